"""The score: 0 is what the base draws, 10 are faces by the artist that were never trained on; both are measured.

training faces, half of the held-out ones     -> References
pictures                                      -> Features -> values: the parts, each in its own units
values of base and of that half, the two ends -> Score: where between them, in points, with bootstrap intervals
LoRA file                                     -> Evaluation: draws, scores, writes scores.json and before_after.png

What is compared are portraits: pictures drawn for the captions of held-out faces, in these faces' shapes.
"""

import contextlib
import json
import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

from dataset import FEWEST
from evaluation import measures, pictures
from evaluation.judge import GRID, Judge
from evaluation.measures import ATTRIBUTES, LINE_ART
from lora_layers import read_lora_weights
from training.base_model import load_text_encoder, load_unet, load_vae
from training.encoding import encode_faces, folder_identity
from training.files import InputError, write_atomic
from training.folder import PICTURES
from training.lora_files import fit, put_on

MAX_FACES = 250  # training faces that pictures are compared with, and that the judge learns from
STRENGTHS = (0, 0.4, 0.7, 1, 1.3)  # of the LoRA, in the report
TOO_FEW = f"too few to judge: a score needs {FEWEST} held-out faces"
EXACT_COPY = 0.01  # faces nearer than this are one picture: copies in a data set must not make copies look usual
PLAIN = {"colourfulness": "colour", "ink share": "dark", "bilevel share": "black or white", "edge strength": "sharp"}
RESAMPLES = 300  # of the bootstrap
POINTS = {"style": 2, "set distance": 3, "coherence": 3, "adherence": 2}  # 10 in all
COSTS = {"novelty": 3, "diversity": 3}  # what the base has, too: nothing to be earned, only lost


class References:
    """What pictures are held against: m training faces, through the VAE as every picture is; and all, for copies.

    Attributes:
        faces, half: numbers of the training faces, and of the held-out ones that are the score's upper end.
        half_pixels: of those, each (H, W, 3), uint8. other, other_pixels: the other half, for a check.
    """

    def __init__(self, dataset, config, vae, vae_identity: str, clip):
        def through_vae(faces: list[int]) -> list[np.ndarray]:
            return [pictures.decode(vae, latents[face][:1])[0] for face in faces]

        latents = encode_faces(dataset, config.cache_dir, vae_identity, lambda: vae)
        chosen = np.linspace(0, len(dataset.train) - 1, min(MAX_FACES, len(dataset.train))).round().astype(int)
        faces = [dataset.train[position] for position in chosen]
        own = through_vae(faces)
        self.half, self.other = dataset.validation[::2], dataset.validation[1::2]
        self.half_pixels, self.other_pixels = through_vae(self.half), through_vae(self.other)
        self.shapes = [dataset.faces[face].shape for face in faces]
        self.line_art = measures.line_art(own)  # each (m,)
        self.scales = [math.sqrt(2 * block.var(axis=0).sum()) + 1e-9 for block in measures.layout(own)]
        self.layout = self.layout_of(own)  # (m, D)
        self.among = measures.distances(self.layout, self.layout)  # (m, m)
        self.side = 4 * GRID if config.resolution >= 4 * GRID else 2 * GRID  # of the pictures that the judge sees
        self.judge = None
        if len(dataset.validation) >= FEWEST:
            self.judge = Judge(*(measures.squashed(some, self.side) for some in (own, self.half_pixels)), config.seed)

        # A picture nearer to a face than half of what faces are apart is a copy of it. NaN with fewer than two faces.
        self.names = [dataset.faces[face].name for face in dataset.train]  # of all
        originals = (pictures.to_pixels(dataset.pixels(face)) for face in dataset.train)
        self.all = np.concatenate([self.layout_of([picture]) for picture in originals])  # (all, D)
        apart = measures.distances(self.all[chosen], self.all)
        apart = np.where(apart > EXACT_COPY, apart, np.inf).min(axis=1)
        apart = apart[np.isfinite(apart)]
        self.copy_distance = float(np.median(apart)) / 2 if len(apart) else math.nan
        texts = [dataset.texts[dataset.first_text[face]] for face in faces]
        self.clip_margin = float(measures.clip_margins(clip, own, texts).mean()) if clip else math.nan

    def layout_of(self, some) -> np.ndarray:
        """layout(), in units in which two faces are about 1 apart. Shape: (n, D), float32."""
        blocks = zip(measures.layout(some), self.scales, strict=True)
        return np.concatenate([block / scale for block, scale in blocks], axis=1).astype(np.float32) / math.sqrt(2)


