"""A user edits the constants at the top of the script, as README.md says: nothing else may break by it."""

import os
import re
import shutil
import subprocess
import sys

from conftest import ROOT

from train_manga_lora import TrainingConfig

SHIPPED = {
    "dataset_dir": "faces_dataset",
    "json_file": "faces_dataset/modified_face_250.json",
    "output_dir": "lora_output",
    "pretrained_model": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "resolution": 512,
    "train_batch_size": 2,
    "gradient_accumulation_steps": 4,
    "num_train_epochs": 30,
    "learning_rate": 5e-5,
    "lora_rank": 16,
    "lora_alpha": 32,
    "mixed_precision": "fp16",
    "weighting": "sampling",
    "caption_dropout": 0.1,
    "penalty_factor": 1e-5,
    "min_weight_decay": 1e-5,
    "max_weight_decay": 1e-4,
    "early_stopping_patience": 5,
    "validation_share": 0.1,
    "seed": 0,
}
EDITS = {
    "dataset_dir": '"my manga"',
    "json_file": '"my manga/captions.json"',
    "output_dir": '"my_lora"',
    "num_train_epochs": "12",
    "learning_rate": "1e-4",
    "lora_rank": "8",
}
FAST = [  # a part of every kind of test that looks at the script's constants
    "tests/test_edited_constants.py::test_the_constants_are_the_ones_shipped",
    "tests/test_readme.py",
    "tests/test_checkpoint.py::test_a_finished_run_says_so_and_more_epochs_go_on",
    "tests/test_train_manga_lora.py::test_weight_decay_is_the_original_log_line_and_acts_exactly",
    "tests/test_train_manga_lora.py::test_warmup_then_cosine_equals_the_library_schedule",
    "tests/test_bad_input.py::test_another_runs_output_folder_is_refused_with_all_that_differs",
    "tests/test_bad_input.py::test_a_constant_edited_to_another_type_is_named",
    "tests/test_bad_input.py::test_without_a_data_set_it_answers_at_once_and_leads_to_the_demo",
    "tests/test_bad_input.py::test_a_dry_run_reports_and_writes_its_page_alone",
]


def test_the_constants_are_the_ones_shipped():
    edited = {name: getattr(TrainingConfig, name) for name in SHIPPED if getattr(TrainingConfig, name) != SHIPPED[name]}
    told = ", ".join(f"{name} is {value!r}, shipped is {SHIPPED[name]!r}" for name, value in edited.items())
    assert not edited, (
        f"the constants differ from the ones shipped ({told}). For your own training that is just right, and no other "
        "test minds. Before you contribute, undo it: git checkout -p train_manga_lora.py"
    )


def test_edited_constants_break_no_other_test(tmp_path):
    copy = tmp_path / "copy"
    skipped = (".git", ".venv", ".cache", ".work", "*_output", "__pycache__", ".ruff_cache", ".pytest_cache")
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*skipped))
    script = copy / "train_manga_lora.py"
    source = script.read_text(encoding="utf-8")
    for name, value in EDITS.items():
        source, count = re.subn(rf"^(    {name}: \w+ = ).*?(  # .*)$", rf"\g<1>{value}\2", source, flags=re.MULTILINE)
        assert count == 1, name
    script.write_text(source, encoding="utf-8")
    command = [sys.executable, "-m", "pytest", *FAST, "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=line"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
    failed = re.findall(r"^FAILED (\S+)", done.stdout, re.MULTILINE)
    assert failed == [FAST[0]], done.stdout[-3000:]
    assert "learning_rate is 0.0001, shipped is 5e-05" in done.stdout
