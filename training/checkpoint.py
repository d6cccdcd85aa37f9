"""All that changes in a run, and its checkpoints: whole or not at all, verified when they are read. No pickle.

checkpoints/step-000870/state.safetensors   LoRA weights, the optimizer's tensors
checkpoints/step-000870/state.json          TrainingState, the loss scaler, the optimizer's other values
checkpoints/step-000870/manifest.json       size and SHA-256 of both; written last
"""

import dataclasses
import hashlib
import json
import math
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from training import files
from training.labels import run_start

LORA_FILES = ("pytorch_lora_weights.bin", "pytorch_lora_weights.safetensors")
FORMAT = 3  # of a checkpoint; those of another can't be continued
OTHER_VERSION = "the checkpoints were written by another version of this program: go on with that one"
OTHER_VERSION += ", or start anew with --overwrite"
DAMAGED = (FileNotFoundError, IsADirectoryError, NotADirectoryError)  # but not a disk that fails for a moment
DAMAGED += (ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError)


class CheckpointError(RuntimeError):
    """The output folder belongs to something else, or none of its checkpoints can be trusted."""

    exit_code = 2


class Validated(NamedTuple):
    """What was found between two epochs."""

    epoch: int  # how many were done; 0 = before training
    loss: float | None  # of the held-out faces; None without any
    error: float | None  # its standard error


@dataclass
class TrainingState:
    """All that changes while a run goes on and that a checkpoint has to keep, but for the tensors."""

    batch_size: int  # images per optimizer step, over all processes
    steps_per_epoch: int
    total_steps: int
    fingerprint: str  # whose checkpoints these are: see fingerprint_of()
    started: int  # when the run was: see run_start()
    step: int = 0  # optimizer steps made, those skipped included
    optimizer_steps: int = 0  # those that changed the weights
    skipped_steps: int = 0  # those whose gradient wasn't finite
    bad_steps: int = 0  # of them, the last ones in a row
    images_seen: int = 0
    train_seconds: float = 0.0
    epoch_loss: float = 0.0  # sums over the images of the running epoch
    epoch_images: int = 0
    log_decay: float = 0.0  # of the weights, not yet applied
    total_log_decay: float = 0.0
    history: list[Validated] = field(default_factory=list)  # one per epoch boundary that has been dealt with
    candidates: dict[str, dict] = field(default_factory=dict)  # epoch -> what its LoRA files must be
    plan: dict | None = None  # the memory plan, kept by a resumed run

    @classmethod
    def of_new_run(cls, config, faces: int, processes: int, fingerprint: str) -> "TrainingState":
        batch_size = config.train_batch_size * config.gradient_accumulation_steps * processes
        steps_per_epoch = math.ceil(faces / batch_size)
        return cls(batch_size, steps_per_epoch, steps_per_epoch * config.num_train_epochs, fingerprint, run_start())

    def arithmetic(self, config, processes: int) -> str:
        """How many images a step has, and how many steps the run, for the screen."""
        product = f"{config.train_batch_size} x {config.gradient_accumulation_steps} x {processes} = {self.batch_size}"
        steps = f"{self.steps_per_epoch} per epoch x {config.num_train_epochs} epochs = {self.total_steps}"
        names = "train_batch_size x gradient_accumulation_steps x processes"
        return f"Effective batch: {product} ({names})\nSteps: {steps}"

    @property
    def epoch(self) -> int:
        """Whole epochs done."""
        return self.step // self.steps_per_epoch

    @property
    def at_epoch_boundary(self) -> bool:
        """Before the first step, between two epochs, or after the last."""
        return self.step % self.steps_per_epoch == 0

    @property
    def is_validated(self) -> bool:
        """Whether this epoch boundary has been dealt with."""
        return self.at_epoch_boundary and bool(self.history) and self.history[-1].epoch == self.epoch

    @property
    def start_loss(self) -> float | None:
        """Validation loss before training."""
        return self.history[0].loss if self.history else None

    @property
    def best(self) -> Validated | None:
        """The epoch of the lowest validation loss, the earliest of equals."""
        losses = [entry for entry in self.history if entry.epoch and entry.loss is not None]
        return min(losses, key=lambda entry: entry.loss, default=None)

    @property
    def epochs_without_improvement(self) -> int:
        return self.history[-1].epoch - self.best.epoch if self.best else 0

    def is_finished(self, config) -> bool:
        """All epochs run, or early stopping triggered."""
        patience = config.early_stopping_patience
        return self.epoch >= config.num_train_epochs or 0 < patience <= self.epochs_without_improvement


