"""Print the tables of README.md.

python experiments/2026-11-24_more_upcycling/summarise.py
"""

import csv
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev

from scipy.stats import t as student

FOLDER = Path(__file__).resolve().parent
DOMAINS = ("prose", "code")
# Arm → its control: the dense model of the same base
CONTROLS = {
    "mixtral": "dense",
    "qwen2_moe": "dense",
    "glm4_moe": "dense",
    "scratch": "dense",
    "qwen3_moe": "dense_qwen3",
    "not_renormalised": "dense_qwen3",
}
PAIRS = (
    ("not_renormalised", "qwen3_moe"),
    ("qwen2_moe", "mixtral"),
    ("glm4_moe", "mixtral"),
    ("glm4_moe", "qwen2_moe"),
    ("mixtral", "scratch"),
)

Scores = dict[float, dict[int, float]]  # share of the FLOPs → seed → loss


def scores(path: Path, domain: str) -> dict[str, Scores]:
    found: dict[str, Scores] = defaultdict(lambda: defaultdict(dict))
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            found[row["arm"]][float(row["share"])][int(row["seed"])] = float(row[domain])
    return found


def interval(values: Sequence[float]) -> float:
    """Return half the 95 % interval of a mean (Student's t)."""
    return float(student.ppf(0.975, len(values) - 1)) * stdev(values) / math.sqrt(len(values))


def difference(first: Mapping[int, float], second: Mapping[int, float]) -> str:
    values = [first[seed] - second[seed] for seed in sorted(first)]
    text = f"{fmean(values):+.3f}"
    if len(values) > 1:
        text += f" ± {interval(values):.3f}"
    return text.replace("-", "\N{MINUS SIGN}")


def main() -> None:
    for domain in DOMAINS:
        found = scores(FOLDER / "results.csv", domain)
        shares = sorted(next(iter(found.values())))
        print(f"| {domain} |", *(f"{share:.0%} |" for share in shares))
        print("|---|" + "---|" * len(shares))
        for arm, of_arm in found.items():
            if arm not in CONTROLS:
                cells = [f"{fmean(of_arm[share].values()):.3f}" for share in shares]
            else:
                control = found[CONTROLS[arm]]
                cells = [difference(of_arm[share], control[share]) for share in shares]
            print(f"| {arm} |", *(f"{cell} |" for cell in cells))
        print()
    print("| difference | prose | code |\n|---|---|---|")
    both = [scores(FOLDER / "results.csv", domain) for domain in DOMAINS]
    for first, second in PAIRS:
        cells = (difference(found[first][1.0], found[second][1.0]) for found in both)
        print(f"| {first} \N{MINUS SIGN} {second} |", *(f"{cell} |" for cell in cells))


if __name__ == "__main__":
    main()
