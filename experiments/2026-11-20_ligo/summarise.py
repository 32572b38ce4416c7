"""Turn results.csv into the README's table: `python experiments/2026-11-20_ligo/summarise.py`.

Each cell is a mean over seeds with its 95 % interval (Student's t). A difference is taken within
seeds, to the arm without operators whose mean is lowest at the same place.
"""

import csv
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from scipy.special import stdtrit

FOLDER = Path(__file__).resolve().parent

PLACES = (0, 50, 100, 250, 500)
MINUS = "\N{MINUS SIGN}"
HEADER = ("target", "arm", "steps", *map(str, PLACES), "difference at 250", "difference at 500")

Losses = dict[int, float]  # seed → loss


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One measured loss."""

    seed: int
    target: str
    arm: str
    step: int
    equivalent_steps: float
    loss: float

    @property
    def has_operators(self) -> bool:
        return self.arm.startswith("ligo")


def read_points(path: Path) -> list[Point]:
    with path.open(encoding="utf-8", newline="") as file:
        return [
            Point(
                seed=int(row["seed"]),
                target=row["target"],
                arm=row["arm"],
                step=int(row["step"]),
                equivalent_steps=float(row["equivalent_steps"]),
                loss=float(row["loss"]),
            )
            for row in csv.DictReader(file)
        ]


def at_equal_flops(points: Sequence[Point], place: int) -> Losses:
    """Return the losses where as much was spent as for `place` normal steps, within half a step.

    At 0 it is the grown model before operators are trained.
    """
    return {
        point.seed: point.loss
        for point in points
        if abs(point.equivalent_steps - place) <= 0.5 and (place or point.step <= 0)
    }


def at_equal_steps(points: Sequence[Point], place: int) -> Losses:
    """Return the losses after `place` normal steps, whatever was spent before."""
    return {point.seed: point.loss for point in points if point.step == place}


def interval(values: Sequence[float]) -> float:
    if len(values) < 2:
        return float("nan")
    quantile = stdtrit(len(values) - 1, 0.975)
    return quantile * statistics.stdev(values) / len(values) ** 0.5


def spread(losses: Losses, *, is_signed: bool = False) -> str:
    """Return mean ± interval; nothing where no seed was measured."""
    if not losses:
        return ""
    values = list(losses.values())
    mean = statistics.mean(values)
    text = f"{mean:+.3f}" if is_signed else f"{mean:.3f}"
    return f"{text} ± {interval(values):.3f}".replace("-", MINUS)


def difference(losses: Losses, others: Sequence[Losses]) -> Losses:
    """Return loss minus that of the best of the others, seed by seed."""
    complete = [other for other in others if other]
    if not losses or not complete:
        return {}
    best = min(complete, key=lambda other: statistics.mean(other.values()))
    return {seed: losses[seed] - best[seed] for seed in losses.keys() & best.keys()}


def table_row(
    target: str,
    arm: str,
    by_arm: dict[str, list[Point]],
    *,
    counted: str,
    measured: Callable[[Sequence[Point], int], Losses],
) -> tuple[str, ...]:
    """Return one line of the table; `counted` says which steps its columns count."""
    controls = [points for points in by_arm.values() if not points[0].has_operators]

    def against(place: int) -> str:
        if not by_arm[arm][0].has_operators:
            return ""
        others = [at_equal_steps(points, place) for points in controls]
        return spread(difference(measured(by_arm[arm], place), others), is_signed=True)

    cells = (spread(measured(by_arm[arm], place)) for place in PLACES)
    return (target, arm, counted, *cells, against(250), against(500))


def table(points: Sequence[Point]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for target in dict.fromkeys(point.target for point in points):
        by_arm: dict[str, list[Point]] = {}
        for point in points:
            if point.target == target:
                by_arm.setdefault(point.arm, []).append(point)
        for arm, found in by_arm.items():
            has_operators = found[0].has_operators
            counted = "as much spent" if has_operators else ""
            rows.append(table_row(target, arm, by_arm, counted=counted, measured=at_equal_flops))
            if has_operators:
                rows.append(
                    table_row(target, arm, by_arm, counted="behind it", measured=at_equal_steps)
                )
    return rows


def main(path: Path) -> None:
    print("| " + " | ".join(HEADER) + " |")
    print("|" + "---|" * len(HEADER))
    for row in table(read_points(path)):
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main(FOLDER / "results.csv")
