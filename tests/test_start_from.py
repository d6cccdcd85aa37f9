"""Going on from a LoRA that is there: the same correction in every layout, and what can't be taken. CPU, offline."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import exported, run, signal_at_step, small_config
from safetensors.torch import load_file, save_file
from test_bad_input import exit_of, flags, snapshot

import train_manga_lora as trainer
from dataset import MangaFaceDataset
from evaluation import pictures
from evaluation.score import Evaluation
from lora_layers import inject_lora, lora_modules, save_lora_weights
from training.base_model import load_tokenizer, load_unet
from training.checkpoint import CheckpointError
from training.files import Interrupted
from training.lora_files import start_from

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tiny_base(deep_base):
    return deep_base


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_base) -> Path:
    """A LoRA of rank 4 and alpha 8 for the tiny base, in float32."""
    unet, _ = load_unet(tiny_base, CPU, torch.float32)
    torch.manual_seed(3)
    inject_lora(unet, 4, 8)
    for layer in lora_modules(unet).values():
        layer.up_weight.data.normal_()
    return save_lora_weights(unet, tmp_path_factory.mktemp("trained") / "mine.safetensors", torch.float32)


def corrections(unet) -> dict[str, torch.Tensor]:
    return {n: layer.scale * layer.up_weight @ layer.down_weight for n, layer in lora_modules(unet).items()}


def as_diffusers(tensors: dict) -> dict:
    """The layout of diffusers' training examples, for a UNet's attention: no alpha is stored, so it is the rank."""
    changed = {}
    for name, value in tensors.items():
        module, _, end = name.partition(".")
        if end != "alpha":
            path = module.removeprefix("lora_unet_")
            for part in ("down_blocks", "up_blocks", "mid_block", "transformer_blocks", "attentions", "attn1", "attn2"):
                path = path.replace(f"_{part}", f".{part}").replace(f"{part}_", f"{part}.")
            path = path.replace("to_out_0", "to_out.0").replace("._", ".").replace("_.", ".")
            path = ".".join(part if not part[0].isdigit() else part.replace("_", ".") for part in path.split("."))
            end = {"lora_down.weight": "lora.down.weight", "lora_up.weight": "lora.up.weight"}[end]
            changed[f"unet.{path}.{end}"] = value
    return changed


@pytest.mark.parametrize("layout", ["ours", "another alpha", "kohya in half precision", "diffusers", "half of it"])
def test_the_first_step_starts_from_the_same_correction_whatever_layout_and_alpha(tmp_path, tiny_base, trained, layout):
    tensors, alpha, tolerance = load_file(trained), 8.0, 1e-6
    if layout == "another alpha":
        alpha = 3.0
        tensors |= {name: torch.tensor(alpha) for name in tensors if name.endswith("alpha")}
    elif layout == "kohya in half precision":
        tensors, tolerance = {name: value.half() for name, value in tensors.items()}, 0.02
    elif layout == "diffusers":
        tensors, alpha = as_diffusers(tensors), 4.0
    elif layout == "half of it":
        tensors = {name: value for name, value in tensors.items() if "to_q" in name or "to_v" in name}
    save_file(tensors, tmp_path / "start.safetensors")
    reference, _ = load_unet(tiny_base, CPU, torch.float32)
    unet, _ = load_unet(tiny_base, CPU, torch.float32)
    inject_lora(reference, 4, 8)
    inject_lora(unet, 4, 32)  # of this run
    kept = load_file(trained)
    for name, layer in lora_modules(reference).items():
        if layout != "half of it" or "to_q" in name or "to_v" in name:
            layer.down_weight.data.copy_(kept[f"{name}.lora_down.weight"])
            layer.up_weight.data.copy_(kept[f"{name}.lora_up.weight"] * alpha / 8)
    said = start_from(unet, small_config(tmp_path, tmp_path, tiny_base, start_from=str(tmp_path / "start.safetensors")))
    expected, found = corrections(reference), corrections(unet)
    assert all(torch.allclose(found[name], expected[name], atol=tolerance) for name in expected)
    assert f"alpha {alpha:g}" in said and ("64 more begin anew" in said) == (layout == "half of it")


def test_a_run_goes_on_from_a_file_resumes_exactly_and_knows_the_file(tmp_path, faces, tiny_base, trained):
    """Also: its first validation loss is that file's, and the file decides whose checkpoints these are."""
    start = shutil.copy(trained, tmp_path / "start.safetensors")
    fresh = small_config(tmp_path / "fresh", faces, tiny_base, num_train_epochs=1)
    whole = small_config(tmp_path / "whole", faces, tiny_base, start_from=str(start))
    cut = small_config(tmp_path / "cut", faces, tiny_base, start_from=str(start))
    losses = [run(config)["val_loss_start"] for config in (fresh, whole)]
    assert losses[0] != losses[1]
    with pytest.MonkeyPatch.context() as patch:
        signal_at_step(patch, 3)
        with pytest.raises(Interrupted):
            run(cut)
    tensors = load_file(start)
    save_file({name: value * 2 if "lora_up" in name else value for name, value in tensors.items()}, start)
    with pytest.raises(CheckpointError, match=r"holds another run \(start was"):
        run(cut)
    shutil.copy(trained, start)
    run(cut)
    assert exported(cut) == exported(whole) != exported(fresh)


