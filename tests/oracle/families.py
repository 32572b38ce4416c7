"""Independent oracle of every family: small stock models, each with what only its family has."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

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
    "gemma3_text": {"sliding_window": 4, "sliding_window_pattern": 2, "query_pre_attn_scalar": 9},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {**_EXPERTS, "shared_expert_intermediate_size": 20, "mlp_only_layers": [1]},
    "qwen3_moe": {**_EXPERTS, "decoder_sparse_step": 2, "norm_topk_prob": True},
}
DENSE = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text")
SPARSE = ("mixtral", "qwen2_moe", "qwen3_moe")
HEADS_DIVIDE_HIDDEN = ("llama", "gemma3_text")


def tiny(family: str, **changes: Any) -> PreTrainedModel:
    """Return a small stock model with random weights, gains and biases included."""
    options = {**_SHAPE, **OWN[family], **changes}
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **options)
    model = stock_of(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                around = 0.0 if "bias" in name or family == "gemma3_text" else 1.0
                parameter.copy_(around + 0.3 * torch.randn(parameter.shape))
    return model


def stock_of(config: Any, *, dtype: torch.dtype) -> PreTrainedModel:
    """Return a stock model of a config, its experts computed one by one (in any dtype and size)."""
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, experts_implementation="eager")
    return model.eval()
