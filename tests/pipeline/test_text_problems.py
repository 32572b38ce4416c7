"""Data that breaks after validation, or is too large to validate, fails a run with a list."""

import json
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import datasets
import pytest

from tritter.config.launch.entry import main
from tritter.config.launch.jobs import RunStatus
from tritter.data import sources
from tritter.errors import RequestError
from tritter.pipeline import run_pipeline

Write = Callable[[Path, Sequence[str]], str]


def test_what_is_found_when_the_run_reads_it_is_listed_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sources.check_contents, "__kwdefaults__", {"max_bytes": 0})
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text("text")
        (tmp_path / name / "b.jsonl").write_text('\n{"body": 1}\n3\n')
    run = tmp_path / "run"
    words = ["data=text", f"data.old={tmp_path}/old", f"data.new={tmp_path}/new", "model=tiny"]
    words += [f"hydra.run.dir={run}", f"cache_dir={tmp_path}/cache", "logger=csv"]
    assert main(run_pipeline, arguments=words) == 1
    errors = capsys.readouterr().err
    assert "the data has 4 problems:" in errors
    for name in ("old", "new"):
        assert f"data.{name}: {tmp_path}/{name}/b.jsonl, line 2 has no field text" in errors
        assert f"data.{name}: {tmp_path}/{name}/b.jsonl, line 3 is a number" in errors
    assert f"Run folder: {run}" in errors
    status = RunStatus.read(run)
    assert (status.status, status.exit_code) == ("failed", 1)


def of_side(side: str, *, seed: int = 0, fraction: float = 0.2) -> list[str]:
    """Return documents that the split puts on one side, by the documented rule."""
    found: dict[str, list[str]] = {"train": [], "validation": []}
    for number in range(60):
        text = f"text {number}"
        key = sha256(text.encode()).hexdigest()
        drawn = int(sha256(f"{seed}\0{key}".encode()).hexdigest(), 16) / 2**256
        found["validation" if drawn < fraction else "train"].append(text)
    return found[side]


def write_files(place: Path, texts: Sequence[str]) -> str:
    place.mkdir()
    for number, text in enumerate(texts):
        (place / f"{number}.txt").write_text(text)
    return str(place)


def write_records(place: Path, texts: Sequence[str]) -> str:
    place.with_suffix(".jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return str(place.with_suffix(".jsonl"))


def write_dataset(place: Path, texts: Sequence[str]) -> str:
    datasets.Dataset.from_dict({"text": list(texts)}).save_to_disk(place)
    return f"hf:{place}"


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(
    ("source", "write"),
    [("text", write_files), ("text", write_records), ("hf", write_dataset)],
)
@pytest.mark.parametrize("key", ["data.new", "data.old", "data.tasks"])
def test_a_text_of_one_side_is_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], source: str, write: Write, key: str
) -> None:
    train, validation = of_side("train"), of_side("validation")
    both = write(tmp_path / "both", [*train[:2], *validation[:1]])
    first = write(tmp_path / "first", [*train[10:12], *validation[5:7]])
    run, started = tmp_path / "run", list[Path]()

    def pipeline(config: Any, *, run_folder: Path) -> Any:
        started.append(run_folder)
        raise RequestError("enough")

    def code(place: str, *words: str) -> int:
        own = {"data.new": both, "data.old": both} | {key: place}
        if key == "data.tasks":
            own = {"data.old": both, key: f"[{{a: {first}}},{{b: {place}}}]"}
        own = {n: f"{{x: {v}}}" if n == "data.new" and v == both else v for n, v in own.items()}
        typed = [f"{name}={value}" for name, value in own.items()]
        typed += [f"data={source}", f"hydra.run.dir={run}", f"cache_dir={tmp_path}/cache", *words]
        return main(pipeline, arguments=typed)

    named = "data.tasks.b" if key == "data.tasks" else key
    for name, texts in (("one", train[:1]), ("train", train[:9]), ("held", validation[:4])):
        assert code(write(tmp_path / name, texts)) == 2
        message = capsys.readouterr().err
        assert f"error: {named} = " in message and f"(of {len(texts)})" in message
        assert "Nothing was written." in message
        assert not run.exists() and not (tmp_path / "cache").exists() and not started
    other = f"seed={next(s for s in range(99) if train[0] in of_side('validation', seed=s))}"
    assert code(write(tmp_path / "again", train[:1]), other) == 2
    assert "0 training and 1 validation documents" in capsys.readouterr().err
    assert code(write(tmp_path / "whole", [train[3], validation[3]])) == 2
    assert started == [run] and "enough" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["data.old={0}", "data.new={0}"], "data.new"),
        (["data.old={{x:{0}}}", "data.new={{x:{0}}}"], "data.new.x"),
        (["data.old={0}", "data.new={1}"], "data.new"),
        (["data.old={0}", "data.tasks=[{0},{1}]"], "data.tasks"),
    ],
)
def test_the_same_data_as_old_and_new_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], key: str
) -> None:
    """Also as another format, in another order."""
    texts = [f"text {number}" for number in range(60)]
    folder, rows = write_files(tmp_path / "texts", texts), tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"text": f"{text}\n"}) for text in texts[::-1]))
    run = tmp_path / "run"
    arguments = [word.format(folder, rows) for word in words]
    arguments += ["data=text", f"hydra.run.dir={run}", "model=tiny"]
    assert main(run_pipeline, arguments=arguments) == 2
    errors = capsys.readouterr().err
    assert f"error: {key}" in errors and " old " in errors
    assert not run.exists()


def test_bad_lines_are_named_before_the_split(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "new.jsonl").write_text('{"text": "one"}\n' + "{bad\n" * 9)
    old = write_files(tmp_path / "old", [f"text {number}" for number in range(60)])
    arguments = ["data=text", f"data.old={old}", f"data.new={tmp_path}/new.jsonl", "model=tiny"]
    assert main(run_pipeline, arguments=[*arguments, f"hydra.run.dir={tmp_path}/run"]) == 2
    errors = capsys.readouterr().err
    assert 0 < errors.index("Skipped 9 of 10 records") < errors.index("the split gives")


@pytest.mark.parametrize("exists", [False, True])
def test_a_request_refused_by_the_first_stage_leaves_no_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], exists: bool
) -> None:
    def refuses(config: Any, *, run_folder: Path) -> Any:
        (run_folder / "baseline").mkdir()
        raise RequestError("data.new: nothing to learn.")

    run = tmp_path / "made/for/run"
    if exists:
        run.mkdir(parents=True)
    assert main(refuses, arguments=["model=tiny", f"hydra.run.dir={run}"]) == 2
    assert capsys.readouterr().err.endswith("nothing to learn.\nNothing was written.\n")
    assert list(tmp_path.rglob("*")) == [tmp_path / "made", tmp_path / "made/for", run] * exists


def test_after_a_stage_a_refused_request_has_failed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuses(config: Any, *, run_folder: Path) -> Any:
        (run_folder / "ledger.json").write_text("{}")
        raise RequestError("data.new: nothing to learn.")

    assert main(refuses, arguments=["model=tiny", f"hydra.run.dir={tmp_path / 'run'}"]) == 1
    assert (
        "Fix this, then resume with (most changed keys need a new run):" in capsys.readouterr().err
    )
    assert (tmp_path / "run/ledger.json").exists()
