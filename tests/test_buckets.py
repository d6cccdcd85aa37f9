"""Panel frames, shapes, and the laws of training when shapes are mixed, on pictures drawn here. CPU, offline."""

import collections
import copy
import dataclasses
import itertools
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file

from dataset import MangaFaceDataset
from lora_layers import inject_lora, lora_parameters
from training import denoising, memory, model
from training.base_model import load_unet, load_vae
from training.bases import BaseModelError, resolution_unit
from training.encoding import EncodedDataset, encode_faces
from training.files import Stop
from training.framing import bucket_shapes, find_frame, frame_picture, ink_of, near_shapes, place_box
from training.pictures import load_image

CPU, ROOT = torch.device("cpu"), Path(__file__).resolve().parent.parent
SIZES = [(96, 96)] * 5 + [(120, 80)] * 4 + [(70, 130)] * 3 + [(150, 60), (60, 200)]  # W, H


# Panel frames --------------------------------------------------------------------------------------------------------


class Panel:
    """A drawing of a head in a page of `width` x `height` pixels; what is drawn on top is up to the test."""

    def __init__(self, width: int = 400, height: int = 520, paper: int = 255):
        self.image = Image.new("L", (width, height), paper)
        self.draw, self.width, self.height = ImageDraw.Draw(self.image), width, height

    def head(self, left: float, top: float, right: float, bottom: float, hair: int = 0) -> "Panel":
        self.draw.ellipse((left, top, right, bottom), fill=240, outline=0, width=3)
        self.draw.pieslice((left, top, right, bottom), 180, 360, fill=hair)
        return self

    def found(self) -> tuple[int, int, int, int]:
        """What find_frame() cuts from left, top, right and bottom, which it must do alike in all orientations."""
        pixels = np.asarray(self.image)
        left, top, right, bottom = find_frame(pixels)
        assert find_frame(pixels.T) == (top, left, bottom, right)
        assert find_frame(pixels[:, ::-1]) == (self.width - right, top, self.width - left, bottom)
        return left, top, self.width - right, self.height - bottom


def framed(width=400, height=520, margin=24, line=4, gutter=255, ink=0, **options) -> Panel:
    """A head in a frame whose line ends at margin + line."""
    panel = Panel(width, height, gutter)
    inside = (margin, margin, width - margin - 1, height - margin - 1)
    panel.draw.rectangle(inside, fill=options.get("fill", 250), outline=ink, width=line)
    return panel.head(0.3 * width, 0.3 * height, 0.7 * width, 0.7 * height)


def check_cut(found, expected, beyond: int = 3) -> None:
    """All of the frame is gone, and at most `beyond` pixels of what it frames."""
    for cut, wanted in zip(found, expected, strict=True):
        assert (cut == 0) if wanted == 0 else (wanted <= cut <= wanted + beyond), (found, expected)


