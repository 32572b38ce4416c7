"""`tritter compare`: what differs is said, and paired where the documents are the same."""

import copy
import csv
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cli.conftest import Run
from tests.report.conftest import SUMMARY
from tests.report.test_runs import SETTINGS
from tritter.evaluation.gate import Check
from tritter.evaluation.statistics import _NUM_RESAMPLES, PairedScores

DOCUMENTS = 60


def scored(factor: float, *, seed: int, first: int = 0, count: int = DOCUMENTS) -> PairedScores:
    generator = torch.Generator().manual_seed(seed)
    size = torch.randint(50, 500, (count,), generator=torch.Generator().manual_seed(7))
    noise = 1 + 0.02 * torch.randn(count, generator=generator).double()
    return PairedScores(
        identifiers=tuple(f"d{first + n}" for n in range(count)),
        values=size.double() * factor * noise,
        weights={"tokens": size, "bytes": 3 * size},
        unit="nats",
    )


def write_run(folder: Path, scores: dict[str, PairedScores], **settings: Any) -> None:
    """Leave what a finished run leaves, of scores that its summary tells."""
    (folder / "scores").mkdir(parents=True)
    summary = copy.deepcopy(SUMMARY)
    final = summary["attempts"][0]["final"]  # type: ignore[index]
    for name, held in scores.items():
        final[name] = held.record()
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "run.json").write_text(json.dumps({"fingerprint": SETTINGS | settings}))
    plain = {name: held.to_dict() for name, held in scores.items()}
    (folder / "scores/attempt_1-trained.json").write_text(json.dumps(plain))
    header = "step,train/loss,performance/peak_memory_bytes\n"
    (folder / "metrics.csv").write_text(f"{header}1,2.5,\n2,2.25,300000000\n3,,200000000\n")


@pytest.fixture
def runs(place: Path) -> Path:
    """`first`, `better` on code and worse on prose, and `other` on other documents of prose."""
    code = scored(3.0, seed=1)
    write_run(place / "first", {"prose": scored(2.0, seed=2), "code": code}, seed=0)
    better = {"prose": scored(2.1, seed=3), "code": scored(2.7, seed=4)}
    write_run(place / "better", better, seed=0, training={"learning_rate": 0.1})
    other = {"prose": scored(2.0, seed=2, first=100), "code": code}
    write_run(place / "other", other, seed=1)
    return place


def test_differences_are_those_of_the_paired_bootstrap(run: Run, runs: Path) -> None:
    content = run("compare first better other --json").json
    assert content["reference"] == "first"
    found = {(each["subject"], each["run"]): each for each in content["paired"]}
    for domain, factors in {"prose": (2.0, 2, 2.1, 3), "code": (3.0, 1, 2.7, 4)}.items():
        base, base_seed, factor, seed = factors
        harm = scored(base, seed=base_seed).relative_forgetting(scored(factor, seed=seed))
        each = found[domain, "better"]
        assert each["value"] == harm.value and each["n"] == DOCUMENTS
        assert each["lower"] == harm.lower(0.975) < harm.value < each["upper"]
        assert each["upper"] == harm.upper(0.975)
    assert _NUM_RESAMPLES > 1000
    assert found["prose", "better"]["lower"] > 0 > found["code", "better"]["upper"]
    # The same numbers on other documents say nothing in pairs
    assert found["prose", "other"]["why_not"] == "not paired: different documents"
    assert found["prose", "other"]["value"] is None
    assert found["code", "other"]["value"] == 0
    by_name = {each["name"]: each for each in content["runs"]}
    assert by_name["first"]["peak_memory_bytes"] == 3e8
    assert by_name["first"]["total_flops"] == SUMMARY["flops"]["total"]  # type: ignore[index]


