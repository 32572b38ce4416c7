"""Metrics of a run beside its summary: one CSV, and W&B where it is asked for."""

import csv
import inspect
import io
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any
from uuid import uuid4

from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger, MLFlowLogger, WandbLogger

from tritter.config.run_folder import fingerprint
from tritter.evaluation.statistics import finite_or_none
from tritter.pipeline.branch import Branch
from tritter.pipeline.context import RunContext
from tritter.pipeline.ledger import ExpansionFound, TrainingFound
from tritter.report.rows import domain_rows
from tritter.report.summary import Summary
from tritter.report.wording import ACCURACY
from tritter.storage.atomic import write_text_atomic
from tritter.targets import Component, built
from tritter.training import read_metrics

WANDB_STEP = "trainer/global_step"  # as Lightning's logger calls it
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
    return context.ledger.found(f"{arm_name}.fit", TrainingFound).steps


def before_metrics(context: RunContext, arm_name: str) -> dict[str, float]:
    """Return `eval/<domain>/…` of what an arm expanded; of one that did not grow nothing."""
    stage = f"{arm_name}.expand"
    if context.ledger.get(stage) is None:
        return {}
    return dict(context.ledger.found(stage, ExpansionFound).before)


def first_step(context: RunContext, branches: Sequence[Branch], branch: Branch) -> int:
    """Return where an arm's steps stand among those of the arms that are trained in a row."""
    before = takewhile(lambda each: each.name != branch.name, branches)
    return sum(num_steps(context, each.name) for each in before)


def joined_rows(context: RunContext, branches: Sequence[Branch]) -> list[dict[str, str]]:
    """Return what arms logged that were trained in a row, steps counted on, scores at each end.

    What was evaluated before a task's first step is what stands at the end of the one before.
    """
    rows: list[dict[str, str]] = []
    for branch in branches:
        first = first_step(context, branches, branch)
        logged = read_metrics(context.folder / branch.name)
        if before := before_metrics(context, branch.name):
            logged.insert(0, {"step": str(BEFORE)} | {k: str(v) for k, v in before.items()})
        last: dict[str, object] = {"step": num_steps(context, branch.name)}
        logged.append({k: str(v) for k, v in (last | score_metrics(context, branch.name)).items()})
        rows += [
            row | {"step": str(int(row["step"]) + first)}
            for row in logged
            if not first or int(row["step"]) > 0
        ]
    return rows


def write_metrics(
    context: RunContext, branches: Sequence[Branch], *, of: str = ""
) -> list[dict[str, str]]:
    """Write what arms logged in a row: the step before them, their trainings, their scores.

    Args:
        of: what they are, where they are not the run itself: `control` in metrics_control.csv.

    Returns:
        The rows.
    """
    rows = joined_rows(context, branches)
    write_rows(context.folder / (f"metrics_{of}.csv" if of else "metrics.csv"), rows)
    return rows


def write_rows(path: Path, rows: Sequence[Mapping[str, str]]) -> None:
    """Write rows as a metrics.csv has them: `step` first, the other columns by name."""
    columns = ["step", *sorted({name for row in rows for name in row} - {"step"})]
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text_atomic(path, text.getvalue())


def wandb_summary(summary: Summary) -> dict[str, Any]:
    """Return what stands beside a run in W&B's tables."""
    values: dict[str, Any] = {
        "status": summary.status,
        "parameters/before": summary.parameters["baseline"],
        "parameters/after": summary.parameters["final"],
        "jump/relative_to_std": None if summary.jump is None else summary.jump.relative_to_std,
        "flops": summary.flops["total"],
    }
    if (growth := summary.growth) is not None:
        values |= {
            "growth/born": growth.born,
            "growth/replaced": growth.replaced,
            "growth/died": growth.died,
            "growth/parameters": growth.parameters.after,
        }
    if (experts := summary.experts) is not None:
        values |= {
            "experts/number": experts.number,
            "experts/spawned": len(experts.spawned),
            "experts/trainable": experts.parameters.trainable,
            "experts/trainable_share": experts.parameters.share,
        }
    if (matrix := summary.matrix) is not None:
        values["transfer/backward"] = matrix.mean_backward_transfer
        values["transfer/forward"] = matrix.mean_forward_transfer
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


