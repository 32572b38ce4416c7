"""Turn results.csv into the README's tables and its plot: `python summarise.py`."""

import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path.append(str(FOLDER))

from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from scipy.special import stdtrit  # noqa: E402
from width_arms import EVALUATED_STEPS, Arm, Sizes  # noqa: E402
from width_moments import PARTS, key_of, read  # noqa: E402

SEEDS = (0, 1, 2)
TOKENS_PER_STEP = Sizes().batch_size * Sizes().sequence_length
Row = dict[str, str]


@dataclass(frozen=True, slots=True)
class Case:
    """One arm over its seeds, on one domain."""

    arm: Arm
    rows: tuple[Row, ...]

    @property
    def name(self) -> str:
        words = [self.arm.growth, self.arm.policy]
        words += [f"rate by {self.arm.factor}"] if self.arm.factor != "none" else []
        words += ["re-warmed"] if self.arm.rewarm_steps and self.arm.domain == "prose" else []
        return ", ".join(words)

    def losses(self, column: str) -> list[float]:
        return [float(row[column]) for row in self.rows if row[column]]


def cases(rows: Sequence[Row], part: str, *, evaluated: str = "prose") -> Iterator[Case]:
    """Yield the arms of a part that have rows, in the part's order."""
    by_key = {key_of(row): row for row in rows if row["evaluated"] == evaluated}
    grouped: dict[Arm, list[Row]] = {}
    for arm in PARTS[part](SEEDS):
        row = by_key.get(key_of(asdict(arm)))
        if row is not None:
            grouped.setdefault(replace(arm, seed=0), []).append(row)
    return (Case(arm, tuple(found)) for arm, found in grouped.items())


def spread(values: Sequence[float]) -> str:
    if len(values) < 2:
        return "".join(f"{value:.4f}" for value in values)
    return f"{statistics.mean(values):.4f} ± {statistics.stdev(values):.4f}"


def paired(case: Case, reference: Case, column: str) -> str:
    """Return the mean difference and its 95 % interval, paired by seed."""
    if case is reference:
        return ""
    before = {row["seed"]: float(row[column] or "nan") for row in reference.rows}
    both = [row for row in case.rows if row[column] and row["seed"] in before]
    changes = [float(row[column]) - before[row["seed"]] for row in both]
    if len(changes) < 2:
        return ", ".join(f"{change:+.4f}" for change in changes)
    error = statistics.stdev(changes) / len(changes) ** 0.5
    half = stdtrit(len(changes) - 1, 0.975) * error
    return f"{statistics.mean(changes):+.4f} [{statistics.mean(changes) - half:+.4f}, " + (
        f"{statistics.mean(changes) + half:+.4f}]"
    )


def print_table(title: str, found: Sequence[Case], *, reference: str) -> None:
    """Print mean ± standard deviation along the training, and differences from one arm."""
    steps = [step for step in EVALUATED_STEPS if step != 175]
    print(f"\n{title}\n\n| arm | " + " | ".join(f"step {step}" for step in steps), end="")
    print(f" | step 100 less {reference} | step 250 less |")
    print("|" + "---|" * (len(steps) + 3))
    against = next((case for case in found if case.name == reference), found[0])
    for case in found:
        cells = [spread(case.losses(f"loss_{step}")) for step in steps]
        cells += [paired(case, against, column) for column in ("loss_100", "loss_250")]
        print(f"| {case.name} | " + " | ".join(cells) + f" | n={len(case.rows)}")


def draw(axes: Axes, found: Sequence[Case], title: str) -> None:
    """Draw mean losses over the tokens, arms told apart by colour and line."""
    lines = {"carry": "-", "zero": "--", "reset_new": ":"}
    for case in found:
        steps = [step for step in EVALUATED_STEPS if case.losses(f"loss_{step}")]
        means = [statistics.mean(case.losses(f"loss_{step}")) for step in steps]
        style = "-." if case.arm.factor != "none" else lines[case.arm.policy]
        millions = [step * TOKENS_PER_STEP / 1e6 for step in steps]
        axes.plot(millions, means, style, label=case.name, linewidth=1.2)
    axes.set_title(title, fontsize=9)
    axes.set_xlabel("tokens after the growth [million]", fontsize=8)
    axes.tick_params(labelsize=7)
    axes.legend(frameon=False, fontsize=6)


def plot(rows: Sequence[Row], path: Path) -> None:
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    panels = figure.subplots(1, 3)
    draw(panels[0], list(cases(rows, "moments")), "moments, same distribution")
    inits = list(cases(rows, "inits"))
    draw(panels[1], inits, "inits, same distribution")
    draw(panels[2], list(cases(rows, "domain", evaluated="code")), "inits, new domain")
    exact = next(case for case in inits if case.arm.growth == "fresh")
    panels[1].set_ylim(top=statistics.mean(exact.losses("loss_0")) + 0.1)
    panels[0].set_ylabel("validation loss [nats per token]", fontsize=8)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110)


def print_steps(rows: Sequence[Row]) -> None:
    """Print how far one step moves the function, mean ± standard deviation over seeds."""
    found: dict[tuple[str, ...], list[float]] = {}
    for row in rows:
        key = (row["growth"], row["factor"], row["learning_rate"])
        found.setdefault(key, []).append(float(row["moved"]))
    print("\none step\n")
    for key, values in found.items():
        print("| " + " | ".join((*key, spread(values))) + " |")


def main() -> None:
    rows = read(FOLDER / "results.csv")
    moments = [*cases(rows, "moments"), *cases(rows, "beginning")]
    for growth in ("net2net", "fresh", "ungrown"):
        chosen = [case for case in moments if case.arm.growth == growth]
        print_table(f"A {growth}", chosen, reference=f"{growth}, carry")
    carried = [case for case in moments if case.name == "ungrown, carry"]
    print_table("B same", [*cases(rows, "inits"), *carried], reference="fresh, carry")
    for evaluated in ("code", "prose"):
        found = list(cases(rows, "domain", evaluated=evaluated))
        print_table(f"B domain: {evaluated}", found, reference="fresh, zero")
    print_steps(read(FOLDER / "function_step.csv"))
    plot(rows, FOLDER / "figures" / "losses.png")


if __name__ == "__main__":
    main()
