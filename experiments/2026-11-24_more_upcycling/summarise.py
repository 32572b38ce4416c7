"""Print the tables of README.md.

python experiments/2026-11-24_more_upcycling/summarise.py
"""

import sys
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean

FOLDER = Path(__file__).resolve().parent
sys.path.append(str(FOLDER.parents[1]))

from experiments.jobs import rows_of, with_interval  # noqa: E402

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
    for row in rows_of(path):
        found[row["arm"]][float(row["share"])][int(row["seed"])] = float(row[domain])
    return found


def difference(first: Mapping[int, float], second: Mapping[int, float]) -> str:
    values = [first[seed] - second[seed] for seed in sorted(first)]
    return with_interval(values, ".3f", sign="+")


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
