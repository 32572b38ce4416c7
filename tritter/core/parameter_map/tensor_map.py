"""Maps of spaces and tensors: the source, factors and fill of each expanded tensor."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, Protocol

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
        """Number of copies of each old coordinate.

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


class OtherTensor(Protocol):
    """A tensor that is not of the source model: of another checkpoint, or derived from data."""

    @property
    def digest(self) -> str:
        """What determines the values, as a checksum."""
        ...

    def read(self) -> Tensor:
        """Return the values; they may be computed here."""
        ...


@dataclass(frozen=True, slots=True)
class Fill:
    """The values of coordinates without a source.

    Args:
        kind: `zero`; `random` (normal, mean 0, `std`); `matched` (normal with the mean and standard
            deviation of the source); `mean` (of the mapped values, or 1 if they are all zero: after
            zero weights a gain of zero would have no gradient); `row_mean` (mean of the source's
            rows); `rows` (weighted sums of the source's rows); `quiet` (the mean row, made as
            long as rows are); `copy` (another tensor mapped by `donor`); `given` (`values`); or
            `others` (the mean of tensors that are not of the source model).
        std: standard deviation of `random`.
        seed: of `random`, `matched` and `rows`; each tensor has its own.
        scale: factor on the source's statistics in `matched`.
        repeat: number of consecutive rows that share one draw of `random` (router rows of a group).
        donor: a map from another tensor to the whole target, with its own fill.
        values: of `given`: one per entry without a source, in the target's order. Of `rows`:
            float64 [n, k], the weights of `index`.
        index: of `rows`: int64 [n, k], the summed rows of each of the n new rows; −1 is the
            row of `quiet`, and −2 at the start a random row as in `matched`.
        others: of `others`: tensors in the shape of a target without a source.
    """

    kind: Literal[
        "zero", "random", "matched", "mean", "row_mean", "rows", "quiet", "copy", "given", "others"
    ] = "zero"
    std: float = 0.0
    seed: int = 0
    scale: float = 1.0
    repeat: int = 1
    donor: TensorMap | None = None
    values: Tensor | None = field(default=None, compare=False)
    index: Tensor | None = field(default=None, compare=False)
    others: tuple[OtherTensor, ...] = field(default=(), compare=False)

    def description(self) -> list[object]:
        """Return the fill as plain data, for checksums."""
        plain: list[object] = [self.kind, self.std, self.seed]
        if self.scale != 1 or self.repeat != 1:
            plain += [self.scale, self.repeat]
        if self.values is not None:
            index = () if self.index is None else (self.index,)
            plain.append(_tensor_digest(self.values, *index))
        plain += [other.digest for other in self.others]
        return plain if self.donor is None else [*plain, self.donor.description()]


