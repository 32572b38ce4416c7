"""Readers of local files: valid content, and refusals with file and line."""

import gzip
import io
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from tests.hostile.values import parquet_bomb
from tritter.data import local_files
from tritter.data.local_files import (
    ByteLimitError,
    Reading,
    TextFileError,
    parquet_records,
    text_suffix,
)
from tritter.data.records import WrongRecordError

ALPACA = {"instruction": "Add.", "input": "1 and 2", "output": "3"}
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello\n"}]
RECORDS: list[tuple[object, str]] = [
    ("plain", "plain"),
    ({"text": "field", "prompt": "not", "completion": "this"}, "field"),
    (ALPACA, "Add.\n\n1 and 2\n\n3"),
    (ALPACA | {"input": ""}, "Add.\n\n3"),
    (ALPACA | {"input": None, "id": 7}, "Add.\n\n3"),
    ({"instruction": "Add.", "context": "1 and 2", "response": "3"}, "Add.\n\n1 and 2\n\n3"),
    ({"prompt": "Once", "completion": "upon"}, "Once\n\nupon"),
    ({"prompt": "Once", "answer": "upon", "loss": 0.3}, "Once\n\nupon"),
    ({"question": "Why?", "answer": "So."}, "Why?\n\nSo."),
    ({"messages": CHAT}, "user: Hi\n\nassistant: Hello"),
]
WRONG: list[tuple[str, str]] = [
    ("[1]", "is a list; must be a JSON object"),
    ("3", "is a number; must"),
    ("null", "is null; must"),
    ("{", "is not valid JSON (Expecting property name"),
    ('{"text": NaN}', "is not valid JSON (NaN is not a JSON number"),
    ('{"text": "a\\ud800b"}', "contains an unpaired surrogate (\\ud800)"),
    ('{"messages": [{"role": "user", "content": "\\udc00"}]}', "an unpaired surrogate"),
    ('{"text": "a", "weight": 0}', "is excluded from training (weight: 0)"),
    ('{"text": "a", "train": false}', "is excluded from training (train: false)"),
    ('{"text": "a", "weight": 0.5}', "weight: is 0.5; accepted are 0, 1"),
    ('{"text": null}', "data.text_field = text: is null, not a string"),
    ('{"text": ["a"]}', "is a list, not a string"),
    ('{"text": "a", "text": "b"}', "the field text is repeated"),
    ('{"id": 1, "content": "a"}', "available: id, content. Did you mean data.text_field=content?"),
    ("{}", "has no field text (data.text_field = text); available: none."),
    ('{"instruction": "a", "output": 3}', "output: is a number, not a string"),
    ('{"instruction": "a", "input": 3, "output": "b"}', "input: is a number"),
    ('{"messages": {}}', "messages: is an object; must be a list of messages"),
    ('{"messages": [{"role": "user"}]}', "messages: number 1 is not a message"),
    ('{"messages": [{"role": "user", "content": []}]}', "number 1, content: is a list"),
    ('{"n": ' + "9" * 5000 + "}", "is not valid JSON (Exceeds the limit"),
    ("[" * 100_000, "is nested too deeply"),
    ('{"' + "k" * 100_000 + '": 1}', "available: " + "k" * 40 + "..."),
    ('{"\\u001b[2J\\n": 1}', r"available: \x1b[2J\n."),
]


def texts_of(path: Path, *, field: str = "text") -> list[str]:
    reading = Reading(key="data.new", text_field=field)
    is_whole = (
        path.name.lower()
        .removesuffix(".gz")
        .endswith((".txt", ".md", ".rst", ".tex", ".py", ".h", ".r"))
    )
    found = list(map(str, reading.pieces(path) if is_whole else reading.texts(path)))
    if reading.problems:
        raise TextFileError(reading.problems)
    return found


def skipping(path: Path, *, field: str = "text") -> tuple[list[str], list[str]]:
    """Return the texts and notes of a file without fatal problems."""
    reading = Reading(key="data.new", text_field=field)
    found = list(reading.texts(path))
    assert not reading.problems
    return found, reading.notes


