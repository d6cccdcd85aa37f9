"""Score a finished LoRA: pictures of a fixed set of prompts and seeds, from base and LoRA, against the training faces.

    python evaluate_lora.py --lora demo_output

The exported file is loaded into a fresh diffusers pipeline, as a user would, so what is measured here is what anybody
gets from it; the live model of the training is not involved. Needs no download and no other model. Writes scores.json
and before_after.png beside the LoRA, and prints the table that README.md explains.
"""

import argparse
import io
import json
import math
import re
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from safetensors import safe_open

from base_model import BaseModelError, find_base, load_text_encoder, load_unet, load_vae
from checkpoint import LORA_FILES, write_whole
from dataset import InputError, MangaFaceDataset, encode_faces, encode_image, folder_identity, load_image
from lora_layers import read_lora_weights

HERE = Path(__file__).resolve().parent
TILE = 176  # pixels a side of one picture in a contact sheet
PIXELS_PER_PASS = 2**20  # drawn at a time: 4 pictures of 512 x 512, 8 at the most
MAX_CAPTIONS = 24  # held-out captions that are drawn
MAX_ATTRIBUTE_PROMPTS = 64  # of the demo's 288
MAX_FACES = 500  # training faces that pictures are held against
EXACT_COPY = 0.01  # latents nearer than this are of one picture: copies in a data set must not make copies look usual
RESAMPLES = 300  # of the bootstrap
LINE_ART = {  # measure: the least spread (standard deviation) that a distance is divided by
    "colourfulness": 5.0,
    "ink share": 0.02,
    "bilevel share": 0.02,
    "edge strength": 0.02,
}
POINTS = {"style": 3, "set distance": 2, "adherence": 3, "novelty": 1, "diversity": 1}  # 10 in all


# Measures of line art: each takes pictures (n, H, W, 3) as uint8 and returns one number per picture -------------------


def luma(pictures: np.ndarray) -> np.ndarray:
    """Brightness in [0, 1] (Rec. 601). Shape: (..., 3) -> (...)."""
    return pictures.astype(np.float64) @ np.array([0.299, 0.587, 0.114]) / 255


def colourfulness(pictures: np.ndarray) -> np.ndarray:
    """Hasler & Suesstrunk 2003, "Measuring colourfulness in natural images": 0 grey, 15 slight, 45 quite strong."""
    red, green, blue = np.moveaxis(pictures.astype(np.float64), -1, 0)
    red_green, yellow_blue = red - green, (red + green) / 2 - blue
    spread = np.hypot(red_green.std(axis=(1, 2)), yellow_blue.std(axis=(1, 2)))
    return spread + 0.3 * np.hypot(red_green.mean(axis=(1, 2)), yellow_blue.mean(axis=(1, 2)))


def ink_share(pictures: np.ndarray) -> np.ndarray:
    """Share of pixels darker than a quarter of full brightness, in [0, 1]."""
    return (luma(pictures) < 0.25).mean(axis=(1, 2))


def bilevel_share(pictures: np.ndarray) -> np.ndarray:
    """Share of pixels that are nearly black or nearly white (darker than 0.12, brighter than 0.88), in [0, 1]."""
    return (np.abs(luma(pictures) - 0.5) > 0.38).mean(axis=(1, 2))


def edge_strength(pictures: np.ndarray) -> np.ndarray:
    """99th percentile of the brightness gradient, per pixel: crisp strokes are high, blur is low. In [0, 0.71]."""
    down, right = np.gradient(luma(pictures), axis=(1, 2))
    return np.percentile(np.hypot(down, right), 99, axis=(1, 2))


def measure(pictures: np.ndarray) -> dict[str, np.ndarray]:
    """Every measure of LINE_ART of these pictures (n, H, W, 3) uint8; each (n,)."""
    functions = (colourfulness, ink_share, bilevel_share, edge_strength)
    parts = [pictures[start : start + 16] for start in range(0, len(pictures), 16)]  # each takes 50 times its memory
    each = (np.concatenate([function(part) for part in parts]) for function in functions)
    return dict(zip(LINE_ART, each, strict=True))


# Features and distances ---------------------------------------------------------------------------------------------


