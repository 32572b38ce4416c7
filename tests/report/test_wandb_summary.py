"""What stands beside a run in W&B's tables, and by what it is found there."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import wandb
from lightning.pytorch.loggers import WandbLogger

from tests.pipeline.outside_method import Options, Outside
from tests.report.spawning import experts
from tritter.config.launch.composition import load_config
from tritter.pipeline import metrics
from tritter.pipeline.ledger import Ledger
from tritter.pipeline.metrics import _wandb_summary, log_result_to_wandb, wandb_logger
from tritter.pipeline.run import Run
from tritter.report.summary import Summary
from tritter.targets import Component
from tritter.terminal import Console

OUTSIDE = Component(name=Outside.name, kind=Outside, options=Options())


def test_the_verdict_of_each_domain_is_there(summary_with_control):
    told = _wandb_summary(Summary.of(summary_with_control))
    last = summary_with_control["attempts"][-1]
    assert told["status"] == summary_with_control["status"]
    assert told["flops"] == summary_with_control["flops"]["total"]
    for domain, record in last["final"].items():
        assert told[f"{domain}/trained"] == record["loss"]
        assert told[f"control/{domain}/trained"] != record["loss"]
    verdicts = {c["subject"]: c["verdict"] for c in last["gate"] if c["check"] == "retention"}
    assert all(told[f"{domain}/verdict"] == verdict for domain, verdict in verdicts.items())
    assert None not in told.values()


def test_rounds_are_compared_with_the_base_as_their_control_is(
    summary_with_control: dict[str, Any],
) -> None:
    last = summary_with_control["attempts"][-1]
    last |= {"baseline": last["final"], "expanded": last["final"]}
    first = {"expansion": ["dus"], "status": "kept", "final": last["final"]}
    told = _wandb_summary(Summary.of(summary_with_control | {"rounds": [first, last]}))
    for domain, base in summary_with_control["baseline"].items():
        assert told[f"{domain}/before"] == told[f"control/{domain}/before"] == base["loss"]
        ratio = last["final"][domain]["loss_per_byte"] / base["loss_per_byte"]
        assert told[f"{domain}/change"] == pytest.approx(ratio - 1)
        assert f"{domain}/verdict" not in told and f"control/{domain}/verdict" in told


def test_lengths_of_packed_documents_and_similarities_are_tables(
    summary: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told, histogram = dict[str, Any](), {"8-15": 3, "16-31": 5}
    run = SimpleNamespace(log=told.update, summary={})
    monkeypatch.setattr(metrics, "wandb_logger", lambda _: WandbLogger(experiment=run))
    context = Run(
        config=load_config([]),
        folder=tmp_path,
        console=Console(quiet=True),
        ledger=Ledger(tmp_path),
    )
    task: dict[str, Any] = {"domains": ["code"], "final": {}, "steps": 4}
    packing = {"packed_sequence_length_histogram": histogram}
    tasks = [task, task | {"packing": packing}]

    def log(**changes: Any) -> None:
        made = Summary.of(summary | {"samples": []} | changes)
        log_result_to_wandb(context, made, [], step=7)

    log(tasks=tasks)
    table = told["performance/packed_sequence_length_histogram"]
    assert table.columns == ["task", "tokens", "documents"]
    assert table.data == [[2, "8-15", 3], [2, "16-31", 5]]
    told.clear()
    log(tasks=tasks[:1])
    assert told == {"trainer/global_step": 7}
    log(tasks=[], experts=experts())
    table = told["experts/similarity_scores_on_creation"]
    assert table.columns == ["expert", "step", "known", "similarity"]
    assert table.data[:2] == [["expert_1", 12, "base", 0.41], ["expert_2", 40, "base", 0.52]]
    assert len(table.data) == 6


def test_a_method_from_outside_is_a_tag_as_ours_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}

    def init(**options: Any) -> SimpleNamespace:
        given.update(options)
        return SimpleNamespace(define_metric=lambda *names, **axis: None)

    monkeypatch.setattr(wandb, "init", init)
    words = ("logger.wandb.tags=[mine]", "expansion=[width,dus]", "growth=foam")
    config = load_config(["logger=wandb", *words])
    config = replace(config, forgetting=(OUTSIDE, *config.forgetting))
    context = Run(
        config=config, folder=tmp_path, console=Console(quiet=True), ledger=Ledger(tmp_path)
    )
    wandb_logger(context)
    ours = [f"forgetting:{one.name}" for one in config.forgetting[1:]]
    assert given["tags"] == [
        "mine", "expansion:width", "expansion:dus", "forgetting:outside", *ours, "seed:0",
    ]  # fmt: skip
    assert given["name"].startswith("width+dus+percentile+gradmax outside")
    assert "outside" in str(given["config"])
