"""Growth during training: resume, two processes, optimizer state, young neurons."""

import multiprocessing
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback
from torch import Tensor, nn

from tests import oracle
from tests.methods.growth.factories import grower, growth_options, scheduled
from tests.training.killed import KillAt, Killed
from tests.training.test_fit import SETTINGS
from tests.training.test_surgery import assert_same
from tritter.data.batches import BatchStream, SequenceStream
from tritter.methods.growth.callback import GradientPressure, NeuronGrowthCallback
from tritter.methods.growth.triggers import GrowthOptions
from tritter.terminal import Console
from tritter.training import (
    BaseModule,
    FitResult,
    ForgettingMethod,
    OptimizerSettings,
    Schedule,
    Task,
    TrainerSettings,
    fit,
)
from tritter.training.checkpoint_io import SafetensorsCheckpointIO
from tritter.training.fitting import start_method

STEPS = 14
ONE = replace(SETTINGS, save_every_n_steps=3)
TWO = replace(ONE, devices=2, strategy="ddp")
needs_fork = pytest.mark.skipif(
    start_method("cpu") != "fork", reason="the tests' callbacks come by fork"
)


def often(**changes: Any) -> GrowthOptions:
    """Return options for which a short run grows several times, in different layers."""
    return growth_options(
        **{
            "gradient_percentile": 60.0, "check_every": 1, "growth_cooldown": 3, "warmup_steps": 1,
            "max_growth_per_step": 3, "maturation_age": 5,
        } | changes
    )  # fmt: skip


def train(
    folder: Path,
    options: GrowthOptions | None = None,
    *watching: Callback,
    model: nn.Module | None = None,
    settings: TrainerSettings = ONE,
    steps: int = STEPS,
    methods: Sequence[ForgettingMethod] = (),
    optimizer: OptimizerSettings | None = None,
    rate: float = 1e-2,
) -> tuple[BaseModule, FitResult]:
    """Train a model with dropout, so that the random state matters; resume if possible."""
    torch.manual_seed(999 if (folder / "saved").exists() else 11)
    module = BaseModule(
        model or oracle.tiny_llama(initializer_range=0.05, attention_dropout=0.2),
        schedule=Schedule(learning_rate=rate, max_steps=steps),
        optimizer=optimizer or OptimizerSettings(),
        methods=methods,
    )
    old = oracle.tokens(batch=20, length=16, seed=6).int()
    carried = {n: torch.ones_like(p, dtype=torch.bool) for n, p in module.model.named_parameters()}
    engine = grower(options or often(), max_steps=steps)
    result = fit(
        module,
        batches(steps * settings.accumulate_grad_batches),
        settings=settings,
        folder=folder,
        label="test",
        console=Console(quiet=True),
        task=Task(carried=carried, old_sequences={"old": old}, seed=0) if methods else None,
        observers=[GradientPressure(engine)],
        controls=watching,
        surgery_callbacks=[NeuronGrowthCallback(engine)],
    )
    return module, result


def batches(count: int) -> BatchStream:
    """Return batches of few sequences, so that an epoch ends within the run."""
    sequences = oracle.tokens(batch=40, length=16, seed=5).int()
    return BatchStream(SequenceStream(sequences, seed=0), batch_size=4, num_batches=count)


def saved(folder: Path) -> dict[str, Any]:
    return SafetensorsCheckpointIO().load_checkpoint(folder / "saved")


def assert_same_end(first: Path, second: Path) -> None:
    kept = ("state_dict", "optimizer_states", "lr_schedulers", "global_step")
    ends = []
    for folder in (first, second):
        end = saved(folder)
        growth = end["callbacks"]["NeuronGrowthCallback"]
        ends.append({k: end[k] for k in kept} | {"growth": growth})
    assert_same(*ends, "")


ACCUMULATED = replace(ONE, gradient_clip_val=0.05, arguments={"accumulate_grad_batches": 2})
KINDS = {
    "one": (ONE, {}),
    "replaced": (ONE, {"enable_replacement": True, "dead_quantile": 0.3}),
    "split": (ONE, {"initialiser": "split"}),
    "readme": (ONE, {"initialiser": "source_noise", "trigger": "within_layer"}),
    "accumulated": (ACCUMULATED, {}),
}  # fmt: skip


