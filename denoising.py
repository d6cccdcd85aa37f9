"""One optimizer step: what it draws, the denoising loss, its gradient, the memory for it; and the validation loss.

All randomness of step s comes from (seed, s) and is drawn for the whole effective batch at once. Micro-batches and
processes take slices of it, so none of them changes the step, and a resumed run needs no generator's state.

Letters in shapes: n images of a window, b of a micro-batch, C latent channels, h w latent, T tokens, D text width.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from dataset import EncodedDataset, MangaFaceDataset

VALIDATION_STRATA = 8  # timesteps per held-out face


@dataclass(frozen=True)
class Window:
    """All that is random about one optimizer step, for the whole effective batch of n images."""

    faces: torch.Tensor  # (n,) indices into dataset.samples
    texts: torch.Tensor  # (n,) indices into dataset.texts; 0 is ""
    timesteps: torch.Tensor  # (n,)
    noise: torch.Tensor  # (n, C, h, w)
    posterior_noise: torch.Tensor  # (n, C, h, w): which latent of the VAE's posterior
    loss_weights: torch.Tensor  # (n,)

    def __len__(self) -> int:
        return len(self.faces)

    def to(self, device: torch.device) -> "Window":
        """On a GPU without waiting for it: the copies queue up behind the step that is still being computed."""
        tensors = [getattr(self, field.name) for field in dataclasses.fields(self)]
        if device.type == "cuda":
            tensors = [tensor.pin_memory() for tensor in tensors]
        return Window(*(tensor.to(device, non_blocking=True) for tensor in tensors))


def seeded(*numbers: int) -> torch.Generator:
    """A generator that depends on these numbers alone, so a step can be repeated without repeating those before it."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1))


def draw_window(
    dataset: MangaFaceDataset, positions, seed: int, step: int, latent_shape: tuple, num_timesteps: int, dropout: float
) -> Window:
    """Draw captions, timesteps and noise for the training faces at `positions`, from (seed, step) alone.

    Args:
        positions: n of dataset.epoch_order()'s values.
        latent_shape: (C, h, w).
        dropout: share of the captions replaced by "", in [0, 1].
    """
    count, generator = len(positions), seeded(seed, 3, step)
    faces = torch.tensor([dataset.train[position] for position in positions])
    choice = torch.rand(count, generator=generator)
    variants = [dataset.text_indices[face] for face in faces.tolist()]
    texts = torch.tensor([texts[int(u * len(texts))] for u, texts in zip(choice.tolist(), variants, strict=True)])
    texts[torch.rand(count, generator=generator) < dropout] = 0
    # Stratified timesteps: one from each n-th of the noise schedule, so a step's loss says more and varies less.
    strata = torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)
    timesteps = (strata / count * num_timesteps).long().clamp(max=num_timesteps - 1)
    noise = torch.randn(count, *latent_shape, generator=generator)
    posterior_noise = torch.randn(count, *latent_shape, generator=generator)
    loss_weights = torch.from_numpy(dataset.loss_weights()[list(positions)]).float()
    return Window(faces, texts, timesteps, noise, posterior_noise, loss_weights)


def denoising_losses(unet, scheduler, latents, text_embeddings, timesteps, noise) -> torch.Tensor:
    """Mean squared error of the predicted noise, one value per image: |e - e_theta(x_t, t, c)|^2. Shape: (b,) float32.

    DDPM (Ho et al. 2020), equation 14. A base that predicts v (Salimans & Ho 2022) gets that target. text_embeddings
    come in the UNet's precision (asking `unet.dtype` walks through all its modules: 2 ms a time).
    """
    noisy_latents = scheduler.add_noise(latents, noise, timesteps)
    is_v = scheduler.config.prediction_type == "v_prediction"
    target = scheduler.get_velocity(latents, noise, timesteps) if is_v else noise
    prediction = unet(noisy_latents.to(text_embeddings.dtype), timesteps, text_embeddings, return_dict=False)[0]
    precise = torch.float64 if prediction.dtype == torch.float64 else torch.float32
    return (prediction.to(precise) - target.to(precise)).square().mean(dim=(1, 2, 3))


