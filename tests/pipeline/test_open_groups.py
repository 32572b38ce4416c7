"""A real job with custom callbacks, optimizer and Trainer arguments."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from lightning import Callback

from tests.pipeline.tiny import TINY
from tritter.checkpoints import Lineage
from tritter.config.launch.composition import load_config
from tritter.pipeline import Outcome, run_pipeline
from tritter.pipeline.stages.fit import _recorded_rate
from tritter.training.options import _metric_names


@pytest.mark.full
def test_a_job_with_all_of_them(run_job: Callable[..., Outcome], tmp_path: Path) -> None:
    words = (
        "callbacks=[model_checkpoint,lr_monitor,device_stats]",
        "callbacks.stop={_target_: tests.training.test_module_callbacks.StopAt, batch: 41}",
        "callbacks.model_checkpoint.every_n_train_steps=10",
        "callbacks.device_stats.cpu_stats=true",
        "trainer.accumulate_grad_batches=2",
        "optimizer=sgd",
        "pretraining.max_steps=4",
        "forgetting=none",
        "expansion=none",
        "gate=off",
    )
    outcome = run_job(tmp_path / "run", *words)
    summary = json.loads(outcome.summary_path.read_text())
    (attempt,) = summary["attempts"]
    assert attempt["steps"] == 21
    assert attempt["ended_early"] == "a callback stopped the training run"
    line = "attempt_1: training ended early, at step 21: a callback stopped the training run"
    assert line in summary["notes"]  # which the page shows
    folders = {path.name for path in (tmp_path / "run/attempt_1/checkpoints").iterdir()}
    assert "last.ckpt" in folders and len(folders) == 2
    header = (tmp_path / "run/attempt_1/metrics.csv").read_text().splitlines()[0]
    assert "learning_rate/pg1" in header and "DeviceStatsMonitor" in header
    assert not list((tmp_path / "run/pretraining").glob("checkpoints"))
    # What warms up from here begins at the rate that the training had when it was ended
    lineage = Lineage.read(tmp_path / "run/attempt_1/trained")
    assert lineage is not None
    training = load_config(["training.max_steps=30", "optimizer=sgd"]).training
    schedule = training.rate_schedule()
    assert _recorded_rate(lineage) == schedule.rate(20) > 2 * schedule.last_rate


class Logged(Callback):
    """Record the names of all metrics available to callbacks."""

    def __init__(self, path: str) -> None:
        self.path = path

    def on_train_end(self, trainer, pl_module) -> None:  # type: ignore[no-untyped-def]
        Path(self.path).write_text(json.dumps(sorted(trainer.callback_metrics)))


@pytest.mark.full
@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("expansion", ["none", "moe"])
def test_what_can_be_monitored_is_what_is_logged(tmp_path: Path, expansion: str) -> None:
    path = tmp_path / "logged.json"
    words = (
        f"expansion={expansion}",
        "forgetting=[ewc,replay]",
        "callbacks=early_stopping",
        "callbacks.early_stopping.patience=5",
        "evaluation.every_n_steps=1",
        f"callbacks.logged={{_target_: {__name__}.Logged, path: {path}}}",
        "trainer.log_every_n_steps=1",
        f"cache_dir={tmp_path / 'cache'}",
    )
    config = load_config([*TINY, *words])
    (tmp_path / "run").mkdir()
    run_pipeline(config, run_folder=tmp_path / "run")
    assert set(json.loads(path.read_text())) - {"step"} == set(_metric_names(config))
