"""What the dense decoders have in common: RMSNorm before attention and FFN, rotary positions,
grouped-query attention, SwiGLU. A family states what it has besides."""

from tritter.families.family import Axis, LogicalTensor, Port

_LAYER = "layers.{layer}."
_RESIDUAL = Axis("residual", Port.WRITE)
_ATTENTION_INPUT = _LAYER + "attention_input"
_FFN_INPUT = _LAYER + "ffn_input"
_QUERY = _LAYER + "query"
_KEY_VALUE = _LAYER + "key_value"
_FFN = _LAYER + "ffn"

DECODER_SPACES = {
    "vocab": "vocab_size",
    "residual": "hidden_size",
    _ATTENTION_INPUT: "hidden_size",
    _QUERY: "query_size",
    _KEY_VALUE: "key_value_size",
    "head_dim": "head_dim",
    _FFN_INPUT: "hidden_size",
    _FFN: "intermediate_size",
    "head_input": "hidden_size",
}


def decoder_tensors(
    *, queries_are_normed: bool, attention_bias: str = "", mlp_bias: str = ""
) -> tuple[LogicalTensor, ...]:
    """Return the tensors of a dense decoder in forward order, in Hugging Face names.

    Args:
        queries_are_normed: an RMSNorm per head follows q and k, which shares the config's eps.
        attention_bias: config key that adds biases to the attention projections.
        mlp_bias: config key that adds biases to the FFN projections.
    """
    query_port = Port.ABSORBED if queries_are_normed else Port.WRITE_NONLINEAR
    read_attention, read_ffn = Axis(_ATTENTION_INPUT, Port.READ), Axis(_FFN_INPUT, Port.READ)
    tensors = [
        LogicalTensor("embed", "model.embed_tokens.weight", (Axis("vocab", Port.READ), _RESIDUAL)),
        _norm("attention_norm", "input_layernorm", _ATTENTION_INPUT),
        *_linear("attention.q", "self_attn.q_proj", Axis(_QUERY, query_port), read_attention,
                 bias=attention_bias),
        *_linear("attention.k", "self_attn.k_proj", Axis(_KEY_VALUE, query_port), read_attention,
                 bias=attention_bias),
        *_linear("attention.v", "self_attn.v_proj", Axis(_KEY_VALUE, Port.WRITE), read_attention,
                 bias=attention_bias),
        *_linear("attention.o", "self_attn.o_proj", _RESIDUAL, Axis(_QUERY, Port.READ),
                 bias=attention_bias),
        _norm("ffn_norm", "post_attention_layernorm", _FFN_INPUT),
        *_linear("ffn.gate", "mlp.gate_proj", Axis(_FFN, Port.WRITE_NONLINEAR), read_ffn,
                 bias=mlp_bias),
        *_linear("ffn.up", "mlp.up_proj", Axis(_FFN, Port.WRITE), read_ffn, bias=mlp_bias),
        *_linear("ffn.down", "mlp.down_proj", _RESIDUAL, Axis(_FFN, Port.READ), bias=mlp_bias),
        LogicalTensor("final_norm", "model.norm.weight", (Axis("head_input", Port.GAIN),)),
        LogicalTensor(
            "head",
            "lm_head.weight",
            (Axis("vocab", Port.WRITE), Axis("head_input", Port.READ)),
            unless="tie_word_embeddings",
        ),
    ]  # fmt: skip
    if queries_are_normed:
        after_v = next(i for i, t in enumerate(tensors) if t.name.endswith("attention.o"))
        tensors[after_v:after_v] = [
            _norm("attention.q_norm", "self_attn.q_norm", "head_dim"),
            _norm("attention.k_norm", "self_attn.k_norm", "head_dim"),
        ]
    return tuple(tensors)


def _linear(
    name: str, disk_name: str, output: Axis, *inputs: Axis, bias: str
) -> tuple[LogicalTensor, ...]:
    disk_name = "model." + _LAYER + disk_name
    weight = LogicalTensor(_LAYER + name, disk_name + ".weight", (output, *inputs))
    if not bias:
        return (weight,)
    return weight, LogicalTensor(
        _LAYER + name + "_bias", disk_name + ".bias", (output,), only_if=bias
    )


def _norm(name: str, disk_name: str, space: str) -> LogicalTensor:
    disk_name = "model." + _LAYER + disk_name + ".weight"
    return LogicalTensor(_LAYER + name, disk_name, (Axis(space, Port.GAIN),))
