"""Runs that grow to a size: each round starts from the result of the previous one."""

import csv
import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests import oracle
from tests.pipeline.plug import plug_pulled
from tritter.checkpoints import Lineage
from tritter.config.launch.composition import load_config
from tritter.errors import RequestError
from tritter.evaluation.gate import Check
from tritter.pipeline import Outcome
from tritter.pipeline.metrics import _BEFORE, log_branch
from tritter.pipeline.verdict import Candidate
from tritter.training import read_metrics

RunJob = Callable[..., Outcome]
# Two rounds from the small job's 60,576 parameters; the gate keeps every result.
GROW = ("pipeline.target_params=110k", "training.max_steps=10", "gate='off'")
PROTECTED = (*GROW, "forgetting=[ewc,replay]", "forgetting.ewc.num_sequences=32")


def summary_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


def lineage_of(folder: Path) -> Lineage:
    lineage = Lineage.read(folder)
    assert lineage is not None
    return lineage


@pytest.fixture(scope="module")
def grown(run_job: RunJob, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rounds") / "run"
    run_job(folder, *PROTECTED, "control=true", "evaluation.every_n_steps=1")
    return folder


@pytest.mark.full
def test_rounds_reach_the_target(run_tiny: RunJob, tmp_path: Path) -> None:
    run_tiny(tmp_path / "run", "pipeline.target_params=20k", "forgetting=replay")
    summary = summary_of(tmp_path / "run")
    rounds, target = summary["rounds"], summary["target"]
    assert len(rounds) > 1 and target["reaches_target"] and summary["attempts"] == rounds[-1:]
    assert [record["parameters"] for record in rounds] == target["planned"]
    assert abs(summary["parameters"]["final"] / 20_000 - 1) <= 0.1
    assert rounds[1]["baseline"] == rounds[0]["final"] and summary["final"] == rounds[-1]["final"]


@pytest.mark.full
def test_every_round_is_told_and_the_last_stands_in_front(grown: Path) -> None:
    summary = summary_of(grown)
    rounds, target = summary["rounds"], summary["target"]
    assert summary["status"] == "ungated" and target["reaches_target"]
    assert target["target_params"] == 110_000
    assert len(rounds) == 2 and summary["attempts"] == rounds[-1:]
    assert [record["parameters"] for record in rounds] == target["planned"]
    assert summary["parameters"]["final"] == rounds[-1]["parameters"]
    assert abs(summary["parameters"]["final"] / 110_000 - 1) <= 0.1
    assert summary["expansion"] == ["width", "width"]
    assert summary["final"] == rounds[-1]["final"]
    assert "baseline" not in rounds[0] and rounds[1]["baseline"] == rounds[0]["final"]
    assert rounds[1]["expanded"]["prose"]["loss"] == pytest.approx(
        rounds[0]["final"]["prose"]["loss"], rel=1e-4
    )  # width is exact: a round starts from the scores that the one before it ended with


@pytest.mark.full
def test_each_round_has_the_level_that_it_came_from(grown: Path) -> None:
    """The same text each time: a round is given what the one before it left, and what the control
    starts at is the base."""
    second, control = (list(csv.DictReader((grown / each).open())) for each in (
        "metrics.csv", "control/metrics.csv",
    ))  # fmt: skip
    first = read_metrics(grown / "round_1")
    for name in ("eval/prose/loss", "eval/code/loss"):
        ends = [row[name] for row in first if row[name]]
        assert [row["step"] for row in second if row[name]] == [str(n) for n in range(-1, 11)]
        assert float(second[0][name]) == pytest.approx(float(ends[-1]), rel=1e-6)
        base = next(float(row[name]) for row in control if row[name])
        stages_done = json.loads((grown / "ledger.json").read_text())["stages"]
        before = stages_done["round_1.expand"]["found"]["before"][name]
        assert before == pytest.approx(base, rel=1e-6)
        assert float(ends[0]) == pytest.approx(base, rel=1e-4)  # width is exact


@pytest.mark.full
def test_all_rounds_stand_in_a_row(grown: Path) -> None:
    with (grown / "metrics_rounds.csv").open() as lines:
        steps = [int(row["step"]) for row in csv.DictReader(lines) if row["eval/prose/loss"]]
    assert steps == [*range(-1, 11), *range(10, 21)]  # step 10: before and after an expansion


def test_a_later_round_logs_no_step_before_its_first(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The previous round's last step already has the same scores."""
    logged = list[int]()
    logger = SimpleNamespace(log_metrics=lambda _, step: logged.append(step))
    module = "tritter.pipeline.metrics"
    monkeypatch.setattr(f"{module}.open_loggers", lambda *_, **__: nullcontext([logger]))
    monkeypatch.setattr(f"{module}._before_metrics", lambda *_: {"eval/prose/loss": 3.0})
    run: Any = SimpleNamespace(ledger={}, reading=str, folder=tmp_path, loggers=[])
    branch: Any = SimpleNamespace(name="round", location="round", part=None)
    for first_step in (0, 10):
        with log_branch(run, branch, first_step=first_step):
            assert logged == [_BEFORE]


@pytest.mark.full
def test_costs_are_those_of_all_rounds(grown: Path) -> None:
    summary = summary_of(grown)
    ledger = json.loads((grown / "ledger.json").read_text())["stages"]
    fitted = [ledger[f"round_{number}.fit"]["flops"]["fit"] for number in (1, 2)]
    assert summary["flops"]["fit"] == pytest.approx(sum(fitted)) and min(fitted) > 0
    assert summary["flops"]["total"] == pytest.approx(
        sum(value for name, value in summary["flops"].items() if name != "total")
    )
    assert "round_1.importance" in ledger and "importance" in ledger
    # The control is trained for as many steps as all rounds together
    assert summary["control"]["steps"] == sum(record["steps"] for record in summary["rounds"])


@pytest.mark.full
def test_the_checkpoint_leads_back_through_every_round(grown: Path) -> None:
    summary = summary_of(grown)
    folder = grown / summary["checkpoint"]
    model = oracle.stock(folder)
    assert sum(p.numel() for p in model.parameters()) == summary["parameters"]["final"]
    chain = [folder]
    while (parent := lineage_of(chain[-1])).parent_path is not None:
        chain.append((chain[-1] / parent.parent_path).resolve())
        assert lineage_of(chain[-1]).model_hash == parent.parent_hash
    names = [str(place.relative_to(grown.resolve())) for place in chain[1:]]
    assert names == ["round_2/expanded", "round_1/trained", "round_1/expanded", "baseline"]
    records = lineage_of(folder).expansion_history
    assert [record.continued_training_steps for record in records] == [10, 10]
    assert all(set(record.performance_delta) == {"prose", "code"} for record in records)
    assert records[0].performance_delta != records[1].performance_delta


@pytest.mark.full
def test_history_verifies_the_chain(grown: Path) -> None:
    from tritter.cli import main

    assert main(["history", str(grown / "checkpoint"), "--verify"]) == 0


@pytest.mark.full
def test_rounds_see_new_data_in_an_order_of_their_own(grown: Path) -> None:
    first, second = ((grown / f"round_{n}/metrics.csv").read_text() for n in (1, 2))
    assert first != second


@pytest.mark.full
def test_a_plan_uses_the_methods_that_are_named(run_job: RunJob, tmp_path: Path) -> None:
    run_job(
        tmp_path / "run",
        "expansion=[width,llama_pro]",
        "pipeline.strategy=depth_first",
        "pipeline.target_params=85k",
        *GROW[1:],
    )
    summary = summary_of(tmp_path / "run")
    assert set(summary["expansion"]) == {"llama_pro"}
    assert summary["target"]["reaches_target"]


@pytest.mark.full
def test_max_rounds_stops_before_the_target(run_job: RunJob, tmp_path: Path) -> None:
    run_job(tmp_path / "run", *GROW, "pipeline.max_rounds=1")
    summary = summary_of(tmp_path / "run")
    assert len(summary["rounds"]) == 1 and not summary["target"]["reaches_target"]
    assert summary["parameters"]["final"] == summary["rounds"][0]["parameters"] < 99_000


def fail_round(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    original = Candidate.checks

    def checks(candidate: Candidate) -> list[Check]:
        made = original(candidate)
        if candidate.branches[0].name != name:
            return made
        training = next(check for check in made if check.name == "training")
        failed = replace(training, verdict="failed")
        return [failed if check is training else check for check in made]

    monkeypatch.setattr(Candidate, "checks", checks)


@pytest.mark.full
def test_a_round_that_is_rolled_back_stops_the_loop(
    run_job: RunJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_round(monkeypatch, "round_2")
    outcome = run_job(
        tmp_path / "run", "pipeline.target_params=250k", "training.max_steps=10",
        "gate.retention=9", "gate.confidence=0.501",
    )  # fmt: skip
    summary = summary_of(tmp_path / "run")
    first, second = summary["rounds"]
    assert len(summary["target"]["planned"]) > 2
    assert first["status"] != "rolled_back"
    assert outcome.status == summary["status"] == second["status"] == "rolled_back"
    assert summary["final"] == first["final"]
    assert summary["parameters"]["final"] == first["parameters"]
    assert not summary["target"]["reaches_target"]
    kept, round_one = tmp_path / "run/checkpoint", tmp_path / "run/round_1/trained"
    assert lineage_of(kept).model_hash == lineage_of(round_one).model_hash
    assert lineage_of(kept).expansion_history == lineage_of(round_one).expansion_history
    parent = (kept / str(lineage_of(kept).parent_path)).resolve()
    assert parent == (tmp_path / "run/round_1/expanded").resolve()


@pytest.mark.full
@pytest.mark.parametrize(("stage", "branch"), [("fit", "round_2"), ("keep", "round_1")])
def test_a_stopped_loop_goes_on_to_the_same_weights(
    run_job: RunJob,
    grown: Path,
    tmp_path: Path,
    stage: str,
    branch: str,
) -> None:
    overrides = (*PROTECTED, "control=true")
    with plug_pulled(stage, of=branch):
        run_job(tmp_path / "run", *overrides)
    run_job(tmp_path / "run", *overrides)
    whole, parts = lineage_of(grown / "checkpoint"), lineage_of(tmp_path / "run/checkpoint")
    assert whole.model_hash == parts.model_hash
    assert (
        summary_of(grown)["rounds"][0]["final"]
        == summary_of(tmp_path / "run")["rounds"][0]["final"]
    )


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["pipeline.target_params=100"], r"pipeline\.target_params = 100 parameters: must be l"),
        (["pipeline.target_params=huge"], r"pipeline\.target_params = huge: must be a whole"),
        (["pipeline.target_params=0"], r"pipeline\.target_params = 0"),
        (["pipeline.max_rounds=3"], r"pipeline\.max_rounds = 3: requires pipeline\.target_params"),
        (["pipeline.strategy=balanced"], r"pipeline\.strategy = balanced: requires"),
        (
            ["pipeline.target_params=1M", "pipeline.strategy=balance"],
            r"pipeline\.strategy = balance.*balanced",
        ),
        (
            ["pipeline.target_params=1M", "pipeline.strategy=depth_first"],
            r"pipeline\.strategy = depth_first: requires a method that grows depth",
        ),
        (
            ["pipeline.target_params=1M", "expansion.width.hidden_size=96"],
            r"expansion\.width\.hidden_size = 96: the plan chooses the sizes",
        ),
        (["pipeline.target_params=1M", "expansion=[dus,llama_pro]"], "both grow depth"),
        (["pipeline.target_params=1M", "expansion=moe"], "can't choose the sizes of moe"),
    ],
)
def test_what_cannot_be_looped_is_refused_before_anything_is_written(
    overrides: list[str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(RequestError, match=message):
        load_config([f"cache_dir={tmp_path}", *overrides])


def test_counts_are_read_in_words(tmp_path: Path) -> None:
    for text in ("2M", "2_000_000", "2e6", "0.002B"):
        config = load_config([f"cache_dir={tmp_path}", f"pipeline.target_params={text}"])
        assert config.pipeline.target_params == 2_000_000
