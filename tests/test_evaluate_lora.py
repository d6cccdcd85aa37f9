"""evaluate_lora.py on the command line: what may be named, whose settings count, one table, what is written.

python -m pytest tests/test_evaluate_lora.py
"""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, randomise, small_config
from PIL import Image
from safetensors.torch import load_file, save_file

import evaluate_lora
from dataset import MangaFaceDataset
from evaluation.compare import short_names
from evaluation.score import POINTS
from lora_layers import inject_lora, save_lora_weights
from training.base_model import load_unet
from training.checkpoint import LORA_FILES
from training.files import InputError, Stop

IN_A_RUN = ["out", "out/last", "out/candidates/epoch-002", "out/share", "out/share/manga_faces.safetensors"]
IN_A_RUN += [f"out/{name}" for name in LORA_FILES] + [f"out/last/{name}" for name in LORA_FILES]


def write_lora(folder: Path, base: Path, seed: int) -> Path:
    """Both files of a LoRA whose weights are random."""
    unet, _ = load_unet(base, torch.device("cpu"), torch.float32)
    torch.manual_seed(seed)
    inject_lora(unet, 4, 8)
    randomise(unet, seed)
    for name in LORA_FILES:
        save_lora_weights(unet, folder / name)
    return folder / LORA_FILES[1]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, shared_faces, tiny_base, script):
    """A folder with faces/ and out/, a finished training as far as evaluate_lora.py reads it."""
    place = tmp_path_factory.mktemp("trained")
    prompts = {"sample_prompts": ("a face", "another face"), "samples_per_prompt": 2, "sample_steps": 1}
    config = small_config(place, place / "faces", tiny_base, guidance_scale=2.0, validation_share=0.4, **prompts)
    shutil.copytree(shared_faces, place / "faces")
    write_lora(place / "out", tiny_base, 1)
    for name in ("last", "candidates/epoch-002", "share"):
        shutil.copytree(place / "out", place / "out" / name, ignore=lambda *_: ["last", "candidates", "share"])
    shutil.copy(place / "out" / LORA_FILES[1], place / "out" / "share" / "manga_faces.safetensors")
    data = MangaFaceDataset.from_config(config, 32).fingerprint
    run = {"constants": dataclasses.asdict(config), "data": data, "base": str(tiny_base)}
    (place / "out" / "config.json").write_text(json.dumps(run))
    (place / "theirs").mkdir()
    shutil.move(write_lora(place / "other", tiny_base, 2), place / "theirs" / "theirs.safetensors")
    return place


@pytest.fixture
def place(trained, tmp_path, monkeypatch):
    """A copy of it that a test may change, in the working folder; what was encoded is kept."""
    shutil.copytree(trained, tmp_path / "place", ignore=lambda folder, _: ["cache"])
    monkeypatch.chdir(tmp_path / "place")
    file = tmp_path / "place" / "out" / "config.json"
    file.write_text(file.read_text().replace(str(trained / "faces"), "faces"))
    return tmp_path / "place"


def test_columns_are_headed_by_what_tells_the_files_apart():
    assert short_names(["base alone", "/far/away/one", "runs/two.pt"]) == ["base alone", "one", "two.pt"]
    alike = ["/far/away/one/last", "runs/two/last"]
    assert short_names(alike) == alike


@pytest.fixture
def asked(monkeypatch):
    """What an Evaluation was asked for: it draws nothing."""
    seen = []

    class Asked:
        def __init__(self, config, dataset, base, device, loras, is_sparing):
            self.config, self.dataset, self.base, self.loras, self.judged = config, dataset, base, loras, []
            seen.append(self)

        def judge(self, file):
            self.judged.append(file)

        def judge_held_out(self):
            return None

        def table(self, score, held_out):
            return "a table"

        def write(self, folder, score):
            self.written = folder
            return "a table"

    monkeypatch.setattr(evaluate_lora, "Evaluation", Asked)
    monkeypatch.setattr(evaluate_lora.compare, "table", lambda evaluation, scored: "a table")
    monkeypatch.setattr(evaluate_lora.compare, "ranking", lambda scored: "a sentence")
    monkeypatch.setattr(evaluate_lora, "write_comparison", lambda *_: "a page")
    return seen


