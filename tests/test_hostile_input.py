"""Files that lie, reach outside or would run code; and what a locked-down machine or Windows asks for.

    python -m pytest tests/test_hostile_input.py

Every bad thing is refused, or skipped, in one line that names it; nothing outside the data set is opened or listed,
nothing is executed, and the tree is afterwards, byte for byte, what it was before.
"""

import ast
import builtins
import contextlib
import dataclasses
import io
import json
import os
import pickle
import runpy
import shutil
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from test_bad_input import DEMO_BASE, GOOD, check_captions_refused, check_refused, exit_of, flags, run, snapshot

import evaluate_lora
from dataset import MangaFaceDataset
from lora_layers import inject_lora, load_lora_weights, lora_modules, save_lora_weights
from train_manga_lora import FORMER
from training.base_model import load_unet, load_vae
from training.bases import BaseModelError
from training.encoding import encode_faces
from training.files import InputError, write_atomic
from training.layouts import MAX_CAPTION_BYTES
from training.pictures import IMAGE_FORMATS

NAMES = pytest.mark.promise("An image_name that leads out of the data set is refused by name, and nothing outside read")
CAPTIONS = pytest.mark.promise("A caption file, whatever is in it, is read or refused in one line, never a traceback")
PICTURES = pytest.mark.promise("A picture that is torn, a bomb or of another format is skipped by name, never decoded")
MODELS = pytest.mark.promise("A damaged or malicious base, LoRA or cache file is refused by name, and never executed")
OFFLINE = pytest.mark.promise("Training, export and evaluation work offline and write to output_dir and cache_dir only")
WINDOWS = pytest.mark.promise("Habits that Windows asks for: patient renames, UTF-8, no links, no open file replaced")
MODULES = sorted(ROOT.glob("*.py"))

watched = None  # while a list: every path that Python opens or lists


def _watch(event, arguments):
    if watched is not None and event in ("open", "os.listdir", "os.scandir") and isinstance(arguments[0], (str, bytes)):
        watched.append(os.path.realpath(os.fsdecode(arguments[0])))


sys.addaudithook(_watch)  # for good: hooks can't be taken away


@pytest.fixture
def opened():
    """Every path opened or listed during the test."""
    global watched
    watched = []
    yield watched
    watched = None


class Malicious:
    """Unpickled, it leaves a file `executed` in the working folder."""

    def __reduce__(self):
        return (exec, ("import pathlib; pathlib.Path('executed').touch()",))


def write_pickle(path: Path, kind: str) -> None:
    if kind == "torch.save":
        torch.save({"weight": torch.ones(2), "code": Malicious()}, path)
    else:
        path.write_bytes(pickle.dumps({"weight": 1, "code": Malicious()}, protocol=int(kind)))


def test_the_malicious_pickle_would_run_if_it_were_trusted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for kind in ("torch.save", "2", "4"):
        write_pickle(tmp_path / "a.bin", kind)
        with contextlib.suppress(RuntimeError):  # what it runs, it runs before it finds that this is no model
            torch.load(tmp_path / "a.bin", weights_only=False)
        assert (tmp_path / "executed").exists(), kind
        (tmp_path / "executed").unlink()


# Names -----------------------------------------------------------------------------------------------------------

LEADING_OUT = [
    "../secret",
    "../faces_secret/secret",
    "../faces/face0",
    "..",
    ".",
    "./",
    "...",
    "side/..",
    "side/../face0",
    "a/../../secret",
    ".. /secret",
    ". ./secret",
    "side/.../secret",
    "/etc/passwd",
    "//server/share/face0",
    "///secret",
    "C:face0",
    "c:/faces/face0",
    "C:\\faces\\face0",
    "\\\\server\\share\\face0",
    "\\\\?\\C:\\face0",
    "\\secret",
    "side\\face0",
    "..\\secret",
    "face0\0",
    "face0\0.png",
    "../secret\0.png",
    "face\n0",
    "\x1b[2Jface0",
    "face0\r",
    "face0\x7f",
    "face\x850",
    "link_out",
    "link_out.png",
    "link_of_link",
    "linked/secret",
    "linked/deep/secret",
    "linked/nothing",
    "prefix/secret",
    "system/passwd",
    "../" * 60 + "etc/passwd",
]
NOT_THERE = [
    "CON",
    "nul",
    "nul.png",
    "AUX.jpg",
    "COM1",
    "LPT9.webp",
    "CONIN$",
    "face0:stream",
    "face0.png::$DATA",
    "face0.",
    "face0 ",
    " face0",
    "FACE0",
    "Face0.png",
    "~/face0",
    "$HOME/face0",
    "%HOME%/face0",
    "%2e%2e/secret",
    "*",
    "face?",
    "[f]ace0",
    "file:///etc/passwd",
    "face0.tga",
    "modified_face_250.json",
    "pipe",
    "loop",
    "folder",
    "\uff0e\uff0e/secret",
    "face0\u202egnp.",
    "-rf",
    "x" * 300,
    "x" * 300 + "/face0",
    "x/" * 3000 + "face0",
]


