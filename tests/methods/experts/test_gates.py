"""Gates in every mode: brute force, finite differences, causality."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tritter.methods.experts.gates import Gates, Routing, usage
from tritter.methods.experts.mixture import ExpertRouter


def test_a_router_computes_in_float32_under_autocast() -> None:
    router = ExpertRouter(8, 3)
    torch.nn.init.normal_(router.weight)
    hidden = logits(2, 4, 8).float()
    expected = router(hidden)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(router(hidden), expected)


def logits(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def by_hand(row: list[float], routing: Routing) -> list[float]:
    """The gates of one token without capacity."""
    powers = [math.exp(each / routing.temperature) for each in row]
    probabilities = [each / sum(powers) for each in powers]
    k = routing.top_k or len(row)
    best = sorted(range(len(row)), key=lambda n: -row[n])[:k]
    total = sum(probabilities[n] for n in best) if k > 1 else 1.0
    return [p / total if n in best else 0.0 for n, p in enumerate(probabilities)]


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 5),
    number=st.integers(1, 5),
    top_k=st.one_of(st.none(), st.integers(1, 6)),
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
)
def test_gates_are_those_by_hand(
    batch: int, length: int, number: int, top_k: int | None, temperature: float
) -> None:
    routing = Routing(top_k=top_k, temperature=temperature, capacity_factor=0.1)
    values = logits(batch, length, number)
    gates = routing.gates(values)  # capacity acts in training only
    k = None if top_k is None or top_k >= number else top_k
    for b in range(batch):
        for t in range(length):
            expected = by_hand(values[b, t].tolist(), Routing(top_k=k, temperature=temperature))
            assert gates.weights[b, t].tolist() == pytest.approx(expected, abs=1e-12)
    if k is not None:
        assert gates.chosen is not None and (gates.chosen.sum(-1) == k).all()


def test_dense_tokens_use_all_experts() -> None:
    values, is_dense = logits(1, 2, 4), torch.tensor([[True, False]])
    gates = Routing(top_k=2).gates(values, is_dense=is_dense)
    assert gates.chosen is not None and gates.chosen.sum(-1).tolist() == [[4, 2]]
    assert torch.allclose(gates.weights[0, 0], values[0, 0].softmax(-1))


@pytest.mark.parametrize("top_k", [None, 2, 1])
def test_the_router_gets_a_gradient_in_every_mode(top_k: int | None) -> None:
    values = logits(2, 3, 4).requires_grad_()
    target = logits(2, 3, 4, seed=1)

    def loss(x: torch.Tensor) -> torch.Tensor:
        return (Routing(top_k=top_k, temperature=0.7).gates(x).weights * target).sum()

    assert torch.autograd.gradcheck(loss, (values,))
    (gradient,) = torch.autograd.grad(loss(values), values)
    assert (gradient.abs().amax(-1) > 1e-3).all()


def test_capacity_keeps_the_earliest_of_each_sequence() -> None:
    values = torch.zeros(2, 6, 3)
    values[0, :, 0] = 1.0  # all tokens of the first sequence prefer one expert
    values[1, torch.arange(6), torch.arange(6) % 3] = 1.0
    routing = Routing(top_k=1, capacity_factor=1.0)  # ⌈6 / 3⌉ = 2 tokens
    gates = routing.gates(values, is_training=True)
    assert gates.chosen is not None
    assert gates.chosen[0, :, 0].tolist() == [True, True, False, False, False, False]
    assert gates.chosen[1].sum() == 6
    assert gates.weights[0, 2:].abs().sum() == 0
    assert gates.dropped == pytest.approx(4 / 12)


def test_capacity_knows_no_later_token() -> None:
    routing = Routing(top_k=2, capacity_factor=0.5)
    values = logits(2, 8, 4)
    other = values.clone()
    other[:, 5:] = logits(2, 3, 4, seed=3)
    one, two = (routing.gates(each, is_training=True).weights for each in (values, other))
    assert torch.equal(one[:, :5], two[:, :5])
    assert not torch.equal(one[:, 5:], two[:, 5:])


@pytest.mark.parametrize("top_k", [None, 2, 1])
@pytest.mark.parametrize("loss", [Gates.balance_loss, Gates.entropy_loss, Gates.z_loss])
def test_losses_by_finite_differences(loss, top_k: int | None) -> None:
    values = logits(2, 3, 4).requires_grad_()
    routing = Routing(top_k=top_k, temperature=0.7)
    assert torch.autograd.gradcheck(lambda x: loss(routing.gates(x)), (values,))


def test_what_losses_say_of_even_and_of_collapsed_use() -> None:
    even = Routing(top_k=1).gates(4 * torch.eye(4).repeat(3, 1)[None])
    lone = Routing(top_k=1).gates(torch.tensor([9.0, 0, 0, 0]).repeat(1, 12, 1))
    assert float(even.balance_loss()) == pytest.approx(1.0)
    assert float(lone.balance_loss()) == pytest.approx(4.0, abs=0.01)
    flat = Routing().gates(torch.zeros(1, 2, 4))
    assert float(flat.entropy_loss()) == pytest.approx(math.log(4))
    assert float(flat.z_loss()) == pytest.approx(math.log(4) ** 2)
    assert float(lone.entropy_loss()) < 0.01
    many: list[Gates] = [flat, Routing().gates(torch.tensor([50.0, 0, 0, 0]).repeat(1, 2, 1))]
    assert usage(many).tolist() == pytest.approx([0.625, 0.125, 0.125, 0.125])
