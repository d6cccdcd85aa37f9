"""Teach Stable Diffusion 1.5 your manga faces: a LoRA from a folder of pictures and a JSON of captions.

    python train_manga_lora.py                  your faces: edit the first three constants below
    python train_manga_lora.py --demo           the embedded faces and model: minutes, on a CPU, offline
    accelerate launch train_manga_lora.py       several GPUs: each adds its own images to every optimizer step

Every constant is a flag too (--num_train_epochs 20). The same command again continues an interrupted run.
"""

import errno
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

PROCESS_START = time.time()
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # both libraries print advice on other use cases
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
if sys.platform == "linux":  # elsewhere torch can't: a GPU's memory in pieces that grow, so that less is lost between
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
HERE = Path(__file__).resolve().parent

from training.arguments import check_config, flag_parser, with_flags
from training.files import InputError, Stop, printable

# Constants: edit them here, or override them as --name value -----------------------------------------------------


@dataclass(frozen=True)
class TrainingConfig:
    dataset_dir: str = "faces_dataset"  # folder of faces (.jpg .png .webp .bmp .gif .tif .avif)
    json_file: str = "faces_dataset/modified_face_250.json"  # captions; if missing: image.txt, metadata.jsonl, 10_name/
    output_dir: str = "lora_output"  # everything the run makes
    lora_name: str = "manga_faces"  # of the LoRA in UIs, and of its files in OUTPUT/share

    pretrained_model: str = "stable-diffusion-v1-5/stable-diffusion-v1-5"  # hub id, .safetensors, .ckpt or folder
    start_from: str = ""  # a LoRA file to go on from, of the same rank; "" = a new one
    clip_skip: int = 1  # layer of the text encoder, from its last; NAI-derived anime bases want 2
    resolution: int = 512  # pixels a side of a square picture; a multiple of 64 for SD1.5
    framing: str = "buckets"  # each picture keeps its shape, at about resolution^2 pixels; "square": its centre square
    trim_frames: bool = True  # cut away a panel's frame line and what lies outside of it
    train_batch_size: int = 2  # x gradient_accumulation_steps x processes = images per optimizer step
    gradient_accumulation_steps: int = 4  # 2 x 4 = 8; free memory decides how many pass at once
    num_train_epochs: int = 30  # passes over the training faces
    learning_rate: float = 5e-5  # peak of the cosine
    lr_warmup_ratio: float = 0.05  # share of the steps spent warming up; 0 = off
    lora_rank: int = 16  # r: width of the low-rank update
    lora_alpha: int = 32  # network alpha: the update is scaled by alpha / rank
    mixed_precision: str = "fp16"  # "fp16", "bf16" or "no"; LoRA weights are float32 under each
    gradient_checkpointing: str = "auto"  # "on", "off", or "auto": only as much as memory requires
    use_xformers: bool = False  # attention by xformers, if it is installed; else PyTorch's own fused kernel

    weighting: str = "sampling"  # rare captions: "sampling" draws them more often, "loss" weighs them more; "off"
    weight_min: float = 0.5  # lower clip of the TF-IDF weights, whose mean is 1
    weight_max: float = 2.0  # upper clip; 1 for both = every weight 1
    shuffle_tags: bool = True  # captions that are tags between commas: shuffles of them are drawn, too
    keep_tags: int = 1  # this many tags stay in front of a shuffle; 0 = none
    private_captions: bool = False  # keep your tags out of the LoRA's header, where UIs list them
    trigger_word: str = ""  # put before every caption; "" = off
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
    sample_every_n_epochs: int = 5  # pictures every n epochs, and before the first; 0 = off
    sample_steps: int = 25  # denoising steps per picture (DPM-Solver++)
    guidance_scale: float = 7.5  # of the pictures; 1 = none
    save_every_n_epochs: int = 1  # checkpoints; 0 = only before pictures, at the end and when interrupted
    keep_checkpoints: int = 2  # older ones are deleted

    seed: int = 0  # of everything random
    num_workers: int = 2  # threads that read images; 0 = none
    cache_dir: str = ".cache"  # latents, text embeddings, converted bases; made again if deleted

    demo: bool = False  # the embedded faces and model instead of yours
    dry_run: bool = False  # report on the data set and the plan; writes dataset.html alone
    overwrite: bool = False  # delete the run in output_dir and start anew


