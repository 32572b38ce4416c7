"""Independent oracle of Qwen3: the stock model, in float64 where an identity is tested."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.models.llama import modeling_llama
from transformers.models.qwen3 import modeling_qwen3

from tests import oracle


def tiny_qwen3(**changes: Any) -> Qwen3ForCausalLM:
    """Return a small stock Qwen3 with random weights; q/k gains and biases are random too.

    The hidden size is odd: no head count divides it, and Qwen3 does not ask for that.
    """
    options = {
        "vocab_size": 97,
        "hidden_size": 23,
        "intermediate_size": 37,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-3,
        "initializer_range": 0.3,
        "tie_word_embeddings": False,
        **changes,
    }
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                noise = torch.randn(parameter.shape)
                parameter.copy_(0.3 * noise if "bias" in name else 1 + 0.3 * noise)
    return model.eval()


@contextmanager
def float64_casts() -> Iterator[None]:
    """Lift the float32 that stock Llama and Qwen3 cast to (norms, rotary) to float64."""
    norm, rotary = modeling_qwen3.Qwen3RMSNorm, modeling_qwen3.Qwen3RotaryEmbedding
    kept = norm.forward, rotary.forward
    with oracle.float64_casts():
        norm.forward = modeling_llama.LlamaRMSNorm.forward
        rotary.forward = modeling_llama.LlamaRotaryEmbedding.forward
        try:
            yield
        finally:
            norm.forward, rotary.forward = kept
