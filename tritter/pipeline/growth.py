"""Neuron growth in a run: which trainings it is part of, and what summary.json says of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lightning import Callback
from torch import nn

from tritter.checkpoint import ExpansionRecord
from tritter.families import Config
from tritter.growth.record import GROWTH, growth_record
from tritter.pipeline.arm import Arm
from tritter.pipeline.context import RunContext
from tritter.pipeline.ledger import TrainingFound
from tritter.report.summary import GrowthRecord
from tritter.storage.records import validated
from tritter.training import FitResult


def begin(
    context: RunContext, arm: Arm, model: nn.Module, *, max_steps: int
) -> tuple[Sequence[Callback], Sequence[Callback]]:
    """Return what reads gradients and what changes the model in an arm's training.

    The control grows nothing. What growth does not train is frozen here, before methods against
    forgetting, which thaw only what they froze.
    """
    asked = context.config.growth
    if asked is None or arm.is_control:
        return (), ()
    method = asked.kind(asked.options)
    method.freeze(model)
    data, trainer = context.config.data, context.config.trainer
    tokens = data.batch_size * data.sequence_length * trainer.accumulate_grad_batches
    observer, changer = method.callbacks(
        max_steps=max_steps,
        tokens_per_step=tokens,
        seed=_seed(context, arm),
        new=context.planned(arm).change.new_units() if arm.specs else {},
    )
    return (observer,), (changer,)


@dataclass(frozen=True, slots=True, kw_only=True)
class GrowthAsked:
    """What is known of a training's growth before it begins, for the lineage."""

    options: dict[str, Any]
    seed: int

    @classmethod
    def of(cls, context: RunContext, arm: Arm) -> "GrowthAsked | None":
        """Return that of an arm; None where nothing grows."""
        asked = context.config.growth
        if asked is None or arm.is_control:
            return None
        return cls(options=asked.plain(), seed=_seed(context, arm))

    def records(self, before: Config, after: Config, result: FitResult) -> list[ExpansionRecord]:
        """Return the record of what grew, if anything did, as the lineage has it."""
        report = result.reports[GROWTH]
        if not report["events"]:
            return []
        record = growth_record(
            before,
            after,
            options=self.options,
            seed=self.seed,
            digest=report["map_digest"],
            is_exact=report["is_exact"],
            function_change=report["function_change"],
        )
        return [record]


def _seed(context: RunContext, arm: Arm) -> int:
    return context.seed("growth", *arm.purpose)


def summary_record(context: RunContext, arms: Sequence[Arm]) -> GrowthRecord | None:
    """Return what grew in the trainings of an attempt, task after task; None: nothing was to."""
    asked = context.config.growth
    if asked is None:
        return None
    fits = [context.ledger.found(f"{arm.name}.fit", TrainingFound) for arm in arms]
    reports = [fit.reports[GROWTH] for fit in fits]
    first, last, before, flops = reports[0], reports[-1], 0, 0.0
    events, steps = [], []
    for number, (fit, report) in enumerate(zip(fits, reports, strict=True)):
        own = {"task": number} if len(reports) > 1 else {}
        events += [
            {**each, **own, "step": each["step"] + before, "flops": each["flops"] + flops}
            for each in report["events"]
        ]
        steps += [step + before for step in report["map"]["steps"]]
        before += fit.steps
        flops += report["flops"]
    totals = {
        name: sum(report[name] for report in reports)
        for name in ("born", "replaced", "died", "checks", "extra_flops")
    }
    record = {
        "options": {**asked.plain(), **first["timing"]},
        "advice": asked.options.trigger.advice,
        "events": events,
        **totals,
        "neurons": {"before": first["neurons"]["before"], "after": last["neurons"]["after"]},
        "parameters": {
            "before": first["parameters"]["before"],
            "after": last["parameters"]["after"],
        },
        "young": last["young"],
        "map": {
            "steps": steps,
            **{
                name: [row for report in reports for row in report["map"][name]]
                for name in ("neurons", "pressure")
            },
        },
        "function_change": max(report["function_change"] for report in reports),
        "update_norms": last["update_norms"],
    }
    return validated(record, GrowthRecord, what="summary.json: growth")
