"""Gemma 3 (text): norms of gain 1 + w, also behind attention and FFN; embeddings times √hidden."""

from tritter.families.decoder import (
    attention,
    decoder_tensors,
    dense_ffn,
    ffn_norm,
)
from tritter.families.family import Family
from tritter.families.logical import Port

GEMMA3_TEXT = Family(
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    heads_divide_hidden=True,
    tensors=decoder_tensors(
        *attention(
            query_norm="each head",
            output_norm="post_attention_layernorm",
            biases="qkvo",
            bias_key="attention_bias",
        ),
        ffn_norm("pre_feedforward_layernorm"),
        *dense_ffn(output_norm="post_feedforward_layernorm"),
        embedding_port=Port.WRITE_SCALED,
    ),
    per_layer_config_keys=("layer_types",),
    windows="layer_types",
    norm_offset=1.0,
)
