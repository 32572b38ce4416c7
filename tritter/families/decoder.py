"""The parts that decoders are made of: attention, FFN, experts, norms, in Hugging Face names.

RMSNorm before attention and FFN, rotary positions, grouped-query attention, SwiGLU are common to
all; a family's table states what it has besides.
"""

from typing import Literal

from tritter.families.dimensions import DENSE_SIZES
from tritter.families.family import Axis, Fused, LogicalTensor, Port

_LAYER = "layers.{layer}."
_EXPERT = _LAYER + "experts.{expert}."
_RESIDUAL = Axis("residual", Port.WRITE)
_ATTENTION_INPUT, _ATTENTION_OUTPUT = _LAYER + "attention_input", _LAYER + "attention_output"
_FFN_INPUT, _FFN_OUTPUT = _LAYER + "ffn_input", _LAYER + "ffn_output"
_QUERY, _KEY_VALUE = _LAYER + "query", _LAYER + "key_value"
_FFN, _EXPERT_FFN, _SHARED_FFN = _LAYER + "ffn", _EXPERT + "ffn", _LAYER + "shared_ffn"
_ROUTES, _SHARED_GATE = _LAYER + "routes", _LAYER + "shared_gate"

DECODER_SPACES = {
    "vocab": "vocab_size",
    "residual": "hidden_size",
    _ATTENTION_INPUT: "hidden_size",
    _QUERY: "query_size",
    _KEY_VALUE: "key_value_size",
    "head_dim": "head_dim",
    _ATTENTION_OUTPUT: "hidden_size",
    _FFN_INPUT: "hidden_size",
    _FFN: "intermediate_size",
    _FFN_OUTPUT: "hidden_size",
    "head_input": "hidden_size",
}
EXPERT_SPACES = {
    **DECODER_SPACES,
    _ROUTES: "num_experts",
    _EXPERT_FFN: "expert_size",
    _SHARED_FFN: "shared_expert_size",
    _SHARED_GATE: "single",
}
EXPERT_SIZES = {
    **DENSE_SIZES,
    "experts_per_token": "num_experts_per_tok",
    "expert_size": "moe_intermediate_size",
}

Biases = Literal["none", "qkv", "qkvo"]


def decoder_tensors(
    *layer: LogicalTensor, embedding_port: Port = Port.WRITE
) -> tuple[LogicalTensor, ...]:
    """Return a whole decoder: embedding, the parts of a layer, final norm, head.

    Args:
        embedding_port: how the embedding writes the residual stream.
    """
    residual = Axis("residual", embedding_port)
    return (
        LogicalTensor("embed", "model.embed_tokens.weight", (Axis("vocab", Port.READ), residual)),
        *layer,
        LogicalTensor("final_norm", "model.norm.weight", (Axis("head_input", Port.GAIN),)),
        LogicalTensor(
            "head",
            "lm_head.weight",
            (Axis("vocab", Port.WRITE), Axis("head_input", Port.READ)),
            unless="tie_word_embeddings",
        ),
    )


def attention(
    *,
    has_query_norm: bool = False,
    has_output_norm: bool = False,
    biases: Biases = "none",
    bias_key: str = "",
) -> tuple[LogicalTensor, ...]:
    """Return the norm before attention, its projections, and what stands behind them.

    Args:
        has_query_norm: an RMSNorm per head follows q and k, which shares the config's eps.
        has_output_norm: an RMSNorm stands between o and the residual stream.
        biases: which projections have biases.
        bias_key: config key that adds them; empty: always.
    """
    port = Port.ABSORBED if has_query_norm else Port.WRITE_NONLINEAR
    read = Axis(_ATTENTION_INPUT, Port.READ)
    output = Axis(_ATTENTION_OUTPUT, Port.WRITE) if has_output_norm else _RESIDUAL
    tensors = [
        _norm("attention_norm", "input_layernorm", _ATTENTION_INPUT),
        *_linear("attention.q", "self_attn.q_proj", Axis(_QUERY, port), read, biases, bias_key),
        *_linear("attention.k", "self_attn.k_proj", Axis(_KEY_VALUE, port), read, biases, bias_key),
        *_linear("attention.v", "self_attn.v_proj", Axis(_KEY_VALUE, Port.WRITE), read, biases,
                 bias_key),
    ]  # fmt: skip
    if has_query_norm:
        tensors += [
            _norm("attention.q_norm", "self_attn.q_norm", "head_dim"),
            _norm("attention.k_norm", "self_attn.k_norm", "head_dim"),
        ]
    of_output: Biases = "qkvo" if biases == "qkvo" else "none"
    tensors += _linear(
        "attention.o", "self_attn.o_proj", output, Axis(_QUERY, Port.READ), of_output, bias_key
    )
    if has_output_norm:
        tensors.append(_norm("attention_output_norm", "post_attention_layernorm", "residual"))
    return tuple(tensors)


