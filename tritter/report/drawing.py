"""Colours, empty figures and short texts that all plots share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


_T = TypeVar("_T")
DPI = 150
MAX_COLUMNS = 800  # of a map or points of a curve; a picture has hardly more
_LINE_CHARACTERS = 72
_PANEL_WIDTH = 4.8
# Okabe and Ito: told apart by colour-blind readers, and in grey by their markers.
BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#666666"
CYCLE = (BLUE, ORANGE, GREEN, PURPLE, "#56B4E9", "#E69F00")


def new_figure(
    *, rows: int = 1, columns: int = 1, width: float, height: float
) -> tuple[Figure, list[Axes]]:
    """Return a figure of our own (no pyplot, so nothing global) and its panels in reading order."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    panels = [
        axes for line in figure.subplots(rows, columns, squeeze=False).tolist() for axes in line
    ]
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.25)
    return figure, panels


def plain(text: str) -> str:
    """Return text that matplotlib shows as it is: no formulas, no breaks, no control characters."""
    return "".join(sign if sign.isprintable() else " " for sign in text).replace("$", r"\$")


def cut(text: str, most: int = _LINE_CHARACTERS) -> str:
    """Return text cut with two dots."""
    return text if len(text) <= most else text[: most - 2] + ".."


def shortened(text: str, most: int = _LINE_CHARACTERS) -> str:
    """Return text that matplotlib shows as it is, cut with two dots."""
    return plain(cut(text, most))


def panel(*, height: float) -> tuple[Figure, Axes]:
    """Return a figure of one panel as the page has them."""
    figure, (axes,) = new_figure(width=_PANEL_WIDTH, height=height)
    axes.tick_params(labelsize=8.5)
    axes.xaxis.label.set_fontsize(9)
    axes.yaxis.label.set_fontsize(9)
    return figure, axes


def say(axes: Axes, text: str) -> None:
    """Say in an empty panel why it is empty."""
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", color=GREY)
    axes.set_yticks([])


def some(values: Sequence[_T]) -> Sequence[_T]:
    """Return all values, or of very many as many as a picture has columns, the last among them."""
    import numpy as np

    if len(values) <= MAX_COLUMNS:
        return values
    chosen = np.linspace(0, len(values) - 1, MAX_COLUMNS).astype(int)
    return [values[int(place)] for place in chosen]
