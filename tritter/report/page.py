"""One self-contained HTML page of several runs: text is escaped, nothing is loaded."""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from operator import methodcaller
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from tritter import __version__
from tritter.report import plots
from tritter.report.drawing import CYCLE, DPI, GREY, label_rows, new_figure, panel, wrap_text
from tritter.report.experts import experts_panels, experts_text, page_tables, share_text
from tritter.report.growth import (
    draw_neurons,
    draw_parameters,
    draw_pressure,
    events_table,
    growth_table,
    growth_text,
    label_flops,
    mark_growth,
    parameters_over_flops,
)
from tritter.report.matrix import matrix_figure, transfer_table
from tritter.report.plots import Curve, last_flops, positions_figure, running_mean
from tritter.report.rows import Role, change_text, has_new_tokens
from tritter.report.runs import (
    CONFIDENCE,
    MIN_SEEDS,
    Group,
    Interval,
    Run,
    differing_keys,
    group_runs,
    with_controls,
)
from tritter.report.summary import MAX_NUMBER
from tritter.report.table import Table
from tritter.report.tables import (
    attempts_table,
    result_table,
    size_text,
    stage_table,
    task_table,
)
from tritter.report.wording import MISSING, count_text, number_text, si_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_CELL_CHARACTERS = 400  # of a setting
_MAX_EVENTS = 100  # rows of a table of growth events; summary.json has all
# Control characters, and those that change the direction of the text after them
_UNSEEN = dict.fromkeys(
    [*range(9), *range(11, 32), *range(127, 160), *range(0x202A, 0x202F), *range(0x2066, 0x206A)],
    "\N{REPLACEMENT CHARACTER}",
)
_VERDICTS = ("kept", "rolled back", "undecided", "passed", "failed")

# Figures by topic: titles and captions
_TITLES = {
    "tradeoff": "Forgetting and gain",
    "differences": "Differences to the reference group",
    "losses": "Loss curves",
    "changes": "Change of the loss by domain",
    "cost": "Training cost",
    "growth": "Neuron growth",
    "experts": "LoRA experts",
    "matrix": "Loss after each task",
    "positions": "Loss by position",
}
_OVER_SEEDS = (
    f"Pale marks: seeds. Full marks and bars: mean and Student's {CONFIDENCE:.0%} interval over "
    f"the seeds. Below {MIN_SEEDS} seeds, every mark is a seed."
)
_OF_SEEDS = f"Every mark is a seed; there are no intervals below {MIN_SEEDS} seeds."
_SINGLE = "Bars: one-sided bounds of the gate, over documents."
_CONTROL = "Hollow marks: control (not grown)."
_CAPTIONS = {
    "tradeoff": "Bottom right is best. Dotted line: Pareto front.",
    "differences": "",  # the table above the figures has it
    "losses": "Validation loss on a fixed subset; a rise on an old domain is forgetting. The loss "
    "left of a dashed vertical line is that before the expansion. Dash-dotted vertical line: next "
    "task. Dotted vertical line, or tick at the bottom: neuron growth. Dashed curve: control (not "
    "grown). Thick curve: mean over the seeds. Where a curve is a running mean, its points are "
    "pale.",
    "changes": "From before the expansion to the end of training.",
    "cost": "The last attempt, or all rounds, with the preparation of the methods. The table of "
    "runs has the totals. Compare seconds only within one sweep on one machine.",
    "growth": "Neurons per layer, relative to the start. Triangles: neurons born. Circles: dead "
    "neurons replaced. Pressure (the signal of the trigger): moving average of the mean gradient "
    "norm of a layer's neurons, relative to the norm of the whole gradient. The FLOPs axis ends at "
    "the last row of metrics.csv.",
    "experts": "Routing: mean gate on held-out data. Similarity: of the first batches of an expert "
    "to the known skills, when it was spawned. Triangles: spawns. Dash-dotted line: next task.",
    "matrix": "Rows: the model before the first task and after each task. Columns: domains. "
    "Numbers: validation loss [nats/byte]. Colours: change from the first row. Frames: domains of "
    "the task.",
    "positions": "Validation loss of long documents in long windows.",
}
_WITH_SEEDS = ("tradeoff", "differences", "changes", "cost")  # whose marks are groups
_MAX_GROUPS = 40  # in figures with a row per group; the table of the page has all
MAX_PANELS = 24
_MAX_NAMED = 60  # in the legend
_MAX_MARKED = 60  # expansions and tasks of one figure
_MARKERS = "osD^vPX*<>"
_STYLES = ("-", ":", "-.")  # of the first 12 groups, the next 12, and so on
_DASHES = {"-": "none", "--": "4 3", ":": "1.5 2", "-.": "5 2 1 2"}  # in SVG
_WITH_LEGEND = ("tradeoff", "losses", "growth")


