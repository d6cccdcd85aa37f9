"""The training: one step, whole runs on a tiny random base, interruptions, several processes.

    python -m pytest tests/test_training.py
"""

import csv
import dataclasses
import json
import math
import os
import pathlib
import shutil
import signal

import numpy as np
import pytest
import torch

import checkpoint
import denoising
import evaluate_lora
import train_manga_lora as trainer
from base_model import load_unet
from dataset import EncodedDataset, InputError, MangaFaceDataset
from lora_layers import flatten_lora, fuse_lora, inject_lora, lora_modules, lora_parameters

CPU = torch.device("cpu")
LATENT_SHAPE = (4, 16, 16)


def run(config, **changes):
    return trainer.main(dataclasses.replace(config, **changes))


def metrics(config) -> list[dict]:
    """metrics.csv without the one column that is a stopwatch."""
    with open(os.path.join(config.output_dir, "metrics.csv"), newline="") as file:
        return [{name: value for name, value in row.items() if name != "images_per_s"} for row in csv.DictReader(file)]


def exported(config, name="pytorch_lora_weights.bin") -> bytes:
    with open(os.path.join(config.output_dir, name), "rb") as file:
        return file.read()


def signal_at_step(monkeypatch, step: int, number=signal.SIGTERM) -> None:
    """Send this process a signal while optimizer step `step` (from 1) is under way."""
    original, calls = trainer.accumulate_gradients, []

    def wrapped(*arguments):
        calls.append(1)
        if len(calls) == step:
            os.kill(os.getpid(), number)
        return original(*arguments)

    monkeypatch.setattr(trainer, "accumulate_gradients", wrapped)


# One step --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def precise(tiny_base, tmp_path_factory, demo_faces):
    """(UNet in float64 with a LoRA that does something, schedule, data set, encoded data set, config)."""
    torch.manual_seed(0)
    unet, scheduler = load_unet(tiny_base, CPU, torch.float32)
    inject_lora(unet, 4, 8)
    unet.double()
    with torch.no_grad():
        for parameter in lora_parameters(unet):
            parameter.normal_(std=0.1)
    config = trainer.TrainingConfig(weighting="loss", resolution=64)
    dataset = MangaFaceDataset(demo_faces, demo_faces / "modified_face_250.json", 64, "loss", num_workers=0)
    shape = (len(dataset.samples), *LATENT_SHAPE)
    encoded = EncodedDataset(
        torch.randn(shape).double(), torch.rand(shape).double(), torch.randn(len(dataset.texts), 77, 16).double()
    )
    return unet, scheduler, dataset, encoded, config


def gradient_of_step(precise, rows, batch_size, count=8):
    unet, scheduler, dataset, encoded, config = precise
    for parameter in lora_parameters(unet):
        parameter.grad = None
    window = denoising.draw_window(dataset, dataset.epoch_order(0)[:count], config.seed, 0, LATENT_SHAPE, 1000, 0.1)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    loss = denoising.accumulate_gradients(unet, scheduler, encoded, window, rows, batch_size, scaler)
    return loss, [parameter.grad.clone() for parameter in lora_parameters(unet)], window


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_any_micro_batch_gives_the_same_step(precise, batch_size):
    whole_loss, whole, _ = gradient_of_step(precise, torch.arange(8), 8)
    loss, parts, _ = gradient_of_step(precise, torch.arange(8), batch_size)
    assert abs(loss - whole_loss) < 1e-10
    assert max((a - b).abs().max() for a, b in zip(whole, parts, strict=True)) < 1e-10
    assert max(a.abs().max() for a in whole) > 1e-3


def test_a_process_without_images_in_the_last_window_adds_zeros(precise):
    """The fourth of four processes, in a window of one image."""
    unet, scheduler, dataset, encoded, config = precise
    for parameter in lora_parameters(unet):
        parameter.grad = torch.zeros_like(parameter)
    window = denoising.draw_window(dataset, dataset.epoch_order(0)[:1], config.seed, 0, LATENT_SHAPE, 1000, 0.1)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    rows = torch.arange(len(window))[3::4]
    assert denoising.accumulate_gradients(unet, scheduler, encoded, window, rows, 8, scaler) == 0
    assert not any(parameter.grad.any() for parameter in lora_parameters(unet))


def test_a_partial_window_is_divided_by_what_is_in_it(precise):
    """Against the formula: sum of weight x per-image loss over 5 images, divided by 5."""
    loss, _, window = gradient_of_step(precise, torch.arange(5), 2, count=5)
    unet, scheduler, dataset, encoded, _ = precise
    latents = encoded.latent_mean[window.faces] + encoded.latent_std[window.faces] * window.posterior_noise
    alphas = scheduler.alphas_cumprod.double()[window.timesteps].view(-1, 1, 1, 1)
    noisy = alphas.sqrt() * latents + (1 - alphas).sqrt() * window.noise
    prediction = unet(noisy, window.timesteps, encoded.text_embeddings[window.texts]).sample
    weights = torch.from_numpy(dataset.weights)[[dataset.train.index(face) for face in window.faces.tolist()]]
    expected = (weights * ((prediction - window.noise) ** 2).mean(dim=(1, 2, 3))).sum() / 5
    assert abs(loss - expected) < 1e-6  # the schedule's own arithmetic is float32
    assert weights.std() > 0.05


def test_a_base_that_predicts_v_is_given_v(precise):
    """v = sqrt(alpha) noise - sqrt(1 - alpha) latents (Salimans & Ho 2022)."""
    unet, scheduler, _, _, _ = precise
    v_scheduler = type(scheduler).from_config(scheduler.config, prediction_type="v_prediction")
    generator = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(2, *LATENT_SHAPE, generator=generator).double() for _ in range(2))
    text, timesteps = torch.randn(2, 77, 16, generator=generator).double(), torch.tensor([100, 800])
    alphas = scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1).double()
    with torch.no_grad():
        losses = denoising.denoising_losses(unet, v_scheduler, latents, text, timesteps, noise)
        prediction = unet(alphas.sqrt() * latents + (1 - alphas).sqrt() * noise, timesteps, text).sample
    v = alphas.sqrt() * noise - (1 - alphas).sqrt() * latents
    assert torch.allclose(losses, (prediction - v).square().mean(dim=(1, 2, 3)), atol=1e-5)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtype, least", [(torch.float16, 0.999), (torch.bfloat16, 0.995)])