@pytest.mark.parametrize(("width", "height"), [(167, 240), (400, 520), (1340, 900), (2400, 3400)])
@pytest.mark.parametrize("share", [0.01, 0.04, 0.1])
def test_a_frame_and_its_gutter_are_cut_away_at_any_size(width, height, share):
    margin, line = round(share * min(width, height)), max(1, width // 130)
    slant = 1 + max(width, height) // 250
    check_cut(framed(width, height, margin, line).found(), [margin + line] * 4, slant + 1)


@pytest.mark.parametrize("ink", [0, 60, 100])
@pytest.mark.parametrize("line", [1, 3, 7])
def test_lines_may_be_thin_thick_or_grey(ink, line):
    check_cut(framed(line=line, ink=ink).found(), [24 + line] * 4)


def test_a_line_at_the_very_edge_and_a_black_gutter_are_cut_too():
    check_cut(framed(margin=0).found(), [4] * 4)
    check_cut(framed(margin=30, gutter=0).found(), [34] * 4)


def test_a_strip_of_the_neighbour_goes_with_the_gutter():
    panel = framed(margin=40)
    panel.draw.rectangle((0, 0, 14, 519), fill=180, outline=0, width=3)  # its frame and a grey wall
    panel.draw.line((0, 100, 14, 130), fill=0, width=5)
    check_cut(panel.found(), [44] * 4)


@pytest.mark.parametrize("sides", [(0,), (3,), (0, 2), (1, 2, 3)])
def test_each_side_is_judged_alone(sides):
    panel = Panel(paper=250).head(120, 150, 280, 370)
    lines = [(20, 0, 23, 519), (0, 26, 399, 29), (376, 0, 379, 519), (0, 490, 399, 493)]
    for side in sides:
        left, top, right, bottom = lines[side]
        outside = [(0, 0, left, 519), (0, 0, 399, top), (right, 0, 399, 519), (0, bottom, 399, 519)][side]
        panel.draw.rectangle(outside, fill=255)
    for side in sides:
        panel.draw.rectangle(lines[side], fill=0)
    expected = [24, 30, 24, 30]
    check_cut(panel.found(), [wanted if side in sides else 0 for side, wanted in enumerate(expected)])


@pytest.mark.parametrize("degrees", [-0.3, 0.2, 0.3])
def test_a_page_scanned_a_little_askew_is_trimmed_as_well(degrees):
    panel = framed()
    panel.image = panel.image.rotate(degrees, Image.Resampling.BICUBIC, fillcolor=255)
    for cut in panel.found():
        assert 24 <= cut <= 34


def test_a_margin_without_a_line_is_left_alone():
    assert Panel().head(60, 60, 340, 460).found() == (0, 0, 0, 0)
    assert Panel(paper=0).head(60, 60, 340, 460).found() == (0, 0, 0, 0)
    plain = Panel()
    plain.draw.rectangle((40, 40, 360, 480), fill=190)  # a tone without an outline
    assert plain.head(120, 150, 280, 370).found() == (0, 0, 0, 0)


def test_lines_in_the_drawing_are_no_frames():
    panel = Panel(paper=230).head(120, 150, 280, 370)
    panel.draw.rectangle((70, 0, 74, 519), fill=0)  # a door, beyond the outer eighth
    panel.draw.line((20, 0, 20, 300), fill=0, width=4)  # one that ends half-way
    panel.draw.line((10, 470, 390, 519), fill=0, width=4)  # one that is not straight along the side
    assert panel.found() == (0, 0, 0, 0)


def test_hair_and_night_at_the_edge_are_no_frames():
    night = Panel(paper=250)
    night.draw.rectangle((0, 0, 399, 200), fill=0)
    assert night.head(120, 250, 280, 470).found() == (0, 0, 0, 0)
    hair = Panel(paper=250)
    hair.draw.ellipse((-60, -200, 460, 720), fill=0)  # black hair that fills the sides
    assert hair.head(130, 150, 270, 370, hair=250).found() == (0, 0, 0, 0)


@pytest.mark.parametrize("hair", [0, 120])
def test_a_head_that_breaks_out_of_its_panel_loses_nothing(hair):
    """Its top stands out of the upper line into the gutter: that side stays, the others are cut."""
    panel = framed(margin=40)
    panel.head(120, 5, 280, 300, hair)
    check_cut(panel.found(), [44, 0, 44, 44])


def test_a_strand_that_crosses_the_line_near_a_corner_loses_nothing():
    panel = framed()
    panel.draw.rectangle((5, 36, 90, 56), fill=0)
    check_cut(panel.found(), [0, 28, 28, 28])


def test_hair_along_the_line_is_not_cut_away_with_it():
    panel = framed(margin=24, fill=0).head(200, 150, 360, 400, 250)  # night or hair behind all of the line
    left, top, right, bottom = panel.found()
    assert max(left, top, right, bottom) <= 24 + 4 + 3 and min(left, top, right, bottom) >= 24


def test_never_more_than_an_eighth_of_a_side_is_cut():
    for margin in (45, 49, 60, 100):
        left, top, right, bottom = framed(margin=margin).found()
        assert max(left, right) <= 50 and max(top, bottom) <= 65
    assert framed(margin=100).found() == (0, 0, 0, 0)
    left, _, right, _ = framed(margin=49, gutter=0).found()
    assert left == right == 50  # as much as may be


@pytest.mark.parametrize("shape", [(1, 1), (7, 9), (8, 8), (3, 400), (80, 80), (300, 900)])
def test_noise_and_blank_pictures_of_any_size_have_no_frame(shape):
    noise = (np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8) for seed in range(20))
    for pixels in (np.zeros(shape, np.uint8), np.full(shape, 255, np.uint8), *noise):
        assert find_frame(pixels) == (0, 0, shape[1], shape[0])


