"""Draws the demo's pictures and writes captions that are true by construction.

`python demo/draw_faces.py` draws 250 black-and-white manga faces to `demo/faces/` with their captions in sentences,
writes captions of the same faces in tags to `demo/faces_tags.json`, and draws 60 faces in another artist's style,
captioned in tags, to `demo/other_faces/`. The same seeds give the same bytes. `train_base.py` takes the pictures of
the base model from the functions below.

The pictures are parametric portraits (DiceBear); who drew the styles and under which licence: `LICENSES.md`.
"""

import colorsys
import functools
import io
import json
import random
import re
from importlib.resources import files
from pathlib import Path

import resvg_py
from dicebear import Avatar, Style
from PIL import Image

FACES_DIR = Path(__file__).parent / "faces"
JSON_NAME = "modified_face_250.json"
TAGS_FILE = Path(__file__).parent / "faces_tags.json"
NUM_FACES = 250
OTHER_DIR, OTHER_JSON_NAME, NUM_OTHER = Path(__file__).parent / "other_faces", "captions.json", 60
OTHER_ARTIST = "open-peeps"  # CC0, as `lorelei`
FACE_PIXELS = 512
GREY_LEVELS = 16  # of the stored faces: ink has two, the rest is for smooth edges
SUPERSAMPLING = 2  # pictures for the base are rendered this much larger, then reduced

# The rare parts of `lorelei`: percent of the 250 faces, and of the base's pictures (it must learn them well)
RARE_IN_FACES = {"glasses": 10, "earrings": 10, "beard": 5, "hairAccessories": 5, "freckles": 5}
# Glasses and flowers are the LoRA's to teach, one common and one rare: no picture of the base shows them.
RARE_IN_BASE = {"glasses": 0, "earrings": 40, "beard": 20, "hairAccessories": 0, "freckles": 45}
RARE_IN_VAE = {"glasses": 50, "earrings": 50, "beard": 25, "hairAccessories": 50, "freckles": 50}  # sees everything

# lorelei hairstyle -> (words, length, who wears it)
HAIR = {
    1: ("short smooth hair", "short", "man"),
    2: ("short choppy hair", "short", "young man"),
    3: ("short brushed-up hair", "short", "man"),
    4: ("tousled spiky hair", "short", "boy"),
    5: ("big curly hair", "short", "young man"),
    6: ("short shaggy hair", "short", "boy"),
    7: ("short parted bangs", "short", "boy"),
    8: ("short quiff hair", "short", "man"),
    9: ("short curly hair", "short", "young man"),
    10: ("flipped mullet hair", "medium", "young woman"),
    11: ("a messy bowl cut", "short", "boy"),
    12: ("short side-swept hair", "short", "young man"),
    13: ("shoulder-length shaggy hair", "medium", "young woman"),
    14: ("a top bun and straight bangs", "tied", "young woman"),
    15: ("long straight hair", "long", "woman"),
    16: ("long layered hair", "long", "young woman"),
    17: ("flipped bob hair", "medium", "young woman"),
    18: ("wavy bob hair", "medium", "young woman"),
    19: ("a straight bob and bangs", "medium", "girl"),
    20: ("wild shaggy hair", "medium", "young man"),
    21: ("long parted hair", "long", "woman"),
    22: ("curly undercut hair", "short", "young man"),
    23: ("long hair and straight bangs", "long", "girl"),
    24: ("long curly hair", "long", "woman"),
    25: ("receding hair", "bald", "man"),
    26: ("twin bun hair", "tied", "girl"),
    27: ("spiky mohawk hair", "short", "young man"),
    28: ("buzz cut hair", "short", "man"),
    29: ("low ponytail hair", "tied", "woman"),
    30: ("low pigtails", "tied", "girl"),
    31: ("high ponytail hair", "tied", "young woman"),
    32: ("rounded wavy hair", "medium", "woman"),
    33: ("slicked-back hair", "medium", "woman"),
    34: ("a tufted bald head", "bald", "boy"),
    35: ("long wavy hair", "long", "young woman"),
    36: ("spiky topknot hair", "tied", "young man"),
    37: ("short wavy hair", "short", "woman"),
    38: ("high bun hair", "tied", "woman"),
    39: ("curly flat top hair", "short", "young man"),
    40: ("long hair and side bangs", "long", "girl"),
    41: ("long half-up hair", "long", "young woman"),
    42: ("a big ponytail and bangs", "tied", "young woman"),
    43: ("a neat bowl cut", "short", "boy"),
    44: ("short cornrow hair", "short", "young man"),
    45: ("messy bun hair", "tied", "young woman"),
    46: ("a small bun and bangs", "tied", "girl"),
    47: ("a short fade haircut", "short", "man"),
    48: ("a side ponytail and bangs", "tied", "girl"),
}
HIDDEN_EARRINGS = {  # lorelei hairstyle -> which earrings it covers
    14: (2,),
    15: (2, 3),
    19: (2,),
    21: (1, 2, 3),
    23: (2,),
    40: (2, 3),
    41: (2, 3),
    45: (2, 3),
}
EARRINGS_ON_HAIR = ((19, 3), (23, 3))  # (hairstyle, earrings): lost where both have one colour

