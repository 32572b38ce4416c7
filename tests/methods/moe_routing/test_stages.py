"""The two stages on live models: trained parameters, routing, unchanged parameters."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from tests import oracle
from tests.core.stock_routers.models import FAMILIES, shared_names, tiny_moe
from tritter.core.expansions import MoeAdd
from tritter.core.models import model_of
from tritter.core.stock_routers import AddedExperts, RouterControl
from tritter.errors import RequestError, TritterError
from tritter.methods.moe_routing.live import adapt_router, train_new_experts
from tritter.methods.moe_routing.objective import new_expert_mass
from tritter.transform.live import ModelExpander

Batch = dict[str, Tensor]


def text(seed: int, *, batches: int = 6, low: int = 0) -> list[Batch]:
    """Return batches of a small language in which each token determines the next."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(0, 40, (batches * 4, 1), generator=generator)
    ids = low + (start + 7 * torch.arange(16)) % 40
    return [{"input_ids": part} for part in ids.split(4)]


DOMAIN, OLD = text(3, low=50), text(4)


def grown(family: str = "mixtral", **options: object) -> nn.Module:
    """Return a model with two appended, closed experts."""
    return ModelExpander([MoeAdd(num_experts=2, **options)]).expand(tiny_moe(family))  # type: ignore[arg-type]


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def moved(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {name for name, v in model.state_dict().items() if not torch.equal(v, before[name])}


def mass(model: nn.Module, batches: list[Batch]) -> float:
    routing = RouterControl.of(model)
    assert routing is not None
    with routing.recording(), torch.no_grad():
        model(input_ids=batches[0]["input_ids"])
        return float(
            torch.stack([new_expert_mass(r.logits, (4, 5)) for r in routing.recorded()]).mean()
        )


def task_loss(model: nn.Module, batches: list[Batch]) -> float:
    ids = torch.cat([batch["input_ids"] for batch in batches])
    with torch.no_grad():
        return float(model(input_ids=ids, labels=ids).loss)


@pytest.mark.full
@pytest.mark.parametrize("family", FAMILIES)
def test_routers_alone_are_trained_and_learn_to_use_the_new_experts(family: str) -> None:
    model = grown(family)
    before = values(model)
    assert mass(model, DOMAIN) == 0
    adapt_router(model, [4, 5], DOMAIN, epochs=6, encouragement=1.0, learning_rate=2e-2)
    assert moved(model, before) == {n for n in before if n.endswith("mlp.gate.weight")}
    assert AddedExperts.of(model) is None  # open: stock classes compute the same
    opened = grown(family)
    adapt_router(opened, [4, 5], DOMAIN, router_update="frozen")
    assert mass(model, DOMAIN) > mass(opened, DOMAIN) + 0.1
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.full
def test_encouragement_raises_the_new_experts_mass() -> None:
    masses = []
    for weight in (0.0, 1.0):
        model = grown()
        adapt_router(model, [4, 5], DOMAIN, epochs=6, encouragement=weight, learning_rate=2e-2)
        masses.append(mass(model, DOMAIN))
    assert masses[1] > masses[0] + 0.05


@pytest.mark.full
def test_encouragement_does_not_run_away() -> None:
    """Raw logits could be increased without limit; probabilities can't."""
    model = grown()
    adapt_router(model, [4, 5], DOMAIN, epochs=10, encouragement=10.0, learning_rate=0.2)
    assert 0.5 < mass(model, DOMAIN) <= 1
    assert torch.isfinite(oracle.logits(model, DOMAIN[0]["input_ids"])).all()


@pytest.mark.full
def test_replay_keeps_the_old_text_nearer() -> None:
    rises = []
    for replay in (None, OLD):
        model = grown(noise=0.5)
        before = task_loss(model, OLD)
        adapt_router(
            model, [4, 5], DOMAIN, epochs=8, replay=replay, encouragement=1.0, learning_rate=1e-2
        )
        rises.append(task_loss(model, OLD) - before)
    assert rises[1] < rises[0] - 0.05


def test_frozen_routers_are_only_opened() -> None:
    model = grown()
    before = values(model)
    adapt_router(model, [4, 5], DOMAIN, router_update="frozen")
    assert not moved(model, before) and AddedExperts.of(model) is None


@pytest.mark.full
def test_retrained_rows_start_anew() -> None:
    rows = {}
    for update in ("fine_tune", "retrain"):
        model = grown()
        gate = model.model.layers[0].mlp.gate.weight
        adapt_router(model, [4, 5], DOMAIN[:1], 1, router_update=update, learning_rate=1e-9)
        rows[update] = gate.detach()
    assert torch.allclose(rows["retrain"][:4], rows["fine_tune"][:4], atol=1e-6)
    assert torch.allclose(rows["fine_tune"][4], rows["fine_tune"][0], atol=0.05)  # and noise
    assert not torch.allclose(rows["retrain"][4], rows["fine_tune"][4], atol=0.1)


def failing() -> Iterator[Batch]:
    yield DOMAIN[0]
    raise ZeroDivisionError


def test_an_error_leaves_gradients_needed_as_before() -> None:
    model = grown()
    model.lm_head.weight.requires_grad_(False)
    for work in (adapt_router, train_new_experts):
        options = {"anneal_steps": 3} if work is adapt_router else {}
        with pytest.raises(ZeroDivisionError):
            work(model, [4, 5], failing(), **options)  # type: ignore[operator]
        needing = {name for name, p in model.named_parameters() if p.requires_grad}
        assert needing == {n for n, _ in model.named_parameters()} - {"lm_head.weight"}
        routing = RouterControl.of(model)
        assert routing is not None and not routing.is_recording
        assert set(shared_names(model)) <= {name for name, _ in model.named_parameters()}


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("family", FAMILIES)
def test_new_experts_learn_while_the_base_stays_bit_for_bit(family: str) -> None:
    model = grown(family)
    adapt_router(model, [4, 5], DOMAIN)
    before, loss = values(model), task_loss(model, DOMAIN)
    train_new_experts(model, [4, 5], DOMAIN, epochs=10, weight_decay=0.5, learning_rate=1e-2)
    assert moved(model, before) == set(shared_names(model))
    for name in shared_names(model):
        assert torch.equal(model.state_dict()[name][:4], before[name][:4])
    assert task_loss(model, DOMAIN) < loss - 0.3


@pytest.mark.full
def test_routers_and_all_else_take_part_when_asked_for() -> None:
    model = grown()
    adapt_router(model, [4, 5], DOMAIN)
    before = values(model)
    train_new_experts(model, [4, 5], DOMAIN, train_routers=True)
    routers = {n for n in before if n.endswith("mlp.gate.weight")}
    assert moved(model, before) == {*shared_names(model), *routers}
    train_new_experts(model, [4, 5], DOMAIN, freeze_base=False)
    assert moved(model, before) == set(before)


@pytest.mark.full
def test_the_base_is_unfrozen_on_schedule() -> None:
    model = grown()
    adapt_router(model, [4, 5], DOMAIN)
    before = values(model)
    train_new_experts(model, [4, 5], DOMAIN, unfreeze_after=6)  # there are six steps
    assert moved(model, before) == set(shared_names(model))
    train_new_experts(model, [4, 5], DOMAIN, unfreeze_after=5)
    assert moved(model, before) >= {"lm_head.weight", "model.norm.weight"}
    assert not torch.equal(
        model.state_dict()[shared_names(model)[0]][:4], before[shared_names(model)[0]][:4]
    )


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize(
    ("indices", "options", "message"),
    [
        ([3], {}, "the last of the 6"),
        ([], {}, "the last of the 6"),
        ([0, 1, 2, 3, 4, 5], {}, "not all of them"),
        ([4, 5], {"router_update": "thaw"}, "fine_tune, retrain, frozen"),
    ],
)
def test_wrong_requests(indices: list[int], options: dict[str, str], message: str) -> None:
    model = grown()
    before = values(model)
    with pytest.raises(RequestError, match=message):
        adapt_router(model, indices, DOMAIN, **options)  # type: ignore[arg-type]
    assert not moved(model, before)


def test_other_wrong_requests() -> None:
    with pytest.raises(RequestError, match="no experts"):
        adapt_router(oracle.tiny_llama(), [1], DOMAIN)
    with pytest.raises(RequestError, match="has no effect with freeze_base=False"):
        train_new_experts(grown(), [4, 5], DOMAIN, freeze_base=False, unfreeze_after=1)


def test_a_loss_that_is_not_finite_is_told() -> None:
    model = grown()
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(TritterError, match="not finite"):
        train_new_experts(model, [4, 5], DOMAIN)
    assert model_of(model).config["num_local_experts"] == 6
