"""One self-contained HTML page of several runs: their text is escaped, nothing is loaded."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from tritter import __version__
from tritter.report.captions import CAPTIONS, TITLES
from tritter.report.comparison import MOST_GROUPS, figures
from tritter.report.drawing import DPI
from tritter.report.experts import experts_text, page_tables, share_text
from tritter.report.growth import (
    change_of_function,
    growth_table,
    growth_text,
)
from tritter.report.matrix import (
    transfer_table,
)
from tritter.report.rows import DomainRow, checks, last_attempt, score_of
from tritter.report.runs import Group, Run, differing_keys, grouped, with_controls
from tritter.report.summary import GrowthRecord
from tritter.report.table import Table, left_out
from tritter.report.tables import result_table, stage_table, task_table
from tritter.report.wording import (
    MISSING,
    Signs,
    change_text,
    count_text,
    score_text,
    seconds_text,
    si_text,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_CELL_CHARACTERS = 160  # of a setting
_MOST_EVENTS = 100  # of a run's growth, row by row; summary.json has all
# Control characters, and what turns the direction of the text after it; names of folders may hold
# halves of characters besides
_UNSEEN = dict.fromkeys(
    [*range(9), *range(11, 32), *range(127, 160), *range(0x202A, 0x202F), *range(0x2066, 0x206A)],
    "\N{REPLACEMENT CHARACTER}",
)
_VERDICTS = ("kept", "rolled back", "undecided", "passed", "failed")


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
    pictures = {name: [_png(figure) for figure in found] for name, found in figures(groups).items()}
    environment = Environment(
        loader=PackageLoader("tritter.report", ""), autoescape=True, undefined=StrictUndefined
    )
    text = environment.get_template("page.html.j2").render(
        version=__version__,
        title=title,
        lead=_lead(runs, groups),
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


def _png(figure: Figure) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=DPI)
    return stream.getvalue()


def _lead(runs: Sequence[Run], groups: Sequence[Group]) -> str:
    number = "one finished run" if len(runs) == 1 else f"{len(runs)} finished runs"
    if len(groups) < len(runs):
        number += f" in {len(groups)} groups that differ in the seed alone"
    said = f"{number[0].upper()}{number[1:]}. Losses in nats per token, changes per byte."
    if len(with_controls(groups)) > MOST_GROUPS:
        said += f" Changes and cost are drawn of the first {MOST_GROUPS} groups."
    return said


def _overview(groups: Sequence[Group]) -> Table:
    """Return a row per run: its verdict, each domain's change, size and cost."""
    runs = [(group, run) for group in groups for run in group.runs]
    domains = tuple(dict.fromkeys((r.domain, r.role) for _, run in runs for r in run.rows))
    changes = (f"{domain} ({role})" for domain, role in domains)
    has_growth = any(run.growth is not None for _, run in runs)
    growth = ("neurons born", "parameters after growth") if has_growth else ()
    has_experts = any(run.experts is not None for _, run in runs)
    experts = ("experts", "trainable share") if has_experts else ()
    cost = ("parameters", "steps", "FLOPs", "seconds")
    header = ("run", "group", "seed", "status", *changes, *growth, *experts, *cost)
    rows = tuple(
        (
            run.name,
            group.name,
            str(run.seed),
            _words(run.summary["status"]),
            *(_change_of(run.rows, domain) for domain, _ in domains),
            *(_growth_of(run) if has_growth else ()),
            *(_experts_of(run) if has_experts else ()),
            count_text((run.summary.get("parameters") or {}).get("final")),
            str(run.steps),
            si_text((run.summary.get("flops") or {}).get("total")),
            seconds_text((run.summary.get("seconds") or {}).get("total")),
        )
        for group, run in runs
    )
    caption = "change of loss per byte in %, with one-sided bounds over documents"
    return Table(header, rows, tuple(range(4, len(header))), caption)


def _change_of(rows: Sequence[DomainRow], domain: str) -> str:
    return next((change_text(row.change) for row in rows if row.domain == domain), MISSING)


def _growth_of(run: Run) -> tuple[str, str]:
    if run.growth is None:
        return MISSING, MISSING
    return str(run.growth.born), count_text(run.growth.parameters_after)


def _experts_of(run: Run) -> tuple[str, str]:
    if run.experts is None:
        return MISSING, MISSING
    return str(run.experts.number), share_text(run.experts.share)


def _words(status: object) -> str:
    return str(status).replace("_", " ")


