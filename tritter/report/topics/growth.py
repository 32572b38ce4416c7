"""Neuron growth in the report of a run."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import accumulate, groupby
from typing import TYPE_CHECKING

from tritter.report.drawing import BLUE, ORANGE, new_figure, panel, subsample, wrap_text, write_note
from tritter.report.summary import GrowthEvent, GrowthRecord
from tritter.report.table import Table, count_text, number_text, omitted_note, si_text
from tritter.report.topics.topic import Topic

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    from tritter.report.runs import EndedRun, Group

_MAX_ROWS = 16
_MAX_STEPS = 4  # named of a layer's events
_MAX_POINTS = 60  # that are marked
_LOGARITHMIC_FROM = 20.0  # largest pressure over the smallest


class Growth(Topic[GrowthRecord]):
    """Neurons born and replaced during training."""

    name, title = "growth", "Neuron growth"
    caption = (
        "Neurons per layer, relative to the start. Triangles: neurons born. Circles: dead neurons "
        "replaced. Pressure (the signal of the trigger): moving average of the mean gradient norm "
        "of a layer's neurons, relative to the norm of the whole gradient. The FLOPs axis ends at "
        "the last row of metrics.csv."
    )
    has_legend = True

    def tables(self, record: GrowthRecord, *, on_page: bool = False) -> list[Table]:
        if not record.events:
            return []
        if not on_page:
            return [_growth_table(record, most=_MAX_ROWS)]
        return [
            draw(record, most=Topic.MAX_ROWS_ON_PAGE) for draw in (_growth_table, _events_table)
        ]

    def text(self, record: GrowthRecord) -> str:
        """Return a line on the result of growth, or on what to try if nothing grew."""
        if not record.events:
            return _no_growth_reason(record)
        before, after = sum(record.neurons.before), sum(record.neurons.after)
        parts = []
        if record.parameters.before is not None and record.parameters.after is not None:
            sizes = map(count_text, (record.parameters.before, record.parameters.after))
            parts.append(f"parameters {' → '.join(sizes)}")
        parts.append(f"neurons {before:,} → {after:,}")
        if record.young is not None:
            parts.append(f"{record.young} of them not mature at the end")
        norms = record.update_norms
        if norms is not None and norms.young is not None and norms.old is not None:
            young, old = norms.young, norms.old
            parts.append(f"mean update per step: young {young:.2g}, old {old:.2g}")
        return "; ".join(parts)

    def method(self, record: GrowthRecord) -> str:
        return record.name

    def columns(self, record: GrowthRecord) -> dict[str, str]:
        after = count_text(record.parameters.after)
        return {"neurons born": str(record.born), "parameters after growth": after}

    def plot(self, run: EndedRun, record: GrowthRecord) -> Figure:
        """Return a figure of neurons, pressure, and parameters over steps and over FLOPs."""
        end = run.last_steps
        figure, panels = new_figure(rows=2, columns=2, width=9.6, height=6.2)
        _draw_neurons(panels[0], record, end=end)
        _draw_pressure(panels[1], record, end=end)
        _draw_parameters(panels[2], *_parameters_over_steps(record, end=end))
        panels[2].set_xlabel("training step")
        panels[2].sharex(panels[0])
        _draw_parameters(panels[3], *_parameters_over_flops(record, end_flops=run.last_flops))
        _label_flops(panels[3])
        handles, labels = panels[0].get_legend_handles_labels()
        if handles:
            figure.legend(
                handles, labels, loc="outside upper center", ncols=2, frameon=False, fontsize=8
            )
        return figure

    def figures(self, groups: Sequence[Group]) -> list[Figure]:
        """Return the neurons of each run, the pressure of a single one, and the cost."""
        found = self.records(groups)
        made = []
        drawn = [_draw_neurons] if len(found) > 1 else [_draw_neurons, _draw_pressure]
        for _, run, growth in found[: Topic.MAX_PANELS]:
            for draw in drawn:
                figure, axes = panel(height=2.9)
                draw(axes, growth, end=run.last_steps)
                axes.set_title(wrap_text(f"{run.name}: {axes.get_title()}"), fontsize=9)
                if draw is _draw_neurons and growth.events:
                    figure.legend(loc="outside lower left", ncols=2, frameon=False, fontsize=7.5)
                made.append(figure)
        courses = [
            (group, _parameters_over_flops(g, end_flops=r.last_flops)) for group, r, g in found
        ]
        if courses := [(group, course) for group, course in courses if course[0]]:
            figure, axes = panel(height=2.9)
            for group, course in courses:
                _draw_parameters(axes, *course, color=group.color, marker=group.marker)
            _label_flops(axes)
            axes.set_title("parameters over the training FLOPs", fontsize=9)
            made.append(figure)
        return made


def _growth_table(growth: GrowthRecord, *, most: int) -> Table:
    """Return a row per layer that grew; of many layers, those that grew most."""
    layers: dict[int, list[GrowthEvent]] = {}
    for event in growth.events:
        layers.setdefault(event.layer, []).append(event)
    has_dead = any(event.died for event in growth.events)
    counts = ["born", "replaced", *(["left dead"] if has_dead else [])]
    header = ("layer", "neurons", *counts, "shift [σ]", "after steps")
    grown = sorted(sorted(layers), key=lambda n: -sum(e.born + e.replaced for e in layers[n]))
    rows = []
    for layer in sorted(grown[:most]):
        events = layers[layer]
        number = [sum(e.born for e in events), sum(e.replaced for e in events)]
        number += [sum(e.died for e in events)] if has_dead else []
        shifts = [e.function_change for e in events if e.function_change is not None]
        cells = (
            str(layer),
            f"{growth.neurons.before[layer]} → {growth.neurons.after[layer]}",
            *map(str, number),
            number_text(max(shifts, default=None), ".1e"),
            _steps_text([event.step for event in events]),
        )
        rows.append(cells)
    lines = ["shift: largest logit shift at an event, in standard deviations of the logits"]
    if has_dead:
        lines.append("left dead: found dead at an event, not reused")
    num_layers = len(growth.neurons.before)
    if len(layers) > most:
        lines.append(f"{len(layers)} of {num_layers} layers grew; shown: the {most} that grew most")
    elif len(layers) < num_layers:
        lines.append(f"{len(layers)} of {num_layers} layers grew")
    title = f"Growth: {growth.born} born"
    if growth.replaced:
        title += f", {growth.replaced} replaced"
    title += f" in {len(growth.events)} {'event' if len(growth.events) == 1 else 'events'}"
    title += f", {growth.checks} checks"
    return Table(header, tuple(rows), tuple(range(len(header) - 1)), "\n".join(lines), title=title)


def _events_table(growth: GrowthRecord, *, most: int) -> Table:
    """Return a row per event, of the first `most`."""
    counts = ("step", "layer", "born", "replaced", "left dead", "neurons")
    header = (*counts, "pressure", "logit shift [σ]", "parameters", "FLOPs so far")
    rows = tuple(
        (
            *map(str, (event.step, event.layer, event.born, event.replaced, event.died)),
            str(event.neurons),
            number_text(event.pressure, ".3g"),
            number_text(event.function_change, ".1e"),
            count_text(event.parameters),
            si_text(event.flops),
        )
        for event in growth.events[:most]
    )
    caption = "; ".join(filter(None, ("Growth events", omitted_note(len(growth.events), most))))
    return Table(header, rows, tuple(range(len(header))), caption)


def _no_growth_reason(growth: GrowthRecord) -> str:
    """Return a line on a run without growth: how many checks it had, and what to try."""
    if not growth.checks:
        return (
            "nothing grew: training ended before the first check; try a smaller "
            "growth.warmup_steps or growth.check_every, or more training steps"
        )
    number = "one check" if growth.checks == 1 else f"{growth.checks:,} checks"
    keys = []
    for key in ("growth_cooldown", "check_every"):
        steps = growth.options.get(key)
        if steps != 1:
            keys.append(f"growth.{key}" + (f" ({steps})" if isinstance(steps, int) else ""))
    budgets = ("max_new_parameters", "max_extra_flops")
    larger = " or ".join(f"growth.{key}" for key in budgets if growth.options.get(key))
    ways = [*filter(None, (growth.advice, larger and f"a larger {larger}"))]
    ways += [f"a smaller {' or '.join(keys)}"] if keys else []
    others = ", ".join(ways) + ", or " if ways else ""
    return f"nothing grew in {number}; try {others}more training steps"


def _steps_text(steps: Sequence[int]) -> str:
    """Return the first steps and the last one."""
    if len(steps) <= _MAX_STEPS:
        return ", ".join(map(str, steps))
    return f"{', '.join(map(str, steps[: _MAX_STEPS - 1]))} .. {steps[-1]} ({len(steps)})"


def _draw_neurons(axes: Axes, growth: GrowthRecord, *, end: int) -> None:
    """Draw each layer's neurons over the steps, relative to the first ones, and its events."""
    import numpy as np
    from matplotlib.colors import Normalize

    edges, widths = _widths(growth, end=end)
    change = 100 * (widths / np.asarray(growth.neurons.before, dtype=float) - 1)
    low, high = min(0.0, change.min()), max(1.0, change.max())
    label = "change of the number of neurons [%]"
    _draw_map(axes, edges, change, "Blues", Normalize(low, high), label)
    size = 6 if len(growth.events) <= 100 else 3
    born = [(event.step, event.layer) for event in growth.events if event.born]
    replaced = [(event.step, event.layer) for event in growth.events if event.replaced]
    mark = partial(axes.plot, linestyle="none", clip_on=False)  # the last step is at the border
    if born:
        steps, layers = zip(*born, strict=True)
        mark(steps, layers, marker="^", color=ORANGE, markersize=size, markeredgecolor="white",
             markeredgewidth=0.6, label="born")  # fmt: skip
    if replaced:
        steps, layers = zip(*replaced, strict=True)
        mark(steps, layers, marker="o", color="black", markersize=1.6 * size,
             markerfacecolor="none", label="dead neurons replaced")  # fmt: skip
    axes.set_title("neurons" if growth.events else "neurons (no growth)", fontsize=10)


