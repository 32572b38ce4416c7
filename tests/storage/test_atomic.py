"""Folders and files appear whole or not at all."""

import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.storage.test_tensors import file_size_limit
from tritter.errors import RequestError, TritterError
from tritter.storage import atomic
from tritter.storage.atomic import atomic_folder, clear_leftovers, remove_folder, write_text_atomic


def _contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): path.read_text() if path.is_file() else ""
        for path in folder.rglob("*")
    }


def test_the_folder_appears_when_the_block_ends(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "er" / "target"
    with atomic_folder(target) as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "a.txt").write_text("a")
        assert not target.exists()
        assert folder.parent == target.parent
    assert _contents(target) == {"inner": "", "inner/a.txt": "a"}
    assert [path.name for path in target.parent.iterdir()] == ["target"]
    assert target.stat().st_mode & 0o777 == 0o755


def test_an_exception_inside_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyError), atomic_folder(tmp_path / "target") as folder:
        (folder / "half.txt").write_text("half")
        raise KeyError("stop")
    assert _contents(tmp_path) == {}


def test_a_disk_error_inside_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    with (
        pytest.raises(TritterError, match=r"target could not be written.*No space left") as error,
        atomic_folder(tmp_path / "target"),
    ):
        raise OSError(28, "No space left on device")
    assert "Nothing was changed" in str(error.value)
    assert _contents(tmp_path) == {}