def _differing(runs: Sequence[Run]) -> Table:
    """Return the settings that differ; the longer of settings and runs goes down the page."""
    keys = differing_keys(runs)
    if len(runs) > len(keys):
        by_run = tuple((run.name, *(_plain(run.settings.get(k)) for k in keys)) for run in runs)
        return Table(("run", *keys), by_run if keys else ())
    rows = ((key, *(_plain(run.settings.get(key)) for run in runs)) for key in keys)
    return Table(("setting", *(run.name for run in runs)), tuple(rows))


def _plain(value: Any) -> str:
    if isinstance(value, list):
        value = ", ".join(map(str, value)) or "none"
    text = MISSING if value is None else str(value)
    return text if len(text) <= _CELL_CHARACTERS else f"{text[:_CELL_CHARACTERS]}.."


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
    methods = ", ".join(
        f"{key}={'+'.join(map(str, summary.get(key) or ())) or 'none'}"
        for key in ("expansion", "forgetting")
    )
    tables = [result_table(summary, [*run.rows, *run.control_rows]), _attempts(summary)]
    if len(summary.get("tasks") or ()) > 1:
        tables.append(task_table(summary))
    if run.matrix:
        tables.append(transfer_table(run.matrix, most=_MOST_EVENTS))
    tables += [_gate(summary), stage_table(summary)]
    notes = [str(note) for note in summary.get("notes") or ()]
    if run.growth is not None:
        methods += f", growth={run.growth.name}"
        tables += [growth_table(run.growth, most=_MOST_EVENTS), _growth_events(run.growth)]
        notes.insert(0, f"Growth: {growth_text(run.growth, signs=Signs.for_encoding('utf-8'))}.")
    if run.experts is not None:
        methods += f", experts={run.experts.kind}"
        tables += page_tables(run.experts)
        notes.insert(0, f"LoRA experts: {experts_text(run.experts)}.")
    return {
        "name": run.name,
        "status": str(summary["status"]),
        "methods": methods,
        "tables": [table for table in tables if table.rows],
        "samples": [
            {key: str(sample.get(key) or "") for key in ("domain", "prompt", "before", "after")}
            for sample in summary.get("samples") or ()
        ],
        "notes": notes,
    }


def _growth_events(growth: GrowthRecord) -> Table:
    """Return a row per layer and step; empty where nothing grew."""
    rows = tuple(
        (
            *(str(count) for count in (event.step, event.layer)),
            *(str(count) for count in (event.born, event.replaced, event.died, event.neurons)),
            MISSING if event.pressure is None else f"{event.pressure:.3g}",
            change_of_function(event.function_change),
            count_text(event.parameters),
            si_text(event.flops),
        )
        for event in growth.events[:_MOST_EVENTS]
    )
    header = (
        *("step", "layer", "born", "replaced", "left dead", "neurons", "pressure"),
        *("function change", "parameters", "FLOPs until then"),
    )
    lines = ["growth, event by event", left_out(len(growth.events), _MOST_EVENTS)]
    caption = "; ".join(filter(None, lines))
    return Table(header, rows, tuple(range(len(header))), caption)


def _attempts(summary: Mapping[str, Any]) -> Table:
    """Return what each attempt or round was and how it ended; empty where there was one."""
    rounds = summary.get("rounds") or ()
    parts = rounds or summary["attempts"]
    if len(parts) < 2:
        return Table((), ())
    domains = list(summary["baseline"])
    rows = tuple(
        (
            f"{number}: {' '.join(_what(each, is_round=bool(rounds)))}",
            *(score_text(score_of(each["final"], domain)) for domain in domains),
            _words(each.get("status", MISSING)),
        )
        for number, each in enumerate(parts, start=1)
    )
    header = ("round" if rounds else "attempt", *domains, "verdict")
    numbers = tuple(range(1, 1 + len(domains)))
    return Table(header, rows, numbers, f"loss at the end of each {header[0]}")


def _what(part: Mapping[str, Any], *, is_round: bool) -> Sequence[str]:
    if is_round:
        return part.get("expansion") or ["not expanded"]
    return part.get("overrides") or ["as asked for"]


def _gate(summary: Mapping[str, Any]) -> Table:
    made = checks(last_attempt(summary))
    keys = ("check", "subject", "verdict", "detail")
    rows = tuple(tuple(str(check.get(key, MISSING)) for key in keys) for check in made)
    return Table(("check", "of", "verdict", "because"), rows)
