"""Options of `tritter expand` that train appended experts on a domain."""

from typing import Annotated

from tritter.cli.option import option
from tritter.limits import MAX_COUNT

_PANEL = "New experts on a domain (moe-add)"

Domain = Annotated[
    str | None,
    option(
        "--domain",
        "NAME",
        "moe-add: what the text at --domain-data is called. Default: new.",
        panel=_PANEL,
    ),
]
DomainData = Annotated[
    list[str] | None,
    option(
        "--domain-data",
        "PATH",
        "moe-add: text (file, folder, glob; again for more) that routers and new experts are "
        "trained on at once.",
        panel=_PANEL,
    ),
]
OldData = Annotated[
    list[str] | None,
    option(
        "--old-data",
        "PATH",
        "With --domain-data: text of which two fifths are mixed in, so that it is kept.",
        panel=_PANEL,
    ),
]
DomainSteps = Annotated[
    int | None,
    option(
        "--steps",
        "N",
        "With --domain-data: steps of the new experts' training. Default: 200.",
        least=1,
        most=MAX_COUNT,
        panel=_PANEL,
    ),
]
LearningRate = Annotated[
    float | None,
    option(
        "--learning-rate",
        "X",
        "With --domain-data: of the new experts, at its peak. Default: 1e-4.",
        panel=_PANEL,
    ),
]
