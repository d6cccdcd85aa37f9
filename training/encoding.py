"""Every face and text encoded once, by the base's own VAE and text encoder, and cached by content.

Letters in shapes: B batch, C latent channels, H W pixels, h w latent, T tokens, D text width.
"""

import contextlib
import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import psutil
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from tqdm import tqdm

from dataset import MangaFaceDataset
from training.base_model import load_text_encoder, load_vae
from training.files import TEMPORARY, InputError, sha256_of, write_atomic
from training.memory import free_memory
from training.pictures import load_image

ENCODING_VERSION = 3  # raise it when load_image or the encoding changes: old cache entries are then ignored
TEXT_BATCH = 32  # texts encoded at a time


@dataclass(frozen=True)
class EncodedDataset:
    """Every face and text as the UNet sees them, in the order of `faces` and `texts`.

    Shape: latent_mean, latent_std (faces, C, h, w) float32, already times the VAE's scaling factor; lists of
    (C, h, w) if the faces' shapes differ. text_embeddings (texts, T, D).
    """

    latent_mean: torch.Tensor | list[torch.Tensor]
    latent_std: torch.Tensor | list[torch.Tensor]
    text_embeddings: torch.Tensor

    def to(self, device: torch.device) -> "EncodedDataset":
        def move(tensors):
            return tensors.to(device) if torch.is_tensor(tensors) else [tensor.to(device) for tensor in tensors]

        return EncodedDataset(*map(move, (self.latent_mean, self.latent_std, self.text_embeddings)))

    def posteriors(self, faces: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of the latents of b faces of one shape. Shape: two of (b, C, h, w)."""
        return tuple(torch.stack([latents[face] for face in faces]) for latents in (self.latent_mean, self.latent_std))


@dataclass(frozen=True)
class Data:
    """The faces, and what VAE and text encoder made of them. Frozen for the whole run."""

    dataset: MangaFaceDataset
    encoded: EncodedDataset
    prompts: torch.Tensor  # (1 + sample_prompts, T, D), that of "" first

    @cached_property
    def latent_shapes(self) -> list[tuple[int, int, int]]:
        """(C, h, w) of every face."""
        return [tuple(latent.shape) for latent in self.encoded.latent_mean]


def encode(dataset: MangaFaceDataset, config, base: Path, run) -> Data:
    """Every face and text through the base's VAE and text encoder, once; both are gone before the UNet comes.

    run: has device, dtype, rank, world, barrier and is_main.
    """
    process, cache = (run.rank, run.world, run.barrier), config.cache_dir
    if run.is_main:
        clean_cache(cache)
    vae_identity = folder_identity(base / "vae")
    text_identity = folder_identity(base / "text_encoder") + folder_identity(base / "tokenizer")
    text_identity += f" clip_skip {config.clip_skip}" if config.clip_skip > 1 else ""
    load_texts = lambda: load_text_encoder(base, run.device, config.clip_skip)  # noqa: E731
    latents = encode_faces(dataset, cache, vae_identity, lambda: load_vae(base, run.device), process)
    texts, prompts = (
        encode_texts(some, cache, text_identity, load_texts, run.dtype, process)
        for some in (dataset.texts, ["", *config.sample_prompts])
    )
    encoded = EncodedDataset(*latents, texts).to(run.device)
    free_memory(run.device)
    if isinstance(encoded.latent_mean, list):  # each shape and number of images would have all kernels tried
        torch.backends.cudnn.benchmark = False
    return Data(dataset, encoded, prompts)


def folder_identity(folder: Path) -> str:
    """Hash of a model folder's config and weights: another VAE under the same name is another VAE."""
    digest = hashlib.sha256()
    for path in sorted(path for path in Path(folder).iterdir() if path.is_file()):
        digest.update(path.name.encode())
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def encode_faces(
    dataset: MangaFaceDataset,
    cache_dir: str | Path,
    vae_identity: str,
    load_vae: Callable,
    process: tuple[int, int, Callable] = (0, 1, lambda: None),
    crops: list[tuple] | None = None,
) -> tuple[torch.Tensor, torch.Tensor] | tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Latent mean and standard deviation of every face, from the cache where their content was encoded before.

    An entry's name is the hash of all that decides its value: image bytes, box, shape, VAE weights, code version. A
    changed pixel is therefore another entry; nothing can be stale. Faces are encoded and stored one by one, so that
    an interrupted encoding goes on where it stopped and ends with the same bits.

    Args:
        load_vae: called only if a face is missing; returns an AutoencoderKL (float32: SD1.5's VAE overflows in
            float16 on some images).
        process: (rank, number of processes, barrier): each process encodes its share of what is missing.
        crops: (box, shape) of each face, see load_image(); None = its own.

    Shape: two of (faces, C, h, w), float32, times the VAE's scaling factor; of lists of (C, h, w) if shapes differ.

    Raises:
        InputError: a face encodes to a non-finite latent.
    """
    rank, world, barrier = process
    crops = crops or [(face.box, face.shape) for face in dataset.faces]
    keys = [(vae_identity, *crop, face.sha256) for crop, face in zip(crops, dataset.faces, strict=True)]
    files = [_entry(Path(cache_dir), "latents", *key) for key in keys]
    entries = [_read_entry(file) for file in files]
    missing = [index for index, entry in enumerate(entries) if entry is None]
    barrier()  # everybody has looked before anybody writes
    if mine := missing[rank::world]:
        vae = load_vae()
        for index in tqdm(mine, desc="Encoding faces", disable=rank > 0):
            face = dataset.faces[index]
            if sha256_of(face.path) != face.sha256:
                raise InputError(f"{face.path} has changed since the start of this run: start it again")
            mean, std = encode_image(vae, load_image(face.path, *crops[index]))
            if not (torch.isfinite(mean).all() and torch.isfinite(std).all()):
                raise InputError(f"{face.path} encodes to NaN: look at it, or remove it from the caption file")
            _write_entry(files[index], {"mean": mean, "std": std})
    barrier()
    for index in missing:
        entries[index] = _read_back(files[index])
    return tuple(stack_if_alike([entry[name] for entry in entries]) for name in ("mean", "std"))


def stack_if_alike(tensors: list[torch.Tensor]) -> torch.Tensor | list[torch.Tensor]:
    """One tensor of all, or the list as it is if their shapes differ."""
    return torch.stack(tensors) if len({tensor.shape for tensor in tensors}) == 1 else tensors


def encode_texts(
    texts: list[str],
    cache_dir: str | Path,
    text_encoder_identity: str,
    load_text_encoder: Callable,
    dtype: torch.dtype = torch.float32,
    process: tuple[int, int, Callable] = (0, 1, lambda: None),
) -> torch.Tensor:
    """Embeddings of `texts`, one cache entry for the whole list; keyed and cached as `encode_faces` does.

    Args:
        load_text_encoder: called only if the list is new; returns (tokenizer, text encoder).
        dtype: the precision they are kept in: that of the UNet.

    Shape: (texts, T, D).

    Raises:
        InputError: a text encodes to something that is not finite.
    """
    rank, _, barrier = process
    file = _entry(Path(cache_dir), "texts", text_encoder_identity, str(dtype), texts)
    entry = _read_entry(file)
    barrier()
    if entry is None and rank == 0:
        tokenizer, text_encoder = load_text_encoder()
        chunks = [texts[start : start + TEXT_BATCH] for start in range(0, len(texts), TEXT_BATCH)]
        bar = tqdm(chunks, desc="Encoding texts")
        embeddings = torch.cat([encode_text(tokenizer, text_encoder, chunk).to(dtype) for chunk in bar])
        if bad := [text for text, finite in zip(texts, embeddings.isfinite().all(2).all(1), strict=True) if not finite]:
            raise InputError(
                f"{len(bad)} texts encode to NaN or infinity, {bad[0][:60]!r} first: the text encoder of "
                "pretrained_model is damaged, or overflows in this mixed_precision"
            )
        _write_entry(file, {"embeddings": embeddings})
    barrier()
    return (entry or _read_back(file))["embeddings"]


@torch.no_grad()
def encode_image(vae, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of the latent posterior, times the scaling factor. (3, H, W) -> two of (C, h, w)."""
    posterior = vae.encode(pixels[None].to(vae.device, vae.dtype)).latent_dist
    scale = vae.config.scaling_factor
    return (posterior.mean[0] * scale).float().cpu(), (posterior.std[0] * scale).float().cpu()


@torch.no_grad()
def encode_text(tokenizer, text_encoder, texts: list[str]) -> torch.Tensor:
    """The text encoder's last hidden state after its final layer norm, padded to full length. Shape: (B, T, D)."""
    ids = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    return text_encoder(ids.to(text_encoder.device))[0].float().cpu()


def _entry(cache: Path, kind: str, *content) -> Path:
    key = hashlib.sha256(json.dumps([ENCODING_VERSION, kind, *content]).encode()).hexdigest()
    return cache / kind / key[:2] / f"{key}.safetensors"


def _read_entry(file: Path) -> dict[str, torch.Tensor] | None:
    """The tensors, or None if they have to be encoded (again): missing, torn, changed or not finite."""
    try:
        content = file.read_bytes()  # not load_file: its tensors are the file, and change or fail with it
        header, payload = _split(content)
        if json.loads(header)["__metadata__"]["sha256"] != hashlib.sha256(payload).hexdigest():
            return None
        tensors = load(content)
    except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError):
        return None
    return tensors if all(torch.isfinite(tensor).all() for tensor in tensors.values()) else None


