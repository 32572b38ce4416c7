"""`data.tasks`: each task starts from the previous result, and the checks of the gate."""

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import CSVLogger

from tests.pipeline.plug import plug_pulled
from tests.pipeline.tiny import FIXTURES, TINY
from tritter.checkpoints import Lineage
from tritter.config.launch.composition import load_config
from tritter.evaluation.statistics import PairedScores
from tritter.pipeline import Outcome, pipeline, run_pipeline
from tritter.pipeline.branch import Branch
from tritter.pipeline.ledger import StageResult, TrainingFound
from tritter.pipeline.metrics import _steps_after
from tritter.pipeline.run import Run
from tritter.pipeline.stages.fit import Fit

NEW = FIXTURES / "text/new.jsonl"
JOB = [word for word in TINY if not word.startswith("data.new=")]
RunJob = Callable[..., Outcome]


@pytest.fixture(scope="module")
def run_tasks(tmp_path_factory: pytest.TempPathFactory) -> RunJob:
    cache = tmp_path_factory.mktemp("cache")

    def run_there(folder: Path, *words: str, job: list[str] = JOB) -> Outcome:
        folder.mkdir(exist_ok=True)
        config = load_config([*job, f"cache_dir={cache}", "evaluation.every_n_steps=3", *words])
        with pytest.MonkeyPatch.context() as patch:
            if not config.control:  # one run draws what there is to draw
                patch.setattr(pipeline, "plot_run", lambda *_, **__: [])
            return run_pipeline(config, run_folder=folder)

    return run_there


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "code.jsonl"
    texts = [f"def times_{n}(x):\n    return {n} * x + sum(range({n}))\n" for n in range(30)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="module")
def words(code: Path) -> tuple[str, ...]:
    tasks = f"data.tasks=[{NEW},{code},{NEW}]"
    return (tasks, "control=true", "pipeline.keep_stages=true")


