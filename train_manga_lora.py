"""Teach Stable Diffusion 1.5 your manga faces: a LoRA from a folder of pictures and a JSON of captions.

    python train_manga_lora.py                  your faces: edit the first three constants below
    python train_manga_lora.py --demo           the embedded faces and model: minutes, on a CPU, offline
    accelerate launch train_manga_lora.py       several GPUs; every optimizer step is the same as on one

Every constant is a flag too (--num_train_epochs 20). The same command again continues an interrupted run.
"""

import argparse
import contextlib
import copy
import ctypes
import dataclasses
import difflib
import errno
import gc
import importlib.util
import json
import math
import os
import re
import shlex
import shutil
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

PROCESS_START = time.time()
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # both libraries greet with advice on other use cases
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
HERE = Path(__file__).resolve().parent

# Constants: edit them here, or override them as --name value -----------------------------------------------------


@dataclass(frozen=True)
class TrainingConfig:
    dataset_dir: str = "faces_dataset"  # folder of faces (.jpg .jpeg .png .webp .bmp)
    json_file: str = "faces_dataset/modified_face_250.json"  # captions: [{"image_name": ..., "captions": [...]}, ...]
    output_dir: str = "lora_output"  # everything the run makes

    pretrained_model: str = "stable-diffusion-v1-5/stable-diffusion-v1-5"  # hub id or local diffusers folder
    resolution: int = 512  # pixels a side; a multiple of 64 for SD1.5
    train_batch_size: int = 2  # x gradient_accumulation_steps x processes = images per optimizer step
    gradient_accumulation_steps: int = 4  # 2 x 4 = 8; how many pass at once, free memory decides
    num_train_epochs: int = 30  # passes over the training faces
    learning_rate: float = 5e-5  # peak of the cosine
    lr_warmup_ratio: float = 0.05  # share of the steps spent warming up; 0 = off
    lora_rank: int = 16  # r: width of the low-rank update
    lora_alpha: int = 32  # network alpha: the update is scaled by alpha / rank
    mixed_precision: str = "fp16"  # "fp16", "bf16" or "no"; LoRA weights are float32 under each
    gradient_checkpointing: str = "auto"  # "on", "off", or "auto": only as far as memory asks for it
    use_xformers: bool = False  # attention by xformers, if it is installed; else PyTorch's own fused kernel

    weighting: str = "sampling"  # rare captions: "sampling" draws them more often, "loss" weighs them more; "off"
    weight_min: float = 0.5  # lower clip of the TF-IDF weights, whose mean is 1
    weight_max: float = 2.0  # upper clip; 1 for both = every weight 1
    caption_dropout: float = 0.1  # share of draws with the caption "", which guidance needs; 0 = off
    penalty_factor: float = 1e-5  # times the sum of squared LoRA weights, added to the loss; 0 = off
    min_weight_decay: float = 1e-5  # of the first epoch; 0 and 0 = off
    max_weight_decay: float = 1e-4  # approached by the last epoch
    max_grad_norm: float = 1.0  # gradients are clipped to this norm; 0 = off

    validation_share: float = 0.1  # faces held out, at least 4; 0 = none, so no early stopping
    early_stopping_patience: int = 5  # epochs without a better validation loss before stopping; 0 = off
    sample_prompts: tuple[str, ...] = (  # pictures while training and before / after; none = off
        "A detailed manga face portrait of a young warrior, sharp eyes, determined expression",
        "Cute manga girl with large eyes, soft smile, delicate features, clean lineart",
        "Serious manga character, intense gaze, dramatic shadows, black and white style",
        "Manga face with spiky hair, confident expression, bold lineart, high contrast",
    )
    samples_per_prompt: int = 2  # seeds per prompt
    sample_every_n_epochs: int = 5  # pictures every n epochs, with the first the base's; 0 = off
    sample_steps: int = 25  # denoising steps per picture (DPM-Solver++)
    guidance_scale: float = 7.5  # of the pictures; 1 = none
    save_every_n_epochs: int = 1  # checkpoints; 0 = only at the end and when interrupted
    keep_checkpoints: int = 2  # older ones are deleted

    seed: int = 0  # of everything random
    num_workers: int = 2  # threads that read images; 0 = none
    cache_dir: str = ".cache"  # latents and text embeddings, by content; safe to delete

    demo: bool = False  # the embedded faces and model instead of yours
    dry_run: bool = False  # report on the data set and the plan, write nothing
    overwrite: bool = False  # delete the run in output_dir and start anew


DEMO = {  # what --demo changes; other flags apply on top
    "dataset_dir": str(HERE / "demo" / "faces"),
    "json_file": str(HERE / "demo" / "faces" / "modified_face_250.json"),
    "output_dir": "demo_output",
    "pretrained_model": str(HERE / "demo" / "base"),
    "resolution": 64,
    "sample_every_n_epochs": 10,
    "learning_rate": 2e-3,  # the tiny base needs a far higher rate than SD1.5: see bench/ablation.py
    "sample_prompts": (  # words that the demo's base knows; none names a colour
        "A detailed manga face portrait of a young woman with long wavy hair, large round eyes, gentle smile",
        "A manga face portrait of a girl with twin bun hair, winking eye, big open smile, flowers in the hair",
        "Manga portrait of a boy with tousled spiky hair, large eyes, toothy grin, round glasses",
        "A manga face portrait of a bearded man with short side-swept hair, half-closed eyes, full beard",
        "A detailed manga face portrait of a woman with high bun hair, closed eyes, soft smile, earrings",
        "Manga portrait of a young man with spiky mohawk hair, confident smirk, sunglasses",
        "A manga face portrait of a girl with a straight bob and bangs, large shiny eyes, sad tiny mouth, freckles",
        "A detailed manga face portrait of a woman with long straight hair, lashed eyes, sad crooked frown, earrings",
    ),
}
MAY_CHANGE_ON_RESUME = {
    "output_dir", "num_train_epochs", "early_stopping_patience", "sample_prompts", "samples_per_prompt",
    "sample_every_n_epochs", "sample_steps", "guidance_scale", "save_every_n_epochs", "keep_checkpoints", "num_workers",
    "cache_dir", "dry_run", "overwrite",
}
MIRRORS = {"runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5"}  # the former was deleted
MAX_BAD_STEPS = 20  # this many non-finite steps in a row are a divergence, not a loss scale that is still settling


