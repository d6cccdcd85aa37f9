"""Draws the two sheets of faces beside it, in styles other than the demo's: one coloured, one in grey tones.

python tests/styles/write_styles.py      needs the packages of demo/requirements.txt

DiceBear's Open Peeps (Pablo Stanley) and Notionists (Zoish), both CC0 1.0; see demo/LICENSES.md.
"""

import json
import random
import re
import sys
from pathlib import Path

from PIL import Image

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent / "demo"))
import draw_faces  # noqa: E402

ROWS = COLUMNS = 12
PIXELS = 64
SKIN = ("#ffdbb4", "#edb98a", "#d08b5b", "#ae5d29")
CLOTH = ("#e78276", "#8fa7df", "#9ddadb", "#fdea6b", "#78e185")
HAIR = ("#2c1b18", "#e8e1e1", "#d6b370", "#a55728", "#c93305")


def coloured(number: int) -> tuple[Image.Image, str]:
    rng = random.Random(f"coloured {number}")
    options = {"seed": f"coloured {number}", "backgroundColor": ["#b6e3f4"], "inkColor": ["#1c1c3c"]}
    options |= {"skinColor": [rng.choice(SKIN)], "clothingColor": [rng.choice(CLOTH)]}
    options |= {"headContrastColor": [rng.choice(HAIR)], "maskProbability": 0}
    options |= {"accessoriesProbability": 25, "facialHairProbability": 15}
    picture, parts = draw_faces.render("open-peeps", options, 4 * PIXELS)
    return picture, ", ".join(["cartoon, comic bust", *draw_faces.part_words("open-peeps", parts)])


def grey_toned(number: int) -> tuple[Image.Image, str]:
    rng = random.Random(f"grey {number}")
    options = {"seed": f"grey {number}", "inkColor": ["#262626"], "scale": 1.5, "translateY": 12}
    options |= {"paperColor": [rng.choice(("#d6d6d6", "#e4e4e4"))], "gestureProbability": 0}
    options |= {"backgroundColor": [rng.choice(("#8a8a8a", "#9c9c9c", "#7a7a7a"))]}
    options |= {"glassesProbability": 30, "beardProbability": 20}
    picture, parts = draw_faces.render("notionists", options, 4 * PIXELS)
    words = [*draw_faces.part_words("notionists", parts), f"hairstyle {re.sub(r'[^0-9]', '', parts['hairVariant'])}"]
    return picture, ", ".join(["pen drawing, notebook character", *words])


if __name__ == "__main__":
    captions = {}
    for name, draw in (("coloured", coloured), ("grey_toned", grey_toned)):
        sheet, captions[name] = Image.new("RGB", (COLUMNS * PIXELS, ROWS * PIXELS)), []
        for number in range(ROWS * COLUMNS):
            picture, caption = draw(number)
            small = picture.resize((PIXELS, PIXELS), Image.Resampling.LANCZOS)
            sheet.paste(small, (number % COLUMNS * PIXELS, number // COLUMNS * PIXELS))
            captions[name].append(caption)
        if name == "grey_toned":
            sheet = sheet.convert("L").quantize(32)
        else:
            sheet = sheet.quantize(64, dither=Image.Dither.NONE)
        sheet.save(HERE / f"{name}.png", optimize=True)
    (HERE / "captions.json").write_text(json.dumps(captions, indent=0) + "\n", encoding="utf-8")
