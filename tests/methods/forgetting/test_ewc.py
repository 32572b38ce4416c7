"""EWC: its penalty computed independently, and its mapping through an expansion."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests import oracle
from tests.training.test_fit import module_of, task
from tritter.core.expansions import Dus, LlamaPro, Width
from tritter.core.families import Model
from tritter.core.parameter_map.carry import STATE_KINDS
from tritter.errors import TritterError
from tritter.methods.forgetting import EWC
from tritter.methods.forgetting.ewc import ElasticWeightConsolidation
from tritter.methods.forgetting.quadratic import diagonal_fisher
from tritter.training import Task
from tritter.transform import PlannedExpansion, expand, plan_expansion
from tritter.transform.live import ModelExpander


def task_with(model: nn.Module, fisher: dict[str, Tensor]) -> Task:
    plain = task(model)
    return Task(
        carried=plain.carried,
        old_sequences=plain.old_sequences,
        seed=0,
        state={"fisher": fisher},
        state_before={"fisher": fisher},
    )


@pytest.mark.parametrize("normalise", ["none", "mean"])
def test_gradient_is_that_of_half_lambda_fisher_times_square(normalise: str) -> None:
    model = oracle.tiny_llama()
    fisher = diagonal_fisher(model, oracle.tokens(batch=4))
    method = EWC(ewc_lambda=50.0, normalise=normalise)
    method.begin_task(model, task_with(model, fisher))
    anchor = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    mean = torch.cat([value.flatten() for value in fisher.values()]).mean()
    scale = 1.0 if normalise == "none" else float(mean)
    loss = sum(
        25.0 * (fisher[n] / scale * (p - anchor[n]) ** 2).sum() for n, p in model.named_parameters()
    )
    expected = torch.autograd.grad(loss, list(model.parameters()))  # type: ignore[arg-type]
    assert method.logged_loss(model) == pytest.approx(float(loss.detach()), rel=1e-4)  # type: ignore[union-attr]
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    method.add_to_gradients(model)
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-7)


def test_without_old_data_the_fisher_is_never_refreshed() -> None:
    model = oracle.tiny_llama()
    fisher = {name: torch.ones_like(value) for name, value in model.named_parameters()}
    given = replace(task_with(model, fisher), old_sequences={})
    method = EWC(ewc_lambda=50.0, refresh_steps=1)
    method.begin_task(model, given)
    assert method.observe_step(model, 0) == method.observe_step(model, 1) == 0
    torch.testing.assert_close(dict(method.importance), fisher)


def test_a_fisher_of_zeros_cannot_be_normalised() -> None:
    model = oracle.tiny_llama()
    zeros = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    with pytest.raises(TritterError, match="zero everywhere"):
        EWC(ewc_lambda=1.0, normalise="mean").begin_task(model, task_with(model, zeros))


def carried_fisher(
    plan: PlannedExpansion, fisher: dict[str, Tensor], kind: str = "fisher"
) -> dict[str, Tensor]:
    """Return logical name → the Fisher mapped through the plan; new parameters are absent."""
    values = {t.name: fisher[t.disk_name] for t in Model(plan.source.config).tensors}
    for step in plan.steps:
        maps = step.parameter_map.tensors
        values = {
            n: STATE_KINDS[kind].mapped(m, values.__getitem__) for n, m in maps.items()
            if m.source in values and m.state == "carry"
        }  # fmt: skip
    return values


def pulls(model: nn.Module, task: Task) -> dict[str, Tensor]:
    """Return the gradients that EWC adds after every weight has moved by the same distance."""
    method = EWC(ewc_lambda=3.0, normalise="mean")
    method.begin_task(model, task)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
            parameter.grad = torch.zeros_like(parameter)
    method.add_to_gradients(model)
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def test_what_an_expansion_adds_does_not_dilute_the_mean(tmp_path: Path) -> None:
    """The same λ has the same pull on a weight before and after the expansion."""
    model = oracle.tiny_llama()
    source = oracle.saved(model, tmp_path / "source")
    specs = [Width(init="fresh", intermediate_size=150)]
    wide = oracle.stock(expand(source, tmp_path / "wide", specs).folder)
    fisher = diagonal_fisher(model, oracle.tokens(batch=4))
    plan = plan_expansion(source, specs)
    values = carried_fisher(plan, fisher)
    named = {t.disk_name: values[t.name] for t in Model(plan.target.config).tensors}
    before = pulls(model, task_with(model, fisher))
    carried = plan.change.masks()
    told = replace(task_with(wide, named), state_before={"fisher": fisher})
    compared = 0
    for name, pull in pulls(wide, told).items():
        kept = pull[carried[name]].view_as(before[name])
        torch.testing.assert_close(kept, before[name], rtol=1e-4, atol=1e-8)
        assert not bool(pull[~carried[name]].any())
        compared += kept.numel()
    assert compared == sum(p.numel() for p in model.parameters())


def doubled_ffn(folder: Path, shares: str) -> tuple[nn.Module, nn.Module, list[Tensor], Tensor]:
    """Return model, widened model, the two Fishers of a down projection, and the copies."""
    model = oracle.tiny_llama()
    source = oracle.saved(model, folder / "source")
    specs = [Width(init="net2net", intermediate_size=80, shares=shares)]
    result = expand(source, folder / "result", specs)
    name = "layers.1.ffn.down"
    tensor_map = plan_expansion(source, specs).steps[0].parameter_map.tensors[name]
    axis = tensor_map.axes[1]
    assert axis is not None
    fisher = diagonal_fisher(model, oracle.tokens(batch=4))["model.layers.1.mlp.down_proj.weight"]
    mapped = [
        STATE_KINDS[kind].mapped(tensor_map, lambda _: fisher)
        for kind in ("fisher", "fisher_penalty")
    ]
    return model, oracle.stock(result.folder), [fisher, *mapped], axis.index


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("shares", ["equal", "unequal"])
def test_the_same_move_of_the_function_costs_the_same_or_less(tmp_path: Path, shares: str) -> None:
    """Moving a neuron's output by the same factor, in the old model and in all its copies.

    `penalty_preserving` prices it the same; the mapped diagonal has lost what stands between
    copies: half of it at equal shares, 0.18 at .9/.1.
    """
    model, wide, (fisher, diagonal, preserving), index = doubled_ffn(tmp_path, shares)
    name = "model.layers.1.mlp.down_proj.weight"
    old, new = model.get_parameter(name).detach(), wide.get_parameter(name).detach()
    step = 0.1 * torch.randn(24, 40)
    price = float((fisher * (old * step) ** 2).sum())
    wide_step = new * step[:, index]
    assert float((preserving * wide_step**2).sum()) == pytest.approx(price, rel=1e-4)
    left = {"equal": 0.5, "unequal": 0.9**2 + 0.1**2}[shares]
    assert float((diagonal * wide_step**2).sum()) == pytest.approx(left * price, rel=1e-4)


def test_the_mapped_fisher_is_that_of_the_expanded_model(tmp_path: Path) -> None:
    """For an exact width expansion, the grown model's own Fisher is the mapped one."""
    model = oracle.tiny_llama(tie_word_embeddings=True)
    source = oracle.saved(model, tmp_path / "source")
    specs = [Width(init="net2net"), LlamaPro()]
    result = expand(source, tmp_path / "result", specs)
    sequences = oracle.tokens(batch=6)
    fisher = diagonal_fisher(model, sequences)
    own = diagonal_fisher(oracle.stock(result.folder), sequences)
    plan = plan_expansion(source, specs)
    values = carried_fisher(plan, fisher)
    compared = 0
    for tensor in Model(plan.target.config).tensors:
        if tensor.name in values:
            theirs = own[tensor.disk_name]
            assert float((values[tensor.name] - theirs).norm() / theirs.norm()) < 1e-3, tensor.name
            compared += theirs.numel()
    assert compared > 40_000


