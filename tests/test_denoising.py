"""One optimizer step: what it draws, its loss, its gradient, alone and over processes."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT, metrics, run, small_config
from original_layout import original_layout
from safetensors.torch import save_file

import train_manga_lora as trainer
from dataset import MangaFaceDataset
from lora_layers import inject_lora, lora_modules, lora_parameters
from training import denoising
from training.base_model import load_unet
from training.bases import BaseModelError
from training.encoding import EncodedDataset
from training.fused import fuse_lora

CPU = torch.device("cpu")
LATENT_SHAPE = (4, 16, 16)


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
    shape = (len(dataset.faces), *LATENT_SHAPE)
    latents = torch.stack((torch.randn(shape), torch.rand(shape)), 1)
    encoded = EncodedDataset(latents.double(), torch.randn(len(dataset.texts), 77, 16).double(), CPU)
    return unet, scheduler, dataset, encoded, config


def gradient_of_step(precise, rows, batch_size, count=8):
    unet, scheduler, dataset, encoded, config = precise
    for parameter in lora_parameters(unet):
        parameter.grad = None
    window = denoising.draw_batch(dataset, dataset.epoch_order(0)[:count], config.seed, 0, LATENT_SHAPE, 1000, 0.1)
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
    window = denoising.draw_batch(dataset, dataset.epoch_order(0)[:1], config.seed, 0, LATENT_SHAPE, 1000, 0.1)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    rows = torch.arange(len(window))[3::4]
    assert denoising.accumulate_gradients(unet, scheduler, encoded, window, rows, 8, scaler) == 0
    assert not any(parameter.grad.any() for parameter in lora_parameters(unet))


def test_a_partial_window_is_divided_by_what_is_in_it(precise):
    """Against the formula: sum of weight x per-image loss over 5 images, divided by 5."""
    loss, _, window = gradient_of_step(precise, torch.arange(5), 2, count=5)
    unet, scheduler, dataset, encoded, _ = precise
    mean, std = encoded.latents[window.faces].unbind(1)
    latents = mean + std * window.posterior_noise
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
    deep_base, shared_faces, dtype, least, fused
):
    """The fp16 path of a GPU, run on the CPU: half UNet, float32 LoRA, loss scale. Cosine per module to the plain
    float32 path; bf16's, with 8 bits, is 0.9976 at worst, fused or not.
    """
    dataset = MangaFaceDataset(shared_faces, shared_faces / "modified_face_250.json", 64, num_workers=0)
    generator = torch.Generator().manual_seed(1)
    mean = torch.randn(len(dataset.faces), *LATENT_SHAPE, generator=generator)
    texts = torch.randn(len(dataset.texts), 77, 16, generator=generator)
    gradients = {}
    for precision in (torch.float32, dtype):
        unet, scheduler = load_unet(deep_base, CPU, precision)
        torch.manual_seed(0)
        inject_lora(unet, 4, 8)
        if fused and precision == dtype:
            fuse_lora(unet)
        parameters = lora_parameters(unet)
        optimizer = torch.optim.AdamW(parameters)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=precision == torch.float16)
        encoded = EncodedDataset(torch.stack((mean, mean * 0.1), 1), texts.to(precision), CPU)
        window = denoising.draw_batch(dataset, range(8), 0, 0, LATENT_SHAPE, 1000, 0.1)
        loss = denoising.accumulate_gradients(unet, scheduler, encoded, window, torch.arange(8), 4, scaler)
        scaler.unscale_(optimizer)
        assert loss.dtype == torch.float32 and all(parameter.grad.dtype == torch.float32 for parameter in parameters)
        gradients[precision] = [layer.up_weight.grad.flatten() for layer in lora_modules(unet).values()]
    cosines = [torch.cosine_similarity(a, b, dim=0).item() for a, b in zip(*gradients.values(), strict=True)]
    assert min(cosines) >= least, min(cosines)


def half_of_the_step(rank, folder, base, faces):
    """One of two processes: its half of the window, then the sum over both."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    state = torch.load(f"{folder}/precise.pt", weights_only=False)
    unet, scheduler = load_unet(base, CPU, torch.float32)
    inject_lora(unet, 4, 8)
    unet.double().load_state_dict(state["unet"])
    dataset = MangaFaceDataset(faces, faces / "modified_face_250.json", 64, "loss", num_workers=0)
    precise = (
        unet,
        scheduler,
        dataset,
        EncodedDataset(*state["encoded"], CPU),
        trainer.TrainingConfig(weighting="loss"),
    )
    rows = torch.arange(rank, 5, 2)  # 5 images: the processes' shares differ
    loss, _, window = gradient_of_step(precise, rows, 2, count=5)
    gradients = [parameter.grad for parameter in lora_parameters(unet)]
    denoising.sum_over_processes(loss, *gradients)
    torch.save({"images": window.faces[rows], "loss": loss, "gradients": gradients}, f"{folder}/result{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_give_the_same_step_as_one(precise, tmp_path, tiny_base, demo_faces):
    whole_loss, whole, window = gradient_of_step(precise, torch.arange(5), 5, count=5)
    unet, _, _, encoded, _ = precise
    tensors = (encoded.latents, encoded.text_embeddings)
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
    draw = lambda step, seed=0: denoising.draw_batch(dataset, range(8), seed, step, LATENT_SHAPE, 1000, 0.1)  # noqa: E731
    first = draw(5)
    draw(6), torch.randn(7)  # neither other steps nor the global generator matter
    again = draw(5)
    assert all(torch.equal(getattr(first, f.name), getattr(again, f.name)) for f in dataclasses.fields(first))
    assert not torch.equal(first.noise, draw(6).noise) and not torch.equal(first.noise, draw(5, seed=1).noise)
    assert not torch.equal(first.noise, first.posterior_noise)


def test_timesteps_are_stratified_and_captions_come_from_the_face(precise):
    _, _, dataset, _, _ = precise
    last = dropped = 0
    for step in range(200):
        window = denoising.draw_batch(dataset, range(8), 0, step, LATENT_SHAPE, 1000, 0.1)
        assert sorted((window.timesteps // 125).tolist()) == list(range(8))
        for face, text in zip(window.faces.tolist(), window.texts.tolist(), strict=True):
            assert text == 0 or text in dataset.text_indices[face]
            dropped += text == 0
            last += text == dataset.text_indices[face][-1]
    assert abs(dropped / 1600 - 0.1) < 0.03
    variants = sum(1 / len(dataset.text_indices[face]) for face in window.faces.tolist()) / 8
    assert abs(last / 1600 - 0.9 * variants) < 0.04
    assert (denoising.draw_batch(dataset, range(50), 0, 0, LATENT_SHAPE, 1000, 0.0).texts > 0).all()


# What a base predicts ----------------------------------------------------------------------------------------------


def test_validation_short_of_memory_goes_image_by_image_to_the_same_loss(precise, monkeypatch):
    unet, scheduler, dataset, encoded, _ = precise
    faces = dataset.validation[:3]
    expected = denoising.validate(unet, scheduler, dataset, encoded, 0, faces=faces)
    passes, real = [], denoising.denoising_losses

    def small(unet, scheduler, latents, *rest):
        if len(latents) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        passes.append(len(latents))
        return real(unet, scheduler, latents, *rest)

    monkeypatch.setattr(denoising, "denoising_losses", small)
    found = denoising.validate(unet, scheduler, dataset, encoded, 0, faces=faces)
    assert found == pytest.approx(expected, rel=1e-6) and len(passes) == 3 * denoising.VALIDATION_STRATA
    monkeypatch.setattr(denoising, "denoising_losses", lambda *_: (_ for _ in ()).throw(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        denoising.validate(unet, scheduler, dataset, encoded, 0, faces=faces)


@pytest.fixture
def as_shipped(monkeypatch):
    monkeypatch.setattr(denoising, "BAD_LOSS", 0.5)


@pytest.fixture(scope="module")
def demo_base_as(tmp_path_factory):
    """The demo's base, with other values in its scheduler's config: it really predicts the noise."""

    def make(**changes):
        folder = tmp_path_factory.mktemp("declared") / "base"
        shutil.copytree(ROOT / "demo" / "base", folder)
        file = folder / "scheduler" / "scheduler_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
        return folder

    return make


@pytest.mark.usefixtures("as_shipped")
@pytest.mark.parametrize("share", [0.1, 0.0], ids=["held out", "none held out"])
def test_a_base_that_declares_the_wrong_prediction_type_is_stopped_before_step_one(
    demo_base_as, tmp_path, faces, share
):
    base = demo_base_as(prediction_type="v_prediction")
    config = small_config(tmp_path, faces, base, resolution=128, validation_share=share, early_stopping_patience=0)
    with pytest.raises(BaseModelError) as caught:
        run(config)
    file = base / "scheduler" / "scheduler_config.json"
    assert f'in {file} set "prediction_type": "epsilon" instead of "v_prediction"' in str(caught.value)
    assert metrics(config) == [] and not Path(config.output_dir, "checkpoints").exists()
    shutil.copytree(ROOT / "demo" / "base" / "scheduler", base / "scheduler", dirs_exist_ok=True)  # as it says
    assert run(config, num_train_epochs=1)["optimizer_steps"] > 0


@pytest.mark.usefixtures("as_shipped")
def test_a_single_file_s_prediction_type_is_set_beside_it_or_in_the_copy_that_is_named(demo_base_as, tmp_path, faces):
    base = demo_base_as(prediction_type="v_prediction")
    tensors = original_layout(base)
    for folder in ("beside", "flagged"):  # a file that says v itself is not moved by what lies beside it
        shutil.copytree(base, tmp_path / folder, ignore=shutil.ignore_patterns("*.safetensors"))
        shutil.copytree(ROOT / "demo" / "base" / "scheduler", tmp_path / folder / "scheduler", dirs_exist_ok=True)
    shutil.copytree(base / "scheduler", tmp_path / "beside" / "scheduler", dirs_exist_ok=True)
    save_file(tensors, tmp_path / "beside" / "anime.safetensors")
    save_file(tensors | {"v_pred": torch.tensor([])}, tmp_path / "flagged" / "anime.safetensors")
    for folder in ("beside", "flagged"):
        config = small_config(
            tmp_path / f"run {folder}", faces, tmp_path / folder / "anime.safetensors", resolution=128
        )
        with pytest.raises(BaseModelError) as caught:
            run(config, num_train_epochs=1)
        file, must_stay = re.search(r": in (.*json)(.*) set ", str(caught.value)).groups()
        expected = tmp_path / "beside" if folder == "beside" else Path(config.cache_dir, "bases")
        assert Path(file).is_relative_to(expected) and ("must stay" in must_stay) == (folder == "flagged")
        Path(file).write_text(Path(file).read_text().replace('"v_prediction"', '"epsilon"'))
        assert run(config, num_train_epochs=1)["optimizer_steps"] > 0


@pytest.mark.usefixtures("as_shipped")
def test_a_base_that_predicts_nothing_is_warned_of_once_and_the_demo_s_is_not(tmp_path, faces, tiny_base, capsys):
    run(small_config(tmp_path / "random", faces, tiny_base, num_train_epochs=2))
    assert capsys.readouterr().out.count("This base hardly predicts these faces") == 1
    run(small_config(tmp_path / "demo", faces, ROOT / "demo" / "base", num_train_epochs=1, resolution=128))
    assert "hardly predicts" not in capsys.readouterr().out


def test_v_prediction_with_zero_terminal_snr_has_its_formulas_target_and_trains_and_draws(
    demo_base_as, tmp_path, faces
):
    """At the last timestep nothing of the picture is left, and v is minus the picture (Lin et al. 2023)."""
    changes = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    base = demo_base_as(**changes)
    _, scheduler = load_unet(base, CPU, torch.float64)
    assert scheduler.alphas_cumprod[-1] < 1e-8
    latents, noise = (torch.randn(2, 4, 8, 8, dtype=torch.float64, generator=denoising.seeded(n)) for n in (1, 2))
    seen = {}

    def unet(noisy, timesteps, text, return_dict):
        seen["noisy"] = noisy
        return (torch.zeros_like(noisy),)

    text, timesteps = torch.zeros(2, 77, 16, dtype=torch.float64), torch.tensor([999, 500])
    losses = denoising.denoising_losses(unet, scheduler, latents, text, timesteps, noise)
    a = scheduler.alphas_cumprod.double()[timesteps].sqrt()[:, None, None, None]
    sigma = (1 - scheduler.alphas_cumprod.double()[timesteps]).sqrt()[:, None, None, None]
    assert torch.allclose(seen["noisy"], a * latents + sigma * noise, atol=1e-6)
    assert torch.allclose(losses, (a * noise - sigma * latents).square().mean(dim=(1, 2, 3)), atol=1e-5)
    assert torch.allclose(losses[0], latents[0].square().mean(), atol=1e-3)
    pictures = {"sample_prompts": ("a face",), "samples_per_prompt": 1, "sample_steps": 2}
    config = small_config(tmp_path, faces, demo_base_as(**changes), num_train_epochs=1, resolution=128, **pictures)
    run(config)  # though these weights predict the noise
    assert Path(config.output_dir, "before_after.png").is_file()
