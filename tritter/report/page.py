"""One self-contained HTML page of several runs: their text is escaped, nothing is loaded."""

from __future__ import annotations

import base64
import io
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import methodcaller
from typing import TYPE_CHECKING, Any, Literal

from jinja2 import Environment, PackageLoader, StrictUndefined

from tritter import __version__
from tritter.report.drawing import CYCLE, DPI, GREY, cut, panel, plain, shortened
from tritter.report.experts import experts_panels, experts_text, page_tables, share_text
from tritter.report.growth import (
    draw_neurons,
    draw_parameters,
    draw_pressure,
    flops_course,
    growth_table,
    growth_text,
    label_flops,
    mark_growth,
)
from tritter.report.matrix import matrix_figure, transfer_table
from tritter.report.plots import SMOOTHED_FROM_POINTS, Curve, last_flops, running_mean
from tritter.report.rows import Role, change_text, score_of, score_text
from tritter.report.runs import (
    CONFIDENCE,
    Group,
    Interval,
    Run,
    differing_keys,
    grouped,
    with_controls,
)
from tritter.report.summary import LARGEST, Summary
from tritter.report.table import Table, left_out
from tritter.report.tables import result_table, stage_table, task_table
from tritter.report.wording import MISSING, count_text, number_text, si_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_CELL_CHARACTERS = 162  # of a setting
_EVENT_HEADER = (
    *("step", "layer", "born", "replaced", "left dead", "neurons", "pressure"),
    *("function change", "parameters", "FLOPs until then"),
)
_MOST_EVENTS = 100  # of a run's growth, row by row; summary.json has all
# Control characters, and what turns the direction of the text after it; names of folders may hold
# halves of characters besides
_UNSEEN = dict.fromkeys(
    [*range(9), *range(11, 32), *range(127, 160), *range(0x202A, 0x202F), *range(0x2066, 0x206A)],
    "\N{REPLACEMENT CHARACTER}",
)
_VERDICTS = ("kept", "rolled back", "undecided", "passed", "failed")

# Figures by what they are about: titles, and how each is read
TITLES = {
    "tradeoff": "Retention against gain",
    "losses": "Losses over tokens",
    "changes": "Changes by domain",
    "cost": "Cost",
    "growth": "Neuron growth",
    "experts": "LoRA experts",
    "matrix": "After each task",
}
_OVER_SEEDS = f"Groups of several seeds: mean with Student's {CONFIDENCE:.0%} interval"
CAPTIONS = {
    "tradeoff": f"Right and low is good; dotted: what nothing beats in both. {_OVER_SEEDS}; pale: "
    "each seed; single runs: one-sided bounds of the gate, over documents. Hollow: the control, "
    "the base that did not grow.",
    "losses": "Validation: always the same part of the text, so a rise on old text is forgetting "
    "while it happens. Dashed vertical: an expansion; the level before it stands at its left. "
    "Dash-dotted: the next task begins. Dotted vertical, in the colour of its run, of several runs "
    "at the foot: neurons grew. Dashed curves, hollow marks: the control. Pale: every point, where "
    "the curve is a running mean.",
    "changes": f"From before the expansion to the end. {_OVER_SEEDS}; single runs: one-sided "
    "bounds of the gate. Hollow: the control.",
    "cost": "The last attempt or all rounds: what methods prepare, and training; the table has the "
    "whole run. Seconds depend on what else the machine did: compare those of one sweep only. "
    f"{_OVER_SEEDS}.",
    "growth": "Each layer's neurons over the training, against those it began with; triangles: "
    "neurons were born; circles: dead ones were replaced. Pressure, what the trigger goes by: the "
    "mean gradient norm of a layer's neurons, as a moving average, in proportion to that of the "
    "whole gradient; each check's is drawn back to the check before. FLOPs end with the last row "
    "of metrics.csv.",
    "experts": "Routing: mean gates on held-out text, which is none of the training's; similarity: "
    "of an expert's first batches to what was known, when it was spawned. Triangles: spawns; "
    "dash-dotted: the next task begins.",
    "matrix": "Rows: the model before the first task and after each one; columns: domains. "
    "Numbers: nats per byte on all validation documents; colours: the change from the first row. "
    "Framed: what the task was about.",
}


