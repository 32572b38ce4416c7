"""What no gradient reaches is named, and bytes are those that torch holds."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from tests import oracle
from tests.core.stock_routers.models import tiny_moe
from tests.training.shipped import trainer_settings
from tritter.core.expansions import LlamaPro, Width
from tritter.core.families import Model
from tritter.core.models import model_of
from tritter.data.batches import BatchStream, SequenceStream
from tritter.evaluation.gate import Check
from tritter.planning.memory import TrainingSetup, states_bytes, training_memory
from tritter.stopping import Stopped
from tritter.terminal import Console
from tritter.training import BaseModule, FitResult, OptimizerSettings, Schedule, Task, fit
from tritter.training.gradient_flow import GradientFlow, run_trial_steps
from tritter.transform.live import ModelExpander

SETTINGS = trainer_settings(save_every_n_steps=2)
STEPS = 6


def train(
    model: nn.Module, folder: Path, *, task: Task | None = None, steps: int = STEPS, **more: Any
) -> FitResult:
    module = BaseModule(
        model,
        schedule=Schedule(learning_rate=1e-3, max_steps=steps),
        optimizer=OptimizerSettings(**more),
    )
    sequences = oracle.tokens(batch=24, length=16, seed=5).int()
    return fit(
        module,
        BatchStream(SequenceStream(sequences, seed=0), batch_size=4, num_batches=steps),
        settings=SETTINGS,
        folder=folder,
        label="test",
        console=Console(quiet=True),
        task=task,
    )


def grown(spec: Any) -> tuple[nn.Module, Task]:
    model = oracle.tiny_llama(initializer_range=0.05)
    change = ModelExpander([spec], seed=0).change(model)
    task = Task(seed=0, new_units=change.new_units())
    return ModelExpander([spec], seed=0).expand(model), task


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("spec", [Width(hidden_size=48), LlamaPro()], ids=["width", "llama_pro"])
def test_what_is_new_is_reached_in_the_steps_that_a_verdict_takes(
    tmp_path: Path, spec: Any
) -> None:
    """Also behind zeros; before that nothing is reported."""
    model, task = grown(spec)
    flow = train(model, tmp_path / "long", task=task, steps=Check.ENOUGH_STEPS).flow
    assert flow == {"steps": Check.ENOUGH_STEPS, "without_gradient": [], "without_tokens": []}
    model, task = grown(spec)
    short = train(model, tmp_path / "short", task=task, steps=2).flow
    check = Check.of_gradient_flow(short)
    assert check is not None and check.verdict == "reported" and not short["without_gradient"]


def test_a_dead_unit_and_a_dead_parameter_are_named(tmp_path: Path) -> None:
    """Gate and up both zero have no gradient, by the product rule; behind a zeroed norm nothing."""
    model, task = grown(Width(intermediate_size=60))
    ffn = model.get_submodule("model.layers.1.mlp")
    norm = model.get_parameter("model.layers.2.post_attention_layernorm.weight")
    with torch.no_grad():
        for name in ("gate_proj", "up_proj"):
            ffn.get_parameter(f"{name}.weight")[[44, 57]] = 0
        norm.zero_()
    flow = train(model, tmp_path, task=task, weight_decay=0.5).flow
    dead = [line for line in flow["without_gradient"] if line.startswith("model.layers.1.mlp")]
    place = "model.layers.1.mlp.{}_proj.weight (2 new of 60 along dimension {})"
    assert dead == [place.format("gate", 0), place.format("up", 0), place.format("down", 1)]
    layer_2 = [line for line in flow["without_gradient"] if ".layers.2." in line]
    assert any("gate_proj" in line for line in layer_2)
    assert not any(".layers.0." in line for line in flow["without_gradient"])
    check = Check.of_gradient_flow(flow)
    assert check is not None and check.verdict == "failed" and "gate_proj" in check.detail


@pytest.mark.full
def test_what_is_frozen_is_not_asked_for(tmp_path: Path) -> None:
    model = oracle.tiny_llama()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.0" not in name)
    flow, held = (getattr(train(model, tmp_path), name) for name in ("flow", "memory"))
    assert flow["without_gradient"] == []
    trained = [p for p in model.parameters() if p.requires_grad]
    assert held["gradients"] == sum(p.numel() * 4 for p in trained)
    assert sum(size * count for size, count in held["trained"]) == held["gradients"] // 4
    assert held["parameters"] == sum(p.numel() * 4 for p in model.parameters())


@pytest.fixture
def watch() -> Iterator[Any]:
    """Return a function that lets a watcher look at steps in which some experts get tokens."""

    def look(
        flow: GradientFlow, module: Any, gradients: dict[str, torch.Tensor], step: int
    ) -> None:
        for name, parameter in module.model.named_parameters():
            parameter.grad = gradients.get(name, torch.ones_like(parameter))
        trainer = SimpleNamespace(global_step=step, log_every_n_steps=10, optimizers=[])
        flow.on_before_optimizer_step(trainer, module, None)  # type: ignore[arg-type]

    yield look


def test_experts_without_tokens_are_named_by_layer_and_number(watch: Any) -> None:
    model = tiny_moe("mixtral")
    module = BaseModule(
        model, schedule=Schedule(learning_rate=1e-3, max_steps=9), optimizer=OptimizerSettings()
    )
    (name, fused), *_ = ((n, p) for n, p in model.named_parameters() if "experts" in n)
    flow = GradientFlow({})
    for step in range(Check.ENOUGH_STEPS):
        gradient = torch.zeros_like(fused)
        gradient[0 if step else 2] = 1
        watch(flow, module, {name: gradient}, step)
    assert flow.report(model)["without_gradient"] == []
    idle = flow.report(model)["without_tokens"]
    assert idle == ["layers.0.experts.1", "layers.0.experts.3"]
    restored = GradientFlow({})
    restored.load_state_dict(flow.state_dict())
    assert restored.report(model) == flow.report(model)
    verdicts = [
        Check.of_gradient_flow(flow.report(model), new_experts=new) for new in ((), (3,), (2, 3))
    ]
    assert [check and check.verdict for check in verdicts] == ["passed", "failed", "passed"]


@pytest.mark.full
def test_going_on_finds_what_a_whole_training_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dead() -> tuple[nn.Module, Task]:
        model, task = grown(Width(intermediate_size=60))
        with torch.no_grad():
            for name in ("gate_proj", "up_proj"):
                model.get_parameter(f"model.layers.0.mlp.{name}.weight")[41] = 0
        return model, task

    model, task = dead()
    whole = train(model, tmp_path / "whole", task=task)
    step = BaseModule.training_step

    def dies(self: BaseModule, batch: Any, index: int) -> Any:
        if self.global_step == STEPS - 1:
            raise Stopped(15)
        return step(self, batch, index)

    monkeypatch.setattr(BaseModule, "training_step", dies)
    model, task = dead()
    with pytest.raises(Stopped):
        train(model, tmp_path / "parts", task=task)
    monkeypatch.undo()
    model, task = dead()
    parts = train(model, tmp_path / "parts", task=task)
    assert parts.flow == whole.flow and len(whole.flow["without_gradient"]) == 3
    assert parts.memory == whole.memory


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(
    ("target", "kept"),
    [
        ("torch.optim.AdamW", 2),
        ("torch.optim.SGD", 0),
        ("bitsandbytes.optim.Lion8bit", 1),
        ("bitsandbytes.optim.AdEMAMix8bit", 3),
    ],
)
def test_bytes_are_those_of_the_plan(tmp_path: Path, target: str, kept: int) -> None:
    model = oracle.tiny_llama()
    arguments: dict[str, Any] = {} if kept else {"momentum": 0.0}
    held = train(model, tmp_path, target=target, arguments=arguments).memory
    config = model_of(model).config
    optimizer = "adamw8bit" if "8bit" in target else "adamw"
    setup = TrainingSetup(precision="32-true", optimizer=optimizer)
    expected = states_bytes(Model(config), setup, trained=held["trained"], kept_per_parameter=kept)
    if kept == 2:
        assert expected == training_memory(Model(config), setup).states_bytes
    assert Check.of_memory(held, expected=expected).value == 0
    doubled = {**held, "parameters": 2 * held["parameters"], "peak": 10**9}
    check = Check.of_memory(doubled, expected=expected)
    assert check.verdict == "failed" and check.value is not None and check.value > 0.19
    assert "1,000,000,000" in check.detail


def test_a_trial_drops_out_the_same_at_each_call_and_leaves_the_generator() -> None:
    ends = []
    for number in range(2):
        model = oracle.tiny_llama(attention_dropout=0.5)
        torch.manual_seed(number)
        before = torch.get_rng_state()
        new = {"model.norm.weight": (None,)}
        run_trial_steps(model, oracle.tokens(batch=2, length=8, seed=5), new, steps=2)
        assert torch.equal(torch.get_rng_state(), before)
        ends.append(model.get_parameter("model.norm.weight").detach().clone())
    assert torch.equal(*ends)
