"""Phi-3 and Phi-4: q, k and v are one tensor, and so are gate and up.

Heads keep their size whatever grows, and with it the share of it that is turned (Phi-4-mini turns
three quarters) and LongRoPE's factor for each turned pair.
"""

from tritter.families.decoder import (
    attention,
    decoder_tensors,
    dense_ffn,
    ffn_norm,
)
from tritter.families.family import Family

PHI3 = Family(
    model_type="phi3",
    architecture="Phi3ForCausalLM",
    heads_divide_hidden=False,
    tensors=decoder_tensors(
        *attention(within="self_attn.qkv_proj"),
        ffn_norm(),
        *dense_ffn(within="mlp.gate_up_proj"),
    ),
    windows="all",
)
