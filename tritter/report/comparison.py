"""Figures over several runs: losses over tokens, retention against gain, changes, and cost."""

from collections.abc import Callable, Mapping, Sequence
from operator import methodcaller

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tritter.report.plots import CYCLE, GREY, PURPLE, new_figure
from tritter.report.runs import Group, Interval, Run

_MARKERS = "osD^vPX*<>"
_MOST_COLUMNS = 3


def figures(groups: Sequence[Group]) -> dict[str, Figure]:
    """Return the figures that the runs have data for, by name."""
    made = {
        "tradeoff": _tradeoff(groups),
        "losses": _losses(groups),
        "changes": _changes(groups),
        "cost": _cost(groups),
    }
    return {name: figure for name, figure in made.items() if figure is not None}


def _style(number: int) -> tuple[str, str]:
    """Return color and marker of a group: pairs differ where colors come again."""
    return CYCLE[number % len(CYCLE)], _MARKERS[number % len(_MARKERS)]


def _domains(groups: Sequence[Group], role: str | None = None) -> tuple[str, ...]:
    rows = (row for group in groups for run in group.runs for row in run.losses)
    return tuple(dict.fromkeys(row.domain for row in rows if role in (None, row.role)))


def _tradeoff(groups: Sequence[Group]) -> Figure | None:
    """Mean loss of what was old against mean gain on what was new; what nothing beats is joined."""
    points = []
    for number, group in enumerate(groups):
        retention, gain = (_mean_change(group, role) for role in ("old", "new"))
        if retention is not None and gain is not None:
            points.append((number, group, gain, retention))
    if not points:
        return None
    figure, (axes,) = new_figure(width=7.2, height=4.6 + 0.16 * len(points))
    for number, group, gain, retention in points:
        color, marker = _style(number)
        for run in group.runs if len(group.runs) > 1 else ():
            single = Group("", (run,))
            x, y = _mean_change(single, "new"), _mean_change(single, "old")
            if x is not None and y is not None:
                axes.plot(-100 * x.value, 100 * y.value, marker, color=color, alpha=0.3, ms=4)
        axes.errorbar(
            -100 * gain.value,
            100 * retention.value,
            xerr=_percent(_bars(gain, sign=-1)),
            yerr=_percent(_bars(retention)),
            color=color,
            marker=marker,
            linestyle="none",
            capsize=3,
            label=_labelled(group),
        )
    front = _front([(-gain.value, retention.value) for _, _, gain, retention in points])
    axes.plot(*zip(*((100 * x, 100 * y) for x, y in front), strict=True), color=GREY, ls=":", lw=1)
    axes.axhline(0, color=GREY, linewidth=0.8)
    axes.set_xlabel("gain on new text [% of loss per byte]")
    axes.set_ylabel("loss on old text [%]; lower is better")
    figure.legend(loc="outside lower left", frameon=False, fontsize=8)
    return figure


def _front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
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
        return group.change(domains[0])

    def of(run: Run) -> float | None:
        values = [row.change.value for row in run.losses if row.role == role]
        known = [value for value in values if value is not None]
        return sum(known) / len(known) if known and len(known) == len(values) else None

    return group.mean(of)


