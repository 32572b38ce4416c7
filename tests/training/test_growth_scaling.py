"""Updates scaled by growth: steps computed by hand, changes during training, and resumed runs."""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning import Callback
from torch import Tensor, nn

from tests import oracle
from tests.training.killed import KillAt, Killed
from tests.training.test_eight_bit import settings as eight_bit
from tests.training.test_surgery import (
    AT,
    ONE,
    TWO,
    Grow,
    assert_same_end,
    model_of,
    needs_fork,
    train,
)  # fmt: skip
from tritter.core.expansions import Dus, LlamaPro, Moe, Width, target_config
from tritter.core.models import config_of
from tritter.pipeline import disk, stages
from tritter.pipeline.branch import Branch
from tritter.terminal import no_bar
from tritter.training import BaseModule, OptimizerSettings, Schedule
from tritter.training.growth_scaling import GrowthScaling, width_factors
from tritter.transform import Change
from tritter.transform.live import ModelExpander

RATE, W, G = 0.1, torch.tensor([[1.0, -2.0], [3.0, 4.0]]), torch.tensor([[0.5, 1.0], [-1.0, 2.0]])
SECOND_ROW = torch.tensor([[False, False], [True, True]])


def stepped(optimizer: type, scaling: GrowthScaling, *, steps: int, **arguments: Any) -> Tensor:
    """Take steps with a constant gradient through the hooks of the callback."""
    model = nn.Linear(2, 2, bias=False)
    model.weight.data.copy_(W)
    made = optimizer(model.parameters(), lr=RATE, **arguments)
    schedule = Schedule.constant(RATE, max_steps=steps)
    module = BaseModule(model, schedule=schedule, optimizer=OptimizerSettings())
    trainer: Any = SimpleNamespace(optimizers=(made,), global_step=0)
    scaling.on_train_start(trainer, module)
    for step in range(steps):
        model.weight.grad = G.clone()
        trainer.global_step = step
        made.step()
    return model.weight.detach()


def test_new_rows_warm_up_with_their_decay_under_sgd() -> None:
    """w ← w − f·lr·(g + λ·w), with f = 2·(1/4), 2·(2/4) for new rows."""
    scaling = GrowthScaling(new={"weight": SECOND_ROW}, multiplier=2.0, warmup_steps=4)
    expected = W.clone()
    for new in (0.5, 1.0):
        factor = torch.tensor([[1.0], [new]])
        expected = expected - factor * RATE * (G + 0.3 * expected)
    found = stepped(torch.optim.SGD, scaling, steps=2, weight_decay=0.3)
    assert torch.allclose(found, expected, atol=1e-6)


def test_a_matrix_moves_by_its_width_under_adamw() -> None:
    """At constant gradients Adam moves by lr·sign(g); AdamW's decay lr·λ·w is scaled with it."""
    scaling = GrowthScaling(factors={"weight": 0.25})
    expected = W.clone()
    for _ in range(3):
        expected = expected - 0.25 * RATE * (0.3 * expected + G.sign())
    arguments = {"weight_decay": 0.3, "eps": 1e-12}
    found = stepped(torch.optim.AdamW, scaling, steps=3, **arguments)
    assert torch.allclose(found, expected, atol=1e-5)
    # The scale of the gradient alone would change nothing
    plain = stepped(torch.optim.AdamW, GrowthScaling(), steps=3, **arguments)
    assert not torch.allclose(found, plain, atol=0.01)


def factors(source: Mapping[str, Any], *specs: Any) -> dict[str, float]:
    return width_factors(dict(source), target_config(dict(source), specs))


@pytest.mark.parametrize("is_tied", [False, True])
def test_factors_are_ratios_of_fan_in(is_tied: bool) -> None:
    source = config_of(oracle.tiny_llama(tie_word_embeddings=is_tied))
    hidden, ffn = source["hidden_size"], source["intermediate_size"]
    assert isinstance(hidden, int) and isinstance(ffn, int)
    found = factors(source, Width(hidden_size=2 * hidden, intermediate_size=3 * ffn))
    layer = "model.layers.0."
    assert found[f"{layer}mlp.down_proj.weight"] == pytest.approx(1 / 3)
    assert found[f"{layer}mlp.gate_proj.weight"] == 0.5
    assert found[f"{layer}self_attn.k_proj.weight"] == 0.5
    assert found[f"{layer}self_attn.o_proj.weight"] == 0.5
    assert not [name for name in found if "norm" in name]
    assert found.get("lm_head.weight") == (None if is_tied else 0.5)
    assert found.get("model.embed_tokens.weight") == (0.5 if is_tied else None)


def test_factors_of_layers_and_experts_without_a_counterpart() -> None:
    source = config_of(oracle.tiny_llama())
    assert factors(source, Dus(identity_init=True)) == factors(source, LlamaPro()) == {}
    hidden = source["hidden_size"]
    assert isinstance(hidden, int)
    found = factors(source, Width(hidden_size=2 * hidden), Moe(num_experts=2))
    assert {value for name, value in found.items() if "experts" in name} == {0.5}


def change_of(model: nn.Module, *specs: Any) -> Change:
    return ModelExpander(list(specs), seed=0).change(model)


def test_new_entries_are_fills_blocks_and_further_copies() -> None:
    model = model_of()
    gate = "model.layers.0.mlp.gate_proj.weight"
    fresh = change_of(model, Width(intermediate_size=60)).new_entries()
    assert not fresh[gate][:40].any() and fresh[gate][40:].all()
    assert not [name for name in fresh if "mlp" not in name]
    copied = change_of(model, Width(init="net2net")).new_entries()
    sizes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    rows, columns = sizes[gate]
    assert int((~copied[gate]).sum()) == rows * columns
    whole = {n for n, mask in change_of(model, LlamaPro()).new_entries().items() if mask.all()}
    layers = {name.split(".")[2] for name in whole}
    assert whole and len(whole) % len(layers) == 0
    assert change_of(model, LlamaPro()).new_entries().keys() == whole


