"""One run from its config to a summary, a table and a checkpoint that was kept or rolled back."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger

from tritter.config.jobs import read_status
from tritter.config.schema import RunConfig
from tritter.errors import RequestError
from tritter.evaluation.gate import Status, decide
from tritter.families import count_parameters, on_disk
from tritter.models import read_config
from tritter.pipeline import adaptation, importance, moe, stages, verdict
from tritter.pipeline.arm import Arm
from tritter.pipeline.context import RunContext, score_records
from tritter.pipeline.given import check_given
from tritter.pipeline.ledger import Ledger, StageResult
from tritter.pipeline.loggers import open_loggers
from tritter.pipeline.metrics import (
    BEFORE,
    arm_rows,
    before_metrics,
    num_steps,
    score_metrics,
    tell_wandb,
    write_metrics,
)
from tritter.pipeline.rounds import (
    planned_arms,
    round_status,
    target_record,
)
from tritter.pipeline.suggestions import next_commands
from tritter.report.plots import curves_of, plot_run
from tritter.report.tables import print_summary
from tritter.storage.atomic import write_text_atomic
from tritter.terminal import Console
from tritter.training import metrics_files

CONTROL = Arm("control", (), is_control=True)
SUMMARY_NAME = "summary.json"


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended.

    Args:
        status: kept, rolled_back or undecided.
        metric: mean loss over old and new domains of what was trained last, kept or not, nats
            per byte; what a sweeper minimises. Not a number when the training broke the model.
        summary_path: where summary.json lies.
        leaves: by what the run is known as finished, relative to its folder.
    """

    status: Status
    metric: float
    summary_path: Path
    leaves: tuple[str, ...]


def run_pipeline(config: RunConfig, *, run_folder: Path) -> Outcome:
    """Run all stages that the ledger does not have yet and leave the contract's files.

    Raises:
        RequestError: the request turned out to be wrong (cache not writable).
        TritterError: a stage failed; the ledger keeps what is done.
    """
    context = RunContext(
        config=config,
        folder=run_folder,
        console=Console(),
        ledger=Ledger(run_folder),
    )
    for gone in context.ledger.check_left():
        context.say("run", gone)
    check_given(context)
    _announce(context)
    _check_text(context)
    run_baseline(context)
    arms = _run_rounds(context)
    control = replace(CONTROL, num_trainings=len(arms))
    if config.control:
        context.say("control", "the un-grown base, trained in the same way")
        run_arm(context, control)
    status = round_status(context, arms[-1]) if arms[-1].is_round else None
    status = status or _gate_stage(context, arms[-1])
    context.stage("publish", lambda: _publish(context, arms[-1], status), label="publish")
    summary = _summary(context, arms, control)
    path = run_folder / SUMMARY_NAME
    write_text_atomic(path, json.dumps(summary, indent=1) + "\n")
    metrics_csv = write_metrics(context, arms[-1].name)
    plots = plot_run(
        summary,
        metrics_csv,
        run_folder / "plots",
        earlier=[curves_of(arm_rows(context, arm.name)) for arm in arms[:-1]],
        control=curves_of(arm_rows(context, control.name)) if config.control else (),
    )
    tell_wandb(context, summary, plots)
    print_summary(summary, console=context.console, folder=run_folder)
    _print_next(context, summary, plots)
    leaves = (SUMMARY_NAME, "checkpoint", "scores")
    return Outcome(status=status, metric=_metric(summary), summary_path=path, leaves=leaves)


def _run_rounds(context: RunContext) -> list[Arm]:
    """Run round after round until the last, or one that is rolled back; return those that ran.

    A run that does not grow to a size has one, whose gate comes after the control.
    """
    planned = planned_arms(context)
    run: list[Arm] = []
    for arm in planned:
        run.append(arm)
        _run_importance(context, arm)
        run_arm(context, arm)
        if not arm.is_round:
            break
        status = _gate_stage(context, arm)
        context.say("gate", f"{arm.name}: {status}")
        if status == "rolled_back":
            break
        if arm is not planned[-1]:
            context.stage(arm.key("keep"), partial(_keep, context, arm), label="publish")
    return run


def _run_importance(context: RunContext, arm: Arm) -> None:
    if importance.is_needed(context):
        key = importance.key(arm)
        context.stage(key, lambda: importance.prepare(context, arm), label="importance")


