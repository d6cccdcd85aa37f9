"""Bad input ends with one line that names the thing, its value and the remedy, exit code 2, and nothing written.

In process wherever possible: importing torch and diffusers costs seconds.
"""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from train_manga_lora import TrainingConfig

TOLD = pytest.mark.promise("Bad input is told in one line with its name and value, and changes nothing")
ROOT = Path(__file__).resolve().parent.parent
DEMO_BASE = ROOT / "demo" / "base"


def snapshot(folder: Path) -> dict:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else os.path.islink(path)
        for path in sorted(folder.rglob("*"))
    }


def exit_of(script, config_or_arguments) -> tuple[int, str]:
    """Exit code and message, caught as the script's last block does; anything else it raises is a traceback."""
    try:
        given = config_or_arguments
        config = given if isinstance(given, script.TrainingConfig) else script.parse_arguments(given)
        script.main(config)
    except script.Stop as stop:
        return stop.exit_code, str(stop)
    except (script.InputError, script.CheckpointError) as error:
        return 2, str(error)
    return 0, ""


def check_refused(script, place: Path, config_or_arguments, *words: str) -> None:
    before = snapshot(place)
    code, message = exit_of(script, config_or_arguments)
    assert code == 2, f"exit code {code}: {message}"
    assert len(message.splitlines()) == 1 and len(message) < 600, message
    for word in words:
        assert word in message, message
    assert snapshot(place) == before


def check_captions_refused(script, place: Path, content: bytes, words: list[str]) -> None:
    (place / "faces" / "modified_face_250.json").write_bytes(content)
    check_refused(script, place, flags(place, DEMO_BASE), "modified_face_250.json", *words)


def flags(place: Path, base, *more: str) -> list[str]:
    return [
        "--dataset_dir",
        "faces",
        "--json_file",
        "faces/modified_face_250.json",
        "--output_dir",
        "out",
        "--cache_dir",
        "cache",
        "--pretrained_model",
        str(base),
        "--resolution",
        "128" if base == DEMO_BASE else "64",
        "--num_workers",
        "0",
        "--sample_prompts",
        "--num_train_epochs",
        "1",
        "--learning_rate",
        "5e-5",
        "--lora_rank",
        "16",
        *more,
    ]


# Flags and constants ---------------------------------------------------------------------------------------------


@TOLD
@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--learning_rat", "1e-4"], ["--learning_rat", "did you mean --learning_rate?"]),  # abbreviated
        (["--lora_rnk=4"], ["--lora_rnk", "did you mean --lora_rank?"]),
        (["--num-train-epochs", "3"], ["--num-train-epochs", "did you mean --num_train_epochs?"]),
        (["--xyzzy"], ["--xyzzy", "--help"]),
        (["faces"], ["faces", "--help"]),
        (["--resolution", "512.0"], ["--resolution", "512.0", "int"]),
        (["--num_train_epochs", "many"], ["--num_train_epochs", "many", "int"]),
        (["--learning_rate", "fast"], ["--learning_rate", "fast", "float"]),
        (["--lora_rank"], ["--lora_rank", "expected one argument"]),
        (["--use_xformers=yes"], ["--use_xformers", "yes"]),
    ],
)
def test_a_bad_flag_is_named_with_its_value_and_what_was_meant(script, place, given, words):
    check_refused(script, place, flags(place, DEMO_BASE, *given), *words)


OUT_OF_RANGE = {
    "resolution": ["0", "-64", "4", "100", "513"],
    "train_batch_size": ["0", "-2"],
    "gradient_accumulation_steps": ["0"],
    "num_train_epochs": ["0", "-1"],
    "learning_rate": ["0", "-1e-4", "nan", "inf", "2"],
    "lr_warmup_ratio": ["-0.1", "1", "nan"],
    "lora_rank": ["0", "-16"],
    "lora_alpha": ["0", "-1"],
    "mixed_precision": ["fp32", "FP16", ""],
    "gradient_checkpointing": ["true"],
    "weighting": ["tfidf"],
    "weight_min": ["0", "1.5", "nan", "-inf"],
    "weight_max": ["0.9", "inf", "nan"],
    "caption_dropout": ["-0.1", "1.1", "nan"],
    "penalty_factor": ["-1", "nan", "inf"],
    "min_weight_decay": ["-1e-5", "nan"],
    "max_weight_decay": ["-1", "1e-6", "inf", "1e9"],  # 1e-6 is below min_weight_decay; 1e9 would turn weights over
    "max_grad_norm": ["-1", "nan", "inf"],
    "validation_share": ["-0.1", "0.6", "nan"],
    "early_stopping_patience": ["-1"],
    "samples_per_prompt": ["0"],
    "sample_every_n_epochs": ["-1"],
    "sample_steps": ["0"],
    "guidance_scale": ["0", "nan", "inf"],
    "save_every_n_epochs": ["-1"],
    "keep_checkpoints": ["0"],
    "keep_tags": ["-1"],
    "trigger_word": [" sks", "a\nb"],
    "seed": ["-1", str(2**64)],
    "num_workers": ["-1"],
}


