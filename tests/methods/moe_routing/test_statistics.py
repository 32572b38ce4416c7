"""Load, entropy, dropped tokens: by hand, and their limits over random routings."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tritter.core.stock_routers import Record
from tritter.methods.moe_routing.objective import (
    _bias_update,
    _dropped_fraction,
    _expert_counts,
    _layer_statistics,
)


def _record(logits: torch.Tensor, top_k: int) -> Record:
    probabilities = logits.softmax(-1)
    return Record(0, logits, logits, probabilities, logits.topk(top_k, dim=-1).indices)


def statistics(record: Record) -> dict[str, float]:
    counts = _expert_counts(record.selected, record.logits.shape[-1])
    return _layer_statistics(record, counts=counts, capacity_factor=1.0)


def test_by_hand() -> None:
    logits = torch.tensor([[4.0, 0, 0, 0], [4.0, 0, 0, 0], [0, 4.0, 0, 0], [0, 0, 4.0, 0]])
    found = statistics(_record(logits, 1))
    assert found["max_load"] == 2
    assert found["dropped_fraction"] == 0.25  # capacity 1 each: the second token of expert 0
    p = math.exp(4) / (math.exp(4) + 3)
    q = (1 - p) / 3
    assert found["entropy"] == pytest.approx(-p * math.log(p) - 3 * q * math.log(q))


def test_no_float64_which_apples_gpus_lack(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "double", None)
    assert statistics(_record(torch.tensor([[4.0, 0, 0, 0]]), 1))["max_load"] == 4


def test_capacity_counts_in_whole_tokens() -> None:
    counts = torch.tensor([4, 2, 0])  # even is 2; a factor of 1.25 permits 3 per expert
    assert _dropped_fraction(counts, capacity_factor=1.25) == pytest.approx(1 / 6)
    assert _dropped_fraction(counts, capacity_factor=2.0) == 0


def test_a_closed_expert_does_not_spoil_the_entropy() -> None:
    logits = torch.tensor([[0.0, 0.0, -math.inf]])
    found = statistics(_record(logits, 1))
    assert found["entropy"] == pytest.approx(math.log(2))


def test_the_sign_rule() -> None:
    bias = torch.tensor([0.0, 0.1, 0.0])
    load = torch.tensor([6, 3, 0])
    torch.testing.assert_close(
        _bias_update(bias, load, rate=0.01), torch.tensor([-0.01, 0.1, 0.01])
    )


@given(
    tokens=st.integers(1, 40),
    experts=st.integers(2, 9),
    data=st.data(),
    seed=st.integers(0, 99),
)
def test_limits(tokens: int, experts: int, data: st.DataObject, seed: int) -> None:
    top_k = data.draw(st.integers(1, experts))
    generator = torch.Generator().manual_seed(seed)
    record = _record(torch.randn(tokens, experts, generator=generator), top_k)
    found = statistics(record)
    assert 1 - 1e-9 <= found["max_load"] <= experts / top_k + 1e-9
    assert 0 <= found["entropy"] <= math.log(experts) + 1e-6
    assert 0 <= found["dropped_fraction"] < 1
    counts = _expert_counts(record.selected, experts)
    assert int(counts.sum()) == tokens * top_k
