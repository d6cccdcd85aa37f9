"""Where a training happens, and what the world is told: devices, processes, folder, signals, messages, metrics.

Knows nothing of learning. The only place that knows accelerate.
"""

import contextlib
import ctypes
import dataclasses
import importlib.util
import json
import math
import os
import platform
import shlex
import signal
import sys
import threading
import time
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list
from tqdm import tqdm

from training import folder
from training.checkpoint import fingerprint_of
from training.files import Interrupted, sha256_of

# Longer than any process lets the others wait while it downloads the base or draws. NCCL would give up after 10 minutes
PATIENCE = timedelta(hours=12)
PHASES = ("encode", "train", "validate", "sample", "score", "export")  # of a run; what is left is its start
REPORTED = ("torch", "diffusers", "transformers", "accelerate", "peft", "safetensors")  # whose versions are written


class Run:
    """One training, new, resumed or found finished: `with Run(config, may_change, former) as run: run.open(...)`.

    Args:
        may_change: names of the constants that a resumed run may have changed.
        former: values of constants that a former version's config.json lacks.
        process_start: when the program was started, as time.time(); None if it is called from another one.

    Attributes:
        device; rank, world: this process's number, and how many there are; is_main: rank is 0.
        precision: "fp16", "bf16" or "no", as this device can; dtype: the base's.
        output: the folder. is_finished, resumes: what open() found there.
    """

    def __init__(self, config, may_change: set[str], former: dict, process_start: float | None = None):
        self.config, self.may_change, self.former, self.output = config, may_change, former, Path(config.output_dir)
        self.started, self.command = process_start or time.time(), ["python", *sys.argv] if process_start else None
        self.action, self.is_finished, self.resumes = "new", False, False
        self.bar = self.tensorboard = self.first_step_seconds = None
        self.average_loss = ""  # of the epoch just done, for the screen
        self.spent = dict.fromkeys(PHASES, 0.0)  # seconds, since this start
        self.signal_number, self.waits, self.others_stop = 0, False, False

    def __enter__(self):
        with contextlib.ExitStack() as undo:
            if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
                for number in (signal.SIGINT, signal.SIGTERM):
                    undo.callback(signal.signal, number, signal.signal(number, self._handle))
            self._find_devices()
            self.undo = undo.pop_all()
        return self

    def __exit__(self, kind, *exception):
        with self.undo, contextlib.suppress(*([] if kind is None else [Exception])):  # the first error is the one told
            for thing in (self.bar, self.tensorboard):
                if thing is not None:
                    thing.close()
            if kind is None:
                self.accelerator.end_training()

    def _find_devices(self) -> None:
        on_cpu = not (torch.cuda.is_available() or torch.backends.mps.is_available())
        patience = [InitProcessGroupKwargs(timeout=PATIENCE)]
        self.accelerator = Accelerator(cpu=on_cpu, mixed_precision="no", kwargs_handlers=patience)  # precision: below
        self.device, self.is_main = self.accelerator.device, self.accelerator.is_main_process
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        self.barrier, self.main_process_first = self.accelerator.wait_for_everyone, self.accelerator.main_process_first
        self.log = tqdm.write if self.is_main else lambda text: None
        tune_for(self.device)
        wanted = self.config.mixed_precision
        self.precision, why = precision_of(self.device, wanted)
        self.dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "no": torch.float32}[self.precision]
        if self.precision != wanted:
            name = {"fp16": "fp16", "no": "float32"}[self.precision]
            self.log(f'{why}: training in {name} on the {self.device.type}, not in mixed_precision="{wanted}"')

    def from_main(self, thing):
        """What the main process has, for all."""
        return broadcast_object_list([thing])[0]

    def share_of(self, batch) -> torch.Tensor:
        """Which of a batch's images are this process's."""
        return torch.arange(len(batch))[self.rank :: self.world]

    def least(self, number: float) -> float:
        """The smallest of all processes' numbers."""
        return -self.accelerator.gather(torch.tensor([-number], device=self.device)).max().item()

    # The folder

    def open(self, config, dataset) -> None:
        """Find out what a start in the output folder means, and lock it. `config` as resolved by now.

        Raises CheckpointError: it holds something else, or another run, or one that is at work.
        """
        self.config = config
        self.about = {"constants": dataclasses.asdict(config), "data": dataset.fingerprint, "faces": dataset.hashes}
        self.about |= {"processes": self.world, "precision": self.precision, "start": None}
        if config.start_from:
            self.about["start"] = sha256_of(config.start_from)
        self.fingerprint = fingerprint_of(self.about, self.may_change)
        if config.dry_run:
            return
        asked = (self.about, self.may_change, config.overwrite, self.former)
        self.action = folder.check_output_folder(self.output, *asked)
        self.is_finished, self.resumes = self.action == "finished", self.action == "resume"
        if self.is_main and not self.is_finished:
            self.undo.enter_context(folder.locked(self.output))
            folder.remove_leftovers(self.output)

    def finished_summary(self) -> dict:
        """summary.json of the finished run that was found."""
        remedy = "More num_train_epochs go on from there, --overwrite starts anew, evaluate_lora.py draws it otherwise."
        self.log(f"{self.output} holds this run, finished. {remedy}")
        return json.loads((self.output / "summary.json").read_text(encoding="utf-8"))

    def begin(self, base: Path, parameters: int, state) -> None:
        """Write config.json into the folder, emptied if the run is new. From here on signals wait for run.is_stopping.

        Raises Stop(3): the disk can't hold what the run may write.
        """
        self.waits, self.resumed_from_step, self.base, self.images_before = True, state.step, base, state.images_seen
        if self.is_main:
            folder.check_space(self.output, parameters, self.config)
            about = {"base": str(base.resolve()), "device": str(self.device), "command": self.command}
            about["versions"] = {"python": platform.python_version()} | {name: version(name) for name in REPORTED}
            folder.start_folder(self.output, self.about | about, state.step, self.action, state.epoch)
            if importlib.util.find_spec("tensorboard") is not None:  # metrics.csv is written anyway
                from torch.utils.tensorboard import SummaryWriter

                self.tensorboard = SummaryWriter(self.output / "tensorboard", purge_step=state.step + 1)
        self.action = "begun"
        options = {"total": state.total_steps, "initial": state.step, "unit": "step", "file": sys.stderr}
        self.bar = tqdm(desc="Training", disable=not (self.is_main and sys.stderr.isatty()), **options)
        self.tenth, self.clock_of_bar = 10 * state.step // state.total_steps, time.monotonic()
        what = f"{state.total_steps - state.step:,} steps to go"
        self.log(f"Training starts: {what}; all that is made goes to {self.output}, and what is best at the end")

    @contextlib.contextmanager
    def timing(self, phase: str):
        """Count the seconds that this takes as spent in one of PHASES; none may lie within another."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.spent[phase] += time.perf_counter() - start

    # Steps

    def start_clock(self) -> None:
        self.clock = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last lap."""
        seconds, self.clock = time.perf_counter() - self.clock, time.perf_counter()
        self.first_step_seconds = self.first_step_seconds or time.time() - self.started
        self.spent["train"] += seconds
        return seconds

    def add_step(self, row: list) -> None:
        """Append one optimizer step's values, in the order of METRICS, and move the bar."""
        values = dict(zip(folder.METRICS, row, strict=True))
        shown = ", ".join(f"{name}: {values[name]:.4f}" for name in ("loss", "w_loss", "penalty"))
        self.bar.set_postfix_str(shown, refresh=False)
        self.bar.update()
        done, total = row[1], self.bar.total
        if self.bar.disable and 10 * done // total > self.tenth:  # a log file: a line each tenth
            self.tenth = 10 * done // total
            seconds = time.monotonic() - self.clock_of_bar
            left = seconds / max(1, done - self.resumed_from_step) * (total - done)
            self.log(f"Step {done} of {total}: {shown}; about {math.ceil(left / 60)} min to go")
        if self.is_main:
            folder.add_metrics(self.output, row)
            self._add_scalars({name: value for name, value in values.items() if value != ""})

    def add_validation(self, step: int, loss: float) -> None:
        """Record the validation loss of the epoch that ended with this step."""
        if self.is_main and step:
            folder.add_validation_loss(self.output, step, loss)
            self._add_scalars({"step": step, "val_loss": loss})

    def _add_scalars(self, values: dict) -> None:
        if self.tensorboard is not None:
            for name in values.keys() - {"epoch", "step"}:
                self.tensorboard.add_scalar(name, values[name], values["step"])

    # Signals: Ctrl-C and SIGTERM act at once, but in training, which stops between two steps. Twice: ends at once

    def _handle(self, number, frame) -> None:
        if self.signal_number:
            if time.monotonic() > self.since + 1:  # launchers may send one signal twice
                os._exit(128 + number)
            return
        self.signal_number, self.since = number, time.monotonic()
        if not self.waits:
            self.stop()

    @property
    def is_stopping(self) -> bool:
        """Whether the training has to end here. With several processes only once all have heard of it."""
        return self.others_stop or (self.signal_number > 0 and self.world == 1)

    @contextlib.contextmanager
    def signals_act_at_once(self, even_if_several: bool = False):
        """For what can be broken off anywhere: all is saved. Where several processes wait for each other it isn't."""
        before, self.waits = self.waits, self.world > 1 and not even_if_several
        if self.signal_number and not self.waits:
            self.stop()
        try:
            yield
        finally:
            self.waits = before

    def stop(self, done: str = "") -> None:
        """Raise Interrupted, with what was done and the command that goes on."""
        message = f"interrupted, {done}" if done else "interrupted; all that was done is kept"
        words = self.command or []
        if self.action == "begun":  # an overwrite has happened: don't ask for it again
            words = [word for word in words if word != "--overwrite"]
            words += ["--no-overwrite"] if type(self.config).overwrite else []  # edited in the script
        alone = words and os.environ.get("WORLD_SIZE", "1") == "1"
        again = shlex.join(words) if alone else "start it the same way"
        raise Interrupted(128 + (self.signal_number or signal.SIGTERM), f"{message}; to go on: {again}")


