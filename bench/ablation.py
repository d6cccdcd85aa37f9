"""What does each ingredient do? The demo is trained again and again, with one thing changed, from several seeds.

    python bench/ablation.py                     all rows, 3 seeds: hours on two cores; goes on where it stopped
    python bench/ablation.py --rows no_penalty,lr_x2 --seeds 1
    python bench/ablation.py --table             the committed results as markdown

A row changes constants, or swaps a function of the trainer's modules for another: what didn't earn its place needs no
flag. Everything else is equal, the seeds included, so each row is compared with the baseline seed by seed. Of each
run the exported file is scored: validation loss, loss on faces drawn for this alone (needs demo/requirements.txt), the
pictures' quality score, and whether they show what 96 prompts asked for, by attribute. Every run done is written into
the result file at once, and isn't done again.
"""

import argparse
import copy
import dataclasses
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from importlib.metadata import version
from pathlib import Path
from unittest import mock

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
WORK = ROOT / "bench" / ".work"
RESULT = ROOT / "bench" / "results" / "ablation" / "demo.json"
ATTRIBUTE_PROMPTS = 96  # each attribute is asked for in half of them
NEW = ("flowers", "glasses")  # which the base has never seen: of 225 training faces, 8 have flowers, 23 glasses
RENDERS = 200  # new faces: eight times as many as a run holds out, and the same for all seeds
SAMPLE_STEPS = 15  # denoising steps: the demo's 20 look the same, and pictures take half of the time
SAMPLE_SEED = 0  # of the pictures, whatever the training's: only the LoRA differs between runs
T_95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}  # two-sided 95 % of Student's t, by degrees of freedom


# Swaps: each returns [(module, name, what stands in its place)] ------------------------------------------------------


def lora_plus(ratio: float) -> list:
    """LoRA+ (Hayou et al. 2024): B learns `ratio` times as fast as A. Adam's step is proportional to its rate."""
    import torch

    import lora_layers
    import train_manga_lora as trainer

    build, step, rates = trainer.build_model, trainer.clip_and_step, {}

    def build_and_mark(*arguments):
        model = build(*arguments)
        of_ends = [
            torch.full((weight.numel(),), 1.0 if number % 2 == 0 else ratio)  # down, up, down, up, ...
            for number, weight in enumerate(lora_layers.lora_parameters(model.unet))
        ]
        rates[model.weights] = torch.cat(of_ends).to(model.weights.device)
        return model

    def step_at_two_rates(optimizer, scaler, weights, max_grad_norm):
        before = weights.detach().clone()
        finite = step(optimizer, scaler, weights, max_grad_norm)
        weights.data.copy_(before + rates[weights] * (weights.data - before))
        return finite

    return [(trainer, "build_model", build_and_mark), (trainer, "clip_and_step", step_at_two_rates)]


def redraw(change: Callable) -> list:
    """draw_batch, and then what `change(batch, number of timesteps, generator)` says is to be replaced."""
    import train_manga_lora
    from training import denoising

    draw = train_manga_lora.draw_batch

    def draw_and_change(dataset, positions, seed, step, latent_shape, num_timesteps, dropout):
        batch = draw(dataset, positions, seed, step, latent_shape, num_timesteps, dropout)
        return dataclasses.replace(batch, **change(batch, num_timesteps, denoising.seeded(seed, 99, step)))

    return [(train_manga_lora, "draw_batch", draw_and_change)]


def uniform_timesteps() -> list:
    """Independent timesteps, instead of one from each n-th of the schedule."""
    import torch

    def timesteps(batch, count, generator):
        return {"timesteps": torch.randint(count, (len(batch),), generator=generator)}

    return redraw(timesteps)


def min_snr(gamma: float) -> list:
    """Min-SNR weighting (Hang et al. 2023), for noise prediction: min(SNR, gamma) / SNR."""
    import torch
    from diffusers import DDPMScheduler

    kept = DDPMScheduler.from_pretrained(ROOT / "demo" / "base" / "scheduler").alphas_cumprod
    weights = torch.clamp(gamma / (kept / (1 - kept)), max=1)
    return redraw(lambda batch, *_: {"loss_weights": batch.loss_weights * weights[batch.timesteps]})