def test_there_are_bounds_from_as_many_documents_as_the_gate_asks_for(
    run: Run, place: Path
) -> None:
    for count in (Check.MIN_DOCUMENTS - 1, Check.MIN_DOCUMENTS):
        for name, factor in {"first": 2.0, "other": 2.1}.items():
            held = {"prose": scored(factor, seed=int(10 * factor), count=count)}
            write_run(place / f"{name}_{count}", held, seed=0)
        content = run(f"compare first_{count} other_{count} --json").json
        (pair,) = (each for each in content["paired"] if each["subject"] == "prose")
        assert pair["value"] > 0 and pair["n"] == count
        assert (pair["lower"] is None) == (pair["upper"] is None) == (count < Check.MIN_DOCUMENTS)


def test_only_what_differs_is_told_of_the_settings(run: Run, runs: Path) -> None:
    settings = run("compare first better --json").json["settings"]
    assert "seed" not in settings
    assert settings["training.learning_rate"]["better"] == 0.1
    seeds = run("compare first other --json").json
    assert seeds["settings"] == {"seed": {"first": 0, "other": 1}}
    assert [group["runs"] for group in seeds["groups"]] == [["first", "other"]]


def test_a_terminal_shows_what_takes_seconds(
    run: Run, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "computing bounds" in run("compare first better").err
    assert "drawing the figures" in run("report first --output page.html").err


def test_the_terminal_names_runs_once(run: Run, runs: Path) -> None:
    result = run("compare first better other")
    assert result.code == 0, result.err
    out = [" ".join(line.split()) for line in result.out.splitlines()]
    assert out[:3] == ["A first", "B better", "C other"]
    assert any(line.startswith("prose B +5.") for line in out)
    assert any(line.startswith("C -") and "not paired: different documents" in line for line in out)
    for title in (
        "Settings that differ",
        "Losses",
        "Differences to A, paired by document",
        "Over seeds",
        "Cost",
    ):
        assert title in out
    assert any("300 M" in line for line in out)


def test_the_settings_of_many_runs_fit_a_terminal(run: Run, runs: Path) -> None:
    for job in range(12):
        body = {"width": {"init": "fresh", "shares": "unequal"}, "methods": ["width"]}
        settings = {"seed": job % 2, "expansion": body if job < 6 else {"methods": []}}
        write_run(runs / "sweep" / str(job), {"prose": scored(2.0, seed=2)}, **settings)
    out = [" ".join(line.split()) for line in run("compare sweep").out.splitlines()]
    assert out[:12] == [f"{chr(ord('A') + job)} {job}" for job in range(12)], "by number"
    assert "run seed expansion.methods" in out
    assert "--json has all" in " ".join(out)
    assert not any("width.init" in line for line in out)
    for job in (12, 13):
        words = {f"of_{number}": job + number for number in range(4)}
        write_run(runs / "sweep" / str(job), {"prose": scored(2.0, seed=2)}, seed=0, **words)
    out = [" ".join(line.split()) for line in run("compare sweep").out.splitlines()]
    assert "setting value runs" in out
    assert "seed 0 A C E G I K M N" in out and "1 B D F H J L" in out
    assert "of_3 - A B C D E F G H I J K L" in out and "15 M" in out and "16 N" in out


def test_right_answers_are_named_in_words(run: Run, runs: Path) -> None:
    path = runs / "first/summary.json"
    summary = json.loads(path.read_text())
    answers = {"accuracy": 0.5, "standard_error": 0.1, "n": 60}
    for scores in (summary["baseline"], summary["attempts"][0]["final"]):
        scores["code"] |= answers
    path.write_text(json.dumps(summary))
    out = run("compare first other").out
    assert "code accuracy" in out and "/accuracy" not in out


def test_a_page_and_files_of_numbers(run: Run, runs: Path) -> None:
    assert run("compare first better --output out/page.html").code == 0
    page = (runs / "out/page.html").read_text()
    assert "Differences to first, paired by document" in page and "Loss curves" in page
    assert page.count("Settings that differ") == 1
    assert run("compare first better --output numbers.csv").code == 0
    table = list(csv.DictReader((runs / "numbers.csv").open()))
    pairs = [row for row in table if row["quantity"].endswith("paired by document")]
    content = run("compare first better --json").json
    assert [float(row["value"]) for row in pairs] == [each["value"] for each in content["paired"]]
    assert run("compare first better --output numbers.json").code == 0
    written = json.loads((runs / "numbers.json").read_text())
    assert written["paired"] == content["paired"]


def test_a_checkpoint_stands_for_the_run_that_left_it(run: Run, runs: Path) -> None:
    (runs / "first/checkpoint").mkdir()
    (runs / "first/checkpoint/tritter.json").write_text("{}")
    (runs / "better/attempt_1/trained").mkdir(parents=True)
    (runs / "better/attempt_1/trained/tritter.json").write_text("{}")
    content = run("compare first/checkpoint better/attempt_1/trained --json").json
    assert [each["name"] for each in content["runs"]] == ["first", "better"]


def test_a_file_of_numbers_is_what_is_printed(run: Run, runs: Path) -> None:
    unfinished = runs / "cut-off"
    unfinished.mkdir()
    (unfinished / "run.json").write_text("{}")
    words = "compare first better cut-off --json --output numbers.json"
    printed = run(words).json
    assert printed["left_out"] == ["cut-off"]
    assert json.loads((runs / "numbers.json").read_text()) == printed


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize("kind", ["json", "csv", "html"])
def test_settings_and_names_that_files_have_no_signs_for(run: Run, runs: Path, kind: str) -> None:
    settings = {"training": {"rate": float("nan"), "rates": [1.0, float("-inf")]}}
    named = runs / "sweep" / os.fsdecode(b"na\xffme")
    write_run(named, {"prose": scored(2.0, seed=2)}, **settings)
    result = run("compare", "first", "sweep", "--json", "--output", f"numbers.{kind}")
    assert result.code == 0, result.err
    told, name = result.json["settings"], str(named.relative_to(runs))
    assert told["training.rate"][name] == "nan"
    assert told["training.rates"][name] == [1.0, "-inf"]
    assert "nan" in (runs / f"numbers.{kind}").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: path.unlink(), "no scores/attempt_1-trained.json"),
        (lambda path: path.write_text("{"), "cannot be read"),
        (lambda path: path.write_text('{"prose": 3}'), "scores are not a JSON object"),
        (
            lambda path: path.write_text(path.read_text().replace("d7", "d8", 1)),
            "not paired: different documents",
        ),
        (
            lambda path: path.write_text(json.dumps({"prose": scored(5.0, seed=0).to_dict()})),
            "contradicts summary.json",
        ),
        (lambda path: (path.unlink(), os.mkfifo(path)), "a pipe"),
    ],
)
def test_damaged_scores_leave_the_rest(run: Run, runs: Path, damage: Any, said: str) -> None:
    damage(runs / "better/scores/attempt_1-trained.json")
    result = run("compare first better --json")
    assert result.code == 0, result.err
    assert said in result.json["paired"][0]["why_not"]
    assert result.json["runs"][1]["subjects"][0]["trained"] is not None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("first", "needs two or more"),
        ("first first", "needs two or more"),
        ("first better base", "RUN_OR_SWEEP = base: it contains no finished run"),
        ("nowhere first", "it is not a folder"),
        ("first better --output page.pdf", "must be one of .html, .csv, .json"),
        ("first better --output base.csv", "it is a folder"),
        ("first better --output there.json", "it exists already"),
    ],
)
def test_refused(run: Run, runs: Path, words: str, said: str) -> None:
    (runs / "base.csv").mkdir()
    (runs / "there.json").write_text("{}")
    result = run(f"compare {words}")
    assert result.code == 2 and said in result.err
    assert (runs / "there.json").read_text() == "{}"
