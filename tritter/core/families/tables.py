"""All family tables, and the lookup of the table for a config.json."""

import re
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Literal

from tritter.conf_folder import installed_folders
from tritter.core.families.dimensions import DENSE_SIZES, Config
from tritter.core.families.family import Family
from tritter.core.families.logical import Axis, LayerKind, LogicalTensor, Place, Port, Space
from tritter.errors import Problem, RequestError
from tritter.targets import TARGET, resolve
from tritter.terminal import status

# Decoders

_LAYER = "model.layers.{layer}."
_VOCABULARY = Space("vocab", "vocab_size", "model")
_RESIDUAL = Axis(Space("residual", "hidden_size", "model"), Port.WRITE)
_ATTENTION_INPUT = Space("attention_input", "hidden_size")
_ATTENTION_OUTPUT = Space("attention_output", "hidden_size")
_FFN_INPUT, _FFN_OUTPUT = Space("ffn_input", "hidden_size"), Space("ffn_output", "hidden_size")
_HEAD_INPUT = Space("head_input", "hidden_size", "model")
_HEAD_DIM = Space("head_dim", "head_dim", "model")
_QUERY, _KEY_VALUE = Space("query", "query_size"), Space("key_value", "key_value_size")
_FFN, _EXPERT_FFN = Space("ffn", "intermediate_size"), Space("ffn", "expert_size", "expert")
_SHARED_FFN = Space("shared_ffn", "shared_expert_size")
_ROUTES, _SHARED_GATE = Space("routes", "num_experts"), Space("shared_gate", "single")

_EXPERT_SIZES = {
    **DENSE_SIZES,
    "experts_per_token": "num_experts_per_tok",
    "expert_size": "moe_intermediate_size",
}

_Biases = Literal["none", "qkv", "qkvo"]
# q, k and v of each head; heads are copied unscaled, so one port suffices for all three
_QKV = Space("qkv", "qkv_size")
_POSITIONS = Space("positions", "max_position_embeddings", "model")
_NEOX_LAYER = "gpt_neox.layers.{layer}."
_OF_HEADS = ("num_key_value_heads", "head_dim")  # one of each per query head; hidden size by heads
_MODEL = "transformer."
_GPT2_LAYER = _MODEL + "h.{layer}."
# Without a table, but `stock_routers` knows their routers: sigmoids, with a bias that files contain
SIGMOID_ROUTERS = ("glm4_moe",)


def decoder_tensors(
    *layer: LogicalTensor, embedding_port: Port = Port.WRITE
) -> tuple[LogicalTensor, ...]:
    """Return a whole decoder: embedding, the parts of a layer, final norm, head.

    Args:
        layer: the tensors of a layer.
        embedding_port: port by which the embedding writes the residual stream.
    """
    return (
        _embedding("model.embed_tokens", embedding_port),
        *layer,
        LogicalTensor(
            kind="final_norm", disk_name="model.norm.weight", axes=(Axis(_HEAD_INPUT, Port.GAIN),)
        ),
        _head("lm_head"),
    )


