"""The options of `tritter validate`."""

from typing import Annotated

from tritter.cli.option import option

Source = Annotated[str, option("--source", "SOURCE", "Folder or hub id of the model before.")]
Result = Annotated[str, option("--result", "RESULT", "Folder or hub id of what was made of it.")]
Data = Annotated[
    list[str] | None,
    option(
        "--data",
        "[NAME=]PATH",
        "Old text; may be repeated. Default: what RESULT's lineage records.",
    ),
]
TargetData = Annotated[
    list[str] | None,
    option(
        "--target-data",
        "[NAME=]PATH",
        "New text; may be repeated.",
    ),
]
Limit = Annotated[
    int, option("--limit", "N", "Documents of each domain, at most.", least=30, most=10**6)
]
