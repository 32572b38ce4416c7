"""ω of synaptic intelligence: by hand, compared with the fall of the loss, after a resume."""

import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

from tests import oracle
from tests.training.test_fit import SETTINGS, batches
from tritter.checkpoints.state import State
from tritter.data.batches import BatchStream, SequenceStream
from tritter.methods.forgetting.path_integral import PathIntegral
from tritter.methods.forgetting.si import WeightPath
from tritter.terminal import Console
from tritter.training import BaseModule, OptimizerSettings, Schedule, fit


def test_one_step_by_hand() -> None:
    model = nn.Linear(2, 1, bias=False)
    model.weight.data = torch.tensor([[1.5, 2.0]])
    path = WeightPath(start={}, path_integral={"weight": torch.tensor([[0.5, 0.0]])})
    path.before_step(model, {"weight": torch.tensor([[3.0, -4.0]])})
    model.weight.data = torch.tensor([[1.0, 2.5]])
    path.after_step(model)
    assert path.path_integral["weight"].tolist() == [[0.5 + 3.0 * 0.5, 4.0 * 0.5]]
    path.after_step(model)  # of a batch without a step
    assert path.path_integral["weight"].tolist() == [[2.0, 2.0]]
    assert path.recorded(model)["displacement"]["weight"].tolist() == [[-0.5, 0.5]]


def test_a_step_that_is_refused_adds_nothing() -> None:
    model = nn.Linear(2, 1, bias=False)
    path = WeightPath(start={})
    path.before_step(model, {"weight": torch.tensor([[3.0, float("nan")]])})
    path.after_step(model)
    assert path.path_integral["weight"].tolist() == [[0.0, 0.0]]


def quadratic(step: float, *, midpoint: bool) -> tuple[float, float]:
    """Descend ½ θᵀHθ for a time of 1; return Σ ω and the fall of the loss."""
    generator = torch.Generator().manual_seed(3)
    root = torch.randn(5, 5, dtype=torch.float64, generator=generator)
    hessian = root @ root.T + torch.eye(5, dtype=torch.float64)
    model = nn.Linear(5, 1, bias=False, dtype=torch.float64)
    model.weight.data = torch.randn(1, 5, dtype=torch.float64, generator=generator)
    path = WeightPath(start={})
    before = float((model.weight @ hessian @ model.weight.T).detach() / 2)
    for _ in range(round(1 / step)):
        weight = model.weight.detach().clone()
        after = weight - step * weight @ hessian
        seen = (weight + after) / 2 if midpoint else weight
        path.before_step(model, {"weight": seen @ hessian})
        model.weight.data = after
        path.after_step(model)
    fall = before - float((model.weight @ hessian @ model.weight.T).detach() / 2)
    return float(path.path_integral["weight"].sum()), fall


def test_on_a_quadratic_midpoint_gradients_add_up_to_the_fall_of_the_loss() -> None:
    omega, fall = quadratic(0.05, midpoint=True)
    assert fall > 1 and omega == pytest.approx(fall, rel=1e-12)


@pytest.mark.full
def test_with_gradients_at_the_start_of_steps_the_error_halves_with_the_steps() -> None:
    errors = []
    for step in (1e-3, 5e-4, 2.5e-4):
        omega, fall = quadratic(step, midpoint=False)
        errors.append(omega - fall)
    assert errors[0] > 0
    ratios = [later / one for one, later in pairwise(errors)]
    assert ratios == pytest.approx([0.5, 0.5], rel=0.02)


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
    state = State.read(folder / "importance")
    assert state is not None and state.step == steps
    omega = dict(state.kinds["path_integral"])
    assert set(omega) == {name for name, _ in model.named_parameters()}
    moved = dict(state.kinds["displacement"])
    first = oracle.tiny_llama(initializer_range=0.05)
    for name, parameter in model.named_parameters():
        assert torch.equal(moved[name], parameter.detach() - first.get_parameter(name).detach())
    return model, sum(float(value.sum()) for value in omega.values()), before - loss()


def test_it_adds_up_to_the_fall_of_the_loss(tmp_path: Path) -> None:
    """With all data in every batch and small steps, Σ ω equals the fall of the loss."""
    stream = SequenceStream(oracle.tokens(batch=40, length=16, seed=5).int(), seed=0)
    loader = BatchStream(stream, batch_size=40, num_batches=40)
    _, omega, fall = trained(tmp_path, learning_rate=3e-4, steps=40, loader=loader)
    assert fall > 0.05
    assert omega == pytest.approx(fall, rel=0.05)


@pytest.mark.full
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


@pytest.mark.full
def test_it_is_written_also_when_nothing_was_left_to_train(tmp_path: Path) -> None:
    """Interrupted after the last step: the resumed run takes none, and ω is the same."""
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
        state = State.read(tmp_path / "importance")
        assert result.steps == 8 and state is not None and state.step == 8
        assert set(state.kinds) == {"path_integral", "displacement"}
        omegas.append({f"{k} {n}": v for k in state.kinds for n, v in state.kinds[k].items()})
        shutil.rmtree(tmp_path / "importance")
    first, second = omegas
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
