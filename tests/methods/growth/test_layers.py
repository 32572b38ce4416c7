"""Growable layers in your own training loop: function, optimizer state, refusals."""

import copy
import io
import warnings
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from tests.methods.growth.layers import GROWING, MODELS, adam, data, growing, pair, train
from tritter import GrowableFFN, GrowableLinear
from tritter.errors import RequestError
from tritter.methods.growth.triggers import Percentile

EXACT = ("gradmax", "split", "random")


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize("initialiser", EXACT)
@pytest.mark.parametrize("name", MODELS)
def test_the_function_is_kept_in_two_events(name: str, initialiser: str) -> None:
    model = MODELS[name](initialiser=initialiser).double()
    optimizer, (x, _) = adam(model), data(model)
    for neurons in (16, 20):
        train(model, optimizer)
        before = model(x).detach()
        assert growing(model).check_and_grow() == {"born": 4, "replaced": 0, "died": 0}
        torch.testing.assert_close(model(x).detach(), before, rtol=0, atol=1e-12)
        assert next(model.parameters()).shape[0] == neurons


def test_the_readmes_noise_changes_the_function() -> None:
    """Control: the bound of the test above can be exceeded."""
    model = MODELS["linear, relu"](initialiser="source_noise").double()
    optimizer, (x, _) = adam(model), data(model)
    train(model, optimizer)
    before = model(x).detach()
    growing(model).check_and_grow()
    assert float((model(x) - before).abs().max().detach()) > 1e-4


