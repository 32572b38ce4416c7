"""One self-contained HTML page of several runs: text is escaped, nothing is loaded."""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from operator import methodcaller
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from tritter import __version__
from tritter.report.compared import Comparison
from tritter.report.drawing import new_figure, wrap_text
from tritter.report.figures import group_figures, loss_domains
from tritter.report.runs import (
    EndedRun,
    Group,
    Interval,
    differing_keys,
)
from tritter.report.table import MISSING, Table, number_text, si_text
from tritter.report.tables import SummaryTables
from tritter.report.topics import TOPICS, topics_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_CELL_CHARACTERS = 400  # of a setting
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
    "positions": "Loss by position",
    **{topic.name: topic.title for topic in TOPICS},
}
_CONFIDENCE, _MIN_SEEDS = f"{Interval.CONFIDENCE:.0%}", Interval.MIN_SEEDS
_OVER_SEEDS = (
    f"Pale marks: seeds. Full marks and bars: mean and Student's {_CONFIDENCE} interval over "
    f"the seeds. Below {_MIN_SEEDS} seeds, every mark is a seed."
)
_OF_SEEDS = f"Every mark is a seed; there are no intervals below {_MIN_SEEDS} seeds."
_SINGLE = "Bars: one-sided bounds of the gate, over documents."
_CONTROL = "Hollow marks: control (not grown)."
_CAPTIONS = {
    "tradeoff": "Bottom right is best. A single run has a mark for each pair of an old and a new "
    "domain, others for their means. Dotted line: Pareto front. Dashed line, if any: bound of the "
    "gate.",
    "differences": "",  # the table above the figures has it
    "losses": "Validation loss on a fixed subset; a rise on an old domain is forgetting. The loss "
    "left of a dashed vertical line is that before the expansion. Dotted horizontal line: the "
    "first loss of a single run. Dash-dotted vertical line: next task. Dotted vertical line, or "
    "tick at the bottom: neuron growth. Dashed curve: control (not grown). Thick curve: mean over "
    "the seeds. Where a curve is a running mean, its points are pale.",
    "changes": "From before the expansion to the end of training.",
    "cost": "The last attempt, or all rounds, with the preparation of the methods. The table of "
    "runs has the totals. Compare seconds only within one sweep on one machine.",
    "positions": "Validation loss of long documents in long windows.",
    **{topic.name: topic.caption for topic in TOPICS},
}
_WITH_SEEDS = ("tradeoff", "differences", "changes", "cost")  # whose marks are groups
_MAX_NAMED = 60  # in the legend
_DASHES = {"-": "none", "--": "4 3", ":": "1.5 2", "-.": "5 2 1 2"}  # in SVG
_WITH_LEGEND = ("tradeoff", "losses", *(topic.name for topic in TOPICS if topic.has_legend))