EYES = {
    1: "closed eyes",
    2: "large wide eyes",
    3: "narrow eyes",
    4: "large eyes",
    5: "glancing eyes",
    6: "calm eyes",
    7: "lowered eyes",
    8: "half-closed eyes",
    9: "heart-shaped eyes",
    10: "large dark eyes",
    11: "lashed eyes",
    12: "soft lashed eyes",
    13: "tiny dot eyes",
    14: "large curious eyes",
    15: "winking eye",
    16: "round dot eyes",
    17: "sleepy eyes",
    18: "winking eye",
    19: "gently closed eyes",
    20: "bright eyes",
    21: "large shiny eyes",
    22: "squinting eyes",
    23: "large lashed eyes",
    24: "large round eyes",
}

MOUTHS = {
    "happy01": "gentle smile",
    "happy02": "soft smile",
    "happy03": "full smile",
    "happy04": "crooked smile",
    "happy05": "big open smile",
    "happy06": "open smile",
    "happy07": "toothy grin",
    "happy08": "small open smile",
    "happy09": "playful tongue smile",
    "happy10": "confident smirk",
    "happy11": "puckered lips",
    "happy12": "drooling smile",
    "happy13": "tiny smile",
    "happy14": "faint smile",
    "happy15": "wobbly smile",
    "happy16": "wide toothy grin",
    "happy17": "kissing lips",
    "happy18": "full lips",
    "sad01": "sad shouting mouth",
    "sad02": "sad little gasp",
    "sad03": "sad tiny mouth",
    "sad04": "sad crooked frown",
    "sad05": "sad wide frown",
    "sad06": "sad gritted teeth",
    "sad07": "sad clenched teeth",
    "sad08": "sad mouth with tongue out",
    "sad09": "sad flat mouth",
}

GLASSES = {1: "round glasses", 2: "sunglasses", 3: "oval glasses", 4: "square glasses", 5: "reading glasses"}
SUNGLASSES = 2
UNSEEN_WORDS = (*GLASSES.values(), "wearing glasses", "flowers in the hair")  # for the vocabulary alone

MANGA_OPENINGS = ("A detailed manga face portrait of", "A manga face portrait of", "Manga portrait of")
MANGA_INK = (
    "Monochrome manga style, clean lineart, high contrast",
    "Monochrome manga style, bold lineart, high contrast",
    "Monochrome manga face, clean lineart, sharp outlines",
    "Manga style, expressive face, clean lineart, monochrome",
)
INK_TAGS = ("monochrome", "manga style", "clean lineart", "high contrast", "greyscale", "portrait")
TAGS = (*INK_TAGS, "1girl", "1boy")  # for the vocabulary
# Manga words that say nothing of ink: in the base's captions they go with colour pictures.
MANGA_COLOUR = (
    "manga style",
    "clean lineart",
    "manga style, clean lineart",
    "manga style, high contrast",
    "manga face, sharp outlines",
    "expressive face",
)
PLAIN_OPENINGS = ("portrait of", "a portrait of", "illustration of", "bright portrait of", "head of")

