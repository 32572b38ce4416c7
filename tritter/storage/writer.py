"""Safetensors folders, written tensor by tensor: memory holds a few tensors, never a shard.

The format puts all names, dtypes, shapes and offsets into a header before the data, so a stream
states them first. safetensors' own writer takes whole dictionaries, hence the few lines here.

Threads share the work by tensors. Each makes, hashes and writes its own a piece at a time: a piece
stays in the processor's cache, and its memory is used again for the next.
"""

from __future__ import annotations

import ctypes
import json
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from io import FileIO
from math import prod
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING

from tritter.errors import TritterError
from tritter.storage.hashing import begun_digest, bytes_of
from tritter.storage.tensors import INDEX_NAME, SINGLE_NAME, WRITTEN_DTYPES

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_HEADER_ALIGNMENT = 8
PIECE_BYTES = 2**20
_LARGE_PIECE_BYTES = 4 * PIECE_BYTES
_MAX_THREADS = 4
HELD_TENSORS = 2  # of those that come whole, while the next one is made
_BYTES_UNTIL_TRIM = 32 * 2**20
_BYTES_UNTIL_SYNC = 16 * 2**20
KEPT_BYTES = 16 * 2**20  # freed memory that the allocator may keep for the next piece
_SYNC_FILE_RANGE_WRITE = 2  # from linux/fs.h


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
class Pieces:
    """A tensor that is made while it is written, in one of the writer's threads.

    Args:
        make: yields its values in row-major order, in pieces of any shape.
        digest: waits for its digest, where somebody hashes the same bytes by the same name.
    """

    make: Callable[[], Iterator[Tensor]]
    digest: Callable[[], str] | None = None

    def whole(self, shape: tuple[int, ...]) -> Tensor:
        """Make all of it."""
        import torch  # headers are written without it

        pieces = [piece.reshape(-1) for piece in self.make()]
        return (pieces[0] if len(pieces) == 1 else torch.cat(pieces)).view(shape)


