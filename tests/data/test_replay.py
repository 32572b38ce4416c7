import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tritter.data.replay import ReplayBuffer
from tritter.data.sequences import SequenceStream
from tritter.errors import RequestError, TritterError

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
    with pytest.raises(TritterError, match="a, b was replayed"):
        ReplayBuffer.of_domains(domains("a", "c"), seed=3).load_state_dict(first.state_dict())


def test_a_domain_keeps_its_order_beside_another():
    alone = ReplayBuffer.of_domains(domains("a"), seed=1).sample(9)[:, 0].tolist()
    both = ReplayBuffer.of_domains(domains("a", "b"), seed=1).sample(18)[:, 0].tolist()
    assert [number for number in both if number < 100] == alone
