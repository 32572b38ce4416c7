"""One run from its config to a summary, a table and a checkpoint that was kept or rolled back."""

import json
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from rich.console import Console

from tritter.config.schema import RunConfig, TextDataConfig
from tritter.errors import RequestError
from tritter.evaluation.gate import Status, decide
from tritter.expansion import EXPANSIONS
from tritter.pipeline import stages, verdict
from tritter.pipeline.arm import Arm
from tritter.pipeline.context import RunContext, score_records
from tritter.pipeline.given import check_given
from tritter.pipeline.ledger import Ledger, StageResult
from tritter.pipeline.metrics import evaluation_metrics, wandb_logger, write_metrics
from tritter.report.plots import plot_run
from tritter.report.tables import print_summary
from tritter.storage.atomic import write_text_atomic

ATTEMPT = "attempt_1"
CONTROL = Arm("control", (), is_control=True)
SUMMARY_NAME = "summary.json"


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended.

    Args:
        status: kept, rolled_back or undecided.
        metric: mean loss over old and new domains of what was kept, nats per byte; what a
            sweeper minimises.
        summary_path: where summary.json lies.
    """

    status: Status
    metric: float
    summary_path: Path


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
    attempt = Arm(ATTEMPT, config.expansion)
    check_given(context)
    _announce(context)
    _check_text(context)
    context.stage("baseline", lambda: stages.baseline(context), label="baseline")
    if stages.needs_importance(context):
        context.stage("importance", lambda: stages.importance(context), label="importance")
    _run_arm(context, attempt)
    if config.control:
        context.say("control", "the un-grown base, trained in the same way")
        _run_arm(context, CONTROL)
    gate = context.stage("gate", lambda: _gate(context, attempt), label="gate")
    status = gate.found["status"]
    context.stage("publish", lambda: _publish(context, attempt, status), label="publish")
    summary = _summary(context, attempt, status)
    path = run_folder / SUMMARY_NAME
    write_text_atomic(path, json.dumps(summary, indent=1) + "\n")
    metrics_csv = write_metrics(context, ATTEMPT)
    plots = plot_run(summary, metrics_csv, run_folder / "plots")
    print_summary(summary, console=context.console, folder=run_folder)
    _print_next(context, plots)
    return Outcome(status=status, metric=_metric(summary), summary_path=path)


def _run_arm(context: RunContext, arm: Arm) -> None:
    key, label = arm.name, arm.label
    context.stage(f"{key}.expand", lambda: stages.expansion(context, arm), label=label("expand"))
    with _loggers(context, arm) as loggers:
        context.stage(
            f"{key}.fit",
            lambda: stages.training(context, arm, loggers=loggers),
            label=label("fit"),
        )
        context.stage(
            f"{key}.evaluate", lambda: stages.evaluation(context, arm), label=label("evaluate")
        )
        for logger in loggers:
            logger.log_metrics(evaluation_metrics(context, key))


@contextmanager
def _loggers(context: RunContext, arm: Arm) -> Iterator[list[Logger]]:
    """Open W&B for the attempt, unless it was fitted before, and close it whatever happens."""
    is_open = not arm.is_control and context.ledger.get(f"{arm.name}.fit") is None
    logger = wandb_logger(context) if is_open else None
    try:
        yield [] if logger is None else [logger]
    finally:
        if logger is not None:
            logger.experiment.finish()


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
        }
    )


def _summary(context: RunContext, attempt: Arm, status: Status) -> dict[str, Any]:
    """Assemble summary.json from the ledger and the scores on disk."""
    found = {
        name: result.found
        for name in ("baseline", f"{ATTEMPT}.expand", f"{ATTEMPT}.evaluate", "publish")
        if (result := context.ledger.get(name)) is not None
    }
    before = score_records(context.read_scores("baseline"))
    expanded = _expanded_scores(context, attempt)
    gate = context.ledger.get("gate")
    assert gate is not None
    outcome = _arm_record(context, attempt, gate)
    grown = found[f"{ATTEMPT}.expand"]
    is_kept = status != "rolled_back"
    summary: dict[str, Any] = {
        "format_version": 1,
        "status": status,
        "domains": {"old": list(context.old_domains), "new": list(context.new_domains)},
        "expansion": [spec.name for spec in attempt.specs],
        "forgetting": [options.name for options in context.config.forgetting],
        "seed": context.config.seed,
        "baseline": before,
        "expanded": expanded,
        "final": outcome["final"] if is_kept else before,
        "gate": outcome["gate"],
        "attempts": [{**outcome, "expanded": expanded, "jump": grown.get("jump")}],
        "jump": grown.get("jump"),
        "flops": context.ledger.flops(),
        "seconds": context.ledger.seconds(),
        "parameters": {
            "baseline": found["baseline"]["parameters"],
            "final": grown["parameters"] if is_kept else found["baseline"]["parameters"],
        },
        "checkpoint": "checkpoint",
        "lineage": found["publish"],
        "samples": found[f"{ATTEMPT}.evaluate"]["samples"],
    }
    if context.config.control:
        gate = _gate(context, CONTROL)
        summary["control"] = _arm_record(context, CONTROL, gate)
    return summary


def _arm_record(context: RunContext, arm: Arm, gate: StageResult) -> dict[str, Any]:
    fitted = context.ledger.get(f"{arm.name}.fit")
    grown = context.ledger.get(f"{arm.name}.expand")
    assert fitted is not None and grown is not None
    return {
        "expansion": [spec.name for spec in arm.specs],
        "status": gate.found["status"],
        "final": score_records(context.read_scores(f"{arm.name}-trained")),
        "gate": gate.found["checks"],
        "steps": fitted.found["steps"],
        "refused_steps": fitted.found["refused_steps"],
        "update_norms": fitted.found["update_norms"],
        "parameters": grown.found["parameters"],
        "notes": grown.found["notes"],
        "flops": sum(fitted.flops.values()),
        "seconds": sum(fitted.seconds.values()),
    }


def _expanded_scores(context: RunContext, arm: Arm) -> dict[str, Any]:
    name = f"{arm.name}-expanded" if arm.specs else "baseline"
    return score_records(context.read_scores(name))


def _metric(summary: dict[str, Any]) -> float:
    losses = [record["loss_per_byte"] for record in summary["final"].values()]
    return float(sum(losses) / len(losses))


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


def _print_next(context: RunContext, plots: list[Path]) -> None:
    for plot in plots:
        context.say("plot", str(plot))
    context.say("summary", str(context.folder / SUMMARY_NAME))
    commands = _next_commands(context)
    context.console.print("\nNext:", highlight=False)
    for command in commands:
        context.console.print(f"  {command}", highlight=False, soft_wrap=True, markup=False)


def _next_commands(context: RunContext) -> list[str]:
    config = context.config
    if context.given is not None:
        folder = shlex.quote(str(context.folder / "checkpoint"))
        return [f"tritter history {folder} --verify", f"tritter inspect {folder}"]
    used = {spec.name for spec in config.expansion}
    other = next(name for name in [*EXPANSIONS, "none"] if name not in used)
    text = ""
    if isinstance(config.data, TextDataConfig):
        text = " data=text data.old=... data.new=..."
    commands = [
        f"python train.py{text} expansion={other}",
        f"python train.py{text} -m expansion=none,dus,llama_pro,width forgetting=none,replay",
    ]
    if not config.control:
        comment = "   # beside the un-grown base"
        commands.insert(1, f"python train.py{text} control=true{comment}")
    return commands
