"""Captions as other programs leave them: every layout gives the same faces, and what is odd is told in one line."""

import csv
import dataclasses
import json
import os
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from conftest import exported, run, small_config
from PIL import Image

import train_manga_lora as trainer
from dataset import MangaFaceDataset
from training import arguments
from training.files import InputError, Stop
from training.layouts import find_near, read_layout

ROOT = Path(__file__).resolve().parent.parent
CAPTIONS = {f"face{number}": [f"A girl, number {number}.", "She smiles."] for number in range(3)}


def draw(folder: Path, names, suffix: str = ".png") -> None:
    """Pictures of these names, no two alike."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        pixels = np.random.default_rng(len(list(folder.rglob("*")))).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}{suffix}")


def write(file: Path, content) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
    file.write_text(text, encoding="utf-8")


def entries(captions=CAPTIONS) -> list[dict]:
    return [{"image_name": name, "captions": texts} for name, texts in captions.items()]


def sidecars(folder: Path, captions=CAPTIONS, suffix: str = ".txt") -> None:
    for name, texts in captions.items():
        write(folder / f"{name}{suffix}", "\n".join(texts) + "\n")


def rows(captions=CAPTIONS) -> list[dict]:
    return [{"file_name": f"{name}.png", "text": text} for name, texts in captions.items() for text in texts]


def read(folder: Path, json_file: str = "modified_face_250.json") -> MangaFaceDataset:
    return MangaFaceDataset(folder, folder / json_file, 8, validation_share=0, num_workers=0)


def refusal(folder: Path, json_file: str = "modified_face_250.json") -> str:
    """The one line with which the folder is refused; nothing may have changed."""
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(InputError) as caught:
        read(folder, json_file)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    message = str(caught.value)
    assert len(message.splitlines()) == 1 and len(message) < 600 and message.isprintable(), message
    return message


LAYOUTS = {  # name: (write it, first words of the report's line)
    "original": (lambda folder: write(folder / "modified_face_250.json", entries()), "captions of modified_face_250"),
    "another name": (lambda folder: write(folder / "my words.json", entries()), "captions of my words.json"),
    "txt": (sidecars, "sidecars (3 .txt)"),
    "caption": (lambda folder: sidecars(folder, suffix=".CAPTION"), "sidecars (3 .caption)"),
    "jsonl": (
        lambda folder: write(folder / "metadata.jsonl", "\n".join(map(json.dumps, rows())) + "\n\n"),
        "metadata.jsonl (file_name, text)",
    ),
    "csv": (
        lambda folder: write(
            folder / "metadata.csv",
            "\r\n".join(["text,file_name", *(f'"{row["text"]}",{row["file_name"]}' for row in rows())]),
        ),
        "metadata.csv (file_name, text)",
    ),
    "meta_cap": (
        lambda folder: write(
            folder / "meta_cap.json",
            {f"/home/me/{name}.png": {"caption": texts[0], "tags": texts[1]} for name, texts in CAPTIONS.items()},
        ),
        "captions of meta_cap.json",
    ),
    "meta_cap of Windows": (
        lambda folder: write(
            folder / "meta_cap.json",
            {f"D:\\me\\{name}": {"caption": texts, "train_resolution": [8, 8]} for name, texts in CAPTIONS.items()},
        ),
        "captions of meta_cap.json",
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_gives_the_same_faces_and_is_said(tmp_path, name):
    make, title = LAYOUTS[name]
    draw(tmp_path, CAPTIONS)
    make(tmp_path)
    faces = read(tmp_path)
    assert {face.path.stem: list(face.captions) for face in faces.faces} == CAPTIONS
    assert not faces.skipped and all(face.repeats == 1 for face in faces.faces)
    lines = [line for line in faces.report().splitlines() if line.startswith("Layout: ")]
    assert len(lines) == 1 and lines[0].startswith(f"Layout: {title}")


def test_kohya_folders_give_repeats_and_captions_by_their_name(tmp_path):
    for folder in ("10_sks girl", "2_boy", "notes", "3_empty"):
        draw(tmp_path / folder, ["a", "b"] if folder[0] in "12" else [])
    sidecars(tmp_path / "10_sks girl", {"a": ["1girl, solo, hat"]})
    faces = read(tmp_path)
    found = {face.path.relative_to(tmp_path).as_posix(): (face.captions, face.repeats) for face in faces.faces}
    assert found == {
        "10_sks girl/a.png": (("1girl, solo, hat",), 10),
        "10_sks girl/b.png": (("sks girl",), 10),
        "2_boy/a.png": (("boy",), 2),
        "2_boy/b.png": (("boy",), 2),
    }
    assert "10_sks girl (2 pictures, 1 of them captioned by the folder's name), 2_boy (2" in faces.report()


def test_kohya_folders_by_whose_names_pictures_are_captioned_leave_the_kind_to_the_others(tmp_path):
    draw(tmp_path / "10_my hero", [f"hero{number}" for number in range(6)])
    draw(tmp_path / "1_tagged", ["a", "b"])
    assert read(tmp_path).kind == "sentences"
    sidecars(tmp_path / "1_tagged", {name: ["1girl, long_hair, smile"] for name in "ab"})
    faces = read(tmp_path)
    assert faces.kind == "tags"
    assert {face.captions for face in faces.faces} == {("my hero",), ("1girl, long hair, smile",)}


def test_pictures_of_an_unread_format_are_named_in_kohya_s_folders_too(tmp_path):
    write(tmp_path / "10_girl" / "photo.heic", "x")
    with pytest.raises(InputError, match=r"1 \(10_girl/photo.heic\) of its pictures are in a format that isn't read"):
        read(tmp_path)
    draw(tmp_path / "10_girl", ["a"])
    assert "Pictures in a format that isn't read: 1 (10_girl/photo.heic)" in read(tmp_path).report()


def test_a_link_that_looks_like_a_kohya_folder_is_not_looked_into(tmp_path):
    write(tmp_path / "elsewhere" / "private.heic", "x")
    folder = tmp_path / "faces"
    draw(folder, ["a"])
    write(folder / "a.json", [{"image_name": "a", "captions": "A girl."}])
    (folder / "10_link").symlink_to(tmp_path / "elsewhere")
    assert "private" not in read(folder).report()


@pytest.mark.parametrize("folder", [".", "10_girl"])
def test_two_sidecars_of_one_picture_are_joined_and_said(tmp_path, folder):
    draw(tmp_path / folder, ["a", "b"])
    sidecars(tmp_path / folder, {"a": ["A girl."], "b": ["A boy."]})
    sidecars(tmp_path / folder, {"a": ["1girl, solo, hat"]}, ".caption")
    faces = read(tmp_path)
    assert set(faces.faces[0].captions) == {"A girl.", "1girl, solo, hat"}
    assert "Two sidecars of one picture, whose captions are joined: 1 (a.txt)" in faces.report()


def test_a_message_has_no_character_that_a_terminal_would_obey(tmp_path, capsys):
    with pytest.raises(SystemExit):
        trainer.exit_with(2, InputError(f"{tmp_path}/\x1b[2J\n\ud800.json: fix it"))
    assert capsys.readouterr().err.endswith("/\\x1b[2J\\n\\ud800.json: fix it\n")


def test_captions_that_are_one_text_are_one_caption(tmp_path):
    draw(tmp_path, ["a"])
    write(tmp_path / "a.json", [{"image_name": "a", "captions": "A girl, smiling.\nCalm."}])
    assert read(tmp_path).faces[0].captions == ("A girl, smiling.\nCalm.",)


def test_names_in_another_normal_form_match_but_two_files_stay_an_error(tmp_path):
    names = [unicodedata.normalize(form, "が_é") for form in ("NFC", "NFD")]
    assert names[0] != names[1]
    for ours, theirs in (names, names[::-1]):
        folder = tmp_path / str(len(ours))
        draw(folder, [theirs])
        write(folder / "a.json", [{"image_name": ours, "captions": ["x"]}])
        sidecars(folder, {ours: ["x"]})
        assert read(folder).faces[0].path.stem == theirs
        (folder / "a.json").unlink()
        assert len(read(folder).faces) == 1
        draw(folder, [ours])
        write(folder / "a.json", [{"image_name": unicodedata.normalize("NFKC", "か\u3099") + "_é", "captions": ["x"]}])
        assert [face.path.stem for face in read(folder).faces] == [names[0]]  # an exact match wins
        write(folder / "a.json", [{"image_name": "か\u3099_\u00e9", "captions": ["x"]}])  # half of each form
        assert "matches" in refusal(folder)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("Revenge! - panel1", "Revenge - panel1.png"),
        ("FACE_01", "face 01.png"),
        ("portrait1", "portrai1.jpg"),
        ("face1.jpg", "Face1.png"),
        ("image001", None),
        ("face", None),
        ("!", None),
    ],
)
def test_names_are_paired_with_the_file_they_most_likely_mean(name, file):
    others = ["image002.png", "Revenge - panel2.png", "ok.png", *([file] if file else [])]
    assert find_near(name, others) == file


def test_a_name_that_nearly_matches_an_unlisted_file_is_paired_in_the_report(tmp_path):
    draw(tmp_path, ["one", "Revenge - panel1", "Revenge - panel2"])
    names = ["one", "Revenge - panel1", "Revenge! - panel2", "Revenge! - panel1", "two"]
    write(tmp_path / "a.json", [{"image_name": name, "captions": ["x"]} for name in names])
    assert read(tmp_path).skipped == [
        "Revenge! - panel2: no image file of that name; did you mean Revenge - panel2.png?",
        "Revenge! - panel1: no image file of that name",
        "two: no image file of that name",
    ]


def test_pictures_of_an_unread_format_are_named_as_such(tmp_path):
    draw(tmp_path, ["a"])
    (tmp_path / "b.heic").write_bytes(b"x")
    (tmp_path / "c.PSD").write_bytes(b"x")
    write(tmp_path / "a.json", [{"image_name": name, "captions": ["x"]} for name in ("a", "b")])
    faces = read(tmp_path)
    assert faces.skipped == ["b: b.heic is in a format that isn't read: save it as PNG"]
    assert "Pictures in a format that isn't read: 2 (b.heic, c.PSD)" in faces.report()
    (tmp_path / "a.png").unlink()
    assert "but 2 (b.heic, c.PSD)" in refusal(tmp_path)
    (tmp_path / "a.json").unlink()
    sidecars(tmp_path, {"b": ["x"]})
    assert "b.heic" in refusal(tmp_path) and "format that isn't read" in refusal(tmp_path)


# Several layouts -----------------------------------------------------------------------------------------------------


def test_of_two_layouts_the_first_is_taken_and_the_other_is_named(tmp_path):
    draw(tmp_path, CAPTIONS)
    draw(tmp_path / "3_boy", ["a"])
    write(tmp_path / "words.json", entries())
    sidecars(tmp_path, {"face0": ["she  SMILES."], "face1": ["a girl, number 1. she smiles."]})  # the same, in part
    report = read(tmp_path).report()
    assert "Layout: captions of words.json" in report
    assert "Also there, and not used: sidecars (2 .txt)" in report and "not used: folders with repeats: 3_boy" in report
    (tmp_path / "words.json").unlink()
    faces = read(tmp_path)
    assert len(faces.faces) == 2 and "Layout: sidecars" in faces.report()
    assert "Without a sidecar: 1 (face2.png)" in faces.report()


def test_two_layouts_that_contradict_each_other_are_refused_with_both_words(tmp_path):
    draw(tmp_path, CAPTIONS)
    write(tmp_path / "words.json", entries())
    sidecars(tmp_path, CAPTIONS | {"face1": ["A man with a beard."]})
    message = refusal(tmp_path)
    for words in ("contradict", "face1.png", "A girl, number 1.", "A man with a beard.", "words.json", "move one"):
        assert words in message
    (tmp_path / "face1.txt").write_text("")  # says nothing: no contradiction
    assert len(read(tmp_path).faces) == 3


def test_a_stray_file_is_no_layout_and_stands_in_no_other_s_way(tmp_path):
    draw(tmp_path, CAPTIONS)
    sidecars(tmp_path)
    write(tmp_path / "README.txt", "about these faces")
    for content in ({"dataset": {"name": "x"}}, [], {"a": 1}, "no JSON", [1]):
        write(tmp_path / "info.json", content)
        assert {face.path.stem: list(face.captions) for face in read(tmp_path).faces} == CAPTIONS
    assert "Also there, and not used: " in read(tmp_path).report() and "info.json" in read(tmp_path).report()
    assert "Sidecars without a picture: 1 (README.txt)" in read(tmp_path).report()
    write(tmp_path / "other.json", {})
    assert len(read(tmp_path).faces) == 3  # two JSON files: neither is meant
    write(tmp_path / "modified_face_250.json", entries())
    write(tmp_path / "metadata.csv", "title\nx")
    report = read(tmp_path).report()
    assert (
        "Layout: captions of modified_face_250.json" in report
        and "metadata.csv, line 2: no column 'file_name'" in report
    )


# Bad input -----------------------------------------------------------------------------------------------------------


def test_sidecars_and_pictures_that_lack_each_other_are_named_or_all_refused(tmp_path):
    draw(tmp_path, ["face0", "face1", "late - night 7"])
    sidecars(tmp_path, {"face0": ["x"], "late night! 7": ["x"], **{f"lone{n}": ["x"] for n in range(7)}})
    report = read(tmp_path).report()
    assert "Sidecars without a picture: 8 (late night! 7.txt, lone0.txt, lone1.txt, lone2.txt, lone3.txt ...)" in report
    assert "late night! 7.txt - did you mean late - night 7.png?" in report
    assert "Without a sidecar: 2 (face1.png, late - night 7.png)" in report
    (tmp_path / "face0.txt").unlink()
    message = refusal(tmp_path)
    assert "holds no picture for any of its sidecars, 8 (late night! 7.txt," in message
    assert "did you mean late - night 7.png?" in message
    for file in tmp_path.glob("*.txt"):
        file.unlink()
    assert "holds no image.txt" in refusal(tmp_path) and "set json_file" in refusal(tmp_path)


def test_empty_sidecars_are_counted_and_all_of_them_refused(tmp_path):
    draw(tmp_path, CAPTIONS)
    sidecars(tmp_path, CAPTIONS | {"face1": [" ", ""]})
    faces = read(tmp_path)
    assert len(faces.faces) == 2 and "Empty sidecars: 1 (face1.png)" in faces.report()
    assert faces.skipped == ["face1.png: no captions"]
    sidecars(tmp_path, {name: ["\ufeff"] for name in CAPTIONS})
    assert "3 skipped, first reason: face0.png: no captions" in refusal(tmp_path)


BAD = {  # file, content, words
    "jsonl without text": ("metadata.jsonl", '{"file_name": "face0.png", "hint": "x"}', ["line 1", "'text'", "hint"]),
    "jsonl without name": ("metadata.jsonl", '{"text": "x"}', ["line 1", "'file_name'"]),
    "jsonl with a number": ("metadata.jsonl", '\n{"file_name": "face0.png", "text": 1}', ["line 2", "'text'"]),
    "jsonl that is a list": ("metadata.jsonl", "[]", ["line 1", "expected"]),
    "jsonl cut off": ("metadata.jsonl", '{"file_name": "fa', ["line 1", "expected"]),
    "csv without text": ("metadata.csv", "file_name,caption\nface0.png,x", ["metadata.csv", "'text'", "caption"]),
    "csv without name": ("metadata.csv", "text\nx", ["'file_name'"]),
    "csv with a short row": ("metadata.csv", "file_name,text\nface0.png,x\nface1.png", ["line 3", "'text'"]),
    "csv of nothing": ("metadata.csv", "file_name,text\n", ["holds no image.txt", "set json_file"]),
    "a name that leads out": ("metadata.csv", "file_name,text\n../face0.png,x", ["leads out"]),
    "meta_cap of numbers": ("a.json", {"face0": {"caption": 1}}, ["'face0'", "texts"]),
    "meta_cap with one name twice": (
        "a.json",
        {"/a/face0.png": {"caption": "x"}, "/b/face0.png": {"caption": "y"}},
        ["/b/face0.png", "/a/face0.png", "both face0.png"],
    ),
    "two JSON files": ("a.json", [], ["more than one", "a.json", "b.json", "set json_file"]),
    "half a character": ("metadata.jsonl", '{"file_name": "face0.png", "text": "\\ud83d"}', ["line 1", "surrogate"]),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_metadata_file_is_told_with_its_place(tmp_path, case):
    name, content, words = BAD[case]
    draw(tmp_path, CAPTIONS)
    write(tmp_path / name, content)
    if case == "two JSON files":
        write(tmp_path / "b.json", [])
    message = refusal(tmp_path)
    assert all(word in message for word in words), message


@pytest.mark.parametrize("repeats", ["0", "00", "1001", "10000", "9" * 30])
def test_repeats_that_are_none_or_absurd_are_refused(tmp_path, repeats):
    draw(tmp_path / f"{repeats}_girl", ["a"])
    draw(tmp_path / "1_boy", ["a"])
    message = refusal(tmp_path)
    assert f"{repeats}_girl" in message and "1 to 1000" in message and "rename" in message
    write(tmp_path / "a.json", [{"image_name": f"{repeats}_girl/a", "captions": ["x"]}])
    assert len(read(tmp_path).faces) == 1  # here it is only a folder


@pytest.mark.parametrize("encoding", ["shift_jis", "utf-16", "latin-1"])
@pytest.mark.parametrize("file", ["face0.txt", "metadata.csv", "metadata.jsonl", "a.json"])
def test_what_is_not_utf_8_is_told_with_file_and_byte(tmp_path, file, encoding):
    draw(tmp_path, CAPTIONS)
    text = "é" if encoding == "latin-1" else "少女"
    (tmp_path / file).write_bytes(f"file_name,text\n{text}".encode(encoding))
    message = refusal(tmp_path)
    assert file in message and "is not UTF-8: save the file as UTF-8" in message and "byte" in message
    (tmp_path / "face0.txt").write_text("少女", encoding="utf-8-sig")
    if file == "face0.txt":
        assert read(tmp_path).faces[0].captions == ("少女",)


def test_links_out_of_the_folder_are_not_followed(tmp_path, monkeypatch):
    secret, listed, listdir = tmp_path / "secret", [], os.listdir
    monkeypatch.setattr(os, "listdir", lambda folder: listed.append(os.path.realpath(folder)) or listdir(folder))
    draw(secret, ["face0"])
    write(secret / "secret.txt", "secret words")
    for link, target in (
        ("face0.txt", "secret.txt"),
        ("metadata.csv", "secret.txt"),
        ("a.json", "secret.txt"),
        ("5_girl", ""),
    ):
        folder = tmp_path / link
        draw(folder, [] if link == "5_girl" else CAPTIONS)
        (folder / link).symlink_to(secret / target)
        message = refusal(folder)
        assert "link out of" in message and "secret words" not in message
        assert str(folder) in listed and str(secret) not in listed
    (tmp_path / "fifo").mkdir()
    draw(tmp_path / "fifo", CAPTIONS)
    sidecars(tmp_path / "fifo", {"face1": ["x"]})
    os.mkfifo(tmp_path / "fifo" / "face0.txt")  # opened, it would wait for ever
    assert len(read(tmp_path / "fifo").faces) == 1


# Before anything is loaded -------------------------------------------------------------------------------------------


def test_dataset_dir_edited_in_the_script_moves_json_file_along_as_the_flag_does(script):
    def json_file(words: list[str], **edited) -> str:
        fields = [(name, str, dataclasses.field(default=value)) for name, value in edited.items()]
        kind = dataclasses.make_dataclass("Edited", fields, bases=(script.TrainingConfig,), frozen=True)
        given = vars(arguments.flag_parser(kind, script.__file__).parse_args(words))
        return arguments.with_flags(kind(), given, script.DEMO).json_file

    name = "modified_face_250.json"
    assert json_file([], dataset_dir="mine") == str(Path("mine", name))
    assert json_file(["--dataset_dir", "flag"], dataset_dir="mine") == str(Path("flag", name))
    assert json_file([], dataset_dir="mine", json_file="words.json") == "words.json"
    assert json_file(["--json_file", "words.json"], dataset_dir="mine") == "words.json"
    assert json_file(["--demo"], dataset_dir="mine") == script.DEMO["json_file"]


def test_a_missing_json_file_is_refused_only_where_nothing_else_has_captions(script, tmp_path):
    def config(**more):
        more = {"dataset_dir": str(tmp_path), "json_file": str(tmp_path / "gone.json")} | more
        return script.TrainingConfig(**more)

    draw(tmp_path, ["a"])
    with pytest.raises(Stop, match=r"gone\.json' is not a file.*set json_file"):
        arguments.check_config(config())
    shipped = str(tmp_path / "modified_face_250.json")
    for name in ("a.txt", "metadata.csv", "b.json", "10_girl"):
        (tmp_path / name).mkdir() if name == "10_girl" else write(tmp_path / name, "")
        arguments.check_config(config(json_file=shipped))
        with pytest.raises(
            Stop, match=r"gone\.json' is not a file: set json_file to your captions, or to .*250\.json'"
        ):
            arguments.check_config(config())  # named by the user: nothing else will do
        shutil.rmtree(tmp_path / name) if name == "10_girl" else (tmp_path / name).unlink()
    write(tmp_path / "gone.json", "[]")
    arguments.check_config(config(json_file="elsewhere/gone.json"))  # of its name in the folder
    for bad in ({"keep_tags": -1}, {"trigger_word": "a\nb"}, {"trigger_word": " a"}, {"shuffle_tags": 1}):
        with pytest.raises(Stop, match=next(iter(bad))):
            arguments.check_config(config(**bad))


def test_reading_ten_thousand_sidecars_takes_no_quadratic_time(tmp_path):
    """Without pictures: names and texts alone, most of them without a partner."""
    for number in range(3000):
        (tmp_path / f"picture{number}.png").touch()
        write(tmp_path / f"{'picture' if number < 10 else 'caption'}{number}.txt", "x")
    layout = read_layout(tmp_path, tmp_path / "none.json")
    assert len(layout.entries) == 10 and "Sidecars without a picture: 2990" in layout.notes[0]


# From a layout to a LoRA -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def from_json(tmp_path_factory, shared_faces, tiny_base) -> bytes:
    config = small_config(tmp_path_factory.mktemp("json"), shared_faces, tiny_base, num_train_epochs=1)
    run(config)
    return exported(config)


TRAINED = ["sidecars", "metadata.jsonl", "kohya's folder", pytest.param("metadata.csv", marks=pytest.mark.long)]


@pytest.mark.parametrize("layout", TRAINED)
def test_the_same_faces_and_captions_in_any_layout_train_to_the_same_bytes(
    tmp_path, shared_faces, tiny_base, from_json, layout
):
    entries = json.loads((shared_faces / "modified_face_250.json").read_text(encoding="utf-8"))
    folder = tmp_path / "faces"
    place = folder / "1_manga" if layout == "kohya's folder" else folder
    place.mkdir(parents=True)
    rows = []
    for entry in entries:
        name = f"{entry['image_name']}.png"
        shutil.copy(shared_faces / name, place)
        rows += [(name, caption) for caption in entry["captions"]]
        if layout in ("sidecars", "kohya's folder"):
            (place / name).with_suffix(".txt").write_text("\n".join(entry["captions"]) + "\n", encoding="utf-8")
    if layout == "metadata.jsonl":
        lines = [json.dumps({"file_name": name, "text": text}) for name, text in rows]
        (folder / layout).write_text("\n".join(lines), encoding="utf-8")
    elif layout == "metadata.csv":
        with open(folder / layout, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("file_name", "text"), *rows])
    config = small_config(tmp_path, folder, tiny_base, num_train_epochs=1)
    run(config)
    assert exported(config) == from_json
