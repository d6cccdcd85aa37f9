"""Which base is meant, where it lies, and whether it can be trained: told from its configs, before weights are fetched.

A base is a hub id, a diffusers folder, or a single file as UIs use it, which diffusers converts once.
"""

import dataclasses
import hashlib
import json
import re
from pathlib import Path

from training.files import InputError, rename_with_retries, temporary_beside

SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
MIRRORS = {"runwayml/stable-diffusion-v1-5": SD15}  # the former was deleted
CONFIGS = [f"{part}/config.json" for part in ("unet", "vae", "text_encoder")]  # what every base has
CONFIGS += ["tokenizer/tokenizer_config.json", "scheduler/scheduler_config.json"]
SMALL = ["model_index.json", "*/*config.json", "tokenizer/*"]  # what is fetched first: 2 MB for SD1.5
WEIGHTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "(?:pytorch_)?model"}
UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer."  # in a single file
WIDTHS = {1024: "Stable Diffusion 2", 1280: "Stable Diffusion XL's refiner", 2048: "Stable Diffusion XL"}  # of texts
SINGLE, PIECE = (".safetensors", ".ckpt"), re.compile(r"-\d{5}-of-\d{5}")
NEEDED = "this program needs Stable Diffusion 1.5, or what was made from it, with its text encoder and VAE"


class BaseModelError(InputError):
    """The base can't be had or used; the message says what to change."""


class Unreachable(BaseModelError):
    """It is not on this machine and can't be downloaded."""


def use_mirror(config, log):
    """The config, with the mirror's name in it if its base is gone from the hub."""
    if mirror := MIRRORS.get(config.pretrained_model):
        log(f"The original repository is gone from the hub; using its mirror {mirror}")
        config = dataclasses.replace(config, pretrained_model=mirror)
    return config


def find_configs(pretrained_model: str, is_optional: bool = False) -> Path | None:
    """A folder with the base's configs and tokenizer, checked; of a hub id they are fetched, 2 MB, but no weights.

    A single file comes with those that lie around it as in a diffusers folder, else with SD 1.5's. is_optional: None
    instead of Unreachable.

    Raises:
        Unreachable: neither on this machine nor to be downloaded.
        BaseModelError: it is something else than a base of SD 1.5's kind, or parts are missing, damaged or at odds; in
            a folder the weights, too.
    """
    wanted, folder = f"pretrained_model={pretrained_model!r}", Path(pretrained_model)
    file = single_file(pretrained_model)
    tensors = _header(file, wanted) if file else {}
    if file and (kind := _kind_of_file(tensors)):
        raise BaseModelError(f"{wanted} is {kind}: {NEEDED}")
    try:
        if file:
            folder = _sd15_configs(wanted) if _missing(file.parent) else file.parent
        elif not folder.is_dir():
            folder = _fetch(pretrained_model, SMALL)
    except Unreachable:
        if is_optional:
            return None
        raise
    _check_configs(folder, wanted)
    if file:
        _compare(tensors, folder, wanted)
    elif folder == Path(pretrained_model):
        check_weights(folder)
    return folder


def find_base(pretrained_model: str, cache_dir: str | Path, log=print) -> Path:
    """The base as a local diffusers folder, with its weights: downloaded, or converted into `cache_dir`, once.

    Raises BaseModelError: see find_configs(); or its weights are missing, damaged or in eight bits.
    """
    configs, file = find_configs(pretrained_model), single_file(pretrained_model)
    if file:
        return _convert(file, configs, Path(cache_dir), log)
    if not Path(pretrained_model).is_dir():
        from huggingface_hub import HfApi

        try:
            names = HfApi().list_repo_files(pretrained_model)
        except Exception:  # no network: what is in the cache has to do
            names = [str(path.relative_to(configs)) for path in configs.glob("*/*")]
        configs = _fetch(pretrained_model, SMALL + [file for part in WEIGHTS for file in _weights(part, names)])
        check_weights(configs)
    return configs


