import math
from fractions import Fraction
from itertools import chain, islice

import lightning
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tritter.data.batches import BatchStream, SequenceStream, _num_replayed
from tritter.data.replay import ReplayBuffer
from tritter.errors import RequestError, TritterError

NUM_NEW, NUM_OLD, OLD_START = 23, 7, 1000


def batches(*, fraction: float | None = None, batch_size: int = 4) -> BatchStream:
    new = torch.arange(NUM_NEW)[:, None].repeat(1, 3)
    stream = BatchStream(SequenceStream(new, seed=5), batch_size=batch_size)
    if fraction is None:
        return stream
    old = OLD_START + torch.arange(NUM_OLD)[:, None].repeat(1, 3)
    return ReplayBuffer.of_domains({"old": old}, seed=5).mixed_into(stream, fraction)


def rows(stream: BatchStream, count: int) -> list[list[int]]:
    return [batch["input_ids"][:, 0].tolist() for batch in islice(iter(stream), count)]


def flat(batches_of_rows: list[list[int]]) -> list[int]:
    return list(chain.from_iterable(batches_of_rows))


@given(st.decimals(0, "0.999", places=3).map(float), st.integers(1, 64), st.integers(1, 300))
def test_the_share_is_exact_over_any_number_of_batches(fraction, batch_size, num_batches):
    share = Fraction(str(fraction))
    counts = [_num_replayed(share, index, batch_size) for index in range(num_batches)]
    assert sum(counts) == math.floor(num_batches * batch_size * share)
    assert all(0 <= count <= batch_size for count in counts)


@pytest.mark.full
def test_the_share_has_no_float_drift():
    counts = [_num_replayed(Fraction("0.1"), index, 1) for index in range(100_000)]
    assert sum(counts) == 10_000
    assert sum(int(0.29 * 100) for _ in range(10)) == 280  # what a float does
    assert sum(_num_replayed(Fraction("0.29"), index, 100) for index in range(10)) == 290


@pytest.mark.parametrize("fraction", [1.0, -0.1, float("nan"), float("inf")])
def test_a_share_out_of_range_is_refused(fraction):
    with pytest.raises(RequestError, match=r"forgetting\.replay\.fraction"):
        batches(fraction=fraction)


def test_a_batch_says_what_is_replayed():
    for batch in islice(iter(batches(fraction=0.3)), 30):
        assert batch["input_ids"].dtype == torch.int64 and batch["input_ids"].shape == (4, 3)
        assert batch["is_replay"].dtype == torch.bool
        assert torch.equal(batch["input_ids"][:, 0] >= OLD_START, batch["is_replay"])
    assert not next(iter(batches()))["is_replay"].any()


@given(st.decimals(0, "0.9", places=2).map(float), st.integers(1, 8), st.integers(1, 40))
def test_with_replay_new_data_is_a_prefix_of_that_without(fraction, batch_size, count):
    without = flat(rows(batches(batch_size=batch_size), count))
    mixed = flat(rows(batches(fraction=fraction, batch_size=batch_size), count))
    new = [row for row in mixed if row < OLD_START]
    assert new == without[: len(new)]
    assert len(mixed) - len(new) == math.floor(count * batch_size * Fraction(str(fraction)))


def twice_replayed(first: float, second: float, batch_size: int) -> BatchStream:
    other = 2 * OLD_START + torch.arange(NUM_OLD)[:, None].repeat(1, 3)
    buffer = ReplayBuffer.of_domains({"other": other}, seed=5)
    return buffer.mixed_into(batches(fraction=first, batch_size=batch_size), second)


_SHARES = st.decimals("0.01", "0.45", places=2).map(float)


@given(_SHARES, _SHARES, st.integers(1, 8), st.integers(1, 40), st.integers(0, 40))
def test_two_buffers_replay_their_exact_shares_and_resume(first, second, batch_size, count, after):
    stream, sizes = twice_replayed(first, second, batch_size), [Fraction(str(first))]
    sizes.append(Fraction(str(second)))
    mixed = flat(rows(stream, count))
    old = [sum(low <= row < low + OLD_START for row in mixed) for low in (1000, 2000)]
    assert sum(old) == math.floor(count * batch_size * sum(sizes))
    for number, size in zip(old, sizes, strict=True):
        assert abs(number - sum(old) * size / sum(sizes)) < 1
    new = [row for row in mixed if row < OLD_START]
    assert new == flat(rows(batches(batch_size=batch_size), count))[: len(new)]
    resumed = twice_replayed(first, second, batch_size)
    resumed.load_state_dict(stream.state_dict())
    assert rows(resumed, after) == rows(stream, after)


