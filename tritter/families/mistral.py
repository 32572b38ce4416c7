"""Mistral: Llama's tensors without biases, heads of any size; and Mixtral, its MoE."""

from tritter.families.decoder import (
    EXPERT_SIZES,
    attention,
    decoder_tensors,
    dense_ffn,
    experts,
    ffn_norm,
)
from tritter.families.family import Family

MISTRAL = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    heads_divide_hidden=False,
    tensors=decoder_tensors(*attention(), ffn_norm(), *dense_ffn()),
    windows="all",
)

MIXTRAL = Family(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    heads_divide_hidden=False,
    tensors=decoder_tensors(
        *attention(),
        ffn_norm(),
        *experts(module="block_sparse_moe", gate="w1", up="w3", down="w2", layers="all"),
    ),
    sizes={
        **EXPERT_SIZES,
        "num_experts": "num_local_experts",
        "expert_size": "intermediate_size",
    },
    sparse_layers="all",
    windows="all",
)
