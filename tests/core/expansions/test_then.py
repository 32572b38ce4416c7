"""Composed maps, compared with the steps applied one by one, over all methods."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.oracle.families import tiny
from tritter.core.expansions import (
    Dus,
    ExpansionSpec,
    Interpolate,
    LlamaPro,
    Moe,
    MoeAdd,
    ResolvedExpansion,
    Stack,
    Width,
    build_steps,
)
from tritter.core.families import Config, Model, pack_all
from tritter.core.parameter_map import AxisFactor, AxisMap, Fill, ParameterMap, Quantity, TensorMap
from tritter.core.parameter_map.carry import STATE_KINDS, Policy, StateKind
from tritter.errors import RequestError
from tritter.transform import Change, PlannedExpansion

Values = dict[str, Tensor]
DENSE: list[ExpansionSpec] = [
    Dus(), Dus(identity_init=True), Stack(), Interpolate(), LlamaPro(), Width(),
    Width(init="net2net", noise=0.01), Width(init="zero_pad", shares="equal"), Width(init="aki"),
    Width(head_strategy="split"), Width(intermediate_size=100, init="net2net"),
    Moe(num_experts=2, reinit_fraction=0.5),
]  # fmt: skip
SPARSE: list[ExpansionSpec] = [
    MoeAdd(num_experts=2), MoeAdd(addition="replicate"), Width(init="net2net"), LlamaPro(),
]  # fmt: skip
TIED = {"llama": False, "qwen3": True, "qwen2_moe": False}
CONFIGS = {f: tiny(f, tie_word_embeddings=is_tied).config.to_dict() for f, is_tied in TIED.items()}


def drawn(config: Config, *, positive: bool = False, seed: int = 0) -> Values:
    """Return a value for each logical tensor."""
    generator = torch.Generator().manual_seed(seed)
    values = {
        name: torch.randn(shape, generator=generator)
        for name, shape in Model(config).shapes.items()
    }
    return {name: v.square() for name, v in values.items()} if positive else values


def in_turn(
    steps: Sequence[ResolvedExpansion], values: Values, quantity: Quantity = Quantity.WEIGHT
) -> Values:
    for step in steps:
        maps = step.parameter_map.tensors
        values = {n: m.mapped(values.__getitem__, quantity=quantity) for n, m in maps.items()}
    return values


def state_in_turn(
    steps: Sequence[ResolvedExpansion], state: Values, rule: StateKind, policy: Policy
) -> Values:
    """Map one kind of state step by step; reset state is absent."""
    for step in steps:
        after: Values = {}
        for name, tensor_map in step.parameter_map.tensors.items():
            if rule.has_state(tensor_map, state.__contains__, policy=policy):
                after[name] = rule.mapped(tensor_map, state.__getitem__, policy=policy)
        state = after
    return state


def assert_same(found: Values, expected: Values) -> None:
    assert found.keys() == expected.keys()
    wrong = [name for name, value in expected.items() if not torch.equal(found[name], value)]
    assert not wrong


def check_chain(config: Config, specs: Sequence[ExpansionSpec], *, policy: Policy) -> None:
    """Compare the composed map with the chain, bit for bit, for all mapped quantities."""
    steps = build_steps(Model(config), specs, seed=3)
    plan = PlannedExpansion(source=Model(config), steps=steps, seed=3)
    one, target = plan.parameter_map, plan.target.config
    values = drawn(config)
    read = values.__getitem__
    weights = {n: m.rounded_weight(read, torch.float32) for n, m in one.tensors.items()}
    assert_same(weights, in_turn(steps, values))
    for quantity in set(Quantity) - {Quantity.WEIGHT}:
        moved = {n: m.mapped(read, quantity=quantity) for n, m in one.tensors.items()}
        assert_same(moved, in_turn(steps, values, quantity))
    inputs = {name: v for i, (name, v) in enumerate(drawn(config, positive=True).items()) if i % 7}
    live = pack_all(Model(config).layout("live"), inputs)
    change = Change.of(one, Model(config), Model(target))
    for kind, rule in STATE_KINDS.items():
        state = {
            n: rule.mapped(m, inputs.__getitem__, policy=policy)
            for n, m in one.tensors.items()
            if rule.has_state(m, inputs.__contains__, policy=policy)
        }
        assert_same(state, state_in_turn(steps, inputs, rule, policy))
        if len(live) == len(inputs):  # nothing is fused, so the same state is absent
            seen = change.state(kind, live, policy=policy)
            assert_same(seen, pack_all(change.after, state))
    masks = {n: v > 0 for n, v in drawn(config, seed=1).items()}
    marked = dict(masks)
    for step in steps:
        maps = step.parameter_map.tensors
        marked = {n: m.carried_mask(marked.__getitem__) for n, m in maps.items()}
    assert_same({n: m.carried_mask(masks.__getitem__) for n, m in one.tensors.items()}, marked)


@pytest.mark.full
@settings(max_examples=10, deadline=None, derandomize=True)
@given(data=st.data())
def test_a_chain_is_one_map(data: st.DataObject) -> None:
    family = data.draw(st.sampled_from(sorted(CONFIGS)))
    layers, size = data.draw(st.integers(2, 3)), data.draw(st.sampled_from([16, 24]))
    sizes = {"num_hidden_layers": layers, "hidden_size": size, "vocab_size": 11}
    kinds = CONFIGS[family].get("layer_types")
    if kinds:
        sizes["layer_types"] = kinds[:layers]
    pool = SPARSE if family == "qwen2_moe" else DENSE
    specs = data.draw(st.lists(st.sampled_from(pool), min_size=1, max_size=3))
    policy = data.draw(st.sampled_from(("carry", "zero", "reset_new")))
    with suppress(RequestError):  # an impossible target after the previous expansion
        check_chain(CONFIGS[family] | sizes, specs, policy=policy)


@pytest.mark.full
@pytest.mark.parametrize("policy", ("carry", "zero", "reset_new"))
def test_a_chain_through_every_kind_of_fill_is_one_map(policy: Policy) -> None:
    noisy = Width(init="net2net", noise=0.01)
    check_chain(CONFIGS["llama"], [Width(), Width(init="aki"), LlamaPro()], policy=policy)
    check_chain(CONFIGS["llama"], [noisy, Moe(num_experts=2), MoeAdd(num_experts=1)], policy=policy)


def test_then_is_associative_and_leaves_what_no_map_touches() -> None:
    config = CONFIGS["llama"]
    first, second, third = (
        s.parameter_map for s in build_steps(Model(config), [LlamaPro(), Width(), Stack()], seed=0)
    )
    left, right = first.then(second).then(third), first.then(second.then(third))
    assert left.digest() == right.digest() != first.then(second).digest()
    assert left.layer_sources == (0, 1, 1, 2, 2, 0, 1, 1, 2, 2)
    values = drawn(config)
    for name, tensor_map in left.tensors.items():
        other = right.tensors[name].mapped(values.__getitem__)
        assert torch.equal(tensor_map.mapped(values.__getitem__), other)
    plain = ParameterMap.identity(values, num_layers=3)
    assert plain.then(first).digest() == first.digest() == composed_digest(first, plain)
    stacked = first.then(first_of(first))
    assert stacked.tensors["layers.0.ffn.up"].is_verbatim
    assert stacked.tensors["layers.0.ffn.up"].origin == "layers.0.ffn.up"


def first_of(parameter_map: ParameterMap) -> ParameterMap:
    """Return the identity map of the result of `parameter_map`."""
    return ParameterMap.identity(parameter_map.tensors, num_layers=len(parameter_map.layer_sources))


def composed_digest(parameter_map: ParameterMap, _: ParameterMap) -> str:
    return parameter_map.then(first_of(parameter_map)).digest()


def test_a_product_of_factors_would_not_do() -> None:
    """Negative control: new entries of the second moment get the mean of each map's input."""
    wider = TensorMap("w", (AxisFactor.writes(AxisMap.padded(2, 3)), None))
    once = TensorMap("w", (AxisFactor.writes(AxisMap.padded(2, 4)), None))
    chain = replace(wider, axes=(AxisFactor.writes(AxisMap.padded(3, 4)), None)).after({"w": wider})
    inputs: Mapping[str, Tensor] = {"w": torch.tensor([[1.0, 2.0], [3.0, 4.0]])}
    found = STATE_KINDS["exp_avg_sq"].mapped(chain, inputs.__getitem__)
    assert torch.equal(found[2], torch.full((2,), 2.5)) and torch.equal(found[3], found[2])
    filled = replace(once, fill=Fill("random", std=1.0, seed=5))
    drawn_twice = replace(chain, fill=Fill("random", std=1.0, seed=5))
    one, two = (m.mapped(inputs.__getitem__) for m in (filled, drawn_twice))
    assert torch.equal(one[:2], two[:2]) and not torch.equal(one[2:], two[2:])
    assert torch.equal(two, replace(drawn_twice, source="w").apply(wider.apply(inputs["w"])))
