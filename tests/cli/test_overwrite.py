"""`--overwrite` replaces a folder that holds a checkpoint and nothing else, for every command."""

import errno
import json
import os
import shutil
import socket
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.cli.conftest import Run, snapshot
from tritter.checkpoints import Lineage
from tritter.core.expansions import LlamaPro, Width
from tritter.errors import RequestError
from tritter.storage import atomic
from tritter.storage.hashing import merkle_hash, tensor_digest
from tritter.transform import expand

COMMANDS = {
    "expand": "expand --checkpoint base --method width --no-measure",
    "export": "export --checkpoint base",
    "dry run": "expand --checkpoint base --method width --dry-run",
}
WRITING = {name: words for name, words in COMMANDS.items() if name != "dry run"}
both = pytest.mark.parametrize("words", WRITING.values(), ids=WRITING.keys())


def _tree(place: Path) -> list[tuple[str, int, str]]:
    """Return name, kind and link of everything below a place."""
    paths = sorted(place.rglob("*"))
    modes = [(path, path.lstat().st_mode & 0o170000) for path in paths]
    return [(str(p), mode, str(p.readlink()) if p.is_symlink() else "") for p, mode in modes]


def _old(place: Path) -> Path:
    """Put an older result at `old`."""
    return expand(place / "base", place / "old", [LlamaPro()]).folder


def _thesis(place: Path) -> str:
    (place / "old").mkdir()
    (place / "old" / "thesis.tex").write_text("years")
    return "thesis.tex"


def _file(place: Path) -> str:
    (place / "old").write_text("mine")
    return "is a file"


def _link_to_checkpoint(place: Path) -> str:
    shutil.copytree(place / "base", place / "elsewhere")
    (place / "old").symlink_to("elsewhere")
    return "is a symbolic link"


def _dangling(place: Path) -> str:
    (place / "old").symlink_to("nowhere")
    return "is a symbolic link"


def _pipe(place: Path) -> str:
    os.mkfifo(place / "old")
    return "is a pipe"


def _socket(place: Path) -> str:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("old")  # names of sockets are short
    return "is a socket"


def _empty(place: Path) -> str:
    (place / "old").mkdir()
    return "contains no checkpoint"


def _config_alone(place: Path) -> str:
    (place / "old").mkdir()
    shutil.copy(place / "base" / "config.json", place / "old")
    return "contains no checkpoint"


def _plain_with(*names: str) -> Callable[[Path], str]:
    def make(place: Path) -> str:
        shutil.copytree(place / "base", place / "old")
        for name in names:
            path = place / "old" / name
            path.parent.mkdir(exist_ok=True)
            path.write_text("mine")
        return "contains other files"

    return make


def _ours_with(name: str) -> Callable[[Path], str]:
    def make(place: Path) -> str:
        path = _old(place) / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
        return "contains other files"

    return make


def _with_link(place: Path) -> str:
    shutil.copytree(place / "base", place / "old")
    (place / "old" / "merges.txt").symlink_to("../base/config.json")
    return "merges.txt"


def _with_pipe(place: Path) -> str:
    shutil.copytree(place / "base", place / "old")
    os.mkfifo(place / "old" / "README.md")
    return "README.md"


def _damaged_record(place: Path) -> str:
    (_old(place) / "tritter.json").write_text("{")
    return "tritter.json"


def _empty_folder_inside(place: Path) -> str:
    (_old(place) / "notes").mkdir()
    return "notes/"


STANDING: dict[str, Callable[[Path], str]] = {
    "thesis": _thesis,
    "file": _file,
    "link to a checkpoint": _link_to_checkpoint,
    "dangling link": _dangling,
    "pipe": _pipe,
    "socket": _socket,
    "empty folder": _empty,
    "config alone": _config_alone,
    "plain and notes": _plain_with("notes.txt"),
    "plain and many": _plain_with(*"abcdefg"),
    "plain and other weights": _plain_with("best.safetensors"),
    "plain and a folder": _plain_with("logs/a.txt"),
    "plain and its state": _plain_with("state/diary.txt"),
    "ours and notes": _ours_with("notes.txt"),
    "ours and unlisted weights": _ours_with("model-00001-of-00002.safetensors"),
    "ours and a folder": _ours_with("logs/a.txt"),
    "ours and a stray in state": _ours_with("state/diary.txt"),
    "a link inside": _with_link,
    "a pipe inside": _with_pipe,
    "a damaged record": _damaged_record,
    "an empty folder inside": _empty_folder_inside,
}


@pytest.mark.quick_cases(2)
@both
@pytest.mark.parametrize("make", STANDING.values(), ids=STANDING.keys())
def test_anything_else_is_refused_and_stays(
    run: Run, place: Path, make: Callable[[Path], str], words: str
) -> None:
    said = make(place)
    before, tree = snapshot(place / "base"), _tree(place)
    result = run(f"{words} --output old --overwrite")
    assert (result.code, result.out) == (2, "")
    assert said in result.err
    assert result.err.endswith("Nothing was written.\n")
    without = run(f"{words} --output old")
    assert without.code == 2
    assert "old already exists" in without.err
    assert (snapshot(place / "base"), _tree(place)) == (before, tree)