STRANGE = {
    "text encoder": ("lora_te_text_model_encoder_layers_0_mlp_fc1", "holds text-encoder modules (1 of 129)"),
    "feed-forward": ("lora_unet_mid_block_attentions_0_transformer_blocks_0_ff_net_2", "holds feed-forward modules"),
    "proj": ("lora_unet_mid_block_attentions_0_proj_in", "holds projection modules"),
    "convolution": ("lora_unet_mid_block_resnets_0_conv1", "holds convolution modules"),
    "another model": ("lora_unet_mid_block_attentions_0_transformer_blocks_9_attn1_to_q", "is another model's"),
}


ALONE = {  # what else is in a file -> what is said of it
    "a base": ({"model.diffusion_model.input_blocks.0.0.weight": torch.ones(1)}, "is no LoRA, but a base model: name"),
    "a VAE": ({"first_stage_model.decoder.conv_in.weight": torch.ones(1)}, "but part of a base model, a UNet, VAE or"),
    "an embedding": (
        {"emb_params": torch.ones(3, 16)},
        "is no LoRA, but an embedding (textual inversion): name a LoRA",
    ),
    "a LoHa": ({"lora_unet_mid_block.hada_w1_a": torch.ones(4, 16)}, "a LyCORIS network other than a LoRA"),
}
MODULE = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"


