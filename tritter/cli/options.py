"""Every option once: its spelling, its limits, its line of help."""

from pathlib import Path
from typing import Annotated

import typer

from tritter.cli.values import byte_count, expert_list, layer_list, parameter_count, place
from tritter.limits import MAX_EXPERTS, MAX_LAYERS, MAX_NEW_TOKENS, MAX_SEED, MAX_WIDTH

_DEPTH = "Depth (dus, stack, interpolate, llama-pro)"
_WIDTH = "Width (width)"
_EXPERTS = "Experts (moe)"
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

Method = Annotated[
    list[str],
    typer.Option(
        "--method",
        help="dus, stack, interpolate, llama-pro, width, moe or moe-add; several, joined by "
        "commas, in their order.",
        metavar="METHOD,..",
    ),
]
Output = Annotated[
    Path | None,
    typer.Option("--output", help="New folder. Default: SRC-METHOD.", metavar="DST", parser=place),
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
TargetLayers = Annotated[
    int | None,
    typer.Option(
        "--target-layers",
        min=1,
        max=MAX_LAYERS,
        metavar="N",
        help="Layers afterwards.",
        rich_help_panel=_DEPTH,
    ),
]
DropLayers = Annotated[
    int | None,
    typer.Option(
        "--drop-layers",
        min=0,
        max=MAX_LAYERS,
        metavar="N",
        help="dus: layers that each of its two copies of the stack loses.",
        rich_help_panel=_DEPTH,
    ),
]
IdentityInit = Annotated[
    bool | None,
    typer.Option(
        "--identity-init",
        metavar=" ",
        help="dus, stack, interpolate: copies start as identities, which makes them exact.",
        rich_help_panel=_DEPTH,
    ),
]
Partial = Annotated[
    bool | None,
    typer.Option(
        "--partial",
        metavar=" ",
        help="stack: the last copy may hold its first layers only.",
        rich_help_panel=_DEPTH,
    ),
]
Positions = Annotated[
    str | None,
    typer.Option(
        "--positions",
        callback=layer_list,
        help="llama-pro: source layers that a new block follows, such as 3,7,11.",
        metavar="LAYER,..",
        rich_help_panel=_DEPTH,
    ),
]
HiddenSize = Annotated[
    int | None,
    typer.Option(
        "--hidden-size",
        min=1,
        max=MAX_WIDTH,
        metavar="N",
        help="Default: doubled, when no other target is given.",
        rich_help_panel=_WIDTH,
    ),
]
IntermediateSize = Annotated[
    int | None,
    typer.Option(
        "--intermediate-size",
        min=1,
        max=MAX_WIDTH,
        metavar="N",
        help="Of the FFN, or of each expert. Default: follows the hidden size by ratio.",
        rich_help_panel=_WIDTH,
    ),
]
NumHeads = Annotated[
    int | None,
    typer.Option(
        "--num-heads",
        min=1,
        max=MAX_WIDTH,
        metavar="N",
        help="Default: follows the hidden size where that gives whole numbers.",
        rich_help_panel=_WIDTH,
    ),
]
NumKvHeads = Annotated[
    int | None,
    typer.Option(
        "--num-kv-heads",
        min=1,
        max=MAX_WIDTH,
        metavar="N",
        help="As --num-heads.",
        rich_help_panel=_WIDTH,
    ),
]
HeadStrategy = Annotated[
    str | None,
    typer.Option(
        "--head-strategy",
        help="How heads are added; split is not exact. Default: what --width-init implies.",
        metavar="fresh|copy|gqa|split",
        rich_help_panel=_WIDTH,
    ),
]
WidthInit = Annotated[
    str | None,
    typer.Option(
        "--width-init",
        help="What new units hold: random directions, copies, or (aki, not exact) those of the "
        "layer above. Default: fresh.",
        metavar="fresh|net2net|zero-pad|aki",
        rich_help_panel=_WIDTH,
    ),
]
Shares = Annotated[
    str | None,
    typer.Option(
        "--shares",
        help="How copies divide what they stand for. Default: unequal.",
        metavar="unequal|equal",
        rich_help_panel=_WIDTH,
    ),
]
Noise = Annotated[
    float | None,
    typer.Option(
        "--noise",
        min=0,
        metavar="X",
        help="Relative noise on copies; above 0 the result is not exact. Default: 0 of width, "
        "0.01 of experts.",
        rich_help_panel=_WRITING,
    ),
]
NumExperts = Annotated[
    int | None,
    typer.Option(
        "--num-experts",
        min=1,
        max=MAX_EXPERTS,
        metavar="N",
        help="moe: experts of a layer, in all. Default: 8 copies of the FFN. moe-add: how many "
        "are added. Default: 4.",
        rich_help_panel=_EXPERTS,
    ),
]
ExpertsPerToken = Annotated[
    int | None,
    typer.Option(
        "--experts-per-token",
        min=1,
        max=MAX_EXPERTS,
        metavar="K",
        help="Experts that a token is routed to. Default: 2 copies' worth.",
        rich_help_panel=_EXPERTS,
    ),
]
ReinitFraction = Annotated[
    float | None,
    typer.Option(
        "--reinit-fraction",
        min=0,
        metavar="R",
        help="Share of each expert's neurons drawn anew; above 0 the result is not exact. "
        "Default: 0.",
        rich_help_panel=_EXPERTS,
    ),
]
Granularity = Annotated[
    int | None,
    typer.Option(
        "--granularity",
        min=1,
        max=MAX_EXPERTS,
        metavar="G",
        help="Pieces that each copy of the FFN is cut into. Default: 1.",
        rich_help_panel=_EXPERTS,
    ),
]
SparseLayers = Annotated[
    str | None,
    typer.Option(
        "--sparse-layers",
        callback=layer_list,
        help="Layers that get experts, such as 1,3. Default: all.",
        metavar="LAYER,..",
        rich_help_panel=_EXPERTS,
    ),
]
Addition = Annotated[
    str | None,
    typer.Option(
        "--addition",
        help="moe-add: append any number, closed at first; or replicate all, exact in stock "
        "transformers. Default: append.",
        metavar="append|replicate",
        rich_help_panel=_EXPERTS,
    ),
]
ExpertInit = Annotated[
    str | None,
    typer.Option(
        "--expert-init",
        help="What appended experts hold. Default: clone.",
        metavar="clone|mean|random|best|distill",
        rich_help_panel=_EXPERTS,
    ),
]
CloneFrom = Annotated[
    str | None,
    typer.Option(
        "--clone-from",
        callback=expert_list,
        help="The expert that is cloned, or one per layer with experts. Default: 0.",
        metavar="EXPERT,..",
        rich_help_panel=_EXPERTS,
    ),
]
Moments = Annotated[
    str,
    typer.Option(
        "--moments",
        help="What becomes of optimiser state beside the model.",
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
