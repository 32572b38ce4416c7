"""Jobs of a sweep side by side: how many at once, with how many threads, and their orderly end.

A launcher is a plugin of Hydra's. Of joblib, submitit and ray it is known how many jobs they run at
once; all else of their settings is Hydra's business.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from omegaconf import DictConfig, OmegaConf

from tritter.stopping import Stopped
from tritter.storage.lock import LOCK_NAME, process_in
from tritter.targets import TARGET
from tritter.terminal import say

STOPPING_FILE = ".stopping"  # in a sweep's folder: no further job begins
_OF_CLASS = {
    "BasicLauncher": "basic",
    "JoblibLauncher": "joblib",
    "LocalLauncher": "submitit_local",
    "SlurmLauncher": "submitit_slurm",
    "RayLauncher": "ray",
}
_SECONDS_BETWEEN_LOOKS = 0.2
_THREADS = "OMP_NUM_THREADS"


@dataclass(frozen=True, slots=True, kw_only=True)
class Launching:
    """How a launcher runs jobs.

    Args:
        launcher: its name; that of its class where it is none of those that are known.
        at_once: jobs side by side on this machine, as far as that is known.
        threads: of each job, where jobs share this machine.
    """

    launcher: str = "basic"
    at_once: int = 1
    threads: int | None = None

    @property
    def is_in_processes(self) -> bool:
        """Whether jobs run in other processes than the one that was started."""
        return self.launcher != "basic"


ONE_BY_ONE = Launching()


def launching(hydra: DictConfig, *, num_jobs: int) -> Launching:
    """Return how a sweep's launcher runs its jobs.

    Args:
        hydra: Hydra's own settings of a job.
        num_jobs: that the sweeper gives it together.
    """
    plain = OmegaConf.to_container(hydra.launcher)
    settings: Mapping[Any, Any] = plain if isinstance(plain, dict) else {}
    kind, cores = str(settings.get(TARGET)).rpartition(".")[2], num_cores()
    name = _OF_CLASS.get(kind, kind)
    if name == "joblib":
        asked = settings.get("n_jobs") or 1
        at_once = asked if asked > 0 else max(1, cores + 1 + asked)
    elif name == "submitit_local":
        at_once = num_jobs  # it starts all at once
    elif name == "ray":
        ray = settings.get("ray") or {}
        of_all = (ray.get("init") or {}).get("num_cpus") or cores
        of_each = (ray.get("remote") or {}).get("num_cpus") or 1
        at_once = max(1, int(of_all / of_each))
    else:
        return Launching(launcher=name)
    at_once = max(1, min(at_once, num_jobs))
    return Launching(launcher=name, at_once=at_once, threads=max(1, cores // at_once))


def num_cores() -> int:
    """Return the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def side_by_side(folder: Path, how: Launching) -> Iterator[None]:
    """Set what the processes of a launcher start from, and let a signal end their jobs first.

    Args:
        folder: of the sweep.

    Raises:
        Stopped: a signal came, and no job of this machine runs any more; or a second one came.
    """
    (folder / STOPPING_FILE).unlink(missing_ok=True)
    with ExitStack() as inside:
        if how.is_in_processes:
            inside.enter_context(_environment(how))
            inside.enter_context(_jobs_stop_first(folder))
        yield


@contextmanager
def _environment(how: Launching) -> Iterator[None]:
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
def _jobs_stop_first(folder: Path) -> Iterator[None]:
    is_asked = False

    def running() -> set[int]:
        places = {path.parent for path in folder.rglob(LOCK_NAME)} - {folder}
        return {process for place in places if (process := process_in(place)) is not None}

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal is_asked
        if is_asked:
            _end(running())
            raise Stopped(number)
        is_asked, ended = True, set[int]()
        (folder / STOPPING_FILE).touch()
        say("Stopping: the jobs that run save their states; once more ends them.", is_error=True)
        while found := running():
            _end(found - ended)
            ended |= found
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        raise Stopped(number)

    numbers = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) != signal.SIG_IGN]
    is_main = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, stop) for number in numbers if is_main}
    try:
        with _children_deaf_to_the_terminal():
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
def _children_deaf_to_the_terminal() -> Iterator[None]:
    """Keep Ctrl-C, which a terminal sends to all processes, from those that are started inside.

    They inherit what the thread that starts them has blocked; another thread takes it for us.
    """
    is_over = threading.Event()

    def take() -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        is_over.wait()

    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    threading.Thread(target=take, daemon=True).start()
    try:
        yield
    finally:
        is_over.set()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
