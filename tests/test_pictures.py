"""training/pictures.py against formulas of its own: colour profiles, transparent colours, filters, formats."""

import io
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, features

from dataset import MangaFaceDataset
from training.layouts import IMAGE_SUFFIXES
from training.pictures import load_image, read_picture

SEEN = pytest.mark.promise("A picture of any mode, orientation or number of frames is read as a person sees it")


def seen(path: Path, shape: tuple[int, int] | None = None, box=None) -> np.ndarray:
    """What load_image() makes of a file, as numbers from 0 to 255. Shape: (H, W, 3)."""
    if shape is None:
        with Image.open(path) as opened:
            shape = opened.size[::-1]
    return ((load_image(path, box, shape) + 1) * 127.5).permute(1, 2, 0).numpy()


def srgb(linear: np.ndarray) -> np.ndarray:
    """IEC 61966-2-1, to 0 .. 255."""
    linear = np.clip(linear, 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


# Colour profiles, written by hand (ICC.1:2001) ------------------------------------------------------------------------


def fixed(*values: float) -> bytes:
    return b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def curve(gamma: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256))


def profile(space: bytes, connection: bytes, tags: dict[bytes, bytes]) -> bytes:
    tags = {b"desc": b"desc\0\0\0\0" + struct.pack(">I", 2) + b"x\0" + b"\0" * 78} | tags
    tags |= {b"wtpt": b"XYZ \0\0\0\0" + fixed(0.9642, 1, 0.8249), b"cprt": b"text\0\0\0\0x\0"}
    table, body = b"", b""
    for name, content in tags.items():
        table += name + struct.pack(">II", 132 + 12 * len(tags) + len(body), len(content))
        body += content + b"\0" * (-len(content) % 4)
    size = 132 + len(table) + len(body)
    head = struct.pack(">I4sI4s4s4s", size, b"lcms", 0x02400000, b"mntr", space, connection)
    head += struct.pack(">6H", 2024, 1, 1, 0, 0, 0) + b"acsp" + b"\0" * 28 + fixed(0.9642, 1, 0.8249)
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def rgb_profile(primaries: np.ndarray, gamma: float) -> bytes:
    """primaries: columns are the XYZ of red, green and blue."""
    tags = {
        name + b"XYZ": b"XYZ \0\0\0\0" + fixed(*column)
        for name, column in zip((b"r", b"g", b"b"), primaries.T, strict=True)
    }
    return profile(b"RGB ", b"XYZ ", tags | {name + b"TRC": curve(gamma) for name in (b"r", b"g", b"b")})


def press_profile() -> bytes:
    """CMYK to Lab by a table of two points a channel: white, and L* 30 as soon as there is any full ink."""
    table = bytes([255, 128, 128]) + bytes([round(30 * 2.55), 128, 128]) * 15
    lut = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + fixed(1, 0, 0, 0, 1, 0, 0, 0, 1)
    lut += bytes(range(256)) * 4 + table + bytes(range(256)) * 3
    return profile(b"CMYK", b"Lab ", {b"A2B0": lut, b"A2B1": lut})


SRGB_XYZ = np.array([[0.4361, 0.3851, 0.1431], [0.2225, 0.7169, 0.0606], [0.0139, 0.0971, 0.7141]])  # D50
P3_XYZ = np.array([[0.5151, 0.2920, 0.1571], [0.2412, 0.6922, 0.0666], [-0.0011, 0.0419, 0.7841]])
COLOURS = (
    np.array([[[200, 60, 60], [60, 200, 60]], [[60, 60, 200], [128, 128, 128]]], np.uint8).repeat(8, 0).repeat(8, 1)
)
GREYS = np.array([[0, 64], [128, 220]], np.uint8).repeat(8, 0).repeat(8, 1)


def save(path: Path, pixels: np.ndarray, mode: str | None = None, **options) -> Path:
    image = Image.fromarray(pixels) if mode is None else Image.frombytes(mode, pixels.shape[1::-1], pixels.tobytes())
    image.save(path, **options)
    return path


