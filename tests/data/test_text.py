"""Files into documents: every format, what is cut, what is refused and in which words."""

import gzip
import json
import sys
from pathlib import Path

import pytest

from tritter.data.text import CUT_FROM_BYTES, PIECE_CHARACTERS, cut, read_documents
from tritter.errors import RequestError

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


REFUSED = {
    "a.txt": (b"caf\xe9", ("a.txt is no UTF-8", "byte 3 is 0xe9", "iconv")),
    "b.txt": (b" \n\n ", ("b.txt hold no text",)),
    "c.jsonl": (b'{"text": "a"}\n{"text": \n', ("c.jsonl, line 2 is no JSON",)),
    "d.jsonl": (b"[1]\n", ("d.jsonl, line 1 is no JSON object",)),
    "e.jsonl": (b'{"id": 1, "content": "a"}', ("data.text_field = text", "id, content",
                                                "Did you mean data.text_field=content?")),
    "f.jsonl": (b'{"id": 1}', ("it has id.",)),
    "g.jsonl": (b'{"text": null}', ("line 1", "holds NoneType, no text")),
    "h.txt.gz": (b"no gzip", ("h.txt.gz can't be read",)),
    "i.txt.gz": (gzip.compress(b"abc" * 999)[:-9], ("i.txt.gz can't be read",)),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_file_and_reason(tmp_path, name):
    content, parts = REFUSED[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RequestError) as caught:
        read(tmp_path / name)
    for part in (*parts, "data.new"):
        assert part in str(caught.value)


def test_a_file_that_is_gone_is_refused(tmp_path):
    with pytest.raises(RequestError, match=r"gone.txt can't be read"):
        read(tmp_path / "gone.txt")


def test_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(RequestError, match=r"pip install 'tritter\[data\]'"):
        read(tmp_path / "a.parquet")


def test_parquet(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    parquet.write_table(arrow.table({"text": TEXTS, "id": [1, 2, 3]}), path)
    assert [document.text for document in read(path)] == TEXTS
    with pytest.raises(RequestError, match=r"no such field; it has text, id. Did you mean .*text"):
        read(path, field="body")
    with pytest.raises(RequestError, match=r"row 1 .* holds int"):
        read(path, field="id")
    path.write_bytes(b"no parquet")
    with pytest.raises(RequestError, match="no parquet file"):
        read(path)