def accumulate_gradients(
    unet, scheduler, encoded: EncodedDataset, window: Window, rows: torch.Tensor, batch_size: int, scaler
) -> torch.Tensor:
    """Add to .grad the gradient of this process's part of the window's loss; returns that part of the loss.

    The window's loss is the sum over its images of weight x denoising loss, over the number of images really in it:
    an epoch's last, partial window counts each image as much as the others do, and neither the micro-batch nor the
    number of processes changes the step.
    """
    device, count = encoded.latent_mean.device, len(window)
    window = Window(*(getattr(window, field.name)[rows] for field in dataclasses.fields(window))).to(device)
    total = torch.zeros((), device=device)
    for start in range(0, len(window), batch_size):
        part = slice(start, start + batch_size)
        faces = window.faces[part]
        latents = encoded.latent_mean[faces] + encoded.latent_std[faces] * window.posterior_noise[part]
        text_embeddings = encoded.text_embeddings[window.texts[part]]
        losses = denoising_losses(
            unet, scheduler, latents, text_embeddings, window.timesteps[part], window.noise[part]
        )
        loss = (losses * window.loss_weights[part]).sum() / count
        scaler.scale(loss).backward()
        total = total + loss.detach()
    return total


def sum_over_processes(*tensors: torch.Tensor) -> None:
    """All-reduce in place; nothing to do for a single process."""
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        for tensor in tensors:
            torch.distributed.all_reduce(tensor)


def reads_late(device: torch.device) -> bool:
    """Whether a step's results are read only once the next step is launched. A CPU has nothing to gain by that."""
    return device.type == "cuda"


def read_later(values: torch.Tensor) -> Callable[[], list[float]]:
    """Start copying a few numbers off the device; the function returned waits for them.

    A GPU computes behind the program's back. Asking for a number at once would let it idle at every step, until the
    next step is drawn and launched.
    """
    if values.device.type != "cuda":
        numbers = values.tolist()
        return lambda: numbers
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()
    return lambda: copied.synchronize() or host.tolist()


@torch.no_grad()
def validate(
    unet, scheduler, dataset: MangaFaceDataset, encoded: EncodedDataset, seed: int, accelerator
) -> tuple[float, float]:
    """(mean, its standard error) of the denoising loss over the held-out faces, the same noise every time.

    Joined captions, 8 timestep strata per face. The training loss mostly tells which timesteps were drawn; this one
    moves only when the weights do. Its standard error is that of other faces, not of other noise.
    """
    device, count = encoded.latent_mean.device, len(dataset.validation)
    of_faces = torch.zeros(count, dtype=torch.float64)
    for position in range(accelerator.process_index, count, accelerator.num_processes):
        face, generator = dataset.validation[position], seeded(seed, 4, position)
        strata = torch.arange(VALIDATION_STRATA) + torch.rand(VALIDATION_STRATA, generator=generator)
        timesteps = (strata / VALIDATION_STRATA * scheduler.config.num_train_timesteps).long().to(device)
        noise = torch.randn(VALIDATION_STRATA, *encoded.latent_mean.shape[1:], generator=generator).to(device)
        latents = encoded.latent_mean[face].expand_as(noise)
        text_embeddings = encoded.text_embeddings[dataset.text_indices[face][-1]].expand(VALIDATION_STRATA, -1, -1)
        losses = denoising_losses(unet, scheduler, latents, text_embeddings, timesteps, noise)
        of_faces[position] = losses.double().mean().cpu()
    of_faces = accelerator.reduce(of_faces.float().to(device), reduction="sum").double()
    return of_faces.mean().item(), (of_faces.std() / math.sqrt(count)).item()


def candidate_epochs(history: list) -> list[int]:
    """Epochs that may be the best, earliest first: not before the validation minimum, at most three times as far, and
    within one standard error of it. A model is often at its best somewhat after the minimum of its loss.

    Args:
        history: [epoch, validation loss, its standard error] of every epoch so far, epochs from 1.
    """
    if not history:
        return []
    minimum, lowest, error = min(history, key=lambda row: (row[1], row[0]))
    return [epoch for epoch, loss, _ in history if minimum <= epoch <= 3 * minimum and loss <= lowest + error]


# Memory ----------------------------------------------------------------------------------------------------------

RECOMPUTED = {  # what is not kept for the backward pass, but computed again; SD1.5's share of extra work, counted
    "nothing": "nothing is computed twice",
    "largest": "the transformer blocks of the highest resolution are computed twice (+ 10 % work)",
    "all": "all blocks are computed twice (+ 33 % work)",
}
RESERVE = 1.25  # of the activations counted: gradients on their way back, workspaces, fragments