@pytest.fixture(scope="module")
def trained(
    run_tasks: RunJob, words: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("tasks") / "run"
    run_tasks(folder, *words)
    return folder


def summary_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


def scores_of(folder: Path, name: str, domain: str) -> PairedScores:
    return PairedScores.from_dict(json.loads((folder / f"scores/{name}.json").read_text())[domain])


@pytest.mark.full
def test_each_task_has_its_record_and_the_last_stands_in_front(trained: Path) -> None:
    summary = summary_of(trained)
    assert summary["domains"] == {"old": ["old"], "new": ["new", "code"]}
    tasks, control = summary["tasks"], summary["control"]["tasks"]
    assert [task["domains"] for task in tasks] == [["new"], ["code"], ["new"]]
    assert [task["steps"] for task in tasks] == [6, 6, 6] and summary["attempts"][0]["steps"] == 18
    assert summary["final"] == tasks[-1]["final"] != tasks[0]["final"]
    assert [task["domains"] for task in control] == [task["domains"] for task in tasks]
    assert control[-1]["final"] == summary["control"]["final"]
    for task in tasks:
        assert task["final"].keys() == {"old", "new", "code"} and task["flops"] > 0


@pytest.mark.full
def test_the_matrix_has_every_domain_after_every_task(trained: Path) -> None:
    """From the scores on disk; `new` occurs twice, and its first task counts."""
    summary = summary_of(trained)
    for matrix, branch in (
        (summary["matrix"], "attempt_1"),
        (summary["control"]["matrix"], "control"),
    ):
        names = ["baseline", *(f"{branch}{part}-trained" for part in ("", "_task_2", "_task_3"))]
        assert matrix["rows"] == ["baseline", "task 1", "task 2", "task 3"]
        assert matrix["trained"] == [[], ["new"], ["code"], ["new"]]
        losses = {d: [_per_byte(trained, n, d) for n in names] for d in ("old", "new", "code")}
        for domain, column in losses.items():
            place = matrix["domains"].index(domain)
            assert [row[place] for row in matrix["loss_per_byte"]] == pytest.approx(column)
        new, old, code = losses["new"], losses["old"], losses["code"]
        backward = {"old": old[3] - old[0], "new": new[3] - new[1], "code": code[3] - code[2]}
        assert matrix["backward_transfer"] == pytest.approx(backward)
        assert matrix["forward_transfer"] == pytest.approx({"code": code[1] - code[0]})
        assert matrix["mean_backward_transfer"] == pytest.approx(sum(backward.values()) / 3)
    assert summary["attempts"][0]["matrix"] == summary["matrix"]
    assert (trained / "plots/matrix.png").is_file()


def _per_byte(folder: Path, name: str, domain: str) -> float:
    scores = scores_of(folder, name, domain)
    return float(scores.values.sum() / scores.weights["bytes"].sum())


@pytest.mark.full
def test_a_task_that_others_followed_is_held_against_what_it_was_when_it_was_learned(
    trained: Path,
) -> None:
    """Computed from the scores on disk. The last task is new and has nothing to retain."""
    checks = {(check["check"], check["subject"]): check for check in summary_of(trained)["gate"]}
    assert [name for name in checks if name[0] == "retention"] == [
        ("retention", "old"), ("retention", "code"),
    ]  # fmt: skip
    assert {name for name in checks if name[0] == "new_capability"} == {
        ("new_capability", "new"), ("new_capability", "code"),
    }  # fmt: skip
    final = "attempt_1_task_3-trained"
    for name, subject, before in (
        ("retention", "code", "attempt_1_task_2-trained"),
        ("retention", "old", "baseline"),
        ("new_capability", "new", "baseline"),
    ):
        scores = [scores_of(trained, each, subject) for each in (before, final)]
        harm = scores[0].relative_forgetting(scores[1])
        assert checks[name, subject]["value"] == pytest.approx(harm.value)
        detail, is_later = checks[name, subject]["detail"], before != "baseline"
        assert detail.startswith("since its task: loss per byte" if is_later else "loss per byte")


@pytest.mark.full
def test_each_task_starts_from_what_the_one_before_left(trained: Path) -> None:
    """The lineage has one node per task, and all learned domains."""
    nodes = [trained / f"attempt_1{part}/trained" for part in ("", "_task_2", "_task_3")]
    lineages = [Lineage.read(node) for node in nodes]
    published = Lineage.read(trained / "checkpoint")
    assert published is not None and None not in lineages
    hashes = [each.model_hash for each in lineages if each is not None]
    parents = [each.parent_hash for each in lineages if each is not None]
    assert parents[1:] == hashes[:-1] and published.model_hash == hashes[-1]
    assert [each.step for each in lineages if each is not None] == [6, 12, 18]
    assert set(published.domains) == {"old", "code", "new"}
    assert list(published.training_config["old"]) == ["old", "code"]
    assert published.expansion_history[0].continued_training_steps == 18


@pytest.mark.full
def test_steps_are_counted_on_in_what_is_logged(trained: Path) -> None:
    rows = list(csv.DictReader((trained / "metrics.csv").open()))
    name = "eval/code/loss"
    evaluated = [int(row["step"]) for row in rows if row[name]]
    assert evaluated == [-1, 0, 3, 6, 9, 12, 15, 18]
    scored = [row for row in rows if row["score/code/loss"]]
    assert [int(row["step"]) for row in scored] == [6, 12, 18]
    summary = summary_of(trained)
    assert [float(row["score/code/loss"]) for row in scored] == [
        pytest.approx(task["final"]["code"]["loss"]) for task in summary["tasks"]
    ]


@pytest.mark.full
def test_what_came_in_a_later_task_was_trained_from_there_on(
    run_tasks: RunJob, words: tuple[str, ...], tmp_path: Path
) -> None:
    grown = (
        "growth=gradmax",
        "growth.trigger={name:schedule,at:[2]}",
        "growth.max_growth_per_step=1",
        "expansion=none",
    )
    run_tasks(tmp_path / "run", words[0], *grown)
    lineage = Lineage.read(tmp_path / "run/checkpoint")
    assert lineage is not None
    steps = [(each.method, each.continued_training_steps) for each in lineage.expansion_history]
    assert steps == [("growth", 18), ("growth", 12), ("growth", 6)]


@pytest.mark.full
def test_a_logger_of_a_later_task_counts_on(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="", version="")
    with _steps_after(40, logger):
        logger.log_metrics({"loss": 1.0}, step=2)
        logger.log_metrics({"loss": 0.5})
    logger.log_metrics({"loss": 0.25}, step=2)
    logger.finalize("success")
    rows = list(csv.DictReader((tmp_path / "metrics.csv").open()))
    assert [row["step"] for row in rows if row["step"] in ("42", "2")] == ["42", "2"]


@pytest.mark.full
def test_a_run_that_was_stopped_between_tasks_ends_with_the_same_weights(
    trained: Path, run_tasks: RunJob, words: tuple[str, ...], tmp_path: Path
) -> None:
    with plug_pulled("evaluate", of="attempt_1_task_2"):
        run_tasks(tmp_path / "run", *words)
    run_tasks(tmp_path / "run", *words)
    again, uninterrupted = (
        Lineage.read(folder / "checkpoint") for folder in (tmp_path / "run", trained)
    )
    assert again is not None and uninterrupted is not None
    assert again.model_hash == uninterrupted.model_hash
    assert (
        summary_of(tmp_path / "run")["tasks"][1]["final"]
        == (summary_of(trained)["tasks"][1]["final"])
    )


@pytest.mark.full
def test_each_task_stops_by_a_named_domain_also_when_gone_on_with(
    run_tasks: RunJob, code: Path, tmp_path: Path
) -> None:
    """No improvement is large enough, so patience ends with the third evaluation after step 0.

    The second task is killed after two evaluations without improvement. A restart of the task
    would run to its end.
    """
    failing = "{_target_: tests.pipeline.test_loggers.FailOnce, folder: attempt_1_task_2, marker: "
    words = (
        f"data.tasks=[{NEW},{code}]",
        "training.max_steps=8",
        "evaluation.every_n_steps=2",
        "callbacks=early_stopping",
        "callbacks.early_stopping.monitor=eval/code/loss",
        "callbacks.early_stopping.min_delta=1000",
        f"callbacks.fail={failing}{tmp_path / 'failed'}}}",
    )
    with pytest.raises(KeyError, match="broken off"):
        run_tasks(tmp_path / "run", *words)
    run_tasks(tmp_path / "run", *words)
    tasks = summary_of(tmp_path / "run")["tasks"]
    assert [task["steps"] for task in tasks] == [6, 6]
    assert all("EarlyStopping" in task["ended_early"] for task in tasks)


@pytest.mark.full
def test_what_is_broken_off_is_followed_by_no_task_and_rolled_back(
    run_tasks: RunJob, words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Fit.work

    def broken(stage: Fit, context: Run, branch: Branch) -> StageResult:
        result = whole(stage, context, branch)
        if branch.name != "attempt_1_task_2":
            return result
        assert isinstance(result.found, TrainingFound)
        return replace(result, found=replace(result.found, stopped_because="not finite"))

    monkeypatch.setattr(Fit, "work", broken)
    run_tasks(tmp_path / "run", words[0], "gate=default")
    summary = summary_of(tmp_path / "run")
    assert summary["status"] == "rolled_back" and len(summary["tasks"]) == 2
    assert summary["final"] == summary["baseline"]
    kept = Lineage.read(tmp_path / "run/checkpoint")
    assert kept is not None and kept.model_hash == summary["lineage"]["model_hash"]
    assert not kept.expansion_history


@pytest.mark.full
def test_an_old_domain_that_comes_again_is_kept_until_then(
    run_tasks: RunJob, tmp_path: Path
) -> None:
    """It is replayed in the tasks before its own, and compared with the start at the end."""
    old = FIXTURES / "text/old"
    outcome = run_tasks(tmp_path / "run", f"data.tasks=[{NEW},{old}]", "forgetting=replay")
    summary = summary_of(tmp_path / "run")
    assert summary["domains"] == {"old": ["old"], "new": ["new"]}
    assert [task["domains"] for task in summary["tasks"]] == [["new"], ["old"]]
    first, last = (Lineage.read(tmp_path / f"run/{name}/trained").training_config for name in (  # type: ignore[union-attr]
        "attempt_1", "attempt_1_task_2",
    ))  # fmt: skip
    assert list(first["old"]) == ["old"] and list(last["old"]) == ["new"]
    kept = {check["subject"] for check in summary["gate"] if check["check"] == "retention"}
    assert kept == {"old", "new"} and outcome.status == "ungated"


@pytest.mark.full
def test_what_a_checkpoint_learned_comes_again_as_a_later_task(
    trained: Path, run_tasks: RunJob, code: Path, tmp_path: Path
) -> None:
    job = [word for word in JOB if not word.startswith(("model.", "data.old", "data.vocab"))]
    words = ("model=hf", f"model.path={trained}/checkpoint", f"data.tasks=[{NEW},{code}]")
    run_tasks(tmp_path / "run", *words, "expansion=none", "forgetting=replay", job=job)
    summary = summary_of(tmp_path / "run")
    assert summary["domains"] == {"old": ["old", "code"], "new": ["new"]}
    assert [task["domains"] for task in summary["tasks"]] == [["new"], ["code"]]
