"""The benchmark of training speed: real rows in real processes take turns, and its figures follow from their times."""

import importlib.util
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DIFFUSERS_SCRIPT = """
import argparse, json, pathlib, sys, time
from tqdm.auto import tqdm

parser = argparse.ArgumentParser()
for name in ("pretrained_model_name_or_path", "train_data_dir", "output_dir", "cache_dir", "mixed_precision"):
    parser.add_argument(f"--{name}", type=pathlib.Path, required=True)
for name in ("resolution", "train_batch_size", "gradient_accumulation_steps", "max_train_steps", "rank", "seed"):
    parser.add_argument(f"--{name}", type=int, required=True)
parser.add_argument("--learning_rate", type=float)
parser.add_argument("--gradient_checkpointing", action="store_true")
args = parser.parse_args()
assert (args.pretrained_model_name_or_path / "unet" / "config.json").is_file() and args.gradient_checkpointing
lines = [json.loads(line) for line in (args.train_data_dir / "metadata.jsonl").read_text().splitlines()]
assert len(lines) == 250 and all(line["text"] and (args.train_data_dir / line["file_name"]).is_file() for line in lines)

print("11/24/2026 10:00:00 - INFO - __main__ - ***** Running training *****", file=sys.stderr)
for _ in tqdm(range(250), desc="Generating train split", unit=" examples"):
    pass
moments, bar = [], tqdm(range(0, args.max_train_steps), initial=0, desc="Steps", disable=False)
for step in range(args.max_train_steps):
    for micro_batch in range(args.gradient_accumulation_steps):
        time.sleep(SECONDS[step] / args.gradient_accumulation_steps)
        if micro_batch == args.gradient_accumulation_steps - 1:
            bar.update(1)
            moments.append(time.time())
        bar.set_postfix(step_loss=0.1, lr=args.learning_rate)
    if step == FAILS_AFTER:
        raise ValueError("too much")
pathlib.Path(__file__).with_name("moments.json").write_text(json.dumps(moments))
"""
sys.path.insert(0, str(ROOT / "bench"))