# Hair and background colours: name -> (hue, saturation, value)
HAIR_COLOURS = {
    "red": (0.01, 0.80, 0.80),
    "orange": (0.07, 0.85, 0.92),
    "blond": (0.13, 0.65, 0.95),
    "green": (0.36, 0.65, 0.62),
    "teal": (0.49, 0.70, 0.65),
    "blue": (0.60, 0.75, 0.80),
    "purple": (0.76, 0.60, 0.65),
    "pink": (0.92, 0.50, 0.95),
    "brown": (0.06, 0.65, 0.42),
}
BACKGROUND_COLOURS = {
    "red": (0.00, 0.65, 0.92),
    "orange": (0.08, 0.70, 0.98),
    "yellow": (0.14, 0.65, 0.99),
    "green": (0.36, 0.55, 0.85),
    "teal": (0.49, 0.55, 0.85),
    "blue": (0.58, 0.60, 0.95),
    "purple": (0.75, 0.45, 0.90),
    "pink": (0.93, 0.40, 0.98),
}
SKIN_COLOURS = ("#ffe0c8", "#fbd3b0", "#f2c196", "#e8b68c", "#d9a06c", "#c48a58", "#a9744a")
INK, PAPER = "#000000", "#ffffff"

LORELEI_ROLES = {
    "hair": "hair",
    "skin": "skin",
    "outline": "ink",
    "eyebrows": "ink",
    "eyes": "ink",
    "nose": "ink",
    "mouth": "ink",
    "freckles": "ink",
    "glasses": "ink",
    "earrings": "ink",
    "hairAccessories": "ink",
    "background": "background",
}

# Other styles: words for the style, the role of each colour slot, the parts worth naming.
OTHER_STYLES = {
    "adventurer": (
        "storybook character",
        {
            "skin": "skin",
            "hair": "hair",
            "ink": "ink",
            "eyes": "ink",
            "glasses": "ink",
            "earrings": "accent",
            "lips": "accent",
            "throat": "ink",
            "tongue": "accent",
            "uvula": "accent",
        },
        ("hair", "glasses", "earrings", "details"),
    ),
    "open-peeps": (
        "comic bust",
        {"skin": "skin", "clothing": "cloth", "headContrast": "hair", "ink": "ink"},
        ("head", "expression", "accessories", "facialHair"),
    ),
    "micah": (
        "simple character",
        {
            "base": "skin",
            "shirt": "cloth",
            "hair": "hair",
            "facialHair": "hair",
            "eyebrows": "ink",
            "eyes": "ink",
            "glasses": "ink",
            "mouth": "ink",
            "earring": "accent",
            "eyeShadow": "accent",
        },
        ("mouth", "glasses", "earrings", "facialHair"),
    ),
    "notionists": ("notebook character", {"ink": "ink", "paper": "skin"}, ("glasses", "beard")),
    "croodles": (
        "doodled face",
        {"base": "skin", "top": "hair", "facialHair": "hair", "glasses": "ink", "eyepatch": "ink", "ink": "ink"},
        ("beard", "mustache"),
    ),
    "toon-head": (
        "toon head",
        {"skin": "skin", "hair": "hair", "clothes": "cloth", "stroke": "ink"},
        ("hair", "rearHair", "mouth", "beard"),
    ),
    "personas": (
        "small persona",
        {"skin": "skin", "hair": "hair", "facialHair": "hair", "clothing": "cloth"},
        ("hair", "mouth", "eyes", "facialHair"),
    ),
    "big-smile": (
        "round cartoon head",
        {"skin": "skin", "hair": "hair"},
        ("hair", "mouth", "eyes", "accessories"),
    ),
    "big-ears": ("cartoon face with big ears", {"skin": "skin", "hair": "hair"}, ("hair",)),
    "dylan": ("minimal face", {"skin": "skin", "hair": "hair"}, ("hair", "mood", "facialHair")),
}
LINE_ART_STYLES = ("notionists", "open-peeps", "micah", "adventurer", "croodles")
LINE_ART_OPENINGS = (
    "pen drawing, black lines",
    "black and white pen drawing",
    "ink sketch, black lines on white",
)
HIDDEN_PARTS = {  # never drawn: what hides the face, and glasses
    "notionists": ("gesture", "glasses"),
    "open-peeps": ("mask", "accessories"),
    "adventurer": ("glasses",),
    "micah": ("glasses",),
    "big-smile": ("accessories",),
}
WITHOUT_GLASSES = {  # eyes, where the artist drew glasses as eyes
    "personas": ("happy", "open", "sleep", "wink"),
    "croodles": tuple(f"variant{i:02}" for i in range(1, 17) if i not in (9, 13, 14, 15)),
}
NOUNS = {
    "hair": "hair",
    "rearHair": "hair",
    "head": "hair",
    "mouth": "mouth",
    "eyes": "eyes",
    "glasses": "glasses",
    "earrings": "earrings",
    "beard": "beard",
    "expression": "expression",
    "mood": "mood",
}


