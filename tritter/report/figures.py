"""Figures: the plots of one run as files, and those of several runs for the page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate, product
from operator import methodcaller
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal

from tritter.report.compared import Comparison
from tritter.report.drawing import (
    BLUE,
    CYCLE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    new_figure,
    panel,
    wrap_text,
)
from tritter.report.rows import DomainRow, LossUnit, Role
from tritter.report.runs import Curve, EndedRun, Group, Interval
from tritter.report.summary import MAX_NUMBER, Score, Summary, WindowsRecord
from tritter.report.topics import TOPICS, topics_of
from tritter.report.topics.topic import Topic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MAX_DOMAINS = 12  # of one figure, with a panel each
_MAX_MARKED = 60  # expansions and tasks of one figure
_SMOOTHED_FROM_POINTS = 40
_WIDEST_LABEL = 72  # characters that fill the width of a panel
_MAX_TALL = 20  # marks of the height of the panel; if there are more, they are short
_GAP = 0.06  # between the first step and the loss before it, as a share of all steps
_STAGE_NAMES = ("before", "after\nexpansion", "after\ntraining")
_MODELS = {"source_long": "source", "expanded": "after expansion", "final": "after training"}


def plot_run(
    summary: Summary, curves: Sequence[Curve], folder: Path, *, control: Sequence[Curve] = ()
) -> list[Path]:
    """Draw the figures that the run has data for, and return their files (PNG, 150 dpi).

    Args:
        summary: The run.
        curves: Curves of the last training, or of all rounds.
        folder: Folder of the files; created if missing.
        control: Curves of the control (not grown).
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    folder.mkdir(parents=True, exist_ok=True)
    run = EndedRun("", summary, {}, tuple(curves), tuple(control))
    name = "grown" if summary.last_attempt.expansion else "trained"
    styles = ((BLUE, "o", "-"), (ORANGE, "s", "--"))
    groups = [
        replace(group, color=color, marker=marker, style=style)
        for group, (color, marker, style) in zip(
            Group.with_controls([Group(name, (run,))]), styles, strict=False
        )
    ]
    rows = [row for row in (*run.rows, *run.control_rows) if not row.change.in_points]
    figures = {
        "domains.png": _domains_figure(rows, LossUnit([summary])),
        "forgetting.png": _forgetting_figure(groups),
        "training.png": _training_figure(curves),
        "retention_and_gain.png": next(iter(_tradeoff(groups, has_legend=True)), None),
        "positions.png": None if summary.windows is None else _positions_figure(summary.windows),
        **{f"{topic.name}.png": topic.plot(run, record) for topic, record in topics_of(summary)},
    }
    written = []
    for name, figure in figures.items():
        if figure is not None:
            FigureCanvasAgg(figure).print_png(folder / name)  # savefig would draw it twice
            written.append(folder / name)
    return written


def _domains_figure(rows: Sequence[DomainRow], unit: LossUnit) -> Figure | None:
    """Draw one panel per domain, each on its own scale, so that a rise of 1 % is visible."""
    domains = [row for row in rows if not row.is_control and row.before.loss is not None]
    if not domains:
        return None
    figure, panels = new_figure(columns=len(domains), width=1.2 + 3.2 * len(domains), height=3.6)
    for row, axes in zip(domains, panels, strict=True):
        scores = tuple(map(unit.score, (row.before, row.expanded, row.trained)))
        _draw_stages(axes, scores)
        for control in rows:
            if control.is_control and control.domain == row.domain:
                scores = (unit.score(control.before), None, unit.score(control.trained))
                _draw_stages(axes, scores, is_control=True)
        is_known = row.change.value is not None
        change = f"{row.change.text()} %" if is_known else "change unknown"
        axes.set_title(wrap_text(f"{row.domain} ({row.role}): {change}", 40), fontsize=10)
        axes.set_xticks(range(len(_STAGE_NAMES)), _STAGE_NAMES)
        axes.set_xlim(-0.35, 2.35)
        axes.margins(y=0.15)
    panels[0].set_ylabel(f"validation loss [nats/{unit.name}]")
    if any(row.is_control for row in rows):
        panels[-1].legend(frameon=False, fontsize=8)
    note = "bars: one standard error over documents; the changes above are paired by document"
    figure.supxlabel(note, fontsize=7, color=GREY)
    return figure


