"""LoRA experts as they are shown: each number once more, and any part of the record may be gone."""

import math
import warnings
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from tests.report.places import GONE, places, replaced
from tests.report.spawning import experts
from tests.report.test_page import HOSTILE, run_of, seen
from tests.report.test_tables import line_of, printed
from tritter.errors import TritterError
from tritter.pipeline.metrics import _wandb_summary
from tritter.report.compared import Comparison
from tritter.report.drawing import new_figure
from tritter.report.figures import group_figures, plot_run
from tritter.report.page import page
from tritter.report.runs import EndedRun, Group
from tritter.report.summary import Attempt, ExpertsRecord, Summary, TaskRecord
from tritter.report.topics.experts import (
    Experts,
    _draw_ranks,
    _draw_routing,
    _draw_similarity,
    _draw_usage,
)
from tritter.terminal import Console

CONSOLE = Console()
END = 96


LEAST = {"status": "kept", "domains": {}, "baseline": {}, "attempts": []}


def summary_of(made: dict[str, Any]) -> Summary:
    return Summary.of(LEAST | {"experts": made})


def record_of(made: dict[str, Any]) -> ExpertsRecord:
    found = summary_of(made).experts
    assert found is not None
    return found


def plot(summary: Summary, *, end: int, borders: Sequence[int] = ()) -> Figure:
    """Draw the experts of a run with so many steps, and with tasks that end at some of them."""
    steps = [b - a for a, b in pairwise((0, *borders, end))]
    tasks = [TaskRecord(domains=[], final={}, steps=number) for number in steps]
    changed = {"attempts": [Attempt(steps=end, final={})], "tasks": tasks}
    ended = summary.model_copy(update=changed)
    assert ended.experts is not None
    return Experts().plot(EndedRun("", ended, {}), ended.experts)


def test_the_tables_have_each_expert_and_each_domain(summary: dict[str, Any]) -> None:
    text = printed(summary | {"experts": experts()})
    rows = text[text.index("LoRA experts (dylora)") :]
    assert line_of(rows, "base") == ["base", *["-"] * 6, "54"]
    assert line_of(rows, "expert_1") == [
        *("expert_1", "code", "12", "2", "9.3", "6", "16", "44", "mature"),
    ]  # fmt: skip
    assert line_of(rows, "expert_2") == [
        *("expert_2", "sums", "40", "2", "6.44", "6", "-", "-", "evicted"),
    ]  # fmt: skip
    assert line_of(rows, "expert_3")[4:] == ["120", "6", "8", "2", "young"]
    routing = rows[rows.index("Routing: mean gate") :]
    assert line_of(routing, "domain") == ["domain", "base", "expert_1", "expert_3"]
    assert line_of(routing, "prose") == ["prose", "98", "2", "0"]
    assert line_of(routing, "code") == ["code", "10", "85", "5"]
    said = " ".join(routing.split())
    assert "experts 2 at the end, 3 spawned; 12.4 k trainable parameters (3.1 %);" in said
    assert "120 known, 6 new, 2 unsure, of which 4 trained nothing; 1 refused, last: the" in said
    assert "routed top-2 at temperature 0.5" in said
    assert "parameters 170 k → 532 k + 12.4 k experts" in said
    of_end = {"domains": {"expert_1": "names"}, "states": {"expert_1": "frozen"}}
    text = printed(summary | {"experts": experts() | {"spawned": [], "events": []} | of_end})
    earlier = ["expert_1", "names", *["-"] * 4, "16", "44", "frozen"]
    assert line_of(text[text.index("LoRA experts") :], "expert_1") == earlier, "of an earlier run"
    alone = {
        "kind": "single_lora",
        "number": 1,
        "names": ["expert_0"],
        "usage": {"prose": {"expert_0": 1.0}},
    }
    text = printed(summary | {"experts": alone})
    assert "LoRA experts (single_lora)" in text and "Routing" not in text
    assert line_of(text, "experts") == ["experts", "1", "at", "the", "end,", "0", "spawned"]
    for encoding in ("ascii", "utf-8"):
        text = printed(summary | {"experts": experts()}, encoding=encoding)
        assert max(len(line.rstrip()) for line in text.splitlines()) <= 80
    assert "expert" not in printed(summary)


def test_what_is_merged_is_gone_and_what_it_went_into_stays() -> None:
    made = experts()
    event = {"step": 70, "kind": "merged", "expert": "expert_1", "gone": "expert_2", "why": ""}
    made["events"] = [made["events"][1], event]
    states = {row[0]: row[-1] for row in Experts().tables(record_of(made), on_page=True)[0].rows}
    assert states == {"base": "", "expert_1": "mature", "expert_3": "young", "expert_2": "merged"}


