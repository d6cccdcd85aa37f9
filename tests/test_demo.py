"""The README's commands, shrunk, as a stranger would run them: the demo offline, and on two processes.

python -m pytest tests/test_demo.py
"""

import csv
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from safetensors.torch import load_file

SHRUNK = [
    "--demo",
    "--num_train_epochs",
    "1",
    "--train_batch_size",
    "8",
    "--sample_steps",
    "2",
    "--samples_per_prompt",
    "1",
    "--sample_every_n_epochs",
    "1",
]
NO_NETWORK = """
import socket
real_connect, real_lookup = socket.socket.connect, socket.getaddrinfo

def is_local(host):
    return host in (None, "", "localhost", "127.0.0.1", "::1", socket.gethostname())

def connect(self, address):
    if self.family != socket.AF_UNIX and not is_local(address[0]):
        raise AssertionError(f"network used: {address}")
    return real_connect(self, address)

def lookup(host, *rest, **options):
    if not is_local(host):
        raise AssertionError(f"network used: {host}")
    return real_lookup(host, *rest, **options)

socket.socket.connect, socket.getaddrinfo = connect, lookup
"""


@pytest.fixture
def environment(tmp_path):
    """No network, no hub settings, an empty hub cache, one thread per process."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(NO_NETWORK)
    (tmp_path / "hub").mkdir()
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGINGFACE"))}
    return clean | {"PYTHONPATH": str(tmp_path / "site"), "HF_HOME": str(tmp_path / "hub"), "OMP_NUM_THREADS": "1"}


def command(arguments, environment, folder):
    result = subprocess.run(
        [sys.executable, *arguments], env=environment, cwd=folder, capture_output=True, text=True, timeout=900
    )
    assert "FutureWarning" not in result.stderr, result.stderr[-3000:]  # the first thing a stranger would ask about
    assert result.returncode == 0, f"{arguments}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
    return result.stdout


@pytest.fixture
def demo(environment, tmp_path):
    """(what the demo printed, its output folder), run from another folder than the repository."""
    script = str(ROOT / "train_manga_lora.py")
    printed = command([script, *SHRUNK, "--gradient_accumulation_steps", "8"], environment, tmp_path)
    return printed, tmp_path / "demo_output"


def rows(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_the_demo_runs_offline(demo, tmp_path):
    printed, folder = demo
    assert "8 x 8 x 1 = 64" in printed and "Weight range:" in printed and "Epoch 1: Average Loss:" in printed
    assert "5-95 % of faces" in printed
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["optimizer_steps"] == 4 and summary["images_seen"] == 225
    picture = np.asarray(Image.open(folder / "before_after.png"))
    assert picture.std() > 20  # not a blank sheet
    weights = load_file(folder / "pytorch_lora_weights.safetensors")
    assert len(weights) == 3 * 128
    assert {path.name for path in tmp_path.iterdir()} == {"site", "hub", "demo_output", ".cache"}
    assert not any((tmp_path / "hub").rglob("*.safetensors"))


@pytest.mark.long
def test_two_processes_train_the_same_lora(demo, environment, tmp_path):
    weights, folder = load_file(demo[1] / "pytorch_lora_weights.safetensors"), demo[1]
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    script = [str(ROOT / "train_manga_lora.py"), *SHRUNK, "--gradient_accumulation_steps", "4"]
    printed = command([*launch, *script, "--output_dir", "two"], environment, tmp_path)
    assert "8 x 4 x 2 = 64" in printed
    assert [row["step"] for row in rows(tmp_path / "two")] == ["1", "2", "3", "4"]
    for one, two in zip(rows(folder), rows(tmp_path / "two"), strict=True):
        assert float(one["w_loss"]) == pytest.approx(float(two["w_loss"]), rel=1e-4)
    two = load_file(tmp_path / "two" / "pytorch_lora_weights.safetensors")
    difference = sum(float((weights[name].float() - two[name].float()).square().sum()) for name in weights)
    moved = sum(float(weights[name].float().square().sum()) for name in weights if name.endswith("lora_up.weight"))
    assert difference < 1e-3 * moved


def test_the_base_s_text_encoder_tells_words_of_which_it_has_seen_no_picture():
    """As CLIP does: else a LoRA would have little to learn them from."""
    from training.base_model import load_text_encoder

    tokenizer, encoder = load_text_encoder(ROOT / "demo" / "base", torch.device("cpu"))

    def states(word):
        prompt = f"A manga face portrait of a young man with short curly hair, gentle smile, {word}, manga style"
        ids = tokenizer(prompt, padding="max_length", max_length=77, return_tensors="pt").input_ids
        with torch.no_grad():
            return encoder(ids)[0][0]

    length = states("calm").norm(dim=1).mean()
    words = ("glasses", "sunglasses", "flowers", "freckles", "earrings", "beard")
    moved = {word: (states(word) - states("calm")).square().sum(dim=1).mean().sqrt() / length for word in words}
    assert all(share > 0.2 for share in moved.values()), moved
    page = (ROOT / "demo" / "README.md").read_text(encoding="utf-8")
    assert f"now by {100 * moved['glasses']:.0f} and {100 * moved['freckles']:.0f}.)" in page


@pytest.mark.long
def test_the_whole_demo_turns_colour_into_manga_ink_within_its_time(environment, tmp_path):
    """What the README shows, unshrunk: at most 8 minutes in all on two cores."""
    del environment["OMP_NUM_THREADS"]
    start = time.monotonic()
    printed = command([str(ROOT / "train_manga_lora.py"), "--demo"], environment, tmp_path)
    assert time.monotonic() - start < 8 * 60
    output = tmp_path / "demo_output"
    summary, scores = (json.loads((output / f"{name}.json").read_text()) for name in ("summary", "scores"))
    away = {of: scores[of]["style: colourfulness"]["value"] for of in ("base", "lora")}  # in spreads of the faces
    assert away["base"] > 4 and away["lora"] <= away["base"] / 4
    assert scores["lora"]["style: ink share"]["value"] < 1
    assert summary["val_ratio"] <= 0.85
    assert summary["score_maximum"] >= 8 and summary["score"] >= 0.5 * summary["score_maximum"]
    assert scores["lora"]["copies"] == [] and scores["lora"]["diversity"]["value"] >= 0.8
    last = printed[printed.index("Validation loss 0.0") :]
    assert "Score: " in last and "Best epoch: " in last and "Style learnt, faces intact" in last


def test_the_committed_base_s_unet_has_learnt_as_far_as_its_page_says():
    report = json.loads((ROOT / "demo" / "base" / "training.json").read_text(encoding="utf-8"))
    loss = report["held_out_loss"]["colour_lorelei"]
    assert loss <= 0.026
    assert f"to {loss:.3f} ([demo/base/training.json]" in " ".join(
        (ROOT / "demo" / "README.md").read_text("utf-8").split()
    )


@pytest.fixture
def train_base(monkeypatch):
    """demo/train_base.py; needs the packages of demo/requirements.txt."""
    pytest.importorskip("dicebear")
    pytest.importorskip("resvg_py")
    monkeypatch.syspath_prepend(str(ROOT / "demo"))
    import train_base

    return train_base


@pytest.fixture
def draw_faces(train_base):
    return train_base.draw_faces


def test_captions_name_earrings_exactly_where_the_hair_lets_them_be_seen(draw_faces):
    for style, earrings, hair in itertools.product(draw_faces.HAIR, (1, 2, 3), ("#000000", "#ff8800")):
        options = draw_faces.lorelei_options("ears", {"earrings": 0, "glasses": 0, "hairAccessories": 0})
        options |= {"hairVariant": [f"variant{style:02d}"], "earringsVariant": [f"variant{earrings:02d}"]}
        options["hairColor"] = [hair]
        without, _ = draw_faces.render("lorelei", options, 128)
        picture, parts = draw_faces.render("lorelei", options | {"earringsProbability": 100}, 128)
        seen = np.abs(np.asarray(picture, dtype=float) - np.asarray(without)).max() > 128
        assert ("earrings" in draw_faces.lorelei_words(parts)[2]) == seen, (style, earrings, hair)


def test_prompts_for_attributes_are_what_their_script_writes(draw_faces, tmp_path):
    import train_attributes

    train_attributes.write_prompts(tmp_path / "prompts.json")
    committed = ROOT / "demo" / "attributes" / "prompts.json"
    assert (tmp_path / "prompts.json").read_bytes() == committed.read_bytes()
    hair = [draw_faces.HAIR[style][0] for style in draw_faces.HIDDEN_EARRINGS]
    prompts = json.loads(committed.read_text(encoding="utf-8"))
    assert not any("earrings" in prompt and f"with {words}," in prompt for prompt in prompts for words in hair)
    asked = np.array([train_attributes.asked_for(prompt) for prompt in prompts[: train_attributes.BLOCK]])
    for name, column in zip(train_attributes.ATTRIBUTES, asked.T, strict=True):
        assert np.nanmean(column) == 0.5, name


def test_the_faces_are_what_their_script_draws(draw_faces):
    """Redraws three of the 250."""
    entries = json.loads((ROOT / "demo" / "faces" / "modified_face_250.json").read_text(encoding="utf-8"))
    assert len(entries) == 250
    tags = json.loads((ROOT / "demo" / "faces_tags.json").read_text(encoding="utf-8"))
    others = json.loads((ROOT / "demo" / "other_faces" / "captions.json").read_text(encoding="utf-8"))
    for index in (1, 77, 250):
        picture, captions, as_tags = draw_faces.manga_face(index)
        with Image.open(ROOT / "demo" / "faces" / f"image{index:03}.png") as committed:
            assert np.array_equal(np.asarray(picture), np.asarray(committed.convert("L")))
        assert entries[index - 1] == {"image_name": f"image{index:03}", "captions": captions}
        assert tags[index - 1] == {"image_name": f"image{index:03}", "captions": [as_tags]}
    picture, caption = draw_faces.other_face(60)
    with Image.open(ROOT / "demo" / "other_faces" / "other60.png") as committed:
        assert np.array_equal(np.asarray(picture), np.asarray(committed.convert("L")))
    assert others[59] == {"image_name": "other60", "captions": [caption]}


def test_a_grown_vae_does_to_pictures_what_the_small_one_does_to_reduced_ones(train_base):
    torch.manual_seed(0)
    small = train_base.make_vae(train_base.SMALL_VAE_CHANNELS)
    grown = train_base.grow(small)
    smooth = torch.nn.functional.interpolate(torch.rand(2, 3, 4, 4) * 2 - 1, (128, 128), mode="bicubic")
    with torch.no_grad():
        latents = small.encode(torch.nn.functional.avg_pool2d(smooth, 2)).latent_dist.mode()
        own = grown.encode(smooth).latent_dist.mode()
        decoded, grown_decoded = small.decode(latents).sample, grown.decode(latents).sample
    assert (small.config.sample_size, grown.config.sample_size) == (64, 128)
    assert own.shape == latents.shape == (2, 4, 16, 16)
    assert grown_decoded.shape == (2, 3, 128, 128)
    assert (own - latents).std() < 0.3 * latents.std()
    reduced = torch.nn.functional.avg_pool2d(grown_decoded, 2)
    assert (reduced - decoded).std() < 0.6 * decoded.std()  # of unrelated pictures it would be 1.4


def test_what_is_tuned_for_a_cpu_computes_the_same(train_base):
    base = ROOT / "demo" / "base"
    unet = train_base.UNet2DConditionModel.from_pretrained(base / "unet").float()
    encoder = train_base.CLIPTextModel.from_pretrained(base / "text_encoder").float()
    latents, ids = torch.randn(2, 4, 16, 16), torch.arange(154).view(2, 77)

    def outputs():
        with torch.no_grad():
            states = encoder(ids)[0]
            return states, unet(latents, torch.tensor([10, 900]), states).sample

    plain = outputs()
    train_base.tune_for_device(unet, encoder)
    for own, tuned in zip(plain, outputs(), strict=True):
        torch.testing.assert_close(tuned.contiguous(), own, rtol=1e-4, atol=1e-4)


def test_processes_that_train_the_base_together_take_the_mean_of_their_gradients(train_base, monkeypatch):
    mine = [torch.randn(3, 2, 4, 4).to(memory_format=torch.channels_last), torch.randn(5), torch.randn(1)]
    theirs = [torch.randn_like(tensor) for tensor in mine]
    expected = [(a + b) / 2 for a, b in zip(mine, theirs, strict=True)]
    monkeypatch.setattr(train_base, "PROCESSES", 2)
    other = torch.cat([tensor.reshape(-1) for tensor in theirs])
    monkeypatch.setattr(train_base.dist, "all_reduce", lambda flat: flat.add_(other))
    train_base.mean_over_processes(mine)
    for own, mean in zip(mine, expected, strict=True):
        torch.testing.assert_close(own, mean)


def test_latents_that_were_kept_are_not_taken_for_those_of_other_pictures(train_base, monkeypatch, tmp_path):
    monkeypatch.setattr(train_base, "WORK_DIR", tmp_path)
    monkeypatch.setattr(train_base, "DEVICE", "cpu")
    vae = train_base.make_vae(train_base.SMALL_VAE_CHANNELS).to("cpu")
    first, second = np.random.default_rng(0).integers(0, 256, (2, 3, 64, 64, 3), dtype=np.uint8)
    for pixels in (first, second, second):
        latents = train_base.cached_latents(vae, [("colour_face", pixels, [])])
        expected = train_base.encode(vae, pixels) * vae.config.scaling_factor
        torch.testing.assert_close(latents, expected, rtol=2e-3, atol=2e-3)  # kept in fp16


def test_a_base_that_a_training_goes_on_from_is_written_with_the_same_files(train_base, monkeypatch, tmp_path):
    committed = ROOT / "demo" / "base"
    shutil.copytree(committed, tmp_path / "base")
    monkeypatch.setattr(train_base, "BASE_DIR", tmp_path / "base")
    monkeypatch.setattr(train_base, "DEVICE", "cpu")
    tokenizer = train_base.load_tokenizer(committed)
    train_base.tokenize(tokenizer, ["a face"])
    unet = train_base.UNet2DConditionModel.from_pretrained(committed / "unet").float()
    encoder = train_base.CLIPTextModel.from_pretrained(committed / "text_encoder").float()
    train_base.export(train_base.load_vae(committed), encoder, tokenizer, unet)
    files = sorted(file.relative_to(committed) for file in committed.rglob("*.*"))
    assert files == sorted(file.relative_to(tmp_path / "base") for file in (tmp_path / "base").rglob("*.*"))
    for file in files:
        assert (tmp_path / "base" / file).read_bytes() == (committed / file).read_bytes(), file


@pytest.mark.parametrize("steps_before_the_break", [1, 7])
def test_a_stage_that_was_interrupted_ends_with_the_same_weights(
    train_base, monkeypatch, tmp_path, steps_before_the_break
):
    monkeypatch.setattr(train_base, "WORK_DIR", tmp_path)
    monkeypatch.setattr(train_base, "DEVICE", "cpu")
    ticks = itertools.count()
    monkeypatch.setattr(train_base.time, "process_time", lambda: next(ticks) * torch.get_num_threads())  # 1 s a step

    def train(name, raises_at=None):
        torch.manual_seed(0)
        layer = torch.nn.Linear(3, 2)
        run = train_base.Run(name, [layer], 20 / 60, 1e-2)

        def draw(generator, chance):
            if run.step == raises_at:
                run.save()
                raise KeyboardInterrupt
            return (torch.randn(4, 3, generator=generator) + chance,)

        run.train(draw, lambda inputs: layer(inputs).square().mean())
        run.swap_average()
        return run.step, [weight.detach().clone() for weight in run.weights]

    steps, whole = train("whole")
    with pytest.raises(KeyboardInterrupt):
        train("broken", steps_before_the_break)
    again, resumed = train("broken")
    assert steps == again == 20
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))


def test_the_base_sees_no_glasses_no_flowers_and_its_faces_never_in_ink(train_base, draw_faces):
    assert not {"ink_lorelei", "vivid_lorelei"} & set(train_base.UNET_PICTURES)
    for index in range(10):
        pixels = np.asarray(draw_faces.colour_lorelei(f"seen {index}", 32)[0], dtype=int)
        assert np.ptp(pixels, axis=2).mean() > 20  # coloured, the background at least
    for index in range(100):
        parts = draw_faces.Avatar(
            draw_faces.load_style("lorelei"), draw_faces.lorelei_options(f"seen {index}", draw_faces.RARE_IN_BASE)
        ).to_json()["options"]
        assert not {"glassesVariant", "hairAccessoriesVariant"} & parts.keys()
    for name in draw_faces.OTHER_STYLES:
        colours, _ = draw_faces.draw_palette(random.Random(name))
        for index in range(25):
            options = draw_faces.other_options(name, f"seen {index}", colours)
            parts = draw_faces.Avatar(draw_faces.load_style(name), options).to_json()["options"]
            assert not {"glassesVariant", "accessoriesVariant"} & parts.keys()
            assert "glasses" not in " ".join(draw_faces.part_words(name, parts))
            assert name not in draw_faces.WITHOUT_GLASSES or parts["eyesVariant"] in draw_faces.WITHOUT_GLASSES[name]
