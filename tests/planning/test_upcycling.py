"""The scaling law of upcycling against numbers by hand, and what it says of a budget."""

import math
from types import SimpleNamespace
from typing import Any

import pytest

from tritter.core.expansions import LlamaPro, Moe, Width, target_model
from tritter.core.families import Config, Model, llama_config
from tritter.planning.upcycling import (
    Upcycling,
    _dense_loss,
    _scratch_loss,
    _upcycled_loss,
    upcycling_notes,
)

B = 1e9


def family_config(*, hidden_size: int, layers: int) -> Config:
    return llama_config(
        vocab_size=32_000, hidden_size=hidden_size, intermediate_size=4 * hidden_size,
        num_hidden_layers=layers, num_attention_heads=16, num_key_value_heads=8,
        tie_word_embeddings=True, rms_norm_eps=1e-6, rope_theta=1e4,
        max_position_embeddings=2048, initializer_range=0.02,
    )  # fmt: skip


def test_losses_by_hand() -> None:
    """1B after 74B tokens: ln N = 20.723, ln D1 = 25.027; 37B tokens more: ln D2 = 24.334."""
    assert _dense_loss(B, 74 * B) == pytest.approx(
        8.83 * math.exp(-0.088 * 25.027) + 12.3 * math.exp(-0.116 * 20.723) + 0.165, abs=1e-3
    )
    assert _scratch_loss(B, 37 * B) == pytest.approx(
        32 * math.exp(-0.161 * 24.334) + 7.05 * math.exp(-0.08 * 20.723) + 0.165, abs=1e-3
    )
    exponent = -0.085 + 7.98e-4 * 25.027
    assert _upcycled_loss(B, 74 * B, 37 * B) == pytest.approx(
        16.3 * math.exp(-0.043 * 25.027) * math.exp(exponent * 24.334)
        + 8.53 * math.exp(-0.112 * 20.723)
        + 0.165,
        abs=1e-3,
    )


def test_the_papers_upcycled_model_is_better_than_its_dense_one() -> None:
    """Table 7: 8x1B after 37B tokens beats the 1B model after 74B, by what 2.5 times N would."""
    gain = _dense_loss(B, 74 * B) - _upcycled_loss(B, 74 * B, 37 * B)
    assert 0.05 < gain < 0.15


def test_the_interaction_makes_long_dense_training_a_worse_start() -> None:
    """The gain per e-fold of D2 shrinks with D1."""
    slopes = [
        math.log(
            (_upcycled_loss(B, dense, 10 * B) - 0.165 - 8.53 / B**0.112)
            / (_upcycled_loss(B, dense, 100 * B) - 0.165 - 8.53 / B**0.112)
        )
        for dense in (10 * B, 100 * B, 1000 * B)
    ]
    assert slopes[0] > slopes[1] > slopes[2]


def of(tokens: float, *, parameters: float = B, dense: float = 74 * B) -> Upcycling:
    return Upcycling(parameters=parameters, dense_tokens=dense, tokens=tokens, cost=1.5)


def test_budgets_that_pay_lie_between_both_controls() -> None:
    found = of(20 * B)
    low, high = found.pays_from, found.pays_until
    assert 1e9 < low < 20 * B < high < 100 * B
    dense = _dense_loss(B, 74 * B + 1.5 * low)
    assert _upcycled_loss(B, 74 * B, low) == pytest.approx(dense, abs=2e-3)
    assert _upcycled_loss(B, 74 * B, high) == pytest.approx(_scratch_loss(B, high), abs=2e-3)
    assert found.pays
    assert "20 B tokens of upcycled training after 74 B" in found.text
    assert "is predicted to pay" in found.text
    assert not of(low / 2).pays
    assert not of(high * 2).pays
    assert "is not predicted to pay" in of(low / 2).text


def test_sizes_outside_the_law_are_reported() -> None:
    assert "extrapolated" in of(20 * B, parameters=7 * B).text
    assert "extrapolated" not in of(20 * B).text
    small = of(1e6, parameters=1e6, dense=2e6).text
    assert small == (
        "1 M tokens of upcycled training after 2 M of dense training; the scaling law of upcycling "
        "was not fitted to models this small"
    )


