"""Jobs started by Hydra: each has a folder and `status.json`; jobs of a sweep may run in parallel.

A launcher is a Hydra plugin. For joblib, submitit and ray the number of parallel jobs is known;
all other launcher settings are passed to Hydra.
"""

import math
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar, Protocol

from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from tritter.config.folders import SearchPath, composing_from, search_path
from tritter.config.launch.composition import composer, plain_config
from tritter.config.overrides import recorded_overrides
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
from tritter.storage.lock import LOCK_NAME, alone_in, process_in
from tritter.storage.reading import SUMMARY_FILE
from tritter.storage.records import read_record, record, record_text
from tritter.targets import TARGET
from tritter.terminal import say

STATUS_FILE = "status.json"
STOPPING_FILE = ".stopping"  # in a sweep's folder: start no further job

ENDS = ("kept", "rolled_back", "undecided", "ungated")


@record
class RunStatus:
    """Status of a job.

    Args:
        status: verdict of the gate, or running, failed, interrupted, not run, unknown.
        exit_code: exit code of the job.
        overrides: overrides of the job, as typed.
        metric: value that a sweep minimises; None if missing or not finite.
        summary: path of summary.json.
        error: error message of a failed or interrupted job.
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
    """A run that is about to start.

    Args:
        overrides: overrides of the job.
        config: validated configuration.
        folder: run folder.
        state: state of the run in that folder.
    """

    overrides: tuple[str, ...]
    config: RunConfig
    folder: Path
    state: RunState


class Outcome(Protocol):
    """Result of a finished run."""

    @property
    def status(self) -> str:
        """One of `ENDS`."""
        ...

    @property
    def metric(self) -> float:
        """The value that a sweeper minimises."""
        ...

    @property
    def leaves(self) -> tuple[str, ...]:
        """Outputs of a finished run, relative to its folder; they identify the run as finished."""
        ...


class Pipeline(Protocol):
    """The stages of a run, as `tritter.pipeline.run_pipeline`."""

    def __call__(self, config: RunConfig, *, run_folder: Path) -> Outcome: ...


@dataclass(slots=True, kw_only=True)
class Task:
    """The task function that Hydra calls with each composed job; picklable for launchers.

    Attributes:
        pipeline: runs the stages of a job.
        jobs: planned jobs, set after validation.
        keeps_failed: do not rerun failed jobs, because the sweeper has used their results.
        search_path: search path of the command.
        process: id of the main process.
        program: name of the program in printed commands.
    """

    pipeline: Pipeline
    jobs: Sequence[Job] = ()
    keeps_failed: bool = False
    search_path: SearchPath = field(default_factory=search_path)
    process: int = field(default_factory=os.getpid)
    program: str = field(default_factory=lambda: sys.argv[0] if sys.argv else "")

    def __call__(self, cfg: DictConfig) -> float | None:
        """Run a job and return its metric.

        If the job fails or does not start, the result is NaN; for Optuna, which rejects NaN, None.
        """
        hydra = HydraConfig.get()
        with composing_from(self.search_path):  # worker processes do not have it
            if hydra.mode != RunMode.MULTIRUN:
                return run_job(cfg, self.pipeline, jobs=self.jobs)
            if os.getpid() == self.process:
                metric = self._run_alone(cfg)
            else:  # a launcher's worker process, which handles its own signals
                sys.argv[:1] = [self.program]  # used in printed commands
                folder, metric = Path(hydra.runtime.output_dir), math.nan
                say(f"job {hydra.job.num} started: {' '.join(_typed_overrides(hydra))}")
                # The reason is in its status
                with suppress(Stopped), stopping(), _printing_into(folder):
                    metric = self._run_alone(cfg)
                say(f"job {hydra.job.num} finished: {read_status(folder).status}")
        return None if self.keeps_failed and math.isnan(metric) else metric

    def _run_alone(self, cfg: DictConfig) -> float:
        """Run a job of a sweep, unless another process runs in its folder."""
        hydra = HydraConfig.get()
        folder = Path(hydra.runtime.output_dir)
        try:
            with alone_in(folder, key="hydra.sweep.dir"):
                if (Path(hydra.sweep.dir) / STOPPING_FILE).exists():
                    return math.nan
                if self.keeps_failed and read_status(folder).status == "failed":
                    say(f"job {hydra.job.num} failed earlier and is not rerun")
                    return math.nan
                return run_job(cfg, self.pipeline, jobs=self.jobs)
        except RequestError as error:
            say(f"job {hydra.job.num} failed: {error}")
            return math.nan


def _typed_overrides(hydra: HydraConf) -> list[str]:
    """Return a job's overrides as typed."""
    return [str(override).removeprefix("++") for override in hydra.overrides.task]


