"""One job as Hydra starts it: folder, pipeline, and what became of it in `status.json`."""

import math
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, Protocol

from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from tritter.config.folders import Front, composing_from, front
from tritter.config.launch.composition import composer, plain_config
from tritter.config.launch.launchers import STOPPING_FILE
from tritter.config.launch.resume import recorded_words
from tritter.config.run_folder import (
    OUTPUT_FILE,
    RunState,
    check_run_folder,
    write_run_file,
)
from tritter.config.schema import RunConfig
from tritter.config.validation import validate
from tritter.errors import RequestError, TritterError
from tritter.stopping import Stopped, stopping
from tritter.storage.atomic import write_text_atomic
from tritter.storage.lock import alone_in
from tritter.storage.reading import SUMMARY_FILE
from tritter.storage.records import read_record, record, record_text
from tritter.terminal import say

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


@dataclass(frozen=True, slots=True)
class Job:
    """One run that is about to start.

    Args:
        state: what is in its folder.
    """

    overrides: tuple[str, ...]
    config: RunConfig
    folder: Path
    state: RunState


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


@dataclass(slots=True, kw_only=True)
class Task:
    """What Hydra calls with each composed job; it travels to a launcher's processes.

    Attributes:
        jobs: those that are planned; set when they are judged.
        keeps_failed: a job that failed before stays as it is: what followed was chosen by it.
    """

    pipeline: Pipeline
    jobs: Sequence[Job] = ()
    keeps_failed: bool = False
    asked_from: Front = field(default_factory=front)
    process: int = field(default_factory=os.getpid)
    program: str = field(default_factory=lambda: sys.argv[0] if sys.argv else "")

    def __call__(self, cfg: DictConfig) -> float | None:
        """Run a job and return its metric.

        Where it failed or did not begin, that is NaN, and for Optuna, which takes no NaN, None.
        """
        hydra = HydraConfig.get()
        with composing_from(self.asked_from):  # which other processes don't know
            if hydra.mode != RunMode.MULTIRUN:
                return run_job(cfg, self.pipeline, jobs=self.jobs)
            if os.getpid() == self.process:
                metric = self._run_alone(cfg)
            else:  # in a launcher's process, which may be stopped by itself
                sys.argv[:1] = [self.program]  # by which commands are printed
                folder, metric = Path(hydra.runtime.output_dir), math.nan
                say(f"job {hydra.job.num} begins: {' '.join(_words(hydra))}")
                # What stopped it stands in its status
                with suppress(Stopped), stopping(), _printing_into(folder):
                    metric = self._run_alone(cfg)
                say(f"job {hydra.job.num} is over: {read_status(folder).status}")
        return None if self.keeps_failed and math.isnan(metric) else metric

    def _run_alone(self, cfg: DictConfig) -> float:
        """Run a job of a sweep unless another process began in its folder."""
        hydra = HydraConfig.get()
        folder = Path(hydra.runtime.output_dir)
        try:
            with alone_in(folder, key="hydra.sweep.dir"):
                if (Path(hydra.sweep.dir) / STOPPING_FILE).exists():
                    return math.nan
                if self.keeps_failed and read_status(folder).status == "failed":
                    say(f"job {hydra.job.num} failed before; what followed was chosen by that")
                    return math.nan
                return run_job(cfg, self.pipeline, jobs=self.jobs)
        except RequestError as error:
            say(f"job {hydra.job.num} failed: {error}")
            return math.nan


def _words(hydra: HydraConf) -> list[str]:
    """Return a job's overrides as they were typed."""
    return [str(word).removeprefix("++") for word in hydra.overrides.task]


@contextmanager
def _printing_into(folder: Path) -> Iterator[None]:
    """Let what is printed inside go to a file of the job: others print at the same time."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
    descriptor = os.open(folder / OUTPUT_FILE, flags, 0o644)
    with (
        os.fdopen(descriptor, "a", encoding="utf-8", buffering=1) as file,
        redirect_stdout(file),
        redirect_stderr(file),
    ):
        yield


def run_job(cfg: DictConfig, pipeline: Pipeline, *, jobs: Sequence[Job]) -> float:
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
    words = _words(hydra)
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
                say(f"job {hydra.job.num} was over before: {ended.status}")
            return math.nan if ended.metric is None else float(ended.metric)
        typed = words if planned is None or is_sweep else planned.overrides
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


def _ended_before(folder: Path, config: RunConfig) -> RunStatus | None:
    """Return the status of a job that came to an end before; None of one that is to be run."""
    if check_run_folder(folder, config) is not RunState.FINISHED:
        return None
    status = read_status(folder)
    return status if status.status in ENDS else None


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


def read_status(folder: Path) -> RunStatus:
    """Return what `status.json` says of a job; of one that left none, or a damaged one, that."""
    path = folder / STATUS_FILE
    if not path.exists():
        error = f"it left no {STATUS_FILE}"
        return RunStatus(status="not run", exit_code=EXIT_FAILED, error=error)
    try:
        return read_record(path, RunStatus)
    except TritterError as error:
        return RunStatus(status="unknown", exit_code=EXIT_FAILED, error=str(error))


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
