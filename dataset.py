"""Captions and faces in, weighted training samples out.

    caption JSON + image folder -> MangaFaceDataset: samples, hold-out split, TF-IDF weights, drawing order
    MangaFaceDataset            -> encode_faces(), encode_texts(): each face and text once, cached by content

Useful on its own: `MangaFaceDataset("faces_dataset", "faces_dataset/modified_face_250.json").report()`.
Letters in shapes: B batch, C latent channels, H W pixels, h w latent, T tokens, D text width.
"""

import hashlib
import json
import os
import re
import reprlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError
from safetensors.torch import load, save
from sklearn.feature_extraction.text import TfidfVectorizer
from tqdm import tqdm

from checkpoint import replace

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP")  # what Pillow may decode, whatever the suffix claims
ENCODING_VERSION = 2  # raise it when load_image or the encoding changes: old cache entries are then ignored
MAX_CAPTION_BYTES = 2**26  # a caption file of 64 MiB would describe 100,000 faces: larger ones aren't read
MAX_PIXELS = 2**26  # of a picture: 8192 x 8192; small files can claim far more, and fill the memory
TEXT_BATCH = 32  # texts encoded at a time
DHASH_SIDE = 32  # a picture's hash compares 32 x 32 neighbours; 8 x 8, as is common, takes all faces for one another
NEAR_DUPLICATE = 10  # of 1,024 bits may differ: a smaller JPEG of quality 60 has 8, the two likest faces 13
GOLDEN_RATIO = 0.618034  # its multiples, modulo 1, fill [0, 1) as evenly as any sequence can


class InputError(ValueError):
    """Something the user can mend: the message names the thing, its value and the remedy in one line."""


@dataclass(frozen=True)
class Sample:
    """One face: where it is, what it shows, and what its bytes hash to."""

    name: str  # image_name as the caption file has it
    path: Path
    captions: tuple[str, ...]
    sha256: str  # of the file's bytes: decides the hold-out and keys the latent cache
    size: tuple[int, int]  # W, H in pixels, upright
    dhashes: tuple[bytes, bytes]  # of the picture and of its mirror image: see dhash()

    @property
    def texts(self) -> tuple[str, ...]:
        """What a training draw chooses among: every caption, and (last) all of them joined."""
        joined = ", ".join(caption.rstrip(" .,") for caption in self.captions)
        return self.captions if len(self.captions) == 1 else (*self.captions, joined)


# Reading -------------------------------------------------------------------------------------------------------