def page(
    runs: Sequence[Run],
    *,
    title: str,
    notes: Sequence[str] = (),
    beside: Mapping[str, Table] | None = None,
) -> tuple[str, dict[str, bytes]]:
    """Return the page, and its figures by file name as PNG.

    Args:
        notes: what a reader should know of folders that are not on it.
        beside: title → table, of what stands below the table of all runs.
    """
    groups = grouped(runs)
    number = "one finished run" if len(runs) == 1 else f"{len(runs)} finished runs"
    if len(groups) < len(runs):
        number += f" in {len(groups)} groups that differ in the seed alone"
    lead = f"{number[0].upper()}{number[1:]}. Losses in nats per token, changes per byte."
    if len(with_controls(groups)) > MOST_GROUPS:
        lead += f" Changes and cost are drawn of the first {MOST_GROUPS} groups."
    pictures: dict[str, list[bytes]] = {}
    for name, found in figures(groups).items():
        streams = [io.BytesIO() for _ in found]
        for figure, stream in zip(found, streams, strict=True):
            figure.savefig(stream, format="png", dpi=DPI)
        pictures[name] = [stream.getvalue() for stream in streams]
    environment = Environment(
        loader=PackageLoader("tritter.report", ""), autoescape=True, undefined=StrictUndefined
    )
    text = environment.get_template("page.html.j2").render(
        version=__version__,
        title=title,
        lead=lead,
        notes=notes,
        verdicts=_VERDICTS,
        overview=_overview(groups),
        beside=dict(beside or {}),
        figures=[
            {
                "name": name,
                "title": TITLES[name],
                "caption": CAPTIONS[name],
                "base64": [base64.b64encode(each).decode("ascii") for each in found],
            }
            for name, found in pictures.items()
        ],
        lineage="\n".join(_tree(runs)),
        differing=Table((), ()) if beside else _differing(runs),
        runs=[_details(run) for run in runs],
    )
    files = {
        f"{name}{f'_{number}' if len(found) > 1 else ''}.png": picture
        for name, found in pictures.items()
        for number, picture in enumerate(found, start=1)
    }
    return text.translate(_UNSEEN).encode("utf-8", "replace").decode("utf-8"), files


def _overview(groups: Sequence[Group]) -> Table:
    """Return a row per run: its verdict, each domain's change, size and cost."""
    runs = [(group, run) for group in groups for run in group.runs]
    domains = tuple(dict.fromkeys((r.domain, r.role) for _, run in runs for r in run.rows))
    changes = (f"{domain} ({role})" for domain, role in domains)
    has_growth = any(run.summary.growth is not None for _, run in runs)
    growth = ("neurons born", "parameters after growth") if has_growth else ()
    has_experts = any(run.summary.experts is not None for _, run in runs)
    experts = ("experts", "trainable share") if has_experts else ()
    cost = ("parameters", "steps", "FLOPs", "seconds")
    header = ("run", "group", "seed", "status", *changes, *growth, *experts, *cost)
    rows = []
    for group, run in runs:
        summary = run.summary
        cells = [run.name, group.name, str(run.seed), _words(summary.status)]
        for domain, _ in domains:
            found = (change_text(row.change) for row in run.rows if row.domain == domain)
            cells.append(next(found, MISSING))
        if summary.growth is not None:
            after = summary.growth.parameters.after
            cells += [str(summary.growth.born), count_text(after)]
        elif has_growth:
            cells += [MISSING, MISSING]
        if summary.experts is not None:
            share = summary.experts.parameters.share
            cells += [str(summary.experts.number), share_text(share)]
        elif has_experts:
            cells += [MISSING, MISSING]
        cells += [count_text(summary.parameters.get("final")), str(run.steps)]
        seconds = number_text(summary.seconds.get("total"), ".1f")
        cells += [si_text(summary.flops.get("total")), seconds]
        rows.append(tuple(cells))
    caption = "change of loss per byte in %, with one-sided bounds over documents"
    return Table(header, tuple(rows), tuple(range(4, len(header))), caption)


