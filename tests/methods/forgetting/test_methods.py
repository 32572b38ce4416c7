"""Each method compared with an independent computation, and all of them in one run."""

from pathlib import Path

import pytest
import torch
from torch import nn

from tests import oracle
from tests.oracle.growth import masks_of
from tests.training.test_fit import SCHEDULE, batches, module_of, run, task
from tritter.core.expansions import LlamaPro, Width, build_steps
from tritter.core.families import Model
from tritter.core.models import read_model
from tritter.methods.forgetting import L2SP, Replay, build_methods
from tritter.targets import Component


def test_options_become_methods_in_the_order_asked_for() -> None:
    chosen = [
        Component(name=L2SP.name, kind=L2SP, options=L2SP.Options(l2sp_lambda=3.0)),
        Component(name=Replay.name, kind=Replay, options=Replay.Options(fraction=0.5)),
    ]
    methods = build_methods(chosen)
    assert [method.name for method in methods] == ["l2sp", "replay"]
    assert isinstance(methods[0], L2SP) and methods[0].strength == 3.0


def test_l2sp_gradient_is_that_of_its_penalty() -> None:
    """The gradient added in place equals autograd on the formula."""
    model = oracle.tiny_llama()
    method = L2SP(l2sp_lambda=0.7)
    own = task(model)
    free = "model.layers.1.mlp.down_proj.weight"
    own.carried[free][:, :10] = False
    method.begin_task(model, own)
    anchor = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    loss = sum(
        0.35 * (own.carried[name] * (p - anchor[name]) ** 2).sum()
        for name, p in model.named_parameters()
    )
    expected = torch.autograd.grad(loss, list(model.parameters()))  # type: ignore[arg-type]
    assert method.logged_loss(model) == pytest.approx(float(loss.detach()), rel=1e-5)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    method.add_to_gradients(model)
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient + 1)
    assert float(model.get_parameter(free).grad[:, :10].max()) == 1.0  # type: ignore[index]


def distance(model: nn.Module, start: dict[str, torch.Tensor]) -> float:
    return sum(float((p.detach() - start[n]).square().sum()) for n, p in model.named_parameters())


def test_l2sp_holds_the_model_near_its_start(tmp_path: Path) -> None:
    moved = {}
    for strength in (0.0, 1.0):
        module = module_of(L2SP(l2sp_lambda=strength))
        start = {name: p.detach().clone() for name, p in module.model.named_parameters()}
        run(module, tmp_path / str(strength))
        moved[strength] = distance(module.model, start)
    assert moved[1.0] < 0.9 * moved[0.0]


def test_what_an_expansion_added_is_free(tmp_path: Path) -> None:
    model = oracle.tiny_llama(tie_word_embeddings=True)
    config = read_model(oracle.saved(model, tmp_path / "source")).config
    steps = build_steps(
        Model(config), [Width(hidden_size=48, intermediate_size=60), LlamaPro()], seed=0
    )
    masks = masks_of(config, steps)
    assert steps[1].parameter_map.layer_sources == (0, 1, 1, 2, 2)
    gate = masks["model.layers.0.mlp.gate_proj.weight"]
    assert gate.shape == (60, 48)
    assert bool(gate[:40, :24].all()) and not bool(gate[40:].any()) and not bool(gate[:, 24:].any())
    for name in ("self_attn.q_proj", "mlp.up_proj", "self_attn.o_proj", "input_layernorm"):
        assert not bool(masks[f"model.layers.2.{name}.weight"].any()), "a new block has no past"
    total = sum(int(mask.sum()) for mask in masks.values())
    assert total == sum(p.numel() for p in model.parameters())


def test_replay_holds_its_share_and_leaves_the_new_order_alone() -> None:
    own = task(oracle.tiny_llama())
    mixed, plain = iter(Replay(fraction=0.3).mix(batches(), own)), iter(batches())
    old_rows = {tuple(row.tolist()) for row in own.old_sequences["old"]}
    new_seen: list[list[int]] = []
    replayed = 0
    for step in range(1, 21):
        batch = next(mixed)
        is_replay = batch["is_replay"]
        replayed += int(is_replay.sum())
        assert replayed == int(step * 4 * 3 / 10)
        assert all(tuple(row.tolist()) in old_rows for row in batch["input_ids"][is_replay])
        new_seen += batch["input_ids"][~is_replay].tolist()
    order = [row for _ in range(20) for row in next(plain)["input_ids"].tolist()]
    assert new_seen == order[: len(new_seen)]


def test_methods_combine_in_one_training(tmp_path: Path) -> None:
    module = module_of(L2SP(l2sp_lambda=0.1), Replay(fraction=0.25))
    result = run(module, tmp_path)
    assert result.steps == SCHEDULE.max_steps
    header = (tmp_path / "metrics.csv").read_text().splitlines()[0]
    assert "forgetting/l2sp/loss" in header


@pytest.mark.full
def test_the_base_method_does_nothing(tmp_path: Path) -> None:
    from tritter.training import ForgettingMethod

    plain, idle = module_of(), module_of(ForgettingMethod())
    run(plain, tmp_path / "plain")
    run(idle, tmp_path / "idle")
    for name, parameter in plain.model.named_parameters():
        assert torch.equal(parameter, idle.model.get_parameter(name))
