"""Metrics of a run beside its summary: one CSV, and W&B where it is asked for."""

import csv
import io
from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any
from uuid import uuid4

from lightning.pytorch.loggers import WandbLogger

from tritter.config.fingerprint import fingerprint
from tritter.evaluation.estimate import finite_or_none
from tritter.pipeline.arm import Arm
from tritter.pipeline.context import RunContext
from tritter.report.experts_record import ExpertsRecord
from tritter.report.rows import ACCURACY, domain_rows
from tritter.storage.atomic import write_text_atomic
from tritter.training import read_metrics

BEFORE = -1  # the step that stands for the model before its expansion


def score_metrics(context: RunContext, arm_name: str) -> dict[str, float]:
    """Return `score/<domain>/loss` of a trained arm, over all validation documents.

    Of its tasks `score/<task>/accuracy`.
    """
    scores = context.read_scores(f"{arm_name}-trained")
    means = {subject: finite_or_none(held.mean()) or 0.0 for subject, held in scores.items()}
    of_answers = [subject for subject, held in scores.items() if held.unit == "accuracy"]
    return {
        **{f"score/{name}/loss": mean for name, mean in means.items() if name not in of_answers},
        **{f"score/{n.removesuffix(ACCURACY)}/accuracy": means[n] for n in of_answers},
    }


def num_steps(context: RunContext, arm_name: str) -> int:
    """Return the steps that an arm was trained for."""
    fitted = context.ledger.get(f"{arm_name}.fit")
    assert fitted is not None
    return int(fitted.found["steps"])


def before_metrics(context: RunContext, arm_name: str) -> dict[str, float]:
    """Return `eval/<domain>/loss` of what an arm expanded; of one that did not grow nothing."""
    grown = context.ledger.get(f"{arm_name}.expand")
    return {} if grown is None else dict(grown.found.get("before", {}))


def arm_rows(context: RunContext, arm_name: str) -> list[dict[str, str]]:
    """Return what an arm logged, in the order of its steps, from `BEFORE` on."""
    rows = read_metrics(context.folder / arm_name)
    if before := before_metrics(context, arm_name):
        rows.insert(0, {"step": str(BEFORE)} | {name: str(v) for name, v in before.items()})
    return rows


def first_step(context: RunContext, arms: Sequence[Arm], arm: Arm) -> int:
    """Return where an arm's steps stand among those of the arms that are trained in a row."""
    before = takewhile(lambda each: each.name != arm.name, arms)
    return sum(num_steps(context, each.name) for each in before)


def joined_rows(context: RunContext, arms: Sequence[Arm]) -> list[dict[str, str]]:
    """Return what arms logged that were trained in a row, steps counted on, scores at each end.

    What was evaluated before a task's first step is what stands at the end of the one before.
    """
    rows: list[dict[str, str]] = []
    for arm in arms:
        first = first_step(context, arms, arm)
        logged = arm_rows(context, arm.name)
        last: dict[str, object] = {"step": num_steps(context, arm.name)}
        logged.append({k: str(v) for k, v in (last | score_metrics(context, arm.name)).items()})
        rows += [
            row | {"step": str(int(row["step"]) + first)}
            for row in logged
            if not first or int(row["step"]) > 0
        ]
    return rows


def write_metrics(context: RunContext, arms: Sequence[Arm], *, of: str = "") -> Path:
    """Write what arms logged in a row: the step before them, their trainings, their scores.

    Args:
        of: what they are, where they are not the run itself: `control` in metrics_control.csv.
    """
    path = context.folder / (f"metrics_{of}.csv" if of else "metrics.csv")
    write_rows(path, joined_rows(context, arms))
    return path


def write_rows(path: Path, rows: Sequence[Mapping[str, str]]) -> None:
    """Write rows as a metrics.csv has them: `step` first, the other columns by name."""
    columns = sorted({name for row in rows for name in row}, key=lambda name: (name != "step", name))
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text_atomic(path, text.getvalue())


