"""Refusals of growth that would break surrounding modules or optimizers."""

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from tests.methods.growth.layers import GROWING, MODELS, adam, data, growing, train
from tests.oracle.families import tiny
from tritter import GrowableCausalLM, GrowableFFN, GrowableLinear
from tritter.errors import RequestError


def test_an_optimizer_that_is_not_known_is_asked_for() -> None:
    model = MODELS["gated"]()
    layer = growing(model)
    x, y = data(model)
    for _ in range(3):  # updates by hand
        loss = (model(x) - y).square().mean()
        loss.backward()
        layer.update_loss(loss)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.01 * parameter.grad
    with pytest.raises(RequestError, match=r"attach\(optimizer\)"):
        layer.check_and_grow()
    layer.attach(None)
    assert layer.check_and_grow()["born"] == 4


def test_an_optimizer_left_behind_is_refused_at_its_next_step() -> None:
    model = MODELS["linear, relu"]()
    behind, optimizer = adam(model), adam(model)
    train(model, optimizer)
    assert growing(model).check_and_grow()["born"] == 4
    train(model, optimizer)
    with pytest.raises(RequestError, match="create it again"):
        behind.step()


def test_optimizers_made_again_after_each_growth_are_of_any_kind() -> None:
    model, sizes = MODELS["linear, relu"](), []
    layer = growing(model)
    layer.attach(None)
    for _ in range(2):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        train(model, optimizer)
        sizes.append(layer.check_and_grow()["born"])
    assert sizes == [4, 4]
    with pytest.raises(RequestError, match="create it again"):
        optimizer.step()
    again = deepcopy(model)  # detects its own optimizer
    optimizer = torch.optim.SGD(again.parameters(), lr=0.01)
    train(again, optimizer)
    assert growing(again).check_and_grow()["born"] == 4


def test_optimizers_that_grow_together_or_not_at_all() -> None:
    model = MODELS["linear, relu"]()
    layer = growing(model)
    with pytest.raises(RequestError, match="none of the parameters"):
        layer.attach(adam(nn.Linear(2, 2)))
    with pytest.raises(RequestError, match=r"torch\.optim"):
        layer.attach("adam")  # type: ignore[arg-type]
    both = [adam(model[0]), adam(model[2])]
    x, y = data(model)
    for _ in range(3):
        (model(x) - y).square().mean().backward()
        for optimizer in both:
            optimizer.step()
    with pytest.raises(RequestError, match="2 optimizers"):
        layer.perform_growth([0])


def test_an_optimizer_of_a_part_is_followed() -> None:
    """Parameters that it does not contain are unaffected."""
    model = MODELS["linear, relu"]()
    optimizer = adam(model[0])
    train(model, optimizer)
    assert growing(model).check_and_grow()["born"] == 4
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == set(
        map(id, model[0].parameters())
    )
    assert model[2].weight.shape == (3, 16)


class Adapter(nn.Module):
    """Structured like a LoRA layer."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer, self.lora_A = base, nn.ModuleDict()

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GrowableLinear(8, 12, consumer=nn.Linear(11, 3)), "in_features = 11.*12"),
        (lambda: GrowableLinear(8, 12, consumer=Adapter(nn.Linear(12, 3))), "LoRA"),
        (lambda: GrowableLinear(8, 12, consumer=nn.LayerNorm(12)), r"must be an nn\.Linear"),
        (lambda: GrowableLinear(8, 12, initialiser="gradmx"), "Did you mean gradmax"),
        (lambda: GrowableLinear(8, 12, trigger="percentil"), "Did you mean percentile"),
        (lambda: GrowableLinear(8, 12, trigger="budget"), "needs the number of steps"),
        (lambda: GrowableLinear(8, 12, growth_cooldwn=3), "Did you mean growth_cooldown"),
        (lambda: GrowableFFN(8, 12, gradient_percentile=100.0), "gradient_percentile = 100"),
        (lambda: GrowableFFN(8, 12, "sillu"), "Did you mean silu"),
    ],
)
def test_what_cant_be_is_refused(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        make()


def test_growth_that_would_leave_others_behind_is_refused() -> None:
    layer = GrowableLinear(8, 12, **GROWING)
    held = Adapter(layer)
    train(nn.Sequential(held, nn.Linear(12, 3)), adam(layer))
    with pytest.raises(RequestError, match="LoRA"):
        layer.perform_growth([0])
    model = tiny("llama")
    mlp = model.model.layers[0].mlp
    mlp.up_proj = GrowableLinear(24, 40, bias=False, **GROWING)
    optimizer, ids = adam(model), torch.arange(12)[None]
    for _ in range(3):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    with pytest.raises(RequestError, match="GrowableCausalLM"):
        mlp.up_proj.check_and_grow()
    with pytest.raises(RequestError, match=r"mlp\.up_proj is a GrowableLinear"):
        GrowableCausalLM(model)


def test_growth_by_hand_is_held_to_what_there_is() -> None:
    model = MODELS["gated"]()
    layer = growing(model)
    with pytest.raises(RequestError, match="no training step was observed"):
        layer.perform_growth([0])
    train(model, adam(model))
    with pytest.raises(RequestError, match=r"\[12\].*between 0 and 11"):
        layer.perform_growth([3, 12])
    assert layer.perform_growth([]) == {"born": 0, "replaced": 0, "died": 0, "indices": []}
    model[0].down_proj.weight.requires_grad_(False)
    with pytest.raises(RequestError, match="frozen"):
        layer.perform_growth([0])