@dataclass(frozen=True, slots=True)
class TensorStream:
    """Tensors that come one by one, announced beforehand.

    Args:
        entries: what will come, in order.
        tensors: (name, tensor) in the order of the entries.
    """

    entries: tuple[TensorEntry, ...]
    tensors: Iterable[tuple[str, Tensor | Pieces]]

    @classmethod
    def of(cls, pairs: Iterable[tuple[str, Tensor]]) -> TensorStream:
        """Announce tensors that are in memory already."""
        held = list(pairs)
        entries = tuple(TensorEntry(name, t.dtype, tuple(t.shape)) for name, t in held)
        return cls(entries, held)

    def to(self, dtype: torch.dtype) -> TensorStream:
        """Return the stream with its floating-point tensors rounded to `dtype`."""
        entries = tuple(
            replace(entry, dtype=dtype) if entry.dtype.is_floating_point else entry
            for entry in self.entries
        )
        held = zip(entries, self.whole(), strict=True)
        return TensorStream(entries, ((name, value.to(each.dtype)) for each, (name, value) in held))

    def whole(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors; those that come in pieces are put together."""
        for entry, (name, content) in zip(self.entries, self.tensors, strict=True):
            if isinstance(content, Pieces):
                yield name, content.whole(entry.shape)
            else:
                yield name, content


def write_tensors(
    folder: Path, stream: TensorStream, *, max_shard_bytes: int = 5 * 10**9
) -> dict[str, str]:
    """Write a stream in shards of bounded size and return the digest of every tensor.

    One shard gives `model.safetensors`; several give numbered files and an index, as
    transformers reads them.

    Raises:
        OSError: the disk refused a write.
    """
    shards: list[list[TensorEntry]] = [[]]
    size = 0
    for entry in stream.entries:
        if shards[-1] and size + entry.num_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.num_bytes
    names = [f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = [SINGLE_NAME]
    pending = iter(stream.tensors)
    digests: dict[str, Callable[[], str]] = {}
    with _one_thread_each(), _Crew() as crew:
        for entries, file_name in zip(shards, names, strict=True):
            with crew.shard(folder / file_name, entries) as shard:
                for entry in entries:
                    name, content = next(pending)
                    announced: tuple[object, ...] = (entry.name, entry.dtype, entry.shape)
                    came: tuple[object, ...] = (name, *announced[1:])  # all that pieces say yet
                    if not isinstance(content, Pieces):
                        came = (name, content.dtype, tuple(content.shape))
                    assert announced == came, f"announced {announced}, came {came}"
                    digests[name] = crew.write(shard, entry, content)
                    del content
    assert next(pending, None) is None, "more tensors came than were announced"
    if len(shards) > 1:
        weight_map = {
            entry.name: file_name
            for entries, file_name in zip(shards, names, strict=True)
            for entry in entries
        }
        total = sum(entry.num_bytes for entry in stream.entries)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return {name: digest() for name, digest in digests.items()}


def num_threads() -> int:
    """Return how many tensors that come in pieces are made at a time."""
    return min(_MAX_THREADS, os.cpu_count() or 1)


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Let each of our threads compute by itself, and freed pieces stay with the process.

    glibc gives memory back to the system as soon as more of it is free than the largest block
    that was ever freed, so one is; the system's fresh pages cost more than all arithmetic.
    """
    import torch  # headers are written without it

    before = torch.get_num_threads()
    torch.empty(KEPT_BYTES, dtype=torch.uint8)
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Crew:
    """Threads that write tensors into shards."""

    def __init__(self) -> None:
        self._size = num_threads()
        self._threads = ThreadPoolExecutor(self._size)
        self._running: set[Future[str]] = set()
        self._is_over = Event()
        self._until_trim = _BYTES_UNTIL_TRIM

    def __enter__(self) -> _Crew:
        return self

    def __exit__(self, *raised: object) -> None:
        self._is_over.set()
        self._threads.shutdown(cancel_futures=True)

    @contextmanager
    def shard(self, path: Path, entries: Sequence[TensorEntry]) -> Iterator[_Shard]:
        """Open a file; when the block ends, all that was to go into it has been written."""
        with path.open("wb", buffering=0) as file:
            try:
                yield _Shard(file, entries)
                self._join(0)
            except BaseException:
                self._is_over.set()
                raise
            finally:
                wait(self._running)  # a closed file's number may soon be another's

    def write(
        self, shard: _Shard, entry: TensorEntry, content: Tensor | Pieces
    ) -> Callable[[], str]:
        """Have a tensor written, and return what waits for its digest.

        Waits itself while too many others are not written yet.
        """
        future = self._threads.submit(self._write, shard, entry, content)
        self._running.add(future)
        if not isinstance(content, Pieces):
            self._join(HELD_TENSORS)
            return future.result
        self._join(self._size + 1)
        return content.digest or future.result

    def _join(self, most: int) -> None:
        """Wait until no more than so many tensors are not written yet."""
        while len(self._running) > most:
            done, self._running = wait(self._running, return_when=FIRST_COMPLETED)
            for future in done:
                future.result()

    def _write(self, shard: _Shard, entry: TensorEntry, content: Tensor | Pieces) -> str:
        is_hashed = not isinstance(content, Pieces) or content.digest is None
        digest = begun_digest(entry.name, str(entry.dtype), entry.shape)
        place = shard.place(entry)
        for piece in content.make() if isinstance(content, Pieces) else (content,):
            assert piece.dtype == entry.dtype, f"{entry} came as {piece.dtype}"
            held = bytes_of(piece)
            for begin in range(0, len(held), PIECE_BYTES):
                if self._is_over.is_set():
                    return ""
                part = held[begin : begin + PIECE_BYTES]
                if is_hashed:
                    digest.update(part)
                place.write(part)
            if len(held) > _LARGE_PIECE_BYTES:
                self._freed(len(held))
        place.finish()
        return digest.hexdigest()

    def _freed(self, num_bytes: int) -> None:
        """Return freed pages to the system, once in a while.

        glibc keeps what whole tensors leave behind in pieces that the next ones do not fit into,
        so that memory would grow with the model after all (480 MB for a source of 0.5 GB, 850 MB
        for 1.5 GB; so 340 and 350 MB). Other allocators have no such call.
        """
        self._until_trim -= num_bytes
        if self._until_trim <= 0:
            self._until_trim = _BYTES_UNTIL_TRIM
            trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
            if trim is not None:
                trim(0)


class _Shard:
    """A file whose header is written, and in which each tensor has its place."""

    def __init__(self, file: FileIO, entries: Sequence[TensorEntry]) -> None:
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
        start = struct.pack("<Q", len(text)) + text
        self._file = file
        self._data_begin = len(start)
        _Place(file, 0, len(start)).write(memoryview(start))

    def place(self, entry: TensorEntry) -> _Place:
        """Return where in the file a tensor goes."""
        begin = self._data_begin + self._begin[entry.name]
        return _Place(self._file, begin, begin + entry.num_bytes)


class _Place:
    """A stretch of a file, written from its begin to its end."""

    def __init__(self, file: FileIO, begin: int, end: int) -> None:
        self._file, self._end = file, end
        self._written = self._begun = begin

    def write(self, part: memoryview) -> None:
        """Append, and have the disk begin before there is much to wait for at the end."""
        while part:
            count = os.pwrite(self._file.fileno(), part, self._written)
            self._written += count
            part = part[count:]
        if self._written - self._begun >= _BYTES_UNTIL_SYNC:
            self._begin_writeback()

    def finish(self) -> None:
        assert self._written == self._end, f"{self._end - self._written} bytes did not come"
        if self._written - self._begun >= PIECE_BYTES:
            self._begin_writeback()

    def _begin_writeback(self) -> None:
        sync = getattr(ctypes.CDLL(None), "sync_file_range", None)  # Linux has it
        if sync is not None:
            begin, count = map(ctypes.c_int64, (self._begun, self._written - self._begun))
            sync(self._file.fileno(), begin, count, ctypes.c_uint(_SYNC_FILE_RANGE_WRITE))
        self._begun = self._written


def padded(stream: TensorStream, shapes: Mapping[str, tuple[int, ...]]) -> TensorStream:
    """Return a stream whose tensors fill these shapes, by name; others come as they are."""
    if not shapes:
        return stream

    def tensors() -> Iterator[tuple[str, Tensor | Pieces]]:
        for entry, (name, content) in zip(stream.entries, stream.tensors, strict=True):
            if name not in shapes or entry.shape == shapes[name]:
                yield name, content
            elif isinstance(content, Pieces):
                yield name, Pieces(partial(_filled_up, content, entry.shape, shapes[name]))
            else:
                yield name, _padded(content, shapes[name])

    entries = (replace(e, shape=shapes.get(e.name, e.shape)) for e in stream.entries)
    return replace(stream, entries=tuple(entries), tensors=tensors())


def _filled_up(content: Pieces, live: tuple[int, ...], shape: tuple[int, ...]) -> Iterator[Tensor]:
    yield _padded(content.whole(live), shape)


def _padded(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    whole = tensor.new_zeros(shape)
    whole[_within(tensor.shape)] = tensor
    return whole


def stripped(tensor: Tensor, shape: Sequence[int], *, name: str) -> Tensor:
    """Return the tensor that was padded.

    Raises:
        TritterError: behind it stands something else than zeros.
    """
    live = tensor[_within(shape)]
    if tuple(live.shape) != tuple(shape) or live.count_nonzero() != tensor.count_nonzero():
        raise TritterError(
            f"{name} of shape {tuple(tensor.shape)} is not padded with zeros behind {tuple(shape)}"
        )
    return live.contiguous()


def _within(shape: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(size) for size in shape)