DEMO = {  # what --demo changes; other flags apply on top
    "dataset_dir": str(HERE / "demo" / "faces"),
    "json_file": str(HERE / "demo" / "faces" / "modified_face_250.json"),
    "output_dir": "demo_output",
    "pretrained_model": str(HERE / "demo" / "base"),
    "resolution": 128,
    "guidance_scale": 2.0,  # at 3 the base's colours begin to show in the ink
    "sample_every_n_epochs": 10,
    "samples_per_prompt": 1,
    "sample_steps": 20,
    "num_train_epochs": 20,
    "learning_rate": 4e-3,  # the tiny base needs a far higher rate than SD1.5: see docs/results.md
    "sample_prompts": (  # words that the demo's base knows; none names a colour
        "A detailed manga face portrait of a young woman with long wavy hair, large round eyes, gentle smile",
        "A manga face portrait of a girl with twin bun hair, winking eye, big open smile, flowers in the hair",
        "Manga portrait of a boy with tousled spiky hair, large eyes, toothy grin, round glasses",
        "A manga face portrait of a bearded man with short side-swept hair, half-closed eyes, full beard",
        "A detailed manga face portrait of a woman with high bun hair, closed eyes, soft smile, earrings",
        "Manga portrait of a young man with spiky mohawk hair, confident smirk, sunglasses",
        "A manga face portrait of a girl with a straight bob and bangs, large shiny eyes, sad tiny mouth, freckles",
        "A detailed manga face portrait of a woman with slicked-back hair, lashed eyes, sad crooked frown, earrings",
    ),
}
MAY_CHANGE_ON_RESUME = {"num_train_epochs", "early_stopping_patience", "save_every_n_epochs", "keep_checkpoints"}
MAY_CHANGE_ON_RESUME |= {"sample_prompts", "samples_per_prompt", "sample_every_n_epochs", "sample_steps"}
MAY_CHANGE_ON_RESUME |= {"guidance_scale", "num_workers", "output_dir", "cache_dir", "dry_run", "overwrite"}
MAY_CHANGE_ON_RESUME |= {"lora_name", "private_captions"}
# What a constant that a folder's config.json lacks stands for: how the version that wrote it behaved
FORMER = {"framing": "square", "trim_frames": False, "shuffle_tags": False, "keep_tags": 1, "trigger_word": ""}
FORMER |= {"clip_skip": 1, "lora_name": "manga_faces", "private_captions": False, "start_from": ""}
MAX_BAD_STEPS = 20  # this many non-finite steps in a row are a divergence, not a loss scale that is still settling
NOTHING_EXPORTED = "Nothing was exported, the last checkpoint stands: lower learning_rate"


def parse_arguments(words: list[str]) -> TrainingConfig:
    """Flags over DEMO (if asked for) over the constants above. Raises Stop(2) naming a bad flag."""
    return with_flags(TrainingConfig(), vars(flag_parser(TrainingConfig, __file__).parse_args(words)), DEMO)


def exit_with(code: int, message: object) -> None:
    print(f"train_manga_lora.py: {printable(str(message))}", file=sys.stderr, flush=True)
    sys.exit(code)


if __name__ == "__main__":  # report bad input now, not after the seconds that importing torch takes
    for number in (signal.SIGINT, signal.SIGTERM):  # until main() has something to save
        signal.signal(number, lambda number, frame: os._exit(128 + number))
    try:
        CONFIG = parse_arguments(sys.argv[1:])
        check_config(CONFIG)
    except Stop as stop:
        exit_with(stop.exit_code, stop)

import torch

from dataset import MangaFaceDataset
from evaluation.best_epoch import keep_candidate, prune_candidates
from evaluation.pictures import draw_samples, is_sampled
from evaluation.report import write_report
from evaluation.summary import finish
from lora_layers import GradientPenalty, LoRASelfCheckError
from training import bases
from training.base_model import load_tokenizer
from training.checkpoint import CheckpointError, TrainingState, Validated, resume_state, save_state
from training.dataset_report import dataset_warnings, write_dataset_report
from training.denoising import Batch, check_prediction, draw_batch, one_late, read_later, sum_over_processes, validate
from training.encoding import Data, cache_room, encode
from training.labels import labels_of
from training.lora_files import read_start
from training.memory import is_out_of_memory, plan_memory
from training.model import Model, build_model, clip_and_step, compute_gradients, rehearse
from training.run import Run

# Schedules and the step -----------------------------------------------------------------------------------------


