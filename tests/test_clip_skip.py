"""Layers of the text encoder that are left out, as UIs count them."""

import pytest
import torch
from conftest import exported, run

import train_manga_lora as trainer
from evaluation import pictures, score
from training import encoding
from training.base_model import load_text_encoder
from training.bases import BaseModelError

CPU = torch.device("cpu")
TEXTS = ["a manga face", "", "sharp eyes, long hair"]


def of_diffusers(base, texts, skip):
    """(embeddings, those of the negative prompt) by diffusers' own pipeline, whose clip_skip counts from 0."""
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
    if not hasattr(pipe.text_encoder, "text_model"):  # transformers 5 has no such part, which diffusers asks for
        object.__setattr__(pipe.text_encoder, "text_model", pipe.text_encoder)
    with torch.no_grad():
        return pipe.encode_prompt(texts, CPU, 1, True, clip_skip=skip)


@pytest.mark.parametrize("clip_skip, of_pipeline", [(1, None), (1, 0), (2, 1)])
def test_clip_skip_gives_the_embeddings_of_diffusers_own(tiny_base, clip_skip, of_pipeline):
    own = encoding.encode_text(*load_text_encoder(tiny_base, CPU, clip_skip), TEXTS)
    assert torch.equal(own, of_diffusers(tiny_base, TEXTS, of_pipeline)[0])
    assert torch.equal(own, of_diffusers(tiny_base, TEXTS, None)[0]) == (clip_skip == 1)


def test_training_samples_and_scores_all_skip_the_same_layers(tiny_config, tiny_base, monkeypatch):
    """The texts trained on, the prompts and the empty negative prompt of sheets, and the text encoder that scores."""
    seen, drawn = [], []
    encode, draw, build = trainer.encode, pictures.draw_pictures, pictures.build_pipeline
    monkeypatch.setattr(trainer, "encode", lambda *a: seen.append(encode(*a)) or seen[-1])
    monkeypatch.setattr(pictures, "draw_pictures", lambda pipe, given, *a: drawn.append(given) or draw(pipe, given, *a))
    pipes = []
    monkeypatch.setattr(score.pictures, "build_pipeline", lambda *a, **k: pipes.append(build(*a, **k)) or pipes[-1])
    sampled = {"sample_prompts": ("a face",), "sample_every_n_epochs": 1, "sample_steps": 1, "samples_per_prompt": 1}
    run(tiny_config, num_train_epochs=1, clip_skip=2, **sampled)
    (data,) = seen
    expected, _ = of_diffusers(tiny_base, data.dataset.texts, 1)
    assert torch.equal(torch.stack(list(data.encoded.text_embeddings))[: len(expected)], expected)
    prompts, _ = of_diffusers(tiny_base, ["", "a face"], 1)
    assert torch.equal(drawn[0]["negative_prompt_embeds"][:1], prompts[:1])
    assert torch.equal(drawn[0]["prompt_embeds"][-1:], prompts[1:])  # held-out captions come first
    scoring = pipes[-1].encode_prompt("a face", CPU, 1, True, negative_prompt="")
    assert torch.equal(torch.cat(scoring[::-1]), prompts)


def test_another_clip_skip_takes_nothing_from_the_cache_of_texts(tiny_config, monkeypatch):
    results, encode = [], trainer.encode
    monkeypatch.setattr(trainer, "encode", lambda *a: results.append(encode(*a)) or results[-1])
    for clip_skip in (1, 2, 1):
        run(tiny_config, num_train_epochs=1, clip_skip=clip_skip, overwrite=True)
    first, second, third = (data.encoded.embeddings(list(range(4))) for data in results)
    assert torch.equal(first, third) and not torch.equal(first, second)


def test_another_clip_skip_is_another_training(tiny_config):
    run(tiny_config, num_train_epochs=1)
    plain = exported(tiny_config)
    with pytest.raises(trainer.CheckpointError, match="clip_skip was 1, is 2"):
        run(tiny_config, num_train_epochs=1, clip_skip=2)
    run(tiny_config, num_train_epochs=1, clip_skip=2, overwrite=True)
    assert exported(tiny_config) != plain


@pytest.mark.parametrize("dry_run", [True, False])
def test_a_layer_that_the_base_lacks_is_refused_before_anything_is_encoded(tiny_config, tmp_path, dry_run):
    with pytest.raises(BaseModelError, match="clip_skip=3 must be at most 2, the layers of this base"):
        run(tiny_config, clip_skip=3, dry_run=dry_run)
    assert not (tmp_path / "cache").exists() and not (tmp_path / "out").exists()
    for value in (0, 13):
        with pytest.raises(trainer.Stop, match=rf"clip_skip={value} must be in \[1, 12\]") as stop:
            run(tiny_config, clip_skip=value)
        assert stop.value.exit_code == 2
