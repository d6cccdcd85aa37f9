"""LoRA for the attention of a Stable Diffusion UNet: train, save, load, merge.

LoRA (Hu et al. 2021, arXiv 2106.09685) keeps a trained weight W fixed and learns a low-rank correction to it:

    y = W x + (alpha / rank) * up @ down @ x        down: (rank, in), up: (out, rank)

Everything needed in a notebook:

    inject_lora(unet, rank=16, network_alpha=32)           # after unet.to(device, dtype)
    optimizer = torch.optim.AdamW(lora_parameters(unet), lr=5e-5)
    ...                                                    # the usual training loop
    save_lora_weights(unet, "pytorch_lora_weights.bin")    # read by diffusers, A1111/Forge and ComfyUI

Shape letters: B batch, T tokens, D text width, C channels, r rank.
"""

import hashlib
import io
import json
import math
import os
import pickle
import warnings
import zipfile
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.files import write_atomic

# the linear layers of a diffusers `Attention` that carry LoRA: short name, path within it
PROJECTIONS = {"q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out.0"}


class LoRASelfCheckError(RuntimeError):
    """The weights to be saved are not finite, or the file written does not hold them exactly."""


class LoRALinearLayer(nn.Module):
    """The correction to one linear layer, without that layer: x -> (alpha / rank) x down^T up^T.

    `down_weight` (r, in) starts uniform within 1 / sqrt(in) of zero (Kaiming, a = sqrt 5: nn.Linear's own
    start), `up_weight` (out, r) at zero: no correction before the first step. Both are fp32 on any base, for
    fp16 would lose small optimizer steps; each use casts them to x's dtype.
    Raises ValueError: rank or network_alpha is not an int, or is below 1.
    """

    def __init__(self, in_features: int, out_features: int, rank: int = 16, network_alpha: int = 32):
        super().__init__()
        for name, value in (("rank", rank), ("network_alpha", network_alpha)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, not {value!r}")
        self.rank, self.network_alpha, self.scale = rank, network_alpha, network_alpha / rank
        self.down_weight = nn.Parameter(torch.empty(rank, in_features, dtype=torch.float32))
        self.up_weight = nn.Parameter(torch.zeros(out_features, rank, dtype=torch.float32))
        nn.init.kaiming_uniform_(self.down_weight, a=math.sqrt(5))
        self.base_weight: Tensor | None = None  # the base's own weight, kept here while LoRA is merged

    def forward(self, x: Tensor) -> Tensor:
        """The correction alone, in x's dtype (under autocast in autocast's, like any nn.Linear).

        This formula is what trains. training/fused.py computes it, and its gradients, in fewer kernels; it compares
        itself with this one first and stands back if they differ. So a change here is a change of the training.

        Shape: (..., in) -> (..., out).
        """
        narrow = F.linear(x, self.down_weight.to(x.dtype)) * self.scale  # scaled where only r wide
        return F.linear(narrow, self.up_weight.to(narrow.dtype))


class LoRAAttnProcessor(nn.Module):
    """One diffusers `Attention`, with LoRA on its q, k, v and output projections.

        q, k, v = x, c, c times (W + scale up down)^T       c: the text states, or x itself in self-attention
        y = softmax(q k^T / sqrt(head width)) v times (W_out + scale up down)^T, then residual and rescaling

    All else (group and cross norms, masks, 4-D inputs) is as in diffusers' default processor: while the
    `up_weight`s are zero the result is the same bit for bit. Only what no UNet of SD has is left out: spatial
    norms, and those of q and k. `attn` gives widths and device; `use_xformers` takes that package's attention
    kernel instead of PyTorch's fused one.

    Raises:
        ImportError: use_xformers is True and xformers cannot be imported.
        ValueError: see LoRALinearLayer.
    """

    def __init__(self, attn: nn.Module, rank: int = 16, network_alpha: int = 32, use_xformers: bool = False):
        super().__init__()
        self.xformers_attention = None
        if use_xformers:
            try:
                from xformers.ops import memory_efficient_attention
            except ImportError as error:
                remedy = "`pip install xformers`, or use_xformers=False for PyTorch's own fused attention"
                raise ImportError(f"use_xformers: xformers cannot be imported ({error}); {remedy}") from error
            self.xformers_attention = memory_efficient_attention

        self.lora = nn.ModuleDict()
        for name, path in PROJECTIONS.items():
            linear = attn.get_submodule(path)
            layer = LoRALinearLayer(linear.in_features, linear.out_features, rank, network_alpha)
            self.lora[name] = layer.to(linear.weight.device)  # drawn on the CPU: one seed, one start on all devices

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        # diffusers passes the arguments that it finds in this signature; nn.Module's own names none of them
        return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask)

    def forward(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None) -> Tensor:
        """Shape: x (B, T, C) or (B, C, height, width), text (B, T', D), mask to add (B, 1, T') -> like x."""
        residual = hidden_states
        image_shape = hidden_states.shape if hidden_states.ndim == 4 else None
        if image_shape is not None:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)

        if encoder_hidden_states is None:
            context = hidden_states
            projected = self.project(attn, ("q", "k", "v"), hidden_states)
        else:
            context = encoder_hidden_states
            if attn.norm_cross:
                context = attn.norm_encoder_hidden_states(context)
            projected = (*self.project(attn, ("q",), hidden_states), *self.project(attn, ("k", "v"), context))
        # heads: (B, T, C) -> (B, T, heads, C / heads)
        query, key, value = (part.unflatten(-1, (attn.heads, -1)) for part in projected)

        # fused attention
        mask = attn.prepare_attention_mask(attention_mask, context.shape[1], context.shape[0])
        if mask is not None:
            mask = mask.unflatten(0, (-1, attn.heads))
        if self.xformers_attention is not None:
            if mask is not None:  # xformers does not broadcast it over the queries
                mask = mask.to(query.dtype).expand(-1, -1, query.shape[1], -1)
            mixed = self.xformers_attention(query, key, value, attn_bias=mask)
        else:
            query, key, value = (part.transpose(1, 2) for part in (query, key, value))
            mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)
        mixed = mixed.flatten(2).to(query.dtype)

        (out,) = self.project(attn, ("out",), mixed)
        out = attn.to_out[1](out)
        if image_shape is not None:
            out = out.transpose(1, 2).reshape(image_shape)
        if attn.residual_connection:
            out = out + residual
        return out if attn.rescale_output_factor == 1 else out / attn.rescale_output_factor

    def project(self, attn: nn.Module, names: tuple[str, ...], x: Tensor) -> tuple[Tensor, ...]:
        """Base plus correction of x, for each of these PROJECTIONS; the base alone holds both while LoRA is merged."""
        pairs = [(attn.get_submodule(PROJECTIONS[name]), self.lora[name]) for name in names]
        return tuple(linear(x) + lora(x) if lora.base_weight is None else linear(x) for linear, lora in pairs)


