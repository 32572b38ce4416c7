"""Qwen2: biases on q, k and v, always; and its MoE, with an expert that every token meets."""

from tritter.families.decoder import (
    EXPERT_SIZES,
    attention,
    decoder_tensors,
    dense_ffn,
    experts,
    ffn_norm,
    shared_expert,
)
from tritter.families.family import Family

QWEN2 = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    heads_divide_hidden=False,
    tensors=decoder_tensors(*attention(biases="qkv"), ffn_norm(), *dense_ffn()),
    per_layer_config_keys=("layer_types",),
    windows="layer_types",
)

QWEN2_MOE = Family(
    model_type="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    heads_divide_hidden=False,
    tensors=decoder_tensors(
        *attention(biases="qkv", bias_key="qkv_bias"),
        ffn_norm(),
        *dense_ffn(layers="dense"),
        *experts(module="mlp", gate="gate_proj", up="up_proj", down="down_proj", layers="sparse"),
        *shared_expert(),
    ),
    sizes={
        **EXPERT_SIZES,
        "num_experts": "num_experts",
        "shared_expert_size": "shared_expert_intermediate_size",
    },
    per_layer_config_keys=("layer_types",),
    windows="layer_types",
    sparse_layers="pattern",
)
