"""The interface of expansions: options that determine a target config and a parameter map."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from tritter.core.expansions.moe import Moe
from tritter.core.families import Config, Model
from tritter.errors import Problem, RequestError, brief, raise_problems, refused
from tritter.options import checked, is_options

if TYPE_CHECKING:
    from tritter.core.parameter_map import ParameterMap


# Types that need not know the axes of a model type without a table
_KEEPING_AXES = ("depth", "vocab", "context")
_MANY_LAYERS = 100  # the deepest released models have about 130 layers, of hidden size 16,384


class ExpansionSpec(Protocol):
    """Options of one expansion method; its fields are the keys under `expansion.<name>`."""

    name: ClassVar[str]
    expansion_type: ClassVar[str]  # depth | width | moe | vocab | context

    @property
    def is_exact(self) -> bool:
        """True if the method preserves the function at step 0."""
        ...

    @property
    def new_blocks_only(self) -> bool:
        """True if training updates new tensors only."""
        ...

    def target_config(self, source: Model) -> Config:
        """Return the config after the expansion.

        Raises:
            RequestError: the targets are impossible; names the nearest possible ones.
        """
        ...

    def parameter_map(self, source: Model, target: Model, *, seed: int) -> "ParameterMap":
        """Return the map from the source's tensors to the target's."""
        ...

    def notes(self, source: Model, target: Model) -> tuple[str, ...]:
        """Return the decisions made by defaults, one sentence each."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class ResolvedExpansion:
    """One expansion, resolved against its source model."""

    spec: ExpansionSpec
    source: Model
    target: Model
    parameter_map: "ParameterMap"
    notes: tuple[str, ...]

    @property
    def is_exact(self) -> bool:
        """True if the step preserves the function: no method does that drops a source layer."""
        spec = self.spec
        if isinstance(spec, Moe):  # by default the source determines its target
            spec = replace(spec, target=self.target.model_type)  # type: ignore[arg-type]
        kept = set(self.parameter_map.layer_sources)
        return spec.is_exact and len(kept) == self.source.sizes.num_hidden_layers

    @property
    def options(self) -> dict[str, Any]:
        return asdict(getattr(self.spec, "options", self.spec))  # type: ignore[arg-type]


def target_model(source: Model, specs: Sequence[ExpansionSpec]) -> Model:
    """Return the model after all `specs` in order, without building any map."""
    for spec in specs:
        source = _checked_target(spec, _as_needed(spec, source))
    return source


def _as_needed(spec: ExpansionSpec, source: Model) -> Model:
    """Return the source with what an expansion needs to know of its axes."""
    if not source.family.has_table:  # a step may leave out a kind of layer
        source = Model(source.config)
    if spec.expansion_type in _KEEPING_AXES:
        return source
    if spec.name == "moe" and not source.family.has_table:
        reason = f"{source.model_type} has no table; its depth and its width can grow"
        raise RequestError(Problem(f"expansion.{spec.name}", reason=reason))
    return source.widened


def _checked_target(spec: ExpansionSpec, source: Model) -> Model:
    """Return the model after an expansion, after checking it against the size limits."""
    config, keeps_axes = spec.target_config(source), spec.expansion_type in _KEEPING_AXES
    if not source.family.has_table and (not keeps_axes or spec.expansion_type == "context"):
        from tritter.core.expansions import on_twin  # imports transformers

        if keeps_axes:
            on_twin.check_rotations(source.config, config)
        else:
            on_twin.check_on_twin(spec, source, source.changed(config))
    try:
        target = source.changed(config)
        target.check_size()
    except RequestError as error:
        reason = "of the result, " + str(error).removeprefix("config.json: ")
        raise RequestError(Problem(f"expansion.{spec.name}", reason=reason)) from error
    return target


def check_specs(specs: object) -> tuple[ExpansionSpec, ...]:
    """Return the expansions of a Python call after checking their options."""
    if not isinstance(specs, list | tuple):
        raise RequestError(
            f"specs = {brief(specs)}: pass a list of expansions, such as [Width(), LlamaPro()]."
        )
    if not specs:
        raise RequestError("expand needs at least one expansion.")
    for spec in specs:
        if not is_options(type(spec)) or not hasattr(spec, "target_config"):
            known = "Dus(), Stack(), Interpolate(), LlamaPro(), Layers(), Width(), Moe(), MoeAdd()"
            reason = f"it is not an expansion; expansions are {known}, Vocab() and Context()"
            raise refused("specs", brief(spec), reason)
    raise_problems([p for spec in specs for p in checked(spec, prefix=f"expansion.{spec.name}")])
    return tuple(specs)


def build_steps(
    source: Model, specs: Sequence[ExpansionSpec], *, seed: int
) -> tuple[ResolvedExpansion, ...]:
    """Resolve `specs` one after the other against a model."""
    if type(seed) is not int or not 0 <= seed <= 2**64 - len(specs):
        raise refused("seed", brief(seed), "must be a whole number from 0 to 2^64 - 1")
    steps: list[ResolvedExpansion] = []
    for position, spec in enumerate(specs):
        source = _as_needed(spec, source)
        target = _checked_target(spec, source)
        parameter_map = spec.parameter_map(source, target, seed=seed + position)
        notes = (*spec.notes(source, target), *_thin_notes(source, target))
        steps.append(ResolvedExpansion(spec, source, target, parameter_map, notes))
        source = target
    return tuple(steps)


def _thin_notes(source: Model, target: Model) -> tuple[str, ...]:
    """Advise widening if depth alone makes far more layers than models of this width have."""
    layers, hidden = target.sizes.num_hidden_layers, target.sizes.hidden_size
    if layers <= max(_MANY_LAYERS, 4 * source.sizes.num_hidden_layers):
        return ()
    return (
        f"{layers} layers of hidden size {hidden} are deep and thin: slow to train and to serve. "
        "Widen instead (width), or widen and add fewer layers (width,llama-pro)",
    )
