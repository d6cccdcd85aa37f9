"""How well a VAE keeps the demo's faces: `python demo/measure_vae.py [folder of a VAE]`.

Prints a table for faces that it was not trained on, and writes pairs (drawn, from the VAE) to
`demo/.work/vae_pairs.png`, to be looked at.
"""

import random
import sys
from pathlib import Path

import draw_faces
import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image

DEMO_DIR = Path(__file__).resolve().parent
sys.path.insert(0, str(DEMO_DIR.parent))
from evaluation.measures import line_art  # noqa: E402

PICTURES, SHOWN = 96, 24
RARE_PARTS = {
    "glasses": "glasses",
    "earrings": "earrings",
    "flowers": "hairAccessories",
    "freckles": "freckles",
    "beard": "beard",
}
PAIRS_FILE = DEMO_DIR / ".work" / "vae_pairs.png"


@torch.no_grad()
def reconstruct(vae, pixels):
    """What the VAE makes of pictures: uint8 (n, H, W, 3) -> the same."""
    device = next(vae.parameters()).device
    parts = torch.from_numpy(pixels).permute(0, 3, 1, 2).split(16)
    decoded = [vae.decode(vae.encode(part.to(device) / 127.5 - 1).latent_dist.mode()).sample.cpu() for part in parts]
    return ((torch.cat(decoded).clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).contiguous().numpy()


def psnr(a, b):
    """Peak signal to noise ratio of each picture, in decibels. Shape: uint8 (n, H, W, 3) twice -> (n,)."""
    errors = np.square(a.astype(np.float64) - b).mean(axis=(1, 2, 3))
    return 10 * np.log10(255**2 / np.maximum(errors, 1e-6))


def draw(kind, pixels):
    """Faces of new seeds, rare parts as often as the VAE saw them: uint8 (PICTURES, H, W, 3)."""
    faces = [getattr(draw_faces, kind)(f"measure {index}", pixels)[0] for index in range(PICTURES)]
    return np.stack([np.asarray(face, dtype=np.uint8) for face in faces])


def part_kept(vae, part, colour, pixels):
    """How much of one part survives: 1 all, 0 nothing.

    Each face is drawn with and without the part. The least-squares slope of the difference between what the
    VAE makes of the two, on the difference between the two as drawn: sum(r d) / sum(d d), the mean over faces in
    which the part is visible.
    """
    with_part, without = [], []
    for index in range(PICTURES // 2):
        seed = f"part {index}"
        options = draw_faces.lorelei_options(seed, dict.fromkeys(draw_faces.RARE_IN_VAE, 0))
        if colour:
            options = draw_faces.in_colours(options, draw_faces.draw_palette(random.Random(seed))[0])
        for pictures, percent in ((with_part, 100), (without, 0)):
            picture, _ = draw_faces.render_small("lorelei", options | {f"{part}Probability": percent}, pixels)
            pictures.append(np.asarray(picture, dtype=np.uint8))
    drawn = np.stack(with_part).astype(np.float64) - np.stack(without)
    kept = reconstruct(vae, np.stack(with_part)).astype(np.float64) - reconstruct(vae, np.stack(without))
    visible = np.abs(drawn).max(axis=(1, 2, 3)) > 60
    slopes = (drawn * kept).sum(axis=(1, 2, 3))[visible] / np.square(drawn).sum(axis=(1, 2, 3))[visible]
    return float(slopes.mean())


def report(vae):
    """The table, as Markdown. The VAE in fp32."""
    pixels = vae.config.sample_size
    rows = ["| | drawn | from the VAE |", "|---|---|---|"]
    ink = draw("ink_lorelei", pixels)
    own = reconstruct(vae, ink)
    drawn, kept = line_art(ink), line_art(own)
    for name in ("edge strength", "bilevel share", "ink share", "colourfulness"):
        rows.append(f"| {name} of ink faces | {drawn[name].mean():.3f} | {kept[name].mean():.3f} |")
    rows.append(f"| PSNR of ink faces, dB | | {psnr(ink, own).mean():.2f} |")
    colour = draw("vivid_lorelei", pixels)
    own_colour = reconstruct(vae, colour)
    rows.append(f"| PSNR of coloured faces, dB | | {psnr(colour, own_colour).mean():.2f} |")
    for name, part in RARE_PARTS.items():
        shares = [part_kept(vae, part, in_colour, pixels) for in_colour in (False, True)]
        rows.append(f"| {name}: share kept in ink, in colour | 1 | {shares[0]:.2f}, {shares[1]:.2f} |")
    PAIRS_FILE.parent.mkdir(exist_ok=True)
    columns = [np.concatenate(pair) for a, b in ((ink, own), (colour, own_colour)) for pair in zip(a, b, strict=True)]
    shown = [*columns[: SHOWN // 2], *columns[PICTURES : PICTURES + SHOWN // 2]]
    lines = [np.concatenate(shown[i : i + SHOWN // 4], axis=1) for i in range(0, SHOWN, SHOWN // 4)]
    Image.fromarray(np.concatenate(lines)).save(PAIRS_FILE)
    return "\n".join(rows)


def main():
    made = [DEMO_DIR / ".work" / "base" / "vae", DEMO_DIR / "base" / "vae"]
    folder = sys.argv[1] if len(sys.argv) > 1 else next(folder for folder in made if folder.exists())
    print(report(AutoencoderKL.from_pretrained(folder).float().eval()))


if __name__ == "__main__":
    main()