def snapshot(place: Path) -> dict:
    return {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}


def refusal(*words) -> str:
    """The message of evaluate_lora.py, which must be one line and leave everything as it was."""
    before = snapshot(Path.cwd())
    with pytest.raises((InputError, Stop)) as refused:
        evaluate_lora.main([str(word) for word in words])
    message = str(refused.value)
    assert refused.value.exit_code == 2 and len(message.splitlines()) == 1 and len(message) < 600, message
    assert snapshot(Path.cwd()) == before
    return message


# What may be named --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", IN_A_RUN)
def test_a_finished_training_and_all_lora_files_in_it_are_scored_with_its_settings(place, asked, path, capsys):
    evaluate_lora.main(["--lora", path])
    (seen,) = asked
    constants = json.loads((place / "out" / "config.json").read_text())["constants"]
    assert json.loads(json.dumps(dataclasses.asdict(seen.config))) == constants
    (file,) = seen.judged
    assert file.is_file() and len(seen.loras[file]) == 80 and "settings of " in capsys.readouterr().out
    assert getattr(seen, "written", None) == (Path("out") if path == "out" else None)


def test_a_run_s_folder_without_the_safetensors_is_scored_by_the_bin(place, asked):
    (place / "out" / LORA_FILES[1]).unlink()
    evaluate_lora.main(["--lora", "out"])
    assert asked[0].judged == [Path("out", LORA_FILES[0])]


def test_scoring_alone_sets_the_process_as_training_does(place, asked, monkeypatch):
    tuned = []
    monkeypatch.setattr(evaluate_lora, "tune_for", lambda *given: tuned.append(given))
    evaluate_lora.main(["--lora", "out"])
    assert tuned == [(torch.device("cpu"), 1)]


def test_short_of_memory_a_score_is_tried_sparingly_and_at_last_refused_in_one_line(place, asked, monkeypatch, capsys):
    tried, real = [], evaluate_lora.Evaluation

    def short(*given):
        tried.append(given[-1])
        if not given[-1]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(*given)

    monkeypatch.setattr(evaluate_lora, "Evaluation", short)
    evaluate_lora.main(["--lora", "out"])
    assert tried == [False, True] and "Out of memory while scoring, once more" in capsys.readouterr().out
    monkeypatch.setattr(evaluate_lora, "Evaluation", lambda *_: (_ for _ in ()).throw(MemoryError))
    with pytest.raises(Stop, match="out of memory") as refused:
        evaluate_lora.main(["--lora", "out"])
    assert refused.value.exit_code == 3


def test_any_lora_on_any_faces_takes_the_flags_over_the_constants(place, asked, tiny_base, script):
    words = ["--dataset_dir", "faces", "--pretrained_model", str(tiny_base), "--resolution", "64", "--seed", "3"]
    words += ["--sample_prompts", "one", "two", "--cache_dir", "cache"]
    evaluate_lora.main(["--lora", "theirs/theirs.safetensors", *words])
    changes = {"dataset_dir": "faces", "json_file": str(Path("faces", "modified_face_250.json")), "cache_dir": "cache"}
    changes |= {"pretrained_model": str(tiny_base), "resolution": 64, "seed": 3, "sample_prompts": ("one", "two")}
    assert asked[0].config == dataclasses.replace(script.TrainingConfig(), **changes)
    assert asked[0].base == tiny_base and asked[0].dataset.unit == 32


def test_with_a_training_among_several_its_settings_count_for_all_and_flags_go_over_them(place, asked):
    evaluate_lora.main(["--lora", "theirs", "out", "out/last", "--sample_steps", "7"])
    (seen,) = asked
    assert (seen.config.sample_steps, seen.config.guidance_scale) == (7, 2.0)
    assert [str(file) for file in seen.judged] == [
        str(Path("theirs", "theirs.safetensors")),
        str(Path("out", LORA_FILES[1])),
        str(Path("out", "last", LORA_FILES[1])),
    ]


