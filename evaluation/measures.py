"""What can be measured on pictures: line art, layout, attributes, CLIP. None of it knows of a training.

`pictures` are n of (H, W, 3), uint8, in one array or, where their shapes differ, in a list.
"""

import contextlib
import json
import math
import re
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open

DEMO_ATTRIBUTES = Path(__file__).resolve().parent.parent / "demo" / "attributes"
LINE_ART = {  # measure: the smallest spread (standard deviation) that a distance is divided by
    "colourfulness": 5.0,  # 0 grey, 15 slight, 45 quite strong
    "ink share": 0.02,  # of pixels darker than a quarter of full brightness, in [0, 1]
    "bilevel share": 0.02,  # of pixels nearly black or nearly white (darker than 0.12, brighter than 0.88), in [0, 1]
    "edge strength": 0.02,  # 99th percentile of the brightness gradient, per pixel: low if blurred. In [0, 0.71]
}
STROKES = 512  # length of stroke_directions(), which layout() has first
ATTRIBUTE_PIXELS = 128  # a side of the pictures in which they are looked for
ATTRIBUTES = ("glasses", "earrings", "beard", "flowers", "freckles", "smile", "long hair")  # of the demo's faces


def luma(pictures: np.ndarray) -> np.ndarray:
    """Brightness in [0, 1] (Rec. 601). Shape: (..., 3) -> (...)."""
    return pictures.astype(np.float64) @ np.array([0.299, 0.587, 0.114]) / 255


def colourfulness(pictures: np.ndarray) -> np.ndarray:
    """Hasler & Suesstrunk 2003, "Measuring colourfulness in natural images". Shape: (n,)."""
    red, green, blue = np.moveaxis(pictures.astype(np.float64), -1, 0)
    red_green, yellow_blue = red - green, (red + green) / 2 - blue
    spread = np.hypot(red_green.std(axis=(1, 2)), yellow_blue.std(axis=(1, 2)))
    return spread + 0.3 * np.hypot(red_green.mean(axis=(1, 2)), yellow_blue.mean(axis=(1, 2)))


def line_art(pictures) -> dict[str, np.ndarray]:
    """Every measure of LINE_ART, each (n,), of pictures (H, W, 3) of any shapes."""
    parts = []
    for picture in pictures:
        grey = luma(picture)
        gradient = np.hypot(*np.gradient(grey))
        shares = [(grey < 0.25).mean(), (np.abs(grey - 0.5) > 0.38).mean()]
        parts.append([colourfulness(picture[None])[0], *shares, np.percentile(gradient, 99)])
    return dict(zip(LINE_ART, np.array(parts).T, strict=True))


def squashed(pictures, side: int) -> np.ndarray:
    """Pictures (H, W, 3) of any shapes, averaged to squares. Shape: (n, side, side, 3), uint8."""
    box = Image.Resampling.BOX
    return np.stack([np.asarray(Image.fromarray(picture).resize((side, side), box)) for picture in pictures])


def distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Euclidean distances between rows of a and of b. Shape: (n, D), (m, D) -> (n, m)."""
    squares = (a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1) - 2 * a @ b.T
    return np.sqrt(np.maximum(squares, 0))


def stroke_directions(pictures) -> np.ndarray:
    """Histograms of oriented gradients (Dalal & Triggs 2005): in each of 8 x 8 cells, how much stroke runs which way.

    Shape: (n, 512), of length 1 each; 8 directions from 0 to 180 degrees.
    """
    down, right = np.gradient(luma(squashed(pictures, 64)), axis=(1, 2))
    direction = (np.arctan2(down, right) % np.pi / np.pi * 8).astype(int) % 8
    strength = np.hypot(down, right)[..., None] * np.eye(8)[direction]
    cells = strength.reshape(len(strength), 8, 8, 8, 8, 8).sum(axis=(2, 4)).reshape(len(strength), -1)
    return cells / (np.linalg.norm(cells, axis=1, keepdims=True) + 1e-9)


def layout(pictures) -> list[np.ndarray]:
    """What is where in a picture: its strokes, and its colours seen from afar. Shape: [(n, 512), (n, 768)]."""
    return [stroke_directions(pictures), squashed(pictures, 16).reshape(len(pictures), -1) / 255]


def equal_mix(shapes: list[tuple[int, int]], real: list[tuple[int, int]]) -> np.ndarray:
    """Weights of the real pictures, sum 1, so that each shape (by its aspect) counts as often as among `shapes`.

    A shape that no real picture has counts for the nearest one. Shape: (m,).
    """
    own, of_real = (np.round(np.log([height / width for height, width in some]), 6) for some in (shapes, real))
    counts = Counter(of_real[np.abs(of_real - aspect).argmin()] for aspect in own)
    return np.array([counts[aspect] / (of_real == aspect).sum() for aspect in of_real]) / len(own)


def asked_for(text: str) -> list[float]:
    """Which of ATTRIBUTES a prompt or caption asks for: 1 yes, 0 no (unmentioned), NaN open. For the demo's words."""
    text = text.lower()
    smile = 0.0 if "sad" in text else 1.0 if re.search("smile|grin|smirk", text) else math.nan
    long = 1.0 if re.search(r"\blong\b", text) else 0.0 if re.search(r"\bshort\b", text) else math.nan
    special = {"smile": math.nan if "beard" in text else smile, "long hair": long}
    return [special.get(name, float(name in text)) for name in ATTRIBUTES]


