"""The options of `tritter plan`: spelling, limits, line of help."""

from typing import Annotated

from tritter.cli.option import flag, option
from tritter.cli.values import flops_rate
from tritter.limits import MAX_COUNT

_COST = "Cost"
_MEMORY = "Memory"

Source = Annotated[
    str | None,
    option(
        "--source",
        "3B|DIR",
        "A count such as 3B (the nearest preset), a preset, a folder or a hub id.",
    ),
]
Target = Annotated[str | None, option("--target", "10B", "A count such as 10B, or a preset.")]
GpuHours = Annotated[float | None, option("--gpu-hours", "H", "The budget.")]
Strategy = Annotated[
    str,
    option(
        "--strategy",
        "auto|depth_first|width_first|balanced",
        "What grows first; auto: the least predicted loss for the budget.",
    ),
]
DeviceFlops = Annotated[
    int,
    option(
        "--device-flops",
        "F",
        "Peak FLOPs per second of one GPU, such as 989T. Default: 312T (A100, bf16).",
        parser=flops_rate,
        shows_default=False,
        panel=_COST,
    ),
]
Mfu = Annotated[
    float, option("--mfu", "U", "Share of the peak that training reaches.", panel=_COST)
]
TokensPerParameter = Annotated[
    float,
    option(
        "--tokens-per-parameter",
        "X",
        "Tokens to train on for each parameter that a step adds.",
        panel=_COST,
    ),
]
Precision = Annotated[
    str, option("--precision", "32-true|bf16-mixed|bf16-true|..", "Of the training.", panel=_MEMORY)
]
Optimizer = Annotated[
    str, option("--optimizer", "adamw|adamw8bit", "Of the training.", panel=_MEMORY)
]
FreezeAttention = Annotated[
    bool, flag("--freeze-attention", "Attention is not trained.", panel=_MEMORY)
]
BatchSize = Annotated[
    int,
    option(
        "--batch-size", "N", "Sequences on the GPU at once.", least=1, most=MAX_COUNT, panel=_MEMORY
    ),
]
SequenceLength = Annotated[
    int | None,
    option(
        "--sequence-length",
        "N",
        "Tokens of a sequence. Default: 2048, or as many positions as the model has learned.",
        least=1,
        most=MAX_COUNT,
        panel=_MEMORY,
    ),
]
GradientCheckpointing = Annotated[
    bool,
    flag(
        "--gradient-checkpointing",
        "Activations are computed again in the backward pass.",
        panel=_MEMORY,
    ),
]
Guide = Annotated[bool, flag("--guide", "Print the size guide, counted from shapes, and no plan.")]
