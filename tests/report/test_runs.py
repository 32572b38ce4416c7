"""Groups of runs that differ in the seed alone, and the intervals over them."""

import copy
import math
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pytest
from scipy import stats

from tests.report.growing import growth
from tritter.errors import TritterError
from tritter.report.figures import _search_path
from tritter.report.runs import EndedRun, Group, Interval, differing_keys
from tritter.report.summary import Summary

SETTINGS = {
    "seed": 0,
    "training.learning_rate": 0.003,
    "forgetting.methods": ["ewc"],
    "data.batch_size": 4,
    "data.sequence_length": 8,
}


def run_of(summary: dict[str, Any], name: str, change: float, **settings: Any) -> EndedRun:
    summary = copy.deepcopy(summary) | {"expansion": ["width"], "forgetting": ["ewc"]}
    for check in summary["attempts"][-1]["gate"]:
        if check["check"] == "retention":
            check["value"] = change
    values = SETTINGS | {key.replace("__", "."): value for key, value in settings.items()}
    return EndedRun(name=name, summary=Summary.of(summary), settings=values)


def test_seeds_are_one_group_and_other_settings_are_another(summary: dict[str, Any]) -> None:
    changes = [0.01, 0.03, 0.02]
    runs = [run_of(summary, f"a{seed}", x, seed=seed) for seed, x in enumerate(changes)]
    other = run_of(summary, "b", 0.5, training__learning_rate=0.01)
    first, second = Group.of_runs([*runs, other])
    assert [run.name for run in first.runs] == ["a0", "a1", "a2"] and second.runs == (other,)
    assert first.name == "expansion=width forgetting=ewc learning_rate=0.003"
    assert second.name == "expansion=width forgetting=ewc learning_rate=0.01"
    assert differing_keys([*runs, other]) == ("seed", "training.learning_rate")
    found = first.change("prose")
    assert found is not None
    low, high = stats.t.interval(0.95, 2, loc=np.mean(changes), scale=stats.sem(changes))
    assert (found.value, found.lower, found.upper) == pytest.approx((0.02, low, high))


def test_keys_that_end_alike_name_a_group_in_full(summary: dict[str, Any]) -> None:
    steps = {"training__max_steps": 12, "pretraining__max_steps": 600}
    more = {key: 2 * value for key, value in steps.items()}
    first, _ = Group.of_runs([run_of(summary, "a", 0.0, **each) for each in (steps, more)])
    assert first.name.endswith(" training.max_steps=12 pretraining.max_steps=600")


def test_a_single_run_has_the_bounds_of_its_gate(summary: dict[str, Any]) -> None:
    (group,) = Group.of_runs([run_of(summary, "a", 0.0102)])
    found = group.change("prose")
    interval = summary["gate"][0]["interval"]
    assert found == Interval(0.0102, *interval, values=(0.0102,))
    assert group.change("of no run") is None


def test_below_three_seeds_there_is_no_interval(summary: dict[str, Any]) -> None:
    changes = [0.01, 0.03]
    runs = [run_of(summary, f"a{seed}", x, seed=seed) for seed, x in enumerate(changes)]
    (group,) = Group.of_runs(runs)
    found = group.change("prose")
    assert found is not None and (found.lower, found.upper) == (None, None)
    assert found.values == (0.01, 0.03) and found.text() == "+1.00, +3.00"


def test_runs_of_one_seed_count_once(summary: dict[str, Any]) -> None:
    """A second run with the same seed is no independent observation."""
    seeds, changes = [0, 0, 1, 2], [0.01, 0.03, 0.05, 0.08]
    runs = [
        run_of(summary, str(n), x, seed=s)
        for n, (s, x) in enumerate(zip(seeds, changes, strict=True))
    ]
    (group,) = Group.of_runs(runs)
    found = group.change("prose")
    assert found is not None and found.values == pytest.approx((0.02, 0.05, 0.08))
    low, high = stats.t.interval(0.95, 2, loc=0.05, scale=stats.sem([0.02, 0.05, 0.08]))
    assert (found.lower, found.upper) == pytest.approx((low, high))


