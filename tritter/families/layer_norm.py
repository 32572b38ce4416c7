"""The parts of decoders with LayerNorm: norms with biases, one tensor for q, k and v, a plain FFN.

A LayerNorm subtracts the mean over the residual stream and divides by its deviation. Whole copies
of the stream leave both as they are, and eps with them.
"""

from tritter.families.decoder import (
    ATTENTION_INPUT,
    FFN,
    FFN_INPUT,
    HEAD_INPUT,
    QUERY,
    RESIDUAL,
    VOCABULARY,
)
from tritter.families.logical import Axis, LayerKind, LogicalTensor, Port, Space

# Of each head its q, its k and its v; heads are copied unscaled, so one port does for all three
QKV = Space("qkv", "qkv_size")


def embedding(name: str) -> LogicalTensor:
    """Return the embedding of tokens, called so on disk."""
    axes = (Axis(VOCABULARY, Port.READ), RESIDUAL)
    return LogicalTensor(kind="embed", disk_name=f"{name}.weight", axes=axes)


def attention(*, norm: str, qkv: str, output: str, bias_key: str = "") -> tuple[LogicalTensor, ...]:
    """Return the norm before attention and its projections, called so on disk.

    Args:
        bias_key: config key that adds biases to the projections; empty: always.
    """
    read, written = Axis(ATTENTION_INPUT, Port.READ), Axis(QKV, Port.WRITE_NONLINEAR)
    return (
        *layer_norm("attention_norm", norm, ATTENTION_INPUT),
        *_linear("attention.qkv", qkv, written, read, bias_key),
        *_linear("attention.o", output, RESIDUAL, Axis(QUERY, Port.READ), bias_key),
    )


def plain_ffn(*, norm: str, up: str, down: str) -> tuple[LogicalTensor, ...]:
    """Return the norm before an FFN without a gate and its projections, called so on disk."""
    read, written = Axis(FFN_INPUT, Port.READ), Axis(FFN, Port.WRITE_NONLINEAR)
    return (
        *layer_norm("ffn_norm", norm, FFN_INPUT),
        *_linear("ffn.up", up, written, read),
        *_linear("ffn.down", down, RESIDUAL, Axis(FFN, Port.READ)),
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
    kind: str, name: str, output: Axis, read: Axis, bias_key: str = ""
) -> tuple[LogicalTensor, ...]:
    return (
        LogicalTensor(kind=kind, disk_name=f"{name}.weight", axes=(output, read), layers="all"),
        LogicalTensor(
            kind=f"{kind}_bias",
            disk_name=f"{name}.bias",
            axes=(output,),
            layers="all",
            only_if=bias_key,
        ),
    )
