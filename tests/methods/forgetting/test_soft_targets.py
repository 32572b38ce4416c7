"""Divergence from a teacher in chunks, compared with the plain formula; memory."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tritter.methods.forgetting.distill import _soft_target_loss

B, T, V = 3, 5, 11


def drawn(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(shape, generator=generator, dtype=dtype)


def plain(
    said: Tensor, wanted: Tensor, *, temperature: float, top_k: int | None, gold: Tensor | None
) -> Tensor:
    """The formula, token by token, from probabilities."""
    total = said.new_zeros(())
    for number, (student, teacher) in enumerate(zip(said, wanted, strict=True)):
        entries = [v for v in range(len(student)) if gold is None or v != int(gold[number])]
        q, p = ((each[entries] / temperature).softmax(dim=-1) for each in (student, teacher))
        order = p.argsort(descending=True)[: top_k or len(p)]
        rest = [v for v in range(len(p)) if v not in order.tolist()]
        total = total + (p[order] * (p[order] / q[order]).log()).sum()
        if rest:
            total = total + p[rest].sum() * (p[rest].sum() / q[rest].sum()).log()
    return temperature**2 * total


@pytest.mark.quick_cases(16)
@pytest.mark.parametrize("chunk_entries", [1, 2 * V, 10**6])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("top_k", [None, 1, 4, V])
@pytest.mark.parametrize("has_gold", [False, True])
def test_value_and_gradient_are_those_of_the_formula(
    chunk_entries: int, temperature: float, top_k: int | None, has_gold: bool
) -> None:
    said, wanted = drawn(B, T, V, seed=0).requires_grad_(), drawn(B * T, V, seed=1)
    places = torch.tensor([0, 3, 4, 7, 12, 14])
    gold = torch.tensor([0, -1, 10, 5, 5, -1]) if has_gold else None
    loss = _soft_target_loss(
        said,
        lambda part: wanted[places[part]],
        places,
        temperature=temperature,
        top_k=top_k,
        excluded=gold,
        chunk_entries=chunk_entries,
    )
    (found,) = torch.autograd.grad(3 * loss, said)
    naive = said.detach().clone().requires_grad_()
    expected = plain(
        naive.view(-1, V)[places], wanted[places], temperature=temperature, top_k=top_k, gold=gold
    )
    (slope,) = torch.autograd.grad(3 * expected, naive)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found, slope, rtol=1e-10, atol=1e-12)


def test_the_gradient_is_that_of_finite_differences() -> None:
    said, wanted = drawn(1, 4, V, seed=2), drawn(4, V, seed=3)

    def value(logits: Tensor) -> Tensor:
        return _soft_target_loss(
            logits,
            lambda part: wanted[part],
            torch.arange(4),
            temperature=2.0,
            top_k=3,
            excluded=torch.tensor([1, 2, 3, -1]),
        )

    leaf = said.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(value(leaf), leaf)
    for index in ((0, 0, 0), (0, 0, 1), (0, 1, 7), (0, 3, 10)):
        moved = [said.clone() for _ in range(2)]
        for each, by in zip(moved, (1e-6, -1e-6), strict=True):
            each[index] += by
        slope = (value(moved[0]) - value(moved[1])) / 2e-6
        assert float(gradient[index]) == pytest.approx(float(slope), rel=1e-6, abs=1e-9)


def test_one_who_says_the_same_loses_nothing_whatever_is_left_out() -> None:
    said = drawn(B, T, V, seed=4).requires_grad_()
    for top_k in (None, 2):
        loss = _soft_target_loss(
            said,
            lambda part: said.detach().view(-1, V)[part],
            torch.arange(B * T),
            top_k=top_k,
            excluded=torch.arange(B * T) % V,
        )
        (gradient,) = torch.autograd.grad(loss, said)
        assert abs(float(loss.detach())) < 1e-12 and float(gradient.abs().max()) < 1e-12


def test_extreme_and_half_precision_logits_stay_finite() -> None:
    said = torch.tensor([[[80.0, -80.0, 0.0]]], dtype=torch.bfloat16, requires_grad=True)
    wanted = torch.tensor([[-90.0, 90.0, 0.0]], dtype=torch.bfloat16)
    for top_k in (None, 1):
        loss = _soft_target_loss(said, lambda part: wanted[part], torch.arange(1), top_k=top_k)
        assert loss.dtype == torch.float32
        (gradient,) = torch.autograd.grad(loss, said)
        assert gradient.dtype == torch.bfloat16
        assert float(loss.detach()) == pytest.approx(160.0, rel=1e-3)
        assert gradient.flatten().tolist() == pytest.approx([1.0, -1.0, 0.0])


class Held(TorchDispatchMode):
    """Counts the bytes of all live tensors that were created inside the block."""

    def __init__(self, given: Tensor) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen = {given.untyped_storage().data_ptr()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for each in made if isinstance(made, tuple | list) else (made,):
            if isinstance(each, Tensor):
                self._note(each)
        return made

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage.data_ptr(), storage.nbytes()
        if key in self.seen:
            return
        self.seen.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size


def peak(loss_of: Callable[[Tensor], Tensor], said: Tensor) -> int:
    """Return the peak bytes of a loss and its gradient."""
    leaf = said.clone().requires_grad_()
    gc.collect()
    with Held(leaf) as held:
        torch.autograd.grad(loss_of(leaf), leaf)
    return held.peak


def test_of_the_size_of_the_logits_only_their_gradient_is_held() -> None:
    tokens, vocab, hidden_size = 64, 8192, 4
    said = drawn(1, tokens, vocab, seed=0, dtype=torch.float32)
    hidden = drawn(tokens, hidden_size, seed=1, dtype=torch.float32)
    head = drawn(vocab, hidden_size, seed=2, dtype=torch.float32)
    size, chunk = said.numel() * 4, 4 * vocab

    def chunked(leaf: Tensor) -> Tensor:
        return _soft_target_loss(
            leaf,
            lambda part: hidden[part] @ head.T,
            torch.arange(tokens),
            temperature=2.0,
            chunk_entries=chunk,
        )

    def naive(leaf: Tensor) -> Tensor:
        goal = (hidden @ head.T / 2).softmax(dim=-1)
        said = (leaf[0] / 2).log_softmax(dim=-1)
        return 4 * torch.nn.functional.kl_div(said, goal, reduction="sum")

    found, expected = peak(chunked, said), peak(naive, said)
    assert size <= found < size + 12 * 4 * chunk
    assert expected > 4 * size