def learning_rate_at(step: int, total_steps: int, config: TrainingConfig) -> float:
    """Linear warmup over the first lr_warmup_ratio of the steps, then half a cosine to 0. Steps count from 0."""
    warmup = round(config.lr_warmup_ratio * total_steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total_steps - warmup)))


def weight_decay_at(epoch: int, config: TrainingConfig) -> float:
    """From min_weight_decay, towards max_weight_decay as the epochs (from 0) go by."""
    progress = epoch / config.num_train_epochs
    return config.min_weight_decay + (config.max_weight_decay - config.min_weight_decay) * progress


@torch.no_grad()
def apply_decay(weights: torch.Tensor, log_decay: float) -> float:
    """Multiply the weights by exp(log_decay); returns the part of log_decay that rounding to float32 left undone.

    One step's factor 1 - 5e-9 is 1 in float32, and even an epoch's product is near its resolution of 6e-8. So the
    epoch's logarithms are summed and applied in float64; the part lost to rounding is carried over to the next epoch.
    """
    before = weights.cpu().double()
    weights.copy_((before * math.exp(log_decay)).float())  # not every device has float64
    return log_decay - math.log((before @ weights.cpu().double() / (before @ before)).item())


def train_step(
    model: Model, encoded, batch: Batch, share: torch.Tensor, learning_rate: float, config, signal_number=0
) -> Callable[[], list[float]]:
    """One optimizer step.

    Returns a function that waits for it (a GPU is still at work) and returns [loss on the faces, penalty, whether the
    gradient was finite, sum of all processes' signal_number].
    """
    # The gradient of the denoising loss, summed over processes; then that of the penalty on large weights, once
    w_loss = compute_gradients(model, encoded, batch, share)
    penalty = GradientPenalty(config.penalty_factor)(model.weights)
    if config.penalty_factor:
        model.scaler.scale(penalty).backward()

    # Clip and step
    model.optimizer.param_groups[0]["lr"] = learning_rate
    finite = clip_and_step(model.optimizer, model.scaler, model.weights, config.max_grad_norm)

    signals = torch.full_like(w_loss, signal_number)
    sum_over_processes(signals)
    return read_later(torch.stack([w_loss, penalty.detach(), finite.to(w_loss), signals]))


@dataclass
class Step:
    """A step that was launched: read() gives its numbers, see train_step()."""

    number: int  # from 1
    epoch: int  # from 0
    learning_rate: float
    weight_decay: float
    batch: Batch
    read: Callable[[], list[float]]


# The recipe -------------------------------------------------------------------------------------------------------


def main(config: TrainingConfig, process_start: float | None = None) -> dict:
    """Run a whole training, or the rest of one, and return the summary. Raises Stop or InputError.

    What is random: the LoRA's initial weights (from seed); which faces an epoch draws, and their order (seed, epoch);
    the captions, caption dropout, timesteps and noise of a step (seed, step); the noise of validation (seed, face) and
    of pictures (seed). So a resumed run draws exactly what an uninterrupted one would have drawn. The held-out faces
    are chosen by the hashes of their files, not at random.

    When a checkpoint is written: after every save_every_n_epochs-th epoch, before pictures are drawn, after the last
    epoch, and on Ctrl-C. Ctrl-C ends the run at once while faces are read or encoded, pictures are drawn, or the best
    epoch is exported, since all that matters is on disk then; during training the current step is finished first.

    Which epoch is exported: from the epoch of the lowest validation loss on, the earliest whose pictures score as well
    as any, within a standard error. Without pictures the lowest loss decides; without held-out faces, the last.

    Where to change what: the loss, training/denoising.py; the weighting, dataset.py; the captions' format,
    training/layouts.py; the optimizer, training/model.py; the LoRA formula, and which projections carry LoRA,
    lora_layers.py.
    """
    check_config(config)
    with Run(config, MAY_CHANGE_ON_RESUME, FORMER, process_start) as run:
        # What kind of base is it? Read the faces, hold some out, weight the others by how rare their captions are
        config = bases.use_mirror(config, run.log)
        with run.main_process_first():
            configs = bases.find_configs(config.pretrained_model, is_optional=config.dry_run)
        bases.check_fits(config, configs)
        read_start(config, configs)
        dataset = MangaFaceDataset.from_config(config, bases.resolution_unit(configs))

        # Is there a run in the folder already?
        run.open(config, dataset)
        if run.is_finished:
            return run.finished_summary()
        state = TrainingState.of_new_run(config, len(dataset), run.world, run.fingerprint)
        tokenizer = load_tokenizer(configs) if configs else None
        dataset.make_texts(tokenizer)
        run.warnings = [text for text, _ in dataset_warnings(dataset, config, state.total_steps)]
        run.log(bases.about(config.pretrained_model))
        run.log(dataset.report(tokenizer, run.warnings))
        if configs:
            run.log(cache_room(dataset, config, configs, run.dtype))
        run.log(state.arithmetic(config, run.world))
        if config.dry_run:
            if run.is_main:
                run.log(write_dataset_report(dataset, tokenizer, config, state.total_steps, run.output))
            return {}

        # Encode every face and text once; VAE and text encoder are gone before the UNet comes
        with run.main_process_first():
            base = bases.find_base(config.pretrained_model, config.cache_dir, run.log)
        with run.timing("encode"):
            data = encode(dataset, config, base, run)

        # The UNet, frozen, with LoRA on top: new, or as a checkpoint left it
        model = build_model(config, base, run.device, run.dtype, run.log)
        if run.resumes:
            state = resume_state(run, config, model, state)

        run.labels = labels_of(config, dataset, model, base, run.precision, state.started)

        # Choose how many images pass at once, then rehearse: a whole step that changes nothing must work
        plan_memory(run, model, data, config, state.plan)
        batch = draw(data, model, config, dataset.largest_batch(state.batch_size), 0)
        rehearse(model, data.encoded, batch, run.share_of(batch))
        run.begin(base, len(model.weights), state)

        # Train, then export the best epoch
        train(run, config, model, data, state, base)
        return finish(run, config, model, data, state, base)


