"""The gate's questions to a training itself: did gradients reach it all, did it hold its bytes."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tritter.config.optimizers import kept_per_parameter
from tritter.evaluation.gate import Check, flow_check, memory_check
from tritter.models import read_config
from tritter.pipeline import moe
from tritter.pipeline.arm import Arm
from tritter.pipeline.context import RunContext
from tritter.planning import TrainingSetup, states_bytes


def held_checks(context: RunContext, arms: Sequence[Arm]) -> Iterator[Check]:
    """Yield the checks of gradient flow and memory of an attempt.

    Of several tasks it is enough that a parameter was reached in one of them, and the one whose
    memory differs most from what its shapes say stands for all.
    """
    fits = [context.ledger[f"{arm.name}.fit"].found for arm in arms]
    added = moe.appended(context, arms[0])
    flow = _joined([found.get("flow") or {} for found in fits])
    check = flow_check(flow, new_experts=() if added is None else added.experts)
    if check is not None and (context.config.experts is None or arms[0].is_control):
        yield check  # of experts, which take turns, it would say nothing
    made = [
        _memory(context, arm, fit["held"])
        for arm, fit in zip(arms, fits, strict=True)
        if fit.get("held") and (context.config.experts is None or arm.is_control)
    ]
    if made:
        yield max(made, key=lambda check: abs(check.value or 0.0))


def _joined(flows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what none of the trainings reached, of at least one that was watched."""
    watched = [flow for flow in flows if flow]
    if not watched:
        return {}
    joined: dict[str, Any] = {"steps": sum(flow["steps"] for flow in watched)}
    for kind in ("without_gradient", "without_tokens"):
        first, *others = (flow[kind] for flow in watched)
        joined[kind] = [name for name in first if all(name in other for other in others)]
    return joined


def _memory(context: RunContext, arm: Arm, held: Mapping[str, Any]) -> Check:
    optimizer, trainer = context.config.optimizer, context.config.trainer
    setup = TrainingSetup(
        precision=trainer.precision,
        optimizer="adamw8bit" if "8bit" in optimizer.target else "adamw",
    )
    expected = states_bytes(
        read_config(context.folder / arm.name / "trained"),
        setup,
        trained=[(size, count) for size, count in held["trained"]],
        kept_per_parameter=kept_per_parameter(optimizer),
    )
    return memory_check(held, expected=expected)
