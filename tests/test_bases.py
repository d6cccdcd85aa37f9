"""Which base is meant and what can't work: hub ids, folders, single files in the original layout. CPU, offline.

The hub is a small HTTP server on this machine, spoken to by the real client.
"""

import http.server
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from conftest import ROOT, exported, run, small_config
from original_layout import original_layout
from safetensors.torch import load_file, save_file
from test_bad_input import exit_of, flags, snapshot

from training import bases
from training.base_model import load_text_encoder, load_unet, load_vae

CPU = torch.device("cpu")
PARTS = ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model")
WEIGHTS = shutil.ignore_patterns("*.safetensors", "*.bin")
UNET, TEXT = "model.diffusion_model.", "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"


@pytest.fixture(scope="module")
def tiny_base(deep_base):
    return deep_base


@pytest.fixture(scope="module")
def single(tmp_path_factory, tiny_base) -> dict[str, torch.Tensor]:
    return original_layout(tiny_base)


def beside_configs(folder: Path, base: Path, tensors: dict, name="anime.safetensors") -> Path:
    """A single file, with the base's configs around it."""
    shutil.copytree(base, folder, ignore=WEIGHTS)
    if name.endswith(".ckpt"):
        torch.save({"state_dict": tensors, "global_step": 7}, folder / name)
    else:
        save_file(tensors, folder / name)
    return folder / name


def assert_same_base(first: Path, second: Path) -> None:
    for part in PARTS:
        one, other = load_file(first / f"{part}.safetensors"), load_file(second / f"{part}.safetensors")
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
        assert all(one[name].dtype == other[name].dtype for name in one)


# What they have --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["anime.safetensors", "anime.ckpt"])
def test_a_single_file_trains_to_the_same_bytes_as_its_diffusers_folder(tmp_path, faces, tiny_base, single, name):
    from_folder = small_config(tmp_path / "folder", faces, tiny_base, num_train_epochs=1)
    file = beside_configs(tmp_path / "models", tiny_base, single, name)
    from_file = small_config(tmp_path / "file", faces, file, num_train_epochs=1)
    run(from_folder)
    run(from_file)
    assert exported(from_folder) == exported(from_file)


def test_a_single_file_is_converted_once_without_a_changed_bit_in_its_own_precision(tmp_path, single):
    demo, said = ROOT / "demo" / "base", []
    file = beside_configs(tmp_path / "models", demo, original_layout(demo))  # in float16
    found = bases.find_base(str(file), tmp_path / "cache", said.append)
    assert_same_base(found, demo)
    assert len(said) == 1 and "Converting anime.safetensors" in said[0]
    assert bases.find_base(str(file), tmp_path / "cache", said.append) == found and len(said) == 1
    tensors = load_file(file)
    name = UNET + "out.2.bias"
    save_file(tensors | {name: tensors[name] + 1}, file)
    assert bases.find_base(str(file), tmp_path / "cache", said.append) != found and len(said) == 2


def test_a_folder_that_holds_one_single_file_is_that_file(tmp_path, tiny_base, single, capsys):
    file = beside_configs(tmp_path / "models", tiny_base, single)
    (tmp_path / "alone").mkdir()
    file.rename(tmp_path / "alone" / "anime.safetensors")
    assert bases.single_file(str(tmp_path / "alone")) == tmp_path / "alone" / "anime.safetensors"
    assert bases.about(str(tmp_path / "alone")) == "Base: anime.safetensors, a single file"
    assert bases.single_file(str(tiny_base)) is None and bases.single_file("some/id") is None
    assert bases.about("some/id") == "Base: some/id, from the Hugging Face hub"
    shutil.copy(tmp_path / "alone" / "anime.safetensors", tmp_path / "alone" / "b.ckpt")
    with pytest.raises(bases.BaseModelError, match=r"holds 2 checkpoints \(anime.safetensors, b.ckpt\): name one"):
        bases.find_base(str(tmp_path / "alone"), tmp_path)


