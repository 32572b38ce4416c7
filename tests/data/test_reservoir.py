"""Algorithm R, and the replay buffer of reservoir samples."""

import math
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tritter.data.batches import BatchStream, SequenceStream
from tritter.data.replay import ReplayBuffer, Reservoir
from tritter.errors import RequestError, TritterError


def numbered(first: int, count: int) -> Tensor:
    return torch.arange(first, first + count)[:, None].repeat(1, 3)


def filled(count: int, *, capacity: int, seed: int, pieces: int = 1) -> Reservoir:
    reservoir = Reservoir(capacity, seed=seed)
    for piece in numbered(0, count).chunk(pieces):
        reservoir.add(piece, piece[:, 0].float())
    return reservoir


@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 7), st.integers(0, 99))
def test_it_holds_what_came_up_to_its_capacity(count, capacity, pieces, seed):
    reservoir = filled(count, capacity=capacity, seed=seed, pieces=pieces)
    held = reservoir.sequences[:, 0].tolist()
    assert len(set(held)) == len(held) == min(count, capacity)
    assert set(held) <= set(range(count)) and reservoir.num_seen == count
    assert reservoir.losses.tolist() == held, "a loss stays with its sequence"
    whole = filled(count, capacity=capacity, seed=seed)
    assert torch.equal(whole.sequences, reservoir.sequences), "however it was dealt out"


@pytest.mark.full
def test_every_sequence_is_kept_with_the_same_chance():
    trials, count, capacity = 3000, 12, 4
    kept = torch.zeros(count)
    for seed in range(trials):
        kept[filled(count, capacity=capacity, seed=seed).sequences[:, 0].long()] += 1
    expected, spread = trials * capacity / count, math.sqrt(trials / 3 * 2 / 3)
    assert float((kept - expected).abs().max()) < 4 * spread
    # What would be wrong: always the last ones
    assert 4 * spread < trials - expected


def test_uniform_draws_come_round_and_losses_weigh():
    reservoir = filled(5, capacity=9, seed=0)
    drawn = reservoir.next_sequences(10)[:, 0].tolist()
    assert sorted(drawn[:5]) == sorted(drawn[5:]) == list(range(5))
    weighted = Reservoir(9, seed=0, weighting="loss")
    weighted.add(numbered(0, 3), torch.tensor([0.0, 1.0, 3.0]))
    shares = weighted.next_sequences(8000)[:, 0].bincount(minlength=3) / 8000
    assert shares.tolist() == pytest.approx([0, 0.25, 0.75], abs=0.02)
    silent = Reservoir(9, seed=0, weighting="loss")
    silent.add(numbered(0, 3), torch.zeros(3))
    assert set(silent.next_sequences(60)[:, 0].tolist()) == {0, 1, 2}


@pytest.mark.parametrize("weighting", ["uniform", "loss"])
def test_it_goes_on_bit_for_bit(weighting):
    def reservoir():
        return Reservoir(6, seed=3, weighting=weighting)

    def use(held: Reservoir, first: int) -> list[int]:
        drawn: list[int] = []
        for step in range(first, first + 8):
            held.add(numbered(10 * step, 3), torch.rand(3, generator=torch.manual_seed(step)))
            drawn += held.next_sequences(2)[:, 0].tolist()
        return drawn

    whole, first, second = reservoir(), reservoir(), reservoir()
    expected = use(whole, 0) + use(whole, 8)
    begun = use(first, 0)
    second.load_state_dict(first.state_dict())
    use(first, 50)  # what is saved does not follow
    assert begun + use(second, 8) == expected