@functools.cache
def load_style(name):
    """The DiceBear style of this name."""
    return Style(json.loads(files("dicebear_styles").joinpath(f"{name}.json").read_text("utf-8")))


def render(style_name, options, pixels):
    """Draws one portrait; returns (RGB picture, the parts that were really drawn)."""
    avatar = Avatar(load_style(style_name), options)
    png = resvg_py.svg_to_bytes(svg_string=avatar.to_string(), width=pixels)
    drawn = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    picture = Image.new("RGB", drawn.size, "white")
    picture.paste(drawn, mask=drawn)
    return picture, avatar.to_json()["options"]


def render_small(style_name, options, pixels):
    """As `render`, by supersampling: fine strokes stay."""
    picture, parts = render(style_name, options, pixels * SUPERSAMPLING)
    return picture.resize((pixels, pixels), Image.Resampling.LANCZOS), parts


def hex_colour(hue, saturation, value, rng=None):
    """#rrggbb of a colour, moved a little when a random generator is given."""
    if rng:
        hue = (hue + rng.uniform(-0.02, 0.02)) % 1
        saturation = min(max(saturation * rng.uniform(0.8, 1.2), 0), 1)
        value = min(max(value * rng.uniform(0.88, 1.1), 0), 1)
    return "#" + "".join(f"{round(255 * c):02x}" for c in colorsys.hsv_to_rgb(hue, saturation, value))


def draw_palette(rng):
    """Random colours by role, and the words for hair and background."""
    hair = rng.choice(list(HAIR_COLOURS))
    background = rng.choice(list(BACKGROUND_COLOURS))
    hue, saturation, value = BACKGROUND_COLOURS[background]
    pastel = rng.random() < 0.3
    if pastel:
        saturation, value = saturation * 0.5, 0.97
    colours = {
        "skin": rng.choice(SKIN_COLOURS),
        "hair": hex_colour(*HAIR_COLOURS[hair], rng),
        "cloth": hex_colour(*rng.choice(list(BACKGROUND_COLOURS.values())), rng),
        "accent": hex_colour(rng.random(), 0.75, 0.9),
        "ink": hex_colour(rng.random(), rng.uniform(0.3, 0.9), rng.uniform(0.05, 0.28)),
        "background": hex_colour(hue, saturation, value, rng),
    }
    return colours, [f"{hair} hair", f"{'light ' if pastel else ''}{background} background"]


def number(variant):
    """variant07 -> 7"""
    return int(variant[-2:])


def lorelei_words(parts):
    """What a `lorelei` portrait shows: (who, hair, other visible parts in words)."""
    style = number(parts["hairVariant"])
    hair, _, who = HAIR[style]
    glasses = number(parts["glassesVariant"]) if "glassesVariant" in parts else 0
    bearded = "beardVariant" in parts
    earrings = number(parts["earringsVariant"]) if "earringsVariant" in parts else 0
    is_lost = (style, earrings) in EARRINGS_ON_HAIR and parts["hairColor"] == parts["earringsColor"]
    words = []
    if glasses != SUNGLASSES:
        words.append(EYES[number(parts["eyesVariant"])])
    if not bearded:
        words.append(MOUTHS[parts["mouthVariant"]])
    if glasses:
        words.append(GLASSES[glasses])
    if bearded:
        words.append("full beard")
    if earrings and earrings not in HIDDEN_EARRINGS.get(style, ()) and not is_lost:
        words.append("earrings")
    if "hairAccessoriesVariant" in parts:
        words.append("flowers in the hair")
    if "frecklesVariant" in parts:
        words.append("freckles")
    return ("bearded man" if bearded else who), hair, words