def _draw_stages(axes: Axes, scores: Sequence[Score | None], *, is_control: bool = False) -> None:
    known = [
        (position, score.loss, score.standard_error or 0.0)
        for position, score in enumerate(scores)
        if score is not None and score.loss is not None
    ]
    axes.errorbar(
        # Next to each other, so that bars do not overlap
        [position + 0.06 * is_control for position, _, _ in known],
        [loss for _, loss, _ in known],
        yerr=[error for _, _, error in known],
        color=ORANGE if is_control else BLUE,
        marker="s" if is_control else "o",
        linestyle="--" if is_control else "-",
        capsize=3,
        label="control (not grown)" if is_control else "grown",
    )


def _forgetting_figure(groups: Sequence[Group]) -> Figure | None:
    """Draw one panel per domain: the loss before the expansion and during training."""
    (run,) = groups[0].runs
    names = {curve.name for curve in run.curves if curve.steps[-1] >= 0}
    shown = [row for row in run.losses if f"eval/{row.domain}/loss" in names]
    if not shown:
        return None
    figure, panels = new_figure(columns=len(shown), width=1.2 + 3.2 * len(shown), height=4.0)
    for row, axes in zip(shown, panels, strict=True):
        _draw_losses(axes, groups, f"eval/{row.domain}/loss")
        axes.set_title(wrap_text(f"{row.domain} ({row.role})", 40), fontsize=10)
        axes.set_xlabel("training step")
        axes.margins(y=0.15)
    panels[0].set_ylabel("validation loss [nats/token]")
    _add_legend(figure)
    note = "loss on a fixed validation subset; dotted: the first loss"
    if any(curve.steps[0] < 0 for curve in run.curves):
        note += "; left of the dashed line: before the expansion"
    if run.summary.has_new_tokens:
        note += "\nafter the expansion: of other tokens; can't be compared with the other losses"
    figure.supxlabel(note, fontsize=7, color=GREY)
    return figure


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
            _draw_curve(axes, curve, Group(curve.name, (), color=color))
        axes.set_ylabel("penalty" if group is penalties else "loss [nats/token]")
        axes.legend(frameon=False, fontsize=8)
    panels[-1].set_xlabel("training step")
    return figure


def group_figures(comparison: Comparison) -> dict[str, list[Figure]]:
    """Return the figures that the runs of a comparison have data for, by topic."""
    groups, reference = comparison.styled, comparison.reference
    means, is_seeded = groups[: Comparison.MAX_GROUPS], _is_seeded(groups)
    changes, differences = [], []
    for domain, role in loss_domains(means):
        found = [(group, group.change(domain)) for group in means]
        title = f"{domain} ({role}): change of the loss per byte [%]"
        changes.append(_bars_of(found, title=title, scale=100, has_bounds=not is_seeded))
        others = [group for group in means if group is not reference]
        found = [(group, group.difference(reference, domain)) for group in others]
        title = f"{domain} ({role}): loss per byte relative to {reference.name} [%]"
        if is_seeded:
            differences.append(_bars_of(found, title=title, scale=100))
    made: dict[str, Sequence[Figure | None]] = {
        "tradeoff": _tradeoff(groups),
        "differences": differences,
        "changes": changes,
        "losses": _losses(groups),
        "cost": _costs(means),
        "positions": _positions([run for group in comparison.groups for run in group.runs]),
        **{topic.name: topic.figures(groups) for topic in TOPICS},
    }
    drawn = {name: [each for each in found if each is not None] for name, found in made.items()}
    return {name: found for name, found in drawn.items() if found}


def _is_alone(groups: Sequence[Group]) -> bool:
    """Return True if there is one run next to its control."""
    return sum(len(group.runs) for group in groups if not group.is_control) == 1


def _is_seeded(groups: Sequence[Group]) -> bool:
    return any(len(group.runs) > 1 for group in groups)


def loss_domains(groups: Sequence[Group], role: str | None = None) -> list[tuple[str, Role]]:
    """Return domains that have losses, each with its role."""
    rows = (row for group in groups for run in group.runs for row in run.losses)
    found = dict.fromkeys((row.domain, row.role) for row in rows if role in (None, row.role))
    return list(found)[: Topic.MAX_PANELS]


