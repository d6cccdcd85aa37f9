"""Trains the demo's base model from scratch: a very small Stable Diffusion for 128-pixel faces.

`python demo/train_base.py` renders the pictures, trains VAE, text encoder and UNet, and writes a diffusers folder to
`demo/.work/base/`, to be looked at before it takes the place of `demo/base/`. It has Stable Diffusion 1.5's block
structure, so its LoRA has the same 128 modules, and its VAE reduces eightfold. Interrupted? The same command continues.
The work folder `demo/.work/` can be deleted afterwards.

Two CPU cores train the UNet faster as two processes:
`OMP_NUM_THREADS=1 torchrun --nproc_per_node 2 demo/train_base.py --stage unet`
"""

import argparse
import contextlib
import copy
import functools
import hashlib
import json
import math
import multiprocessing
import os
import platform
import random
import shutil
import sys
import time
from pathlib import Path

import draw_faces
import measure_vae
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import AttnProcessor
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

DEMO_DIR = Path(__file__).resolve().parent
sys.path.insert(0, str(DEMO_DIR.parent))
from training.graphs import Graphed  # noqa: E402

WORK_DIR = DEMO_DIR / ".work"
BASE_DIR = WORK_DIR / "base"

PIXELS = 128
VAE_PICTURES = {"ink_lorelei": 2500, "vivid_lorelei": 1500, "colour_face": 1000, "line_art_face": 1000}
# Black-and-white manga faces, glasses and flowers are the LoRA's job: the VAE sees them, the UNet doesn't.
UNET_PICTURES = {"colour_lorelei": 16000, "colour_face": 2000, "line_art_face": 2000}
SHARD = 500  # pictures rendered and kept at a time
HELD_OUT = 128  # more of each kind, for the loss at the end
VOCABULARY = 1400  # tokens; enough for every word of the captions to be one token

VAE_CHANNELS = (24, 24, 48, 96)
VAE_MINUTES = 97
VAE_LEARNING_RATE = 5e-4
CROP, CROPS = 64, 8  # most steps see these crops, some as many pixels of whole pictures
WHOLE = 0.15  # share of those steps
GRID = 8  # crops begin where a latent pixel does
LATENT_PIXELS = PIXELS // GRID
SMALL_VAE_CHANNELS = (24, 48, 64)  # trained first, for half the pixels; VAE_CHANNELS grows from it
SMALL_VAE_MINUTES = 21
SMALL_VAE_LEARNING_RATE = 2e-3
KL_FACTOR = 2e-4

UNET_CHANNELS = (32, 64, 96, 96)
TEXT_WIDTH = 128
UNET_MINUTES = 160
UNET_BATCH_SIZE = 28
UNET_LEARNING_RATE = 8e-4
CAPTION_DROPOUT = 0.1
TIMESTEP_SPREAD = 0.7  # of log(t / (1000 - t)); 1 is uniform, less favours the middle, where small parts take shape
FACE = (slice(5, 13), slice(3, 14))  # rows and columns of latents in which eyes, mouths, freckles and earrings lie
FACE_WEIGHT = 2  # of their squared errors
# CLIP knows more words than Stable Diffusion's pictures show. So does this text encoder: of captions of manga faces,
# glasses and flowers included, whose pictures nobody sees, it learns to tell which words they have.
TEXTS = 4000
WORDS_FACTOR = 1e-3

WARMUP = 0.03  # share of the minutes
EMA_DECAY = 0.999
SAVE_EVERY_S = 120
EXPORT_EVERY_S = 600
NORM_GROUPS = 8
SEED = 0

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
AT_ONCE, SHORTER = (5, 25) if DEVICE == "cuda" else (1, 1)  # a GPU: times the batches above; of the minutes
CPU = Path("/proc/cpuinfo")
CPU_HAS_BFLOAT16 = CPU.is_file() and "avx512_bf16" in CPU.read_text("utf-8")  # else it is slower than float32
RANK, PROCESSES = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def log(message):
    if RANK == 0:
        print(time.strftime("%H:%M:%S"), message, flush=True)


