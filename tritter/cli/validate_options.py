"""The options of `tritter validate`."""

from typing import Annotated

from tritter.cli.option import option

Source = Annotated[str, option("--source", "A", "Folder or hub id of the model before.")]
Result = Annotated[str, option("--result", "B", "Folder or hub id of what was made of it.")]
Data = Annotated[
    list[str] | None,
    option(
        "--data",
        "[NAME=]PATH",
        "Text that is to be kept; may be given several times. Default: what B's lineage records.",
    ),
]
TargetData = Annotated[
    list[str] | None,
    option(
        "--target-data",
        "[NAME=]PATH",
        "Text that was to be learned; likewise.",
    ),
]
Limit = Annotated[
    int, option("--limit", "N", "Documents of each domain, at most.", least=30, most=10**6)
]