def test_a_half_precision_base_gives_float32_gradients_in_the_same_direction(
    tiny_base, shared_faces, dtype, least, fused
):
    """The fp16 path of a GPU, run on the CPU: half UNet, float32 LoRA, loss scale. Cosine per module to the plain
    float32 path; bf16's, with 8 bits, is 0.9976 at worst, fused or not.
    """
    dataset = MangaFaceDataset(shared_faces, shared_faces / "modified_face_250.json", 64, num_workers=0)
    generator = torch.Generator().manual_seed(1)
    mean = torch.randn(len(dataset.samples), *LATENT_SHAPE, generator=generator)
    texts = torch.randn(len(dataset.texts), 77, 16, generator=generator)
    gradients = {}
    for precision in (torch.float32, dtype):
        unet, scheduler = load_unet(tiny_base, CPU, precision)
        torch.manual_seed(0)
        inject_lora(unet, 4, 8)
        if fused and precision == dtype:
            fuse_lora(unet)
        parameters = lora_parameters(unet)
        optimizer = torch.optim.AdamW(parameters)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=precision == torch.float16)
        encoded = EncodedDataset(mean, mean * 0.1, texts.to(precision))
        window = denoising.draw_window(dataset, range(8), 0, 0, LATENT_SHAPE, 1000, 0.1)
        loss = denoising.accumulate_gradients(unet, scheduler, encoded, window, torch.arange(8), 4, scaler)
        scaler.unscale_(optimizer)
        assert loss.dtype == torch.float32 and all(parameter.grad.dtype == torch.float32 for parameter in parameters)
        gradients[precision] = [layer.up_weight.grad.flatten() for layer in lora_modules(unet).values()]
    cosines = [torch.cosine_similarity(a, b, dim=0).item() for a, b in zip(*gradients.values(), strict=True)]
    assert min(cosines) >= least, min(cosines)


def hundred_losses(base, faces, seed, dtype=None):
    """The losses of 100 steps on latents of 8 x 8. dtype: that of the fused path's base; None is the plain path.

    Plain: torch's AdamW on 256 tensors, one projection at a time, float32. Fused: as the trainer does it, with its
    flat weights, fused AdamW and, in fp16, its loss scale.
    """
    dataset = MangaFaceDataset(faces, faces / "modified_face_250.json", 64, num_workers=0)
    generator, shape = torch.Generator().manual_seed(1), (4, 8, 8)
    mean = torch.randn(len(dataset.samples), *shape, generator=generator)
    texts = torch.randn(len(dataset.texts), 77, 16, generator=generator)
    unet, scheduler = load_unet(base, CPU, dtype or torch.float32)
    encoded = EncodedDataset(mean, mean * 0.1, texts.to(unet.dtype))
    torch.manual_seed(seed)
    inject_lora(unet, 4, 8)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16 if dtype == torch.float16 else 1.0)
    if dtype is None:
        weights = lora_parameters(unet)
        optimizer = torch.optim.AdamW(weights, lr=2e-3, foreach=False)
    else:
        fuse_lora(unet)
        weights = flatten_lora(unet)
        optimizer = torch.optim.AdamW([weights], lr=2e-3, fused=True)
    losses, rows = [], torch.arange(2)
    for step in range(100):
        optimizer.zero_grad(set_to_none=False)
        window = denoising.draw_window(dataset, [step % 4, 5], seed, step, shape, 1000, 0.1)
        losses.append(denoising.accumulate_gradients(unet, scheduler, encoded, window, rows, 2, scaler).item())
        if dtype is None:
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
        else:
            assert trainer.clip_and_step(optimizer, scaler, weights, 1.0)
    return np.array(losses)


@pytest.fixture(scope="module")
def plain_losses(tiny_base, shared_faces):
    """Of the plain path, and of a second seed: another LoRA at the start, other captions, timesteps and noise."""
    return [hundred_losses(tiny_base, shared_faces, seed) for seed in (0, 1)]


@pytest.mark.parametrize("dtype, most", [(torch.float32, 1e-5), (torch.float16, 0.002), (torch.bfloat16, 0.01)])
def test_a_hundred_steps_of_the_fused_path_follow_the_plain_ones_within_the_noise_of_the_seed(
    tiny_base, shared_faces, plain_losses, dtype, most
):
    """To a small part of it: a learning rate 1 % higher is 0.005 apart. The noise is the mean distance to a real run
    of a second seed, which is stricter than the change from one step's loss to the next's (by a quarter).
    """
    plain, other = plain_losses
    assert plain[-20:].mean() < plain[:20].mean() - 0.01  # it learns
    fused = hundred_losses(tiny_base, shared_faces, 0, dtype)
    apart, noise = np.abs(plain - fused).mean(), np.abs(plain - other).mean()
    assert apart < most * noise, (apart, noise)


@pytest.mark.parametrize("recompute, forward_passes", [("largest", 16 + 2 + 3), ("all", 2 * 16)])
def test_recomputation_leaves_every_module_s_gradient_as_it_is(tiny_base, recompute, forward_passes):
    """On the trainer's path. The transformer blocks really computed twice: of the first and the last block, or all."""
    unet, _ = load_unet(tiny_base, CPU, torch.float32)
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
    for tier, expected in (("nothing", 16), (recompute, forward_passes)):
        denoising.MemoryPlan(2, tier, 0.0).apply(unet)
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
    plans = denoising.memory_plans(unet, *shapes, 4, "auto")
    assert [(plan.recompute, plan.micro_batch) for plan in plans] == [
        (tier, images) for tier in ("nothing", "largest", "all") for images in (4, 2, 1)
    ]
    for plan in plans:
        plan.apply(unet)
        measured = live_bytes(unet, shapes, plan.micro_batch)
        assert 0.7 * measured <= plan.needed / denoising.RESERVE <= 1.1 * measured, (plan, measured)
        assert measured <= plan.needed, (plan, measured)
    of_four = [plan.needed for plan in plans if plan.micro_batch == 4]
    assert of_four[0] > 1.3 * of_four[1] > 1.3 * of_four[2]