def single_file(pretrained_model: str) -> Path | None:
    """The checkpoint that is meant: by its name, or as the only one in a folder that is no diffusers folder.

    Raises BaseModelError: it isn't there, or the folder holds several.
    """
    path, wanted = Path(pretrained_model), f"pretrained_model={pretrained_model!r}"
    if path.is_file() and path.suffix.lower() not in SINGLE:
        kinds = f"{' or '.join(SINGLE)} file, a diffusers folder or a hub id"
        raise BaseModelError(f"{wanted} is a {path.suffix or 'nameless'} file: a base is a {kinds}")
    files = []
    if path.suffix.lower() in SINGLE and not path.is_dir():
        if not path.is_file():
            raise BaseModelError(f"{wanted} is not there: correct the path")
        files = [path]
    elif path.is_dir() and not (path / "unet").is_dir() and not (path / "model_index.json").is_file():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in SINGLE)
    if any(PIECE.search(file.stem) for file in files):
        raise BaseModelError(f"{wanted} is one model in pieces: get it in one file, or as a diffusers folder")
    if len(files) > 1:
        names = ", ".join(file.name for file in files[:3]) + (", ..." if len(files) > 3 else "")
        raise BaseModelError(f"{wanted} holds {len(files)} checkpoints ({names}): name one of them")
    return files[0] if files else None


def about(pretrained_model: str) -> str:
    """What kind of thing the base is, for the screen."""
    if file := single_file(pretrained_model):
        return f"Base: {file.name}, a single file"
    where = "a diffusers folder" if Path(pretrained_model).is_dir() else "from the Hugging Face hub"
    return f"Base: {pretrained_model}, {where}"


def schedule_of(pretrained_model: str, base: Path, declared: str) -> str:
    """The file in which to change what the base is declared to predict; of a converted one, that from which it came."""
    file, schedule = single_file(pretrained_model), CONFIGS[4]
    if file is None:
        return str(base / schedule)
    if not _missing(file.parent) and read_config(file.parent / schedule).get("prediction_type", "epsilon") == declared:
        return str(file.parent / schedule)
    return f"{base / schedule} (the converted copy of {file.name}, which must stay there)"


def read_config(path: Path) -> dict:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")).items())
    except (OSError, ValueError, AttributeError, RecursionError):
        raise BaseModelError(f"the base's {path} is damaged: get the base again") from None


def reason(error) -> str:
    """The first sentence of an exception's message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].split(". ")[0]


def _fetch(name: str, patterns: list[str]) -> Path:
    """Files of a hub's repository, in the hub's own cache. Raises Unreachable; BaseModelError: no such id can be."""
    from huggingface_hub import errors, snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # the hub's client raises a dozen kinds
        kind, why = Unreachable, " and can't be downloaded"
        if isinstance(error, errors.HFValidationError):
            kind, why = BaseModelError, ", nor a hub id"
        why = f"pretrained_model={name!r} is no local file or folder{why} ({reason(error)})"
        raise kind(f"{why}: name a diffusers folder or a .safetensors file, or try --demo") from None


def _missing(folder: Path) -> list[str]:
    """What a folder lacks of the small files that a conversion needs."""
    is_whole = (folder / "tokenizer" / "tokenizer.json").is_file()  # which holds what is in these two
    vocabulary = [] if is_whole else ["tokenizer/vocab.json", "tokenizer/merges.txt"]
    return [file for file in ["model_index.json", *CONFIGS, *vocabulary] if not (folder / file).is_file()]


def _sd15_configs(wanted: str) -> Path:
    why, missing = "", ["the configs and the tokenizer"]
    try:
        folder = _fetch(SD15, SMALL)
        if not (missing := _missing(folder)):
            return folder
    except Unreachable as error:
        why = f" ({reason(error.__context__)})"
    remedy = f'where there is a network, type: hf download {SD15} --include "*.json" --include "tokenizer/*"'
    files = ", ".join(missing)
    raise Unreachable(f"{wanted} is a single file, for which {files} of {SD15} can't be downloaded{why}: {remedy}")


# What can be trained ---------------------------------------------------------------------------------------------


def whole_number(folder: Path, file: str, name: str, default=None) -> int:
    """From a config of the base. Raises BaseModelError: it isn't above 0."""
    value = read_config(folder / file).get(name, default)
    if type(value) is not int or value < 1:
        raise BaseModelError(f"the base's {folder / file} has {name}={value!r}: get the base again")
    return value


