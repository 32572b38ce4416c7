"""The parts of decoders with LayerNorm: norms with biases, one tensor for q, k and v, a plain FFN.

A LayerNorm subtracts the mean over the residual stream and divides by its deviation. Whole copies
of the stream leave both as they are, and eps with them.
"""

from tritter.families.decoder import (
    ATTENTION_INPUT,
    FFN,
    FFN_INPUT,
    HEAD_INPUT,
    KEY_VALUE,
    QUERY,
    RESIDUAL,
    VOCABULARY,
)
from tritter.families.logical import Axis, LayerKind, LogicalTensor, Port, Space

# Of each head its q, its k and its v; heads are copied unscaled, so one port does for all three
QKV = Space("qkv", "qkv_size")
_POSITIONS = Space("positions", "max_position_embeddings", "model")


def embedding(name: str) -> LogicalTensor:
    """Return the embedding of tokens, called so on disk."""
    axes = (Axis(VOCABULARY, Port.READ), RESIDUAL)
    return LogicalTensor(kind="embed", disk_name=f"{name}.weight", axes=axes)


def learned_positions(name: str) -> LogicalTensor:
    """Return the embedding of places in a sequence, called so on disk."""
    axes = (Axis(_POSITIONS, Port.READ), RESIDUAL)
    return LogicalTensor(kind="embed_positions", disk_name=f"{name}.weight", axes=axes)


def attention(
    *,
    norm: str,
    qkv: str,
    output: str,
    bias_key: str = "",
    are_apart: bool = False,
    is_transposed: bool = False,
) -> tuple[LogicalTensor, ...]:
    """Return the norm before attention and its projections, called so on disk.

    Args:
        bias_key: config key that adds biases to the projections; empty: always.
        are_apart: the tensor of q, k and v holds all of q, then k, then v, not head by head.
        is_transposed: matrices lie inputs first.
    """
    read, together = Axis(ATTENTION_INPUT, Port.READ), Axis(QKV, Port.WRITE_NONLINEAR)
    written = {
        "q": Axis(QUERY, Port.WRITE_NONLINEAR),
        "k": Axis(KEY_VALUE, Port.WRITE_NONLINEAR),
        "v": Axis(KEY_VALUE, Port.WRITE),
    }
    projections = (
        [
            tensor
            for name, axis in written.items()
            for tensor in _linear(f"attention.{name}", f"{qkv}.{name}", axis, read, bias_key,
                                  within=qkv, is_transposed=is_transposed)
        ]
        if are_apart
        else _linear("attention.qkv", qkv, together, read, bias_key, is_transposed=is_transposed)
    )  # fmt: skip
    return (
        *layer_norm("attention_norm", norm, ATTENTION_INPUT),
        *projections,
        *_linear("attention.o", output, RESIDUAL, Axis(QUERY, Port.READ), bias_key,
                 is_transposed=is_transposed),
    )  # fmt: skip


def plain_ffn(
    *, norm: str, up: str, down: str, is_transposed: bool = False
) -> tuple[LogicalTensor, ...]:
    """Return the norm before an FFN without a gate and its projections, called so on disk."""
    read, written = Axis(FFN_INPUT, Port.READ), Axis(FFN, Port.WRITE_NONLINEAR)
    return (
        *layer_norm("ffn_norm", norm, FFN_INPUT),
        *_linear("ffn.up", up, written, read, is_transposed=is_transposed),
        *_linear("ffn.down", down, RESIDUAL, Axis(FFN, Port.READ), is_transposed=is_transposed),
    )


def head(disk_name: str, live_name: str) -> LogicalTensor:
    """Return the head, absent where it is tied."""
    return LogicalTensor(
        kind="head",
        disk_name=f"{disk_name}.weight",
        axes=(Axis(VOCABULARY, Port.WRITE), Axis(HEAD_INPUT, Port.READ)),
        unless="tie_word_embeddings",
        live_name=f"{live_name}.weight",
    )


def layer_norm(
    kind: str, name: str, space: Space, *, layers: LayerKind = "all"
) -> tuple[LogicalTensor, ...]:
    """Return the gain of a LayerNorm and its bias, which lies in what the norm writes."""
    gain, bias = (Axis(space, port) for port in (Port.GAIN, Port.WRITE))
    return (
        LogicalTensor(kind=kind, disk_name=f"{name}.weight", axes=(gain,), layers=layers),
        LogicalTensor(kind=f"{kind}_bias", disk_name=f"{name}.bias", axes=(bias,), layers=layers),
    )


def _linear(
    kind: str,
    name: str,
    output: Axis,
    read: Axis,
    bias_key: str = "",
    *,
    within: str = "",
    is_transposed: bool = False,
) -> tuple[LogicalTensor, ...]:
    return (
        LogicalTensor(
            kind=kind,
            disk_name=f"{name}.weight",
            axes=(output, read),
            layers="all",
            is_transposed=is_transposed,
            within=f"{within}.weight" if within else "",
        ),
        LogicalTensor(
            kind=f"{kind}_bias",
            disk_name=f"{name}.bias",
            axes=(output,),
            layers="all",
            only_if=bias_key,
            within=f"{within}.bias" if within else "",
        ),
    )
