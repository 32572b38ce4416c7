"""Families with LayerNorm: exactness, refusals and typical mistakes.

A LayerNorm subtracts the mean over the stream, so the stream only grows by whole copies. The slow
suite runs the generic tests over these families.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from tests import oracle
from tests.oracle import growth as oracle_growth
from tests.oracle.families import LAYER_NORM, layers_of, tiny
from tritter import GrowableCausalLM
from tritter.checkpoints.state import State, write_state
from tritter.core.expansions import (
    Dus,
    ExpansionSpec,
    LlamaPro,
    ResolvedExpansion,
    Stack,
    Width,
    build_steps,
)
from tritter.core.families import Model
from tritter.core.models import read_model
from tritter.core.parameter_map import AxisFactor, AxisMap, TensorMap
from tritter.errors import RequestError, TritterError
from tritter.storage.tensors import TensorHeader
from tritter.storage.writer import TensorStream
from tritter.transform import expand
from tritter.transform.live import ModelExpander, expand_attention_heads

IDENTITY, STOCK, GRADIENT, SEEN = 1e-10, 1e-4, 1e-9, 1e-4
OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "gpt_neox": {
        "parallel, untied": {"use_parallel_residual": True},
        "one after the other, tied": {"use_parallel_residual": False, "tie_word_embeddings": True},
        "no biases, all turned": {"attention_bias": False, "rotary_pct": 1.0},
        "another activation, small eps": {"hidden_act": "gelu_new", "rms_norm_eps": 1e-6},
    },
    "gpt2": {
        "tied, an FFN of four times": {"tie_word_embeddings": True, "intermediate_size": None},
        "untied, another activation": {"tie_word_embeddings": False, "hidden_act": "relu"},
        "scores unscaled, small eps": {"scale_attn_weights": False, "rms_norm_eps": 1e-6},
    },
}
EXACT: dict[str, list[ExpansionSpec]] = {
    "doubled": [Width(init="net2net")],
    "three times, fresh heads": [
        Width(init="net2net", hidden_size=72, intermediate_size=101, head_strategy="fresh")
    ],
    "FFN, then depth": [Width(intermediate_size=107), LlamaPro()],
    "depth, then doubled": [Dus(identity_init=True), Width(init="net2net", shares="equal")],
}


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(("family", "options"), [(f, o) for f in OPTIONS for o in OPTIONS[f]])
@pytest.mark.parametrize("specs", EXACT)
def test_function_and_gradient_are_kept(family: str, options: str, specs: str) -> None:
    model = tiny(family, **OPTIONS[family][options]).double()
    found = oracle_growth.errors(model, _steps(model, *EXACT[specs]))
    assert found.logits < IDENTITY
    assert found.worst_gradient < GRADIENT, max(found.gradients, key=found.gradients.__getitem__)
    assert found.compared >= sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("family", LAYER_NORM)
def test_new_heads_and_copies_get_a_gradient(family: str) -> None:
    model = tiny(family, vocab_size=31, max_position_embeddings=24)
    spec = Width(init="net2net", head_strategy="fresh")
    grown = oracle_growth.grown(model, _steps(model, spec, LlamaPro()))
    optimizer = torch.optim.AdamW(grown.parameters(), lr=1e-3, weight_decay=0.0)
    for step in range(3):
        gradients = oracle.gradients(grown, oracle.tokens(31, batch=8, length=24, seed=step))
        optimizer.step()
    if family == "gpt2":
        gradients["transformer.wpe.weight"][-1] = 1.0  # the last token has no loss
    by_name = oracle.disk_tensors(Model(oracle_growth.config_of(grown)), gradients)
    dead = {name for name, value in by_name.items() if not bool(value.ne(0).all())}
    # Without rotary embeddings (half of the dimensions of gpt_neox), a constant added to all keys
    # changes no attention weights: the gradient is zero up to rounding
    keys = ("c_attn.k.bias", "query_key_value.bias")
    assert {name for name in dead if not name.endswith(keys)} == set()


# Refusals


@pytest.mark.quick_cases(7)
@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (Width(), "LayerNorm, which subtracts the mean.*init=net2net with .*hidden_size=48"),
        (Width(init="zero_pad"), "init = zero_pad: .*init=net2net with .*hidden_size=48"),
        (Width(init="net2net", hidden_size=36), "hidden_size = 36 .*hidden_size=48"),
        (Width(init="net2net", hidden_size=60), "hidden_size=48 or 72"),
        (Width(num_attention_heads=8), "num_attention_heads = 8: .*size of 6, .*it must be 4"),
        (Width(num_key_value_heads=2, init="net2net"), "num_key_value_heads = 2"),
        (Width(init="net2net", head_strategy="gqa"), "head_strategy = gqa: .*use copy or fresh"),
        (Width(init="net2net", head_strategy="split"), "head_strategy = split"),
    ],
    ids=str,
)
@pytest.mark.parametrize("family", LAYER_NORM)
def test_what_would_not_be_exact_says_what_is(family: str, spec: Width, message: str) -> None:
    with pytest.raises(RequestError, match=message) as error:
        _steps(tiny(family), spec)
    assert family in str(error.value) or "smaller than" in str(error.value)


def test_a_hidden_size_that_the_heads_do_not_divide_is_refused() -> None:
    config = {**tiny("gpt_neox").config.to_dict(), "hidden_size": 25}
    with pytest.raises(RequestError, match=r"hidden_size = 25 is not a multiple of .* = 4"):
        assert Model(config).sizes


def test_one_attention_alone_has_no_other_number_of_heads() -> None:
    attention = tiny("gpt_neox").base_model.layers[0].attention
    for strategy in ("fresh", "copy"):
        with pytest.raises(RequestError, match="num_attention_heads = 12"):
            expand_attention_heads(attention, 12, strategy)


# Mistakes


def test_new_directions_beside_the_old_ones_are_seen() -> None:
    """The reason for the refusal: the map for an RMSNorm fails with every eps."""
    model = tiny("gpt_neox").double()
    (right,) = _steps(model, Width(init="net2net"))
    fresh = Width().parameter_map(right.source, right.target, seed=0)
    for eps in (1e-3, 0.5e-3, 2e-3):
        target = {**right.target.config, "layer_norm_eps": eps}
        spoiled = replace(right, parameter_map=fresh, target=right.target.changed(target))
        assert oracle_growth.errors(model, [spoiled]).logits > 1e-2


def test_coordinates_copied_unequally_often_are_seen() -> None:
    """24 to 72, where half of the stream has four copies and the other half two."""
    model = tiny("gpt_neox").double()
    half = torch.arange(12)
    source = torch.cat([half.repeat(4), (half + 12).repeat(2)])
    shares = torch.cat([torch.full((48,), 1 / 4), torch.full((24,), 1 / 2)])
    stream = AxisMap.copied(24, source, shares)
    (step,) = _steps(model, Width(init="net2net", hidden_size=72))
    assert (
        oracle_growth.errors(model, [_with_stream(step, AxisMap.tiled(24, 72))]).logits < IDENTITY
    )
    assert oracle_growth.errors(model, [_with_stream(step, stream)]).logits > 1e-2


def test_unequal_shares_of_the_stream_keep_the_function_and_break_the_gradient() -> None:
    model = tiny("gpt_neox").double()
    (step,) = _steps(model, Width(init="net2net"))
    shares = torch.tensor([0.9, 0.1], dtype=torch.float64).repeat_interleave(24)
    stream = AxisMap.copied(24, [*range(24), *range(24)], shares)
    found = oracle_growth.errors(model, [_with_stream(step, stream)])
    assert found.logits < IDENTITY
    assert found.worst_gradient > 1e-2


def test_an_eps_that_follows_as_behind_an_rmsnorm_is_seen() -> None:
    model = tiny("gpt_neox", rms_norm_eps=1e-3).double()
    (step,) = _steps(model, Width(init="net2net"))
    assert step.target.config["layer_norm_eps"] == 1e-3
    assert "rms_norm_eps" not in step.target.config
    target = step.target.changed({**step.target.config, "layer_norm_eps": 0.5e-3})
    assert oracle_growth.errors(model, [replace(step, target=target)]).logits > SEEN


def test_q_k_and_v_in_blocks_in_place_of_heads_are_seen() -> None:
    """The tensor stores q, k and v head by head, not all of q first."""
    model = tiny("gpt_neox").double()
    (step,) = _steps(model, Width(init="net2net"))
    block = torch.arange(24).repeat(2)
    blocks = AxisMap.copied(72, torch.cat([block, block + 24, block + 48]), torch.full((144,), 0.5))
    maps = step.parameter_map.tensors
    changed = {}
    for name in maps:
        if ".attention.qkv" in name:
            changed[name] = _with_axis(maps[name], 0, AxisFactor.writes_nonlinear(blocks))
    assert len(changed) == 6
    assert oracle_growth.errors(model, [_with_maps(step, changed)]).logits > 1e-2


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize(
    ("name", "position"),
    [
        ("embed", 1),
        ("layers.0.attention_norm", 0),
        ("layers.1.attention_norm_bias", 0),
        ("layers.0.attention.qkv", 0),
        ("layers.1.attention.qkv", 1),
        ("layers.2.attention.qkv_bias", 0),
        ("layers.0.attention.o", 0),
        ("layers.1.attention.o", 1),
        ("layers.2.attention.o_bias", 0),
        ("layers.0.ffn_norm_bias", 0),
        ("layers.0.ffn.up", 0),
        ("layers.1.ffn.up", 1),
        ("layers.2.ffn.up_bias", 0),
        ("layers.0.ffn.down", 0),
        ("layers.1.ffn.down", 1),
        ("layers.2.ffn.down_bias", 0),
        ("final_norm", 0),
        ("final_norm_bias", 0),
        ("head", 1),
    ],
)
def test_one_permuted_index_is_seen(name: str, position: int) -> None:
    model = tiny("gpt_neox").double()
    (step,) = _steps(model, Width(init="net2net"))
    tensor_map = step.parameter_map.tensors[name]
    axis = tensor_map.axes[position]
    assert axis is not None
    moved = _with_axis(tensor_map, position, replace(axis, index=axis.index.roll(1)))
    assert oracle_growth.errors(model, [_with_maps(step, {name: moved})]).logits > SEEN


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("kind", ["attention.o", "attention.o_bias", "ffn.down", "ffn.down_bias"])
@pytest.mark.parametrize("is_parallel", [False, True])
def test_one_output_that_is_not_zeroed_is_seen(kind: str, is_parallel: bool) -> None:
    model = tiny("gpt_neox", use_parallel_residual=is_parallel).double()
    (step,) = _steps(model, Stack(identity_init=True))
    maps = step.parameter_map.tensors
    (name, *_) = [name for name in maps if name.endswith(kind) and maps[name].is_zeroed]
    forgotten = _with_maps(step, {name: replace(maps[name], is_zeroed=False)})
    assert oracle_growth.errors(model, [step]).logits < IDENTITY
    assert oracle_growth.errors(model, [forgotten]).logits > SEEN


# Folders


def as_on_the_hub(folder: Path) -> Path:
    """Add the masks, frequencies and older config keys of Pythia checkpoints to a folder."""
    file, text = folder / "model.safetensors", folder / "config.json"
    tensors = load_file(file)
    for layer in range(3):
        name = f"gpt_neox.layers.{layer}.attention."
        tensors[name + "bias"] = torch.ones(1, 1, 64, 64, dtype=torch.bool).tril()
        tensors[name + "masked_bias"] = torch.tensor(-1e9)
        tensors[name + "rotary_emb.inv_freq"] = torch.rand(1)
    save_file(tensors, file, metadata={"format": "pt"})
    plain = json.loads(text.read_text())
    rope = plain.pop("rope_parameters")
    plain |= {"rotary_pct": rope["partial_rotary_factor"], "rotary_emb_base": rope["rope_theta"]}
    text.write_text(json.dumps(plain))
    return folder


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("is_sharded", [False, True])
def test_a_folder_as_on_the_hub_is_grown_and_loads_in_stock_transformers(
    tmp_path: Path, is_sharded: bool
) -> None:
    model = tiny("gpt_neox", rotary_pct=0.25, hidden_size=32)
    source = as_on_the_hub(oracle.saved(model, tmp_path / "source"))
    if is_sharded:
        shard = source / "model-00001-of-00001.safetensors"
        (source / "model.safetensors").rename(shard)
        index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(shard), shard.name)}
        (source / "model.safetensors.index.json").write_text(json.dumps(index))
    result = expand(source, tmp_path / "result", [Width(init="net2net"), LlamaPro()])
    after = oracle.stock(result.folder)
    assert oracle.relative_difference(model, after, oracle.tokens()) < STOCK
    assert sum(p.numel() for p in after.parameters()) == result.parameters_after
    config = read_model(result.folder).config
    assert config["rope_parameters"]["partial_rotary_factor"] == 0.25  # type: ignore[index]
    names = set(load_file(result.folder / "model.safetensors"))
    assert "embed_out.weight" in names
    assert not any(name.endswith(("attention.bias", "inv_freq")) for name in names)


def test_a_head_by_its_name_in_memory_is_the_head(tmp_path: Path) -> None:
    model = tiny("gpt_neox")
    folder = oracle.saved(model, tmp_path / "source")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors.pop("embed_out.weight")
    save_file(tensors, file, metadata={"format": "pt"})
    after = oracle.stock(expand(folder, tmp_path / "result", [LlamaPro()]).folder)
    assert oracle.relative_difference(model, after, oracle.tokens()) < STOCK
    del tensors["gpt_neox.layers.1.mlp.dense_h_to_4h.bias"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(TritterError, match=r"1 tensors are missing: .*1\.mlp\.dense_h_to_4h\.bias"):
        expand(folder, tmp_path / "refused", [LlamaPro()])


def test_a_live_model_is_expanded_as_a_folder_is() -> None:
    model = tiny("gpt_neox")
    grown = ModelExpander([Width(init="net2net"), LlamaPro()]).expand(model).eval()
    assert grown.base_model.layers[0].attention.query_key_value.weight.shape == (144, 48)
    assert oracle.relative_difference(model, grown, oracle.tokens()) < STOCK


def test_state_has_the_names_on_disk_and_follows(tmp_path: Path) -> None:
    """Anchors are mapped like weights, so they still equal the weights of the model."""
    model = tiny("gpt_neox")
    config = oracle_growth.config_of(model)
    state = oracle.disk_tensors(
        Model(config), {name: p.detach() for name, p in model.named_parameters()}
    )
    assert "embed_out.weight" in state
    again = Model(config).live_tensors(state)
    assert all(torch.equal(again[name], p) for name, p in model.named_parameters())
    source = oracle.saved(model, tmp_path / "source")
    entries = tuple(TensorHeader.of(name, p.dtype, tuple(p.shape)) for name, p in state.items())
    kinds = {"anchor": TensorStream(entries, iter(state.items()))}
    write_state(source, kinds, step=3, max_shard_bytes=10**9)
    result = expand(source, tmp_path / "result", [Width(init="net2net"), LlamaPro()])
    stored_state, grown = State.read(result.folder), load_file(result.folder / "model.safetensors")
    assert stored_state is not None
    for name in grown:
        assert torch.equal(stored_state.kinds["anchor"].get(name), grown[name]), name


# Neurons


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize("family", LAYER_NORM)
@pytest.mark.parametrize("initialiser", ["gradmax", "split", "random"])
def test_ffns_without_gates_grow_neurons(family: str, initialiser: str) -> None:
    stock, ids = tiny(family).double(), oracle.tokens()
    model = GrowableCausalLM(
        stock, trigger="schedule", growth_cooldown=1, max_growth_per_step=4, initialiser=initialiser
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    oracle.gradients(model, ids)
    optimizer.step()
    before = oracle.logits(model, ids)
    with oracle.float64_casts():
        assert model.check_and_grow()["born"] == 12
    assert float((oracle.logits(model, ids) - before).abs().max()) < 1e-6
    mlp = layers_of(stock)[0].mlp
    if family == "gpt2":
        assert mlp.c_fc.weight.shape == (24, 44) and mlp.c_fc.nf == mlp.c_proj.nx == 44
    else:
        assert mlp.dense_h_to_4h.weight.shape == (44, 24)
    oracle.gradients(model, ids)
    optimizer.step()
    after = oracle.logits(model, ids)
    assert float((after - before).abs().max()) > 1e-4


def _steps(model: PreTrainedModel, *specs: ExpansionSpec) -> tuple[ResolvedExpansion, ...]:
    return tuple(build_steps(Model(oracle_growth.config_of(model)), list(specs), seed=0))


def _with_maps(step: ResolvedExpansion, changed: dict[str, TensorMap]) -> ResolvedExpansion:
    tensors = {**step.parameter_map.tensors, **changed}
    return replace(step, parameter_map=replace(step.parameter_map, tensors=tensors))


def _with_axis(tensor_map: TensorMap, position: int, factor: AxisFactor) -> TensorMap:
    axes = list(tensor_map.axes)
    axes[position] = factor
    return replace(tensor_map, axes=tuple(axes))


def _with_stream(step: ResolvedExpansion, stream: AxisMap) -> ResolvedExpansion:
    """Replace the map of the residual stream and of the outputs of its norms."""
    config, changed = step.source.config, {}
    for tensor in Model(config).tensors:
        tensor_map = step.parameter_map.tensors[tensor.name]
        for position, axis in enumerate(tensor.axes):
            if axis.space.size != "hidden_size":
                continue
            match axis.port.name:
                case "WRITE":
                    factor = AxisFactor.writes(stream)
                case "READ":
                    factor = AxisFactor.reads(stream)
                case _:
                    factor = AxisFactor.gain(stream, rms_ratio=1.0)
            tensor_map = _with_axis(tensor_map, position, factor)
        changed[tensor.name] = tensor_map
    return _with_maps(step, changed)
