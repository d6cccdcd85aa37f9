"""The base model on disk: a diffusers folder, found or downloaded, and its parts loaded one at a time.

diffusers and transformers are imported where they are needed: together they cost seconds.
"""

import dataclasses
import json
import pickle
from pathlib import Path

import torch

from training.files import InputError
from training.memory import is_out_of_memory

CONFIGS = [f"{part}/config.json" for part in ("unet", "vae", "text_encoder")]  # what every base has
CONFIGS += ["tokenizer/tokenizer_config.json", "scheduler/scheduler_config.json"]
FILES = ["model_index.json", "*/*config.json", "tokenizer/*", "text_encoder/model.safetensors"]  # what is downloaded:
FILES += [f"{part}/diffusion_pytorch_model.safetensors" for part in ("unet", "vae")]  # 4.3 GB for SD1.5, nothing twice
MIRRORS = {"runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5"}  # the former was deleted


class BaseModelError(InputError):
    """The base can't be had or used; the message says what to change."""


def use_mirror(config, log):
    """The config, with the mirror's name in it if its base is gone from the hub."""
    if mirror := MIRRORS.get(config.pretrained_model):
        log(f"The original repository is gone from the hub; using its mirror {mirror}")
        config = dataclasses.replace(config, pretrained_model=mirror)
    return config


def find_base(pretrained_model: str) -> Path:
    """The base as a local diffusers folder; a hub id is downloaded once, into the hub's own cache.

    Raises BaseModelError: neither a folder nor a repository that can be reached, or parts are missing or no JSON.
    """
    folder, wanted = Path(pretrained_model), f"pretrained_model={pretrained_model!r}"
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(pretrained_model, allow_patterns=FILES))
        except Exception as error:  # the hub's client raises a dozen kinds
            why = f"{wanted} is no local folder and can't be downloaded ({_reason(error)})"
            raise BaseModelError(f"{why}: name a diffusers folder, or try --demo") from None
    for file in map(Path, CONFIGS):
        if not (folder / file).is_file():
            raise BaseModelError(f"{wanted} is no diffusers folder: it lacks {file}")
        _read_config(folder / file)
    return folder


def _reason(error) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _read_config(path: Path) -> dict:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")).items())
    except (OSError, ValueError, AttributeError, RecursionError):
        raise BaseModelError(f"the base's {path} is damaged: get the base again") from None


def resolution_unit(base: Path) -> int:
    """What a picture's sides must be multiples of, to survive every halving of the VAE and the UNet: SD1.5's is 64."""
    halvings = 0
    for part in ("vae", "unet"):
        path = base / part / "config.json"
        blocks = _read_config(path).get("block_out_channels")
        if not isinstance(blocks, list) or not blocks:
            raise BaseModelError(f"the base's {path} has block_out_channels={blocks!r}: get the base again")
        halvings += len(blocks) - 1
    return 2**halvings


def find_unit(pretrained_model: str) -> int:
    """The base's resolution_unit() if it is on this machine and whole, else SD1.5's."""
    from huggingface_hub import try_to_load_from_cache

    base = Path(pretrained_model)
    try:
        if not base.is_dir():
            base = Path(try_to_load_from_cache(pretrained_model, "unet/config.json")).parent.parent
        return resolution_unit(base)
    except (BaseModelError, TypeError, ValueError):  # found out when it is needed
        return 64


def check_resolution(resolution: int, base: Path) -> None:
    """Every side must be a multiple of the base's unit, and leave the UNet's middle block more than one token.

    Raises BaseModelError: it isn't a multiple of 64 (SD1.5) or is below 128; names the nearest that will do.
    """
    unit = resolution_unit(base)
    if resolution % unit or resolution < 2 * unit:  # attention over a single token has nothing to choose from
        near = max(2, round(resolution / unit)) * unit
        rule = f"a multiple of {unit}, at least {2 * unit}, for this base"
        raise BaseModelError(f"resolution={resolution} must be {rule} (try {near})")


