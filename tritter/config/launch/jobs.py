"""Jobs as Hydra starts them: each with its folder, `status.json` and, in a sweep, its log.

A launcher is a plugin of Hydra's. Tritter knows how many jobs joblib, submitit and ray run at once;
their other settings are Hydra's business.
"""

import math
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from tritter.checkpoints.record import LedgerRecord
from tritter.config.folders import SearchPath, search_path
from tritter.config.launch.composition import Loader
from tritter.config.overrides import recorded_overrides
from tritter.config.run_folder import (
    OUTPUT_FILE,
    RunRecord,
    RunState,
    RunStatus,
    check_run_folder,
)
from tritter.config.schema import RunConfig
from tritter.errors import RequestError, TritterError, panics_as_errors
from tritter.stopping import Stopped, stopping
from tritter.storage.lock import FolderLock
from tritter.storage.reading import SUMMARY_FILE
from tritter.targets import TARGET
from tritter.terminal import redirected, say

_STOPPING_FILE = ".stopping"  # in a sweep's folder: no further job begins

_EXIT_DONE, _EXIT_FAILED, _EXIT_NOT_KEPT = 0, 1, 3
_OF_CLASS = {
    "BasicLauncher": "basic",
    "JoblibLauncher": "joblib",
    "LocalLauncher": "submitit_local",
    "SlurmLauncher": "submitit_slurm",
    "RayLauncher": "ray",
}
_POLL_SECONDS = 0.2
_THREADS = "OMP_NUM_THREADS"


@dataclass(frozen=True, slots=True)
class Job:
    """One run that is about to start.

    Args:
        state: what is in its folder.
        missing: its folder and the parents that the run creates, deepest first.
    """

    overrides: tuple[str, ...]
    config: RunConfig
    folder: Path
    state: RunState
    missing: tuple[Path, ...] = ()

    @property
    def has_finished_stage(self) -> bool:
        """Whether its run has written its ledger, which it does after each stage."""
        return (self.folder / LedgerRecord.FILE_NAME).exists()

    def undo(self) -> bool:
        """Remove the folder of a new run, unless a stage has finished; return True if removed."""
        if self.state is not RunState.NEW or self.has_finished_stage:
            return False
        for path in () if self.missing else self.folder.iterdir():  # an empty folder stays
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        for folder in self.missing:
            if folder == self.folder:
                shutil.rmtree(folder)
            elif not any(folder.iterdir()):
                folder.rmdir()
        return True


