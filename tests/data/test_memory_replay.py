"""A replay buffer of prompts and answers: ratio and format of batches, and sampling."""

import math
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tritter import MemoryReplayBuffer
from tritter.data.replay import Reservoir
from tritter.errors import RequestError, TritterError


def filled(count: int, **options: Any) -> MemoryReplayBuffer:
    buffer = MemoryReplayBuffer(**options)
    for number in range(count):
        buffer.add(f"{number} + 1 =", f" {number + 1}", loss=float(number))
    return buffer


def new(count: int) -> list[dict[str, str]]:
    return [{"prompt": f"new {number}", "answer": "yes"} for number in range(count)]


def test_the_ratio_is_of_the_mixed_batch() -> None:
    buffer, examples = filled(5), new(8)
    batch = buffer.get_replay_batch(examples, replay_ratio=0.2)
    assert len(batch) == 10 and batch[:8] == examples
    assert all(one["prompt"].endswith("+ 1 =") for one in batch[8:])
    assert len(buffer.get_replay_batch(examples)) == 10
    assert buffer.get_replay_batch(examples, replay_ratio=0) == examples == new(8)
    assert len(buffer.get_replay_batch(new(3), replay_ratio=0.75)) == 12


@settings(max_examples=40)
@given(
    st.decimals("0", "0.9", places=2).map(float),
    st.lists(st.integers(0, 9), min_size=1, max_size=30),
)
def test_the_ratio_holds_over_time(ratio: float, sizes: list[int]) -> None:
    buffer, given_, replayed = filled(4), 0, 0
    for size in sizes:
        replayed += len(buffer.get_replay_batch(new(size), replay_ratio=ratio)) - size
        given_ += size
        assert -1e-9 <= ratio * (given_ + replayed) - replayed + (1 - ratio) * 1e-9 < 1


@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 99))
def test_it_keeps_and_draws_what_a_reservoir_of_tokens_would(count, size, seed):
    """Both buffers sample and draw the same with the same seed, for both weightings."""
    for weighting in ("uniform", "loss"):
        buffer = filled(count, max_size=size, seed=seed, weighting=weighting)
        other = Reservoir(size, seed=seed, weighting=weighting)
        numbers = torch.arange(count)
        other.add(numbers[:, None], numbers.float())
        held = [int(each.prompt.split()[0]) for each in buffer.examples]
        assert held == other.sequences[:, 0].tolist() == [int(e.loss) for e in buffer.examples]
        batch = buffer.get_replay_batch(new(7), replay_ratio=0.5)
        drawn = [int(each["prompt"].split()[0]) for each in batch[7:]]
        assert drawn == other.next_sequences(7)[:, 0].tolist()


@pytest.mark.full
def test_every_example_is_kept_with_the_same_chance() -> None:
    trials, count, size = 2000, 12, 4
    kept = Counter(
        each.answer
        for seed in range(trials)
        for each in filled(count, max_size=size, seed=seed).examples
    )
    spread = math.sqrt(trials / 3 * 2 / 3)
    assert len(kept) == count
    assert max(abs(number - trials / 3) for number in kept.values()) < 4 * spread


def test_losses_weigh() -> None:
    buffer = filled(4, weighting="loss")  # 0, 1, 2, 3
    drawn = buffer.get_replay_batch(new(6000), replay_ratio=0.5)[6000:]
    shares = Counter(one["answer"] for one in drawn)
    assert shares[" 1"] == 0
    assert [shares[f" {n + 1}"] / 6000 for n in (1, 2, 3)] == pytest.approx(
        [1 / 6, 2 / 6, 3 / 6], abs=0.03
    )


