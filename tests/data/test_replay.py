import json
from hashlib import sha256

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tritter.data.batches import SequenceStream
from tritter.data.replay import MemoryReplayBuffer, ReplayBuffer, Reservoir
from tritter.errors import RequestError
from tritter.seeds import derived_seed

OLD = torch.arange(9)[:, None].repeat(1, 2)


def test_nothing_returns_before_all_have_come():
    buffer = ReplayBuffer.of_domains({"old": OLD}, seed=0)
    assert len(buffer) == 9 and buffer.sequence_length == 2
    drawn = torch.cat([buffer.sample(2) for _ in range(9)])[:, 0].tolist()
    assert sorted(drawn[:9]) == sorted(drawn[9:]) == list(range(9))


def test_resume():
    buffer = ReplayBuffer.of_domains({"old": OLD}, seed=0)
    buffer.sample(13)
    other = ReplayBuffer.of_domains({"old": OLD}, seed=0)
    other.load_state_dict(buffer.state_dict())
    assert torch.equal(other.sample(20), buffer.sample(20))


def test_its_order_is_not_that_of_new_data_with_the_same_seed():
    drawn = ReplayBuffer.of_domains({"old": OLD}, seed=4).sample(9)
    assert not torch.equal(drawn, SequenceStream(OLD, seed=4).next_sequences(9))


def test_an_empty_buffer_is_refused():
    with pytest.raises(RequestError):
        ReplayBuffer.of_domains({"old": OLD[:0]}, seed=0)


def domains(*names):
    return {name: OLD + 100 * number for number, name in enumerate(names)}


def shares(buffer, count, names):
    drawn = buffer.sample(count)[:, 0] // 100
    return [int((drawn == number).sum()) for number in range(len(names))]


@given(st.lists(st.integers(0, 5), min_size=1, max_size=4), st.integers(1, 120))
def test_shares_of_domains_are_exact_over_time(weights, count):
    names = "abcd"[: len(weights)]
    asked = dict(zip(names, weights, strict=True))
    if not any(weights):
        with pytest.raises(RequestError, match="weights"):
            ReplayBuffer.of_domains(domains(*names), seed=0, weights=asked)
        return
    buffer = ReplayBuffer.of_domains(domains(*names), seed=0, weights=asked)
    for drawn, weight in zip(shares(buffer, count, names), weights, strict=True):
        assert abs(drawn - count * weight / sum(weights)) < len(weights)
    whole = ReplayBuffer.of_domains(domains(*names), seed=0, weights=asked)
    assert shares(whole, 10 * sum(weights), names) == [10 * weight for weight in weights]


def test_domains_take_turns_and_a_small_one_is_not_drowned():
    sequences = {"large": OLD.repeat(100, 1), "small": OLD[:2] + 100}
    buffer = ReplayBuffer.of_domains(sequences, seed=0)
    assert shares(buffer, 400, "ab") == [200, 200]
    assert len(buffer) == 902


def test_a_weight_that_is_not_given_is_one():
    buffer = ReplayBuffer.of_domains(domains("a", "b", "c"), seed=0, weights={"b": 2})
    assert shares(buffer, 40, "abc") == [10, 20, 10]


def test_domains_resume_where_they_were():
    def buffer():
        return ReplayBuffer.of_domains(domains("a", "b"), seed=3, weights={"a": 0.3})

    whole, first, other = buffer(), buffer(), buffer()
    expected = whole.sample(60)
    assert torch.equal(first.sample(23), expected[:23])
    other.load_state_dict(first.state_dict())
    assert torch.equal(other.sample(37), expected[23:])


def test_a_domain_keeps_its_order_beside_another():
    alone = ReplayBuffer.of_domains(domains("a"), seed=1).sample(9)[:, 0].tolist()
    both = ReplayBuffer.of_domains(domains("a", "b"), seed=1).sample(18)[:, 0].tolist()
    assert [number for number in both if number < 100] == alone


def numbered(first, count):
    return torch.arange(first, first + count)[:, None].repeat(1, 3)


def plain(state):
    if isinstance(state, torch.Tensor):
        return state.tolist()
    return {key: plain(each) for key, each in state.items()} if isinstance(state, dict) else state


def of_a_reservoir(weighting):
    held, drawn = Reservoir(6, seed=5, weighting=weighting), []
    for step in range(9):
        held.add(numbered(10 * step, 4), torch.rand(4, generator=torch.manual_seed(step)))
        drawn += held.next_sequences(5)[:, 0].tolist()
    return drawn, held


def of_domains():
    sequences, losses = {"a": numbered(0, 9), "b": numbered(100, 4)}, torch.tensor([1.0, 2, 3, 0])
    held = ReplayBuffer.of_domains(sequences, seed=3, weights={"a": 0.3}, losses={"b": losses})
    return held.sample(50)[:, 0].tolist(), held


def of_reservoirs():
    held = ReplayBuffer.of_reservoirs({"a": 4, "b": 3}, seed=3, weighting="loss")
    held.add(numbered(0, 20), torch.arange(20.0), domain="a")
    held.add(numbered(100, 20), domain="b")
    return held.sample(50)[:, 0].tolist(), held


def of_new_domains():
    sequences = {"a": numbered(0, 9), "b": numbered(100, 4)}
    streams = {
        name: SequenceStream(each, seed=derived_seed(8, "domain", name))
        for name, each in sequences.items()
    }
    held = ReplayBuffer(streams, weights={"b": 2.5})
    return held.next_sequences(50)[:, 0].tolist(), held


def of_memory():
    held, drawn = MemoryReplayBuffer(5, seed=2, weighting="loss"), []
    for number in range(12):
        held.add(f"p{number}", f"a{number}", number / 3)
        drawn += held.get_replay_batch(["x"] * 3, 0.4)
    return drawn, held


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: of_a_reservoir("uniform"), "514280050a611681"),
        (lambda: of_a_reservoir("loss"), "0520747c7253e079"),
        (of_domains, "bf260f73f92e8e15"),
        (of_reservoirs, "4539bbbbe48465de"),
        (of_new_domains, "22a43546ebf61a21"),
        (of_memory, "1722aedd4e5d206e"),
    ],
)
def test_draws_and_what_is_saved_are_those_of_before(make, expected):
    drawn, held = make()
    found = json.dumps([drawn, plain(held.state_dict())])
    assert sha256(found.encode()).hexdigest()[:16] == expected
