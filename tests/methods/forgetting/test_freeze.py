"""Frozen values stay bit-identical and are not in the optimizer; unfrozen ones are trained."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback
from torch import Tensor, nn

from tests import oracle
from tests.oracle.families import tiny
from tests.training.test_fit import SCHEDULE, SETTINGS, task
from tests.training.test_fit import batches as batches_of
from tritter.core.families import ParameterSelection, training_flops
from tritter.core.models import model_of
from tritter.errors import RequestError
from tritter.methods.forgetting import Freeze
from tritter.methods.forgetting.freeze import FreezeOptions
from tritter.terminal import Console
from tritter.training import BaseModule, FitResult, OptimizerSettings, Task, fit

UP = "model.layers.1.mlp.up_proj.weight"


class Watch(Callback):
    """Records the weights and the optimizer's parameters after every step."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []
        self.held: list[set[str]] = []
        self.state_bytes = 0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:  # type: ignore[no-untyped-def]
        named = dict(pl_module.model.named_parameters())
        (optimizer,) = trainer.optimizers
        slots = {id(p) for group in optimizer.param_groups for p in group["params"]}
        self.weights.append({name: p.detach().clone() for name, p in named.items()})
        self.held.append({name for name, p in named.items() if id(p) in slots})
        self.state_bytes = sum(
            value.nbytes
            for state in optimizer.state.values()
            for name, value in state.items()
            if name != "step"
        )


def trained(
    folder: Path, model: nn.Module, method: Freeze, *, told: Task | None = None
) -> tuple[Watch, dict[str, Tensor], FitResult]:
    """Train with strong weight decay; return the records, and the initial weights."""
    told, watch = told or task(model), Watch()
    method.freeze(model, told, max_steps=SCHEDULE.max_steps)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    module = BaseModule(
        model,
        schedule=SCHEDULE,
        optimizer=OptimizerSettings(weight_decay=0.5),
        methods=(method,),
    )
    result = fit(
        module,
        batches_of(),
        settings=SETTINGS,
        folder=folder,
        label="test",
        console=Console(quiet=True),
        task=told,
        controls=[watch],
    )
    watch.weights.append({name: p.detach().clone() for name, p in model.named_parameters()})
    return watch, before, result


def test_frozen_places_stay_and_hold_no_optimizer_state(tmp_path: Path) -> None:
    model = oracle.tiny_llama(initializer_range=0.05)
    watch, before, result = trained(tmp_path, model, Freeze(layers=["embed", "0-1"]))
    frozen = {n for n in before if "embed" in n or "layers.0." in n or "layers.1." in n}
    for name, value in before.items():
        assert torch.equal(value, watch.weights[-1][name]) == (name in frozen), name
    assert watch.held[0] == before.keys() - frozen
    numbers = sum(p.numel() for name, p in before.items() if name not in frozen)
    assert watch.state_bytes == 2 * 4 * numbers
    flops = training_flops(
        model_of(model), is_trained=lambda t: t.kind != "embed" and t.layer not in (0, 1)
    )
    assert result.flops == SCHEDULE.max_steps * 4 * flops.of(16)


def half_new(model: nn.Module) -> Task:
    told = task(model)
    told.carried[UP][:10] = False
    told.carried["model.norm.weight"][...] = False
    return told


def test_of_what_is_partly_new_the_old_entries_stay_whatever_decays(tmp_path: Path) -> None:
    model = oracle.tiny_llama(initializer_range=0.05)
    told = half_new(model)
    watch, before, _ = trained(tmp_path, model, Freeze(new_only=True), told=told)
    assert watch.held[0] == {UP, "model.norm.weight"}
    for name, value in watch.weights[-1].items():
        old = told.carried[name]
        assert torch.equal(value[old], before[name][old]), name
        assert bool((value != before[name])[~old].all()), name


def test_a_masked_gradient_alone_would_not_hold_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Freeze, "observe_step", lambda self, model, step: 0.0)
    model = oracle.tiny_llama(initializer_range=0.05)
    watch, before, _ = trained(tmp_path, model, Freeze(new_only=True), told=half_new(model))
    assert not torch.equal(watch.weights[-1][UP][10:], before[UP][10:])


def test_old_experts_stay_and_new_ones_and_routers_move(tmp_path: Path) -> None:
    model = tiny("mixtral", vocab_size=97)
    told = task(model)
    experts = [name for name in told.carried if ".experts." in name]
    for name in experts:
        told.carried[name][2:] = False
    watch, before, _ = trained(tmp_path, model, Freeze(old_experts=True), told=told)
    for name, value in watch.weights[-1].items():
        if name in experts:
            assert torch.equal(value[:2], before[name][:2]), name
            assert not torch.equal(value[2:], before[name][2:]), name
        else:
            assert not torch.equal(value, before[name]), name


