"""How the spaces of a model grow in width: their maps, the factors of every axis, the fills."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from tritter.expansion.head_maps import HeadMaps, copied_sources, split_shares
from tritter.families import Axis, LogicalTensor, Port, Space
from tritter.parameter_map import AxisFactor, AxisMap, Fill
from tritter.seeds import derived_seed

# Spaces of units that are computed from the stream and read back into it
_UNITS = ("ffn", "shared_ffn", "query")
_KEPT = ("vocab", "positions", "routes", "shared_gate")


@dataclass(frozen=True, slots=True)
class Spaces:
    """The maps of all spaces under one width expansion.

    Args:
        residual: of the residual stream, and of all that a norm stands between it and.
        heads: of attention.
        is_tied: the embedding is the head as well.
        embedding_scale: what the embedding is multiplied with, so that it writes the same stream
            where the model scales it by the root of the hidden size; 1 where it does not.
        units_are_copied: new neurons of an FFN copy old ones.
        equal_shares: copies divide what reads them equally.
        seed: of the choice which neurons are copied.
    """

    residual: AxisMap
    heads: HeadMaps
    is_tied: bool
    embedding_scale: float
    units_are_copied: bool
    equal_shares: bool
    seed: int
    _units: dict[Space, AxisMap] = field(default_factory=dict, repr=False)

    def factors(
        self, tensor: LogicalTensor, old_shape: Sequence[int], new_shape: Sequence[int]
    ) -> tuple[AxisFactor | None, ...]:
        """Return the factors along each axis of a tensor, None where nothing changes."""
        sizes = zip(tensor.axes, old_shape, new_shape, strict=True)
        return tuple(self._factor(axis, old, new) for axis, old, new in sizes)

    def _factor(self, axis: Axis, old_size: int, new_size: int) -> AxisFactor | None:
        if axis.space.kind in _KEPT:
            return None
        if axis.space.kind == "head_dim":
            return self.heads.per_head
        axis_map = self._axis_map(axis.space, old_size, new_size)
        match axis.port:
            case Port.WRITE:
                factor = AxisFactor.writes(axis_map)
            case Port.WRITE_SCALED:
                factor = AxisFactor.writes(axis_map.rebalanced(scale=self.embedding_scale))
            case Port.WRITE_NONLINEAR:
                factor = AxisFactor.writes_nonlinear(axis_map)
            case Port.ABSORBED:
                factor = AxisFactor.writes_into_norm(axis_map, scale=rms_ratio(self.residual))
            case Port.READ:
                factor = AxisFactor.reads(axis_map)
            case Port.GAIN:
                # q and k have the new eps's scale already, and their copies the old mean square
                is_of_heads = axis.space.kind in ("query", "key_value")
                ratio = 1.0 if is_of_heads else rms_ratio(self.residual)
                factor = AxisFactor.gain(axis_map, rms_ratio=ratio)
        return None if factor.is_identity and axis_map.is_identity else factor

    def _axis_map(self, space: Space, old_size: int, new_size: int) -> AxisMap:
        match space.kind:
            case "query":
                return self.heads.query
            case "key_value":
                return self.heads.key_value
            case "qkv":
                assert self.heads.together is not None, "such heads are never split"
                return self.heads.together
            case "head_input":
                return self._head_input
            case "ffn" | "shared_ffn":
                if space not in self._units:
                    self._units[space] = self._neurons(space, old_size, new_size)
                return self._units[space]
            case "attention_input" | "ffn_input":
                return self.residual
            case _:
                assert space.is_stream, f"width does not know the space {space.name}"
                return self.residual

    @property
    def _head_input(self) -> AxisMap:
        """The map between the final norm and the head.

        A tied embedding has one value in both of its roles: what the head's columns would have to
        lose to the copies, and to the embedding's own scale, goes into the final norm's gain.
        """
        if not self.is_tied:
            return self.residual
        scale = 1 / (self.residual.num_copies * self.embedding_scale)
        return self.residual.rebalanced(scale=scale)

    def _neurons(self, space: Space, old_size: int, new_size: int) -> AxisMap:
        if not self.units_are_copied:
            return AxisMap.padded(old_size, new_size)
        seed = derived_seed(self.seed, "copies", space.name)
        source = copied_sources(old_size, new_size, seed=seed)
        share = split_shares(source, old_size, equal=self.equal_shares)
        return AxisMap.copied(old_size, source, share)


def residual_map(old_size: int, new_size: int, *, is_repeated: bool) -> AxisMap:
    """Return the map of the residual stream: one block and new directions, or whole repeats."""
    if is_repeated:
        return AxisMap.tiled(old_size, new_size)
    return AxisMap.padded(old_size, new_size)


def rms_ratio(residual: AxisMap) -> float:
    """Return the grown stream's root mean square over the old one's: √(k·d/D)."""
    return math.sqrt(residual.num_copies * residual.old_size / residual.new_size)


def width_fill(
    tensor: LogicalTensor,
    shape: Sequence[int],
    factors: Sequence[AxisFactor | None],
    *,
    seed: int,
) -> Fill:
    """Choose what new coordinates hold: whatever they write to old ones, or old ones to them, is 0.

    New directions of the residual stream are written by nobody and read at random; new neurons
    and heads are computed at random and read by nobody. So one side of each is always zero, the
    function is kept, and the other side gives the zero one a gradient.
    """
    if tensor.is_norm:
        return Fill(kind="mean")
    kinds = {_fill_kind(axis) for axis, factor in zip(tensor.axes, factors, strict=True) if factor}
    if "random" not in kinds or "zero" in kinds or len(shape) != 2:
        return Fill()
    std = 1 / math.sqrt(shape[-1])
    return Fill(kind="random", std=std, seed=derived_seed(seed, "fill", tensor.name))


def first_copies(factor: AxisFactor) -> AxisFactor:
    """Return a factor with its second copies made new coordinates."""
    is_first = ~factor.is_duplicate
    return AxisFactor(
        torch.where(is_first, factor.index, -1),
        factor.weight * is_first,
        factor.gradient * is_first,
    )


def tensors_above(tensors: Sequence[LogicalTensor]) -> dict[str, str]:
    """Return for each tensor of a layer the same one of the next layer up that has it."""
    above: dict[str, str] = {}
    nearest: dict[tuple[str, int | None], str] = {}
    for tensor in reversed([tensor for tensor in tensors if tensor.layer is not None]):
        within_layer = tensor.kind, tensor.expert
        if within_layer in nearest:
            above[tensor.name] = nearest[within_layer]
        nearest[within_layer] = tensor.name
    return above


def _fill_kind(axis: Axis) -> Literal["zero", "random"]:
    reads_new_unit = axis.port is Port.READ and axis.space.kind in _UNITS
    return "zero" if axis.space.is_stream or reads_new_unit else "random"
