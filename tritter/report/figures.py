"""Figures over several runs and groups: panels that fit a phone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from operator import methodcaller
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal

from markupsafe import Markup

from tritter.report.drawing import CYCLE, GREY, new_figure, panel, wrapped
from tritter.report.experts import experts_panels
from tritter.report.growth import (
    draw_neurons,
    draw_parameters,
    draw_pressure,
    flops_course,
    label_flops,
    mark_growth,
)
from tritter.report.matrix import matrix_figure
from tritter.report.plots import SMOOTHED_FROM_POINTS, Curve, last_flops, running_mean
from tritter.report.rows import Role
from tritter.report.runs import Group, Interval, Run, with_controls
from tritter.report.summary import LARGEST

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_GROUPS = 40  # in figures with a row per group; the table of the page has all
MOST_PANELS = 24
MOST_NAMED = 60  # in the legend
_MOST_MARKED = 60  # expansions and tasks of one figure
_MARKERS = "osD^vPX*<>"
WITH_LEGEND = ("tradeoff", "losses", "growth")


@dataclass(frozen=True, slots=True)
class Line:
    """A group and its style; the pair of colour and marker is unique for 60 groups."""

    group: Group
    color: str
    marker: str

    @property
    def filling(self) -> str:
        return "white" if self.group.is_control else self.color

    @property
    def style(self) -> str:
        return "--" if self.group.is_control else "-"

    @property
    def label(self) -> str:
        number = len(self.group.seeds)
        return self.group.name if number == 1 else f"{self.group.name} ({number} seeds)"


def lines_of(groups: Sequence[Group]) -> list[Line]:
    """Return the groups and their controls, each with a style; a control has that of its group."""
    lines: list[Line] = []
    number = -1
    for group in with_controls(groups):
        number += not group.is_control
        color, marker = CYCLE[number % len(CYCLE)], _MARKERS[number % len(_MARKERS)]
        lines.append(Line(group, color, marker))
    return lines


def reference_of(lines: Sequence[Line]) -> Group:
    """Return the group that all others are compared with: the first control, else the first."""
    return next((line.group for line in lines if line.group.is_control), lines[0].group)


def swatch(line: Line) -> Markup:
    """Return the mark of a group as SVG; it holds numbers and colours only."""
    import numpy as np
    from matplotlib.markers import MarkerStyle
    from matplotlib.transforms import Affine2D

    style = MarkerStyle(line.marker)
    path = style.get_path().transformed(style.get_transform() + Affine2D().scale(9, -9))
    vertices = np.asarray(path.to_polygons()[0], dtype=float).tolist()
    points = " ".join(f"{x:.2f},{y:.2f}" for x, y in vertices)
    dash = ' stroke-dasharray="4 3"' if line.group.is_control else ""
    return Markup(
        f'<svg class="swatch" viewBox="-14 -7 28 14"><line x1="-13" x2="13" '
        f'stroke="{line.color}" stroke-width="1.6"{dash}/><polygon points="{points}" '
        f'fill="{line.filling}" stroke="{line.color}" stroke-width="1.2"/></svg>'
    )


def legend_figure(lines: Sequence[Line]) -> Figure:
    """Return the legend of all figures as a figure of its own."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=line.color, linestyle=line.style, label=wrapped(line.label),
               markersize=5, marker=line.marker, markerfacecolor=line.filling)
        for line in lines[:MOST_NAMED]
    ]  # fmt: skip
    rows = sum(1 + str(handle.get_label()).count("\n") for handle in handles)
    figure, (axes,) = new_figure(width=4.8, height=0.2 + 0.17 * rows)
    axes.set_axis_off()
    figure.legend(handles=handles, loc="center left", frameon=False, fontsize=7.5)
    return figure


