"""Which epochs are kept, which one is exported, and the reason given."""

import dataclasses
import json
import math
import os
import pathlib

import pytest
import safetensors
import torch
from conftest import exported, run

import train_manga_lora as trainer
from evaluation import best_epoch, pictures
from training import checkpoint

CPU = torch.device("cpu")


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


def test_candidates_are_the_minimum_and_all_later_epochs():
    losses = [0.9, 0.6, 0.71, 0.69, 0.6]
    history = [checkpoint.Validated(epoch, loss, 0.1) for epoch, loss in enumerate(losses, start=1)]
    assert best_epoch.candidate_epochs(history) == [2, 3, 4, 5]
    assert best_epoch.candidate_epochs(history[:1]) == [1] and best_epoch.candidate_epochs([]) == []


def test_however_long_a_run_few_candidates_are_kept_and_none_is_asked_for_that_was_not():
    losses = [0.9, 0.5, 0.52, 0.65, *[0.55] * 36]
    kept, history = set(), []
    for epoch, loss in enumerate(losses, start=1):
        history.append(checkpoint.Validated(epoch, loss, 0.1))
        wanted = best_epoch.candidate_epochs(history)
        assert len(wanted) <= best_epoch.MOST_KEPT + 1 and set(wanted) <= kept | {epoch}
        kept = set(wanted)
    assert wanted == [2, 10, 18, 26, 34, 40]  # and the newest


def test_epochs_with_a_sheet_are_kept_beside_the_candidates(tiny_config, monkeypatch):
    losses = iter([1.0, 0.9, 0.8, 0.7, 0.6, 0.5])
    monkeypatch.setattr(trainer, "validate", lambda *_: (next(losses), 0.05))
    prompts = {"sample_prompts": ("a face",), "sample_steps": 1, "samples_per_prompt": 1}
    run(tiny_config, num_train_epochs=5, sample_every_n_epochs=2, **prompts)
    folders = sorted(path.name for path in pathlib.Path(tiny_config.output_dir, "candidates").iterdir())
    assert folders == ["epoch-002", "epoch-004", "epoch-005"]
    best = json.loads(pathlib.Path(tiny_config.output_dir, "best.json").read_text())
    assert [row["epoch"] for row in best["candidates"]] == [5]  # the others are there to be tried


def test_of_the_candidates_the_one_chosen_is_exported_and_best_json_says_why(tiny_config, monkeypatch, capsys):
    losses = iter([1.0, 0.9, 0.70, 0.71, 0.79, 0.705])
    monkeypatch.setattr(trainer, "validate", lambda *_: (next(losses), 0.05))
    asked = []

    def choose(losses, scored):
        asked.append((list(losses), sorted(scored)))
        return 3, "it pleased the test"

    monkeypatch.setattr(best_epoch, "choose_best", choose)
    monkeypatch.setattr(best_epoch.Score, "beats", lambda *_, **__: False)  # all stay in the race
    draw, drawn = pictures.draw_pictures, []
    monkeypatch.setattr(
        pictures,
        "draw_pictures",
        lambda pipe, prompts, seeds, *rest: drawn.append(len(seeds)) or draw(pipe, prompts, seeds, *rest),
    )
    config = dataclasses.replace(
        tiny_config,
        num_train_epochs=5,
        early_stopping_patience=0,
        sample_steps=1,
        validation_share=0.4,  # 8 faces
        sample_prompts=("a face", "another face"),
    )
    summary = trainer.main(config)
    assert asked == [([2, 3, 4, 5], [2, 3, 4, 5])]  # each was drawn with, and scored
    assert drawn[:12] == [8, 16, 4, *[8] * 4, *[16] * 4, 4]  # the base's, candidates' portraits, the best's others
    output = pathlib.Path(config.output_dir)
    folders = sorted(path.name for path in (output / "candidates").iterdir())
    assert folders == ["epoch-002", "epoch-003", "epoch-004", "epoch-005"]  # no other epoch's files were kept
    assert exported(config) == (output / "candidates" / "epoch-003" / "pytorch_lora_weights.bin").read_bytes()
    assert exported(config) != exported(config, "last/pytorch_lora_weights.bin")
    best = json.loads((output / "best.json").read_text())
    assert (best["epoch"], best["step"], best["val_loss"], best["reason"]) == (3, 6, 0.71, "it pleased the test")
    assert [row["epoch"] for row in best["candidates"]] == [2, 3, 4, 5]
    assert [row["val_loss"] for row in best["candidates"]] == [0.70, 0.71, 0.79, 0.705]
    assert best["score"] == best["candidates"][1]["score"] == summary["score"]
    printed = capsys.readouterr().out
    assert "Best epoch: 3 of 5, it pleased the test; its loss: 0.7100" in printed
    assert "-> 0.7000 (x 0.70) after epoch 2; converged" in printed  # not the chosen one's loss: it says whose
    assert "converged after 2 of 5 epochs" in printed  # 95 % of 0.3 are gained at 0.715
    assert f"Score: {summary['score_in_words']} (0: as the base, {summary['score_maximum']}: as the artist)" in printed


