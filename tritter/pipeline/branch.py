"""A branch of a run: one way to continue from the baseline or from a kept round."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tritter.core.expansions import ExpansionSpec, MoeAdd


@dataclass(frozen=True, slots=True)
class Branch:
    """One way to continue: with the selected expansion, or without any as the control.

    Args:
        name: name of the branch's folder, scores and stages.
        specs: its expansions in order.
        is_control: True for the control, which is trained for comparison.
        follows: branch from whose result it starts; None for the baseline.
        is_round: True for a round of a run that grows to a target size.
        num_trainings: multiple of the configured training steps.
        attempt: number of the attempt, from 1; each starts from the baseline.
        prepared_by: first attempt with the same forgetting methods, whose preparation is shared.
        task: number of the task, from 0. Each task has its own branch, which follows the previous
            one.
        is_final: True if no later round or task starts from its result.
        reached: folder of the checkpoint that its last stage before the training wrote, relative to
            the run folder; empty if there is none.
    """

    name: str
    specs: tuple[ExpansionSpec, ...]
    is_control: bool = False
    follows: str | None = None
    is_round: bool = False
    num_trainings: int = 1
    attempt: int = 1
    prepared_by: int = 1
    task: int = 0
    is_final: bool = True
    reached: str = ""

    @property
    def start(self) -> str:
        """The folder of its initial checkpoint, relative to the run folder."""
        return f"{self.follows}/trained" if self.follows else "baseline"

    @property
    def expanded(self) -> str:
        """The folder of its checkpoint after the expansion and before any training."""
        return f"{self.name}/expanded" if self.specs else self.start

    @property
    def expanded_again(self) -> str:
        """The folder of a second expansion, if a killed training run has released the first."""
        return f"{self.name}/expanded_again"

    @property
    def location(self) -> str:
        """The folder of the checkpoint from which its next stage, or its training, starts."""
        return self.reached or self.start

    @property
    def trained(self) -> str:
        """The folder of its trained model."""
        return f"{self.name}/trained"

    @property
    def preparation(self) -> str:
        """The folder of what its forgetting methods prepare at its start; attempts share it."""
        if self.follows:
            return f"{self.follows}/importance"
        return "importance" if self.prepared_by == 1 else f"importance_{self.prepared_by}"

    @property
    def start_scores(self) -> str:
        """The name of the initial checkpoint's scores."""
        return f"{self.follows}-trained" if self.follows else "baseline"

    @property
    def purpose(self) -> tuple[str, ...]:
        """Components of its random seeds that distinguish it from earlier rounds."""
        return (self.name,) if self.follows else ()

    def key(self, stage: str) -> str:
        """Return the ledger's name of a stage that occurs once per round and attempt."""
        return f"{self.name}.{stage}" if self.is_round or self.attempt > 1 else stage

    @property
    def part(self) -> str | None:
        """The part of the run in loggers: control, a retry, or None for the run itself."""
        if self.is_control:
            return "control"
        return f"attempt_{self.attempt}" if self.attempt > 1 else None

    def label(self, stage: str) -> str:
        """Return the report label of a stage; the control has a single label."""
        return "control" if self.is_control else stage

    def with_choice(self, clone_from: Sequence[int]) -> "Branch":
        """Return the branch with the selected experts to clone."""
        chosen = tuple(clone_from)
        specs = tuple(
            replace(spec, clone_from=chosen)
            if isinstance(spec, MoeAdd) and spec.is_chosen_by_data
            else spec
            for spec in self.specs
        )
        return replace(self, specs=specs)

    def for_tasks(self, count: int) -> tuple["Branch", ...]:
        """Return a branch per task; later ones continue from the previous without expansion."""
        branches = [replace(self, is_final=self.is_final and count == 1)]
        for number in range(2, count + 1):
            name, follows = f"{self.name}_task_{number}", branches[-1].name
            later = replace(self, name=name, specs=(), follows=follows, task=number - 1)
            branches.append(replace(later, is_final=self.is_final and number == count))
        return tuple(branches)