def pairwise_distances(pictures: np.ndarray) -> np.ndarray:
    """Root mean square of the difference in brightness, in [0, 1]. Shape: (n, H, W, 3) uint8 -> (n, n).

    Pictures of more than 128 pixels a side are averaged down to that or less.
    """
    block = -(-pictures.shape[1] // 128)
    side = pictures.shape[1] // block
    grey = (luma(picture[: side * block, : side * block]) for picture in pictures)
    flat = np.stack([one.reshape(side, block, side, block).mean(axis=(1, 3)).ravel() for one in grey])
    squares = (flat**2).sum(axis=1)
    return np.sqrt(np.maximum(squares[:, None] + squares - 2 * flat @ flat.T, 0) / flat.shape[1])


def stroke_directions(pictures: np.ndarray) -> np.ndarray:
    """Histograms of oriented gradients (Dalal & Triggs 2005): in each of 8 x 8 cells, how much stroke runs which way.

    Shape: (n, H, W, 3) uint8 -> (n, 512), of length 1 each; 8 directions from 0 to 180 degrees.
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


def balanced_accuracy(says: np.ndarray, truth: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Mean of the share right where the truth is 1 and where it is 0; NaN in `truth` is not asked. Never = 0.5.

    Shape: says (n, a) bool, truth (n, a) of 1, 0 or NaN, weights (n,) -> (a,); NaN where 1 or 0 was never asked.
    """
    weights = np.ones(len(says)) if weights is None else weights
    sides = [((says == bool(value)) * (truth == value), truth == value) for value in (1, 0)]
    with np.errstate(invalid="ignore"):
        return sum((weights @ right) / (weights @ asked) for right, asked in sides) / 2


# Attributes: does the picture show what its prompt asked for? (The demo's faces only) -------------------------------

ATTRIBUTES = ("glasses", "earrings", "beard", "flowers", "freckles", "smile", "long hair")


def asked_for(text: str) -> list[float]:
    """Which of ATTRIBUTES a prompt or caption asks for: 1 yes, 0 no (unmentioned), NaN open. For the demo's words."""
    text = text.lower()
    beard = float("beard" in text)
    smile = math.nan if beard else 0.0 if "sad" in text else 1.0 if re.search("smile|grin|smirk", text) else math.nan
    long = 1.0 if re.search(r"\blong\b", text) else 0.0 if re.search(r"\bshort\b", text) else math.nan
    return [*(float(word in text) for word in ("glasses", "earrings")), beard,
            *(float(word in text) for word in ("flowers", "freckles")), smile, long]  # fmt: skip


def attribute_network() -> torch.nn.Sequential:
    """A small convolutional network: pictures (n, 3, 64, 64) in [-1, 1] to one logit per attribute (n, 7)."""
    layers, channels = [], 3
    for width, stride in ((24, 1), (24, 1), (40, 2), (48, 1), (64, 2), (96, 1), (128, 2), (128, 1)):
        layers += [
            torch.nn.Conv2d(channels, width, 3, stride, padding=1, bias=False),
            torch.nn.BatchNorm2d(width),
            torch.nn.SiLU(),
        ]
        channels = width
    return torch.nn.Sequential(*layers, torch.nn.AdaptiveMaxPool2d(4), torch.nn.Flatten(),
                               torch.nn.Dropout(0.2), torch.nn.Linear(16 * channels, len(ATTRIBUTES)))  # fmt: skip


def load_attribute_network(folder: Path) -> tuple[torch.nn.Module, dict[str, float]]:
    """(the network of demo/train_attributes.py, its balanced accuracy on renders that it was not trained on)."""
    network = attribute_network().eval()
    with safe_open(folder / "classifier.safetensors", "pt") as file:
        network.load_state_dict({name: file.get_tensor(name).float() for name in file.keys()})  # noqa: SIM118
        return network, json.loads(file.metadata()["balanced_accuracy"])


def find_clip(device: torch.device):
    """A CLIP (Radford et al. 2021) in the hub's cache on this machine, as (tokenizer, model on the device), or None."""
    from transformers import CLIPModel, CLIPTokenizer

    for name in ("openai/clip-vit-large-patch14", "openai/clip-vit-base-patch32"):
        try:
            tokenizer = CLIPTokenizer.from_pretrained(name, local_files_only=True)
            return tokenizer, CLIPModel.from_pretrained(name, local_files_only=True).eval().to(device)
        except (OSError, ValueError):
            continue
    return None


@torch.no_grad()
def clip_margins(clip, pictures: np.ndarray, texts: list[str]) -> np.ndarray:
    """CLIP's cosine of each picture and its text, less the mean of its cosines with the other texts. Shape: (n,).

    NaN if there are no other texts.
    """
    tokenizer, model = clip
    size = model.config.vision_config.image_size
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in
                 ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)))  # fmt: skip
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


# The score -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Faces:
    """What generated pictures are held against: all training faces, or m of them, at most MAX_FACES."""

    names: list[str]  # of all
    latents: np.ndarray  # (all, D) float32: posterior means
    chosen: np.ndarray  # (m,) positions among all
    pixels: np.ndarray  # (m, H, W, 3) uint8
    measures: dict[str, np.ndarray]  # each (m,)
    copy_distance: float  # nearer to a face than this is a copy of it; NaN with fewer than two faces
    diversity: float  # mean pairwise distance; NaN with fewer than two faces
    clip_margin: float  # mean of clip_margins, NaN without a CLIP


