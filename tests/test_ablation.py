"""The ablation: each swap does what its row says, and nothing but that; the table follows from the runs.

python -m pytest tests/test_ablation.py
"""

import dataclasses
import itertools
import json
import math
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

import train_manga_lora as trainer
from dataset import MangaFaceDataset
from lora_layers import lora_parameters
from training import denoising
from training.base_model import load_tokenizer

sys.path.insert(0, str(ROOT / "bench"))
import ablation
import new_concepts

PROMPTS = set(json.loads((ROOT / "demo" / "attributes" / "prompts.json").read_text(encoding="utf-8")))


def swapped(monkeypatch, swap: list) -> None:
    for module, name, new in swap:
        monkeypatch.setattr(module, name, new)


@pytest.fixture
def faces(shared_faces):
    return MangaFaceDataset(shared_faces, shared_faces / "modified_face_250.json", 64)


def draw(dataset, step=3):
    return trainer.draw_batch(dataset, range(8), 0, step, (4, 16, 16), 1000, 0.0)


def test_lora_plus_equals_adamw_with_two_groups_of_parameters(tiny_base, monkeypatch):
    config = trainer.TrainingConfig(lora_rank=4, lora_alpha=8, learning_rate=1e-3, seed=0)
    arguments = (config, tiny_base, torch.device("cpu"), torch.float32, lambda text: None)
    own = [weight.detach().clone() for weight in lora_parameters(trainer.build_model(*arguments).unet)]
    swapped(monkeypatch, ablation.lora_plus(4))
    weights = trainer.build_model(*arguments).weights
    start = weights.detach().clone()
    optimizer = torch.optim.AdamW([weights], lr=1e-3, weight_decay=0.0, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0, growth_interval=2**30)
    groups = [{"params": own[0::2], "lr": 1e-3}, {"params": own[1::2], "lr": 4e-3}]  # down, up, down, up, ...
    expected = torch.optim.AdamW(groups, weight_decay=0.0)
    for step in range(3):
        gradient = torch.randn(len(weights), generator=torch.Generator().manual_seed(step))
        weights.grad.copy_(gradient)
        for weight, values in zip(own, gradient.split([w.numel() for w in own]), strict=True):
            weight.grad = values.view_as(weight).clone()
        assert trainer.clip_and_step(optimizer, scaler, weights, 0.0)
        expected.step()
    assert torch.allclose(weights, torch.cat([w.flatten() for w in own]), rtol=0, atol=1e-6)
    assert (weights - start).abs().max() > 0.01
    before = weights.detach().clone()
    weights.grad.fill_(math.nan)
    assert not trainer.clip_and_step(optimizer, scaler, weights, 0.0)
    assert weights.equal(before)