def test_differences_of_groups_are_paired_by_seed(summary: dict[str, Any]) -> None:
    """As the paired t-test of scipy; seeds of one group alone do not count."""
    generator = np.random.default_rng(0)
    seeds = {1: [0, 1, 2, 3, 4, 7], 2: [4, 3, 2, 1, 0, 9]}
    base = dict(zip(range(10), generator.uniform(1, 2, 10), strict=True))  # differs by seed
    losses = {
        rate: {s: base[s] * (1 + 0.01 * rate + generator.normal(0, 0.002)) for s in of_rate}
        for rate, of_rate in seeds.items()
    }
    runs = []
    for rate, of_rate in losses.items():
        for seed, loss in of_rate.items():
            changed = copy.deepcopy(summary)
            changed["attempts"][-1]["final"]["prose"]["loss_per_byte"] = loss
            runs.append(run_of(changed, f"{rate}-{seed}", 0.0, seed=seed, rate=rate))
    reference, other = Group.of_runs(runs)
    found = other.difference(reference, "prose")
    ratios = [losses[2][seed] / losses[1][seed] for seed in range(5)]
    test = stats.ttest_rel(ratios, np.ones(5))
    low, high = test.confidence_interval(0.95)
    assert found is not None and len(found.values) == 5
    assert (found.value, found.lower, found.upper) == pytest.approx(
        (np.mean(ratios) - 1, low, high)
    )
    # Without the pairs the seeds' own differences would hide it
    unpaired = stats.ttest_ind(list(losses[2].values()), list(losses[1].values()))
    assert unpaired.pvalue > 0.5 and found.lower is not None and found.lower > 0


def test_a_mean_of_what_is_not_finite_is_none() -> None:
    assert Interval.of([]) is None and Interval.of([1.0, float("nan")]) is None
    assert Interval.of([1.0]) == Interval(1.0, None, None, (1.0,))


def test_the_front_holds_what_nothing_beats() -> None:
    points = [(0.1, -0.2), (0.3, 0.0), (0.2, 0.1), (0.3, 0.1), (0.05, -0.1)]
    assert _search_path(points) == [(0.3, 0.0), (0.1, -0.2)]


def test_tokens_of_a_step_and_borders_of_tasks(summary: dict[str, Any]) -> None:
    run = run_of(summary, "a", 0.0, trainer__accumulate_grad_batches=3)
    assert run.tokens_per_step == 4 * 8 * 3
    long = {"source_length": 8, "length": 12, "scores": {}, "positions": {}}
    longer = replace(run, summary=Summary.of(summary | {"windows": long}))
    assert longer.tokens_per_step == 3 * 12 * 3
    tasks = [{"domains": ["x"], "final": {}, "steps": steps} for steps in (5, 7, 9)]
    several = EndedRun(name="a", summary=Summary.of(summary | {"tasks": tasks}), settings={})
    assert several.summary.borders == (5, 12) and several.tokens_per_step is None


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("status", "great", "status"),
        ("domains", ["prose"], "domains"),
        ("baseline", {"prose": {"loss": "low"}}, "baseline.prose.loss"),
        ("attempts", {}, "attempts"),
        ("flops", {"total": "much"}, "flops.total"),
        ("baseline", {"prose": {"loss": "3.5"}}, "baseline.prose.loss"),  # text is no number
        ("baseline", {"prose": {"loss": math.nan}}, "baseline.prose.loss"),
        ("flops", {"total": 1e300}, "flops.total"),
        ("parameters", {"final": 10**90}, "parameters.final"),
        ("attempts", [{"status": "kept"}], "attempts.0.final"),
        ("attempts", [{"final": {}, "overrides": [1]}], "attempts.0.overrides.0"),
        ("attempts", [{"final": {}, "gate": [{"value": 1.0}]}], "attempts.0.gate.0.check"),
        ("control", {"final": []}, "control.final"),
        ("tasks", [{"domains": ["x"], "final": {}, "steps": 1e9}], "tasks.0.steps"),
        ("samples", [{"before": 3}], "samples.0.before"),
    ],
)
def test_what_is_no_summary_is_refused(
    summary: dict[str, Any], key: str, value: Any, said: str
) -> None:
    Summary.of(summary)
    with pytest.raises(TritterError, match=said):
        Summary.of(summary | {key: value})


