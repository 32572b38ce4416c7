"""`tritter report`: finished runs and sweeps as one self-contained HTML page.

Run folders are found below the folders that a person names, and read without trust.
"""

from __future__ import annotations

import csv
import io
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tritter.cli.options import AsJson, ReportOverwrite, Runs, place
from tritter.cli.output import print_json, short
from tritter.errors import Problem, RequestError, TritterError, raise_problems
from tritter.storage.atomic import atomic_folder, refuse_standing
from tritter.storage.reading import RUN_FILE, SUMMARY_FILE, read_object, read_text
from tritter.terminal import Console

if TYPE_CHECKING:
    from tritter.report.plots import Curve
    from tritter.report.runs import Run

MAX_RUNS = 1000
_DEPTH = 3  # below a folder that is named: a sweep of sweeps
_MAX_METRICS_BYTES = 2**26


def report(
    folders: Runs,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            help="The page. Default: report.html in the folder, or here if there are several.",
            metavar="FILE.html",
            parser=place,
        ),
    ] = None,
    figures: Annotated[
        Path | None,
        typer.Option(
            "--figures",
            help="New folder for the figures as PNG files.",
            metavar="DIR",
            parser=place,
        ),
    ] = None,
    overwrite: ReportOverwrite = False,
    as_json: AsJson = False,
) -> int:
    """Put finished runs and sweeps side by side on one HTML page."""
    from tritter.cli.report_file import PAGE_NAME, ReportFile, check_place
    from tritter.report.page import page

    found = find_runs(folders)
    target = output or (folders[0] if len(folders) == 1 else Path()) / PAGE_NAME
    file = ReportFile(path=target, kind="report", format="html", overwrite=overwrite)
    file.check()
    if figures is not None:
        refuse_standing(figures, overwrite=False)
        check_place(figures, key="--figures")
    runs = read_runs(found.finished)
    notes = [f"Not finished, and left out: {path}" for path in found.unfinished]
    title = f"Runs in {folders[0].resolve().name}" if len(folders) == 1 else "Runs side by side"
    text, pictures = page(runs, title=title, notes=notes)
    file.write(text)
    if figures is not None:
        with atomic_folder(figures) as temporary:
            for name, picture in pictures.items():
                (temporary / name).write_bytes(picture)
    if as_json:
        left_out = [str(path) for path in found.unfinished]
        names = [run.name for run in runs]
        print_json({"output": str(target), "runs": names, "left_out": left_out})
        return 0
    console = Console()
    for note in notes:
        console.print(note, soft_wrap=True, markup=False, highlight=False)
    number = "one run" if len(runs) == 1 else f"{len(runs)} runs"
    console.print(f"{number}: {target}", soft_wrap=True, markup=False, highlight=False)
    return 0


@dataclass(frozen=True, slots=True)
class FoundRuns:
    """Folders of runs below what was named."""

    finished: tuple[Path, ...]
    unfinished: tuple[Path, ...]


def find_runs(folders: Sequence[Path]) -> FoundRuns:
    """Return the runs in some folders and below them; links are not followed.

    Raises:
        RequestError: there is no such folder, one holds no run, or there is no finished one.
    """
    finished: dict[Path, None] = {}
    unfinished: dict[Path, None] = {}
    for folder in folders:
        try:
            if not folder.is_dir():
                raise RequestError(Problem("RUN", str(folder), reason="it is not a folder"))
            found: set[Path] = set()
            for each in _places(folder, depth=_DEPTH):
                if (each / SUMMARY_FILE).is_file():
                    finished[each] = None
                elif (each / RUN_FILE).is_file():
                    unfinished[each] = None
                else:
                    continue
                found.add(each)
            if not found:
                reason = f"no finished run is in it: no {SUMMARY_FILE}"
                raise RequestError(Problem("RUN", str(folder), reason=reason))
        except OSError as error:  # below it is what the system does not let be read
            reason = f"{error.filename}: {error.strerror}"
            raise RequestError(Problem("RUN", str(folder), reason=reason)) from error
    if not finished:
        reason = f"no finished run is in it: no {SUMMARY_FILE}"
        if unfinished:
            several = f"{len(unfinished)} are not finished, the first"
            told = "one is not finished" if len(unfinished) == 1 else several
            from tritter.config.overrides import resume_command

            reason += f"; {told}: {resume_command(next(iter(unfinished)))} goes on with it"
        raise RequestError(Problem("RUN", ", ".join(map(str, folders)), reason=reason))
    if len(finished) > MAX_RUNS:
        reason = f"{len(finished)} runs are in it; allowed are {MAX_RUNS}, name fewer"
        raise RequestError(Problem("RUN", ", ".join(map(str, folders)), reason=reason))
    return FoundRuns(tuple(finished), tuple(unfinished))