@SEEN
@pytest.mark.parametrize("gamma", [1.0, 1.8, 2.2])
@pytest.mark.parametrize(
    "kind", ["grey", "grey and alpha", "one bit", "16 bits", "rgb", "palette", "grey, profile of rgb"]
)
def test_a_profile_s_gamma_is_turned_into_that_of_srgb(tmp_path, gamma, kind):
    grey = profile(b"GRAY", b"XYZ ", {b"kTRC": curve(gamma)})
    pixels, path = GREYS, tmp_path / "a.png"
    if kind == "grey and alpha":
        save(path, np.dstack([GREYS, np.full_like(GREYS, 255)]), "LA", icc_profile=grey)
    elif kind == "one bit":
        pixels = (GREYS > 100) * np.uint8(255)
        Image.fromarray(pixels > 0).save(path, icc_profile=grey)
    elif kind == "16 bits":
        Image.fromarray(GREYS.astype(np.uint16) * 257).save(path, icc_profile=grey)
    elif kind == "grey":
        save(path, GREYS, icc_profile=grey)
    else:
        pixels = GREYS if "grey" in kind else COLOURS
        image = Image.fromarray(pixels)
        image = image.quantize(4) if kind == "palette" else image
        pixels = np.asarray(image.convert("RGB")) if kind == "palette" else pixels
        image.save(path, icc_profile=rgb_profile(SRGB_XYZ, gamma))
    expected = srgb((pixels / 255) ** gamma)
    np.testing.assert_allclose(seen(path), expected if expected.ndim == 3 else np.dstack([expected] * 3), atol=1.01)


@SEEN
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif", "avif"])
def test_wide_colours_are_turned_into_srgb(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    options = {
        "jpg": {"quality": 100, "subsampling": 0},
        "webp": {"lossless": True},
        "avif": {"quality": 100, "subsampling": "4:4:4"},
    }
    save(path, COLOURS, icc_profile=rgb_profile(P3_XYZ, 2.2), **options.get(suffix, {}))
    linear = (COLOURS / 255.0) ** 2.2 @ (np.linalg.inv(SRGB_XYZ) @ P3_XYZ).T
    expected = srgb(linear)
    assert np.abs(expected - COLOURS).max() > 30
    np.testing.assert_allclose(seen(path)[4::8, 4::8], expected[4::8, 4::8], atol=4)


@SEEN
def test_a_press_s_profile_says_what_ink_looks_like(tmp_path):
    pixels = np.zeros((16, 16, 4), np.uint8)
    pixels[:, 8:, 3] = 255  # CMYK: black ink on the right
    path = save(tmp_path / "a.tif", pixels, "CMYK", icc_profile=press_profile())
    black = srgb(np.array(((30 + 16) / 116) ** 3))  # of L* 30
    assert 60 < black < 80  # without the profile it is 0
    np.testing.assert_allclose(seen(path)[8, [4, 12]], [[255] * 3, [black] * 3], atol=1.5)


@SEEN
def test_lab_pixels_are_turned_into_srgb(tmp_path):
    pixels = np.array([[[255, 0, 0], [round(50 * 2.55), 0, 0]]], np.uint8).repeat(16, 0).repeat(8, 1)
    path = save(tmp_path / "a.tif", pixels, "LAB")
    np.testing.assert_allclose(seen(path)[8, [4, 12]], [[255] * 3, [srgb(np.array((66 / 116) ** 3))] * 3], atol=1.5)


BROKEN = {
    "garbage": b"no profile",
    "empty tags": profile(b"RGB ", b"XYZ ", {}),
    "torn": rgb_profile(P3_XYZ, 2.2)[:200],
    "for a press": press_profile(),
    "for grey": profile(b"GRAY", b"XYZ ", {b"kTRC": curve(1.0)}),
}


@SEEN
@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_profile_is_named_and_the_picture_kept_as_it_is(tmp_path, kind):
    for number, icc in enumerate((BROKEN[kind], rgb_profile(SRGB_XYZ, 2.2))):
        save(tmp_path / f"face{number}.png", COLOURS, icc_profile=icc)
    np.testing.assert_array_equal(seen(tmp_path / "face0.png").round(), COLOURS)
    entries = [{"image_name": f"face{number}", "captions": ["x"]} for number in (0, 1)]
    (tmp_path / "captions.json").write_text(json.dumps(entries))
    faces = MangaFaceDataset(tmp_path, tmp_path / "captions.json", 16)
    assert [bool(face.remark) for face in faces.faces] == [True, False]
    lines = faces.report().splitlines()
    assert "Used, but to be looked at: 1" in lines
    assert any(line.startswith("  face0: its colour profile is not used (") for line in lines)


# Transparent colours, files written by hand (PNG, third edition) -----------------------------------------------------


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(samples: np.ndarray, depth: int, key, colour: int) -> bytes:
    """samples: (16, 16) grey or (16, 16, 3), of `depth` bits each; key: the transparent sample or samples."""
    head = struct.pack(">IIBBBBB", 16, 16, depth, colour, 0, 0, 0)
    if depth == 16:
        rows = samples.astype(">u2")
    elif depth == 8:
        rows = samples.astype(np.uint8)
    else:
        bits = (samples[..., None] >> np.arange(depth)[::-1]) & 1
        rows = np.packbits(bits.reshape(16, -1), axis=1)
    lines = b"".join(b"\0" + row.tobytes() for row in rows)
    trns = chunk(b"tRNS", struct.pack(f">{np.size(key)}H", *np.ravel(key)))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + trns + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    )


