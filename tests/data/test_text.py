"""Texts of files: all formats, and the messages of refusals."""

import gzip
import json
from pathlib import Path

import pytest

from tritter.data.documents import pieces
from tritter.data.local_files import Reading, TextFileError
from tritter.data.sources import TextRequest

TEXTS = ["déjà vu\n\nagain\n", "猫\r\n\r\nneko", 'a "quoted" line']


def read(*files: Path, field: str = "text"):
    return list(Reading(key="data.new", text_field=field).pieces_of(files))


def jsonl(texts, field="text") -> str:
    return "".join(json.dumps({"id": 1, field: text}) + "\n" for text in texts)


def test_a_text_file_is_a_document(tmp_path):
    for number, text in enumerate(TEXTS):
        (tmp_path / f"{number}.txt").write_bytes(text.encode())
        (tmp_path / f"{number}.txt.gz").write_bytes(gzip.compress(text.encode()))
    for ending in ("txt", "txt.gz"):
        paths = [tmp_path / f"{number}.{ending}" for number in range(3)]
        assert read(*paths) == [piece for text in TEXTS for piece in pieces(text)]


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfabc")
    assert read(tmp_path / "a.txt") == ["abc"]


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "JSONL"])
def test_a_record_is_a_document(tmp_path, ending):
    content = ("\n" + jsonl([*TEXTS, "  "], "body") + "\n").encode()
    path = tmp_path / f"a.{ending}"
    path.write_bytes(gzip.compress(content) if ending.endswith("gz") else content)
    assert read(path, field="body") == [piece for text in TEXTS for piece in pieces(text)]


def test_half_of_a_character_is_skipped_as_text_that_is_not_utf_8(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud800b"}\n{"text": "c"}\n')
    assert read(tmp_path / "a.jsonl") == ["c"]


def test_what_is_wrong_is_listed_whole(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    (tmp_path / "b.jsonl").write_text('\n{"id": 1}\n[1]\n')
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
    assert str(caught.value).startswith("the data has 4 problems:\n  data.new: ")


def test_blank_files_hold_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b" \n\n ")
    (tmp_path / "b.txt").write_bytes(b"")
    with pytest.raises(TextFileError, match=r"data.new: .*a.txt, .*b.txt contain no text"):
        read(tmp_path / "a.txt", tmp_path / "b.txt")
    (tmp_path / "c.md").write_text("text")
    assert read(*(tmp_path / name for name in ("a.txt", "b.txt", "c.md"))) == ["text"]


@pytest.mark.parametrize(
    ("texts", "problem"),
    [
        ("letters", "returns a string; it must yield strings"),
        (None, "raises TypeError: 'NoneType' object is not iterable"),
        (["a", b"b"], "yields a bytes; it must yield strings"),
    ],
)
def test_a_source_that_yields_anything_else_is_named(texts, problem):
    with pytest.raises(TextFileError) as error:
        TextRequest([], key="data.new.mine", text_field="text", texts=lambda: texts).documents()
    assert f"data.new.mine: texts() {problem}" in str(error.value)