def _places(folder: Path, *, depth: int) -> Iterator[Path]:
    """Yield a folder and those below it; what a run holds is no run."""
    yield folder
    is_run = any((folder / name).is_file() for name in (SUMMARY_FILE, RUN_FILE))
    if is_run or not depth:
        return
    with os.scandir(folder) as entries:
        inner = [
            Path(entry.path)
            for entry in entries
            if entry.is_dir(follow_symlinks=False) and not entry.name.startswith(".")
        ]
    for each in sorted(inner, key=_counted):
        yield from _places(each, depth=depth - 1)


def _counted(path: Path) -> str:
    """Return what paths are sorted by: jobs of a sweep by number, 2 before 10."""
    return re.sub("[0-9]+", lambda digits: digits[0].zfill(20), path.name)


def read_runs(places: Sequence[Path]) -> list[Run]:
    """Return the runs, by names that tell them apart.

    Raises:
        RequestError: lists those that can't be read, each with what is wrong.
    """
    resolved = [folder.resolve() for folder in places]
    above = Path(os.path.commonpath([folder.parent for folder in resolved]))
    runs: list[Run] = []
    problems = []
    for folder in resolved:
        try:
            runs.append(_run(folder, name=str(folder.relative_to(above))))
        except TritterError as error:
            problems.append(Problem("RUN", str(folder), reason=str(error).removesuffix(".")))
    if problems:
        raise_problems(problems)
    return runs


def _run(place: Path, *, name: str) -> Run:
    from tritter.report.runs import Run
    from tritter.report.summary import Summary

    summary = Summary.read(place / SUMMARY_FILE)
    record = read_object(place / RUN_FILE) if (place / RUN_FILE).exists() else {}
    settings = record.get("fingerprint")
    return Run(
        name=name,
        summary=summary,
        settings=_settings(settings) if isinstance(settings, dict) else {"seed": summary.seed},
        curves=_curves(place, "rounds") or _curves(place),
        control=_curves(place, "control"),
        pretraining=_curves(place, "pretraining"),
        history=_history(place / "checkpoint"),
    )


def _settings(fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """Return dotted key → value; what is not finite, which JSON has no number for, as text."""

    from tritter.options import leaves

    def plain(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [plain(each) for each in value]
        return str(value) if isinstance(value, float) and not math.isfinite(value) else value

    return {key: plain(value) for key, value in leaves(fingerprint).items()}


def _curves(place: Path, of: str = "") -> tuple[Curve, ...]:
    """Return the losses of a run, or of a part of it; none where it has no such file.

    Raises:
        TritterError: it is damaged.
    """
    from tritter.report.plots import curves_of

    path = place / (f"metrics_{of}.csv" if of else "metrics.csv")
    try:
        return curves_of(metric_rows(path))
    except (ValueError, TypeError, OverflowError) as error:
        if isinstance(error, TritterError):
            raise
        raise TritterError(f"{path.name} is damaged: {error}") from error


def metric_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a table of metrics; none where there is no such file.

    Raises:
        TritterError: it can't be read, or is no such table.
    """
    if not os.path.lexists(path):
        return []
    text = read_text(path, limit_bytes=_MAX_METRICS_BYTES)
    try:
        return list(csv.DictReader(io.StringIO(text), strict=True))
    except csv.Error as error:
        raise TritterError(f"{path.name} is damaged: {error}") from error


def _history(checkpoint: Path) -> tuple[str, ...]:
    """Return the chain of a checkpoint, a line each; nothing where it is gone."""
    from tritter.checkpoint.history import read_chain
    from tritter.cli.history import made_by, steps_after

    try:
        chain = read_chain(checkpoint)
    except TritterError:
        return ()
    lines = []
    for link in chain:
        steps = steps_after(link, chain[-1])
        trained = "" if steps is None else f", then {steps} steps"
        lines.append(f"{short(link.model_hash)}: {made_by(link)}{trained}")
    return tuple(lines)