def _words(status: object) -> str:
    return str(status).replace("_", " ")


def _differing(runs: Sequence[Run]) -> Table:
    """Return the settings that differ; the longer of settings and runs goes down the page."""
    keys = differing_keys(runs)
    if len(runs) > len(keys):
        by_run = tuple(
            (run.name, *(run.setting(k, _CELL_CHARACTERS) for k in keys)) for run in runs
        )
        return Table(("run", *keys), by_run if keys else ())
    rows = ((key, *(run.setting(key, _CELL_CHARACTERS) for run in runs)) for key in keys)
    return Table(("setting", *(run.name for run in runs)), tuple(rows))


def _tree(runs: Sequence[Run]) -> list[str]:
    """Return the chains of all checkpoints as one tree, a line each; runs stand at their ends."""
    ends: dict[tuple[str, ...], list[str]] = {}
    for run in runs:
        for length in range(1, len(run.history) + 1):
            ends.setdefault(run.history[:length], [])
        if run.history:
            ends[run.history].append(run.name)
    return [
        f"{'   ' * (len(chain) - 1)}{chain[-1]}{'  ← ' + ', '.join(names) if names else ''}"
        for chain, names in sorted(ends.items())
    ]


def _details(run: Run) -> dict[str, Any]:
    summary = run.summary
    growth, experts = summary.growth, summary.experts
    chosen = {"expansion": summary.expansion, "forgetting": summary.forgetting}
    methods = ", ".join(f"{key}={'+'.join(names) or 'none'}" for key, names in chosen.items())
    tables = [result_table(summary, [*run.rows, *run.control_rows]), _attempts(summary)]
    if len(summary.tasks) > 1:
        tables.append(task_table(summary))
    if summary.matrix:
        tables.append(transfer_table(summary.matrix, most=_MOST_EVENTS))
    checks = tuple(
        (each.check, each.subject or MISSING, each.verdict, each.detail or MISSING)
        for each in summary.last_attempt.gate
    )
    tables += [Table(("check", "of", "verdict", "because"), checks), stage_table(summary)]
    notes = list(summary.notes)
    if growth is not None:
        methods += f", growth={growth.name}"
        rows = tuple(
            (
                *map(str, (event.step, event.layer, event.born, event.replaced, event.died)),
                str(event.neurons),
                number_text(event.pressure, ".3g"),
                number_text(event.function_change, ".1e"),
                count_text(event.parameters),
                si_text(event.flops),
            )
            for event in growth.events[:_MOST_EVENTS]
        )
        lines = ["growth, event by event", left_out(len(growth.events), _MOST_EVENTS)]
        caption = "; ".join(filter(None, lines))
        events = Table(_EVENT_HEADER, rows, tuple(range(len(_EVENT_HEADER))), caption)
        tables += [growth_table(growth, most=_MOST_EVENTS), events]
        notes.insert(0, f"Growth: {growth_text(growth)}.")
    if experts is not None:
        methods += f", experts={experts.kind}"
        tables += page_tables(experts)
        notes.insert(0, f"LoRA experts: {experts_text(experts)}.")
    return {
        "name": run.name,
        "status": summary.status,
        "methods": methods,
        "tables": [table for table in tables if table.rows],
        "samples": summary.samples,
        "notes": notes,
    }


def _attempts(summary: Summary) -> Table:
    """Return what each attempt or round was and how it ended; empty where there was one."""
    rounds = summary.rounds
    parts = rounds or summary.attempts
    if len(parts) < 2:
        return Table((), ())
    domains = list(summary.baseline)
    rows = []
    for number, each in enumerate(parts, start=1):
        changes = each.overrides or ["as asked for"]
        if rounds:
            changes = each.expansion or ["not expanded"]
        scores = (score_text(score_of(each.final, domain)) for domain in domains)
        rows.append((f"{number}: {' '.join(changes)}", *scores, _words(each.status or MISSING)))
    header = ("round" if rounds else "attempt", *domains, "verdict")
    numbers = tuple(range(1, 1 + len(domains)))
    return Table(header, tuple(rows), numbers, f"loss at the end of each {header[0]}")


