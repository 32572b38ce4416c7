"""Small stock models with experts, of each family that has them."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

_SHAPE = {
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
# Widths of experts are multiples of 4: torch's grouped product wants rows of 16 bytes.
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {"shared_expert_intermediate_size": 12, "norm_topk_prob": False, **_EXPERTS},
    "qwen3_moe": {"mlp_only_layers": [0], "norm_topk_prob": True, **_EXPERTS},
}


def tiny_moe(family: str, **changes: Any) -> PreTrainedModel:
    """Return a stock model with random weights and gains, its experts computed one by one."""
    torch.manual_seed(0)
    options = {**_SHAPE, **FAMILIES[family], **changes}
    config = AutoConfig.for_model(family, **options)
    model = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, experts_implementation="eager"
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.copy_(1 + 0.3 * torch.randn(parameter.shape))
    return model.eval()


def num_experts(model: PreTrainedModel) -> int:
    experts = {m.num_experts for m in model.modules() if type(m).__name__.endswith("TopKRouter")}
    (count,) = experts
    return int(count)
