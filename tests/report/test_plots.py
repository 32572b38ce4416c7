import csv
import math
from dataclasses import replace

import matplotlib.image
import pytest

from tests.report.growing import growth
from tritter.report import figures
from tritter.report.drawing import new_figure
from tritter.report.figures import _draw_losses
from tritter.report.runs import Curve, EndedRun, Group
from tritter.report.summary import Summary

HEADER = "epoch,eval/code/loss,forgetting/l2sp/loss,step,train/loss\n"


def read_curves(path):
    rows = csv.DictReader(path.read_text().splitlines()) if path and path.exists() else ()
    return Curve.of_rows(list(rows))


def plot_run(plain, path, folder, **options):
    return figures.plot_run(Summary.of(plain), read_curves(path), folder, **options)


@pytest.fixture
def metrics_csv(tmp_path):
    path = tmp_path / "metrics.csv"
    lines = [f"0,,{0.01 * step},{step},{3 + math.exp(-step / 20):.4f}\n" for step in range(60)]
    path.write_text(HEADER + "".join(lines) + "0,3.42,,59,\n")
    return path


def pixels_of(path):
    return matplotlib.image.imread(path)[..., :3]


def test_draws_plots_with_something_in_them(summary_with_control, metrics_csv, tmp_path):
    written = plot_run(summary_with_control, metrics_csv, tmp_path / "new" / "plots")
    assert [path.name for path in written] == [
        "domains.png",
        "forgetting.png",
        "training.png",
        "retention_and_gain.png",
    ]
    for path in written:
        pixels = pixels_of(path)
        assert pixels.shape[0] > 400 and pixels.shape[1] > 600
        is_coloured = (pixels.max(axis=-1) - pixels.min(axis=-1)) > 0.3
        assert 100 < is_coloured.sum() < 0.2 * is_coloured.size


@pytest.mark.full
def test_plots_depend_on_the_numbers(summary, tmp_path):
    first = plot_run(summary, None, tmp_path / "a")
    summary["attempts"][0]["final"]["prose"]["loss"] = 3.9
    second = plot_run(summary, None, tmp_path / "b")
    assert first[0].read_bytes() != second[0].read_bytes()
    assert first[1].read_bytes() == second[1].read_bytes(), "the paired changes are the same"


