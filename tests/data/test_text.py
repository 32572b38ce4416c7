"""Files into documents: every format, what is cut, what is refused and in which words."""

import gzip
import json
from pathlib import Path

import pytest

from tritter.data.readers import TextFileError
from tritter.data.text import CUT_FROM_BYTES, PIECE_CHARACTERS, cut, read_documents

TEXTS = ["déjà vu\n\nagain\n", "猫\r\n\r\nneko", 'a "quoted" line']


def read(*files: Path, field: str = "text"):
    return read_documents(files, key="data.new", text_field=field)


def jsonl(texts, field="text") -> str:
    return "".join(json.dumps({"id": 1, field: text}) + "\n" for text in texts)


def test_a_text_file_is_a_document(tmp_path):
    for number, text in enumerate(TEXTS):
        (tmp_path / f"{number}.txt").write_bytes(text.encode())
        (tmp_path / f"{number}.txt.gz").write_bytes(gzip.compress(text.encode()))
    for ending in ("txt", "txt.gz"):
        found = read(*(tmp_path / f"{number}.{ending}" for number in range(3)))
        assert [document.text for document in found] == TEXTS
        assert len({document.identifier for document in found}) == 3


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfabc")
    assert read(tmp_path / "a.txt")[0].text == "abc"


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "JSONL"])
def test_a_record_is_a_document(tmp_path, ending):
    content = ("\n" + jsonl([*TEXTS, "  "], "body") + "\n").encode()
    path = tmp_path / f"a.{ending}"
    path.write_bytes(gzip.compress(content) if ending.endswith("gz") else content)
    assert [document.text for document in read(path, field="body")] == TEXTS


def test_an_unpaired_surrogate_can_be_encoded(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud800b"}\n')
    assert read(tmp_path / "a.jsonl")[0].text == "a?b"


def test_names_depend_on_content_and_not_on_place(tmp_path):
    (tmp_path / "a.jsonl").write_text(jsonl(TEXTS))
    before = {document.identifier for document in read(tmp_path / "a.jsonl")}
    (tmp_path / "b").mkdir()
    (tmp_path / "b/a.jsonl").write_text(jsonl(["first", *reversed(TEXTS)]))
    after = {document.identifier for document in read(tmp_path / "b/a.jsonl")}
    assert before < after and len(after) == len(before) + 1


def long_text(size: int) -> str:
    paragraphs = [f"paragraph {number} " + "word " * (number % 90) for number in range(size // 100)]
    return "\n\n".join(paragraphs)


def test_a_long_file_is_cut_at_blank_lines(tmp_path):
    text = long_text(3 * CUT_FROM_BYTES)
    assert len(text) > CUT_FROM_BYTES
    for number in range(30):  # enough documents: the others stay whole
        (tmp_path / f"short-{number}.txt").write_text(f"{number} " + long_text(60_000))
    (tmp_path / "long.txt").write_text(text)
    documents = read(*sorted(tmp_path.iterdir()))
    pieces = [each.text for each in documents if each.identifier.startswith("long")]
    assert "".join(pieces) == text
    assert len(documents) == len(pieces) + 30
    assert len(pieces) > 20
    assert all(piece.endswith("\n\n") for piece in pieces[:-1])
    assert all(PIECE_CHARACTERS <= len(piece) <= 2 * PIECE_CHARACTERS for piece in pieces[:-1])


def test_a_domain_of_few_documents_is_cut_too(tmp_path):
    text = long_text(600_000)
    (tmp_path / "book.txt").write_text(text)
    (tmp_path / "record.jsonl").write_text(jsonl([text]))
    assert len(read(tmp_path / "book.txt")) > 10
    assert len(read(tmp_path / "record.jsonl")) == 1


@pytest.mark.parametrize("text", ["a\n" * 500, "a " * 500, "a" * 1000, "", "é" * 1000])
def test_pieces_are_the_text_whatever_it_is_made_of(text):
    pieces = list(cut(text, size=100))
    assert "".join(pieces) == text
    assert all(len(piece) <= 200 for piece in pieces)


def test_what_is_wrong_is_listed_whole(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    (tmp_path / "b.jsonl").write_text('{"text": "a"}\n{"id": 1}\n[1]\n')
    with pytest.raises(TextFileError) as caught:
        read(tmp_path / "a.txt", tmp_path / "b.jsonl", tmp_path / "gone.md")
    assert [
        line.split(str(tmp_path))[1][:20].split(" is")[0] for line in caught.value.problems
    ] == [
        "/a.txt",
        "/b.jsonl, line 2 has",
        "/b.jsonl, line 3",
        "/gone.md cannot be r",
    ]
    assert str(caught.value).startswith("4 things are wrong with the text:\n  data.new: ")


def test_blank_files_hold_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b" \n\n ")
    (tmp_path / "b.txt").write_bytes(b"")
    with pytest.raises(TextFileError, match=r"data.new: .*a.txt, .*b.txt hold no text"):
        read(tmp_path / "a.txt", tmp_path / "b.txt")
    (tmp_path / "c.md").write_text("text")
    assert len(read(*(tmp_path / name for name in ("a.txt", "b.txt", "c.md")))) == 1
