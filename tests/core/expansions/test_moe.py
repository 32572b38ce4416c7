"""Upcycled models: exact where claimed, bounded otherwise, and trainable."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from tests import oracle
from tests.oracle import growth as oracle_growth
from tests.oracle.families import tiny
from tests.oracle.moe import PARTNERS, expert_gap, identity_error, steps_of, upcycled
from tritter.core.expansions import Dus, ExpansionSpec, LlamaPro, Moe, Stack, Width, target_model
from tritter.core.families import Model
from tritter.core.models import read_model
from tritter.core.parameter_map import TensorMap
from tritter.transform import expand

IDENTITY, STOCK = 1e-10, 1e-4
EXACT = {
    "8 experts, top 2": Moe(noise=0.0),
    "3 experts, top 1": Moe(noise=0.0, num_experts=3, experts_per_token=1),
    "all experts": Moe(noise=0.0, num_experts=2, experts_per_token=2),
    "halves": Moe(noise=0.0, num_experts=6, experts_per_token=2, granularity=2),
    "fifths": Moe(noise=0.0, num_experts=15, experts_per_token=10, granularity=5),
}
TOKENS = oracle.tokens()


# Exactness


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("eps", [1e-3, 1e-6])
@pytest.mark.parametrize("spec", EXACT.values(), ids=EXACT.keys())
@pytest.mark.parametrize("family", PARTNERS)
def test_equal_experts_compute_what_the_ffn_did(
    family: str, spec: Moe, eps: float, tied: bool
) -> None:
    model = tiny(family, tie_word_embeddings=tied, rms_norm_eps=eps).double()
    result = upcycled(model, [spec])
    assert result.config.model_type == PARTNERS[family]
    assert identity_error(model, result, TOKENS) < IDENTITY


@st.composite
def cases(draw: st.DrawFn) -> tuple[PreTrainedModel, Moe]:
    """A tiny dense model of any shape, and experts of any number that it can become."""
    family = draw(st.sampled_from(list(PARTNERS)))
    kv_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    heads = kv_heads * group
    hidden_size = draw(st.integers(5, 25))
    pieces = draw(st.integers(1, 3))
    options: dict[str, Any] = {
        "hidden_size": -(-hidden_size // heads) * heads if family == "llama" else hidden_size,
        "intermediate_size": pieces * draw(st.integers(1, 15)),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "num_hidden_layers": draw(st.integers(1, 3)),
        "rms_norm_eps": draw(st.sampled_from([1e-3, 1e-6])),
        "tie_word_embeddings": draw(st.booleans()),
    }
    if family == "qwen3":
        options["attention_bias"] = draw(st.booleans())
    copies = draw(st.integers(2, 6))
    layers = None
    if family.startswith("qwen"):
        some = st.sets(st.integers(0, options["num_hidden_layers"] - 1), min_size=1)
        layers = draw(st.one_of(st.none(), some.map(tuple)))
    spec = Moe(
        num_experts=copies * pieces,
        experts_per_token=pieces * draw(st.integers(1, copies)),
        granularity=pieces,
        noise=0.0,
        layers=layers,
    )
    return tiny(family, **options).double(), spec


@pytest.mark.full
@settings(max_examples=60)
@given(case=cases(), seed=st.integers(0, 5))
def test_any_shape_any_number_of_experts(case: tuple[PreTrainedModel, Moe], seed: int) -> None:
    model, spec = case
    result = upcycled(model, [spec], seed=seed)
    assert identity_error(model, result, TOKENS) < IDENTITY
    config = oracle_growth.config_of(result)
    assert Model(config).num_parameters == result.num_parameters()


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("eps", [1e-3, 1e-6])
@pytest.mark.parametrize("family", PARTNERS)
def test_stock_class_from_disk(tmp_path: Path, family: str, eps: float, tied: bool) -> None:
    """The default expert kernel of transformers, which supports these sizes."""
    model = tiny(family, tie_word_embeddings=tied, rms_norm_eps=eps)
    source = oracle.saved(model, tmp_path / "source")
    for name in ("8 experts, top 2", "halves"):
        result = expand(source, tmp_path / name, [EXACT[name]])
        after = oracle.stock(result.folder)
        assert after.config.model_type == PARTNERS[family]
        assert after.num_parameters() == result.parameters_after
        error = oracle.relative_difference(model, after, TOKENS)
        assert error < STOCK
        if family == "qwen2":
            assert error == 0  # the shared expert is the FFN; the routed ones have zero output
        assert result.lineage.expansion_history[-1].claims_exact


@pytest.mark.full
def test_silent_experts_keep_the_function_whatever_the_noise(tmp_path: Path) -> None:
    model = tiny("qwen2")
    source = oracle.saved(model, tmp_path / "source")
    result = expand(source, tmp_path / "result", [Moe(noise=0.1, reinit_fraction=0.5)])
    assert oracle.relative_difference(model, oracle.stock(result.folder), TOKENS) == 0
    assert result.lineage.expansion_history[-1].claims_exact


@pytest.mark.parametrize("family", PARTNERS)
def test_the_target_that_a_family_gets_by_default_decides_what_is_claimed(family: str) -> None:
    (step,) = steps_of(tiny(family), Moe())
    is_silent = PARTNERS[family] == "qwen2_moe"
    assert step.is_exact == is_silent
    assert any("with any noise" in note for note in step.notes) == is_silent
    (stated,) = steps_of(tiny(family), Moe(target=PARTNERS[family]))  # type: ignore[arg-type]
    assert stated.is_exact == step.is_exact and step.options["target"] is None
    from_children = dataclasses.replace(step, spec=Moe(experts_from=("one", "other")))
    assert not from_children.is_exact


def test_some_layers(tmp_path: Path) -> None:
    model = tiny("qwen3")
    source = oracle.saved(model, tmp_path / "source")
    result = expand(source, tmp_path / "result", [Moe(noise=0.0, layers=(2, 1))])
    after = oracle.stock(result.folder)
    assert after.config.mlp_only_layers == [0]
    assert [hasattr(layer.mlp, "experts") for layer in after.model.layers] == [False, True, True]
    assert oracle.relative_difference(model, after, TOKENS) < STOCK
    assert "dense layers: 0" in result.steps[0].notes


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
WHAT_FOLLOWS: dict[str, tuple[str, dict[str, Any]]] = {
    "scaled rotary": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "rotary base": ("mistral", {"rope_parameters": {"rope_type": "default", "rope_theta": 321.0}}),
    "no window": ("mistral", {"sliding_window": None}),
    "window": ("mistral", {"sliding_window": 3}),
    "windows of some layers": ("qwen2", {}),
    "no windows": ("qwen2", {"use_sliding_window": False}),
    "windows of all layers": (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0},
    ),
    "biases": ("qwen3", {"attention_bias": True}),
    "another activation": ("llama", {"hidden_act": "gelu"}),
    "heads of another size": ("qwen2", {"head_dim": 10}),
}


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(("family", "changes"), WHAT_FOLLOWS.values(), ids=WHAT_FOLLOWS.keys())
def test_what_the_dense_config_says_the_partner_says_too(
    tmp_path: Path, family: str, changes: dict[str, Any]
) -> None:
    model = tiny(family, **changes)
    source = oracle.saved(model, tmp_path / "source")
    result = expand(source, tmp_path / "result", [Moe(noise=0.0)])
    long = oracle.tokens(length=40)
    assert oracle.relative_difference(model, oracle.stock(result.folder), long) < STOCK


@pytest.mark.parametrize("family", PARTNERS)
def test_no_default_of_the_partner_is_relied_on(tmp_path: Path, family: str) -> None:
    """The config sets every key that the partner's class reads, with the value of the map."""
    config = read_model(oracle.saved(tiny(family), tmp_path / "source")).config
    result = target_model(Model(config), [Moe()]).config
    partner = type(AutoConfig.for_model(str(result["model_type"])))
    own = {field.name for field in dataclasses.fields(partner)}
    inherited = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    renamed = {"num_experts": "num_local_experts"} if family != "qwen2" else {}
    assert {renamed.get(name, name) for name in own - inherited} <= set(result)
    read_back = AutoConfig.for_model(
        str(result["model_type"]), **{k: v for k, v in result.items() if k != "model_type"}
    ).to_dict()
    # A Qwen2-MoE without windows writes 0 where other families write null
    ours, theirs = dict(result), {key: read_back[key] for key in result}
    if not ours.get("sliding_window") and not theirs.get("sliding_window"):
        ours.pop("sliding_window"), theirs.pop("sliding_window")
    assert ours == theirs


