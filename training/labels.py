"""What a LoRA file says about itself in its header, for programs that list LoRAs and for people.

modelspec.*, the fields of Stability AI's ModelSpec, and ss_*, kohya's. No path is among them, and of captions only what
reads as a list of tags, unless private_captions is on.
"""

import hashlib
import json
import os
import re
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

from training.bases import single_file
from training.captions import MAX_TAG_WORDS, are_tags, split_tags
from training.files import Stop

DEMO = "demo/base"
SAME = ("learning_rate", "seed", "gradient_accumulation_steps", "max_grad_norm", "clip_skip")  # constants, as ss_...
SD15 = {"block_out_channels": [320, 640, 1280, 1280], "layers_per_block": 2, "cross_attention_dim": 768}  # its UNet's


def run_start(kept: int | None = None) -> int:
    """When a run began, in seconds since 1970: SOURCE_DATE_EPOCH, if set, so that equal runs give equal files; else
    what a checkpoint has kept, or now. Raises Stop(2): SOURCE_DATE_EPOCH is no such number.
    """
    given = os.environ.get("SOURCE_DATE_EPOCH")
    if given is not None and not re.fullmatch("[0-9]{1,10}", given):
        raise Stop(2, f"SOURCE_DATE_EPOCH={given!r} must be a whole number, seconds since 1970: correct or unset it")
    return int(next(moment for moment in (given, kept, time.time()) if moment is not None))


def base_name(config) -> str:
    """The last part of pretrained_model, for the rest may be a private path; DEMO for the embedded base."""
    path = (single_file(config.pretrained_model) or Path(config.pretrained_model)).resolve()
    return DEMO if path == Path(__file__).resolve().parent.parent / DEMO else path.name


def base_hash(config, base: Path) -> str | None:
    """A1111's short hash of the base's single file, or of a diffusers folder's UNet; None without either."""
    for file in (single_file(config.pretrained_model), *sorted(base.glob("unet/diffusion_pytorch_model*"))):
        if file is not None:
            with open(file, "rb") as opened:
                return hashlib.sha256(opened.read(2**20 + 2**16)[2**20 :]).hexdigest()[:8]


def tag_frequency(config, dataset) -> dict[str, int]:
    """How many training faces have each tag, the most frequent first. Empty where captions are sentences.

    Some faces of a data set of tags may have sentences, too. So captions that don't read as tags are left out, and
    what is long and said of one face alone.
    """
    tags = Counter()
    for face in (dataset.faces[index] for index in dataset.train if dataset.kind != "sentences"):
        lists = (split_tags(caption) for caption in face.captions)
        tags.update({tag for parts in lists if are_tags(parts) for tag in parts if len(tag) <= 40})
    longest = {tag: MAX_TAG_WORDS + (2 if count > 1 else 0) for tag, count in tags.items()}  # in words
    tags = Counter({tag: count for tag, count in tags.items() if len(tag.split()) <= longest[tag]})
    tags |= {config.trigger_word: len(dataset)} if config.trigger_word else {}
    return dict(sorted(tags.items(), key=lambda item: (-item[1], item[0])))


def labels_of(config, dataset, model, base: Path, precision: str, started: int) -> dict[str, object]:
    """All header fields that a run's epochs have in common, in a fixed order; None = left out."""
    name, unet, side, faces = base_name(config), model.unet.config, config.resolution, len(dataset)
    is_sd15 = json.loads(json.dumps({name: unet[name] for name in SD15})) == SD15  # in which tuples become lists
    own = "unet-" + "-".join(map(str, (*unet.block_out_channels, "text", unet.cross_attention_dim)))
    about = f"Manga faces, learnt from {faces} pictures on {name}. Strength 1 is as trained. Fits "
    about += "Stable Diffusion 1.5 and what was made from it." if is_sd15 else f"{name} alone, which is no SD 1.5."
    about += f" Clip skip {config.clip_skip}." if config.clip_skip > 1 else ""
    about += f" Write {config.trigger_word} in the prompt." if config.trigger_word else ""
    spec = {"sai_model_spec": "1.0.0", "architecture": f"{'stable-diffusion-v1' if is_sd15 else own}/lora"}
    spec |= {"implementation": "diffusers", "title": config.lora_name, "resolution": f"{side}x{side}"}
    spec |= {"license": "creativeml-openrail-m" if is_sd15 else "cc-by-4.0" if name == DEMO else "other"}
    spec |= {"description": about, "trigger_phrase": config.trigger_word or None, "tags": "manga, face"}
    spec |= {"date": datetime.fromtimestamp(started, UTC).isoformat(), "encoder_layer": config.clip_skip}
    spec |= {"prediction_type": "v" if model.scheduler.config.prediction_type == "v_prediction" else "epsilon"}

    folder, tags = Path(config.dataset_dir).resolve().name, tag_frequency(config, dataset)
    shapes = Counter(dataset.faces[index].shape for index in dataset.train).most_common()
    buckets = {str(n): {"resolution": shape[::-1], "count": count} for n, (shape, count) in enumerate(shapes)}
    kohya = {"base_model_version": "sd_v1" if is_sd15 else own, "v2": False, "training_started_at": started}
    kohya |= {"sd_model_name": name, "sd_model_hash": base_hash(config, base), "mixed_precision": precision}
    kohya |= {constant: getattr(config, constant) for constant in SAME}
    kohya |= {"num_train_images": faces, "num_validation_images": len(dataset.validation)}
    kohya |= {"num_epochs": config.num_train_epochs, "resolution": f"({side}, {side})"}
    kohya |= {"lr_scheduler": "cosine with warmup", "optimizer": "torch.optim.AdamW"}
    kohya |= {"batch_size_per_device": config.train_batch_size, "caption_dropout_rate": config.caption_dropout}
    lists = {"dataset_dirs": {folder: {"n_repeats": 1, "img_count": faces}}, "bucket_info": {"buckets": buckets}}
    lists |= {"tag_frequency": {folder: tags}} if tags and not config.private_captions else {}
    kohya |= {"tag_frequency": None} | {key: json.dumps(value, ensure_ascii=False) for key, value in lists.items()}
    return {f"modelspec.{key}": value for key, value in spec.items()} | {f"ss_{key}": kohya[key] for key in kohya}
