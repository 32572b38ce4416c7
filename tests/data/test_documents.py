"""Documents depend only on texts: pieces, identifiers, keys and order."""

import json
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tritter.data.documents import (
    PIECE_CHARACTERS,
    Documents,
    pieces,
    pieces_of_chunks,
    text_key,
)
from tritter.data.records import Conversation
from tritter.data.sources import TextRequest
from tritter.storage import spool

TEXTS = st.text(st.characters(codec="utf-8"), max_size=30)


@pytest.mark.full
@given(st.lists(TEXTS, max_size=8), st.randoms())
def test_order_copies_and_neighbours_change_nothing(texts, source):
    documents = Documents.of(texts)
    shuffled = [*texts, *texts[:3]]
    source.shuffle(shuffled)
    assert Documents.of(shuffled) == documents
    more = Documents.of([*texts, "another text altogether"])
    assert set(more) - set(documents) <= {*Documents.of(["another text altogether"])}
    assert {document.text for document in documents} <= {*texts} and not Documents.of([" \n"])


@given(TEXTS)
def test_blank_around_and_line_ends_make_no_other_text(text):
    other = "\n\n  " + text.replace("\n", "\r\n") + "\r\n"
    assert text_key(other) == text_key(text)
    assert Documents.of([other, text]) in (Documents.of([text]), Documents.of([other]))


