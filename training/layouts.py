"""Where captions come from: the original's JSON, or what other programs leave beside the pictures.

READERS lists the layouts; the first that a folder has is taken, the others are only compared with it. Standard library
only. Nothing outside the folder is read, but for the json_file that the user names.
"""

import csv
import difflib
import io
import json
import os
import re
import reprlib
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import NamedTuple

from training.files import InputError, grouped, printable

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".avif", ".gif", ".tif", ".tiff")
OTHER_PICTURES = (".heic", ".heif", ".jp2", ".jxl", ".tga", ".psd", ".svg")
SIDECARS = (".txt", ".caption")
KOHYA = r"(\d+)_(.+)"  # its folders: repeats, and what is in them
MAX_CAPTION_BYTES = 2**26  # a caption file of 64 MiB would describe 100,000 faces: larger ones aren't read
MAX_REPEATS = 1000  # of a kohya folder: more is a slip, or a year
MAX_COMPARED = 20  # missing names that are compared with all names that are there
SHAPE = 'expected [{"image_name": "image001", "captions": ["...", "..."]}, ...]'


class Entry(NamedTuple):
    """A picture as a layout describes it."""

    name: str  # inside the folder; the suffix may be missing
    captions: tuple[str, ...]  # none if there is nothing but blanks
    repeats: int = 1  # multiplies its weight
    is_described: bool = True  # False: the caption is only its folder's name


@dataclass
class Layout:
    """What was found, in words and as entries."""

    title: str  # "captions of a.json"
    lacking: str  # what a picture lacks that isn't listed: "an entry in a.json"
    entries: list[Entry]
    notes: list[str] = field(default_factory=list)  # lines for the report
    json_file: Path | None = None


# Files and names -------------------------------------------------------------------------------------------------


def shown(text: str) -> str:
    """Foreign text for the screen: cut, and printable."""
    return printable(text if len(text) <= 80 else f"{text[:80]}...")


def some_of(names: list[str]) -> str:
    """'7 (a, b, c, d, e ...)'."""
    return f"{len(names)} ({', '.join(map(shown, names[:5]))}{' ...' if len(names) > 5 else ''})"


def _key(name: str) -> str:
    """Equal for names that differ only in Unicode's normal form: macOS decomposes accents and kana."""
    return unicodedata.normalize("NFC", name)


def _stem(name: str) -> str:
    """Without the suffix of a picture."""
    return os.path.splitext(name)[0] if name.lower().endswith(IMAGE_SUFFIXES + OTHER_PICTURES) else name


def _files(folder: Path, suffixes: tuple[str, ...]) -> list[str]:
    """Names of the files with one of these suffixes, sorted."""
    names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []  # Path.is_dir() raises at too long a name
    return [name for name in names if name.lower().endswith(suffixes) and os.path.isfile(folder / name)]


def unread_pictures(folder: Path) -> list[str]:
    """Names of pictures in formats that aren't read, in kohya's folders, too."""
    names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    below = [name for name in names if re.fullmatch(KOHYA, name) and not os.path.islink(folder / name)]
    inside = [f"{name}/{other}" for name in below for other in _files(folder / name, OTHER_PICTURES)]
    return [*_files(folder, OTHER_PICTURES), *inside]


def check_inside(folder: Path, path: Path, name: str) -> None:
    """Raise InputError if `path` is a link out of `folder`."""
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        raise InputError(f"image_name {name[:80]!r} is a link out of {folder}: only files inside it are read")


def _read_text(file: Path, inside: Path | None = None) -> str:
    """A UTF-8 file's text. Raises InputError naming the file, and the byte that isn't UTF-8.

    inside: the folder that the file mustn't lead out of; None for the user's own json_file.
    """
    if inside:
        check_inside(inside, file, file.name)
    what = str(file) if inside else f"json_file={str(file)!r}"
    try:
        with open(file, "rb") as opened:
            content = opened.read(MAX_CAPTION_BYTES + 1)
    except OSError as error:
        raise InputError(f"{what} can't be read ({error.strerror}): set json_file to your captions") from None
    if len(content) > MAX_CAPTION_BYTES:
        raise InputError(f"{what} is larger than {MAX_CAPTION_BYTES / 2**20:.0f} MiB: set json_file to your captions")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: byte {error.start} is not UTF-8: save the file as UTF-8") from None


