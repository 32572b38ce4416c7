"""A table of the page."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PageTable:
    """A table of plain text.

    Args:
        numbers: positions of the columns that are set to the right.
    """

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numbers: tuple[int, ...] = ()
    caption: str = ""
