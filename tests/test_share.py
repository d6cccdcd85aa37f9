"""The folder to give away, opened as a stranger would."""

import contextlib
import dataclasses
import io
import json
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, run, small_config
from PIL import Image

import train_manga_lora as trainer
from evaluation import share

FILE = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def shared(tmp_path_factory, tiny_base, shared_faces):
    """(config, its share folder, what was printed) of a run with a trigger word and clip skip 2."""
    folder = tmp_path_factory.mktemp("share")
    config = small_config(
        folder,
        shared_faces,
        tiny_base,
        learning_rate=0.01,
        num_train_epochs=1,
        lora_name="my_style",
        trigger_word="sks style",
        clip_skip=2,
        sample_prompts=('a "manga" face: sad', "another {face}"),
        sample_steps=2,
        samples_per_prompt=2,
    )
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        trainer.main(config)
    return config, pathlib.Path(config.output_dir, "share"), printed.getvalue()


def test_the_hub_s_own_parser_accepts_the_card_and_finds_all_in_it(shared):
    from huggingface_hub import ModelCard

    config, folder, _ = shared
    card = ModelCard.load(folder / "README.md")
    data = card.data.to_dict()
    assert (data["license"], data["library_name"], data["instance_prompt"]) == ("other", "diffusers", "sks style")
    assert {"lora", "text-to-image"} <= set(data["tags"]) and data["pipeline_tag"] == "text-to-image"
    assert [entry["text"] for entry in data["widget"]] == list(config.sample_prompts)
    for entry in data["widget"]:
        assert Image.open(folder / entry["output"]["url"]).size == (64, 64)
        assert f"]({entry['output']['url']})" in card.text
    assert not re.search(r"TODO|More Information|None|\{|MEASURE", card.text.replace("another {face}", ""))
    assert "my_style" in card.text and "rank 4, alpha 8" in card.text


@pytest.mark.parametrize("model, expected", [("someone/anime", "someone/anime"), (str(ROOT / "demo" / "base"), None)])
def test_the_card_names_a_base_of_the_hub_and_the_demo_s_artists(shared, model, expected):
    config, _, _ = shared
    config = dataclasses.replace(config, pretrained_model=model)
    labels = dict.fromkeys(("modelspec.license", "modelspec.description"), "x")
    labels |= {"ss_num_train_images": 3, "modelspec.resolution": "64x64", "ss_base_model_version": "sd_v1"}
    card = share.model_card(config, labels, {}, {"best_epoch": 1, "epochs_run": 1})
    data = yaml.safe_load(card.split("---")[1])
    assert (data.get("base_model"), "widget" in data) == (expected, False)
    assert ("LICENSES.md" in card) == (expected is None) and str(ROOT) not in card
    assert f"from_pretrained({expected or 'demo/base'!r})" in card


def test_a_card_sends_to_uis_only_what_they_can_load(shared):
    config, folder, _ = shared
    labels = dict.fromkeys(("modelspec.license", "modelspec.description", "modelspec.resolution"), "x")
    labels |= {"ss_num_train_images": 3, "ss_base_model_version": "sd_v1"}
    of_sd15 = share.model_card(config, labels, {}, {"best_epoch": 1, "epochs_run": 1})
    for card, fits in ((of_sd15, True), ((folder / "README.md").read_text(encoding="utf-8"), False)):
        assert [word in card for word in ("A1111", "ComfyUI", "<lora:my_style:1>")] == [fits] * 3
        tags = yaml.safe_load(card.split("---")[1])["tags"]
        assert [tag for tag in tags if "stable-diffusion" in tag] == share.SD15_TAGS * fits
        assert "Download this folder and run this in it; it needs diffusers and peft." in card


def test_pictures_are_generated_ones_and_copies_of_training_faces_are_left_out(shared, monkeypatch, tmp_path):
    config, folder, _ = shared
    sheet = np.asarray(Image.open(folder / "images" / "1.png"))
    faces = [
        np.asarray(Image.open(path).convert("RGB").resize((64, 64)))
        for path in pathlib.Path(config.dataset_dir).glob("*.png")
    ]
    assert min(np.abs(sheet.astype(int) - face).mean() for face in faces) > 10
    assert (folder / "my_style.png").read_bytes() == (folder / "images" / "1.png").read_bytes()

    class Score:
        features = type("F", (), {"is_copy": [True, False, False, False], "texts": [*"aabb"], "pixels": [*range(4)]})

    evaluation = type("Evaluation", (), {"jobs": type("Jobs", (), {"samples": [0, 2]})})
    assert share.examples(evaluation, Score) == [("b", 2)]


def test_the_folder_holds_what_is_promised_and_nothing_private(shared):
    config, folder, _ = shared
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    own = {f"my_style.{suffix}" for suffix in ("json", "png", "safetensors")}
    assert files == own | {"README.md", FILE, "images/1.png", "images/2.png"}
    captions = [text for entry in json.loads(pathlib.Path(config.json_file).read_text()) for text in entry["captions"]]
    for file in files:
        content = (folder / file).read_bytes()
        private = [config.output_dir, config.dataset_dir, config.pretrained_model, *captions]
        assert [text for text in private if text.encode() in content] == [], file
    weights = pathlib.Path(config.output_dir, FILE).read_bytes()
    assert (folder / "my_style.safetensors").read_bytes() == (folder / FILE).read_bytes() == weights


