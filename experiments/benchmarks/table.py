"""The rows of a benchmark: told as they come, and written as a table once all are there."""

import csv
import json
from collections.abc import Iterable, Mapping
from pathlib import Path


def tell(rows: Iterable[Mapping[str, object]], output: Path | None) -> None:
    """Print each row as JSON as soon as it is there; write them all to a CSV file, if one is named.

    A benchmark that is stopped has told what it had measured, and has replaced no table.
    """
    told = []
    for row in rows:
        told.append(row)
        print(json.dumps(row), flush=True)
    if output is not None:
        with output.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, told[0].keys(), lineterminator="\n")
            writer.writeheader()
            writer.writerows(told)
