"""Data sets: names, splits, columns and rows; saved, from files and from a hub."""

import gzip
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import datasets
import pytest

from tests.data.hub import COMMIT, serve_hub
from tests.hostile.values import parquet_bomb
from tritter.data import local_files
from tritter.data.datasets import (
    DatasetName,
)
from tritter.data.local_files import Reading, TextFileError
from tritter.data.sources import TextRequest
from tritter.errors import RequestError

ROWS = {"body": ["a", "b", "c"], "length": [1, 2, 3]}


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path


def save(name: str, **splits: dict[str, list[object]]) -> None:
    parts = {split: datasets.Dataset.from_dict(rows) for split, rows in splits.items()}
    (parts["alone"] if "alone" in parts else datasets.DatasetDict(parts)).save_to_disk(name)


def texts(word: str) -> list[str]:
    return read(word)[0]


def read(word: str) -> tuple[list[str], Reading]:
    """Return the texts of a data set and its reading."""
    reading = Reading(key="data.new", text_field="text")
    rows = DatasetName.named("data.new", word).texts(reading, is_streamed=False)
    found = list(map(str, rows))
    if reading.problems:
        raise TextFileError(reading.problems)
    return found, reading


def problem(word: str) -> str:
    with pytest.raises(TextFileError) as caught:
        texts(word)
    return str(caught.value).replace(str(Path.cwd()), "@")


def lines(name: str, records: Iterable[object]) -> None:
    Path(name).write_text("".join(json.dumps(record) + "\n" for record in records))


# Names


@pytest.mark.parametrize(
    ("word", "parts"),
    [
        ("hf:me/stories", {}),
        ("hf:me/stories/main", {"config": "main"}),
        ("hf:me/stories/2022.en:test", {"config": "2022.en", "split": "test"}),
        ("hf:me/stories#my text", {"column": "my text"}),
        ("hf:me/stories[5:]", {"rows": (5, None)}),
        ("hf:me/stories:train[2:9]#a", {"split": "train", "rows": (2, 9), "column": "a"}),
        (f"hf:me/stories@{COMMIT}/main:train[:9]",
         {"revision": COMMIT, "config": "main", "split": "train", "rows": (0, 9)}),
    ],
)  # fmt: skip
def test_names_of_the_hub(word: str, parts: dict[str, object]) -> None:
    name = DatasetName.named("data.new", word)
    assert name == DatasetName(name="me/stories", **parts)  # type: ignore[arg-type]
    assert str(name) == word and not name.is_on_disk


def test_names_on_disk(place: Path) -> None:
    (place / "a:b#c").mkdir()
    (place / "a").mkdir()
    for word in ("a", "./a", "hf:./a", f"hf:{place}/a", str(place / "a")):
        assert DatasetName.named("data.new", word) == DatasetName(name=f"{place}/a")
        part = DatasetName.named("data.new", f"{word}:b[1:]#c")
        assert part == DatasetName(name=f"{place}/a", split="b", rows=(1, None), column="c")
        assert DatasetName.named("data.new", str(part)) == part
    assert DatasetName.named("data.new", "a:b#c").name == f"{place}/a:b#c"


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("hf:stories", "the format is hf:OWNER/NAME[@REVISION]"),
        ("hf:me/stories:train[:10%]", "FROM and TO count rows"),
        ("hf:me/stories[5:5]", "rows 5 to 5 (exclusive) are an empty range"),
        ("savd", "there is no such file or folder. Did you mean 'saved'?"),
        ("saved/empty/a.csv", "there is no such file or folder."),
        ("me/stories", "not a folder either; for a data set of the hub, write hf:me/stories"),
        ("saved/a.pdf", "data=hf reads .json, .jsonl, .csv"),
        ("load.py", "Tritter never runs the script of a data set"),
        ("saved/scripted", "Tritter never runs the script of a data set"),
    ],
)
def test_names_that_are_refused(place: Path, word: str, expected: str) -> None:
    (place / "saved/scripted").mkdir(parents=True)
    (place / "saved/empty").mkdir()
    for name in ("load.py", "saved/a.pdf", "saved/scripted/scripted.py"):
        (place / name).touch()
    with pytest.raises(RequestError) as caught:
        DatasetName.named("data.new", word).check_on_disk("data.new", word)
    assert expected in str(caught.value) and f"data.new = {word}" in str(caught.value)


# Rows


