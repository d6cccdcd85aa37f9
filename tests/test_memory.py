"""How many images pass at once, what is computed twice, and what happens when memory runs out."""

import dataclasses
import gc
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import exported, run, signal_at_step
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train_manga_lora as trainer
from evaluation import summary
from evaluation.pictures import SPARING_TILE, build_pipeline, decode
from lora_layers import flatten_lora, inject_lora, lora_modules, lora_parameters
from training import memory, model
from training.base_model import load_unet, load_vae
from training.checkpoint import LORA_FILES
from training.fused import fuse_lora
from training.run import tune_for

CPU = torch.device("cpu")
LATENT_SHAPE = (4, 16, 16)


@pytest.mark.parametrize("checkpointing, forward_passes", [("largest", 16 + 2 + 3), ("all", 2 * 16)])
def test_recomputation_leaves_every_module_s_gradient_as_it_is(deep_base, checkpointing, forward_passes):
    """On the trainer's path. The transformer blocks really computed twice: of the first and the last block, or all."""
    unet, _ = load_unet(deep_base, CPU, torch.float32)
    inject_lora(unet, 4, 8)
    fuse_lora(unet)
    unet.train()
    torch.manual_seed(0)
    for parameter in lora_parameters(unet):
        torch.nn.init.normal_(parameter, std=0.1)
    inputs, passes, found = (torch.randn(2, *LATENT_SHAPE), torch.tensor([3, 700]), torch.randn(2, 77, 16)), [], {}
    for module in unet.modules():
        if type(module).__name__ == "BasicTransformerBlock":
            module.register_forward_pre_hook(lambda *_: passes.append(1))
    for tier, expected in (("nothing", 16), (checkpointing, forward_passes)):
        memory.MemoryPlan(2, tier, 0.0).apply(unet)
        passes.clear()
        unet(*inputs).sample.square().mean().backward()
        assert len(passes) == expected
        found[tier] = [parameter.grad for parameter in lora_parameters(unet)]
        unet.zero_grad(set_to_none=True)
    names = [name for name in lora_modules(unet) for _ in ("down", "up")]
    for name, kept, again in zip(names, *found.values(), strict=True):
        assert kept.norm() > 0, name
        cosine = torch.cosine_similarity(kept.flatten().double(), again.flatten().double(), dim=0)
        assert cosine >= 0.999999 and torch.allclose(kept.norm(), again.norm()), (name, cosine)


def live_bytes(unet, shapes, images):
    """The most memory that forward and backward of `images` hold at a time, by watching every tensor's birth and death.

    Independent of the hooks that memory_plans counts with.
    """
    import weakref

    from torch.utils._python_dispatch import TorchDispatchMode

    known = {tensor.untyped_storage()._cdata for tensor in (*unet.parameters(), *unet.buffers())}
    alive, most = {}, 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal most
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, tuple | list) else [result]:
                if isinstance(tensor, torch.Tensor):
                    storage = tensor.untyped_storage()
                    if storage._cdata not in known and storage._cdata not in alive:
                        alive[storage._cdata] = storage.nbytes()
                        weakref.finalize(storage, alive.pop, storage._cdata, None)
            most = max(most, sum(alive.values()))
            return result

    latents, text = (torch.randn(images, *shape) for shape in shapes)
    with Watch():
        unet(latents, torch.zeros(images, dtype=torch.long), text)[0].square().mean().backward()
    return most


def test_memory_plans_count_what_a_backward_pass_really_holds(tiny_base):
    unet, _ = load_unet(tiny_base, CPU, torch.float32)
    inject_lora(unet, 4, 8)
    fuse_lora(unet)
    shapes = (4, 32, 32), (77, 16)
    plans = memory.memory_plans(unet, *shapes, 4, "auto")
    assert [(plan.checkpointing, plan.micro_batch) for plan in plans] == [
        (tier, images) for tier in ("nothing", "largest", "all") for images in (4, 2, 1)
    ]
    for plan in plans:
        plan.apply(unet)
        measured = live_bytes(unet, shapes, plan.micro_batch)
        assert 0.7 * measured <= plan.needed / memory.RESERVE <= 1.1 * measured, (plan, measured)
        assert measured <= plan.needed, (plan, measured)
    of_four = [plan.needed for plan in plans if plan.micro_batch == 4]
    assert of_four[0] > 1.3 * of_four[1] > 1.3 * of_four[2]


def test_the_first_plan_that_fits_is_chosen():
    plans = [
        memory.MemoryPlan(n, tier, size)
        for n, tier, size in ((8, "nothing", 80), (4, "nothing", 40), (8, "all", 24), (4, "all", 12))
    ]
    choices = {100: plans[0], 80: plans[0], 79: plans[1], 39: plans[2], 20: plans[3], 1: plans[3]}
    assert {free: memory.choose_plan(plans, free) for free in choices} == choices


