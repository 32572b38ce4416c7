"""Online EWC: a single task equals EWC, several decay, and the data that it needs."""

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from tests import oracle
from tests.training.test_fit import task
from tritter.data.tokens import TextBounds
from tritter.methods.forgetting import EWC, OnlineEWC
from tritter.methods.forgetting.ewc import OnlineEWCOptions, _saved_kind
from tritter.methods.forgetting.quadratic import diagonal_fisher
from tritter.training import Preparation, Task

TEXT = {"a": oracle.tokens(batch=6, seed=11), "b": oracle.tokens(batch=5, seed=12)}


def slow_fisher(model: nn.Module, rows: Tensor) -> dict[str, Tensor]:
    """Squares of the gradients, one sequence after the other."""
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for row in rows:
        for name, gradient in oracle.gradients(model, row[None]).items():
            total[name] += gradient**2 / len(rows)
    return total


def told(model: nn.Module, state: Mapping[str, Mapping[str, Tensor]], latest: str) -> Task:
    return replace(
        task(model), old_sequences=TEXT, latest=(latest,), state=state, state_before=state
    )


def prepared(method: EWC, model: nn.Module, state: Mapping[str, Mapping[str, Tensor]]) -> list[str]:
    """Prepare a method after training on `b`; return the domains that it draws from."""
    drawn: list[str] = []

    def draw(count: int, *words: str, domains: tuple[str, ...]) -> Tensor:
        drawn.extend(domains)
        return torch.cat([TEXT[name][:count] for name in domains])

    given = Preparation(
        model=model,
        domains=("a", "b"),
        latest=("b",),
        draw=draw,
        seed=lambda *words: 0,
        sequence_length=17,
        bounds=TextBounds(0),
        state=state,
        log=lambda line: None,
    )
    method.prepare(given)
    return drawn


def test_float16_keeps_what_earlier_tasks_left() -> None:
    """Squares of gradients are too small for it."""
    model = oracle.tiny_llama().half()
    left = {n: torch.full_like(p, 1e-9, dtype=torch.float32) for n, p in model.named_parameters()}
    method = OnlineEWC(gamma=0.5)
    method.begin_task(model, told(model, {"fisher": left, "online_fisher": left}, "b"))
    for value in method.importance.values():
        torch.testing.assert_close(value, torch.full_like(value, 1.5e-9), rtol=1e-5, atol=0)


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("options", [{}, {"normalise": "mean"}, {"at": "expanded"}], ids=str)
def test_one_task_is_ewc(options: dict[str, str]) -> None:
    models = [oracle.tiny_llama(), oracle.tiny_llama()]
    kinds = (EWC, OnlineEWC)
    methods = [kind(ewc_lambda=7.0, refresh_steps=1, **options) for kind in kinds]  # type: ignore[arg-type]
    for model, method in zip(models, methods, strict=True):
        fisher = diagonal_fisher(model, TEXT["a"])
        method.begin_task(model, told(model, {"fisher": fisher}, "a"))
        method.observe_step(model, 0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1)
                parameter.grad = torch.zeros_like(parameter)
        method.observe_step(model, 1)
        method.add_to_gradients(model)
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(one.grad, other.grad) and bool(one.grad.any())  # type: ignore[arg-type, union-attr]


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("normalise", ["none", "mean"])
def test_three_tasks_are_those_of_a_slow_loop(normalise: str) -> None:
    model = oracle.tiny_llama()
    expected = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    kept: Mapping[str, Tensor] = {}
    for seed in range(3):
        rows = oracle.tokens(batch=4, seed=seed)
        fisher = slow_fisher(model, rows)
        mean = torch.cat([value.flatten() for value in fisher.values()]).mean()
        scale = float(mean) if normalise == "mean" else 1.0
        expected = {name: 0.6 * expected[name] + fisher[name] / scale for name in expected}
        method = OnlineEWC(
            ewc_lambda=2.0, gamma=0.6, refresh_steps=None, at="carried", normalise=normalise
        )
        state = {"fisher": diagonal_fisher(model, rows)}
        if kept:
            state[_saved_kind("fisher", normalise)] = dict(kept)
        method.begin_task(model, told(model, state, "b"))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        ((_, kept),) = method.end_task(model).items()
        small = 1e-7 / scale
        for name, value in kept.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=small)
        distance = {n: (p.detach() - method.anchor[n]) ** 2 for n, p in model.named_parameters()}
        penalty = sum(float((expected[name] * distance[name]).sum()) for name in distance)
        assert method.logged_loss(model) == pytest.approx(penalty, rel=1e-3)


def test_only_text_of_the_latest_task_is_looked_at_once_something_was_kept() -> None:
    model = oracle.tiny_llama()
    kept = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    assert prepared(EWC(ewc_lambda=1.0), model, {}) == ["a", "b"]
    assert prepared(OnlineEWC(ewc_lambda=1.0), model, {}) == ["a", "b"]
    assert prepared(OnlineEWC(ewc_lambda=1.0), model, {"online_fisher": kept}) == ["b"]


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("at", ["carried", "expanded"])
def test_a_look_is_compared_with_the_latest_fisher_and_earlier_ones_stay_added(at: str) -> None:
    """The data of the first task is not available."""
    model = oracle.tiny_llama()
    latest = {n: torch.rand_like(p) * 1e-3 for n, p in model.named_parameters()}
    kept = {n: torch.rand_like(p) * 1e-3 for n, p in model.named_parameters()}
    given = told(model, {"fisher": latest, "online_fisher": kept}, "b")
    method = OnlineEWC(ewc_lambda=1.0, gamma=0.5, at=at, refresh_steps=1)
    method.begin_task(model, replace(given, old_sequences={"b": TEXT["b"]}))
    held = {name: value.clone() for name, value in method.importance.items()}
    assert method.observe_step(model, 1) > 0
    now = slow_fisher(model, TEXT["b"])
    for name, value in method.importance.items():
        first = latest[name] if at == "carried" else torch.zeros_like(latest[name])
        torch.testing.assert_close(held[name], 0.5 * kept[name] + first)
        expected = 0.5 * kept[name] + torch.maximum(first, now[name])
        torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-9)


def test_a_run_that_has_grown_loads_its_own_state() -> None:
    """Until then the kept Fisher has the shapes before the growth."""
    grown = oracle.tiny_llama(intermediate_size=64)
    kept = {n: torch.ones_like(p) for n, p in oracle.tiny_llama().named_parameters()}
    method = OnlineEWC(at="expanded", refresh_steps=1)
    given = told(grown, {"online_fisher": kept}, "b")
    method.begin_task(grown, replace(given, old_sequences={"b": TEXT["b"]}))
    state = {n: torch.ones_like(p) for n, p in grown.named_parameters()}
    method.load_state_dict({"anchor": state, "fisher": state, "earlier": state})
    assert method.observe_step(grown, 1) > 0
    assert all(value.shape == state[name].shape for name, value in method.importance.items())


def test_what_it_keeps_is_of_one_unit_and_one_rule() -> None:
    def kinds(**options: str) -> tuple[str, ...]:
        needs = OnlineEWC.needs(OnlineEWCOptions(**options))  # type: ignore[arg-type]
        assert needs.state == needs.leaves and needs.old_text
        return needs.leaves

    assert kinds() == ("online_fisher",)
    assert kinds(carry="penalty_preserving") == ("online_fisher_penalty",)
    assert kinds(normalise="mean") == ("online_fisher_mean",)
    both = {"carry": "penalty_preserving", "normalise": "mean"}
    assert kinds(**both) == ("online_fisher_penalty_mean",)
