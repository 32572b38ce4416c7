"""The page: everything in one file, nothing loaded, and text of runs is text."""

import copy
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from tests.report.growing import growth
from tests.report.test_runs import SETTINGS
from tests.report.test_tables import ungated
from tritter.report.compared import Comparison
from tritter.report.drawing import panel
from tritter.report.figures import _label_rows, group_figures
from tritter.report.page import page
from tritter.report.runs import Curve, EndedRun, Group
from tritter.report.summary import Summary
from tritter.report.tables import SummaryTables
from tritter.report.topics.topic import Topic

HOSTILE = "<script>alert(1)</script>"


class Seen(HTMLParser):
    """What a browser would meet."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def seen(text: str) -> Seen:
    parser = Seen()
    parser.feed(text)
    return parser


def run_of(summary: dict[str, Any], name: str, seed: int) -> EndedRun:
    curves = (
        Curve("eval/prose/loss", (-1, 0, 10), (3.0, 3.1, 3.2)),
        Curve("train/loss", (5, 10), (4.0, 3.9)),
    )
    return EndedRun(
        name=name,
        summary=Summary.of(summary | {"seed": seed, "expansion": ["width"], "forgetting": ["ewc"]}),
        settings=SETTINGS | {"seed": seed},
        curves=curves,
        control=(Curve("eval/prose/loss", (0, 10), (3.0, 3.3)),),
        pretraining=(Curve("train/loss", (1, 2), (7.0, 6.0)),),
        history=("base", f"grown {seed}"),
    )


@pytest.mark.full
def test_nothing_of_an_ungated_run_has_the_colour_of_a_verdict(summary: dict[str, Any]) -> None:
    for run, is_coloured in ((summary, True), (ungated(summary), False)):
        text, _ = page([run_of(run, "run", 0)], title="One")
        assert any(f'class="{verdict}"' in text for verdict in ("kept", "passed")) is is_coloured
    assert "ungated" in text and "reported" in text


def test_it_holds_everything_and_loads_nothing(summary_with_control: dict[str, Any]) -> None:
    runs = [run_of(summary_with_control, f"run{seed}", seed) for seed in range(2)]
    text, pictures = page(runs, title="A sweep")
    found = seen(text)
    assert list(pictures) == [
        "tradeoff.png",
        "differences_1.png",
        "differences_2.png",
        "changes_1.png",
        "changes_2.png",
        "losses_1.png",  # prose, validation
        "losses_2.png",  # training
        "losses_3.png",  # pretraining
        "cost_1.png",
        "cost_2.png",
        "legend.png",
    ]
    assert all(picture.startswith(b"\x89PNG") for picture in pictures.values())
    images = [attributes["src"] for tag, attributes in found.tags if tag == "img"]
    assert len(images) == 10 and all(str(s).startswith("data:image/png;base64,") for s in images)
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in found.tags}
    assert all(a.get("href", "#").startswith("#") for _, a in found.tags)  # type: ignore[union-attr]
    words = " ".join(" ".join(found.words).split())
    for expected in (
        "2 finished runs in one group",
        "+1.02 [+0.78, +1.36]",  # of the gate, as the run's own table has it
        "Settings that differ",
        "control:",
        "base grown 0 ← run0 grown 1 ← run1",
    ):
        assert expected in words
    assert sum(tag == "details" for tag, _ in found.tags) == 2


def _lab(color: str) -> np.ndarray:
    """CIE L*a*b* of an sRGB colour (D65)."""
    channels = np.asarray(to_rgb(color))
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    matrix = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    t = np.asarray(matrix) @ linear / [0.95047, 1.0, 1.08883]
    x, y, z = np.where(t > 0.008856, np.cbrt(t), 7.787 * t + 16 / 116)
    return np.asarray([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def test_eleven_groups_have_eleven_distinguishable_colours(summary: dict[str, Any]) -> None:
    made = Summary.of(summary)
    eleven = [EndedRun(str(n), made, SETTINGS | {"training.learning_rate": n}) for n in range(11)]
    colours = [group.color for group in Comparison(tuple(eleven)).styled]
    assert len(set(colours)) == 11
    for one, other in combinations(colours, 2):
        assert np.linalg.norm(_lab(one) - _lab(other)) > 25, (one, other)  # CIE76; 2.3 is visible
    many = [EndedRun(str(n), made, SETTINGS | {"training.learning_rate": n}) for n in range(60)]
    styles = [(group.color, group.marker) for group in Comparison(tuple(many)).styled]
    assert len(set(styles)) == 60


def test_labels_are_whole(summary: dict[str, Any]) -> None:
    keys = {f"training.a_rather_long_name_{key}": 0 for key in range(6)}
    runs = [EndedRun("a", Summary.of(summary), SETTINGS | keys)]
    runs.append(EndedRun("b", Summary.of(summary), SETTINGS | dict.fromkeys(keys, 1)))
    groups = Group.of_runs(runs)
    text, _ = page(runs, title="Long")
    for group in groups:
        assert all(f"{key.removeprefix('training.')}=" in group.name for key in keys)
        assert group.name in text
        (figure, *_) = group_figures(Comparison(tuple(runs)))["changes"]
        labels = [each.get_text().replace("\n", " ") for each in figure.axes[0].texts]
        assert group.name in labels


def _cells(text: str, heading: str) -> list[list[str]]:
    """Return the cells of the table after a heading."""
    table = text.split(f">{heading}</h2>", 1)[1].split("<tbody>", 1)[1].split("</tbody>", 1)[0]
    return [
        [re.sub("<[^>]*>", "", cell) for cell in re.findall("<td.*?</td>", row)]
        for row in table.split("</tr>")[:-1]
    ]


def _with_loss(summary: dict[str, Any], loss_per_byte: float) -> dict[str, Any]:
    changed = copy.deepcopy(summary)
    changed["attempts"][-1]["final"]["prose"]["loss_per_byte"] = loss_per_byte
    return changed


@pytest.mark.parametrize("num_seeds", [2, 3])
def test_groups_and_their_differences(summary: dict[str, Any], num_seeds: int) -> None:
    """Below three seeds there is no interval; differences are paired by seed."""
    losses = {1: [1.2, 1.3, 1.25], 2: [1.212, 1.339, 1.275]}  # +1 %, +3 %, +2 %
    runs = []
    for rate, of_rate in losses.items():
        for seed in range(num_seeds):
            run = run_of(_with_loss(summary, of_rate[seed]), f"{rate}{seed}", seed)
            runs.append(replace(run, settings=run.settings | {"training.learning_rate": rate}))
    text, _ = page(runs, title="Groups")
    first, second = _cells(text, "Groups")
    assert first[1] == second[1] == str(num_seeds)
    ((group, pairs, prose, code),) = _cells(text, "Differences to the reference group")
    assert group.endswith("learning_rate=2") and pairs == str(num_seeds)
    if num_seeds == 2:
        assert first[3] == "+1.02, +1.02"  # of the gate's check, for each seed
        assert (prose, code) == ("+1.00, +3.00", "+0.00, +0.00")
        return
    # By hand: mean 2 %, standard deviation 1 %, t = 4.3027 for two degrees of freedom
    half = 4.3027 / 3**0.5
    assert prose == f"+2.00 [{2 - half:+.2f}, {2 + half:+.2f}]" == "+2.00 [-0.48, +4.48]"
    assert first[3] == "+1.02 [+1.02, +1.02]"
    # A single run has no interval over seeds, and the bounds of its gate are of another kind
    text, _ = page(runs[:4], title="Groups")
    assert _cells(text, "Groups")[1][3] == "+1.02"


def test_a_run_with_a_control_is_compared_with_it(summary_with_control: dict[str, Any]) -> None:
    text, _ = page([run_of(summary_with_control, "run", 0)], title="One")
    ((group, pairs, prose, _),) = _cells(text, "Differences to the reference group")
    assert group.startswith("expansion=width") and pairs == "1"
    assert prose == f"{100 * (1.22 / 1.24 - 1):+.2f}"


def test_text_of_a_run_is_text(summary: dict[str, Any]) -> None:
    summary["samples"][0] |= {"domain": "prose", "before": HOSTILE}
    summary["notes"] = [HOSTILE]
    run = run_of(summary, HOSTILE, 0)
    text, _ = page([run], title=HOSTILE, notes=[HOSTILE])
    found = seen(text)
    assert HOSTILE not in text and "script" not in {tag for tag, _ in found.tags}
    assert " ".join(found.words).count(HOSTILE) >= 5


@pytest.mark.full
def test_a_run_that_broke_down_has_a_page(rolled_back: dict[str, Any]) -> None:
    text, _ = page([run_of(rolled_back, "broken", 0)], title="One")
    assert 'class="rolled_back"' in text and "not finite" in text


@pytest.mark.full
def test_what_an_own_stage_found_is_on_the_page(summary: dict[str, Any]) -> None:
    summary["stages"] = {"drift": {"largest": "layers.0 <b>"}}
    text, _ = page([run_of(summary, "own", 0)], title="One")
    assert "largest" in text and "layers.0 &lt;b&gt;" in text


@pytest.mark.full
def test_tasks_have_a_table(summary: dict[str, Any]) -> None:
    final = summary["final"]
    tasks = [{"domains": [name], "final": final, "steps": 5} for name in ("code", "prose")]
    text, _ = page([run_of(summary | {"tasks": tasks}, "tasks", 0)], title="One")
    assert "Loss after each task [nats/token]" in text and "2: prose" in text


def test_a_run_alone_has_a_mark_for_each_pair_of_domains(summary: dict[str, Any]) -> None:
    """Their mean would hide the loss of one domain behind the gain of another."""
    scores = {name: dict(each) for name, each in summary["baseline"].items()}
    for number, name in enumerate(("poems", "law")):
        scores[name] = scores["prose"] | {"loss_per_byte": 1.0}
        trained = scores["prose"] | {"loss_per_byte": 1.1 + number}
        summary["attempts"][0]["final"][name] = trained
    del scores["prose"]
    domains = {"old": ["poems", "law"], "new": ["code"]}
    run = run_of(summary | {"baseline": scores, "domains": domains}, "one", 0)
    other = replace(run, name="other", settings=run.settings | {"training.learning_rate": 2})
    (alone,), (both,) = (
        group_figures(Comparison(tuple(each)))["tradeoff"] for each in ([run], [run, other])
    )
    notes = {text.get_text(): text.xy[1] for text in alone.axes[0].texts}
    assert notes == {"poems": pytest.approx(10), "law": pytest.approx(110)}
    assert len(alone.axes[0].containers) == len(both.axes[0].containers) == 2
    assert not any(text.get_text() for text in both.axes[0].texts)


@pytest.mark.full
def test_hostile_names_and_numbers_have_figures(summary_with_control: dict[str, Any]) -> None:
    """Formulas, breaks, and losses that no axis holds: each has a place or is a gap."""
    name = "$\\frac{$\n\x1b[31m\u202e\udc80" + "x" * 5000
    domain = name.replace("\udc80", "")  # which no file that is read may hold
    text = json.dumps(summary_with_control).replace('"prose"', json.dumps(domain))
    values = (math.inf, math.nan, 1e308, -1e308, 3.0)
    curve = Curve(f"eval/{domain}/loss", (0, 1, 2, 3, 10**14), values)
    settings = SETTINGS | {f"key{name}": name}
    run = EndedRun(name, Summary.of(json.loads(text)), settings, (curve,), (curve,), (curve,))
    assert page([replace(run, curves=(replace(curve, values=(1.7e308, *values[1:])),))], title=name)
    found, pictures = page([run, EndedRun("b", run.summary, SETTINGS, (curve,))], title=name)
    assert not {"\x1b", "\u202e", "\udc80"} & set(found) and len(pictures) == 7
    assert all(len(picture) > 2000 for picture in pictures.values())


@pytest.mark.full
def test_as_much_is_drawn_as_a_picture_can_hold(summary: dict[str, Any]) -> None:
    made = Summary.of(summary)
    many = [EndedRun(str(n), made, SETTINGS | {"training.learning_rate": n}) for n in range(50)]
    changes = group_figures(Comparison(tuple(many)))["changes"]
    assert all(max(each.get_size_inches()) * each.dpi < 2**12 for each in changes)
    assert "the first 40 groups" in page(many, title="many")[0]
    scores = {f"d{number}": summary["baseline"]["prose"] for number in range(60)}
    domains = {"old": list(scores), "new": []}
    wide = summary | {"baseline": scores, "domains": domains, "attempts": [{"final": scores}]}
    drawn = group_figures(Comparison((EndedRun("a", Summary.of(wide), SETTINGS),)))
    assert len(drawn["changes"]) == Topic.MAX_PANELS


@pytest.mark.full
def test_rounds_are_compared_from_the_base_to_their_end(summary: dict[str, Any]) -> None:
    middle, final = summary["expanded"], summary["final"]
    rounds = [
        {"expansion": ["width"], "status": "kept", "final": middle, "steps": 5, "flops": 1.0},
        {"expansion": ["width"], "status": "kept", "final": final, "steps": 7, "flops": 2.0},
    ]
    rounds[1]["baseline"] = middle
    attempts = [rounds[1] | {"gate": summary["gate"]}]
    grown = {"rounds": rounds, "attempts": attempts, "expansion": ["width", "width"], "flops": {}}
    run = EndedRun("grown", Summary.of(summary | grown), SETTINGS)
    assert run.expansions == (0, 5) and run.steps == 12 and run.cost("flops") == 3.0
    prose = next(row for row in run.rows if row.domain == "prose")
    assert prose.before == next(row for row in run_of(summary, "a", 0).rows).before
    assert prose.change.value == pytest.approx(1.22 / 1.208 - 1) and prose.verdict is None
    text = page([run], title="Rounds")[0]
    assert "Loss after each round [nats/token]" in text
    assert "Checks of the gate of the last round" in text, "whose start is not the base"


@pytest.mark.full
def test_growth_has_its_map_and_columns_where_some_run_may_grow(
    summary_with_control: dict[str, Any],
) -> None:
    plain = run_of(summary_with_control, "plain", 0)
    text, pictures = page([plain], title="None")
    assert "neurons born" not in text and "Neuron growth" not in text
    assert not any(name.startswith("growth") for name in pictures)
    made = growth(replaces=True)
    grown = run_of(summary_with_control | {"growth": made}, "grown", 0)
    text, pictures = page([grown], title="One")
    assert [name for name in pictures if name.startswith("growth")] == [
        *("growth_1.png", "growth_2.png", "growth_3.png"),  # map, pressure, parameters
    ]
    words = " ".join(" ".join(seen(text).words).split())
    assert "expansion=width, forgetting=ewc, growth=percentile+gradmax" in words
    assert "in 5 events, 17 checks" in words
    assert "72 0 6 4 1 198" in words  # step, layer, born, replaced, left dead, neurons
    assert "Neuron growth: parameters 169 k → 177 k; neurons 384 → 426" in words
    again = run_of(summary_with_control | {"growth": made}, "again", 1)
    _, pictures = page([plain, grown, again], title="All")
    assert sum(name.startswith("growth") for name in pictures) == 3  # two maps, parameters
    text, pictures = page([plain, grown], title="Both")
    words = " ".join(" ".join(seen(text).words).split())
    assert "neurons born parameters after growth" in words and "42 177 k" in words
    assert words.count("- - 532 k") == 1  # the one that was not to grow, by its columns


@pytest.mark.full
def test_of_very_many_events_the_page_has_the_first(summary: dict[str, Any]) -> None:
    made = growth(layers=130, checks=400, grows_every=1)
    text, _ = page([run_of(summary | {"growth": made}, "many", 0)], title="Many")
    assert "Growth events; 300 more are in summary.json" in text
    assert "shown: the 100 that grew most" in text
    nothing = run_of(summary | {"growth": growth(grows_every=0)}, "nothing", 0)
    text, _ = page([nothing], title="Nothing")
    assert "Neuron growth: nothing grew in 17 checks" in text and "Growth events" not in text


@pytest.mark.full
def test_a_name_of_a_growth_is_text(summary: dict[str, Any]) -> None:
    made = growth()
    made["options"]["trigger"] = HOSTILE
    text, _ = page([run_of(summary | {"growth": made}, "a", 0)], title="One")
    assert HOSTILE not in text and "script" not in {tag for tag, _ in seen(text).tags}


def test_a_rolled_back_run_shows_the_grown_size_too(summary: dict[str, Any]) -> None:
    kept = summary | {"parameters": {"baseline": 213_440, "final": 213_440}}
    kept["attempts"] = [one | {"parameters": 721_792} for one in kept["attempts"]]
    for status, expected in (("rolled_back", "213 k (grown 722 k)"), ("kept", "213 k")):
        assert SummaryTables(Summary.of(kept | {"status": status})).size == expected
    text, _ = page([run_of(kept | {"status": "rolled_back"}, "one", 0)], title="Runs")
    assert "<span>213 k</span> <span>(grown 722 k)</span>" in text


def test_a_label_is_next_to_the_line_at_zero() -> None:
    for values, first in (((0, 10), 0.0), ((-16, 0), None)):
        figure, axes = panel(height=1)
        axes.plot(values, [1, 1])
        axes.axvline(0)
        _label_rows(axes, [1], ["expansion=width forgetting=none"])
        figure.draw_without_rendering()
        (label,) = axes.texts
        box = label.get_window_extent()
        zero = axes.transData.transform((0, 1))[0]
        assert box.x0 > zero if first is not None else box.x1 < zero
        assert box.x0 > axes.get_window_extent().x0 and not axes.spines["left"].get_visible()
