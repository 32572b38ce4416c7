"""Plans: termination, reached sizes, costs compared with a manual formula, and refusals."""

import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tritter
from tests.oracle import tiny_llama
from tritter.core.expansions import LlamaPro, Width
from tritter.core.families import Config, Model
from tritter.core.families.presets import PRESETS, aspect_ratio_at
from tritter.errors import RequestError
from tritter.planning.memory import TrainingSetup
from tritter.planning.plan import (
    Assumptions,
    GrowthPlan,
    ScalingLaw,
    _training_flops_per_token,
    plan_expansion_path,
    plan_growth,
)
from tritter.planning.shapes import GrowthMethods, nearest_preset

SMALL: Config = tiny_llama().config.to_dict()
STRATEGIES = ("depth_first", "width_first", "balanced", "auto")
# What the specification's paths ask for, as (source, target) in billions.
PATHS = [(3, 7), (7, 10), (3, 10), (7, 14), (0.125, 14)]


def planned(source: float, target: float, strategy: str, *, hours: float = 1e9) -> GrowthPlan:
    _, model = nearest_preset(int(source * 1e9))
    return plan_growth(model, int(target * 1e9), gpu_hours=hours, strategy=strategy)


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("source", "target"), PATHS)
def test_a_plan_reaches_its_target_by_steps_that_follow(
    source: float, target: float, strategy: str
) -> None:
    plan = planned(source, target, strategy)
    assert abs(plan.steps[-1].target_parameters / (target * 1e9) - 1) <= 0.1
    assert plan.steps[0].source == plan.source
    for before, after in pairwise(plan.steps):
        assert after.source == before.target
    for step in plan.steps:
        assert step.target_parameters == Model(step.target.config).num_parameters
        assert 1 < step.target_parameters / step.source_parameters < 2.1
    assert plan.reaches_target and plan.reached is None
    assert plan.reached_parameters == plan.steps[-1].target_parameters


@pytest.mark.full
def test_the_specifications_example_takes_three_steps() -> None:
    assert len(planned(3, 10, "balanced").steps) == 3


@pytest.mark.full
def test_strategies_do_what_they_are_called() -> None:
    deeper, wider = planned(3, 10, "depth_first"), planned(3, 10, "width_first")
    assert {step.method for step in deeper.steps} == {"dus"}
    assert {step.method for step in wider.steps} == {"width"}
    turned = planned(0.125, 14, "width_first").steps
    assert turned[0].method == "width" and turned[-1].method == "dus"


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(("source", "target"), [(3, 10), (7, 14)])
def test_balanced_ends_nearer_to_the_presets_proportions(source: float, target: float) -> None:
    def miss(strategy: str) -> float:
        last = planned(source, target, strategy).steps[-1]
        wanted = aspect_ratio_at(last.target_parameters)
        return abs(math.log(last.target.sizes.aspect_ratio / wanted))

    assert miss("balanced") <= min(miss("depth_first"), miss("width_first")) + 0.15


def test_a_refused_size_is_never_the_nearest_one() -> None:
    """`depth_first` turns to width; if no width fits below the target, layers do."""
    shape = {"hidden_size": 40, "num_attention_heads": 5, "num_key_value_heads": 1}
    source = Model({**SMALL, **shape, "head_dim": 8, "num_hidden_layers": 1})
    plan = plan_growth(source, 60_120, gpu_hours=1, strategy="depth_first")
    assert plan.steps[-1].target_parameters == 60_120


@pytest.mark.full
@settings(max_examples=15, deadline=None)
@given(
    growth=st.floats(1.3, 60),
    strategy=st.sampled_from(STRATEGIES),
    heads=st.sampled_from([(4, 1), (4, 2), (4, 4), (6, 3), (8, 1)]),
    layers=st.integers(1, 9),
)
def test_planning_always_ends(
    growth: float, strategy: str, heads: tuple[int, int], layers: int
) -> None:
    """Any small shape and any target either yields a plan or a named refusal."""
    source: Config = {
        **SMALL, "num_hidden_layers": layers, "hidden_size": 8 * heads[0], "head_dim": 8,
        "num_attention_heads": heads[0], "num_key_value_heads": heads[1],
    }  # fmt: skip
    target = int(growth * Model(source).num_parameters)
    try:
        plan = plan_growth(Model(source), target, gpu_hours=1, strategy=strategy)
    except RequestError as error:
        assert "within 10 %" in str(error)
        return
    assert len(plan.steps) <= 64
    assert abs(plan.steps[-1].target_parameters / target - 1) <= 0.1