def test_gradient_checkpointing_changes_no_weight(tiny_config, capsys):
    run(tiny_config, num_train_epochs=1, gradient_checkpointing="off")
    first = exported(tiny_config)
    assert "8 images per pass, nothing is computed twice" in capsys.readouterr().out
    calls, original = [], torch.utils.checkpoint.checkpoint
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.utils.checkpoint, "checkpoint", lambda *a, **o: calls.append(1) or original(*a, **o))
        run(tiny_config, num_train_epochs=1, gradient_checkpointing="on", overwrite=True)
    assert "8 images per pass, all blocks are computed twice" in capsys.readouterr().out and calls
    assert exported(tiny_config) == first


def out_of_memory_at(monkeypatch, too_large):
    """Passes of `too_large` images or more fail as the CPU's allocator does; the sizes tried are returned."""
    original, tried = model.accumulate_gradients, []

    def wrapped(*arguments):
        tried.append(arguments[5])
        if arguments[5] >= too_large:
            original(*arguments)  # gradients that a failed attempt leaves behind must not count
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes.")
        return original(*arguments)

    monkeypatch.setattr(model, "accumulate_gradients", wrapped)
    return tried


def test_out_of_memory_at_step_1_steps_down_loudly_and_changes_nothing_else(tiny_config, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(memory, "choose_plan", lambda plans, _: next(p for p in plans if p.micro_batch == 2))
        run(tiny_config, num_train_epochs=1)
    small = exported(tiny_config)
    capsys.readouterr()
    with monkeypatch.context() as patch:
        tried = out_of_memory_at(patch, too_large=4)
        run(tiny_config, num_train_epochs=1, overwrite=True)
    assert tried[:3] == [8, 4, 2] and set(tried[3:]) == {2} and exported(tiny_config) == small  # in the rehearsal
    output = capsys.readouterr().out
    assert "Out of memory with 8 images per pass" in output and "Trying again with 2 images per pass" in output


def test_out_of_memory_with_the_smallest_plan_is_exit_code_3(tiny_config, monkeypatch):
    out_of_memory_at(monkeypatch, too_large=1)
    with pytest.raises(trainer.Stop, match="out of memory, even with 1 images") as stop:
        run(tiny_config, num_train_epochs=1)
    assert stop.value.exit_code == 3


def test_a_resumed_run_keeps_its_plan_whatever_memory_is_free(tiny_config, uninterrupted, monkeypatch):
    config = dataclasses.replace(tiny_config, train_batch_size=1)
    with monkeypatch.context() as patch:
        signal_at_step(patch, 3)
        with pytest.raises(trainer.Stop):
            run(config)
    monkeypatch.setattr(memory, "free_bytes", lambda *_: 1.0)
    tried = out_of_memory_at(monkeypatch, too_large=100)
    run(config)
    assert set(tried) == {4} and exported(config) == uninterrupted[1]


def test_little_free_memory_means_small_passes_and_recomputation(tiny_config, monkeypatch, capsys):
    monkeypatch.setattr(memory, "free_bytes", lambda *_: 1.0)
    run(tiny_config, num_train_epochs=1)
    assert "Memory: 1 images per pass, all blocks are computed twice" in capsys.readouterr().out


def test_out_of_memory_at_a_later_step_steps_down_too(tiny_config, monkeypatch, capsys):
    """Another program may take memory while a run is under way."""
    with monkeypatch.context() as patch:
        patch.setattr(memory, "choose_plan", lambda plans, _: next(p for p in plans if p.micro_batch == 4))
        run(tiny_config, num_train_epochs=1)
    expected = exported(tiny_config)
    capsys.readouterr()
    original, calls = model.accumulate_gradients, []

    def fails_once(*arguments):
        calls.append(arguments[5])
        result = original(*arguments)
        if len(calls) == 2:  # the first is the rehearsal
            raise torch.OutOfMemoryError("CUDA out of memory")
        return result

    monkeypatch.setattr(model, "accumulate_gradients", fails_once)
    run(tiny_config, num_train_epochs=1, overwrite=True)
    assert calls == [8, 8, 4, 4] and exported(tiny_config) == expected
    assert "Trying again with 4 images per pass" in capsys.readouterr().out


def test_several_processes_agree_on_a_smaller_plan_in_the_rehearsal(tiny_base):
    """One runs out of memory, the other doesn't: both step down. Later none may, as the other would wait for ever."""
    unet, _ = load_unet(tiny_base, CPU, torch.float32)
    plans = [memory.MemoryPlan(n, "nothing", 10.0 * n) for n in (4, 2, 1)]
    weights = torch.nn.Parameter(torch.zeros(3))
    weights.grad = torch.ones(3)
    answers = iter([0.0, 1.0])  # the least of all processes: at first the other one's is 0
    chosen = memory.Plans(unet, plans, plans[0], lambda text: None, lambda number: min(number, next(answers)))
    tried = []
    assert chosen.attempt(lambda n: tried.append(n) or torch.ones(()), weights) == 1 and tried == [4, 2]
    assert not weights.grad.any()
    chosen.is_rehearsal = False

    def fails(micro_batch):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        chosen.attempt(fails, weights)


def test_planning_leaves_nothing_behind_and_a_deleted_unet_is_gone(tiny_base):
    unet, _ = load_unet(tiny_base, CPU, torch.float32)
    inject_lora(unet, 4, 8)
    fuse_lora(unet)
    flatten_lora(unet)
    unet.train()
    kept, original = [], torch.autograd.graph.saved_tensors_hooks.__init__

    def watched(self, pack, unpack):
        def pack_and_watch(tensor):
            packed = pack(tensor)
            kept.extend((weakref.ref(tensor), weakref.ref(packed)))
            return packed

        original(self, pack_and_watch, unpack)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.autograd.graph.saved_tensors_hooks, "__init__", watched)
        plans = memory.memory_plans(unet, LATENT_SHAPE, (77, 16), 8, "auto")
    gc.collect()
    own = {id(tensor) for tensor in (*unet.parameters(), *unet.buffers())}
    assert len(kept) > 1000 and len(plans) == 12
    assert [ref for ref in kept if ref() is not None and id(ref()) not in own] == []
    parts = [weakref.ref(part) for part in (*unet.modules(), *unet.parameters())]
    del unet
    gc.collect()
    assert [ref for ref in parts if ref() is not None] == []


