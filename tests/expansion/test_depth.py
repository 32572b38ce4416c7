"""Which layer each target layer copies, under every depth rule, and what is refused."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests import oracle
from tritter.errors import RequestError
from tritter.expand import expand
from tritter.expansion import Dus, ExpansionSpec, LlamaPro, build_steps
from tritter.expansion.depth import (
    block_insertion_sources,
    depth_upscale_sources,
    repeated_layers,
)
from tritter.families import LLAMA, Config
from tritter.models import new_model


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


def test_solar_takes_layers_0_to_23_and_8_to_31() -> None:
    assert depth_upscale_sources(32, target_layers=48) == (*range(24), *range(8, 32))
    assert depth_upscale_sources(32, drop_layers=8) == (*range(24), *range(8, 32))
    assert depth_upscale_sources(32) == (*range(24), *range(8, 32))


@pytest.mark.parametrize(
    ("layers", "target", "sources"),
    [
        (1, 2, (0, 0)),
        (2, 4, (0, 1, 0, 1)),
        (3, 4, (0, 1, 1, 2)),  # the default base: one layer dropped
        (4, 6, (0, 1, 2, 1, 2, 3)),
        (5, 8, (0, 1, 2, 3, 1, 2, 3, 4)),
        (8, 12, (0, 1, 2, 3, 4, 5, 2, 3, 4, 5, 6, 7)),
    ],
)
def test_dus_default(layers: int, target: int, sources: tuple[int, ...]) -> None:
    assert depth_upscale_sources(layers) == sources
    assert len(sources) == target
    assert Dus().target_config(LLAMA, _config(layers))["num_hidden_layers"] == target


def test_24_to_48_drops_nothing() -> None:
    assert depth_upscale_sources(24, target_layers=48) == (*range(24), *range(24))
    assert depth_upscale_sources(24, target_layers=48, drop_layers=0) == (*range(24), *range(24))


@given(layers=st.integers(1, 40), data=st.data())
def test_every_even_target_up_to_twice_the_layers_is_two_overlapping_runs(
    layers: int, data: st.DataObject
) -> None:
    target = data.draw(st.integers(layers // 2 + 1, layers)) * 2
    sources = depth_upscale_sources(layers, target_layers=target)
    half = target // 2
    assert sources[:half] == tuple(range(half))
    assert sources[half:] == tuple(range(layers - half, layers))
    assert set(sources) == set(range(layers))
    assert depth_upscale_sources(layers, drop_layers=layers - half) == sources


@pytest.mark.parametrize(
    ("layers", "options", "said"),
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
            ["drop_layers = 8 contradicts", "need drop_layers = 0", "gives 32"],
        ),
    ],
)
def test_dus_refuses_with_what_would_work(
    layers: int, options: dict[str, int], said: list[str]
) -> None:
    with pytest.raises(RequestError) as error:
        Dus(**options).target_config(LLAMA, _config(layers))
    assert "expansion.dus." in str(error.value)
    for words in said:
        assert words in str(error.value)


@pytest.mark.parametrize(
    ("layers", "target", "sources"),
    [
        (2, None, (0, 1, 1)),
        (4, None, (0, 1, 1, 2, 3, 3)),
        (3, None, (0, 1, 1, 2, 2)),
        (4, 5, (0, 1, 2, 3, 3)),
        (4, 8, (0, 0, 1, 1, 2, 2, 3, 3)),
        (2, 6, (0, 0, 0, 1, 1, 1)),
        (32, 40, tuple(sorted([*range(32), 3, 7, 11, 15, 19, 23, 27, 31]))),
    ],
)
def test_llama_pro_spreads_evenly(
    layers: int, target: int | None, sources: tuple[int, ...]
) -> None:
    assert block_insertion_sources(layers, target_layers=target) == sources


def test_llama_pro_at_positions() -> None:
    assert block_insertion_sources(4, positions=(3, 0, 0)) == (0, 0, 0, 1, 2, 3, 3)
    assert block_insertion_sources(4, positions=(1,), target_layers=5) == (0, 1, 1, 2, 3)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"positions": (4,)}, "from 0 to 3"),
        ({"positions": (-1,)}, "from 0 to 3"),
        ({"positions": ()}, "at least one"),
        ({"positions": (0, 1), "target_layers": 5}, "4 + 2 = 6"),
        ({"target_layers": 4}, "at least 5"),
        ({"target_layers": 2}, "at least 5"),
    ],
)
def test_llama_pro_refuses_with_what_would_work(options: dict[str, object], said: str) -> None:
    with pytest.raises(RequestError) as error:
        LlamaPro(**options).target_config(LLAMA, _config(4))  # type: ignore[arg-type]
    assert "expansion.llama_pro." in str(error.value)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("sources", "repeated"),
    [
        ((0, 1, 2), set()),
        ((0, 1, 1, 2), {2}),
        ((0, 1, 2, 1, 2, 3), {3, 4}),
        ((0, 0, 0), {1, 2}),
        ((), set()),
    ],
)
def test_repeated_layers_are_the_later_copies(sources: tuple[int, ...], repeated: set[int]) -> None:
    assert repeated_layers(sources) == repeated


def test_identity_copies_are_zeroed_where_they_write_the_residual_and_start_fresh() -> None:
    """4 → 6 by dus is 0 1 2 1 2 3: target layers 3 and 4 are the copies."""
    tensors = build_steps(_config(4), [Dus(identity_init=True)], seed=0)[0].parameter_map.tensors
    writers = {"attention.o", "ffn.down"}
    zeroed = {name for name, tensor in tensors.items() if tensor.is_zeroed}
    assert zeroed == {f"layers.{layer}.{kind}" for layer in (3, 4) for kind in writers}
    fresh = {name.split(".")[1] for name, tensor in tensors.items() if tensor.state == "fresh"}
    assert fresh == {"3", "4"}


def test_identity_zeroes_biases_too() -> None:
    config = {**_config(2), "attention_bias": True, "mlp_bias": True}
    tensors = build_steps(config, [LlamaPro()], seed=0)[0].parameter_map.tensors
    zeroed = {name for name, tensor in tensors.items() if tensor.is_zeroed}
    kinds = ("attention.o", "attention.o_bias", "ffn.down", "ffn.down_bias")
    assert zeroed == {f"layers.2.{kind}" for kind in kinds}


def test_plain_dus_zeroes_nothing_and_carries_all_state() -> None:
    tensors = build_steps(_config(4), [Dus()], seed=0)[0].parameter_map.tensors
    assert not any(tensor.is_zeroed for tensor in tensors.values())
    assert {tensor.state for tensor in tensors.values()} == {"carry"}


@pytest.mark.parametrize("spec", [Dus(), LlamaPro()], ids=["dus", "llama_pro"])
def test_embeddings_norm_and_head_are_carried(spec: ExpansionSpec) -> None:
    tensors = build_steps(_config(4), [spec], seed=0)[0].parameter_map.tensors
    for name in ("embed", "final_norm", "head"):
        assert tensors[name].source == name
        assert tensors[name].axes == ()
        assert tensors[name].state == "carry"


def test_weights_come_from_the_recorded_layers(tmp_path: Path) -> None:
    """Stock models on both sides; no map of ours in between."""
    model = oracle.tiny_llama(num_hidden_layers=4)
    result = expand(oracle.saved(model, tmp_path / "source"), tmp_path / "result", [Dus()])
    sources = (0, 1, 2, 1, 2, 3)
    assert result.lineage.expansion_history[-1].layer_sources == sources
    after = oracle.stock(result.folder)
    for target, source in enumerate(sources):
        new = after.model.layers[target].state_dict()
        for name, old in model.model.layers[source].state_dict().items():
            assert torch.equal(new[name], old), f"{target} {name}"
    assert torch.equal(after.model.norm.weight, model.model.norm.weight)
    assert torch.equal(after.lm_head.weight, model.lm_head.weight)


def test_layer_sources_are_shown_in_the_card(tmp_path: Path) -> None:
    model = oracle.tiny_llama(num_hidden_layers=4)
    result = expand(oracle.saved(model, tmp_path / "source"), tmp_path / "result", [Dus()])
    assert "| 0 1 2 1 2 3 |" in (result.folder / "README.md").read_text()


def test_lists_with_one_entry_per_layer_follow_their_source_layer() -> None:
    family = replace(LLAMA, per_layer_config_keys=("layer_types",))
    config = {**_config(3), "layer_types": ["full", "sliding", "other"]}
    assert Dus().target_config(family, config)["layer_types"] == [
        "full",
        "sliding",
        "sliding",
        "other",
    ]


@pytest.mark.parametrize("is_tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    "spec", [Dus(), Dus(target_layers=8), LlamaPro(), LlamaPro(positions=(0, 0, 0))], ids=str
)
def test_parameter_count_as_predicted(spec: ExpansionSpec, is_tied: bool) -> None:
    target = spec.target_config(LLAMA, _config(4, is_tied=is_tied))
    model = new_model(target, seed=0)
    assert sum(p.numel() for p in model.parameters()) == LLAMA.count_parameters(target)
