"""Independent oracle of every family: small stock models, each with what only its family has."""

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests.suites import SIX_FAMILIES
from tritter.core.expansions import Width

_SHAPE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-3,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 12, "num_experts": 4}

OWN: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 4},
    "qwen2": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "qwen3": {},
    "smollm3": {"no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": 4},
    "granite": {
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.7,
        "residual_multiplier": 0.4,
        "logits_scaling": 2.5,
    },
    "olmo2": {},
    "phi3": {
        "sliding_window": 4,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10_000.0,
            "partial_rotary_factor": 0.75,
        },
    },
    "glm4": {},
    "gemma2": {
        "sliding_window": 4,
        "query_pre_attn_scalar": 9,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    },
    "gemma3_text": {"sliding_window": 4, "sliding_window_pattern": 2, "query_pre_attn_scalar": 9},
    "gpt_neox": {"rotary_pct": 0.5},
    "gpt2": {},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {**_EXPERTS, "shared_expert_intermediate_size": 20, "mlp_only_layers": [1]},
    "qwen3_moe": {**_EXPERTS, "decoder_sparse_step": 2, "norm_topk_prob": True},
}
LAYER_NORM = (
    "gpt_neox",
    "gpt2",
)  # and with it heads as wide as the stream together, FFNs without a gate
STACKED = ("phi3", "glm4")  # gate and up are one tensor, and other pairs are turned than Llama's
SPARSE = ("mixtral", "qwen2_moe", "qwen3_moe")
DENSE = tuple(family for family in OWN if family not in SPARSE)
GROWABLE = tuple(family for family in DENSE if family not in STACKED)
RMS = tuple(family for family in OWN if family not in LAYER_NORM)
HEADS_DIVIDE_HIDDEN = ("llama", "gemma2", "gemma3_text", *LAYER_NORM)
GEMMA = ("gemma2", "gemma3_text")
# Made of mechanisms that the others prove, or that tests/core/expansions/test_further_families.py
# does; generic tests of them are slow, but for those of the six
FURTHER = ("smollm3", "granite", "olmo2", "phi3", "glm4", "gemma2", *LAYER_NORM)


# What these classes call it; heads have no size of their own there, and keys no count
_LAYER_NORM_KEYS = {
    "gpt_neox": {"rms_norm_eps": "layer_norm_eps", "num_key_value_heads": "", "head_dim": ""},
    "gpt2": {
        "rms_norm_eps": "layer_norm_epsilon",
        "num_key_value_heads": "",
        "head_dim": "",
        "hidden_size": "n_embd",
        "intermediate_size": "n_inner",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "n_positions",
        "hidden_act": "activation_function",
    },
}


def key_of(family: str, name: str) -> str:
    """Return what a family's config calls one of Llama's keys; empty: it has none."""
    return _LAYER_NORM_KEYS.get(family, {}).get(name, name)


def marks_of(family: str) -> tuple[pytest.MarkDecorator, ...]:
    """Return the marks of a generic test of a family: six are quick, the further ones slow."""
    if family in SIX_FAMILIES:
        return ()
    return (pytest.mark.slow,) if family in FURTHER else (pytest.mark.full,)


def generic(families: Iterable[str] = tuple(OWN)) -> list[Any]:
    """Return families as parameters of a generic test."""
    return [pytest.param(family, marks=marks_of(family)) for family in families]


def tiny(family: str, **changes: Any) -> PreTrainedModel:
    """Return a small stock model with random weights, gains and biases included."""
    options = {**_SHAPE, **OWN[family], **changes}
    if family in LAYER_NORM:
        options = {key_of(family, key): value for key, value in options.items()}
        options.pop("", None)
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **options)
    model = stock_of(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                around = 0.0 if "bias" in name or family in GEMMA else 1.0
                parameter.copy_(around + 0.3 * torch.randn(parameter.shape))
    return model


def doubled(family: str) -> Width:
    """Return a width that the family takes exactly."""
    return Width(init="net2net") if family in LAYER_NORM else Width()


def final_norm_of(model: PreTrainedModel) -> nn.Module:
    """Return the norm before the head."""
    backbone: Any = model.base_model
    names = ("final_layer_norm", "ln_f", "norm")
    return next(getattr(backbone, name) for name in names if hasattr(backbone, name))


def layers_of(model: PreTrainedModel) -> Any:
    """Return the decoder layers."""
    backbone: Any = model.base_model
    return backbone.h if hasattr(backbone, "h") else backbone.layers


def stock_of(config: Any, *, dtype: torch.dtype) -> PreTrainedModel:
    """Return a stock model of a config, its experts computed one by one (in any dtype and size)."""
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, experts_implementation="eager")
    return model.to(dtype).eval()  # transformers 5.24 keeps some routers in float32


# Each eps and each way of the head is met quickly, the other two pairs in the slow suite
EPS_AND_TIES = [
    pytest.param(1e-3, False, id="eps 1e-3, untied"),
    pytest.param(1e-6, True, id="eps 1e-6, tied"),
    pytest.param(1e-3, True, id="eps 1e-3, tied", marks=pytest.mark.slow),
    pytest.param(1e-6, False, id="eps 1e-6, untied", marks=pytest.mark.slow),
]