def test_new_parameters_are_free_and_copies_are_held(tmp_path: Path) -> None:
    source = oracle.saved(oracle.tiny_llama(), tmp_path / "source")
    (step,) = plan_expansion(source, [Width(hidden_size=36, intermediate_size=50)]).steps
    rule, ones = STATE_KINDS["fisher"], torch.ones(40, 24)
    gate = step.parameter_map.tensors["layers.0.ffn.gate"]
    fisher = rule.mapped(gate, lambda _: ones)
    assert bool((fisher[:40, :24] > 0).all())
    assert not bool(fisher[40:].any()) and not bool(fisher[:, 24:].any())
    (step,) = plan_expansion(source, [Dus()]).steps
    tensors = step.parameter_map.tensors
    assert step.parameter_map.layer_sources == (0, 1, 1, 2)
    for layer in range(4):
        kept = rule.mapped(tensors[f"layers.{layer}.ffn.gate"], lambda _: ones)
        assert bool((kept == 1).all())


def test_it_holds_what_matters(tmp_path: Path) -> None:
    """The Fisher-weighted distance shrinks with λ while the plain distance need not."""
    moved = {}
    for strength in (0.0, 1e5):
        module = module_of(EWC(ewc_lambda=strength))
        fisher = diagonal_fisher(module.model, oracle.tokens(batch=8))
        start = {name: p.detach().clone() for name, p in module.model.named_parameters()}
        from tests.training.test_fit import SETTINGS, batches
        from tritter.terminal import Console
        from tritter.training import fit

        fit(
            module,
            batches(),
            settings=SETTINGS,
            folder=tmp_path / str(strength),
            label="test",
            console=Console(quiet=True),
            task=task_with(module.model, fisher),
        )
        moved[strength] = sum(
            float((fisher[n] * (p.detach() - start[n]) ** 2).sum())
            for n, p in module.model.named_parameters()
        )
    assert moved[1e5] < 0.5 * moved[0.0]


