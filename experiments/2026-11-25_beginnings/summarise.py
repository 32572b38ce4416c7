"""The table of the README, from results.csv: means over seeds with 95 % intervals.

python experiments/2026-11-25_beginnings/summarise.py
"""

import csv
import statistics
from pathlib import Path

FOLDER = Path(__file__).parent
CONTROL = "all_weights"
T_95 = {2: 4.303}  # Student's t for three seeds


def interval(values: list[float], digits: int) -> str:
    """Return the mean of three seeds and its 95 % interval."""
    half = T_95[len(values) - 1] * statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.mean(values):.{digits}f} ± {half:.{digits}f}"


def main() -> None:
    with (FOLDER / "results.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    arms: dict[str, list[dict[str, str]]] = {}
    for row in sorted(rows, key=lambda row: row["seed"]):
        arms.setdefault(row["arm"], []).append(row)
    control = [float(row["mean_of_new"]) for row in arms[CONTROL]]
    for arm, own in arms.items():
        prose = [float(row["prose_percent"]) for row in own]
        new = [float(row["mean_of_new"]) for row in own]
        paired = [one - other for one, other in zip(new, control, strict=True)]
        seeds = ", ".join(f"{each:.2f}" for each in prose)
        difference = "" if arm == CONTROL else interval(paired, 3)
        print(
            f"| {arm} | {interval(prose, 2)} | {seeds} | {interval(new, 3)} | {difference} | "
            f"{statistics.mean(float(row['tera_flops']) for row in own):.2f} |"
        )


if __name__ == "__main__":
    main()