def test_saved_data_sets() -> None:
    save("alone", alone=ROWS)
    save("split", train=ROWS, test={"body": ["d"], "length": [4]})
    assert texts("alone") == texts("split") == texts("split#body") == ["a", "b", "c"]
    assert texts("split:test") == texts("split/test") == ["d"]
    assert [texts(f"alone{part}") for part in ("[1:]", "[:2]", "[1:2]", "[2:9]", "[5:]")] == [
        ["b", "c"], ["a", "b"], ["b"], ["c"], [],
    ]  # fmt: skip
    stated = DatasetName.named("data.new", "split[:2]").resolved(key="data.new")
    assert str(stated).endswith("/split:train[:2]#body")


def test_files_and_folders(place: Path) -> None:
    lines("a.jsonl", [{"text": "a", "n": 1}, {"text": "b", "n": 2}])
    Path("a.json.gz").write_bytes(gzip.compress(Path("a.jsonl").read_bytes()))
    Path("a.csv").write_text("text,n\na,1\nb,2\n")
    Path("a.tsv").write_text("n\ttext\n1\ta\n2\tb\n")
    datasets.Dataset.from_dict({"text": ["a", "b"]}).to_parquet("a.parquet")
    for name in ("a.jsonl", "a.json.gz", "a.csv", "a.tsv", "a.parquet"):
        assert texts(name) == ["a", "b"], name
        assert texts(f"{name}[1:2]") == ["b"], name
    Path("plain").mkdir()
    Path("plain/train.txt").write_text("a\nb\n\nc")
    Path("plain/test.txt").write_text("d\n")
    Path("windows.txt").write_bytes(b"\xef\xbb\xbf  a\r\nb\rc\n")
    assert texts("windows.txt") == ["  a\r\nb\rc\n"]
    assert texts("plain") == texts("plain/train.txt") == ["a\nb\n\nc"]
    assert texts("plain:test") == ["d\n"]
    assert not [path for path in place.rglob("*.arrow") if "cache" in path.parts]


def test_instructions_and_messages() -> None:
    save("asked", alone={"question": ["a"], "answer": ["b"], "id": ["c"]})
    chat = [{"role": "user", "content": "a"}, {"role": "model", "content": "b"}]
    save("chat", alone={"messages": [chat], "id": ["c"], "text": ["d"]})
    assert (texts("asked"), texts("asked#answer")) == (["a\n\nb"], ["b"])
    assert (texts("chat"), texts("chat#messages")) == (["d"], ["user: a\n\nassistant: b"])
    save("full", alone={"messages": [chat, None], "system": ["s", "s"], "text": ["d", "e"],
                        "instruction": [None, "x"], "output": [None, "y"]})  # fmt: skip
    wanted = ["system: s\n\nuser: a\n\nassistant: b", "s\n\nx\n\ny"]
    assert texts("full#messages") == wanted
    _, reading = read("full")
    assert any("text is read (#messages reads" in note for note in reading.notes)
    key = {"key": "data.new"}
    resolved = DatasetName.named("data.new", "full#messages").resolved(**key)
    assert str(resolved).endswith("#messages")


def test_a_row_without_a_text_is_passed_over() -> None:
    save("holes", alone={"body": ["a", None, "", "b"]})
    lines("holes.jsonl", [{"body": None}, {"body": "a"}, {"other": 1}])
    assert (texts("holes"), texts("holes.jsonl#body")) == (["a", "", "b"], ["a"])


def test_rows_that_hold_no_text_are_skipped_and_counted() -> None:
    chat = {"role": "user", "content": "a"}
    save("chat", alone={"messages": [[chat], [{"role": None, "content": "b"}], [chat]]})
    found, reading = read("chat")
    assert found == ["user: a"] * 2
    (note,) = reading.notes
    assert note.startswith("Skipped 1 of 3 records; the first: data.new: hf:")
    assert note.endswith("/chat, row 1 messages: number 1, role: is null, not a string.")


def test_excluded_rows_are_skipped_and_a_second_conversation_is_noted() -> None:
    save("some", alone={"text": ["a", "b", None], "weight": [1, 0, None]})
    found, reading = read("some")
    assert found == ["a"] and "is excluded from training (weight: 0)" in reading.notes[0]
    assert str(DatasetName.named("data.new", "some").resolved(key="data.new")).endswith("#text")
    chat = [{"role": "user", "content": "a"}, {"role": "model", "content": "b"}]
    save("both", alone={"messages": [chat], "conversations": [chat]})
    found, reading = read("both")
    assert len(found) == 1 and "messages and conversations; messages is read" in reading.notes[0]


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("semicolons.csv", "separated by commas, not by ';'"),
        ("split:tset", "has no split tset; available: test, dev. Did you mean test?"),
        ("split", "has several splits: test, dev; append one, :test."),
        ("alone:train", "has no split train; it was saved without splits."),
        ("alone#boddy", "has no column boddy; available: body, length. Did you mean body?"),
        ("alone#length", "has int64 in column length, not text."),
        (
            "two",
            "and 2 text columns; available: a, b. Select a column with #COLUMN or data.text_",
        ),
        ("numbers.csv", "and no text column; available: n. Select a column"),
        ("broken.json", "can't be read (ArrowInvalid: JSON parse error"),
        ("empty", "can't be read"),
        ("chat", "row 0 messages: number 1 is not a message"),
    ],
)
def test_data_sets_that_are_refused(word: str, expected: str) -> None:
    save("split", test=ROWS, dev=ROWS)
    save("alone", alone=ROWS)
    save("two", alone={"a": ["a"], "b": ["b"]})
    save("chat", alone={"messages": [[{"who": "a"}]]})
    Path("numbers.csv").write_text("n\n1\n")
    Path("broken.json").write_text("{")
    Path("empty").mkdir()
    Path("semicolons.csv").write_text("id;text\n1;a\n")
    assert problem(word).startswith(f"data.new: hf:@/{word}") and expected in problem(word)


