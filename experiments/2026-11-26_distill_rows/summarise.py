"""Collect runs in `results.csv`, and print the table of the README.

python experiments/2026-11-26_distill_rows/summarise.py [RUN ...]
"""

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
sys.path.append(str(FOLDER.parents[1]))

from experiments.jobs import append, rows_of, with_interval  # noqa: E402

RESULTS = FOLDER / "results.csv"
_SCORES = ("prose", "code")


def main() -> None:
    """Append the named run folders, then print a row per method."""
    found = [row_of(Path(each)) for each in sys.argv[1:]]
    if found:
        append(RESULTS, found)
    arms: dict[tuple[str, str], list[dict[str, str]]] = defaultdict(list)
    for row in rows_of(RESULTS):
        arms[row["forgetting"], row["rows"]].append(row)
    gains = {row["seed"]: float(row["code"]) for row in arms["none", ""]}
    print("| `forgetting` | `rows` | prose | code | gain kept | gate kept | T FLOPs |")
    print("|---" * 7 + "|")
    for (methods, which), rows in arms.items():
        kept = [100 * float(row["code"]) / gains[row["seed"]] for row in rows]
        name, _, weight = methods.partition(", ")
        cells = [f"`[{name}]`" if "," in name else f"`{name}`", which]
        cells[0] += f", {weight}" if weight else ""
        cells += [with_interval([float(row[n]) for row in rows], ".2f", sign="+") for n in _SCORES]
        cells += [f"{with_interval(kept, '.0f')} %"]
        cells += [f"{sum(row['status'] == 'kept' for row in rows)} of {len(rows)}"]
        cells += [f"{float(rows[0]['flops']) / 1e12:.2f}"]
        print(f"| {' | '.join(cells)} |")


def row_of(folder: Path) -> dict[str, Any]:
    """Return the row of a finished run."""
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    words = json.loads((folder / "run.json").read_text(encoding="utf-8"))["overrides"]
    keys = dict(word.split("=", 1) for word in words)
    methods = summary["forgetting"] or ["none"]
    weight = keys.get("forgetting.distill.weight")
    rows = keys.get("forgetting.distill.rows", "old") if len(methods) > 1 else ""
    first, last = summary["baseline"], summary["attempts"][0]["final"]
    rise = {n: 100 * (last[n]["loss_per_byte"] / first[n]["loss_per_byte"] - 1) for n in _SCORES}
    return {
        "forgetting": ", weight ".join(filter(None, (",".join(methods), weight))),
        "rows": rows,
        "seed": summary["seed"],
        **{name: f"{value:.2f}" for name, value in rise.items()},
        "status": summary["status"],
        "flops": f"{summary['attempts'][0]['flops']:.4g}",
        "model_hash": summary["lineage"]["model_hash"],
    }


if __name__ == "__main__":
    main()