@SEEN
@pytest.mark.parametrize(("bands", "depth"), [(1, 1), (1, 2), (1, 4), (1, 8), (1, 16), (3, 8), (3, 16)])
def test_one_colour_is_transparent_at_every_depth(tmp_path, bands, depth):
    generator, most = np.random.default_rng(depth), 2**depth - 1
    shape = (16, 16) if bands == 1 else (16, 16, 3)
    for key in {0, 1, most // 3, most // 2 + 1, most}:
        samples = np.clip(generator.integers(-2, 3, shape) + key, 0, most)  # its nearest neighbours, too
        (tmp_path / "a.png").write_bytes(png(samples, depth, [key] * bands, 0 if bands == 1 else 2))
        clear = samples == key if bands == 1 else (samples == key).all(axis=2)
        expected = samples / most * 255 if depth < 16 or bands == 1 else samples // 256
        expected = np.dstack([expected] * 3) if bands == 1 else expected
        assert clear.any() and not clear.all()
        np.testing.assert_allclose(seen(tmp_path / "a.png"), np.where(clear[..., None], 255, expected), atol=0.51)


# Resizing ------------------------------------------------------------------------------------------------------------


def filter_matrix(size: int, target: int, shape_of, support: float) -> np.ndarray:
    """(target, size): a filter of `support` lobes, widened by the reduction, rows summing to 1."""
    scale = size / target
    distance = (np.arange(size) + 0.5 - (np.arange(target) + 0.5)[:, None] * scale) / max(scale, 1)
    weights = np.where(abs(distance) < support, shape_of(distance), 0)
    return weights / weights.sum(axis=1, keepdims=True)


def area_matrix(size: int, target: int) -> np.ndarray:
    """(target, size): the mean over exactly the area that a pixel covers."""
    edges = np.linspace(0, size, target + 1)[:, None]
    return (
        np.clip(np.minimum(edges[1:], np.arange(size) + 1) - np.maximum(edges[:-1], np.arange(size)), 0, 1)
        * target
        / size
    )


@pytest.mark.parametrize(("width", "height", "target"), [(48, 48, 16), (41, 30, 12), (9, 20, 24), (16, 16, 16)])
def test_the_centre_is_reduced_by_a_triangle_and_enlarged_by_lanczos(tmp_path, width, height, target):
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    save(tmp_path / "a.png", pixels)
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    square = pixels[top : top + side, left : left + side].astype(float)
    if side > target:
        matrix = filter_matrix(side, target, lambda x: 1 - abs(x), 1)
    else:
        matrix = filter_matrix(side, target, lambda x: np.sinc(x) * np.sinc(x / 3), 3)
    rows = np.einsum("ij,hjc->hic", matrix, square).clip(0, 255).round()
    expected = np.einsum("ij,jwc->iwc", matrix, rows).clip(0, 255).round()
    np.testing.assert_allclose(seen(tmp_path / "a.png", (target, target)), expected, atol=1.01)


def test_nothing_beyond_the_box_is_mixed_in(tmp_path):
    pixels = np.full((60, 60), 255, np.uint8)
    pixels[10:50, 10:50] = 100
    save(tmp_path / "a.png", pixels)
    for shape in ((16, 16), (40, 40), (96, 96)):
        np.testing.assert_allclose(seen(tmp_path / "a.png", shape, (10, 10, 50, 50)), 100, atol=1e-3)


def screentone(size: int, pitch: float, share: float) -> np.ndarray:
    """Dots at 45 degrees, `share` of the area black."""
    y, x = np.mgrid[:size, :size] * (np.pi * 2**0.5 / pitch)
    waves = np.cos(x + y) + np.cos(x - y)
    return np.where(waves > np.quantile(waves, 1 - share), 0, 255).astype(np.uint8)


def moire(picture: np.ndarray, dots: float) -> float:
    """Standard deviation of what is coarser than the tone's own dots (per pixel) and than 5 pixels."""
    window = np.hanning(len(picture))[:, None] * np.hanning(len(picture))
    power = np.abs(np.fft.fft2((picture - picture.mean()) * window)) ** 2 / (window**2).sum()
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(len(picture)), np.fft.fftfreq(len(picture))))
    return float(np.sqrt(power[frequency < min(0.6 * dots, 0.2)].mean() * (frequency < min(0.6 * dots, 0.2)).mean()))


