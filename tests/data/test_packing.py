"""Packing of whole documents: each token once, little padding, deterministic."""

import random

import numpy as np
import pytest
import torch

from tritter.data.packing import _PACKED_TOKENS, _best_fit, num_packed, packed, padding_fraction
from tritter.data.tokens import TextBounds, TokenisedDocuments
from tritter.errors import RequestError

EOT = 0


def of_lengths(lengths: list[int]) -> TokenisedDocuments:
    """Return documents whose tokens all differ, counted from 1."""
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    return TokenisedDocuments(
        tokens=torch.arange(1, int(offsets[-1]) + 1, dtype=torch.int32),
        offsets=offsets,
        num_bytes=torch.tensor(lengths),
        identifiers=tuple(map(str, range(len(lengths)))),
    )


def rows_of(documents: TokenisedDocuments, length: int) -> torch.Tensor:
    return packed(documents, packing="documents", sequence_length=length, bounds=TextBounds(EOT))


def test_by_hand() -> None:
    rows = rows_of(of_lengths([2, 9, 1, 0, 4, 5]), 6)
    assert rows.dtype == torch.int32
    assert rows.tolist() == [
        [0, 3, 4, 5, 6, 7],  # the first piece of nine tokens fills a sequence
        [0, 17, 18, 19, 20, 21],  # and so does one of five, whose end has no room
        [0, 8, 9, 10, 11, 0],  # the rest of nine
        [0, 13, 14, 15, 16, 0],
        [0, 1, 2, 0, 12, 0],  # whole ones; the empty one is nowhere
    ]


@pytest.mark.parametrize("seed", range(4))
def test_each_token_stands_once_in_its_order_and_ends_are_predicted(seed: int) -> None:
    drawn = random.Random(seed)
    length = drawn.choice([2, 3, 7, 32])
    documents = of_lengths([drawn.randrange(0, 3 * length) for _ in range(200)])
    rows = rows_of(documents, length)
    assert len(rows) == num_packed(
        documents, packing="documents", sequence_length=length, bounds=TextBounds(EOT)
    )
    assert (rows[:, 0] == EOT).all()
    found = rows[rows != EOT]
    assert sorted(found.tolist()) == documents.tokens.tolist()
    where = {int(token): divmod(at, length) for at, token in enumerate(rows.flatten().tolist())}
    for number in range(len(documents)):
        tokens = documents.document(number).tolist()
        for first in range(0, len(tokens), length - 1):
            piece = tokens[first : first + length - 1]
            row, column = where[piece[0]]
            assert rows[row, column : column + len(piece)].tolist() == piece
            assert rows[row, column - 1] == EOT
            if len(piece) < length - 1:  # else it fills the sequence
                assert rows[row, column + len(piece)] == EOT


def test_lengths_of_real_texts_leave_little_padding() -> None:
    drawn = np.random.default_rng(0)
    lengths = drawn.lognormal(4, 1.2, 5000).astype(int).tolist()  # median 55, a tail to thousands
    rows = rows_of(of_lengths(lengths), 128)
    is_end = rows == EOT
    padding = int((is_end[:, 1:] & is_end[:, :-1]).sum()) / rows.numel()
    assert 0 < padding < 0.02
    fraction = padding_fraction(of_lengths(lengths), sequence_length=128, bounds=TextBounds(EOT))
    assert fraction == pytest.approx(padding, abs=1e-12)
    assert torch.equal(rows, rows_of(of_lengths(lengths), 128))


def test_best_fit_chooses_the_fullest_bin_that_has_room() -> None:
    bins, before = _best_fit(np.array([5, 3, 6, 3, 2, 4]), 10)
    # 6 | 5 | 4 next to 6 | 3 next to 5 | 3 in a new one, 2 fills 5 and 3
    assert bins.tolist() == [1, 1, 0, 2, 1, 0]
    assert before.tolist() == [0, 5, 0, 0, 8, 6]


def test_many_parts_are_laid_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    documents = of_lengths([3, 50, 20, 7, 1, 1, 30, 11])
    whole = rows_of(documents, 16)
    assert whole.numel() < _PACKED_TOKENS
    monkeypatch.setattr("tritter.data.packing._PACKED_TOKENS", 1)
    assert torch.equal(rows_of(documents, 16), whole)


def test_a_stream_is_what_it_was_and_nothing_is_refused() -> None:
    documents = of_lengths([3, 50, 20])
    stream = packed(documents, packing="stream", sequence_length=16, bounds=TextBounds(EOT))
    assert torch.equal(stream, documents.pack(sequence_length=16, bounds=TextBounds(EOT)))
    assert num_packed(
        documents, packing="stream", sequence_length=16, bounds=TextBounds(EOT)
    ) == len(stream)
    short = of_lengths([3])  # not one full sequence, yet a document
    assert rows_of(short, 16).shape == (1, 16)
    for empty, length, words in ((of_lengths([0]), 16, "empty"), (short, 1, "at least 2")):
        with pytest.raises(RequestError, match=words):
            rows_of(empty, length)
