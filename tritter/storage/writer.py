"""Write safetensors folders tensor by tensor, with a few tensors in memory and never a shard.

The header of the format lists all names, dtypes, shapes and offsets before the data, so a stream
announces its tensors first. The writer of the safetensors library needs whole dictionaries.

Each thread computes, hashes and writes one tensor at a time, piece by piece. A piece fits into the
CPU cache, and its memory is reused for the next piece.
"""

from __future__ import annotations

import ctypes
import json
import os
import struct
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from io import FileIO
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, ClassVar

from tritter.errors import TritterError
from tritter.storage.hashing import bytes_of, start_digest
from tritter.storage.tensors import INDEX_NAME, SINGLE_NAME, WRITTEN_DTYPES, TensorHeader

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_HEADER_ALIGNMENT = 8
_PIECE_BYTES = 2**20
_LARGE_PIECE_BYTES = 4 * _PIECE_BYTES
_MAX_THREADS = 4
_BYTES_UNTIL_TRIM = 32 * 2**20
_BYTES_UNTIL_SYNC = 16 * 2**20
_SYNC_FILE_RANGE_WRITE = 2  # from linux/fs.h


@dataclass(frozen=True, slots=True)
class Pieces:
    """A tensor that is computed while it is written, in one of the writer's threads.

    Args:
        make: Yields its values in row-major order, in pieces of any shape.
        digest: Waits for its checksum, if the same bytes are hashed elsewhere under this name.
    """

    make: Callable[[], Iterator[Tensor]]
    digest: Callable[[], str] | None = None

    def whole(self, shape: tuple[int, ...]) -> Tensor:
        """Compute the whole tensor."""
        import torch  # writing headers does not need it

        pieces = [piece.reshape(-1) for piece in self.make()]
        return (pieces[0] if len(pieces) == 1 else torch.cat(pieces)).view(shape)


@dataclass(frozen=True, slots=True)
class TensorStream:
    """A stream of tensors that is announced in advance.

    Args:
        entries: Headers of the tensors, in order.
        tensors: (name, tensor) in the same order.
    """

    # While they are written: whole tensors that wait in memory for the next one to be computed, and
    # freed memory that the allocator may keep for the next piece
    MAX_PENDING: ClassVar[int] = 2
    KEPT_BYTES: ClassVar[int] = 16 * 2**20

    entries: tuple[TensorHeader, ...]
    tensors: Iterable[tuple[str, Tensor | Pieces]]

    @classmethod
    def of(cls, pairs: Iterable[tuple[str, Tensor]]) -> TensorStream:
        """Return a stream of tensors that are already in memory."""
        tensors = list(pairs)
        entries = tuple(TensorHeader.of(name, t.dtype, tuple(t.shape)) for name, t in tensors)
        return cls(entries, tensors)

    def to(self, dtype: torch.dtype, *, unrounded: Collection[str] = ()) -> TensorStream:
        """Return the stream with its floating-point tensors in `dtype`, except `unrounded` ones."""
        entries = tuple(
            TensorHeader.of(each.name, dtype, each.shape)
            if each.torch_dtype.is_floating_point and each.name not in unrounded
            else each
            for each in self.entries
        )
        pairs = zip(entries, self.whole(), strict=True)
        tensors = ((name, value.to(entry.torch_dtype)) for entry, (name, value) in pairs)
        return TensorStream(entries, tensors)

    def whole(self) -> Iterator[tuple[str, Tensor]]:
        """Yield all tensors whole, joining those that come in pieces."""
        for entry, (name, content) in zip(self.entries, self.tensors, strict=True):
            if isinstance(content, Pieces):
                yield name, content.whole(entry.shape)
            else:
                yield name, content

    def padded(self, shapes: Mapping[str, tuple[int, ...]]) -> TensorStream:
        """Return the stream with tensors zero-padded to the given shapes.

        Args:
            shapes: Tensor name → shape; other tensors are unchanged.
        """
        if not shapes:
            return self

        def tensors() -> Iterator[tuple[str, Tensor | Pieces]]:
            for entry, (name, content) in zip(self.entries, self.tensors, strict=True):
                if name not in shapes or entry.shape == shapes[name]:
                    yield name, content
                elif isinstance(content, Pieces):
                    yield name, Pieces(partial(_fill_up, content, entry.shape, shapes[name]))
                else:
                    yield name, _padded(content, shapes[name])

        entries = (replace(e, shape=shapes.get(e.name, e.shape)) for e in self.entries)
        return TensorStream(tuple(entries), tensors())

    def write(self, folder: Path, *, max_shard_bytes: int = 5 * 10**9) -> dict[str, str]:
        """Write the tensors in shards of bounded size.

        One shard becomes `model.safetensors`. Several shards become numbered files and an index in
        the format of transformers.

        Args:
            folder: Existing folder to write to.
            max_shard_bytes: Maximum size of a shard; a larger tensor has its own shard.

        Returns:
            Tensor name → checksum.
        """
        shards: list[list[TensorHeader]] = [[]]
        size = 0
        for entry in self.entries:
            num_bytes = entry.num_bytes
            if shards[-1] and size + num_bytes > max_shard_bytes:
                shards.append([])
                size = 0
            shards[-1].append(entry)
            size += num_bytes
        names = [
            f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)
        ]
        if len(shards) == 1:
            names = [SINGLE_NAME]
        pending = iter(self.tensors)
        digests: dict[str, Callable[[], str]] = {}
        with _one_thread_each(), _WriterPool() as crew:
            for entries, file_name in zip(shards, names, strict=True):
                with crew.shard(folder / file_name, entries) as shard:
                    for entry in entries:
                        name, content = next(pending)
                        announced, came = (entry.name, entry.shape), (name, entry.shape)
                        if not isinstance(content, Pieces):  # of pieces, the shape is unknown
                            came = (name, tuple(content.shape))
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
            total = sum(entry.num_bytes for entry in self.entries)
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        return {name: digest() for name, digest in digests.items()}