def test_a_reduced_screentone_keeps_its_tone_with_no_more_moire_than_by_the_area(tmp_path):
    own, reference = [], []
    for share in (0.3, 0.7):
        for pitch in (5, 7.3):
            tone = screentone(900, pitch, share)
            save(tmp_path / "a.png", tone)
            for target in (810, 690, 570, 420, 256, 150):
                found, matrix = seen(tmp_path / "a.png", (target, target))[..., 0], area_matrix(900, target)
                assert abs(found.mean() - tone.mean()) < 1, (share, pitch, target)
                own.append(moire(found, 900 / target / pitch))
                reference.append(moire(matrix @ tone @ matrix.T, 900 / target / pitch))
    assert np.mean(reference) > 1  # there is some to be seen
    assert np.mean(own) < np.mean(reference) and (np.array(own) < np.array(reference) + 0.5).all()


# Formats -------------------------------------------------------------------------------------------------------------


FORMATS = {  # suffix: (Pillow's name, options, levels)
    ".gif": ("GIF", {}, 0),
    ".tif": ("TIFF", {}, 0),
    ".TIFF": ("TIFF", {"compression": "tiff_lzw"}, 0),
    ".jfif": ("JPEG", {"quality": 100, "subsampling": 0}, 2),
    ".avif": ("AVIF", {"quality": 100, "subsampling": "4:4:4"}, 2),
}


@SEEN
@pytest.mark.parametrize("suffix", FORMATS)
def test_other_formats_are_read_and_of_several_pictures_the_first(tmp_path, suffix):
    kind, options, levels = FORMATS[suffix]
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow can't")
    several = {} if kind == "JPEG" else {"save_all": True, "append_images": [Image.fromarray(255 - COLOURS)]}
    save(tmp_path / f"a{suffix}", COLOURS, format=kind, **options, **several)
    (tmp_path / "captions.json").write_text('[{"image_name": "a", "captions": ["x"]}]')
    faces = MangaFaceDataset(tmp_path, tmp_path / "captions.json", 16)
    np.testing.assert_allclose(seen(faces.faces[0].path)[4::8, 4::8], COLOURS[4::8, 4::8], atol=levels + 1e-3)
    assert suffix.lower() in IMAGE_SUFFIXES


def bomb(kind: str) -> bytes:
    """A small file that claims 50,000 x 50,000 pixels."""
    buffer = io.BytesIO()
    Image.new("RGB", (64, 48)).save(buffer, kind)
    content = buffer.getvalue()
    if kind == "GIF":
        return content[:6] + struct.pack("<HH", 50_000, 50_000) + content[10:]
    if kind == "TIFF":  # tags 256 and 257, one SHORT or LONG each
        for tag, size in ((256, 64), (257, 48)):
            at = next(
                i
                for i in range(len(content))
                if content[i : i + 8] in (struct.pack("<HHI", tag, 3, 1), struct.pack("<HHI", tag, 4, 1))
            )
            assert struct.unpack("<H", content[at + 8 : at + 10]) == (size,)
            content = content[:at] + struct.pack("<HHII", tag, 4, 1, 50_000) + content[at + 12 :]
        return content
    return content.replace(
        b"ispe\0\0\0\0" + struct.pack(">II", 64, 48), b"ispe\0\0\0\0" + struct.pack(">II", 50_000, 50_000)
    )


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("kind", ["GIF", "TIFF", "AVIF"])
def test_a_small_file_that_claims_too_much_is_not_decoded(tmp_path, monkeypatch, kind):
    (tmp_path / "a.png").write_bytes(bomb(kind))
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises((ValueError, OSError, Image.DecompressionBombError)):
        read_picture(tmp_path / "a.png")


def test_a_picture_is_decoded_once_when_it_is_read(tmp_path, monkeypatch):
    save(tmp_path / "a.png", COLOURS)
    (tmp_path / "captions.json").write_text('[{"image_name": "a", "captions": ["x"]}]')
    opened, original = [], Image.open
    monkeypatch.setattr(Image, "open", lambda *args, **kinds: opened.append(args) or original(*args, **kinds))
    MangaFaceDataset(tmp_path, tmp_path / "captions.json", 16)
    assert len(opened) == 1


def test_the_shipped_srgb_profile_changes_no_pixel_by_more_than_a_level(tmp_path):
    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    np.testing.assert_allclose(seen(save(tmp_path / "a.png", pixels, icc_profile=icc)), pixels, atol=1.01)