class Stop(BaseException):  # like KeyboardInterrupt: no library's `except Exception` may swallow it
    """Ends the program with an exit code and one line. 2 input, 3 environment, 4 diverged, 130/143 interrupted."""

    def __init__(self, exit_code: int, message: str):
        super().__init__(message)
        self.exit_code = exit_code


class Interrupted(Stop):
    """Ctrl-C or SIGTERM."""


def parse_arguments(arguments: list[str]) -> TrainingConfig:
    """Flags over DEMO (if asked for) over the constants above. Raises Stop(2) naming a bad flag."""
    fields = dataclasses.fields(TrainingConfig)
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", Path(__file__).read_text(encoding="utf-8"), re.MULTILINE))

    class Parser(argparse.ArgumentParser):
        def error(self, message):
            unknown = re.search(r"unrecognized arguments: --([\w-]+)", message)
            names = [field.name for field in fields]
            near = difflib.get_close_matches(unknown[1].replace("-", "_"), names, 1) if unknown else []
            raise Stop(2, message + (f" (did you mean --{near[0]}?)" if near else "; --help lists all flags"))

    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    for field in fields:
        kind = {"help": f"{comments[field.name]} [{field.default}]".replace("%", "%%"), "default": argparse.SUPPRESS}
        if field.type is bool:
            kind["action"] = argparse.BooleanOptionalAction
        elif isinstance(field.default, tuple):
            kind |= {"nargs": "*", "metavar": "PROMPT"}
        else:
            kind |= {"type": field.type, "metavar": field.type.__name__.upper()}
        parser.add_argument(f"--{field.name}", **kind)
    given = vars(parser.parse_args(arguments))
    if "sample_prompts" in given:
        given["sample_prompts"] = tuple(given["sample_prompts"])
    if "dataset_dir" in given and "json_file" not in given:  # the caption file is looked for in the folder
        given["json_file"] = str(Path(given["dataset_dir"]) / Path(TrainingConfig.json_file).name)
    return dataclasses.replace(TrainingConfig(), **((DEMO if given.get("demo", TrainingConfig.demo) else {}) | given))


def check_config(config: TrainingConfig) -> None:
    """All that can be known before torch is imported. Raises Stop(2) naming the constant, its value and the rule."""

    def check(name: str, good: bool, rule: str) -> None:
        if not good:
            raise Stop(2, f"{name}={getattr(config, name)!r} must be {rule}")

    for field in dataclasses.fields(config):  # a flag's type was checked, a constant's edited in the file wasn't
        value, kind = getattr(config, field.name), float if field.type is float else type(field.default)
        good = type(value) is kind or (kind is float and type(value) is int)
        check(field.name, good and (kind is not tuple or all(type(part) is str for part in value)),
              "texts in brackets, each with a comma" if kind is tuple else f"of type {kind.__name__}")
    for name in ("train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "samples_per_prompt",
                 "lora_rank", "lora_alpha", "sample_steps", "keep_checkpoints"):
        check(name, getattr(config, name) >= 1, "at least 1")
    for name in ("early_stopping_patience", "sample_every_n_epochs", "save_every_n_epochs", "num_workers"):
        check(name, getattr(config, name) >= 0, "0 or more")
    for name in ("penalty_factor", "min_weight_decay", "max_weight_decay", "max_grad_norm"):
        check(name, 0 <= getattr(config, name) < math.inf, "0 (off) or more, and finite")
    check("max_weight_decay", config.max_weight_decay >= config.min_weight_decay, "at least min_weight_decay")
    check("seed", 0 <= config.seed < 2**32, "in [0, 2**32)")
    check("lora_alpha", config.lora_alpha <= 2048, "at most 2048, which the file's float16 holds exactly")
    check("max_weight_decay", config.max_weight_decay < 1, "below 1")
    check("resolution", config.resolution >= 8 and config.resolution % 8 == 0, "a multiple of 8, for SD1.5 of 64")
    check("learning_rate", 0 < config.learning_rate <= 1, "above 0 and at most 1 (try 5e-5)")
    check("lr_warmup_ratio", 0 <= config.lr_warmup_ratio < 1, "in [0, 1)")
    check("caption_dropout", 0 <= config.caption_dropout <= 1, "in [0, 1]")
    check("validation_share", 0 <= config.validation_share <= 0.5, "in [0, 0.5]")
    check("guidance_scale", 1 <= config.guidance_scale < 100, "in [1, 100)")
    check("weight_min", 0 < config.weight_min <= 1, "in (0, 1], as the weights' mean is 1")
    check("weight_max", 1 <= config.weight_max < math.inf, "at least 1, as the weights' mean is 1")
    check("weighting", config.weighting in ("sampling", "loss", "off"), '"sampling", "loss" or "off"')
    check("mixed_precision", config.mixed_precision in ("fp16", "bf16", "no"), '"fp16", "bf16" or "no"')
    check("gradient_checkpointing", config.gradient_checkpointing in ("auto", "on", "off"), '"auto", "on" or "off"')
    if not Path(config.dataset_dir).is_dir():
        raise Stop(2, f"dataset_dir={config.dataset_dir!r} is not a folder: put your faces there, set dataset_dir at "
                      "the top of train_manga_lora.py, or see it work first: python train_manga_lora.py --demo")
    if not Path(config.json_file).is_file():
        raise Stop(2, f"json_file={config.json_file!r} is not a file: set json_file to your captions")


