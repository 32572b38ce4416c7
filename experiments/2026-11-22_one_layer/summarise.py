"""Turn results.csv into the README's tables and the figure.

    python experiments/2026-11-22_one_layer/summarise.py

What a grown arm saves is 1 − its FLOPs / those of another arm to the same loss, within one seed:
read off the line through that arm's decayed losses, over the logarithm of FLOPs.
"""

import csv
import math
import statistics
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
T_95 = {1: 12.71, 2: 4.303, 3: 3.182, 4: 2.776}
Row = dict[str, str]
Point = tuple[float, float]  # FLOPs, loss


def curve(rows: Sequence[Row], seed: str, arm: str) -> list[Point]:
    own = [row for row in rows if row["seed"] == seed and row["arm"] == arm]
    return sorted((float(row["flops"]), float(row["loss"])) for row in own)


def flops_to(points: Sequence[Point], loss: float) -> float:
    """Return the FLOPs to a loss; before the first point and beyond the last, NaN."""
    for (low, above), (high, below) in pairwise(points):
        if above >= loss >= below:
            share = (above - loss) / (above - below)
            return math.exp(math.log(low) + share * (math.log(high) - math.log(low)))
    return math.nan


def loss_at(points: Sequence[Point], flops: float) -> float:
    """Return the loss at so many FLOPs, between two points; elsewhere NaN."""
    for (low, above), (high, below) in pairwise(points):
        if low <= flops <= high:
            share = math.log(flops / low) / math.log(high / low)
            return above + share * (below - above)
    return math.nan


def told(values: Sequence[float], digits: int = 0, unit: float = 100.0) -> str:
    """Return mean ± 95 % interval of the mean."""
    known = [unit * value for value in values if not math.isnan(value)]
    if len(known) < len(values) or not known:
        return "beyond"
    mean = statistics.mean(known)
    if len(known) == 1:
        return f"{mean:.{digits}f}"
    half = T_95[len(known) - 1] * statistics.stdev(known) / math.sqrt(len(known))
    return f"{mean:.{digits}f} ± {half:.{digits}f}".replace("-", "\N{MINUS SIGN}")


def sizes(rows: Sequence[Row], seeds: Sequence[str]) -> None:
    """Print what one layer and eight come to with equal FLOPs."""
    print("| tokens a parameter | eight from scratch | one layer, same FLOPs | difference |")
    print("|---|---|---|---|")
    for budget in sorted({row["tokens_per_parameter"] for row in rows}, key=float):
        losses: dict[str, list[float]] = {"scratch": [], "small": []}
        for seed in seeds:
            for row in rows:
                here = (row["seed"], row["tokens_per_parameter"]) == (seed, budget)
                if here and row["arm"] in losses:
                    losses[row["arm"]].append(float(row["loss"]))
        scratch, small = losses.values()
        gap = [one - eight for one, eight in zip(small, scratch, strict=True)]
        cells = (told(scratch, 3, 1), told(small, 3, 1), told(gap, 3, 1))
        print(f"| {float(budget):g} | " + " | ".join(cells) + " |")


def growths(rows: Sequence[Row], seeds: Sequence[str]) -> None:
    """Print each grown arm beside eight from scratch, and beside the one layer alone."""
    print(
        "\n| tokens a parameter | path | grown at | FLOPs of scratch, % | loss above scratch, % "
        "| saved to its own loss, % | loss above one layer of these FLOPs, nats |"
    )
    print("|---|---|---|---|---|---|---|")
    grown = sorted(
        {
            (float(row["tokens_per_parameter"]), row["arm"], float(row["grown_at"]))
            for row in rows
            if float(row["grown_at"])
        }
    )
    for budget, arm, share in grown:
        taken, gaps, saved, beside = [], [], [], []
        for seed in seeds:
            one = next(r for r in rows if key(r) == (seed, budget, arm, share))
            whole = next(r for r in rows if key(r) == (seed, budget, "scratch", 0.0))
            flops, loss = float(one["flops"]), float(one["loss"])
            taken.append(flops / float(whole["flops"]))
            gaps.append(loss / float(whole["loss"]) - 1)
            saved.append(1 - flops / flops_to(curve(rows, seed, "scratch"), loss))
            beside.append(loss - loss_at(curve(rows, seed, "small"), flops))
        cells = (told(taken), told(gaps, 1), told(saved), told(beside, 3, 1))
        print(
            f"| {budget:g} | `{arm}` | {share:.0%} | ".replace("%", " %") + " | ".join(cells) + " |"
        )


def key(row: Row) -> tuple[str, float, str, float]:
    budget, share = float(row["tokens_per_parameter"]), float(row["grown_at"])
    return row["seed"], budget, row["arm"], share


def draw(rows: Sequence[Row], seeds: Sequence[str]) -> None:
    """Draw losses over FLOPs, each seed a thin line, growths as marks."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for arm, name, colour in (("scratch", "eight layers", "C0"), ("small", "one layer", "C1")):
        for seed in seeds:
            xs, ys = zip(*curve(rows, seed, arm), strict=True)
            axes.plot(xs, ys, "o-", color=colour, lw=0.8, ms=3, label=name if seed == "0" else None)
    marks = {("stack", "0.2"): "s", ("stack", "0.6"): "^", ("stack", "0.8"): "v"}
    marks |= {("llama_pro", "0.6"): "+", ("llama_pro", "0.8"): "x"}
    for (arm, share), mark in marks.items():
        own = [row for row in rows if (row["arm"], row["grown_at"]) == (arm, share)]
        xs, ys = [float(row["flops"]) for row in own], [float(row["loss"]) for row in own]
        axes.plot(xs, ys, mark, color="C2", ms=6, label=f"{arm}, grown at {float(share):.0%}")
    axes.set_xscale("log")
    axes.xaxis.set_minor_formatter(ticker.NullFormatter())
    axes.set(xlabel="training FLOPs, all counted", ylabel="loss, nats per token")
    axes.legend(fontsize=8)
    (FOLDER / "figures").mkdir(exist_ok=True)
    figure.savefig(FOLDER / "figures" / "loss_over_flops.png", dpi=130, bbox_inches="tight")


def main() -> None:
    with (FOLDER / "results.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    seeds = sorted({row["seed"] for row in rows})
    sizes(rows, seeds)
    growths(rows, seeds)
    draw(rows, seeds)


if __name__ == "__main__":
    main()
