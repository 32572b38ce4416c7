"""Options of `tritter expand` that train appended experts on a domain."""

from typing import Annotated

import typer

from tritter.limits import MAX_COUNT

_PANEL = "New experts on a domain (moe-add)"

Domain = Annotated[
    str | None,
    typer.Option(
        "--domain",
        metavar="NAME",
        help="moe-add: what the text at --domain-data is called. Default: new.",
        rich_help_panel=_PANEL,
    ),
]
DomainData = Annotated[
    list[str] | None,
    typer.Option(
        "--domain-data",
        metavar="PATH",
        help="moe-add: text (file, folder, glob; again for more) that routers and new experts are "
        "trained on at once.",
        rich_help_panel=_PANEL,
    ),
]
OldData = Annotated[
    list[str] | None,
    typer.Option(
        "--old-data",
        metavar="PATH",
        help="With --domain-data: text of which a quarter is mixed in, so that it is kept.",
        rich_help_panel=_PANEL,
    ),
]
DomainSteps = Annotated[
    int | None,
    typer.Option(
        "--steps",
        min=1,
        max=MAX_COUNT,
        metavar="N",
        help="With --domain-data: steps of the new experts' training. Default: 200.",
        rich_help_panel=_PANEL,
    ),
]
LearningRate = Annotated[
    float | None,
    typer.Option(
        "--learning-rate",
        metavar="X",
        help="With --domain-data: of the new experts, at its peak. Default: 1e-4.",
        rich_help_panel=_PANEL,
    ),
]
