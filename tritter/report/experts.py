"""LoRA experts in words and numbers: the tables of a run, on the terminal and on the page."""

from collections.abc import Sequence

from rich.table import Table

from tritter.report.experts_record import ExpertRow, ExpertsRecord
from tritter.report.page_table import PageTable
from tritter.report.rich_table import new_table
from tritter.report.wording import MISSING, Signs, count_text

MAX_ROWS = 16
MAX_COLUMNS = 6  # experts side by side on a terminal
_NAME_CHARACTERS = 12
_MOST = 100  # rows and columns on the page; summary.json has all


def experts_table(experts: ExpertsRecord, *, signs: Signs) -> Table:
    """Return a row per expert: where it was born and why, its rank and how much it is used."""
    table = new_table(f"LoRA experts ({signs.shortened(experts.kind, 40)})")
    for name in ("expert", "born in"):
        table.add_column(name, overflow="fold")
    for name in ("step", "batches", "novelty", "limit", "rank", "usage %"):
        table.add_column(name, justify="right", overflow="fold")
    table.add_column("", overflow="fold")
    rows = experts.rows
    for row in rows[:MAX_ROWS]:
        name, domain, *numbers, state = expert_cells(row)
        names = (signs.shortened(text, _NAME_CHARACTERS) for text in (name, domain))
        table.add_row(*names, *numbers, state)
    table.caption = "usage: mean gate over the domains; batches: that the decision took"
    if len(rows) > MAX_ROWS:
        table.caption += f"\n{len(rows) - MAX_ROWS} more are in summary.json"
    return table


def usage_table(experts: ExpertsRecord, *, signs: Signs) -> Table:
    """Return a row per domain: how its held-out text is routed; of many experts the most used."""
    table = new_table("Routing: mean gate in %")
    table.add_column("domain", overflow="fold")
    most = set(experts.by_usage[:MAX_COLUMNS])
    shown = [name for name in experts.names if name in most]
    for name in shown:
        label = signs.shortened(name, _NAME_CHARACTERS)
        table.add_column(label, justify="right", overflow="fold")
    for domain, shares in list(experts.usage.items())[:MAX_ROWS]:
        label = signs.shortened(domain, _NAME_CHARACTERS)
        table.add_row(label, *(_percent(shares.get(name)) for name in shown))
    left_out = [
        f"{number} {what} more are in summary.json"
        for number, what in (
            (len(experts.names) - len(shown), "experts"),
            (len(experts.usage) - MAX_ROWS, "domains"),
        )
        if number > 0
    ]
    table.caption = "\n".join(left_out) or None
    return table


def experts_text(experts: ExpertsRecord) -> str:
    """Say in a line what the experts came to."""
    parts = [f"{experts.number} at the end, {len(experts.spawned)} spawned"]
    if experts.trainable is not None:
        share = "" if experts.share is None else f" ({share_text(experts.share)})"
        parts.append(f"{count_text(experts.trainable)} parameters trained{share}")
    if experts.batches:
        counted = (f"{number:,} {kind}" for kind, number in experts.batches.items())
        parts.append(f"batches: {', '.join(counted)}")
    if refused := experts.refused:
        parts.append(f"{len(refused)} refused, last: {refused[-1].why or 'no reason is recorded'}")
    if len(experts.names) > 1 and (experts.top_k or experts.temperature) is not None:
        way = "dense" if not experts.top_k else f"top-{experts.top_k}"
        warmth = "" if experts.temperature is None else f" at temperature {experts.temperature:.3g}"
        parts.append(f"routed {way}{warmth}")
    return "; ".join(parts)


def share_text(share: float | None) -> str:
    """Return the trainable share in per cent."""
    return MISSING if share is None else f"{100 * share:.3g} %"


def expert_cells(row: ExpertRow) -> list[str]:
    """Return name, domain, step, batches, novelty, threshold, rank, usage in per cent and state."""
    spawn = row.spawn
    if spawn is None:
        return [row.name, MISSING, *[MISSING] * 4, _count(row.rank), _percent(row.usage), row.state]
    numbers = (spawn.score, spawn.threshold)
    return [
        row.name,
        spawn.domain or MISSING,
        *map(_count, (spawn.step, spawn.batches)),
        *(MISSING if value is None else f"{value:.3g}" for value in numbers),
        _count(row.rank),
        _percent(row.usage),
        row.state,
    ]


def page_tables(experts: ExpertsRecord) -> list[PageTable]:
    """Return what the page has of a run's experts: them, routing, similarity, and events."""
    return [_experts(experts), _usage(experts), _similarity(experts), _events(experts)]


def _experts(experts: ExpertsRecord) -> PageTable:
    header = (
        *("LoRA expert", "born in", "step", "batches", "novelty", "threshold", "rank", "usage %"),
        "state",
    )
    rows = tuple(tuple(expert_cells(row)) for row in experts.rows[:_MOST])
    caption = (
        "batches: that the decision to spawn took; usage: mean gate over the domains' held-out text"
    )
    return PageTable(header, rows, tuple(range(2, 8)), caption + _left_out(experts.rows))


def _usage(experts: ExpertsRecord) -> PageTable:
    shown = experts.names[:_MOST]
    rows = tuple(
        (domain, *(_percent(shares.get(name)) for name in shown))
        for domain, shares in list(experts.usage.items())[:_MOST]
    )
    numbers = tuple(range(1, 1 + len(shown)))
    return PageTable(("domain", *shown), rows, numbers, "routing by domain: mean gate in %")


def _similarity(experts: ExpertsRecord) -> PageTable:
    found = experts.similarities[:_MOST]
    known = list(dict.fromkeys(name for _, similarity in found for name in similarity))[:_MOST]
    rows = tuple(
        (expert, *(_similar(similarity.get(name)) for name in known))
        for expert, similarity in found
    )
    caption = "similarity of an expert's batches to what was known when it was spawned"
    return PageTable(("spawned", *known), rows, tuple(range(1, 1 + len(known))), caption)


def _events(experts: ExpertsRecord) -> PageTable:
    rows = tuple(
        (_count(event.step), event.kind, event.expert, event.why)
        for event in experts.events[:_MOST]
    )
    caption = f"experts, event by event{_left_out(experts.events)}"
    return PageTable(("step", "event", "expert", "because"), rows, (0,), caption)


def _left_out(parts: Sequence[object]) -> str:
    number = len(parts) - _MOST
    return f"; {number} more are in summary.json" if number > 0 else ""


def _count(value: int | None) -> str:
    return MISSING if value is None else str(value)


def _percent(share: float | None) -> str:
    return MISSING if share is None else f"{100 * share:.0f}"


def _similar(value: float | None) -> str:
    return MISSING if value is None else f"{value:.3g}"
