"""LoRA experts in the report of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from tritter.report.drawing import (
    CYCLE,
    GREEN,
    GREY,
    draw_cells,
    new_figure,
    numbers,
    panel,
    subsample,
    wrap_text,
    write_note,
)
from tritter.report.summary import ExpertHistory, ExpertsRecord, Spawn
from tritter.report.table import MISSING, Table, count_text, number_text, omitted_note
from tritter.report.topics.topic import Topic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from tritter.report.runs import EndedRun, Group

_MAX_ROWS = 16
_BASE = "base"  # the gate of a base without an adapter
_MAX_COLUMNS = 6  # experts side by side on a terminal
_NAME_CHARACTERS = 12
_KIND_CHARACTERS = 40
_DRAWN = 24  # experts and domains of a picture
_MAX_MARKED = 60  # spawns, and points of a curve that are marked
_LABEL_CHARACTERS = 24
_STYLES = ("-", "--", ":", "-.")


class Experts(Topic[ExpertsRecord]):
    """LoRA experts, spawned or trained."""

    name, title = "experts", "LoRA experts"
    caption = (
        "Routing: mean gate on held-out data. Similarity: of the first batches of an expert to the "
        "known skills, when it was spawned. Triangles: spawns. Dash-dotted line: next task."
    )

    def tables(self, record: ExpertsRecord, *, on_page: bool = False) -> list[Table]:
        if on_page:
            return _page_tables(record)
        is_routed = record.usage and len(record.names) > 1
        return [_experts_table(record), *([_usage_table(record)] if is_routed else [])]

    def text(self, record: ExpertsRecord) -> str:
        """Return a line on the experts of a run."""
        sizes, routing = record.parameters, record.routing
        parts = [f"{number_text(record.number)} at the end, {len(record.spawned)} spawned"]
        if sizes.trainable is not None:
            share = "" if sizes.share is None else f" ({_share_text(sizes.share)})"
            parts.append(f"{count_text(sizes.trainable)} trainable parameters{share}")
        if batches := dict(record.batches or {}):
            idle = batches.pop("idle", 0)
            counted = ", ".join(f"{number:,} {kind}" for kind, number in batches.items())
            parts.append(f"batches: {counted}, of which {idle:,} trained nothing")
        if refused := record.refused:
            parts.append(f"{len(refused)} refused, last: {refused[-1].why or 'no reason recorded'}")
        if len(record.names) > 1 and (routing.top_k or routing.temperature) is not None:
            way = "dense" if not routing.top_k else f"top-{routing.top_k}"
            warmth = routing.temperature
            at = "" if warmth is None else f" at temperature {warmth:.3g}"
            parts.append(f"routed {way}{at}")
        return "; ".join(parts)

    def method(self, record: ExpertsRecord) -> str:
        return record.kind

    def columns(self, record: ExpertsRecord) -> dict[str, str]:
        share = _share_text(record.parameters.share)
        return {"experts": number_text(record.number), "trainable share": share}

    def plot(self, run: EndedRun, record: ExpertsRecord) -> Figure:
        """Return a figure of routing, similarity, ranks and usage."""
        height = 5.4 + 0.16 * min(len(record.usage), _DRAWN)
        figure, panels = new_figure(rows=2, columns=2, width=9.6, height=height)
        for axes, draw in zip(panels, _panels(run, record), strict=True):
            draw(axes)
        return figure

    def figures(self, groups: Sequence[Group]) -> list[Figure]:
        """Return the panels of a single run one by one; of several, only routing."""
        found = self.records(groups)
        made = []
        for _, run, record in found[: Topic.MAX_PANELS]:
            for draw in _panels(run, record)[: None if len(found) == 1 else 1]:
                figure, axes = panel(height=3.0 + 0.12 * min(len(record.usage), _DRAWN))
                draw(axes)
                axes.set_title(wrap_text(f"{run.name}: {axes.get_title()}"), fontsize=9)
                made.append(figure)
        return made


def _experts_table(experts: ExpertsRecord, *, most: int = _MAX_ROWS) -> Table:
    """Return a row per expert: its spawn, its rank and its usage; first those of the end."""
    header = ("expert", "domain", "step", "batches", "novelty", "limit", "rank", "usage %", "state")
    lines = ["spawned on a domain at a step, after so many batches above the novelty limit; "]
    lines[0] += "without a step: there from the start; usage: mean gate"
    # A name may be reused after an eviction: the last spawn counts
    spawns = {spawn.expert: spawn for spawn in experts.spawned}
    names = tuple(dict.fromkeys((*experts.names, *spawns)))
    lines += filter(None, [omitted_note(len(names), most)])
    ended = [event for event in experts.events if event.kind in ("evicted", "merged")]
    states = {event.gone or event.expert: event.kind for event in ended}
    states |= dict.fromkeys(experts.names, "") | experts.states  # a name may be used again
    rows = []
    for name in names[:most]:
        spawn = spawns.get(name, Spawn())
        cells = (
            name,
            spawn.domain or experts.domains.get(name) or MISSING,
            number_text(spawn.step),
            number_text(spawn.batches),
            number_text(spawn.score, ".3g"),
            number_text(spawn.threshold, ".3g"),
            number_text(experts.ranks.get(name)),
            _percent(experts.mean_usage(name)),
            states.get(name, ""),
        )
        rows.append(cells)
    return Table(
        header,
        tuple(rows),
        numbers=tuple(range(2, 8)),
        title=f"LoRA experts ({experts.kind[:_KIND_CHARACTERS]})",
        caption="\n".join(lines),
        names={0: _NAME_CHARACTERS, 1: _NAME_CHARACTERS},
    )


def _usage_table(
    experts: ExpertsRecord, *, most: int = _MAX_ROWS, max_columns: int = _MAX_COLUMNS
) -> Table:
    """Return a row per domain: the mean gates on its held-out data, of the most used experts."""
    used = set(experts.by_usage[:max_columns])
    shown = [name for name in experts.names if name in used]
    rows = tuple(
        (domain, *(_percent(shares.get(name)) for name in shown))
        for domain, shares in list(experts.usage.items())[:most]
    )
    lines = [omitted_note(len(experts.names), len(shown), of="experts ")]
    lines.append(omitted_note(len(experts.usage), most, of="domains "))
    return Table(
        ("domain", *shown),
        rows,
        numbers=tuple(range(1, 1 + len(shown))),
        title="Routing: mean gate in %",
        caption="\n".join(filter(None, lines)),
        names=dict.fromkeys(range(1 + len(shown)), _NAME_CHARACTERS),
    )


def _share_text(share: float | None) -> str:
    """Return the trainable share in per cent."""
    return MISSING if share is None else f"{100 * share:.3g} %"


def _page_tables(experts: ExpertsRecord) -> list[Table]:
    """Return the tables of the page: experts, routing, similarity and events."""
    usage = _usage_table(experts, most=Topic.MAX_ROWS_ON_PAGE, max_columns=Topic.MAX_ROWS_ON_PAGE)
    found = experts.similarities[: Topic.MAX_ROWS_ON_PAGE]
    names = dict.fromkeys(name for _, similarity in found for name in similarity)
    known = list(names)[: Topic.MAX_ROWS_ON_PAGE]
    rows = tuple(
        (expert, *(number_text(similarity.get(name), ".3g") for name in known))
        for expert, similarity in found
    )
    caption = "Similarity of an expert's first batches to the known skills when it was spawned"
    similarity = Table(("spawned", *known), rows, tuple(range(1, 1 + len(known))), caption)
    rows = tuple(
        (number_text(event.step), event.kind, event.expert, event.why)
        for event in experts.events[: Topic.MAX_ROWS_ON_PAGE]
    )
    note = omitted_note(len(experts.events), Topic.MAX_ROWS_ON_PAGE)
    caption = "; ".join(filter(None, ("Events of the experts", note)))
    events = Table(("step", "event", "expert", "reason"), rows, (0,), caption)
    return [_experts_table(experts, most=Topic.MAX_ROWS_ON_PAGE), usage, similarity, events]


def _percent(share: float | None) -> str:
    return number_text(share, ".0%").removesuffix("%")


def _panels(run: EndedRun, experts: ExpertsRecord) -> list[Callable[[Axes], None]]:
    end = run.last_steps
    found = [each.step for each in experts.spawned if each.step is not None]
    spawned = found[:_MAX_MARKED]

    def mark(axes: Axes) -> None:
        """Mark spawns at the bottom, and the start of the next task over the whole height."""
        if spawned:
            place = axes.get_xaxis_transform()
            axes.plot(spawned, [0.0] * len(spawned), "^", transform=place, color=GREEN,
                      markersize=6, clip_on=False, zorder=5)  # fmt: skip
        for step in run.summary.borders[:_MAX_MARKED]:
            axes.axvline(step, color=GREY, linestyle="-.", linewidth=0.8)
        axes.set_xlim(0, max(end, *spawned, 1))

    return [
        partial(_draw_routing, experts=experts),
        partial(_draw_similarity, experts=experts),
        partial(_draw_ranks, experts=experts, end=end, mark=mark),
        partial(_draw_usage, experts=experts, mark=mark),
    ]


def _draw_routing(axes: Axes, experts: ExpertsRecord) -> None:
    """Draw the mean gates on each domain's held-out data: domains over experts, in per cent."""
    axes.set_title("routing by domain: mean gate [%]", fontsize=10)
    most = set(experts.by_usage[:_DRAWN])
    names = [name for name in experts.names if name in most]
    domains = list(experts.usage)[:_DRAWN]
    if not names or not domains:
        _write_note(axes, "no data")
        return
    shares = [[experts.usage[domain].get(name) for name in names] for domain in domains]
    _draw_cells(axes, domains, names, shares, scale=100, colours="Blues")


