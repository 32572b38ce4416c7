"""Move values through a tensor map: weights, and all that lives on them."""

from enum import Enum

import torch
from torch import Tensor

from tritter.parameter_map.tensor_map import AxisFactor, Fill, TensorMap


class Quantity(Enum):
    """What a tensor holds, which decides the factors that it is mapped with."""

    WEIGHT = "weight"  # anchors, averages, teachers as well
    GRADIENT = "gradient"  # Adam's first moment as well
    SQUARED_GRADIENT = "squared_gradient"  # Adam's second moment, diagonal Fisher
    PATH_INTEGRAL = "path_integral"  # gradient × step, synaptic intelligence's ω
    PENALTY = "penalty"  # a Fisher that is to price the same move of the function the same

    def factor(self, axis: AxisFactor) -> Tensor:
        """Return the float64 [N] factors of this quantity along one axis."""
        match self:
            case Quantity.WEIGHT:
                return axis.weight
            case Quantity.GRADIENT:
                return axis.gradient
            case Quantity.SQUARED_GRADIENT:
                return axis.gradient.square()
            case Quantity.PATH_INTEGRAL:
                return axis.weight * axis.gradient
            case Quantity.PENALTY:
                # share / weight², where share = weight · gradient adds up to 1 over the copies
                return torch.where(axis.weight != 0, axis.gradient / axis.weight, 0.0)


def map_tensor(
    tensor_map: TensorMap, source: Tensor, *, quantity: Quantity = Quantity.WEIGHT
) -> Tensor:
    """Return the target tensor for `source`.

    Weights get their fills; every other quantity is zero where a coordinate has no source, and
    everywhere when the map's state is `fresh`. Factors are applied in float32, or float64 for a
    float64 source, on the source's device; the result has the source's dtype.
    """
    axes = tensor_map.axes or (None,) * source.ndim
    if len(axes) != source.ndim:
        raise ValueError(f"a map of {len(axes)} axes met a tensor of shape {tuple(source.shape)}")
    mapped = _gather(source, axes, quantity)
    if quantity is not Quantity.WEIGHT:
        return torch.zeros_like(mapped) if tensor_map.state == "fresh" else mapped
    if tensor_map.is_zeroed:
        return torch.zeros_like(mapped)
    if tensor_map.noise:
        mapped = _with_noise(mapped, tensor_map, source)
    if all(axis is None or bool((axis.index >= 0).all()) for axis in axes):
        return mapped
    has_source = _select(tensor_map, torch.ones(source.shape, dtype=torch.bool))
    return _filled(mapped, has_source.to(mapped.device), tensor_map.fill)


def carried(tensor_map: TensorMap, source_mask: Tensor) -> Tensor:
    """Return which entries of the target carry on what `source_mask` marks in the source.

    New coordinates, zeroed copies and tensors whose state is fresh carry nothing: penalties that
    hold old knowledge leave them free. Maps in a row are followed by applying this in a row.

    Args:
        source_mask: bool, the source tensor's shape.
    """
    mask = _select(tensor_map, source_mask)
    if tensor_map.is_zeroed or tensor_map.state == "fresh":
        return torch.zeros_like(mask)
    return mask


def _select(tensor_map: TensorMap, source_mask: Tensor) -> Tensor:
    """Gather a bool mask along the map; coordinates without a source are False."""
    mask = source_mask
    for dimension, axis in enumerate(tensor_map.axes):
        if axis is None:
            continue
        shape = [1] * mask.ndim
        shape[dimension] = -1
        has_source = (axis.index >= 0).view(shape)
        mask = mask.index_select(dimension, axis.index.clamp(min=0)) & has_source
    return mask


def _gather(source: Tensor, axes: tuple[AxisFactor | None, ...], quantity: Quantity) -> Tensor:
    compute_dtype = torch.float64 if source.dtype == torch.float64 else torch.float32
    values = source
    for dimension, axis in enumerate(axes):
        if axis is None:
            continue
        index = axis.index.clamp(min=0).to(source.device)
        values = values.index_select(dimension, index)
        factor = quantity.factor(axis)
        if bool((factor == 1).all()):
            continue
        shape = [1] * source.ndim
        shape[dimension] = -1
        factor = factor.to(device=source.device, dtype=compute_dtype).view(shape)
        values = values.to(compute_dtype) * factor
    return values.to(source.dtype) if values is not source else source.clone()


def _filled(mapped: Tensor, has_source: Tensor, fill: Fill) -> Tensor:
    match fill.kind:
        case "zero":
            return torch.where(has_source, mapped, torch.zeros_like(mapped))
        case "mean":
            mean = mapped[has_source].double().mean().to(mapped.dtype)
            return torch.where(has_source, mapped, mean)
        case "random":
            generator = torch.Generator().manual_seed(fill.seed)
            noise = torch.randn(mapped.shape, generator=generator) * fill.std
            return torch.where(has_source, mapped, noise.to(mapped))


def _with_noise(mapped: Tensor, tensor_map: TensorMap, source: Tensor) -> Tensor:
    is_copy = torch.zeros((), dtype=torch.bool)
    for dimension, axis in enumerate(tensor_map.axes):
        size = mapped.shape[dimension]
        here = torch.zeros(size, dtype=torch.bool) if axis is None else axis.is_duplicate
        is_copy = is_copy.unsqueeze(-1) | here
    generator = torch.Generator().manual_seed(tensor_map.noise_seed)
    std = tensor_map.noise * float(source.double().std())
    noise = torch.randn(mapped.shape, generator=generator) * std
    return torch.where(is_copy.to(mapped.device), mapped + noise.to(mapped), mapped)