@dataclass(frozen=True)
class Evidence:
    """All that a score is computed from, per picture, so that a bootstrap needs only other weights.

    n pictures, of which the first p are portraits: drawn as the data set's faces are, not to test attributes.
    """

    pixels: np.ndarray  # (n, H, W, 3) uint8
    texts: list[str]  # (n,) their prompts
    measures: dict[str, np.ndarray]  # each (p,)
    kernels: dict[str, tuple[np.ndarray, np.ndarray, float]]  # feature: k(i, j), mean k(i, faces), mean k(faces, faces)
    nearest: np.ndarray  # (p,) the face, of all, whose latents are nearest, the picture or its mirror image
    nearest_distance: np.ndarray  # (p,)
    distances: np.ndarray  # (p, p) pairwise_distances where the prompt is the same, else NaN
    asked: np.ndarray | None  # (n, a) attributes asked for: 1, 0, NaN
    says: np.ndarray | None  # (n, a) bool: attributes seen
    clip_margins: np.ndarray | None  # (n,)

    @property
    def portraits(self) -> int:
        """p."""
        return len(self.nearest)


def latent_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Root mean square difference of latents. Shape: (n, D), (m, D) -> (n, m)."""
    squares = (a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1) - 2 * a @ b.T
    return np.sqrt(np.maximum(squares, 0) / a.shape[1])


def gather_faces(dataset, constants: dict, vae, vae_identity: str, clip) -> Faces:
    """Read, encode and measure the training faces."""
    chosen = np.linspace(0, len(dataset.train) - 1, min(MAX_FACES, len(dataset.train))).round().astype(int)
    pixels = np.stack([face_pixels(dataset, dataset.train[position]) for position in chosen])
    latents, _ = encode_faces(dataset, constants["cache_dir"], vae_identity, lambda: vae)
    latents = latents[dataset.train].flatten(1).numpy()
    own = latent_distances(latents[chosen], latents)
    to_neighbours = np.where(own > EXACT_COPY, own, np.inf).min(axis=1)
    to_neighbours = to_neighbours[np.isfinite(to_neighbours)]
    texts = [dataset.samples[dataset.train[position]].texts[-1] for position in chosen]
    others = pairwise_distances(pixels)[~np.eye(len(pixels), dtype=bool)]
    return Faces(
        [dataset.samples[index].name for index in dataset.train], latents, chosen, pixels, measure(pixels),
        copy_distance=float(np.median(to_neighbours)) / 2 if len(to_neighbours) else math.nan,
        diversity=float(others.mean()) if len(others) else math.nan,
        clip_margin=float(clip_margins(clip, pixels, texts).mean()) if clip else math.nan,
    )  # fmt: skip


def face_pixels(dataset, index: int) -> np.ndarray:
    """A face as training sees it. Shape: (H, W, 3), uint8."""
    pixels = load_image(dataset.samples[index].path, dataset.resolution)
    return ((pixels + 1) * 127.5).round().permute(1, 2, 0).byte().numpy()


def gather_evidence(pixels: np.ndarray, texts: list[str], portraits: int, faces: Faces, vae, network, clip) -> Evidence:
    """Everything about these pictures (n, H, W, 3), the first `portraits` of them portraits, that the score needs."""
    inputs = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    asked = says = None
    if network is not None:
        asked = np.array([asked_for(text) for text in texts])
        with torch.no_grad():
            small = torch.nn.functional.interpolate(inputs, (64, 64), mode="area")
            says = torch.cat([network(part) for part in small.split(32)]).numpy() > 0
    margins = clip_margins(clip, pixels, texts) if clip else None
    own_pixels, own_texts = pixels[:portraits], texts[:portraits]
    latents, mirrored = (
        torch.stack([encode_image(vae, image)[0].flatten() for image in images]).numpy()
        for images in (inputs[:portraits], inputs[:portraits].flip(3))
    )
    kernels = {}
    for name, own, other in (
        ("latents", latents, faces.latents[faces.chosen]),
        ("strokes", stroke_directions(own_pixels), stroke_directions(faces.pixels)),
    ):
        centre, spread = other.mean(axis=0), other.std(axis=0)
        spread = max(float(np.sqrt((spread**2).mean())), 1e-9)
        own, other = (own - centre) / spread, (other - centre) / spread
        among = kernel(other, other)
        among = (among.sum() - np.trace(among)) / (len(other) * max(1, len(other) - 1))
        kernels[name] = kernel(own, own), kernel(own, other).mean(axis=1), float(among)
    to_faces = np.minimum(latent_distances(latents, faces.latents), latent_distances(mirrored, faces.latents))
    same = np.array([[a == b for b in own_texts] for a in own_texts]) & ~np.eye(portraits, dtype=bool)
    return Evidence(
        pixels, texts, measure(own_pixels), kernels, to_faces.argmin(axis=1), to_faces.min(axis=1),
        np.where(same, pairwise_distances(own_pixels), np.nan), asked, says, margins,
    )  # fmt: skip


def values(evidence: Evidence, faces: Faces, weights: np.ndarray) -> dict[str, float]:
    """The parts in their own units, each picture counted `weights` times; NaN where there is no evidence.

    style: mean over LINE_ART of the 1-D Wasserstein distance to the training faces / max(their spread, a floor);
    set distance ...: unbiased squared kernel distance (MMD, Gretton et al. 2012; KID's kernel) to the training faces;
    adherence: mean balanced accuracy over ATTRIBUTES, or CLIP's margin as a share of that of the training faces;
    novelty: share of pictures that are no copy; diversity: mean distance of the pictures of one prompt / of the faces.
    """
    from scipy.stats import wasserstein_distance

    result, some = {}, weights[: evidence.portraits]
    for name, floor in LINE_ART.items():
        own, real = evidence.measures[name], faces.measures[name]
        result[f"style: {name}"] = wasserstein_distance(own, real, some) / max(real.std(), floor)
    result["style"] = float(np.mean([result[f"style: {name}"] for name in LINE_ART]))
    pairs = np.outer(some, some) * (1 - np.eye(len(some)))  # a picture drawn twice by the bootstrap is no pair
    for name, (own, cross, among) in evidence.kernels.items():
        mean_own = (pairs * own).sum() / pairs.sum() if pairs.sum() else math.nan
        result[f"set distance: {name}"] = float(mean_own + among - 2 * (some @ cross) / some.sum())
    if evidence.says is not None:
        accuracy = balanced_accuracy(evidence.says, evidence.asked, weights)
        result |= {f"adherence: {name}": float(value) for name, value in zip(ATTRIBUTES, accuracy, strict=True)}
        result["adherence"] = float(np.nanmean(accuracy)) if np.isfinite(accuracy).any() else math.nan
    elif evidence.clip_margins is not None and faces.clip_margin > 0:  # else CLIP can't read these faces
        result["adherence"] = float(weights @ evidence.clip_margins / weights.sum() / faces.clip_margin)
    else:
        result["adherence"] = math.nan
    new = float(some @ (evidence.nearest_distance >= faces.copy_distance) / some.sum())
    result["novelty"] = new if math.isfinite(faces.copy_distance) else math.nan
    pairs = pairs * np.isfinite(evidence.distances)
    spread = (pairs * np.nan_to_num(evidence.distances)).sum() / pairs.sum() if pairs.sum() else math.nan
    result["diversity"] = float(spread / faces.diversity)
    return result


def points(own: dict[str, float], base: dict[str, float], by_attributes: bool) -> dict[str, float]:
    """Parts as shares of their points, in [0, 1], and the score: their weighted sum, n/a (NaN) parts left out, of 10.

    style: mean of 1 / (1 + distance); set distance: how much of the base's is gone; adherence: 0.5 is nothing, 1 is
    all; novelty as it is; diversity: all at half of the training faces' own.
    """
    shares = {"style": float(np.mean([1 / (1 + own[f"style: {name}"]) for name in LINE_ART]))}
    gone = [1 - own[name] / base[name] if base[name] > 0 else math.nan for name in own if name.startswith("set dist")]
    shares["set distance"] = float(np.mean(np.clip(gone, 0, 1)))
    shares["adherence"] = 2 * own["adherence"] - 1 if by_attributes else own["adherence"]
    shares |= {"novelty": own["novelty"], "diversity": own["diversity"] / 0.5}
    shares = {name: float(np.clip(shares[name], 0, 1)) for name in POINTS}
    known = [name for name in POINTS if math.isfinite(shares[name])]
    return shares | {"score": 10 * sum(POINTS[n] * shares[n] for n in known) / sum(POINTS[n] for n in known)}


class Judgement:
    """Parts, points and score of some pictures, with the bootstrap's samples of each: over prompts, not pictures."""

    def __init__(self, evidence: Evidence, faces: Faces, base: Evidence):
        prompts, of_prompt = np.unique(evidence.texts, return_inverse=True)
        paired = evidence.texts == base.texts
        rng, ones = np.random.default_rng(0), np.ones(len(evidence.texts))
        samples = []
        for resample in range(RESAMPLES + 1):
            times = rng.multinomial(len(prompts), np.full(len(prompts), 1 / len(prompts))) if resample else None
            weights = ones if times is None else times[of_prompt].astype(float)
            of_base = values(base, faces, weights if paired else np.ones(len(base.texts)))
            own = values(evidence, faces, weights)
            shares = points(own, of_base, evidence.says is not None)
            samples.append(own | {f"points: {name}": share for name, share in shares.items()})
        self.evidence = evidence
        self.value = samples[0]
        self.samples = {name: np.array([sample[name] for sample in samples[1:]]) for name in samples[0]}

    @property
    def score(self) -> float:
        """0 to 10."""
        return self.value["points: score"]

    def mean_measure(self, name: str) -> float:
        """Mean over the portraits of one of LINE_ART."""
        return float(self.evidence.measures[name].mean())

    def interval(self, name: str) -> list[float]:
        """Of 95 % of the bootstrap's samples."""
        known = self.samples[name][np.isfinite(self.samples[name])]
        return np.percentile(known, [2.5, 97.5]).tolist() if len(known) else [math.nan, math.nan]

    def beats(self, other: "Judgement", name: str = "points: score") -> bool:
        """Whether this is higher by more than chance: the interval of the paired difference is above 0."""
        difference = self.samples[name] - other.samples[name]
        return bool(np.percentile(difference[np.isfinite(difference)], 2.5) > 0)

    def as_json(self, faces: Faces) -> dict:
        """Each value {value, interval, n, ...} or "n/a"."""
        prompts = {"portraits": self.evidence.portraits, "all": len(self.evidence.texts)}
        result = {}
        for name in ("points: score", *self.value):
            part = name.removeprefix("points: ")
            if name.startswith("points: ") and part != "score":
                continue
            n = prompts["all" if part.startswith(("adherence", "score")) else "portraits"]
            entry = {"value": self.value[name], "interval": self.interval(name), "n": n}
            if part in POINTS and part in self.value:
                entry |= {"points": POINTS[part] * self.value[f"points: {part}"], "of": POINTS[part]}
            result[part] = entry if math.isfinite(entry["value"]) else "n/a"
        share = self.value["points: set distance"]
        result["set distance"] = "n/a" if not math.isfinite(share) else {
            "value": share, "interval": self.interval("points: set distance"), "n": prompts["portraits"],
            "points": POINTS["set distance"] * share, "of": POINTS["set distance"]}  # fmt: skip
        copies = np.flatnonzero(self.evidence.nearest_distance < faces.copy_distance)
        result["copies"] = [
            {"prompt": self.evidence.texts[i], "face": faces.names[self.evidence.nearest[i]],
             "distance": float(self.evidence.nearest_distance[i])} for i in copies
        ]  # fmt: skip
        return result


def choose_best(epochs: list[int], scored: dict[int, Judgement]) -> tuple[int, str]:
    """(the best of the candidate epochs, why): the highest score; of those it doesn't beat by more than chance, the
    earliest. Without scores the first candidate: the lowest validation loss.
    """
    if len(epochs) == 1:
        return epochs[0], "the only candidate: no later epoch is within a standard error of the lowest validation loss"
    if not scored:
        return epochs[0], "the lowest validation loss (no pictures, so no scores)"
    highest = max(scored, key=lambda epoch: (scored[epoch].score, -epoch))
    best = next(epoch for epoch in sorted(scored) if epoch == highest or not scored[highest].beats(scored[epoch]))
    of = f"of {len(scored)} candidates scored"
    if best == highest:
        return best, f"the highest score {of}: {scored[best].score:.2f}"
    return best, (f"score {scored[best].score:.2f}, which the highest {of}, {scored[highest].score:.2f} of epoch "
                  f"{highest}, beats by no more than chance; the earlier one wins")


# Pictures --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def draw_pictures(
    pipe, prompts: list[dict], seeds: list[int], resolution: int, steps: int, guidance: float
) -> np.ndarray:
    """One picture per prompt, each from its own seed; the VAE decodes in its own precision.

    Args:
        pipe: a StableDiffusionPipeline; its scheduler is replaced by DPM-Solver++ (Lu et al. 2022), same settings.
        prompts: keyword arguments of the pipeline: {"prompt": text}, or embeddings (1, T, D).

    Shape: (prompts, resolution, resolution, 3), uint8.
    """
    from diffusers import DPMSolverMultistepScheduler

    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    pictures, at_once = [], max(1, min(8, PIXELS_PER_PASS // resolution**2))
    for start in range(0, len(prompts), at_once):
        some = prompts[start : start + at_once]
        given = {name: [prompt[name] for prompt in some] for name in some[0]}
        given = {name: torch.cat(each) if torch.is_tensor(each[0]) else each for name, each in given.items()}
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[start : start + at_once]]
        latents = pipe(**given, height=resolution, width=resolution, num_inference_steps=steps,
                       guidance_scale=guidance, generator=generators, output_type="latent").images  # fmt: skip
        for latent in latents.to(pipe.vae.dtype):
            pixels = pipe.vae.decode(latent[None] / pipe.vae.config.scaling_factor).sample[0]
            pictures.append(((pixels.float().cpu().clamp(-1, 1) + 1) * 127.5).round().permute(1, 2, 0).byte().numpy())
    return np.stack(pictures)


def contact_sheet(rows: list[list[np.ndarray]], titles: list[str], captions: list[str]) -> Image.Image:
    """One row of pictures per caption, in two blocks side by side if there are more than four rows."""
    blocks = 2 if len(rows) > 4 else 1
    per_block, columns, text, gap = -(-len(rows) // blocks), len(rows[0]), 40, 16
    block_width = columns * TILE + gap
    sheet = Image.new("RGB", (blocks * block_width + gap, 36 + per_block * (TILE + text)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=13)
    for number, (row, caption) in enumerate(zip(rows, captions, strict=True)):
        left, top = gap + number // per_block * block_width, 36 + number % per_block * (TILE + text)
        if number % per_block == 0:
            for column, title in enumerate(titles):
                draw.text((left + column * TILE + TILE / 2, 18), title, "black", ImageFont.load_default(size=15), "mm")
        for column, picture in enumerate(row):
            tile = Image.fromarray(picture).resize((TILE - 4, TILE - 4), Image.Resampling.LANCZOS)
            sheet.paste(tile, (left + column * TILE + 2, top))
        lines = textwrap.wrap(caption, max(12, int(columns * TILE / 6.6)))[:2]
        draw.multiline_text((left + 2, top + TILE), "\n".join(lines), "black", font, spacing=2)
    return sheet


def write_picture(path: Path, picture: Image.Image) -> None:
    """As PNG, whole or not at all."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    write_whole(path, buffer.getvalue())


def sample_sheet(unet, vae, scheduler, embeddings: torch.Tensor, constants: dict, title: str) -> Image.Image:
    """One picture per prompt from a model in training, with the same seed each time, so sheets can be compared.

    Args:
        embeddings: (1 + prompts, T, D), that of "" first.
        constants: the run's, as a dict.
    """
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline(vae, None, None, unet, scheduler, None, None, requires_safety_checker=False)
    empty, *prompts = embeddings.to(unet.device, unet.dtype).split(1)
    prompts = [{"prompt_embeds": prompt, "negative_prompt_embeds": empty} for prompt in prompts]
    settings = (constants["resolution"], constants["sample_steps"], constants["guidance_scale"])
    pictures = draw_pictures(pipe, prompts, [constants["seed"]] * len(prompts), *settings)
    return contact_sheet([[picture] for picture in pictures], [title], list(constants["sample_prompts"]))


def evaluation_prompts(dataset, constants: dict) -> tuple[list[tuple[str, int]], int]:
    """What is drawn: [(prompt, seed)], and how many of them, the first, are portraits like the data set's.

    sample_prompts, samples_per_prompt seeds each; then captions of held-out faces (of training faces if there are
    none), which ask for what the data set shows as often as it shows it; on the demo then prompts that ask for each
    attribute half of the time.
    """
    seeds = [constants["seed"] + number for number in range(constants["samples_per_prompt"])]
    jobs = [(prompt, seed) for prompt in constants["sample_prompts"] for seed in seeds]
    faces = dataset.validation or dataset.train
    chosen = sorted({round(x) for x in np.linspace(0, len(faces) - 1, min(MAX_CAPTIONS, len(faces)))})
    jobs += [(dataset.samples[faces[index]].texts[-1], seeds[0] + index) for index in chosen]
    portraits = len(jobs)
    if constants["demo"]:
        prompts = json.loads((HERE / "demo" / "attributes" / "prompts.json").read_text(encoding="utf-8"))
        jobs += [(prompt, seeds[0] + index) for index, prompt in enumerate(prompts[:MAX_ATTRIBUTE_PROMPTS])]
    return jobs, portraits


class Evaluation:
    """The base's pictures and the training faces, against which LoRA files can then be judged, one after another.

    Args:
        constants: the run's, as a dict. dataset: its MangaFaceDataset. base: a diffusers folder.
    """

    def __init__(self, constants: dict, dataset, base: Path, device: torch.device):
        import transformers
        from diffusers import StableDiffusionPipeline
        from diffusers.utils import logging

        logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()
        dtype = torch.float16 if device.type == "cuda" else torch.float32
        tokenizer, text_encoder = load_text_encoder(base, device)
        unet, scheduler = load_unet(base, device, dtype)
        self.pipe = StableDiffusionPipeline(load_vae(base, device), text_encoder.to(dtype), tokenizer, unet, scheduler,
                                            None, None, requires_safety_checker=False)  # fmt: skip
        self.constants, self.dataset = constants, dataset
        self.network, self.network_accuracy, self.clip = None, {}, None
        if constants["demo"]:
            self.network, self.network_accuracy = load_attribute_network(HERE / "demo" / "attributes")
        else:
            self.clip = find_clip(device)
        self.faces = gather_faces(dataset, constants, self.pipe.vae, folder_identity(base / "vae"), self.clip)
        self.jobs, self.portraits = evaluation_prompts(dataset, constants)
        self.base = self._evidence(self._draw())
        self.of_base = Judgement(self.base, self.faces, self.base)

    def _draw(self) -> np.ndarray:
        settings = (self.constants["resolution"], self.constants["sample_steps"], self.constants["guidance_scale"])
        return draw_pictures(self.pipe, [{"prompt": text} for text, _ in self.jobs], [seed for _, seed in self.jobs],
                             *settings)  # fmt: skip

    def _evidence(self, pixels: np.ndarray, texts=None, portraits=None) -> Evidence:
        texts = [text for text, _ in self.jobs] if texts is None else texts
        portraits = self.portraits if portraits is None else portraits
        return gather_evidence(pixels, texts, portraits, self.faces, self.pipe.vae, self.network, self.clip)

    def judge(self, lora_file: Path) -> Judgement:
        """Draw the prompts with this LoRA file and score the pictures.

        Raises:
            InputError: it is damaged, or doesn't fit the base; diffusers would take what fits, or nothing.
        """
        try:
            read_lora_weights(self.pipe.unet, lora_file)
        except ValueError as error:
            reason = str(error).splitlines()[0][:300]
            raise InputError(f"{reason}: train it again, or name another folder") from None
        self.pipe.load_lora_weights(str(lora_file.parent), weight_name=lora_file.name, use_safetensors=True)
        try:
            pixels = self._draw()
        finally:
            self.pipe.unload_lora_weights()
        return self.judge_pictures(pixels)

    def judge_pictures(self, pixels: np.ndarray) -> Judgement:
        """Score pictures of the prompts, from wherever they come. Shape: (prompts, H, W, 3), uint8."""
        return Judgement(self._evidence(pixels), self.faces, self.base)

    @torch.no_grad()
    def judge_held_out(self) -> Judgement | None:
        """The score of real faces that were not trained on, sent through the VAE as every picture is; or None."""
        held_out, vae = self.dataset.validation, self.pipe.vae
        if not held_out:
            return None
        pixels = np.stack([face_pixels(self.dataset, index) for index in held_out])
        latents = [encode_image(vae, torch.from_numpy(p).permute(2, 0, 1) / 127.5 - 1)[0] for p in pixels]
        decoded = [vae.decode(latent[None].to(vae.device) / vae.config.scaling_factor).sample[0] for latent in latents]
        pixels = np.stack([
            ((image.cpu().clamp(-1, 1) + 1) * 127.5).round().permute(1, 2, 0).byte().numpy() for image in decoded
        ])  # fmt: skip
        texts = [self.dataset.samples[index].texts[-1] for index in held_out]
        return Judgement(self._evidence(pixels, texts, len(texts)), self.faces, self.base)

    def sheet(self, lora: Judgement) -> Image.Image:
        """Per prompt: the base's picture, the LoRA's, and the training face nearest to that."""
        prompts, each = len(self.constants["sample_prompts"]), self.constants["samples_per_prompt"]
        shown = range(0, each * prompts, each) if prompts else range(min(8, self.portraits))
        rows = [[self.base.pixels[number], lora.evidence.pixels[number],
                 face_pixels(self.dataset, self.dataset.train[lora.evidence.nearest[number]])]
                for number in shown]  # fmt: skip
        return contact_sheet(rows, ["base", "LoRA", "nearest training face"], [self.jobs[n][0] for n in shown])

    def scores(self, lora: Judgement, held_out: Judgement | None) -> dict:
        """What scores.json holds."""
        return {
            "base": self.of_base.as_json(self.faces),
            "lora": lora.as_json(self.faces),
            "held_out_faces": held_out.as_json(self.faces) if held_out else "n/a",
            "classifier": self.network_accuracy or "n/a",
            "pictures": len(self.jobs),
        }

    def table(self, lora: Judgement, held_out: Judgement | None) -> str:
        """Measures, parts and score of base, LoRA and real faces."""
        columns = [self.of_base, lora, *([held_out] if held_out else [])]
        titles = ["base", "LoRA", *(["held-out faces"] if held_out else [])]
        portraits = lora.evidence.portraits
        lines = [f"{f'mean of {portraits} portraits each':28s}{'base':>10}{'LoRA':>10}{'faces':>10}   5-95 % of faces"]
        for name in LINE_ART:
            real = self.faces.measures[name]
            means = [judgement.mean_measure(name) for judgement in columns[:2]] + [real.mean()]
            low, high = np.percentile(real, [5, 95])
            lines.append(f"{name:28s}" + "".join(f"{mean:10.3f}" for mean in means) + f"   {low:.3f} to {high:.3f}")

        def cell(judgement: Judgement, name: str) -> str:
            low, high = judgement.interval(name)
            value = judgement.value[name]
            return f"{value:.2f} ({low:.2f} to {high:.2f})" if math.isfinite(value) else "n/a"

        lines.append(f"{'points, and 95 % intervals':28s}" + "".join(f"{title:>23}" for title in titles))
        for name, of in POINTS.items():
            of_each = [cell(judgement, f"points: {name}") for judgement in columns]
            lines.append(f"{f'{name}, x {of}':28s}" + "".join(f"{text:>23}" for text in of_each))
        lines.append(f"{'quality score, 0 to 10':28s}" + "".join(f"{cell(j, 'points: score'):>23}" for j in columns))
        if self.network is not None:
            judge = "its judge, on unseen renders"
            lines.append(f"{'balanced accuracy':28s}{'base':>10}{'LoRA':>10}   {judge}")
            for name in ATTRIBUTES:
                own = [judgement.value[f"adherence: {name}"] for judgement in columns[:2]]
                own = "".join(f"{value:10.2f}" for value in own)
                lines.append(f"  {name:26s}{own}   {self.network_accuracy[name]:.3f}")
        copies = lora.as_json(self.faces)["copies"]
        named = ", ".join(f"{copy['face']} ({copy['distance']:.2f})" for copy in copies[:5])
        lines.append(f"copies of training faces: {len(copies)} of {portraits} portraits {named}".rstrip())
        return "\n".join(lines)


def write_evaluation(folder: Path, evaluation: Evaluation, lora: Judgement) -> str:
    """Write before_after.png and scores.json into `folder`; returns the table."""
    write_picture(folder / "before_after.png", evaluation.sheet(lora))
    held_out = evaluation.judge_held_out()
    write_whole(folder / "scores.json", json.dumps(evaluation.scores(lora, held_out), indent=1).encode())
    return evaluation.table(lora, held_out)


def read_run(folder: Path) -> tuple[dict, str, Path]:
    """(constants, data fingerprint, base) of a finished training, checked as it checked them: the file may be foreign.

    Raises:
        InputError: it is damaged, or names what isn't here any more.
    """
    import train_manga_lora as trainer

    file = folder / "config.json"
    try:
        run = json.loads(file.read_text(encoding="utf-8"))
        prompts = tuple(run["constants"]["sample_prompts"])
        config = trainer.TrainingConfig(**run["constants"] | {"sample_prompts": prompts})
        trainer.check_config(config)
        base = Path(run["base"])
    except trainer.Stop as stop:
        raise InputError(f"{file}: {stop}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{file} is not that of a finished training ({error!r:.80}): train again") from None
    if not base.is_dir():  # nothing is downloaded at a file's word
        raise InputError(f"{file}: base={run['base']!r} is no folder any more: train again, with --overwrite")
    return run["constants"], str(run.get("data")), find_base(str(base))


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lora", required=True, metavar="FOLDER", help="output folder of a finished training")
    folder = Path(parser.parse_args(arguments).lora)
    lora_file = folder / LORA_FILES[-1]
    if not (folder / "config.json").is_file() or not lora_file.is_file():
        raise InputError(f"--lora {folder} holds no finished training: run train_manga_lora.py first")
    constants, data, base = read_run(folder)
    names = ("dataset_dir", "json_file", "resolution", "weighting", "weight_min", "weight_max", "validation_share")
    dataset = MangaFaceDataset(**{name: constants[name] for name in names})
    if dataset.fingerprint != data:
        raise InputError(f"--lora {folder}: the faces or captions in {constants['dataset_dir']} have changed since the "
                         "training, so a score would mean nothing: put them back")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    evaluation = Evaluation(constants, dataset, base, device)
    print(write_evaluation(folder, evaluation, evaluation.judge(lora_file)))


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a console that lacks a face's name's characters is no reason to stop
    try:
        main(sys.argv[1:])
    except (InputError, BaseModelError, OSError) as error:
        print(f"evaluate_lora.py: {error}", file=sys.stderr)
        sys.exit(2)
