"""Maps of tensors: source, factors and fill of each expanded tensor, applied to all values on it.

The values are weights, gradients, moments and importances.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from tritter.core.parameter_map.axis_map import AxisFactor, Quantity

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Read = Callable[[str], "Tensor"]


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
        others: of `others`: checksum of what determines a tensor → function that returns it, in
            the shape of a target without a source.
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
    others: Mapping[str, Callable[[], Tensor]] = field(default_factory=dict, compare=False)

    def new_rows(self, source: Tensor) -> Callable[[int, int], Tensor]:
        """Return a function that computes new rows from one number to another, float64.

        The kind is `rows` or `quiet`.

        Args:
            source: the old rows, [n, ...].
        """
        import torch

        quiet = _quiet_row(source)
        if self.kind == "quiet":
            return lambda begin, end: quiet.expand(end - begin, *quiet.shape)
        index, weights = self.index, self.values
        assert index is not None and weights is not None, "sums of rows need weights"
        shape = (-1, index.shape[1], *[1] * (source.ndim - 1))
        old = source.double() if bool((index == -2).any()) else quiet[None]  # a copy only if needed
        draw = normal_numbers(self.seed, std=float(old.std()), mean=float(old.mean()))

        def sums(begin: int, end: int) -> Tensor:
            chosen = index[begin:end].to(source.device)  # [m, k]
            taken = source[chosen.clamp(min=0)].double()  # [m, k, ...]
            taken = torch.where((chosen < 0).view(shape), quiet, taken)
            made = (taken * weights[begin:end].to(source.device).view(shape)).sum(dim=1)
            for number in (chosen[:, 0] == -2).nonzero().flatten().tolist():  # equal in any blocks
                made[number] = draw(source.shape[1:])
            return made

        return sums

    def description(self) -> list[object]:
        """Return the fill as plain data, for checksums."""
        plain: list[object] = [self.kind, self.std, self.seed]
        if self.scale != 1 or self.repeat != 1:
            plain += [self.scale, self.repeat]
        if self.values is not None:
            index = () if self.index is None else (self.index,)
            plain.append(_tensor_digest(self.values, *index))
        plain += self.others
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

    def mapped(self, read: Read, *, quantity: Quantity = Quantity.WEIGHT) -> Tensor:
        """Return the target tensor, with its sources read by logical name.

        Quantities other than weights ignore fills; for a blend they take the mean too.
        """

        def value_of(source: str | TensorMap) -> Tensor:
            if isinstance(source, str):
                return read(source)
            return source.mapped(read, quantity=quantity)

        source = None if self.source is None else value_of(self.source)
        if source is not None and self.blend:
            total = source.to(compute_dtype(source))
            for other in self.blend:
                total = total + value_of(other)
            source = (total / (1 + len(self.blend))).to(source.dtype)
        donor_map = self.fill.donor
        donor = None
        if donor_map is not None and quantity is Quantity.WEIGHT:
            donor = donor_map.mapped(read)
        return self.apply(source, quantity=quantity, donor=donor)

    def rounded_weight(self, read: Read, dtype: torch.dtype) -> Tensor:
        """Return the target's weights, computed in float32 or wider and rounded once, at the end.

        Weights that no map changes keep their bits.
        """
        import torch

        def read_wide(name: str) -> Tensor:
            tensor = read(name)
            return tensor.to(torch.promote_types(tensor.dtype, torch.float32))

        origin = self.origin if self.is_verbatim else None
        return (self.mapped(read_wide) if origin is None else read(origin)).to(dtype)

    def apply(
        self,
        source: Tensor | None,
        *,
        quantity: Quantity = Quantity.WEIGHT,
        donor: Tensor | None = None,
    ) -> Tensor:
        """Return the target tensor for `source`.

        Weights get their fills. Other quantities are zero in coordinates without a source, and
        everywhere if the map's state is `fresh`. Factors are applied in float32 (float64 for a
        float64 source) on the source's device; the result has the source's dtype.

        Args:
            source: the source tensor; None if the map has no source.
            quantity: of the values.
            donor: values of a fill of kind `copy`, in the target's shape.
        """
        import torch

        if source is None:
            created = torch.zeros(self.shape)
            nowhere = torch.zeros(self.shape, dtype=torch.bool)
            is_filled = quantity is Quantity.WEIGHT
            return _filled(created, nowhere, self.fill) if is_filled else created
        axes = self.axes or (None,) * source.ndim
        assert len(axes) == source.ndim
        if quantity is not Quantity.WEIGHT:
            gathered = _gather(source, axes, quantity)
            return torch.zeros_like(gathered) if self.state == "fresh" else gathered
        if offset := self.offset:  # the model uses the sum, so map the sum
            effective = replace(self, offset=0.0).apply(
                source.to(compute_dtype(source)) + offset,
                donor=None if donor is None else donor + offset,
            )
            return (effective - offset).to(source.dtype)
        values = _gather(source, axes, quantity)
        if self.is_zeroed:
            return torch.zeros_like(values)
        if self.noise:
            is_copy = self.any_mask(lambda axis: axis.is_duplicate) | self.is_copy
            std = self.noise * float(source.double().std())
            noise = normal_numbers(self.noise_seed, std=std)(values.shape).to(values)
            values = torch.where(is_copy.to(values.device), values + noise, values)
        if all(axis is None or bool((axis.index >= 0).all()) for axis in axes):
            return values
        has_source = ~self.any_mask(lambda axis: axis.is_new)
        return _filled(values, has_source.to(values.device), self.fill, like=source, donor=donor)

    def carried_mask(self, read: Read) -> Tensor:
        """Return the mask of target entries that derive from the marked entries of the first model.

        New coordinates, zeroed copies and tensors with fresh state are not marked, so penalties on
        old weights leave them free.

        Args:
            read: returns the mask of a tensor of the first model by logical name.
        """
        import torch

        before = self.source
        if before is None:
            return torch.zeros(self.shape, dtype=torch.bool)
        mask = read(before) if isinstance(before, str) else before.carried_mask(read)
        for dimension, axis in enumerate(self.axes):
            if axis is not None:
                mask = mask.index_select(dimension, axis.index.clamp(min=0))
        if self.is_zeroed or self.state == "fresh":
            return torch.zeros_like(mask)
        return mask & ~self.any_mask(lambda axis: axis.is_new) if self.axes else mask

    def new_coordinates(self, dimension: int) -> Tensor | None:
        """Return the mask [size] of a dimension's coordinates that are new at any map of the chain.

        Return None if no coordinate is new.
        """
        before, axes = self.source, self.axes
        earlier = before.new_coordinates(dimension) if isinstance(before, TensorMap) else None
        axis = axes[dimension] if axes else None
        if axis is None:
            return earlier
        flags = axis.is_new
        if earlier is not None:
            flags = flags | earlier[axis.index.clamp(min=0)]
        return flags if bool(flags.any()) else None

    def any_mask(self, flags: Callable[[AxisFactor], Tensor]) -> Tensor:
        """Return the mask of entries flagged along any axis, broadcastable to the target's shape.

        Args:
            flags: returns the mask [N] of an axis.
        """
        import torch

        mask = torch.zeros((1,) * len(self.axes), dtype=torch.bool)
        for dimension, axis in enumerate(self.axes):
            if axis is not None:
                shape = [1] * len(self.axes)
                shape[dimension] = -1
                mask = mask | flags(axis).view(shape)
        return mask

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


def compute_dtype(source: Tensor) -> torch.dtype:
    """Return the dtype of computations on a tensor."""
    import torch

    return torch.float64 if source.dtype == torch.float64 else torch.float32


def _gather(source: Tensor, axes: Sequence[AxisFactor | None], quantity: Quantity) -> Tensor:
    """Return the source entries at their target coordinates, scaled by the factors of the axes."""
    wide_dtype = compute_dtype(source)
    values = source
    for dimension, axis in enumerate(axes):
        if axis is None:
            continue
        values = take_along(values, dimension, axis.index.to(source.device))
        factor = quantity.factor(axis)
        if bool((factor == 1).all()):
            continue
        shape = [1] * source.ndim
        shape[dimension] = -1
        factor = factor.to(device=source.device, dtype=wide_dtype).view(shape)
        wide = values.to(wide_dtype)
        values = wide * factor if wide is source else wide.mul_(factor)
    return values.to(source.dtype) if values is not source else source.clone()


def take_along(
    values: Tensor, dimension: int, index: Tensor, *, dtype: torch.dtype | None = None
) -> Tensor:
    """Return `values` at an index along one dimension; undefined where the index is negative.

    The leading entries that stay at their coordinate, usually most of them, are copied at once.

    Args:
        values: any tensor.
        dimension: to take entries along.
        index: of each entry of the result [N].
        dtype: of the result, which is then a copy; by default that of `values`.
    """
    import torch

    new_size, old_size = index.numel(), values.shape[dimension]
    size = min(new_size, old_size)
    moved = (index[:size] != torch.arange(size, device=index.device)).nonzero()
    kept = int(moved[0]) if moved.numel() else size
    if kept == new_size == old_size and dtype is None:
        return values
    shape = list(values.shape)
    shape[dimension] = new_size
    result = values.new_empty(shape, dtype=dtype)
    result.narrow(dimension, 0, kept).copy_(values.narrow(dimension, 0, kept))
    rest, target = index[kept:], result.narrow(dimension, kept, new_size - kept)
    if bool((rest < 0).all()):
        target.zero_()
    else:
        target.copy_(values.index_select(dimension, rest.clamp(min=0)))
    return result


def _filled(
    values: Tensor,
    has_source: Tensor,
    fill: Fill,
    *,
    like: Tensor | None = None,
    donor: Tensor | None = None,
) -> Tensor:
    """Fill the entries without a source; `matched` takes mean and deviation from `like`."""
    import torch

    match fill.kind:
        case "zero":
            return values.masked_fill_(~has_source, 0)
        case "mean":
            mean = values[has_source.expand(values.shape)].double().mean().to(values.dtype)
            return torch.where(has_source, values, torch.where(mean == 0, 1, mean))
        case "row_mean":
            assert like is not None, "a mean of rows needs a source"
            row = like.to(values.device).double().mean(dim=0).to(values.dtype)
            return torch.where(has_source, values, row)
        case "rows" | "quiet":
            assert like is not None, "sums of rows need a source"
            is_new_row = ~has_source.reshape(len(values), -1).any(dim=1)
            made = fill.new_rows(like)(0, int(is_new_row.sum())).to(values)
            return values.index_copy_(0, is_new_row.nonzero().squeeze(1), made)
        case "random":
            rows = values[:: fill.repeat]
            drawn = normal_numbers(fill.seed, std=fill.std)(rows.shape).to(values)
            if fill.repeat > 1:
                drawn = drawn.repeat_interleave(fill.repeat, dim=0)
            return torch.where(has_source, values, drawn)
        case "matched":
            assert like is not None, "a matched fill needs a source"
            wide = fill.scale * like.double()
            draw = normal_numbers(fill.seed, std=float(wide.std()), mean=float(wide.mean()))
            return torch.where(has_source, values, draw(values.shape).to(values))
        case "copy":
            assert donor is not None, "a copy fill needs a donor"
            return torch.where(has_source, values, donor.to(values))
        case "given":
            assert fill.values is not None, "a given fill needs values"
            is_new_entry = ~has_source.expand(values.shape)
            return values.masked_scatter_(is_new_entry, fill.values.to(values))
        case "others":
            return _mean_of(fill)


def _mean_of(fill: Fill) -> Tensor:
    """Return the mean of the tensors of other models; a single one keeps its bits."""
    first, *rest = fill.others.values()
    mean = first()
    if rest:
        dtype, mean = compute_dtype(mean), mean.double()  # the mean of equal tensors is exact
        for other in rest:
            mean = mean + other()
        mean = (mean / len(fill.others)).to(dtype)
    return mean


def _quiet_row(source: Tensor) -> Tensor:
    """Return the mean row at the usual length of a row, float64; of biases the lowest."""
    rows = source.double()
    if source.ndim == 1:
        return rows.min()
    mean, length = rows.mean(dim=0), rows.flatten(1).square().sum(dim=1).mean().sqrt()
    return mean * (length / mean.norm().clamp(min=1e-12))


def normal_numbers(seed: int, *, std: float, mean: float = 0.0) -> Callable[[torch.Size], Tensor]:
    """Return a function that draws normal numbers in blocks, equal to one draw of all blocks."""
    import torch

    generator = torch.Generator().manual_seed(seed)

    def draw(shape: torch.Size) -> Tensor:
        drawn = torch.randn(shape, generator=generator).mul_(std)
        return drawn.add_(mean) if mean else drawn

    return draw
