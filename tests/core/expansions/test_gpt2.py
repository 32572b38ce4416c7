"""GPT-2: transposed matrices, learned positions, names on the hub, and refusals.

test_layer_norm.py tests its common features with other LayerNorm families.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from tests import oracle
from tests.oracle import growth as oracle_growth
from tests.oracle.families import tiny
from tritter.checkpoints import Source
from tritter.checkpoints.state import State, write_state
from tritter.cli.inspect import _count_parameters_by_part
from tritter.core.expansions import (
    Dus,
    ExpansionSpec,
    Interpolate,
    LlamaPro,
    Moe,
    ResolvedExpansion,
    Stack,
    Width,
    build_steps,
)
from tritter.core.families import Model, training_flops
from tritter.core.models import load_model, read_model
from tritter.core.parameter_map import AxisFactor, AxisMap
from tritter.core.parameter_map.carry import MOMENTS
from tritter.errors import RequestError, TritterError
from tritter.storage.tensors import TensorHeader
from tritter.storage.writer import TensorStream
from tritter.training.parameters import live_layout
from tritter.training.surgery import _moments_by_name
from tritter.transform import expand, plan_expansion
from tritter.transform.live import ModelExpander

IDENTITY, STOCK, SEEN = 1e-10, 1e-4, 1e-4
GROWN: list[ExpansionSpec] = [Width(init="net2net"), LlamaPro()]


def as_on_the_hub(model: PreTrainedModel, folder: Path) -> Path:
    """Save a model as in openai-community/gpt2: the body only, with mask buffers."""
    oracle.saved(model, folder)
    file, text = folder / "model.safetensors", folder / "config.json"
    tensors = {name.removeprefix("transformer."): each for name, each in load_file(file).items()}
    assert "wte.weight" in tensors and "lm_head.weight" not in tensors
    for layer in range(model.config.n_layer):
        tensors[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 64, 64).tril()
        tensors[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(tensors, file, metadata={"format": "pt"})
    plain = json.loads(text.read_text())
    plain = {key: value for key, value in plain.items() if key not in ("n_inner", "dtype")}
    text.write_text(json.dumps({**plain, "n_ctx": 64, "task_specific_params": {}}))
    return folder


def hub_model() -> PreTrainedModel:
    return tiny("gpt2", tie_word_embeddings=True, intermediate_size=96)


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("is_sharded", [False, True])
def test_a_folder_as_on_the_hub_is_grown_and_loads_in_stock_transformers(
    tmp_path: Path, is_sharded: bool
) -> None:
    model = hub_model()
    source = as_on_the_hub(model, tmp_path / "source")
    if is_sharded:
        shard = source / "model-00001-of-00001.safetensors"
        (source / "model.safetensors").rename(shard)
        index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(shard), shard.name)}
        (source / "model.safetensors.index.json").write_text(json.dumps(index))
    assert oracle.relative_difference(model, load_model(source), oracle.tokens()) < STOCK
    result = expand(source, tmp_path / "result", GROWN)
    after = oracle.stock(result.folder)
    assert oracle.relative_difference(model, after, oracle.tokens()) < STOCK
    assert sum(p.numel() for p in after.parameters()) == result.parameters_after
    config = read_model(result.folder).config
    sizes = [config[key] for key in ("n_embd", "n_inner", "n_layer", "n_head", "n_positions")]
    assert sizes == [48, 192, 5, 8, 64]
    names = set(load_file(result.folder / "model.safetensors"))
    assert names == {name for name, _ in Model(config).disk_tensors(after.state_dict())}
    assert all(name.startswith("transformer.") for name in names)


def test_a_tied_head_beside_the_hubs_names_is_the_embedding_or_is_refused(tmp_path: Path) -> None:
    source = as_on_the_hub(hub_model(), tmp_path / "source")
    file = source / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["wte.weight"].clone()
    save_file(tensors, file, metadata={"format": "pt"})
    expand(source, tmp_path / "result", [LlamaPro()])
    tensors["lm_head.weight"][3, 4] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(TritterError, match=r"lm_head\.weight differs from wte\.weight"):
        expand(source, tmp_path / "refused", [LlamaPro()])


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("is_padded", [False, True])
def test_what_lies_transposed_is_read_in_blocks_of_any_size(
    tmp_path: Path, is_padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Short rows in bf16: equal bit for bit to maps on whole tensors."""
    monkeypatch.setattr("tritter.core.parameter_map.rows._BLOCK_ENTRIES", 100)
    model = hub_model().bfloat16()
    source = oracle.saved(model, tmp_path / "source")
    specs: list[ExpansionSpec] = [Width(intermediate_size=107)] if is_padded else GROWN
    result = expand(source, tmp_path / "result", specs)
    live = dict(
        read_model(result.folder).disk_tensors(ModelExpander(specs).expand(model).state_dict())
    )
    written = load_file(result.folder / "model.safetensors")
    assert written.keys() == live.keys()
    assert all(torch.equal(written[name], live[name]) for name in live)


