"""GPT-NeoX (Pythia): LayerNorm, q, k and v of each head together, a plain FFN, an untied head.

Attention and FFN of a layer read the same stream, or one after the other. A share of each head is
turned, a quarter in Pythia.
"""

from tritter.families.decoder import HEAD_INPUT
from tritter.families.dimensions import DENSE_SIZES
from tritter.families.family import Family
from tritter.families.layer_norm import attention, embedding, head, layer_norm, plain_ffn

_LAYER = "gpt_neox.layers.{layer}."
_OF_HEADS = ("num_key_value_heads", "head_dim")  # one of each per query head; hidden size by heads

GPT_NEOX = Family(
    model_type="gpt_neox",
    architecture="GPTNeoXForCausalLM",
    heads_divide_hidden=True,
    tensors=(
        embedding("gpt_neox.embed_in"),
        *attention(
            norm=_LAYER + "input_layernorm",
            qkv=_LAYER + "attention.query_key_value",
            output=_LAYER + "attention.dense",
            bias_key="attention_bias",
        ),
        *plain_ffn(
            norm=_LAYER + "post_attention_layernorm",
            up=_LAYER + "mlp.dense_h_to_4h",
            down=_LAYER + "mlp.dense_4h_to_h",
        ),
        *layer_norm("final_norm", "gpt_neox.final_layer_norm", HEAD_INPUT, layers="none"),
        head("embed_out", "lm_head"),
    ),
    sizes={name: key for name, key in DENSE_SIZES.items() if name not in _OF_HEADS},
    subtracts_mean=True,
    parallel_if="use_parallel_residual",
)