def fingerprint_of(run: dict, may_change: set[str]) -> str:
    """Hash of all that a resumed run may not change: a checkpoint says whose it is. run: as in config.json."""
    constants = {name: value for name, value in run["constants"].items() if name not in may_change}
    fixed = [constants, run["data"], run["processes"], run["precision"], run["start"]]
    return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()


# Model and state to tensors and values, and back: any optimizer -----------------------------------------------------


def save_state(run, config, model, state: TrainingState) -> None:
    """Write model (its weights, optimizer and scaler) and state as a checkpoint, on the main process.

    Raises:
        Stop(4): the weights are not finite.
        OSError: see save_checkpoint().
    """
    if not model.weights.isfinite().all():
        why = "the weights are not finite. They were not saved, the last checkpoint stands: lower learning_rate"
        raise files.Stop(4, f"step {state.step}: {why}")
    if run.is_main and state.step:
        state.plan = vars(model.plans.plan)
        own = next(iter(model.optimizer.state_dict()["state"].values()), {})
        tensors = {f"optimizer.{name}": value for name, value in own.items() if torch.is_tensor(value)}
        others = {name: value for name, value in own.items() if not torch.is_tensor(value)}
        group = {name: value for name, value in model.optimizer.param_groups[0].items() if name != "params"}
        values = {"format": FORMAT, "scaler": model.scaler.state_dict(), "optimizer": others, "group": group}
        tensors, values = {"lora": model.weights} | tensors, values | dataclasses.asdict(state)
        save_checkpoint(run.output / "checkpoints", state.step, tensors, values, config.keep_checkpoints)
    run.barrier()


def load_state(tensors: dict[str, torch.Tensor], values: dict, model) -> TrainingState:
    """The inverse of save_state(): what it wrote, into the live model."""
    weights = tensors.pop("lora", None)
    if weights is None or weights.shape != model.weights.shape:
        raise CheckpointError(OTHER_VERSION)
    own = {name.removeprefix("optimizer."): tensor for name, tensor in tensors.items()}
    try:
        scaler, others, group = (values.pop(name) for name in ("scaler", "optimizer", "group"))
        del values["format"]
        state = TrainingState(**values | {"history": [Validated(*entry) for entry in values["history"]]})
    except (KeyError, TypeError):
        raise CheckpointError(OTHER_VERSION) from None
    model.weights.data.copy_(weights)
    model.scaler.load_state_dict(scaler)
    groups = [model.optimizer.state_dict()["param_groups"][0] | group]
    model.optimizer.load_state_dict({"state": {0: own | others} if own or others else {}, "param_groups": groups})
    return state


def resume_state(run, config, model, new: TrainingState) -> TrainingState:
    """Go on where the newest checkpoint is; `new` is the state of a run that would start now.

    Raises:
        CheckpointError: there is no good checkpoint, or it is another version's.
        Stop(2): num_train_epochs is less than the run has behind it.
    """
    folder = run.output / "checkpoints"
    with run.main_process_first():  # it moves damaged checkpoints aside
        tensors, values, problems = load_newest_checkpoint(folder, run.fingerprint)
        state = load_state(tensors, values, model)
        if run.is_main:  # killed before it could: the newest has just proved good
            prune_checkpoints(folder, config.keep_checkpoints)
    if new.total_steps < state.step:
        why = f"num_train_epochs={config.num_train_epochs} is less than this run has behind it"
        raise files.Stop(2, f"{why}: set it to {state.epoch + 1} or more, or start anew with --overwrite")
    state.started = run_start(state.started)
    run.log("\n".join([*problems, f"Resuming after step {state.step} of {new.total_steps}"]))
    if state.total_steps != new.total_steps:
        run.log(f"num_train_epochs was changed: the rest follows the cosine over {new.total_steps} steps")
        state.total_steps = new.total_steps
    if state.is_validated and state.is_finished(config) and state.epoch < config.num_train_epochs:
        why = f"No better validation loss in {state.epochs_without_improvement} epochs, so nothing is left to do"
        run.log(f"{why}; a larger early_stopping_patience (or 0, none) goes on")
    return state


