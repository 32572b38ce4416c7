"""A cache of folders that appear whole or not at all, and are trusted only after a check."""

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save_file
from tokenizers import Tokenizer
from torch import Tensor

from tritter.errors import RequestError, TritterError
from tritter.storage.atomic import atomic_folder, write_text_atomic
from tritter.storage.hashing import file_digest
from tritter.storage.reading import open_file
from tritter.storage.spool import is_large, mapped, tensor_of

logger = logging.getLogger(__name__)

_TENSORS, _METADATA, _TOKENIZER = "tokens.safetensors", "corpus.json", "tokenizer.json"
_FILES = (_TENSORS, _METADATA, _TOKENIZER)
_CHECKSUMS = "checksums.json"
_DTYPES = {"I32": "<i4", "I64": "<i8", "U8": "u1"}  # of what is cached


class BrokenEntryError(TritterError):
    """A folder of the cache is not what was once written there."""


@dataclass(frozen=True, slots=True, eq=False)
class CacheEntry:
    """What one folder of the cache holds."""

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, Any]
    tokenizer: Tokenizer


def read_entry(folder: Path) -> CacheEntry | None:
    """Return what a folder holds, or None when there is no such folder.

    Raises:
        BrokenEntryError: a file is missing, unreadable or not what its checksum says.
    """
    if not folder.exists():
        return None
    try:
        checksums = json.loads((folder / _CHECKSUMS).read_text(encoding="utf-8"))
        for name in _FILES:
            if checksums[name] != file_digest(folder / name):
                raise BrokenEntryError(f"{name} does not match its checksum")
        return CacheEntry(
            tensors=_tensors(folder / _TENSORS),
            metadata=json.loads((folder / _METADATA).read_text(encoding="utf-8")),
            tokenizer=Tokenizer.from_file(str(folder / _TOKENIZER)),
        )
    except BrokenEntryError:
        raise
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise BrokenEntryError(f"{type(error).__name__}: {error}") from error


def write_entry(folder: Path, entry: CacheEntry) -> None:
    """Write a folder beside its place and move it there whole.

    When another process was first, its folder stays: both hold the same by their name.

    Raises:
        RequestError: the cache cannot be written.
    """
    try:
        with atomic_folder(folder) as temporary:
            save_file(dict(entry.tensors), temporary / _TENSORS, metadata={"format": "pt"})
            (temporary / _METADATA).write_text(_json(entry.metadata), encoding="utf-8")
            entry.tokenizer.save(str(temporary / _TOKENIZER))
            checksums = {name: file_digest(temporary / name) for name in _FILES}
            (temporary / _CHECKSUMS).write_text(_json(checksums), encoding="utf-8")
    except TritterError as error:
        if not folder.exists():
            raise _unwritable(folder.parent, error) from error


@contextmanager
def one_at_a_time(folder: Path, *, waiting: Callable[[], None] | None = None) -> Iterator[None]:
    """Let one process make an entry of a cache while others wait, who then find it made.

    The lock ends with its process, so that a job that is killed holds nobody up.

    Args:
        folder: of the entry, or its file.
        waiting: told that another process is at it.

    Raises:
        RequestError: the cache cannot be written.
    """
    require_writable(folder.parent)
    lock = FileLock(folder.with_name(f"{folder.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if waiting is not None:
            waiting()
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def set_aside(path: Path, *, reason: str) -> None:
    """Move what cannot be trusted out of the way, and say so in one line.

    Raises:
        RequestError: the cache cannot be written.
    """
    aside = path.with_name(f"{path.name}.broken-{uuid4().hex[:8]}")
    logger.warning(
        "cache entry %s is damaged (%s); moved to %s and built again", path, reason, aside.name
    )
    # Another process may have moved the same entry already.
    with _write_errors(path.parent), suppress(FileNotFoundError):
        path.rename(aside)


def read_note(path: Path) -> str | None:
    """Return the one line of a small file, or None when it is not there or not readable."""
    try:
        return path.read_text(encoding="utf-8").strip() or None
    except (OSError, UnicodeDecodeError):
        return None


def write_note(path: Path, line: str) -> None:
    """Write a small file whole.

    Raises:
        RequestError: the cache cannot be written.
    """
    with _write_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomic(path, line + "\n")


def require_writable(folder: Path) -> None:
    """Find out whether a folder of the cache can be written, before any work is done for it.

    Raises:
        RequestError: it cannot.
    """
    with _write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{uuid4().hex[:8]}"
        probe.touch()
        probe.unlink()


@contextmanager
def _write_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, TritterError) as error:
        raise _unwritable(folder, error) from error


def _unwritable(folder: Path, error: Exception) -> RequestError:
    reason = getattr(error, "strerror", None) or error
    return RequestError(
        f"cache_dir: {folder} cannot be written ({reason}). "
        "Name a folder that can be: cache_dir=PATH."
    )


def _tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file; pages of a large one come when they are read."""
    if not is_large(path.stat().st_size):
        return load(path.read_bytes())
    found = {}
    # safetensors' own mapping is private: it fails for a file larger than memory
    with open_file(path) as file, safe_open(path, framework="np") as header:
        content = mapped(file)
        start = 8 + int.from_bytes(content[:8], "little")
        for name in header.offset_keys():
            part = header.get_slice(name)
            dtype, shape = np.dtype(_DTYPES[part.get_dtype()]), part.get_shape()
            array = np.frombuffer(content, dtype, count=prod(shape), offset=start)
            found[name] = tensor_of(array.reshape(shape))
            start += array.nbytes
    return found


def _json(value: object) -> str:
    return json.dumps(value, indent=1, ensure_ascii=True) + "\n"
