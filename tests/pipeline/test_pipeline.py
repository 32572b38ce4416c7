"""The main job end to end on a small scale: outputs, verdicts and resumes."""

import csv
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests import oracle
from tests.pipeline.plug import WORK
from tritter.checkpoints import Lineage
from tritter.cli.report import metric_rows
from tritter.errors import RequestError, TritterError
from tritter.pipeline import Outcome
from tritter.pipeline.metrics import _wandb_summary
from tritter.report.runs import Curve
from tritter.report.summary import Summary
from tritter.training import BaseModule
from tritter.transform import PlannedExpansion

Run = Callable[..., Outcome]
# Of the tiny job; the built-in texts are those of test_readme.py and of the full tests below
GATED = ("gate=default", "training.max_steps=10", "data.validation_fraction=0.5")


@pytest.fixture(scope="module")
def default_run(run_tiny: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("default") / "run"
    run_tiny(folder, *GATED, "control=true")
    return folder


def summary_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


def test_summary_holds_what_the_contract_names(default_run: Path) -> None:
    summary = summary_of(default_run)
    assert summary["status"] in ("kept", "rolled_back", "undecided")
    for stage in ("baseline", "expanded", "final"):
        for domain in ("old", "new"):
            record = summary[stage][domain]
            assert record["loss"] > record["loss_per_byte"] > 0
            assert record["standard_error"] > 0 and record["n"] > 5
    for check in summary["gate"]:
        assert {"check", "value", "bound", "interval", "verdict"} <= set(check)
    assert {c["check"] for c in summary["gate"]} == {
        "training", "gradient_flow", "memory", "preservation", "retention", "new_capability",
    }  # fmt: skip
    assert summary["attempts"][0]["gate"] == summary["gate"]
    for cost in (summary["flops"], summary["seconds"]):
        assert cost["total"] == pytest.approx(sum(v for k, v in cost.items() if k != "total"))
        assert {"baseline", "expand", "fit", "evaluate", "total"} <= set(cost)
    assert summary["parameters"]["final"] > summary["parameters"]["baseline"]
    assert summary["control"]["parameters"] == summary["parameters"]["baseline"]
    assert summary["control"]["final"]["new"]["loss"] < summary["baseline"]["new"]["loss"]
    assert summary["lineage"]["expansions"] == ["width"]
    assert [sample["domain"] for sample in summary["samples"]] == ["old", "new"]


def test_its_losses_lie_beside_those_of_its_base_and_of_its_control(default_run: Path) -> None:
    """Also for a base model from the cache."""
    for name in ("metrics", "metrics_control", "metrics_pretraining"):
        curves = {
            each.name: each for each in Curve.of_rows(metric_rows(default_run / f"{name}.csv"))
        }
        assert curves["train/loss"].steps[-1] > 0, name
        assert ("eval/old/loss" in curves) == (name != "metrics_pretraining")


def test_checkpoint_is_a_stock_model_with_a_lineage(default_run: Path) -> None:
    summary = summary_of(default_run)
    folder = default_run / summary["checkpoint"]
    model = oracle.stock(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoded = tokenizer("def main():", return_tensors="pt").input_ids
    assert model.generate(encoded, max_new_tokens=4, do_sample=False).shape[1] > 4
    assert sum(p.numel() for p in model.parameters()) == summary["parameters"]["final"]
    lineage = Lineage.read(folder)
    assert lineage is not None
    record = lineage.expansion_history[-1]
    assert record.method == "width" and record.continued_training_steps == 10
    assert set(record.performance_delta) == {"old", "new"}
    assert record.step0_error is not None and record.step0_error < 1e-4
    assert lineage.training_config["old"]["old"]["sha256"]
    parent = Lineage.read((folder / str(lineage.parent_path)).resolve())
    assert parent is not None and parent.model_hash == lineage.parent_hash
    grandparent = Lineage.read(default_run / "baseline")
    assert grandparent is not None and grandparent.model_hash == parent.parent_hash
    assert lineage.base_model_hash == grandparent.model_hash


def test_retention_is_the_paired_change_per_byte(default_run: Path) -> None:
    """The gate's value, computed independently from the per-document losses on disk."""
    scores = {
        name: json.loads((default_run / "scores" / f"{name}.json").read_text())["old"]
        for name in ("baseline", "attempt_1-trained")
    }
    before, after = (sum(scores[name]["values"]) for name in scores)
    check = next(c for c in summary_of(default_run)["gate"] if c["check"] == "retention")
    assert check["value"] == pytest.approx(after / before - 1, rel=1e-9)
    assert check["interval"][0] < check["value"] < check["interval"][1]


def test_metrics_and_plots_are_left(default_run: Path) -> None:
    rows = list(csv.DictReader((default_run / "metrics.csv").open()))
    assert {"step", "train/loss", "eval/old/loss", "performance/step_seconds"} <= set(rows[0])
    last = summary_of(default_run)["attempts"][0]["final"]["new"]["loss"]
    assert float(rows[-1]["score/new/loss"]) == pytest.approx(last)
    evaluated = [int(row["step"]) for row in rows if row["eval/old/loss"]]
    # Before the expansion, before the first step, and at the end: more would cost over a tenth
    assert evaluated == [-1, 0, summary_of(default_run)["attempts"][0]["steps"]]
    seconds, flops = (summary_of(default_run)[name] for name in ("seconds", "flops"))
    assert flops.keys() <= seconds.keys() and seconds["validation"] > 0
    plots = sorted(path.name for path in (default_run / "plots").iterdir())
    assert plots == ["domains.png", "forgetting.png", "retention_and_gain.png", "training.png"]


@pytest.mark.full
@pytest.mark.parametrize("expansion", ["none", "[width,llama_pro]", "[dus,width]"])
def test_a_list_of_expansions_is_carried_out_in_order(
    run_job: Run, tmp_path: Path, expansion: str
) -> None:
    """test_every_choice.py tests each of them with every method."""
    words = (f"expansion={expansion}", "forgetting=[l2sp,replay]", "training.max_steps=3")
    outcome = run_job(tmp_path / "run", *words, "pipeline.keep_stages=true")
    summary = summary_of(tmp_path / "run")
    names = [] if expansion == "none" else expansion.strip("[]").split(",")
    assert summary["expansion"] == names
    exact = all(name in ("width", "llama_pro") for name in names)
    if names:
        verdict = next(c for c in summary["gate"] if c["check"] == "preservation")["verdict"]
        assert verdict == ("passed" if exact else "reported")
    else:
        assert summary["jump"] is None and summary["expanded"] == summary["baseline"]
    trained = oracle.stock(tmp_path / "run/attempt_1/trained")
    if outcome.status != "rolled_back":
        kept = oracle.stock(tmp_path / "run/checkpoint")
        ids = oracle.tokens(trained.config.vocab_size)
        assert torch.equal(oracle.logits(kept, ids), oracle.logits(trained, ids))


@pytest.mark.full
def test_a_false_claim_of_exactness_is_told_before_the_training(
    run_job: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(PlannedExpansion, "is_exact", True)
    outcome = run_job(tmp_path / "run", "expansion=dus", "training.max_steps=2")
    said = capsys.readouterr().out
    told = said.index("standard deviations, although it is exact; please report this")
    assert outcome.status == "rolled_back" and told < said.index("2 steps on")


@pytest.mark.full
def test_learning_rate_one_is_rolled_back(run_job: Run, tmp_path: Path) -> None:
    outcome = run_job(tmp_path / "run", "training.learning_rate=1")
    summary = summary_of(tmp_path / "run")
    assert outcome.status == summary["status"] == "rolled_back"
    assert any(c["verdict"] == "failed" for c in summary["gate"])
    assert summary["final"] == summary["baseline"]
    assert summary["attempts"][0]["final"] != summary["baseline"]
    # What a sweeper minimises is that of what was trained: every base would have the same
    trained = [score["loss_per_byte"] for score in summary["attempts"][0]["final"].values()]
    assert outcome.metric == pytest.approx(sum(trained) / len(trained))
    assert summary["parameters"]["final"] == summary["parameters"]["baseline"]
    kept, base = Lineage.read(tmp_path / "run/checkpoint"), Lineage.read(tmp_path / "run/baseline")
    assert kept is not None and base is not None
    assert kept.model_hash == base.model_hash and kept.expansion_history == ()
    ids = oracle.tokens(summary_vocab(tmp_path / "run/baseline"))
    before, after = (
        oracle.stock(tmp_path / "run/baseline"),
        oracle.stock(tmp_path / "run/checkpoint"),
    )
    assert torch.equal(oracle.logits(before, ids), oracle.logits(after, ids))


def summary_vocab(folder: Path) -> int:
    return int(json.loads((folder / "config.json").read_text())["vocab_size"])


@pytest.mark.full
def test_shuffled_labels_are_rolled_back(
    run_job: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def shuffled(self: BaseModule, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        ids = batch["input_ids"]
        order = torch.randperm(
            ids.shape[1], generator=torch.Generator().manual_seed(int(ids.sum()))
        )
        message = self.model(input_ids=ids, labels=ids[:, order], use_cache=False)
        return message.loss, message.logits

    from tritter.pipeline.stages import baseline as base

    context_free = base.fit  # the base itself must be trained on true labels

    def fit_base(*arguments: Any, **options: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(BaseModule, "task_loss", TRUE_LOSS)
            return context_free(*arguments, **options)

    monkeypatch.setattr(base, "fit", fit_base)
    monkeypatch.setattr(BaseModule, "task_loss", shuffled)
    outcome = run_job(
        tmp_path / "run", "forgetting=none", "training.max_steps=60", "training.learning_rate=0.01",
        "pretraining.max_steps=200",
    )  # fmt: skip
    summary = summary_of(tmp_path / "run")
    assert outcome.status == "rolled_back"
    failed = {c["check"] for c in summary["gate"] if c["verdict"] == "failed"}
    assert "retention" in failed


TRUE_LOSS = BaseModule.task_loss


@pytest.mark.full
def test_too_few_documents_are_undecided_with_the_number_needed(
    run_tiny: Run, tmp_path: Path
) -> None:
    words = ("data.validation_fraction=0.14", "training.max_steps=2", "gate.enabled=true")
    outcome = run_tiny(tmp_path / "run", *words)
    summary = summary_of(tmp_path / "run")
    assert outcome.status == "undecided"
    open_checks = [c for c in summary["gate"] if c["verdict"] == "undecided"]
    assert open_checks and all(c["n"] < 5 for c in open_checks)
    assert any(c["documents_needed"] and c["documents_needed"] > c["n"] for c in open_checks)
    assert Lineage.read(tmp_path / "run/checkpoint").expansion_history  # type: ignore[union-attr]


@pytest.mark.full
def test_gate_off_keeps_any_result_and_reports_its_checks(
    run_job: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outcome = run_job(tmp_path / "run", "training.learning_rate=1", "gate='off'")
    printed, summary = capsys.readouterr().out, summary_of(tmp_path / "run")
    assert outcome.status == summary["status"] == summary["attempts"][0]["status"] == "ungated"
    assert {check["verdict"] for check in summary["gate"]} == {"reported"}
    retention = next(check for check in summary["gate"] if check["check"] == "retention")
    assert retention["value"] > 0.05 and retention["interval"][0] > 0.05  # the gate would fail it
    assert summary["final"] == summary["attempts"][0]["final"] != summary["baseline"]
    assert Lineage.read(tmp_path / "run/checkpoint").expansion_history  # type: ignore[union-attr]
    assert re.search(r"^status +ungated: gate=off keeps any result *$", printed, re.MULTILINE)
    reported = _wandb_summary(Summary.of(summary))
    assert (reported["status"], reported["prose/verdict"]) == ("ungated", "reported")


@pytest.mark.full
def test_gate_off_keeps_a_model_without_finite_losses(run_tiny: Run, tmp_path: Path) -> None:
    """Its lineage has no scores."""
    words = ("training.learning_rate=1e18", "trainer.gradient_clip_val=null")
    assert run_tiny(tmp_path / "run", "gate='off'", *words).status == "ungated"
    assert summary_of(tmp_path / "run")["final"]["old"]["loss"] is None
    rows = metric_rows(tmp_path / "run/metrics.csv")
    assert not any(row.get("score/old/loss") for row in rows), "0 would be a perfect loss"
    lineage = Lineage.read(tmp_path / "run/checkpoint")
    assert lineage is not None and lineage.best_loss is None and not lineage.benchmark_scores
    assert lineage.expansion_history and not lineage.expansion_history[0].performance_delta


def test_a_base_that_explodes_is_not_cached(run_tiny: Run, tmp_path: Path) -> None:
    with pytest.raises(TritterError, match=r"pretraining stopped.*learning_rate"):
        run_tiny(
            tmp_path / "run", "pretraining.learning_rate=1e30", "trainer.gradient_clip_val=null",
            "trainer.max_non_finite_steps=2", cache_dir=tmp_path / "cache",
        )  # fmt: skip
    bases = tmp_path / "cache" / "bases"
    assert not any(bases.glob("**/*.safetensors")), "only the lock of the entry is left"


class Stopped(Exception):
    pass


@pytest.mark.full
@pytest.mark.parametrize("before", ["expand", "fit", "evaluate", "gate", "publish"])
def test_a_run_stopped_between_stages_goes_on_to_the_same_weights(
    run_tiny: Run,
    default_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    before: str,
) -> None:
    """The uninterrupted run has a control, which does not affect it."""

    def stop(*arguments: Any, **options: Any) -> None:
        raise Stopped

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(*WORK[before], stop)
        run_tiny(tmp_path / "parts", *GATED)
    done = json.loads((tmp_path / "parts/ledger.json").read_text())["stages"]
    assert "baseline" in done and "publish" not in done
    run_tiny(tmp_path / "parts", *GATED)
    places = default_run, tmp_path / "parts"
    whole, parts = (Lineage.read(place / "checkpoint") for place in places)
    assert whole is not None and parts is not None
    assert whole.model_hash == parts.model_hash
    first, second = map(summary_of, places)
    assert first["final"] == second["final"] and first["gate"] == second["gate"]


@pytest.mark.full
def test_new_blocks_only_moves_nothing_else(run_job: Run, tmp_path: Path) -> None:
    words = ("expansion=llama_pro", "expansion.llama_pro.new_blocks_only=true")
    run_job(tmp_path / "run", *words, "pipeline.keep_stages=true")
    before = oracle.stock(tmp_path / "run/attempt_1/expanded")
    after = dict(oracle.stock(tmp_path / "run/attempt_1/trained").named_parameters())
    new_layers = {2, 4}  # 0 1 1 2 2
    moved = {n for n, p in before.named_parameters() if not torch.equal(p, after[n])}
    assert moved
    assert {int(name.split(".")[2]) for name in moved} == new_layers


@pytest.mark.full
def test_a_damaged_base_in_the_cache_is_made_again(
    run_tiny: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = tmp_path / "cache"
    run_tiny(tmp_path / "first", "training.max_steps=2", cache_dir=own)
    base = next(path for path in (own / "bases").iterdir() if path.is_dir())
    weights = base / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    run_tiny(tmp_path / "second", "training.max_steps=2", cache_dir=own)
    assert "is damaged" in caplog.text
    first, second = (summary_of(tmp_path / name)["final"] for name in ("first", "second"))
    assert first == second
    shutil.rmtree(base)
    base.mkdir()
    run_tiny(tmp_path / "third", "training.max_steps=2", cache_dir=own)
    assert summary_of(tmp_path / "third")["final"] == first


def test_a_cache_that_cannot_be_written_is_named(run_tiny: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError, match="cache_dir"):
        run_tiny(tmp_path / "run", cache_dir=tmp_path / "file" / "cache")


@pytest.mark.full
def test_dus_reports_its_jump(run_job: Run, tmp_path: Path) -> None:
    run_job(tmp_path / "run", "expansion=dus", "training.max_steps=2")
    summary = summary_of(tmp_path / "run")
    assert summary["jump"]["relative_to_std"] > 1e-3
    assert summary["expanded"]["prose"]["loss"] != summary["baseline"]["prose"]["loss"]
    note = summary["attempts"][0]["notes"]
    assert note == ["dus: layers from 0 1 1 2"]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run/checkpoint") is not None
