"""A run's folder: whose it is, what is in it, who works in it.

config.json                     resolved constants, data fingerprint, processes, precision
metrics.csv                     one row per optimizer step
.lock                           while a process works here
"""

import contextlib
import json
import os
import re
import shutil
from pathlib import Path

from filelock import FileLock, Timeout

from training.checkpoint import LORA_FILES, CheckpointError
from training.files import TEMPORARY, Stop, read_object, remove, write_atomic
from training.layouts import some_of

METRICS = ("epoch", "step", "loss", "w_loss", "penalty", "val_loss", "lr", "weight_decay", "images_per_s")
REPORT = "report.html"  # see evaluation/report.py
PAGE = "dataset.html"  # what a dry run writes, whatever else is in the folder
PICTURES = "pictures"  # that were scored
MOST_KEPT = 8  # epochs that may be the best, and the newest
# What --overwrite deletes
PRODUCTS = ("config.json", "metrics.csv", "summary.json", "before_after.png", "best.json", "scores.json", *LORA_FILES)
PRODUCTS += (REPORT, "samples", PICTURES, "checkpoints", "last", "candidates", "tensorboard")
PRODUCTS += ("share", "share.old", PAGE)
# After the end of a run these, if changed, go on from it, or export it anew
GO_ON = {"num_train_epochs", "early_stopping_patience", "lora_name", "private_captions"}
ABOUT = ("data", "processes", "precision", "start")  # in config.json besides the constants; start: of start_from
LOCK = ".lock"


def check_output_folder(output: Path, run: dict, may_change: set[str], overwrite: bool, former: dict) -> str:
    """What a start in this folder means: "new", "resume" or "finished". Reads only.

    run: what config.json will hold: {"constants": {...}} and ABOUT. may_change: constants that may differ on resume.
    former: values of constants that a former version's config.json lacks.
    Raises CheckpointError: the folder holds files but no run, or a run that differs in anything else.
    """
    where = f"output_dir={str(output)!r}"
    if output.exists() and not output.is_dir():
        raise CheckpointError(f"{where} is a file: choose another output_dir")
    names = os.listdir(output) if output.exists() else []
    if all(name in (LOCK, PAGE) or TEMPORARY.fullmatch(name) for name in names):
        return "new"
    before = read_object(output / "config.json")
    if not isinstance(before.get("constants"), dict):
        raise CheckpointError(f"{where} is not empty and holds no run of this program: choose another output_dir")
    faces = before.get("faces")
    before = former | before["constants"] | {name: before.get(name) for name in ABOUT}
    saved = any((output / "checkpoints").glob("step-*"))  # damaged ones too: a run is never started over silently
    if overwrite or not (saved or any((output / name).is_file() for name in ("summary.json", *LORA_FILES))):
        return "new"  # a start that never got as far as a checkpoint holds nothing to lose
    now = json.loads(json.dumps(run["constants"] | {name: run[name] for name in ABOUT}))  # tuples become lists
    changed = {name: value for name, value in now.items() if value != before.get(name)}
    if forbidden := changed.keys() - may_change:
        differing = {name: f"{name} was {before.get(name)!r}, is {now[name]!r}" for name in now if name in forbidden}
        remedy = "set this back, choose another output_dir, or start anew with --overwrite"
        if "data" in forbidden and isinstance(faces, dict):
            differing["data"] = _changed_faces(faces, run["faces"])
            remedy += f"; --start_from {output / 'last' / LORA_FILES[1]} in another output_dir goes on with these faces"
        raise CheckpointError(f"{where} holds another run ({'; '.join(differing.values())}): {remedy}")
    # If the end's files aren't all there, a resume makes them again from the last checkpoint
    is_finished = read_object(output / "summary.json") and all((output / name).is_file() for name in LORA_FILES)
    return "finished" if is_finished and not changed.keys() & GO_ON else "resume"


def _changed_faces(before: dict[str, str], now: dict[str, str]) -> str:
    """What became of the faces, by their hashes."""
    both = before.keys() & now.keys()
    changed = {name for name in both if before[name] != now[name]}
    names = {"new": now.keys() - both, "gone": before.keys() - both, "changed": changed}
    told = ", ".join(f"{what}: {some_of(sorted(found))}" for what, found in names.items() if found)
    return f"faces {told or 'in another order'}"


