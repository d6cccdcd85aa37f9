"""Captions and faces in, weighted training samples out.

    captions + image folder -> MangaFaceDataset: faces, hold-out split, TF-IDF weights, texts, drawing order

One word for one thing, here and wherever the data set is used:

    face       a number: which of `dataset.faces`        text      a number: which of `dataset.texts`
    position   a number: which of `dataset.train`, the list of the faces that are trained on

Useful on its own: `MangaFaceDataset("faces_dataset", "faces_dataset/modified_face_250.json").report()`.
Letters in shapes: B batch, C latent channels, H W pixels, h w latent, T tokens, D text width.
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS, CountVectorizer
from tqdm import tqdm

from training.captions import kind_of, packs, shuffles, tidy_tags
from training.files import InputError, grouped, sha256_of
from training.framing import MUCH_CUT, frame_picture, ink_cut
from training.layouts import IMAGE_SUFFIXES, find_image, read_layout, shown, some_of, unread_pictures, why_missing
from training.pictures import colour_share, cut_out, dhashes, load_image, read_picture

FEWEST = 8  # held-out faces, without which there is no score
MOST_HELD_OUT = 0.25  # of the faces: more would be missed in training
NEAR_DUPLICATE = 10  # of 1,024 bits may differ: a smaller JPEG of quality 60 has 8, the two most similar faces 13
FACE_WORDS = {"alone", "back", "bottom", "cry", "empty", "fire", "front"}  # on scikit-learn's list of stop words, but
FACE_WORDS |= {"full", "serious", "side", "sincere", "thick", "thin", "top"}  # they describe faces
STRONGEST_TERMS = 3  # of a face decide on its weight
MANY_FACES = 50  # above, a word that a single face has is under 2 %: odd wording rather than a rare feature
KEPT_PIXELS = 2**26  # of pictures stay decoded until they are encoded: 192 MiB
GOLDEN_RATIO = 0.618034  # its multiples, modulo 1, fill [0, 1) as evenly as any sequence can


@dataclass(frozen=True)
class Face:
    """One face: where it is, what it shows, and what its bytes hash to."""

    name: str  # image_name as the caption file has it
    path: Path
    captions: tuple[str, ...]  # sentences, or lists of tags; without the trigger word
    sha256: str  # of the file's bytes: decides the hold-out and keys the latent cache
    size: tuple[int, int]  # W, H in pixels, upright
    dhashes: tuple[bytes, bytes]  # of the picture and of its mirror image: see dhashes()
    frame: tuple[int, ...]  # left, top, right, bottom of what is left without a panel's frame
    box: tuple[float, ...]  # the same of what is trained on
    shape: tuple[int, int]  # H, W that becomes
    remark: str = ""  # what is wrong with it, though it is used
    repeats: int = 1  # multiplies its weight
    colour: float = 0.0  # share of its area: see colour_share()
    ink_cut: float = 0.0  # share of an edge: see ink_cut()

    @property
    def cut(self) -> float:
        """Share of one side that is cut off to fit the shape, but for a panel's frame."""
        left, top, right, bottom = self.frame
        return 1 - self.pixels / ((right - left) * (bottom - top))

    @property
    def pixels(self) -> float:
        """How many of the file's are trained on."""
        left, top, right, bottom = self.box
        return (right - left) * (bottom - top)


# Reading -------------------------------------------------------------------------------------------------------