@TOLD
@pytest.mark.parametrize(("name", "value"), [(name, some) for name, values in OUT_OF_RANGE.items() for some in values])
def test_a_constant_out_of_range_is_named_with_its_value(script, place, name, value):
    kind = type(getattr(script.TrainingConfig, name))
    shown = f"{name}={kind(value)!r}"
    check_refused(script, place, flags(place, DEMO_BASE, f"--{name}={value}"), shown, "must be")


@TOLD
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_train_epochs", 30.0),
        ("resolution", "512"),
        ("learning_rate", "5e-5"),
        ("output_dir", None),
        ("sample_prompts", ("a prompt without its comma")),
        ("demo", "yes"),
        ("train_batch_size", True),
    ],
)
def test_a_constant_edited_to_another_type_is_named(script, place, name, value):
    config = dataclasses.replace(script.parse_arguments(flags(place, DEMO_BASE)), **{name: value})
    check_refused(script, place, config, f"{name}={value!r}")


def test_a_whole_number_is_welcome_where_a_fraction_is_asked_for(script, place):
    config = script.parse_arguments(flags(place, DEMO_BASE, "--dry_run"))
    assert script.main(dataclasses.replace(config, learning_rate=1, max_grad_norm=1)) == {}  # a dry run's summary


@TOLD
@pytest.mark.parametrize(("given", "nearest"), [(8, 64), (32, 64), (72, 64), (88, 96), (520, 512)])
def test_a_resolution_that_does_not_divide_gets_the_nearest_that_does(script, place, tiny_base, given, nearest):
    check_refused(
        script,
        place,
        flags(place, tiny_base, f"--resolution={given}"),
        f"resolution={given}",
        "multiple of 32",
        f"try {nearest}",
    )


# Folder and captions ---------------------------------------------------------------------------------------------


@TOLD
def test_a_missing_folder_leads_to_the_demo(script, place):
    shutil.rmtree(place / "faces")
    check_refused(script, place, flags(place, DEMO_BASE), "dataset_dir='faces'", "--demo")


def test_an_empty_folder_or_one_level_too_high_is_told(script, place):
    inner = place / "faces" / "inner"
    inner.mkdir()
    (place / "faces" / "modified_face_250.json").rename(place / "captions.json")
    for path in (place / "faces").glob("*.png"):
        path.rename(inner / path.name)
    given = flags(place, DEMO_BASE, "--json_file", "captions.json")
    check_refused(script, place, given, "6 images lie one level deeper", str(Path("faces/inner")), "captions.json")
    shutil.rmtree(inner)
    check_refused(script, place, given, "dataset_dir='faces'", "holds no", ".png", "--demo")
    (place / "captions.json").unlink()
    check_refused(script, place, given, "json_file='captions.json'", "set json_file")