def test_a_single_file_alone_takes_sd15_s_configs_from_the_hub_s_cache(tmp_path, tiny_base, single, monkeypatch):
    """Without them one line says what is missing and what to type."""
    from huggingface_hub import constants

    save_file(single, tmp_path / "anime.safetensors")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(bases.Unreachable, match=r"configs and the tokenizer .* can't be downloaded .* hf download"):
        bases.find_base(str(tmp_path / "anime.safetensors"), tmp_path)
    snapshot = tmp_path / "hub" / "models--stable-diffusion-v1-5--stable-diffusion-v1-5" / "snapshots" / ("0" * 40)
    (snapshot.parent.parent / "refs").mkdir(parents=True)
    (snapshot.parent.parent / "refs" / "main").write_text("0" * 40)
    shutil.copytree(tiny_base, snapshot, ignore=WEIGHTS)
    index = json.loads((snapshot / "model_index.json").read_text())
    more = {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"], "requires_safety_checker": True}
    more |= {"feature_extractor": ["transformers", "CLIPImageProcessor"]}  # SD 1.5's own lists both
    (snapshot / "model_index.json").write_text(json.dumps(index | more))
    assert_same_base(bases.find_base(str(tmp_path / "anime.safetensors"), tmp_path / "cache"), tiny_base)
    (snapshot / "tokenizer" / "tokenizer.json").unlink()
    (snapshot / "tokenizer" / "vocab.json").unlink(missing_ok=True)
    with pytest.raises(bases.Unreachable, match=r"tokenizer/vocab\.json"):
        bases.find_base(str(tmp_path / "anime.safetensors"), tmp_path / "other")


def test_a_checkpoint_that_says_it_predicts_v_is_taken_at_its_word(tmp_path, tiny_base, single):
    flags = {"v_pred": torch.tensor([]), "ztsnr": torch.tensor([])}
    file = beside_configs(tmp_path / "models", tiny_base, single | flags)
    _, scheduler = load_unet(bases.find_base(str(file), tmp_path), CPU, torch.float32)
    assert scheduler.config.prediction_type == "v_prediction" and scheduler.config.rescale_betas_zero_snr


def test_weights_that_are_only_there_as_fp16_are_taken_and_plain_ones_before_them(tmp_path, tiny_base):
    base = shutil.copytree(tiny_base, tmp_path / "base")
    for part in PARTS:
        tensors = {name: value.half() for name, value in load_file(base / f"{part}.safetensors").items()}
        save_file(tensors, base / f"{part}.fp16.safetensors", {"format": "pt"})
    plain, both = weights_of(tiny_base), weights_of(base)
    assert all(map(torch.equal, plain, both))
    for part in PARTS:
        (base / f"{part}.safetensors").unlink()
    assert bases.find_base(str(base), tmp_path) == base
    alone = weights_of(base)
    assert all(torch.equal(a.half().float(), b) for a, b in zip(plain, alone, strict=True))
    assert not all(map(torch.equal, plain, alone))


@pytest.fixture(scope="module")
def in_pieces(tmp_path_factory, tiny_base) -> Path:
    """The tiny base with each part in several files and an index."""
    from diffusers import StableDiffusionPipeline

    folder = tmp_path_factory.mktemp("pieces") / "base"
    StableDiffusionPipeline.from_pretrained(tiny_base, safety_checker=None).save_pretrained(
        folder, max_shard_size="30KB"
    )
    assert all(len(list(folder.glob(f"{part}-*-of-*.safetensors"))) > 1 for part in PARTS)
    assert not any((folder / f"{part}.safetensors").exists() for part in PARTS)
    return folder


def as_fp16(folder: Path) -> None:
    """The pieces and their index under the names of diffusers' variant fp16."""
    for part in PARTS:
        index = folder / f"{part}.safetensors.index.json"
        stem = Path(part).name
        index.with_name(f"{stem}.safetensors.index.fp16.json").write_text(
            index.read_text().replace(f"{stem}-", f"{stem}.fp16-")
        )
        index.unlink()
        for piece in folder.glob(f"{part}-*"):
            piece.rename(piece.with_name(piece.name.replace(f"{stem}-", f"{stem}.fp16-")))


def weights_of(base: Path) -> list[torch.Tensor]:
    parts = load_vae(base, CPU), load_unet(base, CPU, torch.float32)[0], load_text_encoder(base, CPU)[1]
    return [weight for part in parts for weight in part.parameters()]


@pytest.mark.parametrize("variant", ["plain", "fp16"])
def test_a_folder_whose_parts_are_in_pieces_is_read_whole(tmp_path, tiny_base, in_pieces, variant):
    base = shutil.copytree(in_pieces, tmp_path / "base")
    if variant == "fp16":
        as_fp16(base)
    assert bases.find_base(str(base), tmp_path) == base
    assert all(map(torch.equal, weights_of(base), weights_of(tiny_base)))
    piece = min((base / "unet").glob("*00002-of*"))
    content = piece.read_bytes()
    for damage in (piece.unlink, lambda: piece.write_bytes(content[:-9])):
        damage()
        with pytest.raises(bases.BaseModelError, match=rf"{piece.name} can't be loaded: it is missing, cut short"):
            bases.find_configs(str(base))


def test_one_model_in_pieces_is_no_diffusers_folder(tmp_path):
    for number in (1, 2):
        (tmp_path / f"anime-0000{number}-of-00002.safetensors").touch()
    (tmp_path / "anime.safetensors.index.json").touch()
    for named in (tmp_path, tmp_path / "anime-00001-of-00002.safetensors"):
        with pytest.raises(
            bases.BaseModelError, match=r"is one model in pieces: get it in one file, or as a diffusers"
        ):
            bases.find_configs(str(named))


@pytest.mark.long
def test_a_checkpoint_of_sd15_s_shapes_in_fp16_trains_through_to_a_file(tmp_path, faces):
    """2 GB of random weights: the real shapes, the real loader."""
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            sample_size=512,
        )
        sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12}
        text_encoder = CLIPTextModel(CLIPTextConfig(vocab_size=49408, projection_dim=768, **sizes))
    parts = [part.half().to_empty(device="cpu") for part in (vae, text_encoder, unet)]
    with torch.no_grad():
        for part in parts:
            for name, weight in part.named_parameters():
                weight.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.02)
        (encoder := getattr(parts[1], "text_model", parts[1])).embeddings.position_ids.copy_(torch.arange(77)[None])
        assert encoder.embeddings.position_ids.max() == 76
    tokenizer = CLIPTokenizer.from_pretrained(ROOT / "demo" / "base" / "tokenizer")
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    scheduler = PNDMScheduler(skip_prk_steps=True, **betas)
    pipe = StableDiffusionPipeline(
        parts[0], parts[1], tokenizer, parts[2], scheduler, None, None, requires_safety_checker=False
    )
    pipe.save_pretrained(tmp_path / "base")
    del pipe, parts, unet, vae, text_encoder
    file = beside_configs(tmp_path / "models", tmp_path / "base", original_layout(tmp_path / "base"))
    shutil.rmtree(tmp_path / "base")
    assert file.stat().st_size > 2e9
    more = {"resolution": 128, "train_batch_size": 1, "gradient_accumulation_steps": 1, "validation_share": 0.0}
    config = small_config(tmp_path, faces, file, num_train_epochs=1, early_stopping_patience=0, **more)
    run(config)
    assert Path(config.output_dir, "share", "manga_faces.safetensors").is_file()


