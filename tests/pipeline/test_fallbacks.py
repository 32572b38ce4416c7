"""Retries after a rollback: each attempt equals a run with the same overrides."""

import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.pipeline.tiny import FIXTURES
from tritter.checkpoints import Lineage
from tritter.config.folders import SearchPath
from tritter.config.launch.composition import load_config
from tritter.errors import TritterError
from tritter.evaluation.gate import Check
from tritter.pipeline import Outcome
from tritter.pipeline.branch import Branch
from tritter.pipeline.run import Run
from tritter.pipeline.stages.evaluate import Evaluate
from tritter.pipeline.verdict import Candidate
from tritter.report.summary import Summary
from tritter.report.tables import SummaryTables
from tritter.terminal import Console

RunJob = Callable[..., Outcome]
LADDER = """\
# One with another rate, one with other methods
fallbacks:
  - [training.learning_rate=1e-3]
  - [forgetting=ewc, forgetting.ewc.ewc_lambda=3, expansion=llama_pro, training.max_steps=4]
"""
SECOND, THIRD = ([*words.strip("- []\n").split(", ")] for words in LADDER.splitlines()[2:])
TASKS = f"data.tasks=[{FIXTURES / 'text/new.jsonl'},{{again:{FIXTURES / 'text/old'}}}]"
ASKED = ("gate=default", "gate.ladder=mine", "logger=csv")


def summary_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


def test_a_fallback_that_repeats_an_attempt_is_left_out() -> None:
    """By default, a run replays already, as the first fallback of `gentler` does."""
    found, said = dict[str, list[str]](), list[str]()
    for forgetting in ("[replay]", "none"):
        run: Any = SimpleNamespace(
            config=load_config(["gate.ladder=gentler", f"forgetting={forgetting}"]),
            data=SimpleNamespace(text=SimpleNamespace(tasks=["one"])),
            of_attempt=lambda number: number,
            say=lambda _, text: said.append(text),
        )
        found[forgetting] = [each.branches[0].name for each in Candidate.planned(run)]
    assert found == {
        "[replay]": ["attempt_1", "attempt_3"],
        "none": ["attempt_1", "attempt_2", "attempt_3"],
    }
    assert said == ["attempt 2 would repeat an earlier one, and is left out"]


@pytest.fixture(scope="module", autouse=True)
def ladder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("conf")
    (folder / "ladder").mkdir()
    (folder / "ladder/mine.yaml").write_text(LADDER)
    with SearchPath.of([str(folder)], None).in_use():
        yield


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[str]]:
    """Roll back attempts by name."""
    names, original = set[str](), Candidate.checks

    def checks(candidate: Candidate) -> list[Check]:
        answer = "failed" if candidate.branches[0].name in names else "passed"
        return [replace(check, verdict=answer) for check in original(candidate)]

    monkeypatch.setattr(Candidate, "checks", checks)
    yield names


@pytest.mark.full
def test_attempts_are_what_runs_of_their_own_would_be(
    run_tiny: RunJob, tmp_path: Path, failing: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the last attempt and resumed; compared with plain runs of the same overrides."""
    failing |= {"attempt_1", "attempt_2"}
    evaluation, broken = Evaluate.work, ["attempt_3"]

    def breaking(stage: Evaluate, context: Run, branch: Branch) -> Any:
        if branch.name in broken:
            raise TritterError("cut off")
        return evaluation(stage, context, branch)

    monkeypatch.setattr(Evaluate, "work", breaking)
    folder = tmp_path / "run"
    with pytest.raises(TritterError, match="cut off"):
        run_tiny(folder, *ASKED, "control=true")
    broken.clear()
    assert run_tiny(folder, *ASKED, "control=true").status == "kept"

    summary = summary_of(folder)
    first, second, third = summary["attempts"]
    assert [one["status"] for one in summary["attempts"]] == ["rolled_back", "rolled_back", "kept"]
    assert [one["overrides"] for one in summary["attempts"]] == [[], SECOND, THIRD]
    assert [one["expansion"] for one in summary["attempts"]] == [["width"]] * 2 + [["llama_pro"]]
    assert [one["forgetting"] for one in summary["attempts"]] == [["ewc", "replay"]] * 2 + [["ewc"]]
    for key in ("status", "gate", "final", "expanded", "jump", "tasks"):
        assert summary[key] == third[key]
    assert summary["expansion"] == ["llama_pro"] and summary["forgetting"] == ["ewc"]
    assert [one["steps"] for one in (first, second, third)] == [6, 6, 4]
    assert first["final"] != second["final"] != third["final"]

    ledger = json.loads((folder / "ledger.json").read_text())["stages"]
    assert {"importance", "importance_3", "gate", "attempt_2.gate"} <= ledger.keys()
    assert "importance_2" not in ledger  # its methods are those of the first
    fitted = sum(ledger[f"attempt_{number}.fit"]["flops"]["fit"] for number in (1, 2, 3))
    assert summary["flops"]["fit"] == pytest.approx(fitted)
    assert summary["control"]["steps"] == 4  # trained as the last attempt was
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    assert rows[-1]["step"] == "4"
    lines = [text.plain for _, text in SummaryTables(Summary.of(summary))._lines(Console())]
    assert any("2: training.learning_rate=1e-3: " in line for line in lines)

    kept = Lineage.of(folder / "checkpoint")
    assert kept.parent_path == "../attempt_3/expanded"
    assert [one["name"] for one in kept.training_config["forgetting"]] == ["ewc"]
    failing.clear()
    for number, words in enumerate(([], SECOND, THIRD), start=1):
        alone = tmp_path / f"alone_{number}"
        run_tiny(alone, "gate=default", "logger=csv", *words)
        trained = Lineage.of(alone / "attempt_1/trained")
        assert Lineage.of(folder / f"attempt_{number}/trained").model_hash == trained.model_hash


@pytest.mark.full
def test_tasks_are_tried_again_and_what_is_left_is_the_baseline_when_nothing_helps(
    run_tiny: RunJob, tmp_path: Path, failing: set[str]
) -> None:
    failing |= {"attempt_1", "attempt_2"}
    folder = tmp_path / "run"
    outcome = run_tiny(folder, *ASKED, TASKS, "data.new=null", "gate.max_attempts=2")
    summary = summary_of(folder)
    assert outcome.status == summary["status"] == "rolled_back"
    assert len(summary["attempts"]) == 2 and len(summary["attempts"][1]["tasks"]) == 2
    assert (folder / "attempt_2_task_2/trained").is_dir()
    assert summary["final"] == summary["baseline"]
    assert (
        Lineage.of(folder / "checkpoint").model_hash == Lineage.of(folder / "baseline").model_hash
    )
