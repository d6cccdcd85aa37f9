"""Look before you train: dataset.html and the warnings. Data sets of a few drawn faces."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw

import train_manga_lora as trainer
from dataset import MangaFaceDataset
from training import dataset_report, files
from training.base_model import load_tokenizer
from training.dataset_report import dataset_page, dataset_warnings, write_dataset_report
from training.folder import check_output_folder, start_folder

NASTY = """<script>alert("x")</script> & <img src='https://example.org/x.png' onerror=alert(1)>"""
SHAPES = ("ellipse", "rectangle", "chord", "pieslice", "arc", "line")


def draw(number: int, size=(96, 96), colour="black", mode="RGB") -> Image.Image:
    """A face of ink, of another kind than those of other numbers."""
    picture = Image.new(mode, size, "white")
    pen, (width, height) = ImageDraw.Draw(picture), size
    for part in range(4):
        left, top = (number * 37 + part * 29) % 50 / 100 * width, (number * 53 + part * 41) % 50 / 100 * height
        box = (left + 0.1 * width, top + 0.1 * height, left + 0.4 * width, top + 0.4 * height)
        kind = SHAPES[(number + part) % len(SHAPES)]
        more = {"start": 20, "end": 200} if kind in ("chord", "pieslice", "arc") else {}
        getattr(pen, kind)(box, fill=colour, **more)
    return picture


@pytest.fixture
def make(tmp_path, tiny_base):
    """A function from {name: picture} and captions (of all, or by name) to (dataset, config)."""

    def make(pictures: dict, captions=None, **changes):
        folder = tmp_path / "faces"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for name, picture in pictures.items():
            picture.save(folder / f"{name}.png")
        of_all = {name: [f"manga face {name}", "clean lineart"] for name in pictures}
        of_all |= captions if isinstance(captions, dict) else dict.fromkeys(pictures, captions) if captions else {}
        entries = [{"image_name": name, "captions": texts} for name, texts in of_all.items()]
        (folder / "modified_face_250.json").write_text(json.dumps(entries), encoding="utf-8")
        config = trainer.TrainingConfig(
            dataset_dir=str(folder),
            json_file=str(folder / "modified_face_250.json"),
            output_dir=str(tmp_path / "out"),
            pretrained_model=str(tiny_base),
            cache_dir=str(tmp_path / "cache"),
            resolution=64,
            learning_rate=1e-4,
            num_workers=2,
        )
        config = dataclasses.replace(config, **changes)
        return MangaFaceDataset.from_config(config, 32), config

    return make


def many(count: int = 20) -> dict:
    return {f"face{number:03d}": draw(number) for number in range(count)}


def texts(made, steps=1000) -> list[str]:
    return [text for text, _ in dataset_warnings(*made, steps)]


def page_of(made, steps=1000) -> str:
    tokenizer = load_tokenizer(Path(made[1].pretrained_model))
    made[0].make_texts(tokenizer)
    return dataset_page(made[0], tokenizer, made[1], steps)


def about(found, words: str, dataset) -> list[str]:
    """The names of the faces that the one warning with these words is about."""
    (faces,) = [faces for text, faces in found if words in text]
    return [dataset.faces[index].name for index in faces]


# Warnings --------------------------------------------------------------------------------------------------------


def test_a_sound_data_set_has_no_warning_but_the_unmeasured_figures(make):
    unmeasured = "Expected time and memory: not measured on this device"
    assert texts(make(many(80), validation_share=0.1)) == [unmeasured]
    few = "Only 4 faces held out, a score needs 8: set validation_share = "
    assert texts(make(many(40), validation_share=0.1)) == [f"{few}0.2", unmeasured]
    assert texts(make(many(24), validation_share=0.1))[0] == "Only 4 faces held out, a score needs 8: add faces"
    assert texts(make(many(24), validation_share=0.0)) == [unmeasured]  # nothing is held out, on purpose


def test_time_and_memory_are_those_measured_on_such_a_device_at_such_a_resolution(make, monkeypatch):
    dataset, config = make(many())
    at_512 = dataclasses.replace(config, resolution=512)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for device, changed, expected in (
        ("NVIDIA H200", at_512, "1.0 minutes of training steps, 7.4 GiB (as measured on NVIDIA H200)"),  # 113 images/s
        ("NVIDIA H200", config, "not measured on NVIDIA H200"),
        ("NVIDIA H200", dataclasses.replace(at_512, demo=True), "not measured on NVIDIA H200"),
        ("GeForce", at_512, "not measured on GeForce"),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=device: device)
        (told,) = [text for text, _ in dataset_warnings(dataset, changed, 870) if text.startswith("Expected")]
        assert told == f"Expected time and memory: {expected}"


def test_few_faces_and_few_steps_are_told_with_the_epochs_for_1000_steps(make):
    made = make(many(19), num_train_epochs=30)
    found = texts(made, steps=90)
    assert found[0].startswith("Only 19 faces") and "--num_train_epochs 334 would make 1,000" in found[2]
    assert not any("Only" in text for text in texts(make(many(20), validation_share=0.4), steps=200))


def test_captions_that_are_all_the_same_are_told(make):
    assert any("Captions all the same ('a face')" in text for text in texts(make(many(), captions=["a face"])))


def test_colour_pictures_among_ink_are_named_and_a_coloured_data_set_is_not(make):
    dataset, config = make(many() | {"red": draw(30, colour="red"), "pale": draw(31, colour="#776655")})
    assert about(dataset_warnings(dataset, config, 1000), "In colour among ink", dataset) == ["red", "pale"]
    coloured = {f"face{number}": draw(number, colour="blue") for number in range(20)}
    assert not any("colour" in text for text in texts(make(coloured | {"ink": draw(30)})))


def test_faces_smaller_than_half_the_resolution_are_named(make):
    dataset, config = make(many() | {"tiny": draw(30, (31, 31)), "half": draw(31, (32, 32))})
    assert about(dataset_warnings(dataset, config, 1000), "Smaller than half", dataset) == ["tiny"]


def test_near_duplicates_are_named(make):
    dataset, config = make(many() | {"copy": draw(3).resize((120, 120))})
    assert about(dataset_warnings(dataset, config, 1000), "Nearly the same", dataset) == ["face003", "copy"]


def test_panel_frames_are_named(make):
    framed = draw(30, (200, 200))
    ImageDraw.Draw(framed).rectangle((8, 8, 191, 191), outline="black", width=3)
    dataset, config = make(many() | {"framed": framed})
    assert about(dataset_warnings(dataset, config, 1000), "Panel frame", dataset) == ["framed"]
    assert re.search("200 x 200; cut frame: left 1., top 1., right 1., bottom 1.<", page_of((dataset, config)))


def test_what_a_cut_goes_through_may_be_a_head_if_it_ended_before_the_picture_did(make):
    def wide(paper="white", **drawn):
        picture = Image.new("RGB", (400, 100), paper)
        ImageDraw.Draw(picture).ellipse((10, 5, 390, 95), **drawn)  # both sides of the head are cut
        return picture

    def tall(top: int, bottom: int):
        picture = Image.new("RGB", (100, 400), "white")  # of which the rows from 150 to 250 are kept
        ImageDraw.Draw(picture).ellipse((10, top, 90, bottom), outline="black", width=2)
        return picture

    heads = {
        "thick": wide(outline="black", width=10),
        "thin": wide(outline="black", width=2),
        "grey": wide(fill="#b0b0b0"),
        "black": wide(fill="black"),
        "night": wide("black", outline="white", width=2),
        "chin": tall(160, 300),
        "top": tall(100, 240),
    }
    calm = Image.new("RGB", (400, 100), "white")
    ImageDraw.Draw(calm).ellipse((160, 10, 240, 90), outline="black", width=6)
    across = Image.new("RGB", (400, 100), "white")  # goes on beyond the picture, as a floor does
    ImageDraw.Draw(across).line((0, 80, 400, 80), fill="black", width=3)
    shoulders = tall(160, 230)
    ImageDraw.Draw(shoulders).rectangle((30, 230, 70, 399), fill="black")
    whole = {"calm": calm, "across": across, "shoulders": shoulders, "paper": Image.new("RGB", (400, 100), "black")}
    dataset, config = make(many() | heads | whole, framing="square")
    assert about(dataset_warnings(dataset, config, 1000), "Is a head cut", dataset) == list(heads)


def test_a_rate_far_from_usual_is_told_but_not_for_the_demo(make):
    for rate, told in ((1e-6, 0), (5e-4, 0), (9e-7, 1), (2e-3, 1)):
        assert sum("learning_rate" in text for text in texts(make(many(), learning_rate=rate))) == told, rate
    assert not any("learning_rate" in text for text in texts(make(many(), learning_rate=2e-3, demo=True)))


def test_a_base_that_was_not_checked_is_told_with_the_reason(make):
    told = [
        text for text in texts(make(many(), pretrained_model="no/base", dry_run=True)) if "base was NOT checked" in text
    ]
    assert len(told) == 1 and "can't be downloaded (" in told[0]
    assert not any("NOT checked" in text for text in texts(make(many())))


def test_warnings_stand_in_the_terminal_before_the_weights(make, capsys):
    _, config = make(many(5))
    trainer.main(dataclasses.replace(config, dry_run=True))
    shown = capsys.readouterr().out
    assert 0 < shown.index("Before you train:\n  Only 5 faces") < shown.index("not measured") < shown.index("Weight")


# The page --------------------------------------------------------------------------------------------------------


def test_foreign_text_is_escaped_everywhere(make):
    made = make(many(3), captions={"face000": [NASTY, NASTY * 9]}, trigger_word="<u>")
    made[0].faces[1] = dataclasses.replace(made[0].faces[1], name='"><script>x', remark="<b>remark</b>")
    made[0].skipped.append("<i>skipped</i>")
    page = page_of(made)
    assert page.count("<script>") == 1 == page.count("</script>") and page.count("<img") == 3
    assert not re.search("<[bui]>|onerror=alert[^<]*'?>(?!&)", page.replace("&gt;", "")) and "&lt;b&gt;" in page


def test_nothing_is_fetched(make):
    page = page_of(make(many(3), captions=[NASTY]))
    assert set(re.findall(r'<[^>]*\b(?:src|href|action)="([^:"]*:?)', page)) == {"data:"}
    assert not re.search(r"@import|url\(|<link|<iframe|fetch\(|XMLHttp", page)
    assert "default-src 'none'" in page
    assert not re.search("https?://", page_of(make(many(3))))


def test_faces_carry_what_they_are_sorted_by_warnings_first(make):
    captions = {f"face{number:03d}": [f"a man, {'glasses' if number % 4 else 'beard'}"] for number in range(20)}
    pictures = many(20) | {"wide": draw(30, (320, 256)), "tiny": draw(31, (20, 20))}
    page = page_of(make(pictures, captions, resolution=128))
    keys = re.findall(
        r'data-weight="([\d.]+)" data-name="(\w+)" data-shape="([\d.]+)" data-warnings="(\d)" '
        r'data-terms="([^"]*)" data-captions="(\d+)" data-lost="0"',
        page,
    )
    assert all(int(length) >= 8 for *_, length in keys) and {term for *_, term, _ in keys} >= {"", "beard", "glasses"}
    keys = [key[:4] for key in keys]
    assert len(keys) == 22 and keys[0][1] == "tiny" and [warned for *_, warned in keys] == ["1"] + ["0"] * 21
    assert {name: shape for _, name, shape, _ in keys}["wide"] == "1.2500"  # 160 x 128
    rest = [float(weight) for weight, _, _, warned in keys if warned == "0"]
    assert rest == sorted(rest, reverse=True) and len(set(rest)) > 2  # those held out, without a weight, at the end
    assert set(re.findall(r'<option value="(\w+) -?1">', page)) == {
        *("warnings", "weight", "name", "shape", "terms", "captions", "lost")
    }


def test_captions_show_what_is_read_and_what_is_lost(make):
    dataset, config = make(many(3), captions={"face001": ["abcdefghij " * 9]})  # a token a letter: 75 are read
    page = page_of((dataset, config))
    (read, lost) = re.search("<li>(abc[^<]*)<s>([^<]*)</s>", page).groups()
    assert read + lost == "abcdefghij " * 9 or read + lost == ("abcdefghij " * 9).strip()
    assert len(read.replace(" ", "")) == 75 and page.count("<s>") == 1
    assert "joined, for validation</summary>manga face face000, clean lineart" in page


def test_a_thumbnail_is_the_face_in_its_shape_at_most_256_pixels(make):
    page = page_of(make({"wide": draw(1, (1200, 600))} | many(2), resolution=512))
    assert 'width="256" height="137"' in page or 'width="256" height="128"' in page


def test_over_500_faces_only_warned_heaviest_and_lightest_are_shown(make, monkeypatch):
    monkeypatch.setattr(dataset_report, "MOST_FACES", 20)
    monkeypatch.setattr(dataset_report, "EXTREMES", 3)
    made = make({f"face{number:03d}": draw(number) for number in range(30)} | {"tiny": draw(40, (20, 20))})
    weights = sorted(made[0].weights)
    page = page_of(made)
    shown = re.findall(r'data-weight="([\d.]+)" data-name="(\w+)"', page)
    assert 'data-name="tiny"' in page and f"{weights[0]:.4f}" in dict(shown) and f"{weights[-1]:.4f}" in dict(shown)
    assert len(shown) < 20 and f"Shown are {len(shown)}" in page
    monkeypatch.setattr(dataset_report, "MUCH_INK", -1)  # all are warned of
    assert len(re.findall("<article", page_of(made))) == 20


def test_the_page_stays_within_its_size_whatever_the_captions(make, monkeypatch):
    monkeypatch.setattr(dataset_report, "MOST_BYTES", 10**6 + 60_000)
    page = page_of(make(many(12), captions=["<" * 30_000, "&" * 30_000]))
    cards = page.count("<article")
    assert len(page.encode()) <= 10**6 + 60_000 and cards < 12 and f"Shown are {cards}" in page


# The dry run -----------------------------------------------------------------------------------------------------


def snapshot(folder: Path) -> dict:
    return {path: path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def test_a_dry_run_leaves_a_run_that_lies_there_untouched(make, tmp_path, monkeypatch):
    _, config = make(many(5))
    out = Path(config.output_dir)
    (out / "checkpoints" / "step-000001").mkdir(parents=True)
    (out / "config.json").write_text("{}")
    (out / ".lock").touch()  # at work: a dry run needs no lock
    before = snapshot(tmp_path)
    assert trainer.main(dataclasses.replace(config, dry_run=True, overwrite=True)) == {}
    after = snapshot(tmp_path)
    assert after.pop(out / "dataset.html") and after == before
    trainer.main(dataclasses.replace(config, dry_run=True))  # again, over the former page
    assert snapshot(tmp_path).keys() == after.keys() | {out / "dataset.html"}


def test_where_the_page_cannot_be_written_one_line_says_so(make, tmp_path, capsys, monkeypatch):
    _, config = make(many(5))
    (tmp_path / "file").touch()
    before = snapshot(tmp_path)
    for output in (tmp_path / "file", tmp_path / "file" / "below"):
        assert trainer.main(dataclasses.replace(config, dry_run=True, output_dir=str(output))) == {}
        assert "Dry run: nothing was written, " in capsys.readouterr().out.splitlines()[-1]

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    assert trainer.main(dataclasses.replace(config, dry_run=True, output_dir=str(tmp_path / "a" / "b"))) == {}
    assert "No space left on device" in capsys.readouterr().out.splitlines()[-1]
    assert snapshot(tmp_path) == before


def test_a_folder_that_holds_only_the_page_is_new_and_a_new_run_keeps_it(make, tmp_path):
    dataset, config = make(many(5))
    write_dataset_report(dataset, None, config, 100, tmp_path / "out")
    about = {"constants": dataclasses.asdict(config), "data": "", "processes": 1, "precision": "no"}
    assert check_output_folder(tmp_path / "out", about, set(), False, {}) == "new"
    start_folder(tmp_path / "out", about, 0, "new")
    assert (tmp_path / "out" / "dataset.html").is_file()
    about["constants"]["overwrite"] = True
    start_folder(tmp_path / "out", about, 0, "new")
    assert not (tmp_path / "out" / "dataset.html").exists()


def test_a_picture_that_vanished_since_it_was_read_is_told_on_the_page(make):
    dataset, config = make(many(3))
    dataset.kept.clear()  # as of pictures that are too many to be kept
    dataset.faces[0].path.unlink()
    assert page_of((dataset, config)).count("can't be read any more") == 1