# A folder reads nothing outside itself


@pytest.mark.parametrize("file", ["README.md", ".huggingface.yaml"])
@pytest.mark.parametrize(
    "entry",
    [
        "../secret.jsonl",
        "a/../../secret.jsonl",
        "@/secret.jsonl",
        "file:@/secret.jsonl",
        "file://@/secret.jsonl",
        "zip://a.jsonl::@/secret.zip",
        "hf://datasets/me/stories/train.jsonl",
        "http://127.0.0.1:PORT/a.jsonl",
        "http:127.0.0.1:PORT/a.jsonl",
        "inner/secret.jsonl",
    ],
)
def test_a_card_names_nothing_outside(place: Path, file: str, entry: str) -> None:
    (place / "data").mkdir()
    lines("secret.jsonl", [{"text": "a secret"}])
    lines("data/train.jsonl", [{"text": "a"}])
    if entry.startswith("inner"):
        (place / "data/inner").symlink_to(place)
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        entry = entry.replace("@", str(place)).replace("PORT", str(server.getsockname()[1]))
        for number, files in enumerate(
            (entry, ["train.jsonl", entry], [{"split": "train", "path": [entry]}])
        ):
            configs = [
                {"config_name": "good", "data_files": "train.jsonl"},
                {"config_name": f"bad{number}", "data_files": files},
            ]
            if number == 1:
                configs[1] = {"config_name": "bad", "data_files": "*", "data_dir": entry}
            if number == 0:
                del configs[0]
            card = json.dumps({"configs": configs})
            mark = "\ufeff" if number == 2 else ""  # which the library skips
            text = f"{mark}---\n{card}\n---\n" if file == "README.md" else card
            (place / "data" / file).write_text(text)
            message = problem("data")
            if entry.startswith("inner"):
                assert "inner leaves the folder" in message
            else:
                assert f"@/data/{file} refers to" in message and "outside the folder" in message
                assert entry.replace(str(place), "@") in message
            assert "a secret" not in message
            with pytest.raises(RequestError, match=r"^data.new: "):
                DatasetName.named("data.new", "data").check_on_disk("data.new", "data")
        with pytest.raises(TimeoutError):
            server.accept()


@pytest.mark.parametrize("name", ["../secret/data-00000-of-00001.arrow", "@/secret/x.arrow"])
def test_a_saved_data_set_names_nothing_outside(place: Path, name: str) -> None:
    save("secret", alone={"text": ["a secret"]})
    save("data", train=ROWS)
    for file, change in (
        ("data/train/state.json", {"_data_files": [{"filename": name.replace("@", str(place))}]}),
        ("data/dataset_dict.json", {"splits": ["train", "../secret"]}),
    ):
        before = (place / file).read_text()
        (place / file).write_text(json.dumps(json.loads(before) | change))
        assert f"@/{file} refers to" in problem("data") and "outside the folder" in problem("data")
        (place / file).write_text(before)
    assert texts("data") == ROWS["body"]


def test_files_that_decode_to_far_too_much_are_refused(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_files, "_FREE_EXPANSION_BYTES", 2**20)
    (place / "data").mkdir()
    for name, content in (
        ("a.parquet", parquet_bomb({"text": ""}, size=2**14)),
        ("a.txt.gz", gzip.compress(b"a" * 2**22)),
    ):
        for path in (place / name, place / "data" / name):
            path.write_bytes(content)
        for word in (name, "data"):
            assert f"{name} decompresses to more than 1 MB" in problem(word)
        (place / "data" / name).unlink()
    (place / "data/a.zip").write_bytes(b"PK")
    assert "can't be read" in problem("data") or "@/data/a.zip is not supported" in problem("data")


# The hub

