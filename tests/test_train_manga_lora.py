"""Schedules, and whole runs on a tiny random base."""

import dataclasses
import json
import math
import os
import pathlib
import signal

import numpy as np
import pytest
import torch
from conftest import exported, metrics, run, signal_at_step
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

import evaluate_lora
import lora_layers
import train_manga_lora as trainer
from dataset import MangaFaceDataset
from evaluation import pictures
from lora_layers import lora_modules
from training import denoising, encoding, model
from training.base_model import load_unet
from training.files import InputError

CPU = torch.device("cpu")
LATENT_SHAPE = (4, 16, 16)


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
    config = trainer.TrainingConfig(num_train_epochs=30, min_weight_decay=1e-5, max_weight_decay=1e-4)
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


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_base, shared_faces):
    """(config, summary, UNet) of one whole run, pictures included; for tests that only look."""
    config = trainer.TrainingConfig(
        dataset_dir=str(shared_faces),
        json_file=str(shared_faces / "modified_face_250.json"),
        resolution=64,
        output_dir=str(tmp_path_factory.mktemp("out")),
        cache_dir=str(tmp_path_factory.mktemp("cache")),
        pretrained_model=str(tiny_base),
        num_train_epochs=1,
        train_batch_size=3,
        gradient_accumulation_steps=2,
        lora_rank=4,
        lora_alpha=8,
        sample_prompts=("a manga face", "another"),
        sample_steps=2,
        sample_every_n_epochs=1,
    )
    unets, original = [], model.load_unet

    def spy(*arguments):
        unets.append(original(*arguments))
        return unets[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "load_unet", spy)
        summary = trainer.main(config)
    return config, summary, unets[0][0]


def test_a_run_leaves_exactly_the_promised_files(finished):
    config, _, _ = finished
    found = {
        os.path.relpath(os.path.join(folder, name), config.output_dir).replace(os.sep, "/")
        for folder, _, names in os.walk(config.output_dir)
        for name in names
    }
    for album, count in {
        "samples/epoch-000": 12,
        "samples/epoch-001": 12,
        "pictures/base": None,
        "pictures/lora": None,
    }.items():
        own = {name for name in found if name.startswith(f"{album}/")}
        assert f"{album}/prompts.json" in own and (count is None or len(own) == count + 1)
        found -= own
    assert found == {
        "config.json",
        "metrics.csv",
        "summary.json",
        "before_after.png",
        "pytorch_lora_weights.bin",
        "pytorch_lora_weights.safetensors",
        "last/pytorch_lora_weights.bin",
        "last/pytorch_lora_weights.safetensors",
        "best.json",
        "scores.json",
        "candidates/epoch-001/pytorch_lora_weights.bin",
        "candidates/epoch-001/pytorch_lora_weights.safetensors",
        "samples/epoch-000.png",
        "samples/epoch-001.png",
        "report.html",
        "share/README.md",
        "share/images/1.png",
        "share/images/2.png",
        "share/manga_faces.json",
        "share/manga_faces.png",
        "share/manga_faces.safetensors",
        "share/pytorch_lora_weights.safetensors",
        "checkpoints/step-000003/state.safetensors",
        "checkpoints/step-000003/state.json",
        "checkpoints/step-000003/manifest.json",
    }


