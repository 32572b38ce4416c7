"""Every domain after every task: what summary.json's `matrix` has to be, and its table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Required

from pydantic import AfterValidator, Field
from typing_extensions import TypedDict  # pydantic asks for this one below Python 3.12

from tritter.report.bounds import Count, Number
from tritter.report.drawing import new_figure, shortened
from tritter.report.table import Table, left_out
from tritter.report.wording import MISSING

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage
    from numpy.typing import NDArray

MAX_ROWS = 24
_MOST = 1000  # rows, and domains
_DOMAIN_CHARACTERS = 20
_Transfer = dict[str, Number | None]
_Row = Annotated[list[Number | None], Field(max_length=_MOST)]


class _Matrix(TypedDict, total=False):
    rows: Required[Annotated[list[str], Field(min_length=1, max_length=_MOST)]]
    domains: Required[Annotated[list[str], Field(min_length=1, max_length=_MOST)]]
    loss_per_byte: Required[list[_Row]]
    trained: list[list[str]]
    accuracy: dict[str, _Row]
    own: dict[str, Count]
    backward_transfer: _Transfer
    forward_transfer: _Transfer
    mean_backward_transfer: Number | None
    mean_forward_transfer: Number | None


def _consistent(matrix: _Matrix) -> _Matrix:
    """Refuse a matrix whose parts are not of the rows and domains that it names."""
    number, domains = len(matrix["rows"]), matrix["domains"]
    losses = matrix["loss_per_byte"]
    if len(losses) != number or any(len(row) != len(domains) for row in losses):
        raise ValueError(f"loss_per_byte is not of {number} rows and {len(domains)} domains")
    if len(set(domains)) < len(domains):
        raise ValueError("a domain stands in it twice")
    if any(len(row) != number for row in matrix.get("accuracy", {}).values()):
        raise ValueError(f"an accuracy is not of {number} rows")
    if "trained" in matrix and len(matrix["trained"]) != number:
        raise ValueError(f"trained is not of {number} rows")
    if any(row >= number for row in matrix.get("own", {}).values()):
        raise ValueError(f"a domain's own row is none of {number}")
    return matrix


MatrixSummary = Annotated[_Matrix, AfterValidator(_consistent)]


@dataclass(frozen=True, slots=True)
class TransferRow:
    """A domain's losses per byte, and what the other tasks did to it.

    Args:
        learned: the row in which it was learned first, such as `task 1`.
        before: of the model that the run started from.
        right_after: behind the task in which it was learned.
        backward: what later tasks changed of it; negative is good.
        forward: what earlier tasks changed of it; likewise.
    """

    domain: str
    learned: str
    before: float | None
    right_after: float | None
    at_the_end: float | None
    backward: float | None
    forward: float | None


def transfer_rows(matrix: Mapping[str, Any]) -> tuple[TransferRow, ...]:
    """Return a row per domain that was learned, and their means where there are several."""
    rows, losses = matrix["rows"], matrix["loss_per_byte"]
    own = matrix.get("own") or {}
    backward, forward = (matrix.get(f"{n}_transfer") or {} for n in ("backward", "forward"))
    found = [
        TransferRow(
            domain=name,
            learned="before" if own[name] == 0 else rows[own[name]],
            before=losses[0][place],
            right_after=losses[own[name]][place],
            at_the_end=losses[-1][place],
            backward=backward.get(name),
            forward=forward.get(name),
        )
        for place, name in enumerate(matrix["domains"])
        if name in own
    ]
    return tuple(found)


def transfer_table(matrix: Mapping[str, Any], *, most: int = MAX_ROWS) -> Table:
    """Return a row per domain that was learned: its losses per byte, and the transfers."""
    found = transfer_rows(matrix)
    rows = [
        (
            row.domain,
            row.learned,
            *map(loss_text, (row.before, row.right_after, row.at_the_end)),
            *map(transfer_text, (row.backward, row.forward)),
        )
        for row in found[:most]
    ]
    lines = ["backward: what later tasks changed; forward: what earlier ones did"]
    lines += filter(None, [left_out(len(found), most)])
    rules = (len(rows),) if len(found) > 1 else ()
    if rules:
        rows.append(("mean", "", "", "", "", *mean_transfers(matrix)))
    return Table(
        ("domain", "learned in", "before", "then", "at the end", "backward", "forward"),
        tuple(rows),
        numbers=tuple(range(2, 7)),
        title="Transfer between tasks, in nats per byte; negative is good",
        caption="\n".join(lines),
        names={0: _DOMAIN_CHARACTERS, 1: _DOMAIN_CHARACTERS},
        rules=rules,
    )


def mean_transfers(matrix: Mapping[str, Any]) -> tuple[str, str]:
    """Return the means of backward and forward transfer, in words."""
    backward, forward = (matrix.get(f"mean_{n}_transfer") for n in ("backward", "forward"))
    return transfer_text(backward), transfer_text(forward)


def loss_text(value: float | None) -> str:
    """Return a loss per byte."""
    return MISSING if value is None else f"{value:.4f}"


def transfer_text(value: float | None) -> str:
    """Return a difference of losses per byte, with its sign."""
    return MISSING if value is None else f"{value:+.4f}"


_DRAWN = 40  # rows and domains that are drawn; more are no picture
_MOST_NUMBERED = 12  # of both, with numbers in their cells
_SATURATED_PERCENT = 50.0  # a change beyond it has the colour of it
_LABEL_CHARACTERS = 16


def matrix_figure(matrix: Mapping[str, Any]) -> Figure:
    """Return the picture of a run's matrix: the losses, and the right answers where there are."""
    names = [list(matrix["domains"])[:_DRAWN], list(matrix.get("accuracy") or {})[:_DRAWN]]
    panels = [each for each in names if each]
    rows = min(len(matrix["rows"]), _DRAWN)
    width = 1.2 + sum(1.4 + 0.75 * len(each) for each in panels)
    figure, axes = new_figure(columns=len(panels), width=width, height=1.8 + 0.42 * rows)
    draw_matrix(axes[0], matrix)
    if len(panels) > 1:
        draw_accuracies(axes[1], matrix)
    return figure


