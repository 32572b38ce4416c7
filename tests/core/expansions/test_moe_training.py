"""Experts in training: gradients of experts and router, and diverging copies."""

import dataclasses

import pytest
import torch

from tests import oracle
from tests.oracle import growth as oracle_growth
from tests.oracle.families import tiny
from tests.oracle.moe import (
    PARTNERS,
    balance_gradients,
    by_logical_name,
    expert_gap,
    steps_of,
    trained,
    upcycled,
)
from tritter.core.expansions import Moe
from tritter.core.parameter_map import Quantity, TensorMap

TOKENS = oracle.tokens()


def test_the_gradients_of_equal_experts_add_up_to_the_dense_one() -> None:
    """A balanced router gives each of E copies 1/E of the gradient, as the mapped state assumes."""
    model = tiny("llama").double()
    step = steps_of(model, Moe(noise=0.0, num_experts=4))[0]
    result = oracle_growth.grown(model, [step])
    with oracle.float64_casts():
        dense = by_logical_name(model, oracle.gradients(model, TOKENS))
        sparse = by_logical_name(result, oracle.gradients(result, TOKENS))
    for part in ("gate", "up", "down"):
        total = sum(sparse[f"layers.1.experts.{expert}.{part}"] for expert in range(4))
        torch.testing.assert_close(total, dense[f"layers.1.ffn.{part}"], rtol=1e-9, atol=1e-12)
        for expert in range(4):
            tensor_map = step.parameter_map.tensors[f"layers.1.experts.{expert}.{part}"]
            share = tensor_map.mapped(dense.__getitem__, quantity=Quantity.GRADIENT)
            torch.testing.assert_close(share, dense[f"layers.1.ffn.{part}"] / 4)
    names = [name for name in dense if "ffn." not in name]
    for name in names:
        torch.testing.assert_close(sparse[name], dense[name], rtol=1e-8, atol=1e-11)


def test_pieces_take_their_part_of_the_gradient() -> None:
    """Every token is routed to all pieces here, so the assumed shares are exact."""
    model = tiny("llama").double()
    spec = Moe(noise=0.0, num_experts=4, experts_per_token=4, granularity=2)
    step = steps_of(model, spec)[0]
    tensors = {
        name: TensorMap.created(m.shape, dataclasses.replace(m.fill, kind="zero"))
        if "router" in name
        else m
        for name, m in step.parameter_map.tensors.items()
    }
    step = dataclasses.replace(
        step, parameter_map=dataclasses.replace(step.parameter_map, tensors=tensors)
    )
    result = oracle_growth.grown(model, [step])
    with oracle.float64_casts():
        dense = by_logical_name(model, oracle.gradients(model, TOKENS))
        sparse = by_logical_name(result, oracle.gradients(result, TOKENS))
    for name, tensor_map in tensors.items():
        if ".experts." in name:
            share = tensor_map.mapped(dense.__getitem__, quantity=Quantity.GRADIENT)
            torch.testing.assert_close(sparse[name], share, rtol=1e-8, atol=1e-11)


def test_the_shared_expert_keeps_its_gradient_identity() -> None:
    model = tiny("qwen2").double()
    step = steps_of(model, Moe())[0]
    result = oracle_growth.grown(model, [step])
    with oracle.float64_casts():
        dense = by_logical_name(model, oracle.gradients(model, TOKENS))
        sparse = by_logical_name(result, oracle.gradients(result, TOKENS))
    compared = 0
    for name, tensor_map in step.parameter_map.tensors.items():
        if tensor_map.state == "carry":
            expected = tensor_map.mapped(dense.__getitem__, quantity=Quantity.GRADIENT)
            torch.testing.assert_close(sparse[name], expected, rtol=1e-8, atol=1e-11)
            compared += 1
    assert compared == len(dense)


def router_gradient(gradients: dict[str, torch.Tensor]) -> float:
    return max(
        float(g.abs().max()) for name, g in gradients.items() if name.endswith("mlp.gate.weight")
    )


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
def test_the_router_learns_through_noise_or_the_balance_loss(family: str) -> None:
    model = tiny(family)
    equal, noisy = upcycled(model, [Moe(noise=0.0)]), upcycled(model, [Moe()])
    from_text = oracle.gradients(equal, TOKENS)
    largest = max(float(gradient.abs().max()) for gradient in from_text.values())
    assert router_gradient(from_text) < 1e-5 * largest
    assert router_gradient(oracle.gradients(noisy, TOKENS)) > 1e-4 * largest
    assert router_gradient(balance_gradients(equal, TOKENS)) > 1e-3


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("family", PARTNERS)
def test_every_new_parameter_moves_within_three_steps(family: str) -> None:
    model = upcycled(tiny(family), [Moe(num_experts=4)])
    before = oracle_growth.logical_state(model)
    before = {name: value.clone() for name, value in before.items()}
    after = oracle_growth.logical_state(trained(model, steps=3, learning_rate=1e-3))
    still = [name for name in before if bool((before[name] == after[name]).all())]
    assert not still
    for name in before:
        if ".experts." in name or "router" in name or "shared" in name:
            share = float((before[name] != after[name]).double().mean())
            assert share > 0.9, name


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(
    ("family", "noise"), [*((family, 0.01) for family in PARTNERS), ("llama", 0.0)]
)
def test_clones_diverge(family: str, noise: float) -> None:
    """Their tokens differ, so even equal copies diverge; noise only starts the router."""
    model = tiny(family, initializer_range=0.1, num_hidden_layers=1)
    model = upcycled(model, [Moe(num_experts=4, noise=noise)])
    start = expert_gap(model)
    assert start == 0 if noise == 0 else start < 0.03
    trained(model, steps=100, learning_rate=1e-3, balance=0.01)
    assert expert_gap(model) > 0.08


@pytest.mark.full
def test_the_variance_is_split_as_the_policy_says() -> None:
    """Per-sequence gradients of experts: 1/(E·k) of the dense ones' squares, and not 1/E²."""
    model = tiny("llama", initializer_range=0.1, num_hidden_layers=2)
    step = steps_of(model, Moe(noise=0.0))[0]
    result = oracle_growth.grown(model, [step])
    found, expected = 0.0, 0.0
    for seed in range(30):
        sequence = oracle.tokens(seed=seed, batch=1, length=60)
        dense = by_logical_name(model, oracle.gradients(model, sequence))
        squares = {name: gradient.square() for name, gradient in dense.items()}
        sparse = by_logical_name(result, oracle.gradients(result, sequence))
        for name in (name for name in sparse if ".experts." in name):
            tensor_map = step.parameter_map.tensors[name]
            found += float(sparse[name].square().sum())
            expected += float(
                tensor_map.mapped(squares.__getitem__, quantity=Quantity.SQUARED_GRADIENT).sum()
            )
    assert 0.6 < found / expected < 1.5