@pytest.fixture
def traps(place) -> Path:
    """Secrets around the data set, and links to them in it."""
    faces = place / "faces"
    for folder in (place, place / "faces_secret", place / "outside", place / "outside" / "deep"):
        folder.mkdir(exist_ok=True)
        Image.new("L", (8, 8)).save(folder / "secret.png")
    (faces / "side").mkdir()
    (faces / "folder.png").mkdir()
    Image.new("L", (8, 8)).save(faces / "face0.tga")
    os.mkfifo(faces / "pipe.png")  # opened, it would wait for ever
    for link, target in (
        ("link_out.png", place / "secret.png"),
        ("link_of_link.png", "link_out.png"),
        ("linked", place / "outside"),
        ("prefix", "../faces_secret"),
        ("system", "/etc"),
        ("loop.png", "loop.png"),
    ):
        (faces / link).symlink_to(target)
    return place


def check_nothing_outside_was_read(place: Path, opened: list[str]) -> None:
    inside, page = os.path.realpath(place / "faces"), os.path.realpath(place / "out")  # which a dry run writes
    for path in (path for path in opened if not Path(path).is_relative_to(page)):
        assert path != "/etc" and not path.startswith("/etc/passwd"), path
        assert not Path(path).is_relative_to(os.path.realpath(place)) or Path(path).is_relative_to(inside), path
    assert any(Path(path).is_relative_to(inside) for path in opened)  # what was opened was indeed recorded


@NAMES
@pytest.mark.parametrize("name", LEADING_OUT)
def test_a_name_that_leaves_the_folder_is_refused(script, traps, opened, name):
    entries = [GOOD, {"image_name": name, "captions": ["x"]}]
    (traps / "faces" / "modified_face_250.json").write_text(json.dumps(entries))
    del opened[:]
    code, message = exit_of(script, flags(traps, DEMO_BASE))
    check_nothing_outside_was_read(traps, opened)
    assert code == 2 and len(message.splitlines()) == 1 and message.isprintable(), message
    assert repr(name[:80]) in message and "faces" in message and "inside" in message
    (traps / "faces" / "pipe.png").unlink()  # a snapshot would wait for it
    assert {path.name for path in traps.iterdir()} == {"faces", "faces_secret", "outside", "secret.png"}


@NAMES
@pytest.mark.parametrize("name", NOT_THERE)
def test_an_odd_name_is_no_face_on_any_system_and_is_skipped_by_name(script, traps, opened, capsys, name):
    entries = [GOOD, {"image_name": name, "captions": ["x"]}]
    (traps / "faces" / "modified_face_250.json").write_text(json.dumps(entries))
    del opened[:]
    assert exit_of(script, flags(traps, DEMO_BASE, "--dry_run")) == (0, "")
    check_nothing_outside_was_read(traps, opened)
    shown = name if len(name) <= 80 else f"{name[:80]}..."
    reason = (
        "face0.tga is in a format that isn't read: save it as PNG"
        if name == "face0.tga"
        else "no image file of that name"
    )
    assert f"  {shown}: {reason}\n" in capsys.readouterr().out


@NAMES
def test_names_that_a_terminal_would_obey_are_shown_escaped(script, place, capsys):
    shutil.copy(place / "faces" / "face1.png", place / "faces" / "\x1b]0;owned\x07\udcff.png")  # not even UTF-8
    assert exit_of(script, flags(place, DEMO_BASE, "--dry_run")) == (0, "")
    assert "Without an entry in modified_face_250.json: 1 (\\x1b]0;owned\\x07\\udcff.png)" in capsys.readouterr().out


# Captions --------------------------------------------------------------------------------------------------------

ODD_CAPTIONS = {  # content, words of the message
    "NaN as captions": (b'[{"image_name": "face0", "captions": NaN}]', ["entry 1", "'face0'", "list of texts"]),
    "Infinity as a caption": (b'[{"image_name": "face0", "captions": [-Infinity]}]', ["entry 1", "list of texts"]),
    "NaN as a name": (b'[{"image_name": NaN, "captions": ["x"]}]', ["entry 1", "no image_name", "nan"]),
    "NaN alone": (b"NaN", ["top level", "float"]),
    "1e999": (b"[1e999]", ["entry 1", "inf"]),
    "a name of a thousand digits": (b'[{"image_name": ' + b"7" * 1000 + b"}]", ["entry 1", "no image_name", "777"]),
    "a long name": (json.dumps([{"image_name": "x" * 10**5}]).encode(), ["entry 1", "'xxx", "list of texts"]),
    "a long entry": (json.dumps(["x" * 10**6]).encode(), ["entry 1", "no image_name", "xxx"]),
    "a long line": (b'[{"image_name": "' + b"x" * 10**6, ["line 1", "xxx"]),
    "nested entry": (b"[" + b'{"a": ' * 400 + b"1" + b"}" * 400 + b"]", ["entry 1", "no image_name"]),
    "nested name": (b'[{"image_name": ' + b"[" * 400 + b"]" * 400 + b"}]", ["entry 1", "no image_name"]),
    "nested captions": (b'[{"image_name": "face0", "captions": ' + b"[" * 400 + b"]" * 400 + b"}]", ["list of texts"]),
    "nested dictionaries": (b'{"a":' * 100_000, ["not readable as JSON"]),
    "two surrogates the wrong way": (b'[{"image_name": "\\ude00\\ud83d", "captions": []}]', ["entry 1", "surrogate"]),
    "surrogate as UTF-8": (b'[{"image_name": "\xed\xa0\xbd", "captions": []}]', ["byte 17", "UTF-8"]),
    "overlong UTF-8": (b'[{"image_name": "\xc0\xae\xc0\xae/secret", "captions": []}]', ["byte 17", "UTF-8"]),
    "UTF-16 without its mark": (json.dumps([GOOD]).encode("utf-16-le"), ["line 1"]),
    "UTF-32": (json.dumps([GOOD]).encode("utf-32"), ["UTF-8"]),
    "two marks": (b"\xef\xbb\xbf\xef\xbb\xbf" + json.dumps([GOOD]).encode(), ["line 1", "ufeff"]),
    "zeros": (b"\0" * 1000, ["line 1"]),
    "two documents": (json.dumps([GOOD]).encode() * 2, ["line 1", "Extra data"]),
    "one entry a line": (json.dumps(GOOD).encode() + b"\n" + json.dumps(GOOD).encode(), ["line 2", "Extra data"]),
    "single quotes": (b"[{'image_name': 'face0'}]", ["line 1"]),
    "a comment": (b"// faces\n[]", ["line 1", "// faces"]),
    "a pickle": (pickle.dumps([GOOD]), ["UTF-8"]),
    "a picture": (b"\x89PNG\r\n\x1a\n", ["UTF-8"]),
}