def test_the_first_plan_that_fits_is_chosen():
    plans = [denoising.MemoryPlan(n, tier, size) for n, tier, size in ((8, "nothing", 80), (4, "nothing", 40),
             (8, "all", 24), (4, "all", 12))]  # fmt: skip
    choices = {100: plans[0], 80: plans[0], 79: plans[1], 39: plans[2], 20: plans[3], 1: plans[3]}
    assert {free: denoising.choose_plan(plans, free) for free in choices} == choices


def half_of_the_step(rank, folder, base, faces):
    """One of two processes: its half of the window, then the sum over both."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    state = torch.load(f"{folder}/precise.pt", weights_only=False)
    unet, scheduler = load_unet(base, CPU, torch.float32)
    inject_lora(unet, 4, 8)
    unet.double().load_state_dict(state["unet"])
    dataset = MangaFaceDataset(faces, faces / "modified_face_250.json", 64, "loss", num_workers=0)
    precise = (unet, scheduler, dataset, EncodedDataset(*state["encoded"]), trainer.TrainingConfig(weighting="loss"))
    rows = torch.arange(rank, 5, 2)  # 5 images: the processes' shares differ
    loss, _, window = gradient_of_step(precise, rows, 2, count=5)
    gradients = [parameter.grad for parameter in lora_parameters(unet)]
    denoising.sum_over_processes(loss, *gradients)
    torch.save({"images": window.faces[rows], "loss": loss, "gradients": gradients}, f"{folder}/result{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_give_the_same_step_as_one(precise, tmp_path, tiny_base, demo_faces):
    whole_loss, whole, window = gradient_of_step(precise, torch.arange(5), 5, count=5)
    unet, _, _, encoded, _ = precise
    tensors = (encoded.latent_mean, encoded.latent_std, encoded.text_embeddings)
    torch.save({"unet": unet.state_dict(), "encoded": tensors}, tmp_path / "precise.pt")
    torch.multiprocessing.spawn(half_of_the_step, (str(tmp_path), tiny_base, demo_faces), nprocs=2)
    results = [torch.load(tmp_path / f"result{rank}.pt") for rank in (0, 1)]
    images = [set(result["images"].tolist()) for result in results]
    assert not images[0] & images[1] and images[0] | images[1] == set(window.faces.tolist())
    for result in results:
        assert abs(result["loss"] - whole_loss) < 1e-10
        assert max((a - b).abs().max() for a, b in zip(whole, result["gradients"], strict=True)) < 1e-10


def test_what_a_step_draws_depends_on_seed_and_step_alone(precise):
    _, _, dataset, _, _ = precise
    draw = lambda step, seed=0: denoising.draw_window(dataset, range(8), seed, step, LATENT_SHAPE, 1000, 0.1)  # noqa: E731
    first = draw(5)
    draw(6), torch.randn(7)  # neither other steps nor the global generator matter
    again = draw(5)
    assert all(torch.equal(getattr(first, f.name), getattr(again, f.name)) for f in dataclasses.fields(first))
    assert not torch.equal(first.noise, draw(6).noise) and not torch.equal(first.noise, draw(5, seed=1).noise)
    assert not torch.equal(first.noise, first.posterior_noise)


def test_timesteps_are_stratified_and_captions_come_from_the_face(precise):
    _, _, dataset, _, _ = precise
    joined = dropped = 0
    for step in range(200):
        window = denoising.draw_window(dataset, range(8), 0, step, LATENT_SHAPE, 1000, 0.1)
        assert sorted((window.timesteps // 125).tolist()) == list(range(8))
        for face, text in zip(window.faces.tolist(), window.texts.tolist(), strict=True):
            assert text == 0 or text in dataset.text_indices[face]
            dropped += text == 0
            joined += text == dataset.text_indices[face][-1]
    assert abs(dropped / 1600 - 0.1) < 0.03
    variants = sum(1 / len(dataset.text_indices[face]) for face in window.faces.tolist()) / 8
    assert abs(joined / 1600 - 0.9 * variants) < 0.04
    assert (denoising.draw_window(dataset, range(50), 0, 0, LATENT_SHAPE, 1000, 0.0).texts > 0).all()


def test_clipping_bounds_the_norm_of_the_gradient():
    weights = torch.nn.Parameter(torch.ones(35))
    optimizer, scaler = torch.optim.SGD([weights], lr=1.0), torch.amp.GradScaler("cpu", init_scale=1.0)
    for limit, expected in ((1.0, 1.0), (0.25, 0.25), (0.0, 70.0), (1000.0, 70.0)):
        before = weights.detach().clone()
        weights.grad = torch.full_like(weights, 70.0 / math.sqrt(35))
        assert trainer.clip_and_step(optimizer, scaler, weights, limit)
        assert (weights - before).norm().item() == pytest.approx(expected, rel=1e-4), limit


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan, 1e30])  # 1e30: finite, but the norm isn't
@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_a_step_that_is_not_finite_changes_neither_weights_nor_moments_and_halves_the_scale(bad, scale):
    """Against torch's AdamW that never saw the bad step."""
    weights, reference = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer, theirs = torch.optim.AdamW([weights], lr=0.1, fused=True), torch.optim.AdamW([reference], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    for step in range(4):
        weights.grad = reference.grad = None
        scaler.scale((weights * torch.tensor([1.0, 0.1 * step, 2.0])).sum()).backward()
        if step == 2:
            weights.grad[1] = bad
            before = weights.detach().clone()
            assert not trainer.clip_and_step(optimizer, scaler, weights, 1.0)
            assert torch.equal(weights, before) and scaler.get_scale() == scale / 2
            continue
        (reference * torch.tensor([1.0, 0.1 * step, 2.0])).sum().backward()
        torch.nn.utils.clip_grad_norm_([reference], 1.0)
        theirs.step()
        assert trainer.clip_and_step(optimizer, scaler, weights, 1.0)
    torch.testing.assert_close(weights, reference, rtol=1e-5, atol=1e-6)
    assert optimizer.state[weights]["step"] == 3


def test_warmup_then_cosine_equals_the_library_schedule():
    from diffusers.optimization import get_cosine_schedule_with_warmup

    config, total = trainer.TrainingConfig(learning_rate=5e-5, lr_warmup_ratio=0.05), 840
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=5e-5)
    reference = get_cosine_schedule_with_warmup(optimizer, 42, total)
    for step in range(total):
        expected = reference.get_last_lr()[0] + (5e-5 / 42 if step < 42 else 0)  # theirs wastes step 0 on a rate of 0
        assert trainer.learning_rate_at(step, total, config) == pytest.approx(expected, abs=1e-12)
        optimizer.step()
        reference.step()
    off = dataclasses.replace(config, lr_warmup_ratio=0.0)
    assert trainer.learning_rate_at(0, total, off) == 5e-5