def test_the_summary_has_every_promised_field_and_they_agree(finished):
    config, summary, _ = finished
    with open(os.path.join(config.output_dir, "summary.json")) as file:
        assert json.load(file) == summary
    for name in (
        "lora_bin",
        "lora_safetensors",
        "epochs_run",
        "best_epoch",
        "stopped_epoch",
        "optimizer_steps",
        "images_seen",
        "val_loss_start",
        "val_loss_best",
        "val_ratio",
        "images_per_s",
        "images_per_s_in_all",
        "phases_s",
        "peak_memory_mib",
        "peak_memory_in_all_mib",
        "seconds",
        "first_step_s",
        "resumed_from_step",
        "converged_epoch",
        "score",
        "score_maximum",
        "score_in_words",
        "best_reason",
        "validation",
    ):
        assert name in summary, name
    assert (summary["epochs_run"], summary["optimizer_steps"], summary["images_seen"]) == (1, 3, 16)
    phases = summary["phases_s"]
    assert list(phases) == ["encode", "train", "validate", "sample", "score", "export", "start"]
    assert all(seconds > 0 for seconds in phases.values())
    assert sum(phases.values()) == pytest.approx(summary["seconds"], abs=0.1)
    assert summary["images_per_s_in_all"] == 16 / summary["seconds"] < summary["images_per_s"]
    assert summary["val_ratio"] == summary["val_loss_best"] / summary["val_loss_start"]
    rows = metrics(config)
    assert [row["step"] for row in rows] == [str(step) for step in (1, 2, 3)]
    assert [row["val_loss"] for row in rows] == [""] * 2 + [str(summary["val_loss_best"])]
    assert all(float(row["loss"]) == pytest.approx(float(row["w_loss"]) + float(row["penalty"])) for row in rows)
    assert float(rows[0]["penalty"]) == pytest.approx(80 * 4 / 3 * 1e-5, rel=0.03)  # modules x rank / 3 x factor


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
    assert summary["score_in_words"] in capsys.readouterr().out  # of four held-out faces: too few
    with open(os.path.join(config.output_dir, "before_after.png"), "rb") as file:
        assert file.read() == before
    with pytest.raises(InputError, match="holds no LoRA file"):
        evaluate_lora.main(["--lora", config.cache_dir])


def test_the_sheet_of_epoch_0_is_the_base_s_own_and_drawing_changes_no_weight(finished, tiny_base, monkeypatch):
    """Drawn before step 1, against the base's own pipeline with the prompts as text."""
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

    config, _, _ = finished
    drawn, original = [], pictures.draw_pictures
    monkeypatch.setattr(pictures, "draw_pictures", lambda *a: drawn.append(original(*a)) or drawn[-1])
    again = dataclasses.replace(config, output_dir=config.output_dir + "-again", learning_rate=0.02)
    without = dataclasses.replace(again, output_dir=config.output_dir + "-without", sample_every_n_epochs=0)
    trainer.main(again)
    trainer.main(without)
    assert exported(again) == exported(without)
    pipe = StableDiffusionPipeline.from_pretrained(tiny_base, safety_checker=None)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, algorithm_type="sde-dpmsolver++")
    square = (config.resolution, config.resolution)
    seeds = [config.seed, config.seed + 2]  # each prompt has its own: one bad one would spoil them all
    expected = original(pipe, {"prompt": list(config.sample_prompts)}, seeds, [square] * 2, config)
    assert len(drawn[0]) == 2 * (4 + 2)  # of four held-out faces' captions, then of the prompts; two seeds each
    assert np.abs(np.array(drawn[0][8::2]).astype(int) - expected).max() <= 1
    assert np.abs(np.array(drawn[1]).astype(int) - drawn[0]).max() > 1
    assert len(os.listdir(os.path.join(again.output_dir, "samples"))) == 2 * 2  # a sheet and its pictures


def test_nothing_is_encoded_twice(tiny_config, monkeypatch):
    run(tiny_config, num_train_epochs=1)
    for loader in ("load_vae", "load_text_encoder"):
        monkeypatch.setattr(encoding, loader, lambda *_: pytest.fail("loaded again"))
    run(tiny_config, num_train_epochs=1, overwrite=True)
    with pytest.raises(pytest.fail.Exception):
        run(tiny_config, num_train_epochs=1, overwrite=True, resolution=96)


def test_the_same_seed_gives_the_same_bytes_and_samples_change_nothing(tiny_config):
    run(tiny_config)
    first = exported(tiny_config)
    run(
        tiny_config,
        overwrite=True,
        sample_prompts=("a face",),
        sample_every_n_epochs=1,
        sample_steps=1,
        samples_per_prompt=1,
        save_every_n_epochs=0,
    )
    assert exported(tiny_config) == first
    run(tiny_config, overwrite=True, seed=1)
    assert exported(tiny_config) != first


def test_an_interruption_inside_a_library_is_not_taken_for_that_library_s_failure(tiny_config, monkeypatch):
    def download(*_, **__):
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("not reached")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(trainer.Stop) as stop:
        run(tiny_config, pretrained_model="nobody/nothing")
    assert stop.value.exit_code == 130


