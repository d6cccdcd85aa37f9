"""Score a finished LoRA: pictures of a fixed set of prompts and seeds, from base and LoRA, against the training faces.

    python evaluate_lora.py --lora demo_output

The exported file is loaded into a fresh diffusers pipeline, as a user would, so what is measured here is what anybody
gets from it; the live model of the training is not involved. Needs no download and no other model. Writes scores.json
and before_after.png beside the LoRA, and prints the table that docs/how_it_works.md explains.
"""

import argparse
import json
import sys
from pathlib import Path

from training.files import InputError, Stop
from training.labels import run_start

if __name__ == "__main__":
    try:
        run_start()  # numpy can't be imported if SOURCE_DATE_EPOCH is no number
    except Stop as stop:
        print(f"evaluate_lora.py: {stop}", file=sys.stderr)
        sys.exit(stop.exit_code)

import torch

from dataset import MangaFaceDataset
from evaluation.score import Evaluation
from train_manga_lora import FORMER, TrainingConfig, check_config
from training.base_model import load_tokenizer
from training.bases import find_base, resolution_unit
from training.checkpoint import LORA_FILES


def read_run(folder: Path) -> tuple[TrainingConfig, str, Path]:
    """(config, data fingerprint, base) of a finished training, checked as it checked them: the file may be foreign.

    Raises InputError: it is damaged, or names what isn't here any more.
    """
    file = folder / "config.json"
    try:
        run = json.loads(file.read_text(encoding="utf-8"))
        prompts = tuple(run["constants"]["sample_prompts"])
        config = TrainingConfig(**FORMER | run["constants"] | {"sample_prompts": prompts})
        check_config(config)
        base = Path(run["base"])
    except Stop as stop:
        raise InputError(f"{file}: {stop}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{file} is not that of a finished training ({error!r:.80}): train again") from None
    if not base.is_dir():  # nothing is downloaded at a file's word
        raise InputError(f"{file}: base={run['base']!r} is no folder any more: train again, with --overwrite")
    return config, str(run.get("data")), find_base(str(base), config.cache_dir)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lora", required=True, metavar="FOLDER", help="output folder of a finished training")
    folder = Path(parser.parse_args(arguments).lora)
    lora_file = folder / LORA_FILES[-1]
    if not (folder / "config.json").is_file() or not lora_file.is_file():
        raise InputError(f"--lora {folder} holds no finished training: run train_manga_lora.py first")
    config, data, base = read_run(folder)
    dataset = MangaFaceDataset.from_config(config, resolution_unit(base))
    if dataset.fingerprint != data:
        why = f"the faces or captions in {config.dataset_dir} have changed since the training"
        raise InputError(f"--lora {folder}: {why}, so a score would mean nothing: put them back")
    dataset.make_texts(load_tokenizer(base))
    evaluation = Evaluation(config, dataset, base, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    print(evaluation.write(folder, evaluation.judge(lora_file)))


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a console that lacks a face's name's characters is no reason to stop
    try:
        main(sys.argv[1:])
    except (InputError, OSError) as error:
        print(f"evaluate_lora.py: {error}", file=sys.stderr)
        sys.exit(2)
