"""A sweep that Hydra runs, whoever starts its jobs, and the table at its end: a line per job."""

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
    """What became of one job.

    Args:
        changes: domain → relative change of the loss per byte.
        experts: LoRA experts at the end, and the part of the parameters that was trained.
        error: of one that failed, or stopped.
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
    """Let Hydra run the jobs of a sweep, print their table and return the exit code.

    Args:
        typed: the command line, to be repeated.

    Raises:
        Stopped: by a signal, after the jobs that ran had saved their states.
        Refused: by the callback, with the reason.
    """
    broken_off: str | None = None
    try:
        # First, so that a mode that is typed wins, and is refused
        words = ["hydra.mode=MULTIRUN", *request.overrides]
        hydra.multirun(search_path().config_name, task, words)
    except Stopped as stop:
        stop.advice = (_goes_on(request, typed),) if request.plan is not None else ()
        raise
    except Exception as error:  # the launcher's and the sweeper's border: whatever they raise
        if request.plan is None:
            raise
        said = (str(error).strip().splitlines() or [""])[0]
        broken_off = f"the sweep was broken off: {type(error).__name__}: {said}"
        if isinstance(error, TritterError):
            broken_off = str(error)
    plan = request.plan
    assert plan is not None and plan.sweep_folder is not None, "Hydra called the callback"
    rows = sweep_rows(plan.jobs, plan.sweep_folder)
    print_sweep(rows, plan.sweep_folder)
    known = [row for row in rows if row.metric is not None]
    if plan.is_adaptive and known:
        say(f"Least metric: job {min(known, key=lambda row: row.metric or 0.0).name}")
    if broken_off is not None:
        say(f"error: {broken_off}\n{_goes_on(request, typed)}", is_error=True)
    codes = {row.exit_code for row in rows}
    if broken_off is not None or codes & {1, 2, 130, 143}:
        return 1
    return 3 if 3 in codes else 0


def _goes_on(request: Request, typed: Sequence[str]) -> str:
    assert request.plan is not None and request.plan.sweep_folder is not None
    own = [word for word in typed if not word.lstrip("+").startswith("hydra.sweep.dir=")]
    folder = as_value(str(request.plan.sweep_folder))
    return f"Go on with the sweep:\n  {command([*own, f'hydra.sweep.dir={folder}'])}"


def sweep_rows(jobs: Sequence[Job], folder: Path) -> tuple[SweepRow, ...]:
    """Read the status of every job: of the planned ones, else of those found below `folder`."""
    folders = [job.folder for job in jobs] or sorted(
        (path.parent for path in folder.rglob(STATUS_FILE)),
        key=lambda path: (int(path.name) if path.name.isdigit() else -1, str(path)),
    )
    planned = {job.folder: job.overrides for job in jobs}
    rows = []
    for place in folders:
        status = read_status(place)
        is_killed = status.status == "running" and not is_held(place)
        rows.append(
            SweepRow(
                name=str(place.relative_to(folder)),
                overrides=planned.get(place, tuple(status.overrides)),
                status="killed" if is_killed else status.status,
                changes=_changes(place / SUMMARY_FILE),
                experts=_experts(place / SUMMARY_FILE),
                metric=status.metric,
                exit_code=status.exit_code,
                error=status.error,
            )
        )
    return tuple(rows)


def print_sweep(rows: Sequence[SweepRow], folder: Path) -> None:
    """Print the table; overrides that all jobs share stand in its title."""
    shared = (
        set(rows[0].overrides).intersection(*(row.overrides for row in rows)) if rows else set()
    )
    shared = shared if len(rows) > 1 else set()
    table = Table(title=Text(" ".join(sorted(shared))) if shared else None)  # [A,B] is no markup
    for name in ("job", "overrides", "status"):
        table.add_column(name, overflow="fold")
    domains = list(dict.fromkeys(domain for row in rows for domain in row.changes))
    has_experts = any(row.experts is not None for row in rows)
    for name in (*domains, *(("experts", "trainable") if has_experts else ()), "metric"):
        table.add_column(name, justify="right")
    for row in rows:
        own = Text(" ".join(word for word in row.overrides if word not in shared))
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
            "By what was trained, kept or not: change of the loss per byte, and metric, its mean "
            "over all domains, which a sweeper minimises.",
            highlight=False,
        )
    for row in rows:
        if row.error is not None:
            said = (row.error.splitlines() or [""])[0]
            console.print(f"job {row.name}: {said}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"Each job's summary and status: {folder}/JOB/", markup=False, soft_wrap=True)


def _changes(summary: Path) -> dict[str, float]:
    """Return domain → relative change of the loss per byte that the last attempt's gate saw."""
    asked = ("retention", "new_capability")
    try:
        return {
            str(check["subject"]): float(check["value"])
            for check in read_object(summary)["attempts"][-1]["gate"]
            if check["check"] in asked and check["value"] is not None
        }
    except (ValueError, LookupError, TypeError):  # a job without a summary, or with another's
        return {}


def _experts(summary: Path) -> tuple[int, float] | None:
    """Return what `SweepRow` holds of LoRA experts; None of a job without any."""
    try:
        held = read_object(summary)["experts"]
        number, share = held["number"], held["parameters"]["share"]
    except (ValueError, LookupError, TypeError):
        return None
    is_known = type(number) is int and isinstance(share, int | float)
    return (number, float(share)) if is_known else None
