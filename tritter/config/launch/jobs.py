"""One job as Hydra starts it: folder, pipeline, and what became of it in `status.json`."""

import math
import os
import traceback
from collections.abc import Sequence
from dataclasses import asdict, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from hydra._internal.callbacks import Callbacks
from hydra._internal.utils import run_and_report
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import configure_log
from hydra.core.utils import run_job as run_hydra_job
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig

from tritter.config.launch.composition import composer, plain_config
from tritter.config.launch.resume import recorded_words
from tritter.config.overrides import quoted
from tritter.config.run_folder import (
    RunState,
    check_run_folder,
    write_run_file,
)
from tritter.config.schema import RunConfig
from tritter.config.validation import validate
from tritter.errors import RequestError, TritterError
from tritter.stopping import Stopped
from tritter.storage.atomic import write_text_atomic
from tritter.storage.lock import alone_in
from tritter.storage.reading import SUMMARY_FILE
from tritter.storage.records import read_record, record, record_text
from tritter.terminal import say

if TYPE_CHECKING:
    from tritter.config.launch.plan import Job

STATUS_FILE = "status.json"

ENDS = ("kept", "rolled_back", "undecided", "ungated")


@record
class RunStatus:
    """How a job ended, or that it is running.

    Args:
        status: what the gate said; or running, failed, interrupted, not run, unknown.
        metric: what a sweep minimises; None where there is none, or none that is finite.
        summary: where summary.json is.
        error: why it failed.
    """

    FORMAT: ClassVar[str] = "run status"

    status: str
    exit_code: int
    overrides: list[str] = field(default_factory=list)
    metric: float | None = None
    summary: str | None = None
    error: str | None = None


EXIT_DONE, EXIT_FAILED, EXIT_REQUEST, EXIT_NOT_KEPT = 0, 1, 2, 3


class Outcome(Protocol):
    """What the pipeline returns of a run that finished."""

    @property
    def status(self) -> str:
        """One of `ENDS`."""
        ...

    @property
    def metric(self) -> float:
        """The number that a sweeper minimises."""
        ...

    @property
    def leaves(self) -> tuple[str, ...]:
        """What a finished run leaves, relative to its folder: by it a run is known as finished."""
        ...


class Pipeline(Protocol):
    """The stages of a run, as `tritter.pipeline.run_pipeline`."""

    def __call__(self, config: RunConfig, *, run_folder: Path) -> Outcome: ...


def start_run(job: "Job", pipeline: Pipeline) -> None:
    """Start a single run as Hydra does, with what was composed when it was judged.

    Raises:
        RequestError: another process began in its folder since.
    """
    assert job.composition is not None
    composed, hydra = job.composition.composed, job.composition.hydra
    hydra.mode, hydra.run.dir = RunMode.RUN, str(job.folder)
    hydra.overrides.hydra.append(f"hydra.run.dir={quoted(str(job.folder))}")
    configure_log(hydra.hydra_logging, hydra.verbose)
    context = HydraContext(config_loader=job.composition.loader, callbacks=Callbacks())

    def train(cfg: DictConfig) -> float:
        return run_job(cfg, pipeline, jobs=[job])

    with alone_in(job.folder, key="hydra.run.dir"):
        run_and_report(
            lambda: (
                run_hydra_job(
                    train,
                    composed,
                    job_dir_key="hydra.run.dir",
                    job_subdir_key=None,
                    hydra_context=context,
                ).return_value
            )
        )