def check_clip_skip(clip_skip: int, base: Path) -> None:
    """Raises BaseModelError: the base's text encoder has no such layer."""
    layers = _read_config(base / "text_encoder" / "config.json").get("num_hidden_layers")
    if type(layers) is int and clip_skip > layers:
        raise BaseModelError(f"clip_skip={clip_skip} must be at most {layers}, the layers of this base's text encoder")


def _load(kind, folder: Path, **options):
    """kind.from_pretrained(folder); a part that is there but can't be loaded is the user's to replace.

    A `.bin` is a pickle: both libraries read it with `weights_only=True`, which runs no code from it.
    """
    is_model = issubclass(kind, torch.nn.Module)
    options |= {"local_files_only": True} | ({"output_loading_info": True} if is_model else {})
    try:
        part = kind.from_pretrained(folder, **options)
        if is_model:
            part, found = part
            if found["missing_keys"]:  # transformers would make them up
                raise ValueError(f"its weights lack {min(found['missing_keys'])}")
            for name, weight in part.named_parameters():
                if not weight.sum(dtype=torch.float32).isfinite():
                    raise ValueError(f"{name} is not finite")
        return part
    except Exception as error:  # whatever damaged or hostile files make the libraries raise
        if is_out_of_memory(error):
            raise
        if isinstance(error, pickle.UnpicklingError):
            error = "its .bin file holds more than weights, and was not run"
        why = f"can't be loaded ({_reason(error)[:200]})"
        raise BaseModelError(f"the base's {folder} {why}: get the base again") from None


def load_vae(base: Path, device: torch.device):
    """The autoencoder in float32: SD1.5's overflows in float16 on some pictures."""
    from diffusers import AutoencoderKL

    return _load(AutoencoderKL, base / "vae", dtype=torch.float32).to(device).eval().requires_grad_(False)


def load_text_encoder(base: Path, device: torch.device, clip_skip: int = 1):
    """(tokenizer, text encoder in float32), without the last clip_skip - 1 layers; its final layer norm stays.

    So do UIs, for negative prompts too; diffusers' own `clip_skip` doesn't for those, and fails with transformers 5.
    """
    from transformers import CLIPTextModel, CLIPTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    text_encoder = _load(CLIPTextModel, base / "text_encoder", dtype=torch.float32)
    layers = getattr(text_encoder, "text_model", text_encoder).encoder.layers  # the former up to transformers 4
    del layers[len(layers) + 1 - clip_skip :]
    return _load(CLIPTokenizer, base / "tokenizer"), text_encoder.to(device).eval().requires_grad_(False)


def find_tokenizer(pretrained_model: str):
    """The base's tokenizer if it is on this machine, else None: a report on the data must not start a download.

    Raises BaseModelError: a local base's tokenizer is damaged.
    """
    from transformers import CLIPTokenizer

    local = Path(pretrained_model, "tokenizer")
    if local.is_dir():
        tokenizer = _load(CLIPTokenizer, local)
    else:
        try:
            tokenizer = CLIPTokenizer.from_pretrained(pretrained_model, subfolder="tokenizer", local_files_only=True)
        except Exception:  # not here, or damaged: found out when it is needed
            return None
    limit = tokenizer.model_max_length
    if not isinstance(limit, int) or limit < 3:
        raise BaseModelError(f"the base's {local} has model_max_length={limit!r}: get the base again")
    return tokenizer if limit < 10_000 else None  # an empty one, made up for want of files


def load_unet(base: Path, device: torch.device, dtype: torch.dtype):
    """(UNet in `dtype`, the noise schedule it was trained with).

    Raises BaseModelError: the UNet predicts neither the noise nor v, or isn't a text-to-image one.
    """
    from diffusers import DDPMScheduler, UNet2DConditionModel

    unet = _load(UNet2DConditionModel, base / "unet", dtype=dtype)
    scheduler = _load(DDPMScheduler, base / "scheduler", clip_sample=False)  # SD's own setting; some bases omit it
    if scheduler.config.prediction_type not in ("epsilon", "v_prediction") or unet.config.in_channels != 4:
        raise BaseModelError(f"the base in {base} is not a Stable Diffusion 1.x or 2.x text-to-image model")
    return unet.to(device), scheduler