def test_the_pictures_at_the_end_find_the_unet_s_memory_free(tiny_config, monkeypatch):
    """Nothing of the trained UNet, its gradients or its optimizer is alive when the best epoch is picked."""
    parts, built, picked = [], trainer.build_model, summary.pick_best

    def watched(*arguments):
        made = built(*arguments)
        things = (*made.unet.modules(), *made.unet.parameters(), made.weights, made.optimizer)
        parts.extend(weakref.ref(thing) for thing in things)
        return made

    def pick(*arguments):
        assert parts and [ref for ref in parts if ref() is not None] == []
        return picked(*arguments)

    monkeypatch.setattr(trainer, "build_model", watched)
    monkeypatch.setattr(summary, "pick_best", pick)
    run(tiny_config, num_train_epochs=1)


# Pictures and scores never cost a training ------------------------------------------------------------------------

DRAWN = {"sample_prompts": ("a face",), "samples_per_prompt": 1, "sample_steps": 1, "sample_every_n_epochs": 1}


def run_short_of_memory(config, monkeypatch, fails) -> dict:
    """A run whose pipeline runs out of memory wherever fails(pictures at once, is tiled) says so."""
    from diffusers import StableDiffusionPipeline

    original, calls = StableDiffusionPipeline.__call__, []

    def call(self, *args, **given):
        calls.append((len(given["generator"]), self.vae.use_tiling))
        if fails(*calls[-1]):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return original(self, *args, **given)

    monkeypatch.setattr(StableDiffusionPipeline, "__call__", call)
    return run(config, num_train_epochs=1, **DRAWN), calls


def test_short_of_memory_pictures_are_drawn_one_at_a_time_and_decoded_in_tiles(tiny_config, monkeypatch, capsys):
    summary, calls = run_short_of_memory(tiny_config, monkeypatch, lambda at_once, is_tiled: not is_tiled)
    output, printed = Path(tiny_config.output_dir), capsys.readouterr().out
    assert {at_once for at_once, is_tiled in calls if is_tiled} == {1}
    assert "Out of memory while drawing samples, once more, one picture at a time" in printed
    assert "Out of memory while drawing and scoring, once more" in printed and "left out" not in printed
    assert (output / "samples" / "epoch-001.png").is_file() and (output / "before_after.png").is_file()
    assert summary["best_epoch"] == 1