def page(
    runs: Sequence[Run],
    *,
    title: str,
    notes: Sequence[str] = (),
    tables: Mapping[str, Table] | None = None,
) -> tuple[str, dict[str, bytes]]:
    """Return the page, and its figures by file name as PNG.

    Args:
        runs: The finished runs.
        title: Title of the page.
        notes: Lines on folders that are not on it.
        tables: Title → table, shown after the table of all runs.
    """
    groups = group_runs(runs)
    lines = _lines(groups)
    pictures = {name: [_png(figure) for figure in found] for name, found in figures(groups).items()}
    environment = Environment(
        loader=PackageLoader("tritter.report", ""), autoescape=True, undefined=StrictUndefined
    )
    legend = [{"swatch": _swatch(line), "label": line.label} for line in lines[:_MAX_NAMED]]
    swatches = {line.group.name: _swatch(line) for line in lines}
    text = environment.get_template("page.html.j2").render(
        version=__version__,
        title=title,
        lead=_subtitle(groups),
        notes=notes,
        verdicts=_VERDICTS,
        groups=_group_table(lines) if len(groups) < len(runs) else Table((), ()),
        differences=_difference_table(lines),
        overview=_overview(groups),
        swatches=swatches,
        legend=legend if len(lines) > 1 else [],
        rest=max(0, len(lines) - _MAX_NAMED),
        tables=dict(tables or {}),
        figures=[
            {
                "name": name,
                "title": _TITLES[name],
                "caption": _caption(name, lines),
                "has_legend": name in _WITH_LEGEND,
                "base64": [base64.b64encode(each).decode("ascii") for each in found],
            }
            for name, found in pictures.items()
        ],
        lineage="\n".join(_tree(runs)),
        differing=Table((), ()) if tables else _settings_table(runs),
        runs=[_details(run) for run in runs],
    )
    files = {
        f"{name}{f'_{number}' if len(found) > 1 else ''}.png": picture
        for name, found in pictures.items()
        for number, picture in enumerate(found, start=1)
    }
    if len(lines) > 1:
        files["legend.png"] = _png(_legend_figure(lines))
    return text.translate(_UNSEEN).encode("utf-8", "replace").decode("utf-8"), files


def _png(figure: Figure) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=DPI)
    return stream.getvalue()


def _subtitle(groups: Sequence[Group]) -> str:
    """Return the line below the title."""
    num_runs = sum(len(group.runs) for group in groups)
    lead = "One finished run" if num_runs == 1 else f"{num_runs} finished runs"
    if len(groups) < num_runs:
        number = "one group" if len(groups) == 1 else f"{len(groups)} groups"
        lead += f" in {number}; the runs of a group differ only in the seed"
    lead += ". Losses are in nats per token, changes of a loss are per byte."
    if any(has_new_tokens(run.summary) for group in groups for run in group.runs):
        lead += " Curves of runs with another tokenizer can't be compared."
    if len(with_controls(groups)) > _MAX_GROUPS:
        lead += f" The figures of changes and cost show the first {_MAX_GROUPS} groups."
    return lead


