"""An expansion that was resolved against its source, before anything is read of tensors."""

from dataclasses import dataclass

from tritter.expand.change import Change
from tritter.expansion import ResolvedExpansion
from tritter.families import Config
from tritter.parameter_map import ParameterMap
from tritter.stock_routers import AddedExperts


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PlannedExpansion:
    """What an expansion would make.

    Args:
        config: config.json of the source.
        steps: the expansions in order, with their maps; none leave everything as it is.
        parameter_map: of all of them.
        seed: what random fills and choices are drawn from.
        parameters_before: counted from shapes, ties once.
        parameters_after: the same of the result.
        added_experts: those of the result that are not open yet, if any.
    """

    config: Config
    steps: tuple[ResolvedExpansion, ...]
    parameter_map: ParameterMap
    seed: int
    parameters_before: int
    parameters_after: int
    added_experts: AddedExperts | None = None

    @property
    def target_config(self) -> Config:
        return self.steps[-1].target_config if self.steps else self.config

    @property
    def change(self) -> Change:
        """The same by the names of parameters in memory."""
        return Change.of(self.parameter_map, self.config, self.target_config)
