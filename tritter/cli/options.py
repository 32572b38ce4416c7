"""Every option once: its spelling, its limits, its line of help."""

from pathlib import Path
from typing import Annotated

import typer

from tritter.cli.values import byte_count, parameter_count, place, spelled
from tritter.limits import MAX_NEW_TOKENS, MAX_SEED

_WRITING = "Writing"

AsJson = Annotated[
    bool, typer.Option("--json", metavar=" ", help="Print one JSON object and nothing else.")
]
Checkpoint = Annotated[
    str, typer.Option("--checkpoint", help="Folder or hub id of the model.", metavar="SRC")
]
Folder = Annotated[Path, typer.Argument(help="A checkpoint folder.", metavar="DIR", parser=place)]
Seed = Annotated[
    int,
    typer.Option(
        "--seed", min=0, max=MAX_SEED, metavar="N", help="What random choices are drawn from."
    ),
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
    list[str],
    typer.Option(
        "--method",
        help="dus, stack, interpolate, llama-pro, width, moe or moe-add; several, joined by "
        "commas, in their order.",
        metavar="METHOD,..",
        autocompletion=_methods,
    ),
]
Output = Annotated[
    Path | None,
    typer.Option("--output", help="New folder. Default: SRC-METHOD.", metavar="DST", parser=place),
]
ConfigDir = Annotated[
    list[str] | None,
    typer.Option(
        "--config-dir",
        "-cd",
        help="Folder of option files of yours; see docs/extending.md.",
        metavar="DIR",
    ),
]
TargetParams = Annotated[
    int | None,
    typer.Option(
        "--target-params",
        parser=parameter_count,
        help="Nearest real shape to so many parameters, such as 7B or 350M.",
        metavar="COUNT",
    ),
]
Moments = Annotated[
    str,
    typer.Option(
        "--moments",
        help="What becomes of optimizer state beside the model.",
        metavar="carry|zero|reset-new",
        rich_help_panel=_WRITING,
    ),
]
DType = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        help="Of the result. Default: the source's.",
        metavar="float32|bfloat16|float16|float64",
        rich_help_panel=_WRITING,
    ),
]
MaxShardSize = Annotated[
    int,
    typer.Option(
        "--max-shard-size",
        parser=byte_count,
        show_default=False,
        help="Largest file, such as 500MB or 4GiB. Default: 5GB.",
        metavar="SIZE",
        rich_help_panel=_WRITING,
    ),
]
Measure = Annotated[
    bool | None,
    typer.Option(
        "--measure/--no-measure",
        metavar=" ",
        help="Compare source and result in stock models and record the step-0 error.  "
        "Default: where both fit into 8 GB.",
        rich_help_panel=_WRITING,
    ),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run", metavar=" ", help="Show the result, write nothing.", rich_help_panel=_WRITING
    ),
]
Overwrite = Annotated[
    bool,
    typer.Option(
        "--overwrite", metavar=" ", help="Replace what is at DST.", rich_help_panel=_WRITING
    ),
]

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

# history

Verify = Annotated[
    bool,
    typer.Option(
        "--verify", metavar=" ", help="Hash all that can be reached again; 3 if something changed."
    ),
]

# generate

Prompt = Annotated[str, typer.Option("--prompt", help="What is to be continued.", metavar="TEXT")]
MaxNewTokens = Annotated[
    int,
    typer.Option(
        "--max-new-tokens",
        min=1,
        max=MAX_NEW_TOKENS,
        metavar="N",
        help="At most so many tokens more.",
    ),
]
Temperature = Annotated[
    float,
    typer.Option(
        "--temperature", min=0, metavar="X", help="0 takes the likeliest token each time."
    ),
]
