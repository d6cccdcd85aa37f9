"""Pictures: which prompts are drawn, how, and the sheets that show them."""

import json
import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

from dataset import FEWEST
from evaluation.measures import DEMO_ATTRIBUTES
from training.base_model import load_vae
from training.files import grouped, write_atomic
from training.memory import free_memory, sparingly
from training.pictures import to_bytes

TILE = 176  # pixels a side of one picture in a contact sheet
SPARING_TILE = 256  # pixels a side of what is decoded at a time when memory is short
PIXELS_PER_PASS = 2**20  # drawn at a time: 4 pictures of 512 x 512, 8 at the most
MAX_CAPTIONS = 24  # held-out faces whose captions are drawn; with fewer, as many pictures, of more seeds
MAX_ATTRIBUTE_PROMPTS = 32  # of the demo's 288
OWN_WORDS = 4  # held-out faces whose captions come first on a sheet, beside the real face


@dataclass(frozen=True)
class Jobs:
    """What is drawn for the score, in this order: portraits for held-out faces' captions, which are what is compared
    with faces; sample_prompts, samples_per_prompt seeds each; on the demo prompts that ask for each attribute half of
    the time.
    """

    prompts: list[str]
    seeds: list[int]
    shapes: list[tuple[int, int]]  # H, W; a portrait has its face's
    faces: list[int]  # whose caption each portrait has
    samples: list[int]  # the numbers of each sample prompt's first picture

    @property
    def portraits(self) -> int:
        """How many."""
        return len(self.faces)


def evaluation_jobs(dataset, config) -> Jobs:
    """Up to MAX_CAPTIONS held-out faces, evenly chosen, with as many seeds each as it takes to have that many.

    Where too few are held out for a score, one seed each; where none are, the captions of training faces.
    """
    faces = dataset.validation or dataset.train
    chosen = sorted({round(x) for x in np.linspace(0, len(faces) - 1, min(MAX_CAPTIONS, len(faces)))})
    each = -(-MAX_CAPTIONS // len(chosen)) if len(dataset.validation) >= FEWEST else 1
    own = [(faces[number], config.seed + number + len(faces) * turn) for turn in range(each) for number in chosen]
    jobs = [(dataset.texts[dataset.first_text[face]], seed, dataset.faces[face].shape) for face, seed in own]
    square, per_prompt = (config.resolution, config.resolution), config.samples_per_prompt
    samples = list(range(len(jobs), len(jobs) + per_prompt * len(config.sample_prompts), per_prompt))
    prompts = [prompt for prompt in config.sample_prompts for _ in range(per_prompt)]
    jobs += [(prompt, config.seed + number, square) for number, prompt in enumerate(prompts)]
    if config.demo:
        prompts = json.loads((DEMO_ATTRIBUTES / "prompts.json").read_text(encoding="utf-8"))
        jobs += [(text, config.seed + turn, square) for turn, text in enumerate(prompts[:MAX_ATTRIBUTE_PROMPTS])]
    prompts, seeds, shapes = (list(column) for column in zip(*jobs, strict=True))
    return Jobs(prompts, seeds, shapes, [face for face, _ in own], samples)


def build_pipeline(vae, unet, scheduler, tokenizer=None, text_encoder=None, is_sparing=False):
    """A StableDiffusionPipeline that draws with DPM-Solver++ (Lu et al. 2022), the one for the stochastic equation,
    whose fresh noise mends what went wrong before; without an encoder, from embeddings.

    is_sparing: large pictures are decoded in tiles, whose seams are blended.
    """
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

    parts = (vae, text_encoder, tokenizer, unet, scheduler, None, None)
    pipe = StableDiffusionPipeline(*parts, requires_safety_checker=False)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, algorithm_type="sde-dpmsolver++")
    pipe.set_progress_bar_config(disable=True)
    if is_sparing:
        vae.enable_tiling()
        vae.tile_sample_min_size, vae.tile_latent_min_size = SPARING_TILE, SPARING_TILE // pipe.vae_scale_factor
    return pipe


