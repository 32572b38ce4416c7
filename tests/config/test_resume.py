"""resume=latest and resume=DIR alone: the run's own overrides, and none that could do harm."""

import json
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.config.conftest import FakePipeline, Result
from tritter.config.run_folder import read_run
from tritter.storage.records import record_text

Run = Callable[..., Result]
JOB = ("seed=1", "expansion=dus", "expansion.dus.target_layers=4", "training.max-steps=7")


def printed_words(text: str) -> list[str]:
    """Return the words of the last command that a text prints, without the program."""
    line = next(line for line in reversed(text.splitlines()) if "train.py " in line)
    return shlex.split(line[line.index("train.py ") + len("train.py ") :])


def edit(folder: Path, **changes: Any) -> None:
    """Change a run file as somebody would who can compute its digest."""
    plain = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(record_text({**plain, **changes}))


@pytest.mark.parametrize("resume", ["latest", "outputs/runs/one", "'outputs/runs/one'"])
def test_alone_it_goes_on_with_what_was_typed(
    run: Run, pipeline: FakePipeline, tmp_path: Path, resume: str
) -> None:
    assert run(*JOB, "hydra.run.dir=outputs/runs/one").code == 1
    again = run(f"resume={resume}")
    assert again.code == 1 and len(pipeline.configs) == 2
    folder = tmp_path / "outputs/runs/one"
    assert pipeline.folders == [folder, folder]
    assert pipeline.configs[1].expansion == pipeline.configs[0].expansion
    assert pipeline.configs[1].training == pipeline.configs[0].training
    words = ("seed=1", "expansion=dus", "expansion.dus.target_layers=4", "training.max_steps=7")
    assert again.out.startswith(f"resume     {folder}: {' '.join(words)}\n")
    record = read_run(folder)
    assert record.overrides == words and record.program.endswith("train.py")


@pytest.mark.parametrize(
    "words",
    [
        ["seed=1", "expansion=dus"],
        ["expansion.dus.target_layers=4"],
        ["logger=csv", "cache_dir=elsewhere", "trainer.devices=1", "trainer.progress=off"],
        ["trainer.save_every_n_steps=3", "training.max_steps=7.0"],
    ],
)
def test_what_is_the_same_or_does_not_count_may_be_typed(run: Run, words: list[str]) -> None:
    assert run(*JOB, "hydra.run.dir=outputs/runs/one").code == 1
    assert run("resume=latest", *words).code == 1
    assert len(read_run(Path("outputs/runs/one")).overrides) == 4


@pytest.mark.parametrize(
    ("word", "change"),
    [
        ("seed=5", "seed: 1 → 5"),
        ("expansion=llama_pro", "expansion.methods: [dus] → [llama_pro]"),
        ("expansion.dus.target_layers=6", "expansion.dus.target_layers: 4 → 6"),
        ("training=quick", "training.max_steps: 7 → "),
        ("~forgetting", "forgetting.methods: "),
    ],
)
def test_what_differs_is_refused_with_a_command_that_works(
    run: Run, word: str, change: str
) -> None:
    assert run(*JOB, "hydra.run.dir=outputs/runs/one", "training=default").code == 1
    refused = run("resume=latest", word)
    assert refused.code == 2 and change in refused.err
    again = run(*printed_words(refused.err))
    assert again.code == 1 and "not finite 10 times" in again.err  # what the run itself says


def test_overrides_of_hydra_are_typed_again(run: Run, pipeline: FakePipeline) -> None:
    assert run(*JOB, "hydra.verbose=true", "hydra.run.dir=outputs/runs/one").code == 1
    refused = run("resume=latest")
    assert refused.code == 2 and "hydra.verbose=true" in refused.err
    again = run(*printed_words(refused.err))
    assert again.code == 1 and len(pipeline.configs) == 2


HOSTILE = [
    "training._target_=os.system",
    "hydra/launcher=submitit_local",
    "hydra.searchpath=[file:///tmp/conf]",
    "++hydra.job_logging.handlers.x.class=os.system",
    "logger.wandb.project=${oc.env:HOME}",
    "--config-dir=/tmp/conf",
]


@pytest.mark.parametrize("word", HOSTILE)
def test_a_folder_from_elsewhere_names_no_code(run: Run, pipeline: FakePipeline, word: str) -> None:
    assert run(*JOB, "hydra.run.dir=outputs/runs/one").code == 1
    edit(Path("outputs/runs/one"), overrides=["seed=1", word])
    before = {path: path.stat().st_mtime_ns for path in Path().rglob("*")}
    refused = run("resume=outputs/runs/one")
    assert refused.code == 2 and word in refused.err and len(pipeline.configs) == 1
    assert {path: path.stat().st_mtime_ns for path in Path().rglob("*")} == before


