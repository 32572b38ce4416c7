"""How an option of `tritter` is declared: in one line, mostly."""

from collections.abc import Callable
from typing import Any

import typer


def option(
    names: str,
    metavar: str,
    told: str,
    *,
    panel: str | None = None,
    parser: Callable[[str], Any] | None = None,
    least: float | None = None,
    most: float | None = None,
    shows_default: bool = True,
    completes: Callable[[str], list[str]] | None = None,
) -> Any:
    """Return Typer's description of an option.

    Args:
        names: as it is typed, one or two, parted by a blank.
        metavar: what stands for its value in the help.
        told: its line of help.
        panel: under which heading it stands.
        completes: returns what a shell may put in place of a value that is begun.
    """
    return typer.Option(
        *names.split(),
        metavar=metavar,
        help=told,
        rich_help_panel=panel,
        parser=parser,
        min=least,
        max=most,
        show_default=shows_default,
        autocompletion=completes,
    )


def flag(names: str, told: str, *, panel: str | None = None) -> Any:
    """Return Typer's description of an option without a value."""
    return option(names, " ", told, panel=panel)
