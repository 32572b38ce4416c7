"""Plots of a finished run, from its summary and its curves alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tritter.report.drawing import BLUE, CYCLE, GREY, ORANGE, PURPLE, new_figure, wrap_text
from tritter.report.experts import experts_figure
from tritter.report.growth import growth_figure, mark_growth
from tritter.report.matrix import matrix_figure
from tritter.report.rows import DomainRow, change_text, domain_rows, unit_of
from tritter.report.summary import MAX_NUMBER, Score, Summary, WindowsRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_STAGES = ("before", "after\nexpansion", "after\ntraining")
SMOOTHED_FROM_POINTS = 40
_GROWTH_FLOPS = "growth/flops"
_MAX_DOMAINS = 12  # with a panel each
_MODELS = {"source_long": "source", "expanded": "after expansion", "final": "after training"}


@dataclass(frozen=True, slots=True)
class Curve:
    """One metric over the steps at which it was logged."""

    name: str
    steps: tuple[int, ...]
    values: tuple[float, ...]


def plot_run(
    summary: Summary,
    curves: Sequence[Curve],
    folder: Path,
    *,
    earlier: Sequence[Sequence[Curve]] = (),
    control: Sequence[Curve] = (),
) -> list[Path]:
    """Draw the figures that the run has data for, and return their files (PNG, 150 dpi).

    Args:
        summary: The run.
        curves: Curves of the last training.
        folder: Folder of the files; created if missing.
        earlier: Curves of the previous rounds.
        control: Curves of the control (not grown).
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    folder.mkdir(parents=True, exist_ok=True)
    rows = [row for row in domain_rows(summary) if not row.change.in_points]
    attempt, growth, experts = summary.last_attempt, summary.growth, summary.experts
    matrix, end = summary.matrix, attempt.steps
    figures = {
        "domains.png": _domains_figure(rows, *unit_of([summary])),
        "forgetting.png": _forgetting_figure(
            rows,
            [*earlier, curves],
            control,
            borders=summary.borders,
            born=() if growth is None else growth.event_steps,
            is_grown=bool(attempt.expansion),
        ),
        "training.png": _training_figure(curves),
        "retention_and_gain.png": _tradeoff_figure(rows),
        "growth.png": None,
        "experts.png": None,
        "positions.png": None if summary.windows is None else positions_figure(summary.windows),
        "matrix.png": None if matrix is None else matrix_figure(matrix),
    }
    if growth is not None:
        figures["growth.png"] = growth_figure(growth, end=end, end_flops=last_flops(curves))
    if experts is not None:
        figures["experts.png"] = experts_figure(experts, end=end, borders=summary.borders)
    written = []
    for name, figure in figures.items():
        if figure is not None:
            FigureCanvasAgg(figure).print_png(folder / name)  # savefig would draw it twice
            written.append(folder / name)
    return written


def last_flops(curves: Sequence[Curve]) -> float | None:
    """Return the last logged FLOPs of a training run with growth."""
    logged = (curve.values[-1] for curve in reversed(curves) if curve.name == _GROWTH_FLOPS)
    last = next(logged, math.nan)
    return last if 0 < last < MAX_NUMBER else None


def curves_of(rows: Sequence[Mapping[str, str]]) -> tuple[Curve, ...]:
    """Return every loss in rows of a metrics.csv, and the FLOPs of a training run with growth.

    Step -1 is the model before its expansion.
    """
    table = [row for row in rows if row.get("step")]
    found = dict.fromkeys(name for row in table for name in row)
    names = [name for name in found if name and (name.endswith("/loss") or name == _GROWTH_FLOPS)]
    curves = []
    for name in names:
        rows = [row for row in table if row.get(name)]
        steps = tuple(int(float(row["step"])) for row in rows)
        if steps:
            curves.append(Curve(name, steps, tuple(float(row[name]) for row in rows)))
    return tuple(curves)


