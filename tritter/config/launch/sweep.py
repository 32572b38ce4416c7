"""Runs a sweep with Hydra and prints a table with one line per job."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra._internal.hydra import Hydra
from rich.table import Table
from rich.text import Text

from tritter.config.folders import search_path
from tritter.config.launch.jobs import STATUS_FILE, Job, Task, read_status
from tritter.config.launch.plan import Request
from tritter.config.overrides import as_value, command
from tritter.errors import TritterError
from tritter.stopping import Stopped
from tritter.storage.lock import is_held
from tritter.storage.reading import SUMMARY_FILE, read_object
from tritter.terminal import Console, say


@dataclass(frozen=True, slots=True)
class SweepRow:
    """Result of one job.

    Args:
        name: name of the job's folder.
        overrides: overrides of the job.
        status: status of the job; killed if its process is gone.
        changes: domain → relative change of the loss per byte.
        experts: number of LoRA experts, and the trained fraction of the parameters.
        metric: value that the sweep minimises.
        exit_code: exit code of the job.
        error: error message of a failed or stopped job.
    """

    name: str
    overrides: tuple[str, ...]
    status: str
    changes: dict[str, float]
    experts: tuple[int, float] | None
    metric: float | None
    exit_code: int
    error: str | None = None


def run_sweep(request: Request, task: Task, hydra: Hydra, *, typed: Sequence[str]) -> int:
    """Run the jobs of a sweep, print their table and return the exit code.

    Args:
        typed: command line, repeated in the output.

    Raises:
        Stopped: by a signal, after running jobs have saved their state.
        Refused: by the callback, with the reason.
    """
    failure: str | None = None
    try:
        # First, so that a typed mode wins and is rejected
        overrides = ["hydra.mode=MULTIRUN", *request.overrides]
        hydra.multirun(search_path().config_name, task, overrides)
    except Stopped as stop:
        stop.advice = (_resume_hint(request, typed),) if request.plan is not None else ()
        raise
    except Exception as error:  # any error of a launcher or sweeper
        if request.plan is None:
            raise
        message = (str(error).strip().splitlines() or [""])[0]
        failure = f"the sweep failed: {type(error).__name__}: {message}"
        if isinstance(error, TritterError):
            failure = str(error)
    plan = request.plan
    assert plan is not None and plan.sweep_folder is not None, "Hydra called the callback"
    rows = sweep_rows(plan.jobs, plan.sweep_folder)
    print_sweep(rows, plan.sweep_folder)
    known = [row for row in rows if row.metric is not None]
    if plan.is_adaptive and known:
        say(f"Lowest metric: job {min(known, key=lambda row: row.metric or 0.0).name}")
    if failure is not None:
        say(f"error: {failure}\n{_resume_hint(request, typed)}", is_error=True)
    codes = {row.exit_code for row in rows}
    if failure is not None or codes & {1, 2, 130, 143}:
        return 1
    return 3 if 3 in codes else 0


def _resume_hint(request: Request, typed: Sequence[str]) -> str:
    assert request.plan is not None and request.plan.sweep_folder is not None
    own = [
        argument for argument in typed if not argument.lstrip("+").startswith("hydra.sweep.dir=")
    ]
    folder = as_value(str(request.plan.sweep_folder))
    return f"Resume the sweep with:\n  {command([*own, f'hydra.sweep.dir={folder}'])}"


def sweep_rows(jobs: Sequence[Job], folder: Path) -> tuple[SweepRow, ...]:
    """Return a row for each planned job, or for each job found in `folder` if none is planned."""
    folders = [job.folder for job in jobs] or sorted(
        (path.parent for path in folder.rglob(STATUS_FILE)),
        key=lambda path: (int(path.name) if path.name.isdigit() else -1, str(path)),
    )
    planned = {job.folder: job.overrides for job in jobs}
    rows = []
    for job_folder in folders:
        status = read_status(job_folder)
        is_killed = status.status == "running" and not is_held(job_folder)
        rows.append(
            SweepRow(
                name=str(job_folder.relative_to(folder)),
                overrides=planned.get(job_folder, tuple(status.overrides)),
                status="killed" if is_killed else status.status,
                changes=_changes(job_folder / SUMMARY_FILE),
                experts=_experts(job_folder / SUMMARY_FILE),
                metric=status.metric,
                exit_code=status.exit_code,
                error=status.error,
            )
        )
    return tuple(rows)


def print_sweep(rows: Sequence[SweepRow], folder: Path) -> None:
    """Print the table of a sweep; overrides shared by all jobs are in the title."""
    shared = (
        set(rows[0].overrides).intersection(*(row.overrides for row in rows)) if rows else set()
    )
    shared = shared if len(rows) > 1 else set()
    table = Table(title=Text(" ".join(sorted(shared))) if shared else None)  # [A,B] is not markup
    for name in ("job", "overrides", "status"):
        table.add_column(name, overflow="fold")
    domains = list(dict.fromkeys(domain for row in rows for domain in row.changes))
    has_experts = any(row.experts is not None for row in rows)
    for name in (*domains, *(("experts", "trainable") if has_experts else ()), "metric"):
        table.add_column(name, justify="right")
    for row in rows:
        own = Text(" ".join(override for override in row.overrides if override not in shared))
        metric = "-" if row.metric is None else f"{row.metric:.4f}"
        changes = [f"{row.changes[d]:+.1%}" if d in row.changes else "-" for d in domains]
        cells: list[str | Text] = [row.name, own, row.status, *changes]
        if has_experts and row.experts is not None:
            number, share = row.experts
            cells += [str(number), f"{share:.2%}"]
        elif has_experts:
            cells += ["-", "-"]
        table.add_row(*cells, metric)
    console = Console()
    console.print(table, markup=False)
    if domains:
        console.print(
            "Changes are relative changes of the loss per byte, whether or not the model was kept. "
            "The metric is their mean over all domains; a sweeper minimises it.",
            highlight=False,
        )
    for row in rows:
        if row.error is not None:
            message = (row.error.splitlines() or [""])[0]
            console.print(
                f"job {row.name}: {message}", markup=False, highlight=False, soft_wrap=True
            )
    console.print(f"Each job's summary and status: {folder}/JOB/", markup=False, soft_wrap=True)


def _changes(summary: Path) -> dict[str, float]:
    """Return domain → relative change of the loss per byte in the last attempt."""
    checks = ("retention", "new_capability")
    try:
        return {
            str(check["subject"]): float(check["value"])
            for check in read_object(summary)["attempts"][-1]["gate"]
            if check["check"] in checks and check["value"] is not None
        }
    except (ValueError, LookupError, TypeError):  # no summary, or an unreadable one
        return {}


def _experts(summary: Path) -> tuple[int, float] | None:
    """Return the LoRA experts of a job; None if it has none."""
    try:
        experts = read_object(summary)["experts"]
        number, share = experts["number"], experts["parameters"]["share"]
    except (ValueError, LookupError, TypeError):
        return None
    is_known = type(number) is int and isinstance(share, int | float)
    return (number, float(share)) if is_known else None
