"""The optimizer's side of a step: clipping, bad gradients, the rehearsal, a hundred steps, other optimizers."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from conftest import exported, run, signal_at_step

import train_manga_lora as trainer
from dataset import MangaFaceDataset
from lora_layers import LoRALinearLayer, inject_lora, lora_parameters
from training import denoising, memory, model
from training import run as run_module
from training.base_model import load_unet
from training.encoding import EncodedDataset

CPU = torch.device("cpu")
LATENT_SHAPE = (4, 16, 16)


def hundred_losses(base, faces, seed, dtype=None):
    """The losses of 100 steps on latents of 8 x 8. dtype: that of the trainer's own path; None is the plain path.

    Plain: torch's AdamW on 256 tensors, one projection at a time, float32. The trainer's: build_model and train_step,
    with flat weights, fused projections, fused AdamW and, in fp16, a loss scale.
    """
    dataset = MangaFaceDataset(faces, faces / "modified_face_250.json", 64, num_workers=0)
    generator, shape = torch.Generator().manual_seed(1), (4, 8, 8)
    mean = torch.randn(len(dataset.faces), *shape, generator=generator)
    texts = torch.randn(len(dataset.texts), 77, 16, generator=generator)
    latents = torch.stack((mean, mean * 0.1), 1)
    encoded, share = EncodedDataset(latents, texts.to(dtype or torch.float32), CPU), torch.arange(2)
    config = trainer.TrainingConfig(lora_rank=4, lora_alpha=8, seed=seed, penalty_factor=0.0, max_grad_norm=1.0)
    if dtype is None:
        unet, scheduler = load_unet(base, CPU, torch.float32)
        torch.manual_seed(seed)
        inject_lora(unet, 4, 8)
        weights, scaler = lora_parameters(unet), torch.amp.GradScaler("cpu", enabled=False)
        optimizer = torch.optim.AdamW(weights, lr=2e-3, foreach=False, weight_decay=0.0)
    else:
        built = build(base, config, dtype, micro_batch=2)
        scheduler = built.scheduler
    losses = []
    for step in range(100):
        batch = denoising.draw_batch(dataset, [step % 4, 5], seed, step, shape, 1000, 0.1)
        if dtype is None:
            optimizer.zero_grad()
            loss = denoising.accumulate_gradients(unet, scheduler, encoded, batch, share, 2, scaler)
            losses.append(loss.item())
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
        else:
            w_loss, penalty, finite, stop = trainer.train_step(built, encoded, batch, share, 2e-3, config)()
            assert (penalty, finite, stop) == (0, 1, 0)
            losses.append(w_loss)
    return np.array(losses)


def build(base, config, dtype=torch.float32, micro_batch=8):
    """The trainer's model on a CPU, with a plan."""
    built = model.build_model(config, base, CPU, dtype, lambda text: None)
    plan = memory.MemoryPlan(micro_batch, "nothing", 0.0)
    built.plans = memory.Plans(built.unet, [plan], plan, lambda text: None)
    return built


@pytest.fixture(scope="module")
def plain_losses(tiny_base, shared_faces):
    """Of the plain path, and of a second seed: another LoRA at the start, other captions, timesteps and noise."""
    return [hundred_losses(tiny_base, shared_faces, seed) for seed in (0, 1)]


