"""dataset.py against references of its own: drawing, hold-out, pixels, captions, cache. CPU, offline."""

import copy
import dataclasses
import hashlib
import json
import math
import os
import re
import shutil
import struct
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import make_faces, run, small_config
from PIL import Image, ImageOps

import dataset as dataset_module
from dataset import MangaFaceDataset
from training import cache as cache_module
from training import encoding, pictures
from training.base_model import load_text_encoder, load_tokenizer, load_vae
from training.cache import HEADER, Cache
from training.encoding import cache_room, encode_faces, encode_texts, folder_identity
from training.files import InputError, Stop
from training.pictures import load_image

CPU = torch.device("cpu")
COMMON = "manga style, clean lineart, expressive face"


# Weights ---------------------------------------------------------------------------------------------------------


def test_rare_terms_weigh_more_and_long_captions_of_common_words_do_not(tmp_path):
    long = ", ".join(f"common{number}" for number in range(10))
    captions = [long] * 10 + [f"common{number % 10}, common{(number + 1) % 10}" for number in range(10)]
    faces = make_faces(tmp_path, [*captions, "common1, heterochromia eyepatch"], validation_share=0)
    assert faces.weights[-1] > faces.weights[:-1].max() * 1.2
    assert faces.weights[:10].max() < faces.weights[10:20].max() * 1.01  # 5 times the words, no more weight


def test_repeating_a_word_or_a_caption_changes_no_weight(tmp_path):
    captions = ["long hair, manga", "short hair, manga", "round glasses, manga", "scar, manga", "hat, manga"]
    once = make_faces(tmp_path / "once", captions, validation_share=0)
    again = [[text, text, text.upper()] if number % 2 else text for number, text in enumerate(captions)]
    twice = make_faces(tmp_path / "twice", again, validation_share=0)
    np.testing.assert_allclose(twice.weights, once.weights, rtol=1e-12)


@pytest.mark.parametrize("captions", [[COMMON] * 9, ["the and of"] * 9, ["!?"] * 9])
def test_identical_captions_weigh_exactly_the_same(tmp_path, captions):
    faces = make_faces(tmp_path, captions)
    assert len(set(faces.weights)) == 1
    assert abs(faces.weights[0] - 1) < 1e-9


def test_a_face_of_stop_words_alone_gets_a_middling_weight(tmp_path):
    faces = make_faces(tmp_path, [*["long hair, manga"] * 6, "scar, hat", "she is the one"], validation_share=0)
    assert faces.weights.min() < faces.weights[-1] < faces.weights.max()


def test_captions_of_held_out_faces_have_no_say_in_the_weights(tmp_path, demo_captions):
    before = make_faces(tmp_path, demo_captions[:40])
    entries = json.loads(before.json_file.read_text())
    for index in before.validation:
        entries[index]["captions"] = ["; ".join(text for texts in demo_captions[:40] for text in texts)]
    before.json_file.write_text(json.dumps(entries))
    after = MangaFaceDataset(tmp_path, before.json_file, 8)
    assert after.validation == before.validation and len(after.validation) == 4
    np.testing.assert_array_equal(after.weights, before.weights)
    assert len(np.unique(after.weights)) > 10


def test_the_weight_acts_once(manga):
    """sampling: on the order alone; loss: on the loss alone; off: nowhere."""
    everybody = list(range(len(manga)))
    for weighting, order_is_weighted, loss_is_weighted in (
        ("sampling", True, False),
        ("loss", False, True),
        ("off", False, False),
    ):
        faces = MangaFaceDataset(manga.dataset_dir, manga.json_file, 8, weighting)
        drawn = sorted(faces.epoch_order(3).tolist())
        assert (drawn != everybody) == order_is_weighted, weighting
        assert (faces.loss_weights() != 1).any() == loss_is_weighted, weighting
        np.testing.assert_array_equal(faces.weights, np.ones(len(faces)) if weighting == "off" else manga.weights)
        if loss_is_weighted:
            np.testing.assert_array_equal(faces.loss_weights(), manga.weights)


def test_effective_sample_size_is_n_for_equal_weights_and_one_for_a_single_one(manga):
    faces = MangaFaceDataset(manga.dataset_dir, manga.json_file, 8, "off")
    assert faces.effective_sample_size == pytest.approx(len(faces), abs=1e-9)
    faces.weights = np.array([3.0, 1.0])
    assert faces.effective_sample_size == pytest.approx(16 / 10)
    faces.weights = np.array([1.0, 0.0, 0.0])
    assert faces.effective_sample_size == pytest.approx(1)


# Drawing ---------------------------------------------------------------------------------------------------------


def weight_sets(manga) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    random = [np.clip(generator.lognormal(0, 0.4, count), 0.5, 2) for count in (5, 16, 61, 250)]
    alternating = np.tile([0.5, 1.5], 10)
    return [manga.weights, *(weights / weights.mean() for weights in random), alternating, np.ones(12)]


def worst_arc(epochs: int) -> float:
    """sup over arcs of the circle of |marks inside - epochs x length|, for golden-ratio marks: bounds any weights."""
    marks = np.sort(np.arange(epochs) * 0.618034 % 1)
    surplus = np.arange(epochs) - epochs * marks
    return surplus.max() - surplus.min() + 1


def test_every_face_is_drawn_as_often_as_its_weight_says_and_is_never_away_for_long(manga, monkeypatch):
    bounds = [worst_arc(epochs) for epochs in range(1, 61)]  # 2.504 at most
    for weights in weight_sets(manga):
        for seed in (0, 1, 12345):
            for name, value in (("weights", weights), ("train", list(range(len(weights)))), ("seed", seed)):
                monkeypatch.setattr(manga, name, value)
            counts, longest = np.zeros(len(weights)), np.zeros(len(weights))
            last_seen = np.full(len(weights), -1)
            for epoch in range(60):
                order = manga.epoch_order(epoch)
                assert len(order) == len(weights)  # n draws per epoch, whatever the weights
                counts += np.bincount(order, minlength=len(weights))
                assert np.abs(counts - (epoch + 1) * weights).max() <= min(bounds[epoch], 2.51) + 1e-9
                longest = np.maximum(longest, epoch - last_seen - 1)  # epochs away in a row
                last_seen[order] = epoch
            assert longest[weights >= 0.5].max() <= 3