def balanced_accuracy(seen: np.ndarray, truth: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Mean of the share right where the truth is 1 and where it is 0; NaN in `truth` is not asked. Always "no" = 0.5.

    Shape: seen (n, a) bool, truth (n, a) of 1, 0 or NaN, weights (n,) -> (a,); NaN where 1 or 0 was never asked.
    """
    weights = np.ones(len(seen)) if weights is None else weights
    sides = [((seen == bool(value)) * (truth == value), truth == value) for value in (1, 0)]
    with np.errstate(invalid="ignore"):
        return sum((weights @ right) / (weights @ asked) for right, asked in sides) / 2


def attribute_network() -> torch.nn.Sequential:
    """A small convolutional network: pictures (n, 3, 128, 128) in [-1, 1] to one logit per attribute (n, 7)."""
    layers, channels = [], 3
    for width, stride in ((24, 2), (24, 1), (40, 2), (48, 1), (64, 2), (96, 1), (128, 2), (128, 1)):
        convolution = torch.nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        layers += [convolution, torch.nn.BatchNorm2d(width), torch.nn.SiLU()]
        channels = width
    layers += [torch.nn.AdaptiveMaxPool2d(4), torch.nn.Flatten(), torch.nn.Dropout(0.2)]
    return torch.nn.Sequential(*layers, torch.nn.Linear(16 * channels, len(ATTRIBUTES)))


def load_attribute_network() -> tuple[torch.nn.Module, dict[str, float]]:
    """(the network of demo/train_attributes.py, its balanced accuracy on renders that it was not trained on)."""
    network = attribute_network().eval().requires_grad_(False)
    with safe_open(DEMO_ATTRIBUTES / "classifier.safetensors", "pt") as file:
        network.load_state_dict({name: file.get_tensor(name).float() for name in file.keys()})  # noqa: SIM118
        return network, json.loads(file.metadata()["balanced_accuracy"])


def find_clip(device: torch.device):
    """A CLIP (Radford et al. 2021) in the hub's cache on this machine, as (tokenizer, model on the device), or None."""
    from transformers import CLIPModel, CLIPTokenizer

    for name in ("openai/clip-vit-large-patch14", "openai/clip-vit-base-patch32"):
        with contextlib.suppress(OSError, ValueError):
            tokenizer = CLIPTokenizer.from_pretrained(name, local_files_only=True)
            return tokenizer, CLIPModel.from_pretrained(name, local_files_only=True).eval().to(device)
    return None


@torch.no_grad()
def clip_margins(clip, pictures: np.ndarray, texts: list[str]) -> np.ndarray:
    """CLIP's cosine of each picture and its text, less the mean of its cosines with the other texts. Shape: (n,).

    NaN if there are no other texts.
    """
    tokenizer, model = clip
    size = model.config.vision_config.image_size
    mean = torch.tensor((0.48145466, 0.4578275, 0.40821073)).view(3, 1, 1)
    std = torch.tensor((0.26862954, 0.26130258, 0.27577711)).view(3, 1, 1)
    resized = [Image.fromarray(p).resize((size, size), Image.Resampling.BICUBIC) for p in pictures]
    pixels = [(torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 - mean) / std for image in resized]
    different = sorted(set(texts))
    ids = tokenizer(different, padding=True, truncation=True, max_length=77, return_tensors="pt")
    of_texts = model.text_projection(model.text_model(**{k: v.to(model.device) for k, v in ids.items()}).pooler_output)
    parts = (torch.stack(pixels[start : start + 8]).to(model.device) for start in range(0, len(pixels), 8))
    of_pictures = torch.cat([model.visual_projection(model.vision_model(pixel_values=p).pooler_output) for p in parts])
    cosines = torch.nn.functional.normalize(of_pictures) @ torch.nn.functional.normalize(of_texts).T
    cosines = cosines.double().cpu().numpy()
    own = cosines[np.arange(len(texts)), [different.index(text) for text in texts]]
    return own - (cosines.sum(axis=1) - own) / (len(different) - 1 or math.nan)
