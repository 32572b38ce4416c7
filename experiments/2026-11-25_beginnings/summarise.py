"""The table of the README, from results.csv: means over seeds with 95 % intervals.

python experiments/2026-11-25_beginnings/summarise.py
"""

import statistics
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path.append(str(FOLDER.parents[1]))

from experiments.jobs import rows_of, with_interval  # noqa: E402

CONTROL = "all_weights"
ARMS = (CONTROL, "dylora", "both", "starts")


def main() -> None:
    rows = {(row["arm"], row["seed"]): row for row in rows_of(FOLDER / "results.csv")}
    for arm in ARMS:
        own = {seed: row for (name, seed), row in sorted(rows.items()) if name == arm}
        new = {seed: float(row["mean_of_new"]) for seed, row in own.items()}
        control = {seed: float(rows[CONTROL, seed]["mean_of_new"]) for seed in own}
        prose = [float(row["prose_percent"]) for row in own.values()]
        difference = (
            "" if arm == CONTROL else with_interval((new[s] - control[s] for s in own), ".3f")
        )
        flops = statistics.mean(float(row["tera_flops"]) for row in own.values())
        cells = [arm, str(len(own)), with_interval(prose, ".2f")]
        cells += [", ".join(f"{each:.2f}" for each in prose), with_interval(new.values())]
        cells += ["" if arm == CONTROL else difference, f"{flops:.2f}"]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