def test_weight_decay_is_the_original_log_line_and_acts_exactly():
    config = trainer.TrainingConfig()
    assert f"Epoch 15: Using weight decay {trainer.weight_decay_at(14, config):.1e}" == (
        "Epoch 15: Using weight decay 5.2e-05"
    )
    assert trainer.weight_decay_at(0, config) == 1e-5
    start = torch.rand(100_000, generator=torch.Generator().manual_seed(0)) - 0.5
    by_torch, ours, left = torch.nn.Parameter(start.clone()), start.clone(), 0.0
    optimizer = torch.optim.AdamW([by_torch], lr=5e-5, weight_decay=1e-4)
    for _ in range(30):  # epochs of 10 steps at a hundredth of the resolution of float32 each
        for _ in range(10):
            by_torch.grad = torch.zeros_like(by_torch)
            optimizer.step()
        left = trainer.apply_decay(ours, left + 10 * math.log1p(-5e-5 * 1e-4))
    assert torch.equal(by_torch, start)  # float32 rounds 1 - 5e-9 to 1: torch's own decay does nothing
    factor = (ours.double() @ start.double() / (start.double() @ start.double())).item()
    assert math.log(factor) == pytest.approx(300 * math.log1p(-5e-9), rel=0.05)


# Whole runs ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_base, shared_faces):
    """(config, summary, UNet) of one whole run, pictures included; for tests that only look."""
    config = trainer.TrainingConfig(
        dataset_dir=str(shared_faces), json_file=str(shared_faces / "modified_face_250.json"), resolution=64,
        output_dir=str(tmp_path_factory.mktemp("out")), cache_dir=str(tmp_path_factory.mktemp("cache")),
        pretrained_model=str(tiny_base), num_train_epochs=1, train_batch_size=3, gradient_accumulation_steps=2,
        lora_rank=4, lora_alpha=8, sample_prompts=("a manga face", "another"), sample_steps=2, sample_every_n_epochs=1,
    )
    unets, original = [], trainer.load_unet

    def spy(*arguments):
        unets.append(original(*arguments))
        return unets[-1]

    trainer.load_unet = spy
    try:
        summary = trainer.main(config)
    finally:
        trainer.load_unet = original
    return config, summary, unets[0][0]


def test_a_run_leaves_exactly_the_promised_files(finished):
    config, _, _ = finished
    found = {os.path.relpath(os.path.join(folder, name), config.output_dir).replace(os.sep, "/")
             for folder, _, names in os.walk(config.output_dir) for name in names}
    assert found == {
        "config.json", "metrics.csv", "summary.json", "before_after.png", "pytorch_lora_weights.bin",
        "pytorch_lora_weights.safetensors", "last/pytorch_lora_weights.bin", "last/pytorch_lora_weights.safetensors",
        "best.json", "scores.json", "candidates/epoch-001/pytorch_lora_weights.bin",
        "candidates/epoch-001/pytorch_lora_weights.safetensors",
        "samples/epoch-000.png", "samples/epoch-001.png", "checkpoints/step-000003/state.safetensors",
        "checkpoints/step-000003/state.json", "checkpoints/step-000003/manifest.json",
    }


def test_the_summary_has_every_promised_field_and_they_agree(finished):
    config, summary, _ = finished
    with open(os.path.join(config.output_dir, "summary.json")) as file:
        assert json.load(file) == summary
    for name in ("lora_bin", "lora_safetensors", "epochs_run", "best_epoch", "stopped_epoch", "optimizer_steps",
                 "images_seen", "val_loss_start", "val_loss_best", "val_ratio", "colourfulness_base",
                 "colourfulness_lora", "images_per_s", "peak_memory_mib", "seconds", "first_step_s",
                 "resumed_from_step", "converged_epoch", "score_base", "score_lora", "best_reason"):
        assert name in summary, name
    assert (summary["epochs_run"], summary["optimizer_steps"], summary["images_seen"]) == (1, 3, 16)
    assert summary["val_ratio"] == summary["val_loss_best"] / summary["val_loss_start"]
    rows = metrics(config)
    assert [row["step"] for row in rows] == [str(step) for step in (1, 2, 3)]
    assert [row["val_loss"] for row in rows] == [""] * 2 + [str(summary["val_loss_best"])]
    assert all(float(row["loss"]) == pytest.approx(float(row["w_loss"]) + float(row["penalty"])) for row in rows)
    assert float(rows[0]["penalty"]) == pytest.approx(128 * 4 / 3 * 1e-5, rel=0.03)  # modules x rank / 3 x factor


def test_the_base_is_the_same_on_disk_and_in_memory_after_training_and_sampling(finished, tiny_base):
    _, _, unet = finished
    fresh, _ = load_unet(tiny_base, CPU, torch.float32)
    trained = unet.state_dict()
    assert all(torch.equal(tensor, trained[name]) for name, tensor in fresh.state_dict().items())
    assert all(layer.up_weight.any() for layer in lora_modules(unet).values())


def test_evaluating_the_folder_draws_the_same_pictures_again(finished, capsys):
    config, summary, _ = finished
    with open(os.path.join(config.output_dir, "before_after.png"), "rb") as file:
        before = file.read()
    evaluate_lora.main(["--lora", config.output_dir])
    colours = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("colourfulness")).split()
    assert colours[1:3] == [f"{summary['colourfulness_base']:.3f}", f"{summary['colourfulness_lora']:.3f}"]
    with open(os.path.join(config.output_dir, "before_after.png"), "rb") as file:
        assert file.read() == before
    with pytest.raises(InputError, match="no finished training"):
        evaluate_lora.main(["--lora", config.cache_dir])


