"""What every expansion is: a record of options that yields a target config and a parameter map."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import reduce
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from tritter.core.families import Config, Family, check_size, family_of
from tritter.errors import Problem, RequestError, brief, raise_problems
from tritter.options import checked, is_options

if TYPE_CHECKING:
    from tritter.core.parameter_map import ParameterMap


class ExpansionSpec(Protocol):
    """Options of one expansion method; its fields are the keys under `expansion.<name>`."""

    name: ClassVar[str]
    expansion_type: ClassVar[str]  # depth | width

    @property
    def is_exact(self) -> bool:
        """True when the method claims to preserve the function at step 0."""
        ...

    @property
    def new_blocks_only(self) -> bool:
        """True when only tensors without a history are to be trained."""
        ...

    def target_config(self, family: Family, config: Config) -> Config:
        """Return the config after the expansion.

        Raises:
            RequestError: the targets cannot be had; names the nearest that can.
        """
        ...

    def parameter_map(
        self, family: Family, source: Config, target: Config, *, seed: int
    ) -> "ParameterMap":
        """Return the map from the source's tensors to the target's."""
        ...

    def notes(self, family: Family, source: Config, target: Config) -> tuple[str, ...]:
        """Return what was decided on the person's behalf, a sentence each."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class ResolvedExpansion:
    """One expansion, resolved against the model that it meets."""

    spec: ExpansionSpec
    source_config: Config
    target_config: Config
    parameter_map: "ParameterMap"
    notes: tuple[str, ...]

    @property
    def options(self) -> dict[str, Any]:
        return asdict(self.spec)  # type: ignore[call-overload]


def target_config(source_config: Config, specs: Sequence[ExpansionSpec]) -> Config:
    """Return the config after all `specs` in order, without building any map.

    Raises:
        RequestError: unknown family, or targets that cannot be had.
    """
    config = source_config
    for spec in specs:
        config = _checked_target(spec, config)
    return config


def is_possible(source_config: Config, spec: ExpansionSpec) -> bool:
    """Return whether an expansion can be had of a model of `source_config`."""
    try:
        target_config(source_config, [spec])
    except RequestError:
        return False
    return True


def _checked_target(spec: ExpansionSpec, config: Config) -> Config:
    """Return the config after an expansion, whose sizes no limit forbids."""
    target = spec.target_config(family_of(config), config)
    try:
        check_size(family_of(target), target)
    except RequestError as error:
        reason = str(error).removeprefix("config.json: ")
        raise RequestError(
            Problem(f"expansion.{spec.name}", reason=f"of the result, {reason}")
        ) from error
    return target


def checked_specs(specs: object) -> tuple[ExpansionSpec, ...]:
    """Return expansions as a program handed them over, once their options are right.

    Raises:
        RequestError: there is none, something else is among them, or an option is wrong.
    """
    if not isinstance(specs, list | tuple):
        raise RequestError(
            f"specs = {brief(specs)}: give a list of expansions, such as [Width(), LlamaPro()]."
        )
    if not specs:
        raise RequestError("expand needs at least one expansion.")
    for spec in specs:
        if not is_options(type(spec)) or not hasattr(spec, "target_config"):
            raise RequestError(
                f"specs: {brief(spec)} is no expansion; those of Tritter are Dus(), Stack(), "
                "Interpolate(), LlamaPro(), Width(), Moe() and MoeAdd()."
            )
    raise_problems([p for spec in specs for p in checked(spec, prefix=f"expansion.{spec.name}")])
    return tuple(specs)


def build_steps(
    source_config: Config, specs: Sequence[ExpansionSpec], *, seed: int
) -> tuple[ResolvedExpansion, ...]:
    """Resolve `specs` one after the other against a model of `source_config`.

    Raises:
        RequestError: unknown family, or targets that cannot be had.
    """
    steps: list[ResolvedExpansion] = []
    source = source_config
    for position, spec in enumerate(specs):
        family = family_of(source)  # an expansion into experts changes it on the way
        target = _checked_target(spec, source)
        parameter_map = spec.parameter_map(family, source, target, seed=seed + position)
        notes = spec.notes(family, source, target)
        steps.append(ResolvedExpansion(spec, source, target, parameter_map, notes))
        source = target
    return tuple(steps)


def composed(steps: Sequence[ResolvedExpansion], source_config: Config) -> "ParameterMap":
    """Return the map of all steps in a row; of none, the one that leaves all as it is."""
    from tritter.core.parameter_map import ParameterMap

    if steps:
        return reduce(ParameterMap.then, (step.parameter_map for step in steps))
    family = family_of(source_config)
    return ParameterMap.identity(
        (tensor.name for tensor in family.logical_tensors(source_config)),
        num_layers=family.dimensions(source_config).num_hidden_layers,
    )
