"""One self-contained HTML page of several runs: text is escaped, nothing is loaded."""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from operator import methodcaller
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from tritter import __version__
from tritter.report.drawing import DPI
from tritter.report.experts import experts_text, page_tables, share_text
from tritter.report.figures import (
    MOST_GROUPS,
    MOST_NAMED,
    WITH_LEGEND,
    Line,
    domains_of,
    figures,
    has_seeds,
    legend_figure,
    lines_of,
    reference_of,
    swatch,
)
from tritter.report.growth import growth_table, growth_text
from tritter.report.matrix import transfer_table
from tritter.report.rows import change_text, score_of, score_text
from tritter.report.runs import (
    CONFIDENCE,
    FEWEST_SEEDS,
    Group,
    Run,
    differing_keys,
    grouped,
    with_controls,
)
from tritter.report.summary import Summary
from tritter.report.table import Table, left_out
from tritter.report.tables import result_table, stage_table, task_table
from tritter.report.wording import MISSING, count_text, number_text, si_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_CELL_CHARACTERS = 400  # of a setting
_EVENT_HEADER = (
    *("step", "layer", "born", "replaced", "left dead", "neurons", "pressure"),
    *("logit shift [σ]", "parameters", "FLOPs so far"),
)
_MOST_EVENTS = 100  # rows of a table of growth events; summary.json has all
# Control characters, and those that change the direction of the text after them
_UNSEEN = dict.fromkeys(
    [*range(9), *range(11, 32), *range(127, 160), *range(0x202A, 0x202F), *range(0x2066, 0x206A)],
    "\N{REPLACEMENT CHARACTER}",
)
_VERDICTS = ("kept", "rolled back", "undecided", "passed", "failed")

# Figures by topic: titles and captions
TITLES = {
    "tradeoff": "Forgetting and gain",
    "differences": "Differences to the reference group",
    "losses": "Loss curves",
    "changes": "Change of the loss by domain",
    "cost": "Training cost",
    "growth": "Neuron growth",
    "experts": "LoRA experts",
    "matrix": "Loss after each task",
}
_OVER_SEEDS = (
    f"Pale marks: seeds. Full marks and bars: mean and Student's {CONFIDENCE:.0%} interval over "
    f"the seeds, from {FEWEST_SEEDS} seeds on."
)
_SINGLE = "Bars: one-sided bounds of the gate, over documents."
_CONTROL = "Hollow marks: control (not grown)."
CAPTIONS = {
    "tradeoff": "Bottom right is best. Dotted line: Pareto front of the means.",
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
}
_WITH_SEEDS = ("tradeoff", "differences", "changes", "cost")  # whose marks are groups


