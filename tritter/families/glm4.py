"""GLM-4: gate and up are one tensor, norms stand behind attention and FFN, biases on q, k, v."""

from tritter.families.decoder import (
    attention,
    decoder_tensors,
    dense_ffn,
    ffn_norm,
)
from tritter.families.family import Family

GLM4 = Family(
    model_type="glm4",
    architecture="Glm4ForCausalLM",
    heads_divide_hidden=False,
    tensors=decoder_tensors(
        *attention(output_norm="post_self_attn_layernorm", biases="qkv", bias_key="attention_bias"),
        ffn_norm(),
        *dense_ffn(output_norm="post_mlp_layernorm", within="mlp.gate_up_proj"),
    ),
    turns_neighbours=True,
)
