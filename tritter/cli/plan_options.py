"""The options of `tritter plan`: spelling, limits, line of help."""

from typing import Annotated

import typer

from tritter.cli.values import flops_rate
from tritter.limits import MAX_COUNT

_COST = "Cost"
_MEMORY = "Memory"

Source = Annotated[
    str | None,
    typer.Option(
        "--source",
        help="A count such as 3B (the nearest preset), a preset, a folder or a hub id.",
        metavar="3B|DIR",
    ),
]
Target = Annotated[
    str | None,
    typer.Option("--target", help="A count such as 10B, or a preset.", metavar="10B"),
]
GpuHours = Annotated[float | None, typer.Option("--gpu-hours", help="The budget.", metavar="H")]
Strategy = Annotated[
    str,
    typer.Option(
        "--strategy",
        help="What grows first; auto: the least predicted loss for the budget.",
        metavar="auto|depth_first|width_first|balanced",
    ),
]
DeviceFlops = Annotated[
    int,
    typer.Option(
        "--device-flops",
        parser=flops_rate,
        show_default=False,
        help="Peak FLOPs per second of one GPU, such as 989T. Default: 312T (A100, bf16).",
        metavar="F",
        rich_help_panel=_COST,
    ),
]
Mfu = Annotated[
    float,
    typer.Option(
        "--mfu",
        help="Share of the peak that training reaches.",
        metavar="U",
        rich_help_panel=_COST,
    ),
]
TokensPerParameter = Annotated[
    float,
    typer.Option(
        "--tokens-per-parameter",
        help="Tokens to train on for each parameter that a step adds.",
        metavar="X",
        rich_help_panel=_COST,
    ),
]
Precision = Annotated[
    str,
    typer.Option(
        "--precision",
        help="Of the training.",
        metavar="32-true|bf16-mixed|bf16-true|..",
        rich_help_panel=_MEMORY,
    ),
]
Optimizer = Annotated[
    str,
    typer.Option(
        "--optimizer",
        help="Of the training.",
        metavar="adamw|adamw8bit",
        rich_help_panel=_MEMORY,
    ),
]
FreezeAttention = Annotated[
    bool,
    typer.Option(
        "--freeze-attention",
        metavar=" ",
        help="Attention is not trained.",
        rich_help_panel=_MEMORY,
    ),
]
BatchSize = Annotated[
    int,
    typer.Option(
        "--batch-size",
        metavar="N",
        min=1,
        max=MAX_COUNT,
        help="Sequences on the GPU at once.",
        rich_help_panel=_MEMORY,
    ),
]
SequenceLength = Annotated[
    int,
    typer.Option(
        "--sequence-length",
        min=1,
        max=MAX_COUNT,
        metavar="N",
        help="Tokens of a sequence.",
        rich_help_panel=_MEMORY,
    ),
]
GradientCheckpointing = Annotated[
    bool,
    typer.Option(
        "--gradient-checkpointing",
        metavar=" ",
        help="Activations are computed again in the backward pass.",
        rich_help_panel=_MEMORY,
    ),
]
Guide = Annotated[
    bool,
    typer.Option(
        "--guide", metavar=" ", help="Print the size guide, counted from shapes, and no plan."
    ),
]