def test_the_class_for_loops_of_ones_own() -> None:
    """Same Fisher and penalty as the method, with a graph; batches may have different sizes."""
    model = oracle.tiny_llama()
    sequences = oracle.tokens(batch=5)
    loader = [{"input_ids": batch} for batch in sequences.split(3)]
    ewc = ElasticWeightConsolidation(model, loader, 20.0)
    for name, value in diagonal_fisher(model, sequences).items():
        torch.testing.assert_close(ewc.fisher[name], value)
    assert float(ewc.penalty().detach()) == 0.0
    method = EWC(ewc_lambda=20.0)
    method.begin_task(model, task_with(model, ewc.fisher))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    penalty = ewc.penalty()
    assert float(penalty.detach()) == pytest.approx(method.logged_loss(model), rel=1e-4)
    penalty.backward()
    weight = model.get_parameter("model.layers.0.mlp.up_proj.weight")
    expected = 20.0 * ewc.fisher["model.layers.0.mlp.up_proj.weight"] * 0.1
    torch.testing.assert_close(weight.grad, expected, rtol=1e-3, atol=1e-8)
    for empty in ([], [{"input_ids": sequences[:, :1]}]):
        with pytest.raises(TritterError, match="no sequence"):
            ElasticWeightConsolidation(model, empty)


def test_a_loader_is_read_batch_by_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model, events = oracle.tiny_llama(), list[str]()

    def loader() -> Iterator[dict[str, Tensor]]:
        for batch in oracle.tokens(batch=4).split(2):
            events.append("read")
            yield {"input_ids": batch}

    def estimate(model: nn.Module, sequences: Tensor) -> dict[str, Tensor]:
        events.append("estimate")
        return diagonal_fisher(model, sequences)

    monkeypatch.setattr("tritter.methods.forgetting.ewc.diagonal_fisher", estimate)
    ElasticWeightConsolidation(model, loader())
    assert events == ["read", "estimate"] * 2


def test_padding_has_no_importance() -> None:
    model, ids = oracle.tiny_llama(), oracle.tokens(batch=3, length=10)
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    mask[1] = 0  # nothing but padding
    ewc = ElasticWeightConsolidation(model, [{"input_ids": ids, "attention_mask": mask}])
    short, whole = diagonal_fisher(model, ids[:1, :6]), diagonal_fisher(model, ids[2:])
    for name, value in ewc.fisher.items():
        torch.testing.assert_close(value, (short[name] + whole[name]) / 2)


def test_float16_keeps_small_importances() -> None:
    model = oracle.tiny_llama().half()
    fisher = {n: torch.full_like(p, 1e-9, dtype=torch.float32) for n, p in model.named_parameters()}
    method = EWC(ewc_lambda=1e8)
    method.begin_task(model, task_with(model, fisher))
    for parameter in model.parameters():
        parameter.data.add_(0.5)
        parameter.grad = torch.zeros_like(parameter)
    method.add_to_gradients(model)
    moved = model.get_parameter("model.norm.weight")
    assert moved.grad is not None and moved.grad.dtype == torch.float16
    torch.testing.assert_close(moved.grad.float(), torch.full(moved.shape, 0.05), rtol=1e-2, atol=0)
    own = ElasticWeightConsolidation(model, [{"input_ids": oracle.tokens()}], lambda_ewc=2.0)
    own.fisher, anchor = fisher, own.optimal_params["model.norm.weight"].fill_(0.01)
    moved.data.copy_(anchor + 1e-4)
    expected = 1e-9 * (moved.detach() - anchor).float().square().sum()
    torch.testing.assert_close(own.penalty(), expected, rtol=1e-3, atol=0)


def test_a_change_that_draws_on_what_has_no_importance_is_followed() -> None:
    """Second copies of a layer below come from a new block, and have no anchor either."""
    model = oracle.tiny_llama()
    held = {n: p for n, p in model.named_parameters() if "layers.1." not in n}
    method = EWC(ewc_lambda=1.0, at="carried", refresh_steps=None)
    fisher = {name: torch.ones_like(parameter) for name, parameter in held.items()}
    method.begin_task(model, Task(seed=0, state={"fisher": fisher}))
    wider = ModelExpander([Width(intermediate_size=56, hidden_size=24, init="aki")])
    grown = wider.expand(model)
    method.parameters_changed(wider.change(model))
    assert method.anchor.keys() == method.importance.keys()
    assert "model.layers.0.mlp.gate_proj.weight" in method.anchor
    for parameter in grown.parameters():
        parameter.grad = torch.zeros_like(parameter)
    method.add_to_gradients(grown)
    assert method.logged_loss(grown) == 0
    assert not any(bool(parameter.grad.any()) for parameter in grown.parameters())
