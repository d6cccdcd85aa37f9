"""Several processes: none gives up while another one downloads; two machines train the LoRA of one.

python -m pytest tests/test_processes.py
"""

import dataclasses
import os
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
from conftest import ROOT
from safetensors.torch import load_file

from training.run import PATIENCE, Run

TRAIN = str(ROOT / "train_manga_lora.py")

# Runs the training with time 60 times as fast for the process group alone: NCCL's ten minutes are ten seconds, and a
# base that takes fifteen to fetch stands for a quarter of an hour. gloo itself would wait for half an hour.
HURRIED = """
import os, runpy, sys, time
from datetime import timedelta
import accelerate.utils, huggingface_hub, torch

script, base, patient, *arguments = sys.argv[1:]
init, kwargs = torch.distributed.init_process_group, accelerate.utils.InitProcessGroupKwargs

def hurried(*some, timeout=timedelta(minutes=10), **more):
    return init(*some, timeout=timeout / 60, **more)

def fetch(*_, **__):
    if os.environ["RANK"] == "0":
        time.sleep(15)
    return base

torch.distributed.init_process_group, huggingface_hub.snapshot_download = hurried, fetch
if patient == "no":
    accelerate.utils.InitProcessGroupKwargs = lambda timeout: kwargs()
sys.argv, sys.path[0] = [script, *arguments], os.path.dirname(script)
runpy.run_path(script, run_name="__main__")
"""


def words_of(config) -> list[str]:
    """A config as flags."""
    words = []
    for name, value in dataclasses.asdict(config).items():
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        else:
            words += [f"--{name}", *map(str, value if isinstance(value, tuple) else (value,))]
    return words


def launch(log: Path, *words: str, **more: object) -> subprocess.Popen:
    """accelerate launch of two processes on CPUs, which print into `log`. more: other flags of the launcher."""
    flags = {"num_processes": 2, "main_process_port": 0} | more
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
    command += [word for name, value in flags.items() for word in (f"--{name}", str(value))] + list(words)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with open(log, "wb") as printed:
        return subprocess.Popen(command, env=environment, stdout=printed, stderr=subprocess.STDOUT)


def test_the_process_group_waits_for_hours(tiny_config):
    assert timedelta(hours=6) <= PATIENCE <= timedelta(days=1)
    with Run(tiny_config, set(), {}) as run:
        assert run.accelerator.init_handler.timeout == PATIENCE


@pytest.mark.long
@pytest.mark.parametrize("patient", ["yes", "no"])
def test_a_slow_download_by_one_process_outlasts_nccl_s_patience_not_the_run_s(
    tiny_config, tiny_base, tmp_path, patient
):
    script, log = tmp_path / "hurried.py", tmp_path / "log.txt"
    script.write_text(HURRIED, encoding="utf-8")
    config = dataclasses.replace(tiny_config, pretrained_model="slow/base", num_train_epochs=1)
    process = launch(log, str(script), TRAIN, str(tiny_base), patient, *words_of(config))
    process.wait(timeout=300)
    printed = log.read_text(encoding="utf-8")
    exported = Path(config.output_dir, "pytorch_lora_weights.safetensors").is_file()
    if patient == "yes":
        assert process.returncode == 0 and exported, printed[-3000:]
    else:  # what happened before: the second process gives up at the barrier, and the launcher ends the first
        assert process.returncode != 0 and not exported
        assert "main_process_first" in printed and "imed out" in printed, printed[-3000:]


@pytest.mark.long
def test_two_machines_train_the_lora_of_one_process(script, tiny_config, tmp_path):
    """Two launches as the docs have them, over loopback; the weights differ by rounding alone."""
    alone = dataclasses.replace(tiny_config, train_batch_size=2, gradient_accumulation_steps=2)
    script.main(alone)
    two = dataclasses.replace(alone, output_dir=str(tmp_path / "two"), gradient_accumulation_steps=1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"main_process_ip": "127.0.0.1", "main_process_port": free.getsockname()[1]}
    logs = [tmp_path / f"machine{rank}.txt" for rank in range(2)]
    machines = [
        launch(log, TRAIN, *words_of(two), num_machines=2, machine_rank=rank, **address)
        for rank, log in enumerate(logs)
    ]
    for machine, log in zip(machines, logs, strict=True):
        assert machine.wait(timeout=300) == 0, log.read_text(encoding="utf-8")[-3000:]
    one, other = (load_file(Path(run.output_dir, "pytorch_lora_weights.safetensors")) for run in (alone, two))
    assert len(one) == len(other) == 3 * 80
    difference = sum((one[name] - other[name]).float().square().sum() for name in one)
    moved = sum(one[name].float().square().sum() for name in one if name.endswith("lora_up.weight"))
    assert moved > 0 and difference < 1e-4 * moved
