"""SmolLM 3: Llama's tensors; some layers turn nothing by its position, and say so per layer."""

from tritter.families.decoder import (
    attention,
    decoder_tensors,
    dense_ffn,
    ffn_norm,
)
from tritter.families.family import Family

SMOLLM3 = Family(
    model_type="smollm3",
    architecture="SmolLM3ForCausalLM",
    heads_divide_hidden=False,
    tensors=decoder_tensors(
        *attention(biases="qkvo", bias_key="attention_bias"),
        ffn_norm(),
        *dense_ffn(bias_key="mlp_bias"),
    ),
    per_layer_config_keys=("layer_types", "no_rope_layers"),
    windows="layer_types",
)
