"""The parts that decoders are made of: attention, FFN, experts, norms, in Hugging Face names.

RMSNorm before attention and FFN, rotary positions, grouped-query attention, SwiGLU are common to
all; a family's table states what it has besides.
"""

from typing import Literal

from tritter.families.dimensions import DENSE_SIZES
from tritter.families.logical import Axis, Fused, LogicalTensor, Port, Space

_LAYER = "model.layers.{layer}."
VOCABULARY = Space("vocab", "vocab_size", "model")
RESIDUAL = Axis(Space("residual", "hidden_size", "model"), Port.WRITE)
ATTENTION_INPUT = Space("attention_input", "hidden_size")
_ATTENTION_OUTPUT = Space("attention_output", "hidden_size")
FFN_INPUT, _FFN_OUTPUT = Space("ffn_input", "hidden_size"), Space("ffn_output", "hidden_size")
HEAD_INPUT = Space("head_input", "hidden_size", "model")
_HEAD_DIM = Space("head_dim", "head_dim", "model")
QUERY, KEY_VALUE = Space("query", "query_size"), Space("key_value", "key_value_size")
FFN, _EXPERT_FFN = Space("ffn", "intermediate_size"), Space("ffn", "expert_size", "expert")
_SHARED_FFN = Space("shared_ffn", "shared_expert_size")
_ROUTES, _SHARED_GATE = Space("routes", "num_experts"), Space("shared_gate", "single")

EXPERT_SIZES = {
    **DENSE_SIZES,
    "experts_per_token": "num_experts_per_tok",
    "expert_size": "moe_intermediate_size",
}

Biases = Literal["none", "qkv", "qkvo"]
QueryNorm = Literal["none", "each head", "all heads"]


def decoder_tensors(
    *layer: LogicalTensor, embedding_port: Port = Port.WRITE
) -> tuple[LogicalTensor, ...]:
    """Return a whole decoder: embedding, the parts of a layer, final norm, head.

    Args:
        embedding_port: how the embedding writes the residual stream.
    """
    residual = Axis(RESIDUAL.space, embedding_port)
    return (
        LogicalTensor(
            kind="embed",
            disk_name="model.embed_tokens.weight",
            axes=(Axis(VOCABULARY, Port.READ), residual),
        ),
        *layer,
        LogicalTensor(
            kind="final_norm", disk_name="model.norm.weight", axes=(Axis(HEAD_INPUT, Port.GAIN),)
        ),
        LogicalTensor(
            kind="head",
            disk_name="lm_head.weight",
            axes=(Axis(VOCABULARY, Port.WRITE), Axis(HEAD_INPUT, Port.READ)),
            unless="tie_word_embeddings",
        ),
    )


def attention(
    *,
    has_input_norm: bool = True,
    query_norm: QueryNorm = "none",
    output_norm: str = "",
    biases: Biases = "none",
    bias_key: str = "",
    within: str = "",
) -> tuple[LogicalTensor, ...]:
    """Return the norm before attention, its projections, and what stands behind them.

    Args:
        has_input_norm: an RMSNorm stands between the residual stream and q, k and v.
        query_norm: whether an RMSNorm, which shares the config's eps, follows q and k, and
            whether its mean square is that of a head or of all.
        output_norm: name of an RMSNorm between o and the residual stream; empty: there is none.
        biases: which projections have biases.
        bias_key: config key that adds them; empty: always.
        within: name of the layer in which q, k and v stand below one another, if there is one.
    """
    port = Port.WRITE_NONLINEAR if query_norm == "none" else Port.ABSORBED
    read = Axis(ATTENTION_INPUT, Port.READ)
    output = Axis(_ATTENTION_OUTPUT, Port.WRITE) if output_norm else RESIDUAL
    before = [_norm("attention_norm", "input_layernorm", ATTENTION_INPUT)]
    tensors = [
        *(before if has_input_norm else ()),
        *_linear("attention.q", "self_attn.q_proj", Axis(QUERY, port), read, biases, bias_key,
                 within=within),
        *_linear("attention.k", "self_attn.k_proj", Axis(KEY_VALUE, port), read, biases, bias_key,
                 within=within),
        *_linear("attention.v", "self_attn.v_proj", Axis(KEY_VALUE, Port.WRITE), read, biases,
                 bias_key, within=within),
    ]  # fmt: skip
    if query_norm != "none":
        is_of_all = query_norm == "all heads"
        tensors += [
            _norm("attention.q_norm", "self_attn.q_norm", QUERY if is_of_all else _HEAD_DIM),
            _norm("attention.k_norm", "self_attn.k_norm", KEY_VALUE if is_of_all else _HEAD_DIM),
        ]
    of_output: Biases = "qkvo" if biases == "qkvo" else "none"
    tensors += _linear(
        "attention.o", "self_attn.o_proj", output, Axis(QUERY, Port.READ), of_output, bias_key
    )
    if output_norm:
        tensors.append(_norm("attention_output_norm", output_norm, RESIDUAL.space))
    return tuple(tensors)


def ffn_norm(disk_name: str = "post_attention_layernorm") -> LogicalTensor:
    """Return the norm before the FFN, or before router and experts."""
    return _norm("ffn_norm", disk_name, FFN_INPUT)