def start_folder(output: Path, run: dict, step: int, action: str, epoch: int = 0) -> None:
    """Empty the folder of an earlier run if action is "new"; write config.json; drop metrics after `step`, sheets after
    `epoch`.

    config.json is replaced, never absent: without it a folder is nobody's, and refused. The page of a dry run goes
    only if --overwrite says so: it was made for the run that begins.
    """
    kept = ("config.json",) if run["constants"].get("overwrite") else ("config.json", PAGE)
    for name in PRODUCTS if action == "new" else ("summary.json",):
        if name not in kept:
            remove(output / name)
    write_atomic(output / "config.json", json.dumps(run, indent=1).encode())
    (output / "samples").mkdir(exist_ok=True)
    for drawn in (output / "samples").glob("epoch-*"):  # after a checkpoint that was lost
        if drawn.stem[6:].isdigit() and int(drawn.stem[6:]) > epoch:
            remove(drawn)
    _write_rows(output, [row for row in read_rows(output) if int(row[1]) <= step] if step else [])


def add_metrics(output: Path, row: list) -> None:
    """Append one optimizer step's values, in the order of METRICS."""
    with open(output / "metrics.csv", "a", encoding="utf-8") as file:
        file.write(",".join(str(value) for value in row) + "\n")


def add_validation_loss(output: Path, step: int, loss: float) -> None:
    """Write the validation loss that followed a step into its row, if the row is there."""
    rows = read_rows(output)
    for row in rows:
        if int(row[1]) == step:
            row[METRICS.index("val_loss")] = str(loss)
    with contextlib.suppress(PermissionError):  # on Windows, while another program reads it: not worth the run
        _write_rows(output, rows)


def read_rows(output: Path) -> list[list[str]]:
    """Of metrics.csv; another program may have written to it: lines that are not rows are dropped."""
    try:
        text = (output / "metrics.csv").read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    rows = [line.split(",") for line in text.splitlines()]
    return [row for row in rows if len(row) == len(METRICS) and re.fullmatch("[0-9]{1,9}", row[1])]


def _write_rows(output: Path, rows: list[list[str]]) -> None:
    lines = [",".join(METRICS), *(",".join(row) for row in rows)]
    write_atomic(output / "metrics.csv", ("\n".join(lines) + "\n").encode())


def check_space(output: Path, parameters: int, config) -> None:
    """Raises Stop(3) if the disk can't hold what the run may still write. Pictures, pages and logs count 64 MiB."""
    checkpoint, files = 3 * 4 * parameters, 2 * 2 * parameters  # weights, two moments: float32; two files: float16
    checkpoints = 1 + min(config.keep_checkpoints, config.num_train_epochs)  # the new one before an old one goes
    # Those that can't be the best any more, and have no sheet, are deleted after a checkpoint
    epochs, every = config.num_train_epochs, config.sample_every_n_epochs
    kept = min(epochs, MOST_KEPT + (config.save_every_n_epochs or epochs) + (epochs // every if every else 0))
    needed = checkpoints * checkpoint + (kept + 3) * files + 2**26
    present = (file for name in PRODUCTS for path in [output / name] for file in [path, *path.rglob("*")])
    held = sum(file.stat().st_size for file in present if file.is_file())
    needed = max(needed - held, checkpoint + files)
    free = shutil.disk_usage(output).free
    if free < needed:
        content = f"{checkpoints} checkpoints, LoRA files of {kept} epochs"
        why = f"may take {needed / 2**20:.0f} MiB more ({content}), but its disk has {free / 2**20:.0f} MiB free"
        remedy = "free some, choose another output_dir, or fewer num_train_epochs"
        raise Stop(3, f"output_dir={str(output)!r} {why}: {remedy}")


@contextlib.contextmanager
def locked(folder: Path):
    """One run at a time in a folder, which is made if it isn't there, and deleted at the end if nothing is in it.

    The system frees a killed process's lock. Raises CheckpointError: another run is at work in it, or its disk has no
    locks.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:  # an OSError, too
            remedy = "wait for it, stop it, or choose another output_dir"
            raise CheckpointError(f"output_dir={str(folder)!r} is in use by another run: {remedy}") from None
        except OSError as error:
            why = f"can't be locked ({error.strerror or error}), so another run might write into it"
            raise CheckpointError(f"output_dir={str(folder)!r} {why}: choose one on a local disk") from None
        yield
    finally:
        if lock.is_locked:
            with contextlib.suppress(OSError):  # Windows deletes no open file
                (folder / LOCK).unlink()
            lock.release()
        for path in made:
            with contextlib.suppress(OSError):  # something is in it, as should be
                path.rmdir()


def remove_leftovers(output: Path) -> None:
    """Delete what killed processes had half written in `output`, whose lock is held."""
    for path in [*output.glob(".*.tmp"), *(path for name in PRODUCTS for path in (output / name).rglob(".*.tmp"))]:
        if TEMPORARY.fullmatch(path.name):
            remove(path)
