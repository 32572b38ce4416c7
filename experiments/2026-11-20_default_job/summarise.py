"""Turn sweep folders into results.csv and a table: `python summarise.py SWEEP…`."""

import csv
import json
import statistics
import sys
from pathlib import Path

FIELDS = ("expansion", "forgetting", "steps", "seed", "old_percent", "new_percent", "new_loss",
          "status", "fit_flops", "fit_seconds")  # fmt: skip


def row(path: Path) -> dict[str, object]:
    """Return one run's figures; changes are of the loss per byte, in per cent."""
    summary = json.loads(path.read_text())
    attempt = summary["attempts"][-1]
    checks = {check["check"]: check for check in attempt["gate"]}
    return {
        "expansion": "+".join(summary["expansion"]) or "none",
        "forgetting": "+".join(summary["forgetting"]) or "none",
        "steps": attempt["steps"],
        "seed": summary["seed"],
        "old_percent": round(100 * checks["retention"]["value"], 2),
        "new_percent": round(100 * checks["new_capability"]["value"], 2),
        "new_loss": round(attempt["final"]["code"]["loss"], 4),
        "status": attempt["status"],
        "fit_flops": f"{summary['flops']['fit']:.3e}",
        "fit_seconds": round(summary["seconds"]["fit"], 1),
    }


def spread(values: list[float]) -> str:
    return f"{statistics.mean(values):+.2f} ± {statistics.stdev(values):.2f}"


def main(sweeps: list[str]) -> None:
    rows = [row(path) for sweep in sweeps for path in Path(sweep).glob("*/summary.json")]
    rows.sort(key=lambda r: [str(r[field]) for field in FIELDS[:4]])
    with (Path(__file__).parent / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    groups: dict[tuple[object, ...], list[dict[str, object]]] = {}
    for entry in rows:
        groups.setdefault(tuple(entry[field] for field in FIELDS[:3]), []).append(entry)
    print("| expansion | forgetting | steps | old, % | new, % | fit FLOPs | kept |")
    print("|---|---|---|---|---|---|---|")
    for key, runs in groups.items():
        old, new = ([float(str(r[f])) for r in runs] for f in ("old_percent", "new_percent"))
        kept = sum(r["status"] == "kept" for r in runs)
        cells = (*key, spread(old), spread(new), runs[0]["fit_flops"], f"{kept}/{len(runs)}")
        print("| " + " | ".join(map(str, cells)) + " |")


if __name__ == "__main__":
    main(sys.argv[1:])
