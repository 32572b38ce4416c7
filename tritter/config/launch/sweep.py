"""A sweep from its plan to its table, whoever runs its jobs.

Whatever becomes of a job, the others are run: one that fails says so in its status, and when a
job's process is killed, and its launcher gives up, the launcher is started again on the rest.
"""

import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import FrameType

from tritter.config.launch.jobs import STATUS_FILE, Pipeline, read_status
from tritter.config.launch.launchers import Launching
from tritter.config.launch.plan import Plan
from tritter.config.launch.side_by_side import STOPPING_FILE, SweptJobs
from tritter.config.launch.starting import start_hydra
from tritter.config.launch.sweep_table import print_sweep, sweep_rows
from tritter.config.overrides import as_value, command, quoted
from tritter.config.run_folder import require_writable
from tritter.errors import TritterError
from tritter.stopping import Stopped
from tritter.storage.lock import LOCK_NAME, alone_in, is_held, process_in
from tritter.terminal import say

_MOST_CUT_OFF = 2  # a job that was cut off so often is left
_SECONDS_BETWEEN_LOOKS = 0.2
_THREADS = "OMP_NUM_THREADS"


def run_sweep(plan: Plan, folder: Path, pipeline: Pipeline, *, typed: Sequence[str]) -> int:
    """Run the jobs of a sweep, print their table and return the exit code.

    Args:
        folder: of the sweep.
        typed: the command line, to be repeated.

    Raises:
        Stopped: by a signal, after the jobs that ran had saved their states.
        RequestError: another process runs this sweep.
    """
    require_writable(folder, key="hydra.sweep.dir")
    own = [word for word in typed if not word.lstrip("+").startswith("hydra.sweep.dir=")]
    goes_on = (
        f"Go on with the sweep:\n  {command([*own, f'hydra.sweep.dir={as_value(str(folder))}'])}"
    )
    given_up = None
    try:
        with alone_in(folder, key="hydra.sweep.dir"):
            (folder / STOPPING_FILE).unlink(missing_ok=True)
            swept = SweptJobs(
                pipeline=pipeline,
                jobs=plan.jobs,
                launching=plan.launching,
                keeps_failed=plan.is_adaptive,
                shared=_shared(plan),
            )
            with ExitStack() as inside:
                if plan.launching.is_in_processes:
                    inside.enter_context(_ready_for(plan.launching))
                    inside.enter_context(_jobs_stop_first(plan, folder))
                if plan.launching.prints_apart:
                    inside.enter_context(_told_of(plan, folder, swept.shared))
                given_up = _run_rounds(plan, folder, swept)
    except Stopped as stop:
        stop.advice = (goes_on,)
        raise
    rows = sweep_rows(plan.jobs, folder)
    print_sweep(rows, folder)
    known = [row for row in rows if row.metric is not None]
    if plan.is_adaptive and known:
        say(f"Least metric: job {min(known, key=lambda row: row.metric or 0.0).name}")
    if given_up is not None:
        say(f"error: {given_up}\n{goes_on}", is_error=True)
    codes = {row.exit_code for row in rows}
    if given_up is not None or codes & {1, 2, 130, 143}:
        return 1
    return 3 if 3 in codes else 0


def _shared(plan: Plan) -> frozenset[str]:
    """Return the words that all jobs have, of several."""
    words = [frozenset(job.overrides) for job in plan.jobs or plan.samples]
    return words[0].intersection(*words[1:]) if len(words) > 1 else frozenset()


def _start(plan: Plan, folder: Path, swept: SweptJobs) -> str | None:
    """Start all jobs; return why that ended before they did, None when it did not."""
    pinned = f"hydra.sweep.dir={quoted(str(folder))}"
    try:
        start_hydra(["--multirun", *plan.overrides, pinned], swept.run, is_raising=True)
    except TritterError as error:
        return str(error)
    except Exception as error:  # the launcher's and the sweeper's border: whatever they raise
        said = (str(error).strip().splitlines() or [""])[0]
        return f"the sweep was broken off: {type(error).__name__}: {said}"
    return None


def _run_rounds(plan: Plan, folder: Path, swept: SweptJobs) -> str | None:
    """Start the jobs until all have ended, or were cut off too often to be tried again."""
    before = {place: _written(place) for place in _job_folders(plan, folder)}
    cut_off: Counter[Path] = Counter()
    while True:
        reason = _start(plan, folder, swept)
        if reason is None:
            return None
        while any(map(is_held, _job_folders(plan, folder))):  # those that run on by themselves
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        new = [f for f in _job_folders(plan, folder) if _written(f) != before.get(f)]
        status = {place: read_status(place)["status"] for place in new}
        cut = [f for f in new if status[f] == "running" and f not in swept.left]
        if not cut:
            return reason
        cut_off.update(cut)
        say(f"{reason}\nCut off: {', '.join(f.name for f in cut)}; going on with what is not done.")
        left = {place for place, times in cut_off.items() if times >= _MOST_CUT_OFF}
        left |= {place for place in new if status[place] == "failed"}
        swept = replace(swept, left=frozenset(left))


def _written(folder: Path) -> int | None:
    try:
        return (folder / STATUS_FILE).stat().st_mtime_ns
    except OSError:
        return None


def _job_folders(plan: Plan, folder: Path) -> list[Path]:
    """Return folders of jobs: of those planned, else of those that began."""
    if plan.jobs:
        return [job.folder for job in plan.jobs]
    return sorted(path.parent for path in folder.rglob(STATUS_FILE))


@contextmanager
def _ready_for(launching: Launching) -> Iterator[None]:
    """Set the environment that the processes of a launcher start from."""
    own = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    if launching.threads is not None and _THREADS not in os.environ:
        own[_THREADS] = str(launching.threads)
    before = {name: os.environ.get(name) for name in own}
    os.environ.update(own)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


@contextmanager
def _told_of(plan: Plan, folder: Path, shared: frozenset[str]) -> Iterator[None]:
    """Say which jobs begin and end, as their status has it: they can't say so themselves."""
    is_over = threading.Event()
    known = {place: read_status(place)["status"] for place in _job_folders(plan, folder)}

    def look() -> None:
        for place in _job_folders(plan, folder):
            found, name = read_status(place), place.relative_to(folder)
            if found["status"] in (known.get(place), "not run", "unknown"):
                continue
            if known.get(place) != "running":
                own = " ".join(word for word in found["overrides"] if word not in shared)
                say(f"job {name} begins: {own}")
            known[place] = found["status"]
            if known[place] != "running":
                say(f"job {name} is over: {known[place]}")

    def watch() -> None:
        while not is_over.wait(_SECONDS_BETWEEN_LOOKS):
            look()

    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    try:
        yield
    finally:
        is_over.set()
        watching.join()
        look()


@contextmanager
def _jobs_stop_first(plan: Plan, folder: Path) -> Iterator[None]:
    """Let Ctrl-C and SIGTERM end the jobs in their processes first, which save their states.

    Raises:
        Stopped: a signal came, and no job of this machine runs any more; or a second one came.
    """
    is_asked = False

    def running() -> set[int]:
        places = _job_folders(plan, folder) or [p.parent for p in folder.rglob(LOCK_NAME)]
        return {p for place in places if place != folder and (p := process_in(place)) is not None}

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal is_asked
        if is_asked:
            _tell(running())
            raise Stopped(number)
        is_asked, told = True, set[int]()
        (folder / STOPPING_FILE).touch()
        say("Stopping: the jobs that run save their states; once more ends them.", is_error=True)
        while found := running():
            _tell(found - told)
            told |= found
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


def _tell(processes: set[int]) -> None:
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