def texts(packs: bool) -> list:
    """Draw only a face's captions, which come first, or only its packs (its only caption, if it has one)."""
    import train_manga_lora

    draw = train_manga_lora.draw_batch

    def draw_some(dataset, *arguments):
        dataset = copy.copy(dataset)
        single = [len(set(face.captions)) for face in dataset.faces]
        dataset.text_indices = [
            (indices[count:] or indices[-1:]) if packs else indices[:count]
            for indices, count in zip(dataset.text_indices, single, strict=True)
        ]
        return draw(dataset, *arguments)

    return [(train_manga_lora, "draw_batch", draw_some)]


def draw_often(word: str, times: float) -> list:
    """Not TF-IDF but an oracle: faces whose captions have this word are `times` as rare as others, before the clip."""
    import numpy as np

    import dataset

    def rarities(self):
        return np.array([times if word in " ".join(self.faces[face].captions) else 1.0 for face in self.train])

    return [(dataset.MangaFaceDataset, "_rarities", rarities)]


def mean_idf() -> list:
    """The weights of a former version: the mean over all words of a face's captions of how rare each is."""
    import numpy as np
    from sklearn.feature_extraction.text import TfidfVectorizer

    import dataset

    def rarities(self):
        vectorizer = TfidfVectorizer(stop_words="english", norm=None)
        found = vectorizer.fit_transform([" ".join(self.faces[face].captions) for face in self.train]) > 0
        return np.asarray(found @ vectorizer.idf_ / found.sum(axis=1).A1)

    return [(dataset.MangaFaceDataset, "_rarities", rarities)]


@dataclasses.dataclass(frozen=True)
class Row:
    """One change to the demo's training."""

    says: str
    constants: dict = dataclasses.field(default_factory=dict)
    rate: float = 1.0  # times the baseline's learning rate
    swap: Callable[[], list] = list


UNCLIPPED = {"weight_min": 0.1, "weight_max": 20.0}

ROWS = {
    "baseline": Row("nothing"),
    "weighting_off": Row("every face once per epoch", {"weighting": "off"}),
    "weighting_loss": Row("rarity acts on the loss, not on the drawing", {"weighting": "loss"}),
    "mean_idf": Row("weights by the mean over all words", swap=mean_idf),
    "flowers_x2": Row(
        "an oracle: faces with flowers get weight 2, the most there is", swap=lambda: draw_often("flowers", 4)
    ),
    "flowers_half": Row("every second face drawn has flowers", UNCLIPPED, swap=lambda: draw_often("flowers", 27)),
    "glasses_half": Row("every second face drawn has glasses", UNCLIPPED, swap=lambda: draw_often("glasses", 9)),
    "no_penalty": Row("penalty_factor 0", {"penalty_factor": 0.0}),
    "penalty_x10": Row("penalty_factor 1e-4", {"penalty_factor": 1e-4}),
    "no_decay": Row("no weight decay", {"min_weight_decay": 0.0, "max_weight_decay": 0.0}),
    "decay_x1e4": Row("weight decay 0.1 to 0.999", {"min_weight_decay": 0.1, "max_weight_decay": 0.999}),
    "no_dropout": Row("caption dropout off", {"caption_dropout": 0.0}),
    "uniform_timesteps": Row("independent timesteps", swap=uniform_timesteps),
    "min_snr_5": Row("min-SNR weighting, gamma 5", swap=lambda: min_snr(5.0)),
    "lora_plus_16": Row("LoRA+: B learns 16 times as fast as A", swap=lambda: lora_plus(16)),
    "lora_plus_16_slow": Row("the same, from an eighth of the rate", rate=1 / 8, swap=lambda: lora_plus(16)),
    "lr_x05": Row("learning rate x 0.5", rate=0.5),
    "lr_x2": Row("learning rate x 2", rate=2),
    "lr_x4": Row("learning rate x 4", rate=4),
    "rank_4": Row("rank 4, alpha 8", {"lora_rank": 4, "lora_alpha": 8}),
    "rank_32": Row("rank 32, alpha 64", {"lora_rank": 32, "lora_alpha": 64}),
    "rank_32_short": Row("the same, 7 epochs", {"lora_rank": 32, "lora_alpha": 64, "num_train_epochs": 7}),
    "no_penalty_short": Row("penalty_factor 0, 7 epochs", {"penalty_factor": 0.0, "num_train_epochs": 7}),
    "lr_x2_short": Row("learning rate x 2, 7 epochs", {"num_train_epochs": 7}, rate=2),
    "single_captions": Row("only single captions", swap=lambda: texts(packs=False)),
    "joined_captions": Row("only the joined captions", swap=lambda: texts(packs=True)),
    "joined_flowers_half": Row(
        "only the joined captions, every second face drawn has flowers",
        UNCLIPPED,
        swap=lambda: texts(packs=True) + draw_often("flowers", 27),
    ),
    "joined_glasses_half": Row(
        "only the joined captions, every second face drawn has glasses",
        UNCLIPPED,
        swap=lambda: texts(packs=True) + draw_often("glasses", 9),
    ),
}