def run_job(cfg: DictConfig, pipeline: Pipeline, *, jobs: Sequence["Job"]) -> float:
    """Run one composed job in the folder that Hydra made for it and return the sweeper's metric.

    A failure goes to the job's `status.json`. In a sweep the other jobs go on, and the failed
    one counts as NaN; in a single run an error that is not ours is raised again.

    Args:
        jobs: those that were planned; one that a sweeper thinks of as it goes is judged here.

    Raises:
        Stopped: by a signal, after the status was written; in a sweep no other job follows.
    """
    hydra = HydraConfig.get()
    folder = Path(hydra.runtime.output_dir)
    words = [str(word).removeprefix("++") for word in hydra.overrides.task]
    is_sweep = hydra.mode == RunMode.MULTIRUN
    if is_sweep:
        say(f"\njob {hydra.job.num}: {' '.join(words)}")
    try:
        planned = {os.path.normpath(job.folder.absolute()): job for job in jobs}.get(str(folder))
        config = _judged(cfg, words) if planned is None else planned.config
        is_of_sweep = is_sweep or (folder.parent / "multirun.yaml").is_file()  # a job resumed alone
        sweep = Path(hydra.sweep.dir) if is_sweep else folder.parent
        group = sweep.name if is_of_sweep else hydra.runtime.choices.get("experiment")
        config = _grouped(config, group=group)
        if (ended := _ended_before(folder, config)) is not None:
            if is_sweep:
                say(f"job {hydra.job.num} was over before: {ended['status']}")
            return math.nan if ended["metric"] is None else float(ended["metric"])
        typed = planned.overrides if planned is not None and planned.composition else words
        recorded = recorded_words(typed)
        write_run_file(folder, config, status="running", overrides=recorded)
        _write_status(folder, words, status="running", exit_code=EXIT_FAILED)
        outcome = pipeline(config, run_folder=folder)
    except Stopped as stop:
        where = None if stop.where is None else f"stopped {stop.where}"
        _write_status(folder, words, status="interrupted", exit_code=stop.exit_code, error=where)
        raise
    except TritterError as error:
        code = EXIT_REQUEST if isinstance(error, RequestError) else EXIT_FAILED
        _write_status(folder, words, status="failed", exit_code=code, error=str(error))
        if is_sweep:
            say(f"job {hydra.job.num} failed: {error}")
        return math.nan
    except Exception as error:
        # The job's border: whatever a library raised, the other jobs of a sweep go on.
        text = f"{type(error).__name__}: {error}"
        _write_status(folder, words, status="failed", exit_code=EXIT_FAILED, error=text)
        if not is_sweep:
            raise
        traceback.print_exc()
        return math.nan
    is_refused = config.gate.strict and outcome.status != "kept"
    _write_status(
        folder,
        words,
        status=outcome.status,
        exit_code=EXIT_NOT_KEPT if is_refused else EXIT_DONE,
        metric=outcome.metric,
        summary=str(folder / SUMMARY_FILE),
    )
    write_run_file(folder, config, status="finished", leaves=outcome.leaves)
    return outcome.metric


def _ended_before(folder: Path, config: RunConfig) -> dict[str, Any] | None:
    """Return the status of a job that came to an end before; None of one that is to be run."""
    if check_run_folder(folder, config) is not RunState.FINISHED:
        return None
    status = read_status(folder)
    return status if status["status"] in ENDS else None


def _grouped(config: RunConfig, *, group: str | None) -> RunConfig:
    """Return a job's config with a group for W&B, unless one is typed."""
    wandb = config.logger.wandb
    if wandb is None or wandb.group is not None:
        return config
    return replace(config, logger=replace(config.logger, wandb=replace(wandb, group=group)))


def _judged(cfg: DictConfig, words: Sequence[str]) -> RunConfig:
    """Judge a job that a sweeper thought of.

    Raises:
        RequestError: whatever is wrong with it, or with what it tries after a rollback.
    """
    config = validate(plain_config(cfg))
    if config.gate.ladder is None:
        return config
    with composer() as composing:
        return composing.with_rungs(config, words)


def read_status(folder: Path) -> dict[str, Any]:
    """Return what `status.json` says of a job; of one that left none, or a damaged one, that."""
    path = folder / STATUS_FILE
    if not path.exists():
        error = f"it left no {STATUS_FILE}"
        return asdict(RunStatus(status="not run", exit_code=EXIT_FAILED, error=error))
    try:
        return asdict(read_record(path, RunStatus))
    except TritterError as error:
        return asdict(RunStatus(status="unknown", exit_code=EXIT_FAILED, error=str(error)))


def _write_status(
    folder: Path,
    words: Sequence[str],
    *,
    status: str,
    exit_code: int,
    metric: float | None = None,
    summary: str | None = None,
    error: str | None = None,
) -> None:
    content = RunStatus(
        status=status,
        exit_code=exit_code,
        overrides=list(words),
        metric=metric if metric is not None and math.isfinite(metric) else None,
        summary=summary,
        error=error,
    )
    write_text_atomic(folder / STATUS_FILE, record_text(content))