def _gate_stage(context: RunContext, arm: Arm) -> Status:
    gate = context.stage(arm.key("gate"), lambda: _gate(context, arm), label="gate")
    status: Status = gate.found["status"]
    return status


def _keep(context: RunContext, arm: Arm) -> StageResult:
    return StageResult(found={"model_hash": verdict.complete(context, arm).model_hash})


def run_baseline(context: RunContext) -> None:
    """Get the model that the run starts from."""
    context.stage("baseline", lambda: stages.baseline(context), label="baseline")


def run_arm(context: RunContext, arm: Arm) -> Arm:
    """Expand, train and score one arm; return it with what was chosen by its data."""
    key, label = arm.name, arm.label
    if moe.chooses(arm):
        chosen = context.stage(
            f"{key}.choose", partial(adaptation.choice, context, arm), label="choose"
        )
        arm = moe.with_choice(arm, chosen.found["clone_from"])
    context.stage(f"{key}.expand", lambda: stages.expansion(context, arm), label=label("expand"))
    if moe.teacher_of(arm) is not None:
        context.stage(
            f"{key}.distill", lambda: adaptation.distillation(context, arm), label="distill"
        )
    if moe.router_steps(context, arm):
        context.stage(f"{key}.adapt", lambda: stages.adaptation(context, arm), label=label("adapt"))
    with _loggers(context, arm) as loggers:
        if before := before_metrics(context, key):
            for logger in loggers if not metrics_files(context.folder / key) else ():
                logger.log_metrics(before, step=BEFORE)
        context.stage(
            f"{key}.fit",
            lambda: stages.training(context, arm, loggers=loggers),
            label=label("fit"),
        )
        context.stage(
            f"{key}.evaluate", lambda: stages.evaluation(context, arm), label=label("evaluate")
        )
        for logger in loggers:
            logger.log_metrics(score_metrics(context, key), step=num_steps(context, key))
    return arm


@contextmanager
def _loggers(context: RunContext, arm: Arm) -> Iterator[list[Logger]]:
    """Open the loggers for an arm, unless it was fitted before."""
    if context.ledger.get(f"{arm.name}.fit") is not None:
        yield []
        return
    with open_loggers(context, "control" if arm.is_control else None) as loggers:
        yield loggers


def _gate(context: RunContext, attempt: Arm) -> StageResult:
    checks = verdict.checks(context, attempt)
    status = decide(checks, enabled=context.config.gate.enabled)
    return StageResult(found={"status": status, "checks": [check.to_dict() for check in checks]})


def _publish(context: RunContext, attempt: Arm, status: Status) -> StageResult:
    lineage = verdict.publish(context, attempt, keep=status != "rolled_back")
    return StageResult(
        found={
            "model_hash": lineage.model_hash,
            "parent_hash": lineage.parent_hash,
            "base_model_hash": lineage.base_model_hash,
            "expansions": [record.method for record in lineage.expansion_history],
        },
        leaves=("checkpoint",),
    )


def _summary(context: RunContext, arms: Sequence[Arm], control: Arm) -> dict[str, Any]:
    """Assemble summary.json from the ledger and the scores on disk; the last arm stands in front.

    Args:
        arms: the rounds that ran; of a run that does not grow to a size the one attempt.
    """
    last = arms[-1]
    records = [_attempt_record(context, arm) for arm in arms]
    attempt, status = records[-1], records[-1]["status"]
    places = {"baseline": "baseline", "final": "checkpoint"}
    sizes = {name: read_config(context.folder / place) for name, place in places.items()}
    is_kept = status != "rolled_back"
    summary: dict[str, Any] = {
        "format_version": 1,
        "status": status,
        "domains": {"old": list(context.old_domains), "new": list(context.new_domains)},
        "data": {name: asdict(counts) for name, counts in context.corpus.counts.items()},
        "expansion": [spec.name for arm in arms for spec in arm.specs],
        "forgetting": [options.name for options in context.config.forgetting],
        "seed": context.config.seed,
        "baseline": _scores(context, "baseline"),
        "expanded": attempt["expanded"],
        "final": attempt["final"] if is_kept else _scores(context, last.start_scores),
        "gate": attempt["gate"],
        "attempts": [attempt],
        "jump": attempt["jump"],
        "flops": context.ledger.flops(),
        "seconds": context.ledger.seconds(),
        "parameters": {name: count_parameters(config) for name, config in sizes.items()},
        "parameters_on_disk": {name: count_parameters(on_disk(c)) for name, c in sizes.items()},
        "checkpoint": "checkpoint",
        "lineage": context.ledger["publish"].found,
        "samples": context.ledger[f"{last.name}.evaluate"].found["samples"],
        "notes": [*context.notes, *(n for arm in arms for n in importance.notes(context, arm))],
    }
    if (used := moe.summary_record(context, last)) is not None:
        summary["moe"] = used
    if last.is_round:
        summary |= {"rounds": records, "target": target_record(context, last)}
    if context.config.control:
        summary["control"] = _arm_record(context, control, _gate(context, control))
    return summary