def _domains_figure(
    rows: Sequence[DomainRow], unit: str, in_unit: Callable[[Score | None], Score | None]
) -> Figure | None:
    """Draw one panel per domain, each on its own scale, so that a rise of 1 % is visible."""
    domains = [row for row in rows if not row.is_control and row.before.loss is not None]
    if not domains:
        return None
    figure, panels = new_figure(columns=len(domains), width=1.2 + 3.2 * len(domains), height=3.6)
    for row, axes in zip(domains, panels, strict=True):
        scores = tuple(map(in_unit, (row.before, row.expanded, row.trained)))
        _draw_stages(axes, scores, label="grown", color=BLUE)
        for control in rows:
            if control.is_control and control.domain == row.domain:
                scores = (in_unit(control.before), None, in_unit(control.trained))
                _draw_stages(axes, scores, label="control (not grown)", color=ORANGE)
        is_known = row.change.value is not None
        change = f"{change_text(row.change)} %" if is_known else "change unknown"
        axes.set_title(wrap_text(f"{row.domain} ({row.role}): {change}", 40), fontsize=10)
        axes.set_xticks(range(len(_STAGES)), _STAGES)
        axes.set_xlim(-0.35, 2.35)
        axes.margins(y=0.15)
    panels[0].set_ylabel(f"validation loss [nats/{unit}]")
    if any(row.is_control for row in rows):
        panels[-1].legend(frameon=False, fontsize=8)
    note = "bars: one standard error over documents; the changes above are paired by document"
    figure.supxlabel(note, fontsize=7, color=GREY)
    return figure


def _draw_stages(axes: Axes, scores: Sequence[Score | None], *, label: str, color: str) -> None:
    known = [
        (position, score.loss, score.standard_error or 0.0)
        for position, score in enumerate(scores)
        if score is not None and score.loss is not None
    ]
    is_control = color == ORANGE
    axes.errorbar(
        # Next to each other, so that bars do not overlap
        [position + 0.06 * is_control for position, _, _ in known],
        [loss for _, loss, _ in known],
        yerr=[error for _, _, error in known],
        color=color,
        marker="s" if is_control else "o",
        linestyle="--" if is_control else "-",
        capsize=3,
        label=label,
    )


def positions_figure(record: WindowsRecord, *, title: str = "") -> Figure | None:
    """Draw one panel per domain: the loss by position in long windows, for each model."""
    if not record.positions:
        return None
    domains = list(record.positions.items())[:_MAX_DOMAINS]
    width = 1.2 + 3.2 * len(domains)
    figure, panels = new_figure(columns=len(domains), width=width, height=3.8)
    for (domain, models), axes in zip(domains, panels, strict=True):
        colors = zip(_MODELS.items(), (GREY, PURPLE, BLUE), strict=True)
        for (name, label), color in colors:
            if (found := models.get(name)) is not None:
                begins = [0, *found.end[:-1]]
                middles = [(a + b) / 2 for a, b in zip(begins, found.end, strict=True)]
                axes.plot(middles, found.loss, "o-", color=color, markersize=3, label=label)
        axes.axvline(record.source_length, color=ORANGE, linestyle=":", label="context of source")
        axes.set_title(wrap_text(f"{title} {domain}".strip(), 40), fontsize=10)
        axes.set_xlabel("position in the window [tokens]")
    panels[0].set_ylabel("validation loss [nats/token]")
    lines = dict(zip(*reversed(panels[0].get_legend_handles_labels()), strict=True))
    place = "outside upper center"
    figure.legend(lines.values(), lines, loc=place, ncols=4, frameon=False, fontsize=8)
    return figure


@dataclass(frozen=True, slots=True)
class _RoundCurve:
    """A domain's validation loss during one round of a run.

    Args:
        before: Loss before the expansion; None without an expansion.
        first_step: Step at which the round began, counted over all rounds.
        steps: Steps of the losses, counted over all rounds.
        values: The losses.
    """

    before: float | None
    first_step: int
    steps: tuple[int, ...]
    values: tuple[float, ...]