def test_what_an_older_version_left_out_is_a_gap(summary: dict[str, Any]) -> None:
    least = {key: summary[key] for key in ("status", "domains", "baseline")}
    least["attempts"] = [{"final": summary["final"]}]
    run = EndedRun("old", Summary.of(least), {})
    assert (run.steps, run.expansions, run.cost("flops"), run.seed) == (0, (), None, None)
    assert run.rows[0].verdict is None and run.rows[0].change.lower is None


def test_what_methods_prepare_is_a_cost_of_their_training(summary: dict[str, Any]) -> None:
    prepared = {"importance": 1.0, "self_replay": 2.0, "choose": 4.0, "distill": 8.0, "adapt": 16.0}
    (attempt,) = summary["attempts"]
    kinds: tuple[Literal["flops", "seconds"], ...] = ("flops", "seconds")
    for of in kinds:
        stages = {**summary[of], **prepared}
        run = EndedRun(
            "a", Summary.of(summary | {of: stages, "attempts": [{**attempt, of: 1000.0}]}), {}
        )
        assert run.cost(of) == 1031.0


def test_a_control_stands_beside_its_group_once(summary_with_control: dict[str, Any]) -> None:
    """That of a sweep over expansions is the same training each time."""
    runs = [
        EndedRun(name, Summary.of(summary_with_control | {"expansion": [method]}), settings)
        for name, method, settings in (
            ("a", "width", SETTINGS),
            ("b", "dus", SETTINGS | {"expansion.methods": 1}),
        )
    ]
    groups = Group.with_controls(Group.of_runs(runs))
    assert [group.is_control for group in groups] == [False, True, False]
    assert groups[1].name == "control (not grown) forgetting=none"
    code = groups[1].change("code")
    assert code is not None and code.value == -0.21
    assert groups[1].runs[0].cost("flops") == 6e11 and groups[1].runs[0].expansions == ()


def test_options_of_a_method_do_not_name_what_the_method_does(summary: dict[str, Any]) -> None:
    runs = [
        run_of(summary, "a", 0.0),
        run_of(summary, "b", 0.0, forgetting__methods=["replay"], forgetting__replay__keep=0),
    ]
    changed = runs[1].summary.model_copy(update={"forgetting": ["replay"]})
    runs[1] = replace(runs[1], summary=changed)
    names = [group.name for group in Group.of_runs(runs)]
    assert names == ["expansion=width forgetting=ewc", "expansion=width forgetting=replay"]


def test_growth_names_a_group_where_some_run_may_grow(
    summary_with_control: dict[str, Any],
) -> None:
    foam = {"growth__trigger": "percentile", "growth__check_every": 5}
    runs = [
        run_of(summary_with_control, "a", 0.0),
        run_of(summary_with_control | {"growth": growth()}, "b", 0.0, **foam),
    ]
    names = [group.name for group in Group.of_runs(runs)]
    common = "expansion=width forgetting=ewc"
    assert names == [f"{common} growth=none", f"{common} growth=percentile+gradmax"]
    groups = Group.with_controls(Group.of_runs(runs[1:]))
    control = groups[1]
    assert control.is_control and "growth" not in control.name
    assert control.runs[0].summary.growth is None and control.runs[0].births == ()


def test_neurons_of_a_last_round_are_born_after_the_rounds_before(summary: dict[str, Any]) -> None:
    made = growth(checks=7)
    single = summary | {"growth": made}
    single["attempts"][0]["steps"] = 90
    assert EndedRun("a", Summary.of(single), {}).births == (36, 72)
    rounds = [{"final": summary["final"], "steps": steps} for steps in (50, 90)]
    several = EndedRun("a", Summary.of(summary | {"growth": made, "rounds": rounds}), {})
    assert several.births == (86, 122) and several.last_steps == 90