GOOD = {"image_name": "face0", "captions": ["x"]}
CAPTION_FILES = {  # content, words of the message
    "empty": (b"", ["line 1", "the file is empty"]),
    "blank lines": (b"\n\n", ["the file is empty"]),
    "syntax error": (b'[\n{"image_name": "face0",\n "captions": ["x"}\n]', ["line 3", '"captions": ["x"}']),
    "cut off after a line": (b'[{"image_name": "face0", "captions": ["x"]},\n', ["line 2"]),
    "odd line separators": ('["\u2028",\n"\x85",\n{]'.encode(), ["line 3", "'{]'"]),
    "not JSON": (b"face0: x", ["line 1", "face0: x"]),
    "UTF-16": (json.dumps([GOOD]).encode("utf-16"), ["UTF-8"]),
    "Latin-1": ('[{"image_name": "face0", "captions": ["café"]}]'.encode("latin-1"), ["UTF-8", "byte 42"]),
    "deep nesting": (b"[" * 100_000, ["not readable as JSON", "expected"]),
    "huge number": (b"[" + b"9" * 5000 + b"]", ["not readable as JSON", "expected"]),
    "a dictionary": (json.dumps({"face0": ["x"]}).encode(), ["top level", "dict"]),
    "null": (b"null", ["top level", "NoneType"]),
    "no entries": (b"[]", ["lists no image"]),
    "an entry without name": (json.dumps([GOOD, {"captions": ["x"]}]).encode(), ["entry 2", "no image_name"]),
    "an entry that is a text": (b'["face0"]', ["entry 1", "face0"]),
    "a name that is a number": (b'[{"image_name": 1, "captions": ["x"]}]', ["entry 1", "image_name"]),
    "a blank name": (b'[{"image_name": " ", "captions": ["x"]}]', ["entry 1", "image_name"]),
    "captions missing": (b'[{"image_name": "face0"}]', ["entry 1", "'face0'", "list of texts"]),
    "a caption of null": (b'[{"image_name": "face0", "captions": ["x", null]}]', ["entry 1", "list of texts"]),
    "half a character": (b'[{"image_name": "face0", "captions": ["\\ud83d"]}]', ["entry 1", "'face0'", "surrogate"]),
    "blank captions alone": (b'[{"image_name": "face0", "captions": [" "]}]', ["no usable face", "face0: no captions"]),
    "none of the files": (b'[{"image_name": "face9", "captions": ["x"]}]', ["no usable face", "face9: no image file"]),
}


@TOLD
@pytest.mark.parametrize("case", CAPTION_FILES)
def test_a_bad_caption_file_is_told_with_its_place_and_the_shape_expected(script, place, case):
    check_captions_refused(script, place, *CAPTION_FILES[case])


@TOLD
def test_two_files_of_one_name_are_both_named(script, place):
    shutil.copy(place / "faces" / "face0.png", place / "faces" / "face0.JPG")
    check_refused(script, place, flags(place, DEMO_BASE), "'face0'", "face0.png", "face0.JPG", "suffix")


@TOLD
def test_faces_of_which_none_can_be_read_are_counted_with_the_first_reason(script, place):
    for path in (place / "faces").glob("*.png"):
        path.write_text("not a picture")
    check_refused(script, place, flags(place, DEMO_BASE), "no usable face", "6 skipped", "face0.png: cannot identify")


# Base and output folder ------------------------------------------------------------------------------------------


@TOLD
def test_a_base_that_is_nowhere_is_named(script, place):
    check_refused(script, place, flags(place, "no/such_base"), "pretrained_model='no/such_base'", "--demo")


@TOLD
@pytest.mark.parametrize(
    "lost",
    [
        "unet",
        "vae",
        "text_encoder",
        "tokenizer",
        "scheduler",
        "vae/config.json",
        "unet/config.json",
    ],
)
def test_a_base_without_a_part_is_named_with_the_part(script, place, tiny_base, lost):
    shutil.copytree(tiny_base, place / "base")
    path = place / "base" / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    check_refused(script, place, flags(place, "base"), "pretrained_model='base'", str(Path(lost)))