def read_captions(json_file: str | Path) -> list[tuple[str, tuple[str, ...]]]:
    """Read `[{"image_name": "image001", "captions": ["...", "..."]}, ...]`.

    Returns (image_name, captions) in file order; blank captions are dropped, entries of the same image are merged.

    Raises:
        InputError: the file is missing, too large, no UTF-8 JSON, or an entry is odd; names file, line or entry.
    """
    shape = 'expected [{"image_name": "image001", "captions": ["...", "..."]}, ...]'
    try:
        with open(json_file, "rb") as file:
            content = file.read(MAX_CAPTION_BYTES + 1)
    except OSError as error:
        raise InputError(f"json_file={str(json_file)!r} can't be read ({error.strerror}): set json_file") from None
    if len(content) > MAX_CAPTION_BYTES:
        limit = f"{MAX_CAPTION_BYTES / 2**20:.0f} MiB"
        raise InputError(f"json_file={str(json_file)!r} is larger than {limit}: set json_file to your captions")
    try:
        text = content.decode("utf-8-sig")
        entries = json.loads(text)
    except UnicodeDecodeError as error:
        raise InputError(f"{json_file}: byte {error.start} is not UTF-8: save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        line = text.split("\n")[error.lineno - 1].strip()[:60] if text.strip() else "the file is empty"
        raise InputError(f"{json_file}, line {error.lineno}: {error.msg} at {line!r}: mend it; {shape}") from None
    except (RecursionError, ValueError) as error:
        raise InputError(f"{json_file}: not readable as JSON ({type(error).__name__}); {shape}") from None
    if not isinstance(entries, list):
        raise InputError(f"{json_file}: the top level is a {type(entries).__name__}, not a list; {shape}")
    merged: dict[str, list[str]] = {}
    for number, entry in enumerate(entries, start=1):
        name = entry.get("image_name") if isinstance(entry, dict) else None
        captions = entry.get("captions") if isinstance(entry, dict) else None
        if not isinstance(name, str) or not name.strip():
            raise InputError(f"{json_file}, entry {number}: no image_name in {_shown(reprlib.repr(entry))}; {shape}")
        where = f"{json_file}, entry {number} ({name[:80]!r})"
        if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
            raise InputError(f"{where}: captions must be a list of texts; {shape}")
        if re.search("[\ud800-\udfff]", "".join([name, *captions])):
            raise InputError(f"{where}: half a surrogate pair is no character: mend it")
        merged.setdefault(name, []).extend(caption.strip() for caption in captions if caption.strip())
    return [(name, tuple(captions)) for name, captions in merged.items()]


def find_image(dataset_dir: Path, name: str, listings: dict[Path, dict] | None = None) -> Path | None:
    """The file of `name` (suffix optional, case of the suffix free) inside `dataset_dir`, or None.

    `listings`, if given, keeps the folders' names from call to call: 10,000 names shouldn't be listed 10,000 times.

    Raises:
        InputError: the name leads out of the folder (absolute, drive, "..", backslash, link), holds a control
            character, or two files match.
    """
    windows, posix = PureWindowsPath(name), PurePosixPath(name)
    dots = not posix.parts or any(not part.strip(". ") for part in posix.parts)  # to Windows, ".. " is ".."
    if dots or windows.drive or posix.is_absolute() or re.search(r"[\0-\x1f\x7f-\x9f\\]", name):
        raise InputError(f"image_name {name[:80]!r} leads out of {dataset_dir}, or is no name on every system: only "
                         "plain names inside the folder are read")  # fmt: skip

    def check_inside(path: Path) -> None:
        if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(dataset_dir)):
            raise InputError(f"image_name {name[:80]!r} is a link out of {dataset_dir}: only files inside it are read")

    folder = (dataset_dir / name).parent
    listings = {} if listings is None else listings
    if folder not in listings:  # Path.is_dir() raises if a name is too long for the disk
        check_inside(folder)
        entries = sorted(entry.name for entry in os.scandir(folder)) if os.path.isdir(folder) else []
        listings[folder] = {}
        for entry in entries:
            stem, suffix = os.path.splitext(entry)
            if suffix.lower() in IMAGE_SUFFIXES:
                for key in (stem, entry):
                    listings[folder].setdefault(key, []).append(folder / entry)
    matches = listings[folder].get(posix.name, [])
    if len(matches) > 1:
        files = " and ".join(path.name for path in matches)
        raise InputError(f"image_name {name[:80]!r} matches {files} in {folder}: remove one, or write its suffix too")
    for path in matches:
        check_inside(path)
    return matches[0] if matches and matches[0].is_file() else None


def _shown(text: str) -> str:
    """Foreign text for the screen: cut, and with escapes for characters that a terminal would obey or can't encode."""
    text = text if len(text) <= 80 else f"{text[:80]}..."
    return re.sub("[\0-\x1f\x7f-\x9f\ud800-\udfff]", lambda found: repr(found[0])[1:-1], text)