@CAPTIONS
@pytest.mark.parametrize("case", ODD_CAPTIONS)
def test_an_odd_caption_file_is_refused_with_its_place(script, place, case):
    check_captions_refused(script, place, *ODD_CAPTIONS[case])


@CAPTIONS
@pytest.mark.parametrize("size", [MAX_CAPTION_BYTES + 1, 100 * 2**20, 2**40])
def test_a_huge_caption_file_is_refused_without_being_read(script, place, size):
    file = place / "faces" / "modified_face_250.json"
    file.write_bytes(b"[")
    os.truncate(file, size)  # takes no space
    code, message = exit_of(script, flags(place, DEMO_BASE))
    assert code == 2 and message.startswith("json_file='faces/modified_face_250.json' is larger than 64 MiB: set")
    assert {path.name for path in place.iterdir()} == {"faces"}


junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
names = st.sampled_from(["face0", "face1", "face1.png", "face9", "../face0", "", "\ud800"]) | st.text() | junk
entries = st.fixed_dictionaries(
    {}, optional={"image_name": names, "captions": st.lists(st.text() | junk, max_size=4) | junk, "more": junk}
)
mild = st.fixed_dictionaries(
    {"image_name": st.sampled_from(["face0", "face1", "face1.png", "face9"]), "captions": st.lists(st.text())},
    optional={"more": junk},
)
written = st.builds(
    lambda content, ascii_only, encoding: json.dumps(content, ensure_ascii=ascii_only).encode(encoding, "ignore"),
    st.lists(mild, min_size=1, max_size=4) | st.lists(entries | mild | junk, max_size=4) | junk,
    st.booleans(),
    st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "latin-1"]),
)
cut = st.builds(
    lambda content, at, more: content[:at] + more + content[at:],
    written,
    st.integers(0, 300),
    st.binary(max_size=4) | st.sampled_from([b'"', b"{", b"]", b",", b"\\ud83d", b"NaN"]),
)


@CAPTIONS
def test_no_caption_file_whatsoever_is_a_traceback(script, small_faces, tmp_path, monkeypatch, record_property):
    shutil.copytree(small_faces, tmp_path / "faces")
    monkeypatch.chdir(tmp_path)
    outcomes = {0: 0, 2: 0}

    @settings(max_examples=300, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(written | cut | st.binary())
    def check(content):
        (tmp_path / "faces" / "modified_face_250.json").write_bytes(content)
        code, message = exit_of(script, flags(tmp_path, DEMO_BASE, "--dry_run"))
        outcomes[code] += 1  # any other is a KeyError
        assert code == 0 or ("face" in message and len(message.splitlines()) == 1 and len(message) < 600), message

    check()
    record_property("cases", sum(outcomes.values()))
    assert min(outcomes.values()) > 10  # neither is all refused nor nothing
    assert {path.name for path in tmp_path.rglob("*") if path.parent != tmp_path / "faces"} <= {
        "faces",
        "out",
        "dataset.html",
    }


# Pictures --------------------------------------------------------------------------------------------------------


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, *more: bytes, depth: int = 8, pixels: bytes = b"\0" * 100) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(more) + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")