def log_result_to_wandb(
    context: RunContext, summary: Summary, plots: Sequence[Path], *, step: int
) -> None:
    """Log summary, samples and plots of a finished run to its W&B run, if there is one.

    Args:
        step: the last one of the run.
    """
    logger = wandb_logger(context)
    if logger is None:
        return
    import wandb

    samples = [sample.plain() for sample in summary.samples]
    media: dict[str, Any] = {f"plots/{plot.stem}": wandb.Image(str(plot)) for plot in plots}
    lengths = [
        [number, tokens, documents]
        for number, task in enumerate(summary.tasks, start=1)
        for tokens, documents in task.packing.packed_sequence_length_histogram.items()
    ]
    if lengths:
        columns = ["task", "tokens", "documents"]
        table = wandb.Table(columns=columns, data=lengths)
        media["performance/packed_sequence_length_histogram"] = table
    similarities = [
        [spawn.expert, spawn.step, known, similarity]
        for spawn in (summary.experts.spawned if summary.experts is not None else ())
        for known, similarity in spawn.similarity.items()
    ]
    if similarities:
        columns = ["expert", "step", "known", "similarity"]
        table = wandb.Table(columns=columns, data=similarities)
        media["experts/similarity_scores_on_creation"] = table
    if samples:
        rows = [list(sample.values()) for sample in samples]
        media["samples"] = wandb.Table(columns=list(samples[0]), data=rows)
    logger.log_metrics(media, step=step)
    logger.experiment.summary.update(wandb_summary(summary))


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
    """Return the logger of a W&B run, which stays open until `wandb_finished` ends; None when off.

    Args:
        part: control, pretraining or a further attempt, which are runs of their own; None: the run
            itself.
    """
    if (settings := context.config.logger.wandb) is None:
        return None
    if part in context.wandb_loggers:
        return context.wandb_loggers[part]
    import wandb

    config = context.config
    kept = context.folder / ("wandb_id" if part is None else f"wandb_id.{part}")
    if not kept.exists():
        write_text_atomic(kept, uuid4().hex[:8])
    run_id = kept.read_text(encoding="utf-8")  # the same when the run is resumed
    _mend_killed_wandb(context.folder / "wandb", run_id)
    # Not through Lightning, which passes an option that W&B warns about; so its axis is set here
    run = wandb.init(
        project=settings.project,
        name=run_name(context, part),
        job_type=part or "run",
        group=settings.group,
        tags=[
            *settings.tags,
            *(f"expansion:{name}" for name in _names(config.expansion)),
            *(f"forgetting:{name}" for name in _names(config.forgetting)),
            f"seed:{config.seed}",
        ],
        dir=context.folder,
        id=run_id,
        resume="allow",
        reinit="create_new",  # the control is trained while the run is open
        mode="offline" if settings.mode == "offline" else "online",
        config=fingerprint(config),
        settings=wandb.Settings(silent=True),
    )
    run.define_metric(WANDB_STEP)
    run.define_metric("*", step_metric=WANDB_STEP, step_sync=True)
    context.wandb_loggers[part] = WandbLogger(experiment=run, log_model=False)
    return context.wandb_loggers[part]


@contextmanager
def wandb_finished(context: RunContext) -> Iterator[None]:
    """Finish the W&B runs that were opened inside: each leaves one folder per process."""
    exit_code = 1
    try:
        yield
        exit_code = 0
    finally:
        while context.wandb_loggers:
            context.wandb_loggers.popitem()[1].experiment.finish(exit_code=exit_code)


def _mend_killed_wandb(folder: Path, run_id: str) -> None:
    """Cut the unfinished end off the files of killed processes: `wandb sync` would stop there.

    The files are LevelDB logs: blocks of 32 KiB, and records with a header of 7 bytes (checksum,
    length, type) that do not cross blocks. W&B writes block by block, so a file may have no record.
    """
    for path in folder.glob("offline-run-*/run-*.wandb"):
        if path.name != f"run-{run_id}.wandb" or path.is_symlink() or path.parent.is_symlink():
            continue
        data, at, whole = path.read_bytes(), 7, 7  # W&B's own header comes first
        if not data.startswith(b":W&B"):
            continue
        while at + 7 <= len(data):
            if (room := -at % 2**15) and room < 7:  # too little for a header
                at += room
                continue
            is_last = data[at + 6] in (1, 4)  # of the parts of a record
            at += 7 + int.from_bytes(data[at + 4 : at + 6], "little")
            whole = at if is_last and at <= len(data) else whole
        if whole == 7:
            shutil.rmtree(path.parent)
        elif whole < len(data):
            os.truncate(path, whole)


