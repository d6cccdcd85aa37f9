"""Trains the judge of the demo: does a picture show glasses, earrings, a beard, flowers, freckles, a smile, long hair?

`python demo/train_attributes.py` renders faces of known parts, sends them through the base's VAE as every generated
picture is, trains a small network on them, tests it on faces it has not seen, and writes `demo/attributes/`:
the network, and prompts that ask for each attribute half of the time. `evaluation/` reads both.

`python demo/train_attributes.py demo/.work/base FOLDER` does the same for that base, and writes to FOLDER.
"""

import argparse
import json
import math
import multiprocessing
import random
import sys
import time
from pathlib import Path

import draw_faces
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from train_base import CPU_HAS_BFLOAT16

DEMO_DIR = Path(__file__).resolve().parent
sys.path.insert(0, str(DEMO_DIR.parent))
from evaluation.measures import (  # noqa: E402
    ATTRIBUTE_PIXELS,
    ATTRIBUTES,
    asked_for,
    attribute_network,
    balanced_accuracy,
)

TRAINING, HELD_OUT = 12000, 1500  # faces; every third in colour, as the base draws them, the others in ink
EVEN = {"glasses": 50, "earrings": 50, "beard": 35, "hairAccessories": 50, "freckles": 50}  # percent
SMALL = ("earrings", "freckles")  # sometimes half hidden by hair, or erased by the VAE: nobody can see them there
VISIBLE = 0.3  # share of the brightness range by which the VAE's picture must differ from that without them
EPOCHS, BATCH_SIZE, LEARNING_RATE = 14, 64, 3e-3
BLOCKS, BLOCK = 9, 32  # prompts: in every block each attribute is asked for in half
SEED = 0


def attributes_of(parts: dict) -> list[float]:
    """1, 0 or NaN (in between, or it can't be seen) for each of ATTRIBUTES."""
    who, hair, words = draw_faces.lorelei_words(parts)
    length = draw_faces.HAIR[draw_faces.number(parts["hairVariant"])][1]
    asked = asked_for(", ".join([who, hair, *words]))
    asked[ATTRIBUTES.index("long hair")] = {"long": 1.0, "short": 0.0}.get(length, math.nan)
    return asked


def render_one(seed: str) -> tuple[np.ndarray, list[float]]:
    """(pixels (3, H, W, 3) uint8: the face, without earrings, without freckles; labels) of the face with this seed."""
    rng = random.Random(seed)
    options = draw_faces.lorelei_options(seed, EVEN)
    if rng.random() < 1 / 3:
        options = draw_faces.in_colours(options, draw_faces.draw_palette(rng)[0])
    picture, parts = draw_faces.render_small("lorelei", options, ATTRIBUTE_PIXELS)
    without = [
        draw_faces.render_small("lorelei", options | {f"{part}Probability": 0}, ATTRIBUTE_PIXELS)[0]
        if f"{part}Variant" in parts
        else picture
        for part in SMALL
    ]
    return np.stack([np.asarray(p, dtype=np.uint8) for p in (picture, *without)]), attributes_of(parts)


