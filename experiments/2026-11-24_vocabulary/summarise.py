"""Turn results.csv into the README's table: `python summarise.py`."""

import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path.append(str(FOLDER.parents[1]))

from experiments.jobs import Row, rows_of, with_interval  # noqa: E402


def main() -> None:
    """Print one row per arm: means over the seeds, and differences paired by seed."""
    rows = rows_of(FOLDER / "results.csv")
    print(
        "| rows of new tokens | probability of new tokens at step 0 | code, tokens per byte |",
        end="",
    )
    print(" code, loss | prose, loss | code before training | prose before training |")
    print("|---|---|---|---|---|---|---|")
    for arm in dict.fromkeys(row["arm"] for row in rows):
        own = [row for row in rows if row["arm"] == arm]
        masses = [100 * float(row["mass"]) for row in own if row["mass"]]
        cells = [arm, with_interval(masses, ".1f") + " %" if masses else "-"]
        cells.append(paired(own, "code", "trained", "tokens_per_byte", own, "before"))
        for stage in ("trained", "expanded"):
            reference = [row for row in rows if row["arm"] == "none"]
            against = "trained" if stage == "trained" else "before"
            for domain in ("code", "old"):
                found = values(own, domain, stage, "loss_per_byte")
                text = f"{statistics.mean(found.values()):.3f}"
                change = paired(own, domain, stage, "loss_per_byte", reference, against)
                cells.append(text if arm == "none" else f"{text} ({change})")
        print(f"| {' | '.join(cells)} |")


def values(rows: Sequence[Row], domain: str, stage: str, column: str) -> dict[str, float]:
    """Return seed → a number of one domain at one stage."""
    return {
        row["seed"]: float(row[column])
        for row in rows
        if row["domain"] == domain and row["stage"] == stage
    }


def paired(
    rows: Sequence[Row],
    domain: str,
    stage: str,
    column: str,
    reference: Sequence[Row],
    against: str,
) -> str:
    """Return the mean relative change in per cent with its 95 % interval, paired by seed."""
    before = values(reference, domain, against, column)
    after = values(rows, domain, stage, column)
    changes = [100 * (after[seed] / before[seed] - 1) for seed in after if seed in before]
    return f"{with_interval(changes, '.1f', sign='+')} %"


if __name__ == "__main__":
    main()