def inject_lora(unet: nn.Module, rank: int = 16, network_alpha: int = 32, use_xformers: bool = False) -> dict:
    """Freeze the UNet, put a LoRAAttnProcessor on each attention; only the LoRA weights are trainable then.

    They are fp32 also on an fp16 base, and on each attention's device. They become part of the UNet, so cast
    it *before*: a later `unet.to(torch.float16)` would cast them too.

    Returns {name: LoRAAttnProcessor} as in `unet.attn_processors` (SD1.5: 32 of them, 4 LoRA layers each).

    Raises:
        ValueError: the UNet has no attention, or LoRA already, or not 4 LoRA layers to each attention; see also
            LoRALinearLayer. The UNet is unchanged then.
        ImportError: see LoRAAttnProcessor.
    """
    attentions = sum(hasattr(module, "to_q") and hasattr(module, "to_out") for module in unet.modules())
    if not attentions:
        raise ValueError(f"{type(unet).__name__} has no attention to put LoRA on")
    if lora_modules(unet):
        raise ValueError("LoRA is already injected into this UNet")
    processors = {}
    for name in unet.attn_processors:
        attn = unet.get_submodule(name.removesuffix(".processor"))
        processors[name] = LoRAAttnProcessor(attn, rank, network_alpha, use_xformers)
    layers, of_each = sum(len(processor.lora) for processor in processors.values()), len(PROJECTIONS)
    if layers != of_each * attentions:
        raise ValueError(f"{layers} LoRA layers for {attentions} attentions; {of_each} to each are expected")
    unet.requires_grad_(False)
    unet.set_attn_processor(dict(processors))  # a copy: diffusers empties the dict it is given
    return processors


def lora_modules(unet: nn.Module) -> dict[str, LoRALinearLayer]:
    """LoRA layers by their name in the file, in the UNet's order; empty if none is injected.

    The name is kohya's: `lora_unet_` and the path of the linear layer, its dots turned into underscores.
    """
    return {name: layer for name, (_, layer) in _projections(unet).items() if layer is not None}


def lora_parameters(unet: nn.Module) -> list[nn.Parameter]:
    """All LoRA weights, down then up per layer; a list, so optimizer and clipping can both go through it.

    Raises ValueError: no LoRA is injected.
    """
    return [w for layer in _injected(unet).values() for w in (layer.down_weight, layer.up_weight)]


