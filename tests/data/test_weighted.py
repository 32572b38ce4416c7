"""Sequences of several domains in exact shares, from any saved position."""

import torch

from tritter.data.batches import BatchStream
from tritter.data.replay import ReplayBuffer

SEQUENCES = {
    "a": torch.arange(10).repeat_interleave(4).view(10, 4),
    "b": torch.arange(100, 103).repeat_interleave(4).view(3, 4),
    "c": torch.arange(200, 205).repeat_interleave(4).view(5, 4),
}


def stream(**weights: float) -> ReplayBuffer:
    return ReplayBuffer.of_domains(SEQUENCES, weights=weights, seed=3)


def test_shares_are_exact_whatever_there_is_of_each() -> None:
    drawn = stream(a=0.5, b=2.5)
    first = drawn.next_sequences(80)[:, 0]
    for count in range(1, 81):
        numbers = torch.bincount(first[:count] // 100, minlength=3).tolist()
        shares = (0.125, 0.625, 0.25)
        assert all(abs(n - s * count) < 1 for n, s in zip(numbers, shares, strict=True))


def test_each_domain_comes_whole_before_it_comes_again() -> None:
    first = stream(b=2).next_sequences(24)[:, 0]
    for low, size in ((0, 10), (100, 3), (200, 5)):
        own = first[(first >= low) & (first < low + 100)][:size]
        assert len(own.unique()) == len(own)


def test_a_resumed_stream_goes_on() -> None:
    whole = BatchStream(stream(a=3), batch_size=5)
    batches = [batch["input_ids"] for batch, _ in zip(whole, range(6), strict=False)]
    half, rest = BatchStream(stream(a=3), batch_size=5), BatchStream(stream(a=3), batch_size=5)
    for _ in zip(range(3), half, strict=False):
        pass
    rest.load_state_dict(half.state_dict())
    for expected, found in zip(batches[3:], rest, strict=False):
        assert torch.equal(expected, found["input_ids"])
