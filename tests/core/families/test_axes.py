"""Axes found by permutations: against the tables, the stock classes and gradients."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

import tritter
from tests.core.families.model_types import example
from tests.core.families.test_discovery import (
    IDS,
    example_folder,
    full_matrix,
    logits,
    untrained_after_two_steps,
)
from tests.oracle.families import OWN, tiny
from tritter.core.expansions import MoeAdd, Width
from tritter.core.expansions.on_twin import _sizes
from tritter.core.families import FAMILIES, Config, Family, Model, family_of, pack_all, unpack_all
from tritter.core.families.discovery import DiscoveredFamily
from tritter.core.families.discovery.axes import _arrangements, _residual_axes
from tritter.core.families.discovery.configs import Key
from tritter.core.families.discovery.family import shallow
from tritter.core.families.discovery.twin import Block, Twin, in_float64
from tritter.core.parameter_map import Fill, Quantity
from tritter.errors import RequestError
from tritter.methods.growth.blocks import FfnBlock
from tritter.methods.growth.grower import _growth_change
from tritter.methods.growth.initialisers import NewNeurons

# Against the tables


def requests(family: Family, config: Config) -> list[Width | MoeAdd]:
    """Return growth of FFN, heads, hidden size and experts that the table supports."""
    sizes = Model(config, family).sizes
    heads, groups = sizes.num_attention_heads, sizes.num_key_value_heads
    hidden, ffn = sizes.hidden_size, sizes.ffn_size
    found: list[Width | MoeAdd] = [
        Width(intermediate_size=ffn + 16, hidden_size=hidden),
        Width(hidden_size=2 * hidden, intermediate_size=ffn, init="net2net"),
    ]
    if not family.heads_fill_hidden:
        doubled = {"num_attention_heads": 2 * heads, "num_key_value_heads": 2 * groups}
        found.append(Width(hidden_size=hidden, head_strategy="copy", **doubled))
    if not family.subtracts_mean and not family.norms_all_heads:
        found.append(Width(hidden_size=2 * hidden))
    if family.has_experts:
        found.append(MoeAdd(addition="replicate", noise=0.0))
    return found


def grown(
    family: Family,
    config: Config,
    request: Width | MoeAdd,
    state: dict[str, Tensor],
    quantity: Quantity,
) -> tuple[Config, dict[str, Tensor]]:
    """Return the target and its tensors in memory, with zeros for all new entries."""
    target = request.target_config(Model(config))
    maps = request.parameter_map(Model(config), Model(target), seed=0).tensors
    values = unpack_all(Model(config).layout("live"), state)
    mapped = {
        name: replace(each, fill=Fill()).apply(values[str(each.origin)], quantity=quantity)
        for name, each in maps.items()
    }
    return target, pack_all(Model(target).layout("live"), mapped)


@pytest.mark.quick_cases(3)
@pytest.mark.parametrize("quantity", [Quantity.WEIGHT, Quantity.GRADIENT])
@pytest.mark.parametrize("model_type", full_matrix(tuple(OWN)))
def test_it_maps_what_the_table_maps(
    model_type: str, quantity: Quantity, monkeypatch: pytest.MonkeyPatch
) -> None:
    config: Config = tiny(model_type).config.to_dict()
    table, found = FAMILIES[model_type], DiscoveredFamily.of(config).widened(config)
    assert found.axes is not None
    unknown = {"heads"} if found.heads_fill_hidden else set[str]()
    assert found.axes.refused.keys() - {"neurons"} == unknown | (
        set() if table.has_experts else {"experts"}
    )
    state = {name: value.double() for name, value in tiny(model_type).state_dict().items()}
    for request in requests(table, config):
        target, expected = grown(table, config, request, state, quantity)
        with monkeypatch.context() as patch:
            patch.setitem(FAMILIES, model_type, found)
            same, values = grown(found, config, request, state, quantity)
        assert {key: same[key] for key in target} == target
        assert values.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(values[name], value, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("model_type", full_matrix(tuple(OWN)))
def test_its_neurons_are_those_of_the_table(
    model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same matrices, the same σ, and the same change of a model."""
    model = tiny(model_type)
    config: Config = model.config.to_dict()
    table, found = FAMILIES[model_type], DiscoveredFamily.of(config)
    assert bool(found.fixed_neurons(config)) == bool(table.fixed_neurons(config))
    if table.fixed_neurons(config):
        return
    grown, values = [], torch.randn(3, 7, generator=torch.Generator().manual_seed(0))
    for family in (table, found):
        with monkeypatch.context() as patch:
            patch.setitem(FAMILIES, model_type, family)
            blocks = FfnBlock.all_of(model)
            growths = {block.layer: layer_growth(model, block) for block in blocks[1:]}
            change = _growth_change(model, growths)
            weights = dict(change.weights({n: p.detach() for n, p in model.named_parameters()}))
            activations = [block.activation(model)(values) for block in blocks]
            grown.append(([replace(b, activation_name="") for b in blocks], activations, weights))
            assert list(change.model.ffn_sizes) == [
                b.width(model) + 2 * (b.layer > 0) for b in blocks
            ]
    (blocks, activations, weights), (same, others, again) = grown
    assert same == blocks and again.keys() == weights.keys()
    assert all(map(torch.equal, activations, others))
    assert all(torch.equal(again[name], value) for name, value in weights.items())


