"""Distillation as a training run: interruption, processes, FLOPs, precision."""

import csv
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests import oracle
from tests.methods.moe_routing.test_stages import grown
from tests.training.shipped import trainer_settings
from tests.training.written import Written
from tritter.core.families import Model, forward_flops, training_flops
from tritter.core.stock_routers import AddedExperts
from tritter.data.batches import BatchStream, SequenceStream
from tritter.methods.moe_routing.distill import DistillationModule, only_new_experts
from tritter.terminal import Console
from tritter.training import FitResult, OptimizerSettings, Schedule, TrainerSettings, fit, fitting

SEQUENCES = oracle.tokens(vocab_size=97, batch=24, length=16, seed=5).int()
SETTINGS = trainer_settings(log_every_n_steps=1, save_every_n_steps=2)


class Killed(Exception):
    pass


def teach(
    folder: Path, *, settings: TrainerSettings = SETTINGS, kill_at: int | None = None
) -> tuple[dict[str, Tensor], FitResult]:
    """Return the weights and the fit's report after five steps."""
    model, teacher = grown(noise=0.5), oracle.tiny_llama()
    written = Written(folder / "written")
    with only_new_experts(model, (4, 5)):
        module = DistillationModule(
            model,
            teacher,
            new_experts=(4, 5),
            temperature=2.0,
            auxiliary_loss=0.01,
            schedule=Schedule.constant(1e-3, max_steps=5),
            optimizer=OptimizerSettings(),
        )
        if kill_at is not None:
            count = iter(range(kill_at))

            def kill(module: nn.Module, arguments: object) -> None:
                if next(count, None) is None:
                    raise Killed

            model.register_forward_pre_hook(kill)
        result = fit(
            module,
            BatchStream(SequenceStream(SEQUENCES, seed=0), batch_size=4, num_batches=5),
            settings=settings,
            folder=folder,
            label="distill",
            console=Console(quiet=True),
            write_result=written,
        )
    added = AddedExperts.of(model)
    assert added is not None and added.offset == -torch.inf  # the experts are closed again
    return written.read()["model"], result


def rows(folder: Path) -> Iterator[dict[str, str]]:
    with (folder / "metrics.csv").open(encoding="utf-8") as file:
        yield from csv.DictReader(file)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor], FitResult]:
    folder = tmp_path_factory.mktemp("whole")
    return folder, *teach(folder)


@pytest.mark.full
def test_bitwise_as_if_never_killed(
    whole: tuple[Path, dict[str, Tensor], FitResult], tmp_path: Path
) -> None:
    _, weights, result = whole
    with pytest.raises(Killed):
        teach(tmp_path, kill_at=3)  # the state of the second step is on the disk
    resumed, again = teach(tmp_path)
    assert resumed.keys() == weights.keys()
    assert all(torch.equal(value, resumed[name]) for name, value in weights.items())
    assert (again.steps, again.flops) == (result.steps, result.flops)


def test_the_teacher_is_neither_saved_nor_trained_and_every_pass_is_counted(
    whole: tuple[Path, dict[str, Tensor], FitResult],
) -> None:
    folder, weights, result = whole
    assert not any("teacher" in path.name for path in folder.rglob("*"))
    moved = {n for n, v in grown(noise=0.5).state_dict().items() if n not in weights}
    assert moved == {n for n in moved if n.endswith(("gate_up_proj", "down_proj"))}  # in two parts
    model, teacher = grown().config.to_dict(), oracle.tiny_llama().config.to_dict()
    each = forward_flops(Model(teacher)) + training_flops(
        Model(model), is_trained=lambda t: t.expert in (4, 5), routed_to=(4, 5)
    )
    assert result.flops == 5 * 4 * each.of(16)
    logged = list(rows(folder))
    losses = [float(row["train/loss"]) for row in logged if row["train/loss"]]
    assert len(losses) == 5
    assert any(row["routing/auxiliary_loss"] for row in logged)


def test_precision_is_that_of_the_run(
    whole: tuple[Path, dict[str, Tensor], FitResult], tmp_path: Path
) -> None:
    weights, _ = teach(tmp_path, settings=replace(SETTINGS, precision="bf16-mixed"))
    differing = [n for n, value in whole[1].items() if not torch.equal(value, weights[n])]
    assert differing and all(n.endswith("_new") for n in differing)
    assert all(torch.allclose(v, weights[n], atol=0.1) for n, v in whole[1].items())


@pytest.mark.full
@pytest.mark.skipif(fitting.start_method("cpu") != "fork", reason="spawning takes seconds")
def test_two_processes_give_the_weights_of_one(
    whole: tuple[Path, dict[str, Tensor], FitResult], tmp_path: Path
) -> None:
    weights, result = teach(tmp_path, settings=replace(SETTINGS, strategy="ddp", devices=2))
    assert result.flops == whole[2].flops and result.steps == 5
    for name, value in whole[1].items():
        assert (weights[name] - value).abs().max() < 1e-4, name
