"""Small stock models of each family with experts."""

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from tests.oracle.families import tiny
from tritter.core.models import model_of

FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "qwen2_moe": {
        "shared_expert_intermediate_size": 12,
        "norm_topk_prob": False,
        "mlp_only_layers": [],
        "use_sliding_window": False,
    },
    "qwen3_moe": {"mlp_only_layers": [0], "decoder_sparse_step": 1},
}


def tiny_moe(family: str, **changes: Any) -> PreTrainedModel:
    """Return a stock model with random weights and gains, and experts that run one by one."""
    return tiny(family, **{**FAMILIES[family], **changes})


def num_experts(model: PreTrainedModel) -> int:
    experts = {m.num_experts for m in model.modules() if type(m).__name__.endswith("TopKRouter")}
    (count,) = experts
    return int(count)


def shared_names(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the parameters that all experts of a layer share."""
    return tuple(each.name for each in model_of(model).layout("live") if each.is_of_experts)
