"""`tritter report`: which folders are runs, where the page goes, and what is refused."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Run
from tests.report.conftest import SUMMARY
from tests.report.test_runs import SETTINGS


@pytest.fixture
def sweep(place: Path) -> Path:
    """A sweep of two finished runs and one that is not, in the current folder."""
    for number in range(3):
        folder = place / f"sweep/{number}"
        folder.mkdir(parents=True)
        record = {"fingerprint": SETTINGS | {"seed": number}}
        (folder / "run.json").write_text(json.dumps(record))
        if number < 2:
            write_summary(folder)
            (folder / "metrics.csv").write_text("step,train/loss\n1,2.5\n2,2.25\n")
            (folder / "metrics_pretraining.csv").write_text("step,train/loss\n1,7.5\n2,6.25\n")
    return place / "sweep"


def write_summary(folder: Path, **changes: Any) -> None:
    (folder / "summary.json").write_text(json.dumps(SUMMARY | changes))


def test_a_sweep(run: Run, sweep: Path) -> None:
    result = run("report sweep --figures figures")
    assert result.code == 0, result.err
    assert "2 runs: sweep/report.html" in result.out and "sweep/2" in result.out
    page = (sweep / "report.html").read_text()
    assert "2 finished runs" in page and "losses_1.png" not in page
    names = sorted(path.name for path in (sweep.parent / "figures").iterdir())
    assert names == [
        "changes_1.png", "changes_2.png", "cost_1.png", "cost_2.png", "losses_1.png",
        "losses_2.png", "tradeoff.png",
    ]  # fmt: skip


def test_runs_by_name_and_as_json(run: Run, sweep: Path) -> None:
    result = run("report sweep/1 sweep/0 sweep/1 --output out/pair.html --json")
    assert result.code == 0, result.err
    assert result.json == {"output": "out/pair.html", "runs": ["1", "0"], "left_out": []}
    assert (sweep.parent / "out/pair.html").is_file()
    again = run(f"report sweep/1 {sweep}/1 sweep --output again.html --json")
    assert again.json["runs"] == ["1", "0"]  # each once, however it is named


@pytest.mark.full
def test_a_page_is_replaced_only_when_asked(run: Run, sweep: Path) -> None:
    assert run("report sweep/0").code == 0
    again = run("report sweep/0")
    assert again.code == 2 and "--overwrite" in again.err
    assert run("report sweep/0 --overwrite").code == 0
    other = run("report sweep/0 --output sweep/0/summary.json --overwrite")
    assert other.code == 2 and "is a run, which may not contain reports" in other.err
    assert json.loads((sweep / "0/summary.json").read_text())["status"] == "kept"


@pytest.mark.parametrize("step", ["1", "1e999", "nan", "[]"])
def test_what_is_damaged_is_listed(run: Run, sweep: Path, step: str) -> None:
    write_summary(sweep / "0", status="wonderful")
    (sweep / "1/metrics.csv").write_text(f"step,train/loss\n{step},much\n")
    result = run("report sweep")
    assert result.code == 2
    for part in ("2 things are wrong", "sweep/0", "status", "sweep/1", "metrics.csv is damaged"):
        assert part in result.err
    assert not (sweep / "report.html").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("report nowhere", "it is not a folder"),
        ("report base", "no finished run"),
        ("report sweep/2", "one is not finished: "),
        ("report sweep --output base", "it is a folder"),
        ("report sweep --figures base", "base"),
    ],
)
def test_refused(run: Run, sweep: Path, words: str, said: str) -> None:
    before = sorted(sweep.parent.rglob("*"))
    result = run(words)
    assert result.code == 2 and said in result.err
    assert sorted(sweep.parent.rglob("*")) == before


def test_links_and_pipes_in_a_folder_are_not_followed(run: Run, sweep: Path) -> None:
    os.mkfifo(sweep / "1/metrics.csv.pipe")
    (sweep / "1/metrics.csv").unlink()
    (sweep / "1/metrics.csv.pipe").rename(sweep / "1/metrics.csv")
    (sweep / "again").symlink_to(sweep)
    result = run("report sweep")
    assert result.code == 2 and "a pipe" in result.err