def figures(groups: Sequence[Group]) -> dict[str, list[Figure]]:
    """Return the figures that the runs have data for, by topic."""
    lines = lines_of(groups)
    runs = [run for group in groups for run in group.runs]
    means = lines[:MOST_GROUPS]
    domains = domains_of([line.group for line in means])
    is_seeded = has_seeds(lines)
    changes, differences, reference = [], [], reference_of(lines)
    for domain, role in domains:
        found = [(line, line.group.change(domain)) for line in means]
        title = f"{domain} ({role}): change of the loss per byte [%]"
        changes.append(_bars_of(found, title=title, scale=100, has_bounds=not is_seeded))
        others = [line for line in means if line.group is not reference]
        found = [(line, line.group.difference(reference, domain)) for line in others]
        title = f"{domain} ({role}): loss per byte relative to {reference.name} [%]"
        if is_seeded:
            differences.append(_bars_of(found, title=title, scale=100))
    skilled = [(run, run.summary.experts) for run in runs if run.summary.experts is not None]
    experts = [
        figure
        for run, record in skilled[:MOST_PANELS]
        for figure in experts_panels(
            record,
            name=run.name,
            end=run.last_steps,
            borders=run.summary.borders,
            is_alone=len(skilled) == 1,
        )
    ]
    matrices = []
    learned = [(run.name, run.summary.matrix) for run in runs if run.summary.matrix]
    for name, matrix in learned[:MOST_PANELS]:
        figure = matrix_figure(matrix)
        figure.axes[0].set_title(wrapped(name), fontsize=9)
        matrices.append(figure)
    made = {
        "tradeoff": _tradeoff(lines),
        "differences": [figure for figure in differences if figure is not None],
        "changes": [figure for figure in changes if figure is not None],
        "losses": _losses(lines),
        "cost": _costs(means),
        "growth": _growth(lines),
        "experts": experts,
        "matrix": matrices,
    }
    return {name: found for name, found in made.items() if found}


def has_seeds(lines: Sequence[Line]) -> bool:
    return any(len(line.group.runs) > 1 for line in lines)


def domains_of(groups: Sequence[Group], role: str | None = None) -> list[tuple[str, Role]]:
    """Return domains that have losses, each with its role."""
    rows = (row for group in groups for run in group.runs for row in run.losses)
    found = dict.fromkeys((row.domain, row.role) for row in rows if role in (None, row.role))
    return list(found)[:MOST_PANELS]


def _tradeoff(lines: Sequence[Line]) -> list[Figure]:
    """Draw forgetting against gain, each as the mean over the domains of its role."""
    points = []
    for line in lines:
        forgetting, gain = (_mean_change(line.group, role) for role in ("old", "new"))
        if forgetting is not None and gain is not None:
            points.append((line, gain, forgetting))
    if not points:
        return []
    figure, axes = panel(height=3.8)
    is_seeded = has_seeds(lines)
    for line, gain, forgetting in points:
        pairs = list(zip(gain.values, forgetting.values, strict=False))
        if len(gain.values) > 1:
            mark_seeds = partial(axes.plot, marker=line.marker, color=line.color, linestyle="none")
            for x, y in pairs:
                mark_seeds(-100 * x, 100 * y, markerfacecolor=line.filling, alpha=0.4, ms=4)
        if gain.is_of_seeds:
            continue
        is_bounded = len(gain.values) > 1 or not is_seeded
        below, above = _bars(gain) if is_bounded else (0.0, 0.0)
        axes.errorbar(
            -100 * gain.value,
            100 * forgetting.value,
            xerr=[[100 * above], [100 * below]],  # the gain is the fall
            yerr=[[100 * side] for side in (_bars(forgetting) if is_bounded else (0.0, 0.0))],
            color=line.color,
            marker=line.marker,
            markerfacecolor=line.filling,
            linestyle="none",
            elinewidth=0.9,
            capsize=2.5,
        )
    front = _front([(-gain.value, forgetting.value) for _, gain, forgetting in points])
    axes.plot(*zip(*((100 * x, 100 * y) for x, y in front), strict=True), color=GREY, ls=":", lw=1)
    axes.axhline(0, color=GREY, linewidth=0.8)
    axes.margins(0.1)
    axes.set_xlabel("gain: decrease of the loss on new domains [% per byte]")
    axes.set_ylabel("forgetting: increase of the loss\non old domains [% per byte]")
    return [figure]


def _front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the Pareto front of points (gain, forgetting), by gain."""
    best: list[tuple[float, float]] = []
    for gain, forgetting in sorted(points, key=lambda point: (-point[0], point[1])):
        if not best or forgetting < best[-1][1]:
            best.append((gain, forgetting))
    return best


def _mean_change(group: Group, role: str) -> Interval | None:
    """Return the mean change over the domains of a role: of each run, then over the seeds."""
    domains = domains_of([group], role)
    if len(domains) == 1:
        return group.change(domains[0][0])

    def of(run: Run) -> float | None:
        values = [row.change.value for row in run.losses if row.role == role]
        known = [value for value in values if value is not None]
        return sum(known) / len(known) if known and len(known) == len(values) else None

    return group.mean(of)


def _losses(lines: Sequence[Line]) -> list[Figure]:
    """Draw a panel per domain, one of the training loss and one of the base's pretraining."""
    named = {
        f"eval/{domain}/loss": f"{domain} ({role}): validation loss"
        for domain, role in domains_of([line.group for line in lines])
    }
    named["train/loss"] = "training loss"
    runs = [run for line in lines for run in line.group.runs]
    is_in_tokens = all(run.tokens_per_step for run in runs)
    made = [_course(lines, name, title, is_in_tokens) for name, title in named.items()]
    bases: dict[tuple[Curve, float], None] = {}  # each once: runs of a sweep share them
    for run in runs:
        scale = _scale(run, is_in_tokens=is_in_tokens)
        bases |= {(each, scale): None for each in run.pretraining if each.name == "train/loss"}
    if bases:
        figure, axes = panel(height=2.7)
        for curve, scale in bases:
            _draw(axes, curve, scale, Line(Group("base", ()), GREY, "o"))
        number = "the base" if len(bases) == 1 else f"{len(bases)} bases"
        title = f"pretraining loss of {number}"
        _label_course(axes, title, is_in_tokens=is_in_tokens)
        made.append(figure)
    return [figure for figure in made if figure is not None]