def load_image(path: str | Path, resolution: int) -> torch.Tensor:
    """Decode, turn upright (EXIF), lay alpha over white, crop the centre square, resize (Lanczos).

    Modes 1, L, LA, P, PA, RGB, RGBA, I;16, I and CMYK are understood; of an animated file the first frame counts.

    Shape: (3, resolution, resolution), float32 in [-1, 1].

    Raises:
        OSError, ValueError, SyntaxError, Image.DecompressionBombError: Pillow can't decode the file.
    """
    image = _upright_rgb(path)
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side))
    image = image.resize((resolution, resolution), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1.0


def _upright_rgb(path: str | Path) -> Image.Image:
    """The whole picture as RGB: EXIF orientation first, then 16 bits to 8, then alpha over white."""
    with Image.open(path, formats=IMAGE_FORMATS) as opened:
        width, height = opened.size
        if not 0 < width * height <= MAX_PIXELS:
            raise ValueError(f"{width} x {height} pixels, where 1 to {MAX_PIXELS:,} can be read")
        image = ImageOps.exif_transpose(opened)
    if image.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion would clip at 255
        image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257.0).round().astype(np.uint8))
    if "A" in image.mode or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def dhash(image: Image.Image) -> bytes:
    """Difference hash (Krawetz 2013): where brightness grows by more than noise to the right, on a 32 x 32 grid.

    Nearly the same pictures differ in few of its 1,024 bits, whatever their size or compression.
    """
    small = image.convert("L").resize((DHASH_SIDE + 1, DHASH_SIDE), Image.Resampling.LANCZOS)
    return np.packbits(np.diff(np.asarray(small).astype(int), axis=1) > 16).tobytes()


def near_duplicates(samples: list["Sample"]) -> list[int]:
    """For each sample the first of its group: samples that look alike, mirrored or not, directly or by way of others.

    Of what is set in either hash less than an eighth may differ, so that pictures without contrast aren't all alike.
    Copies of one file are in one group, too. Compares all pairs: 10,000 faces take seconds.
    """
    plain, mirrored = (
        np.frombuffer(b"".join(sample.dhashes[side] for sample in samples), np.uint64).reshape(len(samples), -1)
        for side in (0, 1)
    )
    files, bits = np.array([sample.sha256 for sample in samples]), np.bitwise_count(plain).sum(axis=1, dtype=int)
    first = list(range(len(samples)))
    for index in range(len(samples)):
        differing = np.minimum(*(np.bitwise_count(plain[index] ^ others[:index]).sum(axis=1, dtype=int)
                                 for others in (plain, mirrored)))  # fmt: skip
        either = (bits[index] + bits[:index] + differing) // 2  # few in a soft picture: then few may differ
        alike = (differing <= NEAR_DUPLICATE) & (8 * differing < either) | (files[index] == files[:index])
        groups = {first[other] for other in np.flatnonzero(alike)}
        if groups:
            first[index] = min(groups)
            first = [first[index] if group in groups else group for group in first]
    return first


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_face(name: str, path: Path, captions: tuple[str, ...]) -> Sample | str:
    """The sample, or why its file can't be used. Decodes all of it: a torn file must fail here, not in epoch 3."""
    try:
        sha256 = _sha256(path)
        picture = _upright_rgb(path)
    except MemoryError:  # is no fault of the picture's
        raise
    except Exception as error:  # on a damaged file Pillow also trips with struct.error, TypeError and others
        return f"{path.name}: {(str(error).splitlines() or [type(error).__name__])[0][:200]}"
    return Sample(name, path, captions, sha256, picture.size, (dhash(picture), dhash(ImageOps.mirror(picture))))


# The data set --------------------------------------------------------------------------------------------------


