"""What every expansion is: a record of options that yields a target config and a parameter map."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Protocol

from tritter.errors import RequestError
from tritter.families import Config, Family, check_size, family_of
from tritter.parameter_map import ParameterMap


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
    ) -> ParameterMap:
        """Return the map from the source's tensors to the target's."""
        ...

    def notes(self, family: Family, source: Config, target: Config) -> tuple[str, ...]:
        """Return what was decided on the person's behalf, a sentence each."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class ExpansionStep:
    """One expansion, resolved against the model that it meets."""

    spec: ExpansionSpec
    source_config: Config
    target_config: Config
    parameter_map: ParameterMap
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


def _checked_target(spec: ExpansionSpec, config: Config) -> Config:
    """Return the config after an expansion, whose sizes no limit forbids."""
    target = spec.target_config(family_of(config), config)
    try:
        check_size(family_of(target), target)
    except RequestError as error:
        reason = str(error).removeprefix("config.json: ")
        raise RequestError(f"expansion.{spec.name}: of the result, {reason}") from error
    return target


def build_steps(
    source_config: Config, specs: Sequence[ExpansionSpec], *, seed: int
) -> tuple[ExpansionStep, ...]:
    """Resolve `specs` one after the other against a model of `source_config`.

    Raises:
        RequestError: unknown family, or targets that cannot be had.
    """
    steps: list[ExpansionStep] = []
    source = source_config
    for position, spec in enumerate(specs):
        family = family_of(source)  # an expansion into experts changes it on the way
        target = _checked_target(spec, source)
        parameter_map = spec.parameter_map(family, source, target, seed=seed + position)
        notes = spec.notes(family, source, target)
        steps.append(ExpansionStep(spec, source, target, parameter_map, notes))
        source = target
    return tuple(steps)