def _losses(groups: Sequence[Group]) -> Figure | None:
    """A panel per domain, and one of the training's own loss: over tokens, expansions marked."""
    names = [f"eval/{domain}/loss" for domain in _domains(groups)] + ["train/loss"]
    named = {name: _curves(groups, name) for name in names}
    shown = {name: curves for name, curves in named.items() if curves}
    if not shown:
        return None
    columns = min(_MOST_COLUMNS, len(shown))
    lines = -(-len(shown) // columns)
    legend = 0.2 * len(groups)
    figure, panels = new_figure(
        rows=lines, columns=columns, width=1 + 3.4 * columns, height=3.1 * lines + legend
    )
    is_in_tokens = all(run.tokens_per_step for group in groups for run in group.runs)
    for axes, (name, curves) in zip(panels, shown.items(), strict=False):
        for number, run, steps, values in curves:
            scale = (run.tokens_per_step or 1) / 1000 if is_in_tokens else 1
            _draw(axes, number, [scale * step for step in steps], values)
            for border in run.borders:
                axes.axvline(scale * border, color=GREY, linestyle="-.", linewidth=0.7)
        if any(run.summary.get("expansion") for _, run, _, _ in curves):
            axes.axvline(0, color=PURPLE, linestyle="--", linewidth=1)
        axes.set_title(name, fontsize=9)
        axes.set_xlabel("thousand tokens" if is_in_tokens else "training step")
    for axes in panels[len(shown) :]:
        axes.set_visible(False)
    panels[0].set_ylabel("nats per token")
    handles = [panels[0].plot([], [], color=_style(n)[0], marker=_style(n)[1], ms=3)[0]
               for n in range(len(groups))]  # fmt: skip
    labels = [_labelled(group) for group in groups]
    figure.legend(handles, labels, loc="outside lower left", frameon=False, fontsize=8)
    return figure


_Drawn = tuple[int, Run, tuple[int, ...], tuple[float, ...]]


def _curves(groups: Sequence[Group], name: str) -> list[_Drawn]:
    return [
        (number, run, curve.steps, curve.values)
        for number, group in enumerate(groups)
        for run in group.runs
        for curve in run.curves
        if curve.name == name
    ]


def _draw(axes: Axes, number: int, places: Sequence[float], values: Sequence[float]) -> None:
    color, marker = _style(number)
    # Step -1 is the model before its expansion
    axes.plot(places, values, color=color, marker=marker, markersize=2.5, linewidth=1, alpha=0.8)


def _changes(groups: Sequence[Group]) -> Figure | None:
    """A panel per domain: each group's change with its interval."""
    domains = [d for d in _domains(groups) if any(group.change(d) for group in groups)]
    if not domains:
        return None
    height = 1.2 + 0.32 * len(groups)
    figure, panels = new_figure(rows=len(domains), width=7.2, height=height * len(domains))
    for domain, axes in zip(domains, panels, strict=True):
        _bars_of(axes, groups, methodcaller("change", domain), scale=100)
        axes.set_title(f"{domain}: change of loss per byte [%]", fontsize=9)
    return figure


def _cost(groups: Sequence[Group]) -> Figure | None:
    """FLOPs of the whole run, and seconds of its training, group by group."""
    known: dict[str, Callable[[Run], float | None]] = {
        "TFLOPs of the run": lambda run: _total(run.summary.get("flops"), scale=1e-12),
        "seconds of the training": lambda run: _total(run.summary.get("seconds"), "fit"),
    }
    shown = {name: of for name, of in known.items() if any(group.mean(of) for group in groups)}
    if not shown:
        return None
    height = 1.2 + 0.32 * len(groups)
    figure, panels = new_figure(rows=len(shown), width=7.2, height=height * len(shown))
    for (name, of), axes in zip(shown.items(), panels, strict=True):
        _bars_of(axes, groups, methodcaller("mean", of), scale=1)
        axes.set_title(name, fontsize=9)
        axes.set_xlim(left=0)
    return figure


def _total(
    values: Mapping[str, float] | None, name: str = "total", *, scale: float = 1.0
) -> float | None:
    value = (values or {}).get(name)
    return None if value is None else scale * value


def _bars_of(
    axes: Axes,
    groups: Sequence[Group],
    of: Callable[[Group], Interval | None],
    *,
    scale: float,
) -> None:
    for number, group in enumerate(groups):
        if (found := of(group)) is None:
            continue
        color, marker = _style(number)
        bars = [[scale * side[0]] for side in _bars(found)]
        axes.errorbar(scale * found.value, number, xerr=bars, color=color, marker=marker, capsize=3)
    axes.set_yticks(range(len(groups)), [group.name for group in groups], fontsize=7)
    axes.set_ylim(len(groups) - 0.5, -0.5)
    axes.axvline(0, color=GREY, linewidth=0.8)
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", alpha=0.25)


def _bars(interval: Interval, *, sign: int = 1) -> list[list[float]]:
    """Return what matplotlib takes for two sides, which change places with the sign."""
    below = 0.0 if interval.lower is None else max(0.0, interval.value - interval.lower)
    above = 0.0 if interval.upper is None else max(0.0, interval.upper - interval.value)
    return [[below], [above]] if sign > 0 else [[above], [below]]


def _percent(sides: list[list[float]]) -> list[list[float]]:
    return [[100 * side for side in each] for each in sides]


def _labelled(group: Group) -> str:
    number = len(group.runs)
    return f"{group.name} ({number} {'run' if number == 1 else 'runs'})"
