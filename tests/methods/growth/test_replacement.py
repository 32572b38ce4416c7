"""Dead neurons: detection, effects of recycling them, and reset state."""

import pytest
import torch
from torch import Tensor, nn

from tests import oracle
from tests.methods.growth.factories import grower, growth_options, probes_of
from tests.oracle.families import tiny
from tritter.methods.growth.blocks import FfnBlock
from tritter.methods.growth.grower import Grower, _dead_neurons, _wanda_scores
from tritter.training.surgery import apply_plain

DEAD = (3, 7)


def model_with_dead() -> nn.Module:
    """Return a model with two neurons of zero output in its second layer."""
    model = oracle.tiny_llama()
    with torch.no_grad():
        model.get_parameter(FfnBlock.all_of(model)[1].down)[:, list(DEAD)] = 0.0
    return model


def event(
    engine: Grower, model: nn.Module, optimizer: torch.optim.Optimizer, *, step: int, count: int
) -> dict[str, Tensor]:
    """Grow the second layer; return the earlier moments of its up projection."""
    ids = oracle.tokens(batch=8, length=24, seed=3)
    probes = probes_of(model, ids)
    engine.pressure.observe(model, engine.blocks)
    state = optimizer.state[model.get_parameter(engine.blocks[1].up)]
    before = {k: v.clone() for k, v in state.items()} if state else {}
    growths = engine.growth(model, {1: count}, probes, step=step)
    apply_plain(model, engine.change(model, growths), optimizer=optimizer)
    engine.record_event(model, growths, step=step)
    return before


def test_dead_ones_are_used_again_and_the_output_stays() -> None:
    model = model_with_dead()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    probes_of(model, oracle.tokens())
    optimizer.step()
    engine = grower(growth_options("foam_v3", dead_quantile=0.01), max_steps=None)
    engine.begin(model)
    ids = oracle.tokens(batch=4, length=20, seed=9)
    logits = oracle.logits(model, ids)
    moments = event(engine, model, optimizer, step=50, count=5)
    after = oracle.logits(model, ids)
    assert float((after - logits).abs().max() / logits.std()) < 1e-5
    (record,) = engine.events
    assert (record["replaced"], record["born"], record["died"]) == (2, 3, 0)
    assert engine.blocks[1].width(model) == 43

    state = optimizer.state[model.get_parameter(engine.blocks[1].up)]
    old = [n for n in range(40) if n not in DEAD]
    for kind in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(state[kind][old], moments[kind][old])
    assert not state["exp_avg"][list(DEAD)].any()
    mean = moments["exp_avg_sq"][old].mean()
    assert torch.allclose(state["exp_avg_sq"][list(DEAD)], mean, rtol=1e-4)
    assert set(engine.maturity.young(1, 51).tolist()) == {*DEAD, 40, 41, 42}


def test_the_young_are_never_used_again() -> None:
    """New GradMax neurons have small outputs at first, and would be recycled next."""
    model = model_with_dead()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    engine = grower(
        growth_options("foam_v3", dead_quantile=0.2, maturation_age=100), max_steps=None
    )
    engine.begin(model)
    event(engine, model, optimizer, step=50, count=2)
    assert engine.events[-1]["replaced"] == 2
    block = engine.blocks[1]
    with torch.no_grad():
        model.get_parameter(block.down)[:, list(DEAD)] = 0.0  # dead by score, but young
    probes = probes_of(model, oracle.tokens(batch=8, length=24, seed=3))
    scores = {1: _wanda_scores(model, block, probes[1])}
    assert float(scores[1][list(DEAD)].max()) == 0.0
    found = {
        step: _dead_neurons(scores, {1: engine.maturity.young(1, step)}, quantile=0.2)[1].tolist()
        for step in (149, 150)
    }
    assert not set(DEAD) & set(found[149]) and found[150][:2] == list(DEAD)
    event(engine, model, optimizer, step=149, count=4)
    assert sorted(engine.maturity.ages(149)) == [0] * 4 + [99] * 2


@pytest.mark.parametrize(
    ("family", "options", "down"),
    [
        ("gpt2", {"resid_pdrop": 0.0}, "mlp.c_proj"),
        ("gpt_neox", {}, "mlp.dense_4h_to_h"),
        ("llama", {"mlp_bias": True}, "mlp.down_proj"),
    ],
)
def test_what_neurons_compute_is_what_their_readers_are_given(
    family: str, options: dict[str, object], down: str
) -> None:
    """With biases of the neurons."""
    model, given = tiny(family, **options), list[Tensor]()
    block = FfnBlock.all_of(model)[1]
    reader = model.get_submodule(str(block.down).removesuffix(".weight"))
    assert str(block.down).endswith(f"{down}.weight")
    handle = reader.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0].detach()))
    probes = probes_of(model, oracle.tokens(batch=4, length=20))
    handle.remove()
    _, _, weight = block.weights(model)
    assert weight is not None
    strength = given[0].flatten(0, 1).square().mean(dim=0).sqrt()
    expected = strength * torch.linalg.vector_norm(weight, dim=0)
    assert torch.allclose(_wanda_scores(model, block, probes[1]), expected, rtol=1e-4)


def test_grow_only_counts_who_is_dead_and_leaves_them() -> None:
    model = model_with_dead()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    engine = grower(growth_options("foam"), max_steps=None)
    engine.begin(model)
    event(engine, model, optimizer, step=50, count=5)
    assert engine.events[-1] | {"pressure": 0} == {
        "step": 50, "layer": 1, "born": 5, "replaced": 0, "died": 0, "neurons": 45, "pressure": 0
    }  # fmt: skip
    assert not model.get_parameter(engine.blocks[1].down)[:, list(DEAD)].any()


def test_what_is_replaced_is_free_of_importances() -> None:
    model = model_with_dead()
    engine = grower(growth_options("foam_v3"), max_steps=None)
    engine.begin(model)
    probes = probes_of(model, oracle.tokens(batch=8, length=24, seed=3))
    engine.pressure.observe(model, engine.blocks)
    change = engine.change(model, engine.growth(model, {1: 3}, probes, step=50))
    name = engine.blocks[1].up
    fisher = {n: torch.ones_like(p) for n, p in model.named_parameters()}
    followed = change.state("fisher", fisher)[name]
    free = [*DEAD, 40]
    assert not followed[free].any() and int(followed.sum()) == 38 * 24
    assert not change.masks()[name][free].any()


def test_what_an_expansion_just_made_is_not_dead_yet() -> None:
    model = model_with_dead()
    engine = grower(growth_options("foam_v3", maturation_age=100), max_steps=None)
    engine.begin(model, new={1: torch.tensor(DEAD)})
    probes = probes_of(model, oracle.tokens(batch=8, length=24, seed=3))
    engine.pressure.observe(model, engine.blocks)
    for step, replaced in ((99, 0), (100, 2)):
        growths = engine.growth(model, {1: 3}, probes, step=step)
        assert len(set(growths[1].recycled) & set(DEAD)) == replaced