def test_uniform_timesteps_change_the_timesteps_and_leave_their_strata(faces, monkeypatch):
    before = [draw(faces, step) for step in range(20)]
    swapped(monkeypatch, ablation.uniform_timesteps())
    after = [draw(faces, step) for step in range(20)]
    for old, new in zip(before, after, strict=True):
        assert sorted(old.timesteps // 125) == list(range(8))  # one of each eighth
        for name in ("faces", "texts", "noise", "posterior_noise", "loss_weights"):
            assert getattr(old, name).equal(getattr(new, name)), name
    assert any(sorted(new.timesteps.tolist()[i] // 125 for i in range(8)) != list(range(8)) for new in after)
    drawn = torch.cat([new.timesteps for new in after]).float()
    assert drawn.min() >= 0 and drawn.max() < 1000 and 400 < drawn.mean() < 600


def test_min_snr_weighs_noise_prediction_by_min_of_snr_and_gamma_over_snr(faces, monkeypatch):
    from diffusers import DDPMScheduler
    from diffusers.training_utils import compute_snr

    before = draw(faces)
    swapped(monkeypatch, ablation.min_snr(5.0))
    after = draw(faces)
    scheduler = DDPMScheduler.from_pretrained(ROOT / "demo" / "base" / "scheduler")
    snr = compute_snr(scheduler, before.timesteps)
    assert torch.allclose(after.loss_weights, before.loss_weights * torch.clamp(snr, max=5.0) / snr, rtol=1e-5)
    assert after.loss_weights.min() < 0.5 < after.loss_weights.max() == 1


@pytest.mark.parametrize(
    "row, packed", [("joined_captions", True), ("joined_glasses_half", True), ("single_captions", False)]
)
def test_caption_rows_draw_only_their_kind_and_leave_the_data_set_alone(faces, monkeypatch, row, packed):
    faces.make_texts(load_tokenizer(ROOT / "demo" / "base"))
    before = [list(indices) for indices in faces.text_indices]
    swapped(monkeypatch, ablation.ROWS[row].swap())
    for step in range(20):
        drawn = draw(faces, step)
        for face, text in zip(drawn.faces.tolist(), drawn.texts.tolist(), strict=True):
            is_caption = faces.texts[text] in faces.faces[face].captions
            assert is_caption != packed and text in before[face]
    assert faces.text_indices == before


def rare_faces(folder, monkeypatch, row, word="flowers"):
    """(the weights, whether each training face's captions have the word, those), with this row's swap and constants."""
    with monkeypatch.context() as patch:
        swapped(patch, ablation.ROWS[row].swap())
        faces = MangaFaceDataset(folder, folder / "modified_face_250.json", 64, **ablation.ROWS[row].constants)
    captions = [" ".join(faces.faces[face].captions) for face in faces.train]
    return faces.weights, np.array([word in text for text in captions]), captions


def test_the_oracles_draw_faces_with_flowers_as_often_as_their_rows_say(shared_faces, monkeypatch):
    weights, rare, _ = rare_faces(shared_faces, monkeypatch, "flowers_x2")
    assert rare.any() and len(set(weights[rare])) == len(set(weights[~rare])) == 1
    assert weights[rare][0] == pytest.approx(2.0) and weights[~rare][0] < 1
    assert weights.mean() == pytest.approx(1)


@pytest.mark.parametrize("word", ablation.NEW)
@pytest.mark.parametrize("row", ["{}_half", "joined_{}_half"])
def test_every_second_face_that_an_oracle_draws_of_the_demo_has_what_its_row_says(monkeypatch, row, word):
    faces = ROOT / "demo" / "faces"
    weights, rare, _ = rare_faces(faces, monkeypatch, row.format(word), word)
    assert len(set(weights[rare])) == len(set(weights[~rare])) == 1
    assert weights[rare].sum() / weights.sum() == pytest.approx(0.5, abs=0.01)


def test_the_former_weights_are_the_mean_idf_of_all_words(shared_faces, monkeypatch):
    from sklearn.feature_extraction.text import TfidfVectorizer

    weights, _, captions = rare_faces(shared_faces, monkeypatch, "mean_idf")
    vectorizer = TfidfVectorizer(stop_words="english").fit(captions)
    rarity = dict(zip(vectorizer.get_feature_names_out(), vectorizer.idf_, strict=True))
    words = [set(vectorizer.build_analyzer()(text)) for text in captions]
    raw = np.array([sum(rarity[word] for word in some) / len(some) for some in words])
    assert np.allclose(weights, raw / raw.mean(), rtol=1e-6)  # nothing is so rare that it is clipped


def test_constants_of_all_rows_are_constants_of_the_trainer():
    names = {field.name for field in dataclasses.fields(trainer.TrainingConfig)}
    for row in ablation.ROWS.values():
        assert row.constants.keys() <= names
        trainer.check_config(trainer.TrainingConfig(**trainer.DEMO | row.constants))


def test_steps_to_a_loss_are_counted_between_epochs_linearly():
    losses = [1.0, 0.8, 0.6, 0.5]
    assert ablation.steps_to(losses, 0.7, 30) == pytest.approx(15)
    assert ablation.steps_to(losses, 0.5, 30) == pytest.approx(30)
    assert ablation.steps_to(losses, 0.49, 30) == math.inf


def result(row, seed, losses, **figures):
    return {"row": row, "seed": seed, "steps": 20, "val_losses": losses} | figures


def test_rows_are_compared_with_the_baseline_seed_by_seed():
    figures = {"renders_loss": 0.5, "score": 5.0, "accuracy": {"flowers": 0.7, "glasses": 0.7}, "known": 0.7}
    runs = [result("baseline", seed, [1.0, 0.8, 0.6 + 0.1 * seed], **figures) for seed in range(3)]
    runs += [
        result(
            "lr_x2", seed, [1.0, 0.6 + 0.1 * seed, 0.5 + 0.1 * seed], **figures | {"known": known, "renders_loss": 0.4}
        )
        for seed, known in enumerate((0.8, 0.81, 0.82))
    ]
    runs += [result("no_decay", seed, [1.0, 0.9, 0.85], **figures) for seed in range(3)]
    rows = {row["row"]: row for row in ablation.summarize(runs)}
    faster = rows["lr_x2"]
    assert faster["val_loss"]["difference"] == pytest.approx(-0.1)
    assert faster["val_loss"]["half_interval"] == pytest.approx(0, abs=1e-9)  # seeds differ, their differences don't
    assert faster["known"]["difference"] == pytest.approx(0.11)
    assert faster["known"]["half_interval"] == pytest.approx(4.303 * 0.01 / math.sqrt(3))
    assert faster["steps"]["mean"] == pytest.approx(0.5)
    assert faster["renders_loss"]["difference"] == pytest.approx(-0.1)
    assert rows["no_decay"]["steps"]["mean"] is None  # never got there


@pytest.mark.long
def test_a_run_trains_with_its_swap_is_scored_and_is_not_done_again(tiny_base, shared_faces, tmp_path, monkeypatch):
    pytest.importorskip("dicebear")
    monkeypatch.setattr(
        trainer,
        "DEMO",
        trainer.DEMO
        | {
            "dataset_dir": str(shared_faces),
            "json_file": str(shared_faces / "modified_face_250.json"),
            "pretrained_model": str(tiny_base),
            "lora_rank": 4,
            "lora_alpha": 8,
            "validation_share": 0.4,  # 8 faces: a score
            "sample_prompts": ("a manga face",),
        },
    )
    for name, value in {"WORK": tmp_path, "ATTRIBUTE_PROMPTS": 40, "SAMPLE_STEPS": 1}.items():
        monkeypatch.setattr(ablation, name, value)
    for name, value in {"EVALUATION": [], "RENDERED": [], "RENDERS": 2}.items():
        monkeypatch.setattr(ablation, name, value)
    results = {row: ablation.run((row, 0, 2, 1e-3)) for row in ("baseline", "min_snr_5")}
    assert trainer.draw_batch is denoising.draw_batch  # the swap was put back
    assert results["baseline"]["renders_loss"] != results["min_snr_5"]["renders_loss"]
    assert sum(prompt in PROMPTS for prompt in ablation.EVALUATION[0].jobs.prompts) == 40
    assert results["baseline"]["val_losses"][0] == results["min_snr_5"]["val_losses"][0]
    assert results["baseline"]["val_losses"][1:] != results["min_snr_5"]["val_losses"][1:]
    assert len(results["baseline"]["val_losses"]) == 3 and 0 <= results["baseline"]["known"] <= 1
    log = tmp_path / "2-epochs-0.001" / "baseline-seed0" / "log.txt"
    assert "Validation Loss" in log.read_text(encoding="utf-8")

    file, words = tmp_path / "results.json", ["--rows", "min_snr_5", "--seeds", "1", "--epochs", "2"]
    ablation.write_results(file, list(results.values()), ablation.settings_of(2, 1e-3))
    monkeypatch.setattr(ablation, "run", lambda *_: pytest.fail("trained again"))
    ablation.main([*words, "--rate", "1e-3", "--out", str(file)])
    assert [run["row"] for run in json.loads(file.read_text())["runs"]] == ["baseline", "min_snr_5"]
    with pytest.raises(SystemExit, match="name another file"):  # runs of other settings are never mixed in
        ablation.main([*words, "--rate", "2e-3", "--out", str(file)])


@pytest.mark.parametrize("words", [["--rows", "nothing"], ["--seeds", "0"], ["--epochs", "0"], ["--rate", "2"]])
def test_bad_arguments_end_with_exit_code_2(words, capsys):
    with pytest.raises(SystemExit) as stop:
        ablation.parse_arguments(words)
    assert stop.value.code == 2 and words[0] in capsys.readouterr().err


def test_what_is_asked_of_new_concepts_has_the_word_or_lacks_it():
    faces = MangaFaceDataset.from_config(trainer.TrainingConfig(**trainer.DEMO | {"demo": True}))
    for word in ablation.NEW:
        texts = new_concepts.texts_of(word, faces)
        assert {len(some) for some in texts.values()} == {new_concepts.PICTURES}
        assert all(word in text for kind in ("own", "put in") for text in texts[kind])
        assert not any(word in text for text in texts["others"]) and len(set(texts["others"])) > 20
        for without, put_in in zip(texts["others"], texts["put in"], strict=True):
            (added,) = [part for part in put_in.split(", ") if word in part]
            assert put_in.replace(f"{added}, ", "") == without


def test_more_faces_with_glasses_are_other_faces_and_all_have_them(tmp_path, monkeypatch):
    pytest.importorskip("dicebear")
    monkeypatch.setattr(new_concepts, "MORE_FACES", 2)
    constants = new_concepts.with_more_glasses(tmp_path / "faces")
    faces = MangaFaceDataset.from_config(trainer.TrainingConfig(**trainer.DEMO | {"demo": True} | constants)).faces
    more = [face for face in faces if face.name.startswith("more")]
    assert len(faces) == 252 and len(more) == 2 and len({face.sha256 for face in faces}) == 252
    assert all("glasses" in " ".join(face.captions) for face in more)


def check_committed(file, settings, runs, table) -> dict:
    """Of this base, judge, prompts and faces, whose digest is in `settings`; every row from every seed; in the docs."""
    content = json.loads(file.read_text(encoding="utf-8"))
    assert content["settings"] == settings
    assert all(run["settings"] == settings for run in content["runs"])
    assert [(run["row"], run["seed"]) for run in content["runs"]] == runs
    assert table(content) in (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    return content


def test_the_committed_results_are_of_this_demo_and_stand_in_the_docs():
    settings, runs = ablation.settings_of(10, trainer.DEMO["learning_rate"]), itertools.product(ablation.ROWS, range(3))
    content = check_committed(ablation.RESULT, settings, list(runs), ablation.results_table)
    assert ablation.summarize(content["runs"]) == content["summary"]


def test_the_committed_results_on_new_concepts_are_of_this_demo_and_stand_in_the_docs():
    settings = ablation.settings_of(trainer.DEMO["num_train_epochs"], trainer.DEMO["learning_rate"])
    runs = itertools.product(new_concepts.ROWS, range(new_concepts.SEEDS))
    check_committed(new_concepts.OUT, settings | {"prompts": new_concepts.PICTURES}, list(runs), new_concepts.table)