def find_image(dataset_dir: Path, name: str, listings: dict[Path, dict]) -> Path | None:
    """The file of `name` (suffix optional, case of the suffix free) inside `dataset_dir`, or None.

    `listings` keeps the folders' names from call to call: 10,000 names shouldn't be listed 10,000 times.

    Raises:
        InputError: the name leads out of the folder (absolute, drive, "..", backslash, link), holds a control
            character, or two files match.
    """
    windows, posix = PureWindowsPath(name), PurePosixPath(name)
    dots = not posix.parts or any(not part.strip(". ") for part in posix.parts)  # to Windows, ".. " is ".."
    if dots or windows.drive or posix.is_absolute() or re.search(r"[\0-\x1f\x7f-\x9f\\]", name):
        why = f"leads out of {dataset_dir}, or is no name on every system"
        raise InputError(f"image_name {name[:80]!r} {why}: only plain names inside the folder are read")
    folder = (dataset_dir / name).parent
    if folder not in listings:
        check_inside(dataset_dir, folder, name)
        listings[folder] = {}
        for file in _files(folder, IMAGE_SUFFIXES):
            for key in {os.path.splitext(file)[0], file}:
                listings[folder].setdefault(_key(key), []).append(folder / file)
    matches = listings[folder].get(_key(posix.name), [])
    # the same characters before the same text in another normal form
    matches = [path for path in matches if posix.name in (path.name, os.path.splitext(path.name)[0])] or matches
    if len(matches) > 1:
        files = " and ".join(path.name for path in matches)
        raise InputError(f"image_name {name[:80]!r} matches {files} in {folder}: remove one, or write its suffix too")
    for path in matches:
        check_inside(dataset_dir, path, name)
    return matches[0] if matches else None


def find_near(name: str, others: list[str]) -> str | None:
    """Which of `others` is most likely meant by `name`: only punctuation, case or a letter differs, but no number."""

    def plain(text: str) -> str:
        return re.sub(r"[\W_]+", "", _key(_stem(text))).casefold()

    numbers = re.findall(r"\d+", name)
    same = [other for other in others if re.findall(r"\d+", other) == numbers]
    if found := [other for other in same if plain(other) and plain(other) == plain(name)]:
        return found[0]
    stems = {_stem(other): other for other in same}
    near = difflib.get_close_matches(_stem(name)[:200], stems, 1, 0.85)
    return stems[near[0]] if near else None


def why_missing(dataset_dir: Path, missing: list[str], used: set[Path]) -> list[str]:
    """One line for each name without a picture, paired with a file that is left over and may be meant.

    used: the pictures that other names stand for.
    """
    left = [name for name in _files(dataset_dir, IMAGE_SUFFIXES) if dataset_dir / name not in used]
    unread = {_key(_stem(name)): name for name in unread_pictures(dataset_dir)}
    lines = []
    for number, name in enumerate(missing):
        line = "no image file of that name"
        if other := unread.get(_key(_stem(name))):
            line = f"{shown(other)} is in a format that isn't read: save it as PNG"
        elif number < MAX_COMPARED and (near := find_near(name, left)):
            line += f"; did you mean {shown(near)}?"
        lines.append(f"{shown(name)}: {line}")
    return lines


# Readers: a layout, or None if the folder has none of its kind -----------------------------------------------------


def _texts(value) -> list[str] | None:
    """One text or a list of texts as a list; None for anything else."""
    texts = [value] if isinstance(value, str) else value
    return texts if isinstance(texts, list) and all(isinstance(text, str) for text in texts) else None


def _merge(rows: list[tuple[str, str, list[str]]]) -> list[Entry]:
    """Entries of (where, name, captions), those of one name together, without blanks."""
    merged: dict[str, list[str]] = {}
    for where, name, captions in rows:
        if re.search("[\ud800-\udfff]", "".join([name, *captions])):
            raise InputError(f"{where}: half a surrogate pair is no character: fix it")
        merged.setdefault(name, []).extend(caption.strip() for caption in captions if caption.strip())
    return [Entry(name, tuple(captions)) for name, captions in merged.items()]


