"""A report replaces a file of its kind outside checkpoints, runs and data, for every command."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Run, snapshot
from tests.cli.test_compare import scored, write_run
from tritter.storage import atomic

COMMANDS = {
    "evaluate": ("evaluate --checkpoint base --data n=texts", "json"),
    "compare json": ("compare first second", "json"),
    "compare csv": ("compare first second", "csv"),
    "compare html": ("compare first second", "html"),
    "report": ("report first", "html"),
}
every = pytest.mark.parametrize(("words", "ending"), COMMANDS.values(), ids=COMMANDS.keys())


@pytest.fixture
def place(place: Path) -> Path:
    """The current folder, with a checkpoint, two runs, a text and a dataset."""
    for number, name in enumerate(("first", "second")):
        write_run(place / name, {"prose": scored(2.0, seed=number)}, seed=number)
    shutil.copytree(place / "base", place / "first/checkpoint")
    (place / "texts").mkdir()
    (place / "texts/notes.txt").write_text("the model grows\n")
    (place / "set").mkdir()
    (place / "set/dataset_info.json").write_text("{}")
    return place


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let any work end the test: a request is refused before it."""

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("it began to work")

    for name in (
        "methods.whole.load_whole",
        "cli.report.FoundRuns.read",
    ):
        monkeypatch.setattr(f"tritter.{name}", fail)


def _tree(place: Path) -> dict[str, Any]:
    links = {str(path): str(path.readlink()) for path in place.rglob("*") if path.is_symlink()}
    return {**snapshot(place), **links, "": sorted(map(str, place.rglob("*")))}


@pytest.mark.quick_cases(1)
@every
@pytest.mark.usefixtures("no_work")
def test_no_file_of_a_checkpoint_run_or_dataset_is_replaced(
    run: Run, place: Path, words: str, ending: str
) -> None:
    before = _tree(place)
    files = list(snapshot(place))
    assert {"base/config.json", "base/model.safetensors", "first/summary.json"} <= set(files)
    for file in files:
        result = run(f"{words} --output {file} --overwrite")
        assert (result.code, result.out) == (2, "")
        assert f"--output = {file}: " in result.err and "Nothing was written" in result.err
    assert _tree(place) == before


@pytest.mark.quick_cases(3)
@every
@pytest.mark.parametrize(
    ("folder", "reason"),
    [
        ("base", "base is a checkpoint"),
        ("base/deep/er", "base is a checkpoint"),
        ("first", "first is a run"),
        ("first/plots", "first is a run"),
        ("first/checkpoint", "first/checkpoint is a checkpoint"),
        ("link/checkpoint", "first/checkpoint is a checkpoint"),
        ("set/train", "set is a dataset"),
        ("texts/notes.txt", "texts/notes.txt is not a folder"),
    ],
)
@pytest.mark.usefixtures("no_work")
def test_nothing_is_written_in_them(
    run: Run, place: Path, words: str, ending: str, folder: str, reason: str
) -> None:
    (place / "link").symlink_to("first")
    before = _tree(place)
    result = run(f"{words} --output {folder}/new.{ending}")
    assert result.code == 2 and before == _tree(place)
    is_source = words.startswith("evaluate") and folder.split("/")[0] in ("base", "texts")
    assert ("which this command reads" if is_source else reason) in result.err


def test_text_that_is_evaluated_gets_no_report(run: Run, place: Path) -> None:
    for output in ("texts/new.json", "texts/deep/new.json", "texts/notes.txt"):
        result = run(f"evaluate --checkpoint base --data n=texts --output {output} --overwrite")
        assert result.code == 2 and "is in texts, which this command reads" in result.err
    (place / "texts/a.json").write_text('[{"text": "it grows"}]')
    words = "evaluate --checkpoint base --data n=texts/*.json --output texts/a.json --overwrite"
    assert "which this command reads" in run(words).err
    result = run("evaluate --checkpoint base --tasks arc_easy --tasks-path set --output set/a.json")
    assert result.code == 2 and "is in set, which this command reads" in result.err


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _link(path: Path) -> None:
    path.with_name("real").write_text("{}")
    path.symlink_to("real")


OTHERS: dict[str, Callable[[Path], None]] = {
    "folder": lambda path: path.mkdir(),
    "pipe": _pipe,
    "dangling link": lambda path: path.symlink_to("nowhere"),
    "link to a file": _link,
}


@pytest.mark.quick_cases(3)
@every
@pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS.keys())
@pytest.mark.usefixtures("no_work")
def test_what_is_no_file_is_refused_and_stays(
    run: Run, place: Path, make: Callable[[Path], None], words: str, ending: str
) -> None:
    make(place / f"out.{ending}")
    before = _tree(place)
    for more in ("", "--overwrite"):
        result = run(f"{words} --output out.{ending} {more}")
        assert result.code == 2 and f"--output = out.{ending}: it " in result.err
    assert _tree(place) == before


@pytest.mark.quick_cases(1)
@every
def test_a_file_of_its_kind_is_replaced(run: Run, place: Path, words: str, ending: str) -> None:
    file = place / f"out.{ending}"
    assert run(f"{words} --output {file.name}").code == 0
    first, inode = file.read_text(), file.stat().st_ino
    again = run(f"{words} --output {file.name}")
    assert again.code == 2 and "it exists already" in again.err
    assert file.stat().st_ino == inode
    assert run(f"{words} --output {file.name} --overwrite").code == 0
    assert file.read_text() == first and file.stat().st_ino != inode
    assert not [path for path in place.iterdir() if path.name.startswith(".")]


@pytest.mark.usefixtures("no_work")
def test_a_file_of_another_kind_stays(run: Run, place: Path) -> None:
    (place / "thesis.txt").write_text("years of work")
    for words in (COMMANDS["evaluate"][0], COMMANDS["report"][0]):
        result = run(f"{words} --output thesis.txt --overwrite")
        assert result.code == 2 and "thesis.txt: --overwrite replaces no other kind" in result.err
    assert (place / "thesis.txt").read_text() == "years of work"


@pytest.mark.full
def test_the_page_of_a_run_may_be_in_it(run: Run, place: Path) -> None:
    assert run("report first").code == 0
    assert run("report first --overwrite").code == 0
    assert (place / "first/report.html").is_file()
    result = run("report first --output other.html --figures first/figures")
    assert result.code == 2 and "--figures = first/figures: " in result.err


@pytest.mark.quick_cases(1)
@every
def test_a_file_that_comes_meanwhile_stays(
    run: Run, place: Path, monkeypatch: pytest.MonkeyPatch, words: str, ending: str
) -> None:
    """At the last moment, at a free name."""
    file, original = place / f"out.{ending}", atomic._rename_new

    def late(first: Path, second: Path) -> bool:
        second.write_text("years")
        return original(first, second)

    monkeypatch.setattr(atomic, "_rename_new", late)
    result = run(f"{words} --output {file.name}")
    assert result.code == 2 and f"--output = {file.name}: it " in result.err
    assert file.read_text() == "years"
    assert not [path for path in place.iterdir() if path.name.startswith(".")]


def test_a_folder_that_is_read_only_is_refused_before_any_work(
    run: Run, place: Path, no_work: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    result = run("compare first second --output deep/er/out.json")
    assert result.code == 2 and f"{place} is not writable" in result.err
    assert not (place / "deep").exists()