def attention(
    *,
    has_input_norm: bool = True,
    query_norm: Literal["none", "each head", "all heads"] = "none",
    output_norm: str = "",
    biases: _Biases = "none",
    bias_key: str = "",
    within: str = "",
) -> tuple[LogicalTensor, ...]:
    """Return the tensors of attention: its norms, projections and biases.

    Args:
        has_input_norm: an RMSNorm precedes q, k and v.
        query_norm: RMSNorm after q and k with the config's eps, over each head or all heads.
        output_norm: name of the RMSNorm after o; empty if there is none.
        biases: the projections with biases.
        bias_key: config key that enables them; empty: always.
        within: name of the layer that stacks q, k and v; empty if they are separate.
    """
    port = Port.WRITE_NONLINEAR if query_norm == "none" else Port.ABSORBED
    read = Axis(_ATTENTION_INPUT, Port.READ)
    output = Axis(_ATTENTION_OUTPUT, Port.WRITE) if output_norm else _RESIDUAL
    before = [_norm("attention_norm", "input_layernorm", _ATTENTION_INPUT)]
    tensors = [
        *(before if has_input_norm else ()),
        *_dense("attention.q", "self_attn.q_proj", Axis(_QUERY, port), read, biases, bias_key,
                 within=within),
        *_dense("attention.k", "self_attn.k_proj", Axis(_KEY_VALUE, port), read, biases, bias_key,
                 within=within),
        *_dense("attention.v", "self_attn.v_proj", Axis(_KEY_VALUE, Port.WRITE), read, biases,
                 bias_key, within=within),
    ]  # fmt: skip
    if query_norm != "none":
        is_of_all = query_norm == "all heads"
        tensors += [
            _norm("attention.q_norm", "self_attn.q_norm", _QUERY if is_of_all else _HEAD_DIM),
            _norm("attention.k_norm", "self_attn.k_norm", _KEY_VALUE if is_of_all else _HEAD_DIM),
        ]
    of_output: _Biases = "qkvo" if biases == "qkvo" else "none"
    tensors += _dense(
        "attention.o", "self_attn.o_proj", output, Axis(_QUERY, Port.READ), of_output, bias_key
    )
    if output_norm:
        tensors.append(_norm("attention_output_norm", output_norm, _RESIDUAL.space))
    return tuple(tensors)


def ffn_norm(disk_name: str = "post_attention_layernorm") -> LogicalTensor:
    """Return the norm before the FFN, or before router and experts."""
    return _norm("ffn_norm", disk_name, _FFN_INPUT)


def dense_ffn(
    *,
    output_norm: str = "",
    bias_key: str = "",
    layers: Literal["all", "dense"] = "all",
    within: str = "",
) -> tuple[LogicalTensor, ...]:
    """Return gate, up and down of a SwiGLU FFN, and the norm after it if there is one.

    Args:
        output_norm: name of the RMSNorm after down; empty if there is none.
        bias_key: config key that enables biases; empty if there are none.
        layers: `dense` if other layers have experts instead.
        within: name of the layer that stacks gate and up; empty if they are separate.
    """
    biases: _Biases = "qkvo" if bias_key else "none"
    output = Axis(_FFN_OUTPUT, Port.WRITE) if output_norm else _RESIDUAL
    read = Axis(_FFN_INPUT, Port.READ)
    gate, up = Axis(_FFN, Port.WRITE_NONLINEAR), Axis(_FFN, Port.WRITE)
    tensors = (
        *_dense("ffn.gate", "mlp.gate_proj", gate, read, biases, bias_key, layers, within),
        *_dense("ffn.up", "mlp.up_proj", up, read, biases, bias_key, layers, within),
        *_dense("ffn.down", "mlp.down_proj", output, Axis(_FFN, Port.READ), biases, bias_key,
                 layers),
    )  # fmt: skip
    if not output_norm:
        return tensors
    return (*tensors, _norm("ffn_output_norm", output_norm, _RESIDUAL.space))


def experts(
    *, module: str, gate: str, up: str, down: str, layers: Literal["all", "sparse"]
) -> tuple[LogicalTensor, ...]:
    """Return router and experts; in memory two tensors stack the experts of a layer.

    Args:
        module: of router and experts on disk; in memory it is `mlp`.
        gate: name on disk of an expert's gate projection.
        up: name on disk of an expert's up projection.
        down: name on disk of an expert's down projection.
        layers: `sparse` if other layers have one FFN instead.
    """
    read = Axis(_FFN_INPUT, Port.READ)
    live, stem = _LAYER + "mlp.", _LAYER + module + "."

    def matrix(kind: str, disk_name: str, axes: tuple[Axis, Axis], fused: Place) -> LogicalTensor:
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
               Place(gate_up, 0, 2, is_stacked=True)),
        matrix("experts.up", up, (Axis(_EXPERT_FFN, Port.WRITE), read),
               Place(gate_up, 1, 2, is_stacked=True)),
        matrix("experts.down", down, (_RESIDUAL, Axis(_EXPERT_FFN, Port.READ)),
               Place(live + "experts.down_proj", is_stacked=True)),
    )  # fmt: skip


