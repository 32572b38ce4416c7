"""Documents follow from texts alone: how they are cut, named, told apart and ordered."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tritter.data.documents import (
    PIECE_CHARACTERS,
    Document,
    cut,
    distinct,
    documents_digest,
    documents_of,
    pieces,
    text_key,
)
from tritter.errors import RequestError

TEXTS = st.text(st.characters(codec="utf-8"), max_size=30)


@given(st.lists(TEXTS, max_size=8), st.randoms())
def test_order_copies_and_neighbours_change_nothing(texts, source):
    documents = documents_of(texts)
    shuffled = [*texts, *texts[:3]]
    source.shuffle(shuffled)
    assert documents_of(shuffled) == documents
    more = documents_of([*texts, "another text altogether"])
    assert set(more) - set(documents) <= {*documents_of(["another text altogether"])}
    assert all(document.text.strip() == document.text != "" for document in documents)


@given(TEXTS)
def test_blank_around_and_line_ends_make_no_other_text(text):
    other = "\n\n  " + text.replace("\n", "\r\n") + "\r\n"
    assert text_key(other) == text_key(text)
    assert documents_of([other, text]) in (documents_of([text]), documents_of([other]))


def long_text(size: int) -> str:
    paragraphs = [f"paragraph {number} " + "word " * (number % 90) for number in range(size // 100)]
    return "\n\n".join(paragraphs)


def test_a_long_text_is_cut_at_blank_lines_by_its_own_size_alone():
    text = long_text(600_000)
    alone = documents_of([text])
    assert len(alone) > 10
    assert all(PIECE_CHARACTERS / 2 < len(each.text) <= 2 * PIECE_CHARACTERS for each in alone)
    beside = documents_of([f"short {number}" for number in range(50)] + [text])
    assert set(alone) < set(beside)
    # What a piece says is what it is when it is met alone
    assert all(list(pieces(each.text)) == [each.text] for each in alone)
    assert documents_of([each.text for each in alone]) == alone
    assert set(documents_of([text.replace("\n", "\r\n")])) == set(alone)


@pytest.mark.parametrize("text", ["a\n" * 500, "a " * 500, "a" * 1000, "", "é" * 1000])
def test_pieces_are_the_text_whatever_it_is_made_of(text):
    found = list(cut(text, size=20))
    assert "".join(found) == text
    assert all(20 <= len(piece) <= 40 for piece in found[:-1])


def test_a_document_is_named_by_what_it_says():
    text = "\n  It begins like this, on two\n lines, and goes on for a while\n"
    (document,) = documents_of([text])
    assert document.identifier == f"{text_key(text)[:16]} It begins like this, on two lines, and"


def test_of_equal_documents_the_first_is_kept_and_blank_ones_are_dropped():
    copies = [Document(f"copy{index}", f"text {index % 10}") for index in range(40)]
    found = distinct([*copies, Document("blank", " \n")])
    assert found == copies[:10]


def test_one_name_for_two_texts_is_refused():
    with pytest.raises(RequestError, match="'a'"):
        distinct([Document("a", "x"), Document("a", "y")])


def test_digest_covers_identifiers_texts_and_order():
    a, b = Document("a", "bc"), Document("ab", "c")
    digests = {documents_digest(each) for each in ([a], [b], [a, b], [b, a], [])}
    assert len(digests) == 5
    assert documents_digest([a, b]) == documents_digest([a, b])
    texts = [str(random.Random(3).random()), "x", "y"]
    assert documents_digest(documents_of(texts)) == documents_digest(documents_of(texts[::-1]))