@torch.no_grad()
def through_vae(vae: AutoencoderKL, pixels: np.ndarray) -> torch.Tensor:
    """What the VAE makes of these pictures. (n, H, W, 3) uint8 -> (n, 3, H, W) in [-1, 1]"""
    parts = torch.from_numpy(pixels).permute(0, 3, 1, 2).split(BATCH_SIZE // 4)
    decoded = [vae.decode(vae.encode(part / 127.5 - 1).latent_dist.mode()).sample for part in parts]
    return torch.cat(decoded).clamp(-1, 1)


def make_faces(vae: AutoencoderKL, kind: str, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(pictures, labels (n, attributes), which of those say yes though it can't be seen (n, attributes), bool)."""
    with multiprocessing.Pool() as pool:
        results = pool.map(render_one, [f"attributes {kind} {index}" for index in range(count)], chunksize=50)
    pictures = through_vae(vae, np.stack([pixels[0] for pixels, _ in results]))
    labels = torch.tensor([labels for _, labels in results])
    unseen = torch.zeros_like(labels, dtype=torch.bool)
    for i, part in enumerate(SMALL, start=1):
        drawn = [number for number, (pixels, _) in enumerate(results) if (pixels[i] != pixels[0]).any()]
        without = pictures.clone()  # the same picture where the part wasn't drawn
        without[drawn] = through_vae(vae, np.stack([results[number][0][i] for number in drawn]))
        difference = (pictures - without).mean(dim=1).abs().amax(dim=(1, 2)) / 2
        attribute = ATTRIBUTES.index(part)
        unseen[:, attribute] = (labels[:, attribute] == 1) & (difference < VISIBLE)
        asked = int((labels[:, attribute] == 1).sum())
        print(f"{part}: can't be seen in {int(unseen[:, attribute].sum())} of {asked} faces that have them ({kind})")
    return pictures, labels, unseen


def disturb(pictures: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Move, tint, fade, blur and add noise: a generated face is never quite where or what a rendered one is."""

    def uniform(low, high):
        return low + (high - low) * torch.rand(len(pictures), 1, 1, 1, generator=generator)

    zoom, right, down = uniform(0.93, 1.07), uniform(-0.08, 0.08), uniform(-0.08, 0.08)
    mirror = torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
    zero = torch.zeros_like(zoom)
    theta = torch.cat([torch.cat([zoom * mirror, zero, right], 3), torch.cat([zero, zoom, down], 3)], 2)[:, 0]
    grid = F.affine_grid(theta, pictures.shape, align_corners=False)
    pictures = F.grid_sample(pictures, grid, padding_mode="border", align_corners=False)
    grey = pictures.mean(dim=1, keepdim=True)
    pictures = grey + (pictures - grey) * uniform(0, 1.2)
    blurred = F.avg_pool2d(F.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    pictures = torch.lerp(pictures, blurred, uniform(0, 0.3))
    tint = torch.randn(len(pictures), 3, 1, 1, generator=generator) * 0.06
    pictures = pictures * uniform(0.75, 1.1) + uniform(-0.1, 0.1) + tint
    noise = torch.randn(pictures.shape, generator=generator) * uniform(0, 0.04)
    return (pictures + noise).clamp(-1, 1)


def train(pictures: torch.Tensor, labels: torch.Tensor) -> torch.nn.Module:
    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    network = attribute_network().train()
    network = network.to(memory_format=torch.channels_last)  # with bfloat16 three times as fast
    steps = EPOCHS * (len(pictures) // BATCH_SIZE)
    as_many = (labels == 0).sum(dim=0) / (labels == 1).sum(dim=0)  # rare attributes must not pay to be denied
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.15)
    for epoch in range(EPOCHS):
        total, order = 0.0, torch.randperm(len(pictures), generator=generator)
        for chosen in order[: len(order) // BATCH_SIZE * BATCH_SIZE].split(BATCH_SIZE):
            known = labels[chosen].isfinite()
            disturbed = disturb(pictures[chosen], generator).contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16, enabled=CPU_HAS_BFLOAT16):
                logits = network(disturbed)
            losses = F.binary_cross_entropy_with_logits(
                logits.float(), labels[chosen].nan_to_num(), reduction="none", pos_weight=as_many
            )
            loss = losses[known].mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() / (len(pictures) // BATCH_SIZE)
        print(time.strftime("%H:%M:%S"), f"epoch {epoch + 1} of {EPOCHS}: loss {total:.4f}", flush=True)
    return network.to(memory_format=torch.contiguous_format).eval()


@torch.no_grad()
def calibrate(network, pictures: torch.Tensor, labels: torch.Tensor) -> None:
    """Move each attribute's bias to where yes and no are told apart best, on training pictures left as they are."""
    logits = torch.cat([network(part) for part in pictures.split(BATCH_SIZE)])
    for attribute, bias in enumerate(network[-1].bias):
        known = labels[:, attribute].isfinite()
        own, truth = logits[known, attribute], labels[known, attribute]
        yes, no = own[truth == 1].sort().values, own[truth == 0].sort().values
        thresholds = torch.linspace(-4, 4, 161)
        missed, denied = torch.searchsorted(yes, thresholds) / len(yes), torch.searchsorted(no, thresholds) / len(no)
        right = 1 - missed + denied
        bias -= thresholds[right >= right.max() - 1e-3].mean()  # the middle of a flat top


def test(network, pictures: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Balanced accuracy of each attribute, on pictures as they come from the VAE."""
    with torch.no_grad():
        says = torch.cat([network(part) for part in pictures.split(BATCH_SIZE)]).numpy() > 0
    return dict(zip(ATTRIBUTES, balanced_accuracy(says, labels.numpy()).tolist(), strict=True))


def write_prompts(path: Path) -> None:
    """Prompts in the words of the 250 faces' captions. In every block each attribute is asked for in half of them."""
    rng, prompts = random.Random(SEED), []
    half = [1.0] * (BLOCK // 2) + [0.0] * (BLOCK // 2)
    by_length = {
        length: [hair for hair in draw_faces.HAIR.values() if hair[1] == length and length in hair[0]]
        for length in ("short", "long")
    }
    covering = [draw_faces.HAIR[style] for style in draw_faces.HIDDEN_EARRINGS]
    showing = {length: [hair for hair in styles if hair not in covering] for length, styles in by_length.items()}
    smiles = [words for words in draw_faces.MOUTHS.values() if any(w in words for w in ("smile", "grin", "smirk"))]
    frowns = [words for words in draw_faces.MOUTHS.values() if words.startswith("sad")]
    for _ in range(BLOCKS):
        columns = [rng.sample(half, BLOCK) for _ in range(5)]
        mouths = iter(rng.sample(half[::2], BLOCK // 2))  # where there is no beard
        long = {beard: iter(rng.sample(half[::2], BLOCK // 2)) for beard in (0.0, 1.0)}
        for glasses, earrings, beard, flowers, freckles in zip(*columns, strict=True):
            smiling, is_long = math.nan if beard else next(mouths), next(long[beard])
            hair, _, who = rng.choice((showing if earrings else by_length)["long" if is_long else "short"])
            chosen = rng.choice(list(draw_faces.GLASSES.values())) if glasses else ""
            words = [] if chosen == "sunglasses" else [rng.choice(list(draw_faces.EYES.values()))]
            words += [] if beard else [rng.choice(smiles if smiling else frowns)]
            words += [chosen] if chosen else []
            words += ["full beard"] if beard else []
            words += [
                word
                for word, asked in (("earrings", earrings), ("flowers in the hair", flowers), ("freckles", freckles))
                if asked
            ]
            who = "bearded man" if beard else who
            opening, ink = rng.choice(draw_faces.MANGA_OPENINGS), rng.choice(draw_faces.MANGA_INK)
            details = ", ".join(words)
            prompt = f"{opening} a {who} with {hair}, {details[0].upper() + details[1:]}, {ink}"
            prompts.append(prompt)
    path.write_text(json.dumps(prompts, indent=0) + "\n", encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", nargs="?", type=Path, default=DEMO_DIR / "base")
    parser.add_argument("folder", nargs="?", type=Path)
    options = parser.parse_args()
    if options.folder is None and options.base.resolve() != DEMO_DIR / "base":
        parser.error("name the folder for that base's judge, too: demo/attributes is of demo/base")
    folder = options.folder or DEMO_DIR / "attributes"
    vae = AutoencoderKL.from_pretrained(options.base / "vae").float().eval().to(memory_format=torch.channels_last)
    folder.mkdir(parents=True, exist_ok=True)
    write_prompts(folder / "prompts.json")

    pictures, labels, unseen = make_faces(vae, "training", TRAINING)
    labels[unseen] = math.nan
    network = train(pictures, labels)
    calibrate(network, pictures, labels)
    weights = {
        name: value.half() if value.is_floating_point() else value for name, value in network.state_dict().items()
    }
    network.load_state_dict(weights)  # what is tested is what is written, in float16

    pictures, labels, unseen = make_faces(vae, "held out", HELD_OUT)
    everything = test(network, pictures, labels)
    labels[unseen] = math.nan
    accuracy = test(network, pictures, labels)
    for what, figures in (("what can be seen", accuracy), ("all that was drawn", everything)):
        print(f"balanced accuracy on held-out renders, {what}:", {name: round(v, 3) for name, v in figures.items()})
    save_file(weights, folder / "classifier.safetensors", {"balanced_accuracy": json.dumps(accuracy)})


if __name__ == "__main__":
    main()