def _course(lines: Sequence[Line], name: str, title: str, is_in_tokens: bool) -> Figure | None:
    """Draw one loss of all runs, and mark expansions, growth and the start of tasks."""
    figure, axes = panel(height=2.9)
    is_empty = True
    is_alone = sum(len(line.group.runs) for line in lines if not line.group.is_control) == 1
    marked: dict[tuple[float, str], None] = {}
    for line in lines:
        courses: list[_Course] = []
        for run in line.group.runs:
            scale = _scale(run, is_in_tokens=is_in_tokens)
            for curve in (each for each in run.curves if each.name == name):
                is_empty = False
                courses.append(_draw(axes, curve, scale, line, is_pale=len(line.group.runs) > 1))
                marked |= dict.fromkeys((scale * step, "expansion") for step in run.expansions)
                marked |= dict.fromkeys((scale * step, "task") for step in run.summary.borders)
                births = [scale * step for step in run.births]
                mark_growth(axes, births, color=line.color, is_alone=is_alone)
        _draw_mean(axes, courses, line)
    if is_empty:
        return None
    for place, kind in list(marked)[:_MOST_MARKED]:
        color, style = ("black", "--") if kind == "expansion" else (GREY, "-.")
        axes.axvline(place, color=color, linestyle=style, linewidth=0.8)
    _label_course(axes, title, is_in_tokens=is_in_tokens)
    return figure


def _scale(run: Run, *, is_in_tokens: bool) -> float:
    return (run.tokens_per_step or 1) / 1000 if is_in_tokens else 1.0


def _label_course(axes: Axes, title: str, *, is_in_tokens: bool) -> None:
    axes.set_title(wrapped(title), fontsize=9)
    axes.set_xlabel("training tokens [thousand]" if is_in_tokens else "training step")
    axes.set_ylabel("loss [nats/token]")


@dataclass(frozen=True, slots=True)
class _Course:
    """A curve as it is drawn, a running mean if it has many points."""

    positions: tuple[float, ...]
    values: tuple[float, ...]