class MangaFaceDataset:
    """The usable faces of a folder, split into training and hold-out, with a sampling weight each.

    Args:
        weighting: "sampling" (draw rare faces more often), "loss" (weigh their loss instead) or "off".
        weight_min, weight_max: clip of the weights, weight_min <= 1 <= weight_max; their mean is 1.
        validation_share: part of the faces held out, in [0, 0.5]; at least 4 images unless 0.
        seed: of the drawing order.
        num_workers: threads that read images; 0 = none.

    Attributes:
        samples: every usable face. train, validation: their indices into samples.
        weights: float64, one per training face, mean 1 (all 1 with weighting "off").
        alike: groups of samples that are nearly the same picture.
        texts: every text that may be drawn, each once; texts[0] is "" (caption dropout).

    Raises:
        InputError: no usable face is left, or the caption file or a name in it is bad.

    Nothing here loads a model. `dataset[i]` is the i-th training face as a tensor, for a look from a notebook.
    """

    def __init__(
        self,
        dataset_dir,
        json_file,
        resolution=512,
        weighting="sampling",
        weight_min=0.5,
        weight_max=2.0,
        validation_share=0.1,
        seed=0,
        num_workers=2,
    ):
        self.dataset_dir, self.json_file, self.resolution = Path(dataset_dir), Path(json_file), resolution
        self.weighting, self.weight_min, self.weight_max, self.seed = weighting, weight_min, weight_max, seed
        self.skipped: list[str] = []  # one line per face that can't be used
        self.samples = self._read_samples(max(1, num_workers))
        self.train, self.validation = self._split(validation_share)
        self.weights = self._calculate_sample_weights() if weighting != "off" else np.ones(len(self.train))
        self.texts = list(dict.fromkeys(["", *(text for sample in self.samples for text in sample.texts)]))
        position = {text: index for index, text in enumerate(self.texts)}
        self.text_indices = [[position[text] for text in sample.texts] for sample in self.samples]

    def __len__(self) -> int:
        """Training faces; also the draws of one epoch."""
        return len(self.train)

    def __getitem__(self, index: int) -> dict:
        """{"pixel_values": (3, H, W) in [-1, 1], "captions": texts, "weight": float} of training face `index`."""
        sample = self.samples[self.train[index]]
        pixels = load_image(sample.path, self.resolution)
        return {"pixel_values": pixels, "captions": sample.texts, "weight": float(self.weights[index])}

    @property
    def fingerprint(self) -> str:
        """Hash of every pixel file and caption: a run can only be resumed on the same data."""
        content = [(sample.name, sample.sha256, sample.captions) for sample in self.samples]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def _read_samples(self, threads: int) -> list[Sample]:
        if not self.dataset_dir.is_dir():
            raise InputError(f"dataset_dir={str(self.dataset_dir)!r} is not a folder: set dataset_dir, or try --demo")
        found: dict[Path, tuple[str, tuple[str, ...]]] = {}
        listings: dict[Path, dict] = {}
        for name, captions in read_captions(self.json_file):
            path = find_image(self.dataset_dir, name, listings)
            if path is None:
                self.skipped.append(f"{_shown(name)}: no image file of that name")
            elif not captions:
                self.skipped.append(f"{_shown(name)}: no captions")
            else:
                first, before = found.get(path, (name, ()))  # image001 and image001.png are one face
                found[path] = (first, before + captions)
        with ThreadPoolExecutor(threads) as pool:
            faces = list(pool.map(lambda path: _read_face(found[path][0], path, found[path][1]), found))
        self.skipped += [face for face in faces if isinstance(face, str)]
        samples = [face for face in faces if isinstance(face, Sample)]
        if not samples:
            raise InputError(self._why_empty())
        return samples

    def _why_empty(self) -> str:
        """One line on why no face is usable, with the likeliest remedy."""
        where = f"no usable face in dataset_dir={str(self.dataset_dir)!r} for {self.json_file}"
        here = [path for path in self.dataset_dir.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES]
        deeper = [path for path in self.dataset_dir.glob("*/*") if path.suffix.lower() in IMAGE_SUFFIXES]
        if not here and deeper:
            there = f"set dataset_dir={str(deeper[0].parent)!r} (json_file stays {str(self.json_file)!r})"
            return f"{where}: {len(deeper)} images lie one level deeper: {there}"
        if not here:
            return f"{where}: the folder holds no {', '.join(IMAGE_SUFFIXES)} file: put the faces there, or try --demo"
        reason = f"first reason: {self.skipped[0]}" if self.skipped else "the caption file lists no image"
        return f"{where}: {len(self.skipped)} skipped, {reason}"

    def _split(self, share: float) -> tuple[list[int], list[int]]:
        """Hold out the faces with the smallest content hashes: independent of file names and order.

        Near-duplicates, mirrored ones too, stay on one side: what was trained on in another size is no test.
        """
        everything = list(range(len(self.samples)))
        wanted = max(4, round(share * len(everything)))
        groups: dict[int, list[int]] = {}
        for index, first in enumerate(near_duplicates(self.samples)):
            groups.setdefault(first, []).append(index)
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
        hashes = sorted(self.samples[index].sha256 for index in group)
        return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()

    def _term_rarity(self) -> tuple[TfidfVectorizer, list[np.ndarray]]:
        """The fitted vectorizer, and per training face the term ids in all of its captions (each once)."""
        documents = [" ".join(self.samples[index].captions) for index in self.train]
        vectorizer = TfidfVectorizer(stop_words="english")
        try:
            counts = vectorizer.fit_transform(documents)
        except ValueError:  # nothing but stop words
            vectorizer.idf_ = np.ones(1)
            return vectorizer, [np.zeros(0, dtype=int) for _ in documents]
        return vectorizer, [counts[row].indices for row in range(len(documents))]

    def _rarities(self) -> np.ndarray:
        """Mean inverse document frequency of each training face's terms, NaN without terms. Shape: (faces,)."""
        vectorizer, terms = self._term_rarity()
        return np.array([vectorizer.idf_[ids].mean() if len(ids) else np.nan for ids in terms])

    def _calculate_sample_weights(self) -> np.ndarray:
        """Weigh each training face by the mean inverse document frequency of its terms, so rare features come up more.

        raw_i = mean over the distinct terms t of face i of idf(t),  idf(t) = ln((1 + n) / (1 + df(t))) + 1
        (scikit-learn's smoothed idf, English stop words left out, training split only). Row sums of the normalised
        TF-IDF matrix would reward long captions of common words; a mean over terms doesn't. The scale c then solves
        mean(clip(c raw, weight_min, weight_max)) = 1 by bisection, so weighting never changes the learning rate.

        Shape: (training faces,), float64 in [weight_min, weight_max].
        """
        raw = self._rarities()
        raw = np.where(np.isnan(raw), 1.0 if np.isnan(raw).all() else np.nanmean(raw), raw)
        low, high = 0.0, 1.0 / raw.min()  # at which no weight is below 1
        for _ in range(200):
            scale = (low + high) / 2
            too_small = np.clip(scale * raw, self.weight_min, self.weight_max).mean() < 1.0
            low, high = (scale, high) if too_small else (low, scale)
        return np.clip(high * raw, self.weight_min, self.weight_max)

    @property
    def effective_sample_size(self) -> float:
        """(sum w)^2 / sum w^2: how many equally weighted faces would vary as little (Kish 1965)."""
        return float(self.weights.sum() ** 2 / (self.weights**2).sum())

    def loss_weights(self) -> np.ndarray:
        """Factor of each training face's loss: its weight under "loss", else 1. The weight acts once, never twice."""
        return self.weights if self.weighting == "loss" else np.ones(len(self.train))

    def epoch_order(self, epoch: int) -> np.ndarray:
        """Positions in `train` in the order in which epoch `epoch` (from 0) draws them, fixed by (seed, epoch) alone.

        Under weighting "sampling": systematic resampling. The weights laid end to end make a ruler of length n; n
        equally spaced marks pick the faces, shifted each epoch by the golden ratio. So the count of a face
        stays within 2.51 of epochs x weight for 60 epochs, whatever the weights (mostly within 2; the bound grows as
        the logarithm), and none is absent for long, which independent draws don't give.

        Shape: (n,), int64 in [0, n).
        """
        count = len(self.train)
        order = np.arange(count)
        if self.weighting == "sampling":
            start = np.random.default_rng([self.seed, 1]).random()
            offset = (start + GOLDEN_RATIO * epoch) % 1.0
            ends = np.cumsum(self.weights)
            order = np.searchsorted(ends * (count / ends[-1]), order + offset, side="right").clip(max=count - 1)
        return np.random.default_rng([self.seed, 2, epoch]).permutation(order)

    def report(self, tokenizer=None) -> str:
        """What a person should know before training: faces, what is skipped or cut, the weights and their reasons."""
        inside = self.dataset_dir.is_relative_to(Path.cwd())
        folder = self.dataset_dir.relative_to(Path.cwd()) if inside else self.dataset_dir
        sizes = [sample.size for sample in self.samples]
        listed = {sample.path.name for sample in self.samples} | {line.split(":")[0] for line in self.skipped}
        stray = [
            entry.name
            for entry in os.scandir(self.dataset_dir)
            if entry.name.lower().endswith(IMAGE_SUFFIXES)
            and entry.name not in listed
            and os.path.splitext(entry.name)[0] not in listed
        ]
        small = sum(min(size) < self.resolution for size in sizes)
        uneven = sum(width != height for width, height in sizes)
        captions = [caption for sample in self.samples for caption in sample.captions]
        lines = [
            f"Faces: {len(self.samples)} usable in {folder} "
            f"({len(self.train)} to train on, {len(self.validation)} held out)"
        ]
        if not self.validation:
            lines.append("Hold-out: none, so no validation, no early stopping; the last epoch is the one exported")
        lines += [f"Skipped: {len(self.skipped)}"] if self.skipped else []
        lines += [f"  {line}" for line in self.skipped[:10]]
        lines += [f"  ... and {len(self.skipped) - 10} more"] if len(self.skipped) > 10 else []
        if stray:
            named = ", ".join(map(_shown, sorted(stray)[:5]))
            lines.append(f"Without an entry in {self.json_file.name}: {len(stray)} ({named})")
        if self.alike:
            groups = [" = ".join([self.samples[index].name for index in group[:4]]
                                 + [f"{len(group) - 4} more"] * (len(group) > 4)) for group in self.alike]
            more = f" and {len(groups) - 5} more" if len(groups) > 5 else ""
            lines.append(f"Nearly the same picture, kept on one side: {', '.join(groups[:5])}{more}")
        lines.append(
            f"Pixels: {min(map(min, sizes))} to {max(map(max, sizes))} a side; used at {self.resolution} x "
            f"{self.resolution}; {uneven} not square (centre square is used), {small} smaller (enlarged)"
        )
        per_face = len(captions) / len(self.samples)
        lines.append(f"Captions: {len(captions)}, {per_face:.1f} per face, {len(set(captions))} different")
        if tokenizer is not None:
            lines += self.report_tokens(tokenizer)
        else:
            lines.append("Texts too long to be read: unknown before the base is downloaded")
        return "\n".join(lines + self._report_weights())

    def report_tokens(self, tokenizer) -> list[str]:
        """Which texts are longer than the text encoder reads, and where they are cut."""
        limit = tokenizer.model_max_length
        cut = [(text, ids) for text in self.texts if len(ids := tokenizer(text, truncation=False).input_ids) > limit]
        lines = [f"Texts over {limit} tokens: {len(cut)} of {len(self.texts) - 1} (what is beyond is not read)"]
        for text, ids in cut[:5]:
            lost = tokenizer.decode(ids[limit - 1 : -1]).strip()
            lines.append(f"  {len(ids)} tokens: {text[:50]!r}... loses {lost[:60]!r}")
        return lines

    def _report_weights(self) -> list[str]:
        """The weight range, and the rarest and commonest faces with the terms that make them so."""
        if self.weighting == "off":
            return ["Weights: off, every face once per epoch"]
        vectorizer, terms = self._term_rarity()
        lines = [
            f"Weight range: {self.weights.min():.2f} to {self.weights.max():.2f} "
            f"(acts through {self.weighting}; effective sample size "
            f"{self.effective_sample_size:.1f} of {len(self)})"
        ]
        if not any(len(ids) for ids in terms):
            return lines
        vocabulary = vectorizer.get_feature_names_out()
        by_weight = np.argsort(-self.weights, kind="stable")
        for label, positions in (("heaviest", by_weight[:3]), ("lightest", by_weight[-3:])):
            for position in positions:
                rare = sorted(terms[position], key=lambda term: -vectorizer.idf_[term])[:4]
                words = ", ".join(vocabulary[term] for term in rare)
                name = self.samples[self.train[position]].name
                lines.append(f"  {label} {self.weights[position]:.2f}  {name}: {words}")
        return lines