# Figures over several runs, each one panel that fits a phone

MOST_GROUPS = 40  # drawn row by row; the table of the page has all
MOST_PANELS = 24
_MOST_NAMED = 20  # in the legend of one figure
_MOST_MARKED = 60  # expansions and tasks of one figure
_MARKERS = "osD^vPX*<>"
_LINE_CHARACTERS = 72


@dataclass(frozen=True, slots=True)
class _Line:
    """A group and how it is drawn: pairs of color and marker differ where colors come again."""

    group: Group
    color: str
    marker: str

    @property
    def filling(self) -> str:
        return "white" if self.group.is_control else self.color

    @property
    def label(self) -> str:
        number = len(self.group.runs)
        return f"{self.group.name} ({number} {'run' if number == 1 else 'runs'})"


def figures(groups: Sequence[Group]) -> dict[str, list[Figure]]:
    """Return the figures that the runs have data for, by what they are about."""
    lines: list[_Line] = []
    number = -1
    for group in with_controls(groups):
        number += not group.is_control
        color, marker = CYCLE[number % len(CYCLE)], _MARKERS[number % len(_MARKERS)]
        lines.append(_Line(group, color, marker))
    runs = [run for group in groups for run in group.runs]
    means = lines[:MOST_GROUPS]
    changes = []
    for domain, role in _domains([line.group for line in means]):
        found = [(line, line.group.change(domain)) for line in means]
        title = f"{cut(domain)} ({role}): change of loss per byte [%]"
        changes.append(_bars_of(found, title=title, scale=100))
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
        figure.axes[0].set_title(shortened(name), fontsize=9)
        matrices.append(figure)
    made = {
        "tradeoff": _tradeoff(lines),
        "losses": _losses(lines),
        "changes": [figure for figure in changes if figure is not None],
        "cost": _costs(means),
        "growth": _growth(lines),
        "experts": experts,
        "matrix": matrices,
    }
    return {name: found for name, found in made.items() if found}


def _domains(groups: Sequence[Group], role: str | None = None) -> list[tuple[str, Role]]:
    """Return domains that have losses, each with its role."""
    rows = (row for group in groups for run in group.runs for row in run.losses)
    found = dict.fromkeys((row.domain, row.role) for row in rows if role in (None, row.role))
    return list(found)[:MOST_PANELS]


def _legend(figure: Figure, lines: Sequence[_Line]) -> None:
    """Name what is drawn below it, and make the figure as much higher as that takes."""
    from matplotlib.lines import Line2D

    handles = []
    for line in lines[:_MOST_NAMED]:
        style = "--" if line.group.is_control else "-"
        rows = textwrap.wrap(plain(line.label), _LINE_CHARACTERS, max_lines=3, placeholder=" ..")
        handles.append(
            Line2D([], [], color=line.color, linestyle=style, label="\n".join(rows), markersize=5,
                   marker=line.marker, markerfacecolor=line.filling)
        )  # fmt: skip
    if len(lines) > _MOST_NAMED:
        rest = f"and {len(lines) - _MOST_NAMED} more: see the table"
        handles.append(Line2D([], [], linestyle="none", label=rest))
    height = sum(1 + str(handle.get_label()).count("\n") for handle in handles)
    figure.set_figheight(figure.get_figheight() + 0.16 * height)
    figure.legend(handles=handles, loc="outside lower left", frameon=False, fontsize=7.5)


