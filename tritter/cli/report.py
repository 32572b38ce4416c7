"""`tritter report`: write finished runs and sweeps as one self-contained HTML page.

Run folders are found in the requested folders and their subfolders. Their content is untrusted.
"""

from __future__ import annotations

import csv
import io
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

from tritter.cli.options import RUNS_ARGUMENT, AsJson, ReportOverwrite, Runs, option, parse_path
from tritter.cli.output import CommandConsole, print_json, short
from tritter.errors import Problem, RequestError, TritterError, raise_problems
from tritter.storage.reading import RUN_FILE, SUMMARY_FILE, read_object, read_text
from tritter.terminal import status

if TYPE_CHECKING:
    from tritter.report.runs import Curve, EndedRun

_MAX_RUNS = 1000
_DEPTH = 3  # levels below a requested folder: a sweep of sweeps
_MAX_METRICS_BYTES = 2**26
_NO_RUN = f"it contains no finished run (no {SUMMARY_FILE})"


def report(
    folders: Runs,
    output: Annotated[
        Path | None,
        option(
            "--output",
            "FILE.html",
            "Output page. Default: report.html in the folder; in the current folder for several.",
            parser=parse_path,
        ),
    ] = None,
    figures: Annotated[
        Path | None,
        option("--figures", "DIR", "New folder for the figures as PNG files.", parser=parse_path),
    ] = None,
    overwrite: ReportOverwrite = False,
    as_json: AsJson = False,
) -> int:
    """Write one HTML page that compares finished runs and sweeps."""
    from tritter.cli.report_file import ReportFile
    from tritter.report.page import page

    found = FoundRuns.below(folders)
    file = ReportFile.page(output, folders, overwrite=overwrite, figures=figures)
    runs = found.read()
    name = folders[0].resolve().name
    title = f"Runs in {name}" if len(folders) == 1 else f"{len(runs)} runs"
    if len(runs) == 1:
        title = f"Run {name}"
    with status("drawing the figures"):
        text, pictures = page(runs, title=title, notes=found.notes)
    file.write(text, pictures)
    if as_json:
        unfinished = [str(path) for path in found.unfinished]
        names = [run.name for run in runs]
        print_json({"output": str(file.path), "runs": names, "left_out": unfinished})
        return 0
    number = "one run" if len(runs) == 1 else f"{len(runs)} runs"
    console = CommandConsole()
    for line in (*found.notes, f"{number}: {file.path}"):
        console.print(line, soft_wrap=True)
    return 0