def end(stop: Stop) -> None:
    print(f"train_manga_lora.py: {stop}", file=sys.stderr, flush=True)
    sys.exit(stop.exit_code)


if __name__ == "__main__":  # bad input is told now, not after the seconds that importing torch takes
    for number in (signal.SIGINT, signal.SIGTERM):  # until main() has something to save
        signal.signal(number, lambda number, frame: os._exit(128 + number))
    try:
        CONFIG = parse_arguments(sys.argv[1:])
        check_config(CONFIG)
    except Stop as stop:
        end(stop)

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from tqdm import tqdm

import evaluate_lora
from base_model import (
    BaseModelError, check_resolution, find_base, find_tokenizer, load_text_encoder, load_unet, load_vae,
)
from checkpoint import (
    LORA_FILES, CheckpointError, FolderLock, check_output_folder, describe, discard, fingerprint_of, gather,
    living_runs,
    load_newest_checkpoint, prune_checkpoints, read_whole, remove_leftovers, restore, save_checkpoint, space_held,
    start_folder, write_metrics, write_whole,
)
from dataset import EncodedDataset, InputError, MangaFaceDataset, encode_faces, encode_texts, folder_identity
from denoising import (
    MemoryPlan, accumulate_gradients, candidate_epochs, choose_plan, draw_window, is_out_of_memory, memory_plans,
    read_later, reads_late, sum_over_processes, validate,
)
from lora_layers import (
    GradientPenalty, LoRASelfCheckError, flatten_lora, fuse_lora, inject_lora, lora_modules, save_lora_weights,
)

# Schedules and the step -----------------------------------------------------------------------------------------


def learning_rate_at(step: int, total_steps: int, config: TrainingConfig) -> float:
    """Linear warmup over the first lr_warmup_ratio of the steps, then half a cosine to 0. Steps count from 0."""
    warmup = round(config.lr_warmup_ratio * total_steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total_steps - warmup)))


def weight_decay_at(epoch: int, config: TrainingConfig) -> float:
    """From min_weight_decay, towards max_weight_decay as the epochs (from 0) go by."""
    share = epoch / config.num_train_epochs
    return config.min_weight_decay + (config.max_weight_decay - config.min_weight_decay) * share


@torch.no_grad()
def apply_decay(weights: torch.Tensor, log_decay: float) -> float:
    """Multiply the weights by exp(log_decay); returns the part of log_decay that rounding to float32 left undone.

    One step's factor 1 - 5e-9 is 1 in float32, and even an epoch's product is near its resolution of 6e-8. So the
    epoch's logarithms are summed, applied in float64, and what the rounded weights fell short of is carried on.
    """
    before = weights.cpu().double()
    weights.copy_(before * math.exp(log_decay))
    return log_decay - math.log((before @ weights.cpu().double() / (before @ before)).item())


def clip_and_step(optimizer, scaler, weights: torch.Tensor, max_grad_norm: float) -> torch.Tensor:
    """Clip the gradient's norm and step, unless the gradient isn't finite. Returns whether it was.

    All on the device: nothing waits for the answer. A gradient that isn't finite becomes NaN throughout, upon which
    the scaler lets the optimizer leave weights and moments as they are, and halves its scale.
    """
    norm = torch.linalg.vector_norm(weights.grad) / scaler.scale(torch.ones((), device=weights.device))
    finite = norm.isfinite()
    factor = (max_grad_norm / (norm + 1e-6)).clamp(max=1.0) if max_grad_norm else torch.ones_like(norm)
    weights.grad.mul_(torch.where(finite, factor, math.nan))
    scaler.step(optimizer)
    scaler.update()
    return finite


# The run around the loop -----------------------------------------------------------------------------------------


class StopSignal(contextlib.ContextDecorator):
    """Ctrl-C or SIGTERM raises Interrupted: at once, or, while deferred, when its turn comes. Twice: ends at once."""

    def __enter__(self):
        self.number, self.deferred, self.overwrite_is_done = 0, False, False
        self.before = {}
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                self.before[number] = signal.signal(number, self.handle)

    def __exit__(self, *exception):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def handle(self, number, frame) -> None:
        if self.number:
            if time.monotonic() > self.since + 1:  # launchers may send one signal twice
                os._exit(128 + number)
            return
        self.number, self.since = number, time.monotonic()
        if not self.deferred:
            self.stop("interrupted; all that was done is kept")

    def defer(self, deferred: bool) -> None:
        """From here on, whether a signal waits (a step is never broken off) or not."""
        self.deferred = deferred
        if self.number and not deferred:
            self.stop("interrupted; all that was done is kept")

    def stop(self, message: str) -> None:
        """Raise Interrupted, with the command that goes on."""
        words = [word for word in sys.argv if not (self.overwrite_is_done and word == "--overwrite")]
        words += ["--no-overwrite"] if self.overwrite_is_done and TrainingConfig.overwrite else []  # edited above
        alone = __name__ == "__main__" and os.environ.get("WORLD_SIZE", "1") == "1"
        again = shlex.join(["python", *words]) if alone else "start it the same way"
        raise Interrupted(128 + (self.number or signal.SIGTERM), f"{message}; to go on: {again}")


stop_signal = StopSignal()
folder_lock = FolderLock()


def tune_for(device: torch.device) -> None:
    """Settings of the process that make the same arithmetic faster."""
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # shapes hardly change: trying all convolution kernels once pays
    elif sys.platform == "linux":
        # glibc returns large blocks to the kernel, which clears them anew for every operation: 5 % of an SD1.5 step.
        with contextlib.suppress(OSError, AttributeError):
            libc = ctypes.CDLL("libc.so.6")
            if libc.mallopt(-3, 2**30):  # M_MMAP_THRESHOLD; old versions refuse
                libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def free_bytes(device: torch.device, processes: int) -> float:
    """What a process may still take: of its GPU, its own cache included, or its part of the machine's memory."""
    if device.type != "cuda":
        return psutil.virtual_memory().available / processes
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + cached