def test_strays_are_listed_a_few_and_a_count(run: Run, place: Path) -> None:
    _plain_with(*"abcdefg")(place)
    result = run(f"{COMMANDS['export']} --output old --overwrite")
    assert "contains other files: a, b, c, d and 3 more." in result.err


INSIDE_OR_ABOVE = {
    "itself": "base",
    "dot": "base/.",
    "the long way": "base/../base",
    "parent": "base/..",
    "here": ".",
    "inside": "base/sub",
    "deep inside": "base/sub/sub",
    "a link to it": "link",
    "inside by a link": "link/sub",
    "a link to its parent": "above",
    "absolute": "ABSOLUTE/base",
}


@pytest.mark.quick_cases(3)
@pytest.mark.parametrize("words", COMMANDS.values(), ids=COMMANDS.keys())
@pytest.mark.parametrize("flag", ["", "--overwrite"])
@pytest.mark.parametrize("output", INSIDE_OR_ABOVE.values(), ids=INSIDE_OR_ABOVE.keys())
def test_the_source_its_parents_and_its_inside_are_no_place(
    run: Run, place: Path, output: str, flag: str, words: str
) -> None:
    (place / "link").symlink_to("base")
    (place / "above").symlink_to(".")
    before, tree = snapshot(place), _tree(place)
    result = run(f"{words} --output {output.replace('ABSOLUTE', str(place))} {flag}")
    if "--dry-run" in words:
        assert (result.code, "refused" in result.out) == (0, True)
    else:
        assert result.code == 2
    assert (snapshot(place), _tree(place)) == (before, tree)


def test_a_source_that_is_reached_by_a_link_is_no_place_either(run: Run, place: Path) -> None:
    (place / "base").rename(place / "real")
    (place / "base").symlink_to("real")
    before, tree = snapshot(place), _tree(place)
    for words in WRITING.values():
        for output in ("real", "real/sub", "base", "base/sub"):
            assert run(f"{words} --output {output} --overwrite").code == 2
    assert (snapshot(place), _tree(place)) == (before, tree)


@pytest.mark.quick_cases(1)
@both
@pytest.mark.parametrize("is_ours", [True, False], ids=["ours", "plain"])
def test_a_checkpoint_and_nothing_else_is_replaced(
    run: Run, place: Path, is_ours: bool, words: str
) -> None:
    if is_ours:
        _old(place)
        (place / "old" / "README.md").write_text("my own words on it")
        (place / "old" / "state").mkdir()
        (place / "old" / "state" / "state.json").write_text("{}")
    else:
        shutil.copytree(place / "base", place / "old")
    before = snapshot(place / "old")
    assert run(f"{words} --output old --overwrite").code == 0
    assert snapshot(place / "old") != before
    assert sorted(path.name for path in place.iterdir()) == ["base", "old"]
    assert run(f"{words} --output old --overwrite").code == 0  # its own result too


@pytest.mark.quick_cases(1)
@both
def test_what_comes_meanwhile_is_not_destroyed(
    run: Run, place: Path, monkeypatch: pytest.MonkeyPatch, words: str
) -> None:
    """A file that is put into the old folder while the new one is made, at the last moment."""
    _old(place)
    sync = atomic._sync_tree

    def interfere(folder: Path) -> None:
        sync(folder)
        (place / "old" / "thesis.tex").write_text("years")

    monkeypatch.setattr(atomic, "_sync_tree", interfere)
    before = snapshot(place / "old")
    result = run(f"{words} --output old --overwrite")
    assert result.code == 2
    assert "thesis.tex" in result.err
    assert snapshot(place / "old") == {**before, "thesis.tex": b"years"}
    assert sorted(path.name for path in place.iterdir()) == ["base", "old"]


@pytest.mark.quick_cases(2)
@both
@pytest.mark.parametrize("flag", ["", "--overwrite"])
@pytest.mark.parametrize("what", ["a result", "an empty folder", "a file"])
def test_the_slower_of_two_leaves_what_the_faster_wrote(
    run: Run,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: str,
    flag: str,
    what: str,
) -> None:
    """Something else comes to the output at the last moment."""
    if flag:
        _old(place)
    sync = atomic._sync_tree

    def interfere(folder: Path) -> None:
        sync(folder)
        if flag:
            (place / "old").rename(place / "older")
        if what == "a result":
            shutil.copytree(place / "base", place / "old")
        elif what == "a file":
            (place / "old").write_text("years")
        else:
            (place / "old").mkdir()

    monkeypatch.setattr(atomic, "_sync_tree", interfere)
    result = run(f"{words} --output old {flag}")
    assert (result.code, result.out) == (2, "")
    assert "old exists now: another process wrote it" in result.err
    assert "was written and is complete" not in result.err
    if what == "a file":
        assert (place / "old").read_text() == "years"
    else:
        assert snapshot(place / "old") == (snapshot(place / "base") if what == "a result" else {})
    assert not [path for path in place.iterdir() if path.name.startswith(".")]