# What can't work ---------------------------------------------------------------------------------------------------


def widened(tensors: dict, width: int, channels: int = 4) -> dict:
    """The checkpoint with a UNet that reads texts of another width, or pictures of other channels."""
    changed = dict(tensors)
    for name, value in tensors.items():
        if "attn2.to_k" in name:
            changed[name] = torch.zeros(len(value), width)
    first = tensors[f"{UNET}input_blocks.0.0.weight"]
    return changed | {f"{UNET}input_blocks.0.0.weight": torch.zeros(len(first), channels, 3, 3)}


def without(tensors: dict, prefix: str) -> dict:
    return {name: value for name, value in tensors.items() if not name.startswith(prefix)}


KINDS = {  # what is in a single file -> what is said of it
    "SDXL": (lambda t: widened(t, 2048), "Stable Diffusion XL (its UNet reads texts 2048 wide"),
    "SDXL's refiner": (lambda t: widened(t, 1280), "refiner"),
    "SD 2": (lambda t: widened(t, 1024), "Stable Diffusion 2"),
    "inpainting": (lambda t: widened(t, 16, 9), "an inpainting model (9 input channels)"),
    "a LoRA": (lambda t: {"lora_unet_mid_block_attentions_0.lora_down.weight": torch.ones(4, 8)}, "a LoRA"),
    "a PEFT LoRA": (lambda t: {"unet.mid_block.attentions.0.to_q.lora_A.weight": torch.ones(4, 8)}, "a LoRA"),
    "an embedding": (lambda t: {"emb_params": torch.ones(4, 768)}, "a textual inversion"),
    "a VAE": (lambda t: {n.split(".", 1)[1]: v for n, v in t.items() if "first_stage" in n}, "a VAE alone"),
    "a VAE with its prefix": (lambda t: without(without(t, "model."), "cond"), "a VAE alone"),
    "a diffusers UNet": (lambda t: {"down_blocks.0.resnets.0.conv1.weight": torch.ones(1)}, "a UNet alone"),
    "Flux": (lambda t: {"model.diffusion_model.double_blocks.0.a": torch.ones(1)}, "SD 3, Flux"),
    "ControlNet": (lambda t: {"control_model.input_hint_block.0.weight": torch.ones(1)}, "a ControlNet"),
    "something": (lambda t: {"weight": torch.ones(1)}, "no Stable Diffusion checkpoint"),
    "no text encoder": (lambda t: without(t, "cond_"), "a checkpoint without text encoder"),
    "no VAE": (lambda t: without(t, "first_"), "a checkpoint without VAE"),
    "fp8": (lambda t: {n: v.to(torch.float8_e4m3fn) if UNET in n else v for n, v in t.items()}, "is in fp8"),
    "int8": (lambda t: {n: v.to(torch.int8) if UNET in n else v for n, v in t.items()}, "is in i8, too coarse"),
    "a LoHa": (lambda t: {"lora_unet_mid_block_attentions_0.hada_w1_a": torch.ones(4, 8)}, "is a LyCORIS network or"),
    "another size": (lambda t: widened(t, 32), "has another UNet"),
}


