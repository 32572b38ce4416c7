"""Numbers as people write them: 7B parameters, 5GB, 3,7,11."""

import re
from decimal import Decimal

import typer

_COUNT_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9, "t": 10**12}
_BYTE_UNITS = {
    "": 1,
    "b": 1,
    **{f"{unit}b": 1000**power for power, unit in enumerate("kmgt", start=1)},
    **{f"{unit}ib": 1024**power for power, unit in enumerate("kmgt", start=1)},
}
_NUMBER = re.compile(r"([0-9][0-9_]*(?:\.[0-9]+)?(?:e[0-9]{1,2})?)\s*([a-z]*)", re.IGNORECASE)


def parameter_count(text: str) -> int:
    """Return a count: 7B, 1.5b, 350M, 7e9, 7_000_000.

    Raises:
        typer.BadParameter: it is none.
    """
    return _scaled(str(text), _COUNT_UNITS, example="a count above 0, such as 7B, 350M or 7e9")


def byte_count(text: str) -> int:
    """Return a number of bytes: 5GB, 500MB (powers of 1000), 4GiB (of 1024).

    Raises:
        typer.BadParameter: it is none.
    """
    return _scaled(str(text), _BYTE_UNITS, example="a size above 0, such as 5GB, 500MB or 4GiB")


def layer_list(text: str | None) -> tuple[int, ...] | None:
    """Return layer numbers separated by commas; None when the option was not given.

    Raises:
        typer.BadParameter: one is no whole number.
    """
    if text is None:
        return None
    words = [word.strip() for word in text.strip("[]").split(",")]
    if not all(re.fullmatch("[0-9]+", word) for word in words):
        raise typer.BadParameter(f"'{text}' is no list of layers, such as 3,7,11.")
    return tuple(map(int, words))


def _scaled(text: str, units: dict[str, int], *, example: str) -> int:
    match = _NUMBER.fullmatch(text.strip())
    unit = match[2].lower() if match else None
    if match is None or unit not in units:
        raise typer.BadParameter(f"'{text}' is not {example}.")
    value = int(Decimal(match[1]) * units[unit])
    if value < 1:
        raise typer.BadParameter(f"'{text}' is not {example}.")
    return value
