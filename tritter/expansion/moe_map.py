"""The map from a dense model to a mixture of experts."""

import math
from dataclasses import KW_ONLY, dataclass, field

import torch
from torch import Tensor

from tritter.families import Config, Family, LogicalTensor, logical_name
from tritter.parameter_map import AxisFactor, Fill, ParameterMap, TensorMap
from tritter.seeds import derived_seed


@dataclass(frozen=True, slots=True)
class Copies:
    """The maps of one upcycling.

    Args:
        partner: the family with experts; `target` is a config of it.
        num_experts: of a layer; the other options likewise as `Moe` has them.
    """

    partner: Family
    target: Config
    _: KW_ONLY
    num_experts: int
    experts_per_token: int
    granularity: int
    noise: float
    reinit_fraction: float
    _factors: dict[tuple[int, bool], AxisFactor] = field(default_factory=dict, repr=False)

    @property
    def size(self) -> int:
        """Neurons of one expert."""
        return self.partner.dimensions(self.target).expert_size

    @property
    def share(self) -> float:
        """What a copy gets of the dense gradient when the router is balanced."""
        return self.granularity / self.num_experts

    @property
    def has_shared_expert(self) -> bool:
        return self.partner.dimensions(self.target).shared_expert_size > 0

    def parameter_map(self, *, seed: int) -> ParameterMap:
        tensors = {
            tensor.name: self.tensor_map(tensor, seed=seed)
            for tensor in self.partner.logical_tensors(self.target)
        }
        layers = self.partner.dimensions(self.target).num_hidden_layers
        return ParameterMap(tensors=tensors, layer_sources=tuple(range(layers)))

    def tensor_map(self, tensor: LogicalTensor, *, seed: int) -> TensorMap:
        if tensor.expert is not None:
            return self._expert(tensor, tensor.expert, seed=seed)
        if tensor.kind == "router":
            return self._router(tensor, seed=seed)
        shape = self.partner.shape(tensor, self.target)
        if tensor.kind == "shared_expert_gate":
            return TensorMap.created(shape, Fill())  # a sigmoid of zero: one half
        source = logical_name(tensor.kind.replace("shared_expert.", "ffn."), layer=tensor.layer)
        if tensor.kind == "shared_expert.down":
            one = torch.ones(shape[0], dtype=torch.float64)
            doubled = AxisFactor(torch.arange(shape[0]), weight=2 * one, gradient=one / 2)
            return TensorMap(source=source, axes=(doubled, None))
        return TensorMap(source=source)

    def _router(self, tensor: LogicalTensor, *, seed: int) -> TensorMap:
        """Draw the rows so that the logits have about unit scale, whatever the hidden size."""
        shape = self.partner.shape(tensor, self.target)
        fill = Fill(
            kind="random",
            std=1 / math.sqrt(shape[1]),
            seed=derived_seed(seed, "fill", tensor.name),
            repeat=self.granularity,
        )
        return TensorMap.created(shape, fill)

    def _expert(self, tensor: LogicalTensor, expert: int, *, seed: int) -> TensorMap:
        copy, piece = divmod(expert, self.granularity)
        is_down = tensor.kind == "experts.down"
        stem = f"layers.{tensor.layer}.experts.{expert}"
        factor = self._factor(piece, stem, is_down=is_down, seed=seed)
        scale = self._scale(is_down=is_down)
        fill = Fill(kind="matched", scale=scale, seed=derived_seed(seed, "fill", tensor.name))
        return TensorMap(
            source=logical_name(tensor.kind.replace("experts.", "ffn."), layer=tensor.layer),
            axes=(None, factor) if is_down else (factor, None),
            fill=fill if self.reinit_fraction else Fill(),
            is_zeroed=is_down and self.has_shared_expert,
            # Behind silent outputs there is no gradient that dense moments could stand for
            state="fresh" if self.has_shared_expert else "carry",
            noise=scale * self.noise if copy else 0.0,
            noise_seed=derived_seed(seed, "noise", tensor.name),
            is_copy=copy > 0,
        )

    def _scale(self, *, is_down: bool) -> float:
        """Return what the weights are multiplied with.

        The k weights of a token are split over the pieces, so what these write is as many times
        as large.
        """
        return float(self.granularity) if is_down else 1.0

    def _factor(self, piece: int, stem: str, *, is_down: bool, seed: int) -> AxisFactor:
        """Return the factors along an expert's neurons.

        The same for all copies where nothing is redrawn: kept for each, they would take more
        memory than the largest tensor.
        """
        if (piece, is_down) in self._factors:
            return self._factors[piece, is_down]
        index = torch.arange(piece * self.size, (piece + 1) * self.size)
        index[self._redrawn(seed=derived_seed(seed, "redrawn", stem))] = -1
        scale = self._scale(is_down=is_down)
        kept = (index >= 0).double()
        chosen = self.experts_per_token / self.granularity
        factor = AxisFactor(
            index,
            weight=kept * scale,
            gradient=kept * self.share / scale,
            squared=kept * self.share / chosen / scale**2,
        )
        if not self.reinit_fraction:
            self._factors[piece, is_down] = factor
        return factor

    def _redrawn(self, *, seed: int) -> Tensor:
        """Return which neurons of an expert are drawn anew, the same for gate, up and down."""
        generator = torch.Generator().manual_seed(seed)
        count = round(self.reinit_fraction * self.size)
        return torch.randperm(self.size, generator=generator)[:count]