def test_what_thaws_together_is_trained_from_that_step_on(tmp_path: Path) -> None:
    model = oracle.tiny_llama(initializer_range=0.05)
    watch, before, result = trained(tmp_path, model, Freeze(layers="0-1", until=0.5))
    frozen = {name for name in before if "layers.0." in name or "layers.1." in name}
    # The recorder runs before unfreezing: at step 4 it still sees frozen weights
    assert [len(held) for held in watch.held] == [len(before) - len(frozen)] * 4 + [len(before)] * 4
    for name in frozen:
        values = [weights[name] for weights in watch.weights]
        assert torch.equal(values[3], before[name]) and not torch.equal(values[4], values[3])
    everything = training_flops(model_of(model))
    some = training_flops(model_of(model), is_trained=lambda t: t.layer not in (0, 1))
    assert result.flops == pytest.approx(4 * 4 * (some.of(16) + everything.of(16)))


@pytest.mark.full
def test_partly_frozen_values_thaw_too(tmp_path: Path) -> None:
    seen: dict[int, Tensor] = {}

    class Seen(Freeze):
        def observe_step(self, model: nn.Module, step: int) -> float:
            flops = super().observe_step(model, step)
            seen[step] = model.get_parameter(UP).detach()[10:].clone()
            return flops

    model = oracle.tiny_llama(initializer_range=0.05)
    _, before, _ = trained(tmp_path, model, Seen(new_only=True, until=4), told=half_new(model))
    is_held = {step: torch.equal(values, before[UP][10:]) for step, values in seen.items()}
    assert is_held == {step: step <= 4 for step in range(9)}


def test_from_the_top_down_layer_after_layer(tmp_path: Path) -> None:
    model = oracle.tiny_llama(initializer_range=0.05)
    method = Freeze(layers="embed,0-2,norm", until=6, thaw="top_down")
    watch, before, _ = trained(tmp_path, model, method)
    thawed = {name: next(n for n, held in enumerate(watch.held) if name in held) for name in before}
    assert {step for name, step in thawed.items() if "lm_head" in name} == {0}
    assert {step for name, step in thawed.items() if name == "model.norm.weight"} == {2}
    for layer, step in ((2, 3), (1, 4), (0, 5)):
        assert {s for name, s in thawed.items() if f"layers.{layer}." in name} == {step}
    assert thawed["model.embed_tokens.weight"] == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": "0-"}, "must be layer numbers"),
        ({"layers": ("embd",)}, "Did you mean 'embed'"),
        ({"new_only": True, "thaw": "top_down"}, "has no effect with"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        FreezeOptions(**options)


def test_where_nothing_is_named_it_is_attention() -> None:
    assert FreezeOptions().selection == ParameterSelection.read(["attention"])
    assert FreezeOptions(new_only=True).selection is None
    assert FreezeOptions(new_only=True, layers=1).selection == ParameterSelection.read([1])


def test_a_share_of_the_steps_is_a_step() -> None:
    def first(until: float, steps: int) -> int | None:
        return FreezeOptions(layers="embed", until=until).first_step(steps)

    assert (first(0.5, 200), first(0.001, 10), first(30, 200)) == (100, 1, 30)


def test_it_takes_nothing_that_is_frozen_already(tmp_path: Path) -> None:
    model = oracle.tiny_llama()
    model.get_parameter(UP).requires_grad_(False)
    method = Freeze(layers="1", until=2)
    method.freeze(model, task(model), max_steps=8)
    assert UP not in method.thawed(2) and len(list(method.thawed(2))) == 8
    assert method.thawed(1) == []


def test_a_change_of_what_is_frozen_is_refused(tmp_path: Path) -> None:
    from tritter.core.expansions import Width
    from tritter.transform import plan_expansion

    model = oracle.tiny_llama()
    plan = plan_expansion(oracle.saved(model, tmp_path), [Width(intermediate_size=60)])
    method = Freeze(layers="attention")
    method.freeze(model, task(model), max_steps=8)
    method.parameters_changed(plan.change)
    method = Freeze(layers="0")
    method.freeze(model, replace(task(model)), max_steps=8)
    with pytest.raises(RequestError, match="is frozen and can't change"):
        method.parameters_changed(plan.change)