# One run ---------------------------------------------------------------------------------------------------------


def train(row: str, seed: int, epochs: int, rate: float, folder: Path, **more) -> dict:
    """Train, `more` constants included (or go on, or find it done); summary.json with the losses of all epochs."""
    import train_manga_lora
    from training.checkpoint import load_newest_checkpoint
    from training.files import Stop

    constants = (
        train_manga_lora.DEMO
        | {
            "demo": True,
            "output_dir": str(folder),
            "seed": seed,
            "num_train_epochs": epochs,
            "sample_prompts": (),
            "early_stopping_patience": 0,
            "cache_dir": str(WORK / "cache"),
            "keep_checkpoints": 1,
            "learning_rate": rate * ROWS[row].rate,
        }
        | ROWS[row].constants
        | more
    )
    with ExitStack() as swapped:
        for module, name, new in ROWS[row].swap():
            swapped.enter_context(mock.patch.object(module, name, new))
        try:
            summary = train_manga_lora.main(train_manga_lora.TrainingConfig(**constants))
        except Stop as stop:  # no Exception, which a pool of processes would wait for in vain
            raise RuntimeError(f"{row}, seed {seed}: {stop}") from stop
    _, state, _ = load_newest_checkpoint(folder / "checkpoints")
    return summary | {"history": state["history"]}


EVALUATION = []  # of this process: the base's pictures and the faces are the same for all runs


def evaluation():
    """The demo's, but with more prompts that ask for attributes."""
    if not EVALUATION:
        import torch

        import train_manga_lora
        from dataset import MangaFaceDataset
        from evaluation import pictures
        from evaluation.score import Evaluation
        from training.base_model import load_tokenizer
        from training.bases import resolution_unit

        demo = train_manga_lora.DEMO | {
            "demo": True,
            "seed": SAMPLE_SEED,
            "sample_steps": SAMPLE_STEPS,
            "cache_dir": str(WORK / "cache"),
        }
        config = train_manga_lora.TrainingConfig(**demo)
        faces = MangaFaceDataset.from_config(config, resolution_unit(Path(config.pretrained_model)))
        faces.make_texts(load_tokenizer(Path(config.pretrained_model)))
        with mock.patch.object(pictures, "MAX_ATTRIBUTE_PROMPTS", ATTRIBUTE_PROMPTS):
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            EVALUATION.append(Evaluation(config, faces, Path(config.pretrained_model), device))
    return EVALUATION[0]


RENDERED = []  # of this process: latents, text states and noises of the new faces


