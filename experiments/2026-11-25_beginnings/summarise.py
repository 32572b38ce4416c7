"""The table of the README, from results.csv: means over seeds with 95 % intervals.

python experiments/2026-11-25_beginnings/summarise.py
"""

import csv
import statistics
from collections.abc import Iterable
from pathlib import Path

FOLDER = Path(__file__).parent
CONTROL = "all_weights"
ARMS = (CONTROL, "dylora", "both", "starts")
T_95 = {2: 4.303, 3: 3.182}  # Student's t for three and for four seeds


def interval(numbers: Iterable[float], digits: int) -> str:
    """Return the mean and its 95 % interval."""
    values = list(numbers)
    half = T_95[len(values) - 1] * statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.mean(values):.{digits}f} ± {half:.{digits}f}".replace(
        "-", "\N{MINUS SIGN}"
    )


def main() -> None:
    with (FOLDER / "results.csv").open(encoding="utf-8", newline="") as file:
        rows = {(row["arm"], row["seed"]): row for row in csv.DictReader(file)}
    for arm in ARMS:
        own = {seed: row for (name, seed), row in sorted(rows.items()) if name == arm}
        new = {seed: float(row["mean_of_new"]) for seed, row in own.items()}
        control = {seed: float(rows[CONTROL, seed]["mean_of_new"]) for seed in own}
        prose = [float(row["prose_percent"]) for row in own.values()]
        difference = "" if arm == CONTROL else interval((new[s] - control[s] for s in own), 3)
        flops = statistics.mean(float(row["tera_flops"]) for row in own.values())
        print(
            f"| {arm} | {len(own)} | {interval(prose, 2)} | "
            f"{', '.join(f'{each:.2f}' for each in prose)} | {interval(new.values(), 3)} | "
            f"{difference} | {flops:.2f} |"
        )


if __name__ == "__main__":
    main()
