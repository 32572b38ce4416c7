"""A dense model into a mixture of experts (sparse upcycling, Komatsuzaki et al., arXiv 2212.05055).

Every FFN is copied n times behind a new router. The weights of the k chosen copies add up to one,
so equal copies compute what the one FFN did, whatever the router says. In Qwen2-MoE an expert that
every token meets takes the FFN's place (twice its output, behind a gate that starts at one half),
and the routed copies start with silent outputs.

Moments and importances of the copies are a policy, not a theorem: which tokens an expert sees
depends on the router. They are carried as a balanced router would have it: each of C copies, of
which a token takes k, gets 1/C of the gradient and, since its tokens are k/C of all and count 1/k
each, 1/(C·k) of the gradient's variance (measured with 8 and 2: 0.051–0.059 for 0.0625).
"""

import math
import re
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from tritter.errors import RequestError
from tritter.expansion.partners import ExpertSizes, partner_config, partner_of
from tritter.families import Config, Family, LogicalTensor
from tritter.limits import MAX_EXPERTS, MAX_LAYERS
from tritter.parameter_map import AxisFactor, Fill, ParameterMap, TensorMap
from tritter.seeds import derived_seed

_COUNT = {"minimum": 1, "maximum": MAX_EXPERTS}
DEFAULT_COPIES, DEFAULT_COPIES_PER_TOKEN = 8, 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Moe:
    """Copy each FFN into experts behind a new router.

    Args:
        num_experts: of a layer, in all. Default: 8 copies of the FFN.
        experts_per_token: k. Default: 2 copies' worth.
        noise: standard deviation, relative to the source's, added to every copy but the first.
            Without it all copies start equal and the text gives the router no gradient.
        reinit_fraction: share of each expert's neurons drawn anew with the source's mean and
            deviation, other ones in each expert (Drop-Upcycling, arXiv 2502.19261).
        granularity: pieces that each copy is cut into. The pieces of a copy share their router
            row, so that at the start a token takes all of them or none.
        layers: that get experts; the others keep their FFN. Default: all.
    """

    name: ClassVar[str] = "moe"
    expansion_type: ClassVar[str] = "moe"
    num_experts: int | None = field(default=None, metadata={"minimum": 2, "maximum": MAX_EXPERTS})
    experts_per_token: int | None = field(default=None, metadata=_COUNT)
    noise: float = field(default=0.01, metadata={"minimum": 0.0})
    reinit_fraction: float = field(default=0.0, metadata={"minimum": 0.0, "below": 1.0})
    granularity: int = field(default=1, metadata=_COUNT)
    layers: tuple[int, ...] | None = field(
        default=None, metadata={"minimum": 0, "maximum": MAX_LAYERS}
    )

    @property
    def is_exact(self) -> bool:
        return self.noise == 0 and self.reinit_fraction == 0

    @property
    def new_blocks_only(self) -> bool:
        return False

    @property
    def total_experts(self) -> int:
        return self.num_experts or DEFAULT_COPIES * self.granularity

    @property
    def chosen_experts(self) -> int:
        return self.experts_per_token or DEFAULT_COPIES_PER_TOKEN * self.granularity

    def target_config(self, family: Family, config: Config) -> Config:
        partner_of(family)
        dimensions = family.dimensions(config)
        self._check_counts()
        size, rest = divmod(dimensions.intermediate_size, self.granularity)
        if rest:
            raise RequestError(
                f"expansion.moe.granularity = {self.granularity} does not divide the FFN's "
                f"{dimensions.intermediate_size} neurons; nearest: "
                f"{_nearest_divisor(dimensions.intermediate_size, self.granularity)}."
            )
        sizes = ExpertSizes(
            num_experts=self.total_experts,
            experts_per_token=self.chosen_experts,
            expert_size=size,
            dense_layers=self._dense_layers(dimensions.num_hidden_layers),
        )
        return partner_config(family, config, sizes)

    def parameter_map(
        self, family: Family, source: Config, target: Config, *, seed: int
    ) -> ParameterMap:
        partner = partner_of(family)
        copies = _Copies(self, partner, target, size=partner.dimensions(target).expert_size)
        tensors = {
            tensor.name: copies.tensor_map(tensor, seed=seed)
            for tensor in partner.logical_tensors(target)
        }
        layers = family.dimensions(source).num_hidden_layers
        return ParameterMap(tensors=tensors, layer_sources=tuple(range(layers)))

    def notes(self, family: Family, source: Config, target: Config) -> tuple[str, ...]:
        partner = partner_of(family)
        dimensions = partner.dimensions(target)
        active, total = partner.count_active_parameters(target), partner.count_parameters(target)
        notes = [
            f"{family.model_type} → {partner.model_type}: {dimensions.num_experts} experts a "
            f"layer, {dimensions.experts_per_token} a token; {active:,} of {total:,} parameters "
            "are active for a token"
        ]
        if dimensions.shared_expert_size:
            notes.append(
                "the shared expert computes what the FFN did and the routed ones start silent, so "
                "nothing changes at step 0, whatever the noise"
            )
        dense = self._dense_layers(dimensions.num_hidden_layers)
        if dense:
            notes.append(f"dense layers: {', '.join(map(str, dense))}")
        if self.is_exact:
            notes.append(
                "all copies start equal: the text gives the router no gradient until they differ, "
                "only a balance loss does"
            )
        if self.granularity > 1:
            notes.append(
                f"the {self.granularity} pieces of a copy are routed together at the start only"
            )
        if dimensions.hidden_size % 8 or dimensions.expert_size % 8:
            notes.append(
                f"hidden size {dimensions.hidden_size} and expert size {dimensions.expert_size} "
                "are not both multiples of 8, which the default kernel of transformers wants; "
                'load it with experts_implementation="eager"'
            )
        return tuple(notes)

    def _dense_layers(self, layers: int) -> tuple[int, ...]:
        if self.layers is None:
            return ()
        wrong = [layer for layer in self.layers if not 0 <= layer < layers]
        if wrong or not self.layers:
            raise RequestError(
                f"expansion.moe.layers = {list(self.layers)}: name at least one layer from 0 to "
                f"{layers - 1} that is to get experts."
            )
        return tuple(sorted(set(range(layers)) - set(self.layers)))

    def _check_counts(self) -> None:
        total, chosen, pieces = self.total_experts, self.chosen_experts, self.granularity
        _check_count("num_experts", total, at_least=2 * pieces, multiple_of=pieces)
        _check_count("experts_per_token", chosen, at_least=pieces, multiple_of=pieces)
        if chosen > total:
            raise RequestError(
                f"expansion.moe.experts_per_token = {chosen}: a token cannot take more than the "
                f"{total} experts of a layer; allowed is at most {total}."
            )


