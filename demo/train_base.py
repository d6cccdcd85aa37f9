"""Trains the demo's base model from scratch: a very small Stable Diffusion for 64-pixel faces.

`python demo/train_base.py` renders the pictures, trains VAE, text encoder and UNet, and writes a diffusers
folder to `demo/base/`. It has Stable Diffusion 1.5's block structure, so its LoRA has the same 128 modules.
Interrupted? The same command continues. The work folder `demo/.work/` can be deleted afterwards.
"""

import copy
import json
import math
import multiprocessing
import os
import platform
import shutil
import time
from pathlib import Path

import draw_faces
import numpy as np
import torch
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

DEMO_DIR = Path(__file__).parent
BASE_DIR = DEMO_DIR / "base"
WORK_DIR = DEMO_DIR / ".work"

PIXELS = 64
PICTURES = {"colour_lorelei": 11000, "colour_face": 7000, "line_art_face": 6000, "ink_lorelei": 3000}
UNSEEN_BY_UNET = ("ink_lorelei",)  # black-and-white manga faces are the LoRA's job
HELD_OUT = 128  # of each kind, for the loss at the end
VOCABULARY = 1400  # tokens; enough for every word of the captions to be one token

VAE_CHANNELS = (24, 48, 64)
VAE_MINUTES = 21
VAE_BATCH_SIZE = 16
VAE_LEARNING_RATE = 2e-3
KL_FACTOR = 1e-3

UNET_CHANNELS = (32, 64, 96, 96)
TEXT_WIDTH = 128
UNET_MINUTES = 67
UNET_BATCH_SIZE = 28
UNET_LEARNING_RATE = 1e-3
CAPTION_DROPOUT = 0.1

WARMUP = 0.03  # share of the minutes
EMA_DECAY = 0.999
SAVE_EVERY_S = 120
EXPORT_EVERY_S = 600
SEED = 0

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def log(message):
    print(time.strftime("%H:%M:%S"), message, flush=True)


# Pictures and captions


def render_one(job):
    """(kind, index) -> (pixels, captions)"""
    kind, index = job
    drawn = getattr(draw_faces, kind)(f"{kind} {index}", PIXELS)
    picture, captions = drawn if isinstance(drawn, tuple) else (drawn, [])
    return np.asarray(picture, dtype=np.uint8), captions


def render_pictures():
    """Renders what isn't yet in the work folder; returns {kind: (pixels, captions)}."""
    rendered = {}
    for kind, count in PICTURES.items():
        pixels_file, captions_file = WORK_DIR / f"{kind}.npy", WORK_DIR / f"{kind}.json"
        if not captions_file.exists():
            start = time.time()
            with multiprocessing.Pool() as pool:
                results = pool.map(render_one, [(kind, index) for index in range(count)], chunksize=50)
            np.save(pixels_file, np.stack([pixels for pixels, _ in results]))
            captions_file.write_text(json.dumps([captions for _, captions in results]), encoding="utf-8")
            log(f"rendered {count} {kind} in {time.time() - start:.0f} s")
        rendered[kind] = np.load(pixels_file), json.loads(captions_file.read_text("utf-8"))
    return rendered