# Negative controls: the oracle detects each mistake


def spoiled(model: PreTrainedModel, spec: Moe, **changes: Any) -> float:
    """Return the identity error with a wrong target config."""
    step = steps_of(model, spec)[0]
    wrong = dataclasses.replace(step, target=step.target.changed({**step.target.config, **changes}))
    return identity_error(model, oracle_growth.grown(model, [wrong]), TOKENS)


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("qwen3", {"norm_topk_prob": False}),
        ("mistral", {"sliding_window": None}),
        ("mistral", {"rms_norm_eps": 1e-5}),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
        ("llama", {"sliding_window": 3}),
    ],
    ids=str,
)
def test_a_default_of_the_partner_would_be_seen(family: str, changes: dict[str, Any]) -> None:
    assert spoiled(tiny(family).double(), EXACT["8 experts, top 2"], **changes) > 1e-4


def wrong_maps(model: PreTrainedModel, spec: Moe, change: Any) -> float:
    """Return the identity error with tensor maps changed by `change(name, tensor_map)`."""
    step = steps_of(model, spec)[0]
    tensors = {name: change(name, m) for name, m in step.parameter_map.tensors.items()}
    parameter_map = dataclasses.replace(step.parameter_map, tensors=tensors)
    wrong = dataclasses.replace(step, parameter_map=parameter_map)
    return identity_error(model, oracle_growth.grown(model, [wrong]), TOKENS)


