"""TensorBoard and MLflow, if installed: their contents after a resume."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.pipeline.tiny import TINY
from tritter.config.launch.composition import load_config
from tritter.errors import RequestError
from tritter.pipeline import run_pipeline

STEPS = 6  # per training run; the control is killed at its fifth step and resumed


def words(tmp_path: Path, loggers: str) -> tuple[str, ...]:
    target = "tests.pipeline.test_loggers.FailOnce"
    failing = f"{{_target_: {target}, folder: control, marker: {tmp_path / 'failed'}}}"
    return (
        *TINY,
        f"logger={loggers}",
        "callbacks=lr_monitor",
        f"callbacks.fail={failing}",
        f"cache_dir={tmp_path / 'cache'}",
        "expansion=llama_pro",
        "control=true",
        "trainer.log_every_n_steps=1",
        "evaluation.every_n_steps=3",
    )


def broken_off_and_resumed(tmp_path: Path, loggers: str) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    config = load_config(list(words(tmp_path, loggers)))
    with pytest.raises(KeyError, match="broken off"):
        run_pipeline(config, run_folder=folder)
    run_pipeline(config, run_folder=folder)
    return folder


def check(curves: Mapping[str, list[int]], *, is_grown: bool) -> None:
    """Compare the steps with metrics in a run with the trained steps, each step once."""
    assert curves["train/loss"] == list(range(STEPS))
    assert curves["eval/old/loss"] == [*([-1] if is_grown else []), 0, 3, STEPS]
    assert curves["score/old/loss"] == [STEPS]


@pytest.mark.full
def test_tensorboard_has_each_training_once(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs tritter[tensorboard]")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    folder = broken_off_and_resumed(tmp_path, "[csv,tensorboard]")
    for part in ("", "control"):
        events = EventAccumulator(str(folder / "tensorboard" / part)).Reload()
        curves = {n: [each.step for each in events.Scalars(n)] for n in events.Tags()["scalars"]}
        check(curves, is_grown=not part)
        reported = events.PluginTagToContent("hparams")["_hparams_/session_start_info"]
        values = HParamsPluginData.FromString(reported).session_start_info.hparams
        assert values["training/max_steps"].number_value == STEPS


@pytest.fixture
def mlflow() -> Any:
    return pytest.importorskip("mlflow", reason="needs tritter[mlflow]")


def runs_of(mlflow: Any, folder: Path) -> dict[str, Any]:
    client = mlflow.MlflowClient(f"file:{folder / 'mlruns'}")
    (experiment,) = [e for e in client.search_experiments() if e.name == "tritter"]
    runs = client.search_runs([experiment.experiment_id])
    assert len({run.info.run_name for run in runs}) == len(runs)
    return {run.info.run_name: (client, run) for run in runs}


@pytest.mark.full
def test_mlflow_goes_on_with_the_same_run(tmp_path: Path, mlflow: Any) -> None:
    folder = broken_off_and_resumed(tmp_path, "[csv,mlflow]")
    runs = runs_of(mlflow, folder)
    names = ("pretraining seed 0", "llama_pro ewc+replay seed 0", "control ewc+replay seed 0")
    assert set(runs) == set(names)
    for name in names[1:]:
        client, run = runs[name]
        assert run.info.status == "FINISHED"
        identifier = run.info.run_id
        curves = {
            n: [each.step for each in client.get_metric_history(identifier, n)]
            for n in run.data.metrics
        }
        check(curves, is_grown="llama_pro" in name)
        assert run.data.params["training/max_steps"] == str(STEPS)


@pytest.mark.full
def test_a_run_that_mlflow_does_not_have_any_more_is_a_new_one(tmp_path: Path, mlflow: Any) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "mlflow_id").write_text("0123456789abcdef0123456789abcdef")
    quick = [word for word in words(tmp_path, "mlflow") if not word.startswith("callbacks")]
    run_pipeline(load_config([*quick, "control=false"]), run_folder=folder)
    _, run = runs_of(mlflow, folder)["llama_pro ewc+replay seed 0"]
    assert (folder / "mlflow_id").read_text() == run.info.run_id


def test_judging_mlflow_writes_nothing(
    tmp_path: Path, mlflow: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    load_config(["logger=mlflow"])
    with pytest.raises(RequestError, match=r"logger\.mlflow\.run_nam"):
        load_config(["logger=mlflow", "logger.mlflow.run_nam=x"])
    assert not list(tmp_path.iterdir())
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"