def test_the_sheet_of_epoch_0_is_the_base_s_own_and_the_training_goes_on_as_if_it_had_not_been_drawn(
    finished, tiny_base, monkeypatch
):
    """Drawn after epoch 1 with the LoRA at zero, against the base's pipeline with the prompts as text."""
    from diffusers import StableDiffusionPipeline

    config, _, _ = finished
    drawn, original = [], evaluate_lora.draw_pictures
    monkeypatch.setattr(evaluate_lora, "draw_pictures", lambda *a: drawn.append(original(*a)) or drawn[-1])
    again = dataclasses.replace(config, output_dir=config.output_dir + "-again", learning_rate=0.02)
    without = dataclasses.replace(again, output_dir=config.output_dir + "-without", sample_every_n_epochs=0)
    trainer.main(again)
    trainer.main(without)
    assert exported(again) == exported(without)
    pipe = StableDiffusionPipeline.from_pretrained(tiny_base, safety_checker=None)
    prompts = [{"prompt": prompt} for prompt in config.sample_prompts]
    expected = original(pipe, prompts, [config.seed] * 2, 64, 2, config.guidance_scale)
    assert np.abs(drawn[0].astype(int) - expected).max() <= 1
    assert np.abs(drawn[1].astype(int) - drawn[0]).max() > 1
    assert len(os.listdir(os.path.join(again.output_dir, "samples"))) == 2


def test_nothing_is_encoded_twice(tiny_config, monkeypatch):
    run(tiny_config, num_train_epochs=1)
    for loader in ("load_vae", "load_text_encoder"):
        monkeypatch.setattr(trainer, loader, lambda *_: pytest.fail("loaded again"))
    run(tiny_config, num_train_epochs=1, overwrite=True)
    with pytest.raises(pytest.fail.Exception):
        run(tiny_config, num_train_epochs=1, overwrite=True, resolution=96)


def test_the_same_seed_gives_the_same_bytes_and_samples_change_nothing(tiny_config):
    run(tiny_config)
    first = exported(tiny_config)
    run(tiny_config, overwrite=True, sample_prompts=("a face",), sample_every_n_epochs=1, sample_steps=1,
        samples_per_prompt=1, save_every_n_epochs=0)
    assert exported(tiny_config) == first
    run(tiny_config, overwrite=True, seed=1)
    assert exported(tiny_config) != first


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
    original, tried = trainer.accumulate_gradients, []

    def wrapped(*arguments):
        tried.append(arguments[-2])
        if arguments[-2] >= too_large:
            original(*arguments)  # gradients that a failed attempt leaves behind must not count
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes.")
        return original(*arguments)

    monkeypatch.setattr(trainer, "accumulate_gradients", wrapped)
    return tried


def test_out_of_memory_at_step_1_steps_down_loudly_and_changes_nothing_else(tiny_config, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "choose_plan", lambda plans, _: next(p for p in plans if p.micro_batch == 2))
        run(tiny_config, num_train_epochs=1)
    small = exported(tiny_config)
    capsys.readouterr()
    with monkeypatch.context() as patch:
        tried = out_of_memory_at(patch, too_large=4)
        run(tiny_config, num_train_epochs=1, overwrite=True)
    assert tried[:3] == [8, 4, 2] and set(tried[3:]) == {2} and exported(tiny_config) == small
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
    monkeypatch.setattr(trainer, "free_bytes", lambda *_: 1.0)
    tried = out_of_memory_at(monkeypatch, too_large=100)
    run(config)
    assert set(tried) == {4} and exported(config) == uninterrupted[1]


def test_little_free_memory_means_small_passes_and_recomputation(tiny_config, monkeypatch, capsys):
    monkeypatch.setattr(trainer, "free_bytes", lambda *_: 1.0)
    run(tiny_config, num_train_epochs=1)
    assert "Memory: 1 images per pass, all blocks are computed twice" in capsys.readouterr().out


# Interrupted, resumed, changed -----------------------------------------------------------------------------------


@pytest.fixture
def uninterrupted(tiny_config):
    """The result every interrupted run has to reproduce: (rows of metrics.csv, bytes of both .bin)."""
    config = dataclasses.replace(tiny_config, output_dir=tiny_config.output_dir + "-uninterrupted", train_batch_size=1)
    run(config)
    return metrics(config), exported(config), exported(config, "last/pytorch_lora_weights.bin")


@pytest.mark.parametrize("step", [1, 3, 4, 11])  # of 4 per epoch: first, mid-epoch, an epoch's last, the last but one
def test_a_resumed_run_equals_an_uninterrupted_run(tiny_config, uninterrupted, monkeypatch, step):
    config = dataclasses.replace(tiny_config, train_batch_size=1)
    with monkeypatch.context() as patch:
        signal_at_step(patch, step)
        with pytest.raises(trainer.Stop) as stop:
            run(config)
    assert stop.value.exit_code == 143 and f"saved after step {step} of 12" in str(stop.value)
    summary = run(config)
    assert summary["resumed_from_step"] == step and summary["optimizer_steps"] == 12
    assert (metrics(config), exported(config), exported(config, "last/pytorch_lora_weights.bin")) == uninterrupted


def test_a_resume_that_forgot_its_position_would_be_noticed(tiny_config, uninterrupted, monkeypatch):
    """Negative control of the test above: same weights and optimizer, but the draws start over."""
    config = dataclasses.replace(tiny_config, train_batch_size=1)
    with monkeypatch.context() as patch:
        signal_at_step(patch, 3, signal.SIGINT)
        with pytest.raises(trainer.Stop) as stop:
            run(config)
    assert stop.value.exit_code == 130
    original = trainer.draw_window
    monkeypatch.setattr(trainer, "draw_window", lambda d, p, seed, step, *rest: original(d, p, seed, step - 3, *rest))
    run(config)
    assert exported(config) != uninterrupted[1]