@pytest.mark.full
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "killed_at", [8, *(pytest.param(step, marks=pytest.mark.slow) for step in (4, 13))]
)
def test_resumed_after_events_it_ends_alike(tmp_path: Path, kind: str, killed_at: int) -> None:
    settings, changes = KINDS[kind]
    options = often(**changes)
    whole, expected = train(tmp_path / "whole", options, settings=settings, steps=15)
    with pytest.raises(Killed):
        train(tmp_path / "parts", options, KillAt(killed_at), settings=settings, steps=15)
    parts, result = train(tmp_path / "parts", options, settings=settings, steps=15)
    assert_same_end(tmp_path / "whole", tmp_path / "parts")
    assert replace(result, seconds=0.0) == replace(expected, seconds=0.0)
    growth = expected.reports["growth"]
    assert len({event["step"] for event in growth["events"]}) >= 3
    assert growth["born"] or growth["replaced"]
    assert growth["neurons"]["after"] != growth["neurons"]["before"] or growth["replaced"]
    assert_same(dict(whole.model.state_dict()), dict(parts.model.state_dict()), "")


@pytest.mark.full
@needs_fork
def test_two_processes_agree_and_resume(tmp_path: Path) -> None:
    _, expected = train(tmp_path / "whole", settings=TWO)
    with pytest.raises(Exception, match="Killed"):
        train(tmp_path / "parts", None, KillAt(8), settings=TWO)
    train(tmp_path / "parts", settings=TWO)
    assert_same_end(tmp_path / "whole", tmp_path / "parts")
    assert len(expected.reports["growth"]["events"]) >= 3


@pytest.mark.full
@needs_fork
def test_two_processes_resume_between_batches_of_a_step(tmp_path: Path) -> None:
    settings = replace(ACCUMULATED, devices=2, strategy="ddp")
    options = often(enable_replacement=True, dead_quantile=0.3)
    _, expected = train(tmp_path / "whole", options, settings=settings)
    with pytest.raises(Exception, match="Killed"):
        train(tmp_path / "parts", options, KillAt(8), settings=settings)
    train(tmp_path / "parts", options, settings=settings)
    assert_same_end(tmp_path / "whole", tmp_path / "parts")
    assert expected.reports["growth"]["replaced"]


class NotFinite(Callback):
    """Make the loss of one step infinite by a weight that is restored afterwards."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:  # type: ignore[no-untyped-def]
        if trainer.global_step == self.at:
            norm = pl_module.model.model.norm.weight
            self.kept = norm.detach().clone()
            norm.data.fill_(float("nan"))

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:  # type: ignore[no-untyped-def]
        if trainer.global_step == self.at:
            pl_module.model.model.norm.weight.data.copy_(self.kept)


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("trigger", ["schedule", "scaling_law"])
def test_a_refused_step_at_an_event_grows_nothing(tmp_path: Path, trigger: str) -> None:
    options = often(trigger=scheduled(7, 9) if trigger == "schedule" else trigger)
    _, result = train(tmp_path, options, NotFinite(6))
    assert result.refused_steps == 1
    steps = {event["step"] for event in result.reports["growth"]["events"]}
    assert steps == ({9} if trigger == "schedule" else set())


class Digests(Callback):
    """Save the weights and moments of each rank."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer, pl_module) -> None:  # type: ignore[no-untyped-def]
        (optimizer,) = trainer.optimizers
        held = dict(pl_module.model.state_dict())
        states = [optimizer.state[p] for group in optimizer.param_groups for p in group["params"]]
        torch.save([held, states], self.folder / f"rank{trainer.global_rank}.pt")


@pytest.mark.full
@needs_fork
def test_ranks_hold_the_same_bits(tmp_path: Path) -> None:
    train(tmp_path / "run", None, Digests(tmp_path), settings=TWO)
    first, second = (torch.load(tmp_path / f"rank{n}.pt") for n in (0, 1))
    assert_same(first, second, "")
    assert first[0]["model.layers.0.mlp.up_proj.weight"].shape[0] > 40


