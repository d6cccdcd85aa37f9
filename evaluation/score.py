"""The score: pictures of base and LoRA held against the training faces, in five parts that add up to ten points.

training faces -> References
pictures       -> Features -> values (the parts in their own units) -> points -> Score, with bootstrap intervals
LoRA file      -> Evaluation: draws, scores, writes scores.json and before_after.png
"""

import contextlib
import json
import math
from pathlib import Path

import numpy as np
import torch

from evaluation import measures, pictures
from evaluation.measures import ATTRIBUTES, LINE_ART
from lora_layers import read_lora_weights
from training.base_model import load_text_encoder, load_unet, load_vae
from training.encoding import encode_faces, encode_image, folder_identity
from training.files import InputError, write_atomic
from training.lora_files import fit, put_on
from training.pictures import load_image

MAX_FACES = 500  # training faces that pictures are held against
EXACT_COPY = 0.01  # latents nearer than this are of one picture: copies in a data set must not make copies look usual
STRENGTHS = (0, 0.4, 0.7, 1, 1.3)  # of the LoRA, in the report
RESAMPLES = 300  # of the bootstrap
POINTS = {"style": 3, "set distance": 2, "adherence": 3, "novelty": 1, "diversity": 1}  # 10 in all


def face_pixels(dataset, face: int) -> np.ndarray:
    """A face's centre square, as the pictures that it is compared with are square. Shape: (H, W, 3), uint8."""
    return pictures.to_pixels(load_image(dataset.faces[face].path, *dataset.square_crop(face)))


class References:
    """What pictures are held against: all training faces, or m of them, at most MAX_FACES."""

    def __init__(self, dataset, config, vae, vae_identity: str, clip):
        chosen = np.linspace(0, len(dataset.train) - 1, min(MAX_FACES, len(dataset.train))).round().astype(int)
        faces = [dataset.train[position] for position in chosen]
        crops = [dataset.square_crop(face) for face in range(len(dataset.faces))]
        latents = encode_faces(dataset, config.cache_dir, vae_identity, lambda: vae, crops=crops)
        self.names = [dataset.faces[face].name for face in dataset.train]  # of all
        means = torch.stack([latents[face][0] for face in dataset.train])  # of the VAE's posterior
        self.latents = means.flatten(1).numpy()  # (all, D) float32
        self.pixels = np.stack([face_pixels(dataset, face) for face in faces])  # (m, H, W, 3) uint8
        self.line_art = measures.line_art(self.pixels)  # each (m,)
        strokes = measures.stroke_directions(self.pixels)
        self.sets = {"latents": self.latents[chosen], "strokes": strokes}  # each (m, D); what the set distance compares

        # A picture nearer to a face than half of what faces are apart is a copy of it. NaN with fewer than two faces.
        to_neighbours = measures.rms_distances(self.latents[chosen], self.latents)
        to_neighbours = np.where(to_neighbours > EXACT_COPY, to_neighbours, np.inf).min(axis=1)
        to_neighbours = to_neighbours[np.isfinite(to_neighbours)]
        self.copy_distance = float(np.median(to_neighbours)) / 2 if len(to_neighbours) else math.nan
        others = measures.pairwise_distances(self.pixels)[~np.eye(len(faces), dtype=bool)]
        self.diversity = float(others.mean()) if len(others) else math.nan  # mean distance; NaN as above
        texts = [dataset.texts[dataset.first_text[face]] for face in faces]
        self.clip_margin = float(measures.clip_margins(clip, self.pixels, texts).mean()) if clip else math.nan