@pytest.mark.full
def test_wrong_maps_would_be_seen() -> None:
    model, halves = tiny("llama").double(), EXACT["halves"]

    def unscaled(name: str, tensor_map: TensorMap) -> TensorMap:
        return dataclasses.replace(tensor_map, axes=()) if "shared" in name else tensor_map

    def ungrouped(name: str, tensor_map: TensorMap) -> TensorMap:
        fill = dataclasses.replace(tensor_map.fill, repeat=1)
        return dataclasses.replace(tensor_map, fill=fill) if "router" in name else tensor_map

    def one_piece(name: str, tensor_map: TensorMap) -> TensorMap:
        if ".experts." not in name or not name.endswith("down"):
            return tensor_map
        axis = tensor_map.axes[1]
        assert axis is not None
        halved = dataclasses.replace(axis, weight=axis.weight / 2)
        return dataclasses.replace(tensor_map, axes=(None, halved))

    same = wrong_maps(model, halves, lambda _, tensor_map: tensor_map)
    assert same < IDENTITY
    assert wrong_maps(model, halves, ungrouped) > 1e-3
    assert wrong_maps(model, halves, one_piece) > 1e-3
    assert wrong_maps(tiny("qwen2").double(), Moe(noise=0.0), unscaled) > 1e-3


# Noise and drop-upcycling


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
def test_noise_moves_the_function_a_little_and_spares_the_first_copy(family: str) -> None:
    model = tiny(family, initializer_range=0.1)
    jumps = [
        oracle.relative_difference(model, upcycled(model, [Moe(noise=noise)]), TOKENS)
        for noise in (0.001, 0.01, 0.1)
    ]
    assert 1e-5 < jumps[0] < 0.02
    assert 1e-4 < jumps[1] < 0.2
    assert jumps[0] < jumps[1] < jumps[2]
    assert not Moe().is_exact
    before = oracle_growth.logical_state(model)
    after = oracle_growth.logical_state(upcycled(model, [Moe(noise=0.01)]))
    for part in ("gate", "up", "down"):
        source = before[f"layers.1.ffn.{part}"]
        assert torch.equal(after[f"layers.1.experts.0.{part}"], source)
        for expert in (1, 7):
            moved = after[f"layers.1.experts.{expert}.{part}"] - source
            assert float(moved.std() / source.std()) == pytest.approx(0.01, rel=0.1)


