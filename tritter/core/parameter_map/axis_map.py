"""Maps of one space, and the factors of one dimension of a tensor under such a map."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

# The map of one space: the old coordinate that each new one copies, and its share.
#
# Growing a space from n to N is described by two matrices: producers write through E (N×n) and
# consumers read through C (n×N), with C·E = I. Here both are sparse: new coordinate j copies one
# old coordinate g(j), is written with scale p(j) and read with share s(j), and
# Σ_{j: g(j)=k} p(j)·s(j) = 1 for each old k. A coordinate without a source is new: its row of E
# and its column of C are zero, and a fill defines its values.

if TYPE_CHECKING:
    from torch import Tensor


NO_SOURCE = -1


@dataclass(frozen=True, slots=True, eq=False)
class AxisMap:
    """The sparse pair (E, C) of one space.

    Args:
        old_size: n, the number of old coordinates.
        source: int64 [N], g(j), or -1 if coordinate j is new.
        scale: float64 [N], p(j): factor of producers, relative to the source.
        share: float64 [N], s(j): factor of consumers, relative to the source.

    Raises:
        ValueError: C·E is not the identity, or a source is neither -1 nor in the old space.
    """

    old_size: int
    source: Tensor
    scale: Tensor
    share: Tensor

    def __post_init__(self) -> None:
        import torch

        is_inside = (self.source >= NO_SOURCE) & (self.source < self.old_size)
        if not bool(is_inside.all()):
            raise ValueError(
                f"source {int(self.source[~is_inside][0])} is outside the old space of "
                f"{self.old_size} coordinates; use {NO_SOURCE} for a new one"
            )
        kept = self.source >= 0
        total = torch.zeros(self.old_size, dtype=torch.float64)
        total.index_add_(0, self.source[kept], (self.scale * self.share)[kept])
        if not torch.allclose(total, torch.ones_like(total), rtol=0, atol=1e-12):
            raise ValueError("C·E is not the identity: the shares of some coordinate do not add up")

    @property
    def new_size(self) -> int:
        return self.source.numel()

    @property
    def is_identity(self) -> bool:
        import torch

        return self.new_size == self.old_size and bool(
            (self.source == torch.arange(self.old_size)).all()
            and (self.scale == 1).all()
            and (self.share == 1).all()
        )

    @property
    def num_copies(self) -> int:
        """Number of copies of each old coordinate, of which all have as many."""
        import torch

        counts = torch.bincount(self.source[self.source >= 0], minlength=self.old_size)
        assert int(counts.min()) == int(counts.max())
        return int(counts[0])

    @classmethod
    def identity(cls, size: int) -> AxisMap:
        return cls.padded(size, size)

    @classmethod
    def padded(cls, old_size: int, new_size: int) -> AxisMap:
        """Keep the old block and append new coordinates."""
        import torch

        source = torch.arange(new_size)
        source[old_size:] = NO_SOURCE
        kept = (source >= 0).double()
        return cls(old_size=old_size, source=source, scale=kept, share=kept.clone())

    @classmethod
    def tiled(cls, old_size: int, new_size: int) -> AxisMap:
        """Repeat the whole block ⌊N/n⌋ times with equal shares; the remainder is new.

        The residual stream must grow this way: an RMSNorm is exact only if all coordinates have the
        same number of copies, and its backward pass mixes copies of unequal share.
        """
        import torch

        copies = new_size // old_size
        source = torch.full((new_size,), NO_SOURCE, dtype=torch.int64)
        source[: copies * old_size] = torch.arange(old_size).repeat(copies)
        kept = (source >= 0).double()
        return cls(old_size=old_size, source=source, scale=kept, share=kept / copies)

    @classmethod
    def copied(cls, old_size: int, source: Sequence[int] | Tensor, share: Tensor) -> AxisMap:
        """Copy `source[j]` unscaled to coordinate j and read it with `share[j]`."""
        import torch

        source = torch.as_tensor(source, dtype=torch.int64)
        kept = (source >= 0).double()
        return cls(old_size=old_size, source=source, scale=kept, share=share.double() * kept)

    def repeated(self, width: int) -> AxisMap:
        """Expand each coordinate to `width` consecutive ones (heads of `width` dimensions)."""
        import torch

        inner = torch.arange(width)
        blocks = self.source.repeat_interleave(width)
        source = torch.where(blocks >= 0, blocks * width + inner.repeat(self.new_size), NO_SOURCE)
        return AxisMap(
            old_size=self.old_size * width,
            source=source,
            scale=self.scale.repeat_interleave(width),
            share=self.share.repeat_interleave(width),
        )

    def arranged(self, segments: Sequence[int], rest: int = 0) -> AxisMap:
        """Expand each coordinate to several, the coordinates once per segment.

        Args:
            segments: consecutive entries of a coordinate in each segment.
            rest: number of further entries, which stay.
        """
        import torch

        maps = [self.repeated(width) for width in segments]
        if rest:
            maps.append(AxisMap.identity(rest))
        starts = [sum(each.old_size for each in maps[:place]) for place in range(len(maps))]
        source = [
            torch.where(each.source >= 0, each.source + start, NO_SOURCE)
            for each, start in zip(maps, starts, strict=True)
        ]
        return AxisMap(
            old_size=sum(each.old_size for each in maps),
            source=torch.cat(source),
            scale=torch.cat([each.scale for each in maps]),
            share=torch.cat([each.share for each in maps]),
        )

    def rebalanced(self, *, scale: float) -> AxisMap:
        """Multiply the scale of producers by `scale` and divide the share of consumers by it."""
        return AxisMap(
            old_size=self.old_size,
            source=self.source,
            scale=self.scale * scale,
            share=self.share / scale,
        )

    def producer_matrix(self) -> Tensor:
        """Return E, float64 [N, n]."""
        return self._dense(self.scale)

    def consumer_matrix(self) -> Tensor:
        """Return C, float64 [n, N]."""
        return self._dense(self.share).T

    def _dense(self, values: Tensor) -> Tensor:
        import torch

        dense = torch.zeros(self.new_size, self.old_size, dtype=torch.float64)
        kept = (self.source >= 0).nonzero().squeeze(1)
        dense[kept, self.source[kept]] = values[kept]
        return dense


@dataclass(frozen=True, slots=True, eq=False)
class AxisFactor:
    """One dimension of one tensor under an axis map.

    Args:
        index: int64 [N], the source coordinate of each coordinate; -1 if it is new.
        weight: float64 [N], factor on weights, anchors, averages.
        gradient: float64 [N], factor on gradients; squared for second moments and Fisher.
        squared: float64 [N], factor on squared gradients if it is not the square: a coordinate
            that processes a fraction of the tokens gets that fraction of the variance, which
            exceeds the fraction squared.
    """

    index: Tensor
    weight: Tensor
    gradient: Tensor
    squared: Tensor | None = None

    @classmethod
    def writes(cls, axis_map: AxisMap) -> AxisFactor:
        """Return the factor of a linear producer: p on weights, s on gradients."""
        return cls(axis_map.source, axis_map.scale, axis_map.share)

    @classmethod
    def writes_nonlinear(cls, axis_map: AxisMap) -> AxisFactor:
        """Return the factor of a producer before a nonlinearity: 1 on weights, p·s on gradients."""
        kept = (axis_map.source >= 0).double()
        return cls(axis_map.source, kept, axis_map.scale * axis_map.share)

    @classmethod
    def writes_into_norm(cls, axis_map: AxisMap, *, scale: float) -> AxisFactor:
        """Return the factor of a producer whose scale a following norm removes.

        Args:
            axis_map: map of the producer's space.
            scale: factor of the producer that compensates the norm's new eps.
        """
        kept = (axis_map.source >= 0).double()
        return cls(axis_map.source, kept * scale, axis_map.scale * axis_map.share / scale)

    @classmethod
    def reads(cls, axis_map: AxisMap) -> AxisFactor:
        """Return the factor of a consumer: s on weights, p on gradients."""
        return cls(axis_map.source, axis_map.share, axis_map.scale)

    @classmethod
    def gain(cls, output: AxisMap, *, rms_ratio: float) -> AxisFactor:
        """Return the factor of a norm's gain, which reads one space and writes another.

        Args:
            output: map of the space that the norm writes.
            rms_ratio: RMS of the expanded input divided by RMS of the old input.
        """
        return cls(output.source, output.scale * rms_ratio, output.share / rms_ratio)

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """The tensors that determine the factor."""
        parts = (self.index, self.weight, self.gradient)
        return parts if self.squared is None else (*parts, self.squared)

    @property
    def is_identity(self) -> bool:
        import torch

        return bool(
            (self.index == torch.arange(self.index.numel())).all()
            and (self.weight == 1).all()
            and (self.gradient == 1).all()
        )

    @property
    def is_new(self) -> Tensor:
        """Mask [N] of coordinates without a source."""
        return self.index < 0

    @property
    def is_duplicate(self) -> Tensor:
        """Mask [N] of coordinates whose source an earlier coordinate already copies."""
        import torch

        seen: set[int] = set()
        flags = []
        for source in self.index.tolist():
            flags.append(source >= 0 and source in seen)
            seen.add(source)
        return torch.tensor(flags, dtype=torch.bool)


class Quantity(Enum):
    """The quantity in a tensor, which determines the factors of its map."""

    WEIGHT = "weight"  # also anchors, averages, teachers
    GRADIENT = "gradient"  # also Adam's first moment
    SQUARED_GRADIENT = "squared_gradient"  # Adam's second moment, diagonal Fisher
    PATH_INTEGRAL = "path_integral"  # gradient × step, synaptic intelligence's ω
    PENALTY = "penalty"  # a Fisher that penalises the same change of the function equally
    DISPLACEMENT = "displacement"  # the difference of two states of a weight

    def factor(self, axis: AxisFactor) -> Tensor:
        """Return the float64 [N] factors of this quantity along one axis."""
        import torch

        match self:
            case Quantity.WEIGHT | Quantity.DISPLACEMENT:
                return axis.weight
            case Quantity.GRADIENT:
                return axis.gradient
            case Quantity.SQUARED_GRADIENT:
                return axis.gradient.square() if axis.squared is None else axis.squared
            case Quantity.PATH_INTEGRAL:
                return axis.weight * axis.gradient
            case Quantity.PENALTY:
                # share / weight², where share = weight · gradient adds up to 1 over the copies
                return torch.where(axis.weight != 0, axis.gradient / axis.weight, 0.0)