def _read_back(file: Path) -> dict[str, torch.Tensor]:
    """An entry that this run, or another process of it, has just written."""
    entry = _read_entry(file)
    if entry is None:
        raise InputError(
            f"{file} was written a moment ago and is gone or damaged: leave cache_dir alone while a run "
            "encodes, then run the same command again"
        )
    return entry


def _write_entry(file: Path, tensors: dict[str, torch.Tensor]) -> None:
    """The header has the hash of what follows."""
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    _, payload = _split(save(tensors))
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, save(tensors, {"sha256": hashlib.sha256(payload).hexdigest()}), flush=False)


def clean_cache(cache_dir: str | Path) -> None:
    """Delete what killed processes had half written.

    Runs share the cache: a file goes only if no process of its number lives here, and if it is a minute old, as the
    process may be another machine's.
    """
    for kind in ("latents", "texts"):
        for path in Path(cache_dir).glob(f"{kind}/*/.*.tmp"):
            found = TEMPORARY.fullmatch(path.name)
            with contextlib.suppress(FileNotFoundError):  # another run cleans up, too
                if found and not psutil.pid_exists(int(found[1])) and time.time() - path.stat().st_mtime > 60:
                    path.unlink()


def _split(content: bytes) -> tuple[bytes, bytes]:
    """Header (JSON) and tensors of a safetensors file, which starts with the header's length."""
    start = 8 + int.from_bytes(content[:8], "little")
    return content[8:start], content[start:]
