"""The small job with two processes: only training uses both, and the verdict is the same."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tritter.core.models import load_model
from tritter.pipeline import Outcome
from tritter.training.fitting import start_method

Run = Callable[..., Outcome]
DOMAINS = ("prose", "code")

pytestmark = pytest.mark.skipif(
    start_method("cpu") != "fork", reason="spawning takes seconds for each training"
)


@pytest.mark.full
@pytest.mark.parametrize("trainer", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_two_processes_run_the_whole_job(run_job: Run, tmp_path: Path, trainer: str) -> None:
    methods = ["forgetting=replay"] if trainer == "fsdp" else []
    one = run_job(tmp_path / "one", "training.max_steps=20", *methods)
    kept = (f"trainer={trainer}", "pipeline.keep_stages=true", "evaluation.every_n_steps=2")
    two = run_job(tmp_path / "two", "training.max_steps=20", *kept, *methods)
    assert two.status == one.status
    expected, found = (
        json.loads(outcome.summary_path.read_text(encoding="utf-8")) for outcome in (one, two)
    )
    for when in ("baseline", "expanded"):
        for domain in DOMAINS:
            losses = [summary[when][domain]["loss"] for summary in (expected, found)]
            assert losses[1] == pytest.approx(losses[0], rel=1e-3)
            assert losses[1] != losses[0]  # its base is another, trained in two processes
    for key in ("steps", "refused_steps", "status", "parameters"):
        assert found["attempts"][0][key] == expected["attempts"][0][key]
    for stage in ("pretraining", "fit"):
        flops = [summary["flops"][stage] for summary in (expected, found)]
        assert flops[0] == flops[1] > 0
    trained, kept = tmp_path / "two" / "attempt_1" / "trained", tmp_path / "two" / "checkpoint"
    assert (kept / "tritter.json").exists() and load_model(trained).num_parameters() > 0
    rows = (tmp_path / "two" / "metrics.csv").read_text(encoding="utf-8").splitlines()
    assert len(rows) == 16 and "performance/tokens_per_second" in rows[0]
    assert not {"saved", "returned"} & {path.name for path in trained.parent.iterdir()}
    assert not {"MASTER_PORT", "LOCAL_RANK", "WORLD_SIZE"} & set(os.environ)