def test_the_sidecar_is_what_a1111_and_invokeai_read(shared):
    _, folder, _ = shared
    sidecar = json.loads((folder / "my_style.json").read_text(encoding="utf-8"))
    assert (sidecar["activation text"], sidecar["preferred weight"]) == ("sks style", 1.0)
    assert "Clip skip 2" in sidecar["description"]


def test_diffusers_loads_the_folder_as_it_is(shared, tiny_base):
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(tiny_base, safety_checker=None)
    pipe.load_lora_weights(str(shared[1]))
    assert pipe.get_active_adapters() == ["default_0"]


def test_the_printed_python_works_as_it_is_and_draws_with_lora_and_clip_skip(shared, tmp_path, tiny_base):
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPTextModel

    config, _, printed = shared
    code = printed.split("In Python: ")[1].splitlines()[0]
    settings = "; pipe.set_progress_bar_config(disable=True); import torch; torch.manual_seed(0); pipe("
    code = code.replace("; pipe(", settings).replace("sad')", "sad', num_inference_steps=2)")
    assert "sks style, a" in code
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    short = CLIPTextModel.from_pretrained(tiny_base, subfolder="text_encoder", num_hidden_layers=1)
    for with_lora, clip_skip, is_same in ((True, True, True), (False, True, False), (True, False, False)):
        encoder = {"text_encoder": short} if clip_skip else {}
        pipe = StableDiffusionPipeline.from_pretrained(tiny_base, safety_checker=None, **encoder)
        if with_lora:
            pipe.load_lora_weights(config.output_dir, weight_name=FILE)
        torch.manual_seed(0)
        expected = pipe("sks style, " + config.sample_prompts[0], num_inference_steps=2).images[0]
        apart = np.abs(np.asarray(expected).astype(int) - np.asarray(Image.open(tmp_path / "face.png"))).max()
        assert (apart <= 2) == is_same, (with_lora, clip_skip, apart)


def test_the_prompt_for_a1111_is_printed_where_it_can_load_the_file(shared):
    config, _, printed = shared
    assert "In A1111, Forge, ComfyUI: not with this base, which is no SD 1.5" in printed and "Copy: " not in printed
    labels, cpu = {"ss_base_model_version": "sd_v1"}, torch.device("cpu")
    fake = type("Run", (), {"labels": labels, "output": pathlib.Path("out"), "device": cpu})
    lines = share.use_it(fake, config, pathlib.Path("base")).splitlines()
    assert "guidance" not in lines[0]
    guided = dataclasses.replace(config, guidance_scale=3.0)
    assert "sad', guidance_scale=3).images[0]" in share.use_it(fake, guided, pathlib.Path("base"))
    assert lines[1] == 'In A1111, Forge: <lora:my_style:1> sks style, a "manga" face: sad   (Clip skip: 2)'
    assert lines[2].startswith('In ComfyUI: "Load LoRA"')
    assert lines[3:] == [f"Copy: my_style.* from {pathlib.Path('out', 'share')} to models/Lora (ComfyUI: models/loras)"]


def test_the_python_for_a_single_file_reads_its_converted_copy_and_says_to_keep_it(shared, tmp_path, tiny_base):
    config, _, _ = shared
    (tmp_path / "anime.ckpt").touch()
    fake = type(
        "Run", (), {"labels": {"ss_base_model_version": "sd_v1"}, "output": tmp_path, "device": torch.device("cpu")}
    )
    for base, copied in ((tmp_path / "anime.ckpt", True), (tiny_base, False)):
        line = share.use_it(fake, dataclasses.replace(config, pretrained_model=str(base)), tiny_base).splitlines()[0]
        assert f"from_pretrained({str(tiny_base)!r})" in line
        assert line.endswith(f"  # {tiny_base} is the converted copy: keep it while you use this") == copied
        compile(line.removeprefix("In Python: "), "line", "exec")


def test_without_pictures_the_folder_is_complete_but_for_them(tiny_config):
    from huggingface_hub import ModelCard

    run(tiny_config, num_train_epochs=1)
    folder = pathlib.Path(tiny_config.output_dir, "share")
    assert sorted(path.name for path in folder.rglob("*") if path.is_file()) == sorted(
        ["README.md", FILE, "manga_faces.json", "manga_faces.safetensors"]
    )
    assert ModelCard.load(folder / "README.md").data.to_dict()["instance_prompt"] == "manga face"


def test_a_share_folder_that_cannot_be_written_leaves_the_former_one(tiny_config, monkeypatch):
    run(tiny_config, num_train_epochs=1)
    folder = pathlib.Path(tiny_config.output_dir, "share")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(share, "write_atomic", full)
    with pytest.raises(OSError, match="No space"):
        run(tiny_config, num_train_epochs=1, lora_name="other")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_the_folder_is_deleted_with_overwrite_and_replaced_as_a_whole(tiny_config):
    run(tiny_config, num_train_epochs=1)
    folder = pathlib.Path(tiny_config.output_dir, "share")
    (folder / "mine.txt").touch()
    run(tiny_config, num_train_epochs=1, lora_name="other")
    assert not (folder / "mine.txt").exists() and (folder / "other.json").is_file()
    assert not (folder / "manga_faces.json").exists()