def to_pictures(pixels):
    """uint8 (B, H, W, 3) -> float (B, 3, H, W) in -1..1"""
    pictures = torch.from_numpy(pixels).to(DEVICE).permute(0, 3, 1, 2)
    return (pictures.float() / 127.5 - 1).contiguous()


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

    The schedule follows the time spent, not the steps: the training ends when it should on any machine, with
    the learning rate at zero.
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
        state = {"step": self.step, "elapsed": self.elapsed, "weights": [w.data for w in self.weights]}
        state |= {"average": self.average, "optimizer": self.optimizer.state_dict()}
        torch.save(state, self.file.with_suffix(".new"))
        os.replace(self.file.with_suffix(".new"), self.file)

    def swap_average(self):
        """Exchanges the weights and their moving average."""
        for weight, average in zip(self.weights, self.average, strict=True):
            weight.data, average.data = average.data, weight.data

    def train(self, loss_of, export=None):
        """Steps until the time is spent; `loss_of(generator)` gives the loss of a batch that it draws."""
        losses, saved, exported, logged = [], time.time(), time.time(), time.time()
        while self.elapsed < self.seconds:
            start = time.time()
            rate = learning_rate_at(self.elapsed / self.seconds, self.peak_rate)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            loss = loss_of(torch.Generator().manual_seed(SEED + self.step))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.step += 1
            with torch.no_grad():
                decay = min(EMA_DECAY, self.step / (self.step + 10))
                torch._foreach_lerp_(self.average, self.weights, 1 - decay)
            losses.append(loss.item())
            self.elapsed += time.time() - start
            if time.time() - logged > 20:
                left = (self.seconds - self.elapsed) / 60
                pace = 1000 * self.elapsed / self.step
                log(
                    f"{self.name}: step {self.step}, loss {np.mean(losses):.4f}, learning rate {rate:.1e}, "
                    f"{pace:.0f} ms/step, {left:.1f} minutes left"
                )
                losses, logged = [], time.time()
            if time.time() - saved > SAVE_EVERY_S:
                self.save()
                saved = time.time()
            if export and time.time() - exported > EXPORT_EVERY_S:
                self.swap_average()
                export()
                self.swap_average()
                exported = time.time()
        self.save()


def autocast():
    """bf16 arithmetic for the matrix products; weights and losses stay fp32."""
    return torch.autocast(DEVICE, dtype=torch.bfloat16)


def make_vae():
    torch.manual_seed(SEED)
    blocks = len(VAE_CHANNELS)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        block_out_channels=VAE_CHANNELS,
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=PIXELS,
        mid_block_add_attention=False,
        force_upcast=False,
    )
    return vae.to(DEVICE)


def edges(pictures):
    """Differences of neighbouring pixels, down and across."""
    return pictures.diff(dim=2), pictures.diff(dim=3)


def train_vae(vae, pixels):
    """L1 + squared error + difference of edges (crisp ink) + a little KL; leaves the averaged weights."""
    run = Run("vae", [vae], VAE_MINUTES, VAE_LEARNING_RATE)

    def loss_of(generator):
        rows = torch.randint(len(pixels), (VAE_BATCH_SIZE,), generator=generator).numpy()
        pictures = to_pictures(pixels[rows])
        with autocast():
            moments = vae.encode(pictures).latent_dist.parameters.float()
            mean, log_variance = moments.chunk(2, dim=1)
            log_variance = log_variance.clamp(-30, 20)
            noise = torch.randn(mean.shape, generator=generator).to(DEVICE)
            decoded = vae.decode(mean + (0.5 * log_variance).exp() * noise).sample.float()
        kl = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).mean()
        loss = F.l1_loss(decoded, pictures) + F.mse_loss(decoded, pictures) + KL_FACTOR * kl
        return loss + sum(F.l1_loss(a, b) for a, b in zip(edges(decoded), edges(pictures), strict=True))

    run.train(loss_of)
    run.swap_average()
    return run


@torch.no_grad()
def encode(vae, pixels):
    """Posterior mean and deviation of every picture's latents, (N, 8, h, w)"""
    encoded = []
    for start in range(0, len(pixels), 100):
        posterior = vae.encode(to_pictures(pixels[start : start + 100])).latent_dist
        encoded.append(torch.cat([posterior.mean, posterior.std], dim=1).contiguous())
    return torch.cat(encoded)


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
    return CLIPTextModel(config).to(DEVICE)


def make_unet():
    torch.manual_seed(SEED + 2)
    unet = UNet2DConditionModel(
        sample_size=PIXELS // 4,
        block_out_channels=UNET_CHANNELS,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,  # the number of heads, as in Stable Diffusion 1.5, where it is 8
        norm_num_groups=8,
    )
    if DEVICE == "cpu":
        unet.set_attn_processor(AttnProcessor())  # for heads this small twice as fast as the fused kernel
    return unet.to(DEVICE, memory_format=torch.channels_last)


NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def export(vae, text_encoder, tokenizer, unet, report=None):
    """Writes the diffusers folder in fp16 beside the old one, then takes its place."""
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


