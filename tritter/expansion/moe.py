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

from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from tritter.errors import RequestError
from tritter.expansion.partners import ExpertSizes, partner_config, partner_of
from tritter.families import Config, Family, ffn_sizes
from tritter.limits import MAX_EXPERTS, MAX_LAYERS
from tritter.options import options

if TYPE_CHECKING:
    from tritter.parameter_map import ParameterMap

DEFAULT_COPIES, DEFAULT_COPIES_PER_TOKEN = 8, 2


@options
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
    new_blocks_only: ClassVar[bool] = False
    expansion_type: ClassVar[str] = "moe"
    num_experts: Annotated[int, Field(ge=2, le=MAX_EXPERTS)] | None = None
    experts_per_token: Annotated[int, Field(ge=1, le=MAX_EXPERTS)] | None = None
    noise: Annotated[float, Field(ge=0)] = 0.01
    reinit_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    granularity: Annotated[int, Field(ge=1, le=MAX_EXPERTS)] = 1
    layers: tuple[Annotated[int, Field(ge=0, le=MAX_LAYERS)], ...] | None = None

    @property
    def is_exact(self) -> bool:
        return self.noise == 0 and self.reinit_fraction == 0

    @property
    def total_experts(self) -> int:
        return self.num_experts or DEFAULT_COPIES * self.granularity

    @property
    def chosen_experts(self) -> int:
        return self.experts_per_token or DEFAULT_COPIES_PER_TOKEN * self.granularity

    def target_config(self, family: Family, config: Config) -> Config:
        partner_of(family)
        dimensions = family.dimensions(config)
        if widths := ffn_sizes(config):
            raise RequestError(
                f"expansion.moe: the FFNs of this model are {min(widths)} to {max(widths)} wide, "
                "and experts have one width in all layers; export --format hf pads them to the "
                "widest, and what it writes can be expanded."
            )
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
    ) -> "ParameterMap":
        from tritter.expansion.moe_map import Copies  # a plan needs no maps, nor torch

        copies = Copies(
            partner_of(family),
            target,
            num_experts=self.total_experts,
            experts_per_token=self.chosen_experts,
            granularity=self.granularity,
            noise=self.noise,
            reinit_fraction=self.reinit_fraction,
        )
        return copies.parameter_map(seed=seed)

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
