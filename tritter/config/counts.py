"""Counts as people write them: 7B, 350M, 1.5b, 7e9, 5GB."""

import re
from collections.abc import Mapping
from decimal import Decimal

COUNT_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9, "t": 10**12}
BYTE_UNITS = {
    "": 1,
    "b": 1,
    **{f"{unit}b": 1000**power for power, unit in enumerate("kmgt", start=1)},
    **{f"{unit}ib": 1024**power for power, unit in enumerate("kmgt", start=1)},
}
_NUMBER = re.compile(
    r"([0-9][0-9_]{0,30}(?:\.[0-9]{1,30})?(?:e[0-9]{1,2})?)\s*([a-z]*)", re.IGNORECASE
)


def parse_count(text: str, units: Mapping[str, int] = COUNT_UNITS) -> int | None:
    """Return the whole number that a number and its unit stand for; None when it is none above 0.

    Args:
        units: unit in small letters → what it multiplies with.
    """
    match = _NUMBER.fullmatch(text.strip())
    if match is None or match[2].lower() not in units:
        return None
    value = int(Decimal(match[1]) * units[match[2].lower()])
    return value if value >= 1 else None
