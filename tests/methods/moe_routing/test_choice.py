"""The choice of the cloned expert, and distillation of new experts."""

import pytest
import torch

from tests import oracle
from tests.core.stock_routers.models import FAMILIES, shared_names, tiny_moe
from tests.methods.moe_routing.test_live import teach
from tests.methods.moe_routing.test_stages import DOMAIN, OLD, grown, moved, values
from tritter.core.expansions import MoeAdd
from tritter.core.expansions.specification import build_steps
from tritter.core.models import model_of
from tritter.core.stock_routers import AddedExperts, RouterControl
from tritter.errors import RequestError
from tritter.methods.moe_routing.distill import _soft_divergence
from tritter.methods.moe_routing.opening import _expert_utility, best_experts
from tritter.transform.live import ModelExpander

TEXT = torch.cat([batch["input_ids"] for batch in DOMAIN])


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize("family", FAMILIES)
def test_utility_is_the_sum_of_gradient_times_weight(family: str) -> None:
    model = tiny_moe(family)
    model(input_ids=TEXT, labels=TEXT).loss.backward()
    layers = sorted({int(name.split(".")[2]) for name in shared_names(model)})
    expected = torch.zeros(len(layers), 4)
    for row, layer in enumerate(layers):
        for part in ("gate_up_proj", "down_proj"):
            p = model.get_parameter(f"model.layers.{layer}.mlp.experts.{part}")
            for expert in range(4):
                expected[row, expert] += (p.grad[expert] * p[expert]).abs().sum().detach()
    utility = _expert_utility(model, TEXT, batch_size=len(TEXT))
    torch.testing.assert_close(utility, expected, rtol=1e-4, atol=1e-6)
    assert best_experts(model, TEXT, batch_size=len(TEXT)) == tuple(expected.argmax(1).tolist())


def test_an_expert_that_no_token_meets_is_of_no_use() -> None:
    model = tiny_moe("mixtral")
    routing = RouterControl.of(model)
    assert routing is not None
    routing.set_offset([1, 3], -torch.inf)
    utility = _expert_utility(model, TEXT)
    assert (utility[:, [1, 3]] == 0).all() and (utility[:, [0, 2]] > 0).all()
    assert set(best_experts(model, TEXT)) <= {0, 2}


def test_what_data_has_to_choose_is_refused_without_data() -> None:
    model = tiny_moe("mixtral")
    with pytest.raises(RequestError, match="domain data selects"):
        ModelExpander([MoeAdd(init="best")]).expand(model)
    chosen = MoeAdd(init="best", clone_from=(3, 0, 1), noise=0.0, num_experts=1)
    (step,) = build_steps(model_of(model), [chosen], seed=0)
    assert step.parameter_map.tensors["layers.1.experts.4.up"].source == "layers.1.experts.0.up"


def test_soft_divergence_by_hand() -> None:
    wanted, said = torch.tensor([[[0.0, 2.0]]]), torch.tensor([[[2.0, 0.0]]])
    p = torch.softmax(torch.tensor([0.0, 1.0]), dim=0)
    assert float(_soft_divergence(wanted, said, temperature=2.0)) == pytest.approx(
        4 * float((p * (p / p.flip(0)).log()).sum())
    )
    assert float(_soft_divergence(said, said, temperature=3.0)) == pytest.approx(0, abs=1e-7)


@pytest.mark.full
@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_new_experts_come_nearer_to_the_teacher_and_stay_closed(family: str) -> None:
    model, teacher = grown(family), oracle.tiny_llama()
    before, ids = values(model), OLD[0]["input_ids"]
    logits = oracle.logits(model, ids)
    gap = taught_gap(model, teacher)
    teach(model, teacher, [4, 5], epochs=12, learning_rate=1e-2)
    assert taught_gap(model, teacher) < 0.8 * gap
    assert torch.equal(oracle.logits(model, ids), logits)
    added = AddedExperts.of(model)
    assert added is not None and added.experts == (4, 5) and added.offset == -torch.inf
    assert moved(model, before) == set(shared_names(model))
    for name in shared_names(model):
        assert torch.equal(model.state_dict()[name][:4], before[name][:4])


def taught_gap(model: torch.nn.Module, teacher: torch.nn.Module) -> float:
    """Return the divergence when every token is routed to the new experts."""
    routing = RouterControl.of(model)
    assert routing is not None
    state = routing.state_dict()
    routing.set_offset([4, 5], 0.0)
    routing.set_offset(range(4), -torch.inf)
    with torch.no_grad():
        gap = _soft_divergence(
            teacher(input_ids=TEXT).logits, model(input_ids=TEXT).logits, temperature=2.0
        )
    routing.load_state_dict(state)
    return float(gap)


def test_too_few_new_experts_are_refused() -> None:
    one = ModelExpander([MoeAdd(num_experts=1)]).expand(tiny_moe("mixtral"))
    with pytest.raises(RequestError, match="at least 2"):
        teach(one, oracle.tiny_llama(), [4])
