"""A real job with callbacks, an optimizer and Trainer arguments of its own."""

import json
from collections.abc import Callable
from pathlib import Path

from tritter.pipeline import Outcome


def test_a_job_with_all_of_them(run_job: Callable[..., Outcome], tmp_path: Path) -> None:
    words = (
        "callbacks=[model_checkpoint,lr_monitor,device_stats]",
        "callbacks.stop={_target_: tests.training.test_their_callbacks.StopAt, batch: 41}",
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
    assert attempt["ended_early"] == "a callback asked the training to stop"
    folders = {path.name for path in (tmp_path / "run/attempt_1/checkpoints").iterdir()}
    assert "last.ckpt" in folders and len(folders) == 2
    header = (tmp_path / "run/attempt_1/metrics.csv").read_text().splitlines()[0]
    assert "learning_rate/pg1" in header and "DeviceStatsMonitor" in header
    assert not list((tmp_path / "run/pretraining").glob("checkpoints"))