# Shapes and boxes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("resolution", "unit"), [(512, 64), (768, 64), (1024, 64), (640, 32), (128, 32), (64, 32)])
def test_buckets_are_whole_units_of_nearly_the_square_s_area(resolution, unit):
    shapes = bucket_shapes(resolution, unit)
    everything = {(a * unit, b * unit) for a in range(2, 99) for b in range(2, 99)}
    wanted = {(h, w) for h, w in everything if 0.8 <= h * w / resolution**2 <= 1.25 and 1 / 3 <= h / w <= 3}
    assert set(shapes) == wanted and (resolution, resolution) in shapes
    assert near_shapes(300, 300, resolution, unit)[0] == (resolution, resolution)


def test_the_nearest_bucket_cuts_at_most_six_percent_at_512():
    worst = 0.0
    for ratio in np.geomspace(1 / 3, 3, 2001):
        height, width = near_shapes(round(1e6 * ratio), 10**6, 512, 64)[0]
        worst = max(worst, 1 - min(width / height / ratio, ratio / (width / height)))
    assert 0.05 < worst <= 0.06


def test_a_resolution_that_is_no_multiple_still_has_its_square():
    assert bucket_shapes(8, 64) == [(8, 8)]  # refused later, when the base is known


@pytest.mark.parametrize(("width", "height"), [(500, 501), (217, 389), (1000, 333), (64, 300), (301, 77)])
def test_boxes_have_exactly_the_aspect_of_their_shape_and_fill_one_side(width, height):
    grey = Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width), dtype=np.uint8))
    frame = (3, 5, width - 2, height - 7)
    shape = near_shapes(frame[2] - frame[0], frame[3] - frame[1], 512, 64)[0]
    _, (left, top, right, bottom) = place_box(ink_of(grey, frame), frame, shape)
    assert (right - left) / (bottom - top) == pytest.approx(shape[1] / shape[0], rel=1e-12)  # nothing is stretched
    assert frame[0] <= left and frame[1] <= top and right <= frame[2] + 1e-9 and bottom <= frame[3] + 1e-9
    filled = (right - left) / (frame[2] - frame[0]), (bottom - top) / (frame[3] - frame[1])
    assert max(filled) == pytest.approx(1)


