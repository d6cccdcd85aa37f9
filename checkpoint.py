"""What a run leaves on the disk, whole or not at all: its folder, its metrics, its checkpoints. No pickle.

    config.json                                 resolved constants, data fingerprint, processes, precision
    metrics.csv                                 one row per optimizer step
    checkpoints/step-000870/state.safetensors   LoRA, optimizer moments
    checkpoints/step-000870/state.json          step, validation losses, patience, scaler, sums of the running epoch
    checkpoints/step-000870/manifest.json       size and SHA-256 of both; written last
    .running-1234-1767225600@host               while a process works here: its number, when it started, its machine
    .NAME.1234.tmp                              NAME while process 1234 writes it; renamed once it is whole
"""

import contextlib
import hashlib
import json
import os
import platform
import re
import shutil
import time
from pathlib import Path

import psutil
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

LORA_FILES = ("pytorch_lora_weights.bin", "pytorch_lora_weights.safetensors")
METRICS = ("epoch", "step", "loss", "w_loss", "penalty", "val_loss", "lr", "weight_decay", "images_per_s")
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's
PRODUCTS = (  # all that a run writes into its folder, and all that --overwrite deletes
    "config.json",
    "metrics.csv",
    "summary.json",
    "before_after.png",
    "best.json",
    "scores.json",
    *LORA_FILES,
    "samples",
    "checkpoints",
    "last",
    "candidates",
    "tensorboard",
)
TEMPORARY = re.compile(r".+\.(\d+)\.tmp")  # what process number ... is writing
LOCK = re.compile(r"\.running-(\d+)-(\d+)@(.*)")  # process number, when it started, its machine


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
    if not output.exists() or all(_is_leftover(path.name) for path in output.iterdir()):
        return "new"
    try:
        before = json.loads((output / "config.json").read_text(encoding="utf-8"))
        constants = dict(before["constants"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise CheckpointError(
            f"output_dir={str(output)!r} is not empty and holds no run of this program: choose another output_dir"
        ) from None
    made = ("summary.json", *LORA_FILES)
    saved = any((output / "checkpoints").glob("step-*"))  # damaged ones too: a run is never started over silently
    if overwrite or not (saved or any((output / name).is_file() for name in made)):
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
    return "finished" if same and _is_finished(output) else "resume"


def _is_finished(output: Path) -> bool:
    """Whether the end's files are there; if not, a resume makes them again from the last checkpoint."""
    try:
        summary = json.loads((output / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(summary, dict) and all((output / name).is_file() for name in LORA_FILES)


def start_folder(output: Path, run: dict, step: int, action: str) -> None:
    """Empty the folder of an earlier run if action is "new"; write config.json; cut metrics.csv after `step`.

    config.json is replaced, never absent: without it a folder is nobody's, and refused.
    """
    for name in PRODUCTS if action == "new" else ("summary.json",):
        path = output / name
        if path.is_dir():
            shutil.rmtree(path)
        elif name != "config.json":
            path.unlink(missing_ok=True)
    output.mkdir(parents=True, exist_ok=True)
    write_whole(output / "config.json", json.dumps(run, indent=1).encode())
    (output / "samples").mkdir(exist_ok=True)
    rows = []
    if step and (output / "metrics.csv").is_file():  # another program may have written to it: what is no row goes
        text = (output / "metrics.csv").read_text(encoding="utf-8", errors="replace")
        rows = [row for row in (line.split(",") for line in text.splitlines())
                if len(row) == len(METRICS) and re.fullmatch("[0-9]{1,9}", row[1])]  # fmt: skip
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


def space_held(output: Path) -> int:
    """Bytes that the run's files take already."""
    files = (file for name in PRODUCTS for path in [output / name] for file in [path, *path.rglob("*")])
    return sum(file.stat().st_size for file in files if file.is_file())


class FolderLock(contextlib.ContextDecorator):
    """One run at a time in a folder: `with FolderLock() as lock: lock.take(folder)`, or as a decorator.

    Every run marks the folder with an empty file of its own, named after its process, and goes on if it sees no living
    other one. So no mark can be half written, or be taken for another's; of two that start at the same instant,
    both may give up, but never go on together. The mark of a killed run is recognised: its process is gone, or the
    process of that number started at another time.
    """

    def __enter__(self):
        self.mark, self.made = None, []
        return self

    def take(self, folder: Path) -> None:
        """Mark `folder`, which is made if it isn't there, until the end of the `with`.

        Raises:
            CheckpointError: another run is at work in it; names its process.
        """
        self.made = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        process = psutil.Process()
        self.mark = folder / f".running-{process.pid}-{process.create_time():.0f}@{platform.node()}"
        self.mark.touch()
        for other, pid, started, host in living_runs(folder):
            if other != self.mark:
                remedy = "wait for it, or stop it"
                if host != platform.node():  # whose processes can't be seen from here
                    remedy += f"; if it is dead, delete {str(other)!r}"
                raise CheckpointError(f"output_dir={str(folder)!r} is in use by process {pid} on {host}, which started "
                                      f"{time.ctime(started)}: {remedy}; or choose another output_dir")  # fmt: skip

    def __exit__(self, *exception):
        if self.mark:
            self.mark.unlink(missing_ok=True)
        for path in self.made:
            with contextlib.suppress(OSError):  # something is in it, as should be
                path.rmdir()


def living_runs(folder: Path) -> list[tuple[Path, int, int, str]]:
    """(mark, process, its start, its machine) of each run at work in `folder`. Deletes the marks of killed ones."""
    living = []
    for mark in folder.glob(".running-*"):
        if found := LOCK.fullmatch(mark.name):
            pid, started, host = int(found[1]), int(found[2]), found[3]
            if host != platform.node() or _is_running(pid, started):
                living.append((mark, pid, started, host))
            else:
                with contextlib.suppress(OSError):
                    mark.unlink()
    return living


def _is_running(pid: int, started: int) -> bool:
    try:
        process = psutil.Process(pid)
        return abs(process.create_time() - started) <= 2 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True


def _is_leftover(name: str) -> bool:
    return bool(LOCK.fullmatch(name) or (name.startswith(".") and TEMPORARY.fullmatch(name)))


def remove_leftovers(output: Path, cache: Path) -> None:
    """Delete what killed processes had half written: in `output`, whose lock is held, and in the cache.

    The cache is shared: a file there must have no process of its number, and be a minute old, as the process may be
    another machine's.
    """
    for path in [*output.glob(".*.tmp"), *(path for name in PRODUCTS for path in (output / name).rglob(".*.tmp"))]:
        if TEMPORARY.fullmatch(path.name):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    for path in [*cache.glob("latents/*/*.safetensors.*.tmp"), *cache.glob("texts/*/*.safetensors.*.tmp")]:
        found = TEMPORARY.fullmatch(path.name)
        with contextlib.suppress(FileNotFoundError):  # another run cleans up, too
            if found and not psutil.pid_exists(int(found[1])) and time.time() - path.stat().st_mtime > 60:
                path.unlink()


# Checkpoints -----------------------------------------------------------------------------------------------------


def write_whole(path: Path, content: bytes) -> None:
    """Write a file under its final name only once all of it is on the disk.

    Raises:
        OSError: the disk is full or the folder can't be written; `path` is then as it was.
    """
    temporary = _temporary(path)
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def describe(content: bytes) -> dict:
    """What a manifest says about a file of this content."""
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def read_whole(folder: Path, manifest: dict[str, dict]) -> dict[str, bytes]:
    """The content of all files in `manifest` ({name: describe(content)}).

    Raises:
        OSError, ValueError: one is gone, or isn't what was written.
    """
    contents = {name: (folder / name).read_bytes() for name in manifest}
    for name, content in contents.items():
        if describe(content) != manifest[name]:
            raise ValueError(f"{name} is not what was saved")
    return contents


def fingerprint_of(run: dict, may_change: set[str]) -> str:
    """Hash of all that a resumed run may not change (see check_output_folder): a checkpoint says whose it is."""
    constants = {name: value for name, value in run["constants"].items() if name not in may_change}
    fixed = [constants, run["data"], run["processes"], run["precision"]]
    return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()


def save_checkpoint(folder: Path, step: int, tensors: dict[str, torch.Tensor], state: dict, keep: int) -> Path:
    """Write `folder`/step-000870, then delete all but the newest `keep` (>= 1). Never the other way round.

    Raises:
        OSError: the disk is full; what was there before still is.
    """
    final = folder / f"step-{step:06d}"
    temporary, old = _temporary(final), folder / f"{final.name}.old"
    temporary.mkdir(parents=True)
    try:
        tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
        contents = {"state.safetensors": save(tensors), "state.json": json.dumps(state, indent=1).encode()}
        manifest = {name: describe(content) for name, content in contents.items()}
        for name, content in (contents | {"manifest.json": json.dumps(manifest, indent=1).encode()}).items():
            write_whole(temporary / name, content)
        _flush_to_disk(temporary)
        if final.exists():  # an epoch's last step, saved before the epoch's end: it counts until its successor is there
            discard(old)
            replace(final, old)
        replace(temporary, final)
        _flush_to_disk(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    prune_checkpoints(folder, keep)
    return final


def prune_checkpoints(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` (>= 1), and what a newer one of the same step has replaced."""
    found = list_checkpoints(folder)
    for path in found[:-keep] + [path for path in found[-keep:-1] if path.suffix]:
        discard(path)


def discard(folder: Path) -> None:
    """Delete a folder of the run; while that is under way it doesn't bear its name any more."""
    with contextlib.suppress(OSError):  # open elsewhere, on Windows: then it stays, whole
        replace(folder, _temporary(folder))
        shutil.rmtree(_temporary(folder), ignore_errors=True)


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
    """Finished checkpoints, oldest first; step-000870.old is one that was about to be replaced by step-000870."""
    found = [path for path in Path(folder).glob("step-*") if path.is_dir() and path.suffix in ("", ".old")]
    return sorted((path for path in found if path.stem[5:].isdigit()), key=lambda path: (path.stem, not path.suffix))


def load_newest_checkpoint(
    folder: Path, fingerprint: str | None = None
) -> tuple[dict[str, torch.Tensor], dict, list[str]]:
    """Tensors and state of the newest checkpoint whose every byte is as written, and by the run of this fingerprint.

    fingerprint: None = any run's. Others are renamed to `step-000870.corrupt`; the third value says which and why.

    Raises:
        CheckpointError: all are damaged, or gone. A run must never start over silently.
    """
    problems = []
    for path in reversed(list_checkpoints(folder)):
        try:
            manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
            contents = read_whole(path, {name: manifest[name] for name in ("state.safetensors", "state.json")})
            state, tensors = json.loads(contents["state.json"]), load(contents["state.safetensors"])
            if fingerprint and state.get("fingerprint") != fingerprint:
                raise ValueError("it is another run's, or another version's")
            if not all(tensor.isfinite().all() for tensor in tensors.values()):
                raise ValueError("state.safetensors holds numbers that are not finite")
            return tensors, state, problems
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError, ValueError, KeyError, TypeError,
                AttributeError, RecursionError, SafetensorError) as error:  # not a disk that fails for a moment
            why = f"{error.strerror}: {Path(error.filename).name}" if isinstance(error, OSError) else error
            aside = path.with_name(f"{path.name}.corrupt")
            shutil.rmtree(aside, ignore_errors=True)
            replace(path, aside)
            problems.append(f"{path} is damaged ({why}); moved to {aside.name}")
    aside = ", ".join(path.name for path in sorted(Path(folder).glob("*.corrupt")))
    why = "; ".join(problems) or (f"only damaged ones: {aside}" if aside else "there is none")
    raise CheckpointError(f"{folder} has no checkpoint to go on from ({why}): --overwrite starts anew")


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


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
