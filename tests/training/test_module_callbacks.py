"""Arguments and callbacks that a run asks for: gradients gathered, killed, in two processes."""

import importlib
import json
import pkgutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback
from safetensors.torch import load_file, save_file
from torch import nn

import tritter
from tests import oracle
from tests.training.test_fit import SETTINGS
from tritter.data.batches import BatchStream, SequenceStream
from tritter.targets import Component, import_object
from tritter.terminal import Console
from tritter.training import BaseModule, FitResult, OptimizerSettings, Schedule, fit, read_metrics
from tritter.training.checkpoint_io import SafetensorsCheckpointIO
from tritter.training.fitting import start_method

STEPS, GATHERED = 12, 3
ADAMW = OptimizerSettings()
HERE = "tests.training.test_module_callbacks"
DEVICES = pytest.mark.parametrize(
    "devices",
    [
        1,
        pytest.param(
            2,
            marks=pytest.mark.skipif(
                start_method("cpu") != "fork", reason="the tests' classes come by fork"
            ),
        ),
    ],
)


class KillAt(Callback):
    """End in the middle of a step, at the first of its batches; or after the last step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:  # type: ignore[no-untyped-def]
        if trainer.global_step == self.step < STEPS:
            raise KeyError("killed")

    def on_train_epoch_end(self, trainer, pl_module) -> None:  # type: ignore[no-untyped-def]
        if self.step == STEPS:
            raise KeyError("killed")


class StopAt(Callback):
    """Ask the training to stop within a step, and count the batches of its own."""

    def __init__(self, batch: int, name: str = "") -> None:
        self.batch, self.name, self.seen = batch, name, 0

    @property
    def state_key(self) -> str:
        return f"StopAt {self.name}"

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:  # type: ignore[no-untyped-def]
        self.seen += 1
        if batch_idx == self.batch:
            trainer.should_stop = True

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seen = state_dict["seen"]


class Order(Callback):
    """Leave the names of all callbacks, in their order."""

    def __init__(self, path: str) -> None:
        self.path = path

    def on_train_start(self, trainer, pl_module) -> None:  # type: ignore[no-untyped-def]
        names = [type(one).__name__ for one in trainer.callbacks]
        Path(self.path).write_text(json.dumps(names))


def asked(key: str, target: str, **arguments: Any) -> Component:
    return Component(
        name=key, kind=import_object(target), options={"_target_": target, **arguments}
    )


def train(
    folder: Path,
    *theirs: Component,
    devices: int = 1,
    gathered: int = 1,
    steps: int = STEPS,
    save_every: int = 4,
    clip: float | None = 1.0,
    optimizer: OptimizerSettings = ADAMW,
    dropout: float = 0.2,
    **arguments: Any,
) -> tuple[nn.Module, FitResult]:
    torch.manual_seed(7)
    model = oracle.tiny_llama(initializer_range=0.05, attention_dropout=dropout)
    sequences = oracle.tokens(batch=40, length=16, seed=5).int()
    batches = BatchStream(
        SequenceStream(sequences, seed=0), batch_size=4, num_batches=steps * gathered
    )
    # A resumed process begins with another random state, which must not matter
    torch.manual_seed(999 if (folder / "saved").exists() else 11)
    module = BaseModule(
        model,
        schedule=Schedule(learning_rate=1e-2, max_steps=steps),
        optimizer=optimizer,
    )
    if gathered > 1:
        arguments["accumulate_grad_batches"] = gathered
    settings = replace(
        SETTINGS, save_every_n_steps=save_every, gradient_clip_val=clip, arguments=arguments
    )
    if devices > 1:
        settings = replace(settings, devices=devices, strategy="ddp")
    result = fit(
        module,
        batches,
        settings=settings,
        folder=folder,
        label="test",
        console=Console(quiet=True),
        user_callbacks=theirs,
        write_result=partial(leave, folder / "weights.safetensors"),
    )
    model.load_state_dict(load_file(folder / "weights.safetensors"))
    return model, result


def leave(path: Path, model: nn.Module, result: FitResult) -> None:
    save_file({name: value.clone() for name, value in model.state_dict().items()}, path)


def killed(folder: Path, step: int, *theirs: Component, **options: Any) -> None:
    with pytest.raises(Exception, match="killed"):
        train(folder, *theirs, asked("kill", f"{HERE}.KillAt", step=step), **options)


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_gathered_gradients_are_one_step_of_a_larger_batch(tmp_path: Path) -> None:
    """Three batches of 4 for a step of SGD move the weights by their mean gradient, by hand."""
    plain = OptimizerSettings(target="torch.optim.SGD", weight_decay=None, arguments={})
    options: dict[str, Any] = {"steps": 1, "clip": None, "dropout": 0.0, "optimizer": plain}
    model, result = train(tmp_path, gathered=GATHERED, **options)
    torch.manual_seed(7)
    other = oracle.tiny_llama(initializer_range=0.05)
    stream = SequenceStream(oracle.tokens(batch=40, length=16, seed=5).int(), seed=0)
    batch = stream.next_sequences(4 * GATHERED).long()
    other(input_ids=batch, labels=batch).loss.backward()
    for name, parameter in other.named_parameters():
        moved = parameter.detach() - 1e-2 * parameter.grad
        assert torch.allclose(model.get_parameter(name), moved, atol=1e-7), name
        assert not torch.equal(moved, parameter.detach()), name
    assert (result.steps, result.num_tokens) == (1, GATHERED * 4 * 16)


@pytest.mark.full
@DEVICES
def test_gathered_gradients_resume_bit_for_bit(tmp_path: Path, devices: int) -> None:
    whole, expected = train(tmp_path / "whole", gathered=GATHERED, devices=devices)
    for step in (2, 5, 9):
        killed(tmp_path / "parts", step, gathered=GATHERED, devices=devices)
    parts, result = train(tmp_path / "parts", gathered=GATHERED, devices=devices)
    assert same_weights(whole, parts)
    assert replace(result, seconds=0.0) == replace(expected, seconds=0.0)
    rows, before = read_metrics(tmp_path / "parts"), read_metrics(tmp_path / "whole")
    losses = [
        [(r["step"], r["train/loss"]) for r in part if r["train/loss"]] for part in (rows, before)
    ]
    assert losses[0] == losses[1]


def test_tokens_and_flops_are_those_of_all_batches(tmp_path: Path) -> None:
    _, plain = train(tmp_path / "plain")
    _, gathered = train(tmp_path / "gathered", gathered=GATHERED)
    assert gathered.steps == plain.steps == STEPS
    assert gathered.num_tokens == GATHERED * plain.num_tokens
    assert gathered.flops == GATHERED * plain.flops


@pytest.mark.full
@DEVICES
def test_an_early_end_is_at_the_end_of_a_step_and_is_not_trained_on_from(
    tmp_path: Path, devices: int
) -> None:
    """Asked at the second of three batches of step 3: the step is finished, and counted whole."""
    stop = asked("stop", f"{HERE}.StopAt", batch=2 * GATHERED + 1)
    model, result = train(tmp_path, stop, gathered=GATHERED, devices=devices)
    assert result.steps == 3 and result.num_tokens == 3 * GATHERED * 4 * 16
    _, short = train(tmp_path / "short", gathered=GATHERED, steps=3)
    assert result.flops == short.flops
    assert result.ended_early == "a callback stopped the training run"
    assert result.stopped_because is None
    again, resumed = train(tmp_path, stop, gathered=GATHERED, devices=devices)
    assert same_weights(model, again)
    assert replace(resumed, seconds=0.0, update_norms={}) == replace(
        result, seconds=0.0, update_norms={}
    )


def test_a_stop_at_the_last_step_is_no_early_end(tmp_path: Path) -> None:
    _, result = train(tmp_path, asked("stop", f"{HERE}.StopAt", batch=STEPS - 1))
    assert result.steps == STEPS and result.ended_early is None


@pytest.mark.full
def test_their_state_goes_on_and_they_stand_behind_ours(tmp_path: Path) -> None:
    counting = asked("count", f"{HERE}.StopAt", batch=-1)
    order = asked("order", f"{HERE}.Order", path=str(tmp_path / "order.json"))
    checkpoints = asked("files", "lightning.pytorch.callbacks.ModelCheckpoint")
    killed(tmp_path, 6, counting)
    train(tmp_path, counting, checkpoints, order)
    saved = SafetensorsCheckpointIO().load_checkpoint(tmp_path / "saved")
    assert saved["callbacks"]["StopAt "] == {"seen": STEPS}
    names = json.loads((tmp_path / "order.json").read_text())
    assert names[0] == "EndOfTraining"
    assert names[-4:] == ["StopAt", "Order", "ModelCheckpoint", "SaveState"]


@pytest.mark.full
@DEVICES
def test_checkpoints_lie_below_the_training_as_if_never_killed(
    tmp_path: Path, devices: int
) -> None:
    files = asked(
        "files",
        "lightning.pytorch.callbacks.ModelCheckpoint",
        dirpath="checkpoints",
        filename="step_{step}",
        auto_insert_metric_name=False,
        monitor="train/loss",
        every_n_train_steps=2,
        save_top_k=2,
        save_last=True,
        enable_version_counter=False,
    )
    options: dict[str, Any] = {"gathered": 2, "devices": devices}
    train(tmp_path / "whole", files, **options)
    killed(tmp_path / "parts", 7, files, **options)
    train(tmp_path / "parts", files, **options)
    folders = [tmp_path / name / "checkpoints" for name in ("whole", "parts")]
    names = [sorted(path.name for path in folder.iterdir()) for folder in folders]
    assert names[0] == names[1] and len(names[0]) == 3 and "last.ckpt" in names[0]
    for name in names[0]:
        whole, parts = (SafetensorsCheckpointIO().load_checkpoint(f / name) for f in folders)
        assert whole["state_dict"].pop("_extra_state") == parts["state_dict"]["_extra_state"]
        for key, value in whole["state_dict"].items():
            assert torch.equal(value, parts["state_dict"][key]), key
    assert {path.suffix for path in folders[0].rglob("*") if path.is_file()} == {
        ".json",
        ".safetensors",
    }


@pytest.mark.full
@DEVICES
@pytest.mark.parametrize("last", [7, STEPS], ids=["between", "after the last step"])
def test_averaged_weights_are_as_if_never_killed(tmp_path: Path, devices: int, last: int) -> None:
    average = asked(
        "ema",
        "lightning.pytorch.callbacks.EMAWeightAveraging",
        decay=0.8,
        use_buffers=False,
    )
    plain, _ = train(tmp_path / "plain", devices=devices)
    whole, _ = train(tmp_path / "whole", average, devices=devices)
    killed(tmp_path / "parts", last, average, devices=devices, save_every=4)
    parts, _ = train(tmp_path / "parts", average, devices=devices)
    assert same_weights(whole, parts) and not same_weights(whole, plain)


def test_what_lightning_sets_for_the_process_is_set_back(tmp_path: Path) -> None:
    train(tmp_path, deterministic=True, steps=2)
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_profile_lies_beside_the_metrics(tmp_path: Path) -> None:
    train(tmp_path, profiler="simple", steps=2)
    assert "run_training_batch" in (tmp_path / "fit-profile.txt").read_text()


SAVED_UNDER = {
    "ExpertCallback",
    "FiniteGuard",
    "ForgettingCallback",
    "GradientFlow",
    "MemoryMeter",
    "NeuronGrowthCallback",
    "PathIntegral",
    "RandomState",
    "RoutingCallback",
    "SampleLog",
    "SaveState",
    "Validation",
    "WorkCount",
}


def test_class_names_that_saved_runs_contain_stay() -> None:
    """Lightning saves a callback's state under its class name: a new name loses the state."""
    shipped = {
        kind
        for module in pkgutil.walk_packages(tritter.__path__, "tritter.")
        if not module.name.endswith("__main__")
        for kind in vars(importlib.import_module(module.name)).values()
        if isinstance(kind, type)
        and issubclass(kind, Callback)
        and kind.__module__.startswith("tritter.")
    }
    with_state = {
        kind.__qualname__ for kind in shipped if kind.state_dict is not Callback.state_dict
    }
    assert with_state == SAVED_UNDER
