"""Constants from the command line, and whether their values make sense. Standard library only: torch takes seconds."""

import argparse
import dataclasses
import difflib
import math
import re
from pathlib import Path

from training.files import Stop
from training.labels import run_start
from training.layouts import may_hold_captions

LORA_NAME = r"(?!(none|addams|con|prn|aux|nul|(com|lpt)[0-9¹²³]|.*pytorch_lora_weights)$)\w[\w-]{0,63}"
SHIPPED_JSON = "faces_dataset/modified_face_250.json"  # goes along with dataset_dir if that alone is edited


class FlagParser(argparse.ArgumentParser):
    """Raises Stop(2) at a bad flag, and names the one of `names` that may have been meant."""

    names: tuple[str, ...] = ()

    def error(self, message):
        unknown = re.search(r"unrecognized arguments: --([\w-]+)", message)
        near = difflib.get_close_matches(unknown[1].replace("-", "_"), self.names, 1) if unknown else []
        raise Stop(2, message + (f" (did you mean --{near[0]}?)" if near else "; --help lists all flags"))


def flag_parser(constants: type, script: str, description: str = "", names=None) -> FlagParser:
    """A parser with a flag for each constant, or for these `names` alone, which leaves out what isn't given.

    script: the file that declares the dataclass `constants`; its comments are the help texts, its docstring the
    program's if there is no other description.
    """
    source = Path(script).read_text(encoding="utf-8")
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", source, re.MULTILINE))
    description, layout = description or source.split('"""')[1], argparse.RawDescriptionHelpFormatter
    parser = FlagParser(description=description, formatter_class=layout, allow_abbrev=False)
    fields = [field for field in dataclasses.fields(constants) if names is None or field.name in names]
    parser.names = tuple(field.name for field in fields)
    for field in fields:
        kind = {"help": f"{comments[field.name]} [{field.default}]".replace("%", "%%"), "default": argparse.SUPPRESS}
        if field.type is bool:
            kind["action"] = argparse.BooleanOptionalAction
        elif isinstance(field.default, tuple):
            kind |= {"nargs": "*", "metavar": "PROMPT"}
        else:
            kind |= {"type": field.type, "metavar": field.type.__name__.upper()}
        parser.add_argument(f"--{field.name}", **kind)
    return parser


def with_flags(config, given: dict, demo: dict):
    """`config` with the flags that were given over `demo` (if it is asked for) over it."""
    if "sample_prompts" in given:
        given["sample_prompts"] = tuple(given["sample_prompts"])
    in_folder = lambda folder: {"json_file": str(Path(folder) / Path(config.json_file).name)}  # noqa: E731
    edited = in_folder(config.dataset_dir) if config.json_file == SHIPPED_JSON else {}  # dataset_dir alone
    if "dataset_dir" in given and "json_file" not in given:  # the caption file is looked for in the folder
        given |= in_folder(given["dataset_dir"])
    return dataclasses.replace(config, **(edited | (demo if given.get("demo", config.demo) else {}) | given))