def _names(options: Sequence[Any]) -> list[str]:
    return [one.name for one in options] or ["none"]


class CountedOn(Logger):
    """A logger for a training that others came before.

    Args:
        logger: takes what is logged.
        first_step: is added to every step.
    """

    def __init__(self, logger: Logger, first_step: int) -> None:
        self._logger = logger
        self._first_step = first_step

    @property
    def name(self) -> str | None:
        return self._logger.name

    @property
    def version(self) -> int | str | None:
        return self._logger.version

    @property
    def save_dir(self) -> str | None:
        return self._logger.save_dir

    @property
    def root_dir(self) -> str | None:
        return self._logger.root_dir

    @property
    def log_dir(self) -> str | None:
        return self._logger.log_dir

    @property
    def group_separator(self) -> str:
        return self._logger.group_separator

    @property
    def experiment(self) -> Any:
        """What the logger writes to."""
        return self._logger.experiment  # type: ignore[attr-defined]

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self._logger.log_metrics(metrics, None if step is None else self._first_step + step)

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        self._logger.log_hyperparams(params, *args, **kwargs)

    def log_graph(self, model: Any, input_array: Any = None) -> None:
        self._logger.log_graph(model, input_array)

    def after_save_checkpoint(self, checkpoint_callback: ModelCheckpoint) -> None:
        self._logger.after_save_checkpoint(checkpoint_callback)

    def save(self) -> None:
        self._logger.save()

    def finalize(self, status: str) -> None:
        self._logger.finalize(status)


@contextmanager
def open_loggers(
    context: RunContext, part: str | None = None, *, first_step: int = 0
) -> Iterator[list[Logger]]:
    """Yield W&B if it is chosen, which stays open, and then the other loggers in their order.

    The first training of a part logs the configuration; W&B has it from its start.

    Args:
        part: control, pretraining or a further attempt, each beside the run in the same group;
            None: the run itself.
        first_step: from where steps are counted: those of the trainings of the part before.
    """
    loggers: list[Logger] = []
    with ExitStack() as opened:
        if (wandb := wandb_logger(context, part)) is not None:
            loggers.append(wandb)
        for named in context.config.logger.others:
            loggers.append(logger := _built(named, context, part))
            opened.push(partial(_close, logger))
            if not first_step:
                logger.log_hyperparams(fingerprint(context.config))
        yield [CountedOn(logger, first_step) if first_step else logger for logger in loggers]


def _close(logger: Logger, error: type[BaseException] | None, *_: object) -> None:
    logger.finalize("success" if error is None else "failed")


def _built(named: Component, context: RunContext, part: str | None) -> Logger:
    """Build a logger that writes below the run folder, unless it is told another place.

    One that names its runs is told the part's name; of others each part has a folder.
    """
    body = dict(named.options)
    takes = inspect.signature(named.kind).parameters
    has_names = "run_name" in takes
    if "save_dir" in takes:
        folder = context.folder / str(body.get("save_dir") or named.name)
        body["save_dir"] = str(folder if part is None or has_names else folder / part)
    if has_names:
        body["run_name"] = body.get("run_name") or run_name(context, part)
    if issubclass(named.kind, MLFlowLogger) and body.get("run_id") is None:
        kept = f"{named.name}_id" if part is None else f"{named.name}_id.{part}"
        return _same_mlflow_run(body, context.folder / kept)
    logger = built(body)
    assert isinstance(logger, Logger)
    return logger


def _same_mlflow_run(body: Mapping[str, Any], kept: Path) -> MLFlowLogger:
    """Open the run in MLflow whose id is kept, or a new one where MLflow does not have it."""
    from mlflow.exceptions import MlflowException

    known = kept.read_text(encoding="utf-8") if kept.exists() else None
    logger: MLFlowLogger = built({**body, "run_id": known})
    try:
        logger.experiment.update_run(logger.run_id, status="RUNNING")
    except MlflowException as error:
        if known is None or error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        logger = built(body)  # it was deleted there, or another server is named now
    write_text_atomic(kept, str(logger.run_id))
    return logger