@pytest.mark.quick_cases(4)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("has_groups", [False, True], ids=["one group", "groups"])
def test_moments_of_old_neurons_stay_and_all_goes_on(name: str, has_groups: bool) -> None:
    model = MODELS[name]()
    if has_groups:
        own, others = list(model[0].parameters()), list(model[-1].parameters())
        groups = [{"params": others, "lr": 1e-3}, {"params": own, "weight_decay": 0.1}]
        optimizer = torch.optim.AdamW(groups, lr=1e-2)
    else:
        optimizer = adam(model)
    train(model, optimizer)
    state = {n: dict(optimizer.state[p]) for n, p in model.named_parameters()}
    old = {n: p.detach().clone() for n, p in model.named_parameters()}
    numbers = [len(group["params"]) for group in optimizer.param_groups]
    growing(model).check_and_grow()
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in model.parameters()}
    assert [len(group["params"]) for group in optimizer.param_groups] == numbers
    grown = 0
    for parameter_name, parameter in model.named_parameters():
        before, now = state[parameter_name], optimizer.state[parameter]
        index = tuple(map(slice, old[parameter_name].shape))
        grown += parameter.shape != old[parameter_name].shape
        assert torch.equal(parameter.detach()[index], old[parameter_name])
        for kind in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(now[kind][index], before[kind])
        is_new = torch.ones_like(parameter, dtype=torch.bool)
        is_new[index] = False
        assert not now["exp_avg"][is_new].any()
        assert (now["exp_avg_sq"][is_new] > 0).all()
    assert grown >= 2
    moved = {n: p.detach().clone() for n, p in model.named_parameters()}
    train(model, optimizer, 2)
    assert all(not torch.equal(p, moved[n]) for n, p in model.named_parameters())


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("name", MODELS)
def test_new_neurons_move_no_further_than_old_ones(name: str) -> None:
    model = MODELS[name](maturation_factor=1.0, growth_cooldown=20)
    optimizer = adam(model, 1e-3)
    train(model, optimizer, 60)
    growing(model).check_and_grow()
    largest = {"old": 0.0, "new": 0.0}
    for _ in range(20):
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        train(model, optimizer, 1)
        for n, parameter in model.named_parameters():
            moved = (parameter.detach() - before[n]).abs()
            if 16 in moved.shape:
                dim = moved.shape.index(16)
                for part, at in (("old", slice(12)), ("new", slice(12, 16))):
                    most = float(moved.movedim(dim, 0)[at].max())
                    largest[part] = max(largest[part], most)
    assert 0 < largest["new"] <= 1.5 * largest["old"]


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("spelling", ["positional", "named"])
@pytest.mark.parametrize("name", ["gated", "linear, relu"])
def test_a_step_with_a_closure_is_a_step_without_one(name: str, spelling: str, kind: Any) -> None:
    """Growth reads the gradients from the closure, not those of the step before."""
    models = [MODELS[name](maturation_factor=3.0, maturation_age=4, growth_cooldown=2)]
    models.append(copy.deepcopy(models[0]))
    x, y = data(models[0])
    found = []
    for model in models:
        optimizer = kind(model.parameters(), lr=0.01)

        def closure(model: nn.Module = model, optimizer: Any = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = (model(x) - y).square().mean()
            loss.backward()
            return loss

        def step(optimizer: Any = optimizer, closure: Any = closure) -> Tensor:
            if spelling == "positional":
                return cast(Tensor, optimizer.step(closure))
            return cast(Tensor, optimizer.step(closure=closure))

        pressures, grown = [], []
        for _ in range(7):
            if model is models[0]:
                loss = closure()
                optimizer.step()
            else:
                loss = step()
            pressures += [loss.item(), *growing(model)._loop.grower.pressure.neurons[0].tolist()]
            grown.append(growing(model).check_and_grow()["born"])
        found.append((pressures, grown, [p.tolist() for p in model.parameters()]))
    assert found[0] == found[1]
    assert sum(grown) > 4


def test_an_optimizer_that_repeats_its_closure_is_refused() -> None:
    class Twice(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            closure()
            return super().step(closure)

    model = MODELS["gated"]()
    (x, y), before = data(model), [p.detach().clone() for p in model.parameters()]

    def closure() -> Tensor:
        loss = (model(x) - y).square().mean()
        loss.backward()
        return loss

    for kind in (torch.optim.LBFGS, Twice):
        with pytest.raises(RequestError, match=f"{kind.__name__} evaluates its closure several"):
            kind(model.parameters(), lr=0.1).step(closure)
    assert all(map(torch.equal, model.parameters(), before))


def test_young_neurons_are_let_go_further_and_grow_old() -> None:
    models = [MODELS["gated"](maturation_factor=f, maturation_age=4) for f in (1.0, 3.0)]
    models[1].load_state_dict(models[0].state_dict())
    moves = []
    for model in models:
        optimizer = adam(model)
        train(model, optimizer)
        growing(model).check_and_grow()
        before = model[0].down_proj.weight.detach().clone()
        train(model, optimizer, 1)
        moves.append(model[0].down_proj.weight.detach() - before)
    torch.testing.assert_close(moves[1][:, :12], moves[0][:, :12], rtol=0, atol=1e-7)
    torch.testing.assert_close(moves[1][:, 12:], 3 * moves[0][:, 12:], rtol=1e-3, atol=1e-7)
    maturity = growing(models[1])._loop.grower.maturity
    assert maturity.young(0, 4).tolist() == [12, 13, 14, 15]
    assert maturity.young(0, 7).tolist() == []


def test_dead_neurons_without_output_are_used_again_and_nothing_changes() -> None:
    model = MODELS["linear, gelu"](enable_replacement=True, max_growth_per_step=3).double()
    optimizer, (x, _), layer = adam(model), data(model), growing(model)
    train(model, optimizer)
    with torch.no_grad():
        model[2].weight[:, [2, 9]] = 0.0
    before, history = model(x).detach(), optimizer.state[model[0].weight]["exp_avg"]
    assert bool(history[[2, 9]].any())
    result = layer.perform_growth([0, 1, 2])
    assert (result["born"], result["replaced"], result["died"]) == (1, 2, 0)
    assert sorted(result["indices"]) == [2, 9, 12]
    torch.testing.assert_close(model(x).detach(), before, rtol=0, atol=1e-12)
    for parameter, dim in ((model[0].weight, 0), (model[0].bias, 0), (model[2].weight, 1)):
        new = optimizer.state[parameter]["exp_avg"].movedim(dim, 0)[[2, 9, 12]]
        assert not new.any()
    assert layer._loop.grower.maturity.young(0, 4).tolist() == [2, 9, 12]
    # Young neurons are not recycled, however small their output
    train(model, optimizer, 1)
    with torch.no_grad():
        model[2].weight[:, [2, 9, 12]] = 0.0
        model[2].weight[:, 5] = 0.0
    assert layer.perform_growth([0, 1])["indices"] == [5, 13]


def test_without_a_consumer_it_gets_wider_and_says_so_once() -> None:
    layer = GrowableLinear(8, 12, **GROWING)
    optimizer, (x, _) = adam(layer), data(layer)
    for _ in range(3):
        layer(x).square().mean().backward()
        optimizer.step()
    before, (is_due, sources) = layer(x).detach(), layer.check_growth()
    assert is_due
    assert len(sources) == 4
    with pytest.warns(UserWarning, match="no consumer"):
        result = layer.perform_growth(sources)
    assert result == {"born": 4, "replaced": 0, "died": 0, "indices": [12, 13, 14, 15]}
    assert layer.out_features == 16
    torch.testing.assert_close(layer(x)[:, :12].detach(), before)
    assert layer.check_growth() == (False, [])
    layer(x).square().mean().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer.perform_growth([0])


@pytest.mark.parametrize("activation", [nn.Identity(), nn.ReLU(), nn.GELU()], ids=repr)
def test_gradmax_begins_with_larger_gradients_than_random_rows(activation: nn.Module) -> None:
    """The first gradient of a new column, for rows of one norm; by autograd alone."""
    model = pair(activation)
    optimizer, layer = adam(model), growing(model)
    train(model, optimizer)
    layer.check_and_grow()
    x, y = data(model)

    def norm() -> float:
        model.zero_grad()
        (model(x) - y).square().mean().backward()
        return float(model[2].weight.grad[:, 12].norm())

    reached, length = norm(), float(model[0].weight.detach()[12].norm())
    others = []
    for _ in range(20):
        with torch.no_grad():
            model[0].weight[12] = nn.functional.normalize(torch.randn(8), dim=0) * length
        others.append(norm())
    assert reached > sorted(others)[-2]


def test_a_narrow_layer_grows_by_more_than_it_has() -> None:
    reader = nn.Linear(3, 3)
    layer = GrowableLinear(8, 3, consumer=reader, **{**GROWING, "max_growth_per_step": 10})
    model = nn.Sequential(layer, nn.ReLU(), reader)
    optimizer = adam(model)
    train(model, optimizer)
    assert len(layer.check_growth()[1]) == 10
    assert layer.perform_growth(layer.check_growth()[1])["born"] == 10
    rows = nn.functional.normalize(layer.weight.detach()[3:], dim=1)
    assert float((rows @ rows.T - torch.eye(10)).max()) < 0.99  # all start differently


def test_split_stems_from_the_neurons_that_are_named() -> None:
    model = MODELS["plain, biases"](initialiser="split")
    optimizer = adam(model)
    train(model, optimizer)
    old = model[0].up_proj.weight.detach().clone()
    down = model[0].down_proj.weight.detach().clone()
    growing(model).perform_growth([7, 3])
    new, written = model[0].up_proj.weight.detach(), model[0].down_proj.weight.detach()
    assert {tuple(row) for row in new[12:].tolist()} == {tuple(row) for row in old[[7, 3]].tolist()}
    torch.testing.assert_close(written[:, [3, 7]], 0.7 * down[:, [3, 7]])


@pytest.mark.full
def test_one_layer_fires_at_the_rate_of_its_own_history() -> None:
    """Random gradients: one check in ten fires, and none of the first nine."""
    model = pair(nn.ReLU(), trigger=Percentile(), growth_cooldown=1)
    layer, optimizer = growing(model), torch.optim.SGD(model.parameters(), lr=0.0)
    generator, fired = torch.Generator().manual_seed(0), []
    for step in range(300):
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
        fired += [step] if layer.check_growth()[0] else []
    assert min(fired) >= 9
    assert 15 <= len(fired) <= 45


def test_a_drop_in_for_nn_linear() -> None:
    torch.manual_seed(1)
    plain = nn.Linear(8, 12)
    torch.manual_seed(1)
    layer = GrowableLinear(8, 12)
    assert isinstance(layer, nn.Linear)
    assert list(layer.state_dict()) == ["weight", "bias"]
    assert torch.equal(layer.weight, plain.weight)
    layer = GrowableLinear(8, 12, bias=False, dtype=torch.float64)
    layer.load_state_dict({"weight": plain.weight})
    assert layer.weight.dtype == torch.float64
    GrowableLinear(8, 12).load_state_dict(plain.state_dict())
    with pytest.raises(RuntimeError, match="size mismatch"):
        GrowableLinear(9, 12).load_state_dict(plain.state_dict())


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize("name", MODELS)
def test_a_grown_ones_state_loads_into_a_new_one(name: str) -> None:
    model, other = MODELS[name](), MODELS[name]()
    optimizer, (x, _) = adam(model), data(model)
    train(model, optimizer)
    growing(model).check_and_grow()
    train(model, optimizer)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(x), model(x))
    again = adam(other)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    if isinstance(model[0], GrowableFFN):
        assert growing(other).growth_events == growing(model).growth_events
        assert growing(other)._loop.steps == 6
        # The copy continues like the model, young neurons included
        assert train(other, again) == train(model, optimizer)
    holder = adam(fresh := MODELS[name]())
    growing(fresh).attach(holder)
    with pytest.raises(RequestError, match="an optimizer refers to"):
        fresh.load_state_dict(model.state_dict())


@pytest.mark.parametrize("name", ["linear, relu", "gated"])
def test_a_copy_is_on_its_own(name: str) -> None:
    model = MODELS[name]()
    train(model, adam(model))
    other = copy.deepcopy(model)
    assert growing(other)._loop.module is not growing(model)._loop.module
    optimizer = adam(other)
    train(other, optimizer)
    growing(other).check_and_grow()
    widths = [next(each[0].parameters()).shape[0] for each in (model, other)]
    assert widths == [12, 16]
    assert len(growing(model).growth_events) == 0


def test_two_growable_layers_in_a_row() -> None:
    last = nn.Linear(10, 3)
    second = GrowableLinear(12, 10, consumer=last, **GROWING)
    first = GrowableLinear(8, 12, consumer=second, **GROWING)
    model = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), last).double()
    optimizer, (x, _) = adam(model), data(model)
    for size in (4, 8):
        train(model, optimizer)
        before = model(x).detach()
        assert first.check_and_grow()["born"] == 4
        if not second.check_and_grow()["born"]:  # its recorded activations have another size
            train(model, optimizer, 1)
            before = model(x).detach()
            assert second.check_and_grow()["born"] == 4
        torch.testing.assert_close(model(x).detach(), before, rtol=0, atol=1e-12)
        shapes = [tuple(m.weight.shape) for m in (first, second, last)]
        assert shapes == [(12 + size, 8), (10 + size, 12 + size), (3, 10 + size)]


def test_checks_come_no_sooner_than_asked() -> None:
    model = MODELS["gated"](check_every=5, growth_cooldown=1)
    optimizer, grown = adam(model), []
    for step in range(1, 14):
        train(model, optimizer, 1)
        grown += [step] if growing(model).check_and_grow()["born"] else []
    assert grown == [1, 6, 11]


@pytest.mark.full
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
def test_a_narrow_block_fits_better_once_it_has_grown(gated: bool) -> None:
    losses = {}
    for cooldown in (40, 10_000):
        torch.manual_seed(0)
        growth: dict[str, Any] = {"growth_cooldown": cooldown, "max_growth_per_step": 6}
        ffn = GrowableFFN(8, 2, "gelu", gated=gated, trigger="schedule", **growth)
        model = nn.Sequential(ffn, nn.Linear(8, 3))
        optimizer = adam(model)
        for _ in range(300):
            losses[cooldown] = train(model, optimizer, 1)
            ffn.check_and_grow()
        if cooldown == 40:
            assert ffn.intermediate_size == 2 + 7 * 6
    assert losses[40] < 0.5 * losses[10_000]