def test_of_many_the_most_used_are_shown() -> None:
    names = [f"expert_{number}" for number in range(40)]
    usage = {f"d{n}": {name: n * i / 1000 for i, name in enumerate(names)} for n in range(30)}
    found = {"names": names, "usage": usage}
    experts_table, table = Experts().tables(record_of(found))
    assert list(table.header) == ["domain", *names[-6:]]
    assert str(table.caption).splitlines() == [
        "34 experts more are in summary.json", "14 domains more are in summary.json",
    ]  # fmt: skip
    assert len(experts_table.rows) == 16
    width, height = plot(summary_of(found), end=5).get_size_inches()
    assert max(width, height) * 150 < 2**12


def axes_of(draw: Any, made: dict[str, Any], **options: Any) -> Any:
    _, (axes,) = new_figure(width=4, height=3)
    draw(axes, record_of(made), **options)
    return axes


def test_routing_and_similarity_are_drawn_cell_by_cell() -> None:
    axes = axes_of(_draw_routing, experts())
    assert np.asarray(axes.images[0].get_array()) == pytest.approx(
        np.array([[0.98, 0.02, 0.0], [0.1, 0.85, 0.05]])
    )
    assert [t.get_text() for t in axes.texts] == ["98", "2", "0", "10", "85", "5"]
    axes = axes_of(_draw_similarity, experts())
    cells = np.ma.asarray(axes.images[0].get_array())
    assert np.ma.filled(cells, -1) == pytest.approx(
        np.array([[0.41, -1, -1], [0.52, 0.113, -1], [0.3, 0.25, 0.9]])
    )
    assert [t.get_text() for t in axes.get_xticklabels()] == ["base", "expert_1", "expert_2"]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["expert_1", "expert_2", "expert_3"]


def test_courses_have_gaps_where_an_expert_was_not() -> None:
    marked: list[Any] = []
    axes = axes_of(_draw_usage, experts(), mark=marked.append)
    lines = {line.get_label(): line.get_ydata() for line in axes.lines}
    assert list(lines) == ["base", "expert_1", "expert_3", "expert_2"] and marked == [axes]
    assert lines["expert_2"] == pytest.approx([np.nan, np.nan, 20, np.nan], nan_ok=True)
    axes = axes_of(_draw_ranks, experts(), end=END, mark=marked.append)
    lines = {line.get_label(): (line.get_xdata(), line.get_ydata()) for line in axes.lines}
    assert list(lines["expert_1"][0]) == [12, 35, 64, END]
    assert lines["expert_3"][1] == pytest.approx([np.nan, np.nan, 8, 8], nan_ok=True)
    made = experts()
    del made["ranks_over_time"]
    axes = axes_of(_draw_ranks, made, end=END, mark=marked.append)
    assert [list(line.get_ydata()) for line in axes.lines] == [[16, 16], [8, 8]]


def test_spawns_and_tasks_are_marked() -> None:
    figure = plot(summary_of(experts()), end=END, borders=[32, 64])
    usage = figure.axes[3]
    marks = [line for line in usage.lines if line.get_marker() == "^"]
    assert [list(line.get_xdata()) for line in marks] == [[12, 40, 64]]
    assert [line.get_xdata()[0] for line in usage.lines if line.get_linestyle() == "-."] == [32, 64]
    assert usage.get_xlim() == (0, END)


def test_a_picture_has_its_place_where_nothing_was_spawned() -> None:
    found = summary_of(experts() | {"spawned": [], "events": []})
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of a layout that collapsed
        FigureCanvasAgg(plot(found, end=END, borders=[32])).draw()


@pytest.mark.full
def test_page_and_plots_have_them_where_there_are_some(summary: dict[str, Any], tmp_path) -> None:  # type: ignore[no-untyped-def]
    made = summary | {"experts": experts()}
    assert "experts.png" in {path.name for path in plot_run(Summary.of(made), (), tmp_path / "a")}
    assert "experts.png" not in {
        path.name for path in plot_run(Summary.of(summary), (), tmp_path / "b")
    }
    one = run_of(made, "one", 0)
    text, pictures = page([one], title="One")
    names = [name for name in pictures if name.startswith("experts")]
    assert names == [f"experts_{number}.png" for number in range(1, 5)]
    words = " ".join(" ".join(seen(text).words).split())
    assert "forgetting=ewc, experts=dylora" in words
    assert "expert_3 tools 64 2 120 6 8 2 young" in words
    assert "expert_2 0.52 0.113 -" in words  # similarity
    assert "60 evicted expert_2 least used" in words
    assert "experts trainable share parameters" in words and "2 3.1 % 532 k" in words
    plain = run_of(summary, "plain", 1)
    found = group_figures(Comparison((one, plain, run_of(made, "again", 2))))["experts"]
    assert [figure.axes[0].get_title() for figure in found] == [
        f"{name}: routing by domain: mean gate [%]" for name in ("one", "again")
    ]
    text, _ = page([plain], title="None")
    assert "trainable share" not in text and "LoRA" not in text


