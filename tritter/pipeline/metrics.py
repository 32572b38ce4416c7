"""Metrics of a run: one CSV file, and W&B and other loggers if selected."""

import csv
import inspect
import io
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

from lightning.pytorch.loggers import Logger, MLFlowLogger, WandbLogger

from tritter.checkpoints import Lineage
from tritter.checkpoints.location import public_files
from tritter.config.run_folder import fingerprint
from tritter.errors import TritterError
from tritter.evaluation.statistics import finite_or_none
from tritter.pipeline.branch import Branch
from tritter.pipeline.ledger import ExpansionFound
from tritter.pipeline.run import Run
from tritter.report.runs import EndedRun
from tritter.report.summary import Summary
from tritter.report.table import ACCURACY
from tritter.storage.atomic import write_text_atomic
from tritter.storage.reading import read_text
from tritter.targets import Component, instantiate
from tritter.training import metrics_files, read_metrics

_WANDB_STEP = "trainer/global_step"  # name used by Lightning's logger
_SAMPLES_NAME = "samples.jsonl"  # in the folder of a training run
_SAMPLES_KEY = "samples/training"  # of the table in W&B
_SAMPLE_COLUMNS = ("step", "prompt", "continuation")
_BEFORE = -1  # step of the model before its expansion


def score_metrics(run: Run, branch_name: str) -> dict[str, float]:
    """Return `score/<domain>/loss` and `score/<task>/accuracy` of a trained branch.

    Scores cover all validation documents; one that is not finite is left out.
    """
    found = {}
    for subject, scores in run.read_scores(f"{branch_name}-trained").items():
        name, is_accuracy = subject.removesuffix(ACCURACY), scores.unit == "accuracy"
        key = f"score/{name}/accuracy" if is_accuracy else f"score/{name}/loss"
        if (mean := finite_or_none(scores.mean())) is not None:
            found[key] = mean
    return found


def _before_metrics(run: Run, branch_name: str) -> dict[str, float]:
    """Return `eval/<domain>/…` before a branch's expansion; empty if it did not expand."""
    stage = f"{branch_name}.expand"
    did_expand = run.ledger.get(stage) is not None
    return dict(run.ledger.found(stage, ExpansionFound).before) if did_expand else {}


def _join_rows(run: Run, branches: Sequence[Branch]) -> list[dict[str, str]]:
    """Return the logged rows of consecutive branches with continuous steps and final scores.

    Rows before the first step of a later task are omitted: they repeat the previous task's end.
    A later round begins with a row at the step of the previous end: the score after its expansion.
    """
    rows: list[dict[str, str]] = []
    for number, branch in enumerate(branches):
        first = run.ledger.steps(branches[:number])
        logged = read_metrics(run.folder / branch.name)
        if before := _before_metrics(run, branch.name):
            logged.insert(0, {"step": str(_BEFORE)} | {k: str(v) for k, v in before.items()})
        last: dict[str, object] = {"step": run.ledger.training(branch.name).steps}
        logged.append({k: str(v) for k, v in (last | score_metrics(run, branch.name)).items()})
        earliest = 0 if branch.is_round and not branch.task else 1  # of a later branch
        rows += [
            row | {"step": str(int(row["step"]) + first)}
            for row in logged
            if not first or int(row["step"]) >= earliest
        ]
    return rows


def write_metrics(run: Run, branches: Sequence[Branch], *, of: str = "") -> list[dict[str, str]]:
    """Write the logged rows of consecutive branches, with their scores.

    Args:
        of: suffix of the file name, such as `control` in metrics_control.csv; empty for the run.

    Returns:
        The rows.
    """
    rows = _join_rows(run, branches)
    write_rows(run.folder / (f"metrics_{of}.csv" if of else "metrics.csv"), rows)
    return rows


def write_rows(path: Path, rows: Sequence[Mapping[str, str]]) -> None:
    """Write rows in the format of metrics.csv: `step` first, other columns by name."""
    columns = ["step", *sorted({name for row in rows for name in row} - {"step"})]
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text_atomic(path, text.getvalue())


def _wandb_summary(summary: Summary) -> dict[str, Any]:
    """Return the summary values of a run in W&B's tables."""
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
    for row in (*(ended := EndedRun("", summary, {})).rows, *ended.control_rows):
        name = f"control/{row.domain}" if row.is_control else row.domain
        values |= {
            f"{name}/before": row.before.value,
            f"{name}/expanded": None if row.expanded is None else row.expanded.value,
            f"{name}/trained": row.trained.value,
            f"{name}/change": row.change.value,
            f"{name}/verdict": row.verdict,
        }
    return {name: value for name, value in values.items() if value is not None}