@contextmanager
def _printing_into(folder: Path) -> Iterator[None]:
    """Redirect the output of a parallel job to a file in its folder."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
    descriptor = os.open(folder / OUTPUT_FILE, flags, 0o644)
    with (
        os.fdopen(descriptor, "a", encoding="utf-8", buffering=1) as file,
        redirect_stdout(file),
        redirect_stderr(file),
    ):
        yield


def run_job(cfg: DictConfig, pipeline: Pipeline, *, jobs: Sequence[Job]) -> float:
    """Run one composed job in its folder and return its metric.

    A failure is stored in the job's `status.json`. In a sweep, the other jobs continue and the
    failed job has the metric NaN. In a single run, unexpected errors are raised again.

    Args:
        jobs: planned jobs; a job proposed by an adaptive sweeper is validated here.

    Raises:
        Stopped: by a signal, after the status was written; no further job of a sweep starts.
    """
    hydra = HydraConfig.get()
    folder = Path(hydra.runtime.output_dir)
    overrides = _typed_overrides(hydra)
    is_sweep = hydra.mode == RunMode.MULTIRUN
    if is_sweep:
        say(f"\njob {hydra.job.num}: {' '.join(overrides)}")
    try:
        planned = {os.path.normpath(job.folder.absolute()): job for job in jobs}.get(str(folder))
        config = _validated(cfg, overrides) if planned is None else planned.config
        # A job of a sweep may be resumed alone
        is_sweep_job = is_sweep or (folder.parent / "multirun.yaml").is_file()
        sweep = Path(hydra.sweep.dir) if is_sweep else folder.parent
        group = sweep.name if is_sweep_job else hydra.runtime.choices.get("experiment")
        if (wandb := config.logger.wandb) is not None and wandb.group is None:
            loggers = replace(config.logger, wandb=replace(wandb, group=group))
            config = replace(config, logger=loggers)
        is_finished = check_run_folder(folder, config) is RunState.FINISHED
        if is_finished and (previous := read_status(folder)).status in ENDS:
            if is_sweep:
                say(f"job {hydra.job.num} is already finished: {previous.status}")
            return math.nan if previous.metric is None else float(previous.metric)
        typed = overrides if planned is None or is_sweep else planned.overrides
        recorded = recorded_overrides(typed)
        write_run_file(folder, config, status="running", overrides=recorded)
        _write_status(folder, overrides, status="running", exit_code=EXIT_FAILED)
        outcome = pipeline(config, run_folder=folder)
    except Stopped as stop:
        where = None if stop.where is None else f"stopped {stop.where}"
        _write_status(
            folder, overrides, status="interrupted", exit_code=stop.exit_code, error=where
        )
        raise
    except TritterError as error:
        code = EXIT_REQUEST if isinstance(error, RequestError) else EXIT_FAILED
        _write_status(folder, overrides, status="failed", exit_code=code, error=str(error))
        if is_sweep:
            say(f"job {hydra.job.num} failed: {error}")
        return math.nan
    except Exception as error:
        # Errors of any library: the other jobs of a sweep continue
        text = f"{type(error).__name__}: {error}"
        _write_status(folder, overrides, status="failed", exit_code=EXIT_FAILED, error=text)
        if not is_sweep:
            raise
        traceback.print_exc()
        return math.nan
    is_refused = config.gate.strict and outcome.status != "kept"
    _write_status(
        folder,
        overrides,
        status=outcome.status,
        exit_code=EXIT_NOT_KEPT if is_refused else EXIT_DONE,
        metric=outcome.metric,
        summary=str(folder / SUMMARY_FILE),
    )
    write_run_file(folder, config, status="finished", leaves=outcome.leaves)
    return outcome.metric


def _validated(cfg: DictConfig, overrides: Sequence[str]) -> RunConfig:
    """Validate a job proposed by an adaptive sweeper.

    Raises:
        RequestError: the job or one of its fallbacks is invalid.
    """
    config = validate(plain_config(cfg))
    if config.gate.ladder is None:
        return config
    with composer() as composing:
        return composing.with_fallbacks(config, overrides)


def read_status(folder: Path) -> RunStatus:
    """Return the content of a job's `status.json`; "not run" or "unknown" without it."""
    path = folder / STATUS_FILE
    if not path.exists():
        error = f"there is no {STATUS_FILE}"
        return RunStatus(status="not run", exit_code=EXIT_FAILED, error=error)
    try:
        return read_record(path, RunStatus)
    except TritterError as error:
        return RunStatus(status="unknown", exit_code=EXIT_FAILED, error=str(error))


def _write_status(
    folder: Path,
    overrides: Sequence[str],
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
        overrides=list(overrides),
        metric=metric if metric is not None and math.isfinite(metric) else None,
        summary=summary,
        error=error,
    )
    write_text_atomic(folder / STATUS_FILE, record_text(content))


