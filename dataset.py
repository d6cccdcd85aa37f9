"""Captions and faces in, weighted training samples out.

    caption JSON + image folder -> MangaFaceDataset: faces, hold-out split, TF-IDF weights, drawing order

One word for one thing, here and wherever the data set is used:

    face       a number: which of `dataset.faces`        text      a number: which of `dataset.texts`
    position   a number: which of `dataset.train`, the list of the faces that are trained on

Useful on its own: `MangaFaceDataset("faces_dataset", "faces_dataset/modified_face_250.json").report()`.
Letters in shapes: B batch, C latent channels, H W pixels, h w latent, T tokens, D text width.
"""

import hashlib
import inspect
import json
import os
import re
import reprlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np
import torch
from PIL import Image, ImageOps
from sklearn.feature_extraction.text import TfidfVectorizer

from training.files import InputError, sha256_of

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP")  # what Pillow may decode, whatever the suffix claims
MAX_CAPTION_BYTES = 2**26  # a caption file of 64 MiB would describe 100,000 faces: larger ones aren't read
MAX_PIXELS = 2**26  # of a picture: 8192 x 8192; small files can claim far more, and fill the memory
DHASH_SIDE = 32  # a picture's hash compares 32 x 32 neighbours; 8 x 8, as is common, takes all faces for one another
NEAR_DUPLICATE = 10  # of 1,024 bits may differ: a smaller JPEG of quality 60 has 8, the two likest faces 13
GOLDEN_RATIO = 0.618034  # its multiples, modulo 1, fill [0, 1) as evenly as any sequence can


@dataclass(frozen=True)
class Face:
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
        raise InputError(
            f"image_name {name[:80]!r} leads out of {dataset_dir}, or is no name on every system: only "
            "plain names inside the folder are read"
        )

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


def near_duplicates(faces: list["Face"]) -> list[int]:
    """For each face the first of its group: faces that look alike, mirrored or not, directly or by way of others.

    Of what is set in either hash less than an eighth may differ, so that pictures without contrast aren't all alike.
    Copies of one file are in one group, too. Compares all pairs: 10,000 faces take seconds.
    """
    plain, mirrored = (
        np.frombuffer(b"".join(face.dhashes[side] for face in faces), np.uint64).reshape(len(faces), -1)
        for side in (0, 1)
    )
    files, bits = np.array([face.sha256 for face in faces]), np.bitwise_count(plain).sum(axis=1, dtype=int)
    first = list(range(len(faces)))
    for index in range(len(faces)):
        differing = np.minimum(
            *(np.bitwise_count(plain[index] ^ others[:index]).sum(axis=1, dtype=int) for others in (plain, mirrored))
        )
        either = (bits[index] + bits[:index] + differing) // 2  # few in a soft picture: then few may differ
        alike = (differing <= NEAR_DUPLICATE) & (8 * differing < either) | (files[index] == files[:index])
        groups = {first[other] for other in np.flatnonzero(alike)}
        if groups:
            first[index] = min(groups)
            first = [first[index] if group in groups else group for group in first]
    return first


def _read_face(name: str, path: Path, captions: tuple[str, ...]) -> Face | str:
    """The face, or why its file can't be used. Decodes all of it: a torn file must fail here, not in epoch 3."""
    try:
        sha256 = sha256_of(path)
        picture = _upright_rgb(path)
    except MemoryError:  # is no fault of the picture's
        raise
    except Exception as error:  # on a damaged file Pillow also trips with struct.error, TypeError and others
        return f"{path.name}: {(str(error).splitlines() or [type(error).__name__])[0][:200]}"
    return Face(name, path, captions, sha256, picture.size, (dhash(picture), dhash(ImageOps.mirror(picture))))


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
        faces: every usable Face. train, validation: indices into faces.
        weights: float64, one per training face, mean 1 (all 1 with weighting "off").
        alike: groups of faces that are nearly the same picture.
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
        self.faces = self._read_faces(max(1, num_workers))
        self.train, self.validation = self._split(validation_share)
        self.weights = self._calculate_sample_weights() if weighting != "off" else np.ones(len(self.train))
        self.texts = list(dict.fromkeys(["", *(text for face in self.faces for text in face.texts)]))
        position = {text: index for index, text in enumerate(self.texts)}
        self.text_indices = [[position[text] for text in face.texts] for face in self.faces]

    @classmethod
    def from_config(cls, config) -> "MangaFaceDataset":
        """From the constants of the same names."""
        names = list(inspect.signature(cls).parameters)
        return cls(**{name: getattr(config, name) for name in names})

    def __len__(self) -> int:
        """Training faces; also the draws of one epoch."""
        return len(self.train)

    def __getitem__(self, index: int) -> dict:
        """{"pixel_values": (3, H, W) in [-1, 1], "captions": texts, "weight": float} of training face `index`."""
        face = self.faces[self.train[index]]
        pixels = load_image(face.path, self.resolution)
        return {"pixel_values": pixels, "captions": face.texts, "weight": float(self.weights[index])}

    @property
    def fingerprint(self) -> str:
        """Hash of every pixel file and caption: a run can only be resumed on the same data."""
        content = [(face.name, face.sha256, face.captions) for face in self.faces]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def _read_faces(self, threads: int) -> list[Face]:
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
        if usable := [face for face in faces if isinstance(face, Face)]:
            return usable
        raise InputError(self._why_empty())

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
        everything = list(range(len(self.faces)))
        wanted = max(4, round(share * len(everything)))
        groups: dict[int, list[int]] = {}
        for index, first in enumerate(near_duplicates(self.faces)):
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
        hashes = sorted(self.faces[index].sha256 for index in group)
        return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()

    def _term_rarity(self) -> tuple[TfidfVectorizer, list[np.ndarray]]:
        """The fitted vectorizer, and per training face the term ids in all of its captions (each once)."""
        documents = [" ".join(self.faces[index].captions) for index in self.train]
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
        sizes = [face.size for face in self.faces]
        listed = {face.path.name for face in self.faces} | {line.split(":")[0] for line in self.skipped}
        stray = [
            entry.name
            for entry in os.scandir(self.dataset_dir)
            if entry.name.lower().endswith(IMAGE_SUFFIXES)
            and entry.name not in listed
            and os.path.splitext(entry.name)[0] not in listed
        ]
        small = sum(min(size) < self.resolution for size in sizes)
        uneven = sum(width != height for width, height in sizes)
        captions = [caption for face in self.faces for caption in face.captions]
        lines = [
            f"Faces: {len(self.faces)} usable in {folder} "
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
            groups = [
                " = ".join(
                    [self.faces[index].name for index in group[:4]] + [f"{len(group) - 4} more"] * (len(group) > 4)
                )
                for group in self.alike
            ]
            more = f" and {len(groups) - 5} more" if len(groups) > 5 else ""
            lines.append(f"Nearly the same picture, kept on one side: {', '.join(groups[:5])}{more}")
        lines.append(
            f"Pixels: {min(map(min, sizes))} to {max(map(max, sizes))} a side; used at {self.resolution} x "
            f"{self.resolution}; {uneven} not square (centre square is used), {small} smaller (enlarged)"
        )
        per_face = len(captions) / len(self.faces)
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
                name = self.faces[self.train[position]].name
                lines.append(f"  {label} {self.weights[position]:.2f}  {name}: {words}")
        return lines