def wandb_summary(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Return what stands beside a run in W&B's tables, from summary.json."""
    jump = summary.get("jump") or {}
    values: dict[str, Any] = {
        "status": summary["status"],
        "parameters/before": summary["parameters"]["baseline"],
        "parameters/after": summary["parameters"]["final"],
        "jump/relative_to_std": jump.get("relative_to_std"),
        "flops": summary["flops"]["total"],
    }
    if (growth := summary.get("growth")) is not None:
        values |= {f"growth/{name}": growth[name] for name in ("born", "replaced", "died")}
        values["growth/parameters"] = growth["parameters"]["after"]
    if (experts := ExpertsRecord.of(summary)) is not None:
        values |= {
            "experts/number": experts.number,
            "experts/spawned": len(experts.spawned),
            "experts/trainable": experts.trainable,
            "experts/trainable_share": experts.share,
        }
    matrix = summary.get("matrix") or {}
    for way in ("backward", "forward"):
        values[f"transfer/{way}"] = matrix.get(f"mean_{way}_transfer")
    for row in domain_rows(summary):
        name = f"control/{row.domain}" if row.is_control else row.domain
        values |= {
            f"{name}/before": row.before.value,
            f"{name}/expanded": None if row.expanded is None else row.expanded.value,
            f"{name}/trained": row.trained.value,
            f"{name}/change": row.change.value,
            f"{name}/verdict": row.verdict,
        }
    return {name: value for name, value in values.items() if value is not None}


def tell_wandb(context: RunContext, summary: Mapping[str, Any], plots: Sequence[Path]) -> None:
    """Put summary, samples and plots of a finished run beside its metrics, where W&B is used."""
    logger = wandb_logger(context)
    if logger is None:
        return
    import wandb

    run = logger.experiment
    samples = [list(sample.values()) for sample in summary["samples"]]
    told: dict[str, Any] = {f"plots/{plot.stem}": wandb.Image(str(plot)) for plot in plots}
    if lengths := _packed_lengths(summary):
        columns = ["task", "tokens", "documents"]
        table = wandb.Table(columns=columns, data=lengths)
        told["performance/packed_sequence_length_histogram"] = table
    if similarities := _similarities(summary):
        columns = ["expert", "step", "known", "similarity"]
        table = wandb.Table(columns=columns, data=similarities)
        told["experts/similarity_scores_on_creation"] = table
    if samples:
        told["samples"] = wandb.Table(columns=list(summary["samples"][0]), data=samples)
    run.log(told)
    run.summary.update(wandb_summary(summary))
    run.finish()


def _packed_lengths(summary: Mapping[str, Any]) -> list[list[Any]]:
    """Return task, tokens and how many documents had so many, of a run that packs documents."""
    return [
        [number, tokens, documents]
        for number, task in enumerate(summary["tasks"], start=1)
        for tokens, documents in task.get("packing", {})
        .get("packed_sequence_length_histogram", {})
        .items()
    ]


def _similarities(summary: Mapping[str, Any]) -> list[list[Any]]:
    """Return spawned expert, step, what was known, and how like it the batches were."""
    experts = ExpertsRecord.of(summary)
    return [
        [spawn.expert, spawn.step, known, similarity]
        for spawn in (experts.spawned if experts is not None else ())
        for known, similarity in spawn.similarity.items()
    ]


def run_name(context: RunContext, part: str | None = None) -> str:
    """Return what loggers call a run, or a part that stands beside it."""
    config, seed = context.config, f"seed {context.config.seed}"
    if part == "pretraining":
        return f"{part} {seed}"
    grown = "+".join(_names(config.expansion))
    if part is not None:
        grown = part if part == "control" else f"{part} {grown}"
    return f"{grown} {'+'.join(_names(config.forgetting))} {seed}"


def wandb_logger(context: RunContext, part: str | None = None) -> WandbLogger | None:
    """Return a W&B logger with group and tags, offline unless asked otherwise; None when off.

    Args:
        part: control, pretraining or a further attempt, which are runs of their own; None: the run
            itself.
    """
    settings = context.config.logger.wandb
    if settings is None:
        return None
    import wandb

    config = context.config
    # Made here and not by Lightning, which passes an option that wandb warns of on every run.
    run = wandb.init(
        project=settings.project,
        name=run_name(context, part),
        job_type=part or "run",
        # A job of a sweep has the sweep's name, which lets W&B compare them
        group=settings.group or context.folder.parent.name,
        tags=[
            *settings.tags,
            *(f"expansion:{name}" for name in _names(config.expansion)),
            *(f"forgetting:{name}" for name in _names(config.forgetting)),
        ],
        dir=context.folder,
        id=_run_id(context.folder / ("wandb_id" if part is None else f"wandb_id.{part}")),
        resume="allow",
        mode="offline" if settings.mode == "offline" else "online",
        config=fingerprint(config),
        settings=wandb.Settings(silent=True),
    )
    return WandbLogger(experiment=run, log_model=False)


def _names(options: Sequence[Any]) -> list[str]:
    return [one.name for one in options] or ["none"]


def _run_id(path: Path) -> str:
    """Return the id of the run in W&B, the same when it is resumed."""
    if not path.exists():
        write_text_atomic(path, uuid4().hex[:8])
    return path.read_text(encoding="utf-8")
