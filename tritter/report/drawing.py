"""Colours and empty figures that all plots share."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure

DPI = 150
# Okabe and Ito: told apart by colour-blind readers, and in grey by their markers.
BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#666666"
CYCLE = (BLUE, ORANGE, GREEN, PURPLE, "#56B4E9", "#E69F00")


def new_figure(
    *, rows: int = 1, columns: int = 1, width: float, height: float
) -> tuple[Figure, list[Axes]]:
    """Return a figure of our own (no pyplot, so nothing global) and its panels in reading order."""
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
