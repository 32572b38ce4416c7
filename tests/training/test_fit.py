"""Training through stock Lightning: what moves, what is refused, what is logged."""

import csv
import signal
import weakref
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests import oracle
from tests.training.shipped import trainer_settings
from tritter.data.batches import BatchStream, SequenceStream
from tritter.terminal import Console
from tritter.training import (
    BaseModule,
    FitResult,
    ForgettingMethod,
    OptimizerSettings,
    Schedule,
    Task,
    TrainerSettings,
    discard_saved,
    fit,
)

SETTINGS = trainer_settings(log_every_n_steps=2)
SCHEDULE = Schedule(learning_rate=1e-2, max_steps=8)


def batches(seed: int = 0) -> BatchStream:
    sequences = oracle.tokens(batch=40, length=16, seed=5).int()
    return BatchStream(SequenceStream(sequences, seed=seed), batch_size=4, num_batches=8)


def task(model: nn.Module) -> Task:
    carried = {n: torch.ones_like(p, dtype=torch.bool) for n, p in model.named_parameters()}
    old = oracle.tokens(batch=20, length=16, seed=6).int()
    return Task(carried=carried, old_sequences={"old": old}, seed=0)


def run(module: BaseModule, folder: Path, *, settings: TrainerSettings = SETTINGS) -> FitResult:
    return fit(
        module,
        batches(),
        settings=settings,
        folder=folder,
        label="test",
        console=Console(quiet=True),
        task=task(module.model) if module.methods else None,
    )


def module_of(*methods: ForgettingMethod, schedule: Schedule = SCHEDULE) -> BaseModule:
    return BaseModule(
        oracle.tiny_llama(initializer_range=0.05),
        schedule=schedule,
        optimizer=OptimizerSettings(),
        methods=methods,
    )


def test_loss_falls_every_part_moves_and_tokens_are_counted(tmp_path: Path) -> None:
    module = BaseModule(
        oracle.tiny_llama(initializer_range=0.05),
        schedule=replace(SCHEDULE, max_steps=60),
        optimizer=OptimizerSettings(),
    )
    result = run(module, tmp_path)
    assert result.steps == 60
    assert result.num_tokens == 60 * 4 * 16
    assert result.refused_steps == 0 and result.stopped_because is None
    assert set(result.update_norms) == {
        "embed_tokens", "layers.0", "layers.1", "layers.2", "norm", "lm_head",
    }  # fmt: skip
    assert all(norm > 1e-3 for norm in result.update_norms.values())
    rows = list(csv.DictReader((tmp_path / "metrics.csv").open()))
    losses = [float(row["train/loss"]) for row in rows if row["train/loss"]]
    assert losses[-1] < losses[0] - 0.5
    assert {"performance/tokens_per_second", "performance/peak_memory_bytes"} <= set(rows[0])


def test_moments_and_gradients_do_not_outlive_it(tmp_path: Path) -> None:
    """The next stage of a run loads other models."""
    run(module := module_of(), tmp_path)
    trainer = weakref.ref(module.trainer)
    del module
    discard_saved(tmp_path)
    assert trainer() is None


def test_same_seed_same_weights(tmp_path: Path) -> None:
    first, second = module_of(), module_of()
    run(first, tmp_path / "a")
    run(second, tmp_path / "b")
    for name, parameter in first.model.named_parameters():
        assert torch.equal(parameter, second.model.get_parameter(name)), name


@pytest.mark.full
@pytest.mark.parametrize("num_tasks", ["1", "4"])
def test_lightnings_requeueing_of_slurm_jobs_is_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_tasks: str
) -> None:
    """It would load the newest hpc_ckpt_*.ckpt of the working directory, of any other run."""
    (tmp_path / "here/hpc_ckpt_1.ckpt").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    usual, in_job = module_of(), module_of()
    run(usual, tmp_path / "usual")
    monkeypatch.setenv("SLURM_JOB_NAME", "train")
    monkeypatch.setenv("SLURM_NTASKS", num_tasks)
    handler = signal.getsignal(signal.SIGUSR1)
    found = []
    step = BaseModule.training_step

    def watched(module: BaseModule, *arguments: Any) -> Any:
        found.append(signal.getsignal(signal.SIGUSR1))
        return step(module, *arguments)

    monkeypatch.setattr(BaseModule, "training_step", watched)
    run(in_job, tmp_path / "in_job")
    assert {*found} == {handler}
    for name, parameter in usual.model.named_parameters():
        assert torch.equal(parameter, in_job.model.get_parameter(name)), name


