"""Control of routers: stock outputs bit for bit, then the effect of offset and bias."""

import copy
import math
import pickle

import pytest
import torch
from torch import Tensor, nn

from tests import oracle
from tests.core.stock_routers.models import FAMILIES, tiny_moe
from tritter.core.families import Model
from tritter.core.stock_routers import RouterControl
from tritter.errors import RequestError
from tritter.methods.moe_routing.objective import _bias_update, _expert_counts


def _routed(model: nn.Module) -> RouterControl:
    routing = RouterControl.of(model)
    assert routing is not None
    return routing


def _outputs(model: nn.Module) -> tuple[Tensor, tuple[Tensor, ...]]:
    with torch.no_grad():
        output = model(input_ids=oracle.tokens(), output_router_logits=True)
    return output.logits, output.router_logits


@pytest.mark.quick_cases(3)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_without_offset_and_bias_it_is_the_stock_router(family: str, dtype: torch.dtype) -> None:
    model = tiny_moe(family).to(dtype)
    logits, router_logits = _outputs(model)
    routing = _routed(model)
    attached, attached_router_logits = _outputs(model)
    assert torch.equal(attached, logits)
    assert len(router_logits) == len(routing.layers)
    for stock, ours in zip(router_logits, attached_router_logits, strict=True):
        assert ours.dtype == stock.dtype and torch.equal(ours, stock)


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("is_renormalised", [False, True])
def test_gradients_are_the_stock_routers(family: str, is_renormalised: bool) -> None:
    changes = {} if family == "mixtral" else {"norm_topk_prob": is_renormalised}
    stock, ours = tiny_moe(family, **changes), tiny_moe(family, **changes)
    _routed(ours)
    expected = oracle.gradients(stock, oracle.tokens())
    for name, gradient in oracle.gradients(ours, oracle.tokens()).items():
        assert torch.equal(gradient, expected[name]), name


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_and_sizes(family: str) -> None:
    routing = _routed(tiny_moe(family))
    assert routing.layers == ((1, 2) if family == "qwen3_moe" else (0, 1, 2))
    assert (routing.num_experts, routing.top_k) == (4, 2)


def test_a_dense_model_has_no_routing() -> None:
    assert RouterControl.of(oracle.tiny_llama()) is None


def test_attaching_again_keeps_what_was_set_and_the_state_dict_is_the_stock_one() -> None:
    model = tiny_moe("mixtral")
    names = set(model.state_dict())
    _routed(model).set_offset([1], -3.0)
    again = _routed(nn.ModuleDict({"inside": model}))
    assert again.offset(2).tolist() == [0.0, -3.0, 0.0, 0.0]
    assert set(model.state_dict()) == names
    assert len(dict(Model(model.config.to_dict()).disk_tensors(model.state_dict()))) > 0