def test_the_order_depends_on_seed_and_epoch_alone(manga):
    first = manga.epoch_order(7)
    np.random.seed(99)  # nor does the global generator matter
    for epoch in (0, 8, 7, 3):
        manga.epoch_order(epoch)
    fresh = MangaFaceDataset(manga.dataset_dir, manga.json_file, 8)
    np.testing.assert_array_equal(manga.epoch_order(7), first)
    np.testing.assert_array_equal(fresh.epoch_order(7), first)
    other_seed = MangaFaceDataset(manga.dataset_dir, manga.json_file, 8, seed=1)
    assert (other_seed.epoch_order(7) != first).any()
    orders = {tuple(manga.epoch_order(epoch).tolist()) for epoch in range(30)}
    assert len(orders) == 30
    assert {tuple(sorted(order)) for order in orders} != {tuple(sorted(first.tolist()))}  # not only shuffled anew


# Hold-out --------------------------------------------------------------------------------------------------------


def test_the_hold_out_follows_content_and_not_names_or_order(tmp_path, demo_captions):
    faces = make_faces(tmp_path, demo_captions[:60])
    held_out = {faces.faces[index].sha256 for index in faces.validation}
    entries = json.loads(faces.json_file.read_text())[::-1]
    for entry in entries:
        new_name = f"z{hash(entry['image_name']) % 1000:03d}_{entry['image_name']}"
        (tmp_path / f"{entry['image_name']}.png").rename(tmp_path / f"{new_name}.PNG")
        entry["image_name"] = new_name
    faces.json_file.write_text(json.dumps(entries))
    renamed = MangaFaceDataset(tmp_path, faces.json_file, 8, seed=5, num_workers=0)
    assert {renamed.faces[index].sha256 for index in renamed.validation} == held_out
    assert len(held_out) == 6


@pytest.mark.parametrize(
    ("faces", "share", "expected"),
    [
        (7, 0.1, 0),
        (8, 0.1, 4),
        (20, 0.1, 4),
        (60, 0.1, 6),
        (60, 0.5, 30),
        (60, 0, 0),
        (1, 0.5, 0),
        (20, 1e-9, 4),
    ],
)
def test_the_hold_out_has_at_least_four_faces_or_none(tmp_path, faces, share, expected):
    split = make_faces(tmp_path, [COMMON] * faces, validation_share=share)
    assert len(split.validation) == expected
    assert sorted(split.train + split.validation) == list(range(faces))
    assert len(split) == len(split.weights) == len(split.train)


@pytest.mark.parametrize("copies", [2, 5, 9, 19])
def test_copies_of_a_file_never_stand_on_both_sides(tmp_path, copies):
    for rank in range(6):  # of the original's hash: among the last held out, the first trained on, and around
        faces = make_faces(tmp_path / str(rank), [COMMON] * (20 + copies))
        by_hash = sorted(faces.faces[:20], key=lambda sample: sample.sha256)
        original = by_hash[rank].path.read_bytes()
        for number in range(20, 20 + copies):
            (faces.dataset_dir / f"face{number:03d}.png").write_bytes(original)
        faces = MangaFaceDataset(faces.dataset_dir, faces.json_file, 8)
        sides = [{faces.faces[index].sha256 for index in side} for side in (faces.train, faces.validation)]
        assert not sides[0] & sides[1]
        assert len(faces.train) >= len(faces.validation)
        assert [len(group) for group in faces.alike] == [copies + 1]


def test_resized_compressed_and_mirrored_pictures_stay_on_one_side_others_do_not(demo_faces, tmp_path):
    shutil.copytree(demo_faces, tmp_path / "faces")
    file = tmp_path / "faces" / "modified_face_250.json"
    entries = json.loads(file.read_text(encoding="utf-8"))
    faces = MangaFaceDataset(tmp_path / "faces", file, 64)
    assert not faces.alike
    expected = []
    for number in range(0, 250, 5):  # some of which are held out
        name = entries[number]["image_name"]
        with Image.open(tmp_path / "faces" / f"{name}.png") as opened:
            picture = opened.convert("RGB")
        picture.resize((300, 300)).save(tmp_path / "faces" / f"{name}-small.jpg", quality=60)
        ImageOps.mirror(picture).save(tmp_path / "faces" / f"{name}-mirrored.png")
        entries += [{"image_name": f"{name}-{kind}", "captions": ["a face"]} for kind in ("small", "mirrored")]
        expected.append({name, f"{name}-small", f"{name}-mirrored"})
    file.write_text(json.dumps(entries), encoding="utf-8")
    faces = MangaFaceDataset(tmp_path / "faces", file, 64)
    names = [{faces.faces[index].name for index in group} for group in faces.alike]
    assert sorted(names, key=sorted) == sorted(expected, key=sorted)
    held_out = set(faces.validation)
    assert held_out and all(held_out.isdisjoint(group) or held_out.issuperset(group) for group in faces.alike)
    assert any(held_out.issuperset(group) for group in faces.alike)