@pytest.mark.full
def test_what_layers_drop_out_follows_from_the_seed(tmp_path: Path) -> None:
    """Regardless of the earlier use of torch's generator; stock GPT-2 drops out a tenth."""
    found = []
    for number, (seed, before) in enumerate([(3, 1), (3, 2), (4, 1)]):
        model = oracle.tiny_llama(initializer_range=0.05, attention_dropout=0.2)
        module = BaseModule(model, schedule=SCHEDULE, optimizer=OptimizerSettings())
        torch.manual_seed(before)
        run(module, tmp_path / str(number), settings=replace(SETTINGS, seed=seed))
        found.append(model.get_parameter("lm_head.weight"))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


class Explodes(ForgettingMethod):
    """Makes the gradient of chosen steps not finite."""

    name = "explodes"

    def __init__(self, steps: set[int]) -> None:
        self.steps, self.step = steps, -1

    def add_to_gradients(self, model: nn.Module) -> None:
        self.step += 1
        if self.step in self.steps:
            next(model.parameters()).grad.fill_(float("nan"))  # type: ignore[union-attr]


def test_a_step_that_is_not_finite_moves_nothing(tmp_path: Path) -> None:
    module = module_of(Explodes({0, 1, 2, 3, 4, 5, 6, 7}))
    before = {name: p.detach().clone() for name, p in module.model.named_parameters()}
    result = run(module, tmp_path)
    assert result.refused_steps == 8 and result.stopped_because is None
    for name, parameter in module.model.named_parameters():
        assert torch.equal(parameter, before[name]), name


def test_single_bad_steps_are_counted_and_training_goes_on(tmp_path: Path) -> None:
    module = module_of(Explodes({2, 5}))
    result = run(module, tmp_path)
    assert result.refused_steps == 2
    assert result.steps == 8
    assert all(bool(torch.isfinite(p).all()) for p in module.model.parameters())


def test_too_many_bad_steps_in_a_row_stop_with_a_reason(tmp_path: Path) -> None:
    module = module_of(Explodes(set(range(2, 8))))
    result = run(module, tmp_path, settings=replace(SETTINGS, max_non_finite_steps=2))
    assert result.refused_steps == 3
    assert result.steps < 8
    assert result.stopped_because is not None and "3 steps in a row" in result.stopped_because


class Witness(ForgettingMethod):
    """Keeps what it saw."""

    name = "witness"

    def __init__(self, value: float) -> None:
        self.value, self.seen = value, 0.0

    def observe_gradients(self, model: nn.Module) -> None:
        self.seen = float(next(model.parameters()).grad.sum())  # type: ignore[union-attr]

    def add_to_gradients(self, model: nn.Module) -> None:
        next(model.parameters()).grad.add_(self.value)  # type: ignore[union-attr]

    def extra_loss(self, model: nn.Module, batch: Mapping[str, Tensor], logits: Tensor) -> Tensor:
        return torch.full((), self.value)

    def logged_loss(self, model: nn.Module) -> float | None:
        return None


def test_observers_see_the_gradients_of_the_task_alone(tmp_path: Path) -> None:
    """Regardless of the order of the methods, none sees what another has added."""
    alone = Witness(0.0)
    run(module_of(alone, schedule=replace(SCHEDULE, max_steps=1)), tmp_path / "alone")
    first, second = Witness(5.0), Witness(7.0)
    run(module_of(first, second, schedule=replace(SCHEDULE, max_steps=1)), tmp_path / "both")
    assert first.seen == second.seen == alone.seen