def _positions(runs: Sequence[EndedRun]) -> list[Figure | None]:
    longer = [(run.name, run.summary.windows) for run in runs if run.summary.windows]
    return [_positions_figure(record, title=name) for name, record in longer[: Topic.MAX_PANELS]]


def _positions_figure(record: WindowsRecord, *, title: str = "") -> Figure | None:
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
    _add_legend(figure)
    return figure


def _tradeoff(groups: Sequence[Group], *, has_legend: bool = False) -> list[Figure]:
    figure, axes = panel(height=4.2 if has_legend else 3.8)
    is_drawn = _draw_tradeoff(axes, groups)
    if is_drawn and has_legend:
        _add_legend(figure)
    return [figure] if is_drawn else []


def _draw_tradeoff(axes: Axes, groups: Sequence[Group]) -> bool:
    """Draw forgetting against gain, each as the mean over the domains of its role.

    A run that is alone with its control has a mark for each pair of domains.

    Returns:
        False if no group has both; nothing is drawn then.
    """
    is_alone, is_seeded = _is_alone(groups), _is_seeded(groups)
    points = [each for group in groups for each in _points(group, is_alone=is_alone)]
    if not points:
        return False
    for group, note, gain, forgetting in points:
        pairs = list(zip(gain.values, forgetting.values, strict=False))
        if len(gain.values) > 1:
            mark = partial(axes.plot, marker=group.marker, color=group.color, linestyle="none")
            alpha = 1.0 if gain.is_of_seeds else 0.4
            for x, y in pairs:
                mark(-100 * x, 100 * y, markerfacecolor=group.filling, alpha=alpha, markersize=4)
        if gain.is_of_seeds:
            continue
        is_bounded = len(gain.values) > 1 or not is_seeded
        below, above = _bars(gain) if is_bounded else (0.0, 0.0)
        axes.errorbar(
            -100 * gain.value,
            100 * forgetting.value,
            xerr=[[100 * above], [100 * below]],  # the gain is the fall
            yerr=[[100 * side] for side in (_bars(forgetting) if is_bounded else (0.0, 0.0))],
            color=group.color,
            marker=group.marker,
            markerfacecolor=group.filling,
            linestyle="none",
            label=wrap_text(group.label),
            elinewidth=0.9,
            capsize=2.5,
        )
        place = (-100 * gain.value, 100 * forgetting.value)
        axes.annotate(wrap_text(note, 30), place, (5, 4), textcoords="offset points", fontsize=8)
    means = [(-gain.value, lost.value) for *_, gain, lost in points if not gain.is_of_seeds]
    if (front := _search_path(means)) and not is_alone:
        xs, ys = zip(*((100 * x, 100 * y) for x, y in front), strict=True)
        axes.plot(xs, ys, color=GREY, linestyle=":", linewidth=1)
    runs = (run for group in groups if not group.is_control for run in group.runs)
    rows = (row for run in runs for row in run.losses if row.role == "old")
    for bound in sorted({row.bound for row in rows if row.bound is not None}):
        _mark_bound(axes, 100 * bound)
    axes.axhline(0, color=GREY, linewidth=0.8)
    axes.axvline(0, color=GREY, linewidth=0.8)
    axes.margins(0.2)
    axes.set_xlabel("gain: decrease of the loss on new domains [% per byte]")
    axes.set_ylabel("forgetting: increase of the loss\non old domains [% per byte]")
    return True


def _points(group: Group, *, is_alone: bool) -> Iterator[tuple[Group, str, Interval, Interval]]:
    """Yield the marks of a group: the group, note, change on new domains and on old ones."""
    gain, forgetting = _mean_change(group, "new"), _mean_change(group, "old")
    old, new = (loss_domains([group], role) for role in ("old", "new"))
    if is_alone:
        for (kept, _), (learned, _) in product(old, new):
            gain, forgetting = group.change(learned), group.change(kept)
            if gain is not None and forgetting is not None:
                yield group, kept if len(new) == 1 else f"{kept}, {learned}", gain, forgetting
    elif gain is not None and forgetting is not None:
        yield group, "", gain, forgetting