_LAUNCHER_NAMES = {
    "BasicLauncher": "basic",
    "JoblibLauncher": "joblib",
    "LocalLauncher": "submitit_local",
    "SlurmLauncher": "submitit_slurm",
    "RayLauncher": "ray",
}
_POLL_SECONDS = 0.2
_THREADS = "OMP_NUM_THREADS"


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchSettings:
    """Settings of a launcher.

    Args:
        launcher: name of the launcher, or its class name if unknown.
        at_once: number of parallel jobs on this machine, if known.
        threads: threads per job if jobs share this machine.
    """

    launcher: str = "basic"
    at_once: int = 1
    threads: int | None = None

    @property
    def is_in_processes(self) -> bool:
        """Whether jobs run in worker processes."""
        return self.launcher != "basic"


SEQUENTIAL = LaunchSettings()


def launching(hydra: DictConfig, *, num_jobs: int) -> LaunchSettings:
    """Return the settings of a sweep's launcher.

    Args:
        hydra: Hydra settings of a job.
        num_jobs: number of jobs in one batch of the sweeper.
    """
    plain = OmegaConf.to_container(hydra.launcher)
    settings: Mapping[Any, Any] = plain if isinstance(plain, dict) else {}
    kind, cores = str(settings.get(TARGET)).rpartition(".")[2], num_cores()
    name = _LAUNCHER_NAMES.get(kind, kind)
    if name == "joblib":
        n_jobs = settings.get("n_jobs") or 1
        at_once = n_jobs if n_jobs > 0 else max(1, cores + 1 + n_jobs)
    elif name == "submitit_local":
        at_once = num_jobs  # it starts all jobs at once
    elif name == "ray":
        ray = settings.get("ray") or {}
        total = (ray.get("init") or {}).get("num_cpus") or cores
        per_job = (ray.get("remote") or {}).get("num_cpus") or 1
        at_once = max(1, int(total / per_job))
    else:
        return LaunchSettings(launcher=name)
    at_once = max(1, min(at_once, num_jobs))
    return LaunchSettings(launcher=name, at_once=at_once, threads=max(1, cores // at_once))


def num_cores() -> int:
    """Return the number of CPU cores available to this process."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def parallel_jobs(folder: Path, launcher: LaunchSettings) -> Iterator[None]:
    """Prepare the environment of worker processes; on a signal, stop their jobs first.

    Args:
        folder: folder of the sweep.
        launcher: settings of the launcher.

    Raises:
        Stopped: after a signal, once all jobs on this machine have ended; or after a second one.
    """
    (folder / STOPPING_FILE).unlink(missing_ok=True)
    with ExitStack() as inside:
        if launcher.is_in_processes:
            inside.enter_context(_environment(launcher))
            inside.enter_context(_jobs_stop_first(folder))
        yield


@contextmanager
def _environment(launcher: LaunchSettings) -> Iterator[None]:
    own = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    if launcher.threads is not None and _THREADS not in os.environ:
        own[_THREADS] = str(launcher.threads)
    before = {name: os.environ.get(name) for name in own}
    os.environ.update(own)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


@contextmanager
def _jobs_stop_first(folder: Path) -> Iterator[None]:
    is_stopping = False

    def running() -> set[int]:
        folders = {path.parent for path in folder.rglob(LOCK_NAME)} - {folder}
        return {process for path in folders if (process := process_in(path)) is not None}

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal is_stopping
        if is_stopping:
            _end(running())
            raise Stopped(number)
        is_stopping, ended = True, set[int]()
        (folder / STOPPING_FILE).touch()
        say(
            "Stopping: running jobs save their state; interrupt again to end them now.",
            is_error=True,
        )
        while found := running():
            _end(found - ended)
            ended |= found
            time.sleep(_POLL_SECONDS)
        raise Stopped(number)

    numbers = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) != signal.SIG_IGN]
    is_main = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, stop) for number in numbers if is_main}
    try:
        with _shield_workers_from_ctrl_c():
            yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        (folder / STOPPING_FILE).unlink(missing_ok=True)


def _end(processes: set[int]) -> None:
    for process in processes - {os.getpid()}:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(process, signal.SIGTERM)


@contextmanager
def _shield_workers_from_ctrl_c() -> Iterator[None]:
    """Block Ctrl-C in worker processes, because a terminal sends it to all processes.

    Child processes inherit the signal mask of the thread that starts them. Another thread of this
    process receives the signal.
    """
    is_over = threading.Event()

    def receive() -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        is_over.wait()

    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    threading.Thread(target=receive, daemon=True).start()
    try:
        yield
    finally:
        is_over.set()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