def dense_ffn(
    *,
    output_norm: str = "",
    bias_key: str = "",
    layers: Literal["all", "dense"] = "all",
    within: str = "",
) -> tuple[LogicalTensor, ...]:
    """Return gate, up and down of a SwiGLU FFN, and a norm behind it if there is one.

    Args:
        output_norm: name of the RMSNorm between down and the residual stream, if any.
        bias_key: config key that adds biases; empty: there are none.
        layers: `dense` where other layers have experts instead.
        within: name of the layer in which up stands below gate, if there is one.
    """
    biases: Biases = "qkvo" if bias_key else "none"
    output = Axis(_FFN_OUTPUT, Port.WRITE) if output_norm else RESIDUAL
    read = Axis(FFN_INPUT, Port.READ)
    gate, up = Axis(FFN, Port.WRITE_NONLINEAR), Axis(FFN, Port.WRITE)
    tensors = (
        *_linear("ffn.gate", "mlp.gate_proj", gate, read, biases, bias_key, layers, within),
        *_linear("ffn.up", "mlp.up_proj", up, read, biases, bias_key, layers, within),
        *_linear("ffn.down", "mlp.down_proj", output, Axis(FFN, Port.READ), biases, bias_key,
                 layers),
    )  # fmt: skip
    if not output_norm:
        return tensors
    return (*tensors, _norm("ffn_output_norm", output_norm, RESIDUAL.space))


def experts(
    *, module: str, gate: str, up: str, down: str, layers: Literal["all", "sparse"]
) -> tuple[LogicalTensor, ...]:
    """Return router and experts; in memory the experts of a layer share two tensors.

    Args:
        module: of router and experts on disk; in memory it is `mlp`.
        gate: name on disk of an expert's gate projection; `up` and `down` likewise.
        layers: `sparse` where other layers have one FFN instead.
    """
    read = Axis(FFN_INPUT, Port.READ)
    live, stem = _LAYER + "mlp.", _LAYER + module + "."

    def matrix(kind: str, disk_name: str, axes: tuple[Axis, Axis], fused: Fused) -> LogicalTensor:
        name = f"{stem}experts.{{expert}}.{disk_name}.weight"
        return LogicalTensor(kind=kind, disk_name=name, axes=axes, layers=layers, fused=fused)

    gate_up = live + "experts.gate_up_proj"
    return (
        LogicalTensor(
            kind="router",
            disk_name=stem + "gate.weight",
            axes=(Axis(_ROUTES, Port.WRITE_NONLINEAR), read),
            layers=layers,
            live_name=live + "gate.weight",
        ),
        matrix("experts.gate", gate, (Axis(_EXPERT_FFN, Port.WRITE_NONLINEAR), read),
               Fused(gate_up, 0, 2)),
        matrix("experts.up", up, (Axis(_EXPERT_FFN, Port.WRITE), read), Fused(gate_up, 1, 2)),
        matrix("experts.down", down, (RESIDUAL, Axis(_EXPERT_FFN, Port.READ)),
               Fused(live + "experts.down_proj")),
    )  # fmt: skip


def shared_expert() -> tuple[LogicalTensor, ...]:
    """Return the expert that every token meets, and the gate that scales it by a sigmoid."""
    read = Axis(FFN_INPUT, Port.READ)
    gate, up = Axis(_SHARED_FFN, Port.WRITE_NONLINEAR), Axis(_SHARED_FFN, Port.WRITE)
    down = Axis(_SHARED_FFN, Port.READ)
    name = "mlp.shared_expert."
    return (
        *_linear("shared_expert.gate", name + "gate_proj", gate, read, layers="sparse"),
        *_linear("shared_expert.up", name + "up_proj", up, read, layers="sparse"),
        *_linear("shared_expert.down", name + "down_proj", RESIDUAL, down, layers="sparse"),
        *_linear("shared_expert_gate", "mlp.shared_expert_gate",
                 Axis(_SHARED_GATE, Port.WRITE_NONLINEAR), read, layers="sparse"),
    )  # fmt: skip


def _linear(
    kind: str,
    disk_name: str,
    output: Axis,
    read: Axis,
    biases: Biases = "none",
    bias_key: str = "",
    layers: Literal["all", "dense", "sparse"] = "all",
    within: str = "",
) -> tuple[LogicalTensor, ...]:
    stem = _LAYER + disk_name
    weight = LogicalTensor(
        kind=kind,
        disk_name=stem + ".weight",
        axes=(output, read),
        layers=layers,
        within=f"{_LAYER}{within}.weight" if within else "",
    )
    if biases == "none":
        return (weight,)
    return weight, LogicalTensor(
        kind=kind + "_bias",
        disk_name=stem + ".bias",
        axes=(output,),
        layers=layers,
        only_if=bias_key,
    )


def _norm(kind: str, disk_name: str, space: Space) -> LogicalTensor:
    axes, disk_name = (Axis(space, Port.GAIN),), f"{_LAYER}{disk_name}.weight"
    return LogicalTensor(kind=kind, disk_name=disk_name, axes=axes, layers="all")
