"""Turn curves.csv into results.csv, the README's tables and the figure.

    python experiments/2026-11-20_compute_saved/summarise.py

A saving is 1 − FLOPs of the grown arm / FLOPs from scratch, to the same loss, within one seed.
"""

import csv
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

FOLDER = Path(__file__).resolve().parent
GOALS = (0.5, 0.75, 1.0)  # shares of the from-scratch steps whose loss is to be reached
MINUS = "\N{MINUS SIGN}"
TARGETS = {
    "depth": "2 → 4 layers",
    "width": "32 → 64 wide",
    "depth_width": "both",
    "moe": "4 experts",
}
T = TypeVar("T")
K = TypeVar("K")


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """The measured losses of one training; decayed: the last of its branches, by FLOPs."""

    seed: int
    arm: str
    target: str
    grown_at: int
    rate: float
    steps: tuple[float, ...]
    flops: tuple[float, ...]
    own_flops: tuple[float, ...]
    losses: tuple[float, ...]
    decayed: dict[float, float]
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Saving:
    """One grown arm to one goal; where it was not reached, the FLOPs are a lower bound.

    `control_*` is the small model left alone: FLOPs to the goal (empty: never), and its loss at
    the grown arm's FLOPs. `saved_over_fixed`: counted, beside the cheaper of from-scratch and it.
    """

    seed: int
    arm: str
    target: str
    grown_at: int
    rate: float
    goal: float
    goal_loss: float
    is_reached: bool
    scratch_flops: float
    flops: float
    flops_after_growth: float
    saved_counted: float
    saved_sunk: float
    control_flops: float | None
    control_loss: float
    saved_over_fixed: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Late:
    """One grown arm decayed at the tokens of from-scratch, under WSD."""

    seed: int
    arm: str
    target: str
    grown_at: int
    scratch_loss: float
    loss: float
    gap_percent: float
    saved_counted: float
    saved_sunk: float
    control_loss: float


def read_curves(path: Path) -> list[Curve]:
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    groups: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for row in rows:
        key = tuple(row[name] for name in ("seed", "arm", "target", "grown_at"))
        groups.setdefault(key, []).append(row)
    return [_curve(group) for group in groups.values()]


def _curve(rows: Sequence[dict[str, str]]) -> Curve:
    along = [row for row in rows if row["kind"] == "average"]
    decayed = {float(r["flops"]): float(r["loss"]) for r in rows if r["kind"] == "decayed"}

    def column(name: str) -> tuple[float, ...]:
        return tuple(float(row[name]) for row in along)

    return Curve(
        seed=int(rows[0]["seed"]),
        arm=rows[0]["arm"],
        target=rows[0]["target"],
        grown_at=int(rows[0]["grown_at"]),
        rate=float(rows[0]["rate"]),
        steps=column("step"),
        flops=column("flops"),
        own_flops=column("flops_after_growth"),
        losses=column("loss"),
        decayed=decayed,
        seconds=max(float(row["seconds"]) for row in rows),
    )


def interpolated(x: float, xs: Sequence[float], ys: Sequence[float]) -> float:
    """Return y at x, held at the ends."""
    if x <= xs[0]:
        return ys[0]
    for (x0, y0), (x1, y1) in pairwise(zip(xs, ys, strict=True)):
        if x <= x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return ys[-1]


def crossing(goal: float, xs: Sequence[float], losses: Sequence[float]) -> float | None:
    """Return the x at which the loss first falls to the goal, or None."""
    if losses[0] <= goal:
        return xs[0]
    for (x0, y0), (x1, y1) in pairwise(zip(xs, losses, strict=True)):
        if y1 <= goal:
            return x0 + (x1 - x0) * (y0 - goal) / (y0 - y1)
    return None


def savings(grown: Curve, scratch: Curve, small: Curve) -> Iterable[Saving]:
    for goal in GOALS:
        steps = goal * scratch.steps[-1]
        wanted = interpolated(steps, scratch.steps, scratch.losses)
        budget = interpolated(steps, scratch.steps, scratch.flops)
        flops = crossing(wanted, grown.flops, grown.losses)
        own = crossing(wanted, grown.own_flops, grown.losses)
        spent = grown.flops[-1] if flops is None else flops
        spent_after = grown.own_flops[-1] if own is None else own
        alone = crossing(wanted, small.flops, small.losses)
        yield Saving(
            seed=grown.seed,
            arm=grown.arm,
            target=grown.target,
            grown_at=grown.grown_at,
            rate=grown.rate,
            goal=goal,
            goal_loss=wanted,
            is_reached=flops is not None,
            scratch_flops=budget,
            flops=spent,
            flops_after_growth=spent_after,
            saved_counted=1 - spent / budget,
            saved_sunk=1 - spent_after / budget,
            control_flops=alone,
            control_loss=interpolated(spent, small.flops, small.losses),
            saved_over_fixed=1 - spent / (budget if alone is None else min(budget, alone)),
        )


def late(grown: Curve, scratch: Curve, small: Curve) -> Late | None:
    if not (grown.decayed and scratch.decayed and small.decayed):
        return None
    budget, scratch_loss = next(iter(scratch.decayed.items()))
    spent, loss = next(iter(grown.decayed.items()))
    before = grown.flops[0] - grown.own_flops[0]
    budgets = sorted(small.decayed)
    return Late(
        seed=grown.seed,
        arm=grown.arm,
        target=grown.target,
        grown_at=grown.grown_at,
        scratch_loss=scratch_loss,
        loss=loss,
        gap_percent=100 * (loss / scratch_loss - 1),
        saved_counted=1 - spent / budget,
        saved_sunk=1 - (spent - before) / budget,
        control_loss=small.decayed[min(budgets, key=lambda flops: abs(flops - budget))],
    )


