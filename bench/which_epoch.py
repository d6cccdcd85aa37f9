"""Does the best epoch's choice hold? A run that overfits on purpose, and every few epochs scored with many pictures.

    python bench/which_epoch.py OUT --learning_rate 5e-3 --num_train_epochs 160
    python bench/which_epoch.py OUT --dataset_dir demo/other_faces --learning_rate 5e-3 --num_train_epochs 160

Trains on 8 of 16 faces of a data set (the demo's), at a rate and for as long as it takes to learn them by heart. Then
says which epoch the program exported, and draws and scores 256 pictures with the LoRA of each of five epochs. With
--timesteps 8 16 each validation is made with so many a face, too: would they choose another epoch?
"""

import argparse
import dataclasses
import json
import os
import shutil
import statistics
import sys
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

SCORED = 5  # epochs, evenly


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--dataset_dir", type=Path, default=ROOT / "demo" / "faces")
    parser.add_argument("--faces", type=int, default=16, help="half of them are held out [16]")
    parser.add_argument("--pictures", type=int, default=256, help="at least, for each score [256]")
    parser.add_argument("--timesteps", type=int, nargs="*", default=[], help="of each face, in more validations")
    args, rest = parser.parse_known_args()  # the rest is for the training

    import torch

    import train_manga_lora as trainer
    from dataset import MangaFaceDataset
    from evaluation import best_epoch, pictures
    from evaluation.score import Evaluation
    from training import denoising
    from training.bases import resolution_unit

    (listed,) = args.dataset_dir.glob("*.json")
    entries = json.loads(listed.read_text(encoding="utf-8"))
    args.out.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(args.out / "kept", ignore_errors=True)
    captions = args.out / "captions.json"
    captions.write_text(json.dumps(entries[: args.faces]), encoding="utf-8")
    words = ["--demo", "--dataset_dir", str(args.dataset_dir), "--json_file", str(captions)]
    words += ["--output_dir", str(args.out / "run"), "--cache_dir", str(args.out / "cache"), "--overwrite"]
    words += ["--validation_share", "0.5", "--early_stopping_patience", "0", "--sample_every_n_epochs", "0"]
    config = trainer.parse_arguments([*words, "--save_every_n_epochs", "0", *rest])

    every, keep = max(1, config.num_train_epochs // SCORED), trainer.keep_candidate

    def keep_some(folder, unet, labels, state, config) -> None:
        keep(folder, unet, labels, state, config)
        if state.epoch % every == 0:
            best_epoch.save_epoch(args.out / "kept" / f"epoch-{state.epoch:03d}", unet, labels, state)

    validate, curves = trainer.validate, {}

    def validate_often(*everything, **options):
        for count in (*args.timesteps, denoising.VALIDATION_STRATA):
            with mock.patch.object(denoising, "VALIDATION_STRATA", count):
                found = validate(*everything, **options)
            curves.setdefault(count, []).append(found[0])
        return found

    trainer.keep_candidate, trainer.validate = keep_some, validate_often
    summary = trainer.main(config)
    losses = {epoch: loss for epoch, loss, _ in summary["validation"]}
    own = curves[denoising.VALIDATION_STRATA][1:]  # the first is the base's
    for count, (_, *curve) in curves.items():
        same = f"its curve's correlation with the program's is {statistics.correlation(curve, own):.3f}"
        print(f"{count} timesteps a face: lowest validation loss at epoch {1 + curve.index(min(curve))}; {same}")
    chosen = summary["best_epoch"]

    pictures.MAX_CAPTIONS, pictures.MAX_ATTRIBUTE_PROMPTS = args.pictures, 0
    config = dataclasses.replace(config, sample_steps=10, sample_prompts=())
    base = Path(config.pretrained_model)
    evaluation = Evaluation(
        config, MangaFaceDataset.from_config(config, resolution_unit(base)), base, torch.device("cpu")
    )
    files = {int(folder.name.split("-")[1]): folder for folder in sorted((args.out / "kept").iterdir())}
    files |= {chosen: args.out / "run" / "candidates" / f"epoch-{chosen:03d}"}
    print(f"\n{summary['verdict']}\nChosen: epoch {chosen}, {summary['best_reason']}")
    print(f"Lowest validation loss: epoch {min(losses, key=losses.get)}\n")
    head = f"score of {evaluation.jobs.portraits} pictures (95 % interval)  coherence  novelty  ahead of the chosen"
    print(f"epoch  validation loss  {head}")
    scores = {}
    for epoch, folder in sorted(files.items(), key=lambda item: (item[0] != chosen, item[0])):
        file = folder / "pytorch_lora_weights.safetensors"
        score = evaluation.judge_portraits(file, evaluation.judge_portraits(file))
        low, high = score.interval("points: score")
        own = f"{score.score:5.2f} ({low:.2f} to {high:.2f}) of {score.maximum}"
        scores[epoch] = score
        ahead, errors = score.score - scores[chosen].score, [n for n in (1, 2) if score.beats(scores[chosen], n)]
        rest = f"{score.value['coherence']:.2f}  {score.value['novelty']:.2f}  {ahead:+.2f}"
        rest += "  <- chosen" if epoch == chosen else f", more than {errors[-1]} standard errors" if errors else ""
        print(f"{epoch:5d}  {losses[epoch]:15.4f}  {own}  {rest}", flush=True)


if __name__ == "__main__":
    main()