class Features:
    """All that a score is computed from, per picture, so that a bootstrap needs only other weights.

    n pictures (H, W, 3), of which the first p = `portraits` are compared with faces.
    network: of load_attribute_network, or None. clip: of find_clip, or None.
    """

    def __init__(self, pixels: list[np.ndarray], texts: list[str], portraits: int, references, network, clip):
        self.pixels, self.texts, self.portraits = pixels, texts, portraits
        own = pixels[:portraits]
        self.line_art = measures.line_art(own)  # each (p,)
        layout, mirrored = (references.layout_of([p[:, ::turn] for p in pixels]) for turn in (1, -1))
        to_faces = np.minimum(*(measures.distances(some, references.all) for some in (layout, mirrored)))
        self.nearest = to_faces.argmin(axis=1)  # (n,) position in references.names, of the picture or its mirror image
        self.nearest_distance = to_faces.min(axis=1)  # (n,)
        self.is_copy = self.nearest_distance < references.copy_distance  # (n,)
        self.mix = measures.equal_mix([p.shape[:2] for p in own], references.shapes)  # (m,)
        self.to_faces = measures.distances(layout[:portraits], references.layout) @ self.mix  # (p,) mean distance
        self.apart = measures.distances(layout[:portraits], layout[:portraits])  # (p, p)
        small = measures.squashed(own, references.side)
        can_judge = references.judge and references.judge.is_reliable
        self.passes = references.judge.passes(small) if can_judge else None  # (p,)
        self.asked = self.seen = self.clip_margins = None
        if network:
            self.asked = np.array([measures.asked_for(text) for text in texts])  # (n, attributes): 1, 0, NaN
            images = torch.from_numpy(measures.squashed(pixels, measures.ATTRIBUTE_PIXELS)).permute(0, 3, 1, 2)
            images = images.float() / 127.5 - 1
            self.seen = torch.cat([network(part) for part in images.split(32)]).numpy() > 0  # (n, attributes)
        if clip:
            self.clip_margins = measures.clip_margins(clip, own, texts[:portraits])  # (p,)


