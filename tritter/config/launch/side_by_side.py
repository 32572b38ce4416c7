"""A job of a sweep where its launcher runs it: in our process, or in one of its own.

In a process of its own it prints into its folder, hears of Ctrl-C through the process that began
the sweep alone, and ends when that one is gone.
"""

import math
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from tritter.config.folders import Front, composing_from, front
from tritter.config.launch.jobs import ENDS, Pipeline, read_status, run_job
from tritter.config.launch.launchers import Launching
from tritter.config.run_folder import OUTPUT_FILE
from tritter.errors import RequestError
from tritter.stopping import Stopped, stopping
from tritter.storage.lock import alone_in
from tritter.terminal import say

if TYPE_CHECKING:
    from tritter.config.launch.plan import Job

STOPPING_FILE = ".stopping"  # in a sweep's folder: no further job begins
_SECONDS_BETWEEN_LOOKS = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SweptJobs:
    """What a launcher runs, job by job; it travels to the launcher's processes.

    Args:
        jobs: those that are planned.
        launching: how they are run.
        left: folders of jobs that are not begun any more in this sweep.
        keeps_failed: a job that failed before stays as it is: what followed was chosen by it.
        shared: words that all jobs have.
    """

    pipeline: Pipeline
    jobs: Sequence["Job"]
    launching: Launching
    left: frozenset[Path] = frozenset()
    keeps_failed: bool = False
    shared: frozenset[str] = frozenset()
    asked_from: Front = field(default_factory=front)
    process: int = field(default_factory=os.getpid)
    program: str = field(default_factory=lambda: sys.argv[0] if sys.argv else "")
    place: str = field(default_factory=os.getcwd)

    def run(self, cfg: DictConfig) -> float | None:
        """Run a composed job and return its metric.

        Where it failed or did not begin, that is NaN, and for Optuna, which takes no NaN, None.
        """
        with composing_from(self.asked_from):  # a launcher's process knows nothing of it
            is_here = os.getpid() == self.process
            metric = self._run_alone(cfg) if is_here else self._run_elsewhere(cfg)
        return None if self.keeps_failed and math.isnan(metric) else metric

    def _run_elsewhere(self, cfg: DictConfig) -> float:
        sys.argv[:1] = [self.program]  # by which commands are printed
        os.chdir(self.place)
        self._end_if_alone()
        hydra = HydraConfig.get()
        folder, number = Path(hydra.runtime.output_dir), hydra.job.num
        is_new = folder not in self.left and read_status(folder)["status"] not in ENDS
        words = [str(word).removeprefix("++") for word in hydra.overrides.task]
        if is_new:
            say(f"job {number} begins: {' '.join(w for w in words if w not in self.shared)}")
        with ExitStack() as inside:
            inside.enter_context(stopping())
            if self.launching.ends_with_us:
                inside.enter_context(_ending_with(self.process))
            try:
                with _printing_into(folder):
                    metric = self._run_alone(cfg)
            except Stopped as stop:  # of which its status tells
                where = f" {stop.where}" if stop.where else ""
                with suppress(OSError):  # whoever read it may be gone
                    say(f"job {number} stopped{where}")
                self._end_if_alone()
                return math.nan
        if is_new:
            say(f"job {number} is over: {read_status(folder)['status']}")
        return metric

    def _end_if_alone(self) -> None:
        """End this process where whoever began the sweep is gone; it would wait for more work."""
        if self.launching.ends_with_us and os.getppid() != self.process:
            os._exit(128 + signal.SIGTERM)

    def _run_alone(self, cfg: DictConfig) -> float:
        """Run a job unless another process began in its folder."""
        hydra = HydraConfig.get()
        folder = Path(hydra.runtime.output_dir)
        try:
            with alone_in(folder, key="hydra.sweep.dir"):
                is_ending = (Path(hydra.sweep.dir) / STOPPING_FILE).exists()
                if is_ending or folder in self.left:
                    return math.nan
                if self.keeps_failed and read_status(folder)["status"] == "failed":
                    say(f"job {hydra.job.num} failed before; what followed was chosen by that")
                    return math.nan
                return run_job(cfg, self.pipeline, jobs=self.jobs)
        except RequestError as error:
            say(f"job {hydra.job.num} failed: {error}")
            return math.nan


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


@contextmanager
def _ending_with(process: int) -> Iterator[None]:
    """Stop this process as SIGTERM does when its parent is killed."""
    is_over = threading.Event()

    def look() -> None:
        while not is_over.wait(_SECONDS_BETWEEN_LOOKS):
            if os.getppid() != process:
                os.kill(os.getpid(), signal.SIGTERM)
                return

    threading.Thread(target=look, daemon=True).start()
    try:
        yield
    finally:
        is_over.set()