def test_groups_are_named_by_them(summary_with_control: dict[str, Any]) -> None:
    made = summary_with_control | {"experts": experts()}
    first, second = run_of(made, "a", 0), run_of(summary_with_control, "b", 0)
    second.settings["x"] = 1  # type: ignore[index]
    names = [group.name for group in Group.of_runs([first, second])]
    assert names[0].endswith("forgetting=ewc experts=dylora")
    assert "experts=none" in names[1]
    control = next(
        group for group in Group.with_controls(Group.of_runs([first])) if group.is_control
    )
    assert control.name == "control (not grown) forgetting=ewc"
    assert control.runs[0].summary.experts is None


def test_wandb_has_their_sums(summary: dict[str, Any]) -> None:
    told = _wandb_summary(Summary.of(summary | {"experts": experts()}))
    assert told["experts/number"] == 2 and told["experts/spawned"] == 3
    assert told["experts/trainable_share"] == 0.031 and told["experts/trainable"] == 12_400
    assert not any("experts" in name for name in _wandb_summary(Summary.of(summary)))


@pytest.mark.full
def test_names_of_theirs_are_text(summary: dict[str, Any]) -> None:
    made = experts() | {"kind": HOSTILE, "names": [HOSTILE, "\x1b[31m$_{\n"]}
    made["usage"] = {HOSTILE: {HOSTILE: 0.5}}
    text, _ = page([run_of(summary | {"experts": made}, "a", 0)], title="One")
    assert HOSTILE not in text and "script" not in {tag for tag, _ in seen(text).tags}
    assert "\x1b" not in printed(summary | {"experts": made})


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        ((), [], "experts"),
        (("names",), "base", "experts.names"),
        (("number",), -1, "experts.number"),
        (("spawned", 0, "step"), 1.5, "experts.spawned.0.step"),
        (("spawned", 0, "score"), math.nan, "experts.spawned.0.score"),
        (("spawned", 0, "similarity"), {"base": "x"}, "experts.spawned.0.similarity.base"),
        (("events", 0, "why"), 5, "experts.events.0.why"),
        (("usage", "prose", "base"), math.inf, "experts.usage.prose.base"),
        (("usage_over_time", "steps"), [10, 9, 50, 90], "steps of usage_over_time do not ascend"),
        (("usage_over_time", "gates", "base"), [1.0], "usage_over_time: 4 numbers are required"),
        (("ranks_over_time", "ranks"), {"x": []}, "ranks_over_time: 3 numbers are required"),
        (("ranks", "expert_1"), "8", "experts.ranks.expert_1"),
        (("parameters", "share"), "all", "experts.parameters.share"),
        (("batches", "known"), -2, "experts.batches.known"),
        (("routing",), {"temperature": 1e300}, "experts.routing.temperature"),
    ],
)
def test_what_is_no_record_of_experts_is_refused(
    summary: dict[str, Any], place: tuple[str | int, ...], value: Any, said: str
) -> None:
    whole = {"experts": experts()}
    Summary.of(summary | whole)
    with pytest.raises(TritterError, match=said):
        Summary.of(summary | replaced(whole, ("experts", *place), value))


@pytest.mark.full
def test_whatever_is_not_refused_is_shown(summary: dict[str, Any]) -> None:
    """Each value in its turn is gone, or of another kind, or out of all bounds."""
    made, shown, refused = experts(), 0, 0
    for place in places(made):
        for value in (GONE, None, "$_{", -1, 0, 10**20, 1e30, -1e30, math.nan, [], {}):
            changed = replaced({"experts": made}, ("experts", *place), value)
            try:
                found = Summary.of(summary | changed)
            except TritterError:
                refused += 1
                continue
            if (record := found.experts) is None:
                continue
            topic = Experts()
            assert topic.text(record) and topic.columns(record)
            assert topic.tables(record) and topic.tables(record, on_page=True)
            if shown % 50 == 0:  # drawing takes its time
                FigureCanvasAgg(plot(found, end=0)).draw()
            shown += 1
    assert shown > 100 and refused > 300
    for end in ({"kind": "dylora"}, {"names": []}):
        FigureCanvasAgg(plot(summary_of(end), end=0)).draw()