def test_tokens_and_hours_by_hand() -> None:
    assumptions = Assumptions(
        device_flops=1e15,
        mfu=0.5,
        tokens_per_parameter=10,
        setup=TrainingSetup(sequence_length=1024),
    )
    source = PRESETS["tritter_7b"].config()
    plan = plan_growth(
        Model(source),
        10_700_000_000,
        gpu_hours=1e6,
        strategy="depth_first",
        assumptions=assumptions,
    )
    (step,) = plan.steps
    layers, d, f, kv, vocabulary = 48, 4096, 14336, 1024, 32_000
    matrices = layers * (2 * d * d + 2 * d * kv + 3 * d * f) + vocabulary * d
    per_token = 3 * (2 * matrices + 2 * layers * d * (1024 + 1))
    tokens = 10 * (10_731_524_096 - 7_241_732_096)
    assert step.num_tokens == tokens
    assert step.gpu_hours == pytest.approx(tokens * per_token / 0.5e15 / 3600)
    assert plan.spare_gpu_hours == pytest.approx(1e6 - step.gpu_hours)
    scratch = 10 * 10_731_524_096 * per_token / 0.5e15 / 3600
    assert plan.from_scratch_gpu_hours == pytest.approx(scratch)
    small = per_token - 3 * 16 * 2 * (2 * d * d + 2 * d * kv + 3 * d * f + d * (1024 + 1))
    own = 10 * 7_241_732_096 * small / 0.5e15 / 3600
    assert plan.source_gpu_hours == pytest.approx(own)
    assert per_token / (6 * 10_731_524_096) == pytest.approx(1, abs=0.1)  # the usual 6 N D


@pytest.mark.full
def test_hours_know_windows_and_what_is_frozen() -> None:
    source = {**PRESETS["tritter_7b"].config(), "model_type": "mistral"}
    hours = {}
    for window, is_frozen in ((None, False), (256, False), (None, True)):
        setup = TrainingSetup(sequence_length=8192, is_attention_frozen=is_frozen)
        assumptions = Assumptions(setup=setup)
        plan = plan_growth(
            Model({**source, "sliding_window": window}), 10_700_000_000,
            gpu_hours=1e6, strategy="depth_first", assumptions=assumptions,)  # fmt: skip
        hours[window, is_frozen] = plan.steps[0].gpu_hours
    layers, d, f, kv, vocabulary, length = 48, 4096, 14336, 1024, 32_000, 8192
    projections = layers * (2 * d * d + 2 * d * kv)
    matrices = projections + layers * 3 * d * f + vocabulary * d
    full = 2 * matrices + 2 * layers * d * (length + 1)
    keys = sum(min(place + 1, 256) for place in range(length)) / length
    windowed = 2 * matrices + 4 * layers * d * keys
    whole = hours[None, False]
    assert hours[256, False] / whole == pytest.approx(windowed / full)
    # Gradients of its weights are saved; those that pass through it are needed below
    assert hours[None, True] / whole == pytest.approx((3 * full - 2 * projections) / (3 * full))


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("due", [5, 20])
def test_growth_pays_from_where_the_curves_cross(due: float) -> None:
    """Compare the curves on a grid; both start at the source's loss."""
    assumptions = Assumptions(tokens_per_parameter=due)
    source = PRESETS["tritter_3b"].config()
    plan = plan_growth(
        Model(source),
        3_600_000_000,
        gpu_hours=500.0,
        strategy="depth_first",
        assumptions=assumptions,
    )
    (first,) = plan.steps

    models = {"source": first.source, "grown": first.target}
    costs = {k: _training_flops_per_token(c, assumptions.setup) for k, c in models.items()}
    sizes = {k: c.num_parameters for k, c in models.items()}

    def loss(which: str, hours: float) -> float:
        size, law = sizes[which], assumptions.law
        tokens = hours * 3600 * assumptions.device_flops * 0.4 / costs[which]
        seen = law.tokens_for(size, law.loss(plan.source_parameters, due * plan.source_parameters))
        return law.loss(size, seen + tokens)

    assert plan.control_loss == pytest.approx(loss("source", 500.0), abs=1e-9)
    grid = [10 ** (k / 20) for k in range(-40, 140)]
    pays = [hours for hours in grid if loss("grown", hours) < loss("source", hours)]
    assert plan.pays_from_gpu_hours is not None
    if plan.pays_from_gpu_hours == 0:
        assert pays == grid
        return
    assert due < 20
    assert pays == [hours for hours in grid if hours >= pays[0]]
    assert pays[0] / 10 ** (1 / 20) <= plan.pays_from_gpu_hours * 1.001 <= pays[0] * 1.002