def done(state: dict, config: TrainingConfig) -> bool:
    """All epochs run, or patience lost."""
    patience = config.early_stopping_patience or math.inf
    return state["epochs"] >= config.num_train_epochs or state["epochs_without_improvement"] >= patience


def open_tensorboard(folder: Path, step: int):
    """A TensorBoard writer that goes on after `step`, if the package is installed; metrics.csv is written anyway."""
    if importlib.util.find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(folder, purge_step=step + 1)


def peak_memory_mib(device: torch.device) -> float:
    """Peak of what the run took: on the GPU if there is one, else of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    info = psutil.Process().memory_info()
    if hasattr(info, "peak_wset"):  # Windows
        return info.peak_wset / 2**20
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def free_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def check_space(output: Path, parameters: int, config: TrainingConfig) -> None:
    """Raises Stop(3) if the disk can't hold what the run may still write. Pictures and logs count 32 MiB."""
    checkpoint, files = 3 * 4 * parameters, 2 * 2 * parameters  # weights, two moments: float32; two files: float16
    checkpoints = 1 + min(config.keep_checkpoints, config.num_train_epochs)  # the new one before an old one goes
    needed = checkpoints * checkpoint + (config.num_train_epochs + 2) * files + 2**25
    needed = max(needed - space_held(output), checkpoint + files)
    free = shutil.disk_usage(output).free
    if free < needed:
        raise Stop(3, f"output_dir={str(output)!r} may take {needed / 2**20:.0f} MiB more ({checkpoints} checkpoints, "
                      f"LoRA files of {config.num_train_epochs} epochs), but its disk has {free / 2**20:.0f} MiB free: "
                      "free some, choose another output_dir, or fewer num_train_epochs")


def check_gradients_flow(unet) -> None:
    """Before the first update: the data's gradient must reach every up_weight (down_weight's is zero, as up is)."""
    gradients = {name: layer.up_weight.grad for name, layer in lora_modules(unet).items()}
    dead = [name for name, gradient in gradients.items() if gradient is None or not gradient.any()]
    if dead:
        raise Stop(4, f"{len(dead)} LoRA modules get no gradient, the first is {dead[0]}: a bug, please report it")


def tell(summary: dict, state: dict, config: TrainingConfig, output: Path, say) -> None:
    """The last lines on the screen: what came of it, and where it is."""
    if summary["stopped_epoch"]:
        say(f"Stopped early: no better validation loss in {config.early_stopping_patience} epochs")
    if summary["val_ratio"]:
        gained = f"converged after {summary['converged_epoch']} of {summary['epochs_run']} epochs (95 % of the gain)"
        say(f"Validation loss {summary['val_loss_start']:.4f} -> {summary['val_loss_best']:.4f} "
            f"(x {summary['val_ratio']:.2f}); "
            + (gained if summary["converged_epoch"] else "never below the base's: lower learning_rate"))
    if summary["score_lora"] is not None:
        say(f"Quality score {summary['score_base']:.1f} -> {summary['score_lora']:.1f} of 10")
    say(f"Best epoch: {summary['best_epoch']} of {summary['epochs_run']}, {summary['best_reason']}")
    say(f"Weight decay over the whole run: weights x {math.exp(state['total_log_decay']):.8f}")
    first_step = f", first step after {summary['first_step_s']:.0f} s" if summary["first_step_s"] else ""
    say(f"{summary['images_per_s']:.1f} images/s, peak memory {summary['peak_memory_mib']:.0f} MiB, "
        f"{summary['seconds']:.0f} s in all{first_step}")
    say(f"Your LoRA: {summary['lora_safetensors']} (the same as .bin beside it)")
    if config.sample_prompts:
        say(f"Now look at {output / 'before_after.png'}")


def converged_epoch(state: dict) -> int | None:
    """The first epoch by which validation had gained 95 % of what it gained in all."""
    if not state["history"] or state["val_loss_best"] >= state["val_loss_start"]:
        return None
    enough = state["val_loss_start"] - 0.95 * (state["val_loss_start"] - state["val_loss_best"])
    return next(epoch for epoch, loss, _ in state["history"] if loss <= enough)


def save_epoch(folder: Path, unet, config: TrainingConfig, dataset, state: dict) -> None:
    """Write this epoch's LoRA as .bin and .safetensors; each is read back and compared before it counts."""
    metadata = {
        "ss_sd_model_name": Path(config.pretrained_model).name,
        "ss_resolution": f"({config.resolution}, {config.resolution})",
        "ss_num_train_images": len(dataset), "ss_num_validation_images": len(dataset.validation),
        "ss_num_epochs": config.num_train_epochs, "ss_steps": state["step"], "ss_learning_rate": config.learning_rate,
        "ss_lr_scheduler": "cosine with warmup", "ss_optimizer": "torch.optim.AdamW", "ss_seed": config.seed,
        "ss_batch_size_per_device": config.train_batch_size, "ss_mixed_precision": config.mixed_precision,
        "ss_gradient_accumulation_steps": config.gradient_accumulation_steps,
        "ss_max_grad_norm": config.max_grad_norm, "ss_caption_dropout_rate": config.caption_dropout,
        "ss_epoch": state["epochs"],
    }
    for file in LORA_FILES:
        save_lora_weights(unet, folder / file, torch.float16, metadata)


def keep_candidate(folder: Path, unet, config: TrainingConfig, dataset, state: dict) -> None:
    """Save the epoch just done if it may turn out to be the best; the state keeps what its files must be."""
    epoch = state["epochs"]
    if epoch in (candidate_epochs(state["history"]) or [epoch]):
        folder = folder / f"epoch-{epoch:03d}"
        save_epoch(folder, unet, config, dataset, state)
        state["candidates"][str(epoch)] = {file: describe((folder / file).read_bytes()) for file in LORA_FILES}


