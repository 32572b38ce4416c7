"""Apply a tensor map to values: weights, gradients, moments and importances."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from enum import Enum
from typing import TYPE_CHECKING

from tritter.core.parameter_map.tensor_map import AxisFactor, Fill, TensorMap

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Read = Callable[[str], "Tensor"]


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


def mapped(tensor_map: TensorMap, read: Read, *, quantity: Quantity = Quantity.WEIGHT) -> Tensor:
    """Return the target tensor, with its sources read by logical name.

    Quantities other than weights ignore fills; for a blend they take the mean too.
    """

    def value_of(source: str | TensorMap) -> Tensor:
        return read(source) if isinstance(source, str) else mapped(source, read, quantity=quantity)

    source = None if tensor_map.source is None else value_of(tensor_map.source)
    if source is not None and tensor_map.blend:
        total = source.to(compute_dtype(source))
        for other in tensor_map.blend:
            total = total + value_of(other)
        source = (total / (1 + len(tensor_map.blend))).to(source.dtype)
    donor_map = tensor_map.fill.donor
    donor = None
    if donor_map is not None and quantity is Quantity.WEIGHT:
        donor = mapped(donor_map, read)
    return map_tensor(tensor_map, source, quantity=quantity, donor=donor)


def rounded_weight(tensor_map: TensorMap, read: Read, dtype: torch.dtype) -> Tensor:
    """Return the target's weights, computed in float32 or wider and rounded once, at the end.

    Weights that no map changes keep their bits.
    """

    import torch

    def read_wide(name: str) -> Tensor:
        tensor = read(name)
        return tensor.to(torch.promote_types(tensor.dtype, torch.float32))

    origin = tensor_map.origin if tensor_map.is_verbatim else None
    return (mapped(tensor_map, read_wide) if origin is None else read(origin)).to(dtype)


def map_tensor(
    tensor_map: TensorMap,
    source: Tensor | None,
    *,
    quantity: Quantity = Quantity.WEIGHT,
    donor: Tensor | None = None,
) -> Tensor:
    """Return the target tensor for `source`.

    Weights get their fills. Other quantities are zero in coordinates without a source, and
    everywhere if the map's state is `fresh`. Factors are applied in float32 (float64 for a float64
    source) on the source's device; the result has the source's dtype.

    Args:
        tensor_map: the map.
        source: the source tensor; None if the map has no source.
        quantity: of the values.
        donor: values of a fill of kind `copy`, in the target's shape.
    """
    import torch

    if source is None:
        created = torch.zeros(tensor_map.shape)
        nowhere = torch.zeros(tensor_map.shape, dtype=torch.bool)
        is_filled = quantity is Quantity.WEIGHT
        return _filled(created, nowhere, tensor_map.fill) if is_filled else created
    axes = tensor_map.axes or (None,) * source.ndim
    if len(axes) != source.ndim:
        raise ValueError(
            f"a map of {len(axes)} axes does not match a tensor of shape {tuple(source.shape)}"
        )
    if quantity is not Quantity.WEIGHT:
        gathered = _gather(source, axes, quantity)
        return torch.zeros_like(gathered) if tensor_map.state == "fresh" else gathered
    if offset := tensor_map.offset:  # the model uses the sum, so map the sum
        effective = map_tensor(
            replace(tensor_map, offset=0.0),
            source.to(compute_dtype(source)) + offset,
            donor=None if donor is None else donor + offset,
        )
        return (effective - offset).to(source.dtype)
    values = _gather(source, axes, quantity)
    if tensor_map.is_zeroed:
        return torch.zeros_like(values)
    if tensor_map.noise:
        is_copy = any_mask(axes, lambda axis: axis.is_duplicate) | tensor_map.is_copy
        std = tensor_map.noise * float(source.double().std())
        noise = normal_numbers(tensor_map.noise_seed, std=std)(values.shape).to(values)
        values = torch.where(is_copy.to(values.device), values + noise, values)
    if all(axis is None or bool((axis.index >= 0).all()) for axis in axes):
        return values
    has_source = ~any_mask(axes, lambda axis: axis.is_new)
    return _filled(values, has_source.to(values.device), tensor_map.fill, like=source, donor=donor)


def carried_mask(tensor_map: TensorMap, read: Read) -> Tensor:
    """Return the mask of target entries that derive from the marked entries of the first model.

    New coordinates, zeroed copies and tensors with fresh state are not marked, so penalties on old
    weights leave them free.

    Args:
        tensor_map: the map.
        read: returns the mask of a tensor of the first model by logical name.
    """
    import torch

    before = tensor_map.source
    if before is None:
        return torch.zeros(tensor_map.shape, dtype=torch.bool)
    mask = read(before) if isinstance(before, str) else carried_mask(before, read)
    for dimension, axis in enumerate(tensor_map.axes):
        if axis is not None:
            mask = mask.index_select(dimension, axis.index.clamp(min=0))
    if tensor_map.is_zeroed or tensor_map.state == "fresh":
        return torch.zeros_like(mask)
    return mask & ~any_mask(tensor_map.axes, lambda axis: axis.is_new) if tensor_map.axes else mask


def new_coordinates(tensor_map: TensorMap, dimension: int) -> Tensor | None:
    """Return the mask [size] of coordinates of a dimension that are new at any map of the chain.

    Return None if no coordinate is new.
    """
    before, axes = tensor_map.source, tensor_map.axes
    earlier = new_coordinates(before, dimension) if isinstance(before, TensorMap) else None
    axis = axes[dimension] if axes else None
    if axis is None:
        return earlier
    flags = axis.is_new
    if earlier is not None:
        flags = flags | earlier[axis.index.clamp(min=0)]
    return flags if bool(flags.any()) else None


def any_mask(axes: Sequence[AxisFactor | None], flags: Callable[[AxisFactor], Tensor]) -> Tensor:
    """Return the mask of entries flagged along any axis, broadcastable to the target's shape.

    Args:
        axes: of the target.
        flags: returns the mask [N] of an axis.
    """
    import torch

    mask = torch.zeros((1,) * len(axes), dtype=torch.bool)
    for dimension, axis in enumerate(axes):
        if axis is not None:
            shape = [1] * len(axes)
            shape[dimension] = -1
            mask = mask | flags(axis).view(shape)
    return mask


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
            made = new_rows(fill, like)(0, int(is_new_row.sum())).to(values)
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
    first, *rest = fill.others
    mean = first.read()
    if rest:
        dtype, mean = compute_dtype(mean), mean.double()  # the mean of equal tensors is exact
        for other in rest:
            mean = mean + other.read()
        mean = (mean / len(fill.others)).to(dtype)
    return mean


def new_rows(fill: Fill, source: Tensor) -> Callable[[int, int], Tensor]:
    """Return a function that computes new rows from one number to another, float64.

    Args:
        fill: of the kind `rows` or `quiet`.
        source: the old rows, [n, ...].
    """
    import torch

    quiet = _quiet_row(source)
    if fill.kind == "quiet":
        return lambda begin, end: quiet.expand(end - begin, *quiet.shape)
    index, weights = fill.index, fill.values
    assert index is not None and weights is not None, "sums of rows need weights"
    shape = (-1, index.shape[1], *[1] * (source.ndim - 1))
    old = source.double() if bool((index == -2).any()) else quiet[None]  # a copy only if needed
    draw = normal_numbers(fill.seed, std=float(old.std()), mean=float(old.mean()))

    def sums(begin: int, end: int) -> Tensor:
        chosen = index[begin:end].to(source.device)  # [m, k]
        taken = source[chosen.clamp(min=0)].double()  # [m, k, ...]
        taken = torch.where((chosen < 0).view(shape), quiet, taken)
        made = (taken * weights[begin:end].to(source.device).view(shape)).sum(dim=1)
        for number in (chosen[:, 0] == -2).nonzero().flatten().tolist():  # equal in any blocks
            made[number] = draw(source.shape[1:])
        return made

    return sums


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