@pytest.mark.full
def test_moments_and_importances_follow(tmp_path: Path) -> None:
    """State is stored with outputs first and q, k and v separate, and restored unchanged."""
    model = hub_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    oracle.gradients(model, oracle.tokens())
    optimizer.step()
    source = oracle.saved(model, tmp_path / "source")
    by_name = _moments_by_name(optimizer, model, live_layout(model))
    tensors = {part.tensor.name: part.tensor for s in live_layout(model) for part in s.parts}
    kinds = {}
    for kind in MOMENTS:
        on_disk = {tensors[name].disk_name: each[kind] for name, each in by_name.items()}
        entries = tuple(
            TensorHeader.of(name, v.dtype, tuple(v.shape)) for name, v in on_disk.items()
        )
        kinds[kind] = TensorStream(entries, iter(on_disk.items()))
    write_state(source, kinds, step=1, max_shard_bytes=10**9)
    state = State.read(source)
    assert state is not None
    assert state.kinds["exp_avg"].shape("transformer.h.0.mlp.c_fc.weight") == (96, 24)
    assert state.kinds["exp_avg"].shape("transformer.h.0.attn.c_attn.k.weight") == (24, 24)
    result = expand(source, tmp_path / "result", [Width(init="net2net", shares="equal")])
    grown, carried = load_model(result.folder), State.read(result.folder)
    assert carried is not None
    oracle.gradients(grown, oracle.tokens())
    for stored in live_layout(grown):
        whole = grown.get_parameter(stored.name).grad
        assert whole is not None
        for part in stored.parts:
            # After one step the first moment is a tenth of the gradient, also in the grown model
            found = carried.kinds["exp_avg"].get(part.tensor.disk_name)
            error = (found - 0.1 * part.of(whole)).abs().max()
            assert float(error / whole.abs().max()) < 1e-5, part.tensor.name


# Mistakes


def _step(model: PreTrainedModel, spec: ExpansionSpec) -> ResolvedExpansion:
    (step,) = build_steps(Model(oracle_growth.config_of(model)), [spec], seed=0)
    return step


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize(
    ("name", "position"),
    [
        ("embed", 1),
        ("embed_positions", 1),
        ("layers.0.attention_norm", 0),
        ("layers.1.attention_norm_bias", 0),
        ("layers.0.attention.q", 0),
        ("layers.1.attention.q", 1),
        ("layers.0.attention.q_bias", 0),
        ("layers.1.attention.k", 0),
        ("layers.2.attention.k", 1),
        ("layers.2.attention.v", 0),
        ("layers.0.attention.v", 1),
        ("layers.1.attention.v_bias", 0),
        ("layers.0.attention.o", 0),
        ("layers.1.attention.o", 1),
        ("layers.2.attention.o_bias", 0),
        ("layers.0.ffn.up", 0),
        ("layers.1.ffn.up", 1),
        ("layers.2.ffn.up_bias", 0),
        ("layers.0.ffn.down", 0),
        ("layers.1.ffn.down", 1),
        ("layers.2.ffn.down_bias", 0),
        ("final_norm", 0),
        ("final_norm_bias", 0),
    ],
)
def test_one_permuted_index_is_seen(name: str, position: int) -> None:
    model = tiny("gpt2", tie_word_embeddings=True).double()
    step = _step(model, Width(init="net2net"))
    axes = list(step.parameter_map.tensors[name].axes)
    axis = axes[position]
    assert axis is not None
    axes[position] = replace(axis, index=axis.index.roll(1))
    assert oracle_growth.errors(model, [_spoiled(step, name, tuple(axes))]).logits > SEEN


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("name", ["layers.0.attention.q", "layers.1.attention.o"])
def test_a_square_matrix_that_is_not_turned_is_seen(name: str) -> None:
    """The shape of o is ambiguous: fresh heads are outputs of q, and inputs of o."""
    model = tiny("gpt2").double()
    step = _step(model, Width(init="net2net", head_strategy="fresh"))
    assert oracle_growth.errors(model, [step]).logits < IDENTITY
    axes = step.parameter_map.tensors[name].axes
    assert oracle_growth.errors(model, [_spoiled(step, name, axes[::-1])]).logits > SEEN


