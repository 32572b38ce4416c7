"""A sweep: one line per finished job, and the table of all jobs at its end."""

import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.table import Table
from rich.text import Text

from tritter.config.folders import search_path
from tritter.config.launch.jobs import Job, Task
from tritter.config.launch.plan import Request
from tritter.config.overrides import command, override_value
from tritter.config.run_folder import OUTPUT_FILE, STATUS_FILE, RunStatus
from tritter.errors import TritterError
from tritter.stopping import Stopped
from tritter.storage.lock import FolderLock
from tritter.storage.reading import SUMMARY_FILE, read_object
from tritter.terminal import Console, say

_SECONDS_BETWEEN_LINES = 0.5


def run_sweep(request: Request, task: Task, *, typed: Sequence[str]) -> int:
    """Let Hydra run the jobs of a sweep, print a line per job and their table.

    Args:
        typed: The command line, which the advice to resume repeats.

    Returns:
        The exit code.
    """
    failure: str | None = None
    task.on_end = lines = _JobLines()
    try:
        # First, so that a mode that is typed wins, and is refused
        words = ["hydra.mode=MULTIRUN", *request.overrides]
        with _print_finished_jobs(request, lines):
            request.loader.hydra.multirun(search_path().config_name, task, words)
    except Stopped as stop:
        if (plan := request.plan) is not None and plan.sweep_folder is not None:
            stop.advice = (_resume_advice(request, typed),)
            if stop.signal_number != signal.SIGPIPE:
                _print_sweep(_ends_of(plan.jobs, plan.sweep_folder), plan.sweep_folder)
        raise
    except Exception as error:  # the launcher and the sweeper may raise anything
        if request.plan is None:
            raise
        failure = f"the sweep failed: {type(error).__name__}: {_first_line(str(error).strip())}"
        if isinstance(error, TritterError):
            failure = str(error)
    plan = request.plan
    assert plan is not None and plan.sweep_folder is not None, "Hydra called the callback"
    ends = _ends_of(plan.jobs, plan.sweep_folder)
    _print_sweep(ends, plan.sweep_folder)
    metrics = {job: ended.metric for job, ended in ends.items() if ended.metric is not None}
    if plan.is_adaptive and metrics:
        lowest = min(metrics, key=metrics.__getitem__)
        say(f"Lowest metric: job {os.path.relpath(lowest, plan.sweep_folder)}")
    if failure is not None:
        say(f"error: {failure}\n{_resume_advice(request, typed)}", is_error=True)
    codes = {ended.exit_code for ended in ends.values()}
    if failure is not None or codes & {1, 2, 130, 143}:
        return 1
    return 3 if 3 in codes else 0


def _resume_advice(request: Request, typed: Sequence[str]) -> str:
    assert request.plan is not None and request.plan.sweep_folder is not None
    own = [
        override for override in typed if not override.lstrip("+").startswith("hydra.sweep.dir=")
    ]
    folder = override_value(str(request.plan.sweep_folder))
    return f"Resume the sweep with:\n  {command([*own, f'hydra.sweep.dir={folder}'])}"


def _ends_of(jobs: Sequence[Job], folder: Path) -> dict[Path, RunStatus]:
    """Return job folder → how it ended, of all planned jobs, or of all in `folder` if none is."""
    folders = [job.folder for job in jobs] or sorted(
        (path.parent for path in folder.rglob(STATUS_FILE)),
        key=lambda path: (int(path.name) if path.name.isdigit() else -1, str(path)),
    )
    planned = {job.folder: job.overrides for job in jobs}
    ends = {job: _end_of(job) for job in folders}
    return {
        job: replace(ended, overrides=list(planned.get(job, ended.overrides)))
        for job, ended in ends.items()
    }


def _end_of(job: Path) -> RunStatus:
    """Return the status of the job in a folder, `killed` if its process is gone."""
    ended = RunStatus.read(job)
    is_killed = ended.status == "running" and not FolderLock(job).is_held
    return replace(ended, status="killed") if is_killed else ended


def _shared(overrides: Sequence[Sequence[str]]) -> set[str]:
    """Return the overrides that all of several jobs have."""
    if len(overrides) < 2:
        return set()
    return set(overrides[0]).intersection(*overrides[1:])