def shared_expert() -> tuple[LogicalTensor, ...]:
    """Return the shared expert of all tokens, and the gate that scales it by a sigmoid."""
    read = Axis(_FFN_INPUT, Port.READ)
    gate, up = Axis(_SHARED_FFN, Port.WRITE_NONLINEAR), Axis(_SHARED_FFN, Port.WRITE)
    down = Axis(_SHARED_FFN, Port.READ)
    name = "mlp.shared_expert."
    return (
        *_dense("shared_expert.gate", name + "gate_proj", gate, read, layers="sparse"),
        *_dense("shared_expert.up", name + "up_proj", up, read, layers="sparse"),
        *_dense("shared_expert.down", name + "down_proj", _RESIDUAL, down, layers="sparse"),
        *_dense("shared_expert_gate", "mlp.shared_expert_gate",
                 Axis(_SHARED_GATE, Port.WRITE_NONLINEAR), read, layers="sparse"),
    )  # fmt: skip


def _dense(
    kind: str,
    disk_name: str,
    output: Axis,
    read: Axis,
    biases: _Biases = "none",
    bias_key: str = "",
    layers: Literal["all", "dense", "sparse"] = "all",
    within: str = "",
) -> tuple[LogicalTensor, ...]:
    stacked = _LAYER + within if within else ""
    weight, bias = _linear(
        kind, _LAYER + disk_name, output, read, bias_key, layers=layers, within=stacked
    )
    return (weight,) if biases == "none" else (weight, bias)


def _norm(kind: str, disk_name: str, space: Space) -> LogicalTensor:
    axes, disk_name = (Axis(space, Port.GAIN),), f"{_LAYER}{disk_name}.weight"
    return LogicalTensor(kind=kind, disk_name=disk_name, axes=axes, layers="all")


# The families

# Parts of decoders with LayerNorm: norms with biases, one tensor for q, k and v, a plain FFN.
#
# A LayerNorm subtracts the mean over the residual stream and divides by its standard deviation.
# Whole copies of the stream change neither of them, nor the effect of eps.


def _embedding(name: str, port: Port = Port.WRITE) -> LogicalTensor:
    """Return the token embedding with this name on disk and this port to the residual stream."""
    axes = (Axis(_VOCABULARY, Port.READ), Axis(_RESIDUAL.space, port))
    return LogicalTensor(kind="embed", disk_name=f"{name}.weight", axes=axes)


def _layer_norm_attention(
    *,
    norm: str,
    qkv: str,
    output: str,
    bias_key: str = "",
    has_qkv_blocks: bool = False,
    is_transposed: bool = False,
) -> tuple[LogicalTensor, ...]:
    """Return the norm before attention and its projections.

    Args:
        norm: name of the norm on disk.
        qkv: name of the projection to q, k and v on disk.
        output: name of the output projection on disk.
        bias_key: config key that enables biases of the projections; empty: always.
        has_qkv_blocks: the tensor of q, k and v stores all of q, then k, then v, not head by head.
        is_transposed: matrices are stored with inputs first.
    """
    read, interleaved = Axis(_ATTENTION_INPUT, Port.READ), Axis(_QKV, Port.WRITE_NONLINEAR)
    written = {
        "q": Axis(_QUERY, Port.WRITE_NONLINEAR),
        "k": Axis(_KEY_VALUE, Port.WRITE_NONLINEAR),
        "v": Axis(_KEY_VALUE, Port.WRITE),
    }
    projections = (
        [
            tensor
            for name, axis in written.items()
            for tensor in _linear(f"attention.{name}", f"{qkv}.{name}", axis, read, bias_key,
                                  within=qkv, is_transposed=is_transposed)
        ]
        if has_qkv_blocks
        else _linear("attention.qkv", qkv, interleaved, read, bias_key, is_transposed=is_transposed)
    )  # fmt: skip
    return (
        *_layer_norm("attention_norm", norm, _ATTENTION_INPUT),
        *projections,
        *_linear("attention.o", output, _RESIDUAL, Axis(_QUERY, Port.READ), bias_key,
                 is_transposed=is_transposed),
    )  # fmt: skip


