"""Plots of a finished run, from its summary and its curves alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tritter.report.drawing import BLUE, CYCLE, GREY, ORANGE, add_legend, new_figure, wrap_text
from tritter.report.experts import experts_figure
from tritter.report.figures import Line, draw_curve, draw_losses, draw_tradeoff, positions_figure
from tritter.report.growth import growth_figure
from tritter.report.matrix import matrix_figure
from tritter.report.rows import DomainRow, change_text, has_new_tokens, unit_of
from tritter.report.runs import Curve, EndedRun, Group, with_controls
from tritter.report.summary import Score, Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_STAGES = ("before", "after\nexpansion", "after\ntraining")


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
    growth, experts, matrix, end = summary.growth, summary.experts, summary.matrix, run.last_steps
    name = "grown" if summary.last_attempt.expansion else "trained"
    styles = ((BLUE, "o", "-"), (ORANGE, "s", "--"))
    lines = [
        Line(group, *style)
        for group, style in zip(with_controls([Group(name, (run,))]), styles, strict=False)
    ]
    rows = [row for row in (*run.rows, *run.control_rows) if not row.change.in_points]
    figures = {
        "domains.png": _domains_figure(rows, *unit_of([summary])),
        "forgetting.png": _forgetting_figure(lines),
        "training.png": _training_figure(curves),
        "retention_and_gain.png": _tradeoff_figure(lines),
        "growth.png": None,
        "experts.png": None,
        "positions.png": None if summary.windows is None else positions_figure(summary.windows),
        "matrix.png": None if matrix is None else matrix_figure(matrix),
    }
    if growth is not None:
        figures["growth.png"] = growth_figure(growth, end=end, end_flops=run.last_flops)
    if experts is not None:
        figures["experts.png"] = experts_figure(experts, end=end, borders=summary.borders)
    written = []
    for name, figure in figures.items():
        if figure is not None:
            FigureCanvasAgg(figure).print_png(folder / name)  # savefig would draw it twice
            written.append(folder / name)
    return written


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


def _forgetting_figure(lines: Sequence[Line]) -> Figure | None:
    """Draw one panel per domain: the loss before the expansion and during training."""
    (run,) = lines[0].group.runs
    names = {curve.name for curve in run.curves if curve.steps[-1] >= 0}
    shown = [row for row in run.losses if f"eval/{row.domain}/loss" in names]
    if not shown:
        return None
    figure, panels = new_figure(columns=len(shown), width=1.2 + 3.2 * len(shown), height=4.0)
    for row, axes in zip(shown, panels, strict=True):
        draw_losses(axes, lines, f"eval/{row.domain}/loss")
        axes.set_title(wrap_text(f"{row.domain} ({row.role})", 40), fontsize=10)
        axes.set_xlabel("training step")
        axes.margins(y=0.15)
    panels[0].set_ylabel("validation loss [nats/token]")
    add_legend(figure)
    note = "loss on a fixed validation subset; dotted: the first loss"
    if any(curve.steps[0] < 0 for curve in run.curves):
        note += "; left of the dashed line: before the expansion"
    if has_new_tokens(run.summary):
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
            draw_curve(axes, curve, Line(Group(curve.name, ()), color, "o", "-"))
        axes.set_ylabel("penalty" if group is penalties else "loss [nats/token]")
        axes.legend(frameon=False, fontsize=8)
    panels[-1].set_xlabel("training step")
    return figure


def _tradeoff_figure(lines: Sequence[Line]) -> Figure | None:
    """Draw forgetting on the old domains against gain on the new ones."""
    figure, (axes,) = new_figure(width=5.6, height=4.2)
    if not draw_tradeoff(axes, lines):
        return None
    add_legend(figure)
    return figure