@pytest.mark.parametrize(
    ("rows", "losses", "words"),
    [
        (torch.zeros(2, 4), None, "3 tokens; sequences of 4 tokens can't be added"),
        (numbered(0, 2), torch.tensor([1.0, float("nan")]), "finite"),
        (numbered(0, 2), torch.tensor([1.0, -1.0]), "not negative"),
        (numbered(0, 2), torch.ones(3), "2 sequences need one each"),
    ],
)
def test_what_does_not_fit_is_refused(rows, losses, words):
    reservoir = filled(4, capacity=4, seed=0)
    with pytest.raises(RequestError, match=words):
        reservoir.add(rows, losses)
    assert reservoir.num_seen == 4


def test_empty_and_too_small():
    buffer = ReplayBuffer.of_reservoirs({"seen": 3}, seed=0)
    assert len(buffer) == 0 and buffer.sample(0).shape == (0, 0)
    with pytest.raises(RequestError, match="empty"):
        buffer.sample(1)
    with pytest.raises(RequestError, match="no such reservoir; available: seen"):
        buffer.add(numbered(0, 1), domain="other")
    with pytest.raises(RequestError, match="capacity = 0"):
        ReplayBuffer.of_reservoirs({"seen": 0}, seed=0)
    with pytest.raises(TritterError, match="capacity of 1"):
        Reservoir(1, seed=0).load_state_dict(filled(2, capacity=2, seed=0).state_dict())


def test_a_buffer_of_reservoirs_is_saved_and_loaded(tmp_path: Path):
    buffer = ReplayBuffer.of_reservoirs({"a": 4, "b/c.d": 2, "none": 5}, seed=1)
    buffer.add(numbered(0, 9), torch.arange(9) / 4, domain="a")
    buffer.add(numbered(100, 1), domain="b/c.d")
    buffer.save(tmp_path / "state/replay.safetensors")
    loaded = ReplayBuffer.load(tmp_path / "state/replay.safetensors", seed=2)
    held = loaded.sample(60)[:, 0]
    assert int((held >= 100).sum()) == 30, "an empty domain waits"
    assert set(held[held < 100].tolist()) == set(buffer.sample(40)[:, 0].tolist()) - {100}
    loaded.save(tmp_path / "again.safetensors")
    same = [
        (tmp_path / name).read_bytes() for name in ("state/replay.safetensors", "again.safetensors")
    ]
    assert same[0] == same[1]
    with pytest.raises(TritterError, match="no such file"):
        ReplayBuffer.load(tmp_path / "nowhere", seed=0)
    with pytest.raises(RequestError, match="data set"):
        ReplayBuffer.of_domains({"a": numbered(0, 3)}, seed=0).save(tmp_path / "x")


def test_a_loaded_buffer_can_draw_by_loss(tmp_path: Path):
    buffer = ReplayBuffer.of_reservoirs({"a": 2}, seed=0)
    buffer.add(numbered(0, 2), torch.tensor([0.0, 1.0]), domain="a")
    buffer.save(tmp_path / "replay.safetensors")
    loaded = ReplayBuffer.load(tmp_path / "replay.safetensors", seed=0, weighting="loss")
    assert set(loaded.sample(20)[:, 0].tolist()) == {1}


@pytest.mark.full
@settings(max_examples=40)
@given(st.decimals("0.01", "0.9", places=2).map(float), st.integers(1, 8), st.integers(0, 999))
def test_the_share_is_exact_in_every_window(fraction, batch_size, seed):
    buffer = ReplayBuffer.of_reservoirs({"a": 3, "b": 5}, seed=seed)
    buffer.add(numbered(1000, 20), domain="a")
    buffer.add(numbered(2000, 20), domain="b")
    stream = SequenceStream(numbered(0, 7), seed=0)
    mixed = iter(buffer.mixed_into(BatchStream(stream, batch_size=batch_size), fraction))
    counts = [int(next(mixed)["is_replay"].sum()) for _ in range(50)]
    draw = random.Random(seed)
    for _ in range(50):
        first, last = sorted(draw.sample(range(51), 2))
        asked = fraction * batch_size * (last - first)
        assert abs(sum(counts[first:last]) - asked) < 1 + 1e-9