def encoded(mode: str, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    picture = Image.effect_noise((40, 40), 80)
    bands = len(Image.new(mode, (1, 1)).getbands())
    picture = picture.convert(mode) if mode in ("1", "P", "I", "F") else Image.merge(mode, [picture] * bands)
    if options.get("save_all"):
        options["append_images"] = [Image.effect_noise((40, 40), 80).convert(mode)]
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def bmp(width: int, height: int) -> bytes:
    content = bytearray(encoded("RGB", "BMP"))
    content[18:26] = struct.pack("<ii", width, height)
    return bytes(content)


def gif(width: int, height: int) -> bytes:
    content = encoded("RGB", "GIF")
    return content[:6] + struct.pack("<HH", width, height) + content[10:]


def tiff(width: int, height: int) -> bytes:
    content = encoded("L", "TIFF")
    for tag, side in ((256, width), (257, height)):
        for kind, size in ((3, "<H"), (4, "<I")):  # as a number of 16 bits or of 32
            field = struct.pack("<HHI", tag, kind, 1)
            if field in content:
                start = content.index(field) + 8
                content = content[:start] + struct.pack(size, side) + content[start + struct.calcsize(size) :]
    return content


BOMBS = {  # content, a word of the reason
    "50000 x 50000": (png(50_000, 50_000), "2500000000 pixels"),
    "12000 x 12000": (png(12_000, 12_000), "12000 x 12000 pixels"),
    "8193 x 8192": (png(8193, 8192), "8193 x 8192 pixels"),
    "largest claim": (png(2**31 - 1, 2**31 - 1), "pixels"),
    "a line of 60 megapixels": (png(60_000_000, 1), "truncated"),
    "no width": (png(0, 8), "identify"),
    "no height": (png(8, 0), "identify"),
    "three bits": (png(8, 8, depth=3), "identify"),
    "a text of 50 MB": (png(8, 8, chunk(b"zTXt", b"a\0\0" + zlib.compress(b"x" * 50_000_000))), "too large"),
    "a colour profile of 50 MB": (png(8, 8, chunk(b"iCCP", b"a\0\0" + zlib.compress(b"x" * 50_000_000))), "too large"),
    "BMP 50000 x 50000": (bmp(50_000, 50_000), "2500000000 pixels"),
    "BMP 8000 x 8000 without its pixels": (bmp(8000, 8000), "truncated"),
    "GIF 65535 x 65535": (gif(65535, 65535), "4294836225 pixels"),
    "TIFF 50000 x 50000": (tiff(50_000, 50_000), "2500000000 pixels"),
    "BMP of negative width": (bmp(-40, 40), "pixels"),
}
OTHER_FORMATS = {
    "text": b"not a picture",
    "HTML": b"<html><img src=x></html>",
    "JSON": b"[]",
    "nothing": b"",
    "one byte": b"\x89",
    "SVG": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
    "PSD": b"8BPS\0\1" + b"\0" * 60,
    "a pickle": pickle.dumps([]),
    "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(executed) (w) file closefile\n",
    "PDF": b"%PDF-1.7\n",
    "FITS": b"SIMPLE  =                    T" + b" " * 2880,
    "WMF": b"\xd7\xcd\xc6\x9a" + b"\0" * 40,
    "a zip": b"PK\3\4" + b"\0" * 60,
    "a program": b"\x7fELF" + b"\0" * 60,
} | {kind: encoded("RGB", kind) for kind in ("DDS", "ICNS", "ICO", "JPEG2000", "PCX", "PPM", "QOI", "SGI", "TGA")}
WHOLE = {
    "png": encoded("RGB", "PNG"),
    "apng": encoded("RGB", "PNG", save_all=True),
    "grey.png": encoded("L", "PNG"),
    "jpg": encoded("RGB", "JPEG"),
    "progressive.jpg": encoded("RGB", "JPEG", progressive=True),
    "cmyk.jpg": encoded("CMYK", "JPEG"),
    "webp": encoded("RGB", "WEBP"),
    "bmp": encoded("RGB", "BMP"),
    "lossless.webp": encoded("RGBA", "WEBP", lossless=True),
    "gif": encoded("RGB", "GIF"),
    "moving.gif": encoded("P", "GIF", save_all=True),
    "tif": encoded("RGB", "TIFF"),
    "lzw.tif": encoded("CMYK", "TIFF", compression="tiff_lzw"),
    "avif": encoded("RGB", "AVIF"),
    "moving.webp": encoded("RGB", "WEBP", save_all=True),
}


@pytest.fixture
def no_other_decoder(monkeypatch):
    """Any other of Pillow's decoders, if it is as much as asked, fails the test."""
    Image.init()

    def forbidden(*_):
        pytest.fail("another decoder was run")  # no `except Exception` swallows it

    for name, (_, accept) in Image.OPEN.items():
        if name not in IMAGE_FORMATS:
            monkeypatch.setitem(Image.OPEN, name, (forbidden, accept and forbidden))


def check_skipped(script, place: Path, content: bytes, suffix: str, *words: str) -> None:
    """The only picture is refused by name; beside a good one it is skipped."""
    (place / "faces" / f"bad{suffix}").write_bytes(content)
    bad = {"image_name": "bad", "captions": ["x"]}
    (place / "faces" / "modified_face_250.json").write_text(json.dumps([bad]))
    check_refused(script, place, flags(place, DEMO_BASE), "no usable face", "1 skipped", f"bad{suffix}: ", *words)
    (place / "faces" / "modified_face_250.json").write_text(json.dumps([bad, GOOD]))
    faces = MangaFaceDataset("faces", "faces/modified_face_250.json", 8)
    assert [sample.name for sample in faces.faces] == ["face0"] and len(faces.skipped) == 1


@PICTURES
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("case", BOMBS)
def test_a_picture_that_claims_too_much_is_skipped_by_name(script, place, no_other_decoder, case):
    content, word = BOMBS[case]
    check_skipped(script, place, content, ".png", word)


@PICTURES
@pytest.mark.parametrize("case", OTHER_FORMATS)
def test_another_format_under_a_picture_s_name_reaches_no_decoder(script, place, no_other_decoder, case):
    suffix = (".png", ".jpg", ".webp", ".bmp", ".JPEG")[len(case) % 5]
    check_skipped(script, place, OTHER_FORMATS[case], suffix, "cannot identify")


@PICTURES
@pytest.mark.parametrize("kind", WHOLE)
def test_a_picture_cut_off_at_each_tenth_is_skipped_by_name(script, place, no_other_decoder, kind, record_property):
    whole, suffix = WHOLE[kind], kind.split(".")[-1].replace("apng", "png")
    first = len(whole) // 2 if "apng" in kind or "moving" in kind else len(whole)  # the first frame counts
    for tenth in range(10):
        check_skipped(script, place, whole[: first * tenth // 10], f".{suffix}")
    record_property("cases", 10)
    (place / "faces" / f"bad.{suffix}").write_bytes(whole)
    assert len(MangaFaceDataset("faces", "faces/modified_face_250.json", 8).faces) == 2


# Bases, LoRA files, cache ----------------------------------------------------------------------------------------

CONFIGS = [
    "unet/config.json",
    "vae/config.json",
    "text_encoder/config.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/tokenizer.json",
    "scheduler/scheduler_config.json",
]
WEIGHTS = [
    "unet/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
]
CONTENTS = {
    "nothing": b"",
    "a list": b"[]",
    "binary": b"\xff\x80" * 50,
    "deep nesting": b"[" * 100_000,
    "a pickle": pickle.dumps(Malicious()),
}


def spoil(path: Path, damage: str) -> None:
    """Put something else in the place of a file of a base or a run."""
    if damage in CONTENTS:
        path.write_bytes(CONTENTS[damage])
    elif damage == "torn":
        os.truncate(path, path.stat().st_size // 2)
    elif damage == "texts for numbers":
        content = json.loads(path.read_text())
        is_number = {key: type(value) in (int, float) for key, value in content.items()}
        path.write_text(json.dumps({key: "evil" if is_number[key] else value for key, value in content.items()}))
    elif damage.startswith("pickle"):
        path.unlink()
        name = "pytorch_model.bin" if path.name == "model.safetensors" else f"{path.stem}.bin"
        write_pickle(path.with_name(name), damage.split()[1])
    else:
        tensors = load_file(path)
        name = sorted(tensors)[3]
        tensors |= {
            name: {
                "a weight not finite": tensors[name] / 0,
                "a weight of another shape": torch.ones(3, 5),
                "a weight missing": None,
            }[damage]
        }
        save_file({key: value for key, value in tensors.items() if value is not None}, path, {"format": "pt"})


BASE_DAMAGE = (
    [(file, damage) for file in CONFIGS for damage in [*CONTENTS, "torn"]]
    + [(file, "texts for numbers") for file in CONFIGS if not file.endswith("tokenizer.json")]
    + [
        (file, damage)
        for file in WEIGHTS
        for damage in [
            "nothing",
            "binary",
            "a pickle",
            "torn",
            "a weight missing",
            "a weight not finite",
            "a weight of another shape",
            "pickle torch.save",
            "pickle 2",
            "pickle 4",
        ]
    ]
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> str:
    """For what the other parts encode before the damage is met."""
    return str(tmp_path_factory.mktemp("cache"))


@MODELS
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:Detected pickle protocol")
@pytest.mark.parametrize(("file", "damage"), BASE_DAMAGE)
def test_a_base_with_a_hostile_file_is_named_and_nothing_of_it_is_run(script, place, tiny_base, cache, file, damage):
    base = place / "faces" / "base"  # in the folder whose bytes are compared
    shutil.copytree(tiny_base, base)
    spoil(base / file, damage)
    before = snapshot(place)
    code, message = exit_of(script, flags(place, "faces/base", "--cache_dir", cache))
    assert code == 2 and len(message.splitlines()) == 1 and len(message) < 600, message
    assert str(Path("faces", "base", file).parent) in message and "get the base again" in message
    assert snapshot(place) == before  # so no file `executed`


@MODELS
def test_custom_code_in_a_base_is_never_imported(script, place, tiny_base):
    shutil.copytree(tiny_base, place / "base")
    index = json.loads((place / "base" / "model_index.json").read_text())
    (place / "base" / "model_index.json").write_text(json.dumps(index | {"unet": ["evil", "Evil"]}))
    for part in ("unet", "tokenizer", "."):
        (place / "base" / part / "evil.py").write_text("import pathlib\npathlib.Path('executed').touch()\n")
    more = {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"}
    for file in ("tokenizer/tokenizer_config.json", "unet/config.json"):
        content = json.loads((place / "base" / file).read_text())
        (place / "base" / file).write_text(json.dumps(content | more))
    assert exit_of(script, flags(place, "base"))[0] == 0
    assert (place / "out" / "summary.json").is_file() and not (place / "executed").exists()
    constants = json.loads((place / "out" / "config.json").read_text())["constants"]
    device, faces = torch.device("cpu"), MangaFaceDataset("faces", "faces/modified_face_250.json", 64)
    constants |= {"sample_prompts": ["a face"], "samples_per_prompt": 1, "sample_steps": 1}
    evaluate_lora.Evaluation(script.TrainingConfig(**constants), faces, place / "base", device)
    assert not (place / "executed").exists()


@pytest.fixture(scope="module")
def evaluation(small_faces, tiny_base, tmp_path_factory, script):
    """(an evaluation of the tiny base, a good LoRA file for it)."""
    folder = tmp_path_factory.mktemp("evaluation")
    config = script.TrainingConfig(
        cache_dir=str(folder), sample_prompts=("a face",), samples_per_prompt=1, sample_steps=1, resolution=64
    )
    faces = MangaFaceDataset(small_faces, small_faces / "modified_face_250.json", 64)
    built = evaluate_lora.Evaluation(config, faces, tiny_base, torch.device("cpu"))
    unet, _ = load_unet(tiny_base, torch.device("cpu"), torch.float32)
    inject_lora(unet, 4, 4)
    return built, save_lora_weights(unet, folder / "good.safetensors")


LORA_DAMAGE = [*CONTENTS, "torn", "a weight missing", "a weight not finite", "a weight of another shape"]


@MODELS
@pytest.mark.parametrize("damage", [*LORA_DAMAGE, "torch.save", "2", "4"])
def test_a_hostile_lora_file_is_refused_by_name_and_not_run(script, place, evaluation, tiny_base, damage):
    built, good = evaluation
    file = place / "pytorch_lora_weights.safetensors"
    shutil.copy(good, file)
    spoil(file, damage) if damage in LORA_DAMAGE else write_pickle(file, damage)
    before = snapshot(place)
    with pytest.raises(InputError, match=r"pytorch_lora_weights\.safetensors.* train it again") as refused:
        built.judge(file)
    assert len(str(refused.value).splitlines()) == 1
    unet, _ = load_unet(tiny_base, torch.device("cpu"), torch.float32)
    shutil.copy(file, place / "pytorch_lora_weights.bin")
    if not damage.startswith("a weight"):
        with pytest.raises(ValueError, match=r"pytorch_lora_weights\.bin"):
            load_lora_weights(unet, place / "pytorch_lora_weights.bin")
    (place / "pytorch_lora_weights.bin").unlink()
    assert not lora_modules(unet) and snapshot(place) == before
    if damage == LORA_DAMAGE[0]:
        assert built.judge(good).features.pixels  # and the next file is judged as ever


@pytest.fixture
def finished(script, place, evaluation, tiny_base) -> Path:
    """A folder that evaluate_lora.py takes for a finished training."""
    (place / "out").mkdir()
    shutil.copy(evaluation[1], place / "out" / "pytorch_lora_weights.safetensors")
    config = script.parse_arguments(
        [*flags(place, tiny_base), "--sample_prompts", "a face", "--samples_per_prompt", "1", "--sample_steps", "1"]
    )
    data = MangaFaceDataset(config.dataset_dir, config.json_file, config.resolution).fingerprint
    content = {"constants": dataclasses.asdict(config), "data": data, "base": str(tiny_base)}
    (place / "out" / "config.json").write_text(json.dumps(content))
    return place / "out"


def check_evaluation_refused(place: Path, *words: str) -> None:
    before = snapshot(place)
    with pytest.raises(InputError) as refused:
        evaluate_lora.main(["--lora", "out"])
    message = str(refused.value)
    assert len(message.splitlines()) == 1 and len(message) < 600 and snapshot(place) == before, message
    for word in words:
        assert word in message, message


RUN_DAMAGE = {  # change of config.json's content, words of the message
    "no constants": (lambda run: run.pop("constants"), ["not that of a finished training", "constants"]),
    "constants a list": (lambda run: run.update(constants=[1]), ["not that of a finished training"]),
    "no base": (lambda run: run.pop("base"), ["not that of a finished training", "base"]),
    "a base that is a number": (lambda run: run.update(base=7), ["not that of a finished training"]),
    "a base on the hub": (lambda run: run.update(base="evil/model"), ["base='evil/model'", "no folder"]),
    "a base that is none": (lambda run: run.update(base="faces"), []),
    "an unknown constant": (lambda run: run["constants"].update(evil=1), ["not that of", "evil"]),
    "a resolution in words": (lambda run: run["constants"].update(resolution="big"), ["resolution='big'"]),
    "a rank of 0": (lambda run: run["constants"].update(lora_rank=0), ["lora_rank=0"]),
    "prompts that are numbers": (lambda run: run["constants"].update(sample_prompts=[1]), ["sample_prompts=(1,)"]),
    "prompts that are a number": (lambda run: run["constants"].update(sample_prompts=1), ["not that of"]),
    "other captions": (lambda run: run.update(data="0"), ["have changed since the training"]),
    "another data set": (lambda run: run["constants"].update(dataset_dir="gone"), ["dataset_dir='gone'"]),
    "no captions": (lambda run: Path("faces", "modified_face_250.json").unlink(), ["json_file=", "is not a file"]),
}


@MODELS
@pytest.mark.parametrize("damage", [*RUN_DAMAGE, *CONTENTS, "torn"])
def test_a_hostile_run_folder_is_refused_by_evaluation(place, finished, damage):
    file = finished / "config.json"
    if damage not in RUN_DAMAGE:
        spoil(file, damage)
        check_evaluation_refused(place, str(Path("out", "config.json")), "not that of a finished training")
        return
    change, words = RUN_DAMAGE[damage]
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    if damage == "a base that is none":
        with pytest.raises(BaseModelError, match="no diffusers folder"):
            evaluate_lora.main(["--lora", "out"])
    else:
        check_evaluation_refused(place, *words)


def test_a_run_of_a_former_version_is_scored_as_it_was_trained(finished, monkeypatch):
    file, seen = finished / "config.json", []
    content = json.loads(file.read_text())
    for name in FORMER:
        del content["constants"][name]
    file.write_text(json.dumps(content))
    read = evaluate_lora.MangaFaceDataset.from_config
    monkeypatch.setattr(evaluate_lora.MangaFaceDataset, "from_config", lambda *run: seen.append(read(*run)) or seen[0])
    evaluate_lora.main(["--lora", "out"])
    assert (seen[0].framing, seen[0].trim_frames, seen[0].shuffle_tags, seen[0].prefix) == ("square", False, False, "")
    assert (finished / "scores.json").is_file()


@MODELS
def test_evaluation_never_runs_the_bin(place, finished, capsys):
    write_pickle(finished / "pytorch_lora_weights.bin", "torch.save")
    evaluate_lora.main(["--lora", "out"])
    assert "copies of training faces" in capsys.readouterr().out and not (place / "executed").exists()
    (finished / "pytorch_lora_weights.safetensors").unlink()
    check_evaluation_refused(place, str(Path("out", "pytorch_lora_weights.bin")), "nothing in it was run")


@MODELS
@pytest.mark.parametrize("content", [*CONTENTS, "torch.save", "2", "4"])
def test_a_hostile_cache_file_is_neither_run_nor_used(script, place, tiny_base, content):
    faces = MangaFaceDataset("faces", "faces/modified_face_250.json", 64)
    load = lambda: load_vae(tiny_base, torch.device("cpu"))  # noqa: E731
    latents = list(encode_faces(faces, "cache", "vae", load))
    files = sorted((place / "cache").rglob("*.records"))
    before = [file.read_bytes() for file in files]
    for file in files:
        spoil(file, content) if content in CONTENTS else write_pickle(file, content)
    again = encode_faces(faces, "cache", "vae", load)
    assert all(torch.equal(new, old) for new, old in zip(again, latents, strict=True))
    made = next(file for file in (place / "cache").rglob("*.records") if file not in files)
    assert len(files) == 1 and len(before[0]) == made.stat().st_size and not (place / "executed").exists()


# On the command line: a handful, as a person meets them -----------------------------------------------------------


@pytest.mark.promise("Bad input is told in one line with its name and value, and changes nothing")
@pytest.mark.parametrize("case", ["name", "base"])
def test_on_the_command_line_hostile_input_is_one_line_and_exit_code_two(place, tiny_base, case):
    if case == "name":
        entries = [{"image_name": "../\x1b[31msecret", "captions": ["x"]}]
        (place / "faces" / "modified_face_250.json").write_text(json.dumps(entries))
    else:
        shutil.copytree(tiny_base, place / "base")
        spoil(place / "base" / "vae" / "config.json", "a pickle")
    before = snapshot(place)
    code, out, err, _ = run(place, *flags(place, "base" if case == "base" else tiny_base))
    last = err.strip().splitlines()[-1]
    assert code == 2 and last.startswith("train_manga_lora.py: ") and "Traceback" not in out + err, err
    assert {"name": "'../\\x1b[31msecret'", "base": str(Path("vae", "config.json"))}[case] in last
    assert snapshot(place) == before


# Offline and locked down -------------------------------------------------------------------------------------------

WATCHDOG = """
import json, os, runpy, sys

writes, opened_at_rename = [], []

def is_open(path):  # or mapped into memory: Windows would refuse to replace or delete it
    path = os.path.realpath(path)
    with open("/proc/self/maps", encoding="utf-8") as file:
        if any(line.rstrip().endswith(path) for line in file):
            return True
    return any(os.path.realpath(f"/proc/self/fd/{number}") == path for number in os.listdir("/proc/self/fd"))

def watch(event, arguments):
    if event.startswith("socket.") and event != "socket.gethostname":
        raise OSError(f"{event}{arguments}: there is no network here")
    if event == "open" and isinstance(arguments[0], str) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        writes.append([event, arguments[0]])
    if event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod",
                 "shutil.rmtree", "tempfile.mkstemp", "tempfile.mkdtemp"):
        paths = [os.fsdecode(path) for path in arguments[:2] if isinstance(path, (str, bytes, os.PathLike))]
        within = event in ("os.remove", "os.rmdir") and arguments[-1] not in (None, -1)  # a step of shutil.rmtree
        writes.extend([event, path] for path in paths if not within)
        if event in ("os.rename", "os.remove") and not within:
            opened_at_rename.extend(path for path in paths if os.path.isfile(path) and is_open(path))

sys.addaudithook(watch)
scripts, report = json.loads(sys.argv[1]), sys.argv[2]
for script, *arguments in scripts:
    sys.argv = [script, *arguments]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as stop:
        assert not stop.code, stop.code
done = json.dumps({"writes": writes, "opened_at_rename": opened_at_rename})
with open(report, "w", encoding="utf-8") as file:
    file.write(done)
"""


@pytest.fixture(scope="module")
def locked_down(tmp_path_factory, shared_faces, tiny_base):
    """(folder, report) of a training with pictures and export, and its evaluation, watched, without a network."""
    folder = tmp_path_factory.mktemp("locked")
    for name in ("home", "tmp", "work"):
        (folder / name).mkdir()
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "XDG_", "TORCH"))}
    clean |= {name: str(folder / "home") for name in ("HOME", "USERPROFILE")}
    clean |= {"TMPDIR": str(folder / "tmp"), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    clean |= {"PYTHONIOENCODING": "ascii"}  # a console that lacks the characters of a face's name
    train = flags(
        folder,
        tiny_base,
        "--sample_prompts",
        "a face",
        "--samples_per_prompt",
        "1",
        "--sample_steps",
        "1",
        "--lora_rank",
        "4",
        "--sample_every_n_epochs",
        "1",
        "--num_train_epochs",
        "2",
        "--keep_checkpoints",
        "1",
    )
    train[train.index("--dataset_dir") + 1] = str(shared_faces)
    train[train.index("--json_file") + 1] = str(shared_faces / "modified_face_250.json")
    scripts = [[str(ROOT / "train_manga_lora.py"), *train], [str(ROOT / "evaluate_lora.py"), "--lora", "out"]]
    report = folder / "report.json"
    done = subprocess.run(
        [sys.executable, "-B", "-c", WATCHDOG, json.dumps(scripts), str(report)],
        env=clean,
        cwd=folder / "work",
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return folder, json.loads(report.read_text()) | {"out": done.stdout}


@OFFLINE
def test_training_export_and_evaluation_need_no_network(locked_down, record_property):
    folder, report = locked_down
    assert "Your LoRA: " in report["out"] and report["out"].count("copies of training faces") == 2
    assert {"summary.json", "scores.json", "pytorch_lora_weights.bin"} <= set(os.listdir(folder / "work" / "out"))
    record_property("cases", 3)


@OFFLINE
def test_nothing_is_written_outside_output_dir_and_cache_dir(locked_down, record_property):
    folder, report = locked_down
    allowed = [folder / "work" / "out", folder / "work" / "cache", folder / "tmp"]
    places = {os.path.realpath(folder / "work" / path) for _, path in report["writes"]} - {os.devnull}
    assert [path for path in places if not any(Path(path).is_relative_to(good) for good in allowed)] == []
    assert len(places) > 30  # what is written was indeed recorded
    assert {path.name for path in (folder / "work").iterdir()} == {"out", "cache"}  # nor by compiled code
    assert list((folder / "home").rglob("*")) == []
    assert all(path.match("tmp/torchinductor_*") for path in (folder / "tmp").rglob("*"))  # PyTorch's, and empty
    record_property("cases", len(places))


# Windows habits --------------------------------------------------------------------------------------------------


@WINDOWS
def test_no_link_is_made_and_no_open_file_replaced_or_deleted(locked_down, record_property):
    _, report = locked_down
    events = [event for event, _ in report["writes"]]
    assert "os.link" not in events and "os.symlink" not in events
    opened = set(report["opened_at_rename"]) - {"out/.lock"}  # held, and never renamed
    assert events.count("os.rename") > 20 and not opened
    record_property("cases", events.count("os.rename"))


@WINDOWS
@pytest.mark.parametrize("refusals", [0, 1, 4, 5, 6])
def test_a_rename_that_windows_refuses_for_a_moment_is_tried_again(tmp_path, monkeypatch, refusals):
    waited, real, left = [], os.replace, [PermissionError(13, "in use by another process")] * refusals

    def refusing(source, target):
        if left:
            raise left.pop()
        real(source, target)

    monkeypatch.setattr(os, "replace", refusing)
    monkeypatch.setattr(time, "sleep", waited.append)
    if refusals <= 5:
        write_atomic(tmp_path / "a", b"new")
        assert (tmp_path / "a").read_bytes() == b"new"
    else:
        with pytest.raises(PermissionError):
            write_atomic(tmp_path / "a", b"new")
        assert list(tmp_path.iterdir()) == []
    assert len(waited) == min(refusals, 5) and sum(waited) < 2


def calls(path: Path):
    """(name, call) of every call in a source file: ("os.replace", ...), ("file.write_text", ...)."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


@WINDOWS
def test_every_file_is_renamed_by_the_patient_function_and_none_linked():
    for path in MODULES:
        found = [
            name
            for name, _ in calls(path)
            if name in ("os.rename", "os.replace", "os.link", "os.symlink")
            or name.endswith((".symlink_to", ".hardlink_to", ".rename"))
        ]
        assert found == (["os.replace"] * 2 if path.name == "checkpoint.py" else []), path


@WINDOWS
@pytest.mark.parametrize("path", [*MODULES, *ROOT.glob("demo/*.py"), *ROOT.glob("bench/*.py")], ids=lambda p: p.name)
def test_every_text_is_utf_8_whatever_the_system_prefers(path):
    for name, call in calls(path):
        options = {option.arg: ast.unparse(option.value) for option in call.keywords}
        where = f"{path.name}, line {call.lineno}: {ast.unparse(call)[:80]}"
        modes = [value.value for value in call.args[1:2] if isinstance(value, ast.Constant)]
        if name == "open" and "b" not in str(modes or options.get("mode", "")):
            assert options.get("encoding") == "'utf-8'", where
        if name.endswith((".read_text", ".write_text")):
            positional = call.args[1 if name.endswith("write_text") else 0 :]
            assert "utf-8" in options.get("encoding", "") + "".join(map(ast.unparse, positional)), where
        assert "text" not in options or "encoding" in options or not name.startswith("subprocess."), where


@WINDOWS
@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.name)
def test_a_spawned_process_that_imports_a_module_again_starts_nothing(path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(path), "--no_such_flag"])
    real = builtins.open
    monkeypatch.setattr(
        builtins, "open", lambda file, mode="r", *rest, **more: real(file, "r" if "w" in mode else mode, *rest, **more)
    )
    runpy.run_path(str(path), run_name="__mp_main__")  # as the start method "spawn" does
    assert capsys.readouterr() == ("", "")
