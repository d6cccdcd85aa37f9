"""A diffusers folder as the single file that UIs use: the original names of Stable Diffusion 1's tensors."""

import re
from pathlib import Path

import torch
from safetensors.torch import load_file

RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0"}
RESNET |= {"conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
OUTER = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"}
OUTER |= {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
MIDDLE = {"resnets.0": "0", "attentions.0": "1", "resnets.1": "2"}
VAE = {"conv_norm_out": "norm_out", "conv_shortcut": "nin_shortcut", "group_norm": "norm", "to_q": "q", "to_k": "k"}
VAE |= {"to_v": "v", "to_out.0": "proj_out", "mid_block.resnets.0": "mid.block_1", "mid_block.resnets.1": "mid.block_2"}
VAE |= {"mid_block.attentions.0": "mid.attn_1", "downsamplers.0.conv": "downsample.conv", "resnets": "block"}
VAE |= {"upsamplers.0.conv": "upsample.conv"}


def unet_name(name: str, with_attention: set[int]) -> str:
    """with_attention: numbers of the up blocks that have it."""
    for old, new in OUTER.items():
        if name.startswith(old + "."):
            return new + name.removeprefix(old)
    if match := re.fullmatch(r"mid_block\.(\w+\.\d)\.(.*)", name):
        place, rest = f"middle_block.{MIDDLE[match[1]]}", match[2]
    else:
        side, block, kind, number, rest = re.fullmatch(r"(down|up)_blocks\.(\d)\.(\w+)\.(\d)\.(.*)", name).groups()
        block, number = int(block), int(number)
        if kind == "downsamplers":
            return f"input_blocks.{3 * block + 3}.0.{rest.replace('conv', 'op')}"
        if kind == "upsamplers":
            return f"output_blocks.{3 * block + 2}.{2 if block in with_attention else 1}.{rest}"
        first = f"input_blocks.{3 * block + number + 1}" if side == "down" else f"output_blocks.{3 * block + number}"
        place = f"{first}.{1 if kind == 'attentions' else 0}"
    part, _, end = rest.rpartition(".")
    return f"{place}.{RESNET.get(part, part)}.{end}"


def vae_name(name: str, blocks: int) -> str:
    for old, new in VAE.items():
        name = name.replace(old, new)
    name = name.replace("down_blocks", "down")
    return re.sub(r"up_blocks\.(\d)", lambda match: f"up.{blocks - 1 - int(match[1])}", name)


def original_layout(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of the base in a diffusers folder, under the names of the original checkpoints."""
    unet = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    vae = load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
    text = load_file(folder / "text_encoder" / "model.safetensors")
    with_attention = {int(name.split(".")[1]) for name in unet if name.startswith("up_") and "attentions" in name}
    blocks = 1 + max(int(name.split(".")[2]) for name in vae if name.startswith("decoder.up_blocks"))
    tensors = {f"model.diffusion_model.{unet_name(name, with_attention)}": value for name, value in unet.items()}
    for name, value in vae.items():
        is_linear = "attentions" in name and value.ndim == 2  # attention's projections were convolutions
        tensors[f"first_stage_model.{vae_name(name, blocks)}"] = value[:, :, None, None] if is_linear else value
    for name, value in text.items():  # from transformers 5 on without text_model
        tensors[f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}"] = value
    return {name: value.contiguous() for name, value in tensors.items()}