def _kind(width: int, channels: int) -> str | None:
    """What a UNet is that can't be trained here; width: of the texts it reads."""
    if width in WIDTHS:
        return f"{WIDTHS[width]} (its UNet reads texts {width} wide, SD 1.5's 768)"
    if channels != 4:
        return f"{'an inpainting model' if channels == 9 else 'no text-to-image model'} ({channels} input channels)"
    return None


def _check_configs(folder: Path, wanted: str) -> None:
    """Raises BaseModelError: these are not the configs of a base of SD 1.5's kind, whole and of one piece."""
    file, limit = CONFIGS[0], "tokenizer/tokenizer_config.json"
    if (folder / file).is_file():
        width = whole_number(folder, file, "cross_attention_dim", 1280)
        if kind := _kind(width, whole_number(folder, file, "in_channels", 4)):
            raise BaseModelError(f"{wanted} is {kind}: {NEEDED}")
    for lacking in CONFIGS:
        if not (folder / lacking).is_file():
            index = folder / "model_index.json"
            kind = read_config(index).get("_class_name") if index.is_file() else None
            of = f" of SD 1.5's kind (it is a {kind})" if kind not in (None, "StableDiffusionPipeline") else ""
            raise BaseModelError(f"{wanted} is no diffusers folder{of}: it lacks {Path(lacking)}; {NEEDED}")
        read_config(folder / lacking)
    resolution_unit(folder)
    text, encoder = whole_number(folder, CONFIGS[2], "hidden_size", 512), Path("text_encoder")
    if text != width:
        why = f"{encoder} makes texts {text} wide, and its UNet reads them {width} wide"
        raise BaseModelError(f"{wanted} has parts of two models: {why}: get the base again")
    tokens, room = read_config(folder / limit).get("model_max_length"), 77
    room = whole_number(folder, CONFIGS[2], "max_position_embeddings", room)
    if type(tokens) is not int or not 3 <= tokens <= room:
        why = f"so texts would overrun its text encoder: set it to {room}, or get the base again"
        raise BaseModelError(f"the base's {folder / limit} has model_max_length={tokens!r}, {why}")
    schedule = folder / CONFIGS[4]
    if (kind := read_config(schedule).get("prediction_type", "epsilon")) not in ("epsilon", "v_prediction"):
        raise BaseModelError(f"the base's {schedule} has prediction_type={kind!r}: {NEEDED}")


def resolution_unit(base: Path | None) -> int:
    """What a picture's sides must be multiples of, to survive every halving of the VAE and the UNet.

    None: SD1.5's, 64.
    """
    halvings = 0 if base else 6
    for part in ("vae", "unet") if base else ():
        path = base / part / "config.json"
        blocks = read_config(path).get("block_out_channels")
        if not isinstance(blocks, list) or not blocks:
            raise BaseModelError(f"the base's {path} has block_out_channels={blocks!r}: get the base again")
        halvings += len(blocks) - 1
    return 2**halvings


def check_fits(config, base: Path | None) -> None:
    """Raises BaseModelError: the base can't draw at this resolution, or its text encoder has no such clip_skip."""
    unit, resolution = resolution_unit(base), config.resolution
    if base and (resolution % unit or resolution < 2 * unit):  # attention over one token has nothing to choose from
        near = max(2, round(resolution / unit)) * unit
        rule = f"a multiple of {unit}, at least {2 * unit}, for this base"
        raise BaseModelError(f"resolution={resolution} must be {rule} (try {near})")
    layers = whole_number(base, CONFIGS[2], "num_hidden_layers", 12) if base else 12
    if config.clip_skip > layers:
        why = f"must be at most {layers}, the layers of this base's text encoder"
        raise BaseModelError(f"clip_skip={config.clip_skip} {why}")


# Weights ---------------------------------------------------------------------------------------------------------


