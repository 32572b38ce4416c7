"""Growth in words and numbers: the table of a run, and what may help where nothing grew."""

from collections.abc import Sequence

from rich.table import Table

from tritter.report.growth_record import GrownLayer, GrowthRecord
from tritter.report.rich_table import new_table
from tritter.report.wording import MISSING, Signs, count_text

MAX_ROWS = 16
_MOST_STEPS = 4  # named of a layer's events
_HINTS = {
    "percentile": "a lower growth.gradient_percentile",
    "plateau": "a higher growth.plateau_threshold",
    "schedule": "steps in growth.at that the training reaches",
    "budget": "a larger budget",
}


def growth_table(growth: GrowthRecord, *, signs: Signs) -> Table:
    """Return a row per layer that grew; of many, those that grew most."""
    layers = growth.layers
    table = new_table(_title(growth), caption=_caption(growth, layers))
    has_dead = any(layer.died for layer in layers)
    counts = ["born", "replaced", *(["left dead"] if has_dead else [])]
    for name in ("layer", "neurons", *counts, "change"):
        table.add_column(name, justify="right", overflow="fold")
    table.add_column("after steps", overflow="fold")
    for layer in most_grown(layers):
        table.add_row(
            str(layer.layer),
            f"{layer.before} {signs.arrow} {layer.after}",
            str(layer.born),
            str(layer.replaced),
            *([str(layer.died)] if has_dead else []),
            change_of_function(layer.function_change),
            steps_text([event.step for event in layer.events]),
        )
    return table


def growth_text(growth: GrowthRecord, *, signs: Signs) -> str:
    """Say in a line what growth came to, or what to try where nothing grew."""
    if not growth.events:
        return nothing_grew(growth)
    before, after = sum(growth.before), sum(growth.after)
    parts = []
    if growth.parameters_before is not None and growth.parameters_after is not None:
        sizes = map(count_text, (growth.parameters_before, growth.parameters_after))
        parts.append(f"parameters {f' {signs.arrow} '.join(sizes)}")
    parts.append(f"neurons {before:,} {signs.arrow} {after:,}")
    if growth.young is not None:
        parts.append(f"{growth.young} of them young at the end")
    if growth.young_norm is not None and growth.old_norm is not None:
        young, old = growth.young_norm, growth.old_norm
        parts.append(f"a young one moved by {young:.2g} a step, an old one by {old:.2g}")
    return "; ".join(parts)


def nothing_grew(growth: GrowthRecord) -> str:
    """Say that nothing grew, how often it could have, and what to try."""
    if not growth.checks:
        return (
            "nothing grew: the training ended before the first check; try a shorter "
            "growth.warmup_steps or growth.check_every, or a longer training"
        )
    number = "one check" if growth.checks == 1 else f"{growth.checks:,} checks"
    timed = ("growth_cooldown", "check_every")
    keys = [_with_steps(growth, key) for key in timed if growth.options.get(key) != 1]
    ways = [f"a shorter {' or '.join(keys)}"] if keys else []
    ways.append("a longer training")
    if (hint := _HINTS.get(growth.trigger)) is not None:
        ways.insert(0, hint)
    *others, last = ways
    return f"nothing grew in {number}; try {', '.join(others) + ', or ' if others else ''}{last}"


def _with_steps(growth: GrowthRecord, key: str) -> str:
    steps = growth.options.get(key)
    return f"growth.{key} ({steps})" if isinstance(steps, int) else f"growth.{key}"


def most_grown(layers: Sequence[GrownLayer], most: int = MAX_ROWS) -> list[GrownLayer]:
    """Return the layers that grew most, in their order."""
    chosen = sorted(layers, key=lambda layer: -(layer.born + layer.replaced))[:most]
    return sorted(chosen, key=lambda layer: layer.layer)


def steps_text(steps: Sequence[int]) -> str:
    """Name the first steps and the last one."""
    if len(steps) <= _MOST_STEPS:
        return ", ".join(map(str, steps))
    return f"{', '.join(map(str, steps[: _MOST_STEPS - 1]))} .. {steps[-1]} ({len(steps)})"


def change_of_function(value: float | None) -> str:
    """Return a change of the logits, in their standard deviation."""
    return MISSING if value is None else f"{value:.1e}"


def _title(growth: GrowthRecord) -> str:
    number = len(growth.events)
    said = f"Growth: {growth.born} born"
    if growth.replaced:
        said += f", {growth.replaced} replaced"
    return f"{said} in {number} {'event' if number == 1 else 'events'}"


def _caption(growth: GrowthRecord, layers: Sequence[GrownLayer]) -> str:
    lines = ["change: of the logits at an event, the largest, in their deviation"]
    if any(layer.died for layer in layers):
        lines.append("left dead: found dead at an event, and not used again")
    number = len(growth.before)
    if len(layers) > MAX_ROWS:
        lines.append(f"{len(layers)} of {number} layers grew; shown: the {MAX_ROWS} that grew most")
    elif len(layers) < number:
        lines.append(f"{len(layers)} of {number} layers grew")
    return "\n".join(lines)