def _tradeoff(lines: Sequence[_Line]) -> list[Figure]:
    """Mean loss of what was old against mean gain on what was new; what nothing beats is joined."""
    points = []
    for line in lines:
        retention, gain = (_mean_change(line.group, role) for role in ("old", "new"))
        if retention is not None and gain is not None:
            points.append((line, gain, retention))
    if not points:
        return []
    figure, axes = panel(height=3.8)
    for line, gain, retention in points:
        for run in line.group.runs if len(line.group.runs) > 1 else ():
            single = Group("", (run,))
            x, y = _mean_change(single, "new"), _mean_change(single, "old")
            if x is not None and y is not None:
                axes.plot(-100 * x.value, 100 * y.value, line.marker, color=line.color,
                          markerfacecolor=line.filling, alpha=0.35, ms=4)  # fmt: skip
        below, above = _bars(gain)
        axes.errorbar(
            -100 * gain.value,
            100 * retention.value,
            xerr=[[100 * above], [100 * below]],  # the gain is the fall
            yerr=[[100 * side] for side in _bars(retention)],
            color=line.color,
            marker=line.marker,
            markerfacecolor=line.filling,
            linestyle="none",
            capsize=3,
        )
    front = _search_path([(-gain.value, retention.value) for _, gain, retention in points])
    axes.plot(*zip(*((100 * x, 100 * y) for x, y in front), strict=True), color=GREY, ls=":", lw=1)
    axes.axhline(0, color=GREY, linewidth=0.8)
    axes.margins(0.1)
    axes.set_xlabel("gain: fall of the loss on new text [% per byte]")
    axes.set_ylabel("forgetting: rise of the loss\non old text [% per byte]")
    best = [point for point in points if (-point[1].value, point[2].value) in front]
    _legend(figure, [line for line, _, _ in sorted(points, key=lambda each: each not in best)])
    return [figure]


