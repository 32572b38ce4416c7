"""Loss against FLOPs of runs called STUDY-ARM-SEED, into a file, and what growth saves.

    python curves.py curves_short.csv RUN…

A curve is `eval/text/loss` on the new text, smoothed over five evaluations. What is saved is asked
at the loss that the large model reaches from scratch with its whole budget.
"""

import csv
import json
import statistics
import sys
from pathlib import Path

WINDOW = 5


def curve(folder: Path, domain: str) -> list[tuple[float, float]]:
    """Return (FLOPs of the training so far, smoothed loss) of each evaluation."""
    summary = json.loads((folder / "summary.json").read_text())
    with (folder / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    each_step = summary["flops"]["fit"] / summary["attempts"][-1]["steps"]
    flops: dict[int, float] = {}
    losses: dict[int, float] = {}
    for row in rows:
        step = int(float(row["step"]))
        if row.get("growth/flops"):
            flops[step] = float(row["growth/flops"])
        if row.get(f"eval/{domain}/loss") and step > 0:
            losses[step] = float(row[f"eval/{domain}/loss"])
    steps = sorted(losses)
    if flops:
        at = [flops.get(step, flops.get(step - 1, flops.get(step + 1))) for step in steps]
    else:
        at = [each_step * step for step in steps]
    pairs = [(f, losses[step]) for f, step in zip(at, steps, strict=True) if f is not None]
    return [
        (pairs[n][0], statistics.mean(loss for _, loss in pairs[max(0, n - WINDOW + 1) : n + 1]))
        for n in range(len(pairs))
    ]


def reached(points: list[tuple[float, float]], loss: float) -> float | None:
    """Return the FLOPs at which a curve first is as low as a loss."""
    return next((flops for flops, own in points if own <= loss), None)


def at(points: list[tuple[float, float]], flops: float) -> float:
    """Return the loss at some FLOPs, that of the last evaluation before."""
    return [loss for own, loss in points if own <= flops][-1]


def main(output: str, folders: list[str]) -> None:
    runs: dict[int, dict[str, list[tuple[float, float]]]] = {}
    grew: dict[tuple[int, str], list[int]] = {}
    for folder in map(Path, folders):
        _, arm, seed = folder.name.split("-")
        summary = json.loads((folder / "summary.json").read_text())
        (domain,) = summary["domains"]["new"]
        runs.setdefault(int(seed), {})[arm] = curve(folder, domain)
        events = summary.get("growth", {}).get("events", [])
        grew[int(seed), arm] = sorted({event["step"] for event in events})
    writer = csv.writer(sys.stdout)
    writer.writerow(["seed", "arm", "grew after", "saved", "loss at the budget", "of the small"])
    rows = []
    for seed, arms in sorted(runs.items()):
        budget, target = arms["wide"][-1]
        for arm, points in sorted(arms.items()):
            needed = reached(points, target)
            saved = "" if needed is None else f"{100 * (1 - needed / budget):.0f} %"
            steps = " ".join(map(str, grew[seed, arm]))
            own, small = at(points, budget), at(arms["small"], budget)
            writer.writerow([seed, arm, steps, saved, f"{own:.3f}", f"{small:.3f}"])
            rows += [(seed, arm, f"{flops:.4g}", f"{loss:.4f}") for flops, loss in points]
    with Path(output).open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["seed", "arm", "flops", "loss"])
        table.writerows(rows)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