def page(
    runs: Sequence[Run],
    *,
    title: str,
    notes: Sequence[str] = (),
    beside: Mapping[str, Table] | None = None,
) -> tuple[str, dict[str, bytes]]:
    """Return the page, and its figures by file name as PNG.

    Args:
        runs: The finished runs.
        title: Title of the page.
        notes: Lines on folders that are not on it.
        beside: Title → table, shown after the table of all runs.
    """
    groups = grouped(runs)
    lines = lines_of(groups)
    pictures = {name: [_png(figure) for figure in found] for name, found in figures(groups).items()}
    environment = Environment(
        loader=PackageLoader("tritter.report", ""), autoescape=True, undefined=StrictUndefined
    )
    legend = [{"swatch": swatch(line), "label": line.label} for line in lines[:MOST_NAMED]]
    swatches = {line.group.name: swatch(line) for line in lines}
    text = environment.get_template("page.html.j2").render(
        version=__version__,
        title=title,
        lead=_lead(groups),
        notes=notes,
        verdicts=_VERDICTS,
        groups=_group_table(lines) if len(groups) < len(runs) else Table((), ()),
        differences=_difference_table(lines),
        overview=_overview(groups),
        swatches=swatches,
        legend=legend if len(lines) > 1 else [],
        rest=max(0, len(lines) - MOST_NAMED),
        beside=dict(beside or {}),
        figures=[
            {
                "name": name,
                "title": TITLES[name],
                "caption": _caption(name, lines),
                "has_legend": name in WITH_LEGEND,
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
    if len(lines) > 1:
        files["legend.png"] = _png(legend_figure(lines))
    return text.translate(_UNSEEN).encode("utf-8", "replace").decode("utf-8"), files


def _png(figure: Figure) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=DPI)
    return stream.getvalue()


def _lead(groups: Sequence[Group]) -> str:
    """Return the line below the title."""
    num_runs = sum(len(group.runs) for group in groups)
    lead = "One finished run" if num_runs == 1 else f"{num_runs} finished runs"
    if len(groups) < num_runs:
        number = "one group" if len(groups) == 1 else f"{len(groups)} groups"
        lead += f" in {number}; the runs of a group differ only in the seed"
    lead += ". Losses are in nats per token, changes of a loss are per byte."
    if len(with_controls(groups)) > MOST_GROUPS:
        lead += f" The figures of changes and cost show the first {MOST_GROUPS} groups."
    return lead


def _caption(name: str, lines: Sequence[Line]) -> str:
    parts = [CAPTIONS[name]]
    if name in _WITH_SEEDS:
        if has_seeds(lines):
            parts.append(_OVER_SEEDS)
        elif name in ("tradeoff", "changes"):
            parts.append(_SINGLE)
        if any(line.group.is_control for line in lines):
            parts.append(_CONTROL)
    return " ".join(filter(None, parts))


def _group_table(lines: Sequence[Line]) -> Table:
    """Return a row per group: seeds, verdicts, each domain's change, cost."""
    domains = domains_of([line.group for line in lines])
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
        f"seeds; below {FEWEST_SEEDS} seeds, the value of each seed. Cost: mean of the training"
    )
    return Table(header, tuple(rows), (1, *range(3, len(header))), caption)


def _statuses(group: Group) -> str:
    """Return `2 kept, 1 undecided`; the status alone if all runs have the same."""
    counts = Counter(_words(run.summary.status) for run in group.runs)
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{number} {status}" for status, number in counts.items())


def _difference_table(lines: Sequence[Line]) -> Table:
    """Return a row per group: the differences to the reference, paired by seed."""
    reference = reference_of(lines)
    others = [line.group for line in lines if line.group is not reference]
    domains = domains_of([line.group for line in lines])
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
        f"is better. From {FEWEST_SEEDS} pairs on: mean with Student's {CONFIDENCE:.0%} interval, "
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
    caption = (
        "Change of the loss per byte with the one-sided bounds of the gate, over documents. "
        "Parameters: of the checkpoint. FLOPs and seconds: of the whole run"
    )
    return Table(header, tuple(rows), tuple(range(4, len(header))), caption)


def _words(status: object) -> str:
    return str(status).replace("_", " ")


def _differing(runs: Sequence[Run]) -> Table:
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
    tables = [result_table(summary, [*run.rows, *run.control_rows]), _attempts(summary)]
    if len(summary.tasks) > 1:
        tables.append(task_table(summary))
    if summary.matrix:
        tables.append(transfer_table(summary.matrix, most=_MOST_EVENTS))
    checks = tuple(
        (each.check, each.subject or MISSING, each.verdict, each.detail or MISSING)
        for each in summary.last_attempt.gate
    )
    tables += [Table(("check", "subject", "verdict", "reason"), checks), stage_table(summary)]
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
        lines = ["Growth events", left_out(len(growth.events), _MOST_EVENTS)]
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
    """Return a row per attempt or round; empty if there was only one."""
    rounds = summary.rounds
    parts = rounds or summary.attempts
    if len(parts) < 2:
        return Table((), ())
    domains = list(summary.baseline)
    rows = []
    for number, each in enumerate(parts, start=1):
        changes = each.overrides or ["as requested"]
        if rounds:
            changes = each.expansion or ["no expansion"]
        scores = (score_text(score_of(each.final, domain)) for domain in domains)
        rows.append((f"{number}: {' '.join(changes)}", *scores, _words(each.status or MISSING)))
    header = ("round" if rounds else "attempt", *domains, "verdict")
    numbers = tuple(range(1, 1 + len(domains)))
    return Table(header, tuple(rows), numbers, f"Loss after each {header[0]}")