def test_best_epoch_and_patience_survive_an_interruption(tiny_config, monkeypatch):
    """Validation losses by epoch; the best is epoch 2, patience ends the run after epoch 4."""
    results = []
    for interrupted in (False, True):
        losses = iter([1.0, 0.9, 0.7, 0.8, 0.75, 0.1])
        config = dataclasses.replace(tiny_config, num_train_epochs=6, early_stopping_patience=2,
                                     output_dir=f"{tiny_config.output_dir}-{interrupted}")
        with monkeypatch.context() as patch:
            patch.setattr(trainer, "validate", lambda *_, losses=losses: (next(losses), 0.01))
            if interrupted:
                with monkeypatch.context() as inner:
                    signal_at_step(inner, 5)  # the first of epoch 3
                    with pytest.raises(trainer.Stop):
                        run(config)
            summary = run(config)
        assert summary["resumed_from_step"] == (5 if interrupted else 0)
        results.append((summary["best_epoch"], summary["stopped_epoch"], summary["val_loss_best"], exported(config),
                        exported(config, "last/pytorch_lora_weights.bin"), metrics(config)))
    assert results[0] == results[1] and results[0][:3] == (2, 4, 0.7)
    assert results[0][3] != results[0][4]


def test_an_interruption_inside_a_library_is_not_taken_for_that_library_s_failure(tiny_config, monkeypatch):
    def download(*_, **__):
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("not reached")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(trainer.Stop) as stop:
        run(tiny_config, pretrained_model="nobody/nothing")
    assert stop.value.exit_code == 130


def test_a_validation_loss_that_is_not_finite_is_never_the_best(tiny_config, monkeypatch):
    losses = iter([1.0, math.nan])
    monkeypatch.setattr(trainer, "validate", lambda *_: (next(losses), 0.01))
    with pytest.raises(trainer.Stop, match="validation loss after epoch 1 is nan") as stop:
        run(tiny_config)
    assert stop.value.exit_code == 4


def test_a_damaged_checkpoint_is_put_aside_for_the_one_before(tiny_config, uninterrupted, monkeypatch, capsys):
    config = dataclasses.replace(tiny_config, train_batch_size=1)
    with monkeypatch.context() as patch:
        signal_at_step(patch, 10)
        with pytest.raises(trainer.Stop):
            run(config)
    newest = os.path.join(config.output_dir, "checkpoints", "step-000010")
    with open(os.path.join(newest, "state.safetensors"), "r+b") as file:
        file.seek(-5, os.SEEK_END)
        byte = file.read(1)
        file.seek(-5, os.SEEK_END)
        file.write(bytes([byte[0] ^ 1]))
    summary = run(config)
    assert "step-000010 is damaged" in capsys.readouterr().out and os.path.isdir(newest + ".corrupt")
    assert summary["resumed_from_step"] == 8 and exported(config) == uninterrupted[1]


def test_checkpoints_of_another_version_are_refused_in_one_line_and_left_alone(tiny_config, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "gather", lambda weights, *_: {"lora.000": weights})
        run(tiny_config, num_train_epochs=1)
    for name in ("summary.json", "pytorch_lora_weights.bin", "pytorch_lora_weights.safetensors"):
        os.remove(os.path.join(tiny_config.output_dir, name))
    with pytest.raises(checkpoint.CheckpointError, match="another version"):
        run(tiny_config, num_train_epochs=1)
    assert os.listdir(os.path.join(tiny_config.output_dir, "checkpoints")) == ["step-000002"]


def test_a_run_whose_checkpoints_are_all_damaged_never_starts_over_silently(tmp_path):
    for step in (1, 2):
        checkpoint.save_checkpoint(tmp_path, step, {"a": torch.zeros(3)}, {"step": step}, keep=2)
        (tmp_path / f"step-{step:06d}" / "state.json").write_text("{")
    with pytest.raises(checkpoint.CheckpointError, match="--overwrite"):
        checkpoint.load_newest_checkpoint(tmp_path)


def test_a_lora_without_its_checkpoints_is_never_deleted_unasked(tiny_config):
    run(tiny_config, num_train_epochs=1)
    before = exported(tiny_config)
    shutil.rmtree(os.path.join(tiny_config.output_dir, "checkpoints"))
    os.remove(os.path.join(tiny_config.output_dir, "summary.json"))
    with pytest.raises(checkpoint.CheckpointError, match="--overwrite"):
        run(tiny_config, num_train_epochs=1)
    assert exported(tiny_config) == before


def test_a_finished_run_says_so_and_more_epochs_go_on(tiny_config, capsys):
    first = run(tiny_config, num_train_epochs=1)
    capsys.readouterr()
    assert run(tiny_config, num_train_epochs=1) == first
    assert "finished" in capsys.readouterr().out
    summary = run(tiny_config, num_train_epochs=2)
    assert "cosine" in capsys.readouterr().out
    assert (summary["resumed_from_step"], summary["optimizer_steps"], summary["epochs_run"]) == (2, 4, 2)


@pytest.mark.parametrize("name, value", [
    ("learning_rate", 2e-3), ("lora_rank", 2), ("seed", 3), ("weighting", "off"), ("train_batch_size", 1),
    ("caption_dropout", 0.0), ("resolution", 96),
])  # fmt: skip
def test_a_run_with_other_constants_is_refused_naming_them(tiny_config, name, value):
    run(tiny_config, num_train_epochs=1)
    before = exported(tiny_config)
    with pytest.raises(checkpoint.CheckpointError, match=f"{name} was .* is {value!r}"):
        run(tiny_config, num_train_epochs=2, **{name: value})
    assert exported(tiny_config) == before


def test_early_stopping_exports_the_best_epoch_and_keeps_the_last_beside_it(tiny_config, monkeypatch):
    losses = iter([1.0, 0.9, 0.7, 0.8, 0.75, 0.6, 0.6])  # before training, then epochs 1, 2, ...
    monkeypatch.setattr(trainer, "validate", lambda *_: (next(losses), 0.01))
    summary = run(tiny_config, num_train_epochs=6, early_stopping_patience=2)
    assert (summary["best_epoch"], summary["epochs_run"], summary["stopped_epoch"]) == (2, 4, 4)
    assert (summary["val_loss_best"], summary["val_ratio"]) == (0.7, 0.7)
    assert exported(tiny_config) != exported(tiny_config, "last/pytorch_lora_weights.bin")
    best = exported(tiny_config)
    losses = iter([1.0, 0.9, 0.7, 0.8, 0.9, 0.9, 0.9])
    summary = run(tiny_config, num_train_epochs=6, early_stopping_patience=0, overwrite=True)
    assert (summary["best_epoch"], summary["epochs_run"]) == (2, 6) and exported(tiny_config) == best


