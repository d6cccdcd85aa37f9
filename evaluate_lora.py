"""Score a LoRA: pictures of a fixed set of prompts and seeds, from base and LoRA, against the training faces.

    python evaluate_lora.py --lora demo_output                        a finished training, as it was scored at its end
    python evaluate_lora.py --lora demo_output/candidates/epoch-010   or a file or folder in it
    python evaluate_lora.py --lora theirs.safetensors --dataset_dir my_faces --pretrained_model their_base
    python evaluate_lora.py --lora run_a run_b theirs.safetensors     one table, on equal terms
    python evaluate_lora.py --lora demo_output --pictures FOLDER      pictures that you made with it, say in a UI

Any LoRA that diffusers can load will do: kohya's layout, with modules in the text encoder and elsewhere, too,
diffusers' own, PEFT's. Each is loaded into a fresh diffusers pipeline, so what is measured is what anybody gets from
it. Needs no download and no other model if the base is here. Faces, base and all other settings are those of the first
training among the paths, from its config.json; if there is none, those at the top of train_manga_lora.py. Flags go
over both. docs/how_it_works.md explains the table.
"""

import sys
from pathlib import Path

from training.files import InputError, Stop, read_object
from training.labels import run_start

if __name__ == "__main__":
    try:
        run_start()  # numpy can't be imported if SOURCE_DATE_EPOCH is no number
    except Stop as stop:
        print(f"evaluate_lora.py: {stop}", file=sys.stderr)
        sys.exit(stop.exit_code)

import numpy as np
import torch

import train_manga_lora as trainer
from dataset import MangaFaceDataset
from evaluation import compare
from evaluation.report import write_comparison
from evaluation.score import Evaluation
from train_manga_lora import DEMO, FORMER, TrainingConfig, check_config
from training.arguments import flag_parser, with_flags
from training.base_model import load_tokenizer
from training.bases import check_fits, find_base, find_configs, resolution_unit, single_file, use_mirror
from training.layouts import IMAGE_SUFFIXES
from training.lora_files import find_lora, read_lora
from training.memory import sparingly
from training.pictures import read_picture
from training.run import tune_for

# The constants that a score depends on, or that its making needs: these are flags here
SETTINGS = ("dataset_dir", "json_file", "pretrained_model", "clip_skip", "resolution", "framing", "trim_frames")
SETTINGS += ("trigger_word", "validation_share", "sample_prompts", "samples_per_prompt", "sample_steps")
SETTINGS += ("guidance_scale", "seed", "num_workers", "cache_dir", "demo")


def find_run(path: Path) -> Path | None:
    """The folder of the training that a path is or lies in: OUTPUT, OUTPUT/last, OUTPUT/candidates/epoch-010/a.bin."""
    if (path / "config.json").is_file():
        return path
    folders = list(path.absolute().parents)[:3]  # a config.json in them may be some other program's
    return next((folder for folder in folders if "constants" in read_object(folder / "config.json")), None)


def read_run(folder: Path, given: dict) -> tuple[TrainingConfig, str, Path | None]:
    """(config with the flags given, data fingerprint, base) of a training, checked: the file may be foreign.

    The base is None if a flag names another.
    Raises InputError: it is damaged, or names what isn't here any more.
    """
    file = folder / "config.json"
    run = read_object(file)
    try:
        prompts = tuple(run["constants"]["sample_prompts"])
        config = TrainingConfig(**FORMER | run["constants"] | {"sample_prompts": prompts})
        config = with_flags(config, given, DEMO if given.get("demo") else {})
        check_config(config)
        base = Path(run["base"])
    except Stop as stop:
        raise InputError(str(stop) if str(stop).split("=")[0] in given else f"{file}: {stop}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{file} is not that of a finished training ({error!r:.80}): train again") from None
    data, named = str(run.get("data")), config.pretrained_model
    is_named = given.keys() & {"pretrained_model", "demo"}
    # Nothing is downloaded at a file's word, but a single file may have to be converted again
    if is_named or (not base.is_dir() and Path(named).exists() and single_file(named)):
        return config, data, None
    if not base.is_dir():
        remedy = "name it as --pretrained_model, or train again, with --overwrite"
        raise InputError(f"{file}: base={run['base']!r} is no folder any more: {remedy}")
    return config, data, find_base(str(base), config.cache_dir)


def settings(paths: list[Path], given: dict) -> tuple[TrainingConfig, str | None, Path | None, str]:
    """(config, data fingerprint or None, base or None, whose they are): see the docstring at the top."""
    run = next((folder for folder in map(find_run, paths) if folder), None)
    if run:
        config, data, base = read_run(run, given)
        return config, None if given.keys() & {"dataset_dir", "json_file", "demo"} else data, base, str(run)
    config = with_flags(TrainingConfig(), given, DEMO)
    if "dataset_dir" not in given and not Path(config.dataset_dir).is_dir():
        remedy = "name the faces to hold it against, --dataset_dir FOLDER, and its base, --pretrained_model"
        raise InputError(f"--lora {paths[0]} lies in no training's folder: {remedy}")
    check_config(config)
    return use_mirror(config, print), None, None, "train_manga_lora.py"