FORMS: list[tuple[Any, Any]] = [
    ("new", "P\n\nA"),
    (("p", "a"), ("P", "A")),
    (["p", "a"], ["P", "A"]),
    ({"prompt": "p", "answer": "a"}, {"prompt": "P", "answer": "A"}),
    (
        {"prompt": "p", "completion": "a", "loss": 1},
        {"prompt": "P", "completion": "A", "loss": 0.5},
    ),
    (
        {"instruction": "p", "input": "i", "output": "a"},
        {"instruction": "P", "input": "", "output": "A"},
    ),
    ({"id": 3, "question": "p", "answer": "a"}, {"id": None, "question": "P", "answer": "A"}),
    ({"text": "t"}, {"text": "P\n\nA"}),
    ({"input_ids": [1]}, {"prompt": "P", "answer": "A"}),
    (7, {"prompt": "P", "answer": "A"}),
    (("a", "b", "c"), {"prompt": "P", "answer": "A"}),
]


@pytest.mark.parametrize(("first", "expected"), FORMS, ids=[str(first) for first, _ in FORMS])
def test_replayed_ones_look_like_the_new(first: Any, expected: Any) -> None:
    buffer = MemoryReplayBuffer()
    buffer.add("P", "A", loss=0.5)
    batch = buffer.get_replay_batch([first], replay_ratio=0.5)
    assert batch == [first, expected] and type(batch[1]) is type(expected)


def test_an_empty_buffer_replays_nothing_and_owes_nothing() -> None:
    buffer = MemoryReplayBuffer()
    assert len(buffer) == 0 and buffer.max_size == 10_000
    assert buffer.get_replay_batch(new(8)) == new(8)
    buffer.add("P", "A")
    assert len(buffer.get_replay_batch(new(8))) == 10
    assert buffer.get_replay_batch([]) == []


@pytest.mark.parametrize("weighting", ["uniform", "loss"])
def test_it_goes_on_bit_for_bit(weighting: Any) -> None:
    def use(buffer: MemoryReplayBuffer, first: int) -> list[Any]:
        found = []
        for number in range(first, first + 9):
            buffer.add(f"{number} + 1 =", f" {number + 1}", loss=number / 7)
            found += buffer.get_replay_batch(new(3), replay_ratio=0.3)
        return found

    whole, first, second = (MemoryReplayBuffer(6, seed=3, weighting=weighting) for _ in range(3))
    expected = use(whole, 0) + use(whole, 9)
    begun = use(first, 0)
    second.load_state_dict(first.state_dict())
    assert begun + use(second, 9) == expected
    assert second.examples == whole.examples and len(second) == 6
    other = MemoryReplayBuffer(6, seed=4, weighting=weighting)
    assert use(other, 0) + use(other, 9) != expected


def test_its_state_is_plain(tmp_path) -> None:  # type: ignore[no-untyped-def]
    torch.save(filled(3).state_dict(), tmp_path / "state.pt")
    buffer = MemoryReplayBuffer()
    buffer.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert buffer.examples == filled(3).examples


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 2.0, float("nan")])
def test_a_ratio_that_is_none_is_refused(ratio: float) -> None:
    with pytest.raises(RequestError, match=r"replay_ratio = .*at least 0 and below 1"):
        filled(2).get_replay_batch(new(2), replay_ratio=ratio)


def test_what_does_not_fit_is_refused() -> None:
    for size in (0, 2.5):
        with pytest.raises(RequestError, match=f"max_size = {size}: must be a whole number"):
            MemoryReplayBuffer(max_size=size)  # type: ignore[arg-type]
    buffer = filled(2)
    with pytest.raises(RequestError, match="strings, not str and int"):
        buffer.add("P", 3)  # type: ignore[arg-type]
    for loss in (float("nan"), -1.0, float("inf")):
        with pytest.raises(RequestError, match="finite and not negative"):
            buffer.add("P", "A", loss=loss)
    assert buffer.examples == filled(2).examples
    with pytest.raises(TritterError, match="has 2 examples; this one has max_size = 1"):
        MemoryReplayBuffer(1).load_state_dict(buffer.state_dict())
    with pytest.raises(TritterError, match=r"format 9; .* reads 1"):
        MemoryReplayBuffer().load_state_dict(buffer.state_dict() | {"format_version": 9})
