"""Synaptic intelligence: penalty, two tasks by hand, sources of ω and Ω, maps."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests import oracle
from tests.training.test_fit import SCHEDULE, SETTINGS, batches, module_of, task
from tritter.checkpoints.state import State
from tritter.core.expansions import Dus, Width
from tritter.core.parameter_map.carry import STATE_KINDS
from tritter.data.tokens import TextBounds
from tritter.methods.forgetting import SI, Replay
from tritter.methods.forgetting.quadratic import diagonal_fisher
from tritter.methods.forgetting.si import _recorded_importance
from tritter.terminal import Console
from tritter.training import ForgettingMethod, Preparation, SideLoss, Task, fit
from tritter.transform.live import ModelExpander

_States = Mapping[str, Mapping[str, Tensor]]


def recorded(model: nn.Module, seed: int = 5) -> dict[str, dict[str, Tensor]]:
    """Return random ω, partly negative, Δ, and Ω of earlier tasks."""
    generator = torch.Generator().manual_seed(seed)

    def drawn() -> dict[str, Tensor]:
        return {
            n: torch.randn(p.shape, generator=generator, dtype=p.dtype)
            for n, p in model.named_parameters()
        }

    earlier = {name: value.abs() for name, value in drawn().items()}
    return {"path_integral": drawn(), "displacement": drawn(), "si_importance": earlier}


def begun(model: nn.Module, state: _States, **options: float) -> SI:
    method = SI(**{"si_lambda": 0.3, "xi": 0.1, **options})
    method.begin_task(model, replace(task(model), state=state))
    return method


def test_importances_add_up_over_tasks_and_are_never_negative() -> None:
    model = oracle.tiny_llama()
    state = recorded(model)
    method = begun(model, state, xi=0.2)
    for name, held in method.importance.items():
        omega, moved, earlier = (value[name] for value in state.values())
        for place in ((0,) * held.ndim, (-1,) * held.ndim):
            latest = max(float(omega[place]), 0.0) / (float(moved[place]) ** 2 + 0.2)
            assert float(held[place]) == pytest.approx(float(earlier[place]) + latest, rel=1e-5)
        assert bool((held >= earlier).all()) and bool((omega < 0).any())


def test_its_gradient_is_that_of_its_penalty_by_finite_differences() -> None:
    model = nn.Linear(3, 2, dtype=torch.float64)
    state = recorded(model)
    method = begun(model, state)
    anchor = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
            parameter.grad = torch.zeros_like(parameter)
    method.add_to_gradients(model)
    by_hand = sum(
        0.3 * float((method.importance[n] * (p.detach() - anchor[n]) ** 2).sum())
        for n, p in model.named_parameters()
    )
    assert method.logged_loss(model) == pytest.approx(by_hand, rel=1e-12)
    for parameter in model.parameters():
        flat, gradient = parameter.data.flatten(), parameter.grad.flatten()  # type: ignore[union-attr]
        for entry in range(len(flat)):
            losses = []
            for sign in (1e-5, -1e-5):
                flat[entry] += sign
                parameter.data = flat.view(parameter.shape)
                losses.append(method.logged_loss(model))
                flat[entry] -= sign
            parameter.data = flat.view(parameter.shape)
            assert (losses[0] - losses[1]) / 2e-5 == pytest.approx(float(gradient[entry]), rel=1e-6)


def loss_of(model: nn.Module, rows: Tensor) -> Tensor:
    logits = model(input_ids=rows).logits[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


def test_two_tasks_are_those_of_a_slow_loop() -> None:
    """Plain SGD with momentum and decay, the penalty as a loss term, all gradients recorded."""
    data = [oracle.tokens(batch=6, seed=seed) for seed in (1, 2)]
    c, xi = 0.4, 0.01
    hand, model = (oracle.tiny_llama(initializer_range=0.1) for _ in range(2))
    names = [name for name, _ in hand.named_parameters()]
    total = {n: torch.rand_like(p) for n, p in hand.named_parameters()}
    state: _States = {"si_importance": {n: v.clone() for n, v in total.items()}}
    for rows in data:
        anchor = {n: p.detach().clone() for n, p in hand.named_parameters()}
        omega = {name: torch.zeros_like(anchor[name]) for name in names}
        optimizer = torch.optim.SGD(hand.parameters(), lr=0.05, momentum=0.5, weight_decay=0.01)
        for step in range(4):
            batch = rows[step : step + 3]
            before = {n: p.detach().clone() for n, p in hand.named_parameters()}
            loss = loss_of(hand, batch)
            gradients = torch.autograd.grad(loss, list(hand.parameters()), retain_graph=True)
            pull = sum((total[n] * (p - anchor[n]) ** 2).sum() for n, p in hand.named_parameters())
            optimizer.zero_grad()
            (loss + c * pull).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            for (name, parameter), gradient in zip(hand.named_parameters(), gradients, strict=True):
                omega[name] -= gradient * (parameter.detach() - before[name])
        for name, parameter in hand.named_parameters():
            moved = parameter.detach() - anchor[name]
            total[name] = total[name] + torch.relu(omega[name]) / (moved**2 + xi)

        method = begun(model, state, si_lambda=c, xi=xi)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.5, weight_decay=0.01)
        for step in range(4):
            optimizer.zero_grad()
            loss_of(model, rows[step : step + 3]).backward()  # type: ignore[no-untyped-call]
            method.observe_gradients(model)
            method.add_to_gradients(model)
            optimizer.step()
            method.observe_step(model, step + 1)
        state = method.end_task(model)
    after = begun(model, state, si_lambda=c, xi=xi).importance
    for name, parameter in hand.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), parameter, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(after[name], total[name], rtol=1e-3, atol=1e-6)
    assert any(bool((state["path_integral"][name] < 0).any()) for name in names)


class Added(ForgettingMethod):
    """Another method's loss."""

    name = "added"

    def extra_loss(self, model: nn.Module, batch: Mapping[str, Tensor], logits: Tensor) -> Tensor:
        return sum(p.square().sum() for p in model.parameters())  # type: ignore[return-value]