def test_detaching_gives_the_stock_forward_back() -> None:
    model = tiny_moe("qwen2_moe")
    before = oracle.logits(model, oracle.tokens())
    routing = _routed(model)
    routing.set_offset([0, 1], -math.inf)
    assert not torch.equal(oracle.logits(model, oracle.tokens()), before)
    routing.detach()
    routing.detach()
    assert torch.equal(oracle.logits(model, oracle.tokens()), before)
    assert "forward" not in vars(model.model.layers[0].mlp.gate)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_offset_shifts_logits_in_the_log_domain(family: str) -> None:
    """Against a hand calculation: an offset multiplies probabilities by its exponential."""
    model = tiny_moe(family)
    routing = _routed(model)
    with routing.recording():
        oracle.logits(model, oracle.tokens())
        plain = routing.recorded()[0].probabilities
        routing.set_offset([3], math.log(0.25))
        oracle.logits(model, oracle.tokens())
        shifted = routing.recorded()[0].probabilities
    expected = plain * torch.tensor([1, 1, 1, 0.25])
    torch.testing.assert_close(shifted, expected / expected.sum(-1, keepdim=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_closed_expert_gets_no_token_and_no_gradient(family: str) -> None:
    model = tiny_moe(family)
    routing = _routed(model)
    routing.set_offset([0, 2], -math.inf)
    with routing.recording():
        gradients = oracle.gradients(model, oracle.tokens())
        records = routing.recorded()
    assert all(set(record.selected.flatten().tolist()) == {1, 3} for record in records)
    for layer in routing.layers:
        stem = f"model.layers.{layer}.mlp."
        for name in (stem + "gate.weight", stem + "experts.down_proj"):
            assert gradients[name][[0, 2]].abs().max() == 0
            assert gradients[name].isfinite().all()


def test_a_bias_moves_the_selection_and_leaves_the_weights() -> None:
    model = tiny_moe("qwen2_moe")
    routing = _routed(model)
    for layer in routing.layers:
        routing.set_selection_bias(layer, torch.tensor([0.0, 2.0, 2.0, 0.0]))
    gate = model.model.layers[0].mlp.gate
    hidden = torch.randn(7, 24)
    logits, weights, selected = gate(hidden)
    assert set(selected.flatten().tolist()) == {1, 2}
    probabilities = torch.nn.functional.linear(hidden, gate.weight).softmax(-1)
    torch.testing.assert_close(weights, probabilities.gather(-1, selected))
    torch.testing.assert_close(logits.softmax(-1), probabilities)


def test_a_bias_never_opens_a_closed_expert() -> None:
    model = tiny_moe("mixtral")
    routing = _routed(model)
    routing.set_offset([2], -math.inf)
    routing.set_selection_bias(0, torch.tensor([0.0, 0.0, 5.0, 0.0]))
    _, weights, selected = model.model.layers[0].mlp.gate(torch.randn(50, 24))
    assert 2 not in selected
    torch.testing.assert_close(weights.sum(-1), torch.ones(50))


def test_the_sign_rule_evens_the_load() -> None:
    """Aux-loss-free balancing on a router that prefers one expert."""
    model = tiny_moe("mixtral")
    routing = _routed(model)
    hidden = torch.randn(400, 24) + 1
    gate = model.model.layers[0].mlp.gate
    with torch.no_grad():
        gate.weight[0] += 0.1

    def counts() -> Tensor:
        with torch.no_grad():
            return _expert_counts(gate(hidden)[2], 4)

    before = counts()
    for _ in range(300):
        bias = _bias_update(routing.selection_bias(0), counts(), rate=0.01)
        routing.set_selection_bias(0, bias)
    assert before.max() / before.float().mean() > 1.5
    assert counts().max() / counts().float().mean() < 1.15


def test_records_hold_the_last_forward_pass_with_its_graph() -> None:
    model = tiny_moe("qwen3_moe")
    routing = _routed(model)
    model(input_ids=oracle.tokens())
    assert routing.recorded() == () and not routing.is_recording
    with routing.recording():
        model(input_ids=oracle.tokens())
        records = routing.recorded()
        assert [record.layer for record in records] == [1, 2]
        first = records[0]
        assert first.logits.shape == first.probabilities.shape == (3 * 17, 4)
        assert first.selected.shape == (3 * 17, 2) and first.selected.dtype == torch.int64
        first.logits.square().mean().backward()
    weight = model.model.layers[1].mlp.gate.weight
    assert weight.grad is not None and weight.grad.abs().sum() > 0
    assert routing.recorded() == () and not routing.is_recording


def test_own_logits_are_those_without_the_offset() -> None:
    model = tiny_moe("mixtral")
    routing = _routed(model)
    routing.set_offset([3], -7.0)
    with routing.recording():
        oracle.logits(model, oracle.tokens())
        record = routing.recorded()[0]
    torch.testing.assert_close(record.logits - record.own_logits, routing.offset(0).expand(51, 4))


def test_a_copy_of_the_model_has_its_own_control() -> None:
    model = tiny_moe("mixtral")
    routing = _routed(model)
    routing.set_offset([0], -math.inf)
    with routing.recording():
        model(input_ids=oracle.tokens())
        twin = copy.deepcopy(model)
    copied = _routed(twin)
    assert copied.offset(0)[0] == -math.inf and copied.recorded() == ()
    copied.set_offset([0], 0.0)
    assert routing.offset(0)[0] == -math.inf
    assert torch.equal(oracle.logits(twin, oracle.tokens()), _stock_logits())


def _stock_logits() -> Tensor:
    return oracle.logits(tiny_moe("mixtral"), oracle.tokens())


def test_state_goes_to_another_model_and_not_to_one_of_other_shape() -> None:
    routing = _routed(tiny_moe("mixtral"))
    routing.set_offset([3], -math.inf)
    routing.set_selection_bias(1, torch.tensor([0.1, 0.2, 0.3, 0.4]))
    other = _routed(tiny_moe("mixtral"))
    other.load_state_dict(routing.state_dict())
    assert other.offset(2).tolist() == [0, 0, 0, -math.inf]
    assert torch.equal(other.selection_bias(1), routing.selection_bias(1))
    for wrong in (tiny_moe("mixtral", num_local_experts=5), tiny_moe("qwen3_moe")):
        with pytest.raises(RequestError, match="routing state"):
            _routed(wrong).load_state_dict(routing.state_dict())


@pytest.mark.parametrize(
    ("experts", "value", "word"),
    [
        ([4], -1.0, "must be from 0 to 3"),
        ([-1], -1.0, "must be from 0 to 3"),
        ([0], math.nan, "must be a finite number"),
        ([0], math.inf, "must be a finite number"),
        ([0, 1, 2], -math.inf, "1 experts of layer 0 would remain enabled; each token needs 2"),
    ],
)
def test_offsets_that_cannot_be(experts: list[int], value: float, word: str) -> None:
    routing = _routed(tiny_moe("mixtral"))
    with pytest.raises(RequestError, match=word):
        routing.set_offset(experts, value)
    assert all(routing.offset(layer).abs().sum() == 0 for layer in routing.layers)


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_process_that_is_spawned_gets_the_same_model(family: str) -> None:
    model = tiny_moe(family)
    _routed(model).set_offset([1], -2.0)
    sent = pickle.loads(pickle.dumps(model))
    assert torch.equal(_outputs(sent)[0], _outputs(model)[0])
    _routed(sent).set_offset([1], -math.inf)
    assert not torch.equal(_outputs(sent)[0], _outputs(model)[0])