def _forgetting_figure(
    rows: Sequence[DomainRow],
    rounds: Sequence[Sequence[Curve]],
    control: Sequence[Curve],
    *,
    borders: Sequence[int],
    born: Sequence[int],
    is_grown: bool,
) -> Figure | None:
    """Draw one panel per domain: the loss before and after the expansion, and during training.

    Args:
        rows: The domains.
        rounds: Curves of each round.
        control: Curves of the control.
        borders: Steps at which the next task began.
        born: Steps of the last round at which neurons were born.
        is_grown: The model was expanded.
    """
    grown = [(row, _round_curves(row, rounds)) for row in rows if not row.is_control]
    shown = [(row, courses) for row, courses in grown if courses]
    if not shown:
        return None
    figure, panels = new_figure(columns=len(shown), width=1.2 + 3.2 * len(shown), height=4.0)
    for (row, courses), axes in zip(shown, panels, strict=True):
        level = _draw_rounds(axes, courses, is_grown=is_grown)
        for course in _round_curves(row, [control]):
            label = "control (not grown)"
            axes.plot(course.steps, course.values, "s--", color=ORANGE, markersize=3, label=label)
        for step in borders:
            axes.axvline(step, color=GREY, linestyle="-.", linewidth=1, label="next task")
        mark_growth(axes, [courses[-1].first_step + step for step in born])
        axes.set_title(wrap_text(f"{row.domain} ({row.role})", 40), fontsize=10)
        axes.set_xlabel("training step")
        axes.margins(y=0.15)
        # The loss before the first step is left of it, and has no tick
        axes.set_xticks([t for t in axes.get_xticks() if 0 <= t <= axes.get_xlim()[1]])
    panels[0].set_ylabel("validation loss [nats/token]")
    lines = dict(zip(*reversed(panels[0].get_legend_handles_labels()), strict=True))
    figure.legend(
        lines.values(), lines, loc="outside upper center", ncols=4, frameon=False, fontsize=8
    )
    note = f"loss on a fixed validation subset; dotted: {level}"
    figure.supxlabel(note, fontsize=7, color=GREY)
    return figure


def _round_curves(row: DomainRow, rounds: Sequence[Sequence[Curve]]) -> list[_RoundCurve]:
    """Return a domain's losses in each round; steps are counted over all rounds."""
    courses: list[_RoundCurve] = []
    for curve in (each for curves in rounds for each in curves):
        if curve.name == f"eval/{row.domain}/loss" and curve.steps[-1] >= 0:
            first_step = courses[-1].steps[-1] if courses else 0
            num_before = sum(step < 0 for step in curve.steps)
            before = curve.values[0] if num_before else None
            steps = tuple(first_step + step for step in curve.steps[num_before:])
            courses.append(_RoundCurve(before, first_step, steps, curve.values[num_before:]))
    return courses


def _draw_rounds(axes: Axes, courses: Sequence[_RoundCurve], *, is_grown: bool) -> str:
    """Draw all rounds and the level of the loss before them; return the label of the level."""
    first = courses[0]
    gap = 0.08 * max(courses[-1].steps[-1], 1)  # between the first step and the loss before it
    for number, course in enumerate(courses):
        label = "grown" if is_grown else "trained"
        axes.plot(course.steps, course.values, "o-", color=BLUE, markersize=3, label=label)
        if course.before is None:
            continue
        start = course.steps[0] - (gap if number == 0 else 0)
        jump = [start, course.steps[0]], [course.before, course.values[0]]
        axes.plot(*jump, color=BLUE, linestyle=":", linewidth=1)
        _mark_expansion(axes, (start + course.steps[0]) / 2)
    if first.before is None:
        if is_grown:  # older runs did not evaluate the level
            _mark_expansion(axes, 0)
        axes.axhline(first.values[0], color=GREY, linestyle=":", linewidth=1)
        return "loss at the first step"
    axes.plot(-gap, first.before, "D", color=GREY, markersize=5, label="before the expansion")
    axes.axhline(first.before, color=GREY, linestyle=":", linewidth=1)
    return "loss before the expansion"


