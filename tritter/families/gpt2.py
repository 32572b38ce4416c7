"""GPT-2: LayerNorm, learned positions, q, k and v side by side, a plain FFN, a tied head.

Its matrices lie transposed. The table of positions has a row for each place in a sequence, and
grows with the stream alone.
"""

from tritter.families.decoder import HEAD_INPUT
from tritter.families.family import Family
from tritter.families.layer_norm import (
    attention,
    embedding,
    head,
    layer_norm,
    learned_positions,
    plain_ffn,
)

_MODEL = "transformer."
_LAYER = _MODEL + "h.{layer}."

GPT2 = Family(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    heads_divide_hidden=True,
    tensors=(
        embedding(_MODEL + "wte"),
        learned_positions(_MODEL + "wpe"),
        *attention(
            norm=_LAYER + "ln_1",
            qkv=_LAYER + "attn.c_attn",
            output=_LAYER + "attn.c_proj",
            are_apart=True,
            is_transposed=True,
        ),
        *plain_ffn(
            norm=_LAYER + "ln_2",
            up=_LAYER + "mlp.c_fc",
            down=_LAYER + "mlp.c_proj",
            is_transposed=True,
        ),
        *layer_norm("final_norm", _MODEL + "ln_f", HEAD_INPUT, layers="none"),
        head("lm_head", "lm_head"),
    ),
    sizes={
        "num_hidden_layers": "n_layer",
        "hidden_size": "n_embd",
        "intermediate_size": "n_inner",
        "num_attention_heads": "n_head",
        "vocab_size": "vocab_size",
        "max_position_embeddings": "n_positions",
    },
    subtracts_mean=True,
    ffn_ratio=4,
    numbered_if="scale_attn_by_inverse_layer_idx",
    omitted_prefix=_MODEL,
)
