"""The options of `tritter export`: spelling, line of help."""

from pathlib import Path
from typing import Annotated

from tritter.cli.option import flag, option
from tritter.cli.values import place

_CKPT = "Of a .ckpt"

ExportSource = Annotated[
    str, option("--checkpoint", "SRC", "Folder or hub id of the model, or a .ckpt of Lightning.")
]
ExportOutput = Annotated[Path, option("--output", "DST", "New folder.", parser=place)]
Format = Annotated[
    str,
    option(
        "--format",
        "hf|peft",
        "hf: a plain folder of Hugging Face transformers; peft: each LoRA expert as a stock "
        "adapter.",
    ),
]
ExportDType = Annotated[
    str | None,
    option(
        "--dtype",
        "float32|bfloat16|float16|float64",
        "Of all tensors. Default: that of the checkpoint.",
    ),
]
ExpertLayout = Annotated[
    str | None,
    option(
        "--expert-layout",
        "hub|fused",
        "Each matrix of an expert on its own, or the experts of a layer in one tensor. "
        "Default: hub.",
    ),
]
ConfigOf = Annotated[
    str | None,
    option(
        "--config",
        "PATH",
        "What a .ckpt holds: a config.json, or a folder (or hub id) with one and a tokenizer.",
        panel=_CKPT,
    ),
]
Prefix = Annotated[
    str | None,
    option(
        "--prefix",
        "PREFIX",
        "What stands before the model's names, such as student.; the rest is left out. "
        "Default: found, and nothing is left out.",
        panel=_CKPT,
    ),
]
DropNewExperts = Annotated[
    bool,
    flag(
        "--drop-new-experts",
        "Of a folder: leave out appended experts that are not wholly open yet.",
    ),
]
Merge = Annotated[
    bool,
    flag(
        "--merge",
        "Of a folder with LoRA experts: put them into the base (hf), or make one adapter of them "
        "(peft), by mean gates. Lossy; it says how much.",
    ),
]
MergedRank = Annotated[
    int | None,
    option(
        "--rank",
        "R",
        "With --format peft --merge: of the one adapter. Default: as much as loses nothing.",
        least=1,
        most=1024,
    ),
]
NoState = Annotated[bool, flag("--no-state", "Leave the optimizer's moments out.", panel=_CKPT)]