def _draw_pressure(axes: Axes, growth: GrowthRecord, *, end: int) -> None:
    """Draw each layer's pressure at each check, back to the check before."""
    import numpy as np
    from matplotlib.colors import LogNorm, Normalize

    axes.set_title("growth pressure at the checks", fontsize=10)
    if not growth.map.steps:
        write_note(axes, "no checks")
        return
    steps = np.asarray(subsample(growth.map.steps), dtype=float)
    gap = steps[1] - steps[0] if len(steps) > 1 else steps[0]
    edges = np.concatenate([[max(0.0, steps[0] - max(gap, 1.0))], steps])
    if edges[0] == edges[1]:  # a check after no step
        edges[0] -= 1.0
    rows = [[np.nan if p is None else p for p in row] for row in subsample(growth.map.pressure)]
    pressure = np.asarray(rows, dtype=float)
    known = pressure[np.isfinite(pressure)]
    low, high = (known.min(), known.max()) if known.size else (0.0, 1.0)
    norm: Normalize = Normalize(low, high if high > low else low + max(abs(low), 1.0))
    if low > 0 and high > _LOGARITHMIC_FROM * low:
        norm = LogNorm(low, high)
    label = "gradient norm of the neurons / of the model"
    _draw_map(axes, edges, pressure, "viridis", norm, label)
    axes.set_xlim(0, max(end, edges[-1]))