def check_config(config) -> None:
    """All that can be known of a TrainingConfig before torch is imported.

    Raises Stop(2): naming the constant, its value and the rule.
    """

    def check(rule: str, is_good, *names: str) -> None:
        for name in names:
            if not is_good(getattr(config, name)):
                raise Stop(2, f"{name}={getattr(config, name)!r} must be {rule}")

    run_start()  # which the environment may spoil, and numpy would fail on it
    for field in dataclasses.fields(config):  # a flag's type was checked, a constant's edited in the file wasn't
        kinds = (float, int) if field.type is float else (type(field.default),)
        if isinstance(field.default, tuple):
            is_texts = lambda value: type(value) is tuple and all(type(text) is str for text in value)  # noqa: E731
            check("texts in brackets, each with a comma", is_texts, field.name)
        else:
            check(f"of type {kinds[0].__name__}", lambda value, kinds=kinds: type(value) in kinds, field.name)

    counts = ("train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "samples_per_prompt", "lora_rank")
    check("at least 1", lambda v: v >= 1, *counts, "lora_alpha", "sample_steps", "keep_checkpoints")
    counts = ("early_stopping_patience", "sample_every_n_epochs", "save_every_n_epochs", "num_workers", "keep_tags")
    check("0 or more", lambda v: v >= 0, *counts)
    factors = ("penalty_factor", "min_weight_decay", "max_weight_decay", "max_grad_norm")
    check("0 (off) or more, and finite", lambda v: 0 <= v < math.inf, *factors)
    check("at least min_weight_decay", lambda v: v >= config.min_weight_decay, "max_weight_decay")
    check("in [0, 2**32)", lambda v: 0 <= v < 2**32, "seed")
    check("at most 2048, which the file's float16 holds exactly", lambda v: v <= 2048, "lora_alpha")
    check("below 1", lambda v: v < 1, "max_weight_decay")
    check("in [1, 12]: 1 is the text encoder's last layer, 2 the one before", lambda v: 1 <= v <= 12, "clip_skip")
    check("a multiple of 8, for SD1.5 of 64", lambda v: v >= 8 and v % 8 == 0, "resolution")
    check("a hub id, a .safetensors or .ckpt file, or a diffusers folder", str.strip, "pretrained_model")
    check("above 0 and at most 1 (try 5e-5)", lambda v: 0 < v <= 1, "learning_rate")
    check("in [0, 1)", lambda v: 0 <= v < 1, "lr_warmup_ratio")
    check("in [0, 1]", lambda v: 0 <= v <= 1, "caption_dropout")
    check("in [0, 0.5]", lambda v: 0 <= v <= 0.5, "validation_share")
    check("in [1, 100)", lambda v: 1 <= v < 100, "guidance_scale")
    check("in (0, 1], as the weights' mean is 1", lambda v: 0 < v <= 1, "weight_min")
    check("at least 1, as the weights' mean is 1", lambda v: 1 <= v < math.inf, "weight_max")
    check('"sampling", "loss" or "off"', ("sampling", "loss", "off").__contains__, "weighting")
    rule = "up to 64 letters, digits, _ and -, but no name that A1111 (none, addams), Windows (con) or diffusers "
    rule += "(...pytorch_lora_weights) keeps for itself"
    check(rule, re.compile(LORA_NAME, re.IGNORECASE).fullmatch, "lora_name")
    check("at most 200 bytes, as files' names are limited", lambda v: len(v.encode()) <= 200, "lora_name")
    check("printable, and without blanks at its ends", lambda v: v.isprintable() and v == v.strip(), "trigger_word")
    check('"buckets" or "square"', ("buckets", "square").__contains__, "framing")
    check('"fp16", "bf16" or "no"', ("fp16", "bf16", "no").__contains__, "mixed_precision")
    check('"auto", "on" or "off"', ("auto", "on", "off").__contains__, "gradient_checkpointing")
    if not Path(config.dataset_dir).is_dir():
        remedy = "put your faces there, set dataset_dir at the top of train_manga_lora.py, or see it work first"
        command = "python train_manga_lora.py --demo"
        raise Stop(2, f"dataset_dir={config.dataset_dir!r} is not a folder: {remedy}: {command}")
    named, shipped = Path(config.json_file).name, Path(SHIPPED_JSON).name
    if Path(config.json_file).is_file() or Path(config.dataset_dir, named).is_file():
        return
    where = f"json_file={config.json_file!r} is not a file"
    if not may_hold_captions(config.dataset_dir):
        none = f"{config.dataset_dir} holds no image.txt, metadata.jsonl or 10_name folder either"
        raise Stop(2, f"{where}, and {none}: set json_file to your captions")
    if named != shipped:  # asked for, so nothing else will do
        other = f"or to {str(Path(config.dataset_dir, shipped))!r} for what is there"
        raise Stop(2, f"{where}: set json_file to your captions, {other}")