def values(features: Features, references: References, weights: np.ndarray) -> dict[str, float]:
    """The parts in their own units, picture i counted weights[i] times; NaN where there is nothing to tell by.

    style ...: 1-D Wasserstein distance of a LINE_ART measure to that of the faces / max(their spread, a floor);
    set distance: energy distance (Szekely & Rizzo 2013) of the layouts, 2 E|x - y| - E|x - x'| - E|y - y'|, unbiased;
    coherence: share that the judge passes; adherence: mean balanced accuracy over ATTRIBUTES, 0 for chance and 1 for
    all, or CLIP's margin as a share of the faces'; novelty: share of pictures that are no copy; diversity: mean
    distance of pictures of different prompts / of faces. Faces count in the pictures' mix of shapes.
    """
    from scipy.stats import wasserstein_distance

    result, some, mix = {}, weights[: features.portraits], features.mix
    for name, floor in LINE_ART.items():
        own, real = features.line_art[name], references.line_art[name]
        centre = mix @ real
        spread = max(math.sqrt(mix @ (real - centre) ** 2), floor)
        result[f"style: {name}"] = wasserstein_distance(own, real, some, mix) / spread
    units = units_of(features.texts[: features.portraits])
    pairs = np.outer(some, some) * (units[:, None] != units)  # what the bootstrap draws twice is no pair
    apart = (pairs * features.apart).sum() / pairs.sum() if pairs.sum() else math.nan
    among = mix @ references.among @ mix / (1 - mix @ mix) if mix @ mix < 1 else math.nan
    result["set distance"] = float(2 * (some @ features.to_faces) / some.sum() - apart - among)
    result["coherence"] = math.nan if features.passes is None else float(some @ features.passes / some.sum())
    result["adherence"] = math.nan
    if features.seen is not None:
        accuracy = 2 * measures.balanced_accuracy(features.seen, features.asked, weights) - 1
        result |= {f"adherence: {name}": float(value) for name, value in zip(ATTRIBUTES, accuracy, strict=True)}
        result["adherence"] = float(np.nanmean(accuracy)) if np.isfinite(accuracy).any() else math.nan
    elif features.clip_margins is not None and references.clip_margin > 0:  # else CLIP can't read these faces
        result["adherence"] = float(some @ features.clip_margins / some.sum() / references.clip_margin)
    new = float(some @ ~features.is_copy[: features.portraits] / some.sum())
    result["novelty"] = new if math.isfinite(references.copy_distance) else math.nan
    result["diversity"] = float(apart / among)
    return result


def nearness(own: dict[str, float], base: dict[str, float]) -> dict[str, float]:
    """Of each part how near it is to the faces: at most 1; of the two distances the base's is 0.

    Roots of distances, so that the last steps towards the faces count as much as the first away from the base. A
    measure in which the base is far off is taken in units of its distance: else it alone would be the style.
    """

    def style(of: dict[str, float]) -> float:
        return math.sqrt(np.mean([(of[name] / max(1, base[name])) ** 2 for name in own if name.startswith("style: ")]))

    of_sets = math.sqrt(max(0, own["set distance"]) / base["set distance"]) if base["set distance"] > 0 else math.nan
    result = {"style": 1 - math.sqrt(style(own) / style(base)), "set distance": 1 - of_sets}
    return result | {name: float(np.minimum(1, own[name])) for name in ("coherence", "adherence", *COSTS)}  # NaN stays


class Ends:
    """What is 0 and what is full points: the base's pictures, and half of the held-out faces.

    Attributes: base, faces: their nearness(). evidence: the parts in which they differ by more than chance.
    """

    def __init__(self, base: Features, faces: Features, references: References):
        def sampled(features: Features) -> tuple[dict, dict]:
            near = [nearness(values(features, references, w), self.of_base) for w in bootstrap(features)]
            return near[0], {name: np.array([one[name] for one in near[1:]]) for name in near[0]}

        self.of_base = values(base, references, np.ones(len(base.texts)))
        (self.base, of_base), (self.faces, of_faces) = sampled(base), sampled(faces)
        self.evidence = []
        for name in POINTS:
            gap = of_faces[name] - of_base[name]
            gap = gap[np.isfinite(gap)]
            if math.isfinite(self.base[name] + self.faces[name]) and len(gap) and np.percentile(gap, 2.5) > 0:
                self.evidence.append(name)

    @property
    def maximum(self) -> int:
        """Points that can be had: a part without evidence earns none."""
        return sum(POINTS[name] for name in self.evidence)

    def shares(self, own: dict[str, float]) -> dict[str, float]:
        """Of values() each part's share of its points, in [-1, 1], and "score", their sum in points.

        Between the ends in proportion; what is worse than both, or in a cost worse than either, is lost in full.
        """
        near, shares = nearness(own, self.of_base), {}
        for name in POINTS | COSTS:
            low, high = self.base[name], self.faces[name]
            if name in self.evidence and near[name] > low:
                shares[name] = min(1, (near[name] - low) / (high - low))
            else:
                start = low if name in self.evidence else float(np.fmin(low, high))  # fmin: of what is known
                shares[name] = float(np.clip(near[name] - start, -1, 0))  # NaN stays
        return shares | {"score": sum(of * shares[n] for n, of in (POINTS | COSTS).items() if math.isfinite(shares[n]))}


