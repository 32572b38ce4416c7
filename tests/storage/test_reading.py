"""Files from elsewhere: regular files of bounded size are read, nothing else is waited for."""

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from tritter.errors import TritterError
from tritter.storage.reading import open_file, read_object, read_text, require_file


def test_plain_files_are_read(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"a": [1, 2.5, null], "b": "ä"}', encoding="utf-8")
    assert read_text(path).startswith('{"a"')
    assert read_object(path) == {"a": [1, 2.5, None], "b": "ä"}
    require_file(path)
    with open_file(path) as file:
        assert file.read(1) == b"{"


def test_a_link_to_a_file_is_one(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{}")
    (tmp_path / "b.json").symlink_to(tmp_path / "a.json")
    assert read_object(tmp_path / "b.json") == {}


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


SPECIAL: dict[str, tuple[Callable[[Path], object], str]] = {
    "pipe": (os.mkfifo, "it is a pipe, not a file"),
    "zero device": (lambda path: path.symlink_to("/dev/zero"), "it is a device, not a file"),
    "folder": (Path.mkdir, "it is a folder, not a file"),
    "nothing": (lambda path: None, "there is no such file"),
    "link to nothing": (lambda path: path.symlink_to("nothing"), "there is no such file"),
    "link to itself": (lambda path: path.symlink_to(path), "symbolic links"),
    "large": (lambda path: path.write_bytes(b" " * (4 * 2**20 + 1)), "larger than 4 MiB"),
    "sparse": (lambda path: os.truncate(_touched(path), 2**40), "larger than 4 MiB"),
}


def _touched(path: Path) -> Path:
    path.touch()
    return path


@pytest.mark.parametrize(("make", "message"), SPECIAL.values(), ids=SPECIAL.keys())
@pytest.mark.parametrize("read", [read_text, read_object, require_file])
def test_everything_else_is_refused_at_once(
    tmp_path: Path, make: Callable[[Path], object], message: str, read: Callable[[Path], object]
) -> None:
    path = tmp_path / "config.json"
    make(path)
    with pytest.raises(TritterError) as error:
        read(path)
    assert message in str(error.value)
    assert str(path) in str(error.value)


def test_a_socket_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # the names of sockets are short
    _socket(Path("s"))
    with pytest.raises(TritterError, match="a socket"):
        read_text(Path("s"))


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "half\udc80"])
def test_names_that_no_file_has_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(TritterError, match="cannot be read"):
        read_text(tmp_path / name)


CONTENTS = {
    "no JSON": ("{", "Expecting"),
    "nothing": ("", "Expecting"),
    "deep": ("[" * 200_000, "nested too deeply"),
    "rather deep": ("[" * 100 + "]" * 100, "nested too deeply"),
    "long number": ("1" * 5_000, "digits"),
    "number beyond floats": ("1" * 400, "a number of 400 digits"),
    "half a character": (r'{"a": "\ud800"}', "half of a character"),
    "half a character in a key": (r'{"\udfff": 1}', "half of a character"),
}


@pytest.mark.parametrize(("content", "message"), CONTENTS.values(), ids=CONTENTS.keys())
def test_json_that_breaks_things_is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "tritter.json").write_text(content)
    with pytest.raises(TritterError) as error:
        read_object(tmp_path / "tritter.json")
    assert message in str(error.value)


def test_what_is_no_text_or_no_object_is_refused(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_bytes(b"\xff\xfe")
    with pytest.raises(TritterError, match="not UTF-8"):
        read_text(tmp_path / "state.json")
    (tmp_path / "state.json").write_text(json.dumps([1]))
    with pytest.raises(TritterError, match="is not a JSON object"):
        read_object(tmp_path / "state.json")
