"""Safetensors folders, written tensor by tensor: memory holds three tensors, never a shard.

The format puts all names, dtypes, shapes and offsets into a header before the data, so a stream
states them first. safetensors' own writer takes whole dictionaries, hence the few lines here.
"""

from __future__ import annotations

import ctypes
import json
import struct
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from tritter.storage.hashing import DigestQueue, bytes_of
from tritter.storage.tensors import INDEX_NAME, SINGLE_NAME, WRITTEN_DTYPES

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_HEADER_ALIGNMENT = 8
_BYTES_UNTIL_TRIM = 32 * 2**20


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """What the header says of one tensor."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class TensorStream:
    """Tensors that come one by one, announced beforehand.

    Args:
        entries: what will come, in order.
        tensors: (name, tensor) in the order of the entries.
    """

    entries: tuple[TensorEntry, ...]
    tensors: Iterable[tuple[str, Tensor]]

    @classmethod
    def of(cls, pairs: Iterable[tuple[str, Tensor]]) -> TensorStream:
        """Announce tensors that are in memory already."""
        held = list(pairs)
        entries = tuple(TensorEntry(name, t.dtype, tuple(t.shape)) for name, t in held)
        return cls(entries, held)


def write_tensors(
    folder: Path, stream: TensorStream, *, max_shard_bytes: int = 5 * 10**9
) -> dict[str, str]:
    """Write a stream in shards of bounded size and return the digest of every tensor.

    One shard gives `model.safetensors`; several give numbered files and an index, as
    transformers reads them. Two worker threads hash and write a tensor while the next is made.

    Raises:
        OSError: the disk refused a write.
    """
    shards = _split(stream.entries, max_shard_bytes)
    names = _shard_names(len(shards))
    digests = DigestQueue()
    pending = iter(stream.tensors)
    written = 0
    for entries, file_name in zip(shards, names, strict=True):
        with _ShardWriter(folder / file_name, entries) as writer:
            for entry in entries:
                name, tensor = next(pending)
                _check(entry, name, tensor)
                digests.add(name, tensor)
                writer.add(name, tensor)
                written += entry.num_bytes
                if written >= _BYTES_UNTIL_TRIM:
                    _give_back_freed_memory()
                    written = 0
    assert next(pending, None) is None, "more tensors came than were announced"
    if len(shards) > 1:
        _write_index(folder, shards, names)
    return digests.results()


def _give_back_freed_memory() -> None:
    """Return freed pages to the system.

    glibc keeps what tensors leave behind in pieces that the next ones do not fit into, so that
    memory would grow with the model after all (480 MB for a source of 0.5 GB, 850 MB for 1.5 GB;
    so 340 and 350 MB). Other allocators have no such call.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


class _ShardWriter:
    def __init__(self, path: Path, entries: Sequence[TensorEntry]) -> None:
        # Wide types first keeps every tensor aligned to its own width, as safetensors does.
        order = sorted(entries, key=lambda entry: -entry.dtype.itemsize)
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        self._begin: dict[str, int] = {}
        position = 0
        for entry in order:
            end = position + entry.num_bytes
            header[entry.name] = {
                "dtype": WRITTEN_DTYPES[str(entry.dtype).removeprefix("torch.")],
                "shape": list(entry.shape),
                "data_offsets": [position, end],
            }
            self._begin[entry.name] = position
            position = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _HEADER_ALIGNMENT)
        self._start = struct.pack("<Q", len(text)) + text
        self._path = path

    def __enter__(self) -> _ShardWriter:
        self._file = self._path.open("wb")
        self._file.write(self._start)
        self._worker = ThreadPoolExecutor(max_workers=1)
        self._last: Future[None] | None = None
        return self

    def __exit__(self, *raised: object) -> None:
        try:
            if self._last is not None and raised[0] is None:
                self._last.result()
        finally:
            self._worker.shutdown()
            self._file.close()

    def add(self, name: str, tensor: Tensor) -> None:
        """Have a tensor written; waits for the one before, so that no two are held."""
        if self._last is not None:
            self._last.result()
        self._last = self._worker.submit(self._write, name, tensor)

    def _write(self, name: str, tensor: Tensor) -> None:
        self._file.seek(len(self._start) + self._begin[name])
        self._file.write(bytes_of(tensor))


def _split(entries: Sequence[TensorEntry], max_shard_bytes: int) -> list[list[TensorEntry]]:
    shards: list[list[TensorEntry]] = [[]]
    size = 0
    for entry in entries:
        if shards[-1] and size + entry.num_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.num_bytes
    return shards


def _shard_names(count: int) -> list[str]:
    if count == 1:
        return [SINGLE_NAME]
    return [f"model-{index + 1:05d}-of-{count:05d}.safetensors" for index in range(count)]


def _write_index(
    folder: Path, shards: Sequence[Sequence[TensorEntry]], names: Sequence[str]
) -> None:
    weight_map = {
        entry.name: name for entries, name in zip(shards, names, strict=True) for entry in entries
    }
    total = sum(entry.num_bytes for entries in shards for entry in entries)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _check(entry: TensorEntry, name: str, tensor: Tensor) -> None:
    announced = (entry.name, entry.dtype, entry.shape)
    came = (name, tensor.dtype, tuple(tensor.shape))
    assert announced == came, f"announced {announced}, came {came}"
