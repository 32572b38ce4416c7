"""Words and numbers as people write them: moe-add, 7B parameters, 5GB."""

from pathlib import Path

import typer

from tritter.config.counts import BYTE_UNITS, COUNT_UNITS, parse_count
from tritter.errors import RequestError, brief
from tritter.limits import MAX_BYTES, MAX_PARAMETERS
from tritter.storage.reading import named_path

_MAX_FLOPS = 10**24  # a second, of one device


def spelled(name: str) -> str:
    """Return a name as the command line writes it: dashes for underscores."""
    return name.replace("_", "-")


def parameter_count(text: str) -> int:
    """Return a count: 7B, 1.5b, 350M, 7e9, 7_000_000.

    Raises:
        typer.BadParameter: it is none.
    """
    example = "a count above 0, such as 7B, 350M or 7e9"
    return _scaled(str(text), COUNT_UNITS, example=example, limit=MAX_PARAMETERS)


def flops_rate(text: str) -> int:
    """Return FLOPs per second: 312T, 9.89e14.

    Raises:
        typer.BadParameter: it is none.
    """
    example = "FLOPs per second above 0, such as 312T or 9.89e14"
    return _scaled(str(text), COUNT_UNITS, example=example, limit=_MAX_FLOPS)


def byte_count(text: str) -> int:
    """Return a number of bytes: 5GB, 500MB (powers of 1000), 4GiB (of 1024).

    Raises:
        typer.BadParameter: it is none.
    """
    example = "a size above 0, such as 5GB, 500MB or 4GiB"
    return _scaled(str(text), BYTE_UNITS, example=example, limit=MAX_BYTES)


def place(text: str) -> Path:
    """Return a path as it was typed, `~` opened.

    Raises:
        typer.BadParameter: no file could have that name.
    """
    try:
        return named_path(str(text), key="path")
    except RequestError as error:
        raise typer.BadParameter(str(error).removeprefix("path = ")) from error


def _scaled(text: str, units: dict[str, int], *, example: str, limit: int) -> int:
    value = parse_count(text, units)
    if value is None:
        raise typer.BadParameter(f"{brief(text)} is not {example}.")
    if value > limit:
        raise typer.BadParameter(f"{brief(text)} is above {limit:.0e}, the most that is allowed.")
    return value
