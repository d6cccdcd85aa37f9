"""Every face and text encoded once, by the base's own VAE and text encoder, and cached by content.

Letters in shapes: B batch, C latent channels, H W pixels, h w latent, T tokens, D text width.
"""

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from dataset import MangaFaceDataset
from training.base_model import load_text_encoder, load_vae
from training.bases import read_config, whole_number
from training.cache import ALONE, Cache, record_bytes
from training.files import InputError, Stop, sha256_of
from training.memory import free_memory
from training.run import tune_for

ENCODING_VERSION = 3  # raise it when load_image or the encoding changes: old cache entries are then ignored
TEXT_BATCH = 32  # texts encoded at a time


class Encoded(Sequence):
    """Tensors on the disk, one per face or text: encoded[7] reads the seventh."""

    def __init__(self, cache: Cache, keys: list[str]):
        self.cache, self.keys = cache, keys

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.cache[self.keys[index]]


@dataclass(frozen=True)
class EncodedDataset:
    """Every face and text as the UNet sees them, in the order of `faces` and `texts`.

    They stay on the disk, or in host memory; what a pass needs travels to the device. So a data set of any size takes
    none of its memory.

    Shape: latents: of each face (2, C, h, w) float32, mean and standard deviation, already times the VAE's scaling
    factor; text_embeddings: of each text (T, D).
    """

    latents: Sequence[torch.Tensor]
    text_embeddings: Sequence[torch.Tensor]
    device: torch.device

    def posteriors(self, faces: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of the latents of b faces of one shape. Shape: two of (b, C, h, w)."""
        return send(torch.stack([self.latents[face] for face in faces]), self.device).unbind(1)

    def embeddings(self, texts: list[int]) -> torch.Tensor:
        """Shape: (b, T, D)."""
        return send(torch.stack([self.text_embeddings[text] for text in texts]), self.device)


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """To the device; a GPU's copy queues up behind the step still under way, and nobody waits for it."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


@dataclass(frozen=True)
class Data:
    """The faces, and what VAE and text encoder made of them. Frozen for the whole run."""

    dataset: MangaFaceDataset
    encoded: EncodedDataset
    latent_shapes: list[tuple[int, int, int]]  # (C, h, w) of every face
    prompts: torch.Tensor  # (1 + sample_prompts, T, D), that of "" first


def encode(dataset: MangaFaceDataset, config, base: Path, run) -> Data:
    """Every face and text through the base's VAE and text encoder, once; both are gone before the UNet comes.

    run: has device, dtype, rank, world and barrier.
    """
    process, cache = (run.rank, run.world, run.barrier), config.cache_dir
    vae_identity = folder_identity(base / "vae")
    text_identity = folder_identity(base / "text_encoder") + folder_identity(base / "tokenizer")
    text_identity += f" clip_skip {config.clip_skip}" if config.clip_skip > 1 else ""
    load_texts = lambda: load_text_encoder(base, run.device, config.clip_skip)  # noqa: E731
    latents = encode_faces(dataset, cache, vae_identity, lambda: load_vae(base, run.device), process)
    prompts, count = ["", *config.sample_prompts], len(dataset.texts)
    texts = encode_texts([*dataset.texts, *prompts], cache, text_identity, load_texts, run.dtype, process)
    encoded = EncodedDataset(latents, texts, run.device)
    examples = {face.shape: index for index, face in enumerate(dataset.faces)}
    shapes = {shape: tuple(latents[index].shape[1:]) for shape, index in examples.items()}
    free_memory(run.device)
    tune_for(run.device, len(shapes))
    prompts = encoded.embeddings(list(range(count, len(texts)))).cpu()
    return Data(dataset, encoded, [shapes[face.shape] for face in dataset.faces], prompts)


def cache_room(dataset: MangaFaceDataset, config, configs: Path, dtype: torch.dtype) -> str:
    """A line on the disk that the encoded faces and texts take, before anything is encoded.

    configs: folder of the base's configs. What lies in the cache already is taken for a part of it; whether it is,
    and whether the rest fits, is found out when it is filled.

    Raises Stop(3): the disk can't hold them; not in a dry run. BaseModelError: the VAE's config is damaged.
    """
    channels = whole_number(configs, "vae/config.json", "latent_channels", 4)
    pixels = 4 ** (len(read_config(configs / "vae/config.json")["block_out_channels"]) - 1)  # of a latent one
    of_faces = [2 * channels * 4 * math.prod(face.shape) // pixels for face in dataset.faces]
    of_a_text = 77 * whole_number(configs, "text_encoder/config.json", "hidden_size", 768) * dtype.itemsize
    texts = len({*dataset.texts, *config.sample_prompts})
    needed = sum(map(record_bytes, of_faces)) + texts * record_bytes(of_a_text)
    folder = Path(config.cache_dir)
    there = sum(file.stat().st_size for part in ("latents", "texts") for file in (folder / part).glob("*.records"))
    free = shutil.disk_usage(next(some for some in (folder, *folder.absolute().parents) if some.exists())).free
    said = f"Cache: {needed / 2**20:,.0f} MiB in {config.cache_dir}, whose disk has {free / 2**20:,.0f} MiB free"
    if needed - there > free and not config.dry_run:
        raise Stop(3, f"{said}: free some, or set cache_dir to another disk")
    return said


def folder_identity(folder: Path) -> str:
    """Hash of a model folder's config and weights: another VAE under the same name is another VAE."""
    digest = hashlib.sha256()
    for path in sorted(path for path in Path(folder).iterdir() if path.is_file()):
        digest.update(path.name.encode() + bytes.fromhex(sha256_of(path)))
    return digest.hexdigest()


def encode_faces(
    dataset: MangaFaceDataset, cache_dir: str | Path, identity: str, load: Callable, process: tuple = ALONE
) -> Encoded:
    """Latent mean and standard deviation of every face, from the cache where their content was encoded before.

    A key is the hash of all that decides its value: image bytes, box, shape, VAE weights, code version. A changed
    pixel is therefore another key; nothing can be stale. Faces are encoded and stored one by one, so that an
    interrupted encoding goes on where it stopped and ends with the same bits.

    Args:
        identity: of the VAE: see folder_identity().
        load: called only if a face is missing; returns an AutoencoderKL (float32: SD1.5's VAE overflows in
            float16 on some images).
        process: (rank, number of processes, barrier): each process encodes its share of what is missing.

    Shape: of each face (2, C, h, w), float32, times the VAE's scaling factor.

    Raises:
        InputError: a face encodes to a non-finite latent.
        Stop(3): the disk can't hold them.
    """
    keys = [_key("latents", identity, face.box, face.shape, face.sha256) for face in dataset.faces]

    def make(missing: list[int]):
        vae = load()
        for index in missing:
            face = dataset.faces[index]
            if sha256_of(face.path) != face.sha256:
                raise InputError(f"{face.path} has changed since the start of this run: start it again")
            latents = encode_image(vae, dataset.pixels(index))
            if not latents.isfinite().all():
                raise InputError(f"{face.path} encodes to NaN: look at it, or remove it from the caption file")
            yield latents

    cache = Cache(Path(cache_dir, "latents"), process)
    cache.fill(keys, make, "faces", [math.prod(face.shape) for face in dataset.faces])
    dataset.kept.clear()
    return Encoded(cache, keys)


def encode_texts(
    texts: list[str], cache_dir: str | Path, identity: str, load: Callable, dtype=torch.float32, process: tuple = ALONE
) -> Encoded:
    """Embeddings of `texts`; keyed and cached as `encode_faces` does.

    Args:
        identity: of text encoder and tokenizer: see folder_identity().
        load: called only if a text is new; returns (tokenizer, text encoder).
        dtype: the precision they are kept in: that of the UNet.

    Shape: of each text (T, D).

    Raises:
        InputError: a text encodes to something that is not finite.
        Stop(3): the disk can't hold them.
    """
    different = list(dict.fromkeys(texts))  # a prompt may be a caption, too
    keys = {text: _key("texts", identity, str(dtype), text) for text in different}

    def make(missing: list[int]):
        tokenizer, text_encoder = load()
        for start in range(0, len(missing), TEXT_BATCH):
            chunk = [different[index] for index in missing[start : start + TEXT_BATCH]]
            embeddings = encode_text(tokenizer, text_encoder, chunk).to(dtype)
            for text, embedding in zip(chunk, embeddings, strict=True):
                if not embedding.isfinite().all():
                    why = "the text encoder of pretrained_model is damaged, or overflows in this mixed_precision"
                    raise InputError(f"{text[:60]!r} encodes to NaN or infinity: {why}")
            yield from embeddings

    cache = Cache(Path(cache_dir, "texts"), process)
    cache.fill(list(keys.values()), make, "texts")
    return Encoded(cache, [keys[text] for text in texts])


@torch.no_grad()
def encode_image(vae, pixels: torch.Tensor) -> torch.Tensor:
    """Mean and standard deviation of the latent posterior, times the scaling factor. (3, H, W) -> (2, C, h, w)."""
    posterior = vae.encode(pixels[None].to(vae.device, vae.dtype)).latent_dist
    return (torch.cat((posterior.mean, posterior.std)) * vae.config.scaling_factor).float().cpu()


@torch.no_grad()
def encode_text(tokenizer, text_encoder, texts: list[str]) -> torch.Tensor:
    """The text encoder's last hidden state after its final layer norm, padded to full length. Shape: (B, T, D).

    Always TEXT_BATCH at once, at least: with another number the kernels may round otherwise, and a text's embedding
    would depend on which others were encoded with it.
    """
    padded = [*texts, *[""] * (TEXT_BATCH - len(texts))]
    ids = tokenizer(padded, padding="max_length", truncation=True, return_tensors="pt").input_ids
    return text_encoder(ids.to(text_encoder.device))[0][: len(texts)].float().cpu()


def _key(*content) -> str:
    """Hash of all that decides a cached value."""
    return hashlib.sha256(json.dumps([ENCODING_VERSION, *content]).encode()).hexdigest()
