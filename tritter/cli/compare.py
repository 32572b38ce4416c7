"""`tritter compare`: compare finished runs in the terminal, on a page or in a file."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.text import Text

from tritter.cli.options import RUNS_ARGUMENT, AsJson, ReportOverwrite, Runs, option, parse_path
from tritter.cli.output import CommandConsole, display_path, print_json
from tritter.cli.report import FoundRuns, metric_rows
from tritter.errors import Problem, RequestError, TritterError
from tritter.storage.reading import LINEAGE_NAME, SUMMARY_FILE, read_object
from tritter.terminal import status

if TYPE_CHECKING:
    from tritter.evaluation.statistics import PairedScores
    from tritter.report.compared import Comparison
    from tritter.report.runs import EndedRun

_MAX_DEPTH = 2  # levels between a run and its checkpoint: attempt_1/trained
_WHOLE = ("role", "run", "setting", "status", "verdict")  # columns that are never wrapped
_PEAK = "performance/peak_memory_bytes"


def compare(
    folders: Runs,
    output: Annotated[
        Path | None,
        option(
            "--output",
            "FILE",
            "Also write a page (.html), or the numbers (.csv, .json).",
            parser=parse_path,
        ),
    ] = None,
    overwrite: ReportOverwrite = False,
    as_json: AsJson = False,
) -> int:
    """Compare finished runs with the first one: settings, losses paired by document, cost."""
    from tritter.report.compared import Comparison

    file = None
    if output is not None:
        from tritter.cli.report_file import ReportFile

        file = ReportFile.with_ending(output, overwrite=overwrite)
    run_folders = []
    for folder in folders:
        if (folder / LINEAGE_NAME).is_file() and not (folder / SUMMARY_FILE).exists():
            above = list(folder.resolve().parents)[:_MAX_DEPTH]  # a checkpoint identifies its run
            folder = next((each for each in above if (each / SUMMARY_FILE).is_file()), folder)
        run_folders.append(folder)
    found = FoundRuns.below(run_folders)
    if len(found.finished) < 2:
        reason = "it contains one finished run; a comparison needs two or more"
        raise RequestError(Problem(RUNS_ARGUMENT, ", ".join(map(str, folders)), reason=reason))
    runs = found.read(are_drawn=file is not None and file.format == "html")
    compared = []
    for folder, run in zip(found.finished, runs, strict=True):
        scores, missing_reason = None, ""
        try:
            scores = _scores(folder, run)
        except TritterError as error:
            missing_reason = str(error).removesuffix(".")
        peak = _peak_memory(folder)
        run = replace(run, scores=scores, missing_reason=missing_reason, peak_memory=peak)
        compared.append(run)
    comparison = Comparison(tuple(compared))
    if file is not None:
        file.write(_content(comparison, file.format, found))
    if as_json:
        print_json(_numbers(comparison, found))
    else:
        _print(comparison, found.notes, output)
    return 0


def _numbers(comparison: Comparison, found: FoundRuns) -> dict[str, Any]:
    return {**comparison.to_dict(), "left_out": [str(path) for path in found.unfinished]}


def _scores(folder: Path, run: EndedRun) -> dict[str, PairedScores]:
    """Return the scores of a run's last model, item by item."""
    from tritter.evaluation.statistics import PairedScores, score_file
    from tritter.report.rows import score_of

    summary = run.summary
    rounds, attempts = summary.rounds, summary.attempts
    name = f"round_{len(rounds)}" if rounds else f"attempt_{max(1, len(attempts))}"
    tasks = len(summary.last_attempt.tasks)
    task = f"_task_{tasks}" if tasks > 1 else ""
    path = folder / score_file(f"{name}{task}-trained")
    if not os.path.lexists(path):
        raise TritterError(f"no {path.relative_to(folder)}")
    plain = read_object(path, limit_bytes=PairedScores.MAX_FILE_BYTES)
    scores = {subject: PairedScores.from_dict(record) for subject, record in plain.items()}
    for row in run.rows:
        own = scores.get(row.domain)
        stated = score_of((rounds or [summary.last_attempt])[-1].final, row.domain).value
        if own is None or stated is None:
            continue
        if not math.isclose(own.mean(), stated, rel_tol=1e-6, abs_tol=1e-9):
            raise TritterError(f"{path.relative_to(folder)} contradicts summary.json")
    return scores


def _peak_memory(folder: Path) -> float | None:
    """Return the peak memory in a run's metrics, or None if it was not logged."""
    from tritter.report.summary import MAX_NUMBER

    try:
        cells = [row.get(_PEAK) for row in metric_rows(folder / "metrics.csv")]
        values = [float(cell) for cell in cells if cell]
    except (TritterError, ValueError, TypeError):
        return None
    return max((value for value in values if 0 < value < MAX_NUMBER), default=None)


def _content(comparison: Comparison, format: str, found: FoundRuns) -> str:
    if format == "json":
        return json.dumps(_numbers(comparison, found), indent=2, allow_nan=False) + "\n"
    if format == "csv":
        stream = io.StringIO()
        csv.writer(stream, lineterminator="\n").writerows(comparison.rows())
        # A folder name may not be valid Unicode
        return stream.getvalue().encode(errors="backslashreplace").decode()
    from tritter.report.page import page

    tables = comparison.tables(on_page=True)
    return page(comparison.runs, title="Runs compared", notes=found.notes, tables=tables)[0]


def _print(comparison: Comparison, notes: Sequence[str], output: Path | None) -> None:
    from tritter.report.table import label

    console, lettered = CommandConsole(), comparison.with_letters()
    for each, short in zip(comparison.runs, lettered.runs, strict=True):
        console.print(Text(f"{short.name}  {console.printable(each.name)}"), soft_wrap=True)
    console.print()
    with status("computing bounds"):
        tables = lettered.tables()
    for title, table in tables.items():
        # A label equal to the one in the row before is not repeated
        rows, before, is_grouped = [], "", table.header[0] in ("domain", "setting")
        for first, *others in table.rows:
            rows.append(("" if is_grouped and first == before else label(first), *others))
            before = first
        names = enumerate(table.header)
        wrapped = [name for n, name in names if n not in table.numbers and name not in _WHOLE]
        console.print(Text(console.printable(title), style="bold"))
        console.print_table(replace(table, rows=tuple(rows), caption=""), wrapped=wrapped)
        if table.caption:
            console.print(Text(console.printable(table.caption), style="dim"))
        console.print()
    for note in notes:
        console.print(note, soft_wrap=True)
    if output is not None:
        console.print(Text(f"written  {console.printable(display_path(output))}"))
