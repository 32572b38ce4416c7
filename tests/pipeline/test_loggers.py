"""The run, its control and its pretraining are runs of one group in W&B, and of other loggers."""

from pathlib import Path
from typing import Any

import pytest
import wandb
import yaml
from lightning import Callback

from tests.pipeline.tiny import TINY
from tritter.config.fingerprint import fingerprint
from tritter.config.launch.composition import load_config
from tritter.pipeline import run_pipeline


class FailOnce(Callback):
    """Break one training off, the first time."""

    def __init__(self, folder: str, marker: str) -> None:
        self.folder, self.marker = folder, Path(marker)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:  # type: ignore[no-untyped-def]
        is_meant = Path(trainer.loggers[0].log_dir).name == self.folder
        if is_meant and trainer.global_step == 4 and not self.marker.exists():
            self.marker.touch()
            raise KeyError("broken off")


class FakeRun:
    """What wandb.init was given, and what the run was told."""

    def __init__(self, **given: Any) -> None:
        self.given, self.rows, self.summary = given, list[dict[str, Any]](), dict[str, Any]()
        self.exit_codes = list[int]()

    def log(self, values: dict[str, Any]) -> None:
        assert not self.exit_codes
        self.rows.append(values)

    def finish(self, exit_code: int = 0) -> None:
        self.exit_codes.append(exit_code)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[FakeRun]:
    opened: list[FakeRun] = []

    def init(**given: Any) -> FakeRun:
        assert all(run.exit_codes for run in opened), "one at a time"
        opened.append(FakeRun(**given))
        return opened[-1]

    monkeypatch.setattr(wandb, "init", init)
    return opened


def test_each_training_is_a_run_of_its_own_and_stays_it(
    runs: list[FakeRun], tmp_path: Path
) -> None:
    folder = tmp_path / "sweep" / "0"
    folder.mkdir(parents=True)
    failing = f"{{_target_: {__name__}.FailOnce, folder: control, marker: {tmp_path / 'failed'}}}"
    words = (
        "logger=[csv,wandb]",
        "logger.rows={_target_: lightning.pytorch.loggers.CSVLogger, "
        "save_dir: rows, name: '', version: ''}",
        "callbacks=lr_monitor",
        f"callbacks.fail={failing}",
        f"cache_dir={tmp_path / 'cache'}",
        "expansion=llama_pro",
        "control=true",
        "trainer.log_every_n_steps=1",
    )
    config = load_config([*TINY, *words])
    with pytest.raises(KeyError, match="broken off"):
        run_pipeline(config, run_folder=folder)
    assert [run.given["job_type"] for run in runs] == ["pretraining", "run", "control"]
    assert [run.exit_codes for run in runs] == [[0], [0], [1]]
    run_pipeline(config, run_folder=folder)
    again = runs[3:]  # the control goes on, and the run is told its summary
    assert [run.given["job_type"] for run in again] == ["control", "run"]
    assert [run.given["id"] for run in again] == [runs[2].given["id"], runs[1].given["id"]]
    assert len({run.given["id"] for run in runs}) == 3
    assert {run.given["group"] for run in runs} == {"sweep"}
    assert [run.given["name"] for run in runs[:3]] == [
        "pretraining seed 0",
        "llama_pro ewc+replay seed 0",
        "control ewc+replay seed 0",
    ]
    for told in (runs[0].rows, runs[1].rows, runs[2].rows + again[0].rows):
        steps = {row["trainer/global_step"] for row in told if "train/loss" in row}
        assert len(steps) == 6
    assert any("score/new/loss" in row for row in again[0].rows)
    for part in ("", "pretraining", "control"):
        rows = (folder / "rows" / part / "metrics.csv").read_text().splitlines()
        assert "train/loss" in rows[0] and len(rows) > 1
        told = yaml.safe_load((folder / "rows" / part / "hparams.yaml").read_text())
        assert told == runs[0].given["config"] == fingerprint(config)
    opened = len(runs)
    (tmp_path / "other").mkdir()
    run_pipeline(load_config([*TINY, *words, "control=false"]), run_folder=tmp_path / "other")
    assert [run.given["job_type"] for run in runs[opened:]] == ["run", "run"]  # a cached base
