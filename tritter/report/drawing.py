"""Colours, empty figures and labels that all plots share."""

from __future__ import annotations

import textwrap
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
_DPI = 150
_MAX_COLUMNS = 800  # of a map, or points of a curve; a picture has hardly more pixels
_LINE_CHARACTERS = 66
_MAX_LINES = 6  # of one label
_PANEL_WIDTH = 4.8
_LABEL_CHARACTERS = 18  # of a line of a row's or column's label
_MAX_NUMBERED = 12  # of both, with texts in their cells
# Okabe and Ito, which colour-blind readers can distinguish; then six that are as far from each
# other and from these (CIE76 above 25)
BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#666666"
CYCLE = (
    *(BLUE, ORANGE, GREEN, PURPLE, "#56B4E9", "#E69F00"),
    *("#000000", "#882255", "#999933", "#332288", "#8C564B", "#661100"),
)


def new_figure(
    *, rows: int = 1, columns: int = 1, width: float, height: float
) -> tuple[Figure, list[Axes]]:
    """Return a figure (without pyplot's global state) and its panels in reading order."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
    panels = [
        axes for line in figure.subplots(rows, columns, squeeze=False).tolist() for axes in line
    ]
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.25)
    return figure, panels


def _plain(text: str) -> str:
    """Return text without formulas, line breaks and control characters, for matplotlib."""
    return "".join(sign if sign.isprintable() else " " for sign in text).replace("$", r"\$")


def truncate(text: str, most: int = _LINE_CHARACTERS) -> str:
    """Return text cut with two dots."""
    return text if len(text) <= most else text[: most - 2] + ".."


def wrap_text(text: str, width: int = _LINE_CHARACTERS) -> str:
    """Return plain text broken into lines of `width` characters; only very long text is cut."""
    text = _plain(truncate(text, width * _MAX_LINES))
    return "\n".join(textwrap.wrap(text, width, max_lines=_MAX_LINES, placeholder=" .."))


def panel(*, height: float) -> tuple[Figure, Axes]:
    """Return a figure of one panel, as on the page."""
    figure, (axes,) = new_figure(width=_PANEL_WIDTH, height=height)
    axes.tick_params(labelsize=8.5)
    axes.xaxis.label.set_fontsize(9)
    axes.yaxis.label.set_fontsize(9)
    return figure, axes


def write_note(axes: Axes, text: str) -> None:
    """Print in an empty panel why it is empty."""
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
    """Draw numbers as coloured cells, with a text in each if there are few.

    Args:
        axes: The panel.
        rows: Labels of the rows.
        columns: Labels of the columns.
        shown: Numbers [rows, columns]; masked if unknown.
        texts: Text of each cell.
        is_dark: Cells whose text is white.
        norm: Number → position on the colour map.
        colours: Name of the colour map.
    """
    import numpy as np

    axes.set_facecolor("#DDDDDD")  # visible in masked cells
    image = axes.imshow(shown, cmap=colours, norm=norm, aspect="auto")
    axes.grid(visible=False)
    labels = [wrap_text(name, _LABEL_CHARACTERS) for name in columns]
    axes.set_xticks(range(len(columns)), labels, rotation=30, ha="right")
    axes.set_yticks(range(len(rows)), [wrap_text(name, _LABEL_CHARACTERS) for name in rows])
    axes.tick_params(labelsize=8, length=0)
    if max(len(rows), len(columns)) <= _MAX_NUMBERED:
        for (row, column), dark in np.ndenumerate(is_dark):
            axes.text(column, row, texts[row][column], ha="center", va="center", fontsize=8,
                      color="white" if dark else "black")  # fmt: skip
    return image


def numbers(rows: Iterable[Iterable[float | None]]) -> NDArray[np.float64]:
    """Return rows as an array; unknown numbers are NaN."""
    import numpy as np

    return np.asarray([[np.nan if v is None else v for v in row] for row in rows], dtype=float)


def subsample(values: Sequence[_T]) -> Sequence[_T]:
    """Return all values, or `_MAX_COLUMNS` of them, evenly spaced and with the last one."""
    import numpy as np

    if len(values) <= _MAX_COLUMNS:
        return values
    chosen = np.linspace(0, len(values) - 1, _MAX_COLUMNS).astype(int)
    return [values[int(place)] for place in chosen]