def near_duplicates(faces: list["Face"]) -> list[int]:
    """For each face the first of its group: faces that look alike, mirrored or not, directly or by way of others.

    Of what is set in either hash less than an eighth may differ, so that pictures without contrast aren't all alike.
    Copies of one file are in one group, too. Compares all pairs: 10,000 faces take seconds.
    """
    sides = zip(*(face.dhashes for face in faces), strict=True)
    plain, mirrored = (np.frombuffer(b"".join(side), np.uint64).reshape(len(faces), -1) for side in sides)
    files, bits = np.array([face.sha256 for face in faces]), np.bitwise_count(plain).sum(axis=1, dtype=int)
    first = np.arange(len(faces))
    for index in range(len(faces)):
        unlike = (plain[index] ^ others[:index] for others in (plain, mirrored))
        differing = np.minimum(*(np.bitwise_count(some).sum(axis=1, dtype=int) for some in unlike))
        either = (bits[index] + bits[:index] + differing) // 2  # few in a soft picture: then few may differ
        alike = (differing <= NEAR_DUPLICATE) & (8 * differing < either) | (files[index] == files[:index])
        groups = first[np.append(np.flatnonzero(alike), index)]
        first[np.isin(first, groups)] = groups.min()
    return first.tolist()


def _read_face(name: str, path: Path, captions: tuple[str, ...], repeats: int, **framing) -> tuple:
    """(the face, its picture), or (why its file can't be used, None).

    Decodes all of it: a torn file must fail here, not in epoch 3.

    framing: options of frame_picture().
    """
    try:
        sha256 = sha256_of(path)
        picture, remark = read_picture(path)
        grey = picture.convert("L")
        frame, box, shape = frame_picture(picture, **framing)
        seen = colour_share(picture), ink_cut(grey, frame, box)
    except MemoryError:  # is no fault of the picture's
        raise
    except Exception as error:  # on a damaged file Pillow also trips with struct.error, TypeError and others
        return f"{path.name}: {(str(error).splitlines() or [type(error).__name__])[0][:200]}", None
    face = Face(name, path, captions, sha256, picture.size, dhashes(grey), frame, box, shape, remark, repeats, *seen)
    return face, picture


# Rarity --------------------------------------------------------------------------------------------------------


def strongest_terms(faces: list[tuple[str, ...]]) -> list[list[tuple[str, float]]]:
    """For each face, given by its captions, up to three terms and how rare a face they make it.

    A face's strongest terms have the highest tf idf; tf is the share of its captions that have the term, and
    idf(t) = ln((1 + n) / (1 + df(t))) + 1 (scikit-learn's). Each makes the face tf idf^2 rare: what says most about a
    face is often said of many, and the second idf asks how rare that is. No stop words, but for FACE_WORDS. With over
    50 faces a word that only one of them has doesn't count.
    """
    terms_of = CountVectorizer(stop_words=sorted(ENGLISH_STOP_WORDS - FACE_WORDS)).build_analyzer()
    shares = []  # of each face's captions that have the term
    for captions in faces:
        counts = Counter(term for caption in captions for term in set(terms_of(caption)))
        shares.append({term: count / len(captions) for term, count in counts.items()})
    frequency = Counter(term for share in shares for term in share)
    idf = {term: math.log((1 + len(faces)) / (1 + count)) + 1 for term, count in frequency.items()}
    if len(faces) > MANY_FACES:
        idf = {term: value for term, value in idf.items() if frequency[term] > 1}
    found = []
    for share in shares:
        strength = {term: tf * idf[term] for term, tf in share.items() if term in idf}
        strongest = sorted(strength, key=lambda term: (-strength[term], term))[:STRONGEST_TERMS]
        found.append([(term, strength[term] * idf[term]) for term in strongest])
    return found


def clip_to_mean_one(raw: np.ndarray, low: float, high: float) -> np.ndarray:
    """clip(c raw, low, high) with the one c, found by bisection, at which the mean is 1. low <= 1 <= high.

    Shape: (n,), float64, raw > 0.
    """
    below, above = 0.0, 1.0 / raw.min()  # at which no weight is below 1
    for _ in range(200):
        scale = (below + above) / 2
        too_small = np.clip(scale * raw, low, high).mean() < 1.0
        below, above = (scale, above) if too_small else (below, scale)
    return np.clip(above * raw, low, high)


# The data set --------------------------------------------------------------------------------------------------


