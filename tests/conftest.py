"""What the tests share: a tiny random Stable Diffusion with SD1.5's block structure, and real faces from the demo."""

import copy
import csv
import dataclasses
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from evaluation import judge  # noqa: E402
from lora_layers import inject_lora, lora_modules, lora_parameters  # noqa: E402

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach for the network
os.environ["SOURCE_DATE_EPOCH"] = "1767225600"  # equal runs give equal files, headers included
# Only few tests care how well the judge of faces judges, which takes it seconds to learn
SHIPPED_JUDGE = {name: getattr(judge, name) for name in ("STEPS", "TRIES", "RELIABLE")}
judge.STEPS, judge.TRIES, judge.RELIABLE = 4, 1, -1.0
torch.set_num_threads(1)  # faster for models of this size, and cores may be busy


# Promises: tests marked promise("...") are counted by what they promise, with all the cases that each of them tries ---


def pytest_addoption(parser):
    parser.addoption("--record", type=Path, help="write what was tried per promise to this JSON file, if all passed")


FIRST = ("test_demo.py", "test_edited_constants.py", "test_evaluate.py", "test_buckets.py")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in FIRST)  # minutes: not left to one process at the end
    for item in items:
        for marker in item.iter_markers("promise"):
            item.user_properties.append(("promise", marker.args[0]))


def pytest_terminal_summary(terminalreporter, exitstatus, config):
    counts = {}
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, []):
            properties = dict(report.user_properties)
            if "promise" in properties and report.when == "call":
                count = counts.setdefault(properties["promise"], {"passed": 0, "failed": 0})
                count[outcome] += properties.get("cases", 1)  # record_property("cases", n): n in one test
    for promise, count in sorted(counts.items()):
        terminalreporter.write_line(f"{promise}: {sum(count.values())} cases tried, {count['failed']} failed")
    is_worker = hasattr(config, "workerinput")  # of pytest-xdist: it has seen a part only
    if config.getoption("--record") and exitstatus == 0 and not is_worker:
        content = {promise: count["passed"] for promise, count in sorted(counts.items())}
        config.getoption("--record").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory) -> Path:
    """A diffusers folder of 1 MB: 64 -> 16 x 16 latents, 10 transformer blocks, random weights, two-layer CLIP."""
    return make_base(tmp_path_factory.mktemp("base"), layers_per_block=1)


@pytest.fixture(scope="session")
def deep_base(tmp_path_factory) -> Path:
    """The same with SD 1.5's 16 transformer blocks."""
    return make_base(tmp_path_factory.mktemp("deep"), layers_per_block=2)


