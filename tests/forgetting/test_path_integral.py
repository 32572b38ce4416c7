"""ω of synaptic intelligence: by hand, against the fall of the loss, and through a resume."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

from tests import oracle
from tests.training.test_fit import SETTINGS, batches
from tritter.checkpoint.state import LazyTensors, read_state
from tritter.data.batches import BatchStream, SequenceStream
from tritter.forgetting.path_integral import PathIntegral, add_to_path
from tritter.training import BaseModule, OptimizerSettings, Schedule, fit


def test_one_step_by_hand() -> None:
    model = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 2.0]]))
    omega = {"weight": torch.tensor([[0.5, 0.0]])}
    before = (torch.tensor([[3.0, float("nan")]]), torch.tensor([[1.5, 2.0]]))
    add_to_path(omega, model, {"weight": before})
    assert omega["weight"].tolist() == [[0.5 + 3.0 * 0.5, 0.0]]


def trained(
    folder: Path, *, learning_rate: float, steps: int, loader: BatchStream
) -> tuple[nn.Module, float, float]:
    """Return the model, the sum of ω, and the fall of the loss on all the data."""
    model = oracle.tiny_llama(initializer_range=0.05)
    data = oracle.tokens(batch=40, length=16, seed=5)

    def loss() -> float:
        with torch.no_grad():
            return float(model(input_ids=data, labels=data).loss)

    before = loss()
    fit(
        BaseModule(
            model,
            schedule=Schedule(learning_rate=learning_rate, max_steps=steps, shape="constant"),
            optimizer=OptimizerSettings(weight_decay=0.0),
        ),
        loader,
        settings=SETTINGS,
        folder=folder,
        label="test",
        console=Console(quiet=True),
        observers=[PathIntegral(folder / "importance")],
    )
    state = read_state(folder / "importance")
    assert state is not None and state.step == steps
    omega = dict(LazyTensors(state.kinds["path_integral"]))
    assert set(omega) == {name for name, _ in model.named_parameters()}
    return model, sum(float(value.sum()) for value in omega.values()), before - loss()


def test_it_adds_up_to_the_fall_of_the_loss(tmp_path: Path) -> None:
    """With all the data in every batch and small steps Σ ω is the loss that was taken away."""
    stream = SequenceStream(oracle.tokens(batch=40, length=16, seed=5).int(), seed=0)
    loader = BatchStream(stream, batch_size=40, num_batches=40)
    _, omega, fall = trained(tmp_path, learning_rate=3e-4, steps=40, loader=loader)
    assert fall > 0.05
    assert omega == pytest.approx(fall, rel=0.05)


def test_it_changes_nothing_of_the_training(tmp_path: Path) -> None:
    watched, _, _ = trained(tmp_path / "watched", learning_rate=1e-2, steps=8, loader=batches())
    model = oracle.tiny_llama(initializer_range=0.05)
    module = BaseModule(
        model,
        schedule=Schedule(learning_rate=1e-2, max_steps=8, shape="constant"),
        optimizer=OptimizerSettings(weight_decay=0.0),
    )
    fit(
        module,
        batches(),
        settings=SETTINGS,
        folder=tmp_path / "plain",
        label="test",
        console=Console(quiet=True),
    )
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, watched.get_parameter(name))


def test_it_is_written_also_when_nothing_was_left_to_train(tmp_path: Path) -> None:
    """Killed after the last step: the resumed training takes none, and ω is the same."""
    omegas = []
    for _ in range(2):
        module = BaseModule(
            oracle.tiny_llama(initializer_range=0.05),
            schedule=Schedule(learning_rate=1e-2, max_steps=8),
            optimizer=OptimizerSettings(),
        )
        result = fit(
            module,
            batches(),
            settings=replace(SETTINGS, save_every_n_steps=4),
            folder=tmp_path,
            label="test",
            console=Console(quiet=True),
            observers=[PathIntegral(tmp_path / "importance")],
        )
        state = read_state(tmp_path / "importance")
        assert result.steps == 8 and state is not None and state.step == 8
        omegas.append(dict(LazyTensors(state.kinds["path_integral"])))
        shutil.rmtree(tmp_path / "importance")
    first, second = omegas
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