def test_candidates_lie_between_the_minimum_and_three_times_its_epoch_within_one_standard_error():
    losses = [0.9, 0.6, 0.71, 0.69, 0.65, 0.7, 0.61, 0.6]
    history = [[epoch, loss, 0.1] for epoch, loss in enumerate(losses, start=1)]
    assert denoising.candidate_epochs(history) == [2, 4, 5, 6]  # 3 is beyond the error, 7 and 8 beyond 3 x 2
    assert denoising.candidate_epochs(history[:1]) == [1] and denoising.candidate_epochs([]) == []


def test_of_the_candidates_the_one_chosen_is_exported_and_best_json_says_why(tiny_config, monkeypatch, capsys):
    losses = iter([1.0, 0.9, 0.70, 0.71, 0.79, 0.705])
    monkeypatch.setattr(trainer, "validate", lambda *_: (next(losses), 0.05))
    asked = []

    def choose(epochs, scored):
        asked.append((epochs, sorted(scored)))
        return 3, "it pleased the test"

    monkeypatch.setattr(evaluate_lora, "choose_best", choose)
    config = dataclasses.replace(tiny_config, num_train_epochs=5, early_stopping_patience=0, sample_steps=1,
                                 sample_prompts=("a face", "another face"))  # fmt: skip
    summary = trainer.main(config)
    assert asked == [([2, 3, 5], [2, 3, 5])]  # each was drawn with, and scored
    output = pathlib.Path(config.output_dir)
    folders = sorted(path.name for path in (output / "candidates").iterdir())
    assert folders == ["epoch-002", "epoch-003", "epoch-005"]  # no other epoch's files were kept
    assert exported(config) == (output / "candidates" / "epoch-003" / "pytorch_lora_weights.bin").read_bytes()
    assert exported(config) != exported(config, "last/pytorch_lora_weights.bin")
    best = json.loads((output / "best.json").read_text())
    assert (best["epoch"], best["step"], best["val_loss"], best["reason"]) == (3, 6, 0.71, "it pleased the test")
    assert [row["epoch"] for row in best["candidates"]] == [2, 3, 5]
    assert [row["val_loss"] for row in best["candidates"]] == [0.70, 0.71, 0.705]
    assert best["score"] == best["candidates"][1]["score"] == summary["score_lora"]
    printed = capsys.readouterr().out
    assert "Best epoch: 3 of 5, it pleased the test" in printed
    assert "converged after 2 of 5 epochs" in printed  # 95 % of 0.3 are gained at 0.715
    assert f"Quality score {summary['score_base']:.1f} -> {summary['score_lora']:.1f} of 10" in printed


def test_without_pictures_there_is_no_score_and_the_lowest_validation_loss_decides(tiny_config, monkeypatch):
    losses = iter([1.0, 0.9, 0.7, 0.71])
    monkeypatch.setattr(trainer, "validate", lambda *_: (next(losses), 0.05))
    summary = run(tiny_config)
    best = json.loads(pathlib.Path(tiny_config.output_dir, "best.json").read_text())
    assert (best["epoch"], best["score"], summary["score_lora"]) == (2, "n/a", None)
    assert not os.path.exists(os.path.join(tiny_config.output_dir, "scores.json"))


def test_a_training_that_never_beats_the_base_ends_and_says_so(tiny_config, monkeypatch, capsys):
    losses = iter([1.0, 1.2, 1.1, 1.3])
    monkeypatch.setattr(trainer, "validate", lambda *_: (next(losses), 0.05))
    summary = run(tiny_config)
    assert (summary["converged_epoch"], summary["best_epoch"]) == (None, 2)
    assert "never below the base's: lower learning_rate" in capsys.readouterr().out


@pytest.mark.parametrize("share, losses, reason", [
    (0.0, [], "the last: without held-out faces there is nothing to choose by"),
    (0.1, [1.0, 0.9, 0.8, 0.7], "the lowest validation loss, and the last: more epochs may be better still"),
    (0.1, [1.0, 0.7, 0.8, 0.9], "the only candidate: no later epoch is within a standard error"),
])  # fmt: skip
def test_the_reason_given_for_the_best_epoch_is_the_real_one(tiny_config, monkeypatch, share, losses, reason):
    losses = iter(losses)
    monkeypatch.setattr(trainer, "validate", lambda *_: (next(losses), 0.01))
    summary = run(tiny_config, validation_share=share)
    assert summary["best_reason"].startswith(reason)
    best = json.loads(pathlib.Path(tiny_config.output_dir, "best.json").read_text())
    assert best["reason"] == summary["best_reason"] and (best["val_loss"] == "n/a") == (share == 0)


def test_a_folder_trained_without_prompts_can_be_scored_and_one_whose_faces_changed_can_not(tiny_config, faces, capsys):
    run(tiny_config, num_train_epochs=1, sample_steps=1)
    evaluate_lora.main(["--lora", tiny_config.output_dir])
    assert "quality score, 0 to 10" in capsys.readouterr().out
    scores = json.loads(pathlib.Path(tiny_config.output_dir, "scores.json").read_text())
    assert scores["lora"]["diversity"] == "n/a" and scores["lora"]["novelty"]["n"] == 4  # captions of held-out faces
    entries = json.loads((faces / "modified_face_250.json").read_text())
    entries[3]["captions"] = ["another"]
    (faces / "modified_face_250.json").write_text(json.dumps(entries))
    with pytest.raises(InputError, match="have changed since the training"):
        evaluate_lora.main(["--lora", tiny_config.output_dir])


def test_a_loss_that_is_not_finite_stops_with_exit_code_4_and_exports_nothing(tiny_config, monkeypatch):
    original, calls = denoising.denoising_losses, []

    def poisoned(*arguments):
        calls.append(1)
        return original(*arguments) * (math.nan if len(calls) > 6 and torch.is_grad_enabled() else 1.0)

    monkeypatch.setattr(denoising, "denoising_losses", poisoned)
    with pytest.raises(trainer.Stop, match="images image") as stop:
        run(tiny_config)
    assert stop.value.exit_code == 4
    assert not os.path.exists(os.path.join(tiny_config.output_dir, "pytorch_lora_weights.bin"))


