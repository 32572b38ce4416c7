"""Qwen3: a norm per head on queries and keys, heads of any size, kinds of layers; and its MoE."""

from tritter.families.decoder import (
    EXPERT_SIZES,
    attention,
    decoder_tensors,
    dense_ffn,
    experts,
    ffn_norm,
)
from tritter.families.family import Family

QWEN3 = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    heads_divide_hidden=False,
    tensors=decoder_tensors(
        *attention(query_norm="each head", biases="qkvo", bias_key="attention_bias"),
        ffn_norm(),
        *dense_ffn(),
    ),
    per_layer_config_keys=("layer_types",),
    windows="layer_types",
)

QWEN3_MOE = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    heads_divide_hidden=False,
    tensors=decoder_tensors(
        *attention(query_norm="each head", biases="qkvo", bias_key="attention_bias"),
        ffn_norm(),
        *dense_ffn(layers="dense"),
        *experts(module="mlp", gate="gate_proj", up="up_proj", down="down_proj", layers="sparse"),
    ),
    sizes={**EXPERT_SIZES, "num_experts": "num_local_experts"},
    per_layer_config_keys=("layer_types",),
    windows="all",
    sparse_layers="pattern",
)