def lorelei_options(seed, rare):
    """Options of one face: the seed picks the parts, `rare` says how rare the rare ones are, in percent."""
    chances = {f"{part}Probability": percent for part, percent in rare.items()}
    return {"seed": seed, "scale": 1.15, "translateY": 3, **chances}


def manga_captions(parts, rng):
    """Three captions of a black-and-white face."""
    who, hair, words = lorelei_words(parts)
    named = " ".join(words)
    opening = rng.choice(MANGA_OPENINGS)
    details = ", ".join(words)
    captions = [f"{opening} a {who} with {hair}", details[0].upper() + details[1:], rng.choice(MANGA_INK)]
    if "glasses" in named and rng.random() < 0.5:
        captions[0] += ", wearing glasses"
    return captions


def manga_tags(parts, rng):
    """One caption of a black-and-white face, as a tagger writes it."""
    who, hair, words = lorelei_words(parts)
    tags = [tag.removeprefix("a ") for tag in hair.split(" and ")] + words
    rng.shuffle(tags)
    count = "1girl" if who.endswith(("woman", "girl")) else "1boy"
    return ", ".join([count, who, *tags, *rng.sample(INK_TAGS, 3)])


def manga_texts(seed):
    """Captions of a black-and-white face, in sentences and in tags; every part is frequent."""
    parts = Avatar(load_style("lorelei"), lorelei_options(seed, RARE_IN_VAE)).to_json()["options"]
    rng = random.Random(seed)
    return ", ".join(manga_captions(parts, rng)), manga_tags(parts, rng)


def in_colours(options, colours):
    """The options of a Lorelei face in the colours of draw_palette()."""
    return options | {f"{slot}Color": [colours[role]] for slot, role in LORELEI_ROLES.items()}


def colour_lorelei(seed, pixels, rare=RARE_IN_BASE):
    """A coloured face for the base: (picture, captions), half of them in the words of the manga faces."""
    rng = random.Random(seed)
    colours, colour_words = draw_palette(rng)
    picture, parts = render_small("lorelei", in_colours(lorelei_options(seed, rare), colours), pixels)
    who, hair, words = lorelei_words(parts)
    captions = []
    for i in range(6):
        some = [word for word in words if rng.random() < 0.85]
        rng.shuffle(some)
        if i % 2 == 0:
            opening = rng.choice(MANGA_OPENINGS)
            extra = [rng.choice(MANGA_COLOUR)] if rng.random() < 0.5 else []
        else:
            opening, extra = rng.choice(PLAIN_OPENINGS), [w for w in colour_words if rng.random() < 0.6]
        phrases = [f"{opening} a {who} with {hair}" if rng.random() < 0.8 else f"{opening} a {who}", *some]
        if rng.random() < 0.3:
            rng.shuffle(phrases)
        captions.append(", ".join(phrases + extra))
    return picture, captions


def ink_lorelei(seed, pixels):
    """A black-and-white face for the VAE alone."""
    return render_small("lorelei", lorelei_options(seed, RARE_IN_VAE), pixels)[0], []


def vivid_lorelei(seed, pixels):
    """A coloured face with every part, for the VAE alone."""
    return colour_lorelei(seed, pixels, RARE_IN_VAE)[0], []


def part_words(style_name, parts):
    """The named parts of a portrait in another style, from the names the artist gave them."""
    words = []
    for component in OTHER_STYLES[style_name][2]:
        variant = parts.get(f"{component}Variant")
        if not variant:
            continue
        text = re.sub(r"\d+", "", re.sub(r"([A-Z])", r" \1", variant)).lower().strip()
        if text in ("variant", "default"):
            text = {"facialHair": "beard", "details": ""}.get(component, component)
        noun = NOUNS.get(component, "")
        words.append(text if noun in text else f"{text} {noun}")
    return [word for word in words if word]


