"""More experts in a model that has some: appended and closed at first, or all of them twice.

`append` adds any number of experts. Their logits get an offset of −∞, so that no token meets them
and the function is kept whatever they hold; the training that follows raises the offset to 0. A
stock class knows no offset: until then the folder is exact in Tritter alone. `replicate` doubles
the experts and the experts per token: each token meets both copies of what it met before, at half
the weight each (a softmax over twice the experts, or its top part renormalised), which stock
classes compute as well.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from tritter.errors import RequestError
from tritter.expansion.specification import ResolvedExpansion
from tritter.families import Config, Family, family_of
from tritter.limits import MAX_EXPERTS
from tritter.options import Text, options

if TYPE_CHECKING:
    from tritter.parameter_map import ParameterMap

DEFAULT_APPENDED = 4
DEFAULT_NOISE = 0.01


@options
class MoeAdd:
    """More experts in every layer that has experts.

    Args:
        num_experts: how many are added. Default: 4 for append; replicate adds as many as there
            are.
        addition: `append`, exact in Tritter, with a router offset that starts at −∞; or
            `replicate`, twice the experts and twice as many per token, exact in stock classes.
        init: of appended experts and their router rows: `clone` of one expert, `mean` of all,
            `random` with the spread of what is there, `best`: a clone of the expert of each layer
            that domain data moves most, or `distill`: clones, which are to be trained to answer
            as `teacher` does before any token meets them.
        clone_from: the expert that is cloned: one index, or one for each layer that has experts.
            Default: 0; under `best` what the data chose.
        teacher: under `distill` a folder or hub id of a model with the same vocabulary.
        noise: on new copies of experts, relative to their deviation; without it copies stay
            equal.
    """

    name: ClassVar[str] = "moe_add"
    new_blocks_only: ClassVar[bool] = False
    expansion_type: ClassVar[str] = "moe"
    num_experts: Annotated[int, Field(ge=1, le=MAX_EXPERTS)] | None = None
    addition: Literal["append", "replicate"] = "append"
    init: Literal["clone", "mean", "random", "best", "distill"] = "clone"
    clone_from: tuple[Annotated[int, Field(ge=0, le=MAX_EXPERTS)], ...] | None = None
    teacher: Text | None = None
    noise: Annotated[float, Field(ge=0)] = DEFAULT_NOISE

    @property
    def is_append(self) -> bool:
        return self.addition == "append"

    @property
    def is_chosen_by_data(self) -> bool:
        """True while only domain data can say which experts are cloned."""
        return self.init == "best" and self.clone_from is None

    @property
    def is_exact(self) -> bool:
        """True of append whatever the new experts hold: no token meets them at step 0."""
        return self.is_append or self.noise == 0

    def target_config(self, family: Family, config: Config) -> Config:
        layers = sparse_layers(family, config)
        size = family.dimensions(config)
        self._check_options()
        self._check_clone_from(size.num_experts, layers)
        num_experts, experts_per_token = (
            family.sizes["num_experts"],
            family.sizes["experts_per_token"],
        )
        if self.is_append:
            added = self.num_experts or DEFAULT_APPENDED
            if self.init == "distill" and added < size.experts_per_token:
                raise RequestError(
                    f"expansion.moe_add.num_experts = {added}: init=distill sends every token to "
                    f"{size.experts_per_token} of the new experts; allowed is at least "
                    f"{size.experts_per_token}."
                )
            return {**config, num_experts: size.num_experts + added}
        if self.num_experts not in (None, size.num_experts):
            raise RequestError(
                f"expansion.moe_add.num_experts = {self.num_experts}: addition=replicate doubles "
                f"the {size.num_experts} experts, so it adds {size.num_experts}; addition=append "
                "adds any number."
            )
        return {
            **config,
            num_experts: 2 * size.num_experts,
            experts_per_token: 2 * size.experts_per_token,
        }

    def parameter_map(
        self, family: Family, source: Config, target: Config, *, seed: int
    ) -> "ParameterMap":
        if self.is_chosen_by_data:
            raise RequestError(
                "expansion.moe_add.init = best: domain data chooses the expert, so it works in a "
                "run of train.py, and with --domain-data; or use clone with clone_from."
            )
        from tritter.expansion.moe_add_map import Addition  # a plan needs no maps, nor torch

        layers, chosen = sparse_layers(family, source), self.clone_from or (0,)
        experts = chosen if len(chosen) > 1 else chosen * len(layers)
        addition = Addition(
            is_append=self.is_append,
            init=self.init,
            cloned=dict(zip(layers, experts, strict=True)),
            noise=self.noise,
            seed=seed,
        )
        return addition.parameter_map(family, source, target)

    def notes(self, family: Family, source: Config, target: Config) -> tuple[str, ...]:
        old, new = family.dimensions(source), family.dimensions(target)
        before, after = (family.count_active_parameters(config) for config in (source, target))
        grown = f"experts {old.num_experts} → {new.num_experts}"
        if self.is_append:
            return (
                f"{grown}, still {new.experts_per_token} per token ({after:,} active parameters)",
                "the new ones are closed by a router offset of -inf, which lies in state/; stock "
                "transformers computes the same only once training has raised it to 0",
            )
        per_token = f"{old.experts_per_token} → {new.experts_per_token} per token"
        return (f"{grown}, {per_token} (active parameters {before:,} → {after:,})",)

    def _check_options(self) -> None:
        if not self.is_append and (self.init != "clone" or self.clone_from is not None):
            key, value = (
                ("init", self.init)
                if self.init != "clone"
                else ("clone_from", list(self.clone_from or ()))
            )
            raise RequestError(
                f"expansion.moe_add.{key} = {value}: addition=replicate clones every expert; "
                "addition=append takes it."
            )
        if (self.init == "distill") != (self.teacher is not None):
            raise RequestError(
                f"expansion.moe_add.teacher = {self.teacher or 'null'}: init=distill learns from a "
                f"teacher, a folder or hub id, and no other init has one (init = {self.init})."
            )
        if self.init in ("mean", "random") and self.clone_from is not None:
            raise RequestError(
                f"expansion.moe_add.clone_from = {list(self.clone_from)}: init={self.init} clones "
                "none; use init=clone."
            )
        if self.init == "random" and self.noise not in (0, DEFAULT_NOISE):
            raise RequestError(
                f"expansion.moe_add.noise = {self.noise} goes on copies, and init=random makes "
                "none; use init=clone or init=mean."
            )

    def _check_clone_from(self, num_experts: int, layers: Sequence[int]) -> None:
        if self.clone_from is None:
            return
        key = f"expansion.moe_add.clone_from = {list(self.clone_from)}"
        if len(self.clone_from) not in (1, len(layers)):
            raise RequestError(
                f"{key}: allowed is one expert, or one for each of the {len(layers)} layers that "
                "have experts."
            )
        wrong = [expert for expert in self.clone_from if not 0 <= expert < num_experts]
        if wrong:
            raise RequestError(
                f"{key}: there is no expert {wrong[0]}; allowed are 0 to {num_experts - 1}."
            )


def closed_experts(
    steps: Sequence[ResolvedExpansion], *, held: tuple[int, ...] = ()
) -> tuple[int, ...]:
    """Return the experts that no token meets yet, or not wholly, after the expansions.

    Args:
        held: those that the source has.

    Raises:
        RequestError: experts are added to a model whose last ones are not open yet.
    """
    closed = held
    for step in steps:
        if not isinstance(step.spec, MoeAdd):
            continue
        if closed:
            raise RequestError(
                f"expansion.moe_add: the router offset of experts {closed[0]} to {closed[-1]}, "
                "which were appended before, is not 0 yet; train the model until it is, then add "
                "more."
            )
        if step.spec.is_append:
            old, new = (
                family_of(config).dimensions(config).num_experts
                for config in (step.source_config, step.target_config)
            )
            closed = tuple(range(old, new))
    return closed


def sparse_layers(family: Family, config: Config) -> tuple[int, ...]:
    """Return the layers that have experts.

    Raises:
        RequestError: there are none.
    """
    kinds = family.layer_kinds(config)
    sparse = tuple(layer for layer, kind in enumerate(kinds) if kind == "sparse")
    if not sparse:
        raise RequestError(
            f"expansion.moe_add: a {family.model_type} model without experts has none to add to; "
            "use moe first (expansion=[moe,moe_add], or --method moe,moe-add)."
        )
    return sparse
