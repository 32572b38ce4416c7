"""Model types with experts that a dense model can become: they compute the same attention.

A partner's config sets every key that its class reads: the defaults of dense and sparse classes
differ (eps, rotary base, sliding window), which would silently change the function.
"""

from __future__ import annotations

from collections.abc import Mapping

from tritter.core.families import Config, Family, LogicalTensor, Model, find_family
from tritter.errors import Problem, RequestError, key_name, refused, setting

# Dense model type → those that it can become, the default first
PARTNERS: Mapping[str, tuple[str, ...]] = {
    "llama": ("mixtral", "qwen2_moe", "glm4_moe"),
    "mistral": ("mixtral", "qwen2_moe", "glm4_moe"),
    "qwen2": ("qwen2_moe", "glm4_moe"),
    "qwen3": ("qwen3_moe", "glm4_moe"),
}
SHARED = ("qwen2_moe", "glm4_moe")  # with a shared expert
# Sizes of GLM-4-MoE, which has no table: discovery finds its tensors
_GLM_SIZES = {
    "num_experts": "n_routed_experts",
    "experts_per_token": "num_experts_per_tok",
    "expert_size": "moe_intermediate_size",
}
# End of a name on disk in GLM-4-MoE → kind in the tables
_GLM_KINDS = {
    "mlp.gate.weight": "router",
    "mlp.gate.e_score_correction_bias": "router_bias",
    **{
        f"mlp.shared_experts.{part}_proj.weight": f"shared_expert.{part}"
        for part in ("gate", "up", "down")
    },
}
# Keys that the partner of a dense class does not read, or reads differently
_DENSE_KEYS = ("pretraining_tp", "mlp_bias", "layer_types", "max_window_layers")
_WINDOW_KEYS = ("sliding_window", "use_sliding_window")
# Reasons that a family has no partner despite an MoE family of the same name
_REASONS: Mapping[str, str] = {
    "phi3": "phimoe has LayerNorm instead of RMSNorm, and its own routing rule",
    "granite": "granitemoe stores experts in one tensor on disk, which is not supported",
}
_MISTRAL_WINDOW = 4096  # default of the class


def partner_of(family: Family, target: str | None = None) -> str:
    """Return the model type with experts that a dense family is upcycled to.

    Args:
        family: of the dense model.
        target: the requested model type. Default: the first that the family can become.

    Raises:
        RequestError: the family already has experts, or no partner, or can't become `target`.
    """
    if partners := PARTNERS.get(family.model_type):
        if target is not None and target not in partners:
            allowed = ", ".join(partners)
            reason = f"{family.model_type} can become {allowed}"
            raise refused("expansion.moe.target", target, reason)
        return target or partners[0]
    supported = ", ".join(f"{dense} ({sparse[0]})" for dense, sparse in PARTNERS.items())
    if family.has_experts:
        raise RequestError(
            Problem(
                "expansion.moe",
                reason="it makes a dense model sparse, and "
                f"{family.model_type} has experts already; it supports {supported}. To add "
                f"experts use {setting('expansion', 'moe_add')}",
            )
        )
    reason = _REASONS.get(family.model_type, "transformers has none for it")
    raise RequestError(
        Problem(
            "expansion.moe",
            reason=f"{family.model_type} has no MoE partner ({reason}); families that have one: "
            f"{supported}",
        )
    )


def kind_of(tensor: LogicalTensor) -> str:
    """Return the kind of a partner's tensor as in the tables: `router`, `experts.down`."""
    if tensor.expert is not None:
        return tensor.kind.removesuffix("_proj.weight")
    name = tensor.disk_name.partition(f".{tensor.layer}.")[2]
    return tensor.kind if tensor.kind == "router" else _GLM_KINDS.get(name, tensor.kind)


def partner_config(
    source: Model,
    partner: str,
    counts: Mapping[str, int],
    dense_layers: tuple[int, ...],
) -> Config:
    """Return the config of the upcycled model, without the key `norm_topk_prob`.

    Args:
        source: the dense model.
        partner: model type of the result.
        counts: `num_experts`, `experts_per_token` and `expert_size`.
        dense_layers: layers that keep their FFN.

    Raises:
        RequestError: the source has a feature that its partner lacks.
    """
    config, dimensions = source.config, source.sizes
    if config.get("rms_norm_eps") is None:
        raise RequestError(f"config.json: rms_norm_eps is missing, but {partner} needs it.")
    if config.get("rope_parameters") is None:
        from tritter.core.families.discovery.configs import complete  # imports transformers

        # rope_theta and rope_scaling, the keys of earlier releases
        kept = {key: value for key, value in config.items() if not key.startswith("rope_")}
        config = {**kept, "rope_parameters": complete(config)["rope_parameters"]}
    table = find_family(partner)
    sizes = _GLM_SIZES if table is None else table.sizes
    dropped = _DENSE_KEYS if table else (*_DENSE_KEYS, *_WINDOW_KEYS)
    rules = {"mixtral": _mixtral, "qwen2_moe": _qwen2_moe, "qwen3_moe": _qwen3_moe}
    return {
        **{key: value for key, value in config.items() if key not in dropped},
        "model_type": partner,
        "architectures": [table.architecture if table else "Glm4MoeForCausalLM"],
        "num_key_value_heads": dimensions.num_key_value_heads,
        "head_dim": dimensions.head_dim,
        **{sizes[name]: count for name, count in counts.items()},
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
        **rules.get(partner, _glm4_moe)(config, dense_layers),
    }


