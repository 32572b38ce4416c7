"""Stages from outside: the examples of docs/how-to/write_a_stage.md, killed and resumed."""

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests import oracle
from tests.config.test_outside import write_examples
from tests.pipeline.plug import plug_pulled
from tritter.checkpoints import Lineage
from tritter.checkpoints.history import Link
from tritter.config.launch.composition import load_config
from tritter.config.run_folder import changes_between, fingerprint
from tritter.core.models import load_model
from tritter.errors import RequestError, TritterError
from tritter.pipeline import Branch, Outcome, Run, Stage, StageResult, verdict
from tritter.pipeline.ledger import ExpansionFound, Ledger
from tritter.pipeline.pipeline import stages_of
from tritter.pipeline.stage import ORDER

Job = Callable[..., Outcome]
SHRINK = "stages.shrink={_target_:mine.shrink.Shrink,share:0.5}"
DRIFT = "stages.drift={_target_:mine.drift.Drift,top:2}"
WORDS = ("forgetting=replay", "expansion=width", SHRINK, DRIFT)


class Late(Stage):
    after = "fit"
    writes = True

    def work(self, run: Run, branch: Branch) -> StageResult:
        raise NotImplementedError


class Lost(Late):
    after = "fitting"
    writes = False


class Early(Late):
    after = "choose"


class Odd(Stage):
    """Its result is not JSON."""

    after = "evaluate"

    def work(self, run: Run, branch: Branch) -> StageResult:
        return StageResult({"loss": float("nan")})