@pytest.mark.full
def test_each_domain_has_its_curve_where_it_was_evaluated_on_the_way(summary, tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("eval/code/loss,eval/prose/loss,step\n3.4,3.1,0\n3.0,3.3,50\n")
    first = plot_run(summary, path, tmp_path / "a")
    assert "forgetting.png" in {file.name for file in first}
    path.write_text("eval/code/loss,eval/prose/loss,step\n3.4,3.1,0\n3.0,3.2,50\n")
    plot_run(summary, path, tmp_path / "b")
    name = "forgetting.png"
    assert (tmp_path / "a" / name).read_bytes() != (tmp_path / "b" / name).read_bytes()


@pytest.mark.full
def test_what_was_before_and_beside_a_training_is_in_its_picture(summary_with_control, tmp_path):
    """The base's level and the control: each changes the picture."""
    path, pictures = tmp_path / "metrics.csv", []
    rows = [{"step": str(step), "eval/code/loss": str(3.4 - step / 99)} for step in (0, 50)]
    before = {"step": "-1", "eval/code/loss": "3.2"}
    for name, first, options in (
        ("plain", [], {}),
        ("before", [before], {}),
        ("control", [before], {"control": Curve.of_rows(rows)}),
    ):
        with path.open("w") as file:
            writer = csv.DictWriter(file, before)
            writer.writeheader()
            writer.writerows([*first, *rows])
        plot_run(summary_with_control, path, tmp_path / name, **options)
        pictures.append((tmp_path / name / "forgetting.png").read_bytes())
    assert len(set(pictures)) == len(pictures)


def drawn(summary, curves, *, seeds=1, **rounds):
    """Draw one loss of runs that differ in the seed; return its panel."""
    run = EndedRun("", Summary.of(summary | rounds), {}, curves)
    _, (axes,) = new_figure(width=4, height=4)
    group = Group("grown", (run,) * seeds, color="blue")
    assert _draw_losses(axes, [group], "eval/code/loss")
    return axes


def rounds_of(summary):
    """Two rounds of 50 steps, and their losses at the places of metrics_rounds.csv."""
    final = summary["final"]
    rounds = [{"expansion": ["dus"], "status": "kept", "final": final, "steps": 50}] * 2
    losses = {-1: 3.2, 0: 3.4, 50: 3.0}, {50: 3.1, 100: 2.9}
    rows = [{"step": str(k), "eval/code/loss": str(v)} for each in losses for k, v in each.items()]
    parts = {"rounds": rounds, "attempts": [rounds[-1] | {"gate": []}], "expansion": ["dus", "dus"]}
    return Curve.of_rows(rows), parts


def test_the_loss_before_each_expansion_is_left_of_it(summary):
    """A line marks each expansion; the loss jumps at it."""
    curves, rounds = rounds_of(summary)
    axes = drawn(summary, curves, **rounds)
    losses, level, *marks = axes.lines
    before, *steps = losses.get_xdata()
    assert before < 0 and list(steps) == [0, 50, 50, 100]
    assert list(losses.get_ydata()) == [3.2, 3.4, 3.0, 3.1, 2.9]
    assert set(level.get_ydata()) == {3.2}
    first, second = (mark.get_xdata()[0] for mark in marks)
    assert before < first < 0 and second == 50
    assert min(axes.get_xticks()) >= 0, "the loss before the first step has no tick"
    *_, mean = [
        line
        for line in drawn(summary, curves, seeds=3, **rounds).lines
        if len(line.get_xdata()) > 2
    ]
    assert list(mean.get_ydata()) == pytest.approx(list(losses.get_ydata())), "of equal seeds"


def test_the_loss_before_an_expansion_is_not_averaged_with_those_after_it(summary):
    losses = [3.2, *[4.0] * 44]
    rows = [{"step": str(n - 1), "eval/code/loss": str(loss)} for n, loss in enumerate(losses)]
    axes = drawn(summary, Curve.of_rows(rows), expansion=["dus"])
    assert list(axes.lines[0].get_ydata()) == losses


@pytest.mark.full
def test_rounds_are_in_one_picture_without_the_bound_of_each(summary_with_control, tmp_path):
    curves, rounds = rounds_of(summary_with_control)
    made = Summary.of(summary_with_control | rounds)
    whole = figures.plot_run(made, curves, tmp_path / "all", control=curves)
    last = figures.plot_run(
        made,
        [replace(each, steps=each.steps[3:], values=each.values[3:]) for each in curves],
        tmp_path / "last",
        control=curves,
    )
    names = [path.name for path in whole]
    assert names == [path.name for path in last] and "forgetting.png" in names
    one, other = (each[names.index("forgetting.png")].read_bytes() for each in (whole, last))
    assert one != other


def test_rounds_and_their_control_begin_at_the_base(summary_with_control, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "_domains_figure", lambda rows, *_: drawn.extend(rows))
    _, rounds = rounds_of(summary_with_control)
    rounds["attempts"][0]["baseline"] = summary_with_control["final"]
    figures.plot_run(Summary.of(summary_with_control | rounds), (), tmp_path)
    for row in drawn:
        assert row.before.loss == summary_with_control["baseline"][row.domain]["loss"]
    assert [row.is_control for row in drawn] == [False, False, True, True]


def test_curves_are_read_between_the_blanks(metrics_csv):
    curves = {curve.name: curve for curve in read_curves(metrics_csv)}
    assert set(curves) == {"eval/code/loss", "forgetting/l2sp/loss", "train/loss"}
    assert curves["eval/code/loss"].steps == (59,) and curves["eval/code/loss"].values == (3.42,)
    assert len(curves["train/loss"].steps) == 60 and curves["train/loss"].values[0] == 4.0


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(
    "content", [None, "", HEADER, HEADER + "0,,,,\n", "step,train/loss\n5,nan\n"]
)
def test_missing_empty_or_broken_metrics_never_fail_a_run(summary, tmp_path, content):
    path = tmp_path / "metrics.csv"
    if content is not None:
        path.write_text(content)
    names = [file.name for file in plot_run(summary, path, tmp_path)]
    assert {"domains.png", "retention_and_gain.png"} <= set(names)


def test_rolled_back_run_without_numbers_draws_what_it_has(rolled_back, tmp_path):
    names = [path.name for path in plot_run(rolled_back, None, tmp_path)]
    assert names == ["domains.png"], "no gain is known, so there is no point to draw"


def test_nothing_known_draws_nothing(summary, tmp_path):
    summary["baseline"] = {}
    summary["attempts"] = []
    summary["gate"] = []
    assert plot_run(summary, None, tmp_path) == []


@pytest.mark.full
def test_many_domains_each_get_a_panel(summary, tmp_path):
    for scores in (summary["baseline"], summary["expanded"], summary["attempts"][0]["final"]):
        scores["poems"] = scores["prose"]
    narrow = pixels_of(plot_run(summary, None, tmp_path)[0])
    summary["domains"]["old"] = ["prose", "poems"]
    wide = pixels_of(plot_run(summary, None, tmp_path)[0])
    assert wide.shape[1] > narrow.shape[1]


@pytest.mark.full
def test_growth_has_its_picture_and_is_marked_in_that_of_forgetting(summary, tmp_path):
    path = tmp_path / "metrics.csv"
    header = "step,eval/code/loss,growth/flops\n"
    path.write_text(f"{header}0,3.4,1e9\n50,3.0,2e11\n")
    plain = plot_run(summary, path, tmp_path / "plain")
    assert "growth.png" not in {file.name for file in plain}
    names = ("growth.png", "forgetting.png")
    pictures = [(tmp_path / "plain" / "forgetting.png").read_bytes()]
    for number, made in enumerate((growth(checks=4), growth(checks=4, grows_every=4))):
        plot_run(summary | {"growth": made}, path, tmp_path / str(number))
        pictures += [(tmp_path / str(number) / name).read_bytes() for name in names]
    assert len(set(pictures)) == 5
    assert pixels_of(tmp_path / "0" / "growth.png").shape == (930, 1440, 3)
    path.write_text(f"{header}0,3.4,1e9\n50,3.0,inf\n")
    assert EndedRun("", Summary.of(summary), {}, read_curves(path)).last_flops is None
    path.write_text(f"{header}0,3.4,0\n20,3.2,3e9\n25,3.1,4e9\n50,3.0,2e9\n")
    tasks = [{"domains": ["code"], "final": {}, "steps": steps} for steps in (20, 30)]
    made = Summary.of(summary | {"tasks": tasks})
    assert EndedRun("", made, {}, read_curves(path)).last_flops == 7e9, "each task counts its own"
    plot_run(summary | {"growth": growth(grows_every=0)}, path, tmp_path / "nothing")


def test_growth_of_a_last_round_is_marked_behind_the_rounds_before(summary):
    curves, rounds = rounds_of(summary)
    made = growth(checks=4)
    axes = drawn(summary, curves, **rounds, growth=made)
    marked = [
        segment[0][0]
        for lines in axes.collections
        for segment in lines.get_segments()
        if lines.get_label() == "neurons grew"
    ]
    assert marked == [50 + step for step in dict.fromkeys(e["step"] for e in made["events"])]
