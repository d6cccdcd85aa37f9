"""The parts of the base model, loaded one at a time from its diffusers folder, which training/bases.py has found.

diffusers and transformers are imported where they are needed: together they cost seconds.
"""

from pathlib import Path

import torch

from training.bases import BaseModelError, reason, variant_of
from training.memory import is_out_of_memory


def _load(kind, folder: Path, **options):
    """kind.from_pretrained(folder); a part that is there but can't be loaded is the user's to replace.

    A `.bin` is a pickle: both libraries read it with `weights_only=True`, which runs no code from it.
    """
    is_model = issubclass(kind, torch.nn.Module)
    options |= {"local_files_only": True}
    try:
        options |= {"output_loading_info": True, "variant": variant_of(folder)} if is_model else {}
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
        why = f"can't be loaded ({reason(error)[:200]})"
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


def load_tokenizer(base: Path):
    """The base's tokenizer: a base is also what find_configs() returns. Raises BaseModelError: it is damaged."""
    from transformers import CLIPTokenizer

    tokenizer = _load(CLIPTokenizer, base / "tokenizer")
    if len(tokenizer) < 3:  # transformers makes up an empty one for want of files
        raise BaseModelError(f"the base's {base / 'tokenizer'} lacks its vocabulary: get the base again")
    return tokenizer


def unet_without_weights(base: Path):
    """The UNet of the base's config, on no device: its layers' names and shapes. Raises BaseModelError."""
    from diffusers import UNet2DConditionModel

    try:
        with torch.device("meta"):
            return UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(base / "unet"))
    except Exception as error:  # whatever a damaged config makes diffusers raise
        why = f"makes no UNet ({reason(error)[:200]})"
        raise BaseModelError(f"the base's {base / 'unet' / 'config.json'} {why}: get the base again") from None


def load_unet(base: Path, device: torch.device, dtype: torch.dtype):
    """(UNet in `dtype`, the noise schedule it was trained with). Raises BaseModelError: they are damaged."""
    from diffusers import DDPMScheduler, UNet2DConditionModel

    unet = _load(UNet2DConditionModel, base / "unet", dtype=dtype)
    scheduler = _load(DDPMScheduler, base / "scheduler", clip_sample=False)  # SD's own setting; some bases omit it
    return unet.to(device), scheduler
