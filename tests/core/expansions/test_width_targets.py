"""Targets of width: defaults, derived sizes, refusals and notes."""

import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.oracle.families import RMS
from tritter.core.expansions import Width, build_steps
from tritter.core.expansions.heads import _split_shares
from tritter.core.families import FAMILIES, Config, Model
from tritter.core.models import new_model
from tritter.errors import RequestError

KEYS = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")


def _config(*, is_tied: bool = False) -> Config:
    return {
        "model_type": "llama",
        "vocab_size": 97,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": is_tied,
    }


def _sizes(spec: Width) -> list[object]:
    target = spec.target_config(Model(_config()))
    return [target[key] for key in KEYS]


@pytest.mark.parametrize(
    ("spec", "sizes"),
    [
        (Width(), [48, 80, 8, 4]),
        (Width(init="net2net"), [48, 80, 8, 4]),
        (Width(hidden_size=72), [72, 120, 12, 6]),
        (Width(hidden_size=36), [36, 60, 6, 3]),  # 1.5×: 6 and 3 are whole numbers
        (Width(hidden_size=32), [32, 53, 4, 2]),  # 4/3: neither is whole; FFN by ratio, rounded
        (Width(hidden_size=28), [28, 47, 4, 2]),
        (Width(hidden_size=48, num_attention_heads=4, num_key_value_heads=2), [48, 80, 4, 2]),
        (Width(hidden_size=48, intermediate_size=41), [48, 41, 8, 4]),
        (Width(intermediate_size=57), [24, 57, 4, 2]),
        (Width(num_attention_heads=6), [24, 40, 6, 2]),
        (Width(num_attention_heads=6, num_key_value_heads=3), [24, 40, 6, 3]),
    ],
)
def test_targets(spec: Width, sizes: list[int]) -> None:
    assert _sizes(spec) == sizes


def test_query_and_key_value_heads_follow_together_or_not_at_all() -> None:
    """A factor of 1.5 works for 4 query heads but not for 1 key/value head: both stay."""
    config = {**_config(), "num_key_value_heads": 1}
    target = Width(hidden_size=36).target_config(Model(config))
    assert (target["num_attention_heads"], target["num_key_value_heads"]) == (4, 1)


def test_head_dim_never_changes() -> None:
    for spec in (Width(), Width(hidden_size=32), Width(num_attention_heads=8)):
        assert spec.target_config(Model(_config()))["head_dim"] == 6