@dataclass(eq=False, repr=False)
class MangaFaceDataset:
    """The usable faces of a folder, split into training and hold-out, with a sampling weight each.

    Args:
        weighting: "sampling" (draw rare faces more often), "loss" (weigh their loss instead) or "off".
        weight_min, weight_max: clip of the weights, weight_min <= 1 <= weight_max; their mean is 1.
        validation_share: part of the faces held out, in [0, 0.5]; at least 4 images unless 0.
        seed: of the drawing order.
        num_workers: threads that read images; 0 = none.
        shuffle_tags: of tags between commas, shuffles are drawn, too; the first keep_tags stay in front.
        trigger_word: put before every text but ""; "" = none.
        framing: "buckets" (each picture keeps its shape, as nearly as the base can) or "square" (the centre square).
        trim_frames: cut panel frames away.
        unit: pixels that the sides of a picture must be multiples of, see resolution_unit(); 64 for SD1.5.

    Attributes:
        faces: every usable Face. train, validation: indices into faces.
        kind: "sentences", "tags" or "one tag each" (joined): see training/captions.py.
        terms: of each training face, what decided on its weight: see strongest_terms().
        weights: float64, one per training face, mean 1 (all alike with weighting "off", but for repeats).
        fingerprint: hash of every pixel file and caption as it was written; a run can only be resumed on the same data.
        hashes: the same of each face, short, by name.
        alike: groups of faces that are nearly the same picture.
        texts: every text that may be drawn, each once; texts[0] is "" (caption dropout).
        text_indices: of each face, which texts a draw chooses among: its captions, shuffles of tags, packs.
        first_text: of each face, the text that validation, scores and sheets use: the pack from its first caption.

    Raises:
        InputError: no usable face is left, or the caption file or a name in it is bad.

    Nothing here loads a model. `dataset[i]` is the i-th training face as a tensor, for a look from a notebook.
    """

    dataset_dir: Path
    json_file: Path
    resolution: int = 512
    weighting: str = "sampling"
    weight_min: float = 0.5
    weight_max: float = 2.0
    validation_share: float = 0.1
    seed: int = 0
    num_workers: int = 2
    shuffle_tags: bool = True
    keep_tags: int = 1
    trigger_word: str = ""
    framing: str = "buckets"
    trim_frames: bool = True
    unit: int = 64

    def __post_init__(self):
        self.dataset_dir, self.json_file = Path(self.dataset_dir), Path(self.json_file)
        self.prefix = f"{self.trigger_word}, " if self.trigger_word else ""
        self.skipped: list[str] = []  # one line per face that can't be used
        self.kept: dict[Path, Image.Image] = {}  # by file, decoded: until they are encoded or drawn
        faces = self._read_faces()
        content = [(face.name, face.sha256, face.captions, *[face.repeats] * (face.repeats > 1)) for face in faces]
        digest = lambda value: hashlib.sha256(json.dumps(value).encode()).hexdigest()  # noqa: E731
        self.fingerprint, self.hashes = digest(content), {face[0]: digest(face)[:16] for face in content}
        described = [face.captions for face in faces if face.name not in self._named_by_folder]
        self.kind = kind_of(described or [face.captions for face in faces])
        if self.kind != "sentences":
            faces = [replace(face, captions=tidy_tags(face.captions, self.kind)) for face in faces]
        self.faces = faces
        self.train, self.validation = self._split(self.validation_share)
        self.terms = strongest_terms([faces[index].captions for index in self.train])
        self.weights = self._calculate_sample_weights()
        self.make_texts()

    @classmethod
    def from_config(cls, config, unit: int = 64) -> "MangaFaceDataset":
        """From the constants of the same names."""
        names = {field.name for field in fields(cls)} - {"unit"}
        return cls(**{name: getattr(config, name) for name in names}, unit=unit)

    def __len__(self) -> int:
        """Training faces; also the draws of one epoch."""
        return len(self.train)

    def __getitem__(self, index: int) -> dict:
        """{"pixel_values": (3, H, W) in [-1, 1], "captions": texts, "weight": float} of training face `index`."""
        texts = tuple(self.texts[text] for text in self.text_indices[self.train[index]])
        pixels = self.pixels(self.train[index])
        return {"pixel_values": pixels, "captions": texts, "weight": float(self.weights[index])}

    def pixels(self, index: int, shape: tuple[int, int] | None = None) -> torch.Tensor:
        """Face `index` as it is trained on, or that part of its file at `shape` (H, W).

        The first time from the picture that was kept when it was read, if it was, then from the file.

        Shape: (3, H, W), float32 in [-1, 1]. Raises: as load_image() does.
        """
        face = self.faces[index]
        kept, shape = self.kept.pop(face.path, None), shape or face.shape
        return cut_out(kept, face.box, shape) if kept else load_image(face.path, face.box, shape)

    def make_texts(self, tokenizer=None) -> None:
        """Fill texts, text_indices and first_text. Packs need the base's tokenizer: call this once it is known."""

        def count_tokens(texts: list[str]) -> list[int]:
            return [len(ids) for ids in tokenizer(texts, truncation=False).input_ids]

        positions = {"": 0}
        self.text_indices, self.first_text = [], []
        for face in self.faces:
            texts = list(face.captions)
            if self.kind != "sentences" and self.shuffle_tags:
                texts += shuffles(face.captions, self.keep_tags, face.sha256)
            texts = [self.prefix + text for text in texts]
            packed = packs(face.captions, count_tokens, tokenizer.model_max_length, self.prefix) if tokenizer else []
            indices = [positions.setdefault(text, len(positions)) for text in dict.fromkeys(texts + packed)]
            self.text_indices.append(indices)
            self.first_text.append(positions[(packed or texts)[0]])
        self.texts = list(positions)

    def _read_faces(self) -> list[Face]:
        if not self.dataset_dir.is_dir():
            raise InputError(f"dataset_dir={str(self.dataset_dir)!r} is not a folder: set dataset_dir, or try --demo")
        self.layout = read_layout(self.dataset_dir, self.json_file)
        self.json_file = self.layout.json_file or self.json_file
        self._named_by_folder = {entry.name for entry in self.layout.entries if not entry.is_described}
        found: dict[Path, tuple[str, tuple[str, ...], int]] = {}
        listings: dict[Path, dict] = {}
        missing, silent = [], []
        for entry in self.layout.entries:
            path = find_image(self.dataset_dir, entry.name, listings)
            if path is None:
                missing.append(entry.name)
            elif not entry.captions:
                silent.append(f"{shown(entry.name)}: no captions")
            else:
                first, before, repeats = found.get(path, (entry.name, (), entry.repeats))  # image001 and image001.png
                found[path] = (first, before + entry.captions, repeats)
        self.skipped = why_missing(self.dataset_dir, missing, set(found)) + silent
        framing = {name: getattr(self, name) for name in ("resolution", "unit", "framing", "trim_frames")}
        faces, room = [], KEPT_PIXELS
        with ThreadPoolExecutor(max(1, self.num_workers)) as pool:
            read = pool.map(lambda path: _read_face(found[path][0], path, *found[path][1:], **framing), found)
            for face, picture in tqdm(read, "Reading faces", len(found), leave=False, disable=None, unit="face"):
                faces.append(face)
                if picture and math.prod(picture.size) <= room:
                    room -= math.prod(picture.size)
                    self.kept[face.path] = picture
        self.skipped += [face for face in faces if isinstance(face, str)]
        if usable := [face for face in faces if isinstance(face, Face)]:
            return usable
        raise InputError(self._why_empty())

    def _why_empty(self) -> str:
        """One line on why no face is usable, with the likeliest remedy."""
        where = f"no usable face in dataset_dir={str(self.dataset_dir)!r} for {self.layout.title}"
        here = [path for path in self.dataset_dir.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES]
        deeper = [path for path in self.dataset_dir.glob("*/*") if path.suffix.lower() in IMAGE_SUFFIXES]
        if not here and deeper:
            there = f"set dataset_dir={str(deeper[0].parent)!r} and json_file={str(self.json_file)!r}"
            return f"{where}: {len(deeper)} images lie one level deeper: {there}"
        if not here:
            other = f", but {some_of(names)}" if (names := unread_pictures(self.dataset_dir)) else ""
            none = f"the folder holds no {', '.join(IMAGE_SUFFIXES)} file{other}"
            return f"{where}: {none}: put faces there, or try --demo"
        reason = f"first reason: {self.skipped[0]}" if self.skipped else "the caption file lists no image"
        return f"{where}: {len(self.skipped)} skipped, {reason}"

    def _split(self, share: float) -> tuple[list[int], list[int]]:
        """Hold out the faces with the smallest content hashes: independent of file names and order.

        Near-duplicates, mirrored ones too, stay on one side: what was trained on in another size is no test.
        """
        everything = list(range(len(self.faces)))
        wanted = max(4, round(share * len(everything)))
        groups = grouped(everything, near_duplicates(self.faces))
        self.alike = [group for group in groups.values() if len(group) > 1]
        held_out: set[int] = set()
        for group in sorted(groups.values(), key=self._group_hash):
            if len(group) <= wanted - len(held_out):  # one picture many times over is no hold-out
                held_out |= set(group)
        if share == 0 or 2 * len(held_out) > len(everything):
            return everything, []
        return [index for index in everything if index not in held_out], sorted(held_out)

    def _group_hash(self, group: list[int]) -> str:
        """A place in the order of the hold-out which doesn't depend on how many the group has."""
        hashes = sorted(self.faces[index].sha256 for index in group)
        return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()

    def _rarities(self) -> np.ndarray:
        """Mean over its strongest terms of how rare they make each training face, NaN without terms. Shape: (n,)."""
        return np.array([np.mean([rarity for _, rarity in terms]) if terms else np.nan for terms in self.terms])

    def _calculate_sample_weights(self) -> np.ndarray:
        """Weigh each training face by TF-IDF, so that rare features come up more often.

        raw_i = mean of tf idf^2 over the face's three strongest terms, see strongest_terms(). A mean over all terms
        follows odd wording, row sums of the TF-IDF matrix reward long captions. weight_i = clip(c raw_i, weight_min,
        weight_max) with the c that makes the mean 1, so that weighting never changes the learning rate. A kohya
        folder's repeats then multiply the weight, and the mean is made 1 again.

        Shape: (training faces,), float64, in [weight_min, weight_max] where nothing is repeated.
        """
        weights, repeats = np.ones(len(self.train)), np.array([self.faces[index].repeats for index in self.train])
        if self.weighting != "off":
            raw = self._rarities()
            raw = np.where(np.isnan(raw), 1.0 if np.isnan(raw).all() else np.nanmean(raw), raw)
            weights = clip_to_mean_one(raw, self.weight_min, self.weight_max)
        if (repeats == repeats[0]).all():
            return weights
        return weights * repeats / (weights * repeats).mean()

    @property
    def effective_sample_size(self) -> float:
        """(sum w)^2 / sum w^2: how many equally weighted faces would vary as little (Kish 1965)."""
        return float(self.weights.sum() ** 2 / (self.weights**2).sum())

    def loss_weights(self) -> np.ndarray:
        """Factor of each training face's loss: its weight under "loss", else 1. The weight acts once, never twice."""
        return self.weights if self.weighting == "loss" else np.ones(len(self.train))

    def epoch_order(self, epoch: int) -> np.ndarray:
        """Positions in `train` in the order in which epoch `epoch` (from 0) draws them, fixed by (seed, epoch) alone.

        But for weighting "loss": systematic resampling. The weights laid end to end make a ruler of length n; n
        equally spaced marks pick the faces, shifted each epoch by the golden ratio. So the count of a face
        stays within 2.51 of epochs x weight for 60 epochs, whatever the weights (mostly within 2; the bound grows as
        the logarithm), and none is absent for long, which independent draws don't give.

        Shape: (n,), int64 in [0, n).
        """
        count = len(self.train)
        order = np.arange(count)
        if self.weighting != "loss":
            offset = (np.random.default_rng([self.seed, 1]).random() + GOLDEN_RATIO * epoch) % 1.0
            ends = np.cumsum(self.weights)
            order = np.searchsorted(ends * (count / ends[-1]), order + offset, side="right").clip(max=count - 1)
        return np.random.default_rng([self.seed, 2, epoch]).permutation(order)

    def epoch_batches(self, epoch: int, size: int) -> list[np.ndarray]:
        """epoch_order(epoch) in batches of `size`, of one shape each as far as possible; ceil(n / size) of them.

        Each shape's positions are cut into full batches, in the order in which they were drawn. What is left over,
        shape after shape, makes the other batches, of which the last may be smaller. Then the batches are shuffled,
        all by (seed, epoch). If all faces have one shape, this is the order itself, cut.
        """
        order = self.epoch_order(epoch)
        by_shape = grouped(order.tolist(), (self.faces[self.train[position]].shape for position in order))
        if len(by_shape) == 1:
            return [order[start : start + size] for start in range(0, len(order), size)]
        whole = {shape: len(positions) // size * size for shape, positions in by_shape.items()}
        rest = [position for shape, positions in by_shape.items() for position in positions[whole[shape] :]]
        runs = [*(positions[: whole[shape]] for shape, positions in by_shape.items()), rest]
        batches = [np.array(run[start : start + size]) for run in runs for start in range(0, len(run), size)]
        shuffled = np.random.default_rng([self.seed, 5, epoch]).permutation(len(batches))
        return [batches[number] for number in shuffled]

    def largest_batch(self, size: int) -> np.ndarray:
        """A batch that needs as much memory as any can: positions of faces of the largest shape, repeated if few."""
        areas = np.array([math.prod(self.faces[face].shape) for face in self.train])
        is_alike = (areas == areas[0]).all()
        order = self.epoch_order(0) if is_alike else np.arange(len(areas))  # an epoch may lack a light face
        return np.resize(order[areas[order] == areas.max()], min(size, len(order)))

    def report(self, tokenizer=None, warnings: Sequence[str] = ()) -> str:
        """What a person should know before training: faces, what is skipped or cut, the weights and their reasons."""
        inside = self.dataset_dir.is_relative_to(Path.cwd())
        folder = self.dataset_dir.relative_to(Path.cwd()) if inside else self.dataset_dir
        listed = {face.path.name for face in self.faces} | {line.split(":")[0] for line in self.skipped}
        here = sorted(path for path in self.dataset_dir.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
        stray = [path.name for path in here if listed.isdisjoint((path.name, path.stem))]
        captions = [caption for face in self.faces for caption in face.captions]
        split = f"{len(self.train)} to train on, {len(self.validation)} held out"
        lines = [f"Faces: {len(self.faces)} usable in {folder} ({split})"]
        if not self.validation:
            lines.append("Hold-out: none, so no validation, no early stopping; the last epoch is the one exported")
        lines += [f"Layout: {self.layout.title}", *self.layout.notes]
        lines += _listed(f"Skipped: {len(self.skipped)}", self.skipped, 10)
        remarks = [f"{shown(face.name)}: {face.remark}" for face in self.faces if face.remark]
        lines += _listed(f"Used, but to be looked at: {len(remarks)}", remarks, 10)
        if stray:
            lines.append(f"Without {self.layout.lacking}: {some_of(stray)}")
        lines += self._report_pixels()
        counts = f"{len(captions)}, {len(captions) / len(self.faces):.1f} per face, {len(set(captions))} different"
        lines.append(f"Captions: {counts}; {self._kind()}")
        lines += [f"Trigger word: {shown(self.prefix[:-2])!r} before every caption"] if self.prefix else []
        lines += self.report_tokens(tokenizer)
        lines += _listed("Before you train:", warnings, 20, ": --dry_run shows them all")
        return "\n".join(lines + self._report_weights())

    def _report_pixels(self) -> list[str]:
        """Sizes, the shapes that the faces are used in, and who loses much to them."""
        sizes, faces = [face.size for face in self.faces], len(self.faces)
        small = sum(face.pixels < math.prod(face.shape) for face in self.faces)
        uneven = sum(width != height for width, height in sizes)
        counts = f"{uneven} of {faces} not square, {small} smaller than used (enlarged)"
        lines = [f"Pixels: {min(map(min, sizes))} to {max(map(max, sizes))} a side; {counts}"]
        shapes = Counter(face.shape for face in self.faces).most_common()
        named = ", ".join(f"{width} x {height}: {count}" for (height, width), count in shapes[:6])
        more = f", and {len(shapes) - 6} more" if len(shapes) > 6 else ""
        lines.append(f"Used as (width x height: faces): {named}{more}")
        if cut := sorted((face for face in self.faces if face.cut > MUCH_CUT), key=lambda face: -face.cut):
            worst = ", ".join(f"{shown(face.name)} {face.cut:.0%}" for face in cut[:5])
            more = f", and {len(cut) - 5} more" if len(cut) > 5 else ""
            lines.append(f"Cut by more than {MUCH_CUT:.0%} to fit: {len(cut)} ({worst}{more})")
        return lines

    def report_tokens(self, tokenizer=None) -> list[str]:
        """Which captions are longer than the text encoder reads, and where they are cut. Packs never are."""
        if tokenizer is None:
            return ["Texts too long to be read: unknown before the base is downloaded"]
        limit = tokenizer.model_max_length
        texts = list(dict.fromkeys(self.prefix + caption for face in self.faces for caption in face.captions))
        cut = [(text, ids) for text in texts if len(ids := tokenizer(text, truncation=False).input_ids) > limit]
        lines = [f"Texts over {limit} tokens: {len(cut)} of {len(texts)} (what is beyond is not read)"]
        for text, ids in cut[:5]:
            lost = tokenizer.decode(ids[limit - 1 : -1]).strip()
            lines.append(f"  {len(ids)} tokens: {text[:50]!r}... loses {lost[:60]!r}")
        return lines

    def _kind(self) -> str:
        """What the captions were taken for, and what follows from that."""
        if self.kind == "sentences":
            return "sentences"
        what = "one tag each, joined into one list a face" if self.kind == "one tag each" else "lists of tags"
        order = "shuffled" if self.shuffle_tags else "in their order"
        if self.shuffle_tags and self.keep_tags:
            order += f", all but the first{f' {self.keep_tags}' if self.keep_tags > 1 else ''}"
        return f"{what}; underscores become spaces, {order}"

    def _report_weights(self) -> list[str]:
        """The weight range, and the rarest and commonest faces with the terms that make them so."""
        if self.weighting == "off" and (self.weights == 1).all():
            return ["Weights: off, every face once per epoch"]
        through = self.weighting if self.weighting != "off" else "repeats alone"
        lines = [f"Weight range: {self.weights.min():.2f} to {self.weights.max():.2f} (acts through {through})"]
        if not any(self.terms):
            return lines
        by_weight = np.argsort(-self.weights, kind="stable")
        for label, positions in (("heaviest", by_weight[:3]), ("lightest", by_weight[-3:])):
            for position in positions:
                words = ", ".join(term for term, _ in sorted(self.terms[position], key=lambda term: -term[1]))
                name = self.faces[self.train[position]].name
                lines.append(f"  {label} {self.weights[position]:.2f}  {name}: {words}")
        return lines


def to_hold_out_enough(faces: int) -> str:
    """What to do for FEWEST of so many faces to be held out."""
    share = math.ceil(100 * FEWEST / faces) / 100
    return f"set validation_share = {share:g}" if share <= MOST_HELD_OUT else "add faces"


def _listed(title: str, lines: Sequence[str], most: int, rest: str = "") -> list[str]:
    """A title, at most so many of its lines, and how many are left; nothing if there are none."""
    more = [f"... and {len(lines) - most} more{rest}"] if len(lines) > most else []
    return [title, *(f"  {line}" for line in [*lines[:most], *more])] if lines else []
