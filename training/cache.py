"""What VAE and text encoder made, kept by content in a few append-only files that several runs may share.

A file holds records, each starting at a multiple of 4096 bytes: a header of 512 bytes (its own hash, then as JSON the
key, the tensor's dtype and shape, and the hash of its bytes), then the bytes. Only the process that made a file appends
to it, so nobody waits for anybody; what is torn or damaged fails its hash and is made again, alone, in another file.
"""

import hashlib
import json
import math
import shutil
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from tqdm import tqdm

from training.files import InputError, Stop

BLOCK, HEADER = 4096, 512  # bytes
DTYPES = ("float32", "float16", "bfloat16")
ALONE = (0, 1, lambda: None)  # a process: its number, how many there are, what lets them wait for each other
MAX_OPEN = 64  # files; macOS lets a process have 256


class Cache:
    """Tensors by key, read from the disk each time: a data set of any size takes no memory.

    Args:
        folder: of this cache's files; made when something is written.
        process: (rank, number of processes, barrier): each process makes its share of what is missing.
    """

    def __init__(self, folder: Path, process: tuple[int, int, Callable] = ALONE):
        self.folder, self.process = folder, process
        self.places: dict[str, list[tuple[Path, int, dict]]] = {}  # by key: file, first byte, header
        self.ends: dict[Path, int] = {}  # how far each file was looked through
        self.open: dict[Path, object] = {}
        self.own = folder / f"{uuid.uuid4().hex}.records"

    def __getitem__(self, key: str) -> torch.Tensor:
        """Memory of its own. Raises InputError: it is gone, or can't be read any more."""
        path, start, header = self.places[key][-1]
        try:
            content = self._read(path, start, header)
            if len(content) < _bytes_of(header):
                raise OSError("it is shorter now")
        except OSError as error:
            remedy = "leave cache_dir alone while a run is at work, then run the same command again"
            raise InputError(f"{path} was whole a moment ago ({error}): {remedy}") from None
        return _tensor(content, header)

    def fill(self, keys: list[str], make: Callable[[list[int]], Iterable[torch.Tensor]], what: str, size=None) -> None:
        """Find these keys' records, and make those that are missing or damaged.

        Args:
            keys: hashes, in hexadecimal, each once.
            make: called once, if anything is missing, with this process's share of the missing positions in `keys`;
                yields their tensors in this order, each kept at once.
            what: for the bar and messages, such as "faces".
            size: of each key, how large its tensor is compared with the others; None = all alike.

        Raises:
            Stop(3): the disk can't hold what is missing.
            InputError: what was written has vanished.
        """
        rank, world, barrier = self.process
        missing = self._missing(keys)
        barrier()  # everybody has looked before anybody writes
        if mine := [index for index in missing if int(keys[index][-8:], 16) % world == rank]:  # whatever others see
            # disable=None: a bar if a terminal sees it
            made = tqdm(make(mine), f"Encoding {what}", len(mine), disable=True if rank else None)
            for number, tensor in enumerate(made):
                if not number:
                    shares = [size[index] for index in missing] if size else [1.0] * len(missing)
                    needed = tensor.nbytes * sum(shares) / shares[missing.index(mine[0])] + BLOCK * len(missing)
                    self._check_space(needed, missing, what)
                self._append(keys[mine[number]], tensor)
        barrier()
        if missing and (lost := self._missing([keys[index] for index in missing])):
            remedy = "leave cache_dir alone while a run encodes, then run the same command again"
            if world > 1:
                remedy += "; several machines need one cache_dir that all of them see"
            raise InputError(f"{len(lost)} {what} just written to {self.folder} are gone or damaged: {remedy}")

    def _missing(self, keys: list[str]) -> list[int]:
        """Positions in `keys` of what has no undamaged record. Reads all of them."""
        for path in sorted(self.folder.glob("*.records")):
            if path.is_file():
                self._look_through(path)
        return [index for index, key in enumerate(keys) if not self._has(key)]

    def _has(self, key: str) -> bool:
        places = self.places.get(key, [])
        while places:
            path, start, header = places[-1]
            content = self._read(path, start, header)
            is_whole = len(content) == _bytes_of(header) and hashlib.sha256(content).hexdigest() == header["sha256"]
            if is_whole and _tensor(content, header).isfinite().all():
                return True
            places.pop()
        return False

    def _look_through(self, path: Path) -> None:
        """Note what a file holds, from where it was left last time. Behind a damaged header the next one is found."""
        file, position = self._file(path), self.ends.get(path, 0)
        size, whole = file.seek(0, 2), position
        while position < size:
            file.seek(position)
            header = _parsed(file.read(HEADER))
            length = HEADER + _bytes_of(header) if header else 1
            if header and position + length <= size:
                # the last place counts: what was verified stays it
                self.places.setdefault(header["key"], []).insert(0, (path, position + HEADER, header))
                whole = position + math.ceil(length / BLOCK) * BLOCK
            position += math.ceil(length / BLOCK) * BLOCK
        self.ends[path] = whole  # what comes after it may be half written as yet

    def _append(self, key: str, tensor: torch.Tensor) -> None:
        content = tensor.contiguous().view(torch.uint8).numpy().tobytes()
        header = {"key": key, "dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}
        text = json.dumps(header | {"sha256": hashlib.sha256(content).hexdigest()}).ljust(HEADER - 64).encode()
        record = hashlib.sha256(text).hexdigest().encode() + text + content
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.own, "ab") as file:
            file.write(record.ljust(record_bytes(len(content)), b"\0"))

    def _check_space(self, needed: float, missing: list[int], what: str) -> None:
        free = shutil.disk_usage(next(folder for folder in [self.folder, *self.folder.parents] if folder.exists())).free
        size = f"{len(missing):,} {what} take {needed / 2**20:,.0f} MiB"
        if needed > free:
            why = f"{size} in {self.folder}, but its disk has {free / 2**20:,.0f} MiB free"
            raise Stop(3, f"{why}: free some, or set cache_dir to another disk")
        if needed > 2**30 and not self.process[0]:
            tqdm.write(f"{size} in {self.folder}")

    def _read(self, path: Path, start: int, header: dict) -> bytearray:
        content, file = bytearray(_bytes_of(header)), self._file(path)
        file.seek(start)
        del content[file.readinto(content) :]
        return content

    def _file(self, path: Path):
        if path not in self.open:
            if len(self.open) == MAX_OPEN:
                self.open.pop(next(iter(self.open))).close()
            self.open[path] = open(path, "rb", buffering=0)  # noqa: SIM115  stays open: deleting it does no harm
        return self.open[path]


def record_bytes(content: int) -> int:
    """What a tensor of so many bytes takes on the disk."""
    return math.ceil((HEADER + content) / BLOCK) * BLOCK


def _bytes_of(header: dict) -> int:
    return math.prod(header["shape"]) * getattr(torch, header["dtype"]).itemsize


def _tensor(content: bytearray, header: dict) -> torch.Tensor:
    return torch.frombuffer(content, dtype=getattr(torch, header["dtype"])).view(header["shape"])


def _parsed(header: bytes) -> dict | None:
    """None if it is none, or damaged, or somebody else's: anybody can compute a hash."""
    own, text = header[:64], header[64:]
    if hashlib.sha256(text).hexdigest().encode() != own:
        return None
    try:
        found = json.loads(text)
        key, dtype, shape, sha256 = (found[name] for name in ("key", "dtype", "shape", "sha256"))
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    are_texts = type(key) is type(dtype) is type(sha256) is str and dtype in DTYPES
    are_sides = type(shape) is list and 0 < len(shape) < 5 and all(type(n) is int and 0 < n < 2**20 for n in shape)
    return found if are_texts and are_sides else None