@pytest.mark.parametrize("at", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("paper", [255, 200])
def test_the_rest_is_cut_where_the_border_is_emptiest(at, paper):
    """A head anywhere in a wide, a tall picture: as long as there is blank paper to cut, nothing of it is cut."""
    for turned in (False, True):
        wide = Panel(600, 200, paper)
        centre = 80 + at * 440
        wide.head(centre - 70, 30, centre + 70, 170)
        grey = wide.image.transpose(Image.Transpose.TRANSPOSE) if turned else wide.image
        _, (left, top, right, bottom) = place_box(ink_of(grey, whole := (0, 0, *grey.size)), whole, (512, 512))
        start, end = (top, bottom) if turned else (left, right)
        assert end - start == 200 and start <= centre - 70 and centre + 70 <= end


def test_heads_are_up_so_the_chest_is_cut_before_the_hair():
    panel = Panel(400, 440).head(100, -20, 300, 250)
    panel.draw.rectangle((50, 300, 350, 439), fill=0)  # black clothes
    assert place_box(ink_of(panel.image, whole := (0, 0, 400, 440)), whole, (512, 512))[1] == (0, 0, 400, 400)


def test_of_shapes_that_cut_little_that_which_loses_no_ink_is_taken():
    """A head that fills the height: the nearest shape would cut its hair, another one only paper beside it."""
    panel = Panel(455, 400).head(130, 0, 330, 399)  # 576 x 512 would cut 4 of 400 rows, 512 x 512 (12 %) is too far
    shapes = near_shapes(455, 400, 512, 64)
    inks = {shape: place_box(ink_of(panel.image, (0, 0, 455, 400)), (0, 0, 455, 400), shape)[0] for shape in shapes}
    _, (left, top, right, bottom), shape = frame_picture(panel.image, 512, 64, "buckets", False)
    assert inks[shapes[0]] > 0 and inks[shape] == 0 and shape != shapes[0]
    assert (top, bottom) == (0, 400) and left <= 130 and right >= 330
    assert all(1 - min(455 * h / (400 * w), 400 * w / (455 * h)) <= 0.06 for h, w in shapes)


def test_a_square_picture_is_never_cut():
    noise = np.random.default_rng(0).integers(0, 256, (300, 300), dtype=np.uint8)
    assert frame_picture(Image.fromarray(noise), 512, 64, "buckets", False)[1:] == ((0, 0, 300, 300), (512, 512))


def test_a_blank_picture_is_cut_in_the_middle():
    for paper in (0, 255):
        assert place_box(ink_of(Image.new("L", (500, 400), paper), whole := (0, 0, 500, 400)), whole, (512, 512)) == (
            0,
            (50, 0, 450, 400),
        )


def test_a_circle_stays_a_circle(tmp_path):
    for width, height in ((300, 500), (777, 300)):
        panel = Panel(width, height)
        panel.draw.ellipse((width / 2 - 100, height / 2 - 100, width / 2 + 100, height / 2 + 100), fill=0)
        panel.image.save(tmp_path / "a.png")
        shape = near_shapes(width, height, 512, 64)[0]
        _, box = place_box(ink_of(panel.image, whole := (0, 0, width, height)), whole, shape)
        ink = load_image(tmp_path / "a.png", box, shape)[0] < 0
        across, along = ink.any(dim=0).sum().item(), ink.any(dim=1).sum().item()
        assert abs(across - along) <= 1


# The data set --------------------------------------------------------------------------------------------------------


def make_faces(folder: Path, sizes=SIZES) -> Path:
    """Noise of these sizes, each with two captions."""
    folder.mkdir()
    entries = []
    for number, (width, height) in enumerate(sizes):
        pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"face{number:02d}.png")
        captions = [f"a face {number}", f"manga, hair {number % 3}"]
        entries.append({"image_name": f"face{number:02d}", "captions": captions})
    (folder / "modified_face_250.json").write_text(json.dumps(entries))
    return folder


def read(folder: Path, **options) -> MangaFaceDataset:
    return MangaFaceDataset(folder, folder / "modified_face_250.json", **{"resolution": 128, "unit": 32, **options})


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> MangaFaceDataset:
    return read(make_faces(tmp_path_factory.mktemp("mixed") / "faces"))


def test_faces_keep_their_shapes_and_the_square_framing_is_the_centre_square(mixed):
    assert [face.shape for face in mixed.faces[:5]] == [(128, 128)] * 5
    assert len({face.shape for face in mixed.faces}) == 4
    for face in mixed.faces:
        assert face.shape in near_shapes(*face.size, 128, 32)
    for face in read(mixed.dataset_dir, framing="square").faces:
        side, (width, height) = min(face.size), face.size
        left, top = (width - side) // 2, (height - side) // 2
        assert face.shape == (128, 128) and face.box == (left, top, left + side, top + side)
    item = mixed[0]["pixel_values"]
    assert item.shape == (3, *mixed.faces[mixed.train[0]].shape)


def test_frames_are_trimmed_where_asked(tmp_path):
    folder = make_faces(tmp_path / "faces", [(96, 96)] * 3)
    framed(400, 520).image.save(folder / "face01.png")
    trimmed, whole = read(folder), read(folder, trim_frames=False)
    left, top, right, bottom = trimmed.faces[1].frame
    check_cut((left, top, 400 - right, 520 - bottom), [28] * 4)
    assert all(face.frame == (0, 0, *face.size) for face in whole.faces)