def prune_candidates(folder: Path, state: dict) -> None:
    """Delete those that can't be the best any more. After a checkpoint that knows so: no resumed run asks for them."""
    wanted = {f"epoch-{epoch:03d}" for epoch in candidate_epochs(state["history"]) or [state["epochs"]]}
    for old in folder.glob("epoch-*"):
        if old.name not in wanted:
            discard(old)


def pick_best(output: Path, config: TrainingConfig, dataset, state: dict, base: Path, device, say) -> dict:
    """Score the candidates, export the best one's files, write best.json; returns scores for the summary.

    The files are what a user loads, and are scored as such. Without pictures the lowest validation loss decides.
    """
    history, epochs = {epoch: (loss, error) for epoch, loss, error in state["history"]}, []
    for epoch in candidate_epochs(state["history"]) or [state["epochs"]]:
        folder = output / "candidates" / f"epoch-{epoch:03d}"
        try:
            read_whole(folder, state["candidates"][str(epoch)])
            epochs.append(epoch)
        except (OSError, ValueError, KeyError) as error:
            say(f"{folder} is damaged ({error}), so this epoch can't be chosen")
    if not epochs:  # what the last epoch made is still at hand
        epochs = [state["epochs"]]
        folder.mkdir(parents=True, exist_ok=True)
        for file in LORA_FILES:
            write_whole(folder / file, (output / "last" / file).read_bytes())
    scored, evaluation = {}, None
    if config.sample_prompts:
        spread = sorted({epochs[round(x * (len(epochs) - 1) / 3)] for x in range(4)})  # at most four of them
        jobs, _ = evaluate_lora.evaluation_prompts(dataset, dataclasses.asdict(config))
        say(f"Drawing and scoring {len(jobs)} pictures each of the base and epoch {', '.join(map(str, spread))}, with "
            "the exported files ...")
        evaluation = evaluate_lora.Evaluation(dataclasses.asdict(config), dataset, base, device)
        for epoch in spread:
            scored[epoch] = evaluation.judge(output / "candidates" / f"epoch-{epoch:03d}" / LORA_FILES[-1])
    epoch, reason = evaluate_lora.choose_best(epochs, scored)
    if not history:
        reason = "the last: without held-out faces there is nothing to choose by"
    elif epochs == [state["epochs"]]:
        reason = "the lowest validation loss, and the last: more epochs may be better still"
    for file in LORA_FILES:
        write_whole(output / file, (output / "candidates" / f"epoch-{epoch:03d}" / file).read_bytes())
    best = {
        "epoch": epoch, "step": epoch * state["step"] // state["epochs"], "val_loss": history.get(epoch, ("n/a",))[0],
        "score": scored[epoch].score if scored else "n/a", "reason": reason,
        "candidates": [
            {"epoch": e, "val_loss": history.get(e, ("n/a",))[0], "standard_error": history.get(e, ("n/a",))[-1],
             "score": scored[e].score if e in scored else "n/a",
             "interval": scored[e].interval("points: score") if e in scored else "n/a"} for e in epochs
        ],
    }
    write_whole(output / "best.json", json.dumps(best, indent=1).encode())
    result = {"best_epoch": epoch, "best_reason": reason, "score_base": None, "score_lora": None,
              "colourfulness_base": None, "colourfulness_lora": None}
    if evaluation:
        say(evaluate_lora.write_evaluation(output, evaluation, scored[epoch]))
        for name, judgement in (("base", evaluation.of_base), ("lora", scored[epoch])):
            result[f"score_{name}"] = judgement.score
            result[f"colourfulness_{name}"] = judgement.mean_measure("colourfulness")
    else:
        for name in ("scores.json", "before_after.png"):  # of an earlier end of this run: not of this LoRA
            (output / name).unlink(missing_ok=True)
    return result


# Training --------------------------------------------------------------------------------------------------------