def test_one_picture_many_times_over_is_never_the_hold_out(tmp_path):
    for number in range(4):  # whichever of the hashes comes first
        faces = make_faces(tmp_path / str(number), [COMMON] * 40)
        with Image.open(faces.faces[number].path) as opened:
            picture = opened.convert("RGB")
        for edit in range(10, 40):
            changed = picture.copy()
            red, green, blue = picture.getpixel((edit % 8, edit // 8))
            changed.putpixel((edit % 8, edit // 8), (red ^ 1, green, blue))
            changed.save(faces.dataset_dir / f"face{edit:03d}.png")
        faces = MangaFaceDataset(faces.dataset_dir, faces.json_file, 8)
        many = max(faces.alike, key=len)
        assert len(many) >= 30 and len(faces.validation) == 4 and not set(many) & set(faces.validation)


def test_pictures_without_contrast_are_not_all_taken_for_one(tmp_path):
    faces = make_faces(tmp_path, [COMMON] * 30)
    rng = np.random.default_rng(0)
    for sample in faces.faces:
        grey = Image.fromarray(rng.integers(90, 130, (4, 4), dtype=np.uint8)).resize((64, 64), Image.Resampling.BICUBIC)
        grey.convert("RGB").save(sample.path)
    assert not MangaFaceDataset(faces.dataset_dir, faces.json_file, 8).alike


def test_a_picture_that_memory_does_not_suffice_for_is_not_taken_for_a_bad_one(tmp_path, monkeypatch):
    faces = make_faces(tmp_path, [COMMON] * 3)
    monkeypatch.setattr(dataset_module, "read_picture", lambda path: (_ for _ in ()).throw(MemoryError))
    with pytest.raises(MemoryError):
        MangaFaceDataset(faces.dataset_dir, faces.json_file, 8)


def test_a_picture_is_decoded_once_before_it_is_encoded_if_memory_for_it_remains(tmp_path, monkeypatch):
    decoded = []
    real = dataset_module.read_picture
    for module in (dataset_module, pictures):
        monkeypatch.setattr(module, "read_picture", lambda path: decoded.append(path.name) or real(path))
    monkeypatch.setattr(encoding, "encode_image", lambda _, pixels: pixels)
    folder = make_faces(tmp_path / "faces", [COMMON] * 6).dataset_dir
    found = []
    for kept, again in ((dataset_module.KEPT_PIXELS, 0), (3 * 8 * 8, 3), (0, 6)):
        monkeypatch.setattr(dataset_module, "KEPT_PIXELS", kept)
        decoded.clear()
        faces = MangaFaceDataset(folder, folder / "captions.json", 8)
        assert sorted(decoded) == [f"face{number:03d}.png" for number in range(6)]
        found.append(torch.stack(list(encode_faces(faces, tmp_path / f"cache{again}", "vae", lambda: None))))
        assert len(decoded) == 6 + again and not faces.kept
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_a_cache_that_loses_what_was_just_encoded_is_named(tmp_path, monkeypatch):
    faces = make_faces(tmp_path / "faces", [COMMON] * 3)
    monkeypatch.setattr(encoding, "encode_image", lambda *_: torch.ones(2, 4, 1, 1))
    monkeypatch.setattr(Cache, "_append", lambda *_: None)
    with pytest.raises(InputError, match="leave cache_dir alone"):
        encode_faces(faces, tmp_path / "cache", "vae", lambda: None)


# Pixels ----------------------------------------------------------------------------------------------------------


RNG = np.random.default_rng(7)
COLOUR = RNG.integers(0, 256, (8, 8, 3), dtype=np.uint8)
GREY = RNG.integers(0, 256, (8, 8), dtype=np.uint8)
ALPHA = RNG.integers(0, 256, (8, 8), dtype=np.uint8)
SIXTEEN = RNG.integers(0, 65536, (8, 8)).astype(np.uint16)
INDEX = RNG.integers(0, 4, (8, 8), dtype=np.uint8)
PALETTE = np.array([[255, 0, 0], [0, 200, 0], [0, 0, 90], [7, 7, 7]], dtype=np.uint8)


def on_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    return (colour * (alpha[..., None] / 255) + 255 * (1 - alpha[..., None] / 255)).round()


def three(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[..., None], 3, axis=2)


def indexed() -> Image.Image:
    image = Image.fromarray(INDEX)
    image.putpalette(PALETTE.tobytes())  # which makes it mode P
    return image


def check_pixels(path: Path, expected: np.ndarray, levels: int = 0) -> None:
    """load_image() at the picture's own size must give `expected` (0..255), to `levels` of 255."""
    pixels = load_image(path, None, expected.shape[:2])
    assert pixels.dtype == torch.float32 and pixels.shape == (3, *expected.shape[:2])
    assert pixels.min() >= -1 and pixels.max() <= 1
    got = (pixels.permute(1, 2, 0).numpy() + 1) * 127.5
    np.testing.assert_allclose(got, expected, atol=levels + 1e-3)


SEEN = pytest.mark.promise("A picture of any mode, orientation or number of frames is read as a person sees it")
MODES = {  # name: (file name, image, options of save, expected, levels)
    "1": ("a.png", Image.fromarray(GREY > 127), {}, three((GREY > 127) * 255), 0),
    "L": ("a.png", Image.fromarray(GREY), {}, three(GREY), 0),
    "L bmp": ("a.bmp", Image.fromarray(GREY), {}, three(GREY), 0),
    "P": ("a.png", indexed(), {}, PALETTE[INDEX], 0),
    "P bmp": ("a.BMP", indexed(), {}, PALETTE[INDEX], 0),
    "RGB": ("a.PNG", Image.fromarray(COLOUR), {}, COLOUR, 0),
    "RGB bmp": ("a.bmp", Image.fromarray(COLOUR), {}, COLOUR, 0),
    "RGB webp": ("a.WebP", Image.fromarray(COLOUR), {"lossless": True}, COLOUR, 0),
    "RGBA": ("a.png", Image.fromarray(np.dstack([COLOUR, ALPHA])), {}, on_white(COLOUR, ALPHA), 1),
    "RGBA webp": (
        "a.webp",
        Image.fromarray(np.dstack([COLOUR, ALPHA])),
        {"lossless": True, "exact": True},
        on_white(COLOUR, ALPHA),
        1,
    ),
    "LA": (
        "a.png",
        Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(ALPHA)]),
        {},
        on_white(three(GREY), ALPHA),
        1,
    ),
    "P transparent index": (
        "a.png",
        indexed(),
        {"transparency": 2},
        on_white(PALETTE[INDEX], np.where(INDEX == 2, 0, 255)),
        0,
    ),
    "P alpha table": (
        "a.png",
        indexed(),
        {"transparency": bytes([255, 128, 0, 30])},
        on_white(PALETTE[INDEX], np.array([255, 128, 0, 30])[INDEX]),
        1,
    ),
    "L transparent grey": (
        "a.png",
        Image.fromarray(GREY),
        {"transparency": int(GREY[2, 3])},
        three(np.where(GREY[2, 3] == GREY, 255, GREY)),
        0,
    ),
    "I;16": ("a.png", Image.fromarray(SIXTEEN), {}, three((SIXTEEN / 65535 * 255).round()), 0),
    "CMYK": (
        "a.jpg",
        Image.new("CMYK", (16, 16), (30, 200, 90, 40)),
        {"quality": 100},
        np.full((16, 16, 3), [(255 - c) * (255 - 40) / 255 for c in (30, 200, 90)]),
        2,
    ),
    "L jpeg": ("a.JPEG", Image.new("L", (16, 16), 77), {"quality": 100}, np.full((16, 16, 3), 77), 1),
}


@SEEN
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_becomes_the_rgb_a_person_sees_on_white(tmp_path, mode):
    name, image, options, expected, levels = MODES[mode]
    image.save(tmp_path / name, **options)
    check_pixels(tmp_path / name, np.asarray(expected, dtype=float), levels)


UPRIGHT = {  # how a viewer turns the stored rows and columns, by EXIF orientation
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}


@SEEN
@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("suffix", ["png", "webp", "jpg"])
def test_exif_orientation_comes_before_the_centre_square(tmp_path, orientation, suffix):
    stored = RNG.integers(0, 256, (8, 13, 3), dtype=np.uint8)
    if suffix == "jpg":
        stored = np.full((8, 13, 3), 255, dtype=np.uint8)
        stored[:4, :6], stored[4:, :6] = 0, 90  # flat corners survive the JPEG
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(stored).save(path, exif=exif, **({"quality": 100} if suffix == "jpg" else {"lossless": True}))
    upright = UPRIGHT[orientation](stored)
    top, left = (upright.shape[0] - 8) // 2, (upright.shape[1] - 8) // 2
    check_pixels(path, upright[top : top + 8, left : left + 8].astype(float), 20 if suffix == "jpg" else 0)
    (tmp_path / "captions.json").write_text('[{"image_name": "a", "captions": ["x"]}]')
    faces = MangaFaceDataset(tmp_path, tmp_path / "captions.json", 8)
    assert faces.faces[0].size == upright.shape[1::-1]  # the size in the report is the upright one


@SEEN
def test_alpha_and_orientation_work_together(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.dstack([COLOUR, ALPHA])).save(tmp_path / "a.png", exif=exif)
    check_pixels(tmp_path / "a.png", np.rot90(on_white(COLOUR, ALPHA), -1), 1)


@SEEN
@pytest.mark.parametrize("suffix", ["png", "webp"])
def test_of_an_animated_file_the_first_frame_counts(tmp_path, suffix):
    first, second = Image.fromarray(COLOUR), Image.fromarray(255 - COLOUR)
    path = tmp_path / f"a.{suffix}"
    first.save(path, save_all=True, append_images=[second], duration=100, lossless=True)
    assert Image.open(path).n_frames == 2
    check_pixels(path, COLOUR.astype(float))


def filter_matrix(size: int, target: int) -> np.ndarray:
    """The (target, size) matrix of a three-lobed Lanczos filter, of a triangle to reduce; rows sum to 1."""
    scale = size / target
    centres = (np.arange(target) + 0.5) * scale
    distance = (np.arange(size) + 0.5 - centres[:, None]) / max(scale, 1)
    weights = np.where(abs(distance) < 3, np.sinc(distance) * np.sinc(distance / 3), 0)
    weights = np.maximum(1 - abs(distance), 0) if scale > 1 else weights
    return weights / weights.sum(axis=1, keepdims=True)


@pytest.mark.parametrize(("width", "height", "target"), [(48, 48, 16), (41, 30, 12), (9, 20, 24)])
def test_the_centre_square_is_reduced_by_a_triangle_enlarged_by_lanczos(tmp_path, width, height, target):
    pixels = RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    square, matrix = pixels[top : top + side, left : left + side].astype(float), filter_matrix(side, target)
    rows = np.einsum("ij,hjc->hic", matrix, square).clip(0, 255).round()
    expected = np.einsum("ij,jwc->iwc", matrix, rows).clip(0, 255).round()
    check_pixels(tmp_path / "a.png", expected, 1)


def test_dataset_items_are_the_training_faces(manga):
    item = manga[3]
    sample = manga.faces[manga.train[3]]
    assert torch.equal(item["pixel_values"], load_image(sample.path, None, (8, 8)))
    assert item["captions"] == sample.captions and item["weight"] == manga.weights[3]


# Captions --------------------------------------------------------------------------------------------------------


def test_entries_of_one_image_are_merged_and_a_bom_is_no_error(tmp_path):
    make_faces(tmp_path, [COMMON, COMMON])
    text = json.dumps(
        [
            {"image_name": "face000", "captions": ["one"]},
            {"image_name": "face001", "captions": ["日本語"]},
            {"image_name": "face000", "captions": ["two"]},
            {"image_name": "face000.png", "captions": ["three"]},
        ],
        ensure_ascii=False,
    )
    (tmp_path / "captions.json").write_text(text, encoding="utf-8-sig")
    faces = MangaFaceDataset(tmp_path, tmp_path / "captions.json", 8)
    assert [(sample.name, sample.captions) for sample in faces.faces] == [
        ("face000", ("one", "two", "three")),
        ("face001", ("日本語",)),
    ]


def test_names_may_carry_a_suffix_or_a_subfolder(tmp_path):
    make_faces(tmp_path, [COMMON])
    (tmp_path / "side").mkdir()
    Image.fromarray(GREY).save(tmp_path / "side" / "v1.2.JPG")
    names = ["face000.png", "side/v1.2", "./side/v1.2.JPG"]
    (tmp_path / "captions.json").write_text(json.dumps([{"image_name": name, "captions": ["x"]} for name in names]))
    faces = MangaFaceDataset(tmp_path, tmp_path / "captions.json", 8)
    found = [sample.path.relative_to(tmp_path).as_posix() for sample in faces.faces]
    assert found == ["face000.png", "side/v1.2.JPG"]


def test_the_fingerprint_changes_with_a_pixel_or_a_caption_only(tmp_path):
    prints = [make_faces(tmp_path, [COMMON, "hat"]).fingerprint]
    prints.append(make_faces(tmp_path, [COMMON, "hats"]).fingerprint)
    (tmp_path / "face001.png").write_bytes((tmp_path / "face000.png").read_bytes())
    prints.append(MangaFaceDataset(tmp_path, tmp_path / "captions.json", 8).fingerprint)
    assert len(set(prints)) == 3
    assert make_faces(tmp_path, [COMMON, "hat"], seed=3, validation_share=0).fingerprint == prints[0]


def test_the_fingerprint_of_faces_without_repeats_is_the_former_version_s(tmp_path):
    faces = make_faces(tmp_path, [["long_hair, smile, 1girl"], ["hat, scar, 1boy", "short_hair, ^_^, cap"]])
    assert faces.kind == "tags"
    former = [
        (face.name, face.sha256, json.loads((tmp_path / "captions.json").read_text())[number]["captions"])
        for number, face in enumerate(faces.faces)
    ]
    assert faces.fingerprint == hashlib.sha256(json.dumps(former).encode()).hexdigest()
    (tmp_path / "captions.json").unlink()
    prints = []
    for folder in ("1_x", "2_x", "3_x"):
        (tmp_path / folder).mkdir()
        shutil.copy(tmp_path / "face000.png", tmp_path / folder)
        prints.append(MangaFaceDataset(tmp_path, tmp_path / "gone.json", 8, validation_share=0).fingerprint)
        shutil.rmtree(tmp_path / folder)
    assert len(set(prints)) == 3


# What can't be used ----------------------------------------------------------------------------------------------


def test_unusable_files_are_skipped_counted_and_named(tmp_path):
    make_faces(tmp_path, [[COMMON]] * 9)
    whole = (tmp_path / "face001.png").read_bytes()
    Image.fromarray(COLOUR).resize((64, 64)).save(tmp_path / "big.png")
    big = (tmp_path / "big.png").read_bytes()
    (tmp_path / "face001.png").write_bytes(big[: len(big) * 2 // 3])  # truncated
    (tmp_path / "face002.png").write_text("not a picture")
    (tmp_path / "face003.png").unlink()
    (tmp_path / "face004.png").write_bytes(b"")
    (tmp_path / "face005.png").unlink()
    (tmp_path / "face005.png").mkdir()
    (tmp_path / "face006.png").unlink()
    (tmp_path / "face006.png").symlink_to("face006.png")  # a link to itself
    Image.fromarray(COLOUR).save(tmp_path / "face007.png", format="TGA")  # a format that isn't read, renamed
    (tmp_path / "stray.webp").write_bytes(whole)
    entries = json.loads((tmp_path / "captions.json").read_text())
    entries[8]["captions"] = [" ", ""]
    (tmp_path / "captions.json").write_text(json.dumps([*entries, {"image_name": "x" * 300 + "/y", "captions": ["x"]}]))
    faces = MangaFaceDataset(tmp_path, tmp_path / "captions.json", 8)
    assert [sample.name for sample in faces.faces] == ["face000"]
    report = faces.report()
    assert "1 usable" in report and "Skipped: 9" in report
    for number in range(1, 9):
        assert len([line for line in faces.skipped if line.startswith(f"face{number:03d}")]) == 1
        assert f"  face{number:03d}" in report
    assert "Without an entry in captions.json: 2 (big.png, stray.webp)" in report


def test_an_image_on_which_the_decoder_trips_is_skipped_too(tmp_path, monkeypatch):
    """Found by flipping bytes in files: Pillow's EXIF code raises struct.error, which is no ValueError."""
    faces = make_faces(tmp_path, [COMMON] * 5)
    real = pictures.ImageOps.exif_transpose

    def trip(image):
        if image.filename.endswith("face002.png"):
            raise struct.error("required argument is not an integer")
        return real(image)

    monkeypatch.setattr(pictures.ImageOps, "exif_transpose", trip)
    faces = MangaFaceDataset(tmp_path, faces.json_file, 8)
    assert len(faces.faces) == 4
    assert faces.skipped == ["face002.png: required argument is not an integer"]


# The report ------------------------------------------------------------------------------------------------------


def test_the_report_names_what_is_cut_and_why_a_face_is_heavy(tmp_path, tiny_base):
    tokenizer = load_tokenizer(tiny_base)  # one token per character: 75 of them are read
    captions = ["x" * 75 + "lost", "y" * 75, *["long hair, manga"] * 16, "heterochromia, manga"]
    faces = make_faces(tmp_path, captions, validation_share=0, weight_max=3.0)
    report = faces.report(tokenizer)
    assert "19 usable" in report and "Hold-out: none" in report
    assert re.search(r"Texts over 77 tokens: 1 of 4 ", report)
    assert re.search(r"81 tokens: 'x+'\.\.\. loses 'lost'", report)
    assert f"Weight range: {faces.weights.min():.2f} to {faces.weights.max():.2f}" in report
    assert re.search(r"heaviest \d\.\d\d  face018: heterochromia, manga", report)
    assert "Weights: off" in make_faces(tmp_path, captions, weighting="off").report()


def test_a_report_on_many_bad_files_stays_short_and_gives_their_number(tmp_path):
    faces = make_faces(tmp_path, [COMMON] * 30)
    for number in range(2, 30):
        (tmp_path / f"face{number:03d}.png").unlink()
    report = MangaFaceDataset(tmp_path, faces.json_file, 8).report()
    assert "Skipped: 28" in report and "... and 18 more" in report
    assert len(report.splitlines()) < 30


# Encoded once ----------------------------------------------------------------------------------------------------


def forbidden():
    raise AssertionError("a model was loaded although everything is in the cache")


class Counting:
    """Loads the tiny VAE and counts, by a hook on its encoder, what goes through; may break off on the way."""

    def __init__(self, base: Path, break_off_after: int | None = None):
        self.base, self.encoded, self.break_off_after = base, 0, break_off_after

    def __call__(self):
        vae = load_vae(self.base, CPU)
        vae.encoder.register_forward_hook(self.count)
        return vae

    def count(self, *_):
        if self.encoded == self.break_off_after:
            raise KeyboardInterrupt
        self.encoded += 1


def encode_and_count(faces, cache, identity, base) -> tuple[torch.Tensor, int]:
    """(latents of all faces, how many of them went through the VAE)."""
    loader = Counting(base)
    latents = torch.stack(list(encode_faces(faces, cache, identity, loader)))
    return latents, loader.encoded


def records(cache: Path) -> list[Path]:
    return sorted(cache.rglob("*.records"))


@pytest.fixture
def few(tmp_path) -> MangaFaceDataset:
    return make_faces(tmp_path / "few", [COMMON] * 6, resolution=16)


def test_cached_latents_equal_the_vae_and_nothing_unchanged_is_encoded_again(tmp_path, few, tiny_base):
    cache, identity = tmp_path / "cache", folder_identity(tiny_base / "vae")
    latents, encoded = encode_and_count(few, cache, identity, tiny_base)
    assert encoded == 6
    vae = load_vae(tiny_base, CPU)
    with torch.no_grad():
        for index, sample in enumerate(few.faces):
            posterior = vae.encode(load_image(sample.path, None, (16, 16))[None]).latent_dist
            assert torch.equal(latents[index][0], posterior.mean[0] * vae.config.scaling_factor)
            assert torch.equal(latents[index][1], posterior.std[0] * vae.config.scaling_factor)
    again = encode_faces(few, cache, identity, forbidden)
    assert torch.equal(torch.stack(list(again)), latents)
    renamed = few.json_file.read_text().replace("face00", "other00").replace(COMMON, "other captions")
    few.json_file.write_text(renamed)
    for path in few.dataset_dir.glob("face*.png"):
        path.rename(path.with_name(path.name.replace("face", "other")))
    other = MangaFaceDataset(few.dataset_dir, few.json_file, 16, "off", validation_share=0, seed=4)
    again = encode_faces(other, cache, identity, forbidden)
    assert torch.equal(torch.stack(list(again)), latents)  # neither names nor captions matter


def test_exactly_what_changed_is_encoded_again(tmp_path, few, tiny_base):
    cache, identity = tmp_path / "cache", folder_identity(tiny_base / "vae")
    before = encode_and_count(few, cache, identity, tiny_base)[0]

    pixels = np.array(Image.open(few.faces[2].path))
    pixels[4, 4, 0] ^= 128  # one pixel of one face
    Image.fromarray(pixels).save(few.faces[2].path)
    changed = MangaFaceDataset(few.dataset_dir, few.json_file, 16)
    latents, encoded = encode_and_count(changed, cache, identity, tiny_base)
    assert encoded == 1
    assert [torch.equal(new, old) for new, old in zip(latents, before, strict=True)] == [n != 2 for n in range(6)]

    larger = MangaFaceDataset(few.dataset_dir, few.json_file, 24)  # the resolution
    latents, encoded = encode_and_count(larger, cache, identity, tiny_base)
    assert encoded == 6 and latents.shape[-2:] == (6, 6)

    assert encode_and_count(changed, cache, "another VAE", tiny_base)[1] == 6
    encode_faces(changed, cache, identity, forbidden)  # and the first ones are still there


def test_another_vae_under_the_same_name_has_another_identity(tmp_path, tiny_base):
    for path in (tiny_base / "vae").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    before = folder_identity(tmp_path)
    assert before == folder_identity(tiny_base / "vae")
    weights = bytearray((tmp_path / "diffusion_pytorch_model.safetensors").read_bytes())
    weights[-1] ^= 1
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(weights)
    assert folder_identity(tmp_path) != before


DAMAGE = {  # to the fourth of six records, each of one block
    "a bit of the tensor": lambda file, start: flip(file, start + 600),
    "a bit of its header": lambda file, start: flip(file, start + 70),
    "its header's hash": lambda file, start: flip(file, start + 3),
    "garbage": lambda file, start: file[:start] + b"\xff" * 4096 + file[start + 4096 :],
    "zeros": lambda file, start: file[:start] + bytes(4096) + file[start + 4096 :],
}


def flip(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_entry_is_encoded_again_alone(tmp_path, few, tiny_base, damage):
    cache = tmp_path / "cache"
    latents, _ = encode_and_count(few, cache, "vae", tiny_base)
    (file,) = records(cache)
    assert file.stat().st_size == 6 * 4096
    file.write_bytes(DAMAGE[damage](file.read_bytes(), 3 * 4096))
    again, encoded = encode_and_count(few, cache, "vae", tiny_base)
    assert encoded == 1 and torch.equal(again, latents)
    again = encode_faces(few, cache, "vae", forbidden)  # from then on the new one counts
    assert torch.equal(torch.stack(list(again)), latents) and len(records(cache)) == 2


@pytest.mark.parametrize("left", [0, 1, 511, 513, 1023, 1024, 4000])
def test_of_a_torn_cache_file_what_is_whole_is_used(tmp_path, few, tiny_base, left):
    latents, _ = encode_and_count(few, tmp_path, "vae", tiny_base)
    (file,) = records(tmp_path)
    os.truncate(file, 4 * 4096 + left)
    again, encoded = encode_and_count(few, tmp_path, "vae", tiny_base)
    assert torch.equal(again, latents)
    assert encoded == (1 if left >= HEADER + latents[0].nbytes else 2)


def test_a_cache_file_that_is_cut_while_a_run_reads_it_is_named(tmp_path, few, tiny_base):
    latents = encode_faces(few, tmp_path, "vae", Counting(tiny_base))
    (file,) = records(tmp_path)
    os.truncate(file, 1000)
    with pytest.raises(InputError, match="leave cache_dir alone while a run is at work"):
        latents[4]


@pytest.mark.skipif(os.name == "nt", reason="Windows deletes no open file")
def test_deleting_the_cache_during_a_run_does_no_harm(tmp_path, few, tiny_base):
    latents = encode_faces(few, tmp_path / "cache", "vae", Counting(tiny_base))
    before = latents[4]
    shutil.rmtree(tmp_path / "cache")
    assert torch.equal(latents[4], before)


def test_a_disk_that_is_too_small_is_told_before_more_than_one_face_is_encoded(tmp_path, few, tiny_base, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=6 * 4096 + 5 * 512))
    loader = Counting(tiny_base)
    with pytest.raises(Stop, match=r"6 faces take 0 MiB in .*, but its disk has 0 MiB free: free some, or set cache"):
        encode_faces(few, tmp_path, "vae", loader)
    assert loader.encoded == 1 and not records(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=6 * 4096 + 6 * 512))
    encode_faces(few, tmp_path, "vae", loader)


def test_what_faces_and_texts_take_on_the_disk_is_told_together_before_anything_is_encoded(
    tmp_path, tiny_base, monkeypatch, shared_faces, capsys
):
    config = small_config(tmp_path, shared_faces, tiny_base, num_train_epochs=1)
    run(config)
    printed = capsys.readouterr().out
    assert printed.index("Faces: ") < printed.index("Cache: ") < printed.index("Effective batch")
    written = sum(file.stat().st_size for file in Path(config.cache_dir).rglob("*.records"))
    empty = dataclasses.replace(config, cache_dir=str(tmp_path / "none"))
    dataset = MangaFaceDataset.from_config(config, 32)
    dataset.make_texts(load_tokenizer(tiny_base))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=written // 2))
    with pytest.raises(Stop, match=r"Cache: .* MiB free: free some, or set cache_dir to another disk"):
        cache_room(dataset, empty, tiny_base, torch.float32)
    cache_room(dataset, dataclasses.replace(empty, dry_run=True), tiny_base, torch.float32)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=written))
    cache_room(dataset, empty, tiny_base, torch.float32)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=written - 1))
    with pytest.raises(Stop):
        cache_room(dataset, empty, tiny_base, torch.float32)