class Routers(SideLoss):
    def loss(
        self, model: nn.Module, batch: Mapping[str, Tensor], *, step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return 3 * next(model.parameters()).sum(), {}


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("extra", ["nothing", "replay", "another loss", "a side loss"])
def test_omega_depends_on_the_new_data_only(tmp_path: Path, extra: str) -> None:
    """One step of several batches: ω is −g·Δθ with the mean gradient of their new rows."""
    methods = {"replay": [Replay(fraction=0.3)], "another loss": [Added()]}.get(extra, [])
    method = SI(si_lambda=0.0)
    module = module_of(method, *methods, schedule=replace(SCHEDULE, max_steps=1))
    module.side_losses = (Routers(),) if extra == "a side loss" else ()
    assert module.is_task_alone is (extra == "nothing")
    model, gathered = module.model, 3
    told = replace(task(model), state=recorded(model))
    mixed = iter(Replay(fraction=0.3).mix(batches(), told) if extra == "replay" else batches())
    drawn = [next(mixed) for _ in range(gathered)]
    rows = torch.cat([batch["input_ids"][~batch["is_replay"]] for batch in drawn])
    assert len(rows) == (9 if extra == "replay" else 12)
    gradients = oracle.gradients(model, rows)
    model.zero_grad()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    result = fit(
        module,
        batches(),
        settings=replace(SETTINGS, arguments={"accumulate_grad_batches": gathered}),
        folder=tmp_path,
        label="test",
        console=Console(quiet=True),
        task=told,
    )
    state = State.read(tmp_path / "left")
    assert state is not None and set(state.kinds) == {*told.state}
    omega, moved = (dict(state.kinds[k]) for k in ("path_integral", "displacement"))
    for name, parameter in model.named_parameters():
        step = parameter.detach() - before[name]
        assert torch.equal(moved[name], step) and bool(step.any())
        torch.testing.assert_close(omega[name], -gradients[name] * step, rtol=1e-3, atol=1e-9)
    plain = 12 * module.step_flops().of(16)
    own = 0 if extra == "nothing" else len(rows) * module.step_flops().of(16)
    assert result.flops == pytest.approx(plain + own)


@pytest.mark.parametrize("shares", ["equal", "unequal"])
def test_the_same_move_of_the_function_costs_the_same_after_an_expansion(shares: str) -> None:
    """Ω of the mapped ω and Δ, and the mapped Ω, penalise all copies of a move equally."""
    model = oracle.tiny_llama()
    expander = ModelExpander([Width(init="net2net", intermediate_size=80, shares=shares)])  # type: ignore[arg-type]
    tensor_map = expander.change(model).tensors["layers.1.ffn.down"]
    axis = tensor_map.axes[1]
    assert axis is not None
    name = "model.layers.1.mlp.down_proj.weight"
    omega, moved, earlier = (values[name] for values in recorded(model).values())
    moved = moved.sign() * (moved.abs() + 0.5)
    one = _recorded_importance({name: omega}, {name: moved}, xi=1e-12)[name]
    mapped = {
        kind: STATE_KINDS[kind].mapped(tensor_map, lambda _, value=value: value)
        for kind, value in (
            ("path_integral", omega), ("displacement", moved), ("si_importance", earlier + one)
        )
    }  # fmt: skip
    paths = {name: mapped["path_integral"]}, {name: mapped["displacement"]}
    again = _recorded_importance(*paths, xi=1e-12)[name]
    step = torch.randn(24, 40)
    wide_step = STATE_KINDS["displacement"].mapped(tensor_map, lambda _: step)
    assert torch.equal(wide_step, step[:, axis.index] * axis.weight.float())
    price = float((one * step**2).sum())
    assert float((again * wide_step**2).sum()) == pytest.approx(price, rel=1e-4)
    price += float((earlier * step**2).sum())
    assert float((mapped["si_importance"] * wide_step**2).sum()) == pytest.approx(price, rel=1e-4)


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("spec", [Width(), Dus()], ids=["width", "dus"])
def test_what_an_expansion_adds_is_free_and_what_it_copies_is_held(spec: object) -> None:
    model = oracle.tiny_llama()
    expander = ModelExpander([spec])  # type: ignore[list-item]
    change, grown = expander.change(model), expander.expand(model)
    state = {
        kind: change.state(kind, {n: v.abs() + 1 for n, v in values.items()})
        for kind, values in recorded(model).items()
    }
    method, masks = begun(grown, state), change.masks()
    for name, held in method.importance.items():
        assert bool((held[masks[name]] > 0).all()) and not bool(held[~masks[name]].any()), name


def preparation(model: nn.Module, state: _States, domains: tuple[str, ...]) -> Preparation:
    return Preparation(
        model=model,
        domains=domains,
        latest=domains,
        draw=lambda count, *words, domains=domains: oracle.tokens(batch=count),
        seed=lambda *words: 0,
        sequence_length=17,
        bounds=TextBounds(0),
        state=state,
        log=lambda line: None,
    )


def test_without_a_path_it_is_estimated_on_old_data_with_a_note() -> None:
    model = oracle.tiny_llama()
    prepared = SI(si_lambda=1.0, num_sequences=5).prepare(preparation(model, {}, ("prose",)))
    assert prepared.notes == (
        "si: no path was recorded for this model; its importances are estimated on 5 sequences of "
        "prose.",
    )
    fisher = diagonal_fisher(model, oracle.tokens(batch=5))
    for name, value in prepared.state["si_importance"].items():
        torch.testing.assert_close(value, 8 * fisher[name])


def test_with_a_path_no_text_is_looked_at() -> None:
    model = oracle.tiny_llama()
    state = recorded(model)
    prepared = SI(si_lambda=1.0).prepare(preparation(model, state, ()))
    assert prepared.state == {"si_importance": state["si_importance"]} and not prepared.flops


def test_the_estimate_is_the_recorded_importance_of_a_quadratic() -> None:
    """On the path to the minimum of a quadratic, ω / Δ² is half of the Hessian's diagonal."""
    curvature = torch.tensor([[1.0, 4.0, 9.0]], dtype=torch.float64)
    model = nn.Linear(3, 1, bias=False, dtype=torch.float64)
    model.weight.data = torch.tensor([[1.0, -2.0, 0.5]], dtype=torch.float64)
    method = begun(model, {"si_importance": {"weight": torch.zeros(1, 3)}})
    for step in range(3000):
        model.weight.grad = curvature * model.weight.detach()
        method.observe_gradients(model)
        model.weight.data = model.weight.detach() - 2e-3 * model.weight.grad
        method.observe_step(model, step)
    left = method.end_task(model)
    found = _recorded_importance(left["path_integral"], left["displacement"], xi=1e-9)["weight"]
    torch.testing.assert_close(found, curvature / 2, rtol=0.02, atol=0)


def test_it_follows_a_change_in_mid_training_with_what_is_new() -> None:
    """New blocks are added at the next step, and have a path at the end."""
    model = oracle.tiny_llama()
    method = begun(model, recorded(model))
    expander = ModelExpander([Width(intermediate_size=60), Dus(target_layers=4)])
    change, grown = expander.change(model), expander.expand(model)
    method.parameters_changed(change)
    first = {name: p.detach().clone() for name, p in grown.named_parameters()}
    for parameter in grown.parameters():
        parameter.grad = torch.ones_like(parameter)
    method.observe_gradients(grown)
    with torch.no_grad():
        for parameter in grown.parameters():
            parameter.sub_(0.5)
    method.observe_step(grown, 1)
    left = method.end_task(grown)
    for name, parameter in grown.named_parameters():
        moved = parameter.detach() - first[name]
        torch.testing.assert_close(left["displacement"][name], moved)
        torch.testing.assert_close(left["path_integral"][name], torch.full_like(moved, 0.5))


def test_a_task_of_the_protocol_without_text_is_enough() -> None:
    model = oracle.tiny_llama()
    SI(si_lambda=1.0).begin_task(model, Task(seed=0, state=recorded(model)))
