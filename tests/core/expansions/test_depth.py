"""Depth methods: refusals, maps and the layers of the result."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests import oracle
from tritter import api
from tritter.core.expansions import (
    Dus,
    ExpansionSpec,
    Interpolate,
    Layers,
    LlamaPro,
    Stack,
    build_steps,
    target_model,
)
from tritter.core.families import FAMILIES, Config, Model
from tritter.core.models import new_model
from tritter.errors import RequestError
from tritter.transform import expand


def _config(layers: int, *, is_tied: bool = False) -> Config:
    return {
        "model_type": "llama",
        "vocab_size": 31,
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": is_tied,
    }


@pytest.mark.parametrize(
    ("layers", "options", "expected"),
    [
        (4, {"target_layers": 7}, ["target_layers = 7", "6, 8", "nearest: 6"]),
        (4, {"target_layers": 4}, ["target_layers = 4", "nearest: 6"]),
        (4, {"target_layers": 9}, ["target_layers = 9", "nearest: 8"]),
        (32, {"target_layers": 100}, ["34, 36, 38, …, 64", "nearest: 64"]),
        (4, {"drop_layers": 2}, ["drop_layers = 2", "dropping 1, 0", "nearest: 1"]),
        (4, {"drop_layers": 9}, ["drop_layers = 9", "nearest: 1"]),
        (
            24,
            {"target_layers": 48, "drop_layers": 8},
            ["drop_layers = 8: it contradicts", "48 need 0", "gives 32"],
        ),
    ],
)
def test_dus_refuses_with_what_would_work(
    layers: int, options: dict[str, int], expected: list[str]
) -> None:
    with pytest.raises(RequestError) as error:
        Dus(**options).target_config(Model(_config(layers)))
    assert "expansion.dus." in str(error.value)
    for phrase in expected:
        assert phrase in str(error.value)


@pytest.mark.parametrize(
    ("layers", "spec", "expected"),
    [
        (4, Stack(target_layers=10), ["target_layers = 10", "nearest: 8 or 12", "first 2 layers"]),
        (4, Stack(target_layers=6), ["whole copies of the 4", "nearest: 8.", "stack.partial"]),
        (4, Stack(target_layers=5), ["nearest: 8.", "first 1 layer."]),
        (4, Stack(target_layers=4), ["already has 4 layers", "at least 8."]),
        (4, Stack(target_layers=2), ["at least 8."]),
        (4, Stack(target_layers=4, partial=True), ["at least 5."]),
        (4, Interpolate(target_layers=4), ["already has 4 layers", "at least 5."]),
        (4, Interpolate(target_layers=2), ["at least 5."]),
    ],
    ids=str,
)
def test_stack_and_interpolate_refuse_with_what_would_work(
    layers: int, spec: Stack | Interpolate, expected: list[str]
) -> None:
    with pytest.raises(RequestError) as error:
        spec.target_config(Model(_config(layers)))
    assert f"expansion.{spec.name}.target_layers = {spec.target_layers}" in str(error.value)
    for phrase in expected:
        assert phrase in str(error.value)


@pytest.mark.parametrize(
    ("layers", "spec", "target"),
    [
        (3, Stack(), 6),
        (3, Stack(target_layers=9), 9),
        (3, Stack(target_layers=7, partial=True), 7),
        (3, Stack(partial=True), 6),
        (3, Interpolate(), 5),
        (4, Interpolate(), 6),
        (4, Interpolate(target_layers=21), 21),
        (1, Interpolate(), 2),
        (3, Dus(), 4),
        (3, LlamaPro(), 5),
    ],
    ids=str,
)
def test_layers_afterwards(layers: int, spec: ExpansionSpec, target: int) -> None:
    assert target_model(Model(_config(layers)), [spec]).config["num_hidden_layers"] == target


@pytest.mark.parametrize(
    ("layers", "spec", "notes"),
    [
        (3, Stack(), ()),
        (3, Stack(partial=True), ()),
        (3, Stack(target_layers=7, partial=True), ("the last copy is partial: 1 of 3 layers",)),
        (3, Interpolate(), ("1.5 times 3 layers are 4.5, rounded up to 5",)),
        (3, Interpolate(target_layers=5), ()),
        (4, Interpolate(), ()),
    ],
    ids=str,
)
def test_what_was_decided_is_said(layers: int, spec: ExpansionSpec, notes: tuple[str]) -> None:
    assert build_steps(Model(_config(layers)), [spec], seed=0)[0].notes == notes


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"positions": (4,)}, "from 0 to 3"),
        ({"positions": (-1,)}, "from 0 to 3"),
        ({"positions": ()}, "at least one"),
        ({"positions": (0, 1), "target_layers": 5}, "4 + 2 = 6"),
        ({"target_layers": 4}, "at least 5"),
        ({"target_layers": 2}, "at least 5"),
    ],
)
def test_llama_pro_refuses_with_what_would_work(options: dict[str, object], expected: str) -> None:
    with pytest.raises(RequestError) as error:
        LlamaPro(**options).target_config(Model(_config(4)))  # type: ignore[arg-type]
    assert "expansion.llama_pro." in str(error.value)
    assert expected in str(error.value)


@pytest.mark.parametrize(
    ("spec", "copies"),
    [
        (Dus(identity_init=True), {3, 4}),  # 0 1 2 1 2 3
        (Stack(identity_init=True), {4, 5, 6, 7}),
        (Stack(target_layers=6, partial=True, identity_init=True), {4, 5}),
        (Interpolate(identity_init=True), {1, 4}),  # 0 0 1 2 2 3
        (Interpolate(target_layers=9, identity_init=True), {1, 3, 4, 6, 8}),  # 0 0 1 1 1 2 2 3 3
        (LlamaPro(), {2, 5}),  # 0 1 1 2 3 3
        (Layers(sources=(0, 3, 1, 1, 2, 3), identity=(1, 3)), {1, 3}),
    ],
    ids=str,
)
def test_identity_copies_are_zeroed_where_they_write_the_residual_and_start_fresh(
    spec: ExpansionSpec, copies: set[int]
) -> None:
    (step,) = build_steps(Model(_config(4)), [spec], seed=0)
    assert spec.is_exact
    tensors = step.parameter_map.tensors
    writers = {"attention.o", "ffn.down"}
    zeroed = {name for name, tensor in tensors.items() if tensor.is_zeroed}
    assert zeroed == {f"layers.{layer}.{kind}" for layer in copies for kind in writers}
    fresh = {name for name, tensor in tensors.items() if tensor.state == "fresh"}
    in_copies = {f"layers.{layer}" for layer in copies}
    assert fresh == {name for name in tensors if ".".join(name.split(".")[:2]) in in_copies}


def test_identity_zeroes_biases_too() -> None:
    config = {**_config(2), "attention_bias": True, "mlp_bias": True}
    tensors = build_steps(Model(config), [LlamaPro()], seed=0)[0].parameter_map.tensors
    zeroed = {name for name, tensor in tensors.items() if tensor.is_zeroed}
    kinds = ("attention.o", "attention.o_bias", "ffn.down", "ffn.down_bias")
    assert zeroed == {f"layers.2.{kind}" for kind in kinds}


@pytest.mark.parametrize(
    "spec", [Dus(), Stack(), Interpolate(), Layers(sources=(3, 1, 1))], ids=lambda spec: spec.name
)
def test_plain_copies_zero_nothing_and_carry_all_state(spec: ExpansionSpec) -> None:
    tensors = build_steps(Model(_config(4)), [spec], seed=0)[0].parameter_map.tensors
    assert not spec.is_exact
    assert not any(tensor.is_zeroed for tensor in tensors.values())
    assert {tensor.state for tensor in tensors.values()} == {"carry"}


@pytest.mark.parametrize(
    "spec", [Dus(), Stack(), Interpolate(), LlamaPro()], ids=lambda spec: spec.name
)
def test_embeddings_norm_and_head_are_carried(spec: ExpansionSpec) -> None:
    tensors = build_steps(Model(_config(4)), [spec], seed=0)[0].parameter_map.tensors
    for name in ("embed", "final_norm", "head"):
        assert tensors[name].source == name
        assert tensors[name].axes == ()
        assert tensors[name].state == "carry"


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(
    ("spec", "sources"),
    [
        (Dus(), (0, 1, 2, 1, 2, 3)),
        (Stack(), (0, 1, 2, 3, 0, 1, 2, 3)),
        (Stack(target_layers=10, partial=True), (0, 1, 2, 3, 0, 1, 2, 3, 0, 1)),
        (Interpolate(), (0, 0, 1, 2, 2, 3)),
        (Interpolate(target_layers=9), (0, 0, 1, 1, 1, 2, 2, 3, 3)),
    ],
    ids=str,
)
def test_weights_come_from_the_recorded_layers(
    tmp_path: Path, spec: ExpansionSpec, sources: tuple[int, ...]
) -> None:
    """Compare stock models, without our maps."""
    model = oracle.tiny_llama(num_hidden_layers=4)
    result = expand(oracle.saved(model, tmp_path / "source"), tmp_path / "result", [spec])
    assert result.lineage.expansion_history[-1].layer_sources == sources
    after = oracle.stock(result.folder)
    assert len(after.model.layers) == len(sources)
    for target, source in enumerate(sources):
        new = after.model.layers[target].state_dict()
        for name, old in model.model.layers[source].state_dict().items():
            assert torch.equal(new[name], old), f"{target} {name}"
    assert torch.equal(after.model.norm.weight, model.model.norm.weight)
    assert torch.equal(after.lm_head.weight, model.lm_head.weight)


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("spec", [Dus(), Stack(), Interpolate()], ids=lambda spec: spec.name)
def test_without_identities_the_function_changes_and_the_record_says_so(
    tmp_path: Path, spec: ExpansionSpec
) -> None:
    model = oracle.tiny_llama()
    result = expand(oracle.saved(model, tmp_path / "source"), tmp_path / "result", [spec])
    assert not result.lineage.expansion_history[-1].claims_exact
    jump = oracle.relative_difference(model, oracle.stock(result.folder), oracle.tokens())
    assert jump > 1e-2


@pytest.mark.parametrize(
    "slices", [["0:3", "1:4"], [[0, 2], [1, 3], [2, 4]], [[2, 4], [0, 1]]], ids=str
)
def test_slices_are_renamed_tensors(tmp_path: Path, slices: list[str | list[int]]) -> None:
    """Passthrough of mergekit, by names on disk; tests/test_clients.py runs mergekit itself."""
    source = oracle.saved(oracle.tiny_llama(num_hidden_layers=4), tmp_path / "source")
    folder = api.expand(source, "layers", slices=slices, output=tmp_path / "result")
    made, old = (load_file(each / "model.safetensors") for each in (folder, source))
    pairs = [each.split(":") if isinstance(each, str) else each for each in slices]
    expected = {name: old[name] for name in old if ".layers." not in name}
    target = 0
    for start, end in pairs:
        for layer in range(int(start), int(end)):
            marks = (f".layers.{layer}.", f".layers.{target}.")
            expected |= {name.replace(*marks): old[name] for name in old if marks[0] in name}
            target += 1
    assert made.keys() == expected.keys()
    assert all(torch.equal(made[name], expected[name]) for name in made)
    assert json.loads((folder / "config.json").read_text())["num_hidden_layers"] == target


def test_layer_sources_are_shown_in_the_card(tmp_path: Path) -> None:
    model = oracle.tiny_llama(num_hidden_layers=4)
    result = expand(oracle.saved(model, tmp_path / "source"), tmp_path / "result", [Dus()])
    assert "| 0 1 2 1 2 3 |" in (result.folder / "README.md").read_text()


def test_lists_with_one_entry_per_layer_follow_their_source_layer() -> None:
    family = replace(FAMILIES["llama"], per_layer_config_keys=("layer_types",))
    config = {**_config(3), "layer_types": ["full", "sliding", "other"]}
    grown = Dus().target_config(Model(config, family))
    assert grown["layer_types"] == ["full", "sliding", "sliding", "other"]


@pytest.mark.quick_cases(7)
@pytest.mark.parametrize("is_tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    "spec",
    [
        Dus(),
        Dus(target_layers=8),
        Stack(),
        Stack(target_layers=5, partial=True),
        Interpolate(),
        Interpolate(target_layers=11),
        LlamaPro(),
        LlamaPro(positions=(0, 0, 0)),
    ],
    ids=str,
)
def test_parameter_count_as_predicted(spec: ExpansionSpec, is_tied: bool) -> None:
    target = spec.target_config(Model(_config(4, is_tied=is_tied)))
    model = new_model(Model(target), seed=0)
    assert sum(p.numel() for p in model.parameters()) == Model(target).num_parameters