def test_a_module_without_gradient_stops_the_run(tiny_config, monkeypatch):
    def cut_one(unet, *rest):
        processors = inject_lora(unet, *rest)
        layer = next(iter(processors.values())).to_v_lora
        layer.forward = lambda x: torch.zeros(*x.shape[:-1], layer.up_weight.shape[0])
        return processors

    monkeypatch.setattr(trainer, "inject_lora", cut_one)
    monkeypatch.setattr(trainer, "fuse_lora", lambda unet: None)
    with pytest.raises(trainer.Stop, match="1 LoRA modules get no gradient") as stop:
        run(tiny_config)
    assert stop.value.exit_code == 4


def test_every_ingredient_can_be_switched_off(tiny_config, capsys):
    run(tiny_config, num_train_epochs=1, weighting="off", penalty_factor=0.0, min_weight_decay=0.0,
        max_weight_decay=0.0, lr_warmup_ratio=0.0, max_grad_norm=0.0, validation_share=0.0, early_stopping_patience=0,
        caption_dropout=0.0, gradient_checkpointing="off", save_every_n_epochs=0, num_workers=0)
    output = capsys.readouterr().out
    rows = metrics(tiny_config)
    assert all(row["loss"] == row["w_loss"] and float(row["penalty"]) == 0 for row in rows)
    assert all(row["val_loss"] == "" and float(row["weight_decay"]) == 0 for row in rows)
    assert float(rows[0]["lr"]) == tiny_config.learning_rate
    assert "no early stopping" in output and "Weights: off" in output
    assert "x 1.00000000" in output  # the whole run's weight decay


def test_a_dry_run_writes_nothing(tiny_config, capsys):
    assert run(tiny_config, dry_run=True) == {}
    output = capsys.readouterr().out
    assert "2 x 4 x 1 = 8" in output and "2 per epoch x 3 epochs = 6" in output and "Weight range" in output
    assert not os.path.exists(tiny_config.output_dir) and not os.path.exists(tiny_config.cache_dir)


# Read one step late, as on a GPU -----------------------------------------------------------------------------------


@pytest.fixture
def late(monkeypatch):
    """Results are read as on a GPU. Returns what happened, in order: a step was launched, its results were read."""
    events, original = [], trainer.read_later

    def read_later(values):
        number = sum(what == "launched" for what, _ in events) + 1
        events.append(("launched", number))
        results = original(values)
        return lambda: events.append(("read", number)) or results()

    monkeypatch.setattr(trainer, "read_later", read_later)
    monkeypatch.setattr(trainer, "reads_late", lambda device: True)
    return events


def test_reading_a_step_late_changes_nothing_that_a_run_leaves(tiny_config, uninterrupted, late):
    config = dataclasses.replace(tiny_config, train_batch_size=1)
    summary = run(config)
    assert (metrics(config), exported(config), exported(config, "last/pytorch_lora_weights.bin")) == uninterrupted
    assert (summary["optimizer_steps"], summary["images_seen"], summary["skipped_steps"]) == (12, 48, 0)
    order = [("launched", 1), ("launched", 2), ("read", 1), ("launched", 3), ("read", 2), ("launched", 4), ("read", 3),
             ("read", 4), ("launched", 5)]  # an epoch's last step is read at once: its validation follows
    assert late[:9] == order


def test_a_gradient_that_is_not_finite_and_read_late_stops_with_its_own_step_and_images(
    tiny_config, monkeypatch, late
):
    windows, draw, losses = [], trainer.draw_window, denoising.denoising_losses
    monkeypatch.setattr(trainer, "draw_window", lambda *a: windows.append(draw(*a)) or windows[-1])

    def poisoned(*arguments):
        return losses(*arguments) * (math.nan if torch.is_grad_enabled() and len(windows) == 2 else 1.0)

    monkeypatch.setattr(denoising, "denoising_losses", poisoned)
    config = dataclasses.replace(tiny_config, train_batch_size=1)
    with pytest.raises(trainer.Stop) as stop:
        run(config)
    assert stop.value.exit_code == 4 and len(windows) == 3  # step 3 was under way already
    dataset = MangaFaceDataset(config.dataset_dir, config.json_file, 64, num_workers=0)
    names = ", ".join(dataset.samples[face].name for face in windows[1].faces.tolist())
    assert f"step 2: the gradient is not finite (images {names})" in str(stop.value)
    assert [row["step"] for row in metrics(config)] == ["1"]
    assert not os.path.exists(os.path.join(config.output_dir, "pytorch_lora_weights.bin"))


@pytest.mark.parametrize("mine, step, saved", [(True, 2, 2), (False, 2, 3), (False, 3, 4)])  # 4: an epoch's last
def test_an_interrupt_while_a_step_is_unread_saves_it_too_and_resumes_to_the_same_bytes(
    tiny_config, uninterrupted, monkeypatch, late, mine, step, saved
):
    """The own signal ends the run after the step under way; another process's is only seen when that step is read."""
    config = dataclasses.replace(tiny_config, train_batch_size=1)
    with monkeypatch.context() as patch:
        if mine:
            signal_at_step(patch, step)
        else:
            sums = []

            def sum_over_processes(*tensors):
                if len(tensors) == 3:  # gradient, loss, signal
                    sums.append(1)
                    tensors[2].add_(signal.SIGTERM if len(sums) == step else 0)

            patch.setattr(trainer, "sum_over_processes", sum_over_processes)
        with pytest.raises(trainer.Stop, match=f"saved after step {saved} of 12") as stop:
            run(config)
    assert stop.value.exit_code == 143 and late[-1] == ("read", saved)
    written = saved - (saved % 4 == 0)  # an epoch's last row waits for its validation loss
    assert [row["step"] for row in metrics(config)] == [str(number) for number in range(1, written + 1)]
    assert run(config)["resumed_from_step"] == saved
    assert (metrics(config), exported(config), exported(config, "last/pytorch_lora_weights.bin")) == uninterrupted