import bench_training  # noqa: E402


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> tuple[dict, str]:
    """The result file and the screen of a run with this trainer, a rival, and a row that can't be built."""
    out = tmp_path_factory.mktemp("bench") / "result.json"
    words = ["--model", "demo", "--device", "cpu", "--rows", "a,c:b3,c:b8", "--steps", "2", "--warmup", "1"]
    run = subprocess.run(
        [sys.executable, ROOT / "bench" / "bench_training.py", *words, "--out", out],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(out.read_text(encoding="utf-8")), run.stdout


@pytest.mark.long
def test_rows_take_turns_and_really_train(measured):
    result, _ = measured
    ours, _, rival = result["rows"]
    assert (ours["row"], rival["row"]) == ("a", "c:b8")
    turns = [
        (start, start + seconds, row["row"])
        for row in (ours, rival)
        for start, seconds in zip(row["step_starts"], row["step_seconds"], strict=True)
    ]
    turns.sort()
    assert [row for _, _, row in turns] == ["a", "c:b8", "a", "c:b8"]
    assert all(end <= start + 1e-5 for (_, end, _), (start, _, _) in itertools.pairwise(turns))
    for row in (ours, rival):
        assert row["updates"] == 3  # the warm-up's one and two timed
        assert row["weight_change"] > 1e-3
        assert row["first_step_s"] > row["median_s"]
        assert 100 < row["process_peak_rss_mib"] < 5000
    assert rival["micro_batch"] == 8 and rival["checkpointing"] == "no"


@pytest.mark.long
def test_one_at_a_time_a_row_ends_before_the_next_starts(tmp_path):
    words = ["--model", "demo", "--device", "cpu", "--rows", "a,c:b8", "--steps", "2", "--warmup", "1"]
    args = bench_training.parse_arguments([*words, "--one_at_a_time", "--out", str(tmp_path)])
    first, second = bench_training.measure(args)
    assert first["step_starts"][-1] + first["step_seconds"][-1] < second["step_starts"][0]
    assert first["updates"] == second["updates"] == 3 and first["useful_tflop_per_step"] > 0


@pytest.mark.long
def test_figures_follow_from_the_seconds(measured):
    result, screen = measured
    ours, _, rival = result["rows"]
    for row in (ours, rival):
        assert row["p10_s"] <= row["median_s"] <= row["p90_s"]
        assert row["median_s"] == pytest.approx(sum(row["step_seconds"]) / 2)
        assert row["images_per_s"] == pytest.approx(8 / row["median_s"])
        rate = row["tflop_per_step"] / row["median_s"]
        assert row["share_of_matmul"] == pytest.approx(rate / result["matmul_tflops"])
    assert result["ratios"] == [
        {"row": "a", "against": "c:b8", "times_as_fast": pytest.approx(rival["median_s"] / ours["median_s"])}
    ]
    assert f"a is {rival['median_s'] / ours['median_s']:.2f} times as fast as c:b8" in screen
    # Without recomputation a step does what it must, and the fused attention's own second look at the scores.
    assert 1 <= rival["tflop_per_step"] / ours["useful_tflop_per_step"] < 1.1
    assert {"device", "versions", "commit", "command", "date", "seed", "steps"} <= result.keys()
    assert result["versions"].keys() == {"python", "torch", "diffusers", "transformers", "accelerate", "peft"}


@pytest.mark.long
def test_a_row_that_fails_is_recorded_and_ends_no_other(measured):
    result, screen = measured
    failed = result["rows"][1]
    assert failed["row"] == "c:b3" and "micro-batches of 3" in failed["error"]
    assert "median_s" not in failed
    assert failed["error"] in screen


@pytest.fixture
def row_d(tmp_path, monkeypatch):
    """Row d's record of a warm-up step and three timed ones, and the script's own of when each step ended.

    In place of diffusers' script, which needs two packages more, one with its flags, its progress bar and its log.
    """
    script = tmp_path / "examples" / "text_to_image" / "train_text_to_image_lora.py"
    script.parent.mkdir(parents=True)
    find_spec = importlib.util.find_spec

    def measure(seconds=(0.5, 0.02, 0.8, 0.1), fails_after=None, missing=(), peer=tmp_path) -> tuple:
        def look(name):
            return None if name in missing else find_spec("json" if name in ("datasets", "torchvision") else name)

        monkeypatch.setattr(importlib.util, "find_spec", look)
        script.write_text(DIFFUSERS_SCRIPT.replace("SECONDS", str(seconds)).replace("FAILS_AFTER", str(fails_after)))
        words = ["--device", "cpu", "--rows", "d", "--peer", str(peer), "--steps", "3", "--warmup", "1"]
        (record,) = rows = bench_training.measure(bench_training.parse_arguments(words))
        bench_training.summarize(rows, 1.0)
        moments = script.with_name("moments.json")
        return record, json.loads(moments.read_text()) if moments.is_file() else []

    return measure


def test_a_step_of_diffusers_own_script_is_timed_by_its_progress_bar(row_d):
    record, moments = row_d()
    own = [after - before for before, after in itertools.pairwise(moments)]
    assert record["step_seconds"] == pytest.approx(own, abs=0.25) and len(own) == 3
    assert record["median_s"] == pytest.approx(sorted(own)[1], abs=0.25)
    assert record["images_per_s"] == pytest.approx(8 / record["median_s"])
    assert record["first_step_s"] >= 0.5 and (record["micro_batch"], record["checkpointing"]) == (2, "yes")


def test_diffusers_own_script_can_fail_or_lack_what_it_needs(row_d, tmp_path):
    record, _ = row_d(fails_after=2)
    assert record["error"] == "exit code 1 after 3 steps: ValueError: too much"
    assert row_d(missing=["torchvision"])[0]["skipped"] == "needs the package torchvision"
    assert "needs --peer: there is no" in row_d(peer=tmp_path / "elsewhere")[0]["skipped"]


def test_a_rows_time_is_compared_with_ours_in_the_table(tmp_path):
    def row(name: str, median: float) -> dict:
        return {
            "row": name,
            "micro_batch": 2,
            "checkpointing": "no",
            "median_s": median,
            "p10_s": median,
            "p90_s": 2 * median,
            "images_per_s": 8 / median,
            "first_step_s": 9.0,
            "peak_allocated_mib": 2048.0,
        }

    rows = [row(name, median) for name, median in (("a", 0.5), ("b", 1.0), ("c:b2", 0.75), ("c:b8", 0.6))]
    rows.append({"row": "d", "skipped": "needs the package datasets"})
    result = {
        "device": "Some GPU",
        "model": "sd15",
        "resolution": 512,
        "precision": "fp16",
        "steps": 100,
        "rows": rows,
        "versions": {"torch": "2", "diffusers": "1"},
        "date": "2026-01-01",
        "commit": "abc",
    }
    path = tmp_path / "result.json"
    path.write_text(json.dumps(result), encoding="utf-8")

    table = bench_training.results_table([path])
    cells = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")] for line in table.splitlines()[2:]}
    assert {name: cells[name][-2] for name in ("a", "b", "c:b2", "c:b8")} == {
        "a": "1.00",
        "b": "2.00",
        "c:b2": "1.50",
        "c:b8": "**1.20**",
    }
    assert "500.0 (500.0 to 1000.0)" in cells["a"] and "2.00 GiB" in cells["a"]
    assert "needs the package datasets" in cells["d"]
    assert len({line.count("|") for line in table.splitlines()[2:]}) == 1

    assert [(found["against"], found["times_as_fast"]) for found in bench_training.ratios(rows)] == [
        ("b", 2.0),
        ("c:b8", pytest.approx(1.2)),
    ]


@pytest.mark.parametrize(
    "words",
    [
        ["--rows", "a,e"],
        ["--rows", "c"],
        ["--rows", "a,a"],
        ["--rows", "b:b2"],
        ["--model", "sdxl"],
        ["--steps", "0"],
        ["--resolution", "100"],
        ["--table", "no_such_file.json"],
        ["--speed"],
    ],
)
def test_bad_input_ends_with_one_line_and_code_2(words, capsys):
    with pytest.raises(SystemExit) as end:
        bench_training.parse_arguments(["--device", "cpu", *words])
    assert end.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.long
def test_all_that_a_gpu_is_asked_for_also_runs_small_on_a_cpu(tmp_path):
    small = {"MODEL": "demo", "RESOLUTION": "128", "ROWS": "a,c:b8", "STEPS": "2", "WARMUP": "1", "EPOCHS": "1"}
    run = subprocess.run(
        ["bash", ROOT / "bench" / "run_gpu.sh"],
        capture_output=True,
        text=True,
        env=os.environ | small | {"OUT": str(tmp_path), "PYTHON": sys.executable},
    )
    assert run.returncode == 0, run.stderr[-3000:]
    (bench,) = tmp_path.glob("*-demo-128.json")
    assert [row["row"] for row in json.loads(bench.read_text())["rows"] if "median_s" in row] == ["a", "c:b8"]
    cold, warm = (tmp_path / f"trainer-demo-128-{name}" for name in ("cold", "warm"))
    first_step_s = [json.loads((folder / "summary.json").read_text())["first_step_s"] for folder in (cold, warm)]
    assert first_step_s[0] > first_step_s[1] > 0
    encode_s = [json.loads((folder / "summary.json").read_text())["phases_s"]["encode"] for folder in (cold, warm)]
    assert encode_s[1] < 0.5 * encode_s[0]  # the warm run finds everything encoded
    assert "Encoding" not in run.stderr  # no bars where no terminal sees them
    assert [path.name for path in sorted((cold / "samples").glob("*.png"))] == ["epoch-000.png", "epoch-001.png"]
    assert len((cold / "metrics.csv").read_text().splitlines()) == 1 + 29
