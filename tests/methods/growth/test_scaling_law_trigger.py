"""The scaling-law trigger: known curves are recovered, and growth starts when it pays."""

import pytest
import torch

from tests import oracle
from tests.methods.growth.factories import grower, growth_options
from tritter.methods.growth.triggers import _Curve, _fit_curve


def drawn(curve: _Curve, *, first: int, last: int, noise: float, seed: int = 0) -> list[float]:
    generator = torch.Generator().manual_seed(seed)
    steps = range(first, last + 1)
    rest = torch.randn(len(steps), generator=generator, dtype=torch.float64) * noise
    return [curve.loss(step) + float(each) for step, each in zip(steps, rest, strict=True)]


@pytest.mark.parametrize("curve", [_Curve(3.2, 12.0, 0.6), _Curve(2.0, 6.0, 0.35)])
def test_a_curve_is_found_again(curve: _Curve) -> None:
    found = _fit_curve(drawn(curve, first=20, last=800, noise=0.05), first_step=20)
    assert found is not None
    for step in (100, 800, 1600):  # twice the observed range
        assert found.loss(step) == pytest.approx(curve.loss(step), abs=0.06)
    assert curve.step(curve.loss(321.0)) == pytest.approx(321.0)


def test_few_losses_tell_nothing() -> None:
    assert _fit_curve([3.0] * 39, first_step=1) is None


def simulated(curve: _Curve, at: int, *, max_steps: int, ratio: float) -> float:
    """Train step by step: small until `at`, then large, with the slopes of both curves."""
    larger = _Curve(curve.floor * ratio**-0.076, curve.scale, curve.exponent)
    loss, spent = curve.loss(at), float(at)
    while spent + ratio <= max_steps:
        step = larger.step(loss)
        loss, spent = larger.loss(step + 1), spent + ratio
    return loss


@pytest.mark.parametrize("ratio", [1.5, 3.0])
def test_the_best_step_is_that_of_a_simulation(ratio: float) -> None:
    curve, steps = _Curve(3.4, 14.0, 0.6), 4000
    at = curve.best_step(step=40, max_steps=steps, ratio=ratio)
    ends = {s: simulated(curve, s, max_steps=steps, ratio=ratio) for s in range(40, steps, 60)}
    best = min(ends, key=lambda step: ends[step])
    assert at is not None
    assert ends[best] < curve.loss(steps)  # growth pays
    assert simulated(curve, at, max_steps=steps, ratio=ratio) <= ends[best] + 2e-3


def test_where_it_does_not_pay_nothing_grows() -> None:
    curve = _Curve(0.5, 14.0, 0.3)  # far from its floor: steps are worth more than size
    assert curve.best_step(step=40, max_steps=400, ratio=3.0) is None


@pytest.mark.full
def test_an_engine_grows_once_there() -> None:
    curve, model = _Curve(3.0, 10.0, 0.8), oracle.tiny_llama()
    options = growth_options(
        trigger="scaling_law", check_every=10, growth_cooldown=10, warmup_steps=30,
        max_growth_per_step=40,
    )  # fmt: skip
    engine = grower(options, max_steps=2000)
    engine.begin(model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    found = []
    for step, loss in enumerate(drawn(curve, first=1, last=1900, noise=0.0), start=1):
        engine.pressure.observe(model, engine.blocks)
        engine.note_loss(loss)
        if decided := engine.decide(model, step):
            found.append(step)
            engine.events.append({"step": step})
            assert decided == {0: 40, 1: 40, 2: 40}
    added = 3 * 40 * 3 * 24
    size = sum(parameter.numel() for parameter in model.parameters())
    wanted = curve.best_step(step=30, max_steps=2000, ratio=(size + added) / size)
    assert wanted is not None and len(found) == 1 and abs(found[0] - wanted) <= 60
