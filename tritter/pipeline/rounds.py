"""The rounds of a run, each from what the last kept, and the attempts of a run of one round."""

from dataclasses import dataclass

from tritter.evaluation.gate import Status
from tritter.pipeline.arm import Arm, tasks_of
from tritter.pipeline.context import RunContext
from tritter.pipeline.ledger import BaselineFound, ExpansionFound, GateFound
from tritter.planning.strategy import TOLERANCE, planned_rounds
from tritter.report.summary import Target


@dataclass(frozen=True, slots=True)
class Trial:
    """What the gate is asked about: a round, or an attempt, with what it has of its own.

    Args:
        arms: those of its tasks that were trained, one after the other.
        overrides: what an attempt does otherwise than the first.
    """

    context: RunContext
    arms: tuple[Arm, ...]
    overrides: tuple[str, ...] = ()

    @property
    def status(self) -> Status:
        """What the gate said of it.

        Raises:
            KeyError: it has not come to that.
        """
        return self.context.ledger.found(self.arms[0].key("gate"), GateFound).status


def planned_attempts(context: RunContext) -> tuple[Trial, ...]:
    """Return what a run of one round tries: itself, and after each rollback the next rung."""
    trials = []
    for number, config in enumerate(context.config.attempts, start=1):
        alike = [one.forgetting == config.forgetting for one in context.config.attempts]
        first = Arm(
            f"attempt_{number}",
            config.expansion,
            attempt=number,
            prepared_by=1 + alike.index(True),
        )
        arms = tasks_of(first, len(context.text.tasks))
        trials.append(Trial(context.of_attempt(number), arms, config.rung_words))
    return tuple(trials)


def planned_trials(context: RunContext) -> tuple[Trial, ...]:
    """Return the attempts that the run may come to, or its rounds.

    The baseline must be there.

    Raises:
        RequestError: the target can't be reached from the baseline's shape.
    """
    config = context.config
    if config.pipeline.target_params is None:
        return planned_attempts(context)
    shapes = planned_rounds(config, context.source("baseline").config)
    counts = " → ".join(f"{shape.parameters:,}" for shape in shapes)
    context.say("plan", f"{len(shapes)} rounds to {counts} parameters")
    arms = (
        Arm(
            f"round_{number}",
            (shape.spec,),
            follows=f"round_{number - 1}" if number > 1 else None,
            is_round=True,
            is_final=number == len(shapes),
        )
        for number, shape in enumerate(shapes, start=1)
    )
    return tuple(Trial(context, (arm,)) for arm in arms)


def target_record(context: RunContext, arm: Arm) -> Target:
    """Return, for summary.json, how far a run that grows to a size has come."""
    config = context.config
    target = config.pipeline.target_params
    assert target is not None
    planned = planned_rounds(config, context.source("baseline").config)
    kept = arm.name if Trial(context, (arm,)).status != "rolled_back" else arm.follows
    if kept is None:
        parameters = context.ledger.found("baseline", BaselineFound).parameters
    else:
        parameters = context.ledger.found(f"{kept}.expand", ExpansionFound).parameters
    miss = abs(parameters / target - 1)
    return Target(
        target_params=target,
        planned=[shape.parameters for shape in planned],
        reaches_target=miss <= TOLERANCE,
    )