def test_the_report_names_whoever_is_cut_by_more_than_six_percent(tmp_path):
    folder = make_faces(tmp_path / "faces", [(300, 300), (360, 300), (1200, 300), (200, 1000)])
    lines = read(folder, resolution=512, unit=64).report().splitlines()
    assert "Cut by more than 6% to fit: 2 (face03 40%, face02 25%)" in lines
    shapes = next(line for line in lines if line.startswith("Used as"))
    assert "512 x 512: 1" in shapes and "320 x 960: 1" in shapes and "960 x 320: 1" in shapes


# Batches -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8, 100])
def test_batches_hold_one_shape_as_far_as_they_can_and_every_draw_once(mixed, size):
    for epoch in range(20):
        batches = mixed.epoch_batches(epoch, size)
        order = mixed.epoch_order(epoch)
        assert len(batches) == math.ceil(len(order) / size)
        assert sorted(np.concatenate(batches).tolist()) == sorted(order.tolist())
        assert sorted(map(len, batches))[1:] == [size] * (len(batches) - 1)  # at most one is smaller
        shapes = [[mixed.faces[mixed.train[position]].shape for position in batch] for batch in batches]
        drawn = collections.Counter(itertools.chain(*shapes))
        of_one = collections.Counter(batch[0] for batch in shapes if len(set(batch)) == 1 and len(batch) == size)
        for shape, count in drawn.items():  # all its full batches, but for the draws beyond them
            assert of_one[shape] >= count // size


def test_batches_depend_on_seed_and_epoch_alone_and_all_are_shuffled(mixed):
    def listed(dataset, epoch):
        return [batch.tolist() for batch in dataset.epoch_batches(epoch, 2)]

    again = read(mixed.dataset_dir)
    assert [listed(mixed, epoch) for epoch in (3, 0, 3)] == [listed(again, epoch) for epoch in (3, 0, 3)]
    assert listed(mixed, 0) != listed(mixed, 1)
    assert listed(read(mixed.dataset_dir, seed=1), 0) != listed(mixed, 0)
    is_full = [
        [len({mixed.faces[mixed.train[position]].shape for position in batch}) == 1 for batch in listed(mixed, epoch)]
        for epoch in range(30)
    ]
    assert any(first < second for row in is_full for first, second in itertools.pairwise(row))  # mixed ones anywhere


def test_of_one_shape_the_batches_are_the_order_cut(mixed):
    square = read(mixed.dataset_dir, framing="square")
    for epoch in range(5):
        order = square.epoch_order(epoch)
        for start, batch in zip(range(0, len(order), 4), square.epoch_batches(epoch, 4), strict=True):
            np.testing.assert_array_equal(batch, order[start : start + 4])


def test_every_face_s_count_stays_within_the_bound_when_shapes_are_mixed(mixed):
    counts = np.zeros(len(mixed))
    for epoch in range(60):
        counts += np.bincount(np.concatenate(mixed.epoch_batches(epoch, 4)), minlength=len(mixed))
        assert np.abs(counts - (epoch + 1) * mixed.weights).max() <= 2.51


