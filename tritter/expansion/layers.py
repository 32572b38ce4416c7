"""Which layer each target layer copies, under every depth rule.

A rule returns a list of source layers, one per target layer. The first occurrence of a layer is
the layer itself; every further one is a copy.
"""

import math
from collections.abc import Sequence

from tritter.errors import RequestError


def depth_upscale_sources(
    layers: int, *, target_layers: int | None = None, drop_layers: int | None = None
) -> tuple[int, ...]:
    """Return the source layer of every target layer under SOLAR's rule (arXiv 2312.15166).

    Raises:
        RequestError: no m fits, or target and m contradict each other; names what would work.
    """
    target = target_layers
    if target is None:
        target = 2 * (layers - drop_layers) if drop_layers is not None else _default_target(layers)
    allowed = range(layers + 1 + (layers + 1) % 2, 2 * layers + 1, 2)
    if target not in allowed:
        closest = _closest(target, allowed)
        by_drop = target_layers is None and drop_layers is not None
        key, value = ("drop_layers", drop_layers) if by_drop else ("target_layers", target)
        raise RequestError(
            f"expansion.dus.{key} = {value}: from {layers} layers dus reaches the even counts "
            f"{_listed(allowed)} (dropping {_listed([layers - t // 2 for t in allowed])} layers); "
            f"nearest: {layers - closest // 2 if by_drop else closest}."
        )
    drop = layers - target // 2
    if drop_layers is not None and drop_layers != drop:
        raise RequestError(
            f"expansion.dus.drop_layers = {drop_layers} contradicts target_layers = {target}: "
            f"from {layers} layers, {target} need drop_layers = {drop}, and drop_layers = "
            f"{drop_layers} gives {2 * (layers - drop_layers)}."
        )
    return (*range(layers - drop), *range(drop, layers))


def stack_sources(
    layers: int, *, target_layers: int | None = None, is_partial: bool = False
) -> tuple[int, ...]:
    """Return the source layer of every target layer when whole copies stand on each other.

    Args:
        target_layers: a multiple of `layers`. Default: twice.
        is_partial: any count above `layers` will do; the last copy is cut after its first ones.

    Raises:
        RequestError: the count is no multiple, or not above `layers`; names the nearest that are.
    """
    target = 2 * layers if target_layers is None else target_layers
    _check_grows("stack", target, layers, at_least=layers + 1 if is_partial else 2 * layers)
    rest = target % layers
    if rest and not is_partial:
        multiples = sorted({max(target - rest, 2 * layers), target - rest + layers})
        raise RequestError(
            f"expansion.stack.target_layers = {target}: stack takes whole copies of the {layers} "
            f"layers; nearest: {' or '.join(map(str, multiples))}. With expansion.stack.partial "
            f"the last copy may be cut, here after its first {_layers_text(rest)}."
        )
    return tuple(layer % layers for layer in range(target))


def interpolation_sources(layers: int, *, target_layers: int | None = None) -> tuple[int, ...]:
    """Return the source layer of every target layer when copies stand behind their layers.

    Every layer stands ⌊t/n⌋ times in a row; what remains of t gives single layers one copy more,
    spread evenly over the gaps between the layers, so that below 2n no copy follows the last one.

    Args:
        target_layers: t, any count above `layers`. Default: 1.5 n, rounded up.

    Raises:
        RequestError: t is not above `layers`.
    """
    target = layers + math.ceil(layers / 2) if target_layers is None else target_layers
    _check_grows("interpolate", target, layers, at_least=layers + 1)
    times, rest = divmod(target, layers)
    once_more = {(2 * copy + 1) * (layers - 1) // (2 * rest) for copy in range(rest)}
    return tuple(
        layer for layer in range(layers) for _ in range(times + (1 if layer in once_more else 0))
    )


def block_insertion_sources(
    layers: int, *, target_layers: int | None = None, positions: Sequence[int] | None = None
) -> tuple[int, ...]:
    """Return the source layer of every target layer when copies follow chosen layers.

    Raises:
        RequestError: a position does not exist, or target and positions contradict each other.
    """
    if positions is not None:
        wrong = [position for position in positions if not 0 <= position < layers]
        if wrong or not positions:
            raise RequestError(
                f"expansion.llama_pro.positions = {list(positions)}: name at least one source "
                f"layer from 0 to {layers - 1} that a new block is to follow."
            )
        if target_layers is not None and target_layers != layers + len(positions):
            raise RequestError(
                f"expansion.llama_pro.target_layers = {target_layers} contradicts the "
                f"{len(positions)} positions: {layers} + {len(positions)} = "
                f"{layers + len(positions)}."
            )
        return tuple(sorted([*range(layers), *positions]))
    target = layers + math.ceil(layers / 2) if target_layers is None else target_layers
    _check_grows("llama_pro", target, layers, at_least=layers + 1)
    added = target - layers
    spread = [math.ceil((block + 1) * layers / added) - 1 for block in range(added)]
    return tuple(sorted([*range(layers), *spread]))


def repeated_layers(sources: Sequence[int]) -> frozenset[int]:
    """Return the target layers that are further copies of a layer that stands already."""
    first = {source: target for target, source in reversed(list(enumerate(sources)))}
    return frozenset(target for target, source in enumerate(sources) if first[source] != target)


def _default_target(layers: int) -> int:
    target = 2 * round(1.5 * layers / 2)
    return target if layers < target <= 2 * layers else 2 * layers


def _check_grows(method: str, target: int, layers: int, *, at_least: int) -> None:
    if target <= layers:
        raise RequestError(
            f"expansion.{method}.target_layers = {target}: the model has {_layers_text(layers)} "
            f"already; ask for at least {at_least}."
        )


def _layers_text(count: int) -> str:
    return f"{count} layer{'' if count == 1 else 's'}"


def _listed(values: Sequence[int]) -> str:
    texts = [str(value) for value in values]
    if len(texts) <= 6:
        return ", ".join(texts)
    return ", ".join([*texts[:3], "…", texts[-1]])


def _closest(value: int, allowed: Sequence[int]) -> int:
    return min(allowed, key=lambda candidate: (abs(candidate - value), candidate))