@pytest.mark.long
@pytest.mark.parametrize("dtype, most", [(torch.float32, 1e-5), (torch.float16, 0.002), (torch.bfloat16, 0.01)])
def test_a_hundred_train_steps_follow_plain_ones_within_the_noise_of_the_seed(
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
def test_a_step_that_is_not_finite_changes_no_weight_or_moment_and_halves_the_scale(bad, scale):
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


def test_a_module_without_gradient_stops_the_run(tiny_config, monkeypatch):
    def cut_one(unet, *rest):
        processors = inject_lora(unet, *rest)
        layer = next(iter(processors.values())).lora["v"]
        layer.forward = lambda x: torch.zeros(*x.shape[:-1], layer.up_weight.shape[0])
        return processors

    monkeypatch.setattr(model, "inject_lora", cut_one)
    monkeypatch.setattr(model, "fuse_lora", lambda unet: True)
    with pytest.raises(trainer.Stop, match="1 LoRA modules get no gradient") as stop:
        run(tiny_config)
    assert stop.value.exit_code == 4


# The step and the rehearsal ----------------------------------------------------------------------------------------


@pytest.fixture
def one_batch(shared_faces):
    """(encoded data set, a batch of 8, all of it)."""
    dataset = MangaFaceDataset(shared_faces, shared_faces / "modified_face_250.json", 64, num_workers=0)
    generator = torch.Generator().manual_seed(1)
    mean = torch.randn(len(dataset.faces), *LATENT_SHAPE, generator=generator)
    texts = torch.randn(len(dataset.texts), 77, 16, generator=generator)
    batch = denoising.draw_batch(dataset, range(8), 0, 0, LATENT_SHAPE, 1000, 0.1)
    return EncodedDataset(torch.stack((mean, mean * 0.1), 1), texts, CPU), batch, torch.arange(8)


CONFIG = trainer.TrainingConfig(lora_rank=4, lora_alpha=8, penalty_factor=1e-3, max_grad_norm=1.0, seed=0)


def test_a_step_is_the_loss_plus_the_penalty_clipped_and_given_to_adamw(tiny_base, one_batch):
    """Against PyTorch's own clipping and AdamW on the gradient of loss + penalty."""
    built, reference = build(tiny_base, CONFIG), build(tiny_base, CONFIG)
    encoded, batch, share = one_batch
    w_loss, penalty, finite, stop = trainer.train_step(built, encoded, batch, share, 2e-3, CONFIG, 15)()
    unet, loss = reference.unet, model.compute_gradients(reference, encoded, batch, share)
    expected = 1e-3 * sum(weight.square().sum() for weight in lora_parameters(unet))
    assert (w_loss, finite, stop) == (loss.item(), 1, 15)
    assert penalty == pytest.approx(expected.item(), rel=1e-6)
    reference.weights.grad += 2e-3 * reference.weights.detach()
    torch.nn.utils.clip_grad_norm_([reference.weights], 1.0)
    torch.optim.AdamW([reference.weights], lr=2e-3, weight_decay=0.0).step()
    torch.testing.assert_close(built.weights, reference.weights, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_a_change_of_the_plain_lora_formula_changes_the_training_step(tiny_base, one_batch, monkeypatch, factor):
    """Whoever edits LoRALinearLayer.forward sees it trained, though fused products stand in for it by default."""
    steps, plain = [], LoRALinearLayer.forward
    for change in (False, True):
        with monkeypatch.context() as patch:
            if change:
                patch.setattr(LoRALinearLayer, "forward", lambda self, x: factor * plain(self, x))
            built = build(tiny_base, CONFIG)
            encoded, batch, share = one_batch
            for _ in range(2):  # before the first, up_weight is zero
                trainer.train_step(built, encoded, batch, share, 2e-3, CONFIG)
            steps.append(built.weights.detach().clone())
    assert torch.allclose(*steps, rtol=1e-4, atol=1e-6) == (factor == 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_rehearsal_changes_nothing(tiny_base, one_batch, dtype):
    built, reference = build(tiny_base, CONFIG, dtype), build(tiny_base, CONFIG, dtype)
    encoded, batch, share = one_batch
    encoded = dataclasses.replace(encoded, text_embeddings=encoded.text_embeddings.to(dtype))
    before, scale = built.weights.detach().clone(), built.scaler.state_dict()
    model.rehearse(built, encoded, batch, share)
    assert torch.equal(built.weights, before) and built.scaler.state_dict() == scale
    for either in (built, reference):
        for _ in range(3):
            trainer.train_step(either, encoded, batch, share, 2e-3, CONFIG)
    assert torch.equal(built.weights, reference.weights)


@pytest.mark.parametrize("options", [{"fused": True, "momentum": 0.9}, {"momentum": 0.9}, {}])
def test_the_rehearsal_changes_nothing_for_sgd_either(tiny_base, one_batch, options):
    """The fused kernel leaves a momentum buffer of a first bad step uninitialised."""
    built, reference = build(tiny_base, CONFIG), build(tiny_base, CONFIG)
    for either in (built, reference):
        either.optimizer = torch.optim.SGD([either.weights], lr=1.0, **options)
    model.rehearse(built, *one_batch)
    for either in (built, reference):
        for _ in range(2):
            trainer.train_step(either, *one_batch, 0.1, CONFIG)
    assert torch.equal(built.weights, reference.weights) and built.weights.isfinite().all()


class Counting(torch.optim.SGD):
    """Keeps a number among its settings, as schedule-free optimizers do: each step is larger than the one before."""

    def step(self, closure=None):
        group = self.param_groups[0]
        group["k"] = group.get("k", 0) + 1
        group["lr"] *= group["k"]
        super().step(closure)


@pytest.mark.parametrize(
    "optimizer",
    [
        pytest.param(lambda weights: torch.optim.SGD(weights, lr=1.0), marks=pytest.mark.long),
        pytest.param(
            lambda weights: torch.optim.SGD(weights, lr=1.0, momentum=0.9, fused=True), marks=pytest.mark.long
        ),
        lambda weights: torch.optim.RMSprop(weights, momentum=0.5),
        pytest.param(lambda weights: Counting(weights, lr=1.0), marks=pytest.mark.long),
    ],
    ids=["sgd", "momentum", "rmsprop", "counting"],
)
def test_any_optimizer_is_saved_killed_and_resumed(tiny_config, monkeypatch, optimizer):
    """In AdamW's place: an interrupted run ends with the bytes of one that wasn't."""

    def with_another(*arguments):
        built = model.build_model(*arguments)
        built.optimizer = optimizer([built.weights])
        return built

    monkeypatch.setattr(trainer, "build_model", with_another)
    config = dataclasses.replace(tiny_config, train_batch_size=1, learning_rate=0.05)
    run(config, output_dir=config.output_dir + "-uninterrupted")
    with monkeypatch.context() as patch:
        signal_at_step(patch, 6)
        with pytest.raises(trainer.Stop, match="saved after step 6"):
            run(config)
    assert run(config)["resumed_from_step"] == 6
    before = exported(dataclasses.replace(config, output_dir=config.output_dir + "-uninterrupted"))
    assert exported(config) == before


# Half precision and memory on a GPU, as far as a CPU can show ------------------------------------------------------


def test_the_optimizer_s_moments_exist_before_the_rehearsed_gradient_and_count_nothing_afterwards(
    tiny_base, one_batch, monkeypatch
):
    """A card that holds the first step then holds the second."""
    found, original, built = [], model.compute_gradients, build(tiny_base, CONFIG)

    def compute_gradients(model, *rest):
        found.extend(value.shape for value in model.optimizer.state[model.weights].values() if value.ndim)
        return original(model, *rest)

    monkeypatch.setattr(model, "compute_gradients", compute_gradients)
    model.rehearse(built, *one_batch)
    assert found == 2 * [built.weights.shape] and not built.optimizer.state


def test_the_loss_scale_grows_within_a_short_run_in_fp16_and_is_one_otherwise(tiny_base):
    config = trainer.TrainingConfig(lora_rank=4, lora_alpha=8)
    scaler = build(tiny_base, config, torch.float16).scaler
    assert scaler.get_growth_interval() == 100 and scaler.scale(torch.ones(())).item() == 2.0**16
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    for _ in range(100):
        weight.grad = torch.ones(1)
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 2.0**17
    scaler = build(tiny_base, config).scaler
    assert scaler.scale(torch.ones(())).item() == 1


@pytest.mark.parametrize(
    ("device", "wanted", "capability", "has", "expected"),
    [
        ("cuda", "bf16", (7, 5), (), "fp16"),  # Turing: torch.cuda.is_bf16_supported() is True there
        ("cuda", "bf16", (8, 0), (), "bf16"),
        ("cuda", "fp16", (7, 5), (), "fp16"),
        ("cuda", "no", (7, 5), (), "no"),
        ("cpu", "bf16", None, (), "no"),
        ("cpu", "bf16", None, ("_is_avx512_bf16_supported",), "bf16"),
        ("cpu", "bf16", None, ("_is_amx_tile_supported",), "bf16"),
        ("cpu", "fp16", None, ("_is_amx_tile_supported",), "no"),
        ("mps", "bf16", None, ("_is_amx_tile_supported",), "no"),
    ],
)
def test_a_precision_is_used_where_the_hardware_has_it(monkeypatch, device, wanted, capability, has, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda name=name: name in has, raising=False)
    assert run_module.precision_of(torch.device(device), wanted)[0] == expected


def test_bf16_on_a_cpu_that_has_it_trains_draws_and_stays_near_float32(tiny_config, monkeypatch, capsys):
    pictures = {"sample_prompts": ("a face",), "samples_per_prompt": 1, "sample_steps": 1, "num_train_epochs": 1}
    exact = run(tiny_config, **pictures, overwrite=True)
    assert "This CPU has no bf16" not in capsys.readouterr().out  # fp16 was asked for
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True, raising=False)
    near = run(tiny_config, **pictures, mixed_precision="bf16", output_dir=tiny_config.output_dir + "-bf16")
    assert "precision bf16" in capsys.readouterr().out
    assert near["val_loss_best"] != exact["val_loss_best"]
    assert abs(near["val_loss_best"] / exact["val_loss_best"] - 1) < 0.02


def test_a_library_without_workspace_counts_as_out_of_memory():
    assert memory.is_out_of_memory(RuntimeError("GET was unable to find an engine to execute this computation"))
    assert not memory.is_out_of_memory(RuntimeError("unable to find a key"))