def _draw_similarity(axes: Axes, experts: ExpertsRecord) -> None:
    """Draw the similarity of each expert's first batches to the known skills."""
    axes.set_title("similarity to known skills at spawn", fontsize=10)
    found = experts.similarities[:_DRAWN]
    known = list(dict.fromkeys(name for _, similarity in found for name in similarity))[:_DRAWN]
    if not found:
        _write_note(axes, "no expert was spawned" if not experts.spawned else "no data")
        return
    values = [[similarity.get(name) for name in known] for _, similarity in found]
    _draw_cells(axes, [expert for expert, _ in found], known, values, scale=1, colours="Purples")


def _draw_ranks(
    axes: Axes, experts: ExpertsRecord, *, end: int, mark: Callable[[Axes], None]
) -> None:
    """Draw each adapter's rank over the steps, or only the final one if that is all there is."""
    from matplotlib.ticker import MaxNLocator

    axes.set_title("adapter ranks", fontsize=10)
    course = experts.ranks_over_time
    if not course.steps:
        ranks = {name: (rank, rank) for name, rank in experts.ranks.items()}
        course = ExpertHistory(steps=(0, end), ranks=ranks)
    if not course.values:
        _write_note(axes, "no data")
        return
    if course.steps[-1] < end:
        longer = {name: (*each, each[-1]) for name, each in course.values.items()}
        course = ExpertHistory(steps=(*course.steps, end), ranks=longer)
    _draw_history(axes, course, experts, is_stepped=True)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_ylim(bottom=0)
    axes.set_ylabel("rank")
    mark(axes)


