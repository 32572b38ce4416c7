"""Values of a record from anywhere, one after the other: gone, or another in their place."""

import copy
from collections.abc import Iterator
from typing import Any

GONE = object()
Place = tuple[str | int, ...]


def replaced(whole: dict[str, Any], place: Place, value: Any) -> dict[str, Any]:
    """Return a copy with another value at a place, or none."""
    changed = copy.deepcopy(whole)
    inside: Any = changed
    for key in place[:-1]:
        inside = inside[key]
    if value is GONE:
        del inside[place[-1]]
    else:
        inside[place[-1]] = value
    return changed


def places(value: Any, above: Place = ()) -> Iterator[Place]:
    """Yield where every value stands; of a list the first one stands for all."""
    inner: Any = value.items() if isinstance(value, dict) else ()
    if isinstance(value, list) and value:
        inner = [(0, value[0])]
    for key, each in inner:
        yield (*above, key)
        yield from places(each, (*above, key))
