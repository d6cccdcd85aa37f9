"""What a run leaves on the disk, whole or not at all: its folder, its metrics, its checkpoints. No pickle.

    config.json                                 resolved constants, data fingerprint, processes, precision
    metrics.csv                                 one row per optimizer step
    checkpoints/step-000870/state.safetensors   LoRA, optimizer moments
    checkpoints/step-000870/state.json          step, validation losses, patience, scaler, sums of the running epoch
    checkpoints/step-000870/manifest.json       size and SHA-256 of both; written last
"""

import csv
import hashlib
import json
import os
import shutil
import time
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file

METRICS = ("epoch", "step", "loss", "w_loss", "penalty", "val_loss", "lr", "weight_decay", "images_per_s")
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's
PRODUCTS = (  # all that a run writes into its folder, and all that --overwrite deletes
    "config.json",
    "metrics.csv",
    "summary.json",
    "before_after.png",
    "best.json",
    "scores.json",
    "pytorch_lora_weights.bin",
    "pytorch_lora_weights.safetensors",
    "samples",
    "checkpoints",
    "last",
    "candidates",
    "tensorboard",
)


class CheckpointError(RuntimeError):
    """The output folder belongs to something else, or none of its checkpoints can be trusted."""


def replace(source: Path, target: Path) -> None:
    """os.replace, tried again for a second and a half: on Windows a virus scanner may hold a new file for a moment."""
    for seconds in (0.05, 0.1, 0.2, 0.4, 0.8):
        try:
            return os.replace(source, target)
        except PermissionError:
            time.sleep(seconds)
    return os.replace(source, target)


# The folder ------------------------------------------------------------------------------------------------------


def check_output_folder(output: Path, run: dict, may_change: set[str], overwrite: bool) -> str:
    """What a start in this folder means: "new", "resume" or "finished". Reads only.

    Args:
        run: what config.json will hold: {"constants": {...}, "data": ..., "processes": ..., "precision": ...}.
        may_change: names of constants that a resumed run may have changed.

    Raises:
        CheckpointError: the folder holds files but no run, or a run that differs in anything else.
    """
    if output.exists() and not output.is_dir():
        raise CheckpointError(f"output_dir={str(output)!r} is a file: choose another output_dir")
    if not output.exists() or not any(output.iterdir()):
        return "new"
    try:
        before = json.loads((output / "config.json").read_text(encoding="utf-8"))
        constants = dict(before["constants"])
    except (OSError, ValueError, KeyError, TypeError):
        raise CheckpointError(
            f"output_dir={str(output)!r} is not empty and holds no run of this program: choose another output_dir"
        ) from None
    made = ("summary.json", "pytorch_lora_weights.bin", "pytorch_lora_weights.safetensors")
    if overwrite or not (list_checkpoints(output / "checkpoints") or any((output / name).is_file() for name in made)):
        return "new"  # a start that never got as far as a checkpoint holds nothing to lose
    now = json.loads(json.dumps(run))  # tuples become lists, as in the file
    changed = [
        f"{name} was {constants.get(name)!r}, is {value!r}"
        for name, value in now["constants"].items()
        if name not in may_change and value != constants.get(name)
    ]
    changed += [
        f"{name} was {before.get(name)!r}, is {now[name]!r}"
        for name in ("data", "processes", "precision")
        if now[name] != before.get(name)
    ]
    if changed:
        raise CheckpointError(
            f"output_dir={str(output)!r} holds another run ({'; '.join(changed)}): set this back, choose another "
            "output_dir, or start anew with --overwrite"
        )
    decisive = ("num_train_epochs", "early_stopping_patience")
    same = all(now["constants"][name] == constants.get(name) for name in decisive)
    return "finished" if same and (output / "summary.json").is_file() else "resume"


def start_folder(output: Path, run: dict, step: int, action: str) -> None:
    """Empty the folder of an earlier run if action is "new"; write config.json; cut metrics.csv after `step`."""
    for name in PRODUCTS if action == "new" else ("summary.json",):
        path = output / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    (output / "samples").mkdir(parents=True, exist_ok=True)
    write_whole(output / "config.json", json.dumps(run, indent=1).encode())
    rows = []
    if step and (output / "metrics.csv").is_file():
        with open(output / "metrics.csv", newline="", encoding="utf-8") as file:
            rows = [row for row in csv.reader(file) if len(row) == len(METRICS) and row[1].isdigit()]
    lines = [",".join(METRICS), *(",".join(row) for row in rows if int(row[1]) <= step)]
    write_whole(output / "metrics.csv", ("\n".join(lines) + "\n").encode())