# Encode once ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EncodedDataset:
    """Every face and text as the UNet sees them, in the order of `samples` and `texts`.

    Shape: latent_mean, latent_std (faces, C, h, w) float32, already times the VAE's scaling factor;
    text_embeddings (texts, T, D).
    """

    latent_mean: torch.Tensor
    latent_std: torch.Tensor
    text_embeddings: torch.Tensor

    def to(self, device: torch.device) -> "EncodedDataset":
        tensors = (self.latent_mean, self.latent_std, self.text_embeddings)
        return EncodedDataset(*(tensor.to(device) for tensor in tensors))


def folder_identity(folder: Path) -> str:
    """Hash of a model folder's config and weights: another VAE under the same name is another VAE."""
    digest = hashlib.sha256()
    for path in sorted(path for path in Path(folder).iterdir() if path.is_file()):
        digest.update(path.name.encode())
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def encode_faces(
    dataset: MangaFaceDataset,
    cache_dir: str | Path,
    vae_identity: str,
    load_vae: Callable,
    process: tuple[int, int, Callable] = (0, 1, lambda: None),
) -> tuple[torch.Tensor, torch.Tensor]:
    """Latent mean and standard deviation of every face, from the cache where their content was encoded before.

    An entry's name is the hash of all that decides its value: image bytes, resolution, VAE weights, code version. A
    changed pixel is therefore another entry; nothing can be stale. Faces are encoded and stored one by one, so that
    an interrupted encoding goes on where it stopped and ends with the same bits.

    Args:
        load_vae: called only if a face is missing; returns an AutoencoderKL (float32: SD1.5's VAE overflows in
            float16 on some images).
        process: (rank, number of processes, barrier): each process encodes its share of what is missing.

    Shape: two of (faces, C, h, w), float32, times the VAE's scaling factor.

    Raises:
        InputError: a face encodes to a non-finite latent.
    """
    rank, world, barrier = process
    keys = [(vae_identity, dataset.resolution, sample.sha256) for sample in dataset.samples]
    files = [_entry(Path(cache_dir), "latents", *key) for key in keys]
    entries = [_read_entry(file) for file in files]
    missing = [index for index, entry in enumerate(entries) if entry is None]
    barrier()  # everybody has looked before anybody writes
    if mine := missing[rank::world]:
        vae = load_vae()
        for index in tqdm(mine, desc="Encoding faces", disable=rank > 0):
            sample = dataset.samples[index]
            if _sha256(sample.path) != sample.sha256:
                raise InputError(f"{sample.path} has changed since the start of this run: start it again")
            mean, std = encode_image(vae, load_image(sample.path, dataset.resolution))
            if not (torch.isfinite(mean).all() and torch.isfinite(std).all()):
                raise InputError(f"{sample.path} encodes to NaN: look at it, or remove it from the caption file")
            _write_entry(files[index], {"mean": mean, "std": std})
    barrier()
    for index in missing:
        entries[index] = _read_back(files[index])
    return torch.stack([entry["mean"] for entry in entries]), torch.stack([entry["std"] for entry in entries])


