"""FLOPs of real training steps: of the trained parameters and of additional forward passes."""

import csv
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.methods.moe_routing.test_objective import SEQUENCES, UNHELD, run
from tests.oracle.families import SPARSE, generic, tiny
from tritter.core.families import Flops, Model, forward_flops, training_flops
from tritter.methods.moe_routing.objective import RoutingObjective
from tritter.methods.moe_routing.opening import Unfreezing
from tritter.methods.moe_routing.options import RoutingOptions
from tritter.methods.moe_routing.separate import SeparateExperts, only_trainable
from tritter.training import BaseModule, OptimizerSettings, Schedule
from tritter.training.parameters import trained_tensors

LENGTH = 16
HELD = RoutingOptions(auxiliary_loss=0.01, z_loss=1e-3, hold_old=1.0)


def square(flops: Flops) -> float:
    """Return the FLOPs of eager attention, in which every token attends to every key."""
    return flops.matrices * LENGTH + sum(flops.attention.values()) * LENGTH**2


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("family", SPARSE)
def test_holding_old_routing_costs_a_second_pass_in_every_step(family: str) -> None:
    model = tiny(family, attn_implementation="eager")
    routing = RoutingObjective(model, HELD)
    routing.hold(model, SEQUENCES[:10], batch_size=2)
    module = BaseModule(
        model,
        schedule=Schedule(learning_rate=1e-3, max_steps=4),
        optimizer=OptimizerSettings(),
        side_losses=[routing],
    )
    module.log = lambda *_, **__: None  # type: ignore[method-assign]
    with routing.routing.recording(), FlopCounterMode(display=False) as counter:
        module.training_step({"input_ids": SEQUENCES[:3].long()}, 0).backward()
    config = model.config.to_dict()
    of_batch = training_flops(Model(config))
    of_routing = training_flops(Model(config), loss_at="routers")
    assert counter.get_total_flops() == 3 * square(of_batch) + 2 * square(of_routing)
    ours = 3 * module.step_flops().of(LENGTH) + routing.step_flops(model)
    assert ours == 3 * of_batch.of(LENGTH) + 2 * of_routing.of(LENGTH)
    assert RoutingObjective(model, UNHELD).step_flops(model) == 0


@pytest.mark.full
def test_the_look_at_old_routing_and_what_is_held_are_in_the_cost_of_a_fit(tmp_path: Path) -> None:
    model = tiny("mixtral")
    config = model.config.to_dict()
    forward = forward_flops(Model(config))
    held = run(model, tmp_path / "held", settings=HELD, old=(SEQUENCES[:10], 2), steps=3)
    plain = run(tiny("mixtral"), tmp_path / "plain", steps=3)
    assert plain.flops == 3 * 4 * 3 * forward.of(LENGTH)
    again = training_flops(Model(config), loss_at="routers")
    assert held.flops == plain.flops + 10 * forward.of(LENGTH) + 3 * 2 * again.of(LENGTH)


@pytest.mark.parametrize("family", generic())
def test_trained_tensors_are_told_by_their_parameters(family: str) -> None:
    model = tiny(family)
    config = model.config.to_dict()
    held = {tensor.name: tensor for tensor in Model(config).tensors}
    assert trained_tensors(model) == set(held)
    with only_trainable(model, lambda tensor: tensor.layer == 1):
        assert trained_tensors(model) == {name for name in held if name.startswith("layers.1.")}
    if family not in SPARSE:
        return
    with only_trainable(model, lambda tensor: tensor.kind == "router"):
        assert trained_tensors(model) == {name for name in held if name.endswith(".router")}
    with SeparateExperts(model, 3), only_trainable(model, lambda tensor: tensor.expert == 3):
        assert trained_tensors(model) == {n for n, tensor in held.items() if tensor.expert == 3}


def test_what_is_held_until_a_step_costs_nothing_until_then(tmp_path: Path) -> None:
    model = tiny("mixtral")
    config = model.config.to_dict()
    with SeparateExperts(model, 2):
        base = [p for name, p in model.named_parameters() if not name.endswith("_new")]
        controls = [Unfreezing(base, after_steps=2)]
        result = run(model, tmp_path, steps=5, controls=controls)
    first = training_flops(Model(config), is_trained=lambda t: t.expert in (2, 3)).of(LENGTH)
    rest = training_flops(Model(config)).of(LENGTH)
    assert first < rest
    assert result.flops == 4 * (2 * first + 3 * rest)


SPEEDS = ("step_seconds", "steps_per_second", "tokens_per_second")


def test_the_metric_is_the_count_over_the_time(tmp_path: Path) -> None:
    model = tiny("mixtral")
    result = run(model, tmp_path, steps=4)  # two rows of two steps
    with (tmp_path / "metrics.csv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["performance/flops"]]
    spent = [
        float(row["performance/flops"]) * 2 * float(row["performance/step_seconds"]) for row in rows
    ]
    assert len(spent) == 2
    assert spent == pytest.approx([result.flops / 2] * 2)
    assert torch.isfinite(torch.tensor(spent)).all()
    speeds = [[float(row[f"performance/{name}"]) for name in SPEEDS] for row in rows]
    for seconds, steps_per_second, tokens_per_second in speeds:
        assert steps_per_second * seconds == pytest.approx(1)
        assert tokens_per_second * seconds == pytest.approx(4 * LENGTH)