def _caption(name: str, lines: Sequence[_Line]) -> str:
    parts = [_CAPTIONS[name]]
    if name in _WITH_SEEDS:
        if any(len(line.group.seeds) >= MIN_SEEDS for line in lines):
            parts.append(_OVER_SEEDS)
        elif _has_seeds(lines):
            parts.append(_OF_SEEDS)
        elif name in ("tradeoff", "changes"):
            parts.append(_SINGLE)
        if any(line.group.is_control for line in lines):
            parts.append(_CONTROL)
    return " ".join(filter(None, parts))


def _group_table(lines: Sequence[_Line]) -> Table:
    """Return a row per group: seeds, verdicts, each domain's change, cost."""
    domains = _domains([line.group for line in lines])
    changes = (f"{domain} ({role}) [%]" for domain, role in domains)
    header = ("group", "seeds", "status", *changes, "FLOPs", "seconds")
    rows = []
    for line in lines:
        group = line.group
        found = (group.change(domain) for domain, _ in domains)
        costs = (group.mean(methodcaller("cost", of)) for of in ("flops", "seconds"))
        flops, seconds = (None if each is None else each.value for each in costs)
        cells = [group.name, str(len(group.seeds)), "" if group.is_control else _statuses(group)]
        cells += [MISSING if each is None else each.text() for each in found]
        rows.append((*cells, si_text(flops), number_text(seconds, ".1f")))
    caption = (
        f"Change of the loss per byte: mean with Student's {CONFIDENCE:.0%} interval over the "
        f"seeds; below {MIN_SEEDS} seeds, the value of each seed. Cost: mean of the training"
    )
    return Table(header, tuple(rows), (1, *range(3, len(header))), caption)


def _statuses(group: Group) -> str:
    """Return `2 kept, 1 undecided`; the status alone if all runs have the same."""
    counts = Counter(_status_text(run.summary.status) for run in group.runs)
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{number} {status}" for status, number in counts.items())


def _difference_table(lines: Sequence[_Line]) -> Table:
    """Return a row per group: the differences to the reference, paired by seed."""
    reference = _reference(lines)
    others = [line.group for line in lines if line.group is not reference]
    domains = _domains([line.group for line in lines])
    rows = []
    for group in others:
        found = [group.difference(reference, domain) for domain, _ in domains]
        pairs = max((len(each.values) for each in found if each is not None), default=0)
        if pairs:
            texts = (MISSING if each is None else each.text() for each in found)
            rows.append((group.name, str(pairs), *texts))
    header = ("group", "seed pairs", *(f"{domain} ({role}) [%]" for domain, role in domains))
    caption = (
        f"Loss per byte after training, relative to {reference.name} at the same seed; below zero "
        f"is better. From {MIN_SEEDS} pairs on: mean with Student's {CONFIDENCE:.0%} interval, "
        "not adjusted for the number of comparisons; below: the value of each seed"
    )
    return Table(header, tuple(rows), tuple(range(1, len(header))), caption)


def _overview(groups: Sequence[Group]) -> Table:
    """Return a row per run: status, each domain's change, size and cost."""
    runs = [(group, run) for group in groups for run in group.runs]
    domains = tuple(dict.fromkeys((r.domain, r.role) for _, run in runs for r in run.rows))
    changes = (f"{domain} ({role}) [%]" for domain, role in domains)
    has_growth = any(run.summary.growth is not None for _, run in runs)
    growth = ("neurons born", "parameters after growth") if has_growth else ()
    has_experts = any(run.summary.experts is not None for _, run in runs)
    experts = ("experts", "trainable share") if has_experts else ()
    cost = ("parameters", "steps", "FLOPs", "seconds")
    header = ("run", "group", "seed", "status", *changes, *growth, *experts, *cost)
    rows = []
    for group, run in runs:
        summary = run.summary
        cells = [run.name, group.name, str(run.seed), _status_text(summary.status)]
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
        cells += [size_text(summary), str(run.steps)]
        seconds = number_text(summary.seconds.get("total"), ".1f")
        cells += [si_text(summary.flops.get("total")), seconds]
        rows.append(tuple(cells))
    caption = (
        "Change of the loss per byte with the one-sided bounds of the gate, over documents. "
        "Parameters: of the checkpoint. FLOPs and seconds: of the whole run"
    )
    return Table(header, tuple(rows), tuple(range(4, len(header))), caption)