def train(run: Run, config: TrainingConfig, model: Model, data: Data, state: TrainingState, base: Path) -> None:
    """All epochs that are left. Ctrl-C ends the loop at its top, where nothing is half done."""
    while True:
        if run.is_stopping:
            save_state(run, config, model, state)
            run.stop(f"saved after step {state.step} of {state.total_steps}" if state.step else "")

        # Before, between and after epochs: validate, keep the epoch if it is good, save; once all is saved, draw
        if state.at_epoch_boundary:
            if not state.is_validated:
                with run.timing("validate"):
                    evaluate(run, config, model, data, state)
                continue
            with run.timing("sample"):
                draw_samples(run, config, model, data, state.epoch, base)
            if run.is_main:
                write_report(run.output, config, run.log, warnings=run.warnings, history=state.history)
            if state.is_finished(config):
                break

        # An epoch's steps; the results of each are read while the next one computes
        for step in one_late(train_epoch(run, config, model, data, state), run.device):
            record(run, state, step, data.dataset)

        # Once per epoch: weight decay
        if state.at_epoch_boundary:
            end_epoch(run, model, state)


def train_epoch(run: Run, config: TrainingConfig, model: Model, data: Data, state: TrainingState) -> Iterator[Step]:
    """Run the remaining steps of the current epoch, yielding each; stops early when a signal arrives."""
    epoch = state.epoch
    weight_decay = weight_decay_at(epoch, config)
    run.log(f"Epoch {epoch + 1}: Using weight decay {weight_decay:.1e}")
    run.start_clock()
    batches = data.dataset.epoch_batches(epoch, state.batch_size)
    for positions in batches[state.step % state.steps_per_epoch :]:
        batch = draw(data, model, config, positions, state.step)
        learning_rate = learning_rate_at(state.step, state.total_steps, config)
        read = train_step(model, data.encoded, batch, run.share_of(batch), learning_rate, config, run.signal_number)
        state.step += 1
        yield Step(state.step, epoch, learning_rate, weight_decay, batch, read)
        if run.is_stopping:
            return


def draw(data: Data, model: Model, config: TrainingConfig, positions, step: int) -> Batch:
    """The batch of optimizer step `step` (from 0), for the training faces at these positions."""
    timesteps = model.scheduler.config.num_train_timesteps
    return draw_batch(data.dataset, positions, config.seed, step, data.latent_shapes, timesteps, config.caption_dropout)