class Outcome(Protocol):
    """What the pipeline returns of a run that finished."""

    @property
    def status(self) -> str:
        """kept, rolled_back, undecided or ungated."""
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
        jobs: the planned jobs, set when they are validated.
        keeps_failed: do not repeat a failed job; the sweeper's later jobs depend on its result.
        on_end: called after each job of a sweep that this process ran, with the job's folder, the
            sweep's folder and `jobs`.
    """

    pipeline: Pipeline
    jobs: Sequence[Job] = ()
    keeps_failed: bool = False
    on_end: Callable[[Path, Path, Sequence[Job]], None] | None = None
    config_search_path: SearchPath = field(default_factory=search_path)
    process: int = field(default_factory=os.getpid)
    program: str = field(default_factory=lambda: sys.argv[0] if sys.argv else "")

    def __call__(self, cfg: DictConfig) -> float | None:
        """Run a job and return its metric.

        Where it failed or did not begin, that is NaN, and for Optuna, which takes no NaN, None.
        """
        hydra = HydraConfig.get()
        with self.config_search_path.in_use():  # which other processes don't know
            if hydra.mode != RunMode.MULTIRUN:
                return self._run(cfg)
            if os.getpid() == self.process:
                metric = self._run_alone(cfg)
            else:  # in a launcher's process, which may be stopped by itself
                sys.argv[:1] = [self.program]  # by which commands are printed
                metric = math.nan
                with suppress(Stopped), stopping():  # its status records the signal
                    metric = self._run_alone(cfg)
        return None if self.keeps_failed and math.isnan(metric) else metric

    def _run_alone(self, cfg: DictConfig) -> float:
        """Run a job of a sweep, its output in its log, unless another process is in its folder."""
        hydra = HydraConfig.get()
        folder = Path(hydra.runtime.output_dir)
        try:
            with FolderLock(folder).held(key="hydra.sweep.dir"):
                if (Path(hydra.sweep.dir) / _STOPPING_FILE).exists():
                    return math.nan
                if self.keeps_failed and RunStatus.read(folder).status == "failed":
                    say(f"job {hydra.job.num} failed before; what followed was chosen by that")
                    return math.nan
                try:
                    with _log_output(folder):
                        return self._run(cfg)
                finally:
                    if self.on_end is not None and os.getpid() == self.process:
                        self.on_end(folder, Path(hydra.sweep.dir), self.jobs)
        except TritterError as error:  # refused, or its status could not be written
            say(f"job {hydra.job.num} failed: {error}")
            return math.nan

    def _run(self, cfg: DictConfig) -> float:
        """Run a composed job in the folder that Hydra made for it; return the sweeper's metric.

        A failure is written to the job's `status.json`. In a sweep the other jobs continue, and
        the failed one counts as NaN; in a single run an unexpected error is raised again. A job
        that the sweeper proposes later than the plan is validated here.

        Raises:
            Stopped: by a signal, after the status was written; in a sweep no other job follows.
            TritterError: the status could not be written; the message includes the first error.
        """
        hydra = HydraConfig.get()
        folder = Path(hydra.runtime.output_dir)
        overrides = [str(override).removeprefix("++") for override in hydra.overrides.task]
        own_status = partial(RunStatus, overrides=overrides)
        is_sweep = hydra.mode == RunMode.MULTIRUN
        if is_sweep:
            say(f"\njob {hydra.job.num}: {' '.join(overrides)}")
        try:
            planned = {os.path.normpath(job.folder.absolute()): job for job in self.jobs}.get(
                str(folder)
            )
            config = Loader.proposed(cfg, overrides) if planned is None else planned.config
            # A job of a sweep may be resumed alone
            is_of_sweep = is_sweep or (folder.parent / "multirun.yaml").is_file()
            sweep = Path(hydra.sweep.dir) if is_sweep else folder.parent
            group = sweep.name if is_of_sweep else hydra.runtime.choices.get("experiment")
            if (wandb := config.wandb) is not None and wandb.group is None:
                config = replace(config, wandb=replace(wandb, group=group))
            is_finished = check_run_folder(folder, config) is RunState.FINISHED
            if is_finished and (ended := RunStatus.read(folder)).is_of_outcome:
                return math.nan if ended.metric is None else float(ended.metric)
            typed = overrides if planned is None or is_sweep else planned.overrides
            run = RunRecord.of(
                folder, config, status="running", overrides=recorded_overrides(typed)
            )
            run.write(folder)
            own_status(status="running", exit_code=_EXIT_FAILED).write(folder)
            say(f"{'run':<11}{folder}")  # the libraries of a run take seconds to import
            with panics_as_errors():
                outcome = self.pipeline(config, run_folder=folder)
        except Stopped as stop:
            location = None if stop.location is None else f"stopped {stop.location}"
            with suppress(TritterError):
                stopped = own_status(status="interrupted", exit_code=stop.exit_code, error=location)
                stopped.write(folder)
            raise
        except TritterError as error:
            code = RunStatus.EXIT_REQUEST if isinstance(error, RequestError) else _EXIT_FAILED
            _write_failure(folder, overrides, str(error), exit_code=code)
            if is_sweep:
                say(f"job {hydra.job.num} failed: {error}")
            return math.nan
        except Exception as error:
            # The job's border: any library may raise here, and the other jobs of a sweep continue
            _write_failure(
                folder, overrides, f"{type(error).__name__}: {error}", exit_code=_EXIT_FAILED
            )
            if not is_sweep:
                raise
            traceback.print_exc()
            return math.nan
        is_refused = config.gate.strict and outcome.status != "kept"
        ended = own_status(
            status=outcome.status,
            exit_code=_EXIT_NOT_KEPT if is_refused else _EXIT_DONE,
            metric=outcome.metric if math.isfinite(outcome.metric) else None,
            summary=str(folder / SUMMARY_FILE),
        )
        ended.write(folder)
        RunRecord.of(folder, config, status="finished", leaves=outcome.leaves).write(folder)
        return outcome.metric


@contextmanager
def _log_output(folder: Path) -> Iterator[None]:
    """Send what is printed inside, also by libraries and child processes, to the job's log."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
    descriptor = os.open(folder / OUTPUT_FILE, flags, 0o644)
    with ExitStack() as inside:
        file = os.fdopen(descriptor, "a", encoding="utf-8", errors="backslashreplace", buffering=1)
        inside.enter_context(file)
        for number in (1, 2):
            inside.enter_context(redirected(number, file))
        yield


