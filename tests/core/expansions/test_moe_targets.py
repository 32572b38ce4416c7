"""The number of experts: defaults, notes and refusals."""

from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from tests import oracle
from tests.oracle import growth as oracle_growth
from tests.oracle.families import tiny
from tritter.core.expansions import Moe, build_steps, target_model
from tritter.core.expansions.targets import reach_parameters
from tritter.core.families import Model
from tritter.errors import RequestError
from tritter.transform import expand


def test_what_is_said() -> None:
    config = oracle_growth.config_of(tiny("qwen3", hidden_size=22, layer_types=None))
    (step,) = build_steps(Model(config), [Moe(noise=0.0, granularity=2)], seed=0)
    words = " ".join(step.notes)
    target = step.target
    assert "qwen3 → qwen3_moe: 16 experts per layer, 4 per token" in words
    assert f"{target.num_active_parameters:,}" in words
    assert f"of {target.num_parameters:,} parameters" in words
    assert "until they differ, only a balance loss" in words
    assert "only at the start" in words
    assert 'experts_implementation="eager"' in words


def test_target_params_chooses_the_number_of_experts() -> None:
    config = oracle_growth.config_of(tiny("llama"))
    wanted = target_model(Model(config), [Moe(num_experts=13)]).config
    count = Model(wanted).num_parameters
    (found,) = reach_parameters(Model(config), [Moe(noise=0.0)], count + 20)
    assert found == Moe(num_experts=13, noise=0.0)
    (found,) = reach_parameters(Model(config), [Moe(granularity=2)], count)
    assert isinstance(found, Moe) and found.num_experts is not None and not found.num_experts % 2
    with pytest.raises(RequestError, match="num_experts 4"):
        reach_parameters(Model(config), [Moe(num_experts=4)], count)
    gemma = oracle_growth.config_of(tiny("gemma3_text"))
    with pytest.raises(RequestError, match="has no MoE partner"):
        reach_parameters(Model(gemma), [Moe()], count)


REFUSED: dict[str, tuple[str, dict[str, Any], Moe, str]] = {
    "no partner": ("gemma3_text", {}, Moe(), r"gemma3_text has no MoE partner.*llama \(mix"),
    "experts already": ("mixtral", {}, Moe(), "mixtral has experts already.*moe_add"),
    "biases": ("llama", {"mlp_bias": True}, Moe(), "mlp_bias = True.*mixtral.*no biases"),
    "attention biases": ("llama", {"attention_bias": True}, Moe(), "attention_bias = True"),
    "more than there are": (
        "llama",
        {},
        Moe(num_experts=4, experts_per_token=5),
        r"experts_per_token = 5.*at most 4",
    ),
    "default k of too few": ("llama", {}, Moe(num_experts=1), "num_experts = 1.*at least 2"),
    "pieces": ("llama", {}, Moe(granularity=3), r"granularity = 3: .*40 neurons; nearest: 2"),
    "pieces of experts": (
        "llama",
        {},
        Moe(granularity=2, num_experts=7),
        r"num_experts = 7: must be a multiple of expansion.moe.granularity = 2.*nearest: 6 or 8",
    ),
    "pieces of a token": (
        "llama",
        {},
        Moe(granularity=4, num_experts=16, experts_per_token=2),
        r"experts_per_token = 2.*at least 4; nearest: 4",
    ),
    "all layers": ("mistral", {}, Moe(layers=(0,)), "leaves layers 1, 2 dense.*mixtral"),
    "layer that is not there": ("qwen3", {}, Moe(layers=(1, 3)), r"layers = \[1,3\].*0 to 2"),
    "no layer": ("qwen3", {}, Moe(layers=()), r"layers = \[\]"),
    "mixed attention": (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
        Moe(),
        "mixes full and sliding attention",
    ),
}


@pytest.mark.quick_cases(6)
@pytest.mark.parametrize(
    ("family", "changes", "spec", "message"), REFUSED.values(), ids=REFUSED.keys()
)
def test_what_cannot_be_is_refused_and_nothing_is_written(
    tmp_path: Path, family: str, changes: dict[str, Any], spec: Moe, message: str
) -> None:
    source = oracle.saved(tiny(family, **changes), tmp_path / "source")
    with pytest.raises(RequestError, match=message):
        expand(source, tmp_path / "result", [spec])
    assert not (tmp_path / "result").exists()


def test_a_config_without_its_rotary_base_gets_that_of_its_class() -> None:
    config = oracle_growth.config_of(tiny("llama"))
    del config["rope_parameters"]
    found = target_model(Model(config), [Moe()]).config["rope_parameters"]
    assert found == LlamaConfig().rope_parameters
