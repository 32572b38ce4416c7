"""`tritter compare`: runs side by side in the terminal, on a page, or in a file of numbers."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.text import Text

from tritter.cli.options import AsJson, ReportOverwrite, Runs, option, place
from tritter.cli.output import new_console, print_json, shown_path, signs_of
from tritter.cli.report import find_runs, metric_rows, read_runs
from tritter.errors import Problem, RequestError, TritterError
from tritter.storage.reading import LINEAGE_NAME, SUMMARY_FILE, read_object

if TYPE_CHECKING:
    from tritter.report.compared import Comparison, Scores
    from tritter.report.runs import Run

_DEEPEST = 2  # a checkpoint below its run: attempt_1/trained
_WHOLE = ("role", "run", "status", "verdict")  # columns that stay whole on a narrow terminal
_PEAK = "performance/peak_memory_bytes"


def compare(
    folders: Runs,
    output: Annotated[
        Path | None,
        option(
            "--output",
            "FILE",
            "Also write a page (.html), or the numbers (.csv, .json).",
            parser=place,
        ),
    ] = None,
    overwrite: ReportOverwrite = False,
    as_json: AsJson = False,
) -> int:
    """Hold finished runs against the first: settings, losses in pairs, cost."""
    from tritter.cli.report_file import FORMATS, ReportFile, mark
    from tritter.report.compared import Compared, Comparison

    file = None
    if output is not None:
        format = FORMATS.get(output.suffix)
        if format is None:
            reason = f"the ending selects the format; allowed is one of {', '.join(FORMATS)}"
            raise RequestError(Problem("--output", str(output), reason=reason))
        file = ReportFile(path=output, kind="compare", format=format, overwrite=overwrite)
        file.check()
    found = find_runs([_run_of(folder) for folder in folders])
    if len(found.finished) < 2:
        reason = "one finished run is in it; a comparison needs two or more"
        raise RequestError(Problem("RUN", ", ".join(map(str, folders)), reason=reason))
    compared = []
    for place_of_run, run in zip(found.finished, read_runs(found.finished), strict=True):
        scores, why_not = None, ""
        try:
            scores = _scores(place_of_run, run)
        except TritterError as error:
            why_not = str(error).removesuffix(".")
        compared.append(Compared(run, scores, why_not, _peak_memory(place_of_run)))
    comparison = Comparison(tuple(compared))
    notes = [f"Not finished, and left out: {path}" for path in found.unfinished]
    numbers = {
        **mark("compare"),
        **comparison.to_dict(),
        "left_out": [str(path) for path in found.unfinished],
    }
    if file is not None:
        file.write(_content(comparison, file.format, notes, numbers))
    if as_json:
        print_json(numbers)
    else:
        _print(comparison, notes, output)
    return 0


def _run_of(folder: Path) -> Path:
    """Return the run that left a checkpoint, and any other folder as it is."""
    if not (folder / LINEAGE_NAME).is_file() or (folder / SUMMARY_FILE).exists():
        return folder
    above = list(folder.resolve().parents)[:_DEEPEST]
    return next((each for each in above if (each / SUMMARY_FILE).is_file()), folder)


def _scores(place: Path, run: Run) -> Scores:
    """Return what the last model of a run scored, item by item.

    Raises:
        TritterError: it is not there, damaged, or not what its summary says.
    """
    from tritter.evaluation.statistics import MAX_SCORE_BYTES, PairedScores, score_file
    from tritter.report.rows import score_of

    summary = run.summary
    rounds, attempts = summary.rounds, summary.attempts
    name = f"round_{len(rounds)}" if rounds else f"attempt_{max(1, len(attempts))}"
    tasks = len(summary.last_attempt.tasks)
    task = f"_task_{tasks}" if tasks > 1 else ""
    path = place / score_file(f"{name}{task}-trained")
    if not os.path.lexists(path):
        raise TritterError(f"no {path.relative_to(place)}")
    plain = read_object(path, limit_bytes=MAX_SCORE_BYTES)
    scores = {subject: PairedScores.from_dict(held) for subject, held in plain.items()}
    for row in run.rows:
        told = scores.get(row.domain)
        stated = score_of((rounds or [summary.last_attempt])[-1].final, row.domain).value
        if told is None or stated is None:
            continue
        if not math.isclose(told.mean(), stated, rel_tol=1e-6, abs_tol=1e-9):
            raise TritterError(f"{path.relative_to(place)} is not what its summary tells")
    return scores


def _peak_memory(place: Path) -> float | None:
    """Return the most memory that a run wrote down; None where it did not."""
    from tritter.report.summary import LARGEST

    try:
        cells = [row.get(_PEAK) for row in metric_rows(place / "metrics.csv")]
        values = [float(cell) for cell in cells if cell]
    except (TritterError, ValueError, TypeError):
        return None
    known = [value for value in values if 0 < value < LARGEST]
    return max(known, default=None)


def _content(
    comparison: Comparison, kind: str, notes: Sequence[str], numbers: Mapping[str, Any]
) -> str:
    from tritter.report.page import page

    if kind == "json":
        return json.dumps(numbers, indent=2, allow_nan=False) + "\n"
    if kind == "csv":
        stream = io.StringIO()
        csv.writer(stream, lineterminator="\n").writerows(comparison.rows())
        # The name of a folder may be no text
        return stream.getvalue().encode(errors="backslashreplace").decode()
    runs = [each.run for each in comparison.runs]
    tables = comparison.tables()
    text, _ = page(runs, title="Runs compared", notes=notes, beside=tables)
    return text


def _print(comparison: Comparison, notes: Sequence[str], output: Path | None) -> None:
    from tritter.report.compared import letter
    from tritter.report.table import label

    console = new_console()
    signs = signs_of(console)
    for number, each in enumerate(comparison.runs):
        console.print(Text(f"{letter(number)}  {signs.printable(each.name)}"), soft_wrap=True)
    console.print()
    for title, table in comparison.lettered().tables().items():
        # What a row has in common with the one before is left out of it
        rows, before, is_grouped = [], "", table.header[0] in ("domain", "setting")
        for first, *others in table.rows:
            rows.append(("" if is_grouped and first == before else label(first), *others))
            before = first
        whole = [n for n, name in enumerate(table.header) if n in table.numbers or name in _WHOLE]
        console.print(Text(signs.printable(title), style="bold"))
        shown = replace(table, rows=tuple(rows), caption="")
        console.print(shown.to_rich(signs, whole=whole))
        if table.caption:
            console.print(Text(signs.printable(table.caption), style="dim"))
        console.print()
    for note in notes:
        console.print(note, soft_wrap=True)
    if output is not None:
        console.print(Text(f"written  {signs_of(console).printable(shown_path(output))}"))
