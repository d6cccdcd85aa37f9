"""What a run goes on from."""

import dataclasses
import json
import os
import pathlib
import shutil

import pytest
import torch
from conftest import exported, metrics, run, signal_at_step

import train_manga_lora as trainer
from training import checkpoint
from training.files import describe

CPU = torch.device("cpu")
LATENT_SHAPE = (4, 16, 16)


def test_best_epoch_and_patience_survive_an_interruption(tiny_config, monkeypatch):
    """Validation losses by epoch; the best is epoch 2, patience ends the run after epoch 4."""
    results = []
    for interrupted in (False, True):
        losses = iter([1.0, 0.9, 0.7, 0.8, 0.75, 0.1])
        config = dataclasses.replace(
            tiny_config,
            num_train_epochs=6,
            early_stopping_patience=2,
            output_dir=f"{tiny_config.output_dir}-{interrupted}",
        )
        with monkeypatch.context() as patch:
            patch.setattr(trainer, "validate", lambda *_, losses=losses: (next(losses), 0.01))
            if interrupted:
                with monkeypatch.context() as inner:
                    signal_at_step(inner, 5)  # the first of epoch 3
                    with pytest.raises(trainer.Stop):
                        run(config)
            summary = run(config)
        assert summary["resumed_from_step"] == (5 if interrupted else 0)
        results.append(
            (
                summary["best_epoch"],
                summary["stopped_epoch"],
                summary["val_loss_best"],
                exported(config),
                exported(config, "last/pytorch_lora_weights.bin"),
                metrics(config),
            )
        )
    assert results[0] == results[1] and results[0][:3] == (2, 4, 0.7)
    assert results[0][3] != results[0][4]


@pytest.mark.parametrize("former", [None, 1])
def test_checkpoints_of_another_version_are_refused_in_one_line_and_left_alone(tiny_config, former):
    """The first version's had no "format"."""
    run(tiny_config, num_train_epochs=1)
    newest = pathlib.Path(tiny_config.output_dir, "checkpoints", "step-000002")
    state = json.loads((newest / "state.json").read_text())
    state = {name: value for name, value in state.items() if name != "format"} | ({"format": former} if former else {})
    (newest / "state.json").write_text(json.dumps(state))
    manifest = {name: describe((newest / name).read_bytes()) for name in ("state.json", "state.safetensors")}
    (newest / "manifest.json").write_text(json.dumps(manifest))
    for name in ("summary.json", "pytorch_lora_weights.bin", "pytorch_lora_weights.safetensors"):
        os.remove(os.path.join(tiny_config.output_dir, name))
    with pytest.raises(checkpoint.CheckpointError, match="another version"):
        run(tiny_config, num_train_epochs=1)
    assert os.listdir(os.path.join(tiny_config.output_dir, "checkpoints")) == ["step-000002"]


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


@pytest.mark.parametrize("lost", ["all", "the last row"])
def test_a_boundary_whose_row_was_lost_is_still_validated(tiny_config, monkeypatch, lost):
    """Ctrl-C in an epoch's last step, and then metrics.csv loses what was in it."""
    with monkeypatch.context() as patch:
        signal_at_step(patch, 2)
        with pytest.raises(trainer.Stop, match="saved after step 2"):
            run(tiny_config)
    file = pathlib.Path(tiny_config.output_dir, "metrics.csv")
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("" if lost == "all" else "".join(lines[:-1]))
    run(tiny_config)
    assert [row["val_loss"] != "" for row in metrics(tiny_config) if row["step"] == "1"] in ([], [False])


def test_a_step_saved_again_costs_no_older_checkpoint(tmp_path):
    for step in (4, 5, 5):
        checkpoint.save_checkpoint(tmp_path, step, {"lora": torch.ones(3)}, {"step": step}, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000004", "step-000005"]


def test_less_patience_in_mid_epoch_still_ends_the_epoch(tiny_config, monkeypatch):
    losses = iter([1.0, 0.5, 0.6, 0.7, 0.8])
    monkeypatch.setattr(trainer, "validate", lambda *_: (next(losses), 0.01))
    config = dataclasses.replace(tiny_config, train_batch_size=1, num_train_epochs=5)
    with monkeypatch.context() as patch:
        signal_at_step(patch, 9)  # the first of epoch 3
        with pytest.raises(trainer.Stop):
            run(config)
    summary = run(config, early_stopping_patience=1)
    best = json.loads(pathlib.Path(config.output_dir, "best.json").read_text())
    assert (summary["epochs_run"], summary["optimizer_steps"], best["epoch"], best["step"]) == (3, 12, 1, 4)
