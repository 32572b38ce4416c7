"""Turn results.csv into the README's tables and positions.png: `python summarise.py`."""

import statistics
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path.append(str(FOLDER.parents[1]))

from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: E402

from experiments.jobs import Row, rows_of, with_interval  # noqa: E402
from tritter.report.drawing import CYCLE, GREY, new_figure  # noqa: E402

DOMAINS = ("code", "prose")


def main() -> None:
    """Print a row per arm: means over the seeds, and differences paired by seed."""
    rows = rows_of(FOLDER / "results.csv")
    arms = tuple(dict.fromkeys(row["arm"] for row in rows))
    print("| arm | steps | code, long | prose, long | code, short | prose, short |")
    print("|---|---|---|---|---|---|")
    for arm in arms:
        cells = [arm, next(row["steps"] for row in rows if row["arm"] == arm)]
        for window in ("long", "short"):
            for domain in DOMAINS:
                # The control reads long documents in its own windows
                reference = values(rows, "short", domain, "own" if window == "long" else "short")
                is_control = arm == "short"
                own = reference if is_control else values(rows, arm, domain, window)
                text = f"{statistics.mean(own.values()):.3f}"
                change = "" if is_control else f" ({percent(own, reference)})"
                cells.append(text + change)
        print(f"| {' | '.join(cells)} |")
    print("\n| long windows | code, step 0 | prose, step 0 | code, end | prose, end |")
    print("|---|---|---|---|---|")
    for arm in arms:
        cells = [arm]
        for stage in ("expanded", "trained"):
            for domain in DOMAINS:
                found = values(rows, arm, domain, "long", stage)
                reference = values(rows, "unchanged", domain, "long", stage)
                text = f"{statistics.mean(found.values()):.3f}" if found else "-"
                is_compared = found and arm != "unchanged"
                cells.append(f"{text} ({percent(found, reference)})" if is_compared else text)
        print(f"| {' | '.join(cells)} |")
    draw(rows, arms)


def values(
    rows: Iterable[Row], arm: str, domain: str, window: str, stage: str = "trained", place: str = ""
) -> dict[str, float]:
    """Return seed → a loss; `place` is the end of a bucket of positions."""
    return {
        row["seed"]: float(row["loss"])
        for row in rows
        if (row["arm"], row["domain"], row["window"]) == (arm, domain, window)
        and (row["stage"], row["position"]) == (stage, place)
    }


def percent(after: Mapping[str, float], before: Mapping[str, float]) -> str:
    """Return the mean relative change in per cent with its 95 % interval, paired by seed."""
    found = [100 * (after[seed] / before[seed] - 1) for seed in after if seed in before]
    return with_interval(found, ".1f", sign="+") + " %"


def draw(rows: list[Row], arms: Iterable[str]) -> None:
    """Draw the loss by position after training, and that of the base before."""
    figure, panels = new_figure(columns=len(DOMAINS), width=8.4, height=3.8)
    ends = sorted({int(row["position"]) for row in rows if row["position"]})
    for domain, axes in zip(DOMAINS, panels, strict=True):
        lines = [("yarn", "before", "before the expansion", GREY)]
        lines += [(arm, "trained", arm, CYCLE[n]) for n, arm in enumerate(arms)]
        for arm, stage, label, color in lines:
            places = [
                (end, statistics.mean(found.values()))
                for end in ends
                if (found := values(rows, arm, domain, "long", stage, str(end)))
            ]
            axes.plot(*zip(*places, strict=True), "o-", markersize=3, color=color, label=label)
        axes.set_title(domain)
        axes.set_xlabel("end of 64 positions [tokens]" if len(ends) == 16 else "position [tokens]")
    panels[0].set_ylabel("validation loss [nats/token]")
    panels[0].legend(frameon=False, fontsize=8)
    FigureCanvasAgg(figure).print_png(FOLDER / "positions.png")


if __name__ == "__main__":
    main()