def test_flags_of_a_training_s_own_are_not_undone_by_its_demo_constant(place, asked):
    file = place / "out" / "config.json"
    content = json.loads(file.read_text())
    content["constants"] |= {"demo": True, "guidance_scale": 3.0}  # a demo with other flags
    file.write_text(json.dumps(content))
    evaluate_lora.main(["--lora", "out"])
    assert asked[0].config.guidance_scale == 3.0 and asked[0].config.dataset_dir == "faces"


def test_other_faces_and_another_base_than_the_training_s_may_be_named(place, asked, tiny_base, shared_faces):
    entries = json.loads((place / "faces" / "modified_face_250.json").read_text())
    entries[3]["captions"] = ["another"]
    (place / "faces" / "modified_face_250.json").write_text(json.dumps(entries))
    assert "have changed since the training" in refusal("--lora", "out")
    evaluate_lora.main(["--lora", "out", "--dataset_dir", str(shared_faces)])
    file = place / "out" / "config.json"
    file.write_text(file.read_text().replace(str(tiny_base), "gone"))
    shutil.copytree(tiny_base, place / "base")
    assert "is no folder any more: name it as --pretrained_model" in refusal("--lora", "out")
    evaluate_lora.main(["--lora", "out", "--dataset_dir", "faces", "--pretrained_model", "base"])
    assert asked[1].base == Path("base") and not hasattr(asked[0], "written")  # scores.json is of its own settings


# Scores -------------------------------------------------------------------------------------------------------------


def test_one_table_holds_each_lora_at_the_score_it_has_alone(place, tiny_base, capsys):
    """Ours, another, ours in diffusers' layout under another name, and one that does nothing."""
    tensors, theirs = load_file(place / "out" / LORA_FILES[1]), {}
    unet, _ = load_unet(tiny_base, torch.device("cpu"), torch.float32)
    paths = {"lora_unet_" + path.replace(".", "_"): path for path, _ in unet.named_modules()}
    for key, tensor in tensors.items():
        name, _, end = key.partition(".")
        scale = 2 if end == "lora_up.weight" else 1  # alpha 8 / rank 4
        if end != "alpha":
            theirs[f"unet.{paths[name]}.{end.replace('lora_', 'lora.')}"] = scale * tensor
    save_file(theirs, place / "same.safetensors")
    nothing = {key: 0 * tensor if "lora_up" in key else tensor for key, tensor in tensors.items()}
    save_file(nothing, place / "nothing.safetensors")
    names = ["out", "theirs", "same.safetensors", "nothing.safetensors"]
    evaluate_lora.main(["--lora", *names, "--to", "compared"])
    printed = capsys.readouterr().out
    assert all(part in printed for part in POINTS)
    row = {name: re.search(rf"^{name} +(.*)$", printed, re.M)[1] for name in (*names, "base alone", "held-out faces")}
    assert row["same.safetensors"] == row["out"] != row["theirs"]
    assert row["nothing.safetensors"] == row["base alone"] != row["out"]
    assert "has the highest score" in printed
    scores = json.loads((place / "compared" / "scores.json").read_text())
    assert set(scores) == {"base alone", *names, "pictures"}
    sheet = Image.open(place / "compared" / "before_after.png")
    assert sheet.width > 5 * 170 and not (place / "out" / "scores.json").exists()
    page = (place / "compared" / "comparison.html").read_text(encoding="utf-8")
    assert all(f"<figcaption>{name}</figcaption>" in page for name in ("base alone", *names))

    evaluate_lora.main(["--lora", "out"])
    alone = json.loads((place / "out" / "scores.json").read_text())["lora"]
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("Score: ") and last.endswith("; pictures: out")
    assert alone["score"] == scores["out"]["score"] and f"{alone['score']['value']:.1f} (" in row["out"]


# What is wrong is one line, exit code 2, and nothing is written ------------------------------------------------------