def _status_text(status: object) -> str:
    return str(status).replace("_", " ")


def _settings_table(runs: Sequence[Run]) -> Table:
    """Return the settings that differ; the longer of settings and runs becomes the rows."""
    keys = differing_keys(runs)
    if len(runs) > len(keys):
        by_run = tuple(
            (run.name, *(run.setting(k, _CELL_CHARACTERS) for k in keys)) for run in runs
        )
        return Table(("run", *keys), by_run if keys else ())
    rows = ((key, *(run.setting(key, _CELL_CHARACTERS) for run in runs)) for key in keys)
    return Table(("setting", *(run.name for run in runs)), tuple(rows))


def _tree(runs: Sequence[Run]) -> list[str]:
    """Return the lineages of all checkpoints as one tree, a line each; runs are at the ends."""
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
    tables = [result_table(summary, [*run.rows, *run.control_rows]), attempts_table(summary)]
    if len(summary.tasks) > 1:
        tables.append(task_table(summary))
    if summary.matrix:
        tables.append(transfer_table(summary.matrix, most=_MAX_EVENTS))
    checks = tuple(
        (each.check, each.subject or MISSING, each.verdict, each.detail or MISSING)
        for each in summary.last_attempt.gate
    )
    tables += [Table(("check", "subject", "verdict", "reason"), checks), stage_table(summary)]
    notes = list(summary.notes)
    if growth is not None:
        methods += f", growth={growth.name}"
        tables += [growth_table(growth, most=_MAX_EVENTS), events_table(growth, most=_MAX_EVENTS)]
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


# Figures over several runs: panels that fit a phone


@dataclass(frozen=True, slots=True)
class _Line:
    """A group and its style; the pair of colour and marker is unique for 60 groups."""

    group: Group
    color: str
    marker: str
    style: str

    @property
    def filling(self) -> str:
        return "white" if self.group.is_control else self.color

    @property
    def label(self) -> str:
        number = len(self.group.seeds)
        return self.group.name if number == 1 else f"{self.group.name} ({number} seeds)"