def latent_shapes(dataset: MangaFaceDataset) -> list[tuple[int, int, int]]:
    return [(4, face.shape[0] // 4, face.shape[1] // 4) for face in dataset.faces]


def test_a_batch_of_one_shape_draws_the_same_noise_as_ever(mixed):
    """Against the draws written out: choice, dropout, strata, noise, posterior noise, from (seed, 3, step)."""
    shapes = latent_shapes(mixed)
    positions = [position for position, face in enumerate(mixed.train) if shapes[face] == (4, 32, 32)][:3]
    generator = denoising.seeded(7, 3, 11)
    for draw in (torch.rand, torch.rand, torch.randperm, torch.rand):
        draw(3, generator=generator)
    noise, posterior = (torch.randn(3, 4, 32, 32, generator=generator) for _ in range(2))
    for given in (shapes, (4, 32, 32)):
        batch = denoising.draw_batch(mixed, positions, 7, 11, given, 1000, 0.1)
        assert torch.equal(batch.noise, noise) and torch.equal(batch.posterior_noise, posterior)


def test_the_largest_shape_is_rehearsed_and_planned_for(mixed, monkeypatch):
    areas = [math.prod(mixed.faces[mixed.train[position]].shape) for position in mixed.largest_batch(8)]
    assert len(areas) == 8 and set(areas) == {max(math.prod(mixed.faces[face].shape) for face in mixed.train)}
    square = read(mixed.dataset_dir, framing="square")
    np.testing.assert_array_equal(square.largest_batch(8), square.epoch_order(0)[:8])
    rare = copy.copy(mixed)  # that epoch 0 doesn't draw: a later one would be the first to need so much memory
    rare.faces = list(mixed.faces)
    unseen = set(range(len(mixed))) - {0, 1}
    rare.faces[mixed.train[5]] = dataclasses.replace(mixed.faces[mixed.train[5]], shape=(512, 512))
    rare.epoch_order = lambda epoch: np.array(sorted(unseen - {5}))
    assert set(rare.largest_batch(8)) == {5}

    planned = []
    monkeypatch.setattr(
        memory, "memory_plans", lambda *given: planned.append(given) or [memory.MemoryPlan(1, "all", 1.0)]
    )
    monkeypatch.setattr(memory, "Plans", lambda *given: SimpleNamespace())

    class Anything:  # stands for the run, the model and the config
        device, world, precision, train_batch_size, gradient_accumulation_steps = CPU, 1, "no", 2, 4
        gradient_checkpointing, unet = "auto", None
        from_main = least = log = staticmethod(lambda thing: thing)

    data = type("Data", (), {"prompts": torch.zeros(1, 77, 16), "latent_shapes": latent_shapes(mixed)})
    memory.plan_memory(Anything(), Anything(), data, Anything())
    assert math.prod(planned[0][1]) == max(map(math.prod, latent_shapes(mixed)))


# The laws of a step, in float64 --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def precise(tiny_base, mixed):
    """(UNet in float64 with a LoRA that does something, schedule, latents of mixed shapes)."""
    torch.manual_seed(0)
    unet, scheduler = load_unet(tiny_base, CPU, torch.float32)
    inject_lora(unet, 4, 8)
    unet.double()
    for parameter in lora_parameters(unet):
        torch.nn.init.normal_(parameter, std=0.1)
    latents = [torch.stack((torch.randn(shape), torch.rand(shape))).double() for shape in latent_shapes(mixed)]
    return unet, scheduler, EncodedDataset(latents, torch.randn(len(mixed.texts), 77, 16).double(), CPU)


def mixed_batch(mixed) -> denoising.Batch:
    """Eight images of at least three shapes, weighed differently."""
    batch = denoising.draw_batch(mixed, list(range(8)), 0, 0, latent_shapes(mixed), 1000, 0.1)
    assert len({noise.shape for noise in batch.noise}) >= 3
    return dataclasses.replace(batch, loss_weights=torch.linspace(0.5, 2, 8))


def gradient(precise, batch, share, micro_batch) -> tuple[torch.Tensor, torch.Tensor]:
    unet, scheduler, encoded = precise
    for parameter in lora_parameters(unet):
        parameter.grad = torch.zeros_like(parameter)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    loss = denoising.accumulate_gradients(unet, scheduler, encoded, batch, share, micro_batch, scaler)
    return loss, torch.cat([parameter.grad.flatten() for parameter in lora_parameters(unet)])


def test_a_mixed_step_equals_the_formula_image_by_image(precise, mixed):
    """sum of weight x per-image loss over 8 images, divided by 8; each image alone through the UNet."""
    unet, scheduler, encoded = precise
    batch, total = mixed_batch(mixed), 0.0
    found, of_step = gradient(precise, batch, torch.arange(8), 8)
    for parameter in lora_parameters(unet):
        parameter.grad = None
    for image, face in enumerate(batch.faces.tolist()):
        mean, std = encoded.latents[face]
        latents = mean + std * batch.posterior_noise[image]
        noise, time = batch.noise[image], batch.timesteps[image : image + 1]
        noisy = scheduler.add_noise(latents[None], noise[None], time)
        prediction = unet(noisy, time, encoded.text_embeddings[batch.texts[image]][None]).sample[0]
        total = total + batch.loss_weights[image].double() * (prediction - noise).square().mean() / 8
    total.backward()
    expected = torch.cat([parameter.grad.flatten() for parameter in lora_parameters(unet)])
    assert abs(found - total) < 1e-10 and (of_step - expected).abs().max() < 1e-10
    assert of_step.abs().max() > 1e-3


PASSES = [(3, 2), *(pytest.param(*some, marks=pytest.mark.long) for some in ((1, 1), (2, 1), (2, 3)))]


@pytest.mark.parametrize(("micro_batch", "world"), PASSES)
def test_neither_micro_batches_nor_processes_change_a_mixed_step(precise, mixed, micro_batch, world):
    batch = mixed_batch(mixed)
    whole_loss, whole = gradient(precise, batch, torch.arange(8), 8)
    parts = [gradient(precise, batch, torch.arange(8)[rank::world], micro_batch) for rank in range(world)]
    assert abs(sum(loss for loss, _ in parts) - whole_loss) < 1e-10
    assert (sum(gradient for _, gradient in parts) - whole).abs().max() < 1e-10


def test_images_of_one_shape_pass_together(precise, mixed):
    passes, batch = [], mixed_batch(mixed)
    hook = precise[0].register_forward_pre_hook(lambda _, given: passes.append(tuple(given[0].shape)))
    gradient(precise, batch, torch.arange(8), 2)
    hook.remove()
    counts = collections.Counter(tuple(noise.shape) for noise in batch.noise)
    assert len(passes) == sum(math.ceil(count / 2) for count in counts.values())


def test_validation_takes_faces_of_one_shape_together_and_noise_of_each_face_s_own(precise, mixed):
    unet, scheduler, encoded = precise
    found = denoising.validate(unet, scheduler, mixed, encoded, 5)
    losses = []
    for position, face in enumerate(mixed.validation):
        generator = denoising.seeded(5, 4, position)
        strata = torch.arange(4) + torch.rand(4, generator=generator)
        timesteps = (strata / 4 * 1000).long()
        noise = torch.randn(4, *latent_shapes(mixed)[face], generator=generator)
        text = encoded.text_embeddings[mixed.first_text[face]]
        for time, one in zip(timesteps[:, None], noise, strict=True):
            noisy = scheduler.add_noise(encoded.latents[face][:1], one[None], time)
            with torch.no_grad():
                losses.append((unet(noisy, time, text[None]).sample - one).square().mean().item())
    assert len({latent_shapes(mixed)[face] for face in mixed.validation}) > 1
    assert found[0] == pytest.approx(np.mean(losses), rel=1e-6)


# Encoding and whole runs ---------------------------------------------------------------------------------------------


def test_latents_are_keyed_by_box_and_shape(tmp_path, mixed, tiny_base):
    vae, encoded = load_vae(tiny_base, CPU), []
    vae.encoder.register_forward_hook(lambda _, given, __: encoded.append(given[0].shape))
    latents = encode_faces(mixed, tmp_path, "vae", lambda: vae)
    assert [tuple(one.shape) for one in latents] == [(2, *shape) for shape in latent_shapes(mixed)]
    assert [tuple(shape[2:]) for shape in encoded] == [face.shape for face in mixed.faces]
    with torch.no_grad():
        pixels = load_image(mixed.faces[6].path, mixed.faces[6].box, mixed.faces[6].shape)
        expected = vae.encode(pixels[None]).latent_dist.mean[0] * vae.config.scaling_factor
    torch.testing.assert_close(latents[6][0], expected)
    encoded.clear()
    square = read(mixed.dataset_dir, framing="square")
    latents = encode_faces(square, tmp_path, "vae", lambda: vae)
    assert len({one.shape for one in latents}) == 1 and len(encoded) == sum(width != height for width, height in SIZES)
    moved = dataclasses.replace(mixed.faces[6], box=tuple(np.add(mixed.faces[6].box, (0.5, 0, 0.5, 0))))
    encoded.clear()
    mixed_again = read(mixed.dataset_dir)
    mixed_again.faces[6] = moved
    encode_faces(mixed_again, tmp_path, "vae", lambda: vae)
    assert len(encoded) == 1
    smaller = read(mixed.dataset_dir, framing="square", resolution=64)  # the same boxes
    assert {one.shape for one in encode_faces(smaller, tmp_path, "vae", lambda: vae)} == {(2, 4, 16, 16)}


@pytest.fixture
def config(tiny_config, mixed):
    """Three epochs of two steps on faces of four shapes."""
    names = {"dataset_dir": str(mixed.dataset_dir), "json_file": str(mixed.json_file), "resolution": 128}
    return dataclasses.replace(tiny_config, **names)


def exported(config) -> bytes:
    return Path(config.output_dir, "pytorch_lora_weights.bin").read_bytes()


@pytest.mark.promise("Interrupted and resumed, a run ends with the same files")
@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.long), 3])
def test_a_run_of_mixed_shapes_resumes_to_the_same_bytes(script, config, tmp_path, monkeypatch, step):
    script.main(config)
    again = dataclasses.replace(config, output_dir=str(tmp_path / "again"))
    original, calls = model.accumulate_gradients, []

    def wrapped(*arguments):
        calls.append(1)
        if len(calls) == step + 1:  # the first is the rehearsal
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments)

    monkeypatch.setattr(model, "accumulate_gradients", wrapped)
    with pytest.raises(Stop, match=f"saved after step {step}"):
        script.main(again)
    monkeypatch.setattr(model, "accumulate_gradients", original)
    script.main(again)
    assert exported(again) == exported(config)