def ffn_norm(disk_name: str = "post_attention_layernorm") -> LogicalTensor:
    """Return the norm before the FFN, or before router and experts."""
    return _norm("ffn_norm", disk_name, _FFN_INPUT)


def dense_ffn(
    *,
    has_output_norm: bool = False,
    bias_key: str = "",
    layers: Literal["all", "dense"] = "all",
) -> tuple[LogicalTensor, ...]:
    """Return gate, up and down of a SwiGLU FFN, and a norm behind it if there is one.

    Args:
        bias_key: config key that adds biases; empty: there are none.
        layers: `dense` where other layers have experts instead.
    """
    biases: Biases = "qkvo" if bias_key else "none"
    output = Axis(_FFN_OUTPUT, Port.WRITE) if has_output_norm else _RESIDUAL
    read = Axis(_FFN_INPUT, Port.READ)
    gate, up = Axis(_FFN, Port.WRITE_NONLINEAR), Axis(_FFN, Port.WRITE)
    tensors = (
        *_linear("ffn.gate", "mlp.gate_proj", gate, read, biases, bias_key, layers),
        *_linear("ffn.up", "mlp.up_proj", up, read, biases, bias_key, layers),
        *_linear("ffn.down", "mlp.down_proj", output, Axis(_FFN, Port.READ), biases, bias_key,
                 layers),
    )  # fmt: skip
    if not has_output_norm:
        return tensors
    return (*tensors, _norm("ffn_output_norm", "post_feedforward_layernorm", "residual"))


def experts(
    *, module: str, gate: str, up: str, down: str, layers: Literal["all", "sparse"]
) -> tuple[LogicalTensor, ...]:
    """Return router and experts; in memory the experts of a layer share two tensors.

    Args:
        module: of router and experts on disk; in memory it is `mlp`.
        gate: name on disk of an expert's gate projection; `up` and `down` likewise.
        layers: `sparse` where other layers have one FFN instead.
    """
    read = Axis(_FFN_INPUT, Port.READ)
    live = "model." + _LAYER + "mlp."
    stem = "model." + _LAYER + module + "."

    def matrix(part: str, disk_name: str, axes: tuple[Axis, Axis], fused: Fused) -> LogicalTensor:
        name = f"{stem}experts.{{expert}}.{disk_name}.weight"
        return LogicalTensor(_EXPERT + part, name, axes, layers=layers, fused=fused)

    gate_up = live + "experts.gate_up_proj"
    return (
        LogicalTensor(
            _LAYER + "router",
            stem + "gate.weight",
            (Axis(_ROUTES, Port.WRITE_NONLINEAR), read),
            layers=layers,
            live_name=live + "gate.weight",
        ),
        matrix("gate", gate, (Axis(_EXPERT_FFN, Port.WRITE_NONLINEAR), read), Fused(gate_up, 0, 2)),
        matrix("up", up, (Axis(_EXPERT_FFN, Port.WRITE), read), Fused(gate_up, 1, 2)),
        matrix("down", down, (_RESIDUAL, Axis(_EXPERT_FFN, Port.READ)),
               Fused(live + "experts.down_proj")),
    )  # fmt: skip


def shared_expert() -> tuple[LogicalTensor, ...]:
    """Return the expert that every token meets, and the gate that scales it by a sigmoid."""
    read = Axis(_FFN_INPUT, Port.READ)
    gate, up = Axis(_SHARED_FFN, Port.WRITE_NONLINEAR), Axis(_SHARED_FFN, Port.WRITE)
    down = Axis(_SHARED_FFN, Port.READ)
    name = "mlp.shared_expert."
    return (
        *_linear("shared_expert.gate", name + "gate_proj", gate, read, layers="sparse"),
        *_linear("shared_expert.up", name + "up_proj", up, read, layers="sparse"),
        *_linear("shared_expert.down", name + "down_proj", _RESIDUAL, down, layers="sparse"),
        *_linear("shared_expert_gate", "mlp.shared_expert_gate",
                 Axis(_SHARED_GATE, Port.WRITE_NONLINEAR), read, layers="sparse"),
    )  # fmt: skip


def _linear(
    name: str,
    disk_name: str,
    output: Axis,
    read: Axis,
    biases: Biases = "none",
    bias_key: str = "",
    layers: Literal["all", "dense", "sparse"] = "all",
) -> tuple[LogicalTensor, ...]:
    disk_name = "model." + _LAYER + disk_name
    weight = LogicalTensor(_LAYER + name, disk_name + ".weight", (output, read), layers=layers)
    if biases == "none":
        return (weight,)
    bias = LogicalTensor(
        _LAYER + name + "_bias", disk_name + ".bias", (output,), only_if=bias_key, layers=layers
    )
    return weight, bias


def _norm(name: str, disk_name: str, space: str) -> LogicalTensor:
    disk_name = "model." + _LAYER + disk_name + ".weight"
    return LogicalTensor(_LAYER + name, disk_name, (Axis(space, Port.GAIN),))
