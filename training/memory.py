"""How many images pass at a time, and what is computed twice: as much as the memory allows; and memory ran out."""

import contextlib
import gc
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass

import psutil
import torch

from training.files import Stop

CHECKPOINTED = {  # what is not kept for the backward pass, but computed again; SD1.5's share of extra work, counted
    "nothing": "nothing is computed twice",
    "cheap": "norms and gates are computed twice",  # see training/lean.py, without which there is no such plan
    "largest": "the transformer blocks of the highest resolution are computed twice (+ 10 % work)",
    "all": "all blocks are computed twice (+ 33 % work)",
}
RESERVE = 1.25  # of the activations counted: gradients on their way back, workspaces, fragments
SPARE = 0.3 * 2**30  # bytes of a GPU that are left free, for its libraries


def is_out_of_memory(error: BaseException) -> bool:
    """torch.OutOfMemoryError on a GPU, or its libraries' ways to say so; the CPU's allocator's RuntimeError."""
    signs = ("out of memory", "allocate memory", "alloc_failed", "unable to find an engine")  # cuDNN: no workspace
    signs += ("cublas_status_not_initialized", "cudnn_status_not_initialized")  # no memory for their handles
    return isinstance(error, MemoryError) or any(sign in str(error).lower() for sign in signs)


@contextlib.contextmanager
def if_memory_lasts():
    """What is within ends where memory runs out, and the program goes on after it; other errors are raised."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise


@dataclass(frozen=True)
class MemoryPlan:
    """How the images of a batch go through the UNet. Any plan gives the same step, up to rounding."""

    micro_batch: int  # images per pass
    checkpointing: str  # a key of CHECKPOINTED
    needed: float  # bytes of activations, with RESERVE

    def apply(self, unet) -> None:
        """Switch on what this plan wants to have computed again; the rest is diffusers' checkpointing."""
        unet.disable_gradient_checkpointing()
        if hasattr(unet, "cheap_twice"):
            unet.cheap_twice.is_on = self.checkpointing != "nothing"
        if self.checkpointing in ("largest", "all"):
            unet.enable_gradient_checkpointing()
        if self.checkpointing == "largest":
            largest = _blocks(unet, "Transformer2DModel", "largest")
            for module in unet.modules():
                if hasattr(module, "gradient_checkpointing"):
                    module.gradient_checkpointing = module in largest

    def __str__(self) -> str:
        needed = f"about {self.needed / 2**30:.1f} GiB of activations"
        return f"{self.micro_batch} images per pass, {CHECKPOINTED[self.checkpointing]}; {needed}"


def _blocks(unet, kind: str, checkpointing: str) -> set:
    parts = (unet.down_blocks[0], unet.up_blocks[-1]) if checkpointing == "largest" else (unet,)
    return {module for part in parts for module in part.modules() if type(module).__name__ == kind}


def memory_plans(unet, latent_shape: tuple, text_shape: tuple, images: int, checkpointing: str) -> list[MemoryPlan]:
    """All plans for `images` per batch and process, the best first: recompute as little, then pass as many as can be.

    What the backward pass needs is counted, not looked up: one image goes forward, and each tensor that autograd
    keeps is weighed, by block. A recomputed block keeps its input alone; the largest is there once in full.

    latent_shape, text_shape: (C, h, w) and (T, D). checkpointing: "auto", "on" (recompute all) or "off" (nothing).
    """
    tiers = {"auto": CHECKPOINTED, "on": ("all",), "off": ("nothing",)}[checkpointing]
    blocks = _blocks(unet, "BasicTransformerBlock", "all") | _blocks(unet, "ResnetBlock2D", "all")
    plans, has_cheap = [], hasattr(unet, "cheap_twice")
    tiers = [tier for tier in tiers if has_cheap or tier != "cheap"]
    with if_memory_lasts():
        for tier in tiers:
            if not plans or tier == "cheap":  # the others have the same blocks
                kept, weights, largest = _count(unet, latent_shape, text_shape, blocks, has_cheap and tier != "nothing")
            again = {"all": blocks, "largest": _blocks(unet, "BasicTransformerBlock", "largest")}.get(tier, set())
            of_one = kept - sum(own - entry for own, entry in (weights[block] for block in again))
            of_one += max((weights[block][0] for block in again), default=0)
            of_one += 3 * largest if has_cheap and tier != "nothing" else 0  # a norm or gate while it is computed again
            plans += [MemoryPlan(n, tier, RESERVE * n * of_one) for n in range(images, 0, -1) if images % n == 0]
    return plans or [MemoryPlan(1, "nothing" if checkpointing == "off" else "all", float("inf"))]


