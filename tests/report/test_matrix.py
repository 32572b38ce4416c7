"""The matrix as it is shown: every number once more, and nothing that was not learned."""

import copy
import math
from typing import Any

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from tests.report.matrix import matrix
from tests.report.places import GONE, places, replaced
from tests.report.test_page import run_of, seen
from tests.report.test_tables import line_of, printed
from tritter.errors import TritterError
from tritter.pipeline.metrics import _wandb_summary
from tritter.report.drawing import new_figure
from tritter.report.figures import plot_run
from tritter.report.page import page
from tritter.report.runs import EndedRun
from tritter.report.summary import Matrix, Summary
from tritter.report.topics.matrix import _MAX_ROWS, TaskMatrix, _draw_matrix
from tritter.terminal import Console

CONSOLE = Console()
EMPTY = Summary.of({"status": "kept", "domains": {}, "baseline": {}, "attempts": []})


def plot(record: Matrix) -> Figure:
    return TaskMatrix().plot(EndedRun("", EMPTY, {}), record)


def test_the_table_has_what_was_learned_and_what_became_of_it(summary: dict[str, Any]) -> None:
    """By hand: prose rises by a tenth three times, code is learned twice, sums once."""
    text = printed(summary | {"matrix": matrix("code", "sums", "code")})
    rows = text[text.index("Transfer between tasks") :]
    assert line_of(rows, "prose") == [
        *("prose", "before", "1.0000", "1.0000", "1.3310", "+0.3310", "-"),
    ]  # fmt: skip
    assert line_of(rows, "code") == [
        *("code", "task", "1", "2.0000", "1.0000", "0.5500", "-0.4500", "-"),
    ]  # fmt: skip
    assert line_of(rows, "sums") == [
        *("sums", "task", "2", "2.0000", "1.1000", "1.2100", "+0.1100", "+0.2000"),
    ]  # fmt: skip
    assert line_of(rows, "mean") == ["mean", "-0.0030", "+0.2000"]
    assert "Transfer" not in printed(summary)
    for encoding in ("ascii", "utf-8"):
        text = printed(summary | {"matrix": matrix(*("x" * 40, "code"))}, encoding=encoding)
        assert max(len(line.rstrip()) for line in text.splitlines()) <= 80


def test_of_very_many_domains_the_first_are_shown() -> None:
    made = Matrix(**matrix(*(f"d{number}" for number in range(60))))
    (table,) = TaskMatrix().tables(made)
    assert len(table.rows) == _MAX_ROWS + 1
    assert "37 more are in summary.json" in str(table.caption)
    width, height = plot(made).get_size_inches()
    assert max(width, height) * 150 < 2**13


def test_the_picture_has_each_change_and_frames_what_was_trained() -> None:
    made = matrix("code", "sums", "code")
    made["loss_per_byte"][2][2] = None
    _, (axes,) = new_figure(width=4, height=3)
    _draw_matrix(axes, Matrix(**made))
    cells = np.ma.asarray(axes.images[0].get_array())
    assert cells[0].tolist() == [0, 0, 0]
    assert cells[1].tolist() == pytest.approx([10, -50, 10])
    assert cells[3].tolist() == pytest.approx([33.1, -50, -39.5])  # code: −72.5, as far as it goes
    assert bool(np.ma.getmaskarray(cells)[2, 2])
    framed = {p.get_xy() for p in axes.patches if isinstance(p, Rectangle)}
    assert framed == {(0.5, 0.5), (1.5, 1.5), (0.5, 2.5)}
    assert {text.get_text() for text in axes.texts} >= {"1.33", "0.55", "?"}


def test_right_answers_have_a_panel_of_their_own() -> None:
    made = matrix("code", "sums") | {"accuracy": {"sums": [0.0, None, 0.876]}}
    figure = plot(Matrix(**made))
    axes = next(each for each in figure.axes if each.get_title() == "accuracy [%]")
    assert [text.get_text() for text in axes.texts] == ["0", "?", "88"]
    assert [p.get_xy() for p in axes.patches if isinstance(p, Rectangle)] == [(-0.5, 1.5)]
    assert plot(Matrix(**matrix("code"))).get_figwidth() < figure.get_figwidth()


@pytest.mark.full
def test_page_and_plots_have_it_where_there_are_tasks(summary: dict[str, Any], tmp_path) -> None:  # type: ignore[no-untyped-def]
    made = summary | {"matrix": matrix("code", "sums")}
    written = {path.name for path in plot_run(Summary.of(made), (), tmp_path)}
    assert "matrix.png" in written
    text, pictures = page([run_of(made, "tasks", 0), run_of(summary, "one", 1)], title="Both")
    assert [name for name in pictures if name.startswith("matrix")] == ["matrix.png"]
    words = " ".join(" ".join(seen(text).words).split())
    assert "sums task 2 2.0000 2.2000" not in words and "sums task 2 2.0000 1.1000 1.1000" in words
    assert "mean +0.1550 +0.2000" in words


def test_wandb_has_the_means(summary: dict[str, Any]) -> None:
    told = _wandb_summary(Summary.of(summary | {"matrix": matrix("code", "sums")}))
    assert told["transfer/backward"] == pytest.approx(0.155)
    assert told["transfer/forward"] == pytest.approx(0.2)
    assert not any(name.startswith("transfer") for name in _wandb_summary(Summary.of(summary)))


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        ((), [], "matrix"),
        (("rows",), ["baseline"], "loss_per_byte: 1 rows of 3 domains"),
        (("domains",), ["a", "a", "b"], "occurs twice"),
        (("loss_per_byte", 0), [1.0], "loss_per_byte: 3 rows"),
        (("loss_per_byte", 0, 0), math.nan, "loss_per_byte.0.0"),
        (("accuracy",), {"code": [0.5]}, "accuracy: 3 rows"),
        (("trained",), [[]], "trained: 3 rows"),
        (("own", "code"), 3, "own: a row is outside 0 to 2"),
        (("backward_transfer", "code"), "x", "matrix.backward_transfer.code"),
        (("mean_forward_transfer",), math.inf, "matrix.mean_forward_transfer"),
    ],
)
def test_what_is_no_matrix_is_refused(
    summary: dict[str, Any], place: tuple[str | int, ...], value: Any, said: str
) -> None:
    whole = {"matrix": matrix("code", "sums")}
    Summary.of(summary | whole)
    with pytest.raises(TritterError, match=said):
        Summary.of(summary | replaced(whole, ("matrix", *place), value))


@pytest.mark.full
def test_whatever_is_not_refused_is_shown(summary: dict[str, Any]) -> None:
    made, shown = matrix("code", "sums") | {"accuracy": {"sums": [0.1, 0.2, 0.3]}}, 0
    for place in places(made):
        for value in (GONE, None, "x", "$_{", 0, -1e30, 10**20, 1e30, math.nan, [], {}, ["$x"]):
            changed = replaced({"matrix": copy.deepcopy(made)}, ("matrix", *place), value)
            try:
                read = Summary.of(summary | changed).matrix
            except TritterError:
                continue
            if read is None:
                continue
            assert TaskMatrix().tables(read) and TaskMatrix().tables(read, on_page=True)
            if shown % 10 == 0:
                FigureCanvasAgg(plot(read)).draw()
            shown += 1
    assert shown > 50
