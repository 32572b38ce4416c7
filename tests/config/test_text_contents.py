"""Data files are parsed before anything is written, and skipped files are reported."""

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.config.conftest import FakePipeline, Result
from tritter.data import sources
from tritter.data.sources import TextRequest, check_contents, skipped_note, text_files
from tritter.errors import RequestError

Run = Callable[..., Result]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with data files, next to the empty folder in which commands run."""
    place = tmp_path.parent / f"{tmp_path.name}-texts"
    (place / "old").mkdir(parents=True)
    (place / "new").mkdir()
    (place / "old/a.txt").write_text("text")
    (place / "new/b.jsonl").write_text('{"text": "text"}\n')
    return place


@pytest.fixture
def run_there(run: Run, place: Path) -> Run:
    """Run data=text with arguments in which @ is the folder of the data."""
    return lambda *words: run("data=text", *(word.replace("@", f"{place}/") for word in words))


def found(place: Path, *names: str) -> tuple[Path, ...]:
    return text_files("data.new", [str(place / name) for name in names])


def note_on(place: Path, *names: str) -> str | None:
    return skipped_note("x", [str(place / name) for name in names], key="data.new")


def names(texts: tuple[Path, ...], place: Path) -> list[str]:
    return [str(path.relative_to(place)) for path in texts]


def check(*paths: Path, max_bytes: int = 2**20) -> None:
    request = TextRequest(tuple(map(str, paths)), key="data.new")
    check_contents([request], max_bytes=max_bytes)


def test_everything_that_is_wrong_is_listed_before_anything_is_written(
    run_there: Run, place: Path, pipeline: FakePipeline
) -> None:
    (place / "old/c.md").write_bytes(b"caf\xe9")
    (place / "old/d.json").write_text("[3]")
    (place / "new/b.jsonl").write_text('\n{"body": "b"}\n[\n')
    (place / "new/e.txt.gz").write_bytes(b"no gzip")
    (place / "new/f.txt").write_text("café", encoding="utf-16")
    result = run_there("data.old={prose:@old,python:stdlib:prose}", "data.new=@new")
    assert (result.code, result.written, pipeline.configs) == (2, [], [])
    heads = [
        "data.old.prose: @/old/c.md is not UTF-8 (byte 3 is 0xe9)",
        "data.old.prose: @/old/d.json, record 1 is a number; must be a JSON object",
        "data.new: @/new/b.jsonl, line 2 has no field text",
        "data.new: @/new/b.jsonl, line 3 is not valid JSON",
        "data.new: @/new/e.txt.gz cannot be read",
        "data.new: @/new/f.txt appears to be UTF-16, not UTF-8",
    ]
    lines = result.err.replace(str(place), "@").splitlines()
    assert lines[0] == "error: the data has 6 problems:"
    for line, head in zip(lines[1:-1], heads, strict=True):
        assert line.startswith(f"  {head}")
    assert lines[-1] == "Nothing was written."


def test_a_sweep_looks_into_each_file_once(
    run_there: Run, place: Path, pipeline: FakePipeline
) -> None:
    (place / "old/a.txt").write_bytes(b"caf\xe9")
    result = run_there("-m", "data.old=@old", "data.new=@new", "seed=0,1,2")
    assert (result.code, result.written, pipeline.configs) == (2, [], [])
    assert result.err.count("is not UTF-8") == 1


def test_a_run_that_is_finished_needs_its_text_no_more(run_there: Run, place: Path) -> None:
    words = ("data.old=@old", "data.new=@new", "hydra.run.dir=here")
    assert run_there(*words).code == 0
    (place / "old/a.txt").write_bytes(b"caf\xe9")
    assert "nothing to do" in run_there(*words).out


def test_blank_text_is_none(run_there: Run, place: Path) -> None:
    (place / "old/a.txt").write_text(" \n")
    result = run_there("data.old=@old", "data.new=@new")
    assert (result.code, result.written) == (2, [])
    assert f"data.old: {place}/old/a.txt contains no text." in result.err
    assert run_there("data.old=[@old,stdlib:prose]", "data.new=@new").code == 0


def test_what_lies_beyond_the_limit_is_left_for_later(
    run_there: Run, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "old/long.txt").write_bytes(b"a" * 1000 + b"\xe9")
    (place / "old/short.txt").write_bytes(b"\xe9")
    with pytest.raises(RequestError) as caught:
        check(place / "old", max_bytes=500)
    assert str(caught.value).startswith(f"data.new: {place}/old/short.txt is not UTF-8")
    (place / "old/short.txt").unlink()
    check(place / "old", max_bytes=500)
    monkeypatch.setattr(sources.check_contents, "__kwdefaults__", {"max_bytes": 500})
    assert run_there("data.old=@old", "data.new=@new").code == 0


def test_unpacked_bytes_count(place: Path) -> None:
    (place / "a.jsonl.gz").write_bytes(gzip.compress(b'"a"\n' * 1000)[:-9])
    check(place / "a.jsonl.gz", max_bytes=3000)
    with pytest.raises(RequestError, match="cannot be read"):
        check(place / "a.jsonl.gz", max_bytes=5000)


def test_options_of_reading_that_nothing_needs_are_refused(
    run: Run, run_there: Run, place: Path, pipeline: FakePipeline
) -> None:
    (place / "old/a.txt").write_text("old text")
    words = ("data.old=@old", "data.text_field=body")
    result = run_there(*words, "data.new=@old/*.txt")
    assert result.code == 2 and "data.text_field = body: no file of the run has" in result.err
    (place / "new/b.jsonl").write_text('{"body": "text"}\n')
    assert run_there(*words, "data.new=@new").code == 0
    names = [f"{place}/{name}" for name in ("old/a.txt[0:1]#text", "new/b.jsonl[0:1]#body")]
    old, new = (f"data.{key}='{name}'" for key, name in zip(("old", "new"), names, strict=True))
    assert "data.max_rows = 5: each" in run("data=hf", old, new, "data.max_rows=5").err
    assert "data.text_column = b: each" in run("data=hf", old, new, "data.text_column=b").err


def test_files_of_a_project_that_are_no_data_are_skipped_unless_they_are_named(place: Path) -> None:
    (place / "old/package.json").write_text('{"name": "x",\n "version": 1}\n')
    (place / "old/texts.json").write_text('["a text"]')
    (place / "old/latin.c").write_bytes(b"// caf\xe9")
    (place / "old/film.ts").write_bytes(b"G\0\0G")
    for paths in (["old"], ["old/*.*"]):
        texts = found(place, *paths)
        assert names(texts, place) == ["old/a.txt", "old/texts.json"]
        kinds = ".c not in UTF-8 1, .json of one object 1, .ts not in UTF-8 1"
        assert note_on(place, *paths) == f"x: 2 files read; skipped 3 ({kinds})"
    for name, reason in (("package.json", "is an object"), ("latin.c", "is not UTF-8")):
        with pytest.raises(RequestError, match=reason):
            check(place / "old" / name)
    # Records in a file with the wrong ending are data
    (place / "old/package.json").write_text('{"text": "a"}\n{"text": "b"}\n')
    with pytest.raises(RequestError, match="one record per line"):
        check(place / "old")


def test_a_folder_of_mixed_files_says_what_it_skipped(place: Path) -> None:
    for number in range(30):
        (place / f"old/{number}.md").write_text("text")
        (place / f"old/{number}.rst").write_text("text")
    for name in ("x.pdf", "y.PDF", "z.tsv", "README", ".hidden.pdf"):
        (place / "old" / name).touch()
    os.mkfifo(place / "old/pipe.txt")
    (place / "old/away").symlink_to("nowhere")
    texts = found(place, "old")
    assert len(texts) == 61
    kinds = ".pdf 2, .tsv 1, broken link 1, no extension 1, pipe 1"
    assert note_on(place, "old") == f"x: 61 files read; skipped 6 ({kinds})"
    assert note_on(place, "old/a.txt") is None
    (place / "old/zoo").mkdir()
    (place / "old/zoo.txt").touch()
    note = note_on(place, "old/a*", "old/zo*", "old/[5-9].*")
    assert note == "x: 12 files read; skipped 2 (broken link 1, folder 1)"


def test_links_inside_are_followed(place: Path) -> None:
    elsewhere, blobs = place / "old/.elsewhere", place / "old/.blobs"
    (elsewhere / "deep").mkdir(parents=True)
    (elsewhere / "deep/c.txt").write_text("text")
    blobs.mkdir()
    (blobs / "0123").write_text('"text"')
    (place / "old/blob.jsonl").symlink_to(".blobs/0123")
    (place / "old/folder").symlink_to(elsewhere)
    (place / "old/twice").symlink_to(elsewhere / "deep")
    assert names(found(place, "old"), place) == [
        "old/a.txt", "old/blob.jsonl", "old/folder/deep/c.txt"
    ]  # fmt: skip
    assert names(found(place, "old/blob.jsonl"), place) == ["old/blob.jsonl"]
    check(place / "old", place / "old/blob.jsonl")


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize("word", ["old", "old/*", "old/*/c.txt"])
def test_links_out_of_a_folder_are_refused(run_there: Run, place: Path, word: str) -> None:
    (place / "secret").mkdir()
    (place / "secret/c.txt").write_text("a secret")
    (place / "old/b.txt").symlink_to("../secret/c.txt")
    (place / "old/deep").symlink_to("../secret")
    result = run_there(f"data.old=@{word}", "data.new=stdlib:prose")
    assert (result.code, result.written) == (2, [])
    assert "leaves the folder" in result.err and str(place / "old") in result.err
    (place / "hub/datasets--a--b/snapshots").mkdir(parents=True)  # as the hub's cache is laid out
    (place / "secret").rename(place / "hub/datasets--a--b/blobs")
    snapshot = place / "hub/datasets--a--b/snapshots/0123"
    (place / "old").rename(snapshot)
    for link, end in (("b.txt", "../../blobs/c.txt"), ("deep", "../../blobs")):
        (snapshot / link).unlink()
        (snapshot / link).symlink_to(end)
    assert len(found(place, "hub/datasets--a--b/snapshots/0123")) == 3


def test_a_link_may_be_named_by_its_own_name(
    run_there: Run, place: Path, pipeline: FakePipeline
) -> None:
    (place / "blob").write_text('"text"')
    (place / "c.jsonl").symlink_to("blob")
    assert run_there("data.old=@old", "data.new=@c.jsonl").code == 0
    assert pipeline.configs[0].data.new_sources == {"new": [str(place / "c.jsonl")]}


@pytest.mark.parametrize("target", [".", "..", "../../old", "folder"])
def test_a_loop_of_links_ends(place: Path, target: str) -> None:
    (place / "old/deep").mkdir()
    (place / "old/deep/folder").symlink_to(target)
    if target == "folder":  # a link to itself is no folder
        assert note_on(place, "old") == "x: 1 file read; skipped 1 (broken link 1)"
        return
    assert names(found(place, "old"), place) == ["old/a.txt"]


def test_many_links_to_one_folder_are_no_work(place: Path) -> None:
    for number in range(20):
        (place / f"old/{number}").mkdir()
        for name in ("a", "b"):
            (place / f"old/{number}/{name}").symlink_to(f"../{number + 1}")
    (place / "old/20").mkdir()
    (place / "old/20/c.txt").touch()
    assert names(found(place, "old"), place) == ["old/20/c.txt", "old/a.txt"]


def test_a_link_to_nothing_that_would_be_text_is_refused(place: Path) -> None:
    (place / "old/gone.txt").symlink_to("nowhere")
    with pytest.raises(RequestError, match=r"gone.txt: the link is broken"):
        found(place, "old")
    with pytest.raises(RequestError, match=r"found broken link 1"):
        found(place, "old/gone.txt")


def test_special_files_are_not_opened(run_there: Run, place: Path) -> None:
    os.mkfifo(place / "pipe.txt")
    (place / "zero.txt").symlink_to("/dev/zero")
    result = run_there("data.old=@pipe.txt", "data.new=@zero.txt")
    assert (result.code, result.written) == (2, [])
    assert "found pipe 1" in result.err and "found device 1" in result.err


def test_a_folder_that_cannot_be_listed_is_refused(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "old/closed").mkdir()
    listed = os.scandir

    def scandir(folder: str) -> object:
        if Path(folder).name == "closed":
            raise PermissionError(13, "Permission denied", folder)
        return listed(folder)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(RequestError, match=r"old/closed: the folder can't be listed \(Permission"):
        found(place, "old")


def test_files_that_vanish_are_told(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = (place / "old/a.txt", place / "old/b.txt")
    monkeypatch.setattr(sources, "text_files", lambda *_, **__: gone)
    gone[0].unlink()
    with pytest.raises(RequestError, match=r"a.txt cannot be read: there is no") as caught:
        check(place / "old")
    assert "b.txt cannot be read" in str(caught.value)


def test_a_deep_folder_and_a_long_name(place: Path) -> None:
    deep = place / "old" / "/".join("d" * 200 for _ in range(10))
    deep.mkdir(parents=True)
    (deep / f"{'n' * 250}.txt").write_text("text")
    assert len(found(place, "old")) == 2
    check(place / "old")


def test_forms_of_records_are_read_by_a_run(run_there: Run, place: Path) -> None:
    (place / "new/c.json").write_text(json.dumps([{"question": "Why?", "answer": "So."}]))
    assert run_there("data.old=@old", "data.new=@new").code == 0
    result = run_there("data.old=@old", "data.new=@new", "data.text_field=body")
    assert result.code == 2
    assert "has no field body (data.text_field = body); available: question, answer" in result.err


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The listed folders; a recorded path is searched through at most 40 entries."""
    listed: list[str] = []
    scandir, listdir = os.scandir, os.listdir

    def spy(original: Any) -> Any:
        def call(path: Any = ".") -> Any:
            listed.append(os.fspath(path))
            assert len(listed) < 100, "it walks the disk"
            return original(path)

        return call

    monkeypatch.setattr(sources, "_MAX_RECORDED", 40)
    monkeypatch.setattr(os, "scandir", spy(scandir))
    monkeypatch.setattr(os, "listdir", spy(listdir))
    return listed


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize(
    "pattern",
    [
        *("TREE", "TREE/**/*", "TREE/**/*.txt", "TREE/**/**/**/a0", "TREE/*/*/*", "TREE/a0/link"),
        *("TREE/a0/*/**/*.txt", "TREE/a0/*/../*/../*/../*", "/", "/**/*", "/*/*/*", "/**"),
    ],
)
def test_what_a_record_names_does_not_walk_the_disk(
    tmp_path: Path, counted: list[str], pattern: str
) -> None:
    for first in range(10):
        for second in range(10):
            (tmp_path / f"tree/a{first}/b{second}/c").mkdir(parents=True)
    (tmp_path / "tree/a0/link").symlink_to(tmp_path / "tree")
    word = pattern.replace("TREE", str(tmp_path / "tree"))
    counted.clear()
    with pytest.raises(RequestError, match=r"limited to 40 files|leaves the folder"):
        text_files("data.old", [word], is_recorded=True)


def test_a_small_folder_that_a_record_names_is_read(tmp_path: Path, counted: list[str]) -> None:
    (tmp_path / "texts/deep").mkdir(parents=True)
    for number in range(20):
        (tmp_path / f"texts/deep/{number}.txt").write_text("text")
    for name in range(60):  # next to it, matched by no pattern
        (tmp_path / f"other{name}").mkdir()
    for word in ("texts", "texts/*/*.txt", "texts/**/*.txt", "texts/deep/1*.txt"):
        place = str(tmp_path / word)
        found = text_files("data.old", [place], is_recorded=True)
        assert found == text_files("data.old", [place]) and len(found) in (20, 11)


def test_a_file_of_several_paths_is_read_once_and_counted(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("text")
    paths = [str(tmp_path / "b.txt"), str(tmp_path), str(tmp_path)]
    assert [path.name for path in text_files("data.new", paths)] == ["b.txt", "a.txt"]
    note = skipped_note("new", paths, key="data.new") or ""
    assert note.startswith("new: 2 files read; skipped 3") and "named again" in note
