"""Tensors that are smaller in memory than on disk: zeros behind each dimension, and off again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from tritter.errors import TritterError
from tritter.storage.writer import Pieces

if TYPE_CHECKING:
    from torch import Tensor

    from tritter.storage.writer import TensorStream


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