def units_of(texts: list[str]) -> np.ndarray:
    """What a bootstrap draws: prompts with all their pictures, or where all prompts are one, pictures. Shape: (n,)."""
    return np.unique(texts, return_inverse=True)[1] if len(set(texts)) > 1 else np.arange(len(texts))


def bootstrap(features: Features) -> list[np.ndarray]:
    """How often each picture counts: once, then RESAMPLES times as units are drawn anew, of portraits and of the other
    pictures apart. Shape: each (n,).
    """
    rng, drawn = np.random.default_rng(0), []
    for texts in filter(None, (features.texts[: features.portraits], features.texts[features.portraits :])):
        units = units_of(texts)
        count = int(units.max()) + 1
        drawn.append(rng.multinomial(count, np.full(count, 1 / count), RESAMPLES)[:, units])
    return [np.ones(len(features.texts)), *np.concatenate(drawn, axis=1).astype(float)]


class Score:
    """Parts, points and score of some pictures, with the bootstrap's samples of each: over prompts, not pictures.

    Attributes: value {name: float} and samples {name: (RESAMPLES,)}, where a name is one of `values`, or "points: "
    and one of `Ends.shares`. Both are empty, and score is None, where there are no ends.
    """

    def __init__(self, features: Features, references: References, ends: Ends | None):
        self.features, self.references, self.ends = features, references, ends
        self.value, self.samples, self.score, self.maximum = {}, {}, None, None
        if ends is None:
            return
        samples = []
        for weights in bootstrap(features):
            own = values(features, references, weights)
            samples.append(own | {f"points: {name}": share for name, share in ends.shares(own).items()})
        self.value, self.maximum = samples[0], ends.maximum
        self.score = self.value["points: score"]  # points of `maximum`
        self.samples = {name: np.array([sample[name] for sample in samples[1:]]) for name in samples[0]}

    def __str__(self) -> str:
        """The score in words: "7.1 of 8, without adherence", "worse than the base (-1.2)"."""
        if self.score is None:
            return TOO_FEW
        if self.score < -0.05:
            return f"worse than the base ({self.score:.1f})"
        without = ", ".join(name for name in POINTS if name not in self.ends.evidence)
        return f"{abs(self.score):.1f} of {self.maximum}{f', without {without}' if without else ''}"

    def interval(self, name: str) -> list[float]:
        """[low, high] of 95 % of the bootstrap's samples."""
        known = self.samples[name][np.isfinite(self.samples[name])]
        return np.percentile(known, [2.5, 97.5]).tolist() if len(known) else [math.nan, math.nan]

    def beats(self, other: "Score", errors: float = 2) -> bool:
        """Whether this score is higher by more than so many standard errors of their paired difference."""
        difference = self.samples["points: score"] - other.samples["points: score"]
        return self.score - other.score > errors * float(difference.std())

    def cell(self, part: str) -> str:
        """A part's points and their interval, for a table."""
        of = (POINTS | COSTS).get(part, 1)
        share, (low, high) = self.value[f"points: {part}"], self.interval(f"points: {part}")
        return f"{of * share:.1f} ({of * low:.1f} to {of * high:.1f})" if math.isfinite(share) else "n/a"

    def entry(self, name: str) -> dict | str:
        """A value for scores.json: {value, interval, n pictures, points, of how many}, or "n/a"."""
        if not math.isfinite(self.value[name]):
            return "n/a"
        n = len(self.features.texts) if name.startswith("adherence") else self.features.portraits
        return {"value": self.value[name], "interval": self.interval(name), "n": n} | self.points(name)

    def points(self, name: str) -> dict:
        """{points, of}: what a part earns, of what it could; of a cost both are 0 or less."""
        if name not in POINTS | COSTS:
            return {}
        of = (POINTS | COSTS)[name]
        points = {"points": of * self.value[f"points: {name}"], "of": of if name in self.ends.evidence else 0}
        return points | ({"of": -of} if name in COSTS else {})

    def copies(self) -> list[dict]:
        """Pictures that are copies of a training face: {prompt, face, distance}."""
        own, names, away = self.features, self.references.names, self.features.nearest_distance
        copied = np.flatnonzero(own.is_copy)
        return [{"prompt": own.texts[n], "face": names[own.nearest[n]], "distance": float(away[n])} for n in copied]

    def as_json(self) -> dict:
        """The score with its maximum, every value as an entry, and the copies."""
        if self.score is None:
            return {"score": TOO_FEW, "copies": self.copies()}
        score = {"value": self.score, "interval": self.interval("points: score"), "n": self.features.portraits}
        score |= {"maximum": self.maximum, "without": [n for n in POINTS if n not in self.ends.evidence]}
        style = {"value": float(np.mean([self.value[f"style: {name}"] for name in LINE_ART])), **self.points("style")}
        entries = {name: self.entry(name) for name in self.value if not name.startswith("points: ")}
        return {"score": score, "style": style} | entries | {"copies": self.copies()}