def _mixtral(config: Config, dense_layers: tuple[int, ...]) -> Config:
    _refuse_biases(config, "mixtral", ("attention_bias", "mlp_bias"))
    if dense_layers:
        target = key_name("expansion.moe.target")
        reason = (
            f"it leaves layers {_listed(dense_layers)} dense, but in mixtral every layer has "
            f"experts; omit it, or use {target}=qwen2_moe"
        )
        raise RequestError(Problem("expansion.moe.layers", reason=reason))
    return {"sliding_window": _window(config), "router_jitter_noise": 0.0}


def _qwen2_moe(config: Config, dense_layers: tuple[int, ...]) -> Config:
    _refuse_biases(config, "qwen2_moe", ("attention_bias", "mlp_bias"))
    kinds, window = _attention_kinds(config), _window(config)
    return {
        **_pattern(dense_layers),
        "qkv_bias": config["model_type"] == "qwen2",
        "shared_expert_intermediate_size": config["intermediate_size"],
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "layer_types": kinds,
        "max_window_layers": config.get("max_window_layers", config["num_hidden_layers"]),
    }


def _qwen3_moe(config: Config, dense_layers: tuple[int, ...]) -> Config:
    kinds = set(_attention_kinds(config))
    if len(kinds) > 1:
        raise RequestError(
            "config.json: layer_types mixes full and sliding attention, but qwen3_moe, the partner "
            "of qwen3, has one kind for all layers."
        )
    is_windowed = kinds == {"sliding_attention"}
    return {
        **_pattern(dense_layers),
        "attention_bias": bool(config.get("attention_bias", False)),
        "use_sliding_window": is_windowed,
        "sliding_window": config.get("sliding_window") if is_windowed else None,
    }


def _glm4_moe(config: Config, dense_layers: tuple[int, ...]) -> Config:
    _refuse_biases(config, "glm4_moe", ("attention_bias", "mlp_bias"))
    if "sliding_attention" in _attention_kinds(config):
        raise RequestError(
            "config.json: sliding_window is set, but attention in glm4_moe has no window. Use "
            f"another {key_name('expansion.moe.target')}."
        )
    first = len(dense_layers)
    if dense_layers != tuple(range(first)):
        reason = (
            f"it leaves layers {_listed(dense_layers)} dense; in glm4_moe only the first can be"
        )
        raise RequestError(Problem("expansion.moe.layers", reason=reason))
    rope = config["rope_parameters"]
    assert isinstance(rope, dict)
    return {
        "attention_bias": config["model_type"] == "qwen2",  # of q, k and v only
        "use_qk_norm": config["model_type"] == "qwen3",
        "rope_parameters": {**rope, "partial_rotary_factor": 1.0},  # default of the class: a half
        "partial_rotary_factor": 1.0,
        "first_k_dense_replace": first,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 1.0,
        "num_nextn_predict_layers": 0,
    }


def _pattern(dense_layers: tuple[int, ...]) -> Config:
    return {"decoder_sparse_step": 1, "mlp_only_layers": list(dense_layers)}


def _refuse_biases(config: Config, partner: str, keys: tuple[str, ...]) -> None:
    source = config["model_type"]
    biases = [key for key in keys if config.get(key)]
    if biases:
        lacks = "no biases" if partner == "mixtral" else "no bias there"
        raise RequestError(
            f"config.json: {biases[0]} = True, but {partner}, the partner of {source}, has {lacks}."
        )


def _listed(layers: tuple[int, ...]) -> str:
    return ", ".join(map(str, layers))


def _window(config: Config) -> object:
    """Return the sliding window of a dense model, or None."""
    if config["model_type"] == "mistral":
        return config.get("sliding_window", _MISTRAL_WINDOW)
    return config.get("sliding_window") if config.get("use_sliding_window") else None


def _attention_kinds(config: Config) -> list[object]:
    """Return the kind of attention of each layer, by default as in the dense class."""
    layers, kinds = config["num_hidden_layers"], config.get("layer_types")
    assert isinstance(layers, int)
    if config["model_type"] in ("llama", "mistral"):  # one kind for all layers
        kind = "full_attention" if _window(config) is None else "sliding_attention"
        return [kind] * layers
    if isinstance(kinds, list | tuple):
        return list(kinds)
    first = config.get("max_window_layers", 28) if config.get("use_sliding_window") else layers
    assert isinstance(first, int)
    return ["full_attention" if layer < first else "sliding_attention" for layer in range(layers)]