@dataclass(frozen=True, slots=True)
class FoundRuns:
    """The run folders found in the requested folders."""

    finished: tuple[Path, ...]
    unfinished: tuple[Path, ...]

    @property
    def notes(self) -> list[str]:
        """One note per unfinished run."""
        return [f"Skipped an unfinished run: {path}" for path in self.unfinished]

    @classmethod
    def below(cls, folders: Sequence[Path]) -> Self:
        """Return the runs in folders and their subfolders, each once. No link is followed."""
        finished: dict[Path, Path] = {}  # by resolved path
        unfinished: dict[Path, Path] = {}
        for folder in folders:
            try:
                if not folder.is_dir():
                    raise _refused([folder], "it is not a folder")
                found = list(_run_folders(folder, depth=_DEPTH))
            except OSError as error:  # a subfolder is not readable
                raise _refused([folder], f"{error.filename}: {error.strerror}") from error
            if not found:
                raise _refused([folder], _NO_RUN)
            for each in found:
                runs = finished if (each / SUMMARY_FILE).is_file() else unfinished
                runs.setdefault(each.resolve(), each)
        if not finished:
            from tritter.config.overrides import resume_command

            several = f"{len(unfinished)} are not finished, the first"
            states = "one is not finished" if len(unfinished) == 1 else several
            command = resume_command(next(iter(unfinished.values())))
            raise _refused(folders, f"{_NO_RUN}; {states}: {command} resumes it")
        if len(finished) > _MAX_RUNS:
            raise _refused(
                folders, f"it contains {len(finished)} runs; must be at most {_MAX_RUNS}"
            )
        return cls(tuple(finished.values()), tuple(unfinished.values()))

    def read(self, *, are_drawn: bool = True) -> list[EndedRun]:
        """Read the finished runs and give them distinct names.

        Args:
            are_drawn: also read the curves of the runs and the history of their checkpoints.
        """
        from tritter.options import leaves
        from tritter.report.runs import EndedRun
        from tritter.report.summary import Summary

        resolved = [folder.resolve() for folder in self.finished]
        above = Path(os.path.commonpath([folder.parent for folder in resolved]))
        runs: list[EndedRun] = []
        problems = []
        for folder in resolved:
            try:
                summary = Summary.read(folder / SUMMARY_FILE)
                record = read_object(folder / RUN_FILE) if (folder / RUN_FILE).exists() else {}
                settings: dict[str, Any] = {"seed": summary.seed}
                if isinstance(fingerprint := record.get("fingerprint"), dict):
                    settings = {key: _plain(value) for key, value in leaves(fingerprint).items()}
                run = EndedRun(str(folder.relative_to(above)), summary, settings)
                if are_drawn:
                    run = replace(
                        run,
                        curves=_curves(folder, "rounds") or _curves(folder),
                        control=_curves(folder, "control"),
                        pretraining=_curves(folder, "pretraining"),
                        history=_history(folder / "checkpoint"),
                    )
                runs.append(run)
            except TritterError as error:
                problems.append(
                    Problem(RUNS_ARGUMENT, str(folder), reason=str(error).removesuffix("."))
                )
        raise_problems(problems)
        return runs


def _refused(folders: Sequence[Path], reason: str) -> RequestError:
    return RequestError(Problem(RUNS_ARGUMENT, ", ".join(map(str, folders)), reason=reason))


def _run_folders(folder: Path, *, depth: int) -> Iterator[Path]:
    """Yield a run folder, or the run folders in its subfolders. Runs do not nest."""
    if any((folder / name).is_file() for name in (SUMMARY_FILE, RUN_FILE)):
        yield folder
        return
    inner = []
    if depth:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False) and not entry.name.startswith("."):
                    inner.append(Path(entry.path))
    # Jobs of a sweep are sorted by number, 2 before 10
    by_number = partial(re.sub, "[0-9]+", lambda digits: digits[0].zfill(20))
    for each in sorted(inner, key=lambda path: by_number(path.name)):
        yield from _run_folders(each, depth=depth - 1)


def _plain(value: Any) -> Any:
    """Return a setting as plain JSON; numbers that are not finite become strings."""
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _curves(folder: Path, of: str = "") -> tuple[Curve, ...]:
    """Return the loss curves of a run or of one of its parts; empty without a metrics file."""
    from tritter.report.runs import Curve

    path = folder / (f"metrics_{of}.csv" if of else "metrics.csv")
    try:
        return Curve.of_rows(metric_rows(path))
    except TritterError:
        raise
    except (ValueError, TypeError, OverflowError) as error:
        raise TritterError(f"{path.name} is damaged: {error}") from error


def metric_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a metrics file; empty if it does not exist."""
    if not os.path.lexists(path):
        return []
    text = read_text(path, limit_bytes=_MAX_METRICS_BYTES)
    try:
        return list(csv.DictReader(io.StringIO(text), strict=True))
    except csv.Error as error:
        raise TritterError(f"{path.name} is damaged: {error}") from error


def _history(checkpoint: Path) -> tuple[str, ...]:
    """Return the chain of a checkpoint, one line per link; empty if it was deleted."""
    from tritter.checkpoints.history import Link

    try:
        chain = Link.chain(checkpoint)
    except TritterError:
        return ()
    lines = []
    for link in chain:
        steps = link.steps_after(chain[-1])
        trained = "" if steps is None else f", then {steps} steps"
        lines.append(f"{short(link.model_hash)}: {link.origin()}{trained}")
    return tuple(lines)