def test_births_follow_a_later_change() -> None:
    """An entry keeps its step of birth; entries of the change start their own warm-up."""
    model, gate = model_of(), "model.layers.0.mlp.gate_proj.weight"
    shape = tuple(model.get_parameter(gate).shape)
    first = torch.zeros(shape, dtype=torch.bool)
    first[0] = True
    scaling = GrowthScaling(new={gate: first, "other": first}, multiplier=2.0, warmup_steps=8)
    scaling._step = 4
    scaling.parameters_changed(change_of(model, Width(intermediate_size=60)))
    factor = scaling.factor(gate, step=5)
    assert isinstance(factor, Tensor)
    assert factor[:, 0].tolist() == [1.5] + [1.0] * 39 + [0.5] * 20  # 2·6/8, old, 2·2/8
    resumed = GrowthScaling(new={gate: first}, multiplier=2.0, warmup_steps=8)
    resumed.load_state_dict(scaling.state_dict())
    assert torch.equal(resumed.factor(gate, step=5), factor)  # type: ignore[arg-type]
    assert torch.equal(resumed.factor("other", step=5), scaling.factor("other", step=5))  # type: ignore[arg-type]


def scaled(multiplier: float = 2.0, warmup_steps: int = 4) -> GrowthScaling:
    new = {"lm_head.weight": torch.ones(model_of().lm_head.weight.shape, dtype=torch.bool)}
    return GrowthScaling(new=new, multiplier=multiplier, warmup_steps=warmup_steps)


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("name", ["AdamW", "AdamW8bit"])
def test_a_killed_training_ends_with_the_same_bits(tmp_path: Path, name: str) -> None:
    """It stops within the warm-up of the head, and in that of entries that were born on the way."""
    optimizer = OptimizerSettings() if name == "AdamW" else eight_bit(name)
    train(tmp_path / "whole", scaled(), Grow(at=5), settings=ONE, optimizer=optimizer)
    with pytest.raises(Killed):
        train(
            tmp_path / "parts", scaled(), Grow(at=5), KillAt(AT + 1),
            settings=ONE, optimizer=optimizer,
        )  # fmt: skip
    train(tmp_path / "parts", scaled(), Grow(at=5), settings=ONE, optimizer=optimizer)
    assert_same_end(tmp_path / "whole", tmp_path / "parts")


def test_a_factor_of_one_changes_no_bit_and_two_does(tmp_path: Path) -> None:
    train(tmp_path / "plain", Grow())
    train(tmp_path / "one", scaled(1.0, 0), Grow())
    assert_same_end(tmp_path / "plain", tmp_path / "one")
    train(tmp_path / "two", scaled(2.0, 0), Grow())
    with pytest.raises(AssertionError):
        assert_same_end(tmp_path / "plain", tmp_path / "two")


class SameOnAllRanks(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:  # type: ignore[no-untyped-def]
        for parameter in pl_module.model.parameters():
            gathered = pl_module.all_gather(parameter.detach())
            assert torch.equal(gathered[0], gathered[1])


@pytest.mark.full
@needs_fork
def test_two_processes_keep_the_same_weights(tmp_path: Path) -> None:
    train(tmp_path / "plain", Grow(), SameOnAllRanks(), settings=TWO)
    train(tmp_path / "scaled", scaled(), Grow(), SameOnAllRanks(), settings=TWO)
    with pytest.raises(AssertionError):
        assert_same_end(tmp_path / "plain", tmp_path / "scaled")


@pytest.mark.parametrize(
    ("carry", "policy"), [(False, "zero"), (True, "carry"), ("reset_new", "reset_new")]
)
def test_moments_are_mapped_by_the_policy_of_the_run(
    monkeypatch: pytest.MonkeyPatch, carry: object, policy: str
) -> None:
    monkeypatch.setattr(disk, "expand", lambda *_, moments, **__: moments)
    context: Any = SimpleNamespace(
        source=str,
        planned=str,
        progress_bars=lambda: nullcontext(no_bar),
        config=SimpleNamespace(optimizer=SimpleNamespace(carry=carry)),
    )
    assert disk.write_expanded(context, SimpleNamespace(start=""), Path()) == policy  # type: ignore[arg-type, comparison-overlap]


def test_widths_are_those_of_the_model_that_the_run_starts_from(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A later round compares with the run's own base, not with the round before; a control with
    nothing."""
    base = config_of(oracle.tiny_llama())
    hidden = base["hidden_size"]
    assert isinstance(hidden, int)
    once = target_config(base, [Width(hidden_size=2 * hidden)])
    twice = target_config(once, [Width(hidden_size=4 * hidden)])
    monkeypatch.setattr(stages.moe, "start_folder", lambda context, branch: "grown")
    context: Any = SimpleNamespace(
        config=SimpleNamespace(optimizer=SimpleNamespace(growth_scaling="mup")),
        model_config=base,
        source=lambda folder: SimpleNamespace(config=twice),
        say=lambda *_: None,
    )
    later = Branch("round_2", (), follows="round_1", is_round=True)
    (scaling,) = stages._scaling(context, later, max_steps=10)
    assert scaling.factor("model.layers.0.mlp.gate_proj.weight", step=0) == 0.25  # type: ignore[attr-defined]
    assert stages._scaling(context, replace(later, is_control=True), max_steps=10) == ()
