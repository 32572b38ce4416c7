"""What a run publishes: the last or the best weights, and an artifact for W&B."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from tests import oracle
from tests.pipeline.offline_wandb import offline_runs
from tests.pipeline.tiny import TINY
from tritter.checkpoints import Lineage
from tritter.checkpoints.state import State
from tritter.config.launch.composition import load_config
from tritter.errors import RequestError
from tritter.pipeline import Outcome
from tritter.pipeline.stages.fit import _best_weights
from tritter.training.callbacks import FiniteGuard, SaveState, StopRequest
from tritter.training.checkpoint_io import SafetensorsCheckpointIO

Run = Callable[..., Outcome]
SAVING = (
    "callbacks=[model_checkpoint]",
    "callbacks.model_checkpoint.monitor=eval/old/loss",
    "callbacks.model_checkpoint.every_n_train_steps=2",
    "evaluation.every_n_steps=2",
)
# A rate that soon makes the model worse on the old domain
BEST = (*SAVING, "pipeline.publish=best", "training.max_steps=14", "training.learning_rate=0.05")


class FailOnce(Callback):
    """Fail at step 9, the first time."""

    def __init__(self, marker: str) -> None:
        self.marker = Path(marker)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:  # type: ignore[no-untyped-def]
        if trainer.global_step == 9 and not self.marker.exists():
            self.marker.touch()
            raise KeyError("broken off")


def attempt_of(folder: Path) -> dict[str, Any]:
    attempt: dict[str, Any] = json.loads((folder / "summary.json").read_text())["attempts"][0]
    return attempt


def saved_at(folder: Path, step: int) -> dict[str, Any]:
    place = folder / f"attempt_1/checkpoints/step_{step:06d}.ckpt"
    return SafetensorsCheckpointIO().load_checkpoint(place)


@pytest.mark.full
def test_the_best_weights_are_published_and_judged(
    run_tiny: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_tiny(tmp_path / "run", *BEST, "forgetting=[si]")
    attempt, folder = attempt_of(tmp_path / "run"), tmp_path / "run"
    with (folder / "attempt_1/metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["eval/old/loss"]]
    losses = {int(row["step"]): float(row["eval/old/loss"]) for row in rows}
    start = losses.pop(0)
    best = min(losses, key=lambda step: losses[step])
    said = f"eval/old/loss was better before the first step: {start:.4g}, now {losses[best]:.4g}"
    assert (said in capsys.readouterr().out) == (start < losses[best])
    assert attempt["best_step"] == best < attempt["steps"] == 14
    notes = json.loads((folder / "summary.json").read_text())["notes"]
    assert f"attempt_1: the best weights are those of step {best} of 14" in notes[-1]
    saved = saved_at(folder, best)
    assert saved["global_step"] == best
    published = dict(oracle.stock(folder / "checkpoint").named_parameters())
    weights: dict[str, Tensor] = saved["state_dict"]
    assert published and all(
        weights[f"model.{name}"].equal(value) for name, value in published.items()
    )
    # The gate read the same weights, and its score is that of the step
    assert attempt["final"]["old"]["loss"] == pytest.approx(losses[best], rel=1e-4)
    lineage = Lineage.of(folder / "checkpoint")
    assert lineage.step == lineage.expansion_history[-1].continued_training_steps == best
    # SI continues from the path to these weights, not to the last ones
    state, path = State.read(folder / "checkpoint"), saved["callbacks"]["ForgettingCallback"]["si"]
    assert state is not None
    kept = state.kinds["path_integral"]
    assert all(kept.get(name).equal(path["path_integral"][name]) for name in kept.files)


@pytest.mark.full
@pytest.mark.parametrize("words", [(), ("trainer=ddp", "trainer.devices=2", "data.batch_size=2")])
def test_a_run_that_was_interrupted_publishes_the_same(
    run_tiny: Run, tmp_path: Path, words: tuple[str, ...]
) -> None:
    asked = (*BEST, *words, "trainer.save_every_n_steps=2", "control=true")
    run_tiny(tmp_path / "whole", *asked)
    failing = f"{{_target_: {__name__}.FailOnce, marker: {tmp_path / 'failed'}}}"
    if not words:  # an error in a worker process ends them all
        with pytest.raises(KeyError, match="broken off"):
            run_tiny(tmp_path / "parts", *asked, f"callbacks.fail={failing}")
    run_tiny(tmp_path / "parts", *asked, *([f"callbacks.fail={failing}"] if not words else []))
    whole, parts = (Lineage.of(tmp_path / name / "checkpoint") for name in ("whole", "parts"))
    assert whole.model_hash == parts.model_hash
    summary = json.loads((tmp_path / "whole/summary.json").read_text())
    assert 0 < summary["control"]["best_step"] <= 14


@pytest.mark.full
def test_a_run_that_was_moved_knows_its_best_weights(run_tiny: Run, tmp_path: Path) -> None:
    asked = (*BEST, "trainer.save_every_n_steps=2", "forgetting=[si]")
    failing = f"{{_target_: {__name__}.FailOnce, marker: {tmp_path / 'failed'}}}"
    with pytest.raises(KeyError, match="broken off"):
        run_tiny(tmp_path / "before", *asked, f"callbacks.fail={failing}")
    (tmp_path / "before").rename(tmp_path / "after")
    run_tiny(tmp_path / "after", *asked, f"callbacks.fail={failing}")
    run_tiny(tmp_path / "whole", *asked)
    whole, parts = (Lineage.of(tmp_path / name / "checkpoint") for name in ("whole", "after"))
    assert whole.model_hash == parts.model_hash and whole.step == parts.step < 8


def test_paths_in_a_saved_state_stay_in_the_folder_of_the_run(tmp_path: Path) -> None:
    saver = ModelCheckpoint(dirpath=tmp_path / "new/checkpoints", monitor="m", save_top_k=1)
    old, outside = str(tmp_path / "old/checkpoints"), str(tmp_path / "precious")
    state = {
        **saver.state_dict(),
        "dirpath": old,
        "best_model_path": f"{old}/deep/step_000002.ckpt",
        "best_k_models": {outside: torch.tensor(9.0), f"{old}/../../x/a.ckpt": torch.tensor(8.0)},
        "kth_best_model_path": outside,
    }
    saving = SaveState(
        tmp_path / "s", every_n_steps=0, stop=StopRequest(), guard=FiniteGuard(max_consecutive=1)
    )
    trainer = SimpleNamespace(checkpoint_callbacks=[saving, saver])
    saving.on_load_checkpoint(trainer, None, {"callbacks": {saver.state_key: state}})  # type: ignore[arg-type]
    saver.load_state_dict(state)
    assert saver.dirpath is not None
    new = Path(saver.dirpath)
    assert saver.best_model_path == str(new / "deep/step_000002.ckpt")
    assert saver.best_k_models.keys() == {str(new / "precious"), str(new / "a.ckpt")}
    assert saver.kth_best_model_path == str(new / "precious")


@pytest.mark.quick_cases(5)
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("pipeline.publish=best",), "needs one ModelCheckpoint, and there is none"),
        ((*BEST, "callbacks.model_checkpoint.every_n_train_steps=3"), "must be a multiple of it"),
        (
            (*BEST, "callbacks.model_checkpoint.every_n_train_steps=50"),
            "period is longer than the run",
        ),
        ((*BEST, "callbacks.model_checkpoint.monitor=null"), "needs a metric"),
        ((*BEST, "callbacks.model_checkpoint.save_top_k=0"), "needs the best checkpoint"),
        (
            (*BEST, "callbacks.model_checkpoint.monitor=eval/old/accuracy"),
            "selects the worst eval/old/accuracy; set mode=max",
        ),
        ((*BEST, "callbacks.model_checkpoint.mode=max"), "worst eval/old/loss; set mode=min"),
        (
            (*BEST, "expansion=moe", "moe_routing.bias_update_rate=0.001"),
            "measured with the selection bias",
        ),
        ((*BEST, "growth=gradmax"), "not together with growth"),
        ((*BEST, "experts=dylora"), "not together with experts"),
        ((*BEST, "trainer=fsdp"), "not together with trainer.strategy"),
        (("pipeline.publish=bset",), "pipeline.publish = bset"),
    ],
)
def test_best_weights_that_cannot_be_had_are_refused(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        load_config([*TINY, *words])


@pytest.mark.full
def test_the_published_checkpoint_is_an_artifact(run_tiny: Run, tmp_path: Path) -> None:
    run_tiny(tmp_path / "run", "logger=wandb", "logger.wandb.log_model=true", "forgetting=[si]")
    (run,) = (each for each in offline_runs(tmp_path / "run") if each.job_type == "run")
    (files,) = run.models.values()
    folder = tmp_path / "run/checkpoint"
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert files.keys() == {name for name in present if not name.startswith("state/")}
    assert files["model.safetensors"] == folder / "model.safetensors"


@pytest.mark.full
def test_no_artifact_of_a_run_that_was_rolled_back(run_job: Run, tmp_path: Path) -> None:
    words = ("training.learning_rate=1", "logger=wandb", "logger.wandb.log_model=true")
    outcome = run_job(tmp_path / "run", *words)
    assert outcome.status == "rolled_back"
    assert not any(run.models for run in offline_runs(tmp_path / "run"))


@pytest.mark.parametrize(
    ("metric", "mode", "start", "is_said"),
    [("loss", "min", 4.0, True), ("loss", "min", 6.0, False), ("accuracy", "max", 6.0, True)],
)
def test_a_start_that_was_better_than_the_best_step_is_stated(
    tmp_path: Path, metric: str, mode: str, start: float, is_said: bool
) -> None:
    own = f"callbacks.model_checkpoint.monitor=eval/old/{metric}"
    config = load_config([*TINY, *BEST, own, f"callbacks.model_checkpoint.mode={mode}"])
    (tmp_path / "metrics.csv").write_text(f"step,eval/old/{metric}\n0,{start}\n2,5.0\n")
    line = _best_weights(config, tmp_path, SimpleNamespace(best_step=2, steps=4))  # type: ignore[arg-type]
    assert line.startswith("the best weights are those of step 2 of 4")
    assert (f"better before the first step: {start:.4g}, now 5" in line) == is_said