def test_nothing_else_of_the_config_changes() -> None:
    config = {**_config(), "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    target = Width().target_config(Model(config))
    changed = {key for key in target if target[key] != config.get(key)}
    assert changed == {*KEYS, "head_dim", "rms_norm_eps"}


@pytest.mark.parametrize(
    ("spec", "phrases"),
    [
        (Width(hidden_size=23), ["width.hidden_size = 23", "smaller", "at least 24"]),
        (Width(intermediate_size=39), ["width.intermediate_size = 39", "at least 40"]),
        (Width(num_attention_heads=2), ["width.num_attention_heads = 2", "at least 4"]),
        (Width(num_key_value_heads=1), ["width.num_key_value_heads = 1", "at least 2"]),
        (Width(hidden_size=24), ["every target equals", "hidden_size 24"]),
        (Width(hidden_size=46), ["width.hidden_size = 46", "4 attention heads", "44 or 48."]),
        (Width(hidden_size=25), ["width.hidden_size = 25", "nearest: 28."]),
        (Width(hidden_size=25, intermediate_size=57), ["nearest: 24 or 28."]),
        (Width(num_attention_heads=5), ["num_attention_heads = 5", "nearest: 6."]),
        (Width(num_attention_heads=7), ["num_attention_heads = 7", "nearest: 6 or 8."]),
        (
            Width(num_attention_heads=6, num_key_value_heads=4),
            ["num_attention_heads = 6", "num_key_value_heads = 4", "nearest: 4 or 8."],
        ),
        (
            Width(num_key_value_heads=4),
            ["num_key_value_heads = 4", "leaves groups of 1 query", "at least 8"],
        ),
        (
            Width(num_attention_heads=6, init="net2net"),
            [
                "head_strategy=copy",
                "groups of 2",
                "must be 4 (or use ",
                "head_strategy=gqa",
                "or fresh)",
            ],
        ),
        (
            Width(num_attention_heads=8, head_strategy="copy"),
            ["head_strategy=copy", "must be 4 (or use ", "head_strategy=gqa", "or fresh)"],
        ),
    ],
)
def test_refusals_name_key_value_and_what_works(spec: Width, phrases: list[str]) -> None:
    with pytest.raises(RequestError) as error:
        spec.target_config(Model(_config()))
    assert "expansion.width" in str(error.value)
    for phrase in phrases:
        assert phrase in str(error.value)


@given(hidden_size=st.integers(25, 200), ffn=st.none() | st.integers(40, 60))
def test_every_nearest_hidden_size_that_is_named_works(hidden_size: int, ffn: int | None) -> None:
    try:
        Width(hidden_size=hidden_size, intermediate_size=ffn).target_config(Model(_config()))
    except RequestError as error:
        named = re.findall(r"\d+", str(error).split("nearest:")[1])
        assert named
        for size in named:
            Width(hidden_size=int(size), intermediate_size=ffn).target_config(Model(_config()))


def test_a_family_whose_heads_need_not_divide_takes_any_hidden_size() -> None:
    family = replace(FAMILIES["llama"], heads_divide_hidden=False)
    source = Model(_config(), family)
    assert Width(hidden_size=25).target_config(source)["hidden_size"] == 25


@pytest.mark.parametrize(
    ("spec", "note"),
    [
        (
            Width(),
            "hidden_size 24 → 48; intermediate_size 40 → 80; num_attention_heads 4 → 8; "
            "num_key_value_heads 2 → 4",
        ),
        (
            Width(hidden_size=32),
            "hidden_size 24 → 32; intermediate_size 40 → 53; head counts unchanged",
        ),
        (Width(intermediate_size=57), "intermediate_size 40 → 57; head counts unchanged"),
    ],
)
def test_the_note_says_what_grows_and_which_heads_stay(spec: Width, note: str) -> None:
    assert build_steps(Model(_config()), [spec], seed=0)[0].notes == (note,)


def test_the_note_says_where_moments_are_a_mean() -> None:
    spread = Width(num_key_value_heads=4, head_strategy="gqa")
    sizes, moments = build_steps(Model(_config()), [spread], seed=0)[0].notes
    assert sizes == "num_key_value_heads 2 → 4"
    assert "moments of k and v are averaged" in moments
    whole = Width(num_attention_heads=8, head_strategy="gqa")
    assert build_steps(Model(_config()), [whole], seed=0)[0].notes == ("num_attention_heads 4 → 8",)


@pytest.mark.parametrize("is_tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    "spec", [Width(), Width(hidden_size=32), Width(num_attention_heads=6)], ids=str
)
def test_parameter_count_as_predicted(spec: Width, is_tied: bool) -> None:
    target = spec.target_config(Model(_config(is_tied=is_tied)))
    model = new_model(Model(target), seed=0)
    assert sum(p.numel() for p in model.parameters()) == Model(target).num_parameters


def test_shares_by_hand() -> None:
    """Neuron 0 three times (weights 1, 1/9, 1/81 of 91/81), neuron 1 twice, neuron 2 once."""
    source = torch.tensor([0, 1, 2, 0, 1, 0])
    expected = torch.tensor([81 / 91, 0.9, 1.0, 9 / 91, 0.1, 1 / 91], dtype=torch.float64)
    torch.testing.assert_close(_split_shares(source, 3, equal=False), expected)
    expected = torch.tensor([1 / 3, 0.5, 1.0, 1 / 3, 0.5, 1 / 3], dtype=torch.float64)
    torch.testing.assert_close(_split_shares(source, 3, equal=True), expected)


# Other families


def _of_family(model_type: str, **changes: object) -> Config:
    sizes = {
        "moe_intermediate_size": 12,
        "shared_expert_intermediate_size": 20,
        "num_experts": 4,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    }
    return {**_config(), **sizes, "model_type": model_type, **changes}


@pytest.mark.parametrize(
    ("model_type", "spec", "sizes"),
    [
        ("mixtral", Width(), {"intermediate_size": 80}),
        ("mixtral", Width(intermediate_size=57), {"intermediate_size": 57, "hidden_size": 24}),
        (
            "qwen2_moe",
            Width(),
            {
                "moe_intermediate_size": 24,
                "intermediate_size": 80,
                "shared_expert_intermediate_size": 40,
            },
        ),
        (  # 18/12 of every size: the target is the size of an expert
            "qwen2_moe",
            Width(intermediate_size=18),
            {
                "moe_intermediate_size": 18,
                "intermediate_size": 60,
                "shared_expert_intermediate_size": 30,
                "hidden_size": 24,
            },
        ),
        (
            "qwen3_moe",
            Width(hidden_size=37),
            {"moe_intermediate_size": 18, "intermediate_size": 62, "num_attention_heads": 4},
        ),
    ],
)
def test_experts_grow_by_their_own_keys_and_the_rest_by_ratio(
    model_type: str, spec: Width, sizes: dict[str, int]
) -> None:
    config = _of_family(model_type)
    target = spec.target_config(Model(config))
    assert {key: target[key] for key in sizes} == sizes
    for key in ("num_experts", "num_local_experts", "num_experts_per_tok"):
        assert target[key] == config[key]


def test_an_experts_size_is_what_must_not_shrink_and_what_the_note_names() -> None:
    config = _of_family("qwen3_moe")
    with pytest.raises(RequestError, match=r"intermediate_size = 11: .* the model's 12; .* 12"):
        Width(intermediate_size=11).target_config(Model(config))
    (step,) = build_steps(Model(config), [Width(intermediate_size=24)], seed=0)
    assert step.notes == (
        "intermediate_size 40 → 80; moe_intermediate_size 12 → 24; head counts unchanged",
    )


@pytest.mark.parametrize("model_type", RMS)
@pytest.mark.parametrize("stated", [None, 10])
def test_the_size_of_a_head_is_stated_where_it_would_be_derived(
    model_type: str, stated: int | None
) -> None:
    config = _of_family(model_type, head_dim=stated)
    target = Width(hidden_size=48).target_config(Model(config))
    assert target["head_dim"] == (stated or 6)


@pytest.mark.parametrize("model_type", RMS)
def test_odd_hidden_sizes_are_refused_where_the_class_refuses_them(model_type: str) -> None:
    config = _of_family(model_type)
    family = FAMILIES[model_type]
    if not family.heads_divide_hidden:
        assert Width(hidden_size=25).target_config(Model(config))["hidden_size"] == 25
        return
    with pytest.raises(RequestError, match=rf"{model_type} accepts only .*nearest: 28\."):
        Width(hidden_size=25).target_config(Model(config))


def test_what_gemma_scales_scores_by_stays() -> None:
    config = _of_family("gemma3_text", query_pre_attn_scalar=9)
    target = Width().target_config(Model(config))
    assert target["query_pre_attn_scalar"] == 9


# Sizes that kernels and quantisers take


@pytest.mark.parametrize(
    ("spec", "ffn", "reached"),
    [
        (Width(hidden_size=1344), 4864, 7296),  # Qwen2.5-0.5B by 1.5 is a multiple of 64 anyway
        (Width(hidden_size=966), 4864, 5248),  # 5244
        (Width(hidden_size=966, multiple_of=256), 4864, 5120),
        (Width(hidden_size=966, multiple_of=128), 4864, 5248),
        (Width(hidden_size=966, multiple_of=1), 4864, 5244),
        (Width(hidden_size=966), 4900, 5283),  # not one before
        (Width(hidden_size=966), 64, 69),  # too small to round without being asked
        (Width(hidden_size=966, multiple_of=64), 64, 64),
        (Width(hidden_size=966, multiple_of=256), 5000, 5376),
        (Width(hidden_size=966, multiple_of=64), 90, 128),  # 97, and 64 would shrink it
        (Width(hidden_size=966, intermediate_size=5244), 4864, 5244),  # what is named is kept
        (Width(hidden_size=966, intermediate_size=4864, multiple_of=256), 4864, 4864),
        (Width(num_attention_heads=28, num_key_value_heads=4, multiple_of=256), 4900, 4900),
    ],
)
def test_an_ffn_that_follows_by_ratio_is_rounded(spec: Width, ffn: int, reached: int) -> None:
    sizes = {"hidden_size": 896, "num_attention_heads": 14, "num_key_value_heads": 2}
    config = {**_config(), **sizes, "intermediate_size": ffn, "head_dim": 64}
    assert spec.target_config(Model(config))["intermediate_size"] == reached


def test_experts_are_rounded_each_by_its_own_size() -> None:
    sizes = {"hidden_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 4}
    changes = {"intermediate_size": 2560, "moe_intermediate_size": 704}
    config = _of_family("qwen2_moe", **sizes, **changes, shared_expert_intermediate_size=1000)
    target = Width(hidden_size=1216).target_config(Model(config))
    assert target["intermediate_size"] == 3072  # 3040
    assert target["moe_intermediate_size"] == 832  # 836
    assert target["shared_expert_intermediate_size"] == round(1000 * 1216 / 1024)


@given(
    ffn=st.integers(1, 20_000),
    ratio=st.fractions(1, 4),
    multiple=st.sampled_from([None, 1, 64, 128, 256, 1000]),
)
def test_rounding_never_shrinks_and_stays_near(
    ffn: int, ratio: float, multiple: int | None
) -> None:
    hidden = 4096 + int((ratio - 1) * 4096)
    spec = Width(hidden_size=hidden, multiple_of=multiple)
    config = {**_config(), "hidden_size": 4096, "intermediate_size": ffn}
    reached, exact = _ffn_or_none(spec, config), ffn * hidden / 4096
    if reached is None:  # nothing grows
        return
    used = spec.multiple_for(ffn)
    assert reached >= ffn and reached - exact < used
    assert abs(reached - exact) <= used / 2 or exact // used * used < ffn
    assert hidden == 4096 or reached == ffn or reached % used == 0


def _ffn_or_none(spec: Width, config: Config) -> int | None:
    try:
        return int(spec.target_config(Model(config))["intermediate_size"])
    except RequestError:
        return None