def encode_texts(
    texts: list[str],
    cache_dir: str | Path,
    text_encoder_identity: str,
    load_text_encoder: Callable,
    dtype: torch.dtype = torch.float32,
    process: tuple[int, int, Callable] = (0, 1, lambda: None),
) -> torch.Tensor:
    """Embeddings of `texts`, one cache entry for the whole list; keyed and cached as `encode_faces` does.

    Args:
        load_text_encoder: called only if the list is new; returns (tokenizer, text encoder).
        dtype: the precision they are kept in: that of the UNet.

    Shape: (texts, T, D).

    Raises:
        InputError: a text encodes to something that is not finite.
    """
    rank, _, barrier = process
    file = _entry(Path(cache_dir), "texts", text_encoder_identity, str(dtype), texts)
    entry = _read_entry(file)
    barrier()
    if entry is None and rank == 0:
        tokenizer, text_encoder = load_text_encoder()
        chunks = [texts[start : start + TEXT_BATCH] for start in range(0, len(texts), TEXT_BATCH)]
        bar = tqdm(chunks, desc="Encoding texts")
        embeddings = torch.cat([encode_text(tokenizer, text_encoder, chunk).to(dtype) for chunk in bar])
        if bad := [text for text, finite in zip(texts, embeddings.isfinite().all(2).all(1), strict=True) if not finite]:
            raise InputError(f"{len(bad)} texts encode to NaN or infinity, {bad[0][:60]!r} first: the text encoder of "
                             "pretrained_model is damaged, or overflows in this mixed_precision")
        _write_entry(file, {"embeddings": embeddings})
    barrier()
    return (entry or _read_back(file))["embeddings"]