def layer_growth(model: nn.Module, block: FfnBlock) -> NewNeurons:
    """Return the growth of an FFN by two random neurons."""
    gate, up, _ = block.weights(model)
    draws = torch.Generator().manual_seed(block.layer)
    first, second, last = torch.randn(3, 2, gate.shape[1], generator=draws)
    return NewNeurons(gate=first, up=None if up is None else second, down=last.T)


# Gradients of a grown twin

FRESH = (("intermediate_size", 1.5),)
COPIED = (("hidden_size", 2.0), ("num_attention_heads", 2.0), ("num_key_value_heads", 2.0))


@pytest.mark.parametrize(
    ("model_type", "init", "factors"),
    [
        ("gpt_oss", "fresh", FRESH),
        ("gpt_oss", "net2net", (*FRESH, *COPIED)),
        pytest.param("qwen3_next", "net2net", (*FRESH, *COPIED), marks=pytest.mark.full),
        pytest.param("deepseek_v3", "zero_pad", (*FRESH, *COPIED), marks=pytest.mark.full),
        pytest.param("mamba", "net2net", (("intermediate_size", 2.0),), marks=pytest.mark.full),
        pytest.param("falcon_h1", "net2net", (*FRESH, *COPIED), marks=pytest.mark.full),
    ],
)
def test_gradients_obey_the_map(
    model_type: str, init: Literal["fresh", "net2net"], factors: tuple[tuple[str, float], ...]
) -> None:
    key = Key.of(Twin.of(shallow(example(model_type))).config.to_dict())
    twin = Twin.of(shallow(key.config))
    source = Model(twin.config.to_dict()).widened
    sizes = _sizes(source.sizes)
    sizes |= {name: math.ceil(sizes[name] * factor) for name, factor in factors}
    spec = Width(init=init, **sizes)
    target = source.changed(spec.target_config(source))
    maps = spec.parameter_map(source, target, seed=0).tensors
    old, new = source.layout("live"), target.layout("live")
    values = unpack_all(old, twin.model.state_dict())
    weights = {name: each.mapped(values.__getitem__) for name, each in maps.items()}
    model = twin.sibling(target.config)
    model.load_state_dict(pack_all(new, weights), strict=False)
    known, found = unpack_all(old, gradients(twin.model)), unpack_all(new, gradients(model))
    for name, each in maps.items():
        if name not in known:  # no token of this batch reached it
            continue
        expected = each.apply(known[name], quantity=Quantity.GRADIENT)
        kept = each.carried_mask(lambda source: torch.ones_like(known[source], dtype=torch.bool))
        difference = ((found[name] - expected) * kept).abs().max()
        assert difference <= 1e-9 * (1 + expected.abs().max()), name


def gradients(model: nn.Module) -> dict[str, Tensor]:
    with in_float64():
        logits = model(input_ids=IDS, use_cache=False).logits
    weights = torch.randn(logits.shape, dtype=torch.float64, generator=torch.manual_seed(0))
    (logits * weights).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


# Growth from files