def _plain_ffn(
    *, norm: str, up: str, down: str, is_transposed: bool = False
) -> tuple[LogicalTensor, ...]:
    """Return the norm before an ungated FFN and its projections, with these names on disk."""
    read, written = Axis(_FFN_INPUT, Port.READ), Axis(_FFN, Port.WRITE_NONLINEAR)
    return (
        *_layer_norm("ffn_norm", norm, _FFN_INPUT),
        *_linear("ffn.up", up, written, read, is_transposed=is_transposed),
        *_linear("ffn.down", down, _RESIDUAL, Axis(_FFN, Port.READ), is_transposed=is_transposed),
    )


def _head(disk_name: str, live_name: str = "") -> LogicalTensor:
    """Return the head, absent if it is tied.

    Args:
        disk_name: name on disk.
        live_name: name in memory, if it differs.
    """
    return LogicalTensor(
        kind="head",
        disk_name=f"{disk_name}.weight",
        axes=(Axis(_VOCABULARY, Port.WRITE), Axis(_HEAD_INPUT, Port.READ)),
        unless="tie_word_embeddings",
        live_name=f"{live_name}.weight" if live_name else "",
    )


def _layer_norm(
    kind: str, name: str, space: Space, *, layers: LayerKind = "all"
) -> tuple[LogicalTensor, ...]:
    """Return the gain of a LayerNorm and its bias, which belongs to the norm's output space."""
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
    layers: LayerKind = "all",
    within: str = "",
    is_transposed: bool = False,
) -> tuple[LogicalTensor, LogicalTensor]:
    """Return a matrix and its bias."""
    weight = LogicalTensor(
        kind=kind,
        disk_name=f"{name}.weight",
        axes=(output, read),
        layers=layers,
        is_transposed=is_transposed,
        within=f"{within}.weight" if within else "",
    )
    bias = LogicalTensor(
        kind=f"{kind}_bias",
        disk_name=f"{name}.bias",
        axes=(output,),
        layers=layers,
        only_if=bias_key,
        within=f"{within}.bias" if within else "",
    )
    return weight, bias


_LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    heads_divide_hidden=True,
    tensors=decoder_tensors(
        *attention(biases="qkvo", bias_key="attention_bias"),
        ffn_norm(),
        *dense_ffn(bias_key="mlp_bias"),
    ),
)


_SMOLLM3 = Family(
    model_type="smollm3",
    architecture="SmolLM3ForCausalLM",
    tensors=_LLAMA.tensors,
    per_layer_config_keys=("layer_types", "no_rope_layers"),
    windows="layer_types",
)


_QWEN3 = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    tensors=decoder_tensors(
        *attention(query_norm="each head", biases="qkvo", bias_key="attention_bias"),
        ffn_norm(),
        *dense_ffn(),
    ),
    per_layer_config_keys=("layer_types",),
    windows="layer_types",
)

_QWEN3_MOE = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    tensors=decoder_tensors(
        *attention(query_norm="each head", biases="qkvo", bias_key="attention_bias"),
        ffn_norm(),
        *dense_ffn(layers="dense"),
        *experts(module="mlp", gate="gate_proj", up="up_proj", down="down_proj", layers="sparse"),
    ),
    sizes={**_EXPERT_SIZES, "num_experts": "num_local_experts"},
    per_layer_config_keys=("layer_types",),
    windows="all",
    sparse_layers="pattern",
)


_QWEN2 = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    tensors=decoder_tensors(*attention(biases="qkv"), ffn_norm(), *dense_ffn()),
    per_layer_config_keys=("layer_types",),
    windows="layer_types",
)

_QWEN2_MOE = Family(
    model_type="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    tensors=decoder_tensors(
        *attention(biases="qkv", bias_key="qkv_bias"),
        ffn_norm(),
        *dense_ffn(layers="dense"),
        *experts(module="mlp", gate="gate_proj", up="up_proj", down="down_proj", layers="sparse"),
        *shared_expert(),
    ),
    sizes={
        **_EXPERT_SIZES,
        "num_experts": "num_experts",
        "shared_expert_size": "shared_expert_intermediate_size",
    },
    per_layer_config_keys=("layer_types",),
    windows="layer_types",
    sparse_layers="pattern",
)


# Phi-3 and Phi-4: q, k and v are one tensor, and so are gate and up.
#
# Heads never change their size, so the rotated fraction (three quarters in Phi-4-mini) and
# LongRoPE's factor per rotated pair stay valid.