@pytest.mark.full
def test_a_budget_too_small_says_what_it_reaches() -> None:
    whole = planned(3, 10, "balanced")
    *_, second, third = whole.steps
    plan = planned(3, 10, "balanced", hours=second.total_gpu_hours + third.gpu_hours / 2)
    assert [step.is_affordable for step in plan.steps] == [True, True, False]
    assert not plan.reaches_target
    assert plan.needed_gpu_hours == whole.needed_gpu_hours
    assert plan.reached is not None and plan.reached.is_affordable
    assert second.target_parameters < plan.reached_parameters < third.target_parameters
    assert plan.reached.total_gpu_hours <= plan.gpu_hours
    nothing = planned(3, 10, "balanced", hours=0.001)
    assert nothing.reached is None and nothing.reached_parameters == nothing.source_parameters
    assert not any(step.is_affordable for step in nothing.steps)


@pytest.mark.full
def test_auto_takes_the_least_predicted_loss() -> None:
    for source, target in ((3, 10), (7, 14)):
        plan = planned(source, target, "auto", hours=3000)
        assert set(plan.alternatives) == {"balanced", "depth_first", "width_first"}
        least = min(plan.alternatives.values())
        assert plan.predicted_loss == plan.alternatives[plan.strategy] <= least + 0.002


@pytest.mark.full
def test_losses_fall_and_a_larger_budget_never_predicts_a_larger_one() -> None:
    plan = planned(3, 10, "balanced")
    source = ScalingLaw().loss(plan.source_parameters, 20 * plan.source_parameters)
    losses = [source, *(step.predicted_loss for step in plan.steps)]
    assert losses == sorted(losses, reverse=True)
    spent = [planned(3, 10, "balanced", hours=h).predicted_loss for h in (1, 1e3, 1e4, 1e5)]
    assert spent == sorted(spent, reverse=True)


@pytest.mark.full
def test_methods_with_options_of_their_own_keep_them() -> None:
    methods = GrowthMethods(depth=LlamaPro(), width=Width(init="net2net", shares="equal"))
    source = PRESETS["tritter_3b"].config()
    plan = plan_growth(Model(source), 10**10, gpu_hours=1, strategy="balanced", methods=methods)
    assert {step.method for step in plan.steps} == {"llama_pro", "width"}
    specs = [step.spec for step in plan.steps if isinstance(step.spec, Width)]
    assert specs and all((spec.init, spec.shares) == ("net2net", "equal") for spec in specs)


@pytest.mark.full
def test_the_names_of_the_specification() -> None:
    steps = tritter.plan_expansion_path(3e9, 10e9, 5000.0, "balanced")
    assert steps and all(isinstance(step, tritter.ExpansionStep) for step in steps)
    assert steps == plan_expansion_path(PRESETS["tritter_3b"].config(), 10**10, 5000, "balanced")


@pytest.mark.parametrize(
    ("source", "target", "hours", "strategy", "message"),
    [
        (
            7e9,
            3e9,
            1,
            "auto",
            r"target = 3,000,000,000 parameters: .* which has 7,241,732,096",
        ),
        (3e9, 1e10, 0, "auto", "gpu_hours = 0"),
        (3e9, 1e10, -5, "auto", "gpu_hours = -5"),
        (3e9, 1e10, math.nan, "auto", "gpu_hours = nan"),
        (3e9, 1e10, 1, "depth", r"strategy = depth: must be one of auto, .*Did you mean"),
        (1e3, 1e10, 1, "auto", r"source = 1,000 parameters.*the nearest preset"),
    ],
)
def test_what_cannot_be_planned_is_refused_by_name(
    source: float, target: float, hours: float, strategy: str, message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        plan_expansion_path(source, target, hours, strategy)


@pytest.mark.parametrize("mfu", [0, -0.1, 1.01, math.nan])
def test_a_utilisation_beyond_its_limits_is_refused(mfu: float) -> None:
    with pytest.raises(RequestError, match="mfu = "):
        Assumptions(mfu=mfu)


def test_other_values_beyond_their_limits_are_refused() -> None:
    with pytest.raises(RequestError, match="device_flops = 0"):
        Assumptions(device_flops=0)
    with pytest.raises(RequestError, match="tokens_per_parameter = -1"):
        Assumptions(tokens_per_parameter=-1)
    with pytest.raises(
        RequestError, match=r"strategy = balanced: requires a method that grows width"
    ):
        plan_growth(
            Model(SMALL),
            10**6,
            gpu_hours=1,
            strategy="balanced",
            methods=GrowthMethods(depth=LlamaPro()),
        )


def test_a_target_just_above_the_source_still_takes_a_step() -> None:
    (step,) = planned(3, 3.1, "depth_first").steps
    assert step.target_parameters == pytest.approx(3.1e9, rel=0.1)


def test_a_count_without_a_preset_is_one_with_other_layers() -> None:
    assert nearest_preset(3_000_000_000)[0] == "tritter_3b"
    name, other = nearest_preset(5_000_000_000)
    assert name != "tritter_3b" and "layers" in name
    assert other.num_parameters == pytest.approx(5e9, rel=0.02)