def renders() -> list:
    """[latents (n, 4, h, w), text states (n, T, D), noises (4, n, 4, h, w)] of faces in no data set."""
    if not RENDERED:
        import numpy as np
        import torch
        from PIL import Image

        import train_manga_lora

        sys.path.insert(0, str(ROOT / "demo"))
        import draw_faces

        pipe, pixels, captions = evaluation().pipe, [], []
        side = train_manga_lora.DEMO["resolution"]
        for index in range(1001, 1001 + RENDERS):
            picture, sentences, _ = draw_faces.manga_face(index)
            pixels.append(np.asarray(picture.resize((side, side), Image.Resampling.LANCZOS).convert("RGB")))
            captions.append(", ".join(sentences))
        pictures = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2) / 127.5 - 1
        ids = pipe.tokenizer(captions, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
        with torch.no_grad():
            parts = pictures.to(pipe.vae.device, pipe.vae.dtype).split(20)
            means = torch.cat([pipe.vae.encode(part).latent_dist.mean for part in parts])
            states = pipe.text_encoder(ids.input_ids.to(pipe.text_encoder.device))[0]
        noises = torch.randn((4, *means.shape), generator=torch.Generator().manual_seed(0))
        all_three = (means * pipe.vae.config.scaling_factor, states, noises)
        RENDERED.extend(some.to(pipe.unet.device, pipe.unet.dtype) for some in all_three)
    return RENDERED


def loss_on_renders(lora: Path) -> float:
    """Mean squared error of the predicted noise on new faces, at 4 timesteps with the same noises for all runs."""
    import torch
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler.from_pretrained(ROOT / "demo" / "base" / "scheduler")
    (latents, states, noises), errors = renders(), []
    with torch.no_grad(), evaluation().wearing(lora):
        for timestep, noise in zip((125, 375, 625, 875), noises, strict=True):
            for some in torch.arange(RENDERS).split(25):
                steps = torch.full((len(some),), timestep, device=latents.device)
                noisy = scheduler.add_noise(latents[some], noise[some], steps)
                predicted = evaluation().pipe.unet(noisy, steps, states[some]).sample
                errors.append((predicted - noise[some]).float().square().mean().item())
    return statistics.fmean(errors)


def settings_of(epochs: int, rate: float) -> dict:
    """What runs must have in common to be compared: the demo's base, judge of attributes, prompts and faces, too."""
    from train_manga_lora import DEMO

    digest = hashlib.sha256()
    for folder in ("base", "attributes", "faces"):
        for file in sorted((ROOT / "demo" / folder).rglob("*.*")):
            digest.update(file.read_bytes())
    return {
        "epochs": epochs,
        "learning_rate": rate,
        "sample_steps": SAMPLE_STEPS,
        "guidance_scale": DEMO["guidance_scale"],
        "prompts": ATTRIBUTE_PROMPTS,
        "demo": digest.hexdigest()[:12],
    }


def run(job: tuple[str, int, int, float]) -> dict:
    """Train and score one row from one seed; a training that was interrupted goes on."""
    from bench_training import git_commit

    row, seed, epochs, rate = job
    started, folder = time.time(), WORK / f"{epochs}-epochs-{rate:g}" / f"{row}-seed{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "log.txt", "a", encoding="utf-8") as log, redirect_stdout(log), redirect_stderr(log):
        summary = train(row, seed, epochs, rate, folder / "run")
        score = evaluation().judge(Path(summary["lora_safetensors"]))
        renders_loss = loss_on_renders(Path(summary["lora_safetensors"]))
    shutil.rmtree(folder / "run")  # else a row that was changed would find it done
    accuracy = {
        name.removeprefix("adherence: "): (1 + value) / 2
        for name, value in score.value.items()
        if name.startswith("adherence: ")
    }
    parts = {name: score.value[f"points: {name}"] for name in ("style", "set distance", "coherence", "adherence")}
    return {
        "row": row,
        "seed": seed,
        "settings": settings_of(epochs, rate),
        "commit": git_commit(),
        "steps": summary["optimizer_steps"],
        "val_losses": [loss for _, loss, _ in summary["history"]],
        "renders_loss": renders_loss,
        "score": score.score,
        "parts": parts,
        "accuracy": accuracy,
        "known": statistics.fmean(value for name, value in accuracy.items() if name not in NEW),
        "seconds": round(time.time() - started),
    }


# The table -------------------------------------------------------------------------------------------------------


def steps_to(losses: list[float], target: float, steps: int) -> float:
    """Optimizer steps after which the validation loss first reaches `target`, between epochs linearly; inf if never."""
    per_epoch = steps / (len(losses) - 1)
    for epoch, (before, after) in enumerate(itertools.pairwise(losses)):
        if after <= target:
            return per_epoch * (epoch + (before - target) / (before - after))
    return math.inf


def summarize(results: list[dict]) -> list[dict]:
    """Per row and figure: mean over seeds, and mean and half the 95 % interval of the difference to the baseline."""
    base = {result["seed"]: result for result in results if result["row"] == "baseline"}
    rows = []
    for name in ROWS:
        runs = [result for result in results if result["row"] == name and result["seed"] in base]
        if not runs:
            continue
        line = {"row": name, "seeds": len(runs)}
        for figure, of in {
            "val_loss": lambda r: min(r["val_losses"][1:]),
            "renders_loss": lambda r: r["renders_loss"],
            "score": lambda r: r["score"],
            "flowers": lambda r: r["accuracy"]["flowers"],
            "glasses": lambda r: r["accuracy"]["glasses"],
            "known": lambda r: r["known"],
            "steps": lambda r: (
                steps_to(r["val_losses"], base[r["seed"]]["val_losses"][-1], r["steps"]) / base[r["seed"]]["steps"]
            ),
        }.items():
            pairs = [(of(result), of(base[result["seed"]])) for result in runs]
            values, differences = [own for own, _ in pairs], [own - other for own, other in pairs]
            known = [d for d in differences if math.isfinite(d)]
            reached, half = len(known) == len(pairs), math.nan  # by all
            if len(known) > 1:
                half = T_95[len(known) - 1] * statistics.stdev(known) / math.sqrt(len(known))
            line[figure] = {
                "mean": statistics.fmean(values) if reached else None,
                "difference": statistics.fmean(known) if reached else None,
                "half_interval": half if reached and math.isfinite(half) else None,
                "known": len(known),
            }
        rows.append(line)
    return rows


def results_table(content: dict) -> str:
    """A result file's content as markdown; docs/results.md holds it."""
    head = ["row", "what is changed", "seeds", "lowest validation loss", f"loss on {RENDERS} new faces"]
    head += ["score, 0 to 10", "flowers, %", "glasses, %", "known attributes, %", "steps to the baseline's loss"]
    lines = [head, ["---"] * len(head)]
    figures = (
        ("val_loss", 5, 1),
        ("renders_loss", 5, 1),
        ("score", 2, 1),
        ("flowers", 1, 100),
        ("glasses", 1, 100),
        ("known", 1, 100),
    )
    for row in summarize(content["runs"]):
        cells = []
        for figure, digits, unit in figures:
            cell = row[figure]
            text = f"{unit * cell['mean']:.{digits}f}"
            if row["row"] != "baseline":
                half = f" ± {unit * cell['half_interval']:.{digits}f}" if cell["half_interval"] is not None else ""
                text += f" ({unit * cell['difference']:+.{digits}f}{half})"
            cells.append(text)
        reached, by = row["steps"]["mean"], row["steps"]["known"]
        half = f" ± {row['steps']['half_interval']:.2f}" if row["steps"]["half_interval"] else ""
        never = f"by {by} of {row['seeds']}" if by else "never"
        cells.append(f"x {reached:.2f}{half}" if reached is not None else never)
        lines.append([row["row"], ROWS[row["row"]].says, str(row["seeds"]), *cells])
    settings = content["settings"]
    return (
        f"{content['device']}; {settings['epochs']} epochs from learning rate {settings['learning_rate']:g}; torch "
        f"{content['versions']['torch']}; {content['date']}, commit {', '.join(content['commits'])}:\n\n"
    ) + "\n".join("| " + " | ".join(line) + " |" for line in lines)


def parse_arguments(words: list[str]) -> argparse.Namespace:
    from train_manga_lora import DEMO

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", help="names, with commas; default: all, and always the baseline")
    parser.add_argument("--seeds", type=int, default=3, help="how many: 0, 1, 2, ...")
    parser.add_argument("--epochs", type=int, default=10, help="of each run; 10 is half of the demo's")
    parser.add_argument("--rate", type=float, default=DEMO["learning_rate"], help="the baseline's [the demo's]")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="runs at a time, one thread each")
    parser.add_argument("--out", type=Path, default=RESULT, help="default: bench/results/ablation/demo.json")
    parser.add_argument("--table", action="store_true", help="print the results as markdown and do nothing else")
    args = parser.parse_args(words)
    args.rows = args.rows.split(",") if args.rows else list(ROWS)
    for name in args.rows:
        if name not in ROWS:
            parser.error(f"--rows: {name!r} is not one of {', '.join(ROWS)}")
    if not 1 <= args.seeds <= 5:
        parser.error("--seeds must be 1 to 5")
    if args.epochs < 1 or args.processes < 1 or not 0 < args.rate < 1:
        parser.error("--epochs and --processes must be at least 1, --rate above 0 and below 1")
    args.rows = list(dict.fromkeys(["baseline", *args.rows]))  # what all others are compared with
    return args