def test_a_run_of_mixed_shapes_is_drawn_and_scored(script, config):
    """Pictures for held-out faces' captions have these faces' shapes, and are compared with faces of such shapes."""
    changes = {"sample_prompts": ("a face",), "samples_per_prompt": 1, "sample_steps": 2, "num_train_epochs": 1}
    summary = script.main(dataclasses.replace(config, **changes))
    assert summary["score_in_words"] is not None
    assert Path(config.output_dir, "before_after.png").is_file()


def test_the_unit_is_the_base_s_and_64_where_it_is_unknown(tiny_base):
    assert resolution_unit(tiny_base) == 32 and resolution_unit(None) == 64


@pytest.mark.parametrize("dry_run", [True, False])
def test_buckets_smaller_than_the_base_allows_are_one_line_and_nothing_is_written(script, config, dry_run):
    before = sorted(Path(config.dataset_dir).parent.rglob("*"))
    for resolution, advice in ((32, 64), (48, 64), (96 + 8, 96)):
        with pytest.raises(BaseModelError, match=rf"resolution={resolution} .*\(try {advice}\)$") as caught:
            script.main(dataclasses.replace(config, resolution=resolution, dry_run=dry_run))
        assert caught.value.exit_code == 2 and "\n" not in str(caught.value)
    assert sorted(Path(config.dataset_dir).parent.rglob("*")) == before
    written = Path(config.output_dir)
    assert not written.exists() or not any(written.iterdir())