@dataclass(frozen=True, slots=True)
class _Copies:
    """The maps of one upcycling.

    Args:
        size: neurons of one expert.
    """

    options: Moe
    partner: Family
    target: Config
    size: int
    _factors: dict[tuple[int, bool], AxisFactor] = field(default_factory=dict, repr=False)

    @property
    def share(self) -> float:
        """What a copy gets of the dense gradient when the router is balanced."""
        return self.options.granularity / self.options.total_experts

    @property
    def has_shared_expert(self) -> bool:
        return self.partner.dimensions(self.target).shared_expert_size > 0

    def tensor_map(self, tensor: LogicalTensor, *, seed: int) -> TensorMap:
        if tensor.expert is not None:
            return self._expert(tensor, tensor.expert, seed=seed)
        in_layer = re.fullmatch(r"(layers\.\d+\.)(.+)", tensor.name)
        part = in_layer[2] if in_layer else tensor.name
        if part == "router":
            return self._router(tensor, seed=seed)
        shape = self.partner.shape(tensor, self.target)
        if part == "shared_expert_gate":
            return TensorMap.created(shape, Fill())  # a sigmoid of zero: one half
        source = tensor.name.replace("shared_expert.", "ffn.")
        if part == "shared_expert.down":
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
            repeat=self.options.granularity,
        )
        return TensorMap.created(shape, fill)

    def _expert(self, tensor: LogicalTensor, expert: int, *, seed: int) -> TensorMap:
        copy, piece = divmod(expert, self.options.granularity)
        stem, part = tensor.name.rsplit(".", 1)
        is_down = part == "down"
        factor = self._factor(piece, stem, is_down=is_down, seed=seed)
        scale = self._scale(is_down=is_down)
        fill = Fill(kind="matched", scale=scale, seed=derived_seed(seed, "fill", tensor.name))
        return TensorMap(
            source=re.sub(r"experts\.\d+", "ffn", tensor.name),
            axes=(None, factor) if is_down else (factor, None),
            fill=fill if self.options.reinit_fraction else Fill(),
            is_zeroed=is_down and self.has_shared_expert,
            # Behind silent outputs there is no gradient that dense moments could stand for
            state="fresh" if self.has_shared_expert else "carry",
            noise=scale * self.options.noise if copy else 0.0,
            noise_seed=derived_seed(seed, "noise", tensor.name),
            is_copy=copy > 0,
        )

    def _scale(self, *, is_down: bool) -> float:
        """Return what the weights are multiplied with.

        The k weights of a token are split over the pieces, so what these write is as many times
        as large.
        """
        return float(self.options.granularity) if is_down else 1.0

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
        chosen = self.options.chosen_experts / self.options.granularity
        factor = AxisFactor(
            index,
            weight=kept * scale,
            gradient=kept * self.share / scale,
            squared=kept * self.share / chosen / scale**2,
        )
        if not self.options.reinit_fraction:
            self._factors[piece, is_down] = factor
        return factor

    def _redrawn(self, *, seed: int) -> Tensor:
        """Return which neurons of an expert are drawn anew, the same for gate, up and down."""
        generator = torch.Generator().manual_seed(seed)
        count = round(self.options.reinit_fraction * self.size)
        return torch.randperm(self.size, generator=generator)[:count]


def _check_count(name: str, value: int, *, at_least: int, multiple_of: int) -> None:
    if value >= at_least and value % multiple_of == 0:
        return
    below = value - value % multiple_of
    counts = sorted({max(below, at_least), max(below + multiple_of, at_least)})
    whole = f"a multiple of granularity = {multiple_of}, and " if multiple_of > 1 else ""
    raise RequestError(
        f"expansion.moe.{name} = {value}: allowed is {whole}at least {at_least}; nearest: "
        f"{' or '.join(map(str, counts))}."
    )


def _nearest_divisor(size: int, wanted: int) -> int:
    divisors = (count for count in range(1, size + 1) if size % count == 0)
    return min(divisors, key=lambda count: abs(count - wanted))