# Files --------------------------------------------------------------------------------------------------------------


def save_checkpoint(folder: Path, step: int, tensors: dict[str, torch.Tensor], state: dict, keep: int) -> Path:
    """Write `folder`/step-000870, then delete all but the newest `keep` (>= 1). Never the other way round.

    Raises OSError: the disk is full; what was there before still is.
    """
    final = folder / f"step-{step:06d}"
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    contents = {"state.safetensors": save(tensors), "state.json": json.dumps(state, indent=1).encode()}
    manifest = {name: files.describe(content) for name, content in contents.items()}
    contents["manifest.json"] = json.dumps(manifest, indent=1).encode()
    with files.temporary_beside(final) as temporary:
        temporary.mkdir(parents=True)
        for name, content in contents.items():
            files.write_atomic(temporary / name, content)
        files.flush_to_disk(temporary)
        files.replace_folder(final, temporary)  # one that is there was saved before its epoch was validated
        files.flush_to_disk(folder)
    prune_checkpoints(folder, keep)
    return final


def prune_checkpoints(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` (>= 1), and what a newer one of the same step has replaced."""
    found = list_checkpoints(folder)
    replaced = [path for path in found if path.suffix and path.with_suffix("") in found]
    for path in replaced + [path for path in found if path not in replaced][:-keep]:
        files.discard(path)


def list_checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints, oldest first; step-000870.old is one that was about to be replaced by step-000870."""
    found = [path for path in Path(folder).glob("step-*") if path.is_dir() and path.suffix in ("", ".old")]
    return sorted((path for path in found if path.stem[5:].isdigit()), key=lambda path: (path.stem, not path.suffix))


def load_newest_checkpoint(folder: Path, fingerprint: str | None = None) -> tuple[dict, dict, list[str]]:
    """Tensors and state of the newest checkpoint whose every byte is as written, and by the run of this fingerprint.

    fingerprint: None = any run's. Others are renamed to `step-000870.corrupt`; the third value says which and why.
    Raises CheckpointError: all are damaged, gone, or another version's. A run must never start over silently.
    """
    problems = []
    for path in reversed(list_checkpoints(folder)):
        try:
            manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
            contents = files.read_verified(path, {name: manifest[name] for name in ("state.safetensors", "state.json")})
            state, tensors = json.loads(contents["state.json"]), load(contents["state.safetensors"])
            if fingerprint and state.get("format") != FORMAT:
                raise CheckpointError(OTHER_VERSION)
            if fingerprint and state.get("fingerprint") != fingerprint:
                raise ValueError("it is another run's, or another version's")
            if not all(tensor.isfinite().all() for tensor in tensors.values()):
                raise ValueError("state.safetensors holds numbers that are not finite")
            return tensors, state, problems
        except DAMAGED as error:
            why = f"{error.strerror}: {Path(error.filename).name}" if isinstance(error, OSError) else error
            aside = path.with_name(f"{path.name}.corrupt")
            shutil.rmtree(aside, ignore_errors=True)
            files.rename_with_retries(path, aside)
            problems.append(f"{path} is damaged ({why}); moved to {aside.name}")
    aside = ", ".join(path.name for path in sorted(Path(folder).glob("*.corrupt")))
    why = "; ".join(problems) or (f"only damaged ones: {aside}" if aside else "there is none")
    raise CheckpointError(f"{folder} has no checkpoint to go on from ({why}): --overwrite starts anew")