def draw_matrix(axes: Axes, matrix: Mapping[str, Any]) -> None:
    """Draw tasks over domains: colours are changes from the first row, numbers nats per byte.

    A frame is around what a task was about.
    """
    import numpy as np
    from matplotlib.colors import TwoSlopeNorm

    losses = _numbers(matrix["loss_per_byte"])[:, :_DRAWN]
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        change = 100 * (losses / losses[:1] - 1)
    known = np.abs(change[np.isfinite(change)])
    limit = float(np.clip(known.max() if known.size else 0.0, 1.0, _SATURATED_PERCENT))
    shown = np.ma.masked_invalid(np.clip(change, -limit, limit))
    is_dark = np.ma.filled(np.abs(shown) > 0.6 * limit, False)
    texts = [[f"{loss:.3g}" for loss in row] for row in losses]
    names = matrix["domains"][:_DRAWN]
    norm = TwoSlopeNorm(0.0, -limit, limit)
    image = _draw_cells(axes, matrix, names, shown, texts, is_dark, norm=norm, colours="RdBu_r")
    axes.set_title("loss per byte; framed: the task's domains", fontsize=9)
    bar = _figure_of(axes).colorbar(
        image, ax=axes, extend="both" if limit == _SATURATED_PERCENT else None
    )
    bar.set_label("change from the baseline [%]", fontsize=8)


def draw_accuracies(axes: Axes, matrix: Mapping[str, Any]) -> None:
    """Draw tasks over what has right answers: their part."""
    import numpy as np
    from matplotlib.colors import Normalize

    names = list(matrix["accuracy"])[:_DRAWN]
    parts = _numbers([matrix["accuracy"][name] for name in names]).T
    shown = 100 * np.ma.masked_invalid(np.clip(parts, 0, 1))
    is_dark = np.ma.filled(shown > 60, False)
    texts = [[f"{100 * part:.0f}" for part in row] for row in parts]
    _draw_cells(axes, matrix, names, shown, texts, is_dark, norm=Normalize(0, 100), colours="Blues")
    axes.set_title("right answers [%]", fontsize=9)


def _draw_cells(
    axes: Axes,
    matrix: Mapping[str, Any],
    names: Sequence[str],
    shown: NDArray[np.float64],
    texts: Sequence[Sequence[str]],
    is_dark: NDArray[np.bool_],
    *,
    norm: Normalize,
    colours: str,
) -> AxesImage:
    """Draw rows over names, with a number in each cell where there are not too many."""
    import numpy as np
    from matplotlib.patches import Rectangle

    rows = matrix["rows"][:_DRAWN]
    axes.set_facecolor("#DDDDDD")  # seen through where nothing is known
    image = axes.imshow(shown, cmap=colours, norm=norm, aspect="auto")
    axes.grid(visible=False)
    axes.set_xticks(
        range(len(names)),
        [shortened(name, _LABEL_CHARACTERS) for name in names],
        rotation=30,
        ha="right",
    )
    axes.set_yticks(range(len(rows)), [shortened(name, _LABEL_CHARACTERS) for name in rows])
    axes.tick_params(labelsize=8, length=0)
    if max(len(names), len(rows)) <= _MOST_NUMBERED:
        for (row, column), dark in np.ndenumerate(is_dark):
            text = texts[row][column]
            axes.text(column, row, "?" if text == "nan" else text, fontsize=8, ha="center",
                      va="center", color="white" if dark else "black")  # fmt: skip
    for row, trained in enumerate((matrix.get("trained") or [])[:_DRAWN]):
        for name in (each for each in trained if each in names):
            corner = (names.index(name) - 0.5, row - 0.5)
            axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor="black", linewidth=1.6))
    return image


def _numbers(rows: Sequence[Sequence[float | None]]) -> NDArray[np.float64]:
    import numpy as np

    known = [
        [np.nan if value is None else value for value in row[:_DRAWN]] for row in rows[:_DRAWN]
    ]
    return np.asarray(known, dtype=float)


def _figure_of(axes: Axes) -> Figure:
    from matplotlib.figure import Figure

    figure = axes.get_figure()
    assert isinstance(figure, Figure)
    return figure