def write_metrics(output: Path, row: list, tensorboard=None) -> None:
    """Append one optimizer step's values, in the order of METRICS."""
    with open(output / "metrics.csv", "a", encoding="utf-8") as file:
        file.write(",".join(str(value) for value in row) + "\n")
    if tensorboard is not None:
        for name, value in zip(METRICS[2:], row[2:], strict=True):
            if value != "":
                tensorboard.add_scalar(name, value, row[1])


# Checkpoints -----------------------------------------------------------------------------------------------------


def write_whole(path: Path, content: bytes) -> None:
    """Write a file under its final name only once all of it is on the disk.

    Raises:
        OSError: the disk is full or the folder can't be written; `path` is then as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_checkpoint(folder: Path, step: int, tensors: dict[str, torch.Tensor], state: dict, keep: int) -> Path:
    """Write `folder`/step-000870, then delete all but the newest `keep` (>= 1). Never the other way round.

    Raises:
        OSError: the disk is full; what was there before still is.
    """
    final = folder / f"step-{step:06d}"
    temporary = folder / f".{final.name}.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        save_file({name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()},
                  temporary / "state.safetensors")  # fmt: skip
        write_whole(temporary / "state.json", json.dumps(state, indent=1).encode())
        manifest = {name: _describe(temporary / name) for name in ("state.safetensors", "state.json")}
        write_whole(temporary / "manifest.json", json.dumps(manifest, indent=1).encode())
        for path in (temporary / "state.safetensors", temporary):
            _flush_to_disk(path)
        if final.exists():  # the same step again, after a resume
            shutil.rmtree(final)
        replace(temporary, final)
        _flush_to_disk(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for old in list_checkpoints(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def gather(weights, optimizer) -> dict[str, torch.Tensor]:
    """All tensors that a checkpoint needs: LoRA and optimizer moments."""
    moments = optimizer.state.get(weights, {})
    return {"lora": weights} | {name: moments[name] for name in MOMENTS if name in moments}


@torch.no_grad()
def restore(tensors: dict[str, torch.Tensor], weights, optimizer, optimizer_steps: int) -> None:
    """The inverse of gather(), into the live run. `optimizer_steps` is AdamW's own count, for its bias correction.

    Raises:
        CheckpointError: these are not the tensors of gather().
    """
    if not {"lora"} <= tensors.keys() <= {"lora", *MOMENTS} or tensors["lora"].shape != weights.shape:
        raise CheckpointError("the checkpoints were written by another version of this program: go on with that one, "
                              "or start anew with --overwrite")  # fmt: skip
    weights.copy_(tensors["lora"])
    if optimizer_steps:
        moments = {name: tensors[name].to(weights.device) for name in MOMENTS}
        optimizer.state[weights] = {"step": torch.tensor(float(optimizer_steps), device=weights.device), **moments}


def list_checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    return sorted(path for path in Path(folder).glob("step-*") if path.is_dir() and path.name[5:].isdigit())


def load_newest_checkpoint(folder: Path) -> tuple[dict[str, torch.Tensor], dict, list[str]]:
    """Tensors and state of the newest checkpoint whose every byte is as written.

    Damaged ones are renamed to `step-000870.corrupt`; the third value says which and why.

    Raises:
        CheckpointError: all are damaged, or gone. A run must never start over silently.
    """
    problems = []
    for path in reversed(list_checkpoints(folder)):
        try:
            manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
            for name in ("state.safetensors", "state.json"):
                if manifest[name] != _describe(path / name):
                    raise ValueError(f"{name} is not what was saved")
            state = json.loads((path / "state.json").read_text(encoding="utf-8"))
            # not load_file: its tensors are the file, which Windows then can't delete
            return load((path / "state.safetensors").read_bytes()), state, problems
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            aside = path.with_name(f"{path.name}.corrupt")
            shutil.rmtree(aside, ignore_errors=True)
            replace(path, aside)
            problems.append(f"{path} is damaged ({error}); moved to {aside.name}")
    why = "; ".join(problems) or "there is none"
    raise CheckpointError(f"{folder} has no checkpoint to go on from ({why}): --overwrite starts anew")


def _describe(path: Path) -> dict:
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _flush_to_disk(path: Path) -> None:
    """fsync a file or, where the system can open one, a folder."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:  # Windows can't open folders
        return
    try:
        os.fsync(descriptor)
    except OSError:  # nor flush a descriptor that is only readable
        pass
    finally:
        os.close(descriptor)
