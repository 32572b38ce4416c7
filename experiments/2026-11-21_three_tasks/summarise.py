"""Turn run folders called NAME-sSEED into results.csv and a table: `python summarise.py RUN…`."""

import csv
import json
import statistics
import sys
from pathlib import Path

FIELDS = ("run", "seed", "steps", "old_percent", "old_high", "code_learned_percent",
          "code_end_percent", "code_forgotten_percent", "arithmetic_percent", "arithmetic_right",
          "status", "parameters", "fit_flops", "other_flops")  # fmt: skip
SHOWN = FIELDS[3:4] + FIELDS[5:10]


def row(folder: Path) -> dict[str, object]:
    """Return one run's figures; changes are of the loss per byte since the base, in per cent.

    `code_forgotten_percent` is the change since code was learned.
    """
    summary = json.loads((folder / "summary.json").read_text())
    attempt = summary["attempts"][-1]
    first, last = (task["final"] for task in summary["tasks"])
    before = summary["baseline"]
    name, _, seed = folder.name.rpartition("-s")
    retention = {c["subject"]: c for c in attempt["gate"] if c["check"] == "retention"}

    def change(domain: str, after: dict, since: dict) -> float:
        values = (scores[domain]["loss_per_byte"] for scores in (after, since))
        return round(100 * (next(values) / next(values) - 1), 2)

    own = ("fit", "total", "pretraining", "baseline", "validation", "evaluate", "expand")
    other = sum(value for stage, value in summary["flops"].items() if stage not in own)
    return {
        "run": name,
        "seed": int(seed),
        "steps": summary["tasks"][0]["steps"],
        "old_percent": change("old", last, before),
        "old_high": round(100 * retention["old"]["interval"][1], 2),
        "code_learned_percent": change("code", first, before),
        "code_end_percent": change("code", last, before),
        "code_forgotten_percent": change("code", last, first),
        "arithmetic_percent": change("arithmetic", last, before),
        "arithmetic_right": round(100 * last["arithmetic"]["accuracy"], 1),
        "status": attempt["status"],
        "parameters": summary["parameters"]["final"],
        "fit_flops": f"{summary['flops']['fit']:.3e}",
        "other_flops": f"{other:.3e}",
    }


def spread(values: list[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:+.1f}"
    return f"{statistics.mean(values):+.1f} ± {statistics.stdev(values):.1f}"


def main(folders: list[str]) -> None:
    rows = [row(Path(folder)) for folder in folders]
    rows.sort(key=lambda each: (str(each["run"]), str(each["seed"])))
    with (Path(__file__).parent / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    groups: dict[str, list[dict[str, object]]] = {}
    for entry in rows:
        groups.setdefault(str(entry["run"]), []).append(entry)
    for name, runs in groups.items():
        cells = [spread([float(str(r[field])) for r in runs]) for field in SHOWN]
        bounds = ", ".join(str(r["old_high"]) for r in runs)
        kept = sum(r["status"] == "kept" for r in runs)
        flops = float(str(runs[0]["fit_flops"])) / 1e12
        extra = float(str(runs[0]["other_flops"])) / 1e12
        print(f"| {name} | " + " | ".join(cells) + f" | {bounds} | {kept}/{len(runs)} | "
              f"{flops:.2f} + {extra:.2f} |")  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1:])