def _parameters_over_steps(
    growth: GrowthRecord, *, end: int
) -> tuple[Sequence[float], Sequence[float]]:
    """Return steps, and the parameters from each step on; nothing if unknown."""
    if growth.parameters.before is None:
        return (), ()
    known = [(event.step, event.parameters) for event in growth.events]
    points = [(step, value) for step, value in known if value is not None]
    values = [growth.parameters.before, *(value for _, value in points)]
    last = max(end, 0, *(step for step, _ in points))
    return [0, *(step for step, _ in points), last], [*values, values[-1]]


def _parameters_over_flops(
    growth: GrowthRecord, *, end_flops: float | None
) -> tuple[Sequence[float], Sequence[float]]:
    """Return training FLOPs, and the parameters from each of them on; nothing if unknown."""
    if growth.parameters.before is None:
        return (), ()
    known = [
        (float(event.flops), event.parameters)
        for event in growth.events
        if event.flops is not None and event.parameters is not None
    ]
    # A cumulative sum never falls, even with invalid values in a summary
    spent = list(accumulate((max(0.0, flops) for flops, _ in known), max, initial=0.0))
    values = [growth.parameters.before, *(value for _, value in known)]
    if end_flops is not None and end_flops > spent[-1]:
        return [*spent, end_flops], [*values, values[-1]]
    return spent, values