def _weights(part: str, names: list[str]) -> list[str]:
    """The files of a part's weights to read, of those there: safetensors before a pickle, plain before fp16.

    That is one file, or an index and its pieces. Of both diffusers reads the index, transformers the file.
    """
    found = []
    for name in names:
        pattern = rf"{part}/({WEIGHTS[part]})(\.\w+)?\.(safetensors|bin)(\.index(\.\w+)?\.json)?"
        if match := re.fullmatch(pattern, name):
            stem, variant, kind, index = match[1], match[2] or match[5] or "", match[3], match[4]
            piece = rf"{part}/{stem}({variant})?-\d+-of-\d+({variant})?\.{kind}"
            pieces = [other for other in names if index and re.fullmatch(piece, other)]
            order = (kind == "bin", variant != "", variant != ".fp16", bool(index) == (part == "text_encoder"))
            found.append((*order, [name, *pieces]))
    return min(found)[-1] if found else []


def variant_of(folder: Path) -> str | None:
    """The `variant` under which diffusers finds the weights in a part's folder, "fp16" of model.fp16.safetensors."""
    files = _weights(folder.name, [f"{folder.name}/{path.name}" for path in folder.iterdir()])
    parts = set(Path(files[0]).name.split(".")[1:]) if files else set()
    return next(iter(parts - {"safetensors", "bin", "index", "json"}), None)


def check_weights(base: Path) -> None:
    """A look at the weights' headers. Raises BaseModelError: some are missing, damaged, or in eight bits."""
    for part in WEIGHTS:
        files = _weights(part, [f"{part}/{path.name}" for path in (base / part).iterdir()])
        if files and files[0].endswith(".json"):
            pieces = read_config(base / files[0]).get("weight_map")
            files = sorted({f"{part}/{file}" for file in pieces.values()} if isinstance(pieces, dict) else ())
        if not files:
            raise BaseModelError(f"the base's {base / part} has no weights: get the base again")
        for file in files:
            _header(base / file, f"the base's {base / file}")


def _header(file: Path, what: str) -> dict[str, tuple[tuple, str]]:
    """{name: (shape, dtype)} of the tensors in a file, safetensors or a pickle, of which nothing is run.

    What else a pickle holds has the dtype "". Raises BaseModelError: it can't be read, or trained on.
    """
    import torch  # here and below: the script's flags are checked before the seconds that this takes
    from safetensors import safe_open

    from lora_layers import read_pickle

    is_pickle = file.suffix.lower() != ".safetensors"
    try:
        if is_pickle:
            content = read_pickle(file)
        else:
            with safe_open(file, "pt") as opened:
                slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
                tensors = {name: (tuple(part.get_shape()), part.get_dtype().lower()) for name, part in slices.items()}
    except Exception as error:  # whatever a damaged or hostile file makes the two parsers raise
        why, remedy = f"cut short or no safetensors file ({reason(error)[:80]})", "get the base again"
        if is_pickle:
            why, remedy = "damaged, or holds more than weights, which was not run", f"{remedy}, as .safetensors"
        raise BaseModelError(f"{what} can't be loaded: it is missing, {why}: {remedy}") from None
    if is_pickle:
        if not isinstance(content, dict):
            raise BaseModelError(f"{what} holds a {type(content).__name__}, but no weights by name: get the base again")
        tensors = {str(name): ((), "") for name in content}
        for name, value in content.items():
            if torch.is_tensor(value):
                tensors[str(name)] = (tuple(value.shape), str(value.dtype).removeprefix("torch."))
    for name, (_, kind) in tensors.items():
        if name.endswith(("weight", "bias")) and kind and not re.fullmatch("b?f(loat)?(16|32|64)", kind):
            kind = "fp8" if "f8" in kind or "float8" in kind else kind
            raise BaseModelError(f"{what} is in {kind}, too coarse to train on: get its fp16 version")
    return tensors


# Single files ----------------------------------------------------------------------------------------------------