def lora_state_dict(unet: nn.Module, dtype: torch.dtype = torch.float16) -> dict[str, Tensor]:
    """What a LoRA file holds per layer: `.lora_down.weight` (r, in), `.lora_up.weight` (out, r), `.alpha` ().

    Contiguous copies on the CPU in `dtype`, unscaled: readers of the file multiply by alpha / r.
    Raises ValueError: no LoRA is injected, or dtype is not a floating-point type that holds alpha exactly.
    """
    state = {}
    for name, layer in _injected(unet).items():
        for end, weight in (("lora_down.weight", layer.down_weight), ("lora_up.weight", layer.up_weight)):
            state[f"{name}.{end}"] = weight.detach().to("cpu", dtype, copy=True).contiguous()
        alpha = state[f"{name}.alpha"] = torch.tensor(layer.network_alpha, dtype=dtype, device="cpu")
        if not dtype.is_floating_point or alpha.item() != layer.network_alpha:
            raise ValueError(f"{dtype} cannot hold LoRA weights, or not alpha = {layer.network_alpha}")
    return state


def save_lora_weights(unet: nn.Module, path, dtype=torch.float16, metadata: dict[str, object] | None = None) -> Path:
    """Write the LoRA to a `.bin` or `.safetensors` for diffusers, A1111/Forge and ComfyUI; return the path.

    Written beside its final name, read back, compared exactly with the live weights cast to `dtype`, and only
    then renamed: whatever fails, a file already there stays as it was. Missing folders are created.

    metadata: added to the header fields that UIs read (`ss_network_dim`, ...), or replacing them; see with_metadata.
    Only `.safetensors` has a header; for a `.bin` this has no effect.

    Raises:
        ValueError: another suffix, or see lora_state_dict.
        LoRASelfCheckError: a weight is not finite, before or after the cast (fp16 ends at 65504), or what was
            read back differs from the live weights.
    """
    path = _checked_suffix(path)
    state = lora_state_dict(unet, dtype)
    for key, tensor in state.items():
        if not tensor.isfinite().all():
            raise LoRASelfCheckError(f"{key} is not finite in {dtype}: {path} is not written")
    if path.suffix == ".bin":
        buffer = io.BytesIO()  # to a file, torch.save would store its name: equal weights, unequal bytes
        torch.save(state, buffer)
        content = buffer.getvalue()
    else:
        layer = next(iter(lora_modules(unet).values()))
        header = {"format": "pt", "ss_base_model_version": "sd_v1", "ss_network_module": "networks.lora"}
        header |= {"ss_network_dim": layer.rank, "ss_network_alpha": layer.network_alpha}
        content = with_metadata(safetensors.torch.save(state), header | (metadata or {}))

    def check(written: Path) -> None:
        try:
            saved = read_tensors(written, path.suffix)
        except ValueError as error:
            raise LoRASelfCheckError(f"{path} cannot be read back: {error}") from error
        live = lora_state_dict(unet, dtype)
        for key in live.keys() | saved.keys():
            if not (key in live and key in saved and saved[key].dtype == dtype and saved[key].equal(live[key])):
                raise LoRASelfCheckError(f"{path}: {key} read back is not the live value in {dtype}")

    write_atomic(path, content, check)
    return path


def with_metadata(content: bytes, metadata: dict[str, object]) -> bytes:
    """The bytes of a `.safetensors` file with these header fields added, or replacing its own; the tensors stay.

    Values become strings; None takes a field out. Added are the hashes by which UIs know a LoRA: that of its tensors,
    and A1111's old one, of the 64 KiB at 1 MiB. The order is fixed; safetensors' own writer leaves it to chance.
    """
    start = 8 + int.from_bytes(content[:8], "little")
    tensors, sha256 = json.loads(content[8:start]), hashlib.sha256(content[start:]).hexdigest()
    fields = tensors.pop("__metadata__", {}) | metadata
    fields = {str(key): str(value) for key, value in fields.items() if value is not None}
    fields |= {"modelspec.hash_sha256": f"0x{sha256}", "sshs_model_hash": sha256, "sshs_legacy_hash": 8 * "0"}

    def whole() -> bytes:
        header = json.dumps({"__metadata__": fields} | tensors, ensure_ascii=False).encode("utf-8", "replace")
        header += b" " * (-len(header) % 8)
        return len(header).to_bytes(8, "little") + header + content[start:]

    fields["sshs_legacy_hash"] = hashlib.sha256(whole()[2**20 : 2**20 + 2**16]).hexdigest()[:8]
    return whole()