def _draw_parameters(
    axes: Axes,
    positions: Sequence[float],
    values: Sequence[float],
    *,
    color: str = BLUE,
    marker: str = "o",
) -> None:
    """Draw the parameters as a step function."""
    from matplotlib.ticker import EngFormatter

    axes.set_title("model parameters", fontsize=10)
    if not positions:
        write_note(axes, "no data")
        return
    shown = marker if len(positions) <= _MAX_POINTS else ""
    axes.step(
        positions, values, where="post", color=color, marker=shown, markersize=3, linewidth=1.2
    )
    axes.yaxis.set_major_formatter(EngFormatter(sep=" "))
    axes.set_ylabel("parameters")


def _label_flops(axes: Axes) -> None:
    """Label an axis as FLOPs."""
    from matplotlib.ticker import EngFormatter

    axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
    axes.set_xlabel("training FLOPs")


def _widths(growth: GrowthRecord, *, end: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return edges of intervals [n + 1], and the neurons of every layer within each [n, L].

    The neurons follow from the events: they are constant between two events.
    """
    import numpy as np

    now = np.asarray(growth.neurons.before, dtype=float)
    edges, rows = [0.0], [now.copy()]
    # Of very many events, as many as a picture can show
    steps = subsample(growth.event_steps)
    of_steps = set(steps)
    for step, events in groupby(growth.events, key=lambda event: event.step):
        for event in events:
            now[event.layer] = event.neurons
        if step in of_steps and step > 0:
            edges.append(float(step))
            rows.append(now.copy())
        elif step == 0:
            rows[0] = now.copy()
    last = max(float(end), *map(float, growth.map.steps[-1:]), edges[-1])
    # Growth after the last step gets an interval that is just visible
    sliver = max(last, 1.0) / 200
    return np.asarray([*edges, max(last, edges[-1] + sliver)]), np.asarray(rows)


def _draw_map(
    axes: Axes,
    edges: NDArray[np.float64],
    values: NDArray[np.float64],
    colours: str,
    norm: Normalize,
    label: str,
) -> None:
    """Draw [n, L] values as cells between n + 1 edges."""
    import numpy as np
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    layers = np.arange(values.shape[1] + 1) - 0.5
    axes.set_facecolor("#DDDDDD")  # visible in masked cells
    mesh = axes.pcolormesh(edges, layers, values.T, cmap=colours, norm=norm, rasterized=True)
    axes.grid(visible=False)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_ylim(-0.5, values.shape[1] - 0.5)
    axes.set_ylabel("layer")
    axes.set_xlabel("training step")
    figure = axes.get_figure()
    assert isinstance(figure, Figure)
    figure.colorbar(mesh, ax=axes).set_label(label, fontsize=8)
