"""Look at a finished LoRA: pictures and line-art measures of the base, of the LoRA and of the training faces.

    python evaluate_lora.py --lora demo_output

The exported file is loaded into a fresh diffusers pipeline, as a user would, so what is measured here is what anybody
gets from it; the live model of the training is not involved. Needs no download and no other model.
"""

import argparse
import json
import sys
import textwrap
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from dataset import InputError, MangaFaceDataset, encode_faces, encode_image, folder_identity, load_image

TILE = 176  # pixels a side of one picture in a contact sheet
MEASURES = ("colourfulness", "ink share", "edge strength", "diversity")


# Measures: each takes pictures (n, H, W, 3) as uint8 and returns one number per picture -----------------------------


def luma(pictures: np.ndarray) -> np.ndarray:
    """Brightness in [0, 1] (Rec. 601). Shape: (n, H, W, 3) -> (n, H, W)."""
    return pictures.astype(np.float64) @ np.array([0.299, 0.587, 0.114]) / 255


def colourfulness(pictures: np.ndarray) -> np.ndarray:
    """Hasler & Suesstrunk 2003, "Measuring colourfulness in natural images": 0 grey, 15 slight, 45 quite strong."""
    red, green, blue = np.moveaxis(pictures.astype(np.float64), -1, 0)
    red_green, yellow_blue = red - green, (red + green) / 2 - blue
    spread = np.hypot(red_green.std(axis=(1, 2)), yellow_blue.std(axis=(1, 2)))
    return spread + 0.3 * np.hypot(red_green.mean(axis=(1, 2)), yellow_blue.mean(axis=(1, 2)))


def ink_share(pictures: np.ndarray) -> np.ndarray:
    """Share of pixels darker than a quarter of full brightness, in [0, 1]."""
    return (luma(pictures) < 0.25).mean(axis=(1, 2))


def edge_strength(pictures: np.ndarray) -> np.ndarray:
    """99th percentile of the brightness gradient, per pixel: crisp strokes are high, blur is low. In [0, 0.71]."""
    down, right = np.gradient(luma(pictures), axis=(1, 2))
    return np.percentile(np.hypot(down, right), 99, axis=(1, 2))


def diversity(pictures: np.ndarray) -> np.ndarray:
    """Mean distance of each picture to the others: root mean square of the difference in brightness, in [0, 1]."""
    flat = luma(pictures).reshape(len(pictures), -1)
    squares = (flat**2).sum(axis=1)
    distances = np.sqrt(np.maximum(squares[:, None] + squares - 2 * flat @ flat.T, 0) / flat.shape[1])
    return distances.sum(axis=1) / max(1, len(pictures) - 1)


def measure(pictures: np.ndarray) -> dict[str, np.ndarray]:
    """Every measure in MEASURES of these pictures (n, H, W, 3) uint8; each (n,)."""
    return dict(zip(MEASURES, (f(pictures) for f in (colourfulness, ink_share, edge_strength, diversity)), strict=True))


# Pictures --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def draw_pictures(
    pipe, prompts: list[dict], resolution: int, steps: int, guidance: float, seeds: list[int]
) -> np.ndarray:
    """One picture per prompt and seed, prompt by prompt; the VAE decodes in its own precision.

    Args:
        pipe: a StableDiffusionPipeline; its scheduler is replaced by DPM-Solver++ (Lu et al. 2022), same settings.
        prompts: keyword arguments of the pipeline: {"prompt": text}, or embeddings.

    Shape: (prompts x seeds, resolution, resolution, 3), uint8.
    """
    from diffusers import DPMSolverMultistepScheduler

    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    pictures = []
    for prompt in prompts:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        latents = pipe(**prompt, num_images_per_prompt=len(seeds), height=resolution, width=resolution,
                       num_inference_steps=steps, guidance_scale=guidance, generator=generators,
                       output_type="latent").images  # fmt: skip
        for latent in latents.to(pipe.vae.dtype):
            pixels = pipe.vae.decode(latent[None] / pipe.vae.config.scaling_factor).sample[0]
            pictures.append(((pixels.float().cpu().clamp(-1, 1) + 1) * 127.5).round().permute(1, 2, 0).byte().numpy())
    return np.stack(pictures)