def long_text(size: int) -> str:
    paragraphs = [f"paragraph {number} " + "word " * (number % 90) for number in range(size // 100)]
    return "\n\n".join(paragraphs)


def test_a_long_text_is_cut_at_blank_lines_by_its_own_size_alone():
    text = long_text(600_000)
    alone = Documents.of([text])
    assert len(alone) > 10
    assert all(PIECE_CHARACTERS / 2 < len(each.text) <= 2 * PIECE_CHARACTERS for each in alone)
    beside = Documents.of([f"short {number}" for number in range(50)] + [text])
    assert set(alone) < set(beside)
    # A piece is a document of its own: it is not cut again
    assert all(list(pieces(each.text)) == [each.text] for each in alone)
    assert Documents.of([each.text for each in alone]) == alone


@pytest.mark.parametrize("name", ["book.txt", "rows.jsonl", "data"])
def test_pieces_fill_long_windows(tmp_path, name):
    """Whatever the texts come from: files, records and sources of one's own."""
    text, size = long_text(600_000), 60_000
    content = json.dumps({"text": text}) if name == "rows.jsonl" else text
    (tmp_path / name).write_text(content, "utf-8")
    found = TextRequest(
        [] if name == "data" else [str(tmp_path / name)],
        key="data.new",
        text_field="text",
        texts=(lambda: [text]) if name == "data" else None,
        piece_characters=size,
    ).documents()
    *whole, last = map(str, pieces(text, size))
    assert {document.text for document in found} == {*whole, last}
    assert len(whole) > 3 and all(size <= len(each) <= 2 * size for each in whole)


@pytest.mark.parametrize("text", ["a\n" * 500, "a " * 500, "a" * 1000, "", "é" * 1000])
def test_pieces_are_the_text_whatever_it_is_made_of(text):
    found = list(map(str, pieces(text, 20)))
    assert "".join(found) == text
    assert all(20 <= len(piece) <= 40 for piece in found[:-1])


@given(st.lists(st.text("ab \n\r", max_size=60), max_size=12))
def test_a_text_in_chunks_has_the_pieces_of_the_whole(chunks):
    text = "".join(chunks)
    assert list(pieces_of_chunks(chunks, 20)) == list(pieces(text, 20))
    assert "".join(map(str, pieces(text, 20))) == text


def test_line_ends_and_blanks_around_a_text_stay(tmp_path):
    """Trained and scored is exactly the text of a file; a byte order mark is dropped."""
    code = b"    first = 1\r\n\tsecond = 2  \r\n\r\n"
    (tmp_path / "code.txt").write_bytes(b"\xef\xbb\xbf" + code)
    (tmp_path / "long.md").write_bytes(b"\n# A\r\n\r\nword \r\n\n" * 9_000)
    (tmp_path / "rows.jsonl").write_text('{"text": "  a record\\r\\n"}\n')
    found = TextRequest([str(tmp_path)], key="data.new", text_field="text").documents()
    texts = {document.text for document in found}
    assert {code.decode(), "  a record\r\n"} < texts and len(texts) > 4
    whole = (tmp_path / "long.md").read_bytes().decode()
    assert all(text in whole for text in texts - {code.decode(), "  a record\r\n"})
    # The recorded checksum of a domain does not depend on them
    plain = Documents.of([code.decode().strip().replace("\r\n", "\n")])
    same = Documents.of([code.decode()])
    assert plain.digest(is_exact=False) == same.digest(is_exact=False)
    assert plain.digest() != same.digest()


def test_empty_documents_and_duplicates_are_counted(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "blank.md").write_text(" \n")
    rows = ['{"text": "a row"}'] * 3 + ['{"text": ""}', '"another"', '"a  row\\n"']
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    found = TextRequest([str(tmp_path)], key="data.new", text_field="text").documents()
    assert found.notes == ("data.new: dropped of 8 documents: 3 empty and 3 duplicate.",)
    assert [document.text for document in found] == ["a  row\n", "another"]


def test_a_text_in_chunks_is_cut_as_it_comes():
    chunks = iter([long_text(200_000), "the end"])
    first = next(pieces_of_chunks(chunks))
    assert first == next(pieces(long_text(200_000))) and next(chunks) == "the end"


def test_documents_on_disk_are_those_in_memory(monkeypatch):
    texts = [f"{number % 90} — {'word ' * (number % 7)}" for number in range(200)]
    held = Documents.of(texts)
    monkeypatch.setattr(spool.Spool, "IN_MEMORY_BYTES", 0)
    spooled = Documents.of(texts)
    assert spooled == held == sorted(held, key=lambda each: text_key(each.text))
    assert list(spooled.keys()) == [text_key(each.text) for each in held]
    assert spooled[3:50:7] == held[3:50:7] and spooled[-1] == held[-1]
    assert list(spooled.select(np.array([5, 2]))) == [held[5], held[2]]
    with pytest.raises(IndexError):
        spooled[len(held)]


def test_a_document_is_named_by_what_it_says():
    text = "\n  It begins like this, on two\n lines, and continues for a while\n"
    (document,) = Documents.of([text])
    assert document.identifier == f"{text_key(text)[:16]} It begins like this, on two lines, and"


def test_digest_covers_identifiers_texts_and_order():
    both = Documents.of(["a bc", "ab c"])
    digests = {each.digest() for each in (both[:1], both[1:], both, both[::-1], both[:0])}
    assert len(digests) == 5
    assert both.digest() == both[:].digest()
    texts = [str(random.Random(3).random()), "x", "y"]
    assert Documents.of(texts).digest() == Documents.of(texts[::-1]).digest()


def test_conversations_that_differ_in_more_than_their_text_all_stay() -> None:
    """Several traces of one question are not duplicates; the split has them on one side."""

    def trace(thought: str) -> Conversation:
        answer = {"role": "assistant", "content": "42", "reasoning_content": thought}
        return Conversation(({"role": "user", "content": "What is 6*7?"}, answer))

    texts = [trace("40+2"), trace("6*7"), trace(" 40+2\n"), "a text"]
    held = Documents.of(texts)
    assert held == Documents.of(texts[::-1])
    assert len(held) == 3 and held.num_duplicates == 1
    assert len({each.identifier for each in held}) == 3 and len({*held.keys()}) == 2
    assert held.num_shared(Documents.of(texts[:1])) == 1


def test_shared_documents_are_counted_by_their_words() -> None:
    one, two = Documents.of(["a b", "c", "d"]), Documents.of(["d", "e", "a\n b"])
    assert (one.num_shared(two), two.num_shared(one)) == (2, 2)
    assert one.num_shared(Documents.of(["e"])) == 0
    assert one[:1].num_shared(one[1:]) == 0