def test_a_disk_error_of_a_copy_is_that_of_its_first_file(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    for name in ("a.json", "b.json"):
        (tmp_path / "source" / name).write_text("1" * 1000)
    with (
        file_size_limit(100),
        pytest.raises(
            TritterError, match=r"written: \[Errno 27\] File too large.* Nothing"
        ) as error,
        atomic_folder(tmp_path / "target") as folder,
    ):
        atomic.copy_tree(tmp_path / "source", folder)
    assert str(error.value).count("Errno") == 1
    assert not (tmp_path / "target").exists()


def test_a_disk_error_of_a_library_in_rust_is_told_too(tmp_path: Path) -> None:
    """safetensors and tokenizers raise errors of their own."""
    with (
        file_size_limit(10_000),
        pytest.raises(TritterError, match=r"target could not be written.*File too large"),
        atomic_folder(tmp_path / "target") as folder,
    ):
        save_file({"a": torch.ones(10_000)}, folder / "a.safetensors")
    assert _contents(tmp_path) == {}
    with pytest.raises(TritterError, match=r"^source can't be read"), atomic_folder(tmp_path / "t"):
        raise TritterError("source can't be read (os error 2).")


@pytest.mark.parametrize("is_file", [False, True], ids=["folder", "file"])
def test_what_exists_is_refused_before_the_block_runs(tmp_path: Path, is_file: bool) -> None:
    target = tmp_path / "target"
    if is_file:
        target.write_text("mine")
    else:
        target.mkdir()
        (target / "mine.txt").write_text("mine")
    before = _contents(tmp_path)
    with pytest.raises(RequestError, match="already exists"), atomic_folder(target):
        pytest.fail("the block ran")
    assert _contents(tmp_path) == before


def test_overwrite_replaces_the_whole_folder(tmp_path: Path) -> None:
    target = tmp_path / "target"
    with atomic_folder(target) as folder:
        (folder / "old.txt").write_text("old")
    with atomic_folder(target, overwrite=True) as folder:
        (folder / "new.txt").write_text("new")
        assert _contents(target) == {"old.txt": "old"}
    assert _contents(tmp_path) == {"target": "", "target/new.txt": "new"}


def test_overwrite_keeps_the_old_folder_when_the_block_fails(tmp_path: Path) -> None:
    target = tmp_path / "target"
    with atomic_folder(target) as folder:
        (folder / "old.txt").write_text("old")
    before = _contents(tmp_path)
    with pytest.raises(RuntimeError), atomic_folder(target, overwrite=True) as folder:
        (folder / "new.txt").write_text("new")
        raise RuntimeError("stop")
    assert _contents(tmp_path) == before


def test_overwrite_puts_the_old_folder_back_when_the_rename_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "target"
    with atomic_folder(target) as folder:
        (folder / "old.txt").write_text("old")
    replace, calls = Path.replace, []

    def second_call_fails(self: Path, other: Path) -> Path:
        calls.append(self)
        if len(calls) == 2:
            raise OSError(5, "Input/output error")
        return replace(self, other)

    monkeypatch.setattr(Path, "replace", second_call_fails)
    with pytest.raises(TritterError, match="Input/output"), atomic_folder(target, overwrite=True):
        pass
    assert len(calls) == 3
    assert _contents(target) == {"old.txt": "old"}


def _pid_of_the_dead() -> int:
    finished = subprocess.Popen(["true"])
    finished.wait()
    return finished.pid


def test_leftovers_of_a_killed_process_go_and_those_of_a_living_one_stay(tmp_path: Path) -> None:
    dead = _pid_of_the_dead()
    (tmp_path / f".target.{atomic._host()}-{dead}.abcdefgh").mkdir()
    (tmp_path / f".target.{atomic._host()}-{os.getppid()}.abcdefgh").mkdir()
    (tmp_path / ".target.notes").mkdir()
    (tmp_path / f".target.elsewhere-{dead}.abcdefgh").mkdir()
    with atomic_folder(tmp_path / "target"):
        pass
    names = sorted(path.name for path in tmp_path.iterdir())
    living = f".target.{atomic._host()}-{os.getppid()}.abcdefgh"
    other_host = f".target.elsewhere-{dead}.abcdefgh"
    assert names == sorted(["target", ".target.notes", living, other_host])


def test_a_locked_run_folder_is_cleared_of_what_killed_writers_left(tmp_path: Path) -> None:
    """Also of those whose process id is in use now, and of those on another machine."""
    here, run = atomic._host(), tmp_path / "run"
    (run / "deep").mkdir(parents=True)
    (run / f"deep/.README.md.{here}-{os.getpid()}.abcdefgh").write_text("half")
    (run / ".saved.0123abcd-1.old-abcdefgh/saved").mkdir(parents=True)
    (run / ".saved.0123abcd-1.old-abcdefgh/saved/tensors").write_text("whole")
    (run / ".saved.0123abcd-1.defdefgh").mkdir()
    names = {".notes.0123abcd", ".notes.20240101-12.md", "...0123abcd-1.abcdefgh"}
    for name in names:
        (run / name).write_text("mine")
    outside = tmp_path / ".run.0123abcd-1.abcdefgh"
    outside.mkdir()
    (run / ".page.html.0123abcd-1.abcdefgh").symlink_to(tmp_path)
    clear_leftovers(run)
    found = {path.relative_to(run).as_posix() for path in run.rglob("*")}
    names |= {"deep", "saved", "saved/tensors", ".page.html.0123abcd-1.abcdefgh"}
    assert found == names and outside.is_dir()


def test_a_folder_goes_with_what_its_killed_writers_left(tmp_path: Path) -> None:
    left = tmp_path / f".saved.{atomic._host()}-{_pid_of_the_dead()}.abcdefgh"
    for folder in (tmp_path / "saved", left, tmp_path / "saved_too"):
        folder.mkdir()
        (folder / "tensors").write_text("half")
    remove_folder(tmp_path / "saved")
    remove_folder(tmp_path / "nowhere" / "saved")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["saved_too"]


def test_a_place_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with (
        pytest.raises(RequestError, match="cannot be written"),
        atomic_folder(tmp_path / "file" / "sub" / "target"),
    ):
        pytest.fail("the block ran")
    assert _contents(tmp_path) == {"file": "mine"}


def test_text_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "note.txt"
    write_text_atomic(path, "eins\n")
    half = f".note.txt.{atomic._host()}-{_pid_of_the_dead()}.abcdefgh"  # a killed writer's
    path.with_name(half).write_text("ha")
    write_text_atomic(path, "zwei ±\n")
    assert path.read_text(encoding="utf-8") == "zwei ±\n"
    assert [entry.name for entry in path.parent.iterdir()] == ["note.txt"]
    assert path.stat().st_mode & 0o777 == 0o644


def test_text_that_cannot_be_written_leaves_the_old(tmp_path: Path) -> None:
    path = tmp_path / "note.txt"
    write_text_atomic(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text_atomic(path, "new \ud800")
    with file_size_limit(100), pytest.raises(TritterError, match=r"note\.txt could not be written"):
        write_text_atomic(path, "new" * 100)
    assert _contents(tmp_path) == {"note.txt": "old"}