_PHI3 = Family(
    model_type="phi3",
    architecture="Phi3ForCausalLM",
    tensors=decoder_tensors(
        *attention(within="self_attn.qkv_proj"), ffn_norm(), *dense_ffn(within="mlp.gate_up_proj")
    ),
    windows="all",
)


# OLMo 2: norms after attention and FFN and none before; one norm over the queries of all heads.
#
# The norms of queries and keys take the mean square over all heads. Copying every head preserves
# it; additional heads would change the output of the old ones.

_OLMO2 = Family(
    model_type="olmo2",
    architecture="Olmo2ForCausalLM",
    tensors=decoder_tensors(
        *attention(
            has_input_norm=False,
            query_norm="all heads",
            output_norm="post_attention_layernorm",
            biases="qkvo",
            bias_key="attention_bias",
        ),
        *dense_ffn(output_norm="post_feedforward_layernorm"),
    ),
)


_MISTRAL = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    tensors=decoder_tensors(*attention(), ffn_norm(), *dense_ffn()),
    windows="all",
)

_MIXTRAL = Family(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    tensors=decoder_tensors(
        *attention(),
        ffn_norm(),
        *experts(module="block_sparse_moe", gate="w1", up="w3", down="w2", layers="all"),
    ),
    sizes={**_EXPERT_SIZES, "num_experts": "num_local_experts", "expert_size": "intermediate_size"},
    sparse_layers="all",
    windows="all",
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
        "architectures": [_LLAMA.architecture],
        "model_type": _LLAMA.model_type,
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


# Granite: Llama's tensors, and four constant multipliers.
#
# `embedding_multiplier`, `attention_multiplier`, `residual_multiplier` and `logits_scaling` do not
# depend on a size, so they stay: a map that preserves the values they scale preserves the
# function. (Under μP another width would need other multipliers and change the function.)

_GRANITE = Family(
    model_type="granite",
    architecture="GraniteForCausalLM",
    tensors=_LLAMA.tensors,
)


# GPT-NeoX (Pythia): LayerNorm, q, k and v of each head together, a plain FFN, an untied head.
#
# Attention and FFN of a layer read the same stream in parallel, or in sequence. RoPE rotates a
# fraction of each head, a quarter in Pythia.


_GPT_NEOX = Family(
    model_type="gpt_neox",
    architecture="GPTNeoXForCausalLM",
    heads_divide_hidden=True,
    tensors=(
        _embedding("gpt_neox.embed_in"),
        *_layer_norm_attention(
            norm=_NEOX_LAYER + "input_layernorm",
            qkv=_NEOX_LAYER + "attention.query_key_value",
            output=_NEOX_LAYER + "attention.dense",
            bias_key="attention_bias",
        ),
        *_plain_ffn(
            norm=_NEOX_LAYER + "post_attention_layernorm",
            up=_NEOX_LAYER + "mlp.dense_h_to_4h",
            down=_NEOX_LAYER + "mlp.dense_4h_to_h",
        ),
        *_layer_norm("final_norm", "gpt_neox.final_layer_norm", _HEAD_INPUT, layers="none"),
        _head("embed_out", "lm_head"),
    ),
    sizes={name: key for name, key in DENSE_SIZES.items() if name not in _OF_HEADS},
    subtracts_mean=True,
    parallel_residual_key="use_parallel_residual",
)


# GPT-2: LayerNorm, learned positions, q, k and v in blocks, a plain FFN, a tied head.
#
# Its matrices are stored transposed. The position embedding has one row per position and only
# grows with the hidden size.


_GPT2 = Family(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    heads_divide_hidden=True,
    tensors=(
        _embedding(_MODEL + "wte"),
        LogicalTensor(
            kind="embed_positions",
            disk_name=_MODEL + "wpe.weight",
            axes=(Axis(_POSITIONS, Port.READ), _RESIDUAL),
        ),
        *_layer_norm_attention(
            norm=_GPT2_LAYER + "ln_1",
            qkv=_GPT2_LAYER + "attn.c_attn",
            output=_GPT2_LAYER + "attn.c_proj",
            has_qkv_blocks=True,
            is_transposed=True,
        ),
        *_plain_ffn(
            norm=_GPT2_LAYER + "ln_2",
            up=_GPT2_LAYER + "mlp.c_fc",
            down=_GPT2_LAYER + "mlp.c_proj",
            is_transposed=True,
        ),
        *_layer_norm("final_norm", _MODEL + "ln_f", _HEAD_INPUT, layers="none"),
        _head("lm_head"),
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
    layer_index_key="scale_attn_by_inverse_layer_idx",
)


_GLM4 = Family(
    model_type="glm4",
    architecture="Glm4ForCausalLM",
    tensors=decoder_tensors(
        *attention(output_norm="post_self_attn_layernorm", biases="qkv", bias_key="attention_bias"),
        ffn_norm(),
        *dense_ffn(output_norm="post_mlp_layernorm", within="mlp.gate_up_proj"),
    ),
    has_interleaved_rope=True,
)


_GEMMA3_TEXT = Family(
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    heads_divide_hidden=True,
    tensors=decoder_tensors(
        *attention(
            query_norm="each head",
            output_norm="post_attention_layernorm",
            biases="qkvo",
            bias_key="attention_bias",
        ),
        ffn_norm("pre_feedforward_layernorm"),
        *dense_ffn(output_norm="post_feedforward_layernorm"),
        embedding_port=Port.WRITE_SCALED,
    ),
    per_layer_config_keys=("layer_types",),
    windows="layer_types",
    norm_offset=1.0,
)


# Gemma 2: as Gemma 3 without norms per head; a tanh caps scores and logits.
#
# The caps and `query_pre_attn_scalar` are constants. So kept and copied attention heads have the
# same scores, and an output head that reads the same stream has the same logits.

_GEMMA2 = Family(
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    heads_divide_hidden=True,
    tensors=decoder_tensors(
        *attention(
            output_norm="post_attention_layernorm", biases="qkvo", bias_key="attention_bias"
        ),
        ffn_norm("pre_feedforward_layernorm"),
        *dense_ffn(output_norm="post_feedforward_layernorm"),
        embedding_port=Port.WRITE_SCALED,
    ),
    per_layer_config_keys=("layer_types",),
    windows="layer_types",
    norm_offset=1.0,
)


FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        _LLAMA,
        _MISTRAL,
        _QWEN2,
        _QWEN3,
        _SMOLLM3,
        _GRANITE,
        _OLMO2,
        _PHI3,
        _GLM4,
        _GEMMA2,
        _GEMMA3_TEXT,
        _GPT_NEOX,
        _GPT2,
        _MIXTRAL,
        _QWEN2_MOE,
        _QWEN3_MOE,
    )
}


