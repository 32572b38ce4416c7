"""Logged metrics of a training run, in one part per uninterrupted stretch."""

import csv
import io
from collections.abc import Mapping
from pathlib import Path

from tritter.errors import TritterError
from tritter.storage.reading import read_text

_METRICS_NAME = "metrics.csv"
MAX_METRICS_BYTES = 2**30


def rotate_metrics(folder: Path) -> None:
    """Rename the metrics of an interrupted part to `metrics.0.csv`, `metrics.1.csv`, …"""
    read_metrics(folder)  # raises now, rather than after the training, if a part is damaged
    current = folder / _METRICS_NAME
    if current.exists():
        numbers = [int(path.name.split(".")[1]) for path in metrics_files(folder)[:-1]]
        current.rename(folder / f"metrics.{max(numbers, default=-1) + 1}.csv")


def metrics_files(folder: Path) -> tuple[Path, ...]:
    """Return the metrics files of all parts of a training run, in order."""
    parts = {path.name.split(".")[1]: path for path in folder.glob("metrics.*.csv")}
    numbered = sorted((int(number), path) for number, path in parts.items() if number.isdecimal())
    last = folder / _METRICS_NAME
    return (*(path for _, path in numbered), *([last] if last.exists() else []))


def read_metrics(folder: Path) -> list[dict[str, str]]:
    """Return the rows of all parts by step; later parts override earlier ones.

    At the step from which a part resumes, metrics of the earlier part that the later one does not
    log again are kept, for example those of validation. A part can be empty or absent if it was
    killed before its first row or had no steps to train.
    """
    rows: list[dict[str, str]] = []
    for part in map(_metrics_part, metrics_files(folder)):
        # Drop rows that Lightning logged only because an earlier part stopped there: `FiniteGuard`
        # logs the learning rate of regularly logged steps only.
        rows = [row for row in rows if row.get("train/learning_rate") or not row.get("train/loss")]
        if part:
            first = min(int(row["step"]) for row in part)
            again = {name for row in part if int(row["step"]) == first for name in _logged(row)}
            rows = [
                row for row in rows if int(row["step"]) < first + again.isdisjoint(_logged(row))
            ] + part
    return sorted(rows, key=lambda row: int(row["step"]))


def _logged(row: Mapping[str, str]) -> set[str]:
    return {name for name, value in row.items() if value and name != "step"}


def _metrics_part(path: Path) -> list[dict[str, str]]:
    text = read_text(path, limit_bytes=MAX_METRICS_BYTES)
    whole = text[: text.rfind("\n") + 1]  # a kill may have cut the last line
    try:
        part = list(csv.DictReader(io.StringIO(whole), strict=True))
        for row in part:
            if None in row or None in row.values():
                raise ValueError("a row has the wrong number of columns")
            int(row["step"])
            for value in row.values():
                float(value or 0)
    except (ValueError, KeyError, csv.Error) as error:
        raise TritterError(
            f"{path} is damaged ({error}). It is only a log: delete it and rerun the command to "
            "resume."
        ) from error
    return part
