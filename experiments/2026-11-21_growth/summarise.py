"""Turn run folders called BASE-ARM-METHOD-SEED into results.csv, ablation_comparison.json, a table.

python summarise.py RUN…
"""

import csv
import json
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

T_975 = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78}  # Student's, by degrees of freedom
SKILLS = ("tool_call", "identity", "reasoning")
SHOWN = ("prose_percent", "choice_points", "choice_lower", *(f"{s}_right" for s in SKILLS),
         "new_loss", "t_flops", "parameters", "born", "replaced")  # fmt: skip


def row(folder: Path) -> dict[str, Any]:
    """Return one run's figures.

    `prose_percent` is the change of the loss per byte; `choice_points` that of right answers to
    multiple choice, in percentage points, `choice_lower` its one-sided 95 % bound, paired by
    question; `new_loss` the mean loss of the three new skills, nats per token; FLOPs are those of
    pretraining and training.
    """
    summary = json.loads((folder / "summary.json").read_text())
    base, arm, method, seed = folder.name.split("-")
    before, after = summary["baseline"], summary["attempts"][-1]["final"]
    checks = {each["subject"]: each for each in summary["attempts"][-1]["gate"]}
    choice = checks["multiple_choice/accuracy"]
    above_chance = before["multiple_choice"]["accuracy"] - before["multiple_choice"]["chance"]
    lost = 100 * above_chance * choice["interval"][1] if choice["interval"] else float("nan")
    growth = summary.get("growth", {})
    own = after["multiple_choice"]["accuracy"] - before["multiple_choice"]["accuracy"]
    prose = after["prose"]["loss_per_byte"] / before["prose"]["loss_per_byte"] - 1
    return {
        "base": base,
        "arm": arm,
        "method": method,
        "seed": int(seed),
        "prose_percent": round(100 * prose, 2),
        "choice_before": round(100 * before["multiple_choice"]["accuracy"], 1),
        "choice_points": round(100 * own, 1),
        "choice_lower": round(-lost, 1),
        **{f"{name}_right": round(100 * after[name]["accuracy"], 1) for name in SKILLS},
        "new_loss": round(statistics.mean(after[name]["loss"] for name in SKILLS), 4),
        "t_flops": round((summary["flops"]["pretraining"] + summary["flops"]["fit"]) / 1e12, 3),
        "parameters": growth.get("parameters", {}).get(
            "after", summary["attempts"][-1]["parameters"]
        ),
        "born": growth.get("born", 0),
        "replaced": growth.get("replaced", 0),
        "function_change": growth.get("function_change", 0.0),
    }


def interval(values: list[float]) -> dict[str, Any]:
    """Return mean, 95 % interval of the mean over seeds, and the values."""
    mean, known = statistics.mean(values), len(values) > 1
    half = T_975[len(values) - 1] * statistics.stdev(values) / len(values) ** 0.5 if known else None
    return {"mean": mean, "half_width": half, "values": values}


def compared(rows: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return base, arm and method → figure → what the seeds say of it."""
    cells: dict[str, list[dict[str, Any]]] = {}
    for each in rows:
        cells.setdefault(f"{each['base']} {each['arm']} {each['method']}", []).append(each)
    return {
        name: {figure: interval([one[figure] for one in own]) for figure in SHOWN}
        for name, own in cells.items()
    }


def shown(cell: dict[str, Any]) -> str:
    if cell["half_width"] is None:
        return f"{cell['mean']:.3g}"
    digits = 2 if cell["half_width"] < 1 else 1
    return f"{cell['mean']:.{digits}f} ± {cell['half_width']:.{digits}f}"


def main(folders: list[str]) -> None:
    place = Path(__file__).parent
    rows = [row(Path(folder)) for folder in folders]
    rows.sort(key=lambda each: (each["base"], each["method"], each["arm"], each["seed"]))
    with (place / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    comparison = compared(rows)
    (place / "ablation_comparison.json").write_text(json.dumps(comparison, indent=1) + "\n")
    figures = ("prose_percent", "choice_points", "choice_lower", *(f"{s}_right" for s in SKILLS),
               "new_loss", "t_flops", "parameters")  # fmt: skip
    sys.stdout.write("| base, arm, method | " + " | ".join(figures) + " |\n")
    sys.stdout.write("|---" * (len(figures) + 1) + "|\n")
    for name, cell in comparison.items():
        cells = [shown(cell[figure]) for figure in figures[:-1]]
        count = f"{cell['parameters']['mean'] / 1000:.0f} k"
        sys.stdout.write(f"| {name} | {' | '.join(cells)} | {count} |\n")


if __name__ == "__main__":
    main(sys.argv[1:])
