"""Mechanisms that only the further families have, each tested once.

The slow suite runs the generic tests over these families.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests import oracle
from tests.oracle import growth as oracle_growth
from tests.oracle.families import FURTHER, LAYER_NORM, STACKED, tiny
from tritter.core.expansions import (
    ExpansionSpec,
    Interpolate,
    LlamaPro,
    Moe,
    Stack,
    Width,
    build_steps,
)
from tritter.core.families import Model, check_config, family_of
from tritter.core.parameter_map import AxisFactor, AxisMap
from tritter.errors import RequestError
from tritter.methods.growth.blocks import FfnBlock
from tritter.transform import expand
from tritter.transform.live import ModelExpander

IDENTITY, STOCK, GRADIENT = 1e-10, 1e-4, 1e-9


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("family", FURTHER)
def test_stock_classes_compute_the_same_from_disk(tmp_path: Path, family: str) -> None:
    model = tiny(family, tie_word_embeddings=True)
    source = oracle.saved(model, tmp_path / "source")
    specs: list[ExpansionSpec] = [Width(init="net2net"), Interpolate(identity_init=True)]
    result = expand(source, tmp_path / "result", specs)
    after = oracle.stock(result.folder)
    assert after.config.model_type == family
    assert oracle.relative_difference(model, after, oracle.tokens()) < STOCK
    assert sum(p.numel() for p in after.parameters()) == result.parameters_after


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("family", FURTHER)
def test_the_gradient_is_the_mapped_one(family: str) -> None:
    model = tiny(family).double()
    size = 36 if family_of(oracle_growth.config_of(model)).heads_divide_hidden else 37
    width = Width(hidden_size=size, intermediate_size=61)
    if family in LAYER_NORM:
        width = Width(init="net2net", head_strategy="fresh", intermediate_size=61, hidden_size=48)
    specs: list[ExpansionSpec] = [LlamaPro(), width]
    found = oracle_growth.errors(model, build_steps(Model(model.config.to_dict()), specs, seed=0))
    assert found.logits < IDENTITY
    assert found.worst_gradient < GRADIENT, max(found.gradients, key=found.gradients.__getitem__)
    assert found.compared >= sum(parameter.numel() for parameter in model.parameters())


def test_layers_without_rotary_positions_stay_so_wherever_they_are_copied_to() -> None:
    model = tiny("smollm3", use_sliding_window=False).double()
    (step,) = build_steps(Model(model.config.to_dict()), [Stack(target_layers=6)], seed=0)
    assert model.config.no_rope_layers == [1, 0, 1]
    assert step.target.config["no_rope_layers"] == [1, 0, 1, 1, 0, 1]  # of 6 alone: 1, 0, 1, 0, ...
    (step,) = build_steps(Model(model.config.to_dict()), [LlamaPro(positions=(0,))], seed=0)
    assert step.target.config["no_rope_layers"] == [1, 1, 0, 1]
    assert oracle_growth.errors(model, [step]).logits < IDENTITY
    step.target.config["no_rope_layers"] = [1, 0, 1, 0]
    assert oracle_growth.errors(model, [step]).logits > 1e-3


def test_the_constants_of_granite_stay_whatever_grows() -> None:
    model = tiny("granite").double()
    config = model.config.to_dict()
    (step,) = build_steps(Model(config), [Width()], seed=0)
    names = [name for name in config if name.endswith(("_multiplier", "logits_scaling"))]
    assert len(names) == 4
    for name in names:
        assert step.target.config[name] == config[name]
        other = {**step.target.config, name: config[name] * 2**0.5}
        changed = replace(step, target=step.target.changed(other))
        assert oracle_growth.errors(model, [changed]).logits > 1e-3, name


# A norm over all heads


NORMED: dict[str, Width] = {
    "hidden size alone": Width(hidden_size=37),
    "copied with the hidden size": Width(init="net2net"),
    "copied, odd size": Width(init="zero_pad", hidden_size=31, num_attention_heads=8),
    "copied three times": Width(
        num_attention_heads=12, num_key_value_heads=6, head_strategy="copy"
    ),
    "in their groups": Width(num_attention_heads=8, head_strategy="gqa"),
}


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("case", NORMED)
@pytest.mark.parametrize("eps", [1e-3, 1e-6])
def test_heads_that_are_copied_alike_keep_their_common_norm(case: str, eps: float) -> None:
    model = tiny("olmo2", rms_norm_eps=eps, attention_bias=True).double()
    spec = NORMED[case]
    if case == "copied, odd size":
        spec = replace(spec, num_key_value_heads=4)
    found = oracle_growth.errors(model, build_steps(Model(model.config.to_dict()), [spec], seed=0))
    assert found.logits < IDENTITY
    assert found.worst_gradient < GRADIENT, max(found.gradients, key=found.gradients.__getitem__)


@pytest.mark.parametrize(
    "spec",
    [
        Width(num_attention_heads=8, num_key_value_heads=4),
        Width(init="net2net", num_attention_heads=6, num_key_value_heads=3),
        Width(num_attention_heads=6, num_key_value_heads=2, head_strategy="gqa"),
        Width(num_attention_heads=12, num_key_value_heads=4, head_strategy="gqa"),
    ],
    ids=["fresh", "half copied", "uneven groups", "groups of three out of two"],
)
def test_heads_that_would_change_their_common_norm_are_refused(spec: Width) -> None:
    config = tiny("olmo2").config.to_dict()
    with pytest.raises(RequestError, match="olmo2 normalises queries and keys over all heads"):
        build_steps(Model(config), [spec], seed=0)


def test_such_heads_stay_where_they_can_not_follow() -> None:
    config = tiny("olmo2").config.to_dict()
    kept = [Width(), Width(hidden_size=36), Width(init="net2net", hidden_size=36)]
    for spec in kept:
        (step,) = build_steps(Model(config), [spec], seed=0)
        assert step.target.config["num_attention_heads"] == 4
    (step,) = build_steps(Model(config), [Width(init="net2net")], seed=0)
    assert step.target.config["num_attention_heads"] == 8


def test_other_heads_shares_or_a_gain_that_follows_the_stream_are_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny("olmo2").double()
    config = model.config.to_dict()
    (step,) = build_steps(Model(config), [Width(init="net2net", hidden_size=60)], seed=0)
    maps = dict(step.parameter_map.tensors)
    for name, size in (("layers.0.attention.q_norm", 24), ("layers.1.attention.k_norm", 12)):
        axis = AxisFactor.gain(AxisMap.padded(size, size), rms_ratio=0.9)
        wrong = {**maps, name: replace(maps[name], axes=(axis,))}
        spoiled = replace(step, parameter_map=replace(step.parameter_map, tensors=wrong))
        assert oracle_growth.errors(model, [spoiled]).logits > 1e-3
    with monkeypatch.context() as patch:
        patch.setattr(type(family_of(config)), "norms_all_heads", False)
        fresh = build_steps(Model(config), [Width(num_attention_heads=8)], seed=0)
        assert oracle_growth.errors(model, fresh).logits > 1e-3
        unequal = build_steps(Model(config), [Width(init="net2net")], seed=0)
        found = oracle_growth.errors(model, unequal)
    assert found.logits < IDENTITY
    assert found.worst_gradient > 1e-3


# Matrices stacked in one tensor


@pytest.mark.parametrize("family", STACKED)
def test_rows_are_those_that_the_stock_class_takes_apart(tmp_path: Path, family: str) -> None:
    model = tiny(family)
    config = oracle_growth.config_of(model)
    (tmp_path / "stock").mkdir()
    model.save_pretrained(tmp_path / "stock")
    saved = load_file(tmp_path / "stock" / "model.safetensors")
    named = dict(Model(config).disk_tensors(model.state_dict()))
    assert named.keys() == saved.keys()
    assert all(torch.equal(named[name], saved[name]) for name in saved)
    logical = oracle_growth.logical_state(model)
    mlp, x = model.model.layers[1].mlp, torch.randn(5, 24)
    gate, up, down = (logical[f"layers.1.ffn.{part}"] for part in ("gate", "up", "down"))
    with torch.no_grad():
        by_hand = (mlp.activation_fn(x @ gate.T) * (x @ up.T)) @ down.T
        torch.testing.assert_close(mlp(x), by_hand)
    again = oracle.disk_tensors(
        Model(config),
        Model(config).live_tensors(oracle.disk_tensors(Model(config), model.state_dict())),
    )
    assert len(again) == len(logical)


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(
    ("family", "one", "other"),
    [
        ("phi3", "layers.0.ffn.gate", "layers.0.ffn.up"),
        ("glm4", "layers.1.ffn.gate", "layers.1.ffn.up"),
        ("phi3", "layers.0.attention.k", "layers.0.attention.v"),
    ],
)
def test_rows_in_each_others_place_are_seen(family: str, one: str, other: str) -> None:
    model = tiny(family).double()
    (step,) = build_steps(Model(model.config.to_dict()), [Width(init="zero_pad")], seed=0)
    maps = dict(step.parameter_map.tensors)
    maps[one], maps[other] = (replace(maps[name], source=name) for name in (other, one))
    swapped = replace(step, parameter_map=replace(step.parameter_map, tensors=maps))
    assert oracle_growth.errors(model, [step]).logits < IDENTITY
    assert oracle_growth.errors(model, [swapped]).logits > 1e-3


def test_a_live_model_is_expanded_as_a_folder_is() -> None:
    model = tiny("phi3")
    grown = ModelExpander([Width(init="net2net"), LlamaPro()]).expand(model).eval()
    assert grown.model.layers[0].self_attn.qkv_proj.weight.shape == (96, 48)
    assert oracle.relative_difference(model, grown, oracle.tokens()) < STOCK


@pytest.mark.parametrize("family", STACKED)
def test_growth_says_why_it_has_no_place_there(family: str) -> None:
    with pytest.raises(RequestError, match=f"{family} stores gate and up as one tensor"):
        FfnBlock.all_of(tiny(family))
    config = {**tiny(family).config.to_dict(), "ffn_sizes": [40, 30, 20]}
    with pytest.raises(RequestError, match=r"ffn_sizes: .*gate and up as one tensor"):
        check_config(Model(config))


LONG: dict[str, Any] = {
    "hidden_size": 32,
    "head_dim": 8,
    "original_max_position_embeddings": 32,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "partial_rotary_factor": 0.75,
        "short_factor": [1.0, 1.5, 2.0],
        "long_factor": [2.0, 4.0, 5.0],
        "original_max_position_embeddings": 32,
    },
}


def test_longrope_keeps_its_factors_where_heads_grow_in_proportion(tmp_path: Path) -> None:
    model = tiny("phi3", **LONG)
    source = oracle.saved(model, tmp_path / "source")
    after = oracle.stock(expand(source, tmp_path / "result", [Width(), LlamaPro()]).folder)
    assert (after.config.hidden_size, after.config.num_attention_heads) == (64, 8)
    for length in (17, 40):  # within the original window and beyond
        ids = oracle.tokens(length=length)
        assert oracle.relative_difference(model, after, ids) < STOCK
    with pytest.raises(RequestError, match=r"hidden_size // num_attention_heads = 8.* become 10"):
        expand(source, tmp_path / "refused", [Width(hidden_size=40)])
    assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("phi3", {}, "fraction of 0.75 of each head is rotated"),
        ("phi3", LONG, "LongRoPE"),
        ("glm4", {}, r"glm4 rotates coordinates 2i and 2i \+ 1 together"),
    ],
)
def test_heads_are_not_split_where_other_pairs_are_turned(
    family: str, options: dict[str, Any], message: str
) -> None:
    config = tiny(family, **{"head_dim": 8, **options}).config.to_dict()
    with pytest.raises(RequestError, match=message):
        build_steps(Model(config), [Width(head_strategy="split")], seed=0)


@pytest.mark.parametrize("family", FURTHER)
def test_none_has_a_partner_with_experts_that_would_compute_the_same(family: str) -> None:
    with pytest.raises(RequestError, match="has no MoE partner"):
        build_steps(Model(tiny(family).config.to_dict()), [Moe()], seed=0)
