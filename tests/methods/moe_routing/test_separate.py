"""Experts split and joined: same function and names, frozen bits, none in the optimizer."""

import pickle

import pytest
import torch
from torch import nn

from tests import oracle
from tests.core.stock_routers.models import FAMILIES, num_experts, shared_names, tiny_moe
from tritter.methods.forgetting.quadratic import diagonal_fisher
from tritter.methods.moe_routing.separate import SeparateExperts, only_trainable
from tritter.training import OptimizerSettings

TOKENS = oracle.tokens()


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_apart_it_computes_the_same_and_joined_it_is_the_same(family: str) -> None:
    model = tiny_moe(family)
    before, logits = values(model), oracle.logits(model, TOKENS)
    with SeparateExperts(model, 3):
        assert torch.equal(oracle.logits(model, TOKENS), logits)
        names = dict(model.named_parameters())
        assert not any(name in names for name in shared_names(before_of(family)))
    after = model.state_dict()
    assert {name: v.shape for name, v in after.items()} == {n: v.shape for n, v in before.items()}
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def before_of(family: str) -> nn.Module:
    return tiny_moe(family)


def test_an_error_inside_leaves_a_stock_model() -> None:
    model = tiny_moe("mixtral")
    before = values(model)
    with pytest.raises(ZeroDivisionError), SeparateExperts(model, 2):
        raise ZeroDivisionError
    assert list(model.state_dict()) != [] and set(model.state_dict()) == set(before)
    assert torch.isfinite(oracle.logits(model, TOKENS)).all()


def test_a_forward_pass_that_fails_leaves_no_whole_behind() -> None:
    model = tiny_moe("mixtral")
    with SeparateExperts(model, 2):
        experts = model.model.layers[0].mlp.experts
        with pytest.raises(TypeError):
            experts(None, None, None)
        assert "gate_up_proj" not in vars(experts)


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize("family", FAMILIES)
def test_frozen_experts_stay_bit_for_bit_and_out_of_the_optimizer(family: str) -> None:
    """Control: with masked gradients instead, weight decay moves them."""
    model = tiny_moe(family)
    first_new = num_experts(model) - 1
    before = values(model)
    with SeparateExperts(model, first_new) as parts:
        optimizer = OptimizerSettings(weight_decay=0.5).build(
            model.named_parameters(), learning_rate=1e-2
        )
        for _ in range(3):
            model(input_ids=TOKENS, labels=TOKENS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        base = [p for n, p in model.named_parameters() if n.endswith("_base")]
        assert base and not held & set(map(id, base))
        assert not any(parameter in optimizer.state for parameter in base)
        assert parts.first_new == first_new
    after = model.state_dict()
    for name in shared_names(model):
        assert torch.equal(after[name][:first_new], before[name][:first_new])
        assert not torch.equal(after[name][first_new:], before[name][first_new:])


def test_biases_do_not_decay_whatever_their_shape() -> None:
    named = [("experts.down_proj_bias", [4, 8]), ("experts.down_proj", [4, 8, 8]), ("norm", [8])]
    parameters = [(name, nn.Parameter(torch.ones(shape))) for name, shape in named]
    optimizer = OptimizerSettings().build(parameters, learning_rate=1e-2)
    matrices, vectors = (group["params"] for group in optimizer.param_groups)
    assert list(map(id, matrices)) == [id(parameters[1][1])]
    assert list(map(id, vectors)) == [id(parameters[0][1]), id(parameters[2][1])]
    assert optimizer.param_groups[1]["weight_decay"] == 0


def test_masked_gradients_would_not_freeze() -> None:
    model = tiny_moe("mixtral")
    before = values(model)
    optimizer = OptimizerSettings(weight_decay=0.5).build(
        model.named_parameters(), learning_rate=1e-2
    )
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    for name in shared_names(model):
        model.get_parameter(name).grad[:3] = 0
    optimizer.step()
    name = shared_names(model)[0]
    assert not torch.equal(model.state_dict()[name][:3], before[name][:3])


def test_gradients_are_those_of_the_whole() -> None:
    model = tiny_moe("qwen3_moe")
    whole = oracle.gradients(model, TOKENS)
    model.zero_grad()
    with SeparateExperts(model, 3):
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        for name in shared_names(tiny_moe("qwen3_moe")):
            torch.testing.assert_close(model.get_parameter(f"{name}_new").grad, whole[name][3:])
            assert model.get_parameter(f"{name}_base").grad is None


def test_the_fisher_is_that_of_the_whole() -> None:
    model, sequences = tiny_moe("mixtral"), oracle.tokens(batch=4)
    whole = diagonal_fisher(model, sequences)
    with SeparateExperts(model, 2) as separated:
        document_mask = diagonal_fisher(model, sequences)
    expected = separated.follow(whole)
    assert document_mask.keys() == expected.keys() != whole.keys()
    for name, value in expected.items():
        torch.testing.assert_close(document_mask[name], value, rtol=1e-4, atol=1e-10)


def test_values_by_name_follow() -> None:
    model = tiny_moe("mixtral")
    name = shared_names(model)[0]
    mask = torch.zeros_like(model.get_parameter(name), dtype=torch.bool)
    mask[:2] = True
    with SeparateExperts(model, 2) as parts:
        followed = parts.follow({name: mask, "other": torch.ones(1)})
        assert set(followed) == {f"{name}_base", f"{name}_new", "other"}
        assert followed[f"{name}_base"].all() and not followed[f"{name}_new"].any()
        assert {n for n, _ in model.named_parameters()} >= {f"{name}_base", f"{name}_new"}


def test_what_needed_a_gradient_needs_it_again() -> None:
    model = tiny_moe("mixtral")
    model.lm_head.weight.requires_grad_(False)
    with (
        pytest.raises(ZeroDivisionError),
        only_trainable(model, lambda t: t.kind == "head"),
    ):
        assert [n for n, p in model.named_parameters() if p.requires_grad] == ["lm_head.weight"]
        raise ZeroDivisionError
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["lm_head.weight"]


def test_apart_it_can_be_sent_to_a_process() -> None:
    model = tiny_moe("mixtral")
    with SeparateExperts(model, 2):
        sent = pickle.loads(pickle.dumps(model))
        assert torch.equal(oracle.logits(sent, TOKENS), oracle.logits(model, TOKENS))