def is_out_of_memory(error: BaseException) -> bool:
    """torch.OutOfMemoryError on a GPU, or its libraries' ..._ALLOC_FAILED; the CPU's allocator's RuntimeError."""
    signs = ("out of memory", "allocate memory", "alloc_failed")
    return isinstance(error, MemoryError) or any(sign in str(error).lower() for sign in signs)


@dataclass(frozen=True)
class MemoryPlan:
    """How the images of a window go through the UNet. Any plan gives the same step, up to rounding."""

    micro_batch: int  # images per pass
    recompute: str  # a key of RECOMPUTED
    needed: float  # bytes of activations, with RESERVE

    def apply(self, unet) -> None:
        """Switch on diffusers' checkpointing where this plan wants it."""
        unet.disable_gradient_checkpointing()
        if self.recompute != "nothing":
            unet.enable_gradient_checkpointing()
        if self.recompute == "largest":
            largest = _blocks(unet, "Transformer2DModel", "largest")
            for module in unet.modules():
                if hasattr(module, "gradient_checkpointing"):
                    module.gradient_checkpointing = module in largest

    def __str__(self) -> str:
        needed = f"about {self.needed / 2**30:.1f} GiB of activations"
        return f"{self.micro_batch} images per pass, {RECOMPUTED[self.recompute]}; {needed}"


def _blocks(unet, kind: str, recompute: str) -> set:
    parts = (unet.down_blocks[0], unet.up_blocks[-1]) if recompute == "largest" else (unet,)
    return {module for part in parts for module in part.modules() if type(module).__name__ == kind}


def memory_plans(unet, latent_shape: tuple, text_shape: tuple, images: int, checkpointing: str) -> list[MemoryPlan]:
    """All plans for `images` per window and process, the best first: recompute as little, then pass as many as can be.

    What the backward pass needs is counted, not looked up: one image goes forward, and each tensor that autograd
    keeps is weighed, by block. A recomputed block keeps its input alone; the largest is there once in full.

    Args:
        latent_shape, text_shape: (C, h, w) and (T, D).
        checkpointing: "auto", "on" (all plans recompute all) or "off" (none does).
    """
    seen = {tensor.untyped_storage().data_ptr() for tensor in (*unet.parameters(), *unet.buffers())}
    kept, starts, weights = 0, {}, {}  # bytes so far; at a block's start; (a block's own, its input's)

    def weigh(tensor):
        nonlocal kept
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            kept += storage.nbytes()
        return tensor

    def enter(block, _):
        starts[block] = kept

    def leave(block, inputs, _):
        weights[block] = (kept - starts[block], inputs[0].nbytes)

    blocks = _blocks(unet, "BasicTransformerBlock", "all") | _blocks(unet, "ResnetBlock2D", "all")
    hooks = [hook for block in blocks for hook in (
        block.register_forward_pre_hook(enter), block.register_forward_hook(leave))]  # fmt: skip
    latents, text = (torch.zeros(1, *shape).to(unet.device, unet.dtype) for shape in (latent_shape, text_shape))
    unet.disable_gradient_checkpointing()
    try:
        with torch.autograd.graph.saved_tensors_hooks(weigh, lambda tensor: tensor):
            unet(latents, torch.zeros(1, device=unet.device, dtype=torch.long), text)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return [MemoryPlan(1, "nothing" if checkpointing == "off" else "all", float("inf"))]
    finally:
        for hook in hooks:
            hook.remove()

    tiers = {"auto": RECOMPUTED, "on": ("all",), "off": ("nothing",)}[checkpointing]
    plans = []
    for tier in tiers:
        again = {"nothing": set(), "all": blocks, "largest": _blocks(unet, "BasicTransformerBlock", "largest")}[tier]
        of_one = kept - sum(own - entry for own, entry in (weights[block] for block in again))
        of_one += max((weights[block][0] for block in again), default=0)
        plans += [MemoryPlan(n, tier, RESERVE * n * of_one) for n in range(images, 0, -1) if images % n == 0]
    return plans


def choose_plan(plans: list[MemoryPlan], free: float) -> MemoryPlan:
    """The first that fits into `free` bytes; if none does, the smallest."""
    return next((plan for plan in plans if plan.needed <= free), min(plans, key=lambda plan: plan.needed))
