"""What experiments share: jobs of `train.py` that run once, rows of `results.csv`, intervals."""

import csv
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
Row = dict[str, str]


def train(folder: Path, words: Iterable[str], *, path: Path | None = None) -> dict[str, Any]:
    """Run `train.py` in a folder, unless it has finished there, and return its summary.

    Args:
        folder: the run folder; a run that was interrupted there is resumed.
        words: overrides.
        path: a folder with further modules.

    Raises:
        SystemExit: the run fails; its last output is the message.
    """
    summary = folder / "summary.json"
    if not summary.is_file():
        words = [f"hydra.run.dir={folder}", "logger=csv", "evaluation.sample_tokens=0", *words]
        if (folder / "run.json").is_file():
            words = [f"resume={folder}"]
        command = [sys.executable, str(ROOT / "train.py"), *words]
        paths = filter(None, (path and str(path), os.environ.get("PYTHONPATH")))
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        print(folder.name, flush=True)
    return dict(json.loads(summary.read_text(encoding="utf-8")))


def rows_of(path: Path) -> list[Row]:
    """Return the rows of a CSV file; none if there is no file."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def append(
    path: Path, rows: Sequence[Mapping[str, object]], *, columns: Sequence[str] | None = None
) -> None:
    """Append rows to a CSV file, which begins with its columns, by default those of a row."""
    is_new = not path.is_file()
    with path.open("a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns or list(rows[0]), lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerows(rows)


def done(path: Path) -> set[tuple[str, str]]:
    """Return the seed and arm of each row."""
    return {(row["seed"], row["arm"]) for row in rows_of(path)}


def loss_rows(summary: Mapping[str, Any]) -> Iterable[tuple[str, str, dict[str, Any]]]:
    """Yield domain, stage and score of a run: before, expanded (if it grew) and trained."""
    attempt = summary["attempts"][0]
    stages = {"before": summary["baseline"], "expanded": attempt["expanded"] or {}}
    for stage, scores in {**stages, "trained": attempt["final"]}.items():
        yield from ((domain, stage, score) for domain, score in scores.items())


def half_interval(values: Sequence[float]) -> float:
    """Return half the 95 % interval of a mean (Student's t); infinite for a single value."""
    from scipy.stats import t as student

    if len(values) < 2:
        return math.inf
    return float(student.ppf(0.975, len(values) - 1)) * stdev(values) / math.sqrt(len(values))


def with_interval(values: Iterable[float], form: str = ".3f", *, sign: str = "") -> str:
    """Return a mean with its 95 % interval, as in `-0.12 ± 0.03`, with a true minus sign."""
    values = list(values)
    text = f"{fmean(values):{sign}z{form}}"  # z: no negative zero
    if len(values) > 1:
        text += f" ± {half_interval(values):{form}}"
    return text.replace("-", "\N{MINUS SIGN}")
