"""Growth as it is shown: every number once more from the events, and nothing where nothing grew."""

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import QuadMesh

from tests.report.growing import EVERY, growth
from tests.report.places import GONE, places, replaced
from tests.report.test_tables import line_of, printed
from tritter.errors import TritterError
from tritter.pipeline.metrics import _wandb_summary
from tritter.report.drawing import _MAX_COLUMNS, new_figure
from tritter.report.figures import _mark_growth
from tritter.report.runs import EndedRun
from tritter.report.summary import GrowthRecord, Summary
from tritter.report.topics.growth import (
    _MAX_ROWS,
    Growth,
    _draw_neurons,
    _draw_pressure,
    _no_growth_reason,
    _parameters_over_flops,
    _parameters_over_steps,
)
from tritter.terminal import Console

CONSOLE = Console()
END = 220


LEAST = {"status": "kept", "domains": {}, "baseline": {}, "attempts": []}


def record_of(made: dict[str, Any]) -> GrowthRecord:
    found = Summary.of(LEAST | {"growth": made}).growth
    assert found is not None
    return found


def mesh_of(draw: Any, made: dict[str, Any], end: int = END) -> QuadMesh:
    _, (axes,) = new_figure(width=4, height=3)
    draw(axes, record_of(made), end=end)
    (mesh,) = (each for each in axes.collections if isinstance(each, QuadMesh))
    return mesh


def test_the_table_has_each_layer_with_its_sums(summary: dict[str, Any]) -> None:
    text = printed(summary | {"growth": growth(replaces=True)})
    assert "Growth: 42 born, 8 replaced in 5 events" in text
    rows = text[text.index("Growth:") :]
    assert line_of(rows, "0") == ["0", "192", "→", "204", "12", "8", "2", "1.2e-07", "72,", "144"]
    assert line_of(rows, "1")[:8] == ["1", "192", "→", "222", "30", "0", "0", "1.5e-07"]
    assert line_of(rows, "growth") == [
        *("growth", "parameters", "169", "k", "→", "177", "k;"),
        *("neurons", "384", "→", "426;", "10", "of", "them", "not", "mature"),
    ]
    assert "mean update per step: young 0.012, old 0.009" in " ".join(text.split())
    plain = printed(summary | {"growth": growth()})
    assert "left dead" not in plain and "50 born in 5 events" in plain


def test_of_many_layers_those_that_grew_most_are_shown(summary: dict[str, Any]) -> None:
    made = growth(layers=40, checks=90, grows_every=1)
    born: Counter[int] = Counter()
    for event in made["events"]:
        born[event["layer"]] += event["born"]
    (table,) = Growth().tables(record_of(made))
    shown = [int(row[0]) for row in table.rows]
    assert len(shown) == _MAX_ROWS and shown == sorted(shown)
    assert min(born[layer] for layer in shown) >= max(born[n] for n in born if n not in shown)
    text = printed(summary | {"growth": made})
    assert f"40 of 40 layers grew; shown: the {_MAX_ROWS} that grew most" in text
    for encoding in ("ascii", "utf-8"):
        text = printed(summary | {"growth": made}, encoding=encoding)
        assert max(len(line.rstrip()) for line in text.splitlines()) <= 80
        assert text.isascii() == (encoding == "ascii")


def test_nothing_grown_is_one_line_with_what_to_try(summary: dict[str, Any]) -> None:
    made = growth(grows_every=0)
    text = " ".join(printed(summary | {"growth": made}).split())
    assert "growth nothing grew in 17 checks; try a lower growth.gradient_percentile" in text
    assert "a smaller growth.growth_cooldown (25) or growth.check_every, or more" in text
    assert "Growth:" not in text
    made |= {"advice": ""}  # of a trigger from outside
    assert _no_growth_reason(record_of(made)).startswith("nothing grew in 17 checks; try a smaller")
    made["options"] |= {"check_every": 1}
    assert "check_every" not in _no_growth_reason(record_of(made))  # nothing is shorter
    made["options"] |= {"growth_cooldown": 1}
    assert (
        _no_growth_reason(record_of(made)) == "nothing grew in 17 checks; try more training steps"
    )
    made["options"] |= {"max_extra_flops": 1e3}
    assert "try a larger growth.max_extra_flops, or more" in _no_growth_reason(record_of(made))
    assert "before the first check" in _no_growth_reason(record_of(growth(checks=0)))
    assert "growth" not in printed(summary).lower()


def test_the_map_has_what_every_check_saw() -> None:
    """The record counts neurons at each check, before it grows; the map is drawn of the events."""
    made = growth(layers=5, checks=30, grows_every=2, replaces=True)
    end = EVERY * 30 + 5
    mesh = mesh_of(_draw_neurons, made, end=end)
    edges = np.asarray(mesh.get_coordinates())[0, :, 0]
    cells = np.asarray(mesh.get_array()).reshape(5, -1)
    assert edges[0] == 0 and edges[-1] == end
    for step, neurons in zip(made["map"]["steps"], made["map"]["neurons"], strict=True):
        column = int(np.searchsorted(edges, step - 0.5)) - 1
        assert cells[:, column] == pytest.approx([100 * (n / 192 - 1) for n in neurons])
    assert cells[:, -1] == pytest.approx([100 * (n / 192 - 1) for n in made["neurons"]["after"]])