def read_captions(json_file: str | Path, inside: Path | None = None) -> list[Entry]:
    """Read `[{"image_name": "image001", "captions": ["...", "..."]}, ...]`, or kohya's meta_cap.json,
    `{"path/image001.png": {"caption": "...", "tags": "..."}, ...}`.

    In file order; blank captions are dropped, entries of the same image are merged; "captions" may be one text.

    Raises:
        InputError: the file is missing, too large, no UTF-8 JSON, or an entry is odd; names file, line or entry.
    """
    text = _read_text(Path(json_file), inside)
    try:
        entries = json.loads(text)
    except json.JSONDecodeError as error:
        line = text.split("\n")[error.lineno - 1].strip()[:60] if text.strip() else "the file is empty"
        raise InputError(f"{json_file}, line {error.lineno}: {error.msg} at {line!r}: fix it; {SHAPE}") from None
    except (RecursionError, ValueError) as error:
        raise InputError(f"{json_file}: not readable as JSON ({type(error).__name__}); {SHAPE}") from None
    dicts = [entry for entry in entries.values() if isinstance(entry, dict)] if isinstance(entries, dict) else []
    if any(entry.keys() & {"caption", "tags"} for entry in dicts):
        return _read_meta_cap(json_file, entries)
    if not isinstance(entries, list):
        raise InputError(f"{json_file}: the top level is a {type(entries).__name__}, not a list; {SHAPE}")
    rows = []
    for number, entry in enumerate(entries, start=1):
        name = entry.get("image_name") if isinstance(entry, dict) else None
        if not isinstance(name, str) or not name.strip():
            raise InputError(f"{json_file}, entry {number}: no image_name in {shown(reprlib.repr(entry))}; {SHAPE}")
        where = f"{json_file}, entry {number} ({name[:80]!r})"
        if (captions := _texts(entry.get("captions"))) is None:
            raise InputError(f"{where}: captions must be a text or a list of texts; {SHAPE}")
        rows.append((where, name, captions))
    return _merge(rows)


def _read_meta_cap(json_file: str | Path, entries: dict[str, dict]) -> list[Entry]:
    """Kohya's finetuning metadata. Of absolute names, which may be another machine's, the last part counts."""
    rows, files = [], {}
    for key, entry in entries.items():
        where = f"{json_file}, {key[:80]!r}"
        captions = [_texts(entry.get(name, "")) if isinstance(entry, dict) else None for name in ("caption", "tags")]
        if None in captions:
            raise InputError(f"{where}: caption and tags must be texts")
        is_absolute = PureWindowsPath(key).drive or key.startswith(("/", "\\"))
        name = PureWindowsPath(key).name if is_absolute else key.replace("\\", "/")
        if files.setdefault(name, key) != key:
            raise InputError(f"{where} and {files[name][:80]!r} are both {name[:80]} here: rename one")
        rows.append((where, name, captions[0] + captions[1]))
    return _merge(rows)


def _read_json(folder: Path, json_file: Path) -> Layout | None:
    """The user's json_file, wherever it is; else the file of its name in the folder; else the only JSON there."""
    inside = None if json_file.is_file() else folder
    if inside:
        files = _files(folder, (".json",))
        files = [json_file.name] if json_file.name in files else files
        if len(files) != 1:
            return None
        json_file = folder / files[0]
    name = shown(json_file.name)
    return Layout(f"captions of {name}", f"an entry in {name}", read_captions(json_file, inside), json_file=json_file)


def _read_rows(file: Path, rows: list[tuple[int, dict]]) -> Layout:
    """A metadata file, of (line, columns)."""
    found = []
    for line, row in rows:
        for column in ("file_name", "text"):
            if not isinstance(row.get(column), str) or (column == "file_name" and not row[column].strip()):
                columns = shown(", ".join(str(key) for key in row))
                raise InputError(f"{file}, line {line}: no column {column!r} with a text in it (columns: {columns})")
        found.append((f"{file}, line {line}", row["file_name"], [row["text"]]))
    return Layout(f"{file.name} (file_name, text)", f"a row in {file.name}", _merge(found))