class Features:
    """All that a score is computed from, per picture, so that a bootstrap needs only other weights.

    n pictures, of which the first p = `portraits` are drawn as the data set's faces are, not to test attributes.
    network: of load_attribute_network, or None. clip: of find_clip, or None.
    """

    def __init__(self, pixels: np.ndarray, texts: list[str], portraits: int, references, vae, network, clip):
        self.pixels, self.texts, self.portraits = pixels, texts, portraits  # (n, H, W, 3) uint8; (n,) prompts; p
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
        own_pixels, own_images, own_texts = pixels[:portraits], images[:portraits], np.array(texts[:portraits])
        latents, mirrored = (
            torch.stack([encode_image(vae, image)[0].flatten() for image in turned]).numpy()
            for turned in (own_images, own_images.flip(3))
        )
        self.line_art = measures.line_art(own_pixels)  # each (p,)
        sets = {"latents": latents, "strokes": measures.stroke_directions(own_pixels)}
        self.kernels = {name: measures.kernel_terms(sets[name], real) for name, real in references.sets.items()}
        to_faces = np.minimum(*(measures.rms_distances(some, references.latents) for some in (latents, mirrored)))
        self.nearest = to_faces.argmin(axis=1)  # (p,) position in references.names, of the picture or its mirror image
        self.nearest_distance = to_faces.min(axis=1)  # (p,) between their latents
        same = (own_texts[:, None] == own_texts) & ~np.eye(portraits, dtype=bool)
        self.distances = np.where(same, measures.pairwise_distances(own_pixels), np.nan)  # (p, p), of one prompt only
        self.asked = self.seen = self.clip_margins = None
        if network:
            self.asked = np.array([measures.asked_for(text) for text in texts])  # (n, attributes): 1, 0, NaN
            small = torch.nn.functional.interpolate(images, (64, 64), mode="area")
            self.seen = torch.cat([network(part) for part in small.split(32)]).numpy() > 0  # (n, attributes)
        if clip:
            self.clip_margins = measures.clip_margins(clip, pixels, texts)  # (n,)


def values(features: Features, references: References, weights: np.ndarray) -> dict[str, float]:
    """The parts in their own units, picture i counted weights[i] times; NaN where there is nothing to tell by.

    style: mean over LINE_ART of the 1-D Wasserstein distance to the training faces / max(their spread, a floor);
    set distance ...: unbiased squared kernel distance (MMD, Gretton et al. 2012; KID's kernel) to the training faces;
    adherence: mean balanced accuracy over ATTRIBUTES, or CLIP's margin as a share of that of the training faces;
    novelty: share of pictures that are no copy; diversity: mean distance of the pictures of one prompt / of the faces.
    """
    from scipy.stats import wasserstein_distance

    result, some = {}, weights[: features.portraits]
    for name, floor in LINE_ART.items():
        own, real = features.line_art[name], references.line_art[name]
        result[f"style: {name}"] = wasserstein_distance(own, real, some) / max(real.std(), floor)
    result["style"] = float(np.mean(list(result.values())))
    pairs = np.outer(some, some) * (1 - np.eye(len(some)))  # a picture drawn twice by the bootstrap is no pair
    for name, (own, cross, among) in features.kernels.items():
        mean_own = (pairs * own).sum() / pairs.sum() if pairs.sum() else math.nan
        result[f"set distance: {name}"] = float(mean_own + among - 2 * (some @ cross) / some.sum())
    if features.seen is not None:
        accuracy = measures.balanced_accuracy(features.seen, features.asked, weights)
        result |= {f"adherence: {name}": float(value) for name, value in zip(ATTRIBUTES, accuracy, strict=True)}
        result["adherence"] = float(np.nanmean(accuracy)) if np.isfinite(accuracy).any() else math.nan
    elif features.clip_margins is not None and references.clip_margin > 0:  # else CLIP can't read these faces
        result["adherence"] = float(weights @ features.clip_margins / weights.sum() / references.clip_margin)
    else:
        result["adherence"] = math.nan
    new = float(some @ (features.nearest_distance >= references.copy_distance) / some.sum())
    result["novelty"] = new if math.isfinite(references.copy_distance) else math.nan
    pairs = pairs * np.isfinite(features.distances)
    spread = (pairs * np.nan_to_num(features.distances)).sum() / pairs.sum() if pairs.sum() else math.nan
    result["diversity"] = float(spread / references.diversity)
    return result