@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        ("opt", {"intermediate_size": 160}),
        pytest.param("opt", {"hidden_size": 128, "init": "net2net"}, marks=pytest.mark.full),
        pytest.param("starcoder2", {"init": "net2net"}, marks=pytest.mark.full),
        pytest.param("gpt_oss", {"hidden_size": 96}, marks=pytest.mark.full),
        pytest.param("mamba", {"hidden_size": 96}, marks=pytest.mark.full),
    ],
)
def test_wider_models_keep_the_logits_and_learn(
    model_type: str, options: dict[str, Any], tmp_path: Path
) -> None:
    folder = example_folder(model_type, tmp_path)
    result = tritter.expand(folder, "width", output=tmp_path / "grown", **options)
    before, after = logits(folder), logits(result)
    assert float((after - before).abs().max()) < 1e-5 * float(before.std())
    assert not untrained_after_two_steps(result)


@pytest.mark.full
def test_the_sizes_of_the_decoder_grow_in_a_multimodal_config(tmp_path: Path) -> None:
    folder = example_folder("gemma3", tmp_path)
    result = tritter.expand(folder, "width", output=tmp_path / "grown", intermediate_size=160)
    before, after = (json.loads((each / "config.json").read_text()) for each in (folder, result))
    assert after["text_config"]["intermediate_size"] == 160
    assert after["vision_config"] == before["vision_config"]
    with pytest.raises(RequestError, match="multi_modal_projector"):
        tritter.expand(folder, "width", output=tmp_path / "wider", hidden_size=128)


@pytest.mark.full
def test_what_changes_the_function_of_a_twin_is_refused(tmp_path: Path) -> None:
    folder = example_folder("olmo", tmp_path)  # its norms have no gain
    with pytest.raises(RequestError, match=r"logits of a small olmo change.*init=net2net"):
        tritter.expand(folder, "width", output=tmp_path / "grown", hidden_size=96)
    result = tritter.expand(folder, "width", output=tmp_path / "grown", init="net2net")
    before, after = logits(folder), logits(result)
    assert float((after - before).abs().max()) < 1e-5 * float(before.std())


@pytest.mark.parametrize(("model_type", "expected"), [("starcoder2", True), ("opt", False)])
def test_whether_documents_stay_separate_is_measured(model_type: str, expected: bool) -> None:
    config = example(model_type)
    assert family_of(config).separates_documents(config) is expected


# Symmetries of a layer


class Gated(nn.Module):
    """A gated FFN of 6 neurons whose gate and up are one tensor, in two possible orders."""

    def __init__(self, *, is_interleaved: bool, has_positions: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.is_interleaved = is_interleaved
        self.up, self.down = nn.Linear(8, 12).double(), nn.Linear(6, 8).double()
        self.scale = torch.arange(8.0).double() if has_positions else 1.0

    def forward(self, x: Tensor) -> Tensor:
        both = self.up(x)
        gate, up = (
            both.view(*x.shape[:-1], 6, 2).unbind(-1) if self.is_interleaved else both.chunk(2, -1)
        )
        return x + self.down(gate.relu() * up) * self.scale


def block(module: nn.Module) -> Block:
    hidden = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1)).double()
    return Block(module, (hidden,), {}, hidden)


@pytest.mark.parametrize(("is_interleaved", "expected"), [(False, "halves"), (True, "whole")])
def test_the_order_of_gate_and_up_is_found(is_interleaved: bool, expected: str) -> None:
    axes = {("up.weight", 0): (12, 24), ("up.bias", 0): (12, 24), ("down.weight", 1): (6, 12)}
    found = _arrangements(block(Gated(is_interleaved=is_interleaved)), axes, 6, 1)
    assert found == {
        ("up.weight", 0): expected, ("up.bias", 0): expected, ("down.weight", 1): "whole"
    }  # fmt: skip


STREAM = {("up.weight", 1): (8, 16), ("down.weight", 0): (8, 16), ("down.bias", 0): (8, 16)}


def test_the_axes_of_the_stream_are_found() -> None:
    assert _residual_axes(block(Gated(is_interleaved=True)), STREAM, frozenset()) == set(STREAM)


def test_a_stream_whose_coordinates_differ_is_refused() -> None:
    layer = block(Gated(is_interleaved=True, has_positions=True))
    with pytest.raises(RequestError, match="order of its residual stream"):
        _residual_axes(layer, STREAM, frozenset())