@TOLD
@pytest.mark.parametrize("file", ["vae/config.json", "vae/diffusion_pytorch_model.safetensors"])
def test_a_base_with_a_torn_file_is_named(script, place, tiny_base, file):
    shutil.copytree(tiny_base, place / "base")
    os.truncate(place / "base" / file, (place / "base" / file).stat().st_size // 2)
    check_refused(script, place, flags(place, "base"), "base", "vae")


@TOLD
def test_foreign_files_in_the_output_folder_stay_even_under_overwrite(script, place, tiny_base):
    (place / "out").mkdir()
    (place / "out" / "thesis.txt").write_text("irreplaceable")
    for more in ([], ["--overwrite"]):
        check_refused(script, place, flags(place, tiny_base, *more), "output_dir='out'", "another output_dir")
    (place / "out" / "config.json").write_text('{"model_type": "clip"}')  # of another program
    check_refused(script, place, flags(place, tiny_base, "--overwrite"), "output_dir='out'", "another output_dir")


@TOLD
def test_an_output_folder_that_is_a_file_is_told(script, place, tiny_base):
    (place / "out").write_text("a file")
    for more in ([], ["--overwrite"]):
        check_refused(script, place, flags(place, tiny_base, *more), "output_dir='out'", "is a file")


@TOLD
def test_another_runs_output_folder_is_refused_with_all_that_differs(script, place, tiny_base):
    from training.folder import start_folder

    config = script.parse_arguments(flags(place, tiny_base))
    faces = script.MangaFaceDataset("faces", "faces/modified_face_250.json", 64)
    run = {"constants": dataclasses.asdict(config), "data": faces.fingerprint, "faces": faces.hashes}
    run |= {"processes": 1, "precision": "no", "start": None}
    start_folder(place / "out", run, 0, "new")
    (place / "out" / "checkpoints" / "step-000001").mkdir(parents=True)  # something to lose
    (place / "faces" / "face3.png").unlink()
    shutil.copy(place / "faces" / "face1.png", place / "faces" / "face2.png")
    given = flags(place, tiny_base, "--lora_rank", "8", "--learning_rate", "1e-3", "--num_workers", "1")
    before = snapshot(place)
    code, message = exit_of(script, given)
    assert code == 2 and len(message.splitlines()) == 1
    for words in (
        "output_dir='out'",
        "lora_rank was 16, is 8",
        "learning_rate was 5e-05, is 0.001",
        "faces gone: 1 (face3), changed: 1 (face2)",
        f"--start_from {Path('out', 'last', 'pytorch_lora_weights.safetensors')} in another output_dir",
        "--overwrite",
    ):
        assert words in message
    assert "num_workers" not in message and "lora_alpha" not in message
    assert snapshot(place) == before


# What only the command line shows --------------------------------------------------------------------------------


def run(folder: Path, *arguments: str, python: tuple[str, ...] = ()) -> tuple[int, str, str, float]:
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, *python, str(ROOT / "train_manga_lora.py"), *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr, time.monotonic() - started


def test_without_a_data_set_it_answers_at_once_and_leads_to_the_demo(tmp_path):
    code, out, err, seconds = run(tmp_path, python=("-X", "importtime"))
    imports, message = err.strip().splitlines()[:-1], err.strip().splitlines()[-1]
    assert code == 2 and not out
    assert message.startswith(f"train_manga_lora.py: dataset_dir={TrainingConfig.dataset_dir!r}")
    assert "--demo" in message
    assert all(line.startswith("import time:") for line in imports)
    heavy = {"torch", "numpy", "diffusers", "transformers", "accelerate", "sklearn", "PIL"}
    assert not heavy & {line.split("|")[-1].strip() for line in imports}
    assert seconds < 9  # 3 s on an idle machine
    assert not list(tmp_path.iterdir())


@TOLD
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--num_train_epoch", "3"], ["--num_train_epoch", "did you mean --num_train_epochs?"]),
        (["--resolution", "big"], ["--resolution", "'big'"]),
        (  # found by dataset.py
            ["--json_file", "faces/broken.json", "--pretrained_model", str(DEMO_BASE), "--resolution", "128"],
            ["broken.json, line 2", "Expecting"],
        ),
    ],
)
def test_on_the_command_line_bad_input_is_one_line_and_exit_code_two(place, arguments, words):
    (place / "faces" / "broken.json").write_text("[\n{,}]")
    before = snapshot(place)
    code, out, err, _ = run(place, "--dataset_dir", "faces", "--output_dir", "out", *arguments)
    assert code == 2
    assert len(err.strip().splitlines()) == 1 and err.startswith("train_manga_lora.py: ")
    for word in words:
        assert word in err
    assert "Traceback" not in out + err
    assert snapshot(place) == before


def test_help_lists_every_constant_with_its_comment_and_default(script, tmp_path):
    code, out, err, _ = run(tmp_path, "--help")
    assert code == 0 and not err
    words = " ".join(out.split())
    for field in dataclasses.fields(script.TrainingConfig):
        assert f"--{field.name} " in words or f"--{field.name}," in words, field.name
        if not isinstance(field.default, tuple):
            assert f"[{field.default}]".replace(" ", "") in "".join(out.split()), field.name  # it wraps at hyphens
    assert len(dataclasses.fields(script.TrainingConfig)) <= 47


def test_a_dry_run_reports_and_writes_its_page_alone(script, place, tiny_base, capsys):
    before = snapshot(place)
    assert exit_of(script, flags(place, tiny_base, "--dry_run"))[0] == 0
    shown = capsys.readouterr().out
    for words in (
        "6 usable",
        "Texts over 77 tokens: 0",
        "Effective batch: 2 x 4 x 1 = 8",
        "only out/dataset.html was written",
    ):
        assert words in shown
    after = snapshot(place)
    assert after.pop("out/dataset.html") and after.pop("out") is False and after == before


def test_another_package_called_training_is_not_taken_for_ours(tmp_path):
    """The folders beside the script are regular packages, and the script's folder comes first."""
    for name in ("training", "evaluation"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise ImportError('the other one')")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, str(ROOT / "train_manga_lora.py"), "--help"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