def read_lora_weights(unet: nn.Module, path: str | os.PathLike) -> tuple[dict[str, Tensor], int, int]:
    """Tensors, rank and alpha in a file of save_lora_weights that fits this UNet, which stays as it is.

    A `.bin` is a pickle: it is read with `weights_only=True`, which runs no code from it.

    Raises:
        ValueError: naming file and key: another suffix, unreadable, missing or unexpected keys, wrong shapes,
            values not finite, differing ranks or alphas, or a rank or alpha other than the injected LoRA's.
    """
    path, projections = _checked_suffix(path), _projections(unet)

    # the right keys
    state = read_tensors(path, path.suffix)
    ends = ("lora_down.weight", "lora_up.weight", "alpha")
    keys = {f"{name}.{end}" for name in projections for end in ends}
    if differing := sorted(state.keys() ^ keys):
        what = "missing" if differing[0] in keys else "not expected"
        raise ValueError(f"{path}: {differing[0]} is {what} ({len(differing)} keys differ)")

    # one rank and alpha throughout: those injected, else those of the file's first layer
    first, (linear, layer) = next(iter(projections.items()))
    if layer is not None:
        rank, alpha = layer.rank, layer.network_alpha
    else:
        rank = state[f"{first}.lora_down.weight"].numel() // linear.in_features
        alpha = state[f"{first}.alpha"].double().sum().item()
    if rank < 1 or alpha < 1 or alpha % 1:
        raise ValueError(f"{path}: {first} has rank {rank} and alpha {alpha}; integers >= 1 are expected")
    for name, (linear, _) in projections.items():
        shapes = ((rank, linear.in_features), (linear.out_features, rank), ())
        for end, shape in zip(ends, shapes, strict=True):
            tensor = state[f"{name}.{end}"]
            if tensor.shape != shape:
                what = f"{list(tensor.shape)}, not {list(shape)}"
                raise ValueError(f"{path}: {name}.{end} has shape {what} (rank {rank})")
            if not tensor.float().isfinite().all():
                raise ValueError(f"{path}: {name}.{end} has values that are not finite")
        if tensor.item() != alpha:
            raise ValueError(f"{path}: {name}.alpha is {tensor.item():g}, {alpha:g} is expected")

    return state, rank, int(alpha)


def load_lora_weights(unet: nn.Module, path: str | os.PathLike) -> None:
    """Read a file of save_lora_weights; a UNet without LoRA gets it first, with the file's rank and alpha.

    Raises ValueError: see read_lora_weights; or LoRA is merged. The UNet is unchanged then.
    """
    injected = lora_modules(unet)
    if any(layer.base_weight is not None for layer in injected.values()):
        raise ValueError(f"{path}: LoRA is merged into this UNet; unmerge_lora before loading")
    state, rank, alpha = read_lora_weights(unet, path)
    if not injected:
        inject_lora(unet, rank, alpha)
    with torch.no_grad():
        for name, layer in lora_modules(unet).items():
            layer.down_weight.copy_(state[f"{name}.lora_down.weight"])
            layer.up_weight.copy_(state[f"{name}.lora_up.weight"])


def merge_lora(unet: nn.Module) -> None:
    """W <- W + scale * up @ down: the base layers alone give the LoRA's result, the processors add nothing.

    Summed in fp32 (fp64 for fp64 weights), then rounded to W's dtype: an fp16 base loses small corrections.
    The old weights are kept (SD1.5 in fp16: 0.17 GiB). A merged UNet cannot be trained: unmerge_lora first.
    Raises ValueError: no LoRA is injected, or it is merged already.
    """
    if any(layer.base_weight is not None for layer in _injected(unet).values()):
        raise ValueError("LoRA is already merged into this UNet")
    for linear, layer in _projections(unet).values():
        weight = linear.weight.detach()
        exact = torch.promote_types(weight.dtype, torch.float32)
        with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
            change = layer.scale * (layer.up_weight.to(exact) @ layer.down_weight.to(exact))
        layer.base_weight = weight.clone()
        weight.copy_(weight.to(exact) + change)


def unmerge_lora(unet: nn.Module) -> None:
    """Undo merge_lora: the kept weights go back, bit for bit (nothing is subtracted).

    Raises ValueError: LoRA is not merged.
    """
    if all(layer.base_weight is None for layer in lora_modules(unet).values()):
        raise ValueError("LoRA is not merged into this UNet")
    for linear, layer in _projections(unet).values():
        if layer.base_weight is not None:  # None where merge_lora broke off
            linear.weight.detach().copy_(layer.base_weight)
            layer.base_weight = None