def test_copies_get_noise_of_their_own() -> None:
    assert expert_gap(upcycled(tiny("llama"), [Moe(noise=0.01)])) > 0.005
    assert expert_gap(upcycled(tiny("llama"), [Moe(noise=0.0)])) == 0
    twice = [oracle_growth.logical_state(upcycled(tiny("llama"), [Moe()])) for _ in range(2)]
    assert all(torch.equal(twice[0][name], twice[1][name]) for name in twice[0])


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("granularity", [1, 2])
def test_drop_upcycling_redraws_the_same_neurons_of_all_three_matrices(granularity: int) -> None:
    model = tiny("llama", intermediate_size=80)
    spec = Moe(noise=0.0, reinit_fraction=0.25, granularity=granularity)
    assert not spec.is_exact
    result = upcycled(model, [spec])
    before, after = oracle_growth.logical_state(model), oracle_growth.logical_state(result)
    size, drawn = 80 // granularity, {}
    for expert in range(8 * granularity):
        start = expert % granularity * size
        rows = slice(start, start + size)
        scales = {"gate": 1.0, "up": 1.0, "down": float(granularity)}
        masks = []
        for part, scale in scales.items():
            source = before[f"layers.0.ffn.{part}"]
            source = source[rows] if part != "down" else source[:, rows].T
            value = after[f"layers.0.experts.{expert}.{part}"]
            value = value if part != "down" else value.T
            is_new = (value != scale * source).all(dim=1)
            assert torch.equal((value != scale * source).any(dim=1), is_new)
            assert int(is_new.sum()) == size // 4
            masks.append(is_new)
            assert float(value[is_new].std()) == pytest.approx(
                scale * float(before[f"layers.0.ffn.{part}"].std()), rel=0.2
            )
        assert all(torch.equal(masks[0], mask) for mask in masks)
        drawn[expert] = tuple(masks[0].nonzero().flatten().tolist())
    assert len(set(drawn.values())) > 6 * granularity
    jump = oracle.relative_difference(model, result, TOKENS)
    assert jump > 0.05


def test_router_rows_have_unit_logits_whatever_the_width() -> None:
    result = upcycled(tiny("mistral", hidden_size=96), [Moe(num_experts=64, granularity=4,
                                                            experts_per_token=8)])  # fmt: skip
    rows = result.model.layers[0].mlp.gate.weight.detach()
    assert float(rows.std()) == pytest.approx(1 / math.sqrt(96), rel=0.1)
    groups = rows.view(16, 4, 96)
    assert torch.equal(groups, groups[:, :1].expand_as(groups))
    assert len({tuple(row.tolist()) for row in groups[:, 0]}) == 16


# Combinations


COMBINATIONS: dict[str, list[ExpansionSpec]] = {
    "width, moe": [Width(init="net2net"), Moe(noise=0.0)],
    "fresh width, moe": [
        Width(hidden_size=36, intermediate_size=58),
        Moe(noise=0.0, granularity=2),
    ],
    "moe, width": [Moe(noise=0.0, num_experts=4), Width(init="zero_pad")],
    "moe in pieces, width": [Moe(noise=0.0, granularity=2), Width()],
    "llama_pro, moe": [LlamaPro(), Moe(noise=0.0)],
    "moe, llama_pro": [Moe(noise=0.0), LlamaPro(positions=(0, 2))],
    "moe, stack": [Moe(noise=0.0, num_experts=3), Stack(identity_init=True)],
    "dus, moe, width": [Dus(identity_init=True), Moe(noise=0.0), Width(intermediate_size=56)],
}


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize("specs", COMBINATIONS.values(), ids=COMBINATIONS.keys())
@pytest.mark.parametrize("family", PARTNERS)
def test_combinations_are_exact(family: str, specs: list[ExpansionSpec]) -> None:
    model = tiny(family, num_hidden_layers=4).double()
    assert identity_error(model, upcycled(model, specs), TOKENS) < IDENTITY


def test_layers_that_stay_dense_are_copied_as_such() -> None:
    model = tiny("qwen3").double()
    specs: list[ExpansionSpec] = [Moe(noise=0.0, layers=(1,)), LlamaPro(positions=(0, 1))]
    result = upcycled(model, specs)
    sparse = [hasattr(layer.mlp, "experts") for layer in result.model.layers]
    assert sparse == [False, False, True, True, False]
    assert identity_error(model, result, TOKENS) < IDENTITY


def test_a_combination_from_disk(tmp_path: Path) -> None:
    model = tiny("llama")
    source = oracle.saved(model, tmp_path / "source")
    specs: list[ExpansionSpec] = [Width(init="net2net"), Moe(noise=0.0), LlamaPro()]
    result = expand(source, tmp_path / "result", specs)
    assert oracle.relative_difference(model, oracle.stock(result.folder), TOKENS) < STOCK
    types = [record.expansion_type for record in result.lineage.expansion_history]
    assert types == ["width", "moe", "depth"]
