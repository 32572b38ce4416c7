"""The options of `tritter export`: spelling, line of help."""

from pathlib import Path
from typing import Annotated

import typer

from tritter.cli.values import place

_CKPT = "Of a .ckpt"

ExportSource = Annotated[
    str,
    typer.Option(
        "--checkpoint",
        help="Folder or hub id of the model, or a .ckpt of Lightning.",
        metavar="SRC",
    ),
]
ExportOutput = Annotated[
    Path, typer.Option("--output", help="New folder.", metavar="DST", parser=place)
]
Format = Annotated[
    str,
    typer.Option("--format", help="hf: a plain folder of Hugging Face transformers.", metavar="hf"),
]
ExportDType = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        help="Of all tensors. Default: bfloat16; of a .ckpt, its own.",
        metavar="float32|bfloat16|float16|float64",
    ),
]
ExpertLayout = Annotated[
    str | None,
    typer.Option(
        "--expert-layout",
        help="Each matrix of an expert on its own, or the experts of a layer in one tensor. "
        "Default: hub.",
        metavar="hub|fused",
    ),
]
ConfigOf = Annotated[
    str | None,
    typer.Option(
        "--config",
        help="What a .ckpt holds: a config.json, or a folder (or hub id) with one and a tokenizer.",
        metavar="PATH",
        rich_help_panel=_CKPT,
    ),
]
Prefix = Annotated[
    str | None,
    typer.Option(
        "--prefix",
        help="What stands before the model's names, such as student.; the rest is left out. "
        "Default: found, and nothing is left out.",
        metavar="PREFIX",
        rich_help_panel=_CKPT,
    ),
]
DropNewExperts = Annotated[
    bool,
    typer.Option(
        "--drop-new-experts",
        metavar=" ",
        help="Of a folder: leave out appended experts that are not wholly open yet.",
    ),
]
NoState = Annotated[
    bool,
    typer.Option(
        "--no-state",
        metavar=" ",
        help="Leave the optimizer's moments out.",
        rich_help_panel=_CKPT,
    ),
]