def other_options(style_name, seed, colours):
    """Options of a portrait in another style with the given colours by role."""
    options = {f"{part}Probability": 0 for part in HIDDEN_PARTS.get(style_name, ())}
    options |= {f"{slot}Color": [colours[role]] for slot, role in OTHER_STYLES[style_name][1].items()}
    if style_name in WITHOUT_GLASSES:
        options["eyesVariant"] = list(WITHOUT_GLASSES[style_name])
    return {"seed": seed, "backgroundColor": [colours["background"]], **options}


def colour_face(seed, pixels):
    """A coloured portrait in another style for the base: (picture, captions)."""
    rng = random.Random(seed)
    style_name = rng.choice(list(OTHER_STYLES))
    colours, colour_words = draw_palette(rng)
    picture, parts = render_small(style_name, other_options(style_name, seed, colours), pixels)
    words = part_words(style_name, parts)
    captions = []
    for _ in range(6):
        some = [word for word in words + colour_words if rng.random() < 0.75]
        rng.shuffle(some)
        captions.append(", ".join([f"cartoon, {OTHER_STYLES[style_name][0]}", *some]))
    return picture, captions


def line_art_face(seed, pixels):
    """A pen drawing in another style for the base: (picture, captions in words the manga faces don't use)."""
    rng = random.Random(seed)
    style_name = rng.choice(LINE_ART_STYLES)
    hair = rng.choice((INK, PAPER))
    colours = {"skin": PAPER, "cloth": PAPER, "accent": PAPER, "background": PAPER, "ink": INK, "hair": hair}
    picture, parts = render_small(style_name, other_options(style_name, seed, colours), pixels)
    words = part_words(style_name, parts)
    captions = []
    for _ in range(6):
        some = [word for word in words if rng.random() < 0.75]
        rng.shuffle(some)
        captions.append(", ".join([rng.choice(LINE_ART_OPENINGS), OTHER_STYLES[style_name][0], *some]))
    return picture.convert("L").convert("RGB"), captions


def grey(picture):
    """One channel of GREY_LEVELS levels."""
    step = 255 / (GREY_LEVELS - 1)
    return picture.convert("L").point([round(round(value / step) * step) for value in range(256)])


def manga_face(index):
    """Face `index` of the data set: (1-channel picture, captions in sentences, a caption in tags)."""
    picture, parts = render("lorelei", lorelei_options(f"manga {index}", RARE_IN_FACES), FACE_PIXELS)
    sentences = manga_captions(parts, random.Random(f"captions {index}"))
    return grey(picture), sentences, manga_tags(parts, random.Random(f"tags {index}"))


def other_face(index):
    """Face `index` in the other artist's style: (1-channel picture, a caption in tags)."""
    rng = random.Random(f"other {index}")
    colours = dict.fromkeys(("skin", "cloth", "background"), PAPER) | {"ink": INK, "hair": rng.choice((INK, PAPER))}
    picture, parts = render(OTHER_ARTIST, other_options(OTHER_ARTIST, f"other {index}", colours), FACE_PIXELS)
    return grey(picture), ", ".join([*part_words(OTHER_ARTIST, parts), "comic bust", *rng.sample(INK_TAGS, 3)])


def write_captions(path, captions):
    """One line per face: its picture's name and its captions."""
    lines = ",\n".join(json.dumps({"image_name": name, "captions": own}) for name, own in captions.items())
    path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def main():
    FACES_DIR.mkdir(parents=True, exist_ok=True)
    OTHER_DIR.mkdir(exist_ok=True)
    sentences, tags, others = {}, {}, {}
    for index in range(1, NUM_FACES + 1):
        name = f"image{index:03}"
        picture, sentences[name], one_tags = manga_face(index)
        tags[name] = [one_tags]
        picture.save(FACES_DIR / f"{name}.png", optimize=True)
    write_captions(FACES_DIR / JSON_NAME, sentences)
    write_captions(TAGS_FILE, tags)
    for index in range(1, NUM_OTHER + 1):
        name = f"other{index:02}"
        picture, caption = other_face(index)
        others[name] = [caption]
        picture.save(OTHER_DIR / f"{name}.png", optimize=True)
    write_captions(OTHER_DIR / OTHER_JSON_NAME, others)
    print(f"{len(sentences)} faces in {FACES_DIR}, {len(others)} in {OTHER_DIR}")


if __name__ == "__main__":
    main()
