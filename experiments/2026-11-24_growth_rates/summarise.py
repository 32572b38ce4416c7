"""Print the tables of README.md.

python experiments/2026-11-24_growth_rates/summarise.py
"""

import math
import sys
from collections import defaultdict
from pathlib import Path
from statistics import fmean

FOLDER = Path(__file__).resolve().parent
sys.path.append(str(FOLDER.parents[1]))

from experiments.jobs import half_interval, rows_of, with_interval  # noqa: E402

SOURCE_RATE = 6e-3  # the best of the grid for the source

Arm = tuple[str, str, float]  # growth, rule, multiplier
Losses = dict[float, dict[int, float]]  # learning rate → seed → loss


def losses(path: Path) -> dict[Arm, Losses]:
    found: dict[Arm, Losses] = defaultdict(lambda: defaultdict(dict))
    for row in rows_of(path):
        arm = (row["growth"], row["rule"], float(row["multiplier"]))
        found[arm][float(row["rate"])][int(row["seed"])] = float(row["loss"])
    return found


def best_rate(of_arm: Losses, seed: int) -> float:
    """Return the minimum of a parabola in log(rate) through the best rate and its neighbours."""
    rates = sorted(of_arm)
    curve = [of_arm[rate][seed] for rate in rates]
    at = curve.index(min(curve))
    if at in (0, len(rates) - 1):
        return rates[at]
    low, middle, high = curve[at - 1 : at + 2]
    shift = (low - high) / (low - 2 * middle + high) / 2  # in steps of a factor of 2
    return rates[at] * 2.0**shift


def difference(first: dict[int, float], second: dict[int, float]) -> str:
    values = [first[seed] - second[seed] for seed in sorted(first)]
    return with_interval(values, ".4f", sign="+")


def main() -> None:
    found = losses(FOLDER / "results.csv")
    rates = sorted({rate for of_arm in found.values() for rate in of_arm})
    print("| growth | rule |", *(f"{rate:g} |" for rate in rates), "best rate |")
    print("|---|---|" + "---|" * (len(rates) + 1))
    for (growth, rule, multiplier), of_arm in found.items():
        if multiplier not in (1.0, 2.0) or len(of_arm) == 1:
            continue
        cells = (f"{fmean(of_arm[r].values()):.4f} |" if r in of_arm else "|" for r in rates)
        logs = [math.log2(best_rate(of_arm, seed)) for seed in (0, 1, 2)]
        low, high = (2 ** (fmean(logs) + sign * half_interval(logs)) for sign in (-1, 1))
        print(f"| {growth} | {rule} |", *cells, f"{2 ** fmean(logs):.2g} [{low:.2g}, {high:.2g}] |")
    print("\n| growth | rule | at the source's best rate | each at its own best rate |")
    print("|---|---|---|---|")
    for (growth, rule, multiplier), of_arm in found.items():
        if rule == "none":
            continue
        plain = found[growth, "none", 1.0]
        own, other = (
            min(arm.values(), key=lambda of: fmean(of.values())) for arm in (of_arm, plain)
        )
        name = rule if rule == "mup" else f"{rule}, {multiplier:g} times"
        tuned = difference(own, other) if len(of_arm) > 1 else ""
        print(f"| {growth} | {name} | {difference(of_arm[SOURCE_RATE], plain[SOURCE_RATE])} |",
              f"{tuned} |")  # fmt: skip


if __name__ == "__main__":
    main()