def make_base(folder: Path, layers_per_block: int) -> Path:
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(8, 16, 16, 16),
        layers_per_block=layers_per_block,
        norm_num_groups=4,
        cross_attention_dim=16,
        attention_head_dim=2,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 16),
        norm_num_groups=4,
        latent_channels=4,
        sample_size=64,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
    )
    characters = [chr(code) for code in range(33, 127)]
    vocabulary = [*characters, *(c + "</w>" for c in characters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(
        vocab={token: index for index, token in enumerate(vocabulary)}, merges=[], model_max_length=77
    )
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=77,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    pipe = StableDiffusionPipeline(
        vae,
        text_encoder,
        tokenizer,
        unet,
        scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def demo_faces() -> Path:
    return ROOT / "demo" / "faces"


def copy_faces(demo_faces: Path, folder: Path, count: int = 20) -> Path:
    """The first of the demo's faces and their captions; of 20 there are 16 to train on and 4 held out."""
    folder.mkdir()
    entries = json.loads((demo_faces / "modified_face_250.json").read_text(encoding="utf-8"))[:count]
    for entry in entries:
        shutil.copy(demo_faces / f"{entry['image_name']}.png", folder)
    (folder / "modified_face_250.json").write_text(json.dumps(entries), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def shared_faces(tmp_path_factory, demo_faces) -> Path:
    """20 faces that no test may change."""
    return copy_faces(demo_faces, tmp_path_factory.mktemp("shared") / "faces")


@pytest.fixture
def faces(tmp_path, demo_faces) -> Path:
    """20 faces that a test may change."""
    return copy_faces(demo_faces, tmp_path / "faces")


STYLES = ("coloured", "grey_toned")  # of tests/styles


def write_faces(style: str, folder: Path, count: int = 144) -> Path:
    """The first faces of a sheet in tests/styles with their captions, as a data set in `folder`."""
    folder.mkdir(parents=True)
    sheet = Image.open(ROOT / "tests" / "styles" / f"{style}.png").convert("RGB")
    captions = json.loads((ROOT / "tests" / "styles" / "captions.json").read_text(encoding="utf-8"))[style][:count]
    for number in range(count):
        top, left = number // 12 * 64, number % 12 * 64
        sheet.crop((left, top, left + 64, top + 64)).save(folder / f"face{number:03d}.png")
    entries = [{"image_name": f"face{number:03d}", "captions": [text]} for number, text in enumerate(captions)]
    (folder / "modified_face_250.json").write_text(json.dumps(entries), encoding="utf-8")
    return folder


def small_config(folder: Path, faces: Path, base: Path, **changes):
    """A training of 3 epochs of 2 steps on the tiny base, without pictures, in `folder`: a few seconds."""
    from train_manga_lora import TrainingConfig

    small = TrainingConfig(
        dataset_dir=str(faces),
        json_file=str(faces / "modified_face_250.json"),
        output_dir=str(folder / "out"),
        pretrained_model=str(base),
        cache_dir=str(folder / "cache"),
        resolution=64,
        num_train_epochs=3,
        learning_rate=1e-3,
        lora_rank=4,
        lora_alpha=8,
        sample_every_n_epochs=0,
        sample_prompts=(),
        num_workers=0,
    )
    return dataclasses.replace(small, **changes)


@pytest.fixture
def tiny_config(tmp_path, faces, tiny_base):
    return small_config(tmp_path, faces, tiny_base)


def make_faces(folder: Path, captions: list, **options):
    """A data set of 8 x 8 pictures, each another one, named face000, face001, ... with the given captions."""
    from dataset import MangaFaceDataset

    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for number, texts in enumerate(captions):
        pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"face{number:03d}.png")
        entries.append({"image_name": f"face{number:03d}", "captions": [texts] if isinstance(texts, str) else texts})
    (folder / "captions.json").write_text(json.dumps(entries), encoding="utf-8")
    return MangaFaceDataset(folder, folder / "captions.json", **{"resolution": 8, "num_workers": 0, **options})


@pytest.fixture(scope="session")
def demo_captions(demo_faces) -> list[list[str]]:
    entries = json.loads((demo_faces / "modified_face_250.json").read_text(encoding="utf-8"))
    return [entry["captions"] for entry in entries]


@pytest.fixture(scope="session")
def manga(tmp_path_factory, demo_captions):
    """The demo's 250 captions, on pictures small enough to read at once."""
    return make_faces(tmp_path_factory.mktemp("manga") / "faces", demo_captions)


@pytest.fixture(scope="module")
def script():
    """train_manga_lora, whose main() takes over Ctrl-C: given back to pytest at the end."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    import train_manga_lora

    yield train_manga_lora
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def small_faces(tmp_path_factory) -> Path:
    """Six faces of 8 x 8 pixels with captions. Not to be changed."""
    folder = tmp_path_factory.mktemp("small") / "faces"
    folder.mkdir()
    for number in range(6):
        Image.new("L", (8, 8), 40 * number).save(folder / f"face{number}.png")
    entries = [{"image_name": f"face{number}", "captions": [f"manga face {number}"]} for number in range(6)]
    (folder / "modified_face_250.json").write_text(json.dumps(entries), encoding="utf-8")
    return folder


@pytest.fixture
def place(tmp_path, small_faces, monkeypatch) -> Path:
    """An own copy of the faces at `place / "faces"`, in the working folder."""
    shutil.copytree(small_faces, tmp_path / "faces")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def random_bases_are_no_surprise(monkeypatch):
    """The tests' own bases predict nothing, of which every run would be warned, after three more validations."""
    monkeypatch.setattr("training.denoising.BAD_LOSS", 9.0)


# UNets of toy widths with LoRA ------------------------------------------------------------------------------------

# Stable Diffusion 1.5's UNet; the tiny one has its block structure at toy widths
SD15_CONFIG = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "norm_num_groups": 32,
}
TINY_CONFIG = SD15_CONFIG | {
    "sample_size": 16,  # 2 x 2 at the mid block: attention to a lone token gives q and k no gradient
    "block_out_channels": (8, 16, 24, 24),
    "cross_attention_dim": 16,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
}
ENDS = ("lora_down.weight", "lora_up.weight", "alpha")


@pytest.fixture(scope="session")
def pristine_unet():
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(**TINY_CONFIG).eval()


@pytest.fixture
def unet(pristine_unet):
    return copy.deepcopy(pristine_unet)


@pytest.fixture(scope="session")
def batch():
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 4, 16, 16, generator=generator)
    return latents, torch.tensor([3, 700]), torch.randn(2, 5, 16, generator=generator)


@pytest.fixture(scope="session")
def sd15_unet():
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(**SD15_CONFIG)
    inject_lora(unet, rank=16, network_alpha=32)
    return unet


def randomise(unet, seed=2, size=0.3):
    """Up weights as after a training, large enough to be seen in the output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in lora_modules(unet).values():
            layer.up_weight.copy_(size * torch.randn(layer.up_weight.shape, generator=generator))
    return unet


def with_lora(pristine_unet, rank=4, alpha=8, **randomised):
    torch.manual_seed(5)
    unet = copy.deepcopy(pristine_unet)
    inject_lora(unet, rank, alpha)
    return randomise(unet, **randomised)


def output(unet, batch):
    with torch.no_grad():
        return unet(*batch).sample


def base_weights(unet):
    lora = {id(p) for p in lora_parameters(unet)}
    return {name: p.detach().clone() for name, p in unet.named_parameters() if id(p) not in lora}


def assert_same_tensors(first, second):
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def gradients_of(unet, batch, scale=1024.0):
    """The loss is scaled, for fp16 has no numbers small enough for its gradients."""
    for weight in lora_parameters(unet):
        weight.grad = None
    latents, timesteps, text = batch
    sample = unet(latents.to(unet.dtype), timesteps, text.to(unet.dtype)).sample
    (scale * sample.to(torch.promote_types(sample.dtype, torch.float32)).square().mean()).backward()
    return [weight.grad for weight in lora_parameters(unet)]


def cosine(a, b):
    return torch.cosine_similarity(a.flatten().double(), b.flatten().double(), dim=0).item()


# Whole runs ------------------------------------------------------------------------------------------------------


def run(config, **changes):
    import train_manga_lora as trainer

    return trainer.main(dataclasses.replace(config, **changes))


def metrics(config) -> list[dict]:
    """metrics.csv without the one column that is a stopwatch."""
    with open(os.path.join(config.output_dir, "metrics.csv"), newline="") as file:
        return [{name: value for name, value in row.items() if name != "images_per_s"} for row in csv.DictReader(file)]


def exported(config, name="pytorch_lora_weights.bin") -> bytes:
    with open(os.path.join(config.output_dir, name), "rb") as file:
        return file.read()


def signal_at_step(monkeypatch, step: int, number=signal.SIGTERM) -> None:
    """Send this process a signal while optimizer step `step` (from 1) is under way."""
    import train_manga_lora as trainer

    original, calls = trainer.train_step, []

    def wrapped(*arguments):
        calls.append(1)
        if len(calls) == step:
            os.kill(os.getpid(), number)
        return original(*arguments)

    monkeypatch.setattr(trainer, "train_step", wrapped)


@pytest.fixture
def uninterrupted(tiny_config):
    """The result every interrupted run has to reproduce: (rows of metrics.csv, bytes of both .bin)."""
    config = dataclasses.replace(tiny_config, output_dir=tiny_config.output_dir + "-uninterrupted", train_batch_size=1)
    run(config)
    return metrics(config), exported(config), exported(config, "last/pytorch_lora_weights.bin")
