"""Turn results.csv into the README's table: `python summarise.py`."""

import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path.append(str(FOLDER.parents[1]))

from experiments.jobs import Row, rows_of, with_interval  # noqa: E402

DOMAINS, BASE = ("code", "stories", "maths"), "old"
DENSE, AVERAGED = "dense", "mean"


def main() -> None:
    """Print one row per arm: means over the seeds, and differences paired by seed."""
    rows = rows_of(FOLDER / "results.csv")
    columns = ("arm", "before training", *DOMAINS, "prose", "mean", "mean, compared with *mean*")
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    dense, averaged = (losses(rows, arm, "trained") for arm in (DENSE, AVERAGED))
    for arm in dict.fromkeys(row["arm"] for row in rows if row["arm"] not in DOMAINS):
        own = losses(rows, arm, "trained")
        start = losses(rows, arm, "before" if arm == AVERAGED else "expanded")
        cells = [arm, f"{statistics.mean(each['mean'] for each in start.values()):.3f}"]
        for domain in (*DOMAINS, BASE, "mean"):
            text = f"{statistics.mean(each[domain] for each in own.values()):.3f}"
            cells.append(text if arm == DENSE else f"{text} ({change(own, dense, domain)})")
        cells.append("-" if arm == AVERAGED else change(own, averaged, "mean"))
        print(f"| {' | '.join(cells)} |")
    print("\n| child | own domain | prose |\n|---|---|---|")
    for name in DOMAINS:
        own = losses(rows, name, "trained")
        before = losses(rows, name, "before")
        cells = [
            f"{statistics.mean(each[d] for each in own.values()):.3f} ({change(own, before, d)})"
            for d in (name, BASE)
        ]
        print(f"| {name} | {' | '.join(cells)} |")
    started = losses(rows, DENSE, "before")
    print("\nMean loss before training, compared with that of the averaged weights:")
    against = losses(rows, AVERAGED, "before")
    for arm in ("mixed", "random router"):
        if found := losses(rows, arm, "expanded"):
            print(f"- {arm}: {change(found, against, 'mean')}")
    print("\nProse after training, compared with the base:")
    for arm in dict.fromkeys(row["arm"] for row in rows if row["arm"] not in DOMAINS):
        print(f"- {arm}: {change(losses(rows, arm, 'trained'), started, BASE)}")


def losses(rows: Sequence[Row], arm: str, stage: str) -> dict[str, dict[str, float]]:
    """Return seed → domain → loss per byte of one arm."""
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        if (row["arm"], row["stage"]) == (arm, stage):
            found.setdefault(row["seed"], {})[row["domain"]] = float(row["loss_per_byte"])
    return {seed: {**each, "mean": statistics.mean(each.values())} for seed, each in found.items()}


Losses = dict[str, dict[str, float]]


def change(own: Losses, reference: Losses, domain: str) -> str:
    """Return the mean relative change in per cent with its 95 % interval, paired by seed."""
    seeds = [seed for seed in own if seed in reference]
    found = [100 * (own[seed][domain] / reference[seed][domain] - 1) for seed in seeds]
    return with_interval(found, ".1f", sign="+") + " %"


if __name__ == "__main__":
    main()