def test_pressure_is_drawn_back_to_the_check_before() -> None:
    made = growth(layers=3, checks=4)
    made["map"]["pressure"][1][2] = None
    mesh = mesh_of(_draw_pressure, made)
    edges = np.asarray(mesh.get_coordinates())[0, :, 0]
    cells = np.ma.asarray(mesh.get_array()).reshape(3, -1)
    assert list(edges) == [0, *made["map"]["steps"]]
    for column, row in enumerate(made["map"]["pressure"]):
        known = [np.nan if value is None else value for value in row]
        assert np.ma.filled(cells[:, column], np.nan) == pytest.approx(known, nan_ok=True)
    mesh = mesh_of(_draw_pressure, growth(checks=1))  # nothing tells how far apart checks are
    assert list(np.asarray(mesh.get_coordinates())[0, :, 0]) == [0, EVERY]


@pytest.mark.full
def test_of_very_many_events_as_many_are_drawn_as_can_be_seen() -> None:
    made = growth(layers=3, checks=5000, grows_every=1)
    end = EVERY * 5001
    for draw in (_draw_neurons, _draw_pressure):
        mesh = mesh_of(draw, made, end=end)
        assert np.asarray(mesh.get_array()).size <= 3 * (_MAX_COLUMNS + 1)
    cells = np.asarray(mesh_of(_draw_neurons, made, end=end).get_array()).reshape(3, -1)
    assert cells[:, -1] == pytest.approx([100 * (n / 192 - 1) for n in made["neurons"]["after"]])


def test_parameters_are_drawn_over_steps_and_over_flops() -> None:
    made = growth(checks=7)
    steps, values = _parameters_over_steps(record_of(made), end=END)
    assert steps == [0, 36, 72, END]
    assert values == [169_000, 170_920, 172_840, 172_840]
    spent, over_flops = _parameters_over_flops(record_of(made), end_flops=2.2e11)
    assert (spent, over_flops) == ([0.0, 3.6e10, 7.2e10, 2.2e11], values)
    made["events"][1]["flops"] = 1e9  # less than before
    spent, over_flops = _parameters_over_flops(record_of(made), end_flops=None)
    assert (spent, over_flops) == ([0.0, 3.6e10, 3.6e10], values[:-1])


def test_steps_are_marked_as_lines_or_at_the_foot() -> None:
    _, (axes,) = new_figure(width=4, height=3)
    for steps, is_alone, top in (
        ([5, 9], True, 1.0),
        ([5, 9], False, 0.05),
        (range(99), True, 0.05),
    ):
        _mark_growth(axes, steps, is_alone=is_alone)
        segments = axes.collections[-1].get_segments()  # type: ignore[attr-defined]
        assert [segment[0][0] for segment in segments] == list(steps)
        assert {segment[1][1] for segment in segments} == {top}
    _mark_growth(axes, ())
    assert len(axes.collections) == 3


def test_wandb_has_its_sums(summary: dict[str, Any]) -> None:
    told = _wandb_summary(Summary.of(summary | {"growth": growth(replaces=True)}))
    names = ("born", "replaced", "died", "parameters")
    parameters = 169_000 + 42 * 192
    assert [told[f"growth/{name}"] for name in names] == [42, 8, 2, parameters]
    assert not any("growth" in name for name in _wandb_summary(Summary.of(summary)))


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        ((), [], "growth"),
        (("events",), None, "growth.events"),
        (("events", 0, "step"), 1.5, "growth.events.0.step"),
        (("events", 0, "layer"), 2, "a layer outside 0 to 1"),
        (("events", 0, "step"), 10**9, "of the events do not ascend"),
        (("events", 0, "function_change"), math.nan, "growth.events.0.function_change"),
        (("events", 0, "flops"), 1e300, "growth.events.0.flops"),
        (("neurons", "before"), [192], "different numbers of layers"),
        (("neurons", "before"), [0, 192], "growth.neurons.before.0"),
        (("neurons", "before"), [1] * 5000, "growth.neurons.before"),
        (("neurons", "after"), [], "growth.neurons.after"),
        (("map", "steps", 1), 12, "of the map do not ascend"),
        (("map", "pressure", 0), [1.0], "pressure of the map"),
        (("map", "pressure", 0, 0), math.inf, "growth.map.pressure.0.0"),
        (("map", "neurons"), [], "neurons of the map"),
        (("born",), "many", "growth.born"),
        (("checks",), -1, "growth.checks"),
        (("parameters",), {"after": "x"}, "growth.parameters.after"),
        (("update_norms",), {"young": "x"}, "growth.update_norms.young"),
    ],
)
def test_what_is_no_growth_is_refused(
    summary: dict[str, Any], place: tuple[str | int, ...], value: Any, said: str
) -> None:
    whole = {"growth": growth()}
    Summary.of(summary | whole)
    with pytest.raises(TritterError, match=said):
        Summary.of(summary | replaced(whole, ("growth", *place), value))


@pytest.mark.full
def test_whatever_is_not_refused_is_shown(summary: dict[str, Any]) -> None:
    """Each value in its turn is gone, or of another kind, or out of all bounds."""
    made = growth(checks=4, grows_every=2, replaces=True)
    shown = refused = 0
    for place in places(made):
        for value in (GONE, None, "x", -1, 0, 10**20, 1e30, math.nan, [], {}):
            changed = replaced({"growth": made}, ("growth", *place), value)
            try:
                found = Summary.of(summary | changed)
            except TritterError:
                refused += 1
                continue
            record = found.growth
            assert record is not None
            topic = Growth()
            assert topic.text(record) and topic.columns(record) and topic.method(record)
            for on_page in (False, True):
                topic.tables(record, on_page=on_page)
            if shown % 20 == 0:  # drawing takes its time
                FigureCanvasAgg(topic.plot(EndedRun("", found, {}), record)).draw()
            shown += 1
    assert shown > 100 and refused > 300