def test_without_pictures_there_is_no_score_and_the_lowest_validation_loss_decides(tiny_config, monkeypatch):
    losses = iter([1.0, 0.9, 0.7, 0.71])
    monkeypatch.setattr(trainer, "validate", lambda *_: (next(losses), 0.05))
    summary = run(tiny_config)
    best = json.loads(pathlib.Path(tiny_config.output_dir, "best.json").read_text())
    assert (best["epoch"], best["score"], summary["score"]) == (2, "n/a", None)
    assert not os.path.exists(os.path.join(tiny_config.output_dir, "scores.json"))


def test_a_training_that_never_beats_the_base_ends_and_says_so(tiny_config, monkeypatch, capsys):
    losses = iter([1.0, 1.2, 1.1, 1.3])
    monkeypatch.setattr(trainer, "validate", lambda *_: (next(losses), 0.05))
    summary = run(tiny_config)
    assert (summary["converged_epoch"], summary["best_epoch"]) == (None, 2)
    assert "never below the start's: lower learning_rate" in capsys.readouterr().out


@pytest.mark.parametrize(
    "share, losses, reason",
    [
        (0.0, [], "the last: without held-out faces there is nothing to choose by"),
        (0.1, [1.0, 0.9, 0.8, 0.7], "the lowest validation loss, and the last"),
        (0.1, [1.0, 0.7, 0.8, 0.9], "the lowest validation loss (no scores"),
    ],
)
def test_the_reason_given_for_the_best_epoch_is_the_real_one(tiny_config, monkeypatch, share, losses, reason):
    losses = iter(losses)
    monkeypatch.setattr(trainer, "validate", lambda *_: (next(losses), 0.01))
    summary = run(tiny_config, validation_share=share)
    assert summary["best_reason"].startswith(reason)
    best = json.loads(pathlib.Path(tiny_config.output_dir, "best.json").read_text())
    assert best["reason"] == summary["best_reason"] and (best["val_loss"] == "n/a") == (share == 0)


def test_the_file_s_header_names_the_trigger_word_if_there_is_one(tiny_config):
    for word in ("sks face", ""):
        run(tiny_config, trigger_word=word, num_train_epochs=1, overwrite=True, validation_share=0.0)
        file = pathlib.Path(tiny_config.output_dir, "pytorch_lora_weights.safetensors")
        with safetensors.safe_open(file, "pt") as opened:
            assert opened.metadata().get("modelspec.trigger_phrase", "") == word


def test_a_validation_loss_that_is_not_finite_is_never_the_best(tiny_config, monkeypatch):
    losses = iter([1.0, math.nan])
    monkeypatch.setattr(trainer, "validate", lambda *_: (next(losses), 0.01))
    with pytest.raises(trainer.Stop, match="validation loss after epoch 1 is nan") as stop:
        run(tiny_config)
    assert stop.value.exit_code == 4
