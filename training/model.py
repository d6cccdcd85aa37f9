"""What learns: the frozen UNet with its LoRA, its gradient, the optimizer and the loss scale."""

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from lora_layers import flatten_lora, inject_lora, lora_modules
from training.base_model import load_unet
from training.denoising import Batch, accumulate_gradients, sum_over_processes
from training.encoding import EncodedDataset
from training.files import Stop
from training.fused import fuse_lora
from training.graphs import GraphedPass
from training.lean import keep_less
from training.lora_files import start_from
from training.memory import Plans


@dataclass
class Model:
    """The UNet with its LoRA, and what moves that."""

    unet: torch.nn.Module
    scheduler: object  # the noise schedule the base was trained with
    weights: torch.Tensor  # all LoRA weights as one vector, float32: views of it are the layers' own
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    plans: Plans | None = None  # how many images pass at once: see training/memory.py
    graphed: GraphedPass | None = None  # see training/graphs.py

    def free(self) -> None:
        """Let go of everything: pictures need the memory."""
        vars(self).clear()


def build_model(config, base: Path, device: torch.device, dtype: torch.dtype, log: Callable = print) -> Model:
    """The base's UNet, frozen, in `dtype`; LoRA on top of it in float32; AdamW and the loss scale.

    Raises:
        BaseModelError: the base's UNet can't be loaded.
        Stop(2): xformers is asked for, there, and broken.
    """
    unet, scheduler = load_unet(base, device, dtype)
    use_xformers = config.use_xformers and importlib.util.find_spec("xformers") is not None
    if use_xformers != config.use_xformers:
        log("use_xformers is on, but xformers is not installed: PyTorch's own fused attention is used")
    torch.manual_seed(config.seed)  # for the LoRA's first weights only: all else draws from a seed and a step
    try:
        inject_lora(unet, config.lora_rank, config.lora_alpha, use_xformers)
    except ImportError as error:
        raise Stop(2, str(error)) from None
    if config.start_from:
        log(start_from(unet, config))
    if not fuse_lora(unet):
        log("lora_layers.py has another formula than training/fused.py computes: yours is used, a little slower")
    if not keep_less(unet):
        log("diffusers has other blocks than training/lean.py knows: they are used as they are, with more memory")
    weights = flatten_lora(unet)
    unet.train()
    share = len(weights) / sum(parameter.numel() for parameter in unet.parameters())
    size = f"{len(weights):,} trainable parameters, {share:.2%} of the UNet's"
    log(f"LoRA: rank {config.lora_rank}, alpha {config.lora_alpha}, {len(lora_modules(unet))} modules, {size}")
    # AdamW's own decay is off: the script's apply_decay() does it exactly. At scale 1 the scaler only skips bad steps.
    optimizer = torch.optim.AdamW([weights], lr=config.learning_rate, weight_decay=0.0, fused=True)
    # In fp16 it grows every 100 steps, so that the smallest gradients come to count within a run of 900.
    scale, growth_interval = (2.0**16, 100) if dtype == torch.float16 else (1.0, 2**30)
    scaler = torch.amp.GradScaler(device.type, scale, growth_interval=growth_interval)
    return Model(unet, scheduler, weights, optimizer, scaler)


def compute_gradients(model: Model, encoded: EncodedDataset, batch: Batch, share: torch.Tensor) -> torch.Tensor:
    """The denoising loss of a batch, of which this process computes the images in `share`; its gradient in .grad.

    Both are summed over all processes. If memory runs out, fewer images pass at a time.
    """

    def gradients(micro_batch: int) -> torch.Tensor:
        if not model.plans.can_be_graphed:
            model.graphed = None
        elif model.graphed is None:
            model.graphed = GraphedPass(model.unet, model.scheduler, model.scaler, model.weights, model.plans.log)
        parts = (model.unet, model.scheduler, encoded, batch, share, micro_batch, model.scaler)
        return accumulate_gradients(*parts, model.graphed)

    w_loss = model.plans.attempt(gradients, model.weights)
    sum_over_processes(model.weights.grad, w_loss)
    return w_loss


def clip_and_step(optimizer, scaler, weights: torch.Tensor, max_grad_norm: float) -> torch.Tensor:
    """Clip the gradient's norm and step, unless the gradient isn't finite. Returns whether it was.

    All on the device: nothing waits for the answer. A gradient that isn't finite becomes NaN throughout, upon which
    the scaler lets the optimizer leave weights and moments as they are, and halves its scale.
    """
    norm = torch.linalg.vector_norm(weights.grad) / scaler.scale(torch.ones((), device=weights.device))
    finite = norm.isfinite()
    factor = (max_grad_norm / (norm + 1e-6)).clamp(max=1.0) if max_grad_norm else torch.ones_like(norm)
    weights.grad.mul_(torch.where(finite, factor, math.nan))
    scaler.step(optimizer)
    scaler.update()
    return finite


def rehearse(model: Model, encoded: EncodedDataset, batch: Batch, share: torch.Tensor) -> None:
    """A whole step that changes nothing: does it fit into memory, and does the data's gradient reach every module?

    (That of down_weight is zero before the first step, as up_weight is.) First the optimizer gets a gradient that is
    NaN, upon which it leaves the weights as they are, but takes its own memory: the second step won't need more.

    Raises:
        Stop(3): the memory isn't enough for the smallest plan.
        Stop(4): a LoRA module gets no gradient.
    """
    scale, is_new = model.scaler.state_dict(), not model.optimizer.state
    model.weights.grad.fill_(math.nan)
    clip_and_step(model.optimizer, model.scaler, model.weights, max_grad_norm=0.0)
    compute_gradients(model, encoded, batch, share)
    gradients = {name: layer.up_weight.grad for name, layer in lora_modules(model.unet).items()}
    # Where the mid-block has one token, as at 64 pixels, that attends to itself alone, whatever its q and k are
    lone = [f"lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_{part}" for part in "qk"]
    dead = [name for name, gradient in gradients.items() if gradient is None or not gradient.any()]
    if dead := [name for name in dead if name not in lone]:
        raise Stop(4, f"{len(dead)} LoRA modules get no gradient, the first is {dead[0]}: a bug, please report it")
    if is_new:  # what some optimizers made of the NaN; a GPU's memory for it stays with this process
        model.optimizer.state.clear()
    model.scaler.load_state_dict(scale)
    model.plans.is_rehearsal = False
    if model.graphed and not model.graphed.graphed.failure:
        model.plans.log("Passes are recorded as CUDA graphs")