def log_result_to_wandb(run: Run, summary: Summary, plots: Sequence[Path], *, step: int) -> None:
    """Log the summary, samples and plots of a finished run to its W&B run, if any.

    Args:
        step: last step of the run.
    """
    if (logger := wandb_logger(run)) is None:
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
        table = wandb.Table(columns=["task", "tokens", "documents"], data=lengths)
        media["performance/packed_sequence_length_histogram"] = table
    similarities = [
        [spawn.expert, spawn.step, known, similarity]
        for spawn in (summary.experts.spawned if summary.experts is not None else ())
        for known, similarity in spawn.similarity.items()
    ]
    if similarities:
        table = wandb.Table(columns=["expert", "step", "known", "similarity"], data=similarities)
        media["experts/similarity_scores_on_creation"] = table
    if samples:
        rows = [list(sample.values()) for sample in samples]
        media["samples"] = wandb.Table(columns=list(samples[0]), data=rows)
    if run.config.trainer.has_workers and (rows := _training_samples(run.folder)):
        media[_SAMPLES_KEY] = _samples_table(rows)
    logger.log_metrics(media, step=step)
    logger.experiment.summary.update(_wandb_summary(summary))
    settings = run.config.wandb
    if settings is not None and settings.log_model and summary.status != "rolled_back":
        _log_model(logger, run.folder / "checkpoint", summary)


def log_samples(
    folder: Path, loggers: Sequence[Logger], rows: Sequence[Sequence[Any]], *, step: int
) -> None:
    """Write samples of a training run to `samples.jsonl`, and log them to W&B as a table.

    Args:
        folder: folder of the training run.
        loggers: its loggers; W&B is among them if it is open in this process.
        rows: step, prompt and continuation of each sample.
        step: step of the training run.
    """
    lines = [json.dumps(dict(zip(_SAMPLE_COLUMNS, row, strict=True))) for row in rows]
    write_text_atomic(folder / _SAMPLES_NAME, "\n".join([*lines, ""]))
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.log_metrics({_SAMPLES_KEY: _samples_table(rows)}, step=step)


def _samples_table(rows: Sequence[Sequence[Any]]) -> Any:
    import wandb

    return wandb.Table(columns=list(_SAMPLE_COLUMNS), data=[list(row) for row in rows])


def _training_samples(run_folder: Path) -> list[list[Any]]:
    """Return the rows of the last training of a run, except the control."""
    logged = [*run_folder.glob(f"attempt_*/{_SAMPLES_NAME}")]
    logged += run_folder.glob(f"round_*/{_SAMPLES_NAME}")
    newest = max(logged, key=lambda path: path.stat().st_mtime_ns, default=None)
    lines = [] if newest is None else read_text(newest).splitlines()
    return [list(json.loads(line).values()) for line in lines]


def _log_model(logger: WandbLogger, folder: Path, summary: Summary) -> None:
    """Log a checkpoint as an artifact, with the files that `tritter push` would upload."""
    import wandb

    lineage = Lineage.of(folder)
    metadata = {"status": summary.status, "model_hash": lineage.model_hash}
    artifact = wandb.Artifact(f"checkpoint-{logger.version}", type="model", metadata=metadata)
    for name, content in public_files(folder, lineage)[0].items():
        if isinstance(content, Path):
            # The files of a published checkpoint are replaced, never edited: no copy is needed
            artifact.add_file(str(content), name=name, policy="immutable")
        else:
            with artifact.new_file(name, mode="wb") as file:
                file.write(content)
    logger.experiment.log_artifact(artifact)


def _run_name(run: Run, part: str | None = None) -> str:
    """Return the name of a run in loggers, or of a separate part of it."""
    config, seed = run.config, f"seed {run.config.seed}"
    if part == "pretraining":
        return f"{part} {seed}"
    grown = "+".join(_names([*config.expansion, *filter(None, (config.growth, config.experts))]))
    if part is not None:
        grown = part if part == "control" else f"{part} {grown}"
    return f"{grown} {'+'.join(_names(config.forgetting))} {seed}"


def wandb_logger(run: Run, part: str | None = None) -> WandbLogger | None:
    """Return the logger of a W&B run, open until `wandb_finished` ends; None if W&B is off."""
    if (settings := run.config.wandb) is None:
        return None
    if part in run.wandb_loggers:
        return run.wandb_loggers[part]
    import wandb

    config = run.config
    id_file = run.folder / ("wandb_id" if part is None else f"wandb_id.{part}")
    if not id_file.exists():
        write_text_atomic(id_file, uuid4().hex[:8])
    run_id = id_file.read_text(encoding="utf-8")  # unchanged when the run resumes
    _truncate_killed_wandb(run.folder / "wandb", run_id)
    # Lightning would pass an option that W&B warns about; so the step metric is set here
    try:
        opened = wandb.init(
            project=settings.project,
            name=_run_name(run, part),
            job_type=part or "run",
            group=settings.group,
            tags=[
                *settings.tags,
                *(f"expansion:{name}" for name in _names(config.expansion)),
                *(f"forgetting:{name}" for name in _names(config.forgetting)),
                f"seed:{config.seed}",
            ],
            dir=run.folder,
            id=run_id,
            resume="allow",
            reinit="create_new",  # the control trains while the run is open
            mode="offline" if settings.mode == "offline" else "online",
            config=fingerprint(config),
            settings=wandb.Settings(silent=True),
        )
    except wandb.Error as error:  # no API key, no connection
        advice = "logger.wandb.mode=offline needs no account and no connection"
        raise TritterError(f"logger.wandb: {str(error).rstrip('.')}; {advice}.") from error
    opened.define_metric(_WANDB_STEP)
    opened.define_metric("*", step_metric=_WANDB_STEP, step_sync=True)
    run.wandb_loggers[part] = WandbLogger(experiment=opened, log_model=False)
    return run.wandb_loggers[part]