def mean_over_processes(tensors):
    """Averages the tensors, in place, over the processes that train together."""
    if PROCESSES > 1:
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(flat)
        flat /= PROCESSES
        for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(mean.view(tensor.shape))


# Pictures and captions


def render_one(job):
    """(kind, seed) -> (pixels, captions)"""
    kind, seed = job
    picture, captions = getattr(draw_faces, kind)(seed, PIXELS)
    return np.asarray(picture, dtype=np.uint8), captions


def render_pictures(counts):
    """Renders what isn't yet in the work folder, in shards; returns [(kind, pixels, captions), ...]."""
    code = hashlib.sha256(Path(draw_faces.__file__).read_bytes()).hexdigest()[:8]
    shards = {
        kind: [WORK_DIR / f"{kind}_{PIXELS}_{code}_{start}.npz" for start in range(0, count, SHARD)]
        for kind, count in counts.items()
    }
    missing = [(kind, i) for kind, files in shards.items() for i, file in enumerate(files) if not file.exists()]
    with multiprocessing.Pool() if missing else contextlib.nullcontext() as pool:
        for kind, i in missing:
            jobs = [(kind, f"{kind} {SHARD * i + index}") for index in range(SHARD)]
            results = pool.map(render_one, jobs, chunksize=10)
            file = shards[kind][i]
            with open(file.with_suffix(".new"), "wb") as new:
                captions = json.dumps([captions for _, captions in results])
                np.savez(new, pixels=np.stack([pixels for pixels, _ in results]), captions=captions)
            os.replace(file.with_suffix(".new"), file)
            log(f"rendered {kind} up to {SHARD * (i + 1)}")
    rendered = []
    for kind, files in shards.items():
        loaded = [np.load(file) for file in files]
        captions = [rows for shard in loaded for rows in json.loads(str(shard["captions"]))]
        rendered.append((kind, np.concatenate([shard["pixels"] for shard in loaded]), captions))
    return rendered


def render_held_out(kinds):
    """[(kind, pixels, captions), ...] of seeds that are in no training, however many pictures it had."""
    held_out = []
    with multiprocessing.Pool() as pool:
        for kind in kinds:
            results = pool.map(render_one, [(kind, f"{kind} held out {index}") for index in range(HELD_OUT)])
            pixels, captions = zip(*results, strict=True)
            held_out.append((kind, np.stack(pixels), captions))
    return held_out


