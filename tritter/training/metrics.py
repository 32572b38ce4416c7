"""What trainings log, part by part: a part ends where one was stopped or killed."""

import csv
import io
from collections.abc import Mapping
from pathlib import Path

from tritter.errors import TritterError
from tritter.storage.reading import read_text

METRICS_NAME = "metrics.csv"
MAX_METRICS_BYTES = 2**30


def set_metrics_aside(folder: Path) -> None:
    """Keep the metrics of the part that was killed, as `metrics.0.csv`, `metrics.1.csv`, …

    Raises:
        TritterError: a part is damaged; better told now than when the training has ended.
    """
    read_metrics(folder)
    current = folder / METRICS_NAME
    if current.exists():
        number = len(list(folder.glob("metrics.*.csv")))
        current.rename(folder / f"metrics.{number}.csv")


def metrics_files(folder: Path) -> tuple[Path, ...]:
    """Return the metrics of all parts of a training, in their order."""
    parts = {path.name.split(".")[1]: path for path in folder.glob("metrics.*.csv")}
    numbered = sorted((int(number), path) for number, path in parts.items() if number.isdecimal())
    last = folder / METRICS_NAME
    return (*(path for _, path in numbered), *([last] if last.exists() else []))


def read_metrics(folder: Path) -> list[dict[str, str]]:
    """Return the rows of all parts; where parts overlap, the later one counts.

    What was evaluated at the step that a part goes on from stands in the part before.

    A part may be empty or absent: one that was killed before it logged, or that had nothing left
    to train.

    Raises:
        TritterError: a part is damaged.
    """
    rows: list[dict[str, str]] = []
    for path in metrics_files(folder):
        part = _metrics_part(path)
        if part:
            first = min(int(row["step"]) for row in part)
            has_own = any(_is_evaluation(row, first) for row in part)
            rows = [
                row
                for row in rows
                if int(row["step"]) < first or (_is_evaluation(row, first) and not has_own)
            ] + part
    return rows


def _is_evaluation(row: Mapping[str, str], step: int) -> bool:
    is_evaluated = any(value for name, value in row.items() if name.startswith("eval/"))
    return is_evaluated and int(row["step"]) == step


def _metrics_part(path: Path) -> list[dict[str, str]]:
    text = read_text(path, limit_bytes=MAX_METRICS_BYTES)
    whole = text[: text.rfind("\n") + 1]  # a kill may have cut the last line
    try:
        part = list(csv.DictReader(io.StringIO(whole), strict=True))
        for row in part:
            if None in row or None in row.values():
                raise ValueError("a row of another length")
            int(row["step"])
            for value in row.values():
                float(value or 0)
    except (ValueError, KeyError, csv.Error) as error:
        raise TritterError(
            f"{path} is damaged ({error}). It is a log: delete it, and the same command goes on."
        ) from error
    return part