def test_without_memory_for_any_picture_the_lora_is_exported_by_validation_loss(tiny_config, monkeypatch, capsys):
    summary, _ = run_short_of_memory(tiny_config, monkeypatch, lambda *_: True)
    output, printed = Path(tiny_config.output_dir), capsys.readouterr().out
    assert printed.count("Out of memory while drawing samples: left out") == 2  # of the base, and after the epoch
    assert printed.count("Out of memory while drawing and scoring: left out") == 1
    assert summary["score"] is None and "validation loss" in summary["best_reason"]
    assert all((output / name).is_file() for name in (*LORA_FILES, "summary.json", "best.json", "report.html"))
    assert not list((output / "samples").glob("*.png")) and not (output / "before_after.png").exists()
    monkeypatch.undo()
    capsys.readouterr()
    run(tiny_config, num_train_epochs=1, **DRAWN)
    assert "holds this run, finished" in capsys.readouterr().out


def test_a_report_without_memory_for_pictures_at_other_strengths_is_whole_but_for_them(
    tiny_config, monkeypatch, capsys
):
    def short(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("evaluation.score.Evaluation.at_strengths", short)
    run(tiny_config, num_train_epochs=1, **DRAWN)
    report = Path(tiny_config.output_dir, "report.html").read_text(encoding="utf-8")
    assert "Out of memory while drawing at other strengths: left out" in capsys.readouterr().out
    assert "How strong?" not in report and "Before and after" in report and "still training" not in report


def test_a_gpu_s_kernels_are_tried_for_one_shape_or_where_untried_ones_fail_and_sums_are_in_float32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    sums = torch.backends.cuda.matmul
    sums.allow_fp16_reduced_precision_reduction = True  # torch's own; no monkeypatch can put it back
    for card, shapes, expected in (("H200", 1, True), ("H200", 2, False), ("GeForce GTX 1660 SUPER", 2, True)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, card=card: f"NVIDIA {card}")
        tune_for(torch.device("cuda"), shapes)
        assert torch.backends.cudnn.benchmark == expected
    assert not sums.allow_fp16_reduced_precision_reduction


def test_another_error_while_drawing_is_not_taken_for_lack_of_memory(tiny_config, monkeypatch):
    monkeypatch.setattr("evaluation.pictures.draw_pictures", lambda *_: (_ for _ in ()).throw(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        run(tiny_config, num_train_epochs=1, **DRAWN)


def test_tiles_blend_to_what_the_whole_picture_is(tiny_base):
    """A tile sees less than the whole picture does: near, not equal."""
    vae, latents = load_vae(tiny_base, CPU), torch.randn(1, 4, 96, 96, generator=torch.Generator().manual_seed(0))
    unet, scheduler = load_unet(tiny_base, CPU, torch.float32)
    whole = decode(vae, latents)[0].astype(float)
    build_pipeline(vae, unet, scheduler, is_sparing=True)
    tiled = decode(vae, latents)[0].astype(float)
    assert whole.shape == tiled.shape and not np.array_equal(whole, tiled)
    assert abs(whole - tiled).mean() < 0.1 * whole.std()


class Counted(TorchDispatchMode):
    """The most bytes that were alive at once of what operations gave; with fake tensors nothing is computed."""

    def __init__(self):
        super().__init__()
        self.alive, self.peak = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(given):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                reference = StorageWeakRef(storage)
                self.alive.setdefault(reference.cdata, (reference, storage.nbytes()))
        self.alive = {key: (ref, size) for key, (ref, size) in self.alive.items() if not ref.expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return given


def counted(make, dtype: torch.dtype, shapes, call) -> tuple[float, float]:
    """(GiB of a network's weights, GiB at the peak of its call beside them)."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            network = make().eval().requires_grad_(False)
            weights = sum(weight.nbytes for weight in network.parameters())
            inputs = [torch.empty(shape) for shape in shapes]
            with Counted() as count, torch.no_grad():
                call(network, *inputs)
    finally:
        torch.set_default_dtype(before)
    return weights / 2**30, count.peak / 2**30


def test_pictures_of_sd15_at_512_pixels_take_under_3_gib_where_memory_is_short():
    """UNet in float16, both of guidance's passes; VAE in float32, a tile; the text encoder's 123 M in float16."""
    wide = (128, 256, 512, 512)
    ends = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    unet, drawing = counted(
        lambda: UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8),
        torch.float16,
        [(2, 4, 64, 64), (2, 77, 768)],
        lambda network, latents, texts: network(latents, 10, texts).sample,
    )
    tile = SPARING_TILE // 8
    vae, decoding = counted(
        lambda: AutoencoderKL(block_out_channels=wide, layers_per_block=2, **ends),
        torch.float32,
        [(1, 4, tile, tile)],
        lambda network, latents: network.decode(latents).sample,
    )
    assert 1.5 < unet < 1.7 and 0.3 < vae < 0.35 and decoding < 0.25  # a whole picture's decoding takes 0.75
    assert unet + vae + 0.23 + max(drawing, decoding) < 3.0
