"""OUTPUT/share: what one gives away, and nothing private: no path, no checkpoint, no caption, no training face.

NAME.safetensors, .png, .json                           for a UI's folder; A1111 and InvokeAI read the last two
README.md, pytorch_lora_weights.safetensors, images/    for the hub: a model card, and the file that diffusers looks for
"""

import base64
import json
from pathlib import Path

import numpy as np
from PIL import Image

from evaluation.pictures import write_picture
from training.bases import single_file
from training.checkpoint import LORA_FILES
from training.files import discard, replace_folder, temporary_beside, write_atomic
from training.labels import DEMO, base_name
from training.pictures import to_bytes

HUB_TAGS = ["text-to-image", "diffusers", "lora", "manga"]
SD15_TAGS = ["stable-diffusion", "stable-diffusion-diffusers"]  # besides, where they are true
PROGRAMS = """With another base that it fits, name that one. For A1111, Forge and ComfyUI take `{name}.safetensors` and
what else bears that name; the prompt takes `<lora:{name}:1>`."""


def examples(evaluation, score) -> list[tuple[str, np.ndarray]]:
    """(prompt, picture by the LoRA) for each sample prompt; without those that are copies of a training face."""
    drawn = score.features
    return [(drawn.texts[n], drawn.pixels[n]) for n in evaluation.jobs.samples if not drawn.is_copy[n]]


def thumbnail(drawn: list[tuple[str, np.ndarray]]) -> str | None:
    """The first of examples() as a small JPEG in a data URL, for the file's header."""
    if not drawn:
        return None
    picture = Image.fromarray(drawn[0][1])
    picture.thumbnail((256, 256))
    return "data:image/jpeg;base64," + base64.b64encode(to_bytes(picture, "JPEG", quality=85)).decode()


def _prompt(config) -> str:
    return ", ".join(filter(None, [config.trigger_word, *config.sample_prompts[:1]])) or "a manga face"


def _python(config, base: str, lora: str, device: str = "cpu") -> list[str]:
    """Lines of Python that draw with the LoRA on its base, with the run's clip skip and guidance."""
    load = "from_single_file" if base.endswith((".safetensors", ".ckpt")) else "from_pretrained"
    to = f'.to("{device}")' if device != "cpu" else ""
    lines = [f"pipe = StableDiffusionPipeline.{load}({base!r}){to}", f"pipe.load_lora_weights({lora!r})"]
    if config.clip_skip > 1:
        lines += ['encoder = getattr(pipe.text_encoder, "text_model", pipe.text_encoder).encoder']
        lines += [f"del encoder.layers[{1 - config.clip_skip}:]"]
    guidance = "" if config.guidance_scale == 7.5 else f", guidance_scale={config.guidance_scale:g}"  # diffusers' own
    draw = f'pipe({_prompt(config)!r}{guidance}).images[0].save("face.png")'
    return ["from diffusers import StableDiffusionPipeline", *lines, draw]


def use_it(run, config, base: Path) -> str:
    """Lines that work as they are: Python, a prompt for A1111, the node for ComfyUI, the folder to copy from."""
    is_converted = bool(single_file(config.pretrained_model))
    named = str(base) if is_converted else config.pretrained_model
    python = "; ".join(_python(config, named, str(run.output / LORA_FILES[1]), run.device.type))
    skip = f"   (Clip skip: {config.clip_skip})" if config.clip_skip > 1 else ""
    if is_converted:
        python += f"  # {base} is the converted copy: keep it while you use this"
    prompt = f"<lora:{config.lora_name}:1> {' '.join(_prompt(config).split())}{skip}"
    node = f'"Load LoRA" between checkpoint and sampler, {config.lora_name}.safetensors, strength 1'
    node += f'; "CLIP Set Last Layer" {-config.clip_skip}' if config.clip_skip > 1 else ""
    if run.labels["ss_base_model_version"] != "sd_v1":
        return f"In Python: {python}\nIn A1111, Forge, ComfyUI: not with this base, which is no SD 1.5"
    copy = f"{config.lora_name}.* from {run.output / 'share'} to models/Lora (ComfyUI: models/loras)"
    return f"In Python: {python}\nIn A1111, Forge: {prompt}\nIn ComfyUI: {node}\nCopy: {copy}"


def model_card(config, labels: dict, images: dict[str, str], summary: dict) -> str:
    """README.md as the hub wants it. images: {file in the folder: its prompt}."""
    from huggingface_hub import ModelCardData

    is_local = Path(config.pretrained_model).exists()
    named = base_name(config) if is_local else config.pretrained_model
    data = {"license": labels["modelspec.license"], "library_name": "diffusers", "pipeline_tag": "text-to-image"}
    data |= {"base_model": None if is_local else named, "instance_prompt": config.trigger_word or "manga face"}
    data |= {"widget": [{"text": prompt, "output": {"url": url}} for url, prompt in images.items()] or None}
    is_sd15 = labels["ss_base_model_version"] == "sd_v1"
    tags = SD15_TAGS * is_sd15 + HUB_TAGS
    values = {"header": ModelCardData(tags=tags, **data).to_yaml(), "config": config, "labels": labels}
    values |= {"programs": PROGRAMS.format(name=config.lora_name) if is_sd15 else ""}
    values |= {"pictures": " ".join(f"![a face drawn with it]({url})" for url in images), "summary": summary}
    values |= {"artists": "; its artists are named in LICENSES.md" if named == DEMO else ""}
    values |= {"python": "\n".join(_python(config, named, LORA_FILES[1]))}
    return (Path(__file__).parent / "model_card.md").read_text(encoding="utf-8").format(**values)


def write_share(run, config, drawn: list, summary: dict) -> None:
    """Write OUTPUT/share anew, whole or not at all. drawn: see examples()."""
    final, name, about = run.output / "share", config.lora_name, run.labels["modelspec.description"]
    about = {"description": about, "activation text": config.trigger_word, "preferred weight": 1.0}
    images = {f"images/{number}.png": text for number, (text, _) in enumerate(drawn, start=1)}
    card, weights = model_card(config, run.labels, images, summary), (run.output / LORA_FILES[1]).read_bytes()
    files = {f"{name}.safetensors": weights, LORA_FILES[1]: weights, "README.md": card.encode()}
    files |= {f"{name}.json": json.dumps(about, ensure_ascii=False, indent=1).encode()}
    if base_name(config) == DEMO:
        files["LICENSES.md"] = (Path(__file__).parent.parent / "demo" / "LICENSES.md").read_bytes()
    with temporary_beside(final) as folder:
        (folder / "images").mkdir(parents=True)
        for file, content in files.items():
            write_atomic(folder / file, content)
        for file, (_, picture) in zip([*images, f"{name}.png"], [*drawn, *drawn[:1]], strict=False):
            write_picture(folder / file, Image.fromarray(picture))
        former = replace_folder(final, folder)
    discard(former)
