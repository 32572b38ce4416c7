"""Triggers: firing rates, cooldowns, budgets, plateaus, schedules."""

from collections.abc import Callable
from math import prod
from typing import Any

import pytest
import torch
from scipy.stats import binom
from torch import Tensor, nn

from tests import oracle
from tests.methods.growth.factories import grower, growth_options, scheduled
from tritter.methods.growth.blocks import sample_rows
from tritter.methods.growth.grower import Grower
from tritter.methods.growth.triggers import GrowthOptions, Percentile, Timing, View, _rank

CHECKS = 1_500
HIDDEN_SIZE = 24  # of the oracle


def view(pressures: Tensor, history: Tensor, options: GrowthOptions | None = None) -> View:
    options = options or growth_options()
    return View(
        step=100,
        pressures=pressures.double(),
        neuron_pressures=[torch.rand(8) for _ in pressures],
        history=history.double().reshape(-1, len(pressures)),
        losses=[],
        neuron_parameters=[30] * len(pressures),
        neuron_flops=[0.0] * len(pressures),
        new_parameters=0,
        extra_flops=0.0,
        num_events=0,
        parameters=1000,
        options=options,
        timing=Timing.of(options, max_steps=None),
    )


def long_tailed(count: int, *, generator: torch.Generator) -> Tensor:
    return torch.randn(count, generator=generator).exp()


def rate_of(num_old: int, num_layers: int, percentile: float) -> float:
    """Return the probability that any layer grows at a check, for exchangeable pressures.

    No value of L new ones exceeds the k-th largest of n old ones if the k largest of all n + L are
    old: C(n, k) / C(n + L, k).
    """
    rank = _rank(num_old, percentile)
    return 1 - prod((num_old - i) / (num_old + num_layers - i) for i in range(rank))


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("num_layers", [1, 2, 6])
@pytest.mark.parametrize("percentile", [90.0, 75.0])
@pytest.mark.parametrize(
    "draw",
    [torch.rand, torch.randn, lambda n, generator: torch.randn(n, generator=generator).exp()],
)
def test_independent_pressures_fire_at_the_computed_rate(
    num_layers: int, percentile: float, draw: Callable[..., Tensor]
) -> None:
    """Without cooldown, the rate of firing is in its 99 % binomial interval."""
    generator = torch.Generator().manual_seed(num_layers)
    options = growth_options(gradient_percentile=percentile)
    history: list[Tensor] = [draw(num_layers, generator=generator) for _ in range(100)]
    fired = 0
    for _ in range(CHECKS):
        pressures = draw(num_layers, generator=generator)
        fired += bool(Percentile().decide(view(pressures, torch.stack(history[-100:]), options)))
        history.append(pressures)
    rate = rate_of(100 * num_layers, num_layers, percentile)
    low, high = binom.interval(0.99, CHECKS, rate)
    assert low <= fired <= high
    if num_layers == 1:
        assert rate == pytest.approx(1 - percentile / 100, abs=0.01)


@pytest.mark.full
def test_the_rate_is_that_of_ranks() -> None:
    """Compared with enumeration: of n + L values in random order, the k largest are all old."""
    generator, fired, checks = torch.Generator().manual_seed(0), 0, 20_000
    for _ in range(checks):
        order = torch.randperm(33, generator=generator)  # 30 old, 3 new
        fired += bool((order[30:] > order[:30].topk(3).values[-1]).any())
    assert fired / checks == pytest.approx(rate_of(30, 3, 90.0), abs=0.01)


def test_without_history_nothing_fires() -> None:
    assert Percentile().decide(view(torch.tensor([9.0, 9.0]), torch.rand(4, 2))) == {}
    assert rate_of(8, 2, 90.0) == 0.0
    assert Percentile().decide(view(torch.tensor([9.0, 0.0]), torch.rand(5, 2))) == {0: 10}