@dataclass(slots=True)
class _JobLines:
    """Prints one line per finished job of a sweep.

    Args:
        started: Time at which the sweep started; a job that ended before is marked.
        printed: Folders of the jobs whose lines are printed.
    """

    started: float = field(default_factory=time.time)
    printed: set[Path] = field(default_factory=set)

    def __call__(self, job: Path, sweep: Path, jobs: Sequence[Job]) -> None:
        """Print the line of a job.

        Args:
            job: Its folder.
            sweep: The sweep's folder.
            jobs: All planned jobs; empty if the sweeper chooses them one by one.
        """
        self.printed.add(job)
        ended, changes = _end_of(job), _changes(job)
        shared = _shared([each.overrides for each in jobs])
        own = " ".join(override for override in ended.overrides if override not in shared)
        number = f"[{len(self.printed)}/{len(jobs)}] " if jobs else ""
        parts = [ended.status]
        if ended.error is not None:
            parts = [f"{ended.status}: {_first_line(ended.error)}", f"log: {job / OUTPUT_FILE}"]
        if changes:
            parts.append(", ".join(f"{name} {change}" for name, change in changes.items()))
        if ended.metric is not None:
            parts.append(f"metric {ended.metric:.4f}")
        if self.is_earlier(job):
            parts.append("finished earlier")
        name = os.path.relpath(job, sweep)
        say(f"{number}job {name}{f' ({own})' if own else ''}: {'; '.join(parts)}")

    def is_earlier(self, job: Path) -> bool:
        """Return whether a job ended before this sweep started."""
        path = job / STATUS_FILE
        return path.exists() and path.stat().st_mtime < self.started

    def print_new(self, sweep: Path, jobs: Sequence[Job]) -> None:
        """Print the lines of jobs that have ended in other processes."""
        known = [job.folder for job in jobs]
        for job in known or sorted(path.parent for path in sweep.glob(f"*/{STATUS_FILE}")):
            run = RunStatus.read(job)
            has_ended = run.status in ("failed", "interrupted") and not self.is_earlier(job)
            if job not in self.printed and (has_ended or run.is_of_outcome):
                self(job, sweep, jobs)


@contextmanager
def _print_finished_jobs(request: Request, lines: _JobLines) -> Iterator[None]:
    """Print the lines of jobs that a launcher runs in other processes, as their statuses appear."""
    is_over = threading.Event()

    def print_new() -> None:
        plan = request.plan
        if plan is None or plan.sweep_folder is None or not plan.launching.is_in_processes:
            return
        lines.print_new(plan.sweep_folder, plan.jobs)

    def watch() -> None:
        while not is_over.wait(_SECONDS_BETWEEN_LINES):
            print_new()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        is_over.set()
        watcher.join()
        print_new()


def _print_sweep(ends: Mapping[Path, RunStatus], folder: Path) -> None:
    """Print the table of all jobs; its title has the overrides that they share."""
    shared = _shared([ended.overrides for ended in ends.values()])
    table = Table(title=Text(" ".join(sorted(shared))) if shared else None)  # [A,B] is no markup
    for name in ("job", "overrides", "status"):
        table.add_column(name, overflow="fold")
    changes, experts = {job: _changes(job) for job in ends}, {job: _experts(job) for job in ends}
    domains = list(dict.fromkeys(domain for job in ends for domain in changes[job]))
    has_experts = any(experts.values())
    for name in (*domains, *(("experts", "trainable") if has_experts else ()), "metric"):
        table.add_column(name, justify="right", overflow="fold")
    for job, ended in ends.items():
        own = Text(" ".join(override for override in ended.overrides if override not in shared))
        cells: list[str | Text] = [os.path.relpath(job, folder), own, ended.status]
        cells += (changes[job].get(name, "-") for name in domains)
        if has_experts:
            cells += experts[job] or ("-", "-")
        table.add_row(*cells, "-" if ended.metric is None else f"{ended.metric:.4f}")
    console = Console()
    console.print(table, markup=False)
    if domains:
        console.print(
            "Per domain: change of the loss per byte, or of the accuracy. Metric: mean loss per "
            "byte, which a sweeper minimises. Both describe the trained model, kept or not.",
            highlight=False,
        )
    for job, ended in ends.items():
        if ended.error is not None and ended.status != "not run":
            line = f"job {os.path.relpath(job, folder)}: {_first_line(ended.error)}"
            console.print(line, markup=False, highlight=False, soft_wrap=True)
    files = f"{STATUS_FILE}, {SUMMARY_FILE} and {OUTPUT_FILE}"
    console.print(f"{files} of each job: {folder}/JOB/", markup=False, soft_wrap=True)


def _first_line(text: str) -> str:
    """Return the first line of an error, or the heading and first entry of a list."""
    first, *rest = text.splitlines() or [""]
    return f"{first} {rest[0].strip()}" if rest and first.endswith(":") else first


def _changes(job: Path) -> dict[str, str]:
    """Return domain or task → change from the base to the last training of a job, as text."""
    found = dict[str, str]()
    with suppress(ValueError, LookupError, TypeError, AttributeError):  # none, or another's
        record, loss = read_object(job / SUMMARY_FILE), "loss_per_byte"
        for name, before in record["baseline"].items():
            after = record["attempts"][-1]["final"][name]
            if before.get(loss) and after[loss] is not None:
                found[name] = f"{after[loss] / before[loss] - 1:+.1%}"
            if None not in (right := [each.get("accuracy") for each in (before, after)]):
                found[f"{name}/accuracy"] = f"{100 * (right[1] - right[0]):+.1f} points"
    return found


def _experts(job: Path) -> tuple[str, str] | None:
    """Return the final number of a job's LoRA experts and their share; None without experts."""
    try:
        record = read_object(job / SUMMARY_FILE)["experts"]
        return f"{record['number']:d}", f"{record['parameters']['share']:.2%}"
    except (ValueError, LookupError, TypeError):
        return None