def problem(path: Path, *, field: str = "text") -> str:
    with pytest.raises(TextFileError) as caught:
        texts_of(path, field=field)
    (line,) = caught.value.problems
    assert line.startswith(f"data.new: {path}")
    assert len(line) < 1000 and "\n" not in line
    return line


def packed(path: Path, content: bytes) -> Path:
    path.write_bytes(gzip.compress(content) if path.name.endswith(".gz") else content)
    return path


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize("suffix", [".txt", ".md", ".rst", ".TXT", ".tex", ".py", ".h", ".R"])
def test_a_file_of_one_text(tmp_path: Path, suffix: str, ending: str) -> None:
    path = packed(tmp_path / f"a.b{suffix}{ending}", "# Zwölf\r\n\r\n猫\n".encode())
    assert texts_of(path) == ["# Zwölf\r\n\r\n猫\n"]


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".json", ".json.gz"])
def test_records_of_every_form(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a{ending}"
    records = [record for record, _ in RECORDS]
    is_array = ".json" in path.suffixes
    content = json.dumps(records) if is_array else "\r\n\n".join(map(json.dumps, records))
    packed(path, f"\ufeff{content}\n".encode())
    assert texts_of(path) == [text for _, text in RECORDS]


def test_forms_are_for_the_field_that_was_not_chosen(tmp_path: Path) -> None:
    path = packed(tmp_path / "a.jsonl", json.dumps(ALPACA).encode())
    assert texts_of(path, field="output") == ["3"]
    assert "has no field body (data.text_field = body); available: instruction" in problem(
        path, field="body"
    )


def test_skipped_records_are_counted_by_reason(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    roles = [{"messages": [*turns[:at], {"role": "critic", "content": "c"}]} for at in (1, 2, 2)]
    lines = [*map(json.dumps, [{"messages": turns}, *roles, {"messages": 3}]), "{"]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    reading = Reading(key="data.new")
    assert len(list(reading.texts(tmp_path / "a.jsonl"))) == 1
    (note,) = reading.notes
    assert note.startswith("Skipped 5 of 6 records")
    for part in ("3: data.new: ", "line 2 messages: number 2 has the role 'critic'", "1: data.new"):
        assert part in note.partition("By reason: ")[2]


def test_messages_beside_a_text_are_noted(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    record = json.dumps({"text": "one", "messages": turns})
    (tmp_path / "a.jsonl").write_text(f"{record}\n{record}\n")
    (tmp_path / "b.csv").write_text("text,messages\none,[]\n")
    for name in ("a.jsonl", "b.csv"):
        reading = Reading(key="data.new")
        assert set(reading.texts(tmp_path / name)) == {"one"}
        (note,) = reading.notes
        assert "text and messages; text is read (data.text_field=messages reads" in note
    (tmp_path / "c.jsonl").write_text('{"text": "one", "instruction": "a", "output": "b"}')
    reading = Reading(key="data.new")
    assert list(reading.texts(tmp_path / "c.jsonl")) == ["one"]
    assert "text and instruction, output; text is read" in reading.notes[0]
    reading = Reading(key="data.new", text_field="messages")
    found = list(reading.texts(tmp_path / "a.jsonl"))
    assert [str(each) for each in found] == ["user: a\n\nassistant: b"] * 2
    assert not reading.notes


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.parquet"])
def test_named_messages_may_be_json_in_a_string(tmp_path: Path, name: str) -> None:
    turns = json.dumps(CHAT)
    if name == "a.csv":
        (tmp_path / name).write_text('text,messages\none,"' + turns.replace('"', '""') + '"\n')
    elif name == "a.jsonl":
        (tmp_path / name).write_text(json.dumps({"text": "one", "messages": turns}))
    else:
        parquet.write_table(pa.table({"text": ["one"], "messages": [turns]}), tmp_path / name)
    reading = Reading(key="data.new", text_field="messages")
    assert [*map(str, reading.texts(tmp_path / name))] == ["user: Hi\n\nassistant: Hello"]


def test_a_row_of_parquet_that_is_not_utf8_is_skipped(tmp_path: Path) -> None:
    words = pa.array([b"one", b"caf\xe9", b"three"], pa.binary()).view(pa.string())
    parquet.write_table(pa.table({"text": words}), tmp_path / "a.parquet")
    found, (note,) = skipping(tmp_path / "a.parquet")
    assert found == ["one", "three"]
    assert "Skipped 1 of 3 records" in note and "a.parquet, row 2 is not UTF-8" in note


def test_a_second_conversation_of_a_record_is_noted(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    unread = {
        "conversations": {"conversations": turns[:1]},
        "instruction, output": {"instruction": "c", "output": "d"},
    }
    for names, fields in unread.items():
        (tmp_path / "a.jsonl").write_text(json.dumps({"messages": turns, **fields}))
        reading = Reading(key="data.new")
        assert [*map(str, reading.texts(tmp_path / "a.jsonl"))] == ["user: a\n\nassistant: b"]
        (note,) = reading.notes
        assert f"records have messages and {names}; messages is read" in note
    (tmp_path / "b.jsonl").write_text(json.dumps({"messages": turns, "prompt": "a"}))
    reading = Reading(key="data.new")
    assert [*reading.texts(tmp_path / "b.jsonl")] and not reading.notes


def test_excluded_texts_of_tables_are_skipped_and_counted(tmp_path: Path) -> None:
    rows = [{"text": f"row {n}", "weight": int(n != 2), "train": n != 1} for n in range(4)]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    csv = "text,weight,train\nrow 0,1,true\nrow 1,,false\nrow 2,0,\nrow 3,,\n"
    (tmp_path / "a.csv").write_text(csv)
    for name in ("a.parquet", "a.csv"):
        found, (note,) = skipping(tmp_path / name)
        assert found == ["row 0", "row 3"]
        assert "Skipped 2 of 4" in note and "(weight: " in note and "(train: " in note


@pytest.mark.parametrize("sign", [";", "\t", "|"])
def test_another_separator_is_named(tmp_path: Path, sign: str) -> None:
    (tmp_path / "a.csv").write_text(f"id{sign}text\n1{sign}a\n")
    found = problem(tmp_path / "a.csv")
    assert f"separated by commas, not by {sign!r}" in found and "Did you mean" not in found


@pytest.mark.parametrize(("record", "expected"), WRONG)
def test_a_wrong_record_is_skipped_and_a_file_of_them_refused(
    tmp_path: Path, record: str, expected: str
) -> None:
    path = packed(tmp_path / "a.jsonl", f'"one"\n{record}\n"three"\n'.encode())
    found, (note,) = skipping(path)
    assert found == ["one", "three"]
    assert note.startswith("Skipped 1 of 3 records; the first: data.new: ")
    assert f"{path}, line 2 " in note and expected in note
    assert len(note) < 1000 and "\n" not in note
    alone = packed(tmp_path / "b.jsonl", f"{record}\n".encode())
    assert f"{alone}, line 1 " in problem(alone) and expected in problem(alone)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("[3]", "a.json, record 1 is a number; must be a JSON object"),
        ('{"text": "a"}', "is an object; must be an array of records or texts"),
        ("", "is not an array"),
        ('["a"', "is not valid JSON (Expecting ',' or ']'"),
        ('["a",]', "is not valid JSON (Expecting value"),
        ('["a" "b"]', "is not valid JSON (Expecting ',' or ']'"),
        ('["a"] x', "extra data after the array, at 6"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_a_wrong_array(tmp_path: Path, content: str, expected: str) -> None:
    assert expected in problem(packed(tmp_path / "a.json", content.encode()))


def test_an_array_is_parsed_record_by_record(tmp_path: Path) -> None:
    """All records at once would need several times the memory of their text."""
    records = Reading(key="").records(packed(tmp_path / "a.json", b'[{"text": "a"}, }'))
    assert next(records)[1] == {"text": "a"}
    with pytest.raises(WrongRecordError, match="Expecting value"):
        next(records)


def test_an_empty_array_holds_no_text(tmp_path: Path) -> None:
    assert texts_of(packed(tmp_path / "a.json", b" [ ] \n")) == []


@pytest.mark.parametrize(
    ("encoding", "named"),
    [("utf-16", "UTF-16"), ("utf-16-le", "UTF-16LE"), ("utf-16-be", "UTF-16BE"),
     ("utf-32", "UTF-32"), ("utf-32-be", "UTF-32BE")],
)  # fmt: skip
@pytest.mark.parametrize("ending", [".txt", ".jsonl", ".json", ".md.gz"])
def test_another_encoding_is_named(tmp_path: Path, encoding: str, named: str, ending: str) -> None:
    path = packed(tmp_path / f"a{ending}", '["text"]\n'.encode(encoding))
    assert f"appears to be {named}, not UTF-8; convert it" in problem(path)
    assert f"iconv -f {named} -t UTF-8" in problem(path)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", b"caf\xe9", "is not UTF-8 (byte 3 is 0xe9)"),
        ("a.jsonl", b'\n"\xe9"\n', "line 2 is not UTF-8 (byte 1 is 0xe9)"),
        ("a.txt", b"\xed\xa0\x80", "is not UTF-8"),
        ("a.txt", b"text\0", "is not text: it has a zero byte at offset 4"),
        ("a.txt", bytes(5000), "is not text: it has a zero byte at offset 0"),
        ("a.txt.gz", b"no gzip", "Not a gzipped file"),
        ("a.txt.gz", gzip.compress(b"abc" * 999, mtime=0)[:-9], "ended before"),
        ("a.jsonl.gz", gzip.compress(b'"a"\n' * 999, mtime=0)[:30] + b"\xff" * 30, "cannot"),
    ],
)
def test_damaged_files(tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert expected in problem(path)


def test_a_problem_of_all_records_is_printed_once(tmp_path: Path) -> None:
    path = packed(tmp_path / "a.jsonl", b'{"body": "a"}\n' * 40)
    with pytest.raises(TextFileError) as caught:
        texts_of(path)
    first, others = caught.value.problems
    assert "line 1 has no field text" in str(first) and "39 more records" in str(others)


def test_no_more_than_a_few_lines_of_one_file(tmp_path: Path) -> None:
    path = packed(tmp_path / "a.jsonl", b"3\nnull\n" * 500)
    with pytest.raises(TextFileError) as caught:
        texts_of(path)
    assert len(caught.value.problems) == 11
    assert caught.value.problems[-1] == f"data.new: {path} has 990 more invalid records."
    many = TextFileError([f"line {number}" for number in range(1000)])
    assert "1000 problems" in str(many) and str(many).endswith("  and 900 more")


def bomb(size: int) -> bytes:
    """Return a gzip file of `size` letters, written in pieces."""
    file = io.BytesIO()
    with gzip.GzipFile(fileobj=file, mode="wb", compresslevel=9) as writer:
        for _ in range(size // 2**20):
            writer.write(b"a" * 2**20)
    return file.getvalue()


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.gz"])
def test_what_unpacks_to_too_much_is_refused_on_the_way(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_files, "_FREE_EXPANSION_BYTES", 2**20)
    (tmp_path / name).write_bytes(bomb(8 * 2**20))
    assert "decompresses to more than 1 MB; the limit is 1 MB or 200" in problem(tmp_path / name)


@pytest.mark.full
@pytest.mark.parametrize("row", [{"text": ""}, {"text": "", "more": [""]}, {"text": [""]}], ids=str)
def test_a_parquet_bomb_is_refused_in_little_memory(tmp_path: Path, row: dict[str, object]) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(parquet_bomb(row))  # 20 GB
    assert path.stat().st_size < 5000
    done = _read_in_a_process(path)
    assert done.stdout.count("decompresses to more than 64 MB") == 2, done
    assert int(done.stdout.split()[-1]) < 600  # MB


@pytest.mark.full
@pytest.mark.parametrize("kind", [pa.string(), pa.binary(2**20)], ids=str)
def test_a_row_with_a_list_of_equal_values_is_refused_in_little_memory(
    tmp_path: Path, kind: pa.DataType
) -> None:
    values = pa.array([b"a" * 2**20], pa.binary(2**20)).cast(kind).take(pa.array([0] * 1500))
    lists = pa.ListArray.from_arrays(pa.array([0, 1500], pa.int32()), values)  # 1.5 GB
    parquet.write_table(
        pa.table({"text": ["a"], "more": lists}), tmp_path / "a.parquet", compression="zstd",
        use_dictionary=False if kind == pa.string() else ["more.list.element"],
        column_encoding={"more.list.element": "DELTA_BYTE_ARRAY"} if kind == pa.string() else None,
    )  # fmt: skip
    assert (tmp_path / "a.parquet").stat().st_size < 2**20
    done = _read_in_a_process(tmp_path / "a.parquet")
    assert done.stdout.count("decompresses to more than 64 MB") == 2, done
    assert int(done.stdout.split()[-1]) < 600  # MB


def _read_in_a_process(path: Path) -> subprocess.CompletedProcess[str]:
    """Read a file; print its problems, and the peak of memory in MB."""
    program = (
        "import re, sys\nfrom pathlib import Path\n"
        "from tritter.data.local_files import *\n"
        "reading = Reading(key='k', text_field='text')\n"
        "assert sum(1 for _ in reading.texts(Path(sys.argv[1]))) < 4\n"
        "try: check_sizes(Path(sys.argv[1]))\nexcept WrongRecordError as error: print(error)\n"
        # Not ru_maxrss, which begins with that of the process that forked
        "peak = re.search(r'VmHWM:\\s+(\\d+) kB', Path('/proc/self/status').read_text())\n"
        "print(*reading.problems, int(peak[1]) // 1024)\n"
    )
    return subprocess.run(
        [sys.executable, "-c", program, str(path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("limit", [2**20, 100])  # texts beyond it are not in the dictionary
def test_records_of_parquet_are_what_pyarrow_reads(tmp_path: Path, limit: int) -> None:
    words = [None, "", *(f"ä{number}" * 50 for number in range(10))] * 65
    lists = [None, [], ["a", None, "ä"], *(["b", f"c{number}"] for number in range(7))] * 78
    table = pa.table(
        {
            "text": words,
            "large": pa.array(words, pa.large_string()),
            "same": pa.array(words).dictionary_encode(),
            "bytes": pa.array([word and word.encode() for word in words]),
            "fixed": pa.array([b"a" * 16, None] * 390, pa.binary(16)),
            "near": [f"{number:09}" for number in range(780)],
            "number": [None, 1] * 390,
            "list": lists,
            "deep": [{"a": [{"b": "c"}], "n": 1.5}, None] * 390,
            "map": pa.array([[("a", "b")], []] * 390, pa.map_(pa.string(), pa.string())),
        }
    )
    parquet.write_table(
        table,
        tmp_path / "a.parquet",
        row_group_size=500,
        dictionary_pagesize_limit=limit,
        use_dictionary=[name for name in table.column_names if name != "near"],
        column_encoding={"near": "DELTA_BYTE_ARRAY"},
    )
    expected = parquet.read_table(tmp_path / "a.parquet").to_pylist()
    sizes: list[int] = []
    assert list(parquet_records(tmp_path / "a.parquet", count=sizes.append)) == expected
    assert sum(sizes) > sum(len(word or "") for word in words) * 4


def test_free_expansion_is_not_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(bomb(8 * 2**20))
    assert sum(map(len, texts_of(tmp_path / "a.txt.gz"))) == 8 * 2**20


def test_sizes_are_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_files, "_MAX_LINE_BYTES", 1000)
    monkeypatch.setattr(local_files, "_MAX_ARRAY_BYTES", 5000)
    long = json.dumps("a" * 6000)
    path = packed(tmp_path / "a.jsonl", f'"one"\n{long}\n"three"\n'.encode())
    found, (note,) = skipping(path)
    assert f"{path}, line 2 exceeds the limit of 0 MB per line" in note and found == [
        "one",
        "three",
    ]
    assert "exceeds the limit of 0 MB" in problem(packed(tmp_path / "a.json", f"[{long}]".encode()))


def test_reading_ends_with_what_was_to_be_read(tmp_path: Path) -> None:
    path = packed(tmp_path / "a.jsonl", b'"a"\n' * 1000)
    reading = Reading(key="data.new", text_field="text", max_bytes=100)
    with pytest.raises(ByteLimitError):
        list(reading.texts(path))
    assert reading.num_bytes <= 104


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (os.mkfifo, "it is a pipe, not a file"),
        (_socket, "it is a socket, not a file"),
        (lambda path: path.symlink_to("/dev/zero"), "it is a device, not a file"),
        (lambda path: path.mkdir(), "it is a folder, not a file"),
        (lambda path: path.symlink_to(path), "symbolic links"),
        (lambda path: None, "there is no such file"),
    ],
)
@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".json.gz", ".md"])
def test_only_files_are_opened(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make: Callable[[Path], None],
    expected: str,
    suffix: str,
) -> None:
    monkeypatch.chdir(tmp_path)  # the path of a socket may not be long
    path = Path(f"a{suffix}")
    make(path)
    assert expected in problem(path)


def test_parquet(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    parquet.write_table(arrow.table({"text": ["déjà", "猫"], "id": [1, 2]}), path)
    assert texts_of(path) == ["déjà", "猫"]
    assert "has no field body" in problem(path, field="body")
    with pytest.raises(TextFileError, match=r"row 1 .*is a number"):
        texts_of(path, field="id")
    parquet.write_table(arrow.table({name: [text] for name, text in ALPACA.items()}), path)
    assert texts_of(path) == ["Add.\n\n1 and 2\n\n3"]
    parquet.write_table(arrow.table({"messages": [CHAT]}), path)
    assert texts_of(path) == ["user: Hi\n\nassistant: Hello"]
    path.write_bytes(b"no parquet")
    assert "not a parquet file" in problem(path)


def test_other_endings_are_none() -> None:
    assert text_suffix(Path("a.JSONL.gz")) == ".jsonl.gz"
    for name in ("a.tsv", "a.parquet.gz", "txt", "a.gz", "a"):
        assert text_suffix(Path(name)) == ""


@pytest.mark.parametrize("ending", [".csv", ".csv.gz"])
def test_a_table(tmp_path: Path, ending: str) -> None:
    path = packed(tmp_path / f"a{ending}", b'\xef\xbb\xbfid,text\n1,"a, ""b""\nc"\n2,\n')
    assert texts_of(path) == ['a, "b"\nc', ""]
    assert texts_of(path, field="id") == ["1", "2"]
    assert "has no field txet" in problem(path, field="txet")
    assert "Did you mean data.text_field=text?" in problem(path, field="txet")
    packed(path, b"instruction,input,output\nAdd.,1,2\n")
    assert texts_of(path) == ["Add.\n\n1\n\n2"]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (b"1", "line 3 data.text_field = text: is null, not a string"),
        (b"1,\xe9", "line 3 is not UTF-8 (byte 0 is 0xe9)"),
        (b'1,"a"b', "line 3 ',' expected after '\"'"),
        (b"1," + b"a" * 2000, "line 3 exceeds the limit of 0 MB per line"),
    ],
)
def test_a_wrong_row_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row: bytes, expected: str
) -> None:
    monkeypatch.setattr(local_files, "_MAX_LINE_BYTES", 1000)
    path = packed(tmp_path / "a.csv", b"id,text\n0,one\n" + row + b"\n2,three\n")
    found, (note,) = skipping(path)
    assert found == ["one", "three"] and expected in note
    assert "is not a valid CSV table" in problem(packed(path, b'"a"b\n'))


def test_a_row_with_more_values_than_columns_is_not_cut(tmp_path: Path) -> None:
    """Such as a text with a comma and without quotes."""
    path = tmp_path / "a.csv"
    path.write_text('n,text\n0,one, two\n1,"one, two"\n2,three,\n')
    reading = Reading(key="data.new")
    assert list(reading.texts(path)) == ["one, two", "three"]
    assert "line 2 has 3 values for 2 columns" in reading.notes[0]
    path.write_text("text,text\none,two\n")
    reading = Reading(key="data.new")
    assert not list(reading.texts(path)) and "repeats the column text" in reading.problems[0]