def _attempt_record(context: RunContext, arm: Arm) -> dict[str, Any]:
    grown = context.ledger[f"{arm.name}.expand"]
    start = {"baseline": _scores(context, arm.start_scores)} if arm.follows else {}
    return {
        **_arm_record(context, arm, context.ledger[arm.key("gate")]),
        "expanded": _scores(context, f"{arm.name}-expanded" if arm.specs else arm.start_scores),
        "jump": grown.found.get("jump"),
        **start,
    }


def _arm_record(context: RunContext, arm: Arm, gate: StageResult) -> dict[str, Any]:
    fitted, grown = (context.ledger[f"{arm.name}.{stage}"] for stage in ("fit", "expand"))
    return {
        "expansion": [spec.name for spec in arm.specs],
        "status": gate.found["status"],
        "final": _scores(context, f"{arm.name}-trained"),
        "gate": gate.found["checks"],
        "steps": fitted.found["steps"],
        "ended_early": fitted.found.get("ended_early"),
        "refused_steps": fitted.found["refused_steps"],
        "update_norms": fitted.found["update_norms"],
        "parameters": grown.found["parameters"],
        "notes": grown.found["notes"],
        "flops": sum(fitted.flops.values()),
        "seconds": sum(fitted.seconds.values()),
    }


def _scores(context: RunContext, name: str) -> dict[str, Any]:
    return score_records(context.read_scores(name))


def _metric(summary: dict[str, Any]) -> float:
    # Of what was kept, all runs that are rolled back would have the number of their base
    trained = summary["attempts"][-1]["final"]
    losses = [record["loss_per_byte"] for record in trained.values()]
    return math.nan if None in losses else float(sum(losses) / len(losses))


def _announce(context: RunContext) -> None:
    config = context.config
    expansion = ", ".join(spec.name for spec in config.expansion) or "none"
    forgetting = ", ".join(options.name for options in config.forgetting) or "none"
    context.say("tritter", f"expansion={expansion}  forgetting={forgetting}  seed={config.seed}")
    context.say("run", str(context.folder))
    parts = [
        f"{source.name} ({source.num_documents} documents, {source.num_bytes / 1e6:.1f} MB)"
        for source in context.corpus.sources.values()
    ]
    origins = dict.fromkeys(source.origin for source in context.corpus.sources.values())
    context.say("data", f"{', '.join(parts)}; {', '.join(origins)}")
    for note in context.notes:
        context.say("", note)
    if not context.old_domains:
        context.say("", "no old text (data.old): forgetting is not measured, and not gated")


def _check_text(context: RunContext) -> None:
    """Refuse text that can't be trained on, or that is not what the run began with.

    Raises:
        RequestError: says which.
    """
    context.check_text()
    begun = context.ledger.get("baseline")
    if begun is not None and begun.found.get("corpus") not in (None, context.corpus.digest):
        raise RequestError(
            f"data: the text has changed since the run in {context.folder} began; put it back, "
            "or begin another run."
        )


def _print_next(context: RunContext, summary: Mapping[str, Any], plots: list[Path]) -> None:
    for plot in plots:
        context.say("plot", str(plot))
    context.say("summary", str(context.folder / SUMMARY_NAME))
    words = read_status(context.folder).get("overrides", ())
    commands = next_commands(context.config, summary, words=words, folder=context.folder)
    context.console.print("\nNext:", highlight=False)
    for command in commands:
        context.console.print(f"  {command}", highlight=False, soft_wrap=True, markup=False)
