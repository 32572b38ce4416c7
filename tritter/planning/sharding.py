"""How FSDP2 shares the parameters of a model out, from shapes alone.

Every parameter is cut along its first dimension into as many pieces as there are ranks, of equal
height but for the last ones. A layer is whole on every rank while it computes.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from tritter.errors import RequestError
from tritter.families import Config, layout


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardingPlan:
    """What each rank holds.

    Args:
        parameters: by rank, of its own.
        gathered: of the largest group that is whole on every rank for a time: a layer, or what
            stands in none (embeddings, the last norm, the head).
    """

    parameters: tuple[int, ...]
    gathered: int


def sharding_plan(config: Config, *, ranks: int) -> ShardingPlan:
    """Return what each of so many ranks holds of a model of this config.

    Raises:
        RequestError: unknown family, or no ranks.
    """
    if ranks < 1:
        raise RequestError(f"ranks = {ranks}: a whole number, at least 1.")
    groups = Counter[int | None]()
    parts = [0] * ranks
    for stored in layout(config, "live"):
        size = math.prod(stored.shape)
        groups[stored.layer] += size
        for rank, rows in enumerate(_rows(stored.shape, ranks)):
            parts[rank] += rows * size // stored.shape[0]
    return ShardingPlan(parameters=tuple(parts), gathered=max(groups.values()))


def _rows(shape: Sequence[int], ranks: int) -> list[int]:
    """Return how much of the first dimension each rank has; the last ones may have nothing."""
    height = -(-shape[0] // ranks)
    return [max(0, min(height, shape[0] - rank * height)) for rank in range(ranks)]
