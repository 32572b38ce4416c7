"""One space of a model, grown: which old coordinate each new one copies, and in which share.

For a space of size n that becomes N the map stands for a pair of matrices, E (N×n), by which
producers write, and C (n×N), by which consumers read, with C·E = I. In the sparse form kept here
new coordinate j copies one old coordinate g(j), is written p(j) times as large and is read with
share s(j), so that Σ_{j: g(j)=k} p(j)·s(j) = 1 for each old k. A coordinate without a source is
new: its row of E and its column of C are zero, and a fill says what stands there instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


NO_SOURCE = -1


@dataclass(frozen=True, slots=True, eq=False)
class AxisMap:
    """The sparse pair (E, C) of one space.

    Args:
        old_size: n, the number of old coordinates.
        source: int64 [N], g(j), or -1 where coordinate j is new.
        scale: float64 [N], p(j): what producers write, relative to the source.
        share: float64 [N], s(j): what consumers read, relative to the source.

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
                f"source {int(self.source[~is_inside][0])} lies outside the old space of "
                f"{self.old_size} coordinates; {NO_SOURCE} is allowed for a new one"
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
        """How many copies each old coordinate has.

        Raises:
            ValueError: the coordinates do not all have the same number of copies.
        """
        import torch

        counts = torch.bincount(self.source[self.source >= 0], minlength=self.old_size)
        if int(counts.min()) != int(counts.max()):
            raise ValueError("the coordinates do not all have the same number of copies")
        return int(counts[0])

    @classmethod
    def identity(cls, size: int) -> AxisMap:
        return cls.padded(size, size)

    @classmethod
    def padded(cls, old_size: int, new_size: int) -> AxisMap:
        """Keep the old block in front and add new coordinates behind it."""
        import torch

        source = torch.arange(new_size)
        source[old_size:] = NO_SOURCE
        kept = (source >= 0).double()
        return cls(old_size=old_size, source=source, scale=kept, share=kept.clone())

    @classmethod
    def tiled(cls, old_size: int, new_size: int) -> AxisMap:
        """Repeat the whole block ⌊N/n⌋ times with equal shares; the remainder is new.

        The residual stream has to grow this way: an RMSNorm is exact only if each coordinate has
        the same number of copies, and its backward pass mixes copies of unequal share.
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
        """Let each coordinate stand for `width` consecutive ones (heads of `width` dimensions)."""
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

    def rebalanced(self, *, scale: float) -> AxisMap:
        """Write every coordinate `scale` times as large and let consumers read it back."""
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