def page(
    runs: Sequence[EndedRun],
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
    compared = Comparison(tuple(runs))
    groups, styled = compared.groups, compared.styled
    drawn = group_figures(compared)
    pictures = {name: [_png(figure) for figure in found] for name, found in drawn.items()}
    environment = Environment(
        loader=PackageLoader("tritter.report", ""), autoescape=True, undefined=StrictUndefined
    )
    legend = [{"swatch": _swatch(each), "label": each.label} for each in styled[:_MAX_NAMED]]
    swatches = {group.name: _swatch(group) for group in styled}
    text = environment.get_template("page.html.j2").render(
        version=__version__,
        title=title,
        lead=_subtitle(compared),
        notes=notes,
        verdicts=_VERDICTS,
        groups=_group_table(compared) if len(groups) < len(runs) else Table((), ()),
        differences=_difference_table(compared),
        overview=_overview(groups),
        swatches=swatches,
        legend=legend if len(styled) > 1 else [],
        rest=max(0, len(styled) - _MAX_NAMED),
        tables=dict(tables or {}),
        figures=[
            {
                "name": name,
                "title": _TITLES[name],
                "caption": _caption(name, compared),
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
    if len(styled) > 1:
        files["legend.png"] = _png(_legend_figure(styled))
    return text.translate(_UNSEEN).encode("utf-8", "replace").decode("utf-8"), files


def _png(figure: Figure) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi="figure")
    return stream.getvalue()


def _subtitle(compared: Comparison) -> str:
    """Return the line below the title."""
    groups, num_runs = compared.groups, len(compared.runs)
    lead = "One finished run" if num_runs == 1 else f"{num_runs} finished runs"
    if len(groups) < num_runs:
        number = "one group" if len(groups) == 1 else f"{len(groups)} groups"
        lead += f" in {number}; the runs of a group differ only in the seed"
    lead += ". Losses without another unit are in nats per token, changes of a loss are per byte."
    if any(run.summary.has_new_tokens for run in compared.runs):
        lead += " Curves of runs with another tokenizer can't be compared."
    if len(compared.styled) > Comparison.MAX_GROUPS:
        lead += f" The figures of changes and cost show the first {Comparison.MAX_GROUPS} groups."
    return lead


def _caption(name: str, compared: Comparison) -> str:
    parts = [_CAPTIONS[name]]
    if name in _WITH_SEEDS:
        if any(len(group.seeds) >= _MIN_SEEDS for group in compared.styled):
            parts.append(_OVER_SEEDS)
        elif any(len(group.runs) > 1 for group in compared.styled):
            parts.append(_OF_SEEDS)
        elif name in ("tradeoff", "changes"):
            parts.append(_SINGLE)
        if any(group.is_control for group in compared.styled):
            parts.append(_CONTROL)
    return " ".join(filter(None, parts))


def _group_table(compared: Comparison) -> Table:
    """Return a row per group: seeds, verdicts, each domain's change, cost."""
    domains = loss_domains(compared.styled)
    changes = (f"{domain} ({role}) [%]" for domain, role in domains)
    header = ("group", "seeds", "status", *changes, "FLOPs", "seconds")
    rows = []
    for group in compared.styled:
        found = (group.change(domain) for domain, _ in domains)
        costs = (group.mean(methodcaller("cost", of)) for of in ("flops", "seconds"))
        flops, seconds = (None if each is None else each.value for each in costs)
        cells = [group.name, str(len(group.seeds)), "" if group.is_control else _statuses(group)]
        cells += [MISSING if each is None else each.text() for each in found]
        rows.append((*cells, si_text(flops), number_text(seconds, ".1f")))
    caption = (
        f"Change of the loss per byte: mean with Student's {_CONFIDENCE} interval over the "
        f"seeds; below {_MIN_SEEDS} seeds, the value of each seed. Cost: mean of the training"
    )
    return Table(header, tuple(rows), (1, *range(3, len(header))), caption)


def _statuses(group: Group) -> str:
    """Return `2 kept, 1 undecided`; the status alone if all runs have the same."""
    counts = Counter(_status_text(run.summary.status) for run in group.runs)
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{number} {status}" for status, number in counts.items())


def _difference_table(compared: Comparison) -> Table:
    """Return a row per group: the differences to the reference, paired by seed."""
    reference, domains = compared.reference, loss_domains(compared.styled)
    others = [group for group in compared.styled if group is not reference]
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
        f"is better. From {_MIN_SEEDS} pairs on: mean with Student's {_CONFIDENCE} interval, "
        "not adjusted for the number of comparisons; below: the value of each seed"
    )
    return Table(header, tuple(rows), tuple(range(1, len(header))), caption)


def _overview(groups: Sequence[Group]) -> Table:
    """Return a row per run: status, each domain's change, size and cost."""
    runs = [(group, run) for group in groups for run in group.runs]
    domains = tuple(dict.fromkeys((r.domain, r.role) for _, run in runs for r in run.rows))
    changes = (f"{domain} ({role}) [%]" for domain, role in domains)
    found = [[t.columns(record) for t, record in topics_of(run.summary)] for _, run in runs]
    added = [{name: cell for each in own for name, cell in each.items()} for own in found]
    names = dict.fromkeys(name for each in added for name in each)
    cost = ("parameters", "steps", "FLOPs", "seconds")
    header = ("run", "group", "seed", "status", *changes, *names, *cost)
    rows = []
    for (group, run), extra in zip(runs, added, strict=True):
        summary = run.summary
        cells = [run.name, group.name, str(run.seed), _status_text(summary.status)]
        for domain, _ in domains:
            texts = (row.change.text() for row in run.rows if row.domain == domain)
            cells.append(next(texts, MISSING))
        cells += [extra.get(name, MISSING) for name in names]
        cells += [SummaryTables(summary).size, str(run.steps)]
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


def _settings_table(runs: Sequence[EndedRun]) -> Table:
    """Return the settings that differ; the longer of settings and runs becomes the rows."""
    keys = differing_keys(runs)
    if len(runs) > len(keys):
        by_run = tuple(
            (run.name, *(run.setting(k, _CELL_CHARACTERS) for k in keys)) for run in runs
        )
        return Table(("run", *keys), by_run if keys else ())
    rows = ((key, *(run.setting(key, _CELL_CHARACTERS) for run in runs)) for key in keys)
    return Table(("setting", *(run.name for run in runs)), tuple(rows))


def _tree(runs: Sequence[EndedRun]) -> list[str]:
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


def _details(run: EndedRun) -> dict[str, Any]:
    summary = run.summary
    chosen = {"expansion": summary.expansion, "forgetting": summary.forgetting}
    methods = [f"{key}={'+'.join(names) or 'none'}" for key, names in chosen.items()]
    own = SummaryTables(summary)
    tables = [own.results([*run.rows, *run.control_rows]), own.attempts()]
    if len(summary.tasks) > 1:
        tables.append(own.tasks())
    notes = []
    for topic, record in topics_of(summary):
        methods += [f"{topic.name}={name}" for name in filter(None, [topic.method(record)])]
        tables += topic.tables(record, on_page=True)
        notes += [f"{topic.title}: {text}." for text in filter(None, [topic.text(record)])]
    checks = tuple(
        (each.check, each.subject or MISSING, each.verdict, each.detail or MISSING)
        for each in summary.last_attempt.gate
    )
    part = "round" if summary.rounds else "attempt"
    last = f" of the last {part}" if len(summary.rounds or summary.attempts) > 1 else ""
    header, title = ("check", "subject", "verdict", "reason"), f"Checks of the gate{last}"
    tables += [Table(header, checks, title=title), own.outside(), own.stages()]
    return {
        "name": run.name,
        "status": summary.status,
        "methods": ", ".join(methods),
        "tables": [table for table in tables if table.rows],
        "samples": summary.samples,
        "notes": [*notes, *summary.notes],
    }


def _swatch(group: Group) -> Markup:
    """Return the mark of a group as SVG; it holds numbers and colours only."""
    import numpy as np
    from matplotlib.markers import MarkerStyle
    from matplotlib.transforms import Affine2D

    style = MarkerStyle(group.marker)
    path = style.get_path().transformed(style.get_transform() + Affine2D().scale(9, -9))
    vertices = np.asarray(path.to_polygons()[0], dtype=float).tolist()
    points = " ".join(f"{x:.2f},{y:.2f}" for x, y in vertices)
    stroke = f'stroke="{group.color}"'
    dashes = f'stroke-width="1.6" stroke-dasharray="{_DASHES[group.style]}"'
    return Markup(
        f'<svg class="swatch" viewBox="-14 -7 28 14"><line x1="-13" x2="13" {stroke} {dashes}/>'
        f'<polygon points="{points}" fill="{group.filling}" {stroke} stroke-width="1.2"/></svg>'
    )


def _legend_figure(groups: Sequence[Group]) -> Figure:
    """Return the legend of all figures as a figure of its own."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=group.color, linestyle=group.style, label=wrap_text(group.label),
               markersize=5, marker=group.marker, markerfacecolor=group.filling)
        for group in groups[:_MAX_NAMED]
    ]  # fmt: skip
    rows = sum(1 + str(handle.get_label()).count("\n") for handle in handles)
    figure, (axes,) = new_figure(width=4.8, height=0.2 + 0.17 * rows)
    axes.set_axis_off()
    figure.legend(handles=handles, loc="center left", frameon=False, fontsize=7.5)
    return figure
