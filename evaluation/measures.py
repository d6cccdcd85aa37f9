"""What can be measured on pictures: line art, distances, attributes, CLIP. None of it knows of a training.

`pictures` are always (n, H, W, 3), uint8.
"""

import contextlib
import json
import math
import re
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


def line_art(pictures: np.ndarray) -> dict[str, np.ndarray]:
    """Every measure of LINE_ART, each (n,)."""
    parts = []
    for start in range(0, len(pictures), 16):  # each takes 50 times its memory
        some = pictures[start : start + 16]
        grey = luma(some)
        ink, bilevel = grey < 0.25, np.abs(grey - 0.5) > 0.38
        gradient = np.hypot(*np.gradient(grey, axis=(1, 2)))
        edges = np.percentile(gradient, 99, axis=(1, 2))
        parts.append([colourfulness(some), ink.mean(axis=(1, 2)), bilevel.mean(axis=(1, 2)), edges])
    return dict(zip(LINE_ART, np.concatenate(parts, axis=1), strict=True))


def rms_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Root mean square of the difference between rows of a and of b. Shape: (n, D), (m, D) -> (n, m)."""
    squares = (a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1) - 2 * a @ b.T
    return np.sqrt(np.maximum(squares, 0) / a.shape[1])


def pairwise_distances(pictures: np.ndarray) -> np.ndarray:
    """Root mean square of the difference in brightness, in [0, 1], of each two pictures. Shape: (n, n).

    Pictures of more than 128 pixels a side are averaged down to that or less.
    """
    block = -(-pictures.shape[1] // 128)
    side = pictures.shape[1] // block
    grey = (luma(picture[: side * block, : side * block]) for picture in pictures)
    flat = np.stack([one.reshape(side, block, side, block).mean(axis=(1, 3)).ravel() for one in grey])
    return rms_distances(flat, flat)


def stroke_directions(pictures: np.ndarray) -> np.ndarray:
    """Histograms of oriented gradients (Dalal & Triggs 2005): in each of 8 x 8 cells, how much stroke runs which way.

    Shape: (n, 512), of length 1 each; 8 directions from 0 to 180 degrees.
    """
    side = 64
    small = [Image.fromarray(p).convert("L").resize((side, side), Image.Resampling.BOX) for p in pictures]
    down, right = np.gradient(np.stack([np.asarray(image, dtype=np.float64) for image in small]), axis=(1, 2))
    direction = (np.arctan2(down, right) % np.pi / np.pi * 8).astype(int) % 8
    strength = np.hypot(down, right)[..., None] * np.eye(8)[direction]
    cells = strength.reshape(len(small), 8, 8, 8, 8, 8).sum(axis=(2, 4)).reshape(len(small), -1)
    return cells / (np.linalg.norm(cells, axis=1, keepdims=True) + 1e-9)


def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The cubic kernel of KID (Binkowski et al. 2018), (a.b / D + 1)^3. Shape: (n, D), (m, D) -> (n, m)."""
    return (a @ b.T / a.shape[1] + 1) ** 3


def kernel_terms(own: np.ndarray, real: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """The terms of the squared kernel distance (MMD) of two sets, normalised by the centre and spread of `real`:
    k(own, own), mean of k(own, real) over `real`, mean of k(real, real) over pairs. Shape: (n, n), (n,), scalar.
    """
    centre, spread = real.mean(axis=0), real.std(axis=0)
    spread = max(float(np.sqrt((spread**2).mean())), 1e-9)
    own, real = (own - centre) / spread, (real - centre) / spread
    among = kernel(real, real)
    among = (among.sum() - np.trace(among)) / (len(real) * max(1, len(real) - 1))
    return kernel(own, own), kernel(own, real).mean(axis=1), float(among)


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


def attribute_network(pixels: int = 64) -> torch.nn.Sequential:
    """A small convolutional network: pictures (n, 3, pixels, pixels) in [-1, 1] to one logit per attribute (n, 7).

    Args:
        pixels: 64 or 128. The weights have the same shapes; the first layer steps over pixels / 64 of them.
    """
    layers, channels = [], 3
    for width, stride in ((24, pixels // 64), (24, 1), (40, 2), (48, 1), (64, 2), (96, 1), (128, 2), (128, 1)):
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