def find_family(model_type: str) -> Family | None:
    """Return the table of a model type; None: there is none.

    An installed package registers one as `family/MODEL_TYPE.yaml` in its folder of option files,
    which names a `Family` by `_target_`.
    """
    if model_type not in FAMILIES and re.fullmatch(r"[\w-]+", model_type):
        for folder in installed_folders().values():
            path = folder / "family" / f"{model_type}.yaml"
            if path.is_file():
                FAMILIES[model_type] = _registered(model_type, path)
    return FAMILIES.get(model_type)


def _registered(model_type: str, path: Path) -> Family:
    import yaml  # which few processes need here

    body = yaml.safe_load(path.read_text(encoding="utf-8"))
    target = body.get(TARGET) if isinstance(body, dict) else None
    key = f"{path}: {TARGET}"
    found = resolve(key, target)
    if not isinstance(found, Family) or found.model_type != model_type:
        reason = f"it is no Family with model_type = {model_type}"
        raise RequestError(Problem(key, target, reason=reason))
    return found


def family_of(config: Config) -> Family:
    """Return the family of a config.json: its table, or else what discovery finds."""
    model_type = str(config.get("model_type"))
    family = find_family(model_type)
    if family is not None:
        return family
    is_first = f"{__package__}.discovery" not in sys.modules
    with status(f"{model_type} has no table: probing its class") if is_first else nullcontext():
        from tritter.core.families.discovery import DiscoveredFamily  # imports transformers

        return DiscoveredFamily.of(config)