class Evaluation:
    """The base's pictures and the faces, against which LoRA files can then be scored, one after another.

    config and dataset are the run's, base is a diffusers folder. loras: read_lora() of files by other programs, or of
    other runs, which judge() then takes, too. is_sparing: with less memory.

    Raises InputError: one of them doesn't fit the base.
    """

    def __init__(self, config, dataset, base: Path, device: torch.device, loras=None, is_sparing: bool = False):
        from diffusers.utils import logging

        logging.disable_progress_bar()
        dtype = torch.float16 if device.type == "cuda" else torch.float32
        tokenizer, text_encoder = load_text_encoder(base, device, config.clip_skip)
        unet, scheduler = load_unet(base, device, dtype)
        self.loras = {file: fit(file, parts, unet, text_encoder) for file, parts in (loras or {}).items()}
        vae = load_vae(base, device)
        self.pipe = pictures.build_pipeline(vae, unet, scheduler, tokenizer, text_encoder.to(dtype), is_sparing)
        self.config, self.dataset, self.is_sparing = config, dataset, is_sparing
        self.network, self.network_accuracy = measures.load_attribute_network() if config.demo else (None, {})
        self.clip = None if config.demo else measures.find_clip(torch.device("cpu") if is_sparing else device)
        self.references = References(dataset, config, vae, folder_identity(base / "vae"), self.clip)
        self.jobs = pictures.evaluation_jobs(dataset, config)
        self.ends, own = None, self._features(self._draw_all([]))
        if self.references.judge:
            half = self._features(self.references.half_pixels, self._captions(self.references.half))
            self.ends = Ends(own, half, self.references)
        self.of_base = Score(own, self.references, self.ends)

    def _captions(self, faces: list[int]) -> list[str]:
        return [self.dataset.texts[self.dataset.first_text[face]] for face in faces]

    def _draw(self, numbers: Iterable[int]) -> list[np.ndarray]:
        """The jobs' pictures of these numbers."""
        jobs, numbers = self.jobs, list(numbers)
        chosen = ([of_all[number] for number in numbers] for of_all in (jobs.prompts, jobs.seeds, jobs.shapes))
        prompts, seeds, shapes = chosen
        return pictures.draw_pictures(self.pipe, {"prompt": prompts}, seeds, shapes, self.config, self.is_sparing)

    def _draw_all(self, drawn: list[np.ndarray]) -> list[np.ndarray]:
        """Of all jobs, given the first ones' pictures. In parts, the same ones each time: what passes together makes
        results differ by rounding.
        """
        for end in (min(FEWEST, self.jobs.portraits), self.jobs.portraits, len(self.jobs.prompts)):
            drawn = drawn + (self._draw(range(len(drawn), end)) if end > len(drawn) else [])
        return drawn

    def _features(self, pixels: list[np.ndarray], texts: list[str] | None = None, are_prompts: bool = True) -> Features:
        texts, portraits = (self.jobs.prompts, self.jobs.portraits) if texts is None else (texts, len(texts))
        readers = (self.network, self.clip) if are_prompts else (None, None)
        return Features(pixels, texts, portraits, self.references, *readers)

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

    def judge(self, lora_file: Path, drawn: Score | None = None) -> Score:
        """Draw the prompts with this LoRA file and score the pictures. drawn: what judge_portraits() made of the file.

        Raises InputError: see wearing().
        """
        with self.wearing(lora_file):
            return self.judge_pictures(self._draw_all(drawn.features.pixels if drawn else []))

    def judge_portraits(self, lora_file: Path, first: Score | None = None) -> Score:
        """The score of the portraits alone: all that is compared with faces, so enough to compare LoRA files by.

        first: the score of the first FEWEST of them, with which candidates that will hardly win are known. Without it,
        that score is returned.
        """
        drawn, end = (first.features.pixels, self.jobs.portraits) if first else ([], min(FEWEST, self.jobs.portraits))
        with self.wearing(lora_file):
            pixels = drawn + self._draw(range(len(drawn), end))
        return self.judge_pictures(pixels, self.jobs.prompts[:end])

    def at_strengths(self, lora_file: Path, lora: Score, is_sparing=False) -> tuple[list[list], list[str], list[str]]:
        """A sheet's first prompt and the first sample prompt with the LoRA at STRENGTHS; for contact_sheet()."""
        self.is_sparing = self.is_sparing or is_sparing
        shown = list(dict.fromkeys([self.shown()[0], *self.jobs.samples[:1]]))
        drawn = {0: self.of_base.features.pixels, 1: lora.features.pixels}
        rows = [{strength: pixels[number] for strength, pixels in drawn.items()} for number in shown]
        with self.wearing(lora_file):
            for strength in STRENGTHS:
                if strength not in drawn:
                    self.pipe.set_adapters(self.pipe.get_active_adapters(), strength)
                    for row, picture in zip(rows, self._draw(shown), strict=True):
                        row[strength] = picture
        captions = [self.jobs.prompts[number] for number in shown]
        return [[row[strength] for strength in STRENGTHS] for row in rows], list(map(str, STRENGTHS)), captions

    def judge_pictures(self, pixels: list, texts: list[str] | None = None, are_prompts: bool = True) -> Score:
        """Score pictures (H, W, 3), uint8, wherever they come from: of the jobs, or portraits of these texts.

        are_prompts: else the texts only tell pictures apart, and adherence is not known.
        """
        return Score(self._features(pixels, texts, are_prompts), self.references, self.ends)

    def judge_held_out(self) -> Score | None:
        """The score of real faces, of the half that is not the score's upper end: a check. None without ends."""
        if self.ends is None:
            return None
        return self.judge_pictures(self.references.other_pixels, self._captions(self.references.other))

    def write(self, folder: Path, lora: Score) -> str:
        """Write before_after.png, all pictures and scores.json into `folder`; returns the table."""
        pictures.write_picture(folder / "before_after.png", pictures.contact_sheet(*self.rows(lora)))
        for name, score in {"base": self.of_base, "lora": lora}.items():
            pictures.write_album(folder / PICTURES / name, self.jobs.prompts, score.features.pixels)
        held_out = self.judge_held_out()
        scores = {"base": self.of_base.as_json(), "lora": lora.as_json()}
        scores |= {"held_out_faces": held_out.as_json() if held_out else "n/a"}
        scores |= {"classifier": self.network_accuracy or "n/a", "pictures": len(self.jobs.prompts)}
        write_atomic(folder / "scores.json", json.dumps(scores, indent=1).encode())
        return self.table(lora, held_out)

    def shown(self) -> list[int]:
        """Which of the pictures are on a sheet: of up to OWN_WORDS held-out faces' captions, then of sample_prompts."""
        own = min(pictures.OWN_WORDS, self.jobs.portraits) if self.dataset.validation else 0
        each = self.config.samples_per_prompt
        chosen = [*range(own), *(first + turn for first in self.jobs.samples for turn in range(each))]
        return chosen or list(range(min(8, len(self.jobs.prompts))))

    def rows(self, lora: Score) -> tuple[list[list], list[str], list[str]]:
        """Per prompt: the face whose caption it is, if it is one's; the base's picture, the LoRA's, and the training
        face nearest to that; for contact_sheet().
        """

        def pixels_of(face: int) -> np.ndarray:
            return pictures.to_pixels(self.dataset.pixels(face))

        rows, captions, base, own = [], [], self.of_base.features.pixels, lora.features.pixels
        for number in self.shown():
            prompt, is_portrait = self.jobs.prompts[number], number < self.jobs.portraits
            real = pixels_of(self.jobs.faces[number]) if is_portrait and self.dataset.validation else None
            nearest = pixels_of(self.dataset.train[lora.features.nearest[number]])
            rows.append([real, base[number], own[number], nearest])
            captions.append(prompt if is_portrait else pictures.titled(prompt, self.config))
        titles = ["real face", "base", "LoRA", "nearest training face"]
        if all(row[0] is None for row in rows):
            rows, titles = [row[1:] for row in rows], titles[1:]
        return rows, titles, captions

    def table(self, lora: Score, held_out: Score | None, name: str = "LoRA") -> str:
        """Measures, parts and score of base, LoRA (or whatever has this name) and real faces."""

        def add(title: str, cells, width: int, last: str = "") -> None:
            lines.append(f"{title:28s}" + "".join(f"{cell:>{width}}" for cell in cells) + last)

        lines, both = [], {"base": self.of_base, name: lora}
        copies, drawn = lora.copies(), len(self.jobs.prompts)
        named = ", ".join(f"{copy['face']} ({copy['distance']:.2f})" for copy in copies[:5])
        last = f"copies of training faces: {len(copies)} of {drawn} pictures {named}".rstrip()
        if held_out is None:
            return f"{TOO_FEW}\n{last}"
        add(f"mean of {self.jobs.portraits} portraits each", [*both, "faces"], 10, "   5-95 % of faces")
        for name, real in self.references.line_art.items():
            columns = [*(score.features.line_art[name] for score in both.values()), real]
            low, high = np.percentile(real, [5, 95])
            add(PLAIN[name], [f"{column.mean():.3f}" for column in columns], 10, f"   {low:.3f} to {high:.3f}")
        columns = both | {"held-out faces": held_out}
        add("points, and 95 % intervals", columns, 23)
        for name, of in POINTS.items():
            possible = f"of {of}" if name in self.ends.evidence else "no evidence"
            add(f"{name}, {possible}", [score.cell(name) for score in columns.values()], 23)
        for name, of in COSTS.items():
            add(f"{name}, costs up to {of}", [score.cell(name) for score in columns.values()], 23)
        add(f"score, of {self.ends.maximum}", [score.cell("score") for score in columns.values()], 23)
        if self.network:
            add("seen of what was asked for", both, 10, "   its judge, on unseen renders")
            for name in ATTRIBUTES:
                own = [f"{(1 + score.value[f'adherence: {name}']) / 2:.2f}" for score in both.values()]
                add(f"  {name}", own, 10, f"   {self.network_accuracy[name]:.3f}")
        return "\n".join([*lines, last])
