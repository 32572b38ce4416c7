"""`tritter validate`: five checks of an expansion, each with a measured value and a bound."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tritter.cli.options import AsJson, named_paths, option
from tritter.cli.output import (
    EXIT_NO,
    CommandConsole,
    print_json,
    progress_bars,
    refuse_damage,
)
from tritter.errors import Problem, RequestError, raise_problems
from tritter.loading import loading
from tritter.report.table import MISSING, Table
from tritter.storage.hub import locate

if TYPE_CHECKING:
    from tritter.data.options import TextSources
    from tritter.evaluation.gate import Check

_Source = Annotated[
    str, option("--source", "SOURCE", "Folder or hub id of the model before its expansion.")
]
_Result = Annotated[str, option("--result", "RESULT", "Folder or hub id of the expanded model.")]
_OldData = Annotated[
    list[str] | None,
    option(
        "--data",
        "[NAME=]PATH",
        "Old data. Repeatable. Default: the data that the lineage of RESULT records.",
    ),
]
_TargetData = Annotated[
    list[str] | None, option("--target-data", "[NAME=]PATH", "New data. Repeatable.")
]
_Limit = Annotated[
    int, option("--limit", "N", "Maximum number of documents per domain.", least=30, most=10**6)
]


def validate(
    source: _Source,
    result: _Result,
    data: _OldData = None,
    target_data: _TargetData = None,
    limit: _Limit = 200,
    as_json: AsJson = False,
) -> int:
    """Compare an expanded checkpoint with its source in five tests; exit code 3 if one fails.

    tritter validate base grown
    """
    with loading("transformers"):
        from tritter.pipeline.validate import Side, validate

    problems: list[Problem] = []
    kept = _sources("--data", data, problems)
    target = _sources("--target-data", target_data, problems)
    raise_problems(problems)
    folders = [_folder(source, "--source"), _folder(result, "--result")]
    with refuse_damage():
        before, after = map(Side.of, folders)
        with progress_bars(is_shown=not as_json) as new_bar:
            checks = validate(before, after, kept=kept, target=target, limit=limit, new_bar=new_bar)
    is_failed = any(check.verdict == "failed" for check in checks)
    if as_json:
        records = [check.to_dict() for check in checks]
        content = {"source": str(folders[0]), "result": str(folders[1]), "passed": not is_failed}
        print_json({**content, "checks": records})
    else:
        rows = [
            (
                check.name.replace("_", " "),
                check.subject,
                _number(check, check.value),
                _number(check, check.bound),
                check.verdict.replace("_", " "),
            )
            for check in checks
        ]
        console, header = CommandConsole(), ("test", "of", "number", "bound", "verdict")
        console.print_table(Table(header, tuple(rows), numbers=(2, 3)))
        console.print()
        lines = [(f"{row[0]}, {row[1]}", c.detail) for row, c in zip(rows, checks, strict=True)]
        console.print_lines(lines)
    return EXIT_NO if is_failed else 0


def _folder(name: str, option: str) -> Path:
    """Return the folder of a checkpoint."""
    from tritter.checkpoints.location import require_plain
    from tritter.core.families.config_file import missing_config

    with refuse_damage():
        folder = locate(name, key=option)
    if not (folder / "config.json").is_file():
        content = f"the folder has {missing_config(folder)}"
        reason = content if folder.is_dir() else "there is no such folder"
        raise RequestError(Problem(option, name, reason=reason))
    require_plain(folder, doing="validation", key=option)
    return folder


def _sources(
    option: str, values: Sequence[str] | None, problems: list[Problem]
) -> TextSources | None:
    """Parse [NAME=]PATH values into domain → paths; None without any value."""
    from tritter.data.options import read_sources

    if not values:
        return None
    return read_sources(option, named_paths(option, values), default_name="text", problems=problems)


def _number(check: Check, value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return MISSING
    if check.name == "forward_equivalence":
        return f"{value:.1e}"
    return f"{value:.0f}" if check.name == "gradient_flow" else f"{value:+.2%}"