def test_an_error_does_not_claim_what_another_process_wrote(
    run: Run, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interfere(folder: Path) -> None:
        shutil.copytree(place / "base", place / "old")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(atomic, "_sync_tree", interfere)
    result = run(f"{COMMANDS['export']} --output old")
    assert result.code == 1 and "No space left" in result.err
    assert "was written and is complete" not in result.err
    assert snapshot(place / "old") == snapshot(place / "base")


_WAITING = """
import sys, time
from pathlib import Path
from tritter.storage import atomic
sync = atomic._sync_tree
def wait(folder):
    sync(folder)
    Path(f"ready-{sys.argv[1]}").touch()
    while len(list(Path().glob("ready-*"))) < 2:
        time.sleep(0.01)
atomic._sync_tree = wait
from tritter.cli import main
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.full
def test_of_two_processes_one_result_is_whole_and_the_other_refused(place: Path) -> None:
    """Both wait with their results made, then place them at once."""
    own = [sys.executable, "-c", _WAITING]
    processes = [
        subprocess.Popen(
            [*own, name, *WRITING[name].split(), "--output", "old", "--json"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in WRITING
    ]
    ended = [(*process.communicate(timeout=300), process.returncode) for process in processes]
    assert sorted(code for _, _, code in ended) == [0, 2], ended
    (printed, _, _), (nothing, error, _) = sorted(ended, key=lambda each: each[2])
    assert nothing == "" and "error: old exists now: " in error
    tensors = load_file(place / "old" / "model.safetensors")  # whose: either may win
    digests = {name: tensor_digest(name, tensor) for name, tensor in tensors.items()}
    assert json.loads(printed)["model_hash"] == merkle_hash(digests)
    assert not [path for path in place.iterdir() if path.name.startswith(".")]


def test_what_comes_between_the_last_look_and_the_rename_is_put_back(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _old(place)
    replace = Path.replace

    def late(first: Path, second: Path) -> Path:
        if first == place / "old":
            (first / "thesis.tex").write_text("years")
        return replace(first, second)

    monkeypatch.setattr(Path, "replace", late)
    before = snapshot(place / "old")
    with pytest.raises(
        RequestError, match=r"/old is not replaced, because it contains other files.*thesis\.tex"
    ):
        expand(place / "base", place / "old", [Width()], overwrite=True)
    assert snapshot(place / "old") == {**before, "thesis.tex": b"years"}
    assert sorted(path.name for path in place.iterdir()) == ["base", "old"]


def test_the_old_output_stands_until_the_new_one_was_measured(
    run: Run, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _old(place)
    before = snapshot(place)

    def fails(*asked: object, **more: object) -> None:
        raise RequestError("cannot be measured")

    monkeypatch.setattr("tritter.evaluation.jump.Jump.of_folders", fails)
    result = run("expand --checkpoint base --method width --output old --overwrite")
    assert result.code == 2
    assert "cannot be measured" in result.err
    assert snapshot(place) == before
    assert sorted(path.name for path in place.iterdir()) == ["base", "old"]


def test_a_ckpt_does_not_replace_the_folder_that_says_what_it_is(run: Run, place: Path) -> None:
    import torch

    from tests.oracle import stock

    torch.save(stock(place / "base").state_dict(), place / "last.ckpt")
    before = snapshot(place)
    for output in ("base", "last.ckpt", "base/sub", "."):
        words = f"export --checkpoint last.ckpt --config base --output {output} --overwrite"
        assert run(words).code == 2
    assert snapshot(place) == before


def test_the_library_asks_as_well(place: Path) -> None:
    before = snapshot(place)
    for target in (place / "base", place, place / "base" / "sub"):
        with pytest.raises(RequestError, match="outside the source"):
            expand(place / "base", target, [Width()], overwrite=True)
    assert snapshot(place) == before
    assert Lineage.read(_old(place)) is not None


@both
def test_names_that_no_file_has_are_refused(run: Run, place: Path, words: str) -> None:
    result = run(words, "--output", "x" * 300)
    assert result.code == 2
    assert "a name has at most 255 bytes" in result.err
    assert run(words, "--output", "a\0b").code == 2


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_device_is_refused_by_its_kind(
    place: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    """One that only says so: no device is made, and none is opened."""
    (place / "old").write_text("mine")
    lstat = Path.lstat

    def as_device(path: Path) -> os.stat_result:
        found = list(lstat(path))
        if path.name == "old":
            found[0] = stat.S_IFCHR | 0o666
        return os.stat_result(found)

    monkeypatch.setattr(Path, "lstat", as_device)
    with pytest.raises(RequestError, match="is a device"):
        expand(place / "base", place / "old", [Width()], overwrite=overwrite)
    assert (place / "old").read_text() == "mine"
