"""A LoRA by whichever program, read and recognised: kohya's layout, diffusers' old and new ones, PEFT's.

file -> read_lora: {name: Part} -> fit: which layers of this base they are -> put_on: as diffusers does it itself
                                -> start_from: into the LoRA to be trained
"""

import json
import math
import re
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open

from lora_layers import inject_lora, lora_modules, read_pickle
from training.base_model import unet_without_weights
from training.files import InputError

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
# One end of a layer's LoRA: kohya's x.lora_down.weight; x.lora.down.weight, x.processor.to_q_lora.down.weight and
# x.lora_linear_layer.down.weight, diffusers'; PEFT's x.lora_A.weight and x.lora_A.default.weight
END = re.compile(r"(.+?)[._]lora[._](?:linear_layer\.)?(down|up|A|B)(?:\.default(?:_0)?)?\.weight")
# What other files hold: the start of a tensor's name -> what that is, and what to do with it
BASE = "a base model: name it as --pretrained_model"
PARTS = "first_stage_model|conv_in|down_blocks|mid_block|up_blocks|text_model|encoder|decoder|quant_conv"
OTHERS = {
    r"(model\.diffusion_model|cond_stage_model)\.": BASE,
    rf"({PARTS})\.": "part of a base model, a UNet, VAE or text encoder: name a LoRA",
    r"emb_params$|string_to_param|<": "an embedding (textual inversion): name a LoRA",
    r".*\.(hada|lokr|oft|boft)_": "a LyCORIS network other than a LoRA, which diffusers can't load: name a LoRA",
}
WIDTHS = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "SDXL"}  # of the text that attention reads


class Part(NamedTuple):
    """One layer's LoRA: W + alpha / rank * up @ down. Shape: (rank, in, ...), (out, rank, ...), in the file's dtype."""

    down: torch.Tensor
    up: torch.Tensor
    alpha: float