def _read_jsonl(folder: Path, json_file: Path) -> Layout | None:
    """Hugging Face's imagefolder, one JSON object a line."""
    file, rows = folder / "metadata.jsonl", []
    if not file.is_file():
        return None
    for number, line in enumerate(_read_text(file, folder).split("\n"), start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except (RecursionError, ValueError):
                row = None
            if not isinstance(row, dict):
                raise InputError(f'{file}, line {number}: expected {{"file_name": "a.png", "text": "..."}}: fix it')
            rows.append((number, row))
    return _read_rows(file, rows)


def _read_csv(folder: Path, json_file: Path) -> Layout | None:
    """Hugging Face's imagefolder, as a table with a line of titles."""
    file = folder / "metadata.csv"
    if not file.is_file():
        return None
    reader = csv.DictReader(io.StringIO(_read_text(file, folder), newline=""))
    try:
        return _read_rows(file, [(reader.line_num, row) for row in reader])
    except csv.Error as error:
        raise InputError(f"{file}, line {reader.line_num}: {error}: fix it") from None


def _pair_sidecars(root: Path, folder: Path, default: str = "", repeats: int = 1) -> tuple[list[Entry], list, dict]:
    """(entries, lines on what is odd, {suffix: number of sidecars with a picture}) of one folder in `root`.

    Each line of `image.txt` or `image.caption` is a caption of `image.png`. Pictures without a sidecar get the
    caption `default`, or are left out if that is "".
    """
    files = _files(folder, IMAGE_SUFFIXES)
    pictures = grouped(files, (_key(_stem(file)) for file in files))
    captions, lone, suffixes, both = {}, [], {}, []
    for name in _files(folder, SIDECARS):
        stem, suffix = os.path.splitext(name)
        if _key(stem) not in pictures:
            lone.append(name)
            continue
        both += [name] if _key(stem) in captions else []
        lines = _read_text(folder / name, root).splitlines()
        captions.setdefault(_key(stem), []).extend(line.strip() for line in lines if line.strip())
        suffixes[suffix.lower()] = suffixes.get(suffix.lower(), 0) + 1
    entries = []
    for stem, names in pictures.items():
        for name in names if stem in captions or default else ():
            texts = tuple(captions.get(stem, [default]))
            entries.append(Entry((folder / name).relative_to(root).as_posix(), texts, repeats, stem in captions))
    notes = [f"Two sidecars of one picture, whose captions are joined: {some_of(both)}"] if both else []
    return entries, notes + _notes_on(folder, entries, lone), suffixes


def _notes_on(folder: Path, entries: list[Entry], lone: list[str]) -> list[str]:
    """Lines on sidecars that say nothing, or have no picture."""
    empty = [entry.name for entry in entries if not entry.captions]
    notes = [f"Empty sidecars: {some_of(empty)}"] if empty else []
    if lone:
        described = {PurePosixPath(entry.name).name for entry in entries if entry.is_described}
        left = [name for name in _files(folder, IMAGE_SUFFIXES) if name not in described]
        pairs = [(name, find_near(os.path.splitext(name)[0], left)) for name in lone[:MAX_COMPARED]]
        meant = [f"{shown(name)} - did you mean {shown(near)}?" for name, near in pairs if near]
        notes.append("; ".join([f"Sidecars without a picture: {some_of(lone)}", *meant[:5]]))
    return notes


def _read_sidecars(folder: Path, json_file: Path) -> Layout | None:
    """`image.txt` or `image.caption` beside `image.png`."""
    entries, notes, suffixes = _pair_sidecars(folder, folder)
    if not suffixes:
        return None
    kinds = ", ".join(f"{count} {suffix}" for suffix, count in sorted(suffixes.items()))
    return Layout(f"sidecars ({kinds})", "a sidecar", entries, notes)


def _read_kohya_folders(folder: Path, json_file: Path) -> Layout | None:
    """Folders `10_name`: 10 repeats; `name` is the caption of pictures without a sidecar."""
    entries, notes, titles = [], [], []
    for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else ():
        found = re.fullmatch(KOHYA, name)
        if not found or not os.path.isdir(folder / name):
            continue
        check_inside(folder, folder / name, name)
        if not _files(folder / name, IMAGE_SUFFIXES):
            continue
        repeats = int(found[1]) if len(found[1]) < 9 else MAX_REPEATS + 1
        if not 1 <= repeats <= MAX_REPEATS:
            asked = f"folder {shown(name)!r} in {folder} asks for {shown(found[1])} repeats"
            raise InputError(f"{asked}, where 1 to {MAX_REPEATS} are possible: rename it")
        own, odd, _ = _pair_sidecars(folder, folder / name, found[2].strip(), repeats)
        entries += own
        notes += [f"{shown(name)}: {note}" for note in odd]
        named = sum(not entry.is_described for entry in own)
        titles.append(f"{shown(name)} ({len(own)} pictures, {named} of them captioned by the folder's name)")
    return Layout(f"folders with repeats: {', '.join(titles)}", "a caption", entries, notes) if entries else None


READERS = (_read_json, _read_jsonl, _read_csv, _read_sidecars, _read_kohya_folders)


# What a folder has -------------------------------------------------------------------------------------------------


def read_layout(dataset_dir: Path, json_file: Path) -> Layout:
    """The captions of a folder, by the first of READERS that finds any; others that are there are named in the notes.

    Raises:
        InputError: there are none, they are bad, or another layout contradicts them.
    """
    taken, others, failed = None, [], None
    for read in READERS:
        try:
            layout = read(dataset_dir, json_file)
        except InputError as error:  # a stray JSON mustn't stand in the way of sidecars, nor a stray table in a JSON's
            if taken is None and (read is not _read_json or json_file.is_file()):
                raise
            others, failed = [*others, str(error)], failed or error
            continue
        if layout is None or not (layout.entries or layout.json_file == json_file):
            continue
        if taken is None:
            taken = layout
        else:
            _compare(dataset_dir, taken, layout)
            others.append(layout.title)
    if taken is None:
        raise failed or InputError(_why_nothing(dataset_dir, json_file))
    taken.notes += [f"Also there, and not used: {title}" for title in others]
    if pictures := unread_pictures(dataset_dir):
        taken.notes.append(f"Pictures in a format that isn't read: {some_of(pictures)}")
    return taken


def _compare(folder: Path, taken: Layout, other: Layout) -> None:
    """Raise InputError at the first picture of which two layouts say different things: no caption is in the other's."""

    def plain(captions: tuple[str, ...]) -> list[str]:
        return [" ".join(re.split(r"[\s_]+", caption.casefold())) for caption in captions]

    described = {_key(_stem(entry.name)): entry for entry in taken.entries if entry.captions and entry.is_described}
    for entry in other.entries:
        before = described.get(_key(_stem(entry.name)))
        if before is None or not entry.captions or not entry.is_described:
            continue
        ours, theirs = plain(before.captions), plain(entry.captions)
        if not any(one in another or another in one for one in ours for another in theirs):
            why = f"dataset_dir={str(folder)!r} holds two layouts that contradict each other: {shown(entry.name)} is"
            both = f"{shown(before.captions[0])!r} by {taken.title}, {shown(entry.captions[0])!r} by {other.title}"
            raise InputError(f"{why} {both}: move one of them out of the folder")


def _why_nothing(folder: Path, json_file: Path) -> str:
    """One line on why no layout was found."""
    jsons, sidecars, unread = _files(folder, (".json",)), _files(folder, SIDECARS), unread_pictures(folder)
    where = f"json_file={str(json_file)!r} is not there, and dataset_dir={str(folder)!r}"
    if len(jsons) > 1:
        return f"{where} holds more than one: set json_file to one of {some_of(jsons)}"
    also = f"; {some_of(unread)} of its pictures are in a format that isn't read" if unread else ""
    if sidecars:
        near = find_near(os.path.splitext(sidecars[0])[0], _files(folder, IMAGE_SUFFIXES))
        meant = f"; for {shown(sidecars[0])}, did you mean {shown(near)}?" if near else ""
        return f"{where} holds no picture for any of its sidecars, {some_of(sidecars)}{meant}{also}"
    return f"{where} holds no image.txt, metadata.jsonl or 10_name folder either: set json_file to your captions{also}"


def may_hold_captions(folder: str | Path) -> bool:
    """A quick look, before anything is read: is there any file or folder that a layout could be made of?"""
    ends = (".json", "metadata.jsonl", "metadata.csv", *SIDECARS)
    return any(name.lower().endswith(ends) or re.fullmatch(KOHYA, name) for name in os.listdir(folder))