def _draw(axes: Axes, curve: Curve, scale: float, line: Line, *, is_pale: bool = False) -> _Course:
    """Draw a curve; below a running mean its points are pale.

    Args:
        axes: The panel.
        curve: A loss over the steps; step -1 is the model before its expansion.
        scale: Step → position.
        line: The style.
        is_pale: The curve is one of several seeds.
    """
    positions = [scale * step for step in curve.steps]
    values = [value if abs(value) < LARGEST else float("nan") for value in curve.values]
    plot = partial(axes.plot, color=line.color, linestyle=line.style)
    alpha, width = (0.35, 0.8) if is_pale else (1.0, 1.3)
    if len(values) < SMOOTHED_FROM_POINTS:
        marks: dict[str, Any] = {
            "marker": line.marker,
            "markerfacecolor": line.filling,
            "markersize": 3,
        }
        plot(positions, values, alpha=alpha, linewidth=width, **({} if is_pale else marks))
        return _Course(tuple(positions), tuple(values))
    window = len(values) // 20
    mean = running_mean(values, window)
    centres = positions[window // 2 : window // 2 + len(mean)]
    if not is_pale:
        plot(positions, values, alpha=0.2)
    plot(centres, mean, alpha=alpha, linewidth=width)
    return _Course(tuple(centres), tuple(mean))


def _draw_mean(axes: Axes, courses: Sequence[_Course], line: Line) -> None:
    """Draw the mean of several seeds' curves over the positions that all of them have."""
    if len(courses) < 2:
        return
    first, *others = (dict(zip(each.positions, each.values, strict=True)) for each in courses)
    shared = [x for x in first if all(x in other for other in others)]
    means = [fmean([first[x], *(other[x] for other in others)]) for x in shared]
    marker = line.marker if len(shared) < SMOOTHED_FROM_POINTS else ""
    axes.plot(shared, means, color=line.color, linestyle=line.style, linewidth=1.6, marker=marker,
              markerfacecolor=line.filling, markersize=4)  # fmt: skip


def _costs(lines: Sequence[Line]) -> list[Figure]:
    """Draw FLOPs and seconds of the training, group by group."""
    from matplotlib.ticker import EngFormatter

    parts: tuple[tuple[Literal["flops", "seconds"], str], ...] = (
        ("flops", "FLOPs"),
        ("seconds", "seconds"),
    )
    made = []
    for of, unit in parts:
        means = [(line, line.group.mean(methodcaller("cost", of))) for line in lines]
        figure = _bars_of(means, title=f"training cost [{unit}]", scale=1)
        if figure is not None:
            figure.axes[0].set_xlim(left=0)
            if of == "flops":
                figure.axes[0].xaxis.set_major_formatter(EngFormatter(sep=" "))
            made.append(figure)
    return made


def _growth(lines: Sequence[Line]) -> list[Figure]:
    """Draw the neurons of each run with growth, the pressure of a single one, and the cost."""
    found = [
        (line, run, run.summary.growth)
        for line in lines
        for run in line.group.runs
        if run.summary.growth is not None
    ]
    made = []
    for _, run, growth in found[:MOST_PANELS]:
        drawn = [draw_neurons] if len(found) > 1 else [draw_neurons, draw_pressure]
        for draw in drawn:
            figure, axes = panel(height=2.9)
            draw(axes, growth, end=run.last_steps)
            what = axes.get_title()
            axes.set_title(wrapped(f"{run.name}: {what}"), fontsize=9)
            if draw is draw_neurons and growth.events:
                figure.legend(loc="outside lower left", ncols=2, frameon=False, fontsize=7.5)
            made.append(figure)
    if not found:
        return made
    figure, axes = panel(height=2.9)
    is_empty = True
    for line, run, growth in found:
        course = flops_course(growth, end_flops=last_flops(run.curves))
        if course[0]:
            draw_parameters(axes, *course, color=line.color, marker=line.marker)
            is_empty = False
    if not is_empty:
        label_flops(axes)
        axes.set_title("parameters over the training FLOPs", fontsize=9)
        made.append(figure)
    return made


def _bars_of(
    found: Sequence[tuple[Line, Interval | None]],
    *,
    title: str,
    scale: float,
    has_bounds: bool = True,
) -> Figure | None:
    """Draw a row per group, its name above its seeds and interval.

    Args:
        found: Groups and their numbers.
        title: Title of the panel, with the unit.
        scale: Factor of the numbers.
        has_bounds: Draw the bounds of groups with one run, which are over documents.
    """
    rows = [(line, interval) for line, interval in found if interval is not None]
    if not rows:
        return None
    labels = [wrapped(line.label) for line, _ in rows]
    heights = [0.27 + 0.15 * (1 + label.count("\n")) for label in labels]  # inches
    figure, axes = panel(height=0.8 + sum(heights))
    bottoms = [*accumulate(heights)]
    for bottom, label, (line, interval) in zip(bottoms, labels, rows, strict=True):
        style: dict[str, Any] = {"color": line.color, "marker": line.marker}
        style["markerfacecolor"] = line.filling
        values = [scale * value for value in interval.values]
        if interval.is_of_seeds:
            axes.plot(values, [bottom] * len(values), ls="none", **style)
        elif len(values) > 1:  # below the bar
            axes.plot(values, [bottom + 0.09] * len(values), ".", color=line.color, alpha=0.5, ms=5)
        if not interval.is_of_seeds:
            is_bounded = has_bounds or len(values) > 1
            sides = _bars(interval) if is_bounded else (0.0, 0.0)
            bars = [[scale * side] for side in sides]
            axes.errorbar(scale * interval.value, bottom, xerr=bars, **style, capsize=3)
        axes.annotate(
            label,
            xy=(0, bottom),
            xycoords=("axes fraction", "data"),
            xytext=(2, 7),
            textcoords="offset points",
            fontsize=7.5,
            bbox={"facecolor": "white", "alpha": 0.8, "pad": 0.5, "linewidth": 0},
        )
    axes.set_yticks([])
    axes.set_ylim(bottoms[-1] + 0.2, 0)
    axes.axvline(0, color=GREY, linewidth=0.8)
    axes.grid(axis="x", alpha=0.25)
    axes.set_title(wrapped(title), fontsize=9)
    return figure


def _bars(interval: Interval) -> tuple[float, float]:
    """Return the distances of the bounds from the value; 0 for an unknown one."""
    below = 0.0 if interval.lower is None else max(0.0, interval.value - interval.lower)
    above = 0.0 if interval.upper is None else max(0.0, interval.upper - interval.value)
    return below, above
