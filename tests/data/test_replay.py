import pytest
import torch

from tritter.data.replay import ReplayBuffer
from tritter.data.sequences import SequenceStream
from tritter.errors import RequestError

OLD = torch.arange(9)[:, None].repeat(1, 2)


def test_nothing_returns_before_all_have_come():
    buffer = ReplayBuffer.from_sequences(OLD, seed=0)
    assert len(buffer) == 9 and buffer.sequence_length == 2
    drawn = torch.cat([buffer.sample(2) for _ in range(9)])[:, 0].tolist()
    assert sorted(drawn[:9]) == sorted(drawn[9:]) == list(range(9))


def test_resume():
    buffer = ReplayBuffer.from_sequences(OLD, seed=0)
    buffer.sample(13)
    other = ReplayBuffer.from_sequences(OLD, seed=0)
    other.load_state_dict(buffer.state_dict())
    assert torch.equal(other.sample(20), buffer.sample(20))


def test_its_order_is_not_that_of_new_data_with_the_same_seed():
    drawn = ReplayBuffer.from_sequences(OLD, seed=4).sample(9)
    assert not torch.equal(drawn, SequenceStream(OLD, seed=4).next_sequences(9))


def test_an_empty_buffer_is_refused():
    with pytest.raises(RequestError):
        ReplayBuffer.from_sequences(OLD[:0], seed=0)
