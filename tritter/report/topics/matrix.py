"""Every domain after every task in the report of a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tritter.report.drawing import draw_cells, new_figure, numbers
from tritter.report.summary import Matrix
from tritter.report.table import Table, number_text, omitted_note
from tritter.report.topics.topic import Topic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from tritter.report.runs import EndedRun

_MAX_ROWS = 24
_DOMAIN_CHARACTERS = 20
_DRAWN = 40  # rows and domains
_SATURATED_PERCENT = 50.0  # larger changes have the same colour


class TaskMatrix(Topic[Matrix]):
    """Losses of all domains before the first task and after each task."""

    name, title = "matrix", "Loss after each task"
    caption = (
        "Rows: the model before the first task and after each task. Columns: domains. Numbers: "
        "validation loss [nats/byte]. Colours: change from the first row. Frames: domains of the "
        "task."
    )

    def tables(self, record: Matrix, *, on_page: bool = False) -> list[Table]:
        return [_transfer_table(record, most=Topic.MAX_ROWS_ON_PAGE if on_page else _MAX_ROWS)]

    def plot(self, run: EndedRun, record: Matrix) -> Figure:
        """Return a figure of the losses, and of the accuracies if there are any."""
        names = [record.domains[:_DRAWN], list(record.accuracy)[:_DRAWN]]
        panels = [each for each in names if each]
        rows = min(len(record.rows), _DRAWN)
        width = 1.2 + sum(1.4 + 0.75 * len(each) for each in panels)
        figure, axes = new_figure(columns=len(panels), width=width, height=1.8 + 0.42 * rows)
        _draw_matrix(axes[0], record)
        if len(panels) > 1:
            _draw_accuracies(axes[1], record)
        return figure


def _transfer_table(matrix: Matrix, *, most: int) -> Table:
    """Return a row per learned domain: its losses per byte and its transfers."""
    losses, own = matrix.loss_per_byte, matrix.own
    found = [(place, name) for place, name in enumerate(matrix.domains) if name in own]
    rows = []
    for place, name in found[:most]:
        shown = (0, own[name], -1)  # before, right after its task, at the end
        transfers = (matrix.backward_transfer.get(name), matrix.forward_transfer.get(name))
        learned = "before" if own[name] == 0 else matrix.rows[own[name]]
        values = (number_text(losses[number][place], ".4f") for number in shown)
        rows.append((name, learned, *values, *(number_text(each, "+.4f") for each in transfers)))
    lines = ["backward: change by later tasks; forward: change by earlier tasks"]
    lines += filter(None, [omitted_note(len(found), most)])
    rules = (len(rows),) if len(found) > 1 else ()
    if rules:
        means = (matrix.mean_backward_transfer, matrix.mean_forward_transfer)
        rows.append(("mean", *[""] * 4, *(number_text(each, "+.4f") for each in means)))
    return Table(
        ("domain", "learned in", "before", "after its task", "at the end", "backward", "forward"),
        tuple(rows),
        numbers=tuple(range(2, 7)),
        title="Transfer between tasks [nats/byte], negative is better",
        caption="\n".join(lines),
        names={0: _DOMAIN_CHARACTERS, 1: _DOMAIN_CHARACTERS},
        rules=rules,
    )


def _draw_matrix(axes: Axes, matrix: Matrix) -> None:
    """Draw tasks over domains: colours are changes from the first row, numbers nats per byte.

    The domains of a task are framed.
    """
    import numpy as np
    from matplotlib.colors import TwoSlopeNorm
    from matplotlib.figure import Figure

    losses = numbers(matrix.loss_per_byte[:_DRAWN])[:, :_DRAWN]
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        change = 100 * (losses / losses[:1] - 1)
    known = np.abs(change[np.isfinite(change)])
    limit = float(np.clip(known.max() if known.size else 0.0, 1.0, _SATURATED_PERCENT))
    shown = np.ma.masked_invalid(np.clip(change, -limit, limit))
    is_dark = np.ma.filled(np.abs(shown) > 0.6 * limit, False)
    texts = [["?" if np.isnan(loss) else f"{loss:.3g}" for loss in row] for row in losses]
    rows, names, norm = (
        matrix.rows[:_DRAWN],
        matrix.domains[:_DRAWN],
        TwoSlopeNorm(0, -limit, limit),
    )
    image = draw_cells(axes, rows, names, shown, texts, is_dark, norm=norm, colours="RdBu_r")
    _frame_trained(axes, matrix, names)
    axes.set_title("loss [nats/byte]; frames: domains of the task", fontsize=9)
    figure = axes.get_figure()
    assert isinstance(figure, Figure)
    bar = figure.colorbar(image, ax=axes, extend="both" if limit == _SATURATED_PERCENT else None)
    bar.set_label("change from the first row [%]", fontsize=8)


def _draw_accuracies(axes: Axes, matrix: Matrix) -> None:
    """Draw tasks over the domains that have an accuracy."""
    import numpy as np
    from matplotlib.colors import Normalize

    names = list(matrix.accuracy)[:_DRAWN]
    parts = numbers(matrix.accuracy[name][:_DRAWN] for name in names).T
    shown = 100 * np.ma.masked_invalid(np.clip(parts, 0, 1))
    is_dark = np.ma.filled(shown > 60, False)
    texts = [["?" if np.isnan(part) else f"{100 * part:.0f}" for part in row] for row in parts]
    rows, norm = matrix.rows[:_DRAWN], Normalize(0, 100)
    draw_cells(axes, rows, names, shown, texts, is_dark, norm=norm, colours="Blues")
    _frame_trained(axes, matrix, names)
    axes.set_title("accuracy [%]", fontsize=9)


def _frame_trained(axes: Axes, matrix: Matrix, names: Sequence[str]) -> None:
    """Draw a frame around the domains of each task."""
    from matplotlib.patches import Rectangle

    for row, trained in enumerate(matrix.trained[:_DRAWN]):
        for name in (each for each in trained if each in names):
            corner = (names.index(name) - 0.5, row - 0.5)
            axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor="black", linewidth=1.6))