@pytest.mark.full
@needs_fork
def test_killed_by_a_signal_on_one_of_two_ranks(tmp_path: Path) -> None:
    train(tmp_path / "whole", settings=TWO)
    with pytest.raises(Exception, match="SIGKILL"):
        train(tmp_path / "parts", None, KillAt(7, signal_to_rank=1), settings=TWO)
    train(tmp_path / "parts", settings=TWO)
    assert_same_end(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.full
def test_killed_by_a_signal(tmp_path: Path) -> None:
    train(tmp_path / "whole")
    process = multiprocessing.get_context("fork").Process(
        target=train, args=(tmp_path / "parts", None, KillAt(10, signal_to_rank=0))
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    train(tmp_path / "parts")
    assert_same_end(tmp_path / "whole", tmp_path / "parts")


class Rows(Callback):
    """Record moments around the event, and the update of each row of up in each later step."""

    def __init__(self, at: int) -> None:
        self.at = at
        self.before: dict[str, dict[str, Tensor]] = {}
        self.after: dict[str, dict[str, Tensor]] = {}
        self.moves: list[Tensor] = []
        self._weights: Tensor | None = None

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:  # type: ignore[no-untyped-def]
        if trainer.global_step == self.at:  # runs before the callback that changes the model
            self.before = self._moments(trainer, pl_module)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:  # type: ignore[no-untyped-def]
        up = pl_module.model.get_parameter("model.layers.1.mlp.up_proj.weight").detach()
        if trainer.global_step == self.at:
            self.after = self._moments(trainer, pl_module)
        elif self._weights is not None and trainer.global_step > self.at:
            self.moves.append((up - self._weights).abs().amax(dim=1))
        self._weights = up.clone() if trainer.global_step >= self.at else None

    def _moments(self, trainer: Any, module: Any) -> dict[str, dict[str, Tensor]]:
        (optimizer,) = trainer.optimizers
        names = (f"model.layers.1.mlp.{n}_proj.weight" for n in ("gate", "up", "down"))
        return {
            name: {
                k: v.clone() for k, v in optimizer.state[module.model.get_parameter(name)].items()
            }
            for name in names
        }


@pytest.mark.full
@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_optimizer_rows_neither_change_nor_spike(tmp_path: Path, factor: float) -> None:
    at, rows = 20, Rows(20)
    options = often(
        trigger=scheduled(at), growth_cooldown=1, maturation_factor=factor,
        maturation_age=200,
    )  # fmt: skip
    train(tmp_path, options, rows, steps=45, rate=1e-3)
    for name, before in rows.before.items():
        after, index = rows.after[name], tuple(map(slice, before["exp_avg"].shape))
        for kind in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(after[kind][index], before[kind])
        assert torch.equal(before["step"], after["step"])
        rest = torch.ones_like(after["exp_avg"], dtype=torch.bool)
        rest[index] = False
        assert not after["exp_avg"][rest].any()
        assert torch.allclose(after["exp_avg_sq"][rest], before["exp_avg_sq"].mean(), rtol=1e-5)
    moves = torch.stack(rows.moves[:20])
    old, new = moves[:, :-3].max(), moves[:, -3:].max()
    assert 0 < float(new) / factor <= 1.5 * float(old)


@pytest.mark.full
def test_updates_of_young_neurons_are_scaled_and_of_no_others(tmp_path: Path) -> None:
    """Compared with the same run without the factor, up to the first step after the event."""
    ends = []
    for factor in (1.0, 2.0):
        options = often(
            trigger=scheduled(6), maturation_factor=factor, maturation_age=99,
            initialiser="random",
        )  # fmt: skip
        folder = tmp_path / str(factor)
        settings = replace(ONE, save_every_n_steps=1)
        with pytest.raises(Killed):
            train(folder, options, KillAt(6), settings=settings)
        start = saved(folder)["state_dict"]
        with pytest.raises(Killed):
            train(folder, options, KillAt(7), settings=settings)
        ends.append((start, saved(folder)["state_dict"]))
    (start, slow), (other, fast) = ends
    assert_same(start, other, "")
    for name in start:
        if not isinstance(start[name], Tensor):
            continue
        moved, further = slow[name] - start[name], fast[name] - start[name]
        young = torch.zeros_like(moved, dtype=torch.bool)
        if "gate_proj" in name or "up_proj" in name:
            young[40:] = True
        if "down_proj" in name:
            young[:, 40:] = True
        assert torch.equal(moved[~young], further[~young])
        if young.any():
            assert torch.allclose(2 * moved[young], further[young], atol=1e-6)
            assert "gate_proj" in name or moved[young].any() or "up_proj" in name


@pytest.mark.full
def test_the_same_bits_whoever_draws_besides(tmp_path: Path) -> None:
    """Growth uses its own random generator and does not affect others."""
    none = often(trigger=scheduled(5), max_new_parameters=1)
    some = often(trigger=scheduled(STEPS - 2))
    states = []
    for name, options in (("none", none), ("some", some)):
        train(tmp_path / name, options, settings=replace(ONE, save_every_n_steps=STEPS))
        end = saved(tmp_path / name)["callbacks"]
        assert bool(end["NeuronGrowthCallback"]["events"]) == (name == "some")
        states.append(end["RandomState"])
    assert_same(*states, "")