def test_q_k_and_v_head_by_head_are_seen() -> None:
    """The tensor stores all of q first, not q, k and v head by head."""
    model = tiny("gpt2").double()
    step = _step(model, Width(init="net2net", shares="equal"))
    shifted = AxisFactor.writes_nonlinear(
        AxisMap.copied(24, torch.arange(24).repeat_interleave(2), torch.full((48,), 0.5))
    )
    axes = step.parameter_map.tensors["layers.0.attention.k"].axes
    spoiled = _spoiled(step, "layers.0.attention.k", (shifted, *axes[1:]))
    assert oracle_growth.errors(model, [step]).logits < IDENTITY
    assert oracle_growth.errors(model, [spoiled]).logits > SEEN


def _spoiled(
    step: ResolvedExpansion, name: str, axes: tuple[AxisFactor | None, ...]
) -> ResolvedExpansion:
    maps = step.parameter_map.tensors
    tensors = {**maps, name: replace(maps[name], axes=axes)}
    return replace(step, parameter_map=replace(step.parameter_map, tensors=tensors))


# Layers that depend on their index, and other refusals


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize(
    "spec", [Dus(identity_init=True), LlamaPro(), Stack(), Interpolate()], ids=lambda s: s.name
)
def test_layers_that_know_their_number_stay_where_they_are(spec: ExpansionSpec) -> None:
    model = tiny("gpt2", scale_attn_by_inverse_layer_idx=True).double()
    with pytest.raises(RequestError, match=rf"expansion\.{spec.name}: .*inverse_layer_idx = true"):
        _step(model, spec)
    for width in (Width(init="net2net"), Width(intermediate_size=50)):
        assert oracle_growth.errors(model, [_step(model, width)]).logits < IDENTITY


def test_moe_is_refused() -> None:
    with pytest.raises(RequestError, match="gpt2 has no MoE partner"):
        _step(tiny("gpt2"), Moe(num_experts=2))


@pytest.mark.quick_cases(4)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"add_cross_attention": True}, "add_cross_attention = True; cross-attention is not"),
        ({"hidden_size": 48}, "hidden_size = 48; gpt2 calls this n_embd"),
        ({"n_positions": 0}, "n_positions = 0; must be a whole number ≥ 1"),
        ({"n_positions": None}, "'n_positions' expected int"),
        ({"n_positions": 10**12}, "n_positions = 1000000000000; must be at most"),
        ({"n_positions": 63}, "wpe.weight has shape"),
        ({"n_embd": 25}, "n_embd = 25 is not a multiple of n_head = 4"),
        ({"n_inner": "wide"}, "n_inner = 'wide'; must be a whole number"),
        ({"n_head": 0}, "n_head = 0"),
        ({"layer_norm_epsilon": -1}, "layer_norm_epsilon = -1"),
    ],
    ids=str,
)
def test_a_config_that_is_none_names_the_key(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    source = as_on_the_hub(hub_model(), tmp_path / "source")
    text = source / "config.json"
    text.write_text(json.dumps({**json.loads(text.read_text()), **change}))
    with pytest.raises(TritterError, match=message):
        expand(source, tmp_path / "result", [LlamaPro()])
    assert not (tmp_path / "result").exists()


def test_a_plan_says_sizes_as_config_json_has_them(tmp_path: Path) -> None:
    source = as_on_the_hub(hub_model(), tmp_path / "source")
    (step,) = plan_expansion(source, [Width(init="net2net")]).steps
    assert "n_embd 24 → 48" in step.notes[0] and "n_inner 96 → 192" in step.notes[0]
    assert step.target.config["n_inner"] == 192
    (step,) = plan_expansion(source, [LlamaPro()]).steps
    assert step.target.config["n_layer"] == 5 and step.target.config["n_inner"] is None


def test_positions_alone_that_are_trained_take_gradients_down_to_them() -> None:
    model = tiny("gpt2", attn_implementation="eager")
    ids = oracle.tokens(batch=1, length=20)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name == "transformer.wpe.weight")
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    flops = training_flops(
        Model(model.config.to_dict()), is_trained=lambda t: t.name == "embed_positions"
    )
    whole = flops.matrices * 20 + sum(flops.attention.values()) * 20**2
    assert whole == counter.get_total_flops()


def test_the_loss_is_named(tmp_path: Path) -> None:
    """transformers derives the loss from the class name, which fails for this class, and warns."""
    model = load_model(as_on_the_hub(hub_model(), tmp_path / "source"))
    ids = oracle.tokens()
    loss = model(input_ids=ids, labels=ids).loss
    expected = torch.nn.functional.cross_entropy(
        model(input_ids=ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    )
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    assert model.loss_type == "ForCausalLM"


def test_inspect_counts_every_tensor_as_some_part(tmp_path: Path) -> None:
    source = as_on_the_hub(hub_model(), tmp_path / "source")
    opened = Source.open(source, read_model(source))
    parts = _count_parameters_by_part(opened)
    assert parts["positions"] == 64 * 24 and parts["embedding"] == 97 * 24
    assert sum(parts.values()) == sum(p.numel() for p in load_model(source).parameters())