def test_a_plan_has_one_for_models_with_a_partner() -> None:
    source = Model(family_config(hidden_size=2048, layers=16))
    budget = {"dense_tokens": 20 * B, "gpu_flops": 1e20, "sequence_length": 1024}
    found = Upcycling.of_budget(source, **budget)  # type: ignore[arg-type]
    assert found is not None
    assert 1.3 < found.cost < 2  # a token uses two FFNs instead of one
    other = source.changed({**source.config, "model_type": "gpt2"})
    assert Upcycling.of_budget(other, **budget) is None  # type: ignore[arg-type]
    biased = source.changed({**source.config, "attention_bias": True})
    assert Upcycling.of_budget(biased, **budget) is None  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("tokens", "text"),
    [
        (0.0, "0"),
        (999.4, "999"),
        (999.7, "1 k"),
        (12_345.0, "12.3 k"),
        (999.4e9, "999 B"),
        (999.7e9, "1 T"),
        (999.7e12, "1,000 T"),
        (1e15, "1,000 T"),
        (1.001e15, "over 1,000 T"),
        (3.92e22, "over 1,000 T"),
        (math.inf, "over 1,000 T"),
    ],
)
def test_units_are_chosen_after_rounding(tokens: float, text: str) -> None:
    assert of(tokens, parameters=1e6).text.startswith(f"{text} tokens of upcycled")


@pytest.mark.parametrize(
    ("family", "options", "is_fitted"),
    [
        ("llama", {}, True),
        ("llama", {"num_experts": 8, "experts_per_token": 2, "noise": 0.0}, True),
        ("llama", {"target": "mixtral"}, True),
        ("llama", {"num_experts": 64, "experts_per_token": 8}, False),
        ("llama", {"num_experts": 4}, False),
        ("llama", {"experts_per_token": 1}, False),
        ("llama", {"granularity": 2}, False),
        ("llama", {"granularity": 2, "num_experts": 8, "experts_per_token": 2}, False),
        ("llama", {"reinit_fraction": 0.5}, False),
        ("llama", {"target": "qwen2_moe"}, False),
        ("llama", {"target": "qwen2_moe", "layers": (0, 1)}, False),
        ("llama", {"experts_from": tuple("abcdefgh")}, False),
        ("qwen2", {}, False),  # has a shared expert by default
    ],
)
def test_other_experts_get_their_budgets_only(
    family: str, options: dict[str, Any], is_fitted: bool
) -> None:
    base = Model({**family_config(hidden_size=2048, layers=16), "model_type": family})
    (note,) = upcycling_notes(a_run([Moe(**options)]), base, 20 * B)
    assert note.startswith("upcycling: 410 k tokens of upcycled training after 20 B of dense")
    assert ("predicted to pay" in note) == is_fitted
    assert ("was fitted to 8 experts, 2 per token" in note) == (not is_fitted)


def a_run(expansion: list[Any]) -> Any:
    return SimpleNamespace(
        expansion=expansion,
        data=SimpleNamespace(sequence_length=128, batch_size=16),
        training=SimpleNamespace(max_steps=100),
        trainer=SimpleNamespace(accumulate_grad_batches=2),
    )


def test_a_run_prints_one_line_with_both_budgets() -> None:
    base = Model(family_config(hidden_size=32, layers=2))
    (known,) = upcycling_notes(a_run([Moe()]), base, 1_000_000.0)
    assert known.startswith("upcycling: 410 k tokens of upcycled training after 1 M of dense")
    (unknown,) = upcycling_notes(a_run([Moe()]), base, None)
    assert "410 k tokens of upcycled training" in unknown and "--source-tokens" in unknown
    assert not list(upcycling_notes(a_run([]), base, None))


def test_expansions_before_it_make_the_model_that_gets_experts() -> None:
    base = Model(family_config(hidden_size=2048, layers=16))
    (alone,) = upcycling_notes(a_run([Moe()]), base, 20 * B)
    (after,) = upcycling_notes(a_run([Width(hidden_size=2560), Moe()]), base, 20 * B)
    grown = target_model(base, [Width(hidden_size=2560)])
    assert after != alone and [after] == list(upcycling_notes(a_run([Moe()]), grown, 20 * B))
    later = Moe(target="qwen2_moe", layers=(20,))  # a layer that only the grown model has
    assert len(list(upcycling_notes(a_run([LlamaPro(), later]), base, 20 * B))) == 1
    assert not list(upcycling_notes(a_run([later]), base, 20 * B))
