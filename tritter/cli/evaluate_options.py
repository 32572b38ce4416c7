"""Options of `tritter evaluate`."""

from pathlib import Path
from typing import Annotated

from tritter.cli.option import option
from tritter.cli.values import place
from tritter.limits import MAX_COUNT

_CODE = "Programs that the model writes (humaneval, mbpp)"


def _names(incomplete: str) -> list[str]:
    """Return what the last benchmark of a list may become, for a shell."""
    from tritter.data.benchmark_names import GROUPS, HUB_NAMES

    done = incomplete[: incomplete.rfind(",") + 1]
    names = dict.fromkeys([*GROUPS, *HUB_NAMES])
    return [found for name in names if (found := done + name).startswith(incomplete)]


Tasks = Annotated[
    list[str] | None,
    option(
        "--tasks",
        "NAME,..",
        "Benchmarks, or groups of them: base_capabilities, code, math, reasoning.",
        completes=_names,
    ),
]
TasksPath = Annotated[
    Path | None,
    option(
        "--tasks-path",
        "DIR",
        "Folder with the benchmarks' files, at any depth. Default: the hub.",
        parser=place,
    ),
]
Data = Annotated[
    list[str] | None,
    option(
        "--data",
        "NAME=PATH",
        "Text (file, folder, glob; again for more) whose loss is taken. Default, without "
        "--tasks: what was held out of the text that the checkpoint learned.",
    ),
]
Limit = Annotated[
    int | None,
    option("--limit", "N", "Ask N questions of each benchmark.", least=1, most=MAX_COUNT),
]
BatchSize = Annotated[
    int, option("--batch-size", "N", "Texts that are read at a time.", least=1, most=MAX_COUNT)
]
AllowCode = Annotated[
    list[str] | None,
    option("--allow-code", "NAME,..", "Run the programs of these benchmarks.", panel=_CODE),
]
CodeSandbox = Annotated[
    str | None,
    option(
        "--code-sandbox",
        "CMD",
        "A command that reads a program on its standard input and runs it, in place of "
        "Tritter's own sandbox.",
        panel=_CODE,
    ),
]
ResultFile = Annotated[
    Path | None,
    option("--output", "FILE.json", "Write the result to a file, too.", parser=place),
]
