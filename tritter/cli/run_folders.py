"""Run folders as they lie on a disk: found below what was named, and read without trust."""

import csv
import io
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tritter.checkpoint.history import read_chain
from tritter.cli.history import made_by, steps_after
from tritter.cli.output import short
from tritter.config.overrides import resume_command
from tritter.config.run_folder import RUN_FILE, SUMMARY_FILE
from tritter.errors import Problem, RequestError, TritterError, raise_problems
from tritter.options import leaves
from tritter.report.plots import Curve, curves_of
from tritter.report.runs import Run
from tritter.report.summary_check import check_summary
from tritter.storage.reading import read_object, read_text

MAX_RUNS = 1000
_DEPTH = 3  # below a folder that is named: a sweep of sweeps
_MAX_METRICS_BYTES = 2**26


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
            for place in _places(folder, depth=_DEPTH):
                if (place / SUMMARY_FILE).is_file():
                    finished[place] = None
                elif (place / RUN_FILE).is_file():
                    unfinished[place] = None
                else:
                    continue
                found.add(place)
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
    resolved = [place.resolve() for place in places]
    above = Path(os.path.commonpath([place.parent for place in resolved]))
    runs: list[Run] = []
    problems = []
    for place in resolved:
        try:
            runs.append(_run(place, name=str(place.relative_to(above))))
        except TritterError as error:
            problems.append(Problem("RUN", str(place), reason=str(error).removesuffix(".")))
    if problems:
        raise_problems(problems)
    return runs


def _run(place: Path, *, name: str) -> Run:
    summary = read_object(place / SUMMARY_FILE)
    check_summary(summary)
    record = read_object(place / RUN_FILE) if (place / RUN_FILE).exists() else {}
    settings = record.get("fingerprint")
    return Run(
        name=name,
        summary=summary,
        settings=_settings(settings)
        if isinstance(settings, dict)
        else {"seed": summary.get("seed")},
        curves=_curves(place, "rounds") or _curves(place),
        control=_curves(place, "control"),
        pretraining=_curves(place, "pretraining"),
        history=_history(place / "checkpoint"),
    )


def _settings(fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """Return dotted key → value; what is not finite, which JSON has no number for, as text."""

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