@dataclass(frozen=True, slots=True, eq=False)
class TensorMap:
    """How one target tensor derives from one source tensor, or from several.

    Args:
        source: logical name in the source model; in a chain, the map before this one; None for a
            tensor without a source, which only consists of its fill.
        axes: one factor per dimension; None leaves the dimension unchanged.
        fill: of coordinates without a source.
        shape: of a target without a source.
        blend: further sources, which are averaged with the first.
        is_zeroed: keep the shape and zero the values (the output projections of an identity
            block); with an offset, the sum is zero.
        state: `carry` maps moments and importances; `fresh` resets them.
        noise: standard deviation of the noise on further copies, relative to the source's.
        noise_seed: seed of that noise.
        is_copy: the whole tensor is a further copy of another target tensor.
        offset: constant that the model adds to the weight; the factors act on the sum (Gemma's
            norms: 1).
    """

    source: str | TensorMap | None
    axes: tuple[AxisFactor | None, ...] = ()
    fill: Fill = Fill()
    shape: tuple[int, ...] = ()
    blend: tuple[str | TensorMap, ...] = ()
    is_zeroed: bool = False
    state: Literal["carry", "fresh"] = "carry"
    noise: float = 0.0
    noise_seed: int = 0
    is_copy: bool = False
    offset: float = 0.0

    @classmethod
    def created(cls, shape: tuple[int, ...], fill: Fill) -> TensorMap:
        """Return the map of a tensor that the source model lacks."""
        return cls(source=None, shape=shape, fill=fill, state="fresh")

    @property
    def origin(self) -> str | None:
        """The tensor of the first model that the target derives from, if any."""
        return self.source.origin if isinstance(self.source, TensorMap) else self.source

    @property
    def is_verbatim(self) -> bool:
        """The weights equal those of `origin`, bit for bit."""
        before = self.source
        return self.keeps_weights and (not isinstance(before, TensorMap) or before.is_verbatim)

    def after(self, maps: Mapping[str, TensorMap]) -> TensorMap:
        """Return the chain of this map after the maps that make its source model.

        The maps are applied one by one: fills, noise and mean moments depend on the input of each,
        so the factors of two maps cannot be multiplied.
        """

        def chained(source: str | TensorMap) -> str | TensorMap:
            found = maps[source] if isinstance(source, str) else source.after(maps)
            return found.source if found._is_identity and found.source is not None else found

        if self._is_identity and isinstance(self.source, str):
            return maps[self.source]
        donor = self.fill.donor
        return replace(
            self,
            source=None if self.source is None else chained(self.source),
            blend=tuple(map(chained, self.blend)),
            fill=self.fill if donor is None else replace(self.fill, donor=donor.after(maps)),
        )

    @property
    def keeps_weights(self) -> bool:
        """The weights equal those of `source`."""
        is_computed = self.noise or self.blend or self.is_zeroed or self.source is None
        return not is_computed and not any(self.axes)

    @property
    def _is_identity(self) -> bool:
        """The target equals the source, including its state."""
        return self.keeps_weights and self.state == "carry" and not self.is_copy

    def description(self) -> list[object]:
        """Return the map as plain data, with tensors as their SHA-256, for checksums."""
        axes = [
            None if axis is None else [_tensor_digest(*axis.parts), axis.index.numel()]
            for axis in self.axes
        ]
        noise = [self.noise, self.noise_seed]
        fill = self.fill.description()
        source, *blend = (
            each.description() if isinstance(each, TensorMap) else each
            for each in (self.source, *self.blend)
        )
        plain: list[object] = [source, axes, fill, self.is_zeroed, self.state, *noise]
        # Rare fields are omitted if empty, so that old checksums stay valid
        rare = {"shape": self.shape, "blend": blend, "is_copy": self.is_copy, "offset": self.offset}
        extra = {name: value for name, value in rare.items() if value}
        return [*plain, extra] if extra else plain


@dataclass(frozen=True, slots=True, eq=False)
class ParameterMap:
    """The maps of all logical tensors of the target, and the source layer of each layer.

    `first.then(second)` composes several expansions.

    Args:
        tensors: target logical name → its map, in the target's order.
        layer_sources: source layer of each target layer.
    """

    tensors: Mapping[str, TensorMap]
    layer_sources: tuple[int, ...]

    @classmethod
    def identity(cls, names: Iterable[str], *, num_layers: int) -> ParameterMap:
        """Return the identity map of some tensors."""
        return cls({name: TensorMap(source=name) for name in names}, tuple(range(num_layers)))

    def then(self, other: ParameterMap) -> ParameterMap:
        """Return the composition: this map, then the other."""
        return ParameterMap(
            {name: tensor_map.after(self.tensors) for name, tensor_map in other.tensors.items()},
            tuple(self.layer_sources[layer] for layer in other.layer_sources),
        )

    def digest(self) -> str:
        """Return the SHA-256 of maps, fills and seeds; equal digests mean equal expansions."""
        plain = {name: tensor_map.description() for name, tensor_map in self.tensors.items()}
        text = json.dumps([plain, self.layer_sources], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def _tensor_digest(*tensors: Tensor) -> str:
    import torch

    digest = hashlib.sha256()
    for tensor in tensors:
        flat = tensor.detach().cpu().contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy().tobytes())  # numpy has no bfloat16
    return digest.hexdigest()