def find_lora(path: Path) -> Path:
    """The LoRA file that a path names: itself, or the one in a folder. Raises InputError: there is none, or several."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise InputError(f"--lora {path} is neither a file nor a folder here: download a LoRA of the hub first")
    names = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin", "adapter_model.safetensors")
    found = [path / name for name in (*names, "adapter_model.bin") if (path / name).is_file()]
    found = found[:1] or sorted(path.glob("*.safetensors"))
    if len(found) == 1:
        return found[0]
    if found:
        raise InputError(f"--lora {path} holds {len(found)} files: name one of them, such as {found[0]}")
    if (path / "model_index.json").is_file():
        raise InputError(f"--lora {path} is {BASE}")
    if (path / "config.json").is_file():
        remedy = "start it again, the same way, or name a folder in its candidates"
        raise InputError(f"--lora {path} holds a training that hasn't exported its LoRA yet: {remedy}")
    raise InputError(f"--lora {path} holds no LoRA file: name the file, or the folder of a training or a LoRA")


def read_lora(file: Path) -> dict[str, Part]:
    """The layers in a LoRA file, named as kohya does: lora_unet_... and lora_te_..., with _ for every dot.

    A pickle is read with `weights_only=True`, which runs no code from it. An alpha that isn't in the file is looked
    for where diffusers (the header) and PEFT (adapter_config.json) keep it; else it is the rank.

    Raises InputError: it can't be read, or holds something else, or more than diffusers would take of it.
    """
    tensors, header = _read(file)
    ends: dict[str, dict[str, torch.Tensor]] = {}
    alphas, rest = {}, []
    for key, tensor in tensors.items():
        if found := END.fullmatch(key):
            side = {"A": "down", "B": "up"}.get(found[2], found[2])
            ends.setdefault(found[1], {})[side] = tensor
        elif key.endswith(".alpha") and tensor.numel() == 1:
            alphas[key.removesuffix(".alpha")] = tensor.item()
        else:
            rest.append(key)
    rest += [f"{module}.alpha" for module in alphas.keys() - ends.keys()]
    if rest:
        why = "which diffusers leaves out or refuses: not only a LoRA; name a plain one"
        raise InputError(f"{file} holds {min(rest)!r:.100}, {why}")
    parts = {}
    for module, pair in ends.items():
        if pair.keys() != {"down", "up"}:
            raise InputError(f"{file}: {module!r:.100} has one half of its LoRA only: get the file again")
        try:
            down, up = (tensor if tensor.dtype in DTYPES else tensor.float() for tensor in (pair["down"], pair["up"]))
            alpha = float(alphas[module] if module in alphas else _noted_alpha(header, module, len(down)))
            finite = down.isfinite().all() and up.isfinite().all() and math.isfinite(alpha)
        except (TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise InputError(f"{file} can't be read as a LoRA ({str(error)[:100]!r}): get it again") from None
        if not finite:
            raise InputError(f"{file}: {module!r:.100} has values that are not finite: get it again, or train it again")
        parts[_name(module)] = Part(down, up, alpha)
    return parts


def _read(file: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """(tensors, what the file's header or the JSON beside it says of alphas), if it is a LoRA."""
    if file.suffix not in SUFFIXES:
        raise InputError(f"{file} is no LoRA file: one ends in {', '.join(SUFFIXES)}")
    header, tensors = {}, None
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as opened:  # the names first: it may be a base of gigabytes
                names, header = list(opened.keys()), opened.metadata() or {}
                if any(map(END.fullmatch, names)):
                    tensors = {name: opened.get_tensor(name) for name in names}
        else:
            content = read_pickle(file)
            if not isinstance(content, dict):
                raise ValueError(f"it holds a {type(content).__name__}, but no weights by name")
            names = list(map(str, content))
            if any(map(END.fullmatch, names)):  # copies, since Windows can't rename a mapped file
                tensors = {str(name): value.clone() for name, value in content.items() if torch.is_tensor(value)}
        if file.name.startswith("adapter_model"):
            header = json.loads(file.with_name("adapter_config.json").read_text(encoding="utf-8"))
        elif "lora_adapter_metadata" in header:
            header = json.loads(header["lora_adapter_metadata"])
    except Exception as error:  # whatever damaged files make their parsers raise
        reason = (str(error).splitlines() or [type(error).__name__])[0].removeprefix(f"{file}: ")[:200]
        raise InputError(f"{file} can't be read as a LoRA ({reason}): get it again") from None
    if tensors is None:
        what = next((what for start, what in OTHERS.items() for name in names if re.match(start, name)), None)
        what = what or (f"something else: its first tensor is {min(names)!r:.100}" if names else "empty")
        raise InputError(f"{file} is no LoRA, but {what}")
    return tensors, header if isinstance(header, dict) else {}


def _name(module: str) -> str:
    """A layer's name in the file as kohya would have it."""
    module = module.removeprefix("base_model.model.").replace(".processor.", ".")
    if module.startswith("lora_"):
        return re.sub("^lora_te1_", "lora_te_", module)
    part, _, path = module.partition(".")
    if part not in ("unet", "text_encoder", "text_encoder_2", "transformer"):  # PEFT's, or very old
        part, path = "text_encoder" if part in ("text_model", "encoder") else "unet", module
    if part == "text_encoder":  # and diffusers' old names for its attention
        path = re.sub(r"\.to_(q|k|v|out)$", r".\1_proj", path)
    part = {"unet": "unet", "text_encoder": "te", "text_encoder_2": "te2", "transformer": "transformer"}[part]
    return f"lora_{part}_{re.sub('[.]to_out$', '.to_out.0', path)}".replace(".", "_")


def _noted_alpha(header: dict, module: str, rank: int) -> float:
    """What PEFT's config says, which diffusers keeps with "unet." or "text_encoder." before each name."""
    path = module.removeprefix("base_model.model.")
    part, _, inner = path.partition(".")
    own = {key.removeprefix(f"{part}."): value for key, value in header.items() if key.startswith(f"{part}.")}
    own, path = (own, inner) if own else (header, path)
    path, patterns = path.removeprefix("text_model."), (own.get("alpha_pattern") or {}).items()
    ends = ((f".{name.lstrip('^').removeprefix('text_model.')}", of_some) for name, of_some in patterns)
    alpha = next((of_some for end, of_some in ends if f".{path}".endswith(end)), own.get("lora_alpha") or rank)
    return alpha * rank**0.5 if own.get("use_rslora") else alpha


def fit(file: Path, parts: dict[str, Part], unet, text_encoder) -> dict[str, dict[str, Part]]:
    """{"unet": {path of a layer: its LoRA}, "text_encoder": ...}, which put_on() takes.

    Layers that clip skip took from the text encoder have no effect, and are left out.
    Raises InputError: a layer isn't in this base, or has another shape there; diffusers would take the others.
    """

    def short(name: str) -> str:  # transformers 5 has no level text_model any more
        return name.replace("lora_te_text_model_", "lora_te_")

    width = unet.config.cross_attention_dim
    readers = [part.down for name, part in parts.items() if re.search("attn2_to_[kv]$", name)]  # of the text
    widths = {down.shape[1] for down in readers if down.ndim > 1} - {width}
    if widths or any(name.startswith("lora_te2_") for name in parts):
        own = max(widths, default=2048)
        kind = WIDTHS.get(own, "another model")
        raise InputError(f"{file} is for {kind}, whose text is {own} wide; this base's is {width}: name a base it fits")
    known = {}
    for prefix, model in (("unet", unet), ("te", text_encoder)):
        for path, layer in model.named_modules():
            if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d)):
                known[short(f"lora_{prefix}_{path.replace('.', '_')}")] = (prefix, path, layer.weight)
    fitted, strange = {"unet": {}, "text_encoder": {}}, []
    for name, (down, up, alpha) in parts.items():
        if short(name) not in known:
            layer = re.match(r"lora_te_encoder_layers_(\d{1,9})_", short(name))
            if not layer or int(layer[1]) >= text_encoder.config.num_hidden_layers:  # as many as there were
                strange.append(name)
            continue
        prefix, path, weight = known[short(name)]
        rank, kernel = (down.shape or [0])[0], weight.shape[2:]
        shapes = ((rank, *weight.shape[1:]), (weight.shape[0], rank, *(1 for _ in kernel)))
        if rank < 1 or down.numel() != torch.Size(shapes[0]).numel() or up.numel() != torch.Size(shapes[1]).numel():
            what = f"{list(up.shape)} x {list(down.shape)}, where this base has {list(weight.shape)}"
            raise InputError(f"{file} is for another model: {name!r:.100} is {what}: name a base it fits")
        part = Part(down.reshape(shapes[0]), up.reshape(shapes[1]), alpha)
        fitted["unet" if prefix == "unet" else "text_encoder"][path] = part
    if strange:
        counts = f"{len(strange)} of its {len(parts)} layers aren't in this base, the first is {strange[0]!r:.100}"
        raise InputError(f"{file} is for another model: {counts}: name a base it fits")
    return fitted