@pytest.mark.parametrize("dry_run", [True, False], ids=["dry run", "run"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_base_is_called_by_its_name_before_anything_is_encoded(
    script, place, tiny_base, single, kind, dry_run
):
    make, said = KINDS[kind]
    file = beside_configs(place / "models", tiny_base, {name: v.contiguous() for name, v in make(single).items()})
    before = snapshot(place)
    code, message = exit_of(script, flags(place, file, *["--dry_run"] * dry_run))
    assert code == 2 and said in message and len(message.splitlines()) == 1, message
    assert snapshot(place) == before


def saved(content) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


class Malicious:
    def __reduce__(self):
        return Path.touch, (Path("executed"),)


CONTENTS = {
    "a text.safetensors": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "get the base again"),
    "empty.safetensors": (b"", "get the base again"),
    "a text.ckpt": (b"<html>Not found</html>", "get the base again, as .safetensors"),
    "code.ckpt": (pickle.dumps(Malicious()), "holds more than weights, which was not run"),
    "empty.ckpt": (b"", "get the base again, as .safetensors"),
    "an embedding.ckpt": (saved({"string_to_param": {"*": torch.ones(3, 768)}, "name": "x"}), "a textual inversion"),
    "a list.ckpt": (saved([torch.ones(3)]), "holds a list, but no weights by name: get "),
    "a tensor.ckpt": (saved({"state_dict": torch.ones(3)}), "holds a Tensor, but no weights by name: get "),
}


@pytest.mark.parametrize("dry_run", [True, False], ids=["dry run", "run"])
@pytest.mark.parametrize("name", [*CONTENTS, "truncated.safetensors", "truncated.ckpt", "code in zip.ckpt"])
def test_a_damaged_or_hostile_single_file_is_one_line_and_never_run(script, place, tiny_base, single, name, dry_run):
    file, said = beside_configs(place / "models", tiny_base, single, f"x{Path(name).suffix}"), "get "
    if name in CONTENTS:
        content, said = CONTENTS[name]
        file.write_bytes(content)
    elif name.startswith("truncated"):
        os.truncate(file, file.stat().st_size // 2)
    else:
        torch.save({"state_dict": single, "callbacks": Malicious()}, file)
    before = snapshot(place)
    code, message = exit_of(script, flags(place, file, *["--dry_run"] * dry_run))
    assert code == 2 and said in message and len(message.splitlines()) == 1 and len(message) < 600, message
    assert str(file) in message and snapshot(place) == before


def test_on_the_real_command_line_torch_s_warnings_of_a_pickle_are_not_shown(place):
    (place / "a.ckpt").write_bytes(pickle.dumps({"state_dict": {"a": 1}}, protocol=4))  # torch warns of this one
    for given in (["a.ckpt"], [ROOT / "demo" / "base", "--start_from", "a.ckpt"]):
        words = [sys.executable, str(ROOT / "train_manga_lora.py"), *flags(place, *given, "--dry_run")]
        done = subprocess.run(words, cwd=place, capture_output=True, text=True, timeout=300)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "a.ckpt" in done.stderr, done.stderr


NO_BASES = {
    "lora.pt": "is a .pt file: a base is a .safetensors or .ckpt file, a diffusers folder or a hub id",
    "README.md": "is a .md file",
    "LICENSE": "is a nameless file",
    "https://huggingface.co/me/base": "is no local file or folder, nor a hub id",
    "models/my/base": "is no local file or folder, nor a hub id",
    "": "must be a hub id, a .safetensors or .ckpt file, or a diffusers folder",
}


@pytest.mark.parametrize("dry_run", [True, False], ids=["dry run", "run"])
@pytest.mark.parametrize("name", NO_BASES)
def test_what_can_be_neither_a_base_nor_a_hub_id_is_refused(script, place, name, dry_run):
    if name and "/" not in name:
        (place / name).touch()
    before = snapshot(place)
    code, message = exit_of(script, flags(place, name, *["--dry_run"] * dry_run))
    assert code == 2 and f"pretrained_model={name!r} {NO_BASES[name]}" in message, message
    assert len(message.splitlines()) == 1 and snapshot(place) == before


def test_a_file_that_is_not_there_is_not_looked_for_on_the_hub(script, place):
    code, message = exit_of(script, flags(place, "models/anime.safetensors"))
    assert (code, message) == (2, "pretrained_model='models/anime.safetensors' is not there: correct the path")


CONFIGS = {  # (config, what is changed in it) -> what is said
    "SDXL": ("unet", {"cross_attention_dim": 2048}, "is Stable Diffusion XL"),
    "refiner": ("unet", {"cross_attention_dim": 1280}, "refiner"),
    "SD 2": ("unet", {"cross_attention_dim": 1024}, "is Stable Diffusion 2"),
    "inpainting": ("unet", {"in_channels": 9}, "an inpainting model"),
    "image to image": ("unet", {"in_channels": 8}, "no text-to-image model (8 input channels)"),
    "widths": (
        "text_encoder",
        {"hidden_size": 32},
        "makes texts 32 wide, and its UNet reads them 16 wide",
    ),
    "a text for a width": ("unet", {"cross_attention_dim": "16"}, "has cross_attention_dim='16'"),
    "no limit": ("tokenizer", {"model_max_length": 10**30}, "texts would overrun its text encoder: set it to 77"),
    "no limit at all": ("tokenizer", {"model_max_length": None}, "set it to 77"),
    "prediction type": ("scheduler", {"prediction_type": "sample"}, "has prediction_type='sample'"),
}
FILES = {"tokenizer": "tokenizer_config.json", "scheduler": "scheduler_config.json"}


@pytest.mark.parametrize("dry_run", [True, False], ids=["dry run", "run"])
@pytest.mark.parametrize("case", CONFIGS)
def test_what_cannot_work_is_said_from_the_configs_alone(script, place, tiny_base, case, dry_run):
    part, change, said = CONFIGS[case]
    shutil.copytree(tiny_base, place / "base", ignore=WEIGHTS)  # no weights: they aren't asked for
    file = place / "base" / part / FILES.get(part, "config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    before = snapshot(place)
    code, message = exit_of(script, flags(place, "base", *["--dry_run"] * dry_run))
    assert code == 2 and said in message and len(message.splitlines()) == 1, message
    assert snapshot(place) == before


def coarse(file: Path, dtype: torch.dtype) -> None:
    save_file({name: value.to(dtype) for name, value in load_file(file).items()}, file, {"format": "pt"})


WEIGHTS_TROUBLE = {  # what is done to the UNet's weights -> what is said
    "missing": (Path.unlink, "unet has no weights: get the base again"),
    "touched": (lambda file: file.write_bytes(b""), "can't be loaded: it is missing, cut short or no safetensors"),
    "touched .bin": (
        lambda file: (file.unlink(), file.with_suffix(".bin").touch()),
        "can't be loaded: it is missing, damaged, or holds more than weights",
    ),
    "fp8": (lambda file: coarse(file, torch.float8_e4m3fn), "is in fp8, too coarse to train on"),
    "int8": (lambda file: coarse(file, torch.int8), "is in i8, too coarse to train on"),
}


@pytest.mark.parametrize("dry_run", [True, False], ids=["dry run", "run"])
@pytest.mark.parametrize("case", WEIGHTS_TROUBLE)
def test_a_folder_s_weights_are_looked_at_before_anything_is_encoded(script, place, tiny_base, case, dry_run):
    shutil.copytree(tiny_base, place / "base")
    change, said = WEIGHTS_TROUBLE[case]
    change(place / "base" / "unet" / "diffusion_pytorch_model.safetensors")
    before = snapshot(place)
    code, message = exit_of(script, flags(place, "base", *["--dry_run"] * dry_run))
    assert code == 2 and said in message and len(message.splitlines()) == 1, message
    assert "unet" in message and snapshot(place) == before


def test_a_pipeline_of_another_kind_is_named(place, tiny_base):
    shutil.copytree(tiny_base, place / "base", ignore=WEIGHTS)
    shutil.rmtree(place / "base" / "unet")
    (place / "base" / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(bases.BaseModelError, match=r"it is a FluxPipeline\): it lacks unet"):
        bases.find_configs("base")


# The hub -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path):
    """(an address that serves the folders in tmp_path/hub as repositories, the paths it was asked for)."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.answer(False)

        def do_GET(self):
            self.answer(True)

        def answer(self, with_body: bool):
            path, content = self.path.split("?")[0], None
            owner = "/".join(path.removeprefix("/api/models/").lstrip("/").split("/")[:2])
            root = tmp_path / "hub" / owner
            if path.startswith("/api/models/") and root.is_dir():
                names = sorted(str(file.relative_to(root)) for file in root.rglob("*") if file.is_file())
                about = {"id": owner, "sha": "1" * 40, "siblings": [{"rfilename": name} for name in names]}
                content = json.dumps(about).encode()
                if "/tree/" in path:
                    sizes = {name: (root / name).stat().st_size for name in names}
                    tree = [{"type": "file", "path": n, "size": size, "oid": "0" * 40} for n, size in sizes.items()]
                    content = json.dumps(tree).encode()
            elif "/resolve/" in path:
                file = root / path.split("/resolve/")[1].split("/", 1)[1]
                content = file.read_bytes() if file.is_file() else None
                asked.append(file.relative_to(root).as_posix())
            self.send_response(404 if content is None else 200)
            for name, value in {"ETag": f'"{abs(hash(path)):x}"', "X-Repo-Commit": "1" * 40}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content or b"")))
            self.end_headers()
            if with_body and content:
                self.wfile.write(content)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()


def start_with_hub(place: Path, address: str, *more: str) -> subprocess.CompletedProcess:
    own = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": address, "HF_HOME": str(place / "home"), "HF_HUB_DISABLE_XET": "1"}
    words = [sys.executable, str(ROOT / "train_manga_lora.py"), *flags(place, "me/base", *more)]
    return subprocess.run(words, cwd=place, env=os.environ | own, capture_output=True, text=True, timeout=300)


def test_from_the_hub_only_one_file_a_part_is_fetched_and_configs_first(place, tiny_base, hub):
    address, asked = hub
    repository = shutil.copytree(tiny_base, place / "hub" / "me" / "base")
    for part in PARTS:
        shutil.copy(repository / f"{part}.safetensors", repository / f"{part}.fp16.safetensors")
        torch.save(load_file(repository / f"{part}.safetensors"), repository / f"{part}.bin")
    (repository / "unet" / "diffusion_pytorch_model.safetensors").unlink()  # the UNet is there as fp16 alone
    shutil.copy(repository / f"{PARTS[1]}.safetensors", repository / "v1-5-pruned.safetensors")
    done = start_with_hub(place, address)
    assert done.returncode == 0, done.stderr
    assert "Base: me/base, from the Hugging Face hub" in done.stdout
    weights = [name for name in dict.fromkeys(asked) if name.endswith((".safetensors", ".bin"))]
    expected = ["text_encoder/model.safetensors", f"{PARTS[0]}.fp16.safetensors", f"{PARTS[1]}.safetensors"]
    assert sorted(weights) == expected
    small = [place for place, name in enumerate(asked) if name not in weights]
    assert asked.index("unet/config.json") < min(map(asked.index, weights)) and len(small) >= 6


def test_from_the_hub_a_part_in_pieces_comes_with_its_index(place, in_pieces, hub):
    address, asked = hub
    repository = shutil.copytree(in_pieces, place / "hub" / "me" / "base")
    as_fp16(shutil.copytree(in_pieces, place / "fp16"))
    shutil.copytree(place / "fp16", repository, dirs_exist_ok=True)  # the variant, too, which is left there
    done = start_with_hub(place, address)
    assert done.returncode == 0, done.stderr
    weights = {name for name in asked if ".safetensors" in name}
    assert weights == {
        path.relative_to(in_pieces).as_posix() for path in in_pieces.rglob("*") if ".safetensors" in path.name
    }


def test_what_cannot_work_is_refused_before_its_weights_are_fetched(place, tiny_base, hub):
    address, asked = hub
    repository = shutil.copytree(tiny_base, place / "hub" / "me" / "base")
    config = json.loads((repository / "unet" / "config.json").read_text()) | {"cross_attention_dim": 2048}
    (repository / "unet" / "config.json").write_text(json.dumps(config))
    done = start_with_hub(place, address)
    assert done.returncode == 2 and "is Stable Diffusion XL" in done.stderr.splitlines()[-1], done.stderr
    assert "unet/config.json" in asked and not [name for name in asked if name.endswith((".safetensors", ".bin"))]
    assert not (place / "out").exists() and not (place / "cache").exists()


def test_a_hub_that_cannot_be_reached_is_one_line_and_a_dry_run_goes_on_without(script, place, capsys):
    code, message = exit_of(script, flags(place, "nobody/base"))
    assert code == 2 and "'nobody/base' is no local file or folder and can't be downloaded" in message
    assert len(message.splitlines()) == 1 and "--demo" in message and len(message) < 400, message
    assert exit_of(script, flags(place, "nobody/base", "--dry_run"))[0] == 0
    told = [line for line in capsys.readouterr().out.splitlines() if "NOT checked" in line]
    assert len(told) == 1 and "'nobody/base' is no local file or folder and can't be downloaded (" in told[0], told