def test_a_folder_without_prompts_can_be_scored_one_with_changed_faces_can_not(tiny_config, faces, capsys):
    run(tiny_config, num_train_epochs=1, sample_steps=1, validation_share=0.4)
    evaluate_lora.main(["--lora", tiny_config.output_dir])
    assert "points, and 95 % intervals" in capsys.readouterr().out
    scores = json.loads(pathlib.Path(tiny_config.output_dir, "scores.json").read_text())
    assert scores["lora"]["novelty"]["n"] == 24  # captions of 8 held-out faces, three seeds each
    entries = json.loads((faces / "modified_face_250.json").read_text())
    entries[3]["captions"] = ["another"]
    (faces / "modified_face_250.json").write_text(json.dumps(entries))
    with pytest.raises(InputError, match="have changed since the training"):
        evaluate_lora.main(["--lora", tiny_config.output_dir])


def test_every_ingredient_can_be_switched_off(tiny_config, capsys):
    summary = run(
        tiny_config,
        num_train_epochs=1,
        weighting="off",
        penalty_factor=0.0,
        min_weight_decay=0.0,
        max_weight_decay=0.0,
        lr_warmup_ratio=0.0,
        max_grad_norm=0.0,
        validation_share=0.0,
        early_stopping_patience=0,
        caption_dropout=0.0,
        gradient_checkpointing="off",
        save_every_n_epochs=0,
        num_workers=0,
    )
    output = capsys.readouterr().out
    rows = metrics(tiny_config)
    assert all(row["loss"] == row["w_loss"] and float(row["penalty"]) == 0 for row in rows)
    assert all(row["val_loss"] == "" and float(row["weight_decay"]) == 0 for row in rows)
    assert float(rows[0]["lr"]) == tiny_config.learning_rate
    assert "no early stopping" in output and "Weights: off" in output
    assert summary["weight_decay_in_all"] == 1.0


def test_a_dry_run_writes_its_page_alone(tiny_config, capsys):
    assert run(tiny_config, dry_run=True) == {}
    output = capsys.readouterr().out
    assert "2 x 4 x 1 = 8" in output and "2 per epoch x 3 epochs = 6" in output and "Weight range" in output
    assert os.listdir(tiny_config.output_dir) == ["dataset.html"] and not os.path.exists(tiny_config.cache_dir)


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
    one_late = trainer.one_late
    monkeypatch.setattr(trainer, "one_late", lambda results, device: one_late(results, torch.device("cuda")))
    return events


def test_reading_a_step_late_changes_nothing_that_a_run_leaves(tiny_config, uninterrupted, late):
    config = dataclasses.replace(tiny_config, train_batch_size=1)
    summary = run(config)
    assert (metrics(config), exported(config), exported(config, "last/pytorch_lora_weights.bin")) == uninterrupted
    assert (summary["optimizer_steps"], summary["images_seen"], summary["skipped_steps"]) == (12, 48, 0)
    order = [
        ("launched", 1),
        ("launched", 2),
        ("read", 1),
        ("launched", 3),
        ("read", 2),
        ("launched", 4),
        ("read", 3),
        ("read", 4),
        ("launched", 5),
    ]  # an epoch's last step is read at once: its validation follows
    assert late[:9] == order


def test_a_bad_gradient_that_is_read_late_stops_with_its_own_step_and_images(tiny_config, monkeypatch, late):
    batches, draw, losses = [], trainer.draw_batch, denoising.denoising_losses
    monkeypatch.setattr(trainer, "draw_batch", lambda *a: batches.append(draw(*a)) or batches[-1])

    def poisoned(*arguments):
        return losses(*arguments) * (math.nan if torch.is_grad_enabled() and len(batches) == 3 else 1.0)

    monkeypatch.setattr(denoising, "denoising_losses", poisoned)
    config = dataclasses.replace(tiny_config, train_batch_size=1)
    with pytest.raises(trainer.Stop) as stop:
        run(config)
    assert stop.value.exit_code == 4 and len(batches) == 1 + 3  # the rehearsal's; step 3 was under way already
    dataset = MangaFaceDataset(config.dataset_dir, config.json_file, 64, num_workers=0)
    names = ", ".join(dataset.faces[face].name for face in batches[2].faces.tolist())
    assert f"step 2: the gradient is not finite (images {names})" in str(stop.value)
    assert [row["step"] for row in metrics(config)] == ["1"]
    assert not os.path.exists(os.path.join(config.output_dir, "pytorch_lora_weights.bin"))


