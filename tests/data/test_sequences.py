import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tritter.data.batches import SequenceStream, derived_seed
from tritter.errors import RequestError, TritterError


def numbered(count: int) -> torch.Tensor:
    return torch.arange(count, dtype=torch.int32)[:, None].repeat(1, 3)


def stream(count: int, seed: int = 0) -> SequenceStream:
    return SequenceStream(numbered(count), seed=seed)


def take(source: SequenceStream, count: int) -> list[int]:
    taken = source.next_sequences(count)
    assert taken.dtype == torch.int64 and taken.shape == (count, 3)
    return taken[:, 0].tolist()


@given(st.integers(1, 12), st.lists(st.integers(0, 30), max_size=6), st.integers(0, 3))
def test_each_epoch_holds_each_sequence_once_however_it_is_asked(count, requests, seed):
    source = stream(count, seed)
    taken = [each for request in requests for each in take(source, request)]
    whole = take(stream(count, seed), len(taken))
    assert taken == whole
    for start in range(0, len(taken) - count + 1, count):
        assert sorted(taken[start : start + count]) == list(range(count))


@given(st.integers(1, 12), st.integers(0, 40), st.integers(0, 40), st.integers(0, 3))
def test_a_resumed_stream_goes_on_exactly(count, before, after, seed):
    source = stream(count, seed)
    take(source, before)
    resumed = stream(count, seed)
    resumed.load_state_dict(source.state_dict())
    assert source.state_dict() == {"epoch": before // count, "position": before % count}
    assert take(resumed, after) == take(source, after)


def test_orders_differ_by_epoch_and_seed_and_ignore_the_global_generator():
    first = take(stream(50), 100)
    torch.manual_seed(123)
    assert take(stream(50), 100) == first
    assert first[:50] != first[50:]
    assert take(stream(50, seed=1), 50) != first[:50]


def test_global_random_state_is_left_alone():
    before = torch.get_rng_state()
    take(stream(5), 12)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("state", [{"epoch": 0, "position": 5}, {"epoch": -1, "position": 0}])
def test_a_place_that_does_not_exist_is_refused(state):
    with pytest.raises(TritterError, match="5 sequences"):
        stream(5).load_state_dict(state)


def test_no_sequences_are_refused():
    with pytest.raises(RequestError, match="N > 0"):
        SequenceStream(torch.zeros(0, 4), seed=0)


def test_derived_seeds_do_not_meet():
    seeds = {
        derived_seed(seed, *purpose)
        for seed in range(20)
        for purpose in (("replay",), ("epoch", 0), ("epoch", 1), ("epoch", 11))
    }
    assert len(seeds) == 80 and all(0 <= seed < 2**63 for seed in seeds)
