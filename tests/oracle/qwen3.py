"""Independent oracle of Qwen3: the stock model."""

from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from tests.oracle import with_random_vectors


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
    return with_random_vectors(Qwen3ForCausalLM(Qwen3Config(**options)))