def contact_sheet(rows: list[list[np.ndarray]], titles: list[str], captions: list[str]) -> Image.Image:
    """One row of pictures per caption, in two blocks side by side if there are more than four rows."""
    blocks = 2 if len(rows) > 4 else 1
    per_block, columns, text, gap = -(-len(rows) // blocks), len(rows[0]), 40, 16
    block_width = columns * TILE + gap
    sheet = Image.new("RGB", (blocks * block_width + gap, 36 + per_block * (TILE + text)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=13)
    for number, (row, caption) in enumerate(zip(rows, captions, strict=True)):
        left, top = gap + number // per_block * block_width, 36 + number % per_block * (TILE + text)
        if number % per_block == 0:
            for column, title in enumerate(titles):
                draw.text((left + column * TILE + TILE / 2, 18), title, "black", ImageFont.load_default(size=15), "mm")
        for column, picture in enumerate(row):
            tile = Image.fromarray(picture).resize((TILE - 4, TILE - 4), Image.Resampling.LANCZOS)
            sheet.paste(tile, (left + column * TILE + 2, top))
        lines = textwrap.wrap(caption, max(12, int(columns * TILE / 6.6)))[:2]
        draw.multiline_text((left + 2, top + TILE), "\n".join(lines), "black", font, spacing=2)
    return sheet


def sample_sheet(unet, vae, scheduler, embeddings: torch.Tensor, constants: dict, title: str) -> Image.Image:
    """One picture per prompt from a model in training, with the same seed each time, so sheets can be compared.

    Args:
        embeddings: (1 + prompts, T, D), that of "" first.
        constants: the run's, as a dict.
    """
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline(vae, None, None, unet, scheduler, None, None, requires_safety_checker=False)
    empty, *prompts = embeddings.to(unet.device, unet.dtype).split(1)
    prompts = [{"prompt_embeds": prompt, "negative_prompt_embeds": empty} for prompt in prompts]
    pictures = draw_pictures(
        pipe,
        prompts,
        constants["resolution"],
        constants["sample_steps"],
        constants["guidance_scale"],
        [constants["seed"]],
    )
    return contact_sheet([[picture] for picture in pictures], [title], list(constants["sample_prompts"]))


def before_and_after(folder: Path, dataset, base: Path, device: torch.device) -> tuple[Image.Image, dict]:
    """Draw with and without the LoRA file of `folder`, same prompts and seeds, beside the nearest training face.

    "Nearest" is by distance in the VAE's latents. At most 250 training faces are measured.

    Returns:
        (contact sheet, {"base": pictures, "lora": pictures, "faces": training faces}), pictures (n, H, W, 3) uint8.
    """
    import transformers
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import logging

    logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    run = json.loads((folder / "config.json").read_text(encoding="utf-8"))["constants"]
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    pipe = StableDiffusionPipeline.from_pretrained(base, dtype=dtype, safety_checker=None, local_files_only=True)
    pipe = pipe.to(device)
    pipe.vae.to(torch.float32)  # SD1.5's VAE overflows in float16 on some pictures
    prompts = [{"prompt": prompt} for prompt in run["sample_prompts"]]
    seeds = [run["seed"] + number for number in range(run["samples_per_prompt"])]
    settings = (run["resolution"], run["sample_steps"], run["guidance_scale"], seeds)
    pictures = {"base": draw_pictures(pipe, prompts, *settings)}
    pipe.load_lora_weights(str(folder / "pytorch_lora_weights.safetensors"))
    pictures["lora"] = draw_pictures(pipe, prompts, *settings)

    def face(index: int) -> np.ndarray:
        pixels = load_image(dataset.samples[index].path, run["resolution"])
        return ((pixels + 1) * 127.5).round().permute(1, 2, 0).byte().numpy()

    pictures["faces"] = np.stack([face(index) for index in dataset.train[:250]])
    identity = folder_identity(base / "vae")
    known = encode_faces(dataset, run["cache_dir"], identity, lambda: pipe.vae)[0][dataset.train].flatten(1)
    rows = []
    for number in range(0, len(pictures["lora"]), len(seeds)):
        pixels = torch.from_numpy(pictures["lora"][number]).permute(2, 0, 1).float() / 127.5 - 1
        distances = (known - encode_image(pipe.vae, pixels)[0].flatten()).square().sum(dim=1)
        nearest = face(dataset.train[int(distances.argmin())])
        rows.append([pictures["base"][number], pictures["lora"][number], nearest])
    titles = ["base", "LoRA", "nearest training face"]
    return contact_sheet(rows, titles, list(run["sample_prompts"])), pictures


def table(pictures: dict[str, np.ndarray]) -> str:
    """The measures of the base's, the LoRA's and the real faces' pictures, and the range of 90 % of the faces."""
    measured = {name: measure(group) for name, group in pictures.items()}
    counts = ", ".join(f"{len(group)} {name}" for name, group in pictures.items())
    lines = [f"{'mean over ' + counts:44s} {'base':>7} {'LoRA':>7} {'faces':>7}   5-95 % of faces"]
    for name in MEASURES:
        low, high = np.percentile(measured["faces"][name], [5, 95])
        means = " ".join(f"{measured[group][name].mean():7.3f}" for group in ("base", "lora", "faces"))
        lines.append(f"{name:44s} {means}   {low:.3f} to {high:.3f}")
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lora", required=True, metavar="FOLDER", help="output folder of a finished training")
    folder = Path(parser.parse_args(arguments).lora)
    lora_file = folder / "pytorch_lora_weights.safetensors"
    if not (folder / "config.json").is_file() or not lora_file.is_file():
        raise InputError(f"--lora {folder} holds no finished training: run train_manga_lora.py first")
    run = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    constants = run["constants"]
    names = ("dataset_dir", "json_file", "resolution", "weighting", "weight_min", "weight_max", "validation_share")
    dataset = MangaFaceDataset(**{name: constants[name] for name in names})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not constants["sample_prompts"]:
        raise InputError(f"--lora {folder}: the run had no sample_prompts, so there is nothing to draw")
    sheet, pictures = before_and_after(folder, dataset, Path(run["base"]), device)
    sheet.save(folder / "before_after.png")
    print(table(pictures))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (InputError, OSError) as error:
        print(f"evaluate_lora.py: {error}", file=sys.stderr)
        sys.exit(2)