def test_a_framing_that_does_not_exist_is_named(script, config):
    with pytest.raises(Stop, match=r"framing='oblong' must be \"buckets\" or \"square\""):
        script.check_config(dataclasses.replace(config, framing="oblong"))


@pytest.mark.long
def test_two_processes_train_the_same_lora_on_mixed_shapes(script, config, tmp_path):
    """A run of its own each, of six steps; the weights differ by rounding alone."""
    config = dataclasses.replace(config, train_batch_size=2, gradient_accumulation_steps=2)
    script.main(config)
    two = dataclasses.replace(config, output_dir=str(tmp_path / "two"), gradient_accumulation_steps=1)
    words = []
    for name, value in dataclasses.asdict(two).items():
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        else:
            words += [f"--{name}", *map(str, value if isinstance(value, tuple) else (value,))]
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    command = [sys.executable, *launch, str(ROOT / "train_manga_lora.py"), *words]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True)
    assert done.returncode == 0, done.stderr[-2000:]
    one, other = (load_file(Path(run.output_dir, "pytorch_lora_weights.safetensors")) for run in (config, two))
    assert len(one) == len(other) == 3 * 80
    difference = sum((one[name] - other[name]).float().square().sum() for name in one)
    moved = sum(one[name].float().square().sum() for name in one if name.endswith("lora_up.weight"))
    assert moved > 0 and difference < 1e-4 * moved
