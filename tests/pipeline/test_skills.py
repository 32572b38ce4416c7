"""`data=skills`: accuracies in scores, in the gate, and in later runs."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.pipeline.plug import plug_pulled
from tests.pipeline.tiny import TINY
from tritter.checkpoints import Lineage
from tritter.config.launch.composition import load_config
from tritter.data.skills import SkillText
from tritter.evaluation.statistics import PairedScores
from tritter.pipeline import Outcome, pipeline, run_pipeline

JOB = (
    *(word for word in TINY if not word.startswith(("data=", "data.old=", "data.new="))),
    "data=skills",
    "evaluation.task_questions=40",
    "evaluation.every_n_steps=0",
    "forgetting=replay",
    "gate=default",
)
WORDS = ("data.old=key_value:150", "data.tasks=[identity:150,sorting:150,identity:150]")
Job = Callable[..., Outcome]


@pytest.fixture(scope="module")
def run_skills(tmp_path_factory: pytest.TempPathFactory) -> Job:
    cache = tmp_path_factory.mktemp("cache")

    def run_there(folder: Path, *words: str, job: tuple[str, ...] = JOB) -> Outcome:
        folder.mkdir(exist_ok=True)
        config = load_config([*job, f"cache_dir={cache}", *words])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pipeline, "plot_run", lambda *_, **__: [])
            return run_pipeline(config, run_folder=folder)

    return run_there


@pytest.fixture(scope="module")
def trained(run_skills: Job, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("skills") / "run"
    run_skills(folder, *WORDS)
    return folder


def summary_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


def scores_of(folder: Path, name: str) -> dict[str, PairedScores]:
    plain = json.loads((folder / f"scores/{name}.json").read_text())
    return {subject: PairedScores.from_dict(held) for subject, held in plain.items()}


@pytest.mark.full
def test_a_skill_has_its_accuracy_beside_its_loss_wherever_it_is_scored(trained: Path) -> None:
    summary = summary_of(trained)
    names = {"key_value", "identity", "sorting"}
    for scores in (summary["baseline"], summary["expanded"], summary["final"],
                   *(task["final"] for task in summary["tasks"])):  # fmt: skip
        assert scores.keys() == names
        for record in scores.values():
            assert record["num_questions"] == 40 and 0 <= record["accuracy"] <= 1
            assert record["chance"] == 0 and record["accuracy_standard_error"] >= 0
            assert record["loss"] > 0 and record["standard_error"] > 0
    held = scores_of(trained, "attempt_1_task_3-trained")
    assert held["sorting/accuracy"].mean() == summary["final"]["sorting"]["accuracy"]
    asked = {question.identifier for question in SkillText("sorting").questions(40)}
    assert set(held["sorting/accuracy"].identifiers) == asked
    lineage = Lineage.read(trained / "checkpoint")
    assert lineage is not None and "sorting/accuracy" in lineage.benchmark_scores
    assert lineage.domains["sorting"].paths == ("skills:sorting:150",)
    assert lineage.domains["sorting"].origin == "generated skills, version 1, seed 0"


@pytest.mark.full
def test_the_gate_asks_for_each_domain_and_each_task(trained: Path) -> None:
    """After six steps accuracy is at chance: it is reported, and only losses decide."""
    checks = {(check["check"], check["subject"]): check for check in summary_of(trained)["gate"]}
    tasks = {key: check for key, check in checks.items() if key[1].endswith("/accuracy")}
    assert set(tasks) == {
        ("retention", "key_value/accuracy"), ("retention", "sorting/accuracy"),
        ("new_capability", "identity/accuracy"), ("new_capability", "sorting/accuracy"),
    }  # fmt: skip
    assert {(name, subject.removesuffix("/accuracy")) for name, subject in tasks} <= set(checks)
    assert {check["verdict"] for check in tasks.values()} == {"reported"}
    assert "not significantly above chance" in tasks["retention", "sorting/accuracy"]["detail"]


@pytest.mark.full
def test_accuracies_are_logged_and_shown(
    trained: Path, run_skills: Job, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = list(csv.DictReader((trained / "metrics.csv").open()))
    logged = [float(row["score/sorting/accuracy"]) for row in rows if row["score/sorting/accuracy"]]
    summary = summary_of(trained)
    assert logged == [task["final"]["sorting"]["accuracy"] for task in summary["tasks"]]
    run_skills(trained, *WORDS)  # it is done, and shown again
    shown = capsys.readouterr().out
    assert "sorting accuracy" in shown and "points" in shown
    assert "answers    accuracy is measured on key_value, identity, sorting" in shown


@pytest.mark.full
def test_a_run_that_was_stopped_between_tasks_ends_alike(
    trained: Path, run_skills: Job, tmp_path: Path
) -> None:
    with plug_pulled("evaluate", of="attempt_1_task_2"):
        run_skills(tmp_path / "run", *WORDS)
    run_skills(tmp_path / "run", *WORDS)
    again, uninterrupted = summary_of(tmp_path / "run"), summary_of(trained)
    for key in ("baseline", "final", "gate", "flops"):
        assert again[key] == uninterrupted[key]
    assert again["lineage"]["model_hash"] == uninterrupted["lineage"]["model_hash"]


@pytest.mark.full
def test_a_checkpoint_is_asked_the_same_again(
    trained: Path, run_skills: Job, tmp_path: Path
) -> None:
    """All learned skills are old, and are generated again from the lineage."""
    job = tuple(word for word in JOB if not word.startswith(("model.", "data.vocab")))
    words = ("model=hf", f"model.path={trained}/checkpoint", "data.new=reversing:150")
    run_skills(tmp_path / "run", *words, "expansion=none", job=job)
    summary = summary_of(tmp_path / "run")
    assert set(summary["domains"]["old"]) == {"key_value", "identity", "sorting"}
    assert summary["domains"]["new"] == ["reversing"]
    before, after = summary_of(trained)["final"], summary["baseline"]
    for name, record in before.items():
        assert after[name] == pytest.approx(record), name
    first, then = (
        scores_of(folder, name)["identity/accuracy"]
        for folder, name in ((trained, "attempt_1_task_3-trained"), (tmp_path / "run", "baseline"))
    )
    assert first.identifiers == then.identifiers
