"""Layout of logical tensors in stored ones: on disk as on the hub, or in memory.

On disk each matrix of each expert is a tensor. In memory, and in files saved from memory, the
experts of a layer are stacked in one tensor. Dense families have the same layout in both, except
for the name of a head. Some families stack matrices with the same input (q, k and v; gate and up)
in one tensor; some store matrices transposed. A logical tensor always has its outputs first:
`pack` and `unpack` transpose it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from tritter.core.families.logical import Axis, LogicalTensor
from tritter.errors import RequestError, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor

LayoutKind = Literal["hub", "live"]
_Read = Callable[[str], "Tensor"]
# Keyword → kinds of logical tensors, or their prefixes; norms belong to the module they feed
_PARTS: dict[str, tuple[str, ...]] = {
    "embed": ("embed",),
    "head": ("head",),
    "norm": ("final_norm",),
    "attention": ("attention",),
    "ffn": ("ffn", "shared_expert"),
    "experts": ("experts",),
    "router": ("router",),
}
_RANGE = re.compile(r"(\d{1,9})(?:\s*-\s*(\d{1,9}))?")
_ALLOWED = f"must be layer numbers, such as 0 or 0-3, or any of {', '.join(_PARTS)}"


@dataclass(frozen=True, slots=True)
class Part:
    """One logical tensor within a stored one.

    Args:
        tensor: the logical tensor.
        index: its index in the stored tensor; empty if it is the whole.
    """

    tensor: LogicalTensor
    index: tuple[int | slice, ...] = ()

    def of(self, stored: Tensor) -> Tensor:
        """Return this part of a stored tensor, as a view."""
        return self.transposed(stored[self.index] if self.index else stored)

    def transposed(self, value: Tensor) -> Tensor:
        """Convert a value between its stored and its logical orientation."""
        return value.T if self.tensor.is_transposed and value.ndim else value


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A stored tensor: one logical tensor, or several.

    Args:
        name: on disk, or in the model's memory.
        shape: of the stored tensor.
        parts: its logical tensors.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]

    @property
    def layer(self) -> int | None:
        return self.parts[0].tensor.layer

    @property
    def is_whole(self) -> bool:
        """It holds one logical tensor."""
        return not self.parts[0].index

    @property
    def is_of_experts(self) -> bool:
        """It holds the matrices of a layer's experts."""
        return not self.is_whole and self.parts[0].tensor.is_per_expert

    @property
    def parts_in_order(self) -> tuple[Part, ...]:
        """The parts in row-major order."""

        def start(part: Part) -> tuple[int, ...]:
            return tuple((i.start or 0) if isinstance(i, slice) else i for i in part.index)

        return tuple(sorted(self.parts, key=start))

    @property
    def is_transposed(self) -> bool:
        """Its inputs come first."""
        return self.parts[0].tensor.is_transposed

    @property
    def axes(self) -> tuple[Axis, ...]:
        """The axes of its first part, in stored order."""
        axes = self.parts[0].tensor.axes
        return axes[::-1] if self.is_transposed else axes

    def pack(self, read: _Read) -> Tensor:
        """Return the stored tensor, with its parts read by logical name."""
        if self.is_whole:
            (part,) = self.parts
            value = read(part.tensor.name)
            return part.transposed(value).contiguous() if self.is_transposed else value
        stored: Tensor | None = None
        for part in self.parts:
            value = part.transposed(read(part.tensor.name))
            if stored is None:
                stored = value.new_empty(self.shape)
            stored[part.index] = value
        assert stored is not None
        return stored

    def unpack(self, stored: Tensor) -> Iterator[tuple[LogicalTensor, Tensor]]:
        """Yield each logical tensor and its values, as a view."""
        for part in self.parts:
            yield part.tensor, part.of(stored)


def pack_all(tensors: Iterable[StoredTensor], values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return stored name → tensor, for values by logical name.

    A stored tensor is absent if none of its parts has a value; parts without a value are zero.
    """
    packed = {}
    for stored in tensors:
        known = [part for part in stored.parts if part.tensor.name in values]
        if known:
            zero = values[known[0].tensor.name].new_zeros(())
            parts = {p.tensor.name: values.get(p.tensor.name, zero) for p in stored.parts}
            packed[stored.name] = stored.pack(parts.__getitem__)
    return packed


def unpack_all(tensors: Iterable[StoredTensor], values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return logical name → tensor, for values by stored name; absent ones stay absent."""
    return {
        tensor.name: value
        for stored in tensors
        if stored.name in values
        for tensor, value in stored.unpack(values[stored.name])
    }


@dataclass(frozen=True, slots=True)
class ParameterSelection:
    """A selection of parameters by layer and kind.

    `embed` and `head` both select a tied embedding.

    Args:
        parts: keys of `_PARTS`.
        layers: first and last layer of each range.
    """

    parts: tuple[str, ...]
    layers: tuple[tuple[int, int], ...]

    @classmethod
    def read(cls, words: Sequence[str | int]) -> ParameterSelection:
        """Parse words such as `0-3`, `7` and `embed`; a word may list several, with commas."""
        single = [each.strip() for word in words for each in str(word).split(",")]
        if not single:
            raise RequestError(f"it is empty; {_ALLOWED}.")
        parts, layers = [], []
        for word in single:
            if word in _PARTS:
                parts.append(word)
                continue
            found = _RANGE.fullmatch(word)
            first, last = (int(n or found[1]) for n in found.groups()) if found else (1, 0)
            if first > last:
                raise RequestError(f"{word or 'nothing'}: {_ALLOWED}.{did_you_mean(word, _PARTS)}")
            layers.append((first, last))
        return cls(tuple(parts), tuple(layers))

    @property
    def last_layer(self) -> int:
        """The highest layer number; -1 if there is none."""
        return max((last for _, last in self.layers), default=-1)

    def has(self, tensor: LogicalTensor, *, is_tied: bool) -> bool:
        """Return True if a tensor is selected."""
        layer = tensor.layer
        if layer is not None and any(first <= layer <= last for first, last in self.layers):
            return True
        if is_tied and tensor.kind == "embed" and "head" in self.parts:
            return True
        kinds = [kind for word in self.parts for kind in _PARTS[word]]
        return any(
            tensor.kind == kind or tensor.kind.startswith((f"{kind}.", f"{kind}_"))
            for kind in kinds
        )