def test_more_cache_files_than_a_process_may_open_are_read(tmp_path, few, tiny_base, monkeypatch):
    monkeypatch.setattr(cache_module, "MAX_OPEN", 2)
    for number in range(6):
        alone = copy.copy(few)
        alone.faces = few.faces[number : number + 1]
        assert encode_and_count(alone, tmp_path, "vae", tiny_base)[1] == 1
    assert len(records(tmp_path)) == 6
    latents = encode_faces(few, tmp_path, "vae", forbidden)
    assert torch.equal(torch.stack(list(latents)), encode_and_count(few, tmp_path / "new", "vae", tiny_base)[0])
    assert len(latents.cache.open) <= 2


def test_an_interrupted_encoding_goes_on_with_the_rest_and_ends_with_the_same_bits(tmp_path, few, tiny_base):
    cache, loader = tmp_path / "cache", Counting(tiny_base, break_off_after=4)
    with pytest.raises(KeyboardInterrupt):
        encode_faces(few, cache, "vae", loader)
    latents, encoded = encode_and_count(few, cache, "vae", tiny_base)
    assert encoded == 2
    assert torch.equal(latents, encode_and_count(few, tmp_path / "another", "vae", tiny_base)[0])


def test_two_processes_share_the_faces_and_get_the_same_latents_as_one(tmp_path, few, tiny_base):
    alone = encode_and_count(few, tmp_path / "one", "vae", tiny_base)
    barrier, loaders = threading.Barrier(2, timeout=60), [Counting(tiny_base), Counting(tiny_base)]
    models = [loader() for loader in loaders]  # not in the threads: diffusers patches torch globally while it loads
    with ThreadPoolExecutor(2) as pool:
        work = [
            pool.submit(encode_faces, few, tmp_path / "two", "vae", lambda model=model: model, (rank, 2, barrier.wait))
            for rank, model in enumerate(models)
        ]
        for result in [some.result() for some in work]:
            assert torch.equal(torch.stack(list(result)), alone[0])
    assert sum(loader.encoded for loader in loaders) == 6 and all(loader.encoded for loader in loaders)