def _search_path(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points (gain, harm) that no other beats in both, by gain."""
    best: list[tuple[float, float]] = []
    for gain, harm in sorted(points, key=lambda point: (-point[0], point[1])):
        if not best or harm < best[-1][1]:
            best.append((gain, harm))
    return best


def _mean_change(group: Group, role: str) -> Interval | None:
    """Return the mean change over the domains of a role: of each run, then over the runs."""
    domains = _domains([group], role)
    if len(domains) == 1:
        return group.change(domains[0][0])

    def of(run: Run) -> float | None:
        values = [row.change.value for row in run.losses if row.role == role]
        known = [value for value in values if value is not None]
        return sum(known) / len(known) if known and len(known) == len(values) else None

    return group.mean(of)


def _losses(lines: Sequence[_Line]) -> list[Figure]:
    """A panel per domain, one of the text that is trained on, one of the base's pretraining."""
    named = {
        f"eval/{domain}/loss": f"{domain} ({role}), validation"
        for domain, role in _domains([line.group for line in lines])
    }
    named["train/loss"] = "the text that is trained on"
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
            _draw(axes, curve, scale, _Line(Group("base", ()), GREY, "o"))
        number = "one base" if len(bases) == 1 else f"{len(bases)} bases"
        title = f"before: pretraining of {number} on old text"
        _label_course(axes, title, is_in_tokens=is_in_tokens)
        made.append(figure)
    return [figure for figure in made if figure is not None]


def _course(lines: Sequence[_Line], name: str, title: str, is_in_tokens: bool) -> Figure | None:
    """Draw one loss of all runs; where they grew and where tasks begin is marked."""
    figure, axes = panel(height=2.7)
    drawn: dict[str, _Line] = {}
    is_alone = sum(len(line.group.runs) for line in lines if not line.group.is_control) == 1
    marked: dict[tuple[float, str], None] = {}
    for line in lines:
        for run in line.group.runs:
            scale = _scale(run, is_in_tokens=is_in_tokens)
            for curve in (each for each in run.curves if each.name == name):
                drawn[line.group.name] = line
                _draw(axes, curve, scale, line)
                marked |= dict.fromkeys((scale * step, "expansion") for step in run.expansions)
                marked |= dict.fromkeys((scale * step, "task") for step in run.summary.borders)
                births = [scale * step for step in run.births]
                mark_growth(axes, births, color=line.color, is_alone=is_alone)
    if not drawn:
        return None
    for place, kind in list(marked)[:_MOST_MARKED]:
        color, style = ("black", "--") if kind == "expansion" else (GREY, "-.")
        axes.axvline(place, color=color, linestyle=style, linewidth=0.8)
    _label_course(axes, title, is_in_tokens=is_in_tokens)
    _legend(figure, list(drawn.values()))
    return figure


def _scale(run: Run, *, is_in_tokens: bool) -> float:
    return (run.tokens_per_step or 1) / 1000 if is_in_tokens else 1.0


def _label_course(axes: Axes, title: str, *, is_in_tokens: bool) -> None:
    axes.set_title(shortened(title), fontsize=9)
    axes.set_xlabel("thousand tokens" if is_in_tokens else "training step")
    axes.set_ylabel("nats per token")


def _draw(axes: Axes, curve: Curve, scale: float, line: _Line) -> None:
    """Draw a curve, pale below its running mean where it has many points."""
    places = [scale * step for step in curve.steps]  # step -1 is the model before its expansion
    values = [value if abs(value) < LARGEST else float("nan") for value in curve.values]
    style = "--" if line.group.is_control else "-"
    plot = partial(axes.plot, color=line.color, linestyle=style, linewidth=1.2)
    if len(values) < SMOOTHED_FROM_POINTS:
        plot(places, values, marker=line.marker, markerfacecolor=line.filling, markersize=3)
        return
    window = len(values) // 20
    mean = running_mean(values, window)
    plot(places, values, alpha=0.2)
    plot(places[window // 2 : window // 2 + len(mean)], mean)


def _costs(lines: Sequence[_Line]) -> list[Figure]:
    """FLOPs and seconds of the training, group by group."""
    parts: tuple[tuple[Literal["flops", "seconds"], str, float], ...] = (
        ("flops", "TFLOPs", 1e-12),
        ("seconds", "seconds", 1.0),
    )
    made = []
    for of, unit, scale in parts:
        means = [(line, line.group.mean(methodcaller("cost", of))) for line in lines]
        figure = _bars_of(means, title=f"{unit} of the training", scale=scale)
        if figure is not None:
            figure.axes[0].set_xlim(left=0)
            made.append(figure)
    return made


def _growth(lines: Sequence[_Line]) -> list[Figure]:
    """The map of each run that may grow; of a single one its pressure; what growth cost in all."""
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
            axes.set_title(shortened(f"{run.name}: {what}"), fontsize=9)
            if draw is draw_neurons and growth.events:
                figure.legend(loc="outside lower left", ncols=2, frameon=False, fontsize=7.5)
            made.append(figure)
    if not found:
        return made
    figure, axes = panel(height=2.9)
    named: dict[str, _Line] = {}
    for line, run, growth in found:
        course = flops_course(growth, end_flops=last_flops(run.curves))
        if course[0]:
            draw_parameters(axes, *course, color=line.color, marker=line.marker)
            named[line.group.name] = line
    if named:
        label_flops(axes)
        axes.set_title("parameters of the models that may grow", fontsize=9)
        _legend(figure, list(named.values()))
        made.append(figure)
    return made


def _bars_of(
    found: Sequence[tuple[_Line, Interval | None]], *, title: str, scale: float
) -> Figure | None:
    """Draw a row per group, its name above its interval."""
    rows = [(line, interval) for line, interval in found if interval is not None]
    if not rows:
        return None
    figure, axes = panel(height=0.8 + 0.42 * len(rows))
    for number, (line, interval) in enumerate(rows):
        axes.errorbar(
            scale * interval.value,
            number,
            xerr=[[scale * side] for side in _bars(interval)],
            color=line.color,
            marker=line.marker,
            markerfacecolor=line.filling,
            capsize=3,
        )
        axes.annotate(
            shortened(line.label),
            xy=(0, number),
            xycoords=("axes fraction", "data"),
            xytext=(2, 8),
            textcoords="offset points",
            fontsize=7.5,
            bbox={"facecolor": "white", "alpha": 0.8, "pad": 0.5, "linewidth": 0},
        )
    axes.set_yticks([])
    axes.set_ylim(len(rows) - 0.5, -0.8)
    axes.axvline(0, color=GREY, linewidth=0.8)
    axes.grid(axis="x", alpha=0.25)
    axes.set_title(plain(title), fontsize=9)
    return figure


def _bars(interval: Interval) -> tuple[float, float]:
    """Return how far the bounds lie below and above; an unknown one has no bar."""
    below = 0.0 if interval.lower is None else max(0.0, interval.value - interval.lower)
    above = 0.0 if interval.upper is None else max(0.0, interval.upper - interval.value)
    return below, above