def points(own: dict[str, float], base: dict[str, float], by_attributes: bool) -> dict[str, float]:
    """Parts as shares of their points, in [0, 1], and the score: their weighted sum, n/a (NaN) parts left out, of 10.

    style: mean of 1 / (1 + distance); set distance: how much of the base's is gone; adherence: 0.5 is nothing, 1 is
    all; novelty as it is; diversity: all at half of the training faces' own.
    """
    gone = [1 - own[name] / base[name] if base[name] > 0 else math.nan for name in own if name.startswith("set dist")]
    shares = {
        "style": np.mean([1 / (1 + own[f"style: {name}"]) for name in LINE_ART]),
        "set distance": np.mean(np.clip(gone, 0, 1)),
        "adherence": 2 * own["adherence"] - 1 if by_attributes else own["adherence"],
        "novelty": own["novelty"],
        "diversity": own["diversity"] / 0.5,
    }
    shares = {name: float(np.clip(share, 0, 1)) for name, share in shares.items()}
    known = [name for name in POINTS if math.isfinite(shares[name])]
    return shares | {"score": 10 * sum(POINTS[n] * shares[n] for n in known) / sum(POINTS[n] for n in known)}


class Score:
    """Parts, points and score of some pictures, with the bootstrap's samples of each: over prompts, not pictures.

    Attributes: value {name: float} and samples {name: (RESAMPLES,)}, where a name is one of `values`, or "points: "
    and one of `points`.
    """

    def __init__(self, features: Features, references: References, base: Features):
        self.features, self.references = features, references
        prompts, of_prompt = np.unique(features.texts, return_inverse=True)
        drawn = np.random.default_rng(0).multinomial(len(prompts), np.full(len(prompts), 1 / len(prompts)), RESAMPLES)
        samples = []
        for times in (np.ones(len(prompts)), *drawn.astype(float)):  # the pictures as they are, then the bootstrap
            weights = times[of_prompt]
            of_base = weights if features.texts == base.texts else np.ones(len(base.texts))
            own = values(features, references, weights)
            shares = points(own, values(base, references, of_base), features.seen is not None)
            samples.append(own | {f"points: {name}": share for name, share in shares.items()})
        self.value = samples[0]
        self.score = self.value["points: score"]  # 0 to 10
        self.samples = {name: np.array([sample[name] for sample in samples[1:]]) for name in samples[0]}

    def interval(self, name: str) -> list[float]:
        """[low, high] of 95 % of the bootstrap's samples."""
        known = self.samples[name][np.isfinite(self.samples[name])]
        return np.percentile(known, [2.5, 97.5]).tolist() if len(known) else [math.nan, math.nan]

    def beats(self, other: "Score", name: str = "points: score") -> bool:
        """Whether this is higher by more than chance: the interval of the paired difference is above 0."""
        difference = self.samples[name] - other.samples[name]
        return bool(np.percentile(difference[np.isfinite(difference)], 2.5) > 0)

    def cell(self, name: str) -> str:
        """A value and its interval, for a table."""
        low, high = self.interval(name)
        return f"{self.value[name]:.2f} ({low:.2f} to {high:.2f})" if math.isfinite(self.value[name]) else "n/a"

    def entry(self, name: str) -> dict | str:
        """A value for scores.json: {value, interval, n pictures, points of how many}, or "n/a"."""
        if not math.isfinite(self.value[name]):
            return "n/a"
        part = name.removeprefix("points: ")
        of_all = part.startswith(("adherence", "score"))
        n = len(self.features.texts) if of_all else self.features.portraits
        entry = {"value": self.value[name], "interval": self.interval(name), "n": n}
        if part in POINTS:
            entry |= {"points": POINTS[part] * self.value[f"points: {part}"], "of": POINTS[part]}
        return entry

    def copies(self) -> list[dict]:
        """Portraits that are copies of a training face: {prompt, face, distance}."""
        own, names, distances = self.features, self.references.names, self.features.nearest_distance
        return [
            {"prompt": own.texts[number], "face": names[own.nearest[number]], "distance": float(distances[number])}
            for number in np.flatnonzero(distances < self.references.copy_distance)
        ]

    def as_json(self) -> dict:
        """Every value as an entry, and the copies. The set distance has two units: of it, the share of its points."""
        own = [name for name in self.value if not name.startswith("points: ")]
        entries = {"score": self.entry("points: score")} | {name: self.entry(name) for name in own}
        return entries | {"set distance": self.entry("points: set distance"), "copies": self.copies()}