def start_worker(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)


def write_results(path: Path, results: list[dict], settings: dict, **more) -> dict:
    """All runs so far, and of what they are; returns the file's content."""
    import torch
    from bench_training import describe_machine

    from training.files import write_atomic

    content = {
        "device": describe_machine("cuda" if torch.cuda.is_available() else "cpu")[0].partition(",")[0],
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers", "numpy")},
        "date": time.strftime("%Y-%m-%d"),
        "commits": sorted({result["commit"] for result in results}),
        "settings": settings,
        **more,
        "runs": results,
    }
    write_atomic(path, (json.dumps(content, indent=1) + "\n").encode())
    return content


def main(words: list[str]) -> None:
    args = parse_arguments(words)
    settings = settings_of(args.epochs, args.rate)
    results = json.loads(args.out.read_text(encoding="utf-8"))["runs"] if args.out.is_file() else []
    if args.table:
        print(
            results_table(json.loads(args.out.read_text(encoding="utf-8"))) if results else f"no results in {args.out}"
        )
        return
    if any(result.get("settings") != settings for result in results):
        raise SystemExit(f"{args.out} is not of {settings}: name another file with --out")
    done = {(result["row"], result["seed"]) for result in results}
    wanted = [(row, seed) for seed in range(args.seeds) for row in args.rows]
    jobs = [(row, seed, args.epochs, args.rate) for row, seed in wanted if (row, seed) not in done]
    threads = max(1, (os.cpu_count() or 1) // args.processes)
    with multiprocessing.get_context("spawn").Pool(args.processes, start_worker, (threads,)) as pool:
        for number, result in enumerate(pool.imap_unordered(run, jobs), start=1):
            results.append(result)
            results.sort(key=lambda result: (list(ROWS).index(result["row"]), result["seed"]))
            write_results(args.out, results, settings, summary=summarize(results))
            print(
                f"{time.strftime('%H:%M:%S')} {number}/{len(jobs)} {result['row']} seed {result['seed']}: "
                f"validation loss {min(result['val_losses'][1:]):.5f}, score {result['score']:.2f}, "
                f"flowers {result['accuracy']['flowers']:.3f}, glasses {result['accuracy']['glasses']:.3f}, "
                f"known {result['known']:.3f}, {result['seconds']} s",
                flush=True,
            )
        pool.close()
        pool.join()  # leaving the block would end the workers in mid-goodbye
    print(results_table(write_results(args.out, results, settings, summary=summarize(results))))


if __name__ == "__main__":
    main(sys.argv[1:])
