"""Tensors that are smaller in memory than on disk: zeros behind each dimension, and off again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from tritter.errors import TritterError

if TYPE_CHECKING:
    from torch import Tensor

    from tritter.storage.writer import TensorStream


def padded(stream: TensorStream, shapes: Mapping[str, tuple[int, ...]]) -> TensorStream:
    """Return a stream whose tensors fill these shapes, by name; others come as they are."""
    if not shapes:
        return stream

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in stream.tensors:
            if name in shapes and tensor.shape != shapes[name]:
                whole = tensor.new_zeros(shapes[name])
                whole[_within(tensor.shape)] = tensor
                tensor = whole
            yield name, tensor

    entries = (replace(e, shape=shapes.get(e.name, e.shape)) for e in stream.entries)
    return replace(stream, entries=tuple(entries), tensors=tensors())


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