@stop_signal
@folder_lock
def main(config: TrainingConfig, process_start: float | None = None) -> dict:
    """Run a whole training, or what is left of it, and return the summary; raises Stop or an input error."""
    started = process_start or time.time()
    check_config(config)
    on_cpu = not (torch.cuda.is_available() or torch.backends.mps.is_available())
    accelerator = Accelerator(cpu=on_cpu, mixed_precision="no")  # for processes and devices; precision is handled below
    device, is_main = accelerator.device, accelerator.is_main_process
    say = tqdm.write if is_main else lambda text: None
    process = (accelerator.process_index, accelerator.num_processes, accelerator.wait_for_everyone)
    tune_for(device)

    # What was asked for, and what this machine can do.
    if config.pretrained_model in MIRRORS:
        config = dataclasses.replace(config, pretrained_model=MIRRORS[config.pretrained_model])
        say(f"The original repository is gone from the hub; using its mirror {config.pretrained_model}")
    precision = config.mixed_precision if device.type == "cuda" else "no"
    if precision != config.mixed_precision:
        say(f'No CUDA GPU: training in float32 on the {device.type}, not in mixed_precision="{config.mixed_precision}"')
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "no": torch.float32}[precision]
    use_xformers = config.use_xformers and importlib.util.find_spec("xformers") is not None
    if use_xformers != config.use_xformers:
        say("use_xformers is on, but xformers is not installed: PyTorch's own fused attention is used")

    # The data set, and the arithmetic of the run.
    dataset = MangaFaceDataset(
        config.dataset_dir, config.json_file, config.resolution, config.weighting, config.weight_min,
        config.weight_max, config.validation_share, config.seed, config.num_workers,
    )
    effective_batch = config.train_batch_size * config.gradient_accumulation_steps * accelerator.num_processes
    steps_per_epoch = math.ceil(len(dataset) / effective_batch)
    total_steps = steps_per_epoch * config.num_train_epochs
    output = Path(config.output_dir)
    run = {"constants": dataclasses.asdict(config), "data": dataset.fingerprint,
           "processes": accelerator.num_processes, "precision": precision}
    action = "new" if config.dry_run else check_output_folder(output, run, MAY_CHANGE_ON_RESUME, config.overwrite)
    if action == "finished":
        say(f"{output} holds this run, finished. More num_train_epochs go on from there, --overwrite starts anew.")
        living_runs(output)  # which deletes the mark of one that was killed at its very end
        return json.loads((output / "summary.json").read_text(encoding="utf-8"))
    if is_main and not config.dry_run:
        folder_lock.take(output)
        remove_leftovers(output, Path(config.cache_dir))
    tokenizer = find_tokenizer(config.pretrained_model)
    say(dataset.report(tokenizer))
    say(f"Effective batch: {config.train_batch_size} x {config.gradient_accumulation_steps} x "
        f"{accelerator.num_processes} = {effective_batch} (train_batch_size x gradient_accumulation_steps x processes)")
    say(f"Steps: {steps_per_epoch} per epoch x {config.num_train_epochs} epochs = {total_steps}")
    if Path(config.pretrained_model).is_dir():
        check_resolution(config.resolution, find_base(config.pretrained_model))
    if config.dry_run:
        say("Dry run: nothing was written.")
        return {}

    # Encode every face and text once; VAE and text encoder are gone before the UNet comes.
    with accelerator.main_process_first():
        base = find_base(config.pretrained_model)
    check_resolution(config.resolution, base)
    if tokenizer is None:  # only now downloaded
        say("\n".join(dataset.report_tokens(find_tokenizer(str(base)))))
    vae_identity = folder_identity(base / "vae")
    text_identity = folder_identity(base / "text_encoder") + folder_identity(base / "tokenizer")
    latents = encode_faces(dataset, config.cache_dir, vae_identity, lambda: load_vae(base, device), process)
    texts, prompts = (
        encode_texts(some, config.cache_dir, text_identity, lambda: load_text_encoder(base, device), dtype, process)
        for some in (dataset.texts, ["", *config.sample_prompts])
    )
    encoded = EncodedDataset(*latents, texts).to(device)
    free_memory(device)

    # The UNet, frozen, in the working precision; the LoRA on top of it in float32.
    unet, scheduler = load_unet(base, device, dtype)
    torch.manual_seed(config.seed)  # for the LoRA's first weights only: all else draws from a seed and a step
    try:
        inject_lora(unet, config.lora_rank, config.lora_alpha, use_xformers)
    except ImportError as error:  # xformers is there, but doesn't fit this torch
        raise Stop(2, str(error)) from None
    fuse_lora(unet)
    weights = flatten_lora(unet)
    unet.train()
    everything = sum(p.numel() for p in unet.parameters())
    say(f"LoRA: rank {config.lora_rank}, alpha {config.lora_alpha}, {len(lora_modules(unet))} modules, "
        f"{len(weights):,} trainable parameters, {len(weights) / everything:.2%} of the UNet's")

    # Optimizer, loss scale, penalty. AdamW's own decay is off: apply_decay() does it exactly.
    optimizer = torch.optim.AdamW([weights], lr=config.learning_rate, weight_decay=0.0, fused=True)
    scale = {"init_scale": 2.0**16} if precision == "fp16" else {"init_scale": 1.0, "growth_interval": 2**30}
    scaler = torch.amp.GradScaler(device.type, **scale)  # at scale 1 it only keeps bad steps from the weights
    penalty_of = GradientPenalty(config.penalty_factor)
    state = {
        "step": 0, "optimizer_steps": 0, "images_seen": 0, "bad_steps": 0, "skipped_steps": 0, "train_seconds": 0.0,
        "epochs": 0, "epoch_loss": 0.0, "epoch_images": 0, "log_decay": 0.0, "total_log_decay": 0.0,
        "val_loss_start": None, "val_loss_best": None, "history": [], "epochs_without_improvement": 0,
        "plan": None, "row": None, "candidates": {}, "fingerprint": fingerprint_of(run, MAY_CHANGE_ON_RESUME),
    }

    # Resume where a checkpoint says, or start in an empty folder.
    if action == "resume":
        with accelerator.main_process_first():  # it moves damaged checkpoints aside
            tensors, state, problems = load_newest_checkpoint(output / "checkpoints", state["fingerprint"])
            if is_main:  # killed before it could: the newest has just proved good
                prune_checkpoints(output / "checkpoints", config.keep_checkpoints)
                prune_candidates(output / "candidates", state)
        restore(tensors, weights, optimizer, state["optimizer_steps"])
        scaler.load_state_dict(state["scaler"])
        if config.num_train_epochs < state["epochs"] or (
            config.num_train_epochs == state["epochs"] and state["epoch_images"]
        ):
            raise Stop(2, f"num_train_epochs={config.num_train_epochs} is less than this run has behind it: set it to "
                          f"{state['epochs'] + 1} or more, or start anew with --overwrite")
        say("\n".join([*problems, f"Resuming after step {state['step']} of {total_steps}"]))
        if state["total_steps"] != total_steps:
            say(f"num_train_epochs was changed: the rest follows the cosine over {total_steps} steps, from a learning "
                f"rate of {learning_rate_at(state['step'], total_steps, config):.1e}")
        if done(state, config) and state["epochs"] < config.num_train_epochs:
            say(f"No better validation loss in {state['epochs_without_improvement']} epochs, so nothing is left to do; "
                "a larger early_stopping_patience (or 0, none) goes on")
    resumed_from_step = state["step"]

    # How many images pass at once, and whether activations are kept, follows from the free memory. Not from its
    # rounding, though: a resumed run keeps the plan.
    images = config.train_batch_size * config.gradient_accumulation_steps
    shapes = encoded.latent_mean.shape[1:], encoded.text_embeddings.shape[1:]
    plans = broadcast_object_list([memory_plans(unet, *shapes, images, config.gradient_checkpointing)])[0]
    free = -accelerator.gather(torch.tensor([-free_bytes(device, accelerator.num_processes)], device=device)).max()
    plan = MemoryPlan(**state["plan"]) if state["plan"] else choose_plan(plans, free.item())
    plan.apply(unet)
    say(f"Device {device}, precision {precision}. Memory: {plan}, {free.item() / 2**30:.1f} GiB are free")
    if is_main:
        check_space(output, len(weights), config)
        run |= {"base": str(base.resolve()), "torch": torch.__version__, "device": str(device)}
        start_folder(output, run, resumed_from_step - (state["row"] is not None), action)
    stop_signal.overwrite_is_done = True
    tensorboard = open_tensorboard(output / "tensorboard", resumed_from_step) if is_main else None

    def save() -> None:
        state["total_steps"], state["scaler"], state["plan"] = total_steps, scaler.state_dict(), vars(plan)
        if not weights.isfinite().all():
            raise Stop(4, f"step {state['step']}: the weights are not finite. They were not saved, the last checkpoint "
                          "stands: lower learning_rate")
        if is_main:
            tensors = gather(weights, optimizer)
            save_checkpoint(output / "checkpoints", state["step"], tensors, state, config.keep_checkpoints)
            prune_candidates(output / "candidates", state)
        accelerator.wait_for_everyone()

    def save_and_stop() -> None:
        save()
        bar.close()
        stop_signal.stop(f"interrupted, saved after step {state['step']} of {total_steps}")

    def sample(epoch: int) -> None:
        wanted = config.sample_prompts and config.sample_every_n_epochs
        if is_main and wanted and epoch % config.sample_every_n_epochs == 0:
            free_memory(device)
            vae, trained = load_vae(base, device), weights.detach().clone()
            for number in (0, epoch):  # once, what the base draws: its LoRA is zero
                file = output / "samples" / f"epoch-{number:03d}.png"
                if number == epoch or not file.is_file():
                    weights.data.copy_(trained if number else torch.zeros_like(trained))
                    title = f"epoch {number}"
                    picture = evaluate_lora.sample_sheet(unet, vae, scheduler, prompts, vars(config), title)
                    evaluate_lora.write_picture(file, picture)
            weights.data.copy_(trained)
            del vae
            free_memory(device)

    # Before step 1: how well the base predicts the held-out faces.
    if state["step"] == 0 and dataset.validation:
        state["val_loss_start"], _ = validate(unet, scheduler, dataset, encoded, config.seed, accelerator)
        say(f"Validation loss before training: {state['val_loss_start']:.4f}")

    def first_gradients(*arguments) -> torch.Tensor:
        """Step 1 shows whether the plan was right: when memory runs out, on any process, all take a smaller plan."""
        nonlocal plan
        while True:
            failed = torch.zeros((), device=device)
            try:
                w_loss = accumulate_gradients(*arguments, plan.micro_batch, scaler)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                failed += 1
            sum_over_processes(failed)
            if not failed.item():
                return w_loss
            smaller = [other for other in plans if other.needed < 0.9 * plan.needed]
            if not smaller:
                raise Stop(3, f"out of memory, even with {plan}: free some, or lower resolution or lora_rank")
            say(f"Out of memory with {plan}.")
            plan = smaller[0]
            plan.apply(unet)
            say(f"Trying again with {plan}")
            weights.grad.zero_()
            free_memory(device)

    def settle(waiting: int) -> None:
        """Book the launched steps, all but the last `waiting`, as soon as their results have left the device."""
        nonlocal clock, first_step_seconds, interrupted
        while len(launched) > waiting:
            number, lr, window, results = launched.pop(0)
            w_loss, penalty, finite, signal_number = results()
            loss, interrupted = w_loss + penalty, interrupted or signal_number > 0
            if finite:
                state["epoch_loss"] += loss * len(window)
                state["epoch_images"] += len(window)
                state["log_decay"] += math.log1p(-lr * weight_decay)
                state["optimizer_steps"] += 1
                state["bad_steps"] = 0
            else:
                state["bad_steps"] += 1
                state["skipped_steps"] += 1
                if state["bad_steps"] > (MAX_BAD_STEPS if precision == "fp16" else 0):
                    names = ", ".join(dataset.samples[face].name for face in window.faces.tolist())
                    raise Stop(4, f"step {number}: the gradient is not finite (images {names}). Nothing was "
                                  "exported, the last checkpoint stands: lower learning_rate or look at these images")
            seconds, clock = time.perf_counter() - clock, time.perf_counter()
            state["images_seen"] += len(window)
            state["train_seconds"] += seconds
            first_step_seconds = first_step_seconds or time.time() - started
            images_per_s = round(len(window) / seconds, 2)
            row = [epoch + 1, number, loss, w_loss, penalty, "", lr, weight_decay, images_per_s]
            state["row"] = None if number % steps_per_epoch else row  # an epoch's last waits for the validation loss
            bar.set_postfix_str(f"loss: {loss:.4f}, w_loss: {w_loss:.4f}, penalty: {penalty:.4f}", refresh=False)
            bar.update()
            if is_main and not state["row"]:
                write_metrics(output, row, tensorboard)

    bar = tqdm(desc="Training", total=total_steps, initial=state["step"], unit="step", disable=not is_main)
    first_step_seconds, interrupted, launched = None, False, []
    stop_signal.defer(True)
    while not done(state, config):
        # Every epoch has its weight decay and its drawing order.
        epoch = state["epochs"]
        weight_decay = weight_decay_at(epoch, config)
        say(f"Epoch {epoch + 1}: Using weight decay {weight_decay:.1e}")
        order = dataset.epoch_order(epoch)
        clock = time.perf_counter()

        for start in range((state["step"] - epoch * steps_per_epoch) * effective_batch, len(order), effective_batch):
            # Draw the window of this step; this process takes its share of the rows.
            lr = learning_rate_at(state["step"], total_steps, config)
            positions = order[start : start + effective_batch]
            window = draw_window(dataset, positions, config.seed, state["step"], encoded.latent_mean.shape[1:],
                                 scheduler.config.num_train_timesteps, config.caption_dropout)
            rows = torch.arange(len(window))[accelerator.process_index :: accelerator.num_processes]

            # The gradient of the denoising loss, summed over processes, and that of the penalty, added once.
            weights.grad.zero_()
            if state["step"] == resumed_from_step:
                w_loss = first_gradients(unet, scheduler, encoded, window, rows)
            else:
                w_loss = accumulate_gradients(unet, scheduler, encoded, window, rows, plan.micro_batch, scaler)
            signal_number = torch.full_like(w_loss, stop_signal.number)
            sum_over_processes(weights.grad, w_loss, signal_number)
            if state["step"] == 0:
                check_gradients_flow(unet)
            penalty = penalty_of(weights)
            if config.penalty_factor:
                scaler.scale(penalty).backward()

            # Clip and step. What came of it is read while the next step is under way: a GPU never waits for that.
            optimizer.param_groups[0]["lr"] = lr
            finite = clip_and_step(optimizer, scaler, weights, config.max_grad_norm)
            results = read_later(torch.stack([w_loss, penalty.detach(), finite.to(w_loss), signal_number]))
            state["step"] += 1
            launched.append((state["step"], lr, window, results))
            last = state["step"] % steps_per_epoch == 0
            at_once = not reads_late(device) or last or (stop_signal.number and accelerator.num_processes == 1)
            settle(0 if at_once else 1)
            if interrupted:
                settle(0)
                save_and_stop()

        # The epoch's end: decay, validate, keep the best, sample, save. If interrupted, it is resumed from its start.
        before = copy.deepcopy(state), weights.detach().clone()
        left = apply_decay(weights.data, state["log_decay"])
        state["total_log_decay"] += state["log_decay"] - left
        say(f"Epoch {epoch + 1}: Average Loss: {state['epoch_loss'] / max(1, state['epoch_images']):.4f}")
        row, better = state["row"], True
        state |= {"epochs": epoch + 1, "epoch_loss": 0.0, "epoch_images": 0, "log_decay": left, "row": None}
        try:
            stop_signal.defer(accelerator.num_processes > 1)
            if dataset.validation:
                val_loss, error = validate(unet, scheduler, dataset, encoded, config.seed, accelerator)
                if not math.isfinite(val_loss):
                    raise Stop(4, f"the validation loss after epoch {epoch + 1} is {val_loss}. Nothing was exported, "
                                  "the last checkpoint stands: lower learning_rate")
                better = state["val_loss_best"] is None or val_loss < state["val_loss_best"]
                say(f"Epoch {epoch + 1}: Validation Loss: {val_loss:.4f}{' (best so far)' if better else ''}")
                row[5] = val_loss
                state["history"].append([epoch + 1, val_loss, error])
                state["val_loss_best"] = val_loss if better else state["val_loss_best"]
            state["epochs_without_improvement"] = 0 if better else state["epochs_without_improvement"] + 1
            if is_main:
                keep_candidate(output / "candidates", unet, config, dataset, state)
            sample(epoch + 1)
            stop_signal.defer(True)
        except Interrupted:
            stop_signal.defer(True)
            state = before[0]
            weights.data.copy_(before[1])
            save_and_stop()
        if is_main:
            write_metrics(output, row, tensorboard)
        due = config.save_every_n_epochs and (epoch + 1) % config.save_every_n_epochs == 0
        if due or done(state, config):
            save()
    bar.close()
    stop_signal.defer(False)
    if tensorboard is not None:
        tensorboard.close()

    # Keep the last epoch beside, pick the best, sum up.
    peak_mib = peak_memory_mib(device)
    summary = {}
    if is_main:
        save_epoch(output / "last", unet, config, dataset, state)
        del unet, weights  # the pictures need the memory
        free_memory(device)
        picked = pick_best(output, config, dataset, state, base, device, say)
        start_loss, best_loss = state["val_loss_start"], state["val_loss_best"]
        summary = picked | {
            "lora_bin": str(output / LORA_FILES[0]), "lora_safetensors": str(output / LORA_FILES[1]),
            "epochs_run": state["epochs"], "converged_epoch": converged_epoch(state),
            "stopped_epoch": state["epochs"] if state["epochs"] < config.num_train_epochs else None,
            "optimizer_steps": state["optimizer_steps"], "skipped_steps": state["skipped_steps"],
            "images_seen": state["images_seen"], "val_loss_start": start_loss, "val_loss_best": best_loss,
            "val_ratio": best_loss / start_loss if start_loss and best_loss else None,
            "images_per_s": state["images_seen"] / max(state["train_seconds"], 1e-9), "peak_memory_mib": peak_mib,
            "seconds": time.time() - started, "first_step_s": first_step_seconds,
            "resumed_from_step": resumed_from_step,
        }
        write_whole(output / "summary.json", json.dumps(summary, indent=1).encode())
        tell(summary, state, config, output, say)
    accelerator.end_training()
    return summary


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a console that lacks a caption's characters is no reason to stop
    try:
        main(CONFIG, PROCESS_START)
    except Stop as stop:
        end(stop)
    except (InputError, BaseModelError, CheckpointError) as error:
        end(Stop(2, str(error)))
    except LoRASelfCheckError as error:
        end(Stop(4, f"the exported file failed its check and was not kept: {error}"))
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError, and so are bugs
        if not is_out_of_memory(error):
            raise
        end(Stop(3, "out of memory: let other programs free some, or lower resolution; what was saved stays whole"))
    except OSError as error:
        remedy = f"{'free some' if error.errno == errno.ENOSPC else 'mend it'}, then the same command goes on"
        what = f"{error.strerror or error}: {error.filename or CONFIG.output_dir}"
        end(Stop(3, f"{what}; what was saved stays whole; {remedy}"))
