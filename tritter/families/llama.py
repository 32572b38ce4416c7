"""Llama: RMSNorm before attention and FFN, rotary positions, grouped-query attention, SwiGLU."""

from tritter.families.family import Axis, Config, Family, LogicalTensor, Port

_RESIDUAL_WRITE = Axis("residual", Port.WRITE)
_ATTENTION_READ = Axis("layers.{layer}.attention_input", Port.READ)
_FFN_READ = Axis("layers.{layer}.ffn_input", Port.READ)
_QUERY = "layers.{layer}.query"
_KEY_VALUE = "layers.{layer}.key_value"
_FFN = "layers.{layer}.ffn"


def _layer(name: str, disk_name: str, *axes: Axis, only_if: str = "") -> LogicalTensor:
    return LogicalTensor(
        "layers.{layer}." + name, "model.layers.{layer}." + disk_name, axes, only_if=only_if
    )


LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    heads_divide_hidden=True,
    spaces={
        "vocab": "vocab_size",
        "residual": "hidden_size",
        "layers.{layer}.attention_input": "hidden_size",
        _QUERY: "query_size",
        _KEY_VALUE: "key_value_size",
        "layers.{layer}.ffn_input": "hidden_size",
        _FFN: "intermediate_size",
        "head_input": "hidden_size",
    },
    tensors=(
        LogicalTensor(
            "embed", "model.embed_tokens.weight", (Axis("vocab", Port.READ), _RESIDUAL_WRITE)
        ),
        _layer(
            "attention_norm",
            "input_layernorm.weight",
            Axis("layers.{layer}.attention_input", Port.GAIN),
        ),
        _layer(
            "attention.q",
            "self_attn.q_proj.weight",
            Axis(_QUERY, Port.WRITE_NONLINEAR),
            _ATTENTION_READ,
        ),
        _layer(
            "attention.q_bias",
            "self_attn.q_proj.bias",
            Axis(_QUERY, Port.WRITE_NONLINEAR),
            only_if="attention_bias",
        ),
        _layer(
            "attention.k",
            "self_attn.k_proj.weight",
            Axis(_KEY_VALUE, Port.WRITE_NONLINEAR),
            _ATTENTION_READ,
        ),
        _layer(
            "attention.k_bias",
            "self_attn.k_proj.bias",
            Axis(_KEY_VALUE, Port.WRITE_NONLINEAR),
            only_if="attention_bias",
        ),
        _layer(
            "attention.v", "self_attn.v_proj.weight", Axis(_KEY_VALUE, Port.WRITE), _ATTENTION_READ
        ),
        _layer(
            "attention.v_bias",
            "self_attn.v_proj.bias",
            Axis(_KEY_VALUE, Port.WRITE),
            only_if="attention_bias",
        ),
        _layer("attention.o", "self_attn.o_proj.weight", _RESIDUAL_WRITE, Axis(_QUERY, Port.READ)),
        _layer(
            "attention.o_bias", "self_attn.o_proj.bias", _RESIDUAL_WRITE, only_if="attention_bias"
        ),
        _layer(
            "ffn_norm",
            "post_attention_layernorm.weight",
            Axis("layers.{layer}.ffn_input", Port.GAIN),
        ),
        _layer("ffn.gate", "mlp.gate_proj.weight", Axis(_FFN, Port.WRITE_NONLINEAR), _FFN_READ),
        _layer(
            "ffn.gate_bias",
            "mlp.gate_proj.bias",
            Axis(_FFN, Port.WRITE_NONLINEAR),
            only_if="mlp_bias",
        ),
        _layer("ffn.up", "mlp.up_proj.weight", Axis(_FFN, Port.WRITE), _FFN_READ),
        _layer("ffn.up_bias", "mlp.up_proj.bias", Axis(_FFN, Port.WRITE), only_if="mlp_bias"),
        _layer("ffn.down", "mlp.down_proj.weight", _RESIDUAL_WRITE, Axis(_FFN, Port.READ)),
        _layer("ffn.down_bias", "mlp.down_proj.bias", _RESIDUAL_WRITE, only_if="mlp_bias"),
        LogicalTensor("final_norm", "model.norm.weight", (Axis("head_input", Port.GAIN),)),
        LogicalTensor(
            "head",
            "lm_head.weight",
            (Axis("vocab", Port.WRITE), Axis("head_input", Port.READ)),
            unless="tie_word_embeddings",
        ),
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