def test_each_method_logs_its_loss(tmp_path: Path) -> None:
    run(module_of(Witness(0.5)), tmp_path)
    rows = list(csv.DictReader((tmp_path / "metrics.csv").open()))
    assert any(row["forgetting/witness/loss"] == "0.5" for row in rows)


def test_the_terms_of_a_step_are_averaged_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """A term may be a number of tokens, or have 16 bits."""
    module, logged = module_of(), dict[str, Tensor]()
    monkeypatch.setattr(module, "log", lambda name, value, **_: logged.update({name: value}))
    for dtype, first, second in ((torch.int64, 2, 3), (torch.bfloat16, 1.0, 1.0078125)):
        for value in (first, second):
            module.log_step_mean(str(dtype), torch.tensor(value, dtype=dtype))
        assert float(logged[str(dtype)]) == (first + second) / 2


def test_a_frozen_parameter_is_not_in_the_optimizer(tmp_path: Path) -> None:
    module = module_of()
    frozen = module.model.get_parameter("model.layers.0.mlp.up_proj.weight")
    frozen.requires_grad_(False)
    before = frozen.detach().clone()
    run(module, tmp_path)
    held = [p for g in module.configure_optimizers()["optimizer"].param_groups for p in g["params"]]
    assert not any(p is frozen for p in held)
    assert len(held) == sum(p.requires_grad for p in module.parameters())
    assert torch.equal(frozen, before)


@pytest.mark.parametrize("shape", ["constant", "cosine", "wsd", "rewarm"])
def test_schedules_warm_up_and_end_where_they_say(shape: str) -> None:
    schedule = Schedule(
        learning_rate=1.0, max_steps=100, warmup_ratio=0.1, shape=shape, minimum_ratio=0.1
    )
    factors = [schedule.factor(step) for step in range(101)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9] == pytest.approx(1.0)
    assert max(factors) <= 1.0
    end = 1.0 if shape == "constant" else 0.1
    assert factors[100] == pytest.approx(end)
    if shape == "wsd":
        assert factors[79] == 1.0 and factors[90] == pytest.approx(0.55)
    if shape in ("cosine", "rewarm"):
        assert factors[55] == pytest.approx(0.55)


def test_a_rate_warms_up_from_the_last_one_and_decays_again() -> None:
    before = Schedule(learning_rate=4.0, max_steps=50, minimum_ratio=0.25, shape="constant")
    assert before.last_rate == 4.0
    assert replace(before, shape="cosine").last_rate == pytest.approx(1.0, abs=0.01)
    again = Schedule(
        learning_rate=2.0, max_steps=100, warmup_ratio=0.1, shape="rewarm", minimum_ratio=0.1,
        start_rate=1.0,
    )  # fmt: skip
    rates = [2 * again.factor(step) for step in range(101)]
    assert rates[:10] == pytest.approx([1 + 0.1 * (step + 1) for step in range(10)])
    assert rates[9] == 2.0 and rates[100] == pytest.approx(0.2)
    assert rates[10:] == pytest.approx(
        [2 * replace(again, shape="cosine").factor(step) for step in range(10, 101)]
    )
    falling = replace(again, start_rate=3.0)
    assert [2 * falling.factor(step) for step in (0, 9)] == pytest.approx([2.9, 2.0])
    assert replace(again, warmup_ratio=0.0).factor(0) == 1.0


@pytest.mark.parametrize(
    ("max_steps", "ratio", "expected"),
    [(200, 0.05, 10), (600, 0.05, 30), (40, 0.05, 5), (20, 0.0, 0), (8, 0.05, 2), (3, 0.05, 0)],
)
def test_a_short_training_warms_up_for_some_steps(
    max_steps: int, ratio: float, expected: int
) -> None:
    schedule = Schedule(learning_rate=1.0, max_steps=max_steps, warmup_ratio=ratio)
    assert schedule.warmup_steps == expected
    rising = [schedule.factor(step) for step in range(expected)]
    assert rising == sorted(rising) and all(factor <= 1 for factor in rising)