def to_pictures(pixels):
    """uint8 (B, H, W, 3) -> float (B, 3, H, W) in -1..1"""
    pictures = torch.as_tensor(pixels).to(DEVICE).permute(0, 3, 1, 2)
    return (pictures.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def train_tokenizer(captions):
    """A CLIP tokenizer whose vocabulary is trained on the captions and covers any text byte by byte."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = CLIPTokenizer().backend_tokenizer.normalizer
    bpe.pre_tokenizer = CLIPTokenizer().backend_tokenizer.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    bpe.train_from_iterator(captions, trainer)
    merges = [tuple(merge) for merge in json.loads(bpe.to_str())["model"]["merges"]]
    tokens = alphabet + [f"{byte}</w>" for byte in alphabet] + ["".join(merge) for merge in merges]
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77)


def load_tokenizer(base):
    """The one that was written there, without what from_pretrained adds to its config."""
    model = json.loads((base / "tokenizer" / "tokenizer.json").read_text("utf-8"))["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    return CLIPTokenizer(vocab=model["vocab"], merges=merges, model_max_length=77)


def tokenize(tokenizer, captions):
    """Token ids (number of captions, 77)"""
    options = {"padding": "max_length", "truncation": True, "max_length": 77, "return_tensors": "pt"}
    return tokenizer(captions, **options).input_ids


# Training


def learning_rate_at(progress, peak):
    """Warm-up, then a cosine to zero; `progress` is the share of the training time."""
    if progress < WARMUP:
        return peak * max(progress / WARMUP, 0.01)
    return peak * 0.5 * (1 + math.cos(math.pi * min((progress - WARMUP) / (1 - WARMUP), 1)))


class Run:
    """One stage: weights, their moving average, the optimizer and the time spent, on disk and back.

    The schedule follows the time spent, not the steps: the training ends when it should on any machine, with the
    learning rate at zero. On a CPU it is the time that the threads computed, so that other work only delays it.
    """

    def __init__(self, name, modules, minutes, peak_rate):
        self.name, self.modules, self.seconds, self.peak_rate = name, modules, 60 * minutes, peak_rate
        self.file = WORK_DIR / f"{name}.pt"
        self.weights = [weight for module in modules for weight in module.parameters()]
        self.average = [weight.detach().clone() for weight in self.weights]
        options = {"lr": peak_rate, "weight_decay": 0.01, "betas": (0.9, 0.99), "fused": True}
        self.optimizer = torch.optim.AdamW(self.weights, **options)
        self.step, self.elapsed = 0, 0.0
        if self.file.exists():
            state = torch.load(self.file, map_location=DEVICE, weights_only=True)
            self.step, self.elapsed = state["step"], state["elapsed"]
            for mine, saved in ((self.weights, state["weights"]), (self.average, state["average"])):
                for weight, value in zip(mine, saved, strict=True):
                    weight.data.copy_(value)
            self.optimizer.load_state_dict(state["optimizer"])
            log(f"{name}: continues at step {self.step}, {self.elapsed / 60:.1f} minutes spent")

    def save(self):
        """Writes the state beside the old one, then takes its place."""
        if RANK > 0:
            return
        state = {"step": self.step, "elapsed": self.elapsed, "weights": [w.data for w in self.weights]}
        state |= {"average": self.average, "optimizer": self.optimizer.state_dict()}
        torch.save(state, self.file.with_suffix(".new"))
        os.replace(self.file.with_suffix(".new"), self.file)

    def swap_average(self):
        """Exchanges the weights and their moving average."""
        for weight, average in zip(self.weights, self.average, strict=True):
            weight.data, average.data = average.data, weight.data

    def train(self, draw, loss_of, export=None):
        """Steps until the time is spent. `draw(generator, chance)` gives the tensors whose loss is `loss_of(*tensors)`.

        The generator is the device's own, for the GPU not to wait; `chance`, in [0, 1), is for decisions.
        """
        losses, saved, exported, logged = [], time.time(), time.time(), time.time()
        on_cpu = DEVICE == "cpu"

        def loss_and_gradients(*tensors):
            loss = loss_of(*tensors)
            gradients = torch.autograd.grad(loss, self.weights, materialize_grads=True)
            pairs = zip(self.weights, gradients, strict=True)  # laid out alike, as the optimizer wants them
            return loss.detach(), *(g if g.stride() == w.stride() else torch.empty_like(w).copy_(g) for w, g in pairs)

        # Networks as small as these take less time than launching their kernels does
        passes = loss_and_gradients if on_cpu else Graphed(loss_and_gradients)
        clock = (lambda: time.process_time() / torch.get_num_threads()) if on_cpu else time.perf_counter
        while self.elapsed < self.seconds:
            start = clock()
            rate = learning_rate_at(self.elapsed / self.seconds, self.peak_rate)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            seed = SEED + self.step * PROCESSES + RANK
            tensors = draw(torch.Generator(DEVICE).manual_seed(seed), random.Random(seed).random())
            loss, *gradients = passes(*tensors)
            mean_over_processes(gradients)
            for weight, gradient in zip(self.weights, gradients, strict=True):
                weight.grad = gradient
            torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
            self.optimizer.step()
            self.step += 1
            with torch.no_grad():
                decay = min(EMA_DECAY, self.step / (self.step + 10))
                torch._foreach_lerp_(self.average, self.weights, 1 - decay)
            losses.append(loss.clone())
            spent = torch.tensor([clock() - start])
            mean_over_processes([spent])  # all stop at the same step
            self.elapsed += spent.item()
            if time.time() - logged > 20:
                left = (self.seconds - self.elapsed) / 60
                pace = 1000 * self.elapsed / self.step
                log(
                    f"{self.name}: step {self.step}, loss {torch.stack(losses).mean():.4f}, learning rate {rate:.1e}, "
                    f"{pace:.0f} ms/step, {left:.1f} minutes left"
                )
                losses, logged = [], time.time()
                if not on_cpu and passes.failure:
                    log(f"no CUDA graphs: {passes.failure}")
            if time.time() - saved > SAVE_EVERY_S:
                self.save()
                saved = time.time()
            if export and RANK == 0 and time.time() - exported > EXPORT_EVERY_S:
                self.swap_average()
                export()
                self.swap_average()
                exported = time.time()
        self.save()


def autocast():
    """bf16 arithmetic for the matrix products where the hardware has it; weights and losses stay fp32."""
    return torch.autocast(
        DEVICE, dtype=torch.bfloat16, enabled=DEVICE == "cuda" or CPU_HAS_BFLOAT16, cache_enabled=DEVICE == "cpu"
    )


def make_vae(channels):
    """A VAE that halves the side once per level but the last, down to LATENT_PIXELS."""
    torch.manual_seed(SEED)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=1,
        norm_num_groups=NORM_GROUPS,
        sample_size=LATENT_PIXELS * 2 ** (len(channels) - 1),
        mid_block_add_attention=False,
        force_upcast=False,
    )
    return vae.to(DEVICE, memory_format=torch.channels_last)


def load_vae(base):
    vae = AutoencoderKL.from_pretrained(base / "vae").float()
    return vae.to(DEVICE, memory_format=torch.channels_last)


@torch.no_grad()
def grow(small):
    """A VAE of VAE_CHANNELS that does what the small one does to pictures reduced to half their side.

    One level more at full resolution (nearly the identity at first) and more channels at the lowest: copies of
    those there, in the same groups of the norms, told apart by a little noise (Chen et al. 2015, "Net2Net").
    """
    vae = make_vae(VAE_CHANNELS)
    old, new = small.state_dict(), vae.state_dict()
    levels = len(SMALL_VAE_CHANNELS)
    narrow, wide = SMALL_VAE_CHANNELS[-1], VAE_CHANNELS[-1]
    group = narrow // NORM_GROUPS
    copies = torch.tensor([group * g + i % group for g in range(NORM_GROUPS) for i in range(wide // NORM_GROUPS)])
    times = torch.bincount(copies)
    for level in range(levels - 1, -1, -1):  # the encoder's levels move down by one; the decoder's stay
        for name in [name for name in old if name.startswith(f"encoder.down_blocks.{level}.")]:
            old[name.replace(f"down_blocks.{level}", f"down_blocks.{level + 1}")] = old.pop(name)
    for name, value in old.items():
        if value.dim() > 1 and value.shape[1] != new[name].shape[1]:
            value = (value / times.to(value).view(1, -1, *[1] * (value.dim() - 2)))[:, copies]
        if value.shape[0] != new[name].shape[0]:
            value = value[copies]
        noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(SEED)).to(DEVICE)
        new[name].copy_(value + 0.01 * value.std() * noise if value.dim() == 4 else value)
    for block in (vae.encoder.down_blocks[0], vae.decoder.up_blocks[-1]):
        for resnet in block.resnets:
            resnet.conv2.weight.mul_(0.1)
            resnet.conv2.bias.zero_()
    for conv, window in (
        (vae.encoder.down_blocks[0].downsamplers[0].conv, torch.tensor([[1, 1, 0], [1, 1, 0], [0, 0, 0]]) / 4),
        (vae.decoder.up_blocks[-2].upsamplers[0].conv, torch.tensor([[0, 0, 0], [0, 1, 0], [0, 0, 0]])),
    ):
        conv.weight.mul_(0.1).add_(torch.eye(len(conv.weight), device=DEVICE)[..., None, None] * window.to(DEVICE))
        conv.bias.zero_()
    return vae


def edges(pictures):
    """Differences of neighbouring pixels, down and across."""
    return pictures.diff(dim=2), pictures.diff(dim=3)


def smallness(pictures):
    """Weight of each pixel, of mean 1: high on small parts that stand alone (freckles, pupils), low in flat areas."""
    detail = (pictures - F.avg_pool2d(pictures, 5, 1, 2, count_include_pad=False)).abs().mean(dim=1, keepdim=True)
    around = F.avg_pool2d(detail, 21, 1, 10, count_include_pad=False)
    weight = (1 + detail / (around + 0.02)).clamp(max=12)
    return weight / weight.mean()


def vae_loss(vae, pictures, noise):
    """Weighted L1 and squared error, L1 of edges (crisp ink) at two scales and of mean colours, a little KL."""
    with autocast():
        moments = vae.encode(pictures).latent_dist.parameters.float()
        mean, log_variance = moments.chunk(2, dim=1)
        log_variance = log_variance.clamp(-30, 20)
        decoded = vae.decode(mean + (0.5 * log_variance).exp() * noise).sample.float()
    kl = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).mean()
    difference = decoded - pictures
    loss = KL_FACTOR * kl + (smallness(pictures) * (difference.abs() + difference**2)).mean()
    for scale in (1, 2):
        reduced = F.avg_pool2d(difference, scale)
        loss = loss + sum(edge.abs().mean() for edge in edges(reduced)) / scale
    return loss + 0.5 * F.avg_pool2d(difference, 8).abs().mean()


def with_noise(pictures, generator):
    """Pictures, and noise in the shape of their latents."""
    shape = len(pictures), 4, pictures.shape[2] // GRID, pictures.shape[3] // GRID
    return pictures, torch.randn(shape, generator=generator, device=DEVICE)


def draw_crops(pixels, generator, chance):
    """A batch for the VAE: crops, of two drawn the one with more edges, or sometimes whole pictures."""

    def integers(high, *shape):
        return torch.randint(high, shape, generator=generator, device=DEVICE)

    crops = AT_ONCE * CROPS
    if chance < WHOLE:
        return to_pictures(pixels[integers(len(pixels), crops * CROP**2 // PIXELS**2)])
    rows, corners = integers(len(pixels), 2 * crops), GRID * integers((PIXELS - CROP) // GRID + 1, 2, 2 * crops)
    down, across = (corner[:, None] + torch.arange(CROP, device=DEVICE) for corner in corners)
    drawn = to_pictures(pixels[rows[:, None, None], down[:, :, None], across[:, None, :]])
    detail = sum(edge.abs().mean(dim=(1, 2, 3)) for edge in edges(drawn))
    return drawn[torch.arange(crops, device=DEVICE) * 2 + (detail[1::2] > detail[::2]).long()]


def train_vae(pixels, minutes):
    """Leaves the averaged weights. pixels: uint8 (N, H, W, 3), on the device.

    Starts from the VAE in the base's folder, if there is one, else grows a small one, trained for half the pixels.
    """
    if (BASE_DIR / "vae").exists():
        vae = load_vae(BASE_DIR)
    else:
        small = make_vae(SMALL_VAE_CHANNELS)
        run = Run("small_vae", [small], SMALL_VAE_MINUTES / SHORTER, SMALL_VAE_LEARNING_RATE)

        def draw_small(generator, _):
            rows = torch.randint(len(pixels), (2 * AT_ONCE * CROPS,), generator=generator, device=DEVICE)
            pictures, noise = with_noise(to_pictures(pixels[rows]), generator)
            return F.avg_pool2d(pictures, 2), noise

        run.train(draw_small, lambda pictures, noise: vae_loss(small, pictures, noise))
        run.swap_average()
        vae = grow(small)
    run = Run("vae", [vae], minutes, VAE_LEARNING_RATE)
    run.train(
        lambda generator, chance: with_noise(draw_crops(pixels, generator, chance), generator),
        lambda pictures, noise: vae_loss(vae, pictures, noise),
    )
    run.swap_average()
    return vae


@torch.no_grad()
def encode(vae, pixels):
    """Posterior mean and deviation of every picture's latents, (N, 8, h, w)"""
    encoded = []
    for start in range(0, len(pixels), 100):
        posterior = vae.encode(to_pictures(pixels[start : start + 100])).latent_dist
        encoded.append(torch.cat([posterior.mean, posterior.std], dim=1).contiguous())
    return torch.cat(encoded)


def cached_latents(vae, kept):
    """Scaled latents of all pictures (N, 8, h, w), kept in the work folder for as long as VAE and pictures are."""
    file = WORK_DIR / "latents.pt"
    digest = hashlib.sha256(b"".join(w.cpu().numpy().tobytes() for w in vae.state_dict().values())).hexdigest()
    for _, pixels, _ in kept:
        digest += hashlib.sha256(pixels).hexdigest()
    if not file.exists() or torch.load(file, weights_only=True)["of"] != digest:
        latents = torch.cat([encode(vae, pixels) for _, pixels, _ in kept])
        torch.save({"of": digest, "latents": latents.half().cpu()}, file)
    return torch.load(file, weights_only=True)["latents"].float().to(DEVICE) * vae.config.scaling_factor


def make_text_encoder(tokenizer):
    torch.manual_seed(SEED + 1)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=77,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def make_unet():
    torch.manual_seed(SEED + 2)
    return UNet2DConditionModel(
        sample_size=LATENT_PIXELS,
        block_out_channels=UNET_CHANNELS,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,  # the number of heads, as in Stable Diffusion 1.5, where it is 8
        norm_num_groups=NORM_GROUPS,
    )


def norm_in_fp32(norm, hidden):
    """What a GroupNorm does, in fp32: in bf16 it takes a CPU four times as long."""
    return F.group_norm(hidden.float(), norm.num_groups, norm.weight, norm.bias, norm.eps)


def tune_for_device(unet, text_encoder):
    """Moves both there. On a CPU, heads as small as these are twice as fast without the fused kernels."""
    if DEVICE == "cpu":
        unet.set_attn_processor(AttnProcessor())
        text_encoder.set_attn_implementation("eager")
        for module in unet.modules():
            if isinstance(module, torch.nn.GroupNorm):
                module.forward = functools.partial(norm_in_fp32, module)
    return unet.to(DEVICE, memory_format=torch.channels_last), text_encoder.to(DEVICE)


def training_report():
    """How the base in the folder was trained, or nothing."""
    file = BASE_DIR / "training.json"
    return json.loads(file.read_text("utf-8")) if file.exists() else {}


NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def export(vae, text_encoder, tokenizer, unet, report=None):
    """Writes the diffusers folder in fp16 beside the old one, then takes its place; `report` None: the old one's."""
    report = report or training_report()
    new, old = BASE_DIR.with_suffix(".new"), BASE_DIR.with_suffix(".old")
    for folder in (new, old):
        shutil.rmtree(folder, ignore_errors=True)
    halves = [copy.deepcopy(module).half() for module in (vae, text_encoder, unet)]
    StableDiffusionPipeline(
        vae=halves[0],
        text_encoder=halves[1],
        tokenizer=tokenizer,
        unet=halves[2],
        scheduler=PNDMScheduler(**NOISE, skip_prk_steps=True, steps_offset=1, set_alpha_to_one=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(new)
    forget_where(new)
    # Files are fp16; transformers would compute in the dtype its config names, diffusers in fp32 unless told
    config_file = new / "text_encoder" / "config.json"
    config = json.loads(config_file.read_text("utf-8"))
    config_file.write_text(json.dumps(config | {"dtype": "float32"}, indent=2) + "\n", encoding="utf-8")
    tokenizer.backend_tokenizer.model.save(str(new / "tokenizer"))  # vocab.json, merges.txt: older readers
    if report:
        (new / "training.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if BASE_DIR.exists():
        BASE_DIR.rename(old)
    new.rename(BASE_DIR)
    shutil.rmtree(old, ignore_errors=True)
    log(f"wrote {BASE_DIR}")


@torch.no_grad()
def held_out_loss(unet, text_encoder, latents, tokens):
    """Mean squared error of the predicted noise over 8 timestep strata, with fixed noise."""
    generator = torch.Generator().manual_seed(SEED)
    scheduler = DDPMScheduler(**NOISE)
    states = text_encoder(tokens.to(DEVICE))[0]
    losses = []
    for stratum in range(8):
        noise = torch.randn(latents.shape, generator=generator).to(DEVICE)
        steps = torch.full((len(latents),), 125 * stratum + 62, device=DEVICE)
        predicted = unet(scheduler.add_noise(latents, noise, steps), steps, states).sample
        losses.append(F.mse_loss(predicted, noise).item())
    return float(np.mean(losses))


def train_unet(unet, text_encoder, latents, tokens, empty, texts, minutes, save_snapshot):
    """Predicts the noise, text encoder trained along; leaves the averaged weights.

    The loss has its weights by place, not by picture: those would favour what is rare over what the caption says.
    """
    torch.manual_seed(SEED + 3)
    words_of = torch.nn.Linear(TEXT_WIDTH, text_encoder.config.vocab_size).to(DEVICE)
    torch.nn.init.constant_(words_of.bias, -4.5)  # a word is in about one text of 90
    run = Run("unet", [unet, text_encoder, words_of], minutes, UNET_LEARNING_RATE)
    scheduler = DDPMScheduler(**NOISE)
    size = AT_ONCE * UNET_BATCH_SIZE
    tokens, empty, texts = tokens.to(DEVICE), empty.to(DEVICE), texts.to(DEVICE)
    weight = torch.ones(LATENT_PIXELS, LATENT_PIXELS, device=DEVICE)
    weight[FACE] = FACE_WEIGHT
    weight /= weight.mean()

    def draw(generator, _):
        def uniform(*shape):
            return torch.rand(shape, generator=generator, device=DEVICE)

        rows, picks = (uniform(size) * len(latents)).long(), (uniform(size) * tokens.shape[1]).long()
        captions = torch.where(uniform(size, 1) < CAPTION_DROPOUT, empty, tokens[rows, picks])
        strata = (torch.arange(size, device=DEVICE) + uniform(size)) / size
        steps = (1000 * (TIMESTEP_SPREAD * strata.logit(eps=1e-6)).sigmoid()).long().clamp(max=999)
        mean, deviation = latents[rows].chunk(2, dim=1)
        noises = torch.randn((2, *mean.shape), generator=generator, device=DEVICE)
        return mean + deviation * noises[0], noises[1], steps, captions, texts[(uniform(size) * len(texts)).long()]

    def loss_of(clean, noise, steps, captions, own_texts):
        noisy = scheduler.add_noise(clean, noise, steps)
        present = torch.zeros(size, words_of.out_features, device=DEVICE).scatter_(1, own_texts, 1)
        with autocast():
            states, ends = text_encoder(torch.cat([captions, own_texts]))[:2]
            states, words = states[:size], words_of(ends[size:])
            noisy = noisy.contiguous(memory_format=torch.channels_last)
            predicted = unet(noisy, steps, states).sample
        told = F.binary_cross_entropy_with_logits(words.float(), present, reduction="sum") / size
        return (weight * (predicted.float() - noise) ** 2).mean() + WORDS_FACTOR * told

    run.train(draw, loss_of, save_snapshot)
    run.swap_average()
    return run


def forget_where(folder):
    """Takes out of the configs which folder their weights were loaded from."""
    for file in folder.rglob("config.json"):
        config = json.loads(file.read_text("utf-8"))
        if config.pop("_name_or_path", None):
            file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def write_vae(vae, pixels):
    """Writes the VAE to the base's folder in fp16, with the factor that gives latents of unit deviation."""
    with torch.no_grad():
        latents = encode(vae, pixels[:: max(1, len(pixels) // 1000)])[:, :4]
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    copy.deepcopy(vae).half().save_pretrained(BASE_DIR / "vae.new")
    forget_where(BASE_DIR / "vae.new")
    shutil.rmtree(BASE_DIR / "vae", ignore_errors=True)
    (BASE_DIR / "vae.new").rename(BASE_DIR / "vae")
    log(f"wrote {BASE_DIR / 'vae'}, latent scale {vae.config.scaling_factor}")


def vae_stage(minutes):
    rendered = render_pictures(VAE_PICTURES)
    pixels = np.concatenate([pixels for _, pixels, _ in rendered])
    vae = train_vae(torch.from_numpy(pixels).to(DEVICE), minutes)
    colour = np.concatenate([pixels for kind, pixels, _ in rendered if kind != "ink_lorelei"])
    write_vae(vae, colour)
    print(measure_vae.report(vae))


def unet_stage(minutes):
    """Goes on from where it was interrupted, else from the UNet and the text encoder in the base's folder, if any."""
    if PROCESSES > 1:
        dist.init_process_group("gloo")
        if RANK > 0:
            dist.barrier()  # until the first process has rendered and encoded
    rendered = render_pictures(UNET_PICTURES)
    held_out = render_held_out(UNET_PICTURES) if RANK == 0 else []
    vae = load_vae(BASE_DIR)

    # Latents with unit deviation, token ids
    latents = cached_latents(vae, rendered)
    if PROCESSES > 1 and RANK == 0:
        dist.barrier()
    captions = [caption for _, _, rows in rendered for row in rows for caption in row]
    if (BASE_DIR / "unet").exists():
        tokenizer = load_tokenizer(BASE_DIR)
        unet = UNet2DConditionModel.from_pretrained(BASE_DIR / "unet").float()
        text_encoder = CLIPTextModel.from_pretrained(BASE_DIR / "text_encoder").float()
    else:
        tokenizer = train_tokenizer([*captions, *draw_faces.MANGA_INK, *draw_faces.UNSEEN_WORDS, *draw_faces.TAGS])
        unet, text_encoder = make_unet(), make_text_encoder(tokenizer)
    unet, text_encoder = tune_for_device(unet, text_encoder)
    tokens = tokenize(tokenizer, captions).view(len(latents), -1, 77)
    texts = [text for index in range(TEXTS) for text in draw_faces.manga_texts(f"text {index}")]
    log(f"{len(latents)} pictures, {len(tokenizer)} tokens, latent scale {vae.config.scaling_factor}")

    # UNet and text encoder
    log(f"UNet {unet.num_parameters() / 1e6:.1f} M parameters")
    empty, texts = tokenize(tokenizer, [""])[0], tokenize(tokenizer, texts)
    run = train_unet(
        unet, text_encoder, latents, tokens, empty, texts, minutes, lambda: export(vae, text_encoder, tokenizer, unet)
    )

    if RANK > 0:
        return

    # Held-out loss and the final folder
    report = {
        "hardware": torch.cuda.get_device_name() if DEVICE == "cuda" else f"{platform.machine()} CPU",
        "threads": PROCESSES * torch.get_num_threads(),
        "pictures": len(latents),
        "unet_batch_size": PROCESSES * AT_ONCE * UNET_BATCH_SIZE,
        "unet_steps": run.step,
        "unet_minutes": round(run.elapsed / 60, 1),
    }
    losses = {}
    for kind, pixels, rows in held_out:
        means = encode(vae, pixels)[:, :4] * vae.config.scaling_factor
        losses[kind] = held_out_loss(unet, text_encoder, means, tokenize(tokenizer, [row[0] for row in rows]))
    report["held_out_loss"] = {kind: round(loss, 4) for kind, loss in losses.items()}
    log(f"held-out loss {report['held_out_loss']}")
    before = training_report()
    if before.get("unet_steps") == run.step:  # the command was given again after the end
        before = before.get("went_on_from")
    if before:
        report["went_on_from"] = before
    export(vae, text_encoder, tokenizer, unet, report)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=("vae", "unet"), help="only this one (default: both)")
    parser.add_argument("--minutes", type=float, help="how long the stage computes, all tries together")
    options = parser.parse_args()
    if options.minutes and not options.stage:
        parser.error("--minutes needs --stage: each stage has its own time")
    if PROCESSES > 1 and options.stage != "unet":
        parser.error("several processes train the UNet alone: --stage unet")
    WORK_DIR.mkdir(exist_ok=True)
    BASE_DIR.mkdir(exist_ok=True)
    if options.stage != "unet":
        vae_stage(options.minutes or VAE_MINUTES / SHORTER)
    if options.stage != "vae":
        unet_stage(options.minutes or UNET_MINUTES / SHORTER)


if __name__ == "__main__":
    main()
