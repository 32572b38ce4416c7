"""Llama: the plain dense decoder."""

from tritter.families.decoder import (
    attention,
    decoder_tensors,
    dense_ffn,
    ffn_norm,
)
from tritter.families.dimensions import Config
from tritter.families.family import Family

LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    heads_divide_hidden=True,
    tensors=decoder_tensors(
        *attention(biases="qkvo", bias_key="attention_bias"),
        ffn_norm(),
        *dense_ffn(bias_key="mlp_bias"),
    ),
)


def llama_config(
    *,
    vocab_size: int,
    hidden_size: int,
    intermediate_size: int,
    num_hidden_layers: int,
    num_attention_heads: int,
    num_key_value_heads: int,
    tie_word_embeddings: bool,
    rms_norm_eps: float,
    rope_theta: float,
    max_position_embeddings: int,
    initializer_range: float,
) -> Config:
    """Return the content of a config.json for a new Llama model (end of text is token 0)."""
    return {
        "architectures": [LLAMA.architecture],
        "model_type": LLAMA.model_type,
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": num_attention_heads,
        "num_key_value_heads": num_key_value_heads,
        "head_dim": hidden_size // num_attention_heads,
        "hidden_act": "silu",
        "tie_word_embeddings": tie_word_embeddings,
        "rms_norm_eps": rms_norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": rope_theta},
        "max_position_embeddings": max_position_embeddings,
        "initializer_range": initializer_range,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": None,
        "dtype": "float32",
    }