def test_processes_leave_nothing_out_if_another_run_fills_the_cache_between_their_looks(tmp_path):
    """The first process looks before the other run appends, the second after it: their lists differ."""
    keys, other = [hashlib.sha256(bytes([number])).hexdigest() for number in range(12)], Cache(tmp_path)
    meet, looked, appended = threading.Barrier(2, timeout=30), threading.Event(), threading.Event()

    def make(missing: list[int]):
        return (torch.full((2, 2), float(number)) for number in missing)

    class Early(Cache):
        def _missing(self, some):
            found = super()._missing(some)
            looked.set()
            appended.wait(30)
            return found

    class Late(Cache):
        def _missing(self, some):
            appended.wait(30)
            return super()._missing(some)

    with ThreadPoolExecutor(2) as pool:
        early, late = Early(tmp_path, (0, 2, meet.wait)), Late(tmp_path, (1, 2, meet.wait))
        work = [pool.submit(cache.fill, keys, make, "things") for cache in (early, late)]
        looked.wait(30)
        for number in (0, 1, 2):  # an odd number of them: slices of the lists would no longer fit together
            other._append(keys[number], torch.full((2, 2), float(number)))
        appended.set()
        for result in work:
            result.result()
    for cache in (early, late):
        assert [cache[key][0, 0].item() for key in keys] == list(range(12))