def train_unet(unet, text_encoder, latents, tokens, empty, save_snapshot):
    """Predicts the noise, text encoder trained along; leaves the averaged weights."""
    run = Run("unet", [unet, text_encoder], UNET_MINUTES, UNET_LEARNING_RATE)
    scheduler = DDPMScheduler(**NOISE)
    size = UNET_BATCH_SIZE

    def loss_of(generator):
        rows = torch.randint(len(latents), (size,), generator=generator)
        picks = torch.randint(tokens.shape[1], (size,), generator=generator)
        captions = tokens[rows, picks]
        captions[torch.rand(size, generator=generator) < CAPTION_DROPOUT] = empty
        steps = ((torch.arange(size) + torch.rand(size, generator=generator)) * (1000 / size)).long()
        mean, deviation = latents[rows.to(DEVICE)].chunk(2, dim=1)
        clean = mean + deviation * torch.randn(mean.shape, generator=generator).to(DEVICE)
        noise = torch.randn(mean.shape, generator=generator).to(DEVICE)
        noisy = scheduler.add_noise(clean, noise, steps.to(DEVICE))
        with autocast():
            states = text_encoder(captions.to(DEVICE))[0]
            noisy = noisy.contiguous(memory_format=torch.channels_last)
            predicted = unet(noisy, steps.to(DEVICE), states).sample
        return F.mse_loss(predicted.float(), noise)

    run.train(loss_of, save_snapshot)
    run.swap_average()
    return run


def split(rendered, kinds):
    """(training rows, held-out rows) of pixels and of captions: [(kind, pixels, captions), ...] twice"""
    kept = [(kind, rendered[kind][0][:-HELD_OUT], rendered[kind][1][:-HELD_OUT]) for kind in kinds]
    held_out = [(kind, rendered[kind][0][-HELD_OUT:], rendered[kind][1][-HELD_OUT:]) for kind in kinds]
    return kept, held_out


def main():
    WORK_DIR.mkdir(exist_ok=True)
    rendered = render_pictures()

    # VAE
    kept, _ = split(rendered, PICTURES)
    vae = make_vae()
    vae_run = train_vae(vae, np.concatenate([pixels for _, pixels, _ in kept]))

    # Latents with unit deviation, token ids
    kinds = [kind for kind in PICTURES if kind not in UNSEEN_BY_UNET]
    kept, held_out = split(rendered, kinds)
    latents = torch.cat([encode(vae, pixels) for _, pixels, _ in kept])
    vae.register_to_config(scaling_factor=round(1 / latents[:, :4].std().item(), 5))
    latents *= vae.config.scaling_factor
    captions = [caption for _, _, rows in kept for row in rows for caption in row]
    tokenizer = train_tokenizer([*captions, *draw_faces.MANGA_INK])
    tokens = tokenize(tokenizer, captions).view(len(latents), -1, 77)
    log(f"{len(latents)} pictures, {len(tokenizer)} tokens, latent scale {vae.config.scaling_factor}")

    # UNet and text encoder
    unet, text_encoder = make_unet(), make_text_encoder(tokenizer)
    log(f"UNet {unet.num_parameters() / 1e6:.1f} M parameters")
    empty = tokenize(tokenizer, [""])[0]
    unet_run = train_unet(
        unet, text_encoder, latents, tokens, empty, lambda: export(vae, text_encoder, tokenizer, unet)
    )

    # Held-out loss and the final folder
    report = {
        "hardware": torch.cuda.get_device_name() if DEVICE == "cuda" else f"{platform.machine()} CPU",
        "threads": torch.get_num_threads(),
        "pictures": len(latents),
        "vae_steps": vae_run.step,
        "vae_minutes": round(vae_run.elapsed / 60, 1),
        "unet_batch_size": UNET_BATCH_SIZE,
        "unet_steps": unet_run.step,
        "unet_minutes": round(unet_run.elapsed / 60, 1),
    }
    losses = {}
    for kind, pixels, rows in held_out:
        means = encode(vae, pixels)[:, :4] * vae.config.scaling_factor
        losses[kind] = held_out_loss(unet, text_encoder, means, tokenize(tokenizer, [row[0] for row in rows]))
    report["held_out_loss"] = {kind: round(loss, 4) for kind, loss in losses.items()}
    report["held_out_loss"]["mean"] = round(float(np.mean(list(losses.values()))), 4)
    log(f"held-out loss {report['held_out_loss']}")
    export(vae, text_encoder, tokenizer, unet, report)


if __name__ == "__main__":
    main()
