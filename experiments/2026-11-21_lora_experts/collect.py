"""Runs called ARM_SEED as rows of a table, and the means of each arm over seeds.

    python collect.py RUN… > results.csv

Standard error of a mean is turned into a 95 % interval by Student's t. The means go to the screen.
"""

import csv
import json
import statistics
import sys
from pathlib import Path
from typing import Any

T_95 = {1: 12.71, 2: 4.303, 3: 3.182, 4: 2.776}


def row(folder: Path) -> dict[str, Any]:
    """Return what a run's summary says: each domain at the end, and what its experts did."""
    arm, _, seed = folder.name.rpartition("_")
    summary = json.loads((folder / "summary.json").read_text())
    matrix = summary["matrix"]
    before, after = matrix["loss_per_byte"][0], matrix["loss_per_byte"][-1]
    found: dict[str, Any] = {"arm": arm, "seed": seed}
    for number, domain in enumerate(matrix["domains"]):
        if domain in summary["domains"]["old"]:
            found[f"{domain}_percent"] = 100 * (after[number] / before[number] - 1)
        else:
            found[domain] = after[number]
            found[f"{domain}_nats"] = summary["attempts"][-1]["final"][domain]["loss"]
            found[f"{domain}_right"] = 100 * matrix["accuracy"][domain][-1]
    new = summary["domains"]["new"]
    found["mean_of_new"] = statistics.mean(found[domain] for domain in new)
    found["backward"] = matrix["mean_backward_transfer"]
    experts = summary.get("experts", {})
    spawned = experts.get("spawned", [])
    found["spawned"] = len(spawned)
    found["domains_of_birth"] = " ".join(event["domain"] for event in spawned)
    steps = summary["attempts"][-1]["steps"] // len(summary["tasks"])
    found["largest_delay"] = max((event["step"] % steps for event in spawned), default="")
    found["trained"] = experts.get("parameters", {}).get(
        "trainable", summary["parameters"]["final"]
    )
    found["tera_flops"] = summary["flops"]["fit"] / 1e12
    return found


def shown(values: list[float]) -> str:
    """Return mean and 95 % interval."""
    mean = statistics.mean(values)
    if len(values) == 1:
        return f"{mean:.3g}"
    half = T_95[len(values) - 1] * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean:.3g} ± {half:.2g}"


def main(folders: list[str]) -> None:
    rows = [row(Path(folder)) for folder in sorted(folders)]
    table = csv.DictWriter(sys.stdout, rows[0])
    table.writeheader()
    for each in rows:
        table.writerow({k: f"{v:.4f}" if isinstance(v, float) else v for k, v in each.items()})
    texts = ("arm", "seed", "domains_of_birth", "largest_delay")
    numbers = [name for name in rows[0] if name not in texts]
    for arm in dict.fromkeys(each["arm"] for each in rows):
        own = [each for each in rows if each["arm"] == arm]
        cells = {name: shown([float(each[name]) for each in own]) for name in numbers}
        print(arm, cells, file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1:])