def to_pixels(image: torch.Tensor) -> np.ndarray:
    """Shape: (3, H, W) in [-1, 1] (what is beyond is clamped) -> (H, W, 3), uint8."""
    return ((image.float().cpu().clamp(-1, 1) + 1) * 127.5).round().permute(1, 2, 0).byte().numpy()


@torch.no_grad()
def decode(vae, latents: torch.Tensor) -> np.ndarray:
    """The pictures of latents, in the VAE's own precision. Shape: (n, C, h, w), scaled -> (n, H, W, 3), uint8."""
    latents = latents.to(vae.device, vae.dtype) / vae.config.scaling_factor
    return np.stack([to_pixels(vae.decode(latent[None]).sample[0]) for latent in latents])


@torch.no_grad()
def draw_pictures(pipe, prompts: dict, seeds: list[int], shapes: list[tuple[int, int]], config, is_sparing=False):
    """One picture per seed and shape (H, W), with the run's sample_steps and guidance_scale.

    prompts: the pipeline's arguments, of all pictures: {"prompt": texts}, or embeddings (pictures, T, D).
    Shape: of each (H, W, 3), uint8.
    """
    pictures: list = [None] * len(seeds)
    bar = tqdm(desc="Drawing", total=len(seeds), unit="picture", leave=False, disable=None)  # None: in a terminal
    settings = {"num_inference_steps": config.sample_steps, "guidance_scale": config.guidance_scale}
    for (height, width), numbers in grouped(range(len(seeds)), shapes).items():
        at_once = 1 if is_sparing else max(1, min(8, PIXELS_PER_PASS // (height * width)))
        for start in range(0, len(numbers), at_once):
            some = numbers[start : start + at_once]
            given = {name: [of_all[number] for number in some] for name, of_all in prompts.items()}
            given = {name: torch.stack(of) if torch.is_tensor(of[0]) else of for name, of in given.items()} | settings
            generators = [torch.Generator().manual_seed(seeds[number]) for number in some]
            latents = pipe(**given, height=height, width=width, generator=generators, output_type="latent").images
            for number, picture in zip(some, decode(pipe.vae, latents), strict=True):
                pictures[number] = picture
            bar.update(len(some))
    bar.close()
    return pictures


def contact_sheet(rows: list[list[np.ndarray]], titles: list[str], captions: list[str]) -> Image.Image:
    """One row of pictures (H, W, 3) per caption, a title per column; two blocks side by side if more than four rows.

    Pictures keep their shape, with grey beside them; None stays white, a column of it untitled. Captions are never cut.
    """
    blocks = 2 if len(rows) > 4 else 1
    per_block, columns, gap = -(-len(rows) // blocks), len(rows[0]), 16
    wrapped = [textwrap.wrap(caption, max(12, int(columns * TILE / 6.6))) for caption in captions]
    text = 10 + 15 * max([2, *map(len, wrapped)])
    block_width = columns * TILE + gap
    sheet = Image.new("RGB", (blocks * block_width + gap, 36 + per_block * (TILE + text)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=13)
    for number, (row, lines) in enumerate(zip(rows, wrapped, strict=True)):
        left, top = gap + number // per_block * block_width, 36 + number % per_block * (TILE + text)
        for column, picture in ((column, picture) for column, picture in enumerate(row) if picture is not None):
            if all(above[column] is None for above in rows[number - number % per_block : number]):
                middle, large = left + column * TILE + TILE / 2, ImageFont.load_default(size=15)
                draw.text((middle, 18), titles[column], "black", large, "mm")
            tile = ImageOps.pad(Image.fromarray(picture), (TILE - 4, TILE - 4), Image.Resampling.LANCZOS, "lightgrey")
            sheet.paste(tile, (left + column * TILE + 2, top))
        draw.multiline_text((left + 2, top + TILE), "\n".join(lines), "black", font, spacing=2)
    return sheet


def to_webp(pixels: np.ndarray, most: int = 2048) -> bytes:
    """A picture (H, W, 3), uint8, as a WebP of at most so many pixels a side; a small one loses nothing."""
    picture = Image.fromarray(pixels)
    picture.thumbnail((most, most))
    return to_bytes(picture, "WEBP", lossless=max(picture.size) <= 128, quality=88)


def write_album(folder: Path, prompts: list[str], drawn) -> None:
    """Write each of the pictures (H, W, 3) as it was drawn, 01.webp, 02.webp ..., and prompts.json."""
    for number, pixels in enumerate(drawn, start=1):
        write_atomic(folder / f"{number:02d}.webp", to_webp(pixels), flush=False)
    content = json.dumps({"prompts": prompts}, ensure_ascii=False, indent=1).encode("utf-8", "backslashreplace")
    write_atomic(folder / "prompts.json", content, flush=False)


def write_picture(path: Path, picture: Image.Image) -> None:
    """Write a PNG, whole or not at all."""
    write_atomic(path, to_bytes(picture, "PNG"))


def is_sampled(epoch: int, config) -> bool:
    """Whether a sheet is drawn after this epoch; 0 is before the first."""
    every = config.sample_every_n_epochs
    return bool(config.sample_prompts) and every > 0 and epoch % every == 0


def titled(prompt: str, config) -> str:
    """One of sample_prompts as a sheet shows it: drawn as it was typed, where all captions began with trigger_word."""
    is_there = config.trigger_word.lower() in prompt.lower()
    return prompt if is_there else f"{prompt} (without the trigger word {config.trigger_word!r})"


def start_of(config) -> str:
    """What is drawn before the first epoch, in a word."""
    return "start" if config.start_from else "base"


def draw_samples(run, config, model, data, epoch: int, base: Path) -> None:
    """A sheet: up to OWN_WORDS held-out faces beside pictures drawn for their captions, then sample_prompts, all from
    the run's seeds, so comparable. Epoch 0 is the base's or, with start_from, the start's. Beside it a folder of the
    pictures alone, which the report shows.

    On the main process, unless this epoch's is there already. A signal acts at once: the run that goes on draws it.
    """
    file, unet = run.output / "samples" / f"epoch-{epoch:03d}.png", model.unet
    if not run.is_main or not is_sampled(epoch, config) or file.is_file():
        return
    faces, dataset, each = data.dataset.validation[:OWN_WORDS], data.dataset, config.samples_per_prompt
    square, prompts = (config.resolution, config.resolution), data.prompts.to(unet.device, unet.dtype)
    texts = [*data.encoded.embeddings([dataset.first_text[face] for face in faces])] if faces else []
    texts += [*prompts[1:]]
    shapes = [dataset.faces[face].shape for face in faces] + [square] * len(config.sample_prompts)

    def draw(is_sparing: bool) -> list[np.ndarray]:
        pipe = build_pipeline(load_vae(base, run.device), unet, model.scheduler, is_sparing=is_sparing)
        given = {"prompt_embeds": torch.stack([text for text in texts for _ in range(each)])}
        given |= {"negative_prompt_embeds": prompts[:1].expand_as(given["prompt_embeds"])}
        seeds = [config.seed + number for of in (faces, config.sample_prompts) for number in range(each * len(of))]
        return draw_pictures(pipe, given, seeds, [shape for shape in shapes for _ in range(each)], config, is_sparing)

    with run.signals_act_at_once():
        free_memory(run.device)
        if pictures := sparingly(draw, "drawing samples", run.device, run.log):
            real = [to_pixels(dataset.pixels(face)) for face in faces] + [None] * len(config.sample_prompts)
            rows = [[one, *pictures[each * number : each * (number + 1)]] for number, one in enumerate(real)]
            titles = ["real face", f"epoch {epoch}" if epoch else start_of(config), *[""] * (each - 1)]
            rows, titles = (rows, titles) if faces else ([row[1:] for row in rows], titles[1:])
            captions = [dataset.texts[dataset.first_text[face]] for face in faces]
            captions += [titled(prompt, config) for prompt in config.sample_prompts]
            write_album(file.with_suffix(""), [text for text in captions for _ in range(each)], pictures)
            write_picture(file, contact_sheet(rows, titles, captions))
        free_memory(run.device)