def read_pictures(folder: Path) -> tuple[list, list[str], bool]:
    """(pixels, texts, whether these are prompts, from NAME.txt beside each NAME.png). Raises InputError."""
    if not folder.is_dir():
        raise InputError(f"--pictures {folder} is no folder: name one that holds pictures")
    pixels, texts = [], []
    for file in sorted(file for file in folder.iterdir() if file.name.lower().endswith(IMAGE_SUFFIXES)):
        try:
            pixels.append(np.asarray(read_picture(file)[0]))
            words = file.with_suffix(".txt")
            texts.append(words.read_text(encoding="utf-8").strip() if words.is_file() else None)
        except Exception as error:  # whatever a damaged picture makes its decoder raise
            raise InputError(f"{file} can't be read ({str(error)[:100]}): take it away") from None
    if len(pixels) < 2:
        raise InputError(f"--pictures {folder} holds {len(pixels)} pictures: two at least are needed")
    are_prompts = None not in texts
    return pixels, texts if are_prompts else [str(number) for number in range(len(texts))], are_prompts


def main(arguments: list[str]) -> None:
    parser = flag_parser(TrainingConfig, trainer.__file__, __doc__, SETTINGS)
    parser.names += ("lora", "to", "pictures")
    what = "a training's folder, a folder or file in it, or any LoRA's"
    parser.add_argument("--lora", nargs="+", required=True, type=Path, metavar="PATH", help=what)
    where = "folder for scores.json, before_after.png and, of several, comparison.html, which else goes into this one "
    where += "[a training's own, if it is scored alone and as it was]"
    parser.add_argument("--to", type=Path, metavar="FOLDER", help=where)
    drawn = "score these pictures instead, say of a UI, against that one training's faces; prompts from NAME.txt beside"
    parser.add_argument("--pictures", type=Path, metavar="FOLDER", help=drawn)
    given = vars(parser.parse_args(arguments))
    folder = given.pop("pictures")
    paths, to = list(dict.fromkeys(given.pop("lora"))), given.pop("to")
    if to is None and not given and len(paths) == 1 and (paths[0] / "config.json").is_file():
        to = paths[0]
    elif to and (to.is_file() or (to / "config.json").exists()):
        raise InputError(f"--to {to} is a file or a training's folder: choose another")

    # The files, the settings, the base's configs, the faces: what is wrong is said before any weights are downloaded
    drawn = read_pictures(folder) if folder else None
    if drawn and len(paths) > 1:
        raise InputError("--pictures are held against one training's faces: name one --lora")
    files = {str(path): find_lora(path) for path in paths}
    loras = {file: read_lora(file) for file in files.values()}
    config, data, base, whose = settings(paths, given)
    configs = base or find_configs(config.pretrained_model)
    check_fits(config, configs)
    dataset = MangaFaceDataset.from_config(config, resolution_unit(configs))
    if data not in (None, dataset.fingerprint):
        why = f"the faces or captions in {config.dataset_dir} have changed since the training"
        remedy = "put them back, or name those to hold it against, --dataset_dir FOLDER"
        raise InputError(f"--lora {whose}: {why}, so a score would mean nothing: {remedy}")
    base = base or find_base(config.pretrained_model, config.cache_dir)
    dataset.make_texts(load_tokenizer(base))
    print(f"Held against {len(dataset)} faces of {config.dataset_dir}, drawn on {base}; settings of {whose}")

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tune_for(device, len({face.shape for face in dataset.faces}))

    def judged(is_sparing: bool) -> tuple:
        evaluation = Evaluation(config, dataset, base, device, loras, is_sparing)
        if drawn:
            return evaluation, evaluation.judge_pictures(*drawn)
        return evaluation, {name: evaluation.judge(file) for name, file in files.items()}

    found = sparingly(judged, "scoring", device, print)
    if not found:
        raise Stop(3, "out of memory: close other programs, then run the same command again")
    evaluation, scored = found
    if drawn:
        print(evaluation.table(scored, evaluation.judge_held_out(), f"{folder.name[:20]} ({len(drawn[0])})"))
        print(f"Score: {scored}")
        return
    if len(scored) > 1:
        print(compare.table(evaluation, scored))
        if to:
            compare.write(to, evaluation, scored)
        runs = {name: find_run(file) for name, file in files.items()}
        page = write_comparison(to or Path(), evaluation, scored, runs, compare.ranking(scored))
        print(f"Side by side: {page}")
    else:
        (score,) = scored.values()
        print(evaluation.write(to, score) if to else evaluation.table(score, evaluation.judge_held_out()))
        print(f"Score: {score}{f'; pictures: {to}' if to else ''}")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a console that lacks a face's name's characters is no reason to stop
    try:
        main(sys.argv[1:])
    except (InputError, Stop, OSError) as error:
        print(f"evaluate_lora.py: {error}", file=sys.stderr)
        sys.exit(getattr(error, "exit_code", 2))