class Evaluation:
    """The base's pictures and the training faces, against which LoRA files can then be scored, one after another.

    config and dataset are the run's, base is a diffusers folder. loras: read_lora() of files by other programs, or of
    other runs, which judge() then takes, too. Raises InputError: one doesn't fit the base.
    """

    def __init__(self, config, dataset, base: Path, device: torch.device, loras: dict[Path, dict] | None = None):
        from diffusers.utils import logging

        logging.disable_progress_bar()
        dtype = torch.float16 if device.type == "cuda" else torch.float32
        tokenizer, text_encoder = load_text_encoder(base, device, config.clip_skip)
        unet, scheduler = load_unet(base, device, dtype)
        self.loras = {file: fit(file, parts, unet, text_encoder) for file, parts in (loras or {}).items()}
        vae = load_vae(base, device)
        self.pipe = pictures.build_pipeline(vae, unet, scheduler, tokenizer, text_encoder.to(dtype))
        self.config, self.dataset = config, dataset
        self.network, self.network_accuracy = measures.load_attribute_network() if config.demo else (None, {})
        self.clip = None if config.demo else measures.find_clip(device)
        self.references = References(dataset, config, vae, folder_identity(base / "vae"), self.clip)
        self.jobs, self.portraits = pictures.evaluation_prompts(dataset, config)
        self.texts = [text for text, _ in self.jobs]
        self.of_base = None  # only until it is scored
        self.of_base = self.judge_pictures(self._draw())

    def _draw(self, numbers=None) -> np.ndarray:
        """All jobs' pictures, or those of these numbers."""
        jobs = self.jobs if numbers is None else [self.jobs[number] for number in numbers]
        prompts, seeds = zip(*jobs, strict=True)
        return pictures.draw_pictures(self.pipe, {"prompt": list(prompts)}, list(seeds), self.config)

    @contextlib.contextmanager
    def wearing(self, lora_file: Path):
        """The pipeline with this LoRA file.

        Raises InputError: it is damaged, or doesn't fit the base; diffusers would take what fits, or nothing.
        """
        if lora_file in self.loras:
            put_on(self.pipe, self.loras[lora_file])
        else:
            try:
                read_lora_weights(self.pipe.unet, lora_file)
            except ValueError as error:
                reason = str(error).splitlines()[0][:300]
                raise InputError(f"{reason}: train it again, or name another folder") from None
            self.pipe.load_lora_weights(str(lora_file.parent), weight_name=lora_file.name, use_safetensors=True)
        try:
            yield
        finally:
            self.pipe.unload_lora_weights()

    def judge(self, lora_file: Path) -> Score:
        """Draw the prompts with this LoRA file and score the pictures. Raises InputError: see wearing()."""
        with self.wearing(lora_file):
            pixels = self._draw()
        return self.judge_pictures(pixels)

    def at_strengths(self, lora_file: Path, lora: Score) -> tuple[list[list], list[str], list[str]]:
        """The first two prompts on a sheet with the LoRA at each of STRENGTHS, as contact_sheet() wants it."""
        shown, drawn = list(self.shown())[:2], {0: self.of_base.features.pixels, 1: lora.features.pixels}
        rows = [{strength: pixels[number] for strength, pixels in drawn.items()} for number in shown]
        with self.wearing(lora_file):
            for strength in STRENGTHS:
                if strength not in drawn:
                    self.pipe.set_adapters(self.pipe.get_active_adapters(), strength)
                    for row, picture in zip(rows, self._draw(shown), strict=True):
                        row[strength] = picture
        return [[row[s] for s in STRENGTHS] for row in rows], list(map(str, STRENGTHS)), [self.texts[n] for n in shown]

    def judge_pictures(self, pixels: np.ndarray, texts: list[str] | None = None) -> Score:
        """Score pictures (n, H, W, 3), uint8, wherever they come from: of the prompts, or portraits of these texts."""
        texts, portraits = (self.texts, self.portraits) if texts is None else (texts, len(texts))
        features = Features(pixels, texts, portraits, self.references, self.pipe.vae, self.network, self.clip)
        return Score(features, self.references, self.of_base.features if self.of_base else features)

    def judge_held_out(self) -> Score | None:
        """The score of real faces that were not trained on, sent through the VAE as every picture is; or None."""
        faces = [self.dataset.faces[face] for face in self.dataset.validation]
        if not faces:
            return None
        crops = map(self.dataset.square_crop, self.dataset.validation)
        images = (load_image(face.path, *crop) for face, crop in zip(faces, crops, strict=True))
        latents = torch.stack([encode_image(self.pipe.vae, image)[0] for image in images])
        texts = [self.dataset.texts[self.dataset.first_text[face]] for face in self.dataset.validation]
        return self.judge_pictures(pictures.decode(self.pipe.vae, latents), texts)

    def write(self, folder: Path, lora: Score) -> str:
        """Write before_after.png and scores.json into `folder`; returns the table."""
        pictures.write_picture(folder / "before_after.png", pictures.contact_sheet(*self.rows(lora)))
        held_out = self.judge_held_out()
        scores = {"base": self.of_base.as_json(), "lora": lora.as_json()}
        scores |= {"held_out_faces": held_out.as_json() if held_out else "n/a"}
        scores |= {"classifier": self.network_accuracy or "n/a", "pictures": len(self.jobs)}
        write_atomic(folder / "scores.json", json.dumps(scores, indent=1).encode())
        return self.table(lora, held_out)

    def shown(self) -> range:
        """Which of the pictures are on a sheet: the first of each prompt."""
        prompts, each = len(self.config.sample_prompts), self.config.samples_per_prompt
        return range(0, each * prompts, each) if prompts else range(min(8, self.portraits))

    def rows(self, lora: Score) -> tuple[list[list], list[str], list[str]]:
        """Per prompt: the base's picture, the LoRA's, and the training face nearest to that; for contact_sheet()."""
        shown = self.shown()
        nearest = [face_pixels(self.dataset, self.dataset.train[lora.features.nearest[number]]) for number in shown]
        base, own = self.of_base.features.pixels, lora.features.pixels
        rows = [[base[number], own[number], face] for number, face in zip(shown, nearest, strict=True)]
        titles = ["base", "LoRA", "nearest training face"]
        return rows, titles, [self.texts[number] for number in shown]

    def table(self, lora: Score, held_out: Score | None) -> str:
        """Measures, parts and score of base, LoRA and real faces."""

        def add(title: str, cells, width: int, last: str = "") -> None:
            lines.append(f"{title:28s}" + "".join(f"{cell:>{width}}" for cell in cells) + last)

        lines, both = [], {"base": self.of_base, "LoRA": lora}
        add(f"mean of {self.portraits} portraits each", [*both, "faces"], 10, "   5-95 % of faces")
        for name, real in self.references.line_art.items():
            columns = [*(score.features.line_art[name] for score in both.values()), real]
            low, high = np.percentile(real, [5, 95])
            add(name, [f"{column.mean():.3f}" for column in columns], 10, f"   {low:.3f} to {high:.3f}")
        columns = both | ({"held-out faces": held_out} if held_out else {})
        add("points, and 95 % intervals", columns, 23)
        rows = {name: f"{name}, x {of}" for name, of in POINTS.items()} | {"score": "quality score, 0 to 10"}
        for name, title in rows.items():
            add(title, [score.cell(f"points: {name}") for score in columns.values()], 23)
        if self.network:
            add("balanced accuracy", both, 10, "   its judge, on unseen renders")
            for name in ATTRIBUTES:
                own = [f"{score.value[f'adherence: {name}']:.2f}" for score in both.values()]
                add(f"  {name}", own, 10, f"   {self.network_accuracy[name]:.3f}")
        copies = lora.copies()
        named = ", ".join(f"{copy['face']} ({copy['distance']:.2f})" for copy in copies[:5])
        lines.append(f"copies of training faces: {len(copies)} of {self.portraits} portraits {named}".rstrip())
        return "\n".join(lines)
