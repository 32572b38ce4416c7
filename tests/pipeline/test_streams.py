"""A streamed file that changed since the run began is refused, wherever it changed."""

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tritter.data import datasets as module
from tritter.data.datasets import DatasetName
from tritter.errors import RequestError
from tritter.pipeline.run_data import _STREAMS, RunData

ROWS = [f"row {number}" for number in range(DatasetName.HEAD_ROWS + 20)]


def write(path: Path, rows: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))


@pytest.fixture
def data(tmp_path: Path) -> Any:
    (tmp_path / "data").mkdir()
    (tmp_path / "run").mkdir()
    write(tmp_path / "data/first.jsonl", ROWS)
    write(tmp_path / "data/second.jsonl", ROWS[:10])
    found = SimpleNamespace(
        streams={"code": (DatasetName.named("data.new", f"hf:{tmp_path}/data"),)},
        text=SimpleNamespace(domains={"code": SimpleNamespace(key="data.new.code")}),
    )
    RunData.check_streams(found, tmp_path / "run")  # type: ignore[arg-type]
    return found


def test_unchanged_files_are_accepted(data: Any, tmp_path: Path) -> None:
    """Also with another time, as after a copy; other files do not count."""
    os.utime(tmp_path / "data/first.jsonl", (1, 1))
    (tmp_path / "data/notes.log").write_text("other")
    RunData.check_streams(data, tmp_path / "run")


@pytest.mark.parametrize("change", ["same size", "cut", "added", "removed"])
def test_a_change_after_the_first_rows_is_refused(data: Any, tmp_path: Path, change: str) -> None:
    rows, first = list(ROWS), tmp_path / "data/first.jsonl"
    if change == "same size":
        rows[-1] = rows[-1].replace("row", "two")
    rows = rows[:-1] if change == "cut" else [*rows, "more"] if change == "added" else rows
    write(first, rows)
    if change == "removed":
        (tmp_path / "data/second.jsonl").unlink()
    with pytest.raises(RequestError, match="has changed since the run in") as raised:
        RunData.check_streams(data, tmp_path / "run")
    assert raised.value.problems[0].key == "data.new.code"
    name = "second" if change == "removed" else "first"
    assert raised.value.problems[0].value == str(tmp_path / f"data/{name}.jsonl")


def test_large_files_are_compared_by_size_and_time(
    data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_HASHED_BYTES", 1000)
    (tmp_path / "run" / _STREAMS).unlink()
    RunData.check_streams(data, tmp_path / "run")
    RunData.check_streams(data, tmp_path / "run")
    os.utime(tmp_path / "data/first.jsonl", (1, 1))
    with pytest.raises(RequestError, match="modified 1970"):
        RunData.check_streams(data, tmp_path / "run")