def put_on(pipe, fitted: dict[str, dict[str, Part]]) -> None:
    """Load what fit() made onto a StableDiffusionPipeline; pipe.unload_lora_weights() takes it off again."""
    for name, parts in fitted.items():
        state, alphas = {}, {}
        for path, part in parts.items():
            state |= {f"{name}.{path}.lora_A.weight": part.down, f"{name}.{path}.lora_B.weight": part.up}
            alphas[f"{name}.{path}.alpha"] = part.alpha
        if state:
            options = {"network_alphas": alphas, name: getattr(pipe, name), "low_cpu_mem_usage": True}
            getattr(pipe, f"load_lora_into_{name}")(state, _pipeline=pipe, **options)


def read_start(config, base: Path | None = None) -> dict[str, Part]:
    """The layers of the LoRA that start_from names, {} if it names none. base: a folder with the base's configs.

    Raises InputError: it can't be read, holds layers that aren't trained here, has another rank than lora_rank, or is
    for another model than the base.
    """
    file, where = Path(config.start_from), f"start_from={config.start_from!r}"
    if not config.start_from:
        return {}
    if not file.is_file():
        raise InputError(f"{where} is no file here: name the LoRA to go on from")
    try:
        parts = read_lora(file)
    except InputError as error:
        raise InputError(f"{where}{str(error).removeprefix(str(file))}") from None
    kinds = {"text-encoder": "lora_te", "feed-forward": ".*_ff_net_", "projection": ".*_proj_(in|out)$"}
    kinds |= {"convolution": ".*(_conv|resnets)"}
    strange = {kind: [name for name in parts if re.match(pattern, name)] for kind, pattern in kinds.items()}
    if found := [kind for kind, names in strange.items() if names]:
        what = f"{' and '.join(found)} modules ({sum(map(len, strange.values()))} of {len(parts)})"
        why = f"holds {what}, which this program doesn't train"
        raise InputError(f"{where} {why}: name a LoRA of the UNet's attention alone")
    ranks = sorted({(*part.down.shape, 0)[0] for part in parts.values()})
    if 0 in ranks:
        raise InputError(f"{where} is damaged, with layers of rank 0: get it again")
    if len(ranks) > 1:
        several = f"{', '.join(map(str, ranks[:-1]))} and {ranks[-1]}"
        raise InputError(f"{where} has ranks {several}; one rank is needed: name another file")
    if ranks[0] != config.lora_rank:
        why = f"has rank {ranks[0]}, and lora_rank is {config.lora_rank}"
        raise InputError(f"{where} {why}: set lora_rank={ranks[0]}, or name another file")
    if base:
        unet = unet_without_weights(base)
        inject_lora(unet, config.lora_rank)
        layers = lora_modules(unet)
        for name, (down, up, _) in parts.items():
            layer = layers.get(name)
            if not layer or down.numel() != layer.down_weight.numel() or up.numel() != layer.up_weight.numel():
                why = f"is another model's: {name:.100} is {list(up.shape)} x {list(down.shape)}"
                raise InputError(f"{where} {why}, which doesn't fit this base: name the base that it is for")
    return parts


def start_from(unet, config) -> str:
    """Put that LoRA, which was checked, into the one injected into the UNet; returns a line that says what was done.

    Its alpha may differ: up is rescaled so that the correction, alpha / rank * up @ down, is the same. Layers that it
    leaves out begin anew, that is, without a correction.
    """
    parts, layers = read_start(config), lora_modules(unet)
    with torch.no_grad():
        for name, (down, up, alpha) in parts.items():
            layer = layers[name]
            layer.down_weight.copy_(down.reshape(layer.down_weight.shape))
            layer.up_weight.copy_(up.reshape(layer.up_weight.shape).float() * (alpha / layer.rank / layer.scale))
    alphas = ", ".join(f"{alpha:g}" for alpha in sorted({alpha for _, _, alpha in parts.values()})[:3])
    rest = f"; {len(layers) - len(parts)} more begin anew" if len(parts) < len(layers) else ""
    return f"Going on from {config.start_from}: {len(parts)} modules of alpha {alphas}{rest}"
