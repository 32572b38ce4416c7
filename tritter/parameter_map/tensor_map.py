"""What an expansion does to each tensor: its source, its factors, what fills its gaps."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tritter.parameter_map.axis_map import AxisMap


@dataclass(frozen=True, slots=True, eq=False)
class AxisFactor:
    """One dimension of one tensor under an axis map.

    Args:
        index: int64 [N], the source coordinate of each new one, -1 where it is new.
        weight: float64 [N], factor on weights, anchors, averages.
        gradient: float64 [N], factor on gradients; squared for second moments and Fisher.
    """

    index: Tensor
    weight: Tensor
    gradient: Tensor

    @classmethod
    def writes(cls, axis_map: AxisMap) -> "AxisFactor":
        """A linear producer: weights by p, gradients by s."""
        return cls(axis_map.source, axis_map.scale, axis_map.share)

    @classmethod
    def writes_nonlinear(cls, axis_map: AxisMap) -> "AxisFactor":
        """A producer behind a nonlinearity (FFN gate, q, k): unscaled, gradients by p·s."""
        kept = (axis_map.source >= 0).double()
        return cls(axis_map.source, kept, axis_map.scale * axis_map.share)

    @classmethod
    def writes_into_norm(cls, axis_map: AxisMap, *, scale: float) -> "AxisFactor":
        """A producer whose scale the norm behind it takes out again.

        Args:
            scale: what the producer is multiplied with, so that it meets the norm's new eps as
                it met the old one.
        """
        kept = (axis_map.source >= 0).double()
        return cls(axis_map.source, kept * scale, axis_map.scale * axis_map.share / scale)

    @classmethod
    def reads(cls, axis_map: AxisMap) -> "AxisFactor":
        """A consumer: weights by s, gradients by p."""
        return cls(axis_map.source, axis_map.share, axis_map.scale)

    @classmethod
    def gain(cls, output: AxisMap, *, rms_ratio: float) -> "AxisFactor":
        """A norm's gain, which reads one space and writes another diagonally.

        Args:
            output: the map of the space that the norm writes.
            rms_ratio: root mean square of the grown input over that of the old one.
        """
        return cls(output.source, output.scale * rms_ratio, output.share / rms_ratio)

    @property
    def is_identity(self) -> bool:
        return bool(
            (self.index == torch.arange(self.index.numel())).all()
            and (self.weight == 1).all()
            and (self.gradient == 1).all()
        )

    @property
    def is_duplicate(self) -> Tensor:
        """Bool [N]: the coordinate copies a source that an earlier coordinate copies already."""
        seen: set[int] = set()
        flags = []
        for source in self.index.tolist():
            flags.append(source >= 0 and source in seen)
            seen.add(source)
        return torch.tensor(flags, dtype=torch.bool)


@dataclass(frozen=True, slots=True)
class Fill:
    """What stands in coordinates without a source.

    Args:
        kind: `zero`, `random` (normal, mean 0, `std`) or `mean` (of the carried values).
        std: standard deviation of `random`.
        seed: seed of `random`; each tensor has its own.
    """

    kind: Literal["zero", "random", "mean"] = "zero"
    std: float = 0.0
    seed: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class TensorMap:
    """How one target tensor follows from one source tensor.

    Args:
        source: logical name in the source model.
        axes: one factor per dimension; None keeps the dimension as it is.
        fill: for coordinates without a source.
        is_zeroed: keep the shape, not the values (the output projections of an identity block).
        state: `carry` lets moments and importances follow; `fresh` starts them anew.
        noise: standard deviation, relative to the source's, added to second copies.
        noise_seed: seed of that noise.
    """

    source: str
    axes: tuple[AxisFactor | None, ...] = ()
    fill: Fill = Fill()
    is_zeroed: bool = False
    state: Literal["carry", "fresh"] = "carry"
    noise: float = 0.0
    noise_seed: int = 0

    def description(self) -> list[object]:
        """Return plain data that determines the map, tensors as their SHA-256."""
        axes = [
            None
            if axis is None
            else [_tensor_digest(axis.index, axis.weight, axis.gradient), axis.index.numel()]
            for axis in self.axes
        ]
        fill = [self.fill.kind, self.fill.std, self.fill.seed]
        return [self.source, axes, fill, self.is_zeroed, self.state, self.noise, self.noise_seed]


@dataclass(frozen=True, slots=True, eq=False)
class ParameterMap:
    """One expansion: every logical tensor of the target, and the layer that each layer copies.

    Args:
        tensors: target logical name → its map, in the target's order.
        layer_sources: for each target layer the source layer.
    """

    tensors: Mapping[str, TensorMap]
    layer_sources: tuple[int, ...]

    def digest(self) -> str:
        """SHA-256 over maps, fills and seeds: equal digests, equal expansions."""
        plain = {name: tensor_map.description() for name, tensor_map in self.tensors.items()}
        text = json.dumps([plain, self.layer_sources], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def _tensor_digest(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
