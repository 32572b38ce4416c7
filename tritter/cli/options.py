"""Every option once: its spelling, its limits, its line of help."""

from pathlib import Path
from typing import Annotated

import typer

from tritter.cli.option import flag, option
from tritter.cli.values import byte_count, parameter_count, place, spelled
from tritter.limits import MAX_NEW_TOKENS, MAX_SEED

_WRITING = "Writing"

AsJson = Annotated[bool, flag("--json", "Print one JSON object and nothing else.")]
Checkpoint = Annotated[str, option("--checkpoint", "SRC", "Folder or hub id of the model.")]
Folder = Annotated[str, typer.Argument(help="Folder or hub id of the checkpoint.", metavar="DIR")]
Seed = Annotated[
    int, option("--seed", "N", "What random choices are drawn from.", least=0, most=MAX_SEED)
]

# expand


def _methods(incomplete: str) -> list[str]:
    """Return what the last method of a list may become, for a shell."""
    from tritter.cli.method_options import method_bodies

    done = incomplete[: incomplete.rfind(",") + 1]
    return [
        found for name in method_bodies() if (found := done + spelled(name)).startswith(incomplete)
    ]


Method = Annotated[
    list[str] | None,
    option(
        "--method",
        "METHOD,..",
        "dus, stack, interpolate, llama-pro, width, moe or moe-add; several, joined by "
        "commas, in their order.",
        completes=_methods,
    ),
]
Recipe = Annotated[
    Path | None,
    option(
        "--recipe",
        "FILE",
        "In place of --method: YAML with a list of steps and their options.",
        parser=place,
    ),
]
Output = Annotated[
    Path | None, option("--output", "DST", "New folder. Default: SRC-METHOD.", parser=place)
]
ConfigDir = Annotated[
    list[str] | None,
    option("--config-dir -cd", "DIR", "Folder of option files of yours; see docs/extending.md."),
]
TargetParams = Annotated[
    int | None,
    option(
        "--target-params",
        "COUNT",
        "Nearest real shape to so many parameters, such as 7B or 350M.",
        parser=parameter_count,
    ),
]
Moments = Annotated[
    str,
    option(
        "--moments",
        "carry|zero|reset-new",
        "What becomes of optimizer state beside the model.",
        panel=_WRITING,
    ),
]
DType = Annotated[
    str | None,
    option(
        "--dtype",
        "float32|bfloat16|float16|float64",
        "Of the result. Default: the source's.",
        panel=_WRITING,
    ),
]
MaxShardSize = Annotated[
    int,
    option(
        "--max-shard-size",
        "SIZE",
        "Largest file, such as 500MB or 4GiB. Default: 5GB.",
        parser=byte_count,
        shows_default=False,
        panel=_WRITING,
    ),
]
Measure = Annotated[
    bool | None,
    flag(
        "--measure/--no-measure",
        "Compare source and result in stock models, layer by layer, and record the step-0 error.  "
        "Default: measured.",
        panel=_WRITING,
    ),
]
DryRun = Annotated[bool, flag("--dry-run", "Show the result, write nothing.", panel=_WRITING)]
Overwrite = Annotated[bool, flag("--overwrite", "Replace what is at DST.", panel=_WRITING)]

# report

Runs = Annotated[
    list[Path],
    typer.Argument(
        help="Folders of runs, or folders that hold them.", metavar="RUN_OR_SWEEP...", parser=place
    ),
]
ReportOutput = Annotated[
    Path | None,
    typer.Option(
        "--output",
        help="The page. Default: report.html in the folder, or here if there are several.",
        metavar="FILE.html",
        parser=place,
    ),
]
Figures = Annotated[
    Path | None,
    typer.Option(
        "--figures", help="New folder for the figures as PNG files.", metavar="DIR", parser=place
    ),
]

ReportOverwrite = Annotated[
    bool, flag("--overwrite", "Replace an earlier report of the same kind at --output.")
]

CompareOutput = Annotated[
    Path | None,
    option(
        "--output", "FILE", "Also write a page (.html), or the numbers (.csv, .json).", parser=place
    ),
]

# history

Verify = Annotated[
    bool, flag("--verify", "Hash all that can be reached again; 3 if something changed.")
]
AsRecipe = Annotated[
    bool,
    flag("--recipe", "Print the recipe of `expand` that makes it of its parent, and nothing else."),
]

# generate

Prompt = Annotated[str, option("--prompt", "TEXT", "What is to be continued.")]
MaxNewTokens = Annotated[
    int,
    option("--max-new-tokens", "N", "At most so many tokens more.", least=1, most=MAX_NEW_TOKENS),
]
Temperature = Annotated[
    float, option("--temperature", "X", "0 takes the likeliest token each time.", least=0)
]
