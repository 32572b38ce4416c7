"""Routing losses: by hand, compared with transformers, finite differences in float64."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from tritter.methods.moe_routing.objective import (
    _expert_counts,
    _router_z_loss,
    _routing_divergence,
    load_balancing_loss,
    new_expert_mass,
)

TOKENS, EXPERTS, TOP_K = 11, 5, 2


def _logits(*, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(TOKENS, EXPERTS, generator=generator, dtype=dtype)


def _selected(logits: Tensor) -> Tensor:
    return logits.topk(TOP_K, dim=-1).indices


@pytest.mark.parametrize("layers", [1, 3])
def test_balance_is_what_transformers_computes(layers: int) -> None:
    per_layer = [_logits(dtype=torch.float32, seed=seed) for seed in range(layers)]
    expected = load_balancing_loss_func(tuple(per_layer), EXPERTS, TOP_K)
    logits = torch.cat(per_layer)
    torch.testing.assert_close(load_balancing_loss(logits, _selected(logits)), expected)


def test_balance_is_k_when_even_and_e_when_all_go_to_the_same() -> None:
    even = torch.eye(4).repeat(3, 1) * 1e-9
    assert load_balancing_loss(even, torch.arange(12)[:, None] % 4) == pytest.approx(1)
    one = torch.tensor([[60.0, 0, 0, 0]]).repeat(8, 1)
    assert load_balancing_loss(one, torch.zeros(8, 1, dtype=torch.int64)) == pytest.approx(4)


def test_a_softmax_of_a_softmax_would_not_see_the_imbalance() -> None:
    """A common mistake gives another value."""
    one = torch.tensor([[60.0, 0, 0, 0]]).repeat(8, 1)
    selected = torch.zeros(8, 1, dtype=torch.int64)
    assert load_balancing_loss(one.softmax(-1), selected) < 2 < load_balancing_loss(one, selected)


def test_z_loss_by_hand() -> None:
    logits = torch.tensor([[0.0, 0.0], [math.log(3), 0.0]])
    expected = (math.log(2) ** 2 + math.log(4) ** 2) / 2
    assert _router_z_loss(logits) == pytest.approx(expected)


def test_divergence_by_hand_and_zero_where_nothing_moved() -> None:
    old = torch.tensor([[0.5, 0.5]], dtype=torch.float64)
    new = torch.tensor([[0.25, 0.5, 0.25]], dtype=torch.float64).log()
    assert _routing_divergence(old, new) == pytest.approx(0.5 * math.log(2))
    logits = _logits()
    assert abs(float(_routing_divergence(logits.softmax(-1), logits))) < 1e-12


def test_closed_experts_leave_losses_finite() -> None:
    """New experts with an offset of −∞ do not affect any loss, and gradients have no NaN."""
    closed = torch.tensor([0.0, 0, 0, -math.inf, -math.inf], dtype=torch.float64)
    own = _logits().requires_grad_()
    logits = own + closed
    old = _logits(seed=1)[:, :3].softmax(-1)
    total = (
        _routing_divergence(old, logits)
        + _routing_divergence(logits.detach().softmax(-1), logits)
        + _router_z_loss(logits)
        + load_balancing_loss(logits, _selected(logits))
    )
    total.backward()
    assert total.isfinite() and own.grad is not None and own.grad.isfinite().all()
    assert own.grad[:, 3:].abs().max() == 0
    assert new_expert_mass(logits, [3, 4]) == 0


def test_mass_is_bounded_and_counts_the_named_experts() -> None:
    assert new_expert_mass(torch.zeros(3, 8), [6, 7]) == pytest.approx(0.25)
    assert new_expert_mass(torch.tensor([[0.0, 300.0]]), [1]) == 1


@pytest.mark.parametrize(
    "loss",
    [
        lambda logits: load_balancing_loss(logits, _selected(_logits())),
        _router_z_loss,
        lambda logits: _routing_divergence(_logits(seed=1)[:, :3].softmax(-1), logits),
        lambda logits: _routing_divergence(
            torch.tensor([[1.0, 0, 0]], dtype=torch.float64).expand(TOKENS, 3), logits
        ),
        lambda logits: new_expert_mass(logits, [1, 4]),
    ],
    ids=["balance", "z", "divergence", "divergence_with_zeros", "mass"],
)
def test_gradients_by_finite_differences(loss: Callable[[Tensor], Tensor]) -> None:
    logits = _logits().requires_grad_()
    assert torch.autograd.gradcheck(loss, (logits,), eps=1e-6, atol=1e-8)


def test_bfloat16_logits_are_computed_in_float32() -> None:
    logits = _logits(dtype=torch.bfloat16)
    for value in (
        load_balancing_loss(logits, _selected(logits)),
        _router_z_loss(logits),
        _routing_divergence(logits.softmax(-1), logits),
        new_expert_mass(logits, [0]),
    ):
        assert value.dtype == torch.float32


def test_the_mean_over_processes_is_the_balance_of_the_whole_batch() -> None:
    logits = _logits()[:10]
    selected = _selected(logits)
    whole, counts = load_balancing_loss(logits, selected), _expert_counts(selected, EXPERTS)
    halves = list(zip(logits.chunk(2), selected.chunk(2), strict=True))
    own = sum(load_balancing_loss(*half) for half in halves) / 2
    shared = sum(load_balancing_loss(*half, counts=counts) for half in halves) / 2
    torch.testing.assert_close(shared, whole)
    assert abs(own - whole) > 1e-3