@torch.no_grad()
def encode_image(vae, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of the latent posterior, times the scaling factor. (3, H, W) -> two of (C, h, w)."""
    posterior = vae.encode(pixels[None].to(vae.device, vae.dtype)).latent_dist
    scale = vae.config.scaling_factor
    return (posterior.mean[0] * scale).float().cpu(), (posterior.std[0] * scale).float().cpu()


@torch.no_grad()
def encode_text(tokenizer, text_encoder, texts: list[str]) -> torch.Tensor:
    """The text encoder's last hidden state after its final layer norm, padded to full length. Shape: (B, T, D)."""
    ids = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    return text_encoder(ids.to(text_encoder.device))[0].float().cpu()


def _entry(cache: Path, kind: str, *content) -> Path:
    key = hashlib.sha256(json.dumps([ENCODING_VERSION, kind, *content]).encode()).hexdigest()
    return cache / kind / key[:2] / f"{key}.safetensors"


def _read_entry(file: Path) -> dict[str, torch.Tensor] | None:
    """The tensors, or None if they have to be encoded (again): missing, torn, changed or not finite."""
    try:
        content = file.read_bytes()  # not load_file: its tensors are the file, and change or fail with it
        header, payload = _split(content)
        if json.loads(header)["__metadata__"]["sha256"] != hashlib.sha256(payload).hexdigest():
            return None
        tensors = load(content)
    except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError):
        return None
    return tensors if all(torch.isfinite(tensor).all() for tensor in tensors.values()) else None


def _read_back(file: Path) -> dict[str, torch.Tensor]:
    """An entry that this run, or another process of it, has just written."""
    entry = _read_entry(file)
    if entry is None:
        raise InputError(f"{file} was written a moment ago and is gone or damaged: leave cache_dir alone while a run "
                         "encodes, then the same command goes on")  # fmt: skip
    return entry


def _write_entry(file: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Whole or not at all: written beside its place, then renamed into it. The header has the hash of what follows."""
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    _, payload = _split(save(tensors))
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(save(tensors, {"sha256": hashlib.sha256(payload).hexdigest()}))
        replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def _split(content: bytes) -> tuple[bytes, bytes]:
    """Header (JSON) and tensors of a safetensors file, which starts with the header's length."""
    start = 8 + int.from_bytes(content[:8], "little")
    return content[8:start], content[start:]