def stepped(engine: Grower, model: nn.Module, steps: int, *, seed: int = 0) -> list[int]:
    """Feed random gradients to a grower; return the steps after which it would grow."""
    generator, found = torch.Generator().manual_seed(seed), []
    engine.begin(model)
    for step in range(1, steps + 1):
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        engine.pressure.observe(model, engine.blocks)
        if decided := engine.decide(model, step):
            found.append(step)
            engine.events.append({"step": step})
            engine.new_parameters += sum(decided.values()) * 3 * HIDDEN_SIZE
    return found


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("cooldown", [7, 20, 50])
@pytest.mark.parametrize("trigger", ["percentile", "within_layer", "schedule"])
def test_no_more_events_than_the_cooldown_allows(cooldown: int, trigger: str) -> None:
    options = growth_options(
        trigger=trigger, growth_cooldown=cooldown, check_every=1, warmup_steps=0,
        gradient_percentile=60.0,
    )  # fmt: skip
    found = stepped(grower(options, max_steps=201), oracle.tiny_llama(), 200)
    assert found and len(found) <= 200 // cooldown
    gaps = [b - a for a, b in zip([0, *found], found, strict=False)]
    assert min(gaps) >= cooldown
    if trigger != "percentile":
        assert found == list(range(cooldown, 201, cooldown))


def test_warmup_and_checks() -> None:
    options = growth_options(trigger="schedule", growth_cooldown=1, check_every=10, warmup_steps=45)
    assert stepped(grower(options, max_steps=99), oracle.tiny_llama(), 90) == [50, 60, 70, 80, 90]
    options = growth_options(trigger=scheduled(3, 8, 60), growth_cooldown=1)
    assert stepped(grower(options, max_steps=99), oracle.tiny_llama(), 90) == [3, 8, 60]


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("trigger", ["schedule", "budget", "within_layer"])
def test_budgets_hold(trigger: str) -> None:
    model = oracle.tiny_llama()
    budget = 3 * HIDDEN_SIZE * 25 + 7
    options = growth_options(
        trigger=trigger, growth_cooldown=5, check_every=5, warmup_steps=0,
        max_new_parameters=budget,
    )  # fmt: skip
    engine = grower(options, max_steps=101)
    found = stepped(engine, model, 100)
    spent = engine.new_parameters
    assert spent == 3 * HIDDEN_SIZE * 25 <= budget
    if trigger == "budget":  # evenly, not all at once
        assert len(found) > 10 and max(found) > 80