@given(st.sampled_from([None, 0.0, 0.25, 0.37]), st.integers(0, 30), st.integers(1, 30))
def test_a_resumed_loader_goes_on_exactly(fraction, before, after):
    stream = batches(fraction=fraction)
    rows(stream, before)
    resumed = batches(fraction=fraction)
    resumed.load_state_dict(stream.state_dict())
    assert rows(resumed, after) == rows(stream, after)


def test_making_an_iterator_moves_nothing_and_iterators_share_one_place():
    stream = batches()
    before = stream.state_dict()
    first, second = iter(stream), iter(stream)
    assert stream.state_dict() == before
    next(first)
    assert stream.state_dict() != before
    assert next(second)["input_ids"][:, 0].tolist() == rows(batches(), 2)[1]


def test_state_is_plain_and_of_one_format():
    stream = batches(fraction=0.25)
    assert stream.state_dict() == {
        "format_version": 1,
        "batch_index": 0,
        "new": {"epoch": 0, "position": 0},
        "replay": {"old": {"drawn": 0, "place": {"epoch": 0, "position": 0}}},
    }
    with pytest.raises(TritterError, match="format_version=9"):
        stream.load_state_dict({**stream.state_dict(), "format_version": 9})


def test_wrong_requests_are_refused():
    with pytest.raises(RequestError, match=r"fraction=1: must be at least 0 and below 1"):
        ReplayBuffer.of_domains({"old": torch.zeros(3, 3)}, seed=0).mixed_into(
            batches(fraction=0.7), 0.3
        )
    with pytest.raises(RequestError, match=r"data\.sequence_length=3.*2 tokens"):
        ReplayBuffer.of_domains({"old": torch.zeros(3, 2)}, seed=0).mixed_into(batches(), 0.2)


class Witness(lightning.LightningModule):
    """Records its training batches."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def training_step(self, batch, batch_index):
        self.seen.append(batch["input_ids"][:, 0].tolist())
        return self.weight * 1.0

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(module: Witness, *, steps: int, path=None, loader=None) -> lightning.Trainer:
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader or batches(fraction=0.25), ckpt_path=path, weights_only=True)
    return trainer


@pytest.mark.filterwarnings("ignore")
def test_lightning_resumes_at_the_very_next_batch(tmp_path):
    whole, first, second = Witness(), Witness(), Witness()
    fit(whole, steps=20)
    fit(first, steps=7).save_checkpoint(tmp_path / "at7.ckpt")
    fit(second, steps=20, path=tmp_path / "at7.ckpt")
    assert len(whole.seen) == 20
    assert first.seen + second.seen == whole.seen


class Unsized:
    """The same loader without its length: the negative control of the test above."""

    def __init__(self):
        self.stream = batches(fraction=0.25)
        self.state_dict, self.load_state_dict = (
            self.stream.state_dict,
            self.stream.load_state_dict,
        )

    def __iter__(self):
        return iter(self.stream)


@pytest.mark.filterwarnings("ignore")
def test_without_a_length_lightning_would_skip_a_batch(tmp_path):
    first, second = Witness(), Witness()
    fit(first, steps=3, loader=Unsized()).save_checkpoint(tmp_path / "at3.ckpt")
    fit(second, steps=6, path=tmp_path / "at3.ckpt", loader=Unsized())
    assert first.seen + second.seen != rows(batches(fraction=0.25), 6)


@pytest.mark.parametrize("fraction", [None, 0.3])
def test_ranks_share_the_rows_of_one_and_are_at_its_place(monkeypatch, fraction):
    whole = batches(fraction=fraction)
    parts = [batches(fraction=fraction) for _ in range(2)]
    for batch in islice(iter(whole), 30):
        halves = []
        for index, part in enumerate(parts):
            monkeypatch.setattr("tritter.data.batches.num_ranks", lambda: 2)
            monkeypatch.setattr("tritter.data.batches.this_rank", lambda index=index: index)
            halves.append(next(iter(part)))
        monkeypatch.undo()
        for name, rows_of_all in batch.items():
            assert torch.equal(torch.stack([h[name] for h in halves], 1).flatten(0, 1), rows_of_all)
        assert parts[0].state_dict() == parts[1].state_dict() == whole.state_dict()
