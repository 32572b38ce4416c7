"""Large published models: their configs grow on the meta device, and exactly at reduced size."""

from typing import Any

import pytest

from tests.core.families.model_types import example
from tritter.core.expansions import LlamaPro, MoeAdd, Width, target_model
from tritter.core.families import Config, Model
from tritter.errors import RequestError

# Model → its type, what differs from the defaults of the class, and its billions of parameters
MODELS: dict[str, tuple[str, dict[str, Any], float]] = {
    "gpt-oss-20b": ("gpt_oss", {"num_hidden_layers": 24, "num_local_experts": 32}, 20.9),
    "DeepSeek-V3": ("deepseek_v3", {}, 671.0),
    "Qwen3-Next-80B-A3B": ("qwen3_next", {}, 79.7),
    "GLM-4.5": (
        "glm4_moe",
        {
            "hidden_size": 5120,
            "num_hidden_layers": 92,
            "num_attention_heads": 96,
            "head_dim": 128,
            "intermediate_size": 12288,
            "moe_intermediate_size": 1536,
            "n_routed_experts": 160,
            "first_k_dense_replace": 3,
            "attention_bias": True,
            "use_qk_norm": True,
        },
        352.8,
    ),
    "Olmo-3-7B": (
        "olmo3",
        {"vocab_size": 100278, "num_key_value_heads": 32, "hidden_size": 4096,
         "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
        7.3,
    ),
    "Llama-4-Scout": (
        "llama4_text",
        {"interleave_moe_layer_step": 1, "num_local_experts": 16},
        107.8,
    ),
    "Granite-4.0-H-Small": (
        "granitemoehybrid",
        {
            "vocab_size": 100352,
            "hidden_size": 4096,
            "num_hidden_layers": 40,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "num_local_experts": 72,
            "num_experts_per_tok": 10,
            "intermediate_size": 768,
            "shared_intermediate_size": 1536,
            "mamba_n_heads": 128,
            "mamba_d_head": 64,
            "mamba_d_state": 128,
            "mamba_n_groups": 1,
            "tie_word_embeddings": True,
            "layer_types": ["attention" if layer % 10 == 5 else "mamba" for layer in range(40)],
        },
        32.2,
    ),
    "Gemma-4-E4B": (  # its decoder
        "gemma4_text",
        {
            "hidden_size": 2560,
            "num_hidden_layers": 42,
            "intermediate_size": 10240,
            "num_key_value_heads": 2,
            "num_kv_shared_layers": 18,
        },
        7.46,
    ),
    "Falcon-H1-0.5B": (
        "falcon_h1",
        {
            "vocab_size": 32784,
            "hidden_size": 1024,
            "intermediate_size": 2048,
            "num_hidden_layers": 36,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "mamba_d_ssm": 1536,
            "mamba_n_heads": 24,
            "mamba_d_head": 64,
            "mamba_d_state": 128,
            "mamba_n_groups": 1,
        },
        0.52,
    ),
}  # fmt: skip


def config_of(model: str) -> Config:
    model_type, changes, _ = MODELS[model]
    return example(model_type, **changes)


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_a_published_model_grows_on_the_meta_device(model: str) -> None:
    config, billions = config_of(model), MODELS[model][2]
    assert Model(config).num_parameters / 1e9 == pytest.approx(billions, rel=0.01)
    sizes = Model(config).sizes
    wide = Model(config).widened.sizes
    requests: list[LlamaPro | Width] = [
        LlamaPro(target_layers=2 * sizes.num_hidden_layers),
        Width(hidden_size=sizes.hidden_size, intermediate_size=2 * wide.ffn_size),
        Width(hidden_size=2 * sizes.hidden_size, init="net2net"),
    ]
    if model == "Gemma-4-E4B":  # the last layers read the keys and values of layers 22 and 23
        positions = tuple(
            layer for layer in range(sizes.num_hidden_layers) if layer not in (22, 23)
        )
        requests[0] = LlamaPro(positions=positions)
        requests[2] = Width(hidden_size=2 * sizes.hidden_size)  # √hidden_size is a factor in it
    if model == "Granite-4.0-H-Small":
        with pytest.raises(RequestError, match="hidden_size"):
            target_model(Model(config), [requests.pop()])
    for request in requests:  # each is verified at the sizes of a twin
        assert (
            target_model(Model(config), [request]).num_parameters
            > 1.3 * Model(config).num_parameters
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "key", "expected"),
    [
        ("Qwen3-Next-80B-A3B", "num_experts", (1024, 20)),
        ("Granite-4.0-H-Small", "num_local_experts", (144, 20)),
    ],
)
def test_experts_double_where_copies_share_their_weight(
    model: str, key: str, expected: tuple[int, int]
) -> None:
    grown = target_model(Model(config_of(model)), [MoeAdd(addition="replicate", noise=0.0)]).config
    assert (grown[key], grown["num_experts_per_tok"]) == expected