def _kind_of_file(tensors: dict) -> str | None:
    """What a single file is that is no base of SD 1.5's kind; None if it is one."""

    def some(*parts: str) -> bool:
        return any(part in name for name in tensors for part in parts)

    if some("hada_w", "lokr_", "oft_", "boft_", "dora_scale"):
        return "a LyCORIS network or a DoRA"
    if some("lora_", ".lora"):
        return "a LoRA, which start_from goes on from"
    if some("emb_params", "string_to_param") or set(tensors) == {"clip_g", "clip_l"}:
        return "a textual inversion, an embedding"
    if some("joint_blocks.", "double_blocks.", "single_blocks."):
        return "a model of another kind (SD 3, Flux or alike)"
    if some("control_model.", "controlnet"):
        return "a ControlNet"
    if not some(UNET):
        is_vae = some("decoder.up.", "decoder.up_blocks.")
        alone = "a VAE alone" if is_vae else "a UNet alone" if some("down_blocks.", "input_blocks.") else None
        return alone or "no Stable Diffusion checkpoint"
    if kind := _kind(*_shape_of_unet(tensors)[:2]):
        return kind
    lacking = [name for name, part in {"text encoder": TEXT, "VAE": VAE}.items() if not some(part)]
    return f"a checkpoint without {' and '.join(lacking)}" if lacking else None


def _shape_of_unet(tensors: dict) -> tuple[int, int, int]:
    """(width of the texts it reads, input channels, channels of its first block); 0 for what isn't there."""
    widths = [shape[-1] for name, (shape, _) in tensors.items() if name.startswith(UNET) and "attn2.to_k.w" in name]
    first, channels = (*tensors.get(f"{UNET}input_blocks.0.0.weight", ((), ""))[0], 0, 0)[:2]
    return max(widths, default=0), channels, first


def _compare(tensors: dict, configs: Path, wanted: str) -> None:
    """Raises BaseModelError: the checkpoint isn't what the configs say."""
    unet = read_config(configs / CONFIGS[0])
    said = (unet.get("cross_attention_dim"), unet.get("in_channels", 4), unet["block_out_channels"][0])
    if (found := _shape_of_unet(tensors)) != said:
        names = "text width, input channels, channels"
        raise BaseModelError(f"{wanted} has another UNet ({names}: {found}) than {configs} says ({said}): {NEEDED}")


def _convert(file: Path, configs: Path, cache_dir: Path, log) -> Path:
    """The checkpoint as a diffusers folder, in its own precision; made by diffusers' own loader, once.

    Raises BaseModelError: the loader can't read it.
    """
    digest, size = hashlib.sha256(), file.stat().st_size
    with open(file, "rb") as opened:  # of gigabytes a part has to do: two models differ throughout
        for start in range(0, size, max(2**20, size // 16)):
            opened.seek(start)
            digest.update(opened.read(2**20))
    for small in ("model_index.json", *CONFIGS):
        digest.update((configs / small).read_bytes())
    final = cache_dir / "bases" / f"{size}-{digest.hexdigest()[:32]}"
    if final.is_dir():
        return final
    import torch
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import logging
    from transformers.utils import logging as more_logging

    log(f"Converting {file.name} into {final}, once ...")
    logging.disable_progress_bar()
    more_logging.disable_progress_bar()
    tensors = _header(file, str(file))
    kind = tensors[f"{UNET}input_blocks.0.0.weight"][1]
    dtype = {"f16": torch.float16, "bf16": torch.bfloat16}.get(kind, getattr(torch, kind, torch.float32))
    options = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    options |= {"config": str(configs), "local_files_only": True, "torch_dtype": dtype}
    try:
        pipe = StableDiffusionPipeline.from_single_file(str(file), **options)
    except Exception as error:  # whatever it stumbles over
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
            raise
        raise BaseModelError(f"{file} can't be converted ({reason(error)[:200]}): get the base again") from None
    if "v_pred" in tensors:  # how such checkpoints say so, besides ztsnr
        pipe.scheduler.register_to_config(prediction_type="v_prediction", rescale_betas_zero_snr="ztsnr" in tensors)
    with temporary_beside(final) as folder:
        pipe.save_pretrained(folder)
        if not final.is_dir():  # another run was faster
            rename_with_retries(folder, final)
    return final
