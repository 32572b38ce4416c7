"""Records of neuron growth for the lineage and summary.json."""

from collections.abc import Mapping, Sequence
from typing import Any

from tritter.checkpoints import ExpansionRecord
from tritter.core.families import Model
from tritter.methods.growth.grower import GROWTH, growth_record
from tritter.training import FitResult


def growth_records(
    before: Model, after: Model, result: FitResult, *, options: Mapping[str, Any], seed: int
) -> list[ExpansionRecord]:
    """Return the lineage record of the growth in one training run, if there was any.

    Args:
        before: the model at the start of the run; `after`: at its end.
        options: the options of `growth`.
    """
    report = result.reports[GROWTH]
    if not report["events"]:
        return []
    record = growth_record(
        before,
        after,
        options=options,
        seed=seed,
        digest=report["map_digest"],
        is_exact=report["is_exact"],
        function_change=report["function_change"],
    )
    return [record]


def growth_summary(
    fits: Sequence[tuple[int, Mapping[str, Any]]], *, options: Mapping[str, Any], advice: str
) -> dict[str, Any]:
    """Return `growth` of summary.json: one record for all training runs of a branch.

    Args:
        fits: steps and report of each run, in order; steps and FLOPs are cumulative.
        options: the options of `growth`.
        advice: what to change if nothing grew.
    """
    reports = [report for _, report in fits]
    first, last, steps_before, flops_before = reports[0], reports[-1], 0, 0.0
    events, steps = [], []
    for number, (num_steps, report) in enumerate(fits):
        for event in report["events"]:
            cumulative = {
                "step": event["step"] + steps_before,
                "flops": event["flops"] + flops_before,
            }
            task = {"task": number} if len(fits) > 1 else {}
            events.append({**event, **task, **cumulative})
        steps += [step + steps_before for step in report["map"]["steps"]]
        steps_before += num_steps
        flops_before += report["flops"]
    return {
        "options": {**options, **first["timing"]},
        "advice": advice,
        "events": events,
        **{
            name: sum(report[name] for report in reports)
            for name in ("born", "replaced", "died", "checks", "extra_flops")
        },
        **{
            name: {"before": first[name]["before"], "after": last[name]["after"]}
            for name in ("neurons", "parameters")
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