def compared(curves: Sequence[Curve]) -> tuple[list[Saving], list[Late]]:
    """Pair every grown arm with from-scratch and the small model of its own seed."""
    found: list[Saving] = []
    ends: list[Late] = []
    scratch = {(c.seed, c.target): c for c in curves if c.arm == "scratch"}
    small = {c.seed: c for c in curves if c.arm == "small"}
    for curve in curves:
        if not curve.grown_at or curve.seed not in small:
            continue
        pair = scratch[curve.seed, curve.target], small[curve.seed]
        found += savings(curve, *pair)
        end = late(curve, *pair)
        ends += [] if end is None else [end]
    return found, ends


def spread(values: Sequence[float], *, scale: float = 100, digits: int = 0) -> str:
    """Return mean ± standard deviation; of three, a 95 % interval of the mean is ± 2.5 of these."""
    mean = round(scale * statistics.mean(values), digits) + 0.0  # no −0
    text = f"{mean:.{digits}f}"
    if len(values) > 1:
        text += f" ± {scale * statistics.stdev(values):.{digits}f}"
    return text.replace("-", MINUS)


def grouped(items: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    groups: dict[K, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def print_savings(rows: Sequence[Saving]) -> None:
    names = (
        "target | path | grown at | loss of | counted, % | sunk, % | small alone, % | over both, %"
    )
    print(f"| {names} |")
    print("|" + "---|" * 8)
    groups = grouped(rows, lambda row: (row.target, row.arm, row.grown_at, row.goal))
    for (target, arm, grown_at, goal), runs in groups.items():
        control = [
            1 - run.control_flops / run.scratch_flops
            for run in runs
            if run.control_flops is not None
        ]
        alone = (
            spread(control)
            if len(control) == len(runs)
            else f"{len(control)}/{len(runs)} get there"
        )
        reached = sum(run.is_reached for run in runs)
        at_most = "" if reached == len(runs) else "≤ "
        cells = (
            TARGETS.get(target, target),
            arm,
            grown_at,
            f"{goal:.0%}".replace("%", " %"),
            at_most + spread([run.saved_counted for run in runs]),
            at_most + spread([run.saved_sunk for run in runs]),
            alone,
            at_most + spread([run.saved_over_fixed for run in runs]),
        )
        print("| " + " | ".join(map(str, cells)) + " |")


def print_late(rows: Sequence[Late]) -> None:
    print(
        "| target | path | grown at | gap to scratch, % | counted, % | sunk, % | small's gap, % |"
    )
    print("|---|---|---|---|---|---|---|")
    for (target, arm, grown_at), runs in grouped(
        rows, lambda row: (row.target, row.arm, row.grown_at)
    ).items():
        cells = (
            TARGETS.get(target, target),
            arm,
            grown_at,
            spread([run.gap_percent for run in runs], scale=1, digits=1),
            f"{100 * runs[0].saved_counted:.0f}",
            f"{100 * runs[0].saved_sunk:.0f}",
            spread([run.control_loss / run.scratch_loss - 1 for run in runs], digits=1),
        )
        print("| " + " | ".join(map(str, cells)) + " |")


def write(path: Path, rows: Sequence[Saving] | Sequence[Late], kind: type) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(kind)], lineterminator="\n")
        writer.writeheader()
        for row in rows:
            values = asdict(row).items()
            writer.writerow({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in values})


def draw(curves: Sequence[Curve], path: Path) -> None:
    """Plot loss over FLOPs, a panel for each target and a line for each seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    targets = [t for t in TARGETS if any(c.target == t for c in curves)]
    figure, axes = pyplot.subplots(1, len(targets), figsize=(4 * len(targets), 3.2), squeeze=False)
    for axis, target in zip(axes[0], targets, strict=True):
        chosen = [c for c in curves if c.target == target or c.arm == "small"]
        _draw_curves(axis, chosen)
        scratch = [c for c in chosen if c.arm == "scratch"]
        lowest = min(c.losses[-1] for c in scratch)
        axis.set_ylim(lowest - 0.1, lowest + 0.7)
        axis.set_xlim(0, 1.1 * scratch[0].flops[-1] / 1e12)
        axis.set(title=TARGETS[target], xlabel="training TFLOPs, the small model's included")
        axis.legend(fontsize=7, frameon=False)
    axes[0][0].set_ylabel("validation loss, nats per token")
    figure.tight_layout()
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=80)


def _draw_curves(axis: Any, curves: Sequence[Curve]) -> None:
    controls = ("small", "scratch")
    grown = sorted({(c.arm, c.grown_at) for c in curves if c.arm not in controls})
    for number, (arm, grown_at) in enumerate([*((name, 0) for name in controls), *grown]):
        color = ("0.6", "black")[number] if number < 2 else f"C{number - 2}"
        label = f"{arm} at step {grown_at}" if grown_at else arm
        for curve in [c for c in curves if (c.arm, c.grown_at) == (arm, grown_at)]:
            start = 1 if grown_at else 0  # the first average of a grown model holds one state
            flops = [each / 1e12 for each in curve.flops[start:]]
            axis.plot(flops, curve.losses[start:], color=color, lw=0.8, label=label)
            label = "_"


def main(folder: Path = FOLDER) -> None:
    curves = read_curves(folder / "curves.csv")
    rows, ends = compared(curves)
    write(folder / "results.csv", rows, Saving)
    write(folder / "wsd.csv", ends, Late)
    print_savings(rows)
    print()
    print_late(ends)
    draw(curves, folder / "figures" / "loss_over_flops.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