ASK = """
import sys
from tritter.data.datasets import DatasetName
from tritter.data.local_files import Reading
is_streamed, *words = sys.argv[1:]
for word in words:
    name = DatasetName.named("key", word)
    try:
        expected = str(name.resolved(key="key"))
        reading = Reading(key="key", text_field="text")
        texts = name.texts(reading, is_streamed=is_streamed == "True")
        print(expected, *texts)
    except ValueError as error:
        print(error)
"""


def ask(address: str, *words: str, is_streamed: bool = False, **environment: str) -> list[str]:
    """Return a line per name: the resolved name and its texts, or the error."""
    found = subprocess.run(
        [sys.executable, "-c", ASK, str(is_streamed), *words],
        env={**{name: word for name, word in os.environ.items() if not name.endswith("_OFFLINE")},
             "HF_ENDPOINT": address, "HF_HOME": str(Path.cwd() / "home"), **environment},
        capture_output=True,
        text=True,
        check=True,
    )  # fmt: skip
    return found.stdout.replace(COMMIT, "COMMIT").splitlines()


@pytest.mark.slow
def test_a_hub_and_its_cache(place: Path) -> None:
    for name in ("me/stories/main", "me/stories/other", "me/plain", "me/scripted"):
        (place / name).mkdir(parents=True)
    lines("me/stories/main/train.jsonl", [{"text": "a"}, {"text": "b"}])
    lines("me/stories/other/train.jsonl", [{"story": "c"}])
    Path("me/stories/README.md").write_text(
        "---\nconfigs:\n- {config_name: main, data_files: main/*}\n"
        "- {config_name: other, data_files: other/*}\n---\n"
    )
    Path("me/plain/one.txt").write_text("d\n\ne")
    Path("me/scripted/scripted.py").touch()
    good = ["hf:me/stories/main[1:]", "hf:me/stories/other", "hf:me/plain"]
    bad = [
        "hf:me/stories",
        "hf:me/stories/mian",
        "hf:me/stroies",
        "hf:me/plain@b",
        "hf:me/scripted",
    ]
    read = [
        "hf:me/stories@COMMIT/main:train[1:]#text b",
        "hf:me/stories@COMMIT/other:train#story c",
        "hf:me/plain@COMMIT/default:train#text d",
        *("", "e"),
    ]
    with serve_hub(place) as address:
        assert ask(address, *good, is_streamed=True) == read
        assert "is not cached in" in ask(address, good[0], HF_HUB_OFFLINE="1")[0]
        found = ask(address, *good, *bad)
    assert found[:5] == read
    heads = [
        "key: hf:me/stories has several configs; available: main, other.",
        "key: hf:me/stories/mian has no config mian; available: main, other. Did you mean main?",
        "key: hf:me/stroies is not on the hub, or requires a login",
        "key: hf:me/plain@b is not on the hub",
        "key: hf:me/scripted is a script, which Tritter never runs",
    ]
    assert [line.startswith(head) for line, head in zip(found[5:], heads, strict=True)] == [
        True
    ] * 5
    other = f"hf:me/stories@{'b' * 40}/main"
    *cached, refused = ask("http://127.0.0.1:9", *good, other, HF_HUB_OFFLINE="1")
    assert cached == read
    assert refused.endswith("is not cached; the cache has me/stories at COMMIT.")


@pytest.mark.parametrize("is_streamed", [False, True])
def test_later_rows_of_another_type_are_reported(tmp_path: Path, is_streamed: bool) -> None:
    rows = [{"text": f"row {number}"} for number in range(30)]
    rows += [{"text": number} for number in range(20)] + [{"text": None}]  # type: ignore[list-item]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    name = f"hf:{tmp_path}/rows.jsonl"
    found = TextRequest(
        [name], key="data.new", text_field="text", is_streamed=is_streamed
    ).documents()
    skipped, dropped = found.notes
    assert len(found) == 30
    assert "Skipped 20 of 50 records" in skipped and "row 30" in skipped
    assert "is a number, not a string" in skipped
    assert dropped == "data.new: dropped of 31 documents: 1 empty."


def test_a_line_beyond_the_limit_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library would need 20 times its size."""
    monkeypatch.setattr("tritter.data.local_files._MAX_LINE_BYTES", 2**21)
    rows = [json.dumps({"text": text}) for text in ("a", "word " * 2**19, "b")]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    (tmp_path / "rows.csv").write_text("text\na\n")
    with pytest.raises(TextFileError, match=r"rows.jsonl line 2 exceeds the limit of 2 MB per"):
        TextRequest([f"hf:{tmp_path}/rows.jsonl"], key="data.new", text_field="text").documents()
    TextRequest([f"hf:{tmp_path}/rows.csv"], key="data.new", text_field="text").documents()