@contextmanager
def wandb_finished(run: Run) -> Iterator[None]:
    """Finish the W&B runs opened inside; each process writes one folder per run."""
    exit_code = 1
    try:
        yield
        exit_code = 0
    finally:
        while run.wandb_loggers:
            run.wandb_loggers.popitem()[1].experiment.finish(exit_code=exit_code)


def _truncate_killed_wandb(folder: Path, run_id: str) -> None:
    """Truncate unfinished records in the files of killed processes; `wandb sync` stops at them.

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
            if (rest := -at % 2**15) and rest < 7:  # too little for a header
                at += rest
                continue
            is_last = data[at + 6] in (1, 4)  # the last fragment of a record
            at += 7 + int.from_bytes(data[at + 4 : at + 6], "little")
            whole = at if is_last and at <= len(data) else whole
        if whole == 7:
            shutil.rmtree(path.parent)
        elif whole < len(data):
            os.truncate(path, whole)


def _names(options: Sequence[Any]) -> list[str]:
    return [one.name for one in options] or ["none"]


@contextmanager
def _steps_after(first_step: int, logger: Logger) -> Iterator[None]:
    """Let a logger add an offset to all steps until the block ends."""
    log = logger.log_metrics

    def log_later(metrics: dict[str, float], step: int | None = None) -> None:
        log(metrics, None if step is None else first_step + step)

    logger.log_metrics = log_later  # type: ignore[method-assign]
    try:
        yield
    finally:
        del logger.log_metrics  # that of the class again; the logger of W&B stays open


@contextmanager
def open_loggers(
    run: Run, part: str | None = None, *, first_step: int = 0
) -> Iterator[list[Logger]]:
    """Yield the W&B logger, if selected, and then the other loggers in order.

    The first training run of a part logs the configuration; W&B has it from the start.

    Args:
        part: control, pretraining or a retry, logged separately in the same group; None for the
            run itself.
        first_step: number of steps of the part's earlier training runs.
    """
    loggers: list[Logger] = []
    with ExitStack() as opened:
        if (wandb := wandb_logger(run, part)) is not None:
            loggers.append(wandb)
        for named in run.config.logger:
            loggers.append(logger := _build_logger(named, run, part))
            opened.push(partial(_close, logger))
            if not first_step:
                logger.log_hyperparams(fingerprint(run.config))
        for logger in loggers if first_step else ():
            opened.enter_context(_steps_after(first_step, logger))
        yield loggers


@contextmanager
def log_branch(run: Run, branch: Branch, *, first_step: int) -> Iterator[None]:
    """Open the loggers of a branch's training, and log its metrics before the expansion.

    Args:
        first_step: number of steps of earlier branches.
    """
    if run.ledger.get(f"{branch.name}.evaluate") is not None:
        yield
        return
    with open_loggers(run.reading(branch.location), branch.part, first_step=first_step) as loggers:
        before = _before_metrics(run, branch.name)
        if before and not first_step and not metrics_files(run.folder / branch.name):
            for logger in loggers:
                logger.log_metrics(before, step=_BEFORE)
        run.loggers[:] = loggers
        yield
        run.loggers.clear()


def _close(logger: Logger, error: type[BaseException] | None, *_: object) -> None:
    logger.finalize("success" if error is None else "failed")


def _build_logger(named: Component, run: Run, part: str | None) -> Logger:
    """Build a logger that writes into the run folder, unless its options set another folder.

    A logger with run names gets the name of the part; others get a folder per part.
    """
    body = dict(named.options)
    parameters = inspect.signature(named.kind).parameters
    has_names = "run_name" in parameters
    if "save_dir" in parameters:
        folder = run.folder / str(body.get("save_dir") or named.name)
        body["save_dir"] = str(folder if part is None or has_names else folder / part)
    if has_names:
        body["run_name"] = body.get("run_name") or _run_name(run, part)
    if issubclass(named.kind, MLFlowLogger) and body.get("run_id") is None:
        id_name = f"{named.name}_id" if part is None else f"{named.name}_id.{part}"
        return _same_mlflow_run(body, run.folder / id_name)
    logger = instantiate(body)
    assert isinstance(logger, Logger)
    return logger


def _same_mlflow_run(body: Mapping[str, Any], id_file: Path) -> MLFlowLogger:
    """Open the MLflow run with the stored id, or a new run if MLflow does not have it."""
    from mlflow.exceptions import MlflowException

    known = id_file.read_text(encoding="utf-8") if id_file.exists() else None
    logger: MLFlowLogger = instantiate({**body, "run_id": known})
    try:
        logger.experiment.update_run(logger.run_id, status="RUNNING")
    except MlflowException as error:
        if known is None or error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        logger = instantiate(body)  # deleted on the server, or the server has changed
    write_text_atomic(id_file, str(logger.run_id))
    return logger