def _draw_usage(axes: Axes, experts: ExpertsRecord, *, mark: Callable[[Axes], None]) -> None:
    """Draw each expert's mean gate over the steps."""
    axes.set_title("usage during training", fontsize=10)
    if not experts.usage_over_time.steps or not experts.usage_over_time.values:
        _write_note(axes, "no data")
        return
    _draw_history(axes, experts.usage_over_time, experts, is_stepped=False)
    axes.set_ylim(0, 105)
    axes.set_ylabel("mean gate [%]")
    mark(axes)


def _draw_history(
    axes: Axes, course: ExpertHistory, experts: ExpertsRecord, *, is_stepped: bool
) -> None:
    import numpy as np

    steps = subsample(course.steps)
    order = dict.fromkeys((*experts.names, *course.values))
    shown = [name for name in order if name in course.values][:_DRAWN]
    adapters = [name for name in shown if name != _BASE]
    for name in shown:
        values = [np.nan if v is None else float(v) for v in subsample(course.values[name])]
        number = 0 if name == _BASE else adapters.index(name)
        color = GREY if name == _BASE else CYCLE[number % len(CYCLE)]
        style = _STYLES[number // len(CYCLE) % len(_STYLES)]
        # Equal ranks coincide: the first are thicker, and remain visible
        below = min(len(shown) - 1 - shown.index(name), 5) if is_stepped else 0
        marker = "o" if len(steps) <= _MAX_MARKED and not is_stepped else ""
        width = 1.3 + 1.2 * below
        line_style = {"color": color, "linestyle": style, "marker": marker, "linewidth": width}
        label = wrap_text(name, _LABEL_CHARACTERS)
        if is_stepped:
            axes.step(steps, values, where="post", label=label, **line_style)
        else:
            percent = 100 * np.asarray(values)
            axes.plot(steps, percent, label=label, markersize=2.5, **line_style)  # type: ignore[arg-type]
    if len(shown) < len(course.values):
        axes.plot([], [], linestyle="none", label=f"and {len(course.values) - len(shown)} more")
    axes.legend(frameon=False, fontsize=7, ncols=1 + len(shown) // 8)
    axes.set_xlabel("training step")


def _write_note(axes: Axes, text: str) -> None:
    write_note(axes, text)
    axes.set_xticks([])


def _draw_cells(
    axes: Axes,
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float | None]],
    *,
    scale: float,
    colours: str,
) -> None:
    """Draw numbers from 0 to 1 as cells, clipped to this range."""
    import numpy as np
    from matplotlib.colors import Normalize

    def text(value: float) -> str:
        shown = f"{scale * value:.{0 if scale > 1 else 2}f}"
        return "-" if np.isnan(value) else shown if len(shown) < 8 else f"{scale * value:.1g}"

    known = numbers(values)
    shown = np.ma.masked_invalid(np.clip(known, 0, 1))
    texts = [[text(value) for value in row] for row in known]
    norm = Normalize(0, 1)
    draw_cells(axes, rows, columns, shown, texts, known > 0.6, norm=norm, colours=colours)