def test_what_can_not_be_scored_is_told_and_nothing_is_written(place, tiny_base):
    own = ["--lora", "theirs"]
    assert "lies in no training's folder: name the faces" in refusal(*own)
    assert "dataset_dir='nowhere' is not a folder" in refusal(*own, "--dataset_dir", "nowhere")
    assert "can't be downloaded" in refusal(*own, "--dataset_dir", "faces", "--pretrained_model", "nobody/nothing")
    faces = ["--dataset_dir", "faces", "--pretrained_model", tiny_base]
    assert "resolution=72 must be a multiple of 32" in refusal(*own, *faces, "--resolution", "72")
    assert "clip_skip=5 must be at most 2" in refusal(*own, *faces, "--resolution", "64", "--clip_skip", "5")
    assert "sample_steps=0 must be" in refusal("--lora", "out", "--sample_steps", "0")
    assert "config.json" not in refusal("--lora", "out", "--sample_steps", "0")
    assert "did you mean --dataset_dir" in refusal(*own, "--dataset_dri", "faces")
    assert "unrecognized arguments: --learning_rate" in refusal(*own, "--learning_rate", "1")  # it would do nothing
    assert "--to out is a file or a training's folder" in refusal(*own, *faces, "--to", "out")
    assert "neither a file nor a folder" in refusal("--lora", "out", "someone/lora")
    assert "is a base model" in refusal("--lora", tiny_base)
    for name in LORA_FILES:
        (place / "out" / name).unlink()
    assert "hasn't exported its LoRA yet" in refusal("--lora", "out")


def test_a_lora_for_another_base_is_refused_before_anything_is_encoded(place):
    (place / "theirs" / "theirs.safetensors").unlink()
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    tensors = {f"{name}.lora_down.weight": torch.ones(4, 2048), f"{name}.lora_up.weight": torch.ones(8, 4)}
    save_file(tensors, place / "theirs" / "theirs.safetensors")
    assert "is for SDXL" in refusal("--lora", "out", "theirs", "--cache_dir", "new", "--to", "new_too")


def test_on_the_command_line_it_is_one_line_and_exit_code_two(place):
    (place / "theirs" / "theirs.safetensors").write_text("a text")
    before = snapshot(place)
    command = [sys.executable, str(ROOT / "evaluate_lora.py"), "--lora", "theirs"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("evaluate_lora.py: ") and "can't be read as a LoRA" in done.stderr
    assert snapshot(place) == before


def test_help_shows_every_setting_and_what_may_be_named(capsys):
    with pytest.raises(SystemExit):
        evaluate_lora.main(["--help"])
    printed = capsys.readouterr().out
    for name in ("lora PATH [PATH ...]", "to FOLDER", *evaluate_lora.SETTINGS, "no-demo"):
        assert f"--{name}" in printed, name
    assert "theirs.safetensors --dataset_dir my_faces" in printed and "--learning_rate" not in printed


def test_pictures_of_any_origin_are_held_against_a_training_s_faces(place, capsys):
    """The run's own pictures, saved, get the score that the run got; without prompts beside them adherence is n/a."""
    evaluate_lora.main(["--lora", "out"])
    capsys.readouterr()
    album = place / "out" / "pictures" / "lora"
    prompts, made = json.loads((album / "prompts.json").read_text())["prompts"], place / "made"
    made.mkdir()
    for number, prompt in enumerate(prompts[:24], start=1):  # the portraits
        Image.open(album / f"{number:02d}.webp").save(made / f"{number:02d}.png")
        (made / f"{number:02d}.txt").write_text(prompt)
    before = sorted(place.rglob("*"))
    evaluate_lora.main(["--lora", "out", "--pictures", "made"])
    said = capsys.readouterr().out
    scores = json.loads((place / "out" / "scores.json").read_text())["lora"]["score"]
    expected = scores["value"]
    words = re.search(r"^Score: (?:worse than the base \()?(-?[\d.]+)", said, re.M)
    assert abs(float(words[1]) - expected) < 0.06, said
    (made / "01.txt").unlink()
    evaluate_lora.main(["--lora", "out", "--pictures", "made"])
    assert "Score: " in capsys.readouterr().out
    assert sorted(place.rglob("*")) == [path for path in before if path != made / "01.txt"]


@pytest.mark.parametrize(
    ("what", "said"), [("none", "is no folder"), ("empty", "holds 0 pictures"), ("bad", "can't be")]
)
def test_pictures_that_can_not_be_read_are_one_line(place, what, said):
    if what != "none":
        (place / what).mkdir()
    if what == "bad":
        (place / what / "a.png").write_text("no picture")
    with pytest.raises(InputError, match=said):
        evaluate_lora.main(["--lora", "out", "--pictures", what])