def flatten_lora(unet: nn.Module) -> nn.Parameter:
    """All LoRA weights as one vector with a gradient, so that clipping, AdamW and a checkpoint handle one tensor.

    The layers' weights and gradients become views of it, in lora_parameters()'s order: keep the gradient's memory
    (`vector.grad.zero_()`, not `= None`).

    Shape: (number of LoRA parameters,).

    Raises ValueError: no LoRA is injected.
    """
    weights = lora_parameters(unet)
    vector = nn.Parameter(torch.cat([weight.detach().flatten() for weight in weights]))
    vector.grad = torch.zeros_like(vector)
    sizes = [weight.numel() for weight in weights]
    for weight, values, gradient in zip(weights, vector.detach().split(sizes), vector.grad.split(sizes), strict=True):
        weight.data, weight.grad = values.view_as(weight), gradient.view_as(weight)
    return vector


class GradientPenalty:
    """Keeps LoRA weights small: penalty_factor * sum over LoRALinearLayers of (sum down^2 + sum up^2).

    At the start up = 0 and sum down^2 is about r / 3 per layer: SD1.5 (128 layers), r = 16, 1e-5 give 0.0068.
    Raises ValueError: penalty_factor is negative or not finite; when called, the model has no LoRALinearLayer.
    """

    def __init__(self, penalty_factor: float) -> None:
        if not 0 <= penalty_factor < math.inf:
            raise ValueError(f"penalty_factor must be a finite number of at least 0, not {penalty_factor}")
        self.penalty_factor = penalty_factor

    def __call__(self, model: nn.Module | Tensor) -> Tensor:
        """The penalty as a differentiable scalar, fp32 (fp64 for fp64 weights), of a model or flatten_lora's vector."""
        if not isinstance(model, Tensor):
            layers = [module for module in model.modules() if isinstance(module, LoRALinearLayer)]
            if not layers:
                raise ValueError(f"{type(model).__name__} has no LoRALinearLayer")
            model = torch.cat([w.flatten() for layer in layers for w in (layer.down_weight, layer.up_weight)])
        exact = torch.promote_types(model.dtype, torch.float32)
        return self.penalty_factor * model.to(exact).square().sum()


def _projections(unet: nn.Module) -> dict[str, tuple[nn.Linear, LoRALinearLayer | None]]:
    """Name in the file -> linear layer of the base and its LoRA layer, None if there is none."""
    found = {}
    for processor_name in unet.attn_processors:
        path = processor_name.removesuffix(".processor")
        attn = unet.get_submodule(path)
        layers = getattr(attn.processor, "lora", None)
        for name, linear in PROJECTIONS.items():
            layer = layers[name] if layers is not None else None
            found[f"lora_unet_{path}_{linear}".replace(".", "_")] = (attn.get_submodule(linear), layer)
    return found


def _injected(unet: nn.Module) -> dict[str, LoRALinearLayer]:
    layers = lora_modules(unet)
    if not layers:
        raise ValueError("no LoRA is injected into this UNet")
    return layers


def _checked_suffix(path: str | os.PathLike) -> Path:
    if Path(path).suffix not in (".bin", ".safetensors"):
        raise ValueError(f"{path}: the suffix must be .bin or .safetensors")
    return Path(path)


def read_pickle(source):
    """What torch.save wrote to a path (tensors stay on the disk if they can) or a buffer; of a checkpoint the weights.

    Raises ValueError: it holds code, none of which is run; and whatever else a damaged file makes torch raise.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of pickles by others: the caller says what is wrong in one line
        mapped = isinstance(source, Path) and zipfile.is_zipfile(source)
        try:
            content = torch.load(source, map_location="cpu", weights_only=True, mmap=mapped)
        except pickle.UnpicklingError as error:
            raise ValueError("it holds more than tensors, or is damaged; nothing in it was run") from error
    return content.get("state_dict", content) if isinstance(content, dict) else content


def read_tensors(path: Path, suffix: str) -> dict[str, Tensor]:
    """What is in a file, read as one of this suffix. Raises ValueError: it is damaged, or not tensors by name."""
    try:
        content = path.read_bytes()  # not mapped: Windows cannot rename a mapped file
        if suffix == ".safetensors":
            return safetensors.torch.load(content)
        state = read_pickle(io.BytesIO(content))
    except Exception as error:  # whatever a damaged or hostile file makes the two parsers raise
        raise ValueError(f"{path}: cannot be read as a {suffix} file: {error}") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        holds = ", ".join(map(str, state))[:60] if isinstance(state, dict) else type(state).__name__
        raise ValueError(f"{path}: holds something other than tensors by name ({holds})")
    return state
