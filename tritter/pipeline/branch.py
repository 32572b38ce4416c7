"""An arm of a run: one way of continuing from the baseline, or from what a round before it kept."""

from dataclasses import dataclass, replace

from tritter.core.expansions import ExpansionSpec


@dataclass(frozen=True, slots=True)
class Branch:
    """One way of continuing: the expansion asked for, or none as the control.

    Args:
        name: of the arm's folder, scores and stages.
        specs: its expansions in order.
        is_control: it stands beside the attempt, for comparison.
        follows: the round whose result it starts from; None: it starts from the baseline.
        is_round: it is one of the rounds of a run that grows to a size.
        num_trainings: how many times the training's steps it is trained for.
        attempt: which of the run's, from 1; each starts from the baseline.
        prepared_by: the first attempt whose methods are the same, and for which they prepared.
        task: which of the run's tasks it learns, from 0; the others have arms of their own, each of
            which follows the one before.
        is_final: no later round or task of the run starts from its result.
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

    @property
    def start(self) -> str:
        """Where the checkpoint lies that it starts from, relative to the run folder."""
        return f"{self.follows}/trained" if self.follows else "baseline"

    @property
    def start_scores(self) -> str:
        """The name of that checkpoint's scores."""
        return f"{self.follows}-trained" if self.follows else "baseline"

    @property
    def purpose(self) -> tuple[str, ...]:
        """What sets its seeds apart from those of the rounds before it."""
        return (self.name,) if self.follows else ()

    def key(self, stage: str) -> str:
        """Return the ledger's name of a stage that a run of one round and attempt has once."""
        return f"{self.name}.{stage}" if self.is_round or self.attempt > 1 else stage

    @property
    def part(self) -> str | None:
        """What loggers call it that stands beside the run itself; None: the run."""
        if self.is_control:
            return "control"
        return f"attempt_{self.attempt}" if self.attempt > 1 else None

    @property
    def claims_exact(self) -> bool:
        return all(spec.is_exact for spec in self.specs)

    def label(self, stage: str) -> str:
        """Return what reports call a stage of this arm: everything of the control is one."""
        return "control" if self.is_control else stage


def tasks_of(first: Branch, count: int) -> tuple[Branch, ...]:
    """Return an arm and those that go on from it, task after task, which grow no further."""
    branches = [replace(first, is_final=first.is_final and count == 1)]
    for number in range(2, count + 1):
        name, follows = f"{first.name}_task_{number}", branches[-1].name
        later = replace(first, name=name, specs=(), follows=follows, task=number - 1)
        branches.append(replace(later, is_final=first.is_final and number == count))
    return tuple(branches)
