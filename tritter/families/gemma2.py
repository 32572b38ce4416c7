"""Gemma 2: as Gemma 3 without norms per head; scores and logits are capped by a tanh.

The caps, and `query_pre_attn_scalar` in place of the size of a head, are constants: heads that are
kept or copied have the same scores, and a head that reads the same stream the same logits.
"""

from tritter.families.decoder import (
    attention,
    decoder_tensors,
    dense_ffn,
    ffn_norm,
)
from tritter.families.family import Family
from tritter.families.logical import Port

GEMMA2 = Family(
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    heads_divide_hidden=True,
    tensors=decoder_tensors(
        *attention(
            output_norm="post_attention_layernorm", biases="qkvo", bias_key="attention_bias"
        ),
        ffn_norm("pre_feedforward_layernorm"),
        *dense_ffn(output_norm="post_feedforward_layernorm"),
        embedding_port=Port.WRITE_SCALED,
    ),
    per_layer_config_keys=("layer_types",),
    windows="layer_types",
    norm_offset=1.0,
)