@pytest.mark.parametrize(
    "changes",
    [
        {"overrides": None},
        {"overrides": "seed=1"},
        {"overrides": [1]},
        {"overrides": ["seed=\x1b[2J"]},
        {"overrides": ["no override"]},
        {"overrides": ["seed=1,2"]},
        {"overrides": ["resume=/etc"]},
        {"fingerprint": []},
        {"fingerprint": {}},
        {"status": "published"},
        {"left": {"/etc/passwd": "0"}, "status": "finished"},
        {"left": {"../../x": "0"}, "status": "finished"},
        {"left": ["checkpoint"]},
        {"program": ["rm"]},
        {"format_version": 3},
    ],
    ids=str,
)
def test_a_run_file_of_other_types_is_refused(run: Run, changes: dict[str, Any]) -> None:
    assert run(*JOB, "hydra.run.dir=outputs/runs/one").code == 1
    edit(Path("outputs/runs/one"), **changes)
    refused = run("resume=outputs/runs/one")
    assert refused.code == 2 and "Traceback" not in refused.err and "\x1b" not in refused.err
    assert refused.err.endswith("Nothing was written.\n")


def test_latest_skips_what_is_no_run_and_says_which_it_takes(run: Run, tmp_path: Path) -> None:
    assert run(*JOB, "hydra.run.dir=outputs/runs/old").code == 1
    for name, text in (("torn", "{"), ("older_format", '{"format_version": 1}')):
        assert run(*JOB, f"hydra.run.dir=outputs/runs/{name}").code == 1
        Path(f"outputs/runs/{name}/run.json").write_text(text)
    Path("outputs/runs/notes").mkdir()
    Path("outputs/runs/pipe").mkdir()
    os.mkfifo("outputs/runs/pipe/run.json")
    ended = run("resume=latest")
    assert ended.code == 1
    runs = tmp_path / "outputs/runs"
    assert f"resume     {runs / 'old'}: seed=1" in ended.out
    for name in ("torn", "older_format", "pipe"):
        assert f"resume     not {runs / name}: " in ended.out
    (runs / "old/run.json").unlink()
    refused = run("resume=latest")
    assert refused.code == 2 and str(runs / "torn/run.json") in refused.err


@pytest.mark.parametrize(
    "name", ["a b", "it's", 'say "x"', "a=b", "[x]", "{y}", "$HOME", "-m", "1e5", "a,b", "ä"]
)
def test_the_command_that_is_printed_works_for_any_name(
    run: Run, pipeline: FakePipeline, tmp_path: Path, name: str
) -> None:
    quoted = "'" + name.replace("'", "\\'") + "'"
    first = run("seed=1", f"hydra.run.dir={quoted}")
    assert first.code == 1, first.err
    again = run(*printed_words(first.err))
    assert again.code == 1, again.err
    assert pipeline.folders == [tmp_path / name] * 2


def test_it_is_for_the_command_line_alone(run: Run) -> None:
    assert run("seed=1", "hydra.run.dir=one").code == 1
    both = run("resume=one", "hydra.run.dir=two")
    assert both.code == 2 and "hydra.run.dir" in both.err
    assert run("-m", "resume=one", "seed=1,2").code == 2
    assert run("resume=two").code == 2


@pytest.mark.parametrize("place", [".hydra/config.yaml", "train.log", "attempt_1", "scores/x.json"])
@pytest.mark.parametrize("kind", ["link", "dangling", "pipe"])
def test_a_run_folder_that_leads_elsewhere_is_refused(
    run: Run, tmp_path: Path, place: str, kind: str
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "thesis").write_text("years of work")
    folder = tmp_path / "run"
    assert run("seed=1", f"hydra.run.dir={folder}").code == 1
    path = folder / place
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(outside / ("thesis" if kind == "link" else "new"))
    result = run("seed=1", f"hydra.run.dir={folder}")
    assert result.code == 2
    assert path.name in result.err and "hydra.run.dir" in result.err
    assert [p.name for p in outside.iterdir()] == ["thesis"]
    assert (outside / "thesis").read_text() == "years of work"


def test_links_of_wandb_to_its_own_logs_are_its_own(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert run("seed=1", f"hydra.run.dir={folder}").code == 1
    (folder / "wandb/offline-run/logs").mkdir(parents=True)
    (folder / "wandb/offline-run/logs/debug-core.log").symlink_to(tmp_path / "cache.log")
    assert run("seed=1", f"hydra.run.dir={folder}").code == 1
    (folder / "wandb").rename(tmp_path / "elsewhere")
    (folder / "wandb").symlink_to(tmp_path / "elsewhere")
    assert run("seed=1", f"hydra.run.dir={folder}").code == 2