def _mark_bound(axes: Axes, bound: float) -> None:
    axes.axhline(bound, color=GREY, linestyle="--", linewidth=1)
    text, place = f"bound of the gate {bound:+.3g} %", axes.get_yaxis_transform()
    axes.text(0.99, bound, text, transform=place, ha="right", va="bottom", fontsize=8, color=GREY)


def _search_path(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the Pareto front of points (gain, forgetting), by gain."""
    best: list[tuple[float, float]] = []
    for gain, forgetting in sorted(points, key=lambda point: (-point[0], point[1])):
        if not best or forgetting < best[-1][1]:
            best.append((gain, forgetting))
    return best


def _mean_change(group: Group, role: str) -> Interval | None:
    """Return the mean change over the domains of a role: of each run, then over the seeds."""
    domains = loss_domains([group], role)
    if len(domains) == 1:
        return group.change(domains[0][0])

    def of(run: EndedRun) -> float | None:
        values = [row.change.value for row in run.losses if row.role == role]
        known = [value for value in values if value is not None]
        return sum(known) / len(known) if known and len(known) == len(values) else None

    return group.mean(of)


def _losses(groups: Sequence[Group]) -> list[Figure]:
    """Draw a panel per domain, one of the training loss and one of the base's pretraining."""
    named = {
        f"eval/{domain}/loss": f"{domain} ({role}): validation loss"
        for domain, role in loss_domains(groups)
    }
    named["train/loss"] = "training loss"
    runs = [run for group in groups for run in group.runs]
    is_in_tokens = all(run.tokens_per_step for run in runs)
    made = []
    for name, title in named.items():
        figure, axes = panel(height=2.9)
        if _draw_losses(axes, groups, name, is_in_tokens=is_in_tokens):
            _label_course(axes, title, is_in_tokens=is_in_tokens)
            made.append(figure)
    bases: dict[tuple[Curve, float], None] = {}  # each once: runs of a sweep share them
    for run in runs:
        scale = _scale(run, is_in_tokens=is_in_tokens)
        bases |= {(each, scale): None for each in run.pretraining if each.name == "train/loss"}
    if bases:
        figure, axes = panel(height=2.7)
        for curve, scale in bases:
            _draw_curve(axes, curve, Group("base", ()), scale=scale)
        number = "the base" if len(bases) == 1 else f"{len(bases)} bases"
        title = f"pretraining loss of {number}"
        _label_course(axes, title, is_in_tokens=is_in_tokens)
        made.append(figure)
    return made


def _draw_losses(
    axes: Axes, groups: Sequence[Group], name: str, *, is_in_tokens: bool = False
) -> bool:
    """Draw one loss of all runs, and mark expansions, growth and the start of tasks.

    The loss before the expansion is left of the first step. Of a run that is alone with its
    control, the first loss is also a dotted level.

    Returns:
        False if no run has this loss; nothing is drawn then.
    """
    runs = [(group, run) for group in groups for run in group.runs]
    last = [
        _scale(run, is_in_tokens=is_in_tokens) * curve.steps[-1]
        for _, run in runs
        for curve in run.curves
        if curve.name == name
    ]
    if not last:
        return False
    gap, has_start = _GAP * max(*last, 1), False
    is_alone = _is_alone(groups)
    marked: dict[tuple[float, str], None] = {}
    for group in groups:
        drawn = []
        for run in group.runs:
            scale = _scale(run, is_in_tokens=is_in_tokens)
            for curve in (each for each in run.curves if each.name == name):
                is_pale, has_before = len(group.runs) > 1, curve.steps[0] < 0
                drawn.append(_draw_curve(axes, curve, group, scale=scale, gap=gap, is_pale=is_pale))
                if is_alone and not group.is_control:
                    axes.axhline(next(iter(drawn[-1].values())), color=GREY, ls=":", lw=1)
                has_start |= has_before
                starts = [scale * step or -gap / 2 * has_before for step in run.expansions]
                marked |= dict.fromkeys((place, "expansion") for place in starts)
                marked |= dict.fromkeys((scale * step, "next task") for step in run.summary.borders)
                births = [scale * step for step in run.births]
                _mark_growth(axes, births, color=group.color, is_alone=is_alone)
        _draw_mean(axes, drawn, group)
    for place, kind in list(marked)[:_MAX_MARKED]:
        color, style = ("black", "--") if kind == "expansion" else (GREY, "-.")
        axes.axvline(place, color=color, linestyle=style, linewidth=0.8, label=kind)
    if has_start:  # the loss before the first step has no tick
        end = axes.get_xlim()[1]
        axes.set_xticks([tick for tick in axes.get_xticks() if 0 <= tick <= end])
    return True


def _scale(run: EndedRun, *, is_in_tokens: bool) -> float:
    return (run.tokens_per_step or 1) / 1000 if is_in_tokens else 1.0


def _label_course(axes: Axes, title: str, *, is_in_tokens: bool) -> None:
    axes.set_title(wrap_text(title), fontsize=9)
    axes.set_xlabel("training tokens [thousand]" if is_in_tokens else "training step")
    axes.set_ylabel("loss [nats/token]")


def _draw_curve(
    axes: Axes,
    curve: Curve,
    group: Group,
    *,
    scale: float = 1.0,
    gap: float = 1.0,
    is_pale: bool = False,
) -> dict[tuple[float, int], float]:
    """Draw a curve; below a running mean of training losses, its points are pale.

    Args:
        axes: The panel.
        curve: A loss over the steps; step -1 is the model before its expansion.
        group: Its group, with the style.
        scale: Step → position.
        gap: Distance of the model before its expansion from the first step.
        is_pale: The curve is one of several seeds.

    Returns:
        What was drawn: position and its occurrence → value. A round ends where the next begins.
    """
    positions = [scale * step if step >= 0 else -gap for step in curve.steps]
    values = [value if abs(value) < MAX_NUMBER else float("nan") for value in curve.values]
    plot = partial(axes.plot, color=group.color, linestyle=group.style)
    alpha, width = (0.35, 0.8) if is_pale else (1.0, 1.3)
    if len(values) < _SMOOTHED_FROM_POINTS or curve.name.startswith("eval/"):
        marks: dict[str, Any] = {
            "marker": group.marker,
            "markerfacecolor": group.filling,
            "markersize": 3,
        }
        label = "" if is_pale else group.label
        marks = {} if is_pale else marks
        plot(positions, values, alpha=alpha, linewidth=width, label=label, **marks)
        return _numbered(positions, values)
    window = len(values) // 20
    mean = _running_mean(values, window)
    centres = positions[window // 2 : window // 2 + len(mean)]
    if not is_pale:
        plot(positions, values, alpha=0.2)
    label = "" if is_pale else f"{group.label} (mean of {window} points)"
    plot(centres, mean, alpha=alpha, linewidth=width, label=label)
    return _numbered(centres, mean)


def _numbered(
    positions: Sequence[float], values: Sequence[float]
) -> dict[tuple[float, int], float]:
    seen = Counter[float]()
    points = {}
    for position, value in zip(positions, values, strict=True):
        points[position, seen[position]] = value
        seen[position] += 1
    return points


def _running_mean(values: Sequence[float], window: int) -> list[float]:
    """Return the means of `window` consecutive values; shorter than `values` by `window` - 1."""
    import numpy as np

    windows = np.lib.stride_tricks.sliding_window_view(np.asarray(values), window)
    return [float(mean) for mean in windows.mean(axis=1)]


def _draw_mean(
    axes: Axes, drawn: Sequence[Mapping[tuple[float, int], float]], group: Group
) -> None:
    """Draw the mean of several seeds' curves over the positions that all of them have."""
    if len(drawn) < 2:
        return
    first, *others = drawn
    shared = [point for point in first if all(point in other for other in others)]
    means = [fmean([first[point], *(other[point] for other in others)]) for point in shared]
    marker = group.marker if len(shared) < _SMOOTHED_FROM_POINTS else ""
    axes.plot(
        [position for position, _ in shared],
        means,
        color=group.color,
        linestyle=group.style,
        linewidth=1.6,
        marker=marker,
        markerfacecolor=group.filling,
        markersize=4,
    )


def _costs(groups: Sequence[Group]) -> list[Figure]:
    """Draw FLOPs and seconds of the training, group by group."""
    from matplotlib.ticker import EngFormatter

    parts: tuple[tuple[Literal["flops", "seconds"], str], ...] = (
        ("flops", "FLOPs"),
        ("seconds", "seconds"),
    )
    made = []
    for of, unit in parts:
        means = [(group, group.mean(methodcaller("cost", of))) for group in groups]
        figure = _bars_of(means, title=f"training cost [{unit}]", scale=1)
        if figure is not None:
            figure.axes[0].set_xlim(left=0)
            if of == "flops":
                figure.axes[0].xaxis.set_major_formatter(EngFormatter(sep=" "))
            made.append(figure)
    return made


def _bars_of(
    found: Sequence[tuple[Group, Interval | None]],
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
    rows = [(group, interval) for group, interval in found if interval is not None]
    if not rows:
        return None
    labels = [wrap_text(group.label) for group, _ in rows]
    heights = [0.27 + 0.15 * (1 + label.count("\n")) for label in labels]  # inches
    figure, axes = panel(height=0.8 + sum(heights))
    bottoms = [*accumulate(heights)]
    for bottom, (group, interval) in zip(bottoms, rows, strict=True):
        style: dict[str, Any] = {"color": group.color, "marker": group.marker}
        style["markerfacecolor"] = group.filling
        values = [scale * value for value in interval.values]
        if interval.is_of_seeds:
            axes.plot(values, [bottom] * len(values), ls="none", **style)
        elif len(values) > 1:  # below the bar
            axes.plot(
                values, [bottom + 0.09] * len(values), ".", color=group.color, alpha=0.5, ms=5
            )
        if not interval.is_of_seeds:
            is_bounded = has_bounds or len(values) > 1
            sides = _bars(interval) if is_bounded else (0.0, 0.0)
            bars = [[scale * side] for side in sides]
            axes.errorbar(scale * interval.value, bottom, xerr=bars, **style, capsize=3)
    axes.set_ylim(bottoms[-1] + 0.2, 0)
    axes.axvline(0, color=GREY, linewidth=0.8)
    axes.grid(axis="x", alpha=0.25)
    _label_rows(axes, bottoms, labels)
    axes.set_title(wrap_text(title), fontsize=9)
    return figure


def _bars(interval: Interval) -> tuple[float, float]:
    """Return the distances of the bounds from the value; 0 for an unknown one."""
    below = 0.0 if interval.lower is None else max(0.0, interval.value - interval.lower)
    above = 0.0 if interval.upper is None else max(0.0, interval.upper - interval.value)
    return below, above


def _label_rows(axes: Axes, bottoms: Sequence[float], labels: Sequence[str]) -> None:
    """Write a label above each row of a finished panel, next to the line at zero, not across it.

    Args:
        axes: the panel, without a scale on the left.
        bottoms: height of each row.
        labels: label of each row, wrapped.
    """
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    low, high = axes.get_xlim()
    zero = -low / (high - low)  # in fractions of the width
    for bottom, label in zip(bottoms, labels, strict=True):
        width = max(map(len, label.split("\n"))) / _WIDEST_LABEL
        is_crossed, fits_after = 0 <= zero < width, zero + width <= 1
        axes.annotate(
            label,
            xy=(zero if is_crossed and fits_after else 0, bottom),
            xycoords=("axes fraction", "data"),
            xytext=(3, 7),
            textcoords="offset points",
            fontsize=7.5,
            bbox={"facecolor": "white", "pad": 0.5, "linewidth": 0},
        )


def _add_legend(figure: Figure) -> None:
    """Add the legend of the first panel above all panels, each label once."""
    lines = dict(zip(*reversed(figure.axes[0].get_legend_handles_labels()), strict=True))
    place = "outside upper center"
    figure.legend(lines.values(), lines, loc=place, ncols=4, frameon=False, fontsize=8)


def _mark_growth(
    axes: Axes, steps: Sequence[float], *, color: str = GREEN, is_alone: bool = True
) -> None:
    """Mark the positions at which neurons grew: over the whole height only if a run is alone."""
    if steps:
        top = 1.0 if is_alone and len(steps) <= _MAX_TALL else 0.05
        place = axes.get_xaxis_transform()
        axes.vlines(steps, 0, top, transform=place, color=color, linestyle=(0, (1, 1.5)),
                    linewidth=1, label="neurons grew")  # fmt: skip