def _write_failure(folder: Path, overrides: Sequence[str], error: str, *, exit_code: int) -> None:
    """Record why a job failed. If the disk is full, raise it instead."""
    try:
        failed = RunStatus(
            status="failed", exit_code=exit_code, overrides=list(overrides), error=error
        )
        failed.write(folder)
    except TritterError as unwritten:
        raise TritterError(f"{error}\n{unwritten}") from unwritten


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchSettings:
    """How a launcher runs jobs.

    Args:
        launcher: its name; that of its class where it is none of those that are known.
        num_parallel: jobs side by side on this machine, as far as that is known.
        threads: of each job, where jobs share this machine.
    """

    launcher: str = "basic"
    num_parallel: int = 1
    threads: int | None = None

    @property
    def is_in_processes(self) -> bool:
        """Whether jobs run in other processes than the one that was started."""
        return self.launcher != "basic"

    @classmethod
    def of(cls, hydra: DictConfig, *, num_jobs: int) -> "LaunchSettings":
        """Return the settings of a sweep's launcher.

        Args:
            hydra: Hydra's own settings of a job.
            num_jobs: that the sweeper gives it together.
        """
        plain = OmegaConf.to_container(hydra.launcher)
        settings: Mapping[Any, Any] = plain if isinstance(plain, dict) else {}
        kind, cores = str(settings.get(TARGET)).rpartition(".")[2], _num_cores()
        name = _OF_CLASS.get(kind, kind)
        if name == "joblib":
            requested = settings.get("n_jobs") or 1
            num_parallel = requested if requested > 0 else max(1, cores + 1 + requested)
        elif name == "submitit_local":
            num_parallel = num_jobs  # it starts all at once
        elif name == "ray":
            ray = settings.get("ray") or {}
            of_all = (ray.get("init") or {}).get("num_cpus") or cores
            of_each = (ray.get("remote") or {}).get("num_cpus") or 1
            num_parallel = max(1, int(of_all / of_each))
        else:
            return cls(launcher=name)
        num_parallel = max(1, min(num_parallel, num_jobs))
        threads = max(1, cores // num_parallel)
        return cls(launcher=name, num_parallel=num_parallel, threads=threads)

    @contextmanager
    def parallel_jobs(self, folder: Path) -> Iterator[None]:
        """Set what the processes of a launcher start from, and let a signal end their jobs first.

        Args:
            folder: of the sweep.
        """
        (folder / _STOPPING_FILE).unlink(missing_ok=True)
        with ExitStack() as inside:
            if self.is_in_processes:
                inside.enter_context(_environment(self))
                inside.enter_context(_stop_jobs_first(folder))
            yield


def _num_cores() -> int:
    """Return the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def _environment(how: LaunchSettings) -> Iterator[None]:
    own = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    if how.threads is not None and _THREADS not in os.environ:
        own[_THREADS] = str(how.threads)
    before = {name: os.environ.get(name) for name in own}
    os.environ.update(own)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


@contextmanager
def _stop_jobs_first(folder: Path) -> Iterator[None]:
    is_stopping = False

    def running_processes() -> set[int]:
        places = {path.parent for path in folder.rglob(FolderLock.NAME)} - {folder}
        return {process for place in places if (process := FolderLock(place).process) is not None}

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal is_stopping
        if is_stopping:
            _terminate(running_processes())
            raise Stopped(number)
        is_stopping, ended = True, set[int]()
        (folder / _STOPPING_FILE).touch()
        say("Stopping: the jobs that run save their states; once more ends them.", is_error=True)
        while found := running_processes():
            _terminate(found - ended)
            ended |= found
            time.sleep(_POLL_SECONDS)
        raise Stopped(number)

    numbers = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) != signal.SIG_IGN]
    is_main = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, stop) for number in numbers if is_main}
    try:
        with _block_sigint_in_children():
            yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        (folder / _STOPPING_FILE).unlink(missing_ok=True)


def _terminate(processes: set[int]) -> None:
    for process in processes - {os.getpid()}:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(process, signal.SIGTERM)


@contextmanager
def _block_sigint_in_children() -> Iterator[None]:
    """Keep Ctrl-C, which a terminal sends to all processes, from those that are started inside.

    They inherit what the thread that starts them has blocked; another thread takes it for us.
    """
    is_over = threading.Event()

    def receive_sigint() -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        is_over.wait()

    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    threading.Thread(target=receive_sigint, daemon=True).start()
    try:
        yield
    finally:
        is_over.set()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