@pytest.fixture(scope="module", autouse=True)
def mine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The package of the page, which can be imported."""
    site = tmp_path_factory.mktemp("site")
    write_examples(site, conf=site / "conf")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(site))
        import mine.shrink

        yield mine
    for name in [name for name in sys.modules if name.partition(".")[0] == "mine"]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def whole(run_tiny: Job, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    run_tiny(folder, *WORDS, "control=true", "pipeline.keep_stages=true")
    return folder


def summary_of(folder: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return summary


@pytest.mark.full
def test_training_starts_from_what_a_stage_wrote(whole: Path) -> None:
    expanded, shrunk = (load_model(whole / "attempt_1" / name) for name in ("expanded", "shrink"))
    for (name, before), (_, after) in zip(
        expanded.named_parameters(), shrunk.named_parameters(), strict=True
    ):
        assert (after == (before * 0.5 if before.ndim > 1 else before)).all(), name
    assert oracle.stock(whole / "checkpoint") is not None
    trained, kept = Lineage.of(whole / "attempt_1/trained"), Lineage.of(whole / "checkpoint")
    start = Lineage.of(whole / "attempt_1/shrink")
    assert trained.parent_hash == kept.parent_hash == start.model_hash
    assert start.parent_hash == Lineage.of(whole / "attempt_1/expanded").model_hash
    assert (whole / "checkpoint" / str(kept.parent_path)).resolve() == whole / "attempt_1/shrink"
    assert not any(link.differences() for link in Link.chain(whole / "checkpoint"))
    assert [link.origin() for link in Link.chain(whole / "checkpoint")][2] == "stage shrink"
    # The control starts from the shrunk baseline
    assert (whole / "control/shrink").is_dir()


@pytest.mark.full
def test_what_stages_found_is_in_the_ledger_and_in_the_summary(whole: Path) -> None:
    summary = summary_of(whole)
    stages = json.loads((whole / "ledger.json").read_text())["stages"]
    names = [name.partition(".")[2] for name in stages if name.startswith("attempt_1.")]
    assert names == ["expand", "shrink", "fit", "drift", "evaluate"]
    assert "control.drift" not in stages and "control.shrink" in stages
    assert summary["control"]["stages"] == {"shrink": {"share": 0.5}}
    assert summary["stages"]["shrink"] == {"share": 0.5}
    moved = json.loads((whole / "attempt_1/drift.json").read_text())
    assert len(summary["stages"]["drift"]["largest"]) == 2
    assert summary["stages"]["drift"]["largest"][0] == max(moved, key=moved.__getitem__)
    assert summary["seconds"]["shrink"] > 0 and "shrink" not in summary["flops"]


def test_every_place_of_a_stage_exists() -> None:
    assert tuple(stage.name for stage in stages_of(load_config(()))) == ORDER


@pytest.mark.full
@pytest.mark.parametrize("stage", ["fit", "evaluate"])
def test_a_killed_run_resumes_after_its_stages(
    whole: Path, run_tiny: Job, tmp_path: Path, stage: str
) -> None:
    with plug_pulled(stage, of="attempt_1"):
        run_tiny(tmp_path / "run", *WORDS)
    run_tiny(tmp_path / "run", *WORDS)
    again, uninterrupted = summary_of(tmp_path / "run"), summary_of(whole)
    assert again["lineage"]["model_hash"] == uninterrupted["lineage"]["model_hash"]
    assert (again["stages"], again["final"]) == (uninterrupted["stages"], uninterrupted["final"])
    left = {path.parent.name for path in (tmp_path / "run/attempt_1").glob("*/*.safetensors")}
    assert not left, "a checkpoint that no later stage reads is removed"


@pytest.mark.full
def test_a_run_that_is_killed_in_a_stage_repeats_it(
    whole: Path, run_tiny: Job, tmp_path: Path, mine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, killed = mine.shrink.Shrink.work, []

    def once(stage: Stage, run: Run, branch: Branch) -> StageResult:
        result: StageResult = work(stage, run, branch)
        if not killed:
            killed.append(branch.name)
            raise InterruptedError
        return result

    monkeypatch.setattr(mine.shrink.Shrink, "work", once)
    with pytest.raises(InterruptedError):
        run_tiny(tmp_path / "run", *WORDS)
    run_tiny(tmp_path / "run", *WORDS)
    hashes = [summary_of(each)["lineage"]["model_hash"] for each in (tmp_path / "run", whole)]
    assert hashes[0] == hashes[1]
    (tmp_path / "run/attempt_1/drift.json").unlink()
    run_tiny(tmp_path / "run", *WORDS)
    assert (tmp_path / "run/attempt_1/drift.json").is_file()


@pytest.mark.full
def test_the_order_of_two_stages_counts_and_each_has_its_folder(
    run_tiny: Job, tmp_path: Path
) -> None:
    twice = tuple(SHRINK.replace("stages.shrink", f"stages.{name}") for name in "ab")
    words = ("forgetting=replay", "expansion=width", *twice)
    with plug_pulled("fit", of="attempt_1"):
        run_tiny(tmp_path, *words)
    first, second = Lineage.of(tmp_path / "attempt_1/a"), Lineage.of(tmp_path / "attempt_1/b")
    assert second.parent_hash == first.model_hash != second.model_hash
    run_tiny(tmp_path, *words)
    both = (words, (*words[:2], *twice[::-1]))
    here, there = (fingerprint(load_config([*each])) for each in both)
    assert [*changes_between(here, there)] == ["stages.order"]


@pytest.mark.full
def test_a_rolled_back_round_names_the_stage_in_its_lineage(
    run_tiny: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decide = verdict.Candidate.judge

    def judge(candidate: verdict.Candidate) -> verdict.GateFound:
        found = decide(candidate)
        is_second = candidate.branches[0].name == "round_2"
        return replace(found, status="rolled_back" if is_second else "kept")

    monkeypatch.setattr(verdict.Candidate, "judge", judge)
    run_tiny(
        tmp_path,
        "forgetting=replay",
        "expansion=llama_pro",
        SHRINK,
        "gate=default",
        "pipeline.target_params=20k",
        "pipeline.keep_stages=true",
    )
    assert summary_of(tmp_path)["status"] == "rolled_back"
    links = Link.chain(tmp_path / "checkpoint")
    assert [link.folder and link.folder.name for link in links] == [
        "baseline",
        "expanded",
        "shrink",
        "checkpoint",
    ]
    assert not any(link.differences() for link in links)


def test_a_stage_reads_earlier_results_as_plain_values(tmp_path: Path) -> None:
    ledger, found = Ledger(tmp_path), ExpansionFound(parameters=3, notes=("wider",))
    ledger.record("attempt_1.expand", StageResult(found, flops={"expand": 2.0}))
    written, again = ledger["attempt_1.expand"], Ledger(tmp_path)["attempt_1.expand"]
    assert json.loads(json.dumps(written.plain())) == again.plain()
    assert again.plain()["notes"] == ["wider"] and again.flops == {"expand": 2.0}
    resumed = Ledger(tmp_path)
    resumed.check({"expand": ExpansionFound})  # as a run that is resumed
    assert resumed.found("attempt_1.expand", ExpansionFound) == found
    assert resumed["attempt_1.expand"].plain() == written.plain()


@pytest.mark.full
def test_a_stage_after_the_scores_can_be_mended(
    run_tiny: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("forgetting=replay", "expansion=width", f"stages.odd={{_target_:{__name__}.Odd}}")
    with pytest.raises(TritterError, match=r"attempt_1\.odd: its result is not plain values"):
        run_tiny(tmp_path, *words)
    monkeypatch.setattr(Odd, "work", lambda *_: StageResult({"loss": None}))
    run_tiny(tmp_path, *words)
    assert summary_of(tmp_path)["stages"] == {"odd": {"loss": None}}
    rows = (tmp_path / "metrics.csv").read_text()
    assert "score/" in rows


@pytest.mark.parametrize(
    ("result", "reason"),
    [
        (None, "'NoneType' object has no attribute 'plain'"),
        (StageResult({}, flops={"odd": float("nan")}), "Out of range float values"),
    ],
)
def test_a_result_that_the_ledger_cannot_hold_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, result: Any, reason: str
) -> None:
    monkeypatch.setattr(Odd, "work", lambda *_: result)
    monkeypatch.setattr(Odd, "key", lambda *_: "attempt_1.odd")
    odd, run = Odd(), SimpleNamespace(folder=tmp_path)
    odd.name = "odd"
    with pytest.raises(TritterError, match=rf"^attempt_1\.odd: its result is .*: {reason}"):
        odd._checked(cast(Run, run), cast(Branch, None))


@pytest.mark.parametrize(
    ("word", "key", "reason"),
    [
        ("stages.fit={_target_:mine.drift.Drift}", "stages.fit", "fit is not free for a stage"),
        ("stages.gate={_target_:mine.drift.Drift}", "stages.gate", "gate is not free for a stage"),
        ("stages.x={_target_:%s.Lost}", "stages.x", "Lost.after = 'fitting'; use one of"),
        ("stages.x={_target_:%s.Late}", "stages.x", "but follows fit; it can follow expand"),
        ("stages.x={_target_:%s.Early}", "stages.x", "but follows choose; it can follow expand"),
        ("stages.trained={_target_:mine.drift.Drift}", "stages.trained", "is not free"),
        ("stages.drift={_target_:mine.drift.Drift,tops:2}", "stages.drift.tops", "argument"),
        (
            "stages.x={_target_:mine.shrink.Shrink,share:2}",
            "stages.x.share",
            "must be above 0",
        ),
        ("stages.x={_target_:pathlib.Path}", "stages.x._target_", "not a subclass of"),
        ("stages=drift", "stages", "drift"),
    ],
)
def test_what_cannot_run_is_refused(word: str, key: str, reason: str) -> None:
    with pytest.raises(RequestError) as error:
        load_config([word % __name__ if "%" in word else word])
    assert any(each.key == key and reason in str(each) for each in error.value.problems), error