def test_flops_are_a_budget_too() -> None:
    model = oracle.tiny_llama()
    each = 3 * HIDDEN_SIZE * 6 * 64  # per neuron and step
    flops = float(7 * each * 50)
    options = growth_options(trigger=scheduled(50), growth_cooldown=1, max_extra_flops=flops)
    engine = grower(options, max_steps=100)
    engine.begin(model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    engine.pressure.observe(model, engine.blocks)
    assert sum(engine.decide(model, 50).values()) == 7


def losses(kind: str, count: int) -> list[float]:
    return [3.0 if kind == "flat" else 3.0 - 0.01 * n for n in range(count)]


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize(("kind", "grows"), [("flat", True), ("falling", False)])
@pytest.mark.parametrize("changes", [{"trigger": "plateau"}, {"trigger": "schedule"}])
def test_a_plateau_is_waited_for(kind: str, grows: bool, changes: dict[str, Any]) -> None:
    options = growth_options(
        **changes, plateau_threshold=0.01, plateau_steps=20, growth_cooldown=1, check_every=1,
        warmup_steps=0,
    )  # fmt: skip
    engine, model = grower(options, max_steps=60), oracle.tiny_llama()
    engine.begin(model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    engine.pressure.observe(model, engine.blocks)
    for step, loss in enumerate(losses(kind, 40), start=1):
        engine.note_loss(loss)
        assert bool(engine.decide(model, step)) == (grows and step >= 20)


def test_a_step_that_is_not_finite_leaves_no_trace() -> None:
    model, engine = oracle.tiny_llama(), grower(growth_options())
    engine.begin(model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    engine.pressure.observe(model, engine.blocks)
    before = {layer: each.clone() for layer, each in engine.pressure.neurons.items()}
    model.get_parameter(engine.blocks[0].up).grad[0, 0] = float("inf")  # type: ignore[index]
    engine.pressure.observe(model, engine.blocks)
    assert all(torch.equal(before[layer], engine.pressure.neurons[layer]) for layer in before)


def test_the_average_is_the_readmes() -> None:
    model, engine = oracle.tiny_llama(), grower(growth_options())
    engine.begin(model)
    expected, block = torch.zeros(place_width(engine, model)), engine.blocks[1]
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        rows = [model.get_parameter(n).grad for n in (block.gate, block.up)]
        norms = torch.cat([r for r in rows if r is not None], dim=1).norm(dim=1)
        expected = 0.9 * expected + 0.1 * norms
        engine.pressure.observe(model, engine.blocks)
    assert torch.allclose(engine.pressure.neurons[1], expected, rtol=1e-5)


def place_width(engine: Grower, model: nn.Module) -> int:
    return engine.blocks[1].width(model)


@pytest.mark.parametrize(
    ("max_steps", "expected"),
    [(None, (100, 200, 500)), (2_000, (100, 200, 500)), (250, (13, 25, 63))],
)
def test_schedules_fit_short_trainings(max_steps: int | None, expected: tuple[int, ...]) -> None:
    timing = Timing.of(growth_options(), max_steps=max_steps)
    assert (timing.check_every, timing.cooldown, timing.maturation_age) == expected
    options = growth_options(check_every=7, growth_cooldown=9, maturation_age=11)
    typed = Timing.of(options, max_steps=max_steps)
    assert (typed.check_every, typed.cooldown, typed.maturation_age) == (7, 9, 11)


def test_after_the_last_step_nothing_is_born() -> None:
    options = growth_options(trigger="schedule", growth_cooldown=1, check_every=10, warmup_steps=0)
    assert stepped(grower(options, max_steps=30), oracle.tiny_llama(), 30) == [10, 20]


@pytest.mark.parametrize(("keywords", "message"), [
    ({"check_every": 300}, "nothing could grow"),
    ({"growth_cooldown": 250}, "nothing could grow"),
    ({"history_checks": 1}, "layers: 3), too few for growth.gradient_percentile"),
    ({"gradient_percentile": 99.9}, "too few for growth.gradient_percentile"),
    ({}, ""),
    ({"trigger": scheduled(5)}, ""),
    ({"trigger": "plateau", "plateau_steps": 100}, ""),
])  # fmt: skip
def test_what_can_never_grow_is_told(keywords: dict[str, Any], message: str) -> None:
    options = growth_options(**keywords)
    why = options.inactivity_reason(max_steps=250, num_layers=3)
    assert message in why and bool(why) == bool(message)


def test_layers_grow_once_they_are_trained() -> None:
    """With freeze.until, all are frozen at first."""
    options = growth_options(trigger="schedule", growth_cooldown=1, check_every=1, warmup_steps=0)
    model, engine = oracle.tiny_llama(), grower(options, max_steps=None)
    engine.begin(model)
    engine.pressure.neurons = {n: torch.ones(40) for n in range(3)}
    model.requires_grad_(False)
    assert [engine.decide(model, step) for step in (1, 2)] == [{}, {}]
    model.requires_grad_(True)
    assert set(engine.decide(model, 3)) == {0, 1, 2}


@pytest.mark.full
def test_a_layer_that_is_frozen_is_no_pressure() -> None:
    model = oracle.tiny_llama()
    engine = grower(
        growth_options(gradient_percentile=75.0, check_every=1, growth_cooldown=1), max_steps=None
    )
    engine.begin(model)
    for block in engine.blocks[:2]:
        model.get_parameter(block.gate).requires_grad_(False)
    generator, fired = torch.Generator().manual_seed(0), 0
    for step in range(1, 601):
        engine.pressure.neurons = {
            n: torch.rand(40, generator=generator) * torch.rand(1, generator=generator)
            for n in range(3)
        }
        engine.pressure._whole = torch.ones(())
        decided = engine.decide(model, step + 100)
        fired += bool(decided)
        assert set(decided) <= {2}
    low, high = binom.interval(0.99, 600, 0.25)
    assert low <= fired <= high


@pytest.mark.parametrize(("sequences", "length"), [(64, 128), (1024, 16), (16, 128)])
def test_tokens_are_of_all_places_of_a_sequence(sequences: int, length: int) -> None:
    blocks = torch.arange(length).repeat(sequences)[:, None].float()
    seen = sample_rows(blocks, 256)[:, 0]
    assert len(seen) == 256 and torch.equal(seen, sample_rows(blocks, 256)[:, 0])
    assert float(seen.mean()) == pytest.approx((length - 1) / 2, rel=0.15)
    assert len(seen.unique()) > min(length, 100) * 0.8