READ_LATE = [pytest.param(True, 2, 2, marks=pytest.mark.long), pytest.param(False, 2, 3, marks=pytest.mark.long)]
READ_LATE += [(False, 3, 4)]  # an epoch's last


@pytest.mark.parametrize("mine, step, saved", READ_LATE)
def test_an_interrupt_while_a_step_is_unread_saves_that_step_too(
    tiny_config, uninterrupted, monkeypatch, late, mine, step, saved
):
    """The own signal ends the run after the step under way; another process's is only seen when that step is read."""
    config = dataclasses.replace(tiny_config, train_batch_size=1)
    with monkeypatch.context() as patch:
        if mine:
            signal_at_step(patch, step)
        else:
            sums = []

            def sum_over_processes(stop):
                sums.append(1)
                stop.add_(signal.SIGTERM if len(sums) == step else 0)

            patch.setattr(trainer, "sum_over_processes", sum_over_processes)
        with pytest.raises(trainer.Stop, match=f"saved after step {saved} of 12") as stop:
            run(config)
    assert stop.value.exit_code == 143 and late[-1] == ("read", saved)
    assert [row["step"] for row in metrics(config)] == [str(number) for number in range(1, saved + 1)]
    assert run(config)["resumed_from_step"] == saved
    assert (metrics(config), exported(config), exported(config, "last/pytorch_lora_weights.bin")) == uninterrupted


# A device without float64, as Apple's GPUs are --------------------------------------------------------------------


class NoFloat64(TorchFunctionMode):
    """Refuses float64 wherever it would be computed on the device.

    Device and host are both the CPU here. On the host is what .cpu() gave, what was made as float64 from nothing, and
    what is made of such tensors; .to(device) leaves it. All else is on the device.
    """

    def __init__(self):
        super().__init__()
        self.on_host = WeakIdKeyDictionary()

    def __torch_function__(self, function, types, given=(), named=None):
        named = named or {}
        result = function(*given, **named)
        words = (*given, *named.values())
        tensors = [one for one in tree_leaves(words) if isinstance(one, torch.Tensor)]
        if not isinstance(result, torch.Tensor):
            return result
        if function is torch.Tensor.cpu or any(isinstance(one, str) and one == "cpu" for one in words):
            result = result.clone() if result is given[0] else result
            self.on_host[result] = True
            return result
        arrives = function is torch.Tensor.to and any(isinstance(one, torch.device) for one in words)
        arrives = arrives or (function is torch.Tensor.copy_ and result not in self.on_host)
        is_host = not arrives and (not tensors or any(one in self.on_host for one in tensors))
        if not is_host and torch.float64 in (result.dtype, *(one.dtype for one in tensors[-1:] if arrives)):
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")
        if is_host and result.dtype == torch.float64:
            self.on_host[result] = True
        return result


def test_a_whole_run_asks_no_device_for_float64(tiny_config, monkeypatch):
    with NoFloat64() as device:
        read = lora_layers.read_tensors

        def read_to_host(*given):
            tensors = read(*given)
            device.on_host.update(dict.fromkeys(tensors.values(), True))
            return tensors

        monkeypatch.setattr(lora_layers, "read_tensors", read_to_host)
        summary = run(
            tiny_config, num_train_epochs=1, sample_prompts=("a face",), sample_steps=1, sample_every_n_epochs=1
        )
        for refused in (lambda x: x.double(), lambda x: x.to(torch.float64), lambda x: x.sum(dtype=torch.float64)):
            with pytest.raises(TypeError, match="float64"):
                refused(torch.zeros(3).to(torch.device("cpu")))
        with pytest.raises(TypeError, match="float64"):
            torch.zeros(3).copy_(torch.zeros(3, dtype=torch.float64))
    assert summary["optimizer_steps"] == 2