def _lines(groups: Sequence[Group]) -> list[_Line]:
    """Return the groups and their controls, each with a style; a control has that of its group."""
    lines: list[_Line] = []
    number = -1
    for group in with_controls(groups):
        number += not group.is_control
        color, marker = CYCLE[number % len(CYCLE)], _MARKERS[number % len(_MARKERS)]
        style = "--" if group.is_control else _STYLES[number // len(CYCLE) % len(_STYLES)]
        lines.append(_Line(group, color, marker, style))
    return lines


def _reference(lines: Sequence[_Line]) -> Group:
    """Return the group that all others are compared with: the first control, else the first."""
    return next((line.group for line in lines if line.group.is_control), lines[0].group)


def _swatch(line: _Line) -> Markup:
    """Return the mark of a group as SVG; it holds numbers and colours only."""
    import numpy as np
    from matplotlib.markers import MarkerStyle
    from matplotlib.transforms import Affine2D

    style = MarkerStyle(line.marker)
    path = style.get_path().transformed(style.get_transform() + Affine2D().scale(9, -9))
    vertices = np.asarray(path.to_polygons()[0], dtype=float).tolist()
    points = " ".join(f"{x:.2f},{y:.2f}" for x, y in vertices)
    stroke = f'stroke="{line.color}"'
    dashes = f'stroke-width="1.6" stroke-dasharray="{_DASHES[line.style]}"'
    return Markup(
        f'<svg class="swatch" viewBox="-14 -7 28 14"><line x1="-13" x2="13" {stroke} {dashes}/>'
        f'<polygon points="{points}" fill="{line.filling}" {stroke} stroke-width="1.2"/></svg>'
    )


def _legend_figure(lines: Sequence[_Line]) -> Figure:
    """Return the legend of all figures as a figure of its own."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=line.color, linestyle=line.style, label=wrap_text(line.label),
               markersize=5, marker=line.marker, markerfacecolor=line.filling)
        for line in lines[:_MAX_NAMED]
    ]  # fmt: skip
    rows = sum(1 + str(handle.get_label()).count("\n") for handle in handles)
    figure, (axes,) = new_figure(width=4.8, height=0.2 + 0.17 * rows)
    axes.set_axis_off()
    figure.legend(handles=handles, loc="center left", frameon=False, fontsize=7.5)
    return figure


def figures(groups: Sequence[Group]) -> dict[str, list[Figure]]:
    """Return the figures that the runs have data for, by topic."""
    lines = _lines(groups)
    runs = [run for group in groups for run in group.runs]
    means = lines[:_MAX_GROUPS]
    domains = _domains([line.group for line in means])
    is_seeded = _has_seeds(lines)
    changes, differences, reference = [], [], _reference(lines)
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
        for run, record in skilled[:MAX_PANELS]
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
    for name, matrix in learned[:MAX_PANELS]:
        figure = matrix_figure(matrix)
        figure.axes[0].set_title(wrap_text(name), fontsize=9)
        matrices.append(figure)
    longer = [(run.name, run.summary.windows) for run in runs if run.summary.windows]
    drawn = [positions_figure(record, title=name) for name, record in longer[:MAX_PANELS]]
    made = {
        "tradeoff": _tradeoff(lines),
        "differences": [figure for figure in differences if figure is not None],
        "changes": [figure for figure in changes if figure is not None],
        "losses": _losses(lines),
        "cost": _costs(means),
        "growth": _growth(lines),
        "experts": experts,
        "matrix": matrices,
        "positions": [figure for figure in drawn if figure is not None],
    }
    return {name: found for name, found in made.items() if found}


def _has_seeds(lines: Sequence[_Line]) -> bool:
    return any(len(line.group.runs) > 1 for line in lines)


def _domains(groups: Sequence[Group], role: str | None = None) -> list[tuple[str, Role]]:
    """Return domains that have losses, each with its role."""
    rows = (row for group in groups for run in group.runs for row in run.losses)
    found = dict.fromkeys((row.domain, row.role) for row in rows if role in (None, row.role))
    return list(found)[:MAX_PANELS]


def _tradeoff(lines: Sequence[_Line]) -> list[Figure]:
    """Draw forgetting against gain, each as the mean over the domains of its role."""
    points = []
    for line in lines:
        forgetting, gain = (_mean_change(line.group, role) for role in ("old", "new"))
        if forgetting is not None and gain is not None:
            points.append((line, gain, forgetting))
    if not points:
        return []
    figure, axes = panel(height=3.8)
    is_seeded = _has_seeds(lines)
    for line, gain, forgetting in points:
        pairs = list(zip(gain.values, forgetting.values, strict=False))
        if len(gain.values) > 1:
            mark = partial(axes.plot, marker=line.marker, color=line.color, linestyle="none")
            alpha = 1.0 if gain.is_of_seeds else 0.4
            for x, y in pairs:
                mark(-100 * x, 100 * y, markerfacecolor=line.filling, alpha=alpha, markersize=4)
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
    means = [point for point in points if not point[1].is_of_seeds]
    front = _search_path([(-gain.value, forgetting.value) for _, gain, forgetting in means])
    if front:
        xs, ys = zip(*((100 * x, 100 * y) for x, y in front), strict=True)
        axes.plot(xs, ys, color=GREY, linestyle=":", linewidth=1)
    axes.axhline(0, color=GREY, linewidth=0.8)
    axes.margins(0.1)
    axes.set_xlabel("gain: decrease of the loss on new domains [% per byte]")
    axes.set_ylabel("forgetting: increase of the loss\non old domains [% per byte]")
    return [figure]


def _search_path(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the Pareto front of points (gain, forgetting), by gain."""
    best: list[tuple[float, float]] = []
    for gain, forgetting in sorted(points, key=lambda point: (-point[0], point[1])):
        if not best or forgetting < best[-1][1]:
            best.append((gain, forgetting))
    return best


def _mean_change(group: Group, role: str) -> Interval | None:
    """Return the mean change over the domains of a role: of each run, then over the seeds."""
    domains = _domains([group], role)
    if len(domains) == 1:
        return group.change(domains[0][0])

    def of(run: Run) -> float | None:
        values = [row.change.value for row in run.losses if row.role == role]
        known = [value for value in values if value is not None]
        return sum(known) / len(known) if known and len(known) == len(values) else None

    return group.mean(of)


def _losses(lines: Sequence[_Line]) -> list[Figure]:
    """Draw a panel per domain, one of the training loss and one of the base's pretraining."""
    named = {
        f"eval/{domain}/loss": f"{domain} ({role}): validation loss"
        for domain, role in _domains([line.group for line in lines])
    }
    named["train/loss"] = "training loss"
    runs = [run for line in lines for run in line.group.runs]
    is_in_tokens = all(run.tokens_per_step for run in runs)
    made = [_draw_losses(lines, name, title, is_in_tokens) for name, title in named.items()]
    bases: dict[tuple[Curve, float], None] = {}  # each once: runs of a sweep share them
    for run in runs:
        scale = _scale(run, is_in_tokens=is_in_tokens)
        bases |= {(each, scale): None for each in run.pretraining if each.name == "train/loss"}
    if bases:
        figure, axes = panel(height=2.7)
        for curve, scale in bases:
            _draw(axes, curve, scale, _Line(Group("base", ()), GREY, "o", "-"))
        number = "the base" if len(bases) == 1 else f"{len(bases)} bases"
        title = f"pretraining loss of {number}"
        _label_course(axes, title, is_in_tokens=is_in_tokens)
        made.append(figure)
    return [figure for figure in made if figure is not None]


def _draw_losses(
    lines: Sequence[_Line], name: str, title: str, is_in_tokens: bool
) -> Figure | None:
    """Draw one loss of all runs, and mark expansions, growth and the start of tasks."""
    figure, axes = panel(height=2.9)
    is_empty = True
    is_alone = sum(len(line.group.runs) for line in lines if not line.group.is_control) == 1
    marked: dict[tuple[float, str], None] = {}
    for line in lines:
        courses: list[_Curve] = []
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
    for place, kind in list(marked)[:_MAX_MARKED]:
        color, style = ("black", "--") if kind == "expansion" else (GREY, "-.")
        axes.axvline(place, color=color, linestyle=style, linewidth=0.8)
    _label_course(axes, title, is_in_tokens=is_in_tokens)
    return figure


def _scale(run: Run, *, is_in_tokens: bool) -> float:
    return (run.tokens_per_step or 1) / 1000 if is_in_tokens else 1.0


def _label_course(axes: Axes, title: str, *, is_in_tokens: bool) -> None:
    axes.set_title(wrap_text(title), fontsize=9)
    axes.set_xlabel("training tokens [thousand]" if is_in_tokens else "training step")
    axes.set_ylabel("loss [nats/token]")


@dataclass(frozen=True, slots=True)
class _Curve:
    """A curve to draw: a running mean if it has many points."""

    positions: tuple[float, ...]
    values: tuple[float, ...]


def _draw(axes: Axes, curve: Curve, scale: float, line: _Line, *, is_pale: bool = False) -> _Curve:
    """Draw a curve; below a running mean its points are pale.

    Args:
        axes: The panel.
        curve: A loss over the steps; step -1 is the model before its expansion.
        scale: Step → position.
        line: The style.
        is_pale: The curve is one of several seeds.
    """
    positions = [scale * step for step in curve.steps]
    values = [value if abs(value) < MAX_NUMBER else float("nan") for value in curve.values]
    plot = partial(axes.plot, color=line.color, linestyle=line.style)
    alpha, width = (0.35, 0.8) if is_pale else (1.0, 1.3)
    if len(values) < plots.SMOOTHED_FROM_POINTS:
        marks: dict[str, Any] = {
            "marker": line.marker,
            "markerfacecolor": line.filling,
            "markersize": 3,
        }
        plot(positions, values, alpha=alpha, linewidth=width, **({} if is_pale else marks))
        return _Curve(tuple(positions), tuple(values))
    window = len(values) // 20
    mean = running_mean(values, window)
    centres = positions[window // 2 : window // 2 + len(mean)]
    if not is_pale:
        plot(positions, values, alpha=0.2)
    plot(centres, mean, alpha=alpha, linewidth=width)
    return _Curve(tuple(centres), tuple(mean))


def _draw_mean(axes: Axes, courses: Sequence[_Curve], line: _Line) -> None:
    """Draw the mean of several seeds' curves over the positions that all of them have."""
    if len(courses) < 2:
        return
    first, *others = (dict(zip(each.positions, each.values, strict=True)) for each in courses)
    shared = [x for x in first if all(x in other for other in others)]
    means = [fmean([first[x], *(other[x] for other in others)]) for x in shared]
    marker = line.marker if len(shared) < plots.SMOOTHED_FROM_POINTS else ""
    axes.plot(shared, means, color=line.color, linestyle=line.style, linewidth=1.6, marker=marker,
              markerfacecolor=line.filling, markersize=4)  # fmt: skip


def _costs(lines: Sequence[_Line]) -> list[Figure]:
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


def _growth(lines: Sequence[_Line]) -> list[Figure]:
    """Draw the neurons of each run with growth, the pressure of a single one, and the cost."""
    found = [
        (line, run, run.summary.growth)
        for line in lines
        for run in line.group.runs
        if run.summary.growth is not None
    ]
    made = []
    for _, run, growth in found[:MAX_PANELS]:
        drawn = [draw_neurons] if len(found) > 1 else [draw_neurons, draw_pressure]
        for draw in drawn:
            figure, axes = panel(height=2.9)
            draw(axes, growth, end=run.last_steps)
            what = axes.get_title()
            axes.set_title(wrap_text(f"{run.name}: {what}"), fontsize=9)
            if draw is draw_neurons and growth.events:
                figure.legend(loc="outside lower left", ncols=2, frameon=False, fontsize=7.5)
            made.append(figure)
    if not found:
        return made
    figure, axes = panel(height=2.9)
    is_empty = True
    for line, run, growth in found:
        course = parameters_over_flops(growth, end_flops=last_flops(run.curves))
        if course[0]:
            draw_parameters(axes, *course, color=line.color, marker=line.marker)
            is_empty = False
    if not is_empty:
        label_flops(axes)
        axes.set_title("parameters over the training FLOPs", fontsize=9)
        made.append(figure)
    return made


def _bars_of(
    found: Sequence[tuple[_Line, Interval | None]],
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
    labels = [wrap_text(line.label) for line, _ in rows]
    heights = [0.27 + 0.15 * (1 + label.count("\n")) for label in labels]  # inches
    figure, axes = panel(height=0.8 + sum(heights))
    bottoms = [*accumulate(heights)]
    for bottom, (line, interval) in zip(bottoms, rows, strict=True):
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
    axes.set_ylim(bottoms[-1] + 0.2, 0)
    axes.axvline(0, color=GREY, linewidth=0.8)
    axes.grid(axis="x", alpha=0.25)
    label_rows(axes, bottoms, labels)
    axes.set_title(wrap_text(title), fontsize=9)
    return figure


def _bars(interval: Interval) -> tuple[float, float]:
    """Return the distances of the bounds from the value; 0 for an unknown one."""
    below = 0.0 if interval.lower is None else max(0.0, interval.value - interval.lower)
    above = 0.0 if interval.upper is None else max(0.0, interval.upper - interval.value)
    return below, above