def precision_of(device: torch.device, wanted: str) -> tuple[str, str]:
    """(the precision of the base on this device, why it isn't the one wanted)."""
    if wanted == "no":
        return "no", ""
    if device.type == "cuda":  # torch says that older GPUs can bf16, too: they imitate it
        is_old = wanted == "bf16" and torch.cuda.get_device_capability(device) < (8, 0)
        return "fp16" if is_old else wanted, "This GPU has no bf16"
    if device.type == "cpu" and wanted == "bf16":  # only if it is asked for: small models get slower
        found = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        has_bf16 = any(getattr(torch.cpu, name, lambda: False)() for name in found)
        return "bf16" if has_bf16 else "no", "This CPU has no bf16"
    return "no", "No CUDA GPU"


def tune_for(device: torch.device, shapes: int = 1) -> None:
    """Settings of the process that make the same arithmetic faster, or safer. shapes: how many pictures have."""
    if device.type == "cuda":
        # Trying all convolution kernels once pays, unless each shape and number of images would have them tried. On
        # a GTX 16xx the kernels that are taken untried give NaN in fp16.
        torch.backends.cudnn.benchmark = shapes == 1 or "GTX 16" in torch.cuda.get_device_name(device)
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False  # sums in float32
    elif sys.platform == "linux":
        # glibc returns large blocks to the kernel, which clears them anew for every operation: 5 % of an SD1.5 step.
        with contextlib.suppress(OSError, AttributeError):
            libc = ctypes.CDLL("libc.so.6")
            if libc.mallopt(-3, 2**30):  # M_MMAP_THRESHOLD; old versions refuse
                libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
