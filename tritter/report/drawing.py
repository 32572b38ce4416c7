"""Colours, empty figures and short texts that all plots share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage
    from numpy.typing import NDArray

_T = TypeVar("_T")
DPI = 150
MAX_COLUMNS = 800  # of a map or points of a curve; a picture has hardly more
_LINE_CHARACTERS = 72
_PANEL_WIDTH = 4.8
_LABEL_CHARACTERS = 16  # of a row or column of cells
_MOST_NUMBERED = 12  # of both, with texts in their cells
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


def draw_cells(
    axes: Axes,
    rows: Sequence[str],
    columns: Sequence[str],
    shown: NDArray[np.float64],
    texts: Sequence[Sequence[str]],
    is_dark: NDArray[np.bool_],
    *,
    norm: Normalize,
    colours: str,
) -> AxesImage:
    """Draw numbers as coloured cells, with a text in each where there are not too many.

    Args:
        shown: numbers of rows over columns; masked where nothing is known.
        is_dark: cells whose text is white.
    """
    import numpy as np

    axes.set_facecolor("#DDDDDD")  # seen through where nothing is known
    image = axes.imshow(shown, cmap=colours, norm=norm, aspect="auto")
    axes.grid(visible=False)
    labels = [shortened(name, _LABEL_CHARACTERS) for name in columns]
    axes.set_xticks(range(len(columns)), labels, rotation=30, ha="right")
    axes.set_yticks(range(len(rows)), [shortened(name, _LABEL_CHARACTERS) for name in rows])
    axes.tick_params(labelsize=8, length=0)
    if max(len(rows), len(columns)) <= _MOST_NUMBERED:
        for (row, column), dark in np.ndenumerate(is_dark):
            axes.text(column, row, texts[row][column], ha="center", va="center", fontsize=8,
                      color="white" if dark else "black")  # fmt: skip
    return image


def numbers(rows: Iterable[Iterable[float | None]]) -> NDArray[np.float64]:
    """Return rows as an array; what is not known is no number."""
    import numpy as np

    return np.asarray([[np.nan if v is None else v for v in row] for row in rows], dtype=float)


def some(values: Sequence[_T]) -> Sequence[_T]:
    """Return all values, or of very many as many as a picture has columns, the last among them."""
    import numpy as np

    if len(values) <= MAX_COLUMNS:
        return values
    chosen = np.linspace(0, len(values) - 1, MAX_COLUMNS).astype(int)
    return [values[int(place)] for place in chosen]