def record(run: Run, state: TrainingState, step: Step, dataset: MangaFaceDataset) -> None:
    """Read a step's results and add them to the epoch's sums, metrics.csv and the bar."""
    w_loss, penalty, finite, signal_number = step.read()
    run.others_stop = run.others_stop or signal_number > 0
    if finite:
        state.epoch_loss += (w_loss + penalty) * len(step.batch)
        state.epoch_images += len(step.batch)
        state.log_decay += math.log1p(-step.learning_rate * step.weight_decay)
        state.optimizer_steps += 1
        state.bad_steps = 0
    else:
        state.bad_steps += 1
        state.skipped_steps += 1
        if state.bad_steps > (MAX_BAD_STEPS if run.precision == "fp16" else 0):
            names = ", ".join(dataset.faces[face].name for face in step.batch.faces.tolist())
            why = f"step {step.number}: the gradient is not finite (images {names})"
            raise Stop(4, f"{why}. {NOTHING_EXPORTED} or look at these images")
    seconds = run.lap()
    state.images_seen += len(step.batch)
    state.train_seconds += seconds
    speed = round(len(step.batch) / seconds, 2)
    losses = (w_loss + penalty, w_loss, penalty)
    run.add_step([step.epoch + 1, step.number, *losses, "", step.learning_rate, step.weight_decay, speed])


def end_epoch(run: Run, model: Model, state: TrainingState) -> None:
    """Apply the epoch's weight decay; its average loss is told beside the validation loss."""
    run.average_loss = f"Average Loss: {state.epoch_loss / max(1, state.epoch_images):.4f}"
    left = apply_decay(model.weights.data, state.log_decay)
    state.total_log_decay += state.log_decay - left
    state.log_decay, state.epoch_loss, state.epoch_images = left, 0.0, 0


def evaluate(run: Run, config: TrainingConfig, model: Model, data: Data, state: TrainingState) -> None:
    """Validate, keep the epoch's LoRA if it may turn out to be the best, save. Does nothing if a signal comes."""
    epoch, held_out = state.epoch, data.dataset.validation
    process, faces = (run.rank, run.world), held_out or data.dataset.train[:8]
    rest = (data.dataset, data.encoded, config.seed, process, lambda: run.is_stopping, faces)
    found = validate(model.unet, model.scheduler, *rest) if held_out else (None, None)
    if found is None:
        return
    if not epoch:  # the base as it is: does it fit?
        where = bases.schedule_of(config.pretrained_model, run.base, model.scheduler.config.prediction_type)
        check_prediction(model.unet, model.scheduler, rest, found[0], where, run.log)
    state.history.append(Validated(epoch, *found))
    told = [run.average_loss] if run.average_loss else []  # none before the first epoch, or if a run resumed after one
    if held_out:
        if not math.isfinite(found[0]):
            raise Stop(4, f"the validation loss after epoch {epoch} is {found[0]}. {NOTHING_EXPORTED}")
        run.add_validation(state.step, found[0])
        best = " (best so far)" if state.best == state.history[-1] and found[0] < state.start_loss else ""
        told.append(f"Validation Loss: {found[0]:.4f}{best}")
    if told:
        run.log(f"{f'Epoch {epoch}' if epoch else 'Before training'}: {', '.join(told)}")
    run.average_loss = ""
    if run.is_main and epoch:
        keep_candidate(run.output / "candidates", model.unet, run.labels, state, config)
    due = config.save_every_n_epochs and epoch % config.save_every_n_epochs == 0
    if epoch and (due or state.is_finished(config) or is_sampled(epoch, config)):
        save_state(run, config, model, state)
        if run.is_main:
            prune_candidates(run.output / "candidates", state, config)


if __name__ == "__main__":
    # A console that lacks a caption's characters is no reason to stop; a log file is to be read while it grows
    sys.stdout.reconfigure(errors="replace", line_buffering=True)
    try:
        main(CONFIG, PROCESS_START)
    except (Stop, InputError, CheckpointError) as error:
        exit_with(error.exit_code, error)
    except LoRASelfCheckError as error:
        exit_with(4, f"the exported file failed its check and was not kept: {error}")
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError, and so are bugs
        if not is_out_of_memory(error):
            raise
        exit_with(3, "out of memory: close other programs, then run the same command again; what was saved is intact")
    except OSError as error:
        remedy = f"{'free some space' if error.errno == errno.ENOSPC else 'fix that'}, then run the same command again"
        what = f"{error.strerror or error}: {error.filename or CONFIG.output_dir}"
        exit_with(3, f"{what}; what was saved is intact; {remedy}")