def _count(unet, latent_shape: tuple, text_shape: tuple, blocks: set, cheap_twice: bool) -> tuple[int, dict, int]:
    """Of one image: (bytes that autograd keeps, {block: (its own, its input's)}, the largest tensor's)."""
    seen = {tensor.untyped_storage().data_ptr() for tensor in (*unet.parameters(), *unet.buffers())}
    kept, largest, starts, weights = 0, 0, {}, {}

    def weigh(tensor):
        nonlocal kept, largest
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            kept += storage.nbytes()
            largest = max(largest, storage.nbytes())
        return tensor.detach()  # the tensor itself would hold the graph, which holds what is returned here: for ever

    def enter(block, _):
        starts[block] = kept

    def leave(block, inputs, _):
        weights[block] = (kept - starts[block], inputs[0].nbytes)

    hooks = [block.register_forward_pre_hook(enter) for block in blocks]
    hooks += [block.register_forward_hook(leave) for block in blocks]
    latents, text = (torch.zeros(1, *shape).to(unet.device, unet.dtype) for shape in (latent_shape, text_shape))
    unet.disable_gradient_checkpointing()
    if hasattr(unet, "cheap_twice"):
        unet.cheap_twice.is_on = cheap_twice
    try:
        with torch.autograd.graph.saved_tensors_hooks(weigh, lambda tensor: tensor):
            unet(latents, torch.zeros(1, device=unet.device, dtype=torch.long), text)
    finally:
        for hook in hooks:
            hook.remove()
    return kept, weights, largest


def choose_plan(plans: list[MemoryPlan], free: float) -> MemoryPlan:
    """The first that fits into `free` bytes; if none does, the smallest."""
    return next((plan for plan in plans if plan.needed <= free), min(plans, key=lambda plan: plan.needed))


class Plans:
    """The plan in force, and the smaller ones to step down to when memory runs out. least: Run's, if it has several
    processes, else None.
    """

    can_be_graphed = False  # see training/graphs.py

    def __init__(self, unet, plans: list[MemoryPlan], plan: MemoryPlan, log: Callable = print, least=None):
        self.unet, self.plans, self.log, self.least = unet, plans, log, least
        self.plan, self.is_rehearsal = plan, True
        plan.apply(unet)

    def attempt(self, gradients: Callable[[int], torch.Tensor], weights: torch.Tensor) -> torch.Tensor:
        """gradients(micro_batch), with ever smaller plans as memory runs out; weights.grad is zeroed before each try.

        Several processes agree in the rehearsal; later, one that runs out can't tell the others, which wait for it.
        Raises Stop(3): even the smallest plan doesn't fit.
        """
        while True:
            weights.grad.zero_()
            try:
                result, fits = gradients(self.plan.micro_batch), 1.0
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or (self.least and not self.is_rehearsal):
                    raise
                result, fits = None, 0.0
            if self.least and self.is_rehearsal:
                fits = self.least(fits)
            if fits:
                return result
            self.step_down(weights.device)

    def step_down(self, device: torch.device) -> None:
        smaller = [plan for plan in self.plans if plan.needed < 0.9 * self.plan.needed]
        if not smaller:
            remedy = "free some, then run this again; or --overwrite with a lower resolution or lora_rank"
            raise Stop(3, f"out of memory, even with {self.plan}: {remedy}")
        self.log(f"Out of memory with {self.plan}.")
        self.plan = smaller[0]
        self.plan.apply(self.unet)
        self.can_be_graphed = False  # a recording holds what its passes keep
        self.log(f"Trying again with {self.plan}")
        free_memory(device)


def plan_memory(run, model, data, config, kept: dict | None = None) -> None:
    """Choose model.plans by the memory that is free; `kept` is the plan of a run that goes on.

    How many images pass at once decides rounding, so a resumed run keeps its plan whatever is free.
    """
    images = config.train_batch_size * config.gradient_accumulation_steps
    text_shape = data.prompts.shape[1:]
    largest = max(data.latent_shapes, key=math.prod)
    plans = memory_plans(model.unet, largest, text_shape, images, config.gradient_checkpointing)
    plans, free = run.from_main(plans), run.least(free_bytes(run.device, run.world))
    spare = SPARE if run.device.type == "cuda" else 0
    plan = MemoryPlan(**kept) if kept else choose_plan(plans, free - spare)
    model.plans = Plans(model.unet, plans, plan, run.log, run.least if run.world > 1 else None)
    model.plans.can_be_graphed = run.device.type == "cuda" and leaves_room_for_graphs(plan, free)
    run.log(f"Device {run.device}, precision {run.precision}. Memory: {plan}, {free / 2**30:.1f} GiB are free")


def leaves_room_for_graphs(plan: MemoryPlan, free: float) -> bool:
    """Whether a pass may be recorded: no block is checkpointed, and there is room for what validation and pictures
    take, since a recording keeps its memory.
    """
    return plan.checkpointing in ("nothing", "cheap") and 3 * plan.needed <= free


def free_bytes(device: torch.device, processes: int) -> float:
    """What a process may still take: of its GPU, its own cache included, or its part of the machine's memory."""
    if device.type != "cuda":
        return psutil.virtual_memory().available / processes
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + cached


def sparingly(attempt: Callable, what: str, device: torch.device, log: Callable):
    """attempt(False), or if memory runs out attempt(True), which needs less; None, and said, if that runs out, too."""
    for is_sparing in (False, True):
        with if_memory_lasts():
            return attempt(is_sparing)
        free_memory(device)  # here, where the error no longer holds on to what filled it
        log(f"Out of memory while {what}{': left out' if is_sparing else ', once more, one picture at a time'}")
    return None


def free_memory(device: torch.device) -> None:
    """Let go of what nothing refers to any more."""
    gc.collect()
    if device.type != "cpu":
        torch.get_device_module(device).empty_cache()


def peak_memory_mib(device: torch.device) -> float:
    """Peak of what the run took: on the GPU if there is one, else of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    info = psutil.Process().memory_info()
    if hasattr(info, "peak_wset"):  # Windows
        return info.peak_wset / 2**20
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
