"""An arm of a run: one way of continuing from the baseline."""

from dataclasses import dataclass

from tritter.expansion import ExpansionSpec


@dataclass(frozen=True, slots=True)
class Arm:
    """One way of continuing from the baseline: the expansion asked for, or none as the control.

    Args:
        name: of the arm's folder, scores and stages.
        specs: its expansions in order.
        is_control: it stands beside the attempt, for comparison.
    """

    name: str
    specs: tuple[ExpansionSpec, ...]
    is_control: bool = False

    @property
    def claims_exact(self) -> bool:
        return all(spec.is_exact for spec in self.specs)

    def label(self, stage: str) -> str:
        """Return what reports call a stage of this arm: everything of the control is one."""
        return "control" if self.is_control else stage
