"""Granite: Llama's tensors, and four constants that the model multiplies with.

`embedding_multiplier`, `attention_multiplier`, `residual_multiplier` and `logits_scaling` depend on
no size, so whatever grows they stay: a map that keeps what each of them is multiplied with keeps
the function. (Under μP another width would get others, and compute something else.)
"""

from tritter.families.decoder import (
    attention,
    decoder_tensors,
    dense_ffn,
    ffn_norm,
)
from tritter.families.family import Family

GRANITE = Family(
    model_type="granite",
    architecture="GraniteForCausalLM",
    heads_divide_hidden=False,
    tensors=decoder_tensors(
        *attention(biases="qkvo", bias_key="attention_bias"),
        ffn_norm(),
        *dense_ffn(bias_key="mlp_bias"),
    ),
)
