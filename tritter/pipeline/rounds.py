"""The rounds of a run: one, or as many as the plan to a size has, each from what the last kept."""

from dataclasses import replace
from typing import Any

from tritter.config.rounds import planned_rounds
from tritter.evaluation.gate import Status
from tritter.models import read_config
from tritter.pipeline.arm import Arm, tasks_of
from tritter.pipeline.context import RunContext
from tritter.planning.strategy import TOLERANCE

ATTEMPT = Arm("attempt_1", ())


def planned_rounds_of(context: RunContext) -> tuple[tuple[Arm, ...], ...]:
    """Return the rounds that the run may come to, each as its arms, task after task.

    The baseline must be there.

    Raises:
        RequestError: the target can't be reached from the baseline's shape.
    """
    config = context.config
    if config.pipeline.target_params is None:
        attempt = replace(ATTEMPT, specs=config.expansion)
        return (tasks_of(attempt, len(context.text.tasks)),)
    shapes = planned_rounds(config, read_config(context.folder / "baseline"))
    counts = " → ".join(f"{shape.parameters:,}" for shape in shapes)
    context.say("plan", f"{len(shapes)} rounds to {counts} parameters")
    return tuple(
        (
            Arm(
                f"round_{number}",
                (shape.spec,),
                follows=f"round_{number - 1}" if number > 1 else None,
                is_round=True,
            ),
        )
        for number, shape in enumerate(shapes, start=1)
    )


def round_status(context: RunContext, arm: Arm) -> Status | None:
    """Return what the gate said of an arm; None when it has not come to that."""
    gate = context.ledger.get(arm.key("gate"))
    return None if gate is None else gate.found["status"]


def kept_parameters(context: RunContext, arm: Arm) -> int:
    """Return the size of what the run keeps when `arm` was its last."""
    kept = arm.name if round_status(context, arm) != "rolled_back" else arm.follows
    return int(context.ledger[f"{kept}.expand" if kept else "baseline"].found["parameters"])


def target_record(context: RunContext, arm: Arm) -> dict[str, Any]:
    """Return, for summary.json, how far a run that grows to a size has come."""
    config = context.config
    target = config.pipeline.target_params
    assert target is not None
    planned = planned_rounds(config, read_config(context.folder / "baseline"))
    miss = abs(kept_parameters(context, arm) / target - 1)
    return {
        "target_params": target,
        "planned": [shape.parameters for shape in planned],
        "reaches_target": miss <= TOLERANCE,
    }
