"""`tritter report`: finished runs and sweeps as one self-contained HTML page."""

import csv
import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tritter.checkpoint.history import read_chain
from tritter.cli.history import made_by, steps_after
from tritter.cli.output import print_json, short
from tritter.config.run_folder import RUN_FILE, SUMMARY_FILE
from tritter.errors import Problem, RequestError, TritterError, raise_problems
from tritter.options import leaves
from tritter.report.page import page
from tritter.report.plots import Curve, curves_of
from tritter.report.runs import Run
from tritter.report.summary_check import check_summary
from tritter.storage.atomic import atomic_folder, refuse_standing, write_text_atomic
from tritter.storage.reading import kind_of, read_object, read_text
from tritter.terminal import Console

MAX_RUNS = 1000
_DEPTH = 3  # below a folder that is named: a sweep of sweeps
_MAX_METRICS_BYTES = 2**26


@dataclass(frozen=True, slots=True)
class _Found:
    """Folders of runs below what was named."""

    finished: tuple[Path, ...]
    unfinished: tuple[Path, ...]


def run_report(
    folders: Sequence[Path],
    *,
    output: Path | None,
    figures: Path | None,
    overwrite: bool,
    as_json: bool,
) -> int:
    """Write the page; return 0.

    Args:
        folders: of runs, or of what holds them.
        output: the page; None: `report.html` in the folder, or here if there are several.
        figures: a new folder for its figures as PNG files; None: they stand in the page alone.

    Raises:
        RequestError: no run is found, one is damaged, or the place is taken.
    """
    target = output or (folders[0] if len(folders) == 1 else Path()) / "report.html"
    _check_target(target, overwrite=overwrite)
    if figures is not None:
        refuse_standing(figures, overwrite=False)
    found = _find(folders)
    runs = _read(found.finished)
    notes = [f"Not finished, and left out: {path}" for path in found.unfinished]
    title = f"Runs in {folders[0].resolve().name}" if len(folders) == 1 else "Runs side by side"
    text, pictures = page(runs, title=title, notes=notes)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomic(target, text)
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


def _check_target(target: Path, *, overwrite: bool) -> None:
    """Refuse a place where something stands that is no page to be replaced."""
    if not os.path.lexists(target):
        return
    mode = target.lstat().st_mode
    if kind_of(mode) != "a file":
        raise RequestError(Problem("--output", str(target), reason=f"it is {kind_of(mode)}"))
    if not overwrite:
        reason = "it is there already; name another file, or replace it with --overwrite"
        raise RequestError(Problem("--output", str(target), reason=reason))
    if target.suffix not in (".html", ".htm"):
        reason = "--overwrite replaces pages alone, .html"
        raise RequestError(Problem("--output", str(target), reason=reason))


def _find(folders: Sequence[Path]) -> _Found:
    """Return the runs in some folders and below them; links are not followed.

    Raises:
        RequestError: there is no such folder, or no finished run.
    """
    finished: dict[Path, None] = {}
    unfinished: dict[Path, None] = {}
    for folder in folders:
        try:
            if not folder.is_dir():
                raise RequestError(Problem("RUN", str(folder), reason="it is not a folder"))
            for place in _places(folder, depth=_DEPTH):
                if (place / SUMMARY_FILE).is_file():
                    finished[place] = None
                elif (place / RUN_FILE).is_file():
                    unfinished[place] = None
        except OSError as error:  # below it is what the system does not let be read
            reason = f"{error.filename}: {error.strerror}"
            raise RequestError(Problem("RUN", str(folder), reason=reason)) from error
    if not finished:
        reason = f"no finished run is in it: no {SUMMARY_FILE}"
        if unfinished:
            reason += f"; {len(unfinished)} are not finished"
        raise RequestError(Problem("RUN", ", ".join(map(str, folders)), reason=reason))
    if len(finished) > MAX_RUNS:
        reason = f"{len(finished)} runs are in it; allowed are {MAX_RUNS}, name fewer"
        raise RequestError(Problem("RUN", ", ".join(map(str, folders)), reason=reason))
    return _Found(tuple(finished), tuple(unfinished))


def _places(folder: Path, *, depth: int) -> Iterator[Path]:
    """Yield a folder and those below it; what a run holds is no run."""
    yield folder
    is_run = any((folder / name).is_file() for name in (SUMMARY_FILE, RUN_FILE))
    if is_run or not depth:
        return
    with os.scandir(folder) as entries:
        inner = sorted(
            Path(entry.path)
            for entry in entries
            if entry.is_dir(follow_symlinks=False) and not entry.name.startswith(".")
        )
    for each in inner:
        yield from _places(each, depth=depth - 1)


def _read(places: Sequence[Path]) -> list[Run]:
    """Return the runs, by names that tell them apart.

    Raises:
        RequestError: lists those that can't be read, each with what is wrong.
    """
    resolved = [place.resolve() for place in places]
    above = Path(os.path.commonpath([place.parent for place in resolved]))
    runs, problems = [], []
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
        settings=leaves(settings) if isinstance(settings, dict) else {"seed": summary.get("seed")},
        curves=_curves(place, "rounds") or _curves(place),
        control=_curves(place, "control"),
        pretraining=_curves(place, "pretraining"),
        history=_history(place / "checkpoint"),
    )


def _curves(place: Path, of: str = "") -> tuple[Curve, ...]:
    """Return the losses of a run, or of a part of it; none where it has no such file.

    Raises:
        TritterError: it is damaged.
    """
    path = place / (f"metrics_{of}.csv" if of else "metrics.csv")
    if not os.path.lexists(path):
        return ()
    text = read_text(path, limit_bytes=_MAX_METRICS_BYTES)
    try:
        rows: list[dict[str, Any]] = list(csv.DictReader(io.StringIO(text), strict=True))
        return curves_of(rows)
    except (ValueError, TypeError, OverflowError, csv.Error) as error:
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