def test_a_record_seen_half_written_is_read_once_it_is_whole(tmp_path):
    writer, reader = Cache(tmp_path), Cache(tmp_path)
    writer._append("before", torch.ones(4, 64, 64))
    writer._append("key", torch.ones(4, 64, 64))
    whole = writer.own.read_bytes()
    for part in (4096 + HEADER + 7, 4096, HEADER, 100):
        writer.own.write_bytes(whole[: len(whole) // 2 + part])
        assert reader._missing(["before", "key"]) == [1]
    writer.own.write_bytes(whole)
    assert reader._missing(["before", "key"]) == []


def test_what_was_verified_is_never_replaced_by_what_was_not(tmp_path):
    Cache(tmp_path)._append("a", torch.ones(2, 2))
    reader = Cache(tmp_path)

    def make(missing: list[int]):
        other = Cache(tmp_path)
        other._append("a", torch.ones(2, 2))
        other.own.write_bytes(other.own.read_bytes()[:HEADER] + bytes(4096 - HEADER))  # another's, damaged
        return [torch.ones(2, 2)]

    reader.fill(["a", "b"], make, "things")
    assert torch.equal(reader["a"], torch.ones(2, 2))


GOOD = {"key": "abc", "dtype": "float32", "shape": [2, 2], "sha256": hashlib.sha256(bytes(16)).hexdigest()}
HEADERS = {
    "a list": [1],
    "no JSON": b"{",
    "no UTF-8": b"\xff\xfe",
    "deep nesting": b"[" * 440,
    **{f"no {name}": {other: GOOD[other] for other in GOOD if other != name} for name in GOOD},
    "a list as key": GOOD | {"key": [1]},
    "a number as hash": GOOD | {"sha256": 1},
    "a function as dtype": GOOD | {"dtype": "load"},
    **{
        f"shape {shape}": GOOD | {"shape": shape}
        for shape in ("ab", [2.0, 2], [True, 4], [-2, -2], [10**330], [], ["a"])
    },
    "endless": b'{"key": "abc", "dtype": "float32", "shape": [1e999], "sha256": ""}',
}


@pytest.mark.parametrize("header", HEADERS)
def test_a_header_that_only_looks_right_is_passed_over(tmp_path, header):
    content = HEADERS[header] if isinstance(HEADERS[header], bytes) else json.dumps(HEADERS[header]).encode()
    text = content.ljust(HEADER - 64)
    record = hashlib.sha256(text).hexdigest().encode() + text + bytes(16)
    (tmp_path / "a.records").write_bytes(record.ljust(4096, b"\0"))
    cache = Cache(tmp_path)
    cache.fill(["abc"], lambda missing: [torch.ones(2, 2)], "things")
    assert torch.equal(cache["abc"], torch.ones(2, 2)) and len(records(tmp_path)) == 2


def test_a_record_that_is_not_finite_is_made_again(tmp_path):
    Cache(tmp_path)._append("abc", torch.full((2, 2), math.nan))
    cache = Cache(tmp_path)
    cache.fill(["abc"], lambda missing: [torch.ones(2, 2)], "things")
    assert torch.equal(cache["abc"], torch.ones(2, 2))


def test_a_text_is_always_encoded_in_a_batch_of_the_same_size(tmp_path, tiny_base):
    """With another number of texts the kernels may round otherwise."""
    sizes = []

    def load():
        tokenizer, text_encoder = load_text_encoder(tiny_base, CPU)
        text_encoder.register_forward_pre_hook(lambda _, given: sizes.append(tuple(given[0].shape)))
        return tokenizer, text_encoder

    for count in (3, 40, 70):
        encode_texts([str(number) for number in range(count)], tmp_path, "te", load)
    assert sizes == [(encoding.TEXT_BATCH, 77)] * 4  # 3 new ones, 37, 30


def test_a_face_that_encodes_to_nan_is_named(tmp_path, few, tiny_base):
    def broken():
        vae = load_vae(tiny_base, CPU)
        torch.nn.init.constant_(vae.quant_conv.bias, math.nan)
        return vae

    with pytest.raises(InputError, match=r"face000\.png encodes to NaN"):
        encode_faces(few, tmp_path / "cache", "vae", broken)
    assert not records(tmp_path)


def test_texts_that_encode_to_nan_are_named_and_not_cached(tmp_path, tiny_base):
    def damaged():
        tokenizer, text_encoder = load_text_encoder(tiny_base, torch.device("cpu"))
        text_encoder.get_input_embeddings().weight.data[tokenizer("z").input_ids[1]] = math.inf
        return tokenizer, text_encoder

    with pytest.raises(InputError, match="'z' encodes to NaN or infinity: the text encoder"):
        encode_texts(["", "a", "z"], tmp_path, "identity", damaged)
    assert encode_texts(["", "a"], tmp_path, "identity", lambda: load_text_encoder(tiny_base, CPU))[1].isfinite().all()


def test_text_embeddings_equal_the_pipelines_and_are_encoded_once(tmp_path, tiny_base):
    from diffusers import StableDiffusionPipeline

    texts = ["", "A manga face", "x" * 200, *(f"face number {number}" for number in range(40))]  # two chunks

    def encode(texts, load, identity="te", *dtype):
        return torch.stack(list(encode_texts(texts, tmp_path, identity, load, *dtype)))

    load = lambda: load_text_encoder(tiny_base, CPU)  # noqa: E731
    embeddings = encode(texts, load)
    pipe = StableDiffusionPipeline.from_pretrained(tiny_base, safety_checker=None)
    with torch.no_grad():
        expected = torch.cat([pipe.encode_prompt(text, CPU, 1, False)[0] for text in texts])
    assert embeddings.shape == (len(texts), 77, 16)
    torch.testing.assert_close(embeddings, expected, rtol=1e-5, atol=1e-5)

    assert torch.equal(encode(texts, forbidden), embeddings)
    assert torch.equal(encode(texts[::-1], forbidden), embeddings.flip(0))  # each by itself
    assert torch.equal(encode(texts, load, "te", torch.float16), embeddings.half())
    assert torch.equal(encode(texts, forbidden, "te", torch.float16), embeddings.half())
    for changed in ((["", "another"], "te", torch.float32), (texts, "another te", torch.float32)):
        with pytest.raises(AssertionError, match="a model was loaded"):
            encode(changed[0], forbidden, *changed[1:])


def test_one_changed_caption_encodes_one_text(tmp_path, tiny_base, monkeypatch):
    texts, encoded = ["", *(f"face number {number}" for number in range(40))], []
    original = encoding.encode_text
    monkeypatch.setattr(encoding, "encode_text", lambda *given: encoded.extend(given[2]) or original(*given))
    load = lambda: load_text_encoder(tiny_base, CPU)  # noqa: E731
    before = torch.stack(list(encode_texts(texts, tmp_path, "te", load)))
    assert encoded == texts
    encoded.clear()
    texts[7] = "another caption"
    after = torch.stack(list(encode_texts([*texts, texts[7]], tmp_path, "te", load)))
    assert encoded == ["another caption"] and torch.equal(after[-1], after[7])
    assert [torch.equal(new, old) for new, old in zip(after, before, strict=False)] == [n != 7 for n in range(41)]