@pytest.mark.parametrize("dry_run", [True, False], ids=["dry run", "run"])
@pytest.mark.parametrize(
    "kind", [*STRANGE, *ALONE, "rank", "ranks", "rank 0", "DoRA", "shape", "base.ckpt", "a text", "torn", "nothing"]
)
def test_what_can_not_be_gone_on_from_says_what_it_is(script, place, tiny_base, trained, kind, dry_run):
    tensors, file, said = load_file(trained), place / "start.safetensors", ""
    if kind in STRANGE:
        module, said = STRANGE[kind]
        tensors |= {f"{module}.lora_down.weight": torch.ones(4, 16), f"{module}.lora_up.weight": torch.ones(16, 4)}
        tensors |= {f"{module}.alpha": torch.tensor(8.0)}
    elif kind == "rank":
        sliced = {"down": lambda value: value[:2], "up": lambda value: value[:, :2].contiguous()}
        for name, value in list(tensors.items()):
            if not name.endswith("alpha"):
                tensors[name] = sliced["up" if "lora_up" in name else "down"](value)
        said = "has rank 2, and lora_rank is 4: set lora_rank=2"
    elif kind == "shape":
        name = next(name for name in tensors if "attn2_to_k.lora_down" in name)
        tensors, said = tensors | {name: torch.ones(4, 7)}, "is another model's"
    elif kind in ALONE:
        tensors, said = ALONE[kind]
    elif kind in ("ranks", "rank 0"):
        rank, said = {"ranks": (2, "has ranks 2 and 4; one rank is needed"), "rank 0": (0, "is damaged, with lay")}[
            kind
        ]
        tensors |= {
            f"{MODULE}.lora_down.weight": torch.ones(rank, 16),
            f"{MODULE}.lora_up.weight": torch.ones(16, rank),
        }
    elif kind == "DoRA":
        tensors, said = tensors | {f"{MODULE}.dora_scale": torch.ones(16)}, "not only a LoRA; name a plain one"
    save_file(tensors, file)
    if kind == "a text":
        file.write_text("version https://git-lfs")
    elif kind == "torn":
        file.write_bytes(file.read_bytes()[:1000])
    elif kind == "nothing":
        file.unlink()
    elif kind == "base.ckpt":
        file, said = place / "base.ckpt", "is no LoRA, but a base model: name it as --pretrained_model"
        torch.save({"state_dict": ALONE["a base"][0], "global_step": 7}, file)
    before, more = snapshot(place), ["--dry_run"] * dry_run
    code, message = exit_of(script, flags(place, tiny_base, "--lora_rank", "4", "--start_from", str(file), *more))
    assert code == 2 and said in message and len(message.splitlines()) == 1, message
    assert message.startswith(f"start_from={str(file)!r}") and message.count(file.name) == 1, message
    assert "keys differ" not in message and "score" not in message and snapshot(place) == before, message


def test_score_0_stays_the_base_without_the_lora(tmp_path, shared_faces, tiny_base, trained):
    prompts = {"sample_prompts": ("a face",), "samples_per_prompt": 1, "sample_steps": 2}
    config = small_config(tmp_path, shared_faces, tiny_base, **prompts)
    dataset = MangaFaceDataset.from_config(config)
    dataset.make_texts(load_tokenizer(tiny_base))
    going_on = dataclasses.replace(config, start_from=str(trained))
    drawn = [Evaluation(of, dataset, tiny_base, CPU).of_base.features.pixels for of in (config, going_on)]
    assert all(map(np.array_equal, *drawn))


def test_epoch_0_is_called_the_start_where_there_is_one(tmp_path, faces, tiny_base, trained, monkeypatch):
    titles, prompts = [], {"sample_prompts": ("a face",), "samples_per_prompt": 1, "sample_every_n_epochs": 1}
    sheet = pictures.contact_sheet
    monkeypatch.setattr(pictures, "contact_sheet", lambda rows, of, texts: titles.append(of) or sheet(rows, of, texts))
    config = small_config(tmp_path, faces, tiny_base, num_train_epochs=1, sample_steps=2, **prompts)
    for start, called in (("", "base"), (str(trained), "start")):
        config = dataclasses.replace(config, start_from=start, output_dir=str(tmp_path / called))
        titles.clear()
        trainer.main(config)
        assert [of[-1] for of in titles[:2]] == [called, "epoch 1"]
        page = Path(config.output_dir, "report.html").read_text(encoding="utf-8")
        assert f"<figcaption>{called}</figcaption></button>" in page and f"beside the {called}'s at full size" in page


def test_new_faces_go_on_from_the_last_epoch_in_another_folder_as_the_message_says(
    tmp_path, faces, tiny_base, demo_faces
):
    config = small_config(tmp_path, faces, tiny_base, num_train_epochs=1)
    run(config)
    entries = json.loads((demo_faces / "modified_face_250.json").read_text(encoding="utf-8"))[:21]
    shutil.copy(demo_faces / f"{entries[-1]['image_name']}.png", faces)
    (faces / "modified_face_250.json").write_text(json.dumps(entries), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"faces new: 1") as caught:
        run(config)
    file = str(caught.value).split("--start_from ")[1].split(" in another")[0]
    assert Path(file).is_file()
    assert run(config, start_from=file, output_dir=str(tmp_path / "more"))["optimizer_steps"] > 0
