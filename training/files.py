"""Errors with their exit codes, and files that are there whole or not at all. Needs nothing but the standard library.

.NAME.1234.tmp      NAME while process 1234 writes it; renamed once it is whole, deleted once that process is gone
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterable
from pathlib import Path

TEMPORARY = re.compile(r"\..+\.\d+\.tmp")  # what process number ... is writing


class InputError(ValueError):
    """Something the user can fix: the message names the thing, its value and the remedy in one line."""

    exit_code = 2


class Stop(BaseException):  # like KeyboardInterrupt: no library's `except Exception` may swallow it
    """Ends the program with an exit code and one line. 2 input, 3 environment, 4 diverged, 130/143 interrupted."""

    def __init__(self, exit_code: int, message: str):
        super().__init__(message)
        self.exit_code = exit_code


class Interrupted(Stop):
    """Ctrl-C or SIGTERM."""


def rename_with_retries(source: Path, target: Path) -> None:
    """os.replace, tried again for a second and a half: on Windows a virus scanner may hold a new file for a moment."""
    for seconds in (0.05, 0.1, 0.2, 0.4, 0.8):
        try:
            return os.replace(source, target)
        except PermissionError:
            time.sleep(seconds)
    return os.replace(source, target)


def remove(path: Path, ignore_errors: bool = False) -> None:
    """Delete a file, or a folder with all that is in it; ignore_errors: leave of a folder what can't be deleted."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def temporary_beside(path: Path):
    """A name beside `path` to write to; what is still there under that name at the end is deleted."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
    finally:
        remove(temporary, ignore_errors=True)


def write_atomic(path: Path, content: bytes, check=None, flush: bool = True) -> None:
    """Write a file, in a folder that is made if need be, under its final name only once all of it is on the disk and
    check(temporary) raised nothing.

    flush=False is faster, and enough for a file whose reader notices that a power failure tore it.
    Raises OSError: the disk is full or the folder can't be written; `path` is then as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with temporary_beside(path) as temporary:
        with open(temporary, "wb") as file:
            file.write(content)
            if flush:
                file.flush()
                os.fsync(file.fileno())
        if check:
            check(temporary)
        rename_with_retries(temporary, path)


def read_object(file: Path) -> dict:
    """A JSON object; {} if the file isn't there, is damaged, or holds something else."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def describe(content: bytes) -> dict:
    """What a manifest says about a file of this content."""
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def read_verified(folder: Path, manifest: dict[str, dict]) -> dict[str, bytes]:
    """The content of all files in `manifest` ({name: describe(content)}).

    Raises OSError, ValueError: one is gone, or isn't what was written.
    """
    contents = {name: (folder / name).read_bytes() for name in manifest}
    for name, content in contents.items():
        if describe(content) != manifest[name]:
            raise ValueError(f"{name} is not what was saved")
    return contents


def discard(folder: Path) -> None:
    """Delete a folder; while that is under way it no longer bears its name."""
    with contextlib.suppress(OSError), temporary_beside(folder) as temporary:  # open elsewhere, on Windows: it stays
        rename_with_retries(folder, temporary)


def replace_folder(folder: Path, new: Path) -> Path:
    """Let `new` bear this folder's name; what bore it is then NAME.old. Returns its path, be it there or not."""
    old = folder.with_name(f"{folder.name}.old")
    if folder.exists():
        discard(old)
        rename_with_retries(folder, old)
    rename_with_retries(new, folder)
    return old


def sha256_of(path: Path) -> str:
    """Of a file's bytes, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush_to_disk(folder: Path) -> None:
    """fsync a folder, where the system can open one: a rename in it then survives a power failure."""
    with contextlib.suppress(OSError):  # Windows can't
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def grouped(things: Iterable, keys: Iterable) -> dict:
    """{key: the things that have it}, things and keys in the order in which they come."""
    groups: dict = {}
    for thing, key in zip(things, keys, strict=True):
        groups.setdefault(key, []).append(thing)
    return groups


def printable(text: str) -> str:
    """With escapes for characters that a terminal would obey or can't encode."""
    return re.sub("[\0-\x1f\x7f-\x9f\ud800-\udfff]", lambda found: repr(found[0])[1:-1], text)