def _mark_expansion(axes: Axes, step: float) -> None:
    axes.axvline(step, color=PURPLE, linestyle="--", linewidth=1, label="expansion")


def _training_figure(curves: Sequence[Curve]) -> Figure | None:
    """Draw the training loss, and below it the penalties of forgetting mitigation."""
    losses = [curve for curve in curves if curve.name.startswith("train/")]
    penalties = [curve for curve in curves if curve.name.startswith("forgetting/")]
    groups = [group for group in (losses, penalties) if group]
    if not groups:
        return None
    figure, panels = new_figure(rows=len(groups), width=6.4, height=0.8 + 2.8 * len(groups))
    for group, axes in zip(groups, panels, strict=True):
        for index, curve in enumerate(group):
            color = CYCLE[index % len(CYCLE)]
            if len(curve.values) < SMOOTHED_FROM_POINTS:
                axes.plot(
                    curve.steps, curve.values, "o-", color=color, markersize=3, label=curve.name
                )
                continue
            axes.plot(curve.steps, curve.values, color=color, alpha=0.25, linewidth=0.8)
            window = len(curve.values) // 20
            label = f"{curve.name} (mean of {window} points)"
            mean = running_mean(curve.values, window)
            first = window // 2  # centred: a trailing mean would lag behind a falling loss
            axes.plot(curve.steps[first : first + len(mean)], mean, color=color, label=label)
        axes.set_ylabel("penalty" if group is penalties else "loss [nats/token]")
        axes.legend(frameon=False, fontsize=8)
    panels[-1].set_xlabel("training step")
    return figure


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Return the means of `window` consecutive values; shorter than `values` by `window` - 1."""
    import numpy as np

    windows = np.lib.stride_tricks.sliding_window_view(np.asarray(values), window)
    return [float(mean) for mean in windows.mean(axis=1)]


def _tradeoff_figure(rows: Sequence[DomainRow]) -> Figure | None:
    """Draw forgetting on the old domains against gain on the new ones: bottom right is best."""
    pairs = [
        (old, new)
        for old in rows
        for new in rows
        if (old.role, new.role) == ("old", "new") and old.is_control == new.is_control
        if old.change.value is not None and new.change.value is not None
    ]
    if not pairs:
        return None
    figure, (axes,) = new_figure(width=5.6, height=4.2)
    for old, new in pairs:
        assert old.change.value is not None and new.change.value is not None
        kind = "control (not grown)" if old.is_control else "grown"
        axes.errorbar(
            -100 * new.change.value,
            100 * old.change.value,
            # The gain is the fall: its lower error is the change's upper one
            xerr=_errors(new.change.above, new.change.below),
            yerr=_errors(old.change.below, old.change.above),
            color=ORANGE if old.is_control else BLUE,
            marker="s" if old.is_control else "o",
            linestyle="none",
            capsize=3,
            label=wrap_text(f"{kind}: {old.domain} against {new.domain}"),
        )
    for bound in sorted({old.bound for old, _ in pairs if old.bound is not None}):
        axes.axhline(100 * bound, color=GREY, linestyle="--", linewidth=1)
        axes.annotate(
            f"bound of the gate {100 * bound:+.3g} %",
            xy=(0.99, 100 * bound),
            xycoords=("axes fraction", "data"),
            xytext=(0, 3),
            textcoords="offset points",
            ha="right",
            fontsize=8,
            color=GREY,
        )
    axes.axhline(0, color=GREY, linewidth=0.6)
    axes.axvline(0, color=GREY, linewidth=0.6)
    axes.margins(0.2)
    axes.set_xlabel("gain: decrease of the loss on the new domain [% per byte]")
    axes.set_ylabel("forgetting: increase of the loss\non the old domain [% per byte]")
    figure.legend(loc="outside upper center", frameon=False, fontsize=8)
    return figure


def _errors(below: float | None, above: float | None) -> list[list[float]]:
    """Return two error bars in per cent for matplotlib; an unknown side has none."""
    return [[100 * (below or 0.0)], [100 * (above or 0.0)]]