def num_threads() -> int:
    """Return the number of threads that compute tensors in pieces."""
    return min(_MAX_THREADS, os.cpu_count() or 1)


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Limit torch to one thread per worker thread, and let the process keep freed pieces.

    glibc returns free memory to the system once it exceeds the largest block freed so far.
    Freeing a large block here raises that threshold: fresh pages cost more than the arithmetic.
    """
    import torch  # writing headers does not need it

    before = torch.get_num_threads()
    torch.empty(TensorStream.KEPT_BYTES, dtype=torch.uint8)
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _WriterPool:
    """Threads that write tensors into shards."""

    def __init__(self) -> None:
        self._size = num_threads()
        self._threads = ThreadPoolExecutor(self._size)
        self._running: set[Future[str]] = set()
        self._is_over = Event()
        self._until_trim = _BYTES_UNTIL_TRIM

    def __enter__(self) -> _WriterPool:
        return self

    def __exit__(self, *raised: object) -> None:
        self._is_over.set()
        self._threads.shutdown(cancel_futures=True)

    @contextmanager
    def shard(self, path: Path, entries: Sequence[TensorHeader]) -> Iterator[_Shard]:
        """Open a shard; the block ends after all of its tensors are written."""
        with path.open("wb", buffering=0) as file:
            try:
                yield _Shard(file, entries)
                self._join(0)
            except BaseException:
                self._is_over.set()
                raise
            finally:
                wait(self._running)  # the system may reuse the descriptor of a closed file

    def write(
        self, shard: _Shard, entry: TensorHeader, content: Tensor | Pieces
    ) -> Callable[[], str]:
        """Start writing a tensor and return a function that waits for its checksum.

        Blocks while too many other tensors are not written yet.
        """
        future = self._threads.submit(self._write, shard, entry, content)
        self._running.add(future)
        if not isinstance(content, Pieces):
            self._join(TensorStream.MAX_PENDING)
            return future.result
        self._join(self._size + 1)
        return content.digest or future.result

    def _join(self, most: int) -> None:
        """Wait until at most `most` tensors are not written yet."""
        while len(self._running) > most:
            done, self._running = wait(self._running, return_when=FIRST_COMPLETED)
            for future in done:
                future.result()

    def _write(self, shard: _Shard, entry: TensorHeader, content: Tensor | Pieces) -> str:
        is_hashed = not isinstance(content, Pieces) or content.digest is None
        digest = start_digest(entry.name, f"torch.{entry.dtype}", entry.shape)
        span = shard.span(entry)
        for piece in content.make() if isinstance(content, Pieces) else (content,):
            assert piece.dtype == entry.torch_dtype, f"{entry} came as {piece.dtype}"
            content_bytes = bytes_of(piece)
            for begin in range(0, len(content_bytes), _PIECE_BYTES):
                if self._is_over.is_set():
                    return ""
                part = content_bytes[begin : begin + _PIECE_BYTES]
                if is_hashed:
                    digest.update(part)
                span.write(part)
            if len(content_bytes) > _LARGE_PIECE_BYTES:
                self._trim(len(content_bytes))
        span.finish()
        return digest.hexdigest()

    def _trim(self, num_bytes: int) -> None:
        """Return freed pages to the system from time to time.

        glibc's heap fragments: without trimming, memory grows with the model (480 MB for a model
        of 0.5 GB, 850 MB for 1.5 GB; with trimming 340 and 350 MB). Other allocators have no such
        call.
        """
        self._until_trim -= num_bytes
        if self._until_trim <= 0:
            self._until_trim = _BYTES_UNTIL_TRIM
            trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
            if trim is not None:
                trim(0)


class _Shard:
    """A safetensors file with its header written and a span of bytes for each tensor."""

    def __init__(self, file: FileIO, entries: Sequence[TensorHeader]) -> None:
        # Wide dtypes first, as in safetensors: this aligns every tensor to its item size.
        order = sorted(entries, key=lambda entry: -entry.torch_dtype.itemsize)
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        self._spans: dict[str, tuple[int, int]] = {}
        position = 0
        for entry in order:
            end = position + entry.num_bytes
            header[entry.name] = {
                "dtype": WRITTEN_DTYPES[entry.dtype],
                "shape": list(entry.shape),
                "data_offsets": [position, end],
            }
            self._spans[entry.name] = (position, end)
            position = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _HEADER_ALIGNMENT)
        start = struct.pack("<Q", len(text)) + text
        self._file = file
        self._data_begin = len(start)
        _Span(file, 0, len(start)).write(memoryview(start))

    def span(self, entry: TensorHeader) -> _Span:
        """Return the span of a tensor in the file."""
        begin, end = self._spans[entry.name]
        return _Span(self._file, self._data_begin + begin, self._data_begin + end)


class _Span:
    """A span of a file that is written from begin to end."""

    def __init__(self, file: FileIO, begin: int, end: int) -> None:
        self._file, self._end = file, end
        self._written = self._writeback_end = begin

    def write(self, part: memoryview) -> None:
        """Append bytes, and start writeback early to shorten the final sync."""
        while part:
            count = os.pwrite(self._file.fileno(), part, self._written)
            self._written += count
            part = part[count:]
        if self._written - self._writeback_end >= _BYTES_UNTIL_SYNC:
            self._begin_writeback()

    def finish(self) -> None:
        assert self._written == self._end, f"{self._end - self._written} bytes are missing"
        if self._written - self._writeback_end >= _PIECE_BYTES:
            self._begin_writeback()

    def _begin_writeback(self) -> None:
        sync = getattr(ctypes.CDLL(None), "sync_file_range", None)  # Linux has it
        if sync is not None:
            begin, count = map(
                ctypes.c_int64, (self._writeback_end, self._written - self._writeback_end)
            )
            sync(self._file.fileno(), begin, count, ctypes.c_uint(_SYNC_FILE_RANGE_WRITE))
        self._writeback_end = self._written


def _fill_up(content: Pieces, live: tuple[int, ...], shape: tuple[int, ...]) -> Iterator[Tensor]:
    yield _padded(content.whole(live), shape)


def _padded(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    whole = tensor.new_zeros(shape)
    whole[_within(tensor.shape)] = tensor
    return whole


def stripped(tensor: Tensor, shape: Sequence[int], *, name: str) -> Tensor:
    """Remove zero padding from a tensor.

    Args:
        tensor: The padded tensor.
        shape: Shape without padding.
        name: Name of the tensor, for error messages.
    """
    live = tensor[_within(shape)]
    if tuple(live.shape) != tuple(shape) or live.count_nonzero() != tensor.count_nonzero():
        raise TritterError(
            f"{name} of shape {tuple(tensor.shape)} is not zero outside {tuple(shape)}"
        )
    return live.contiguous()


def _within(shape: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(size) for size in shape)
