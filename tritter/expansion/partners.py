"""Dense families, and the family with experts that computes the same with one expert's weights.

A partner's config states every key that its class reads: where dense and sparse class have other
defaults (eps, rotary base, sliding window), a default would change the function in silence.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tritter.errors import RequestError
from tritter.families import MIXTRAL, QWEN2_MOE, QWEN3_MOE, Config, Family

PARTNERS: Mapping[str, Family] = {
    "llama": MIXTRAL,
    "mistral": MIXTRAL,
    "qwen2": QWEN2_MOE,
    "qwen3": QWEN3_MOE,
}
# What a dense class reads and its partner does not, or reads in another sense
_DENSE_KEYS = ("pretraining_tp", "mlp_bias", "layer_types", "max_window_layers")
# Why a family stays dense although there is one with experts that is named like it
_REASONS: Mapping[str, str] = {
    "phi3": "phimoe has LayerNorm in place of RMSNorm and routes by a rule of its own",
    "granite": "the experts of granitemoe share one tensor on disk, which is not read",
}
_MISTRAL_WINDOW = 4096  # what the class takes where the config is silent


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertSizes:
    """What the target has in place of an FFN.

    Args:
        num_experts: of a sparse layer.
        experts_per_token: k.
        expert_size: intermediate size of one expert.
        dense_layers: layers that keep their FFN.
    """

    num_experts: int
    experts_per_token: int
    expert_size: int
    dense_layers: tuple[int, ...]


def partner_of(family: Family) -> Family:
    """Return the family that a dense family becomes.

    Raises:
        RequestError: it has experts already, or there is no partner; names those that have one.
    """
    if family.model_type in PARTNERS:
        return PARTNERS[family.model_type]
    having = ", ".join(f"{dense} ({sparse.model_type})" for dense, sparse in PARTNERS.items())
    if family.has_experts:
        raise RequestError(
            f"expansion.moe makes a dense model sparse, and {family.model_type} has experts "
            f"already; it takes {having}. To add experts use expansion=moe_add."
        )
    reason = _REASONS.get(family.model_type, "transformers has none for it")
    raise RequestError(
        f"expansion.moe: {family.model_type} is one of the families without a MoE partner "
        f"({reason}); those that have one: {having}."
    )


def partner_config(family: Family, config: Config, sizes: ExpertSizes) -> Config:
    """Return the config of the partner, whose tensors are all as large as the source's.

    Raises:
        RequestError: the source has something that its partner has no place for.
    """
    partner = partner_of(family)
    dimensions = family.dimensions(config)
    for key in ("rms_norm_eps", "rope_parameters"):
        if config.get(key) is None:
            raise RequestError(f"config.json: {key} is missing, and {partner.model_type} needs it.")
    kept = {key: value for key, value in config.items() if key not in _DENSE_KEYS}
    return {
        **kept,
        "model_type": partner.model_type,
        "architectures": [partner.architecture],
        "num_key_value_heads": dimensions.num_key_value_heads,
        "head_dim": dimensions.head_dim,
        partner.sizes["num_experts"]: sizes.num_experts,
        partner.sizes["experts_per_token"]: sizes.experts_per_token,
        partner.sizes["expert_size"]: sizes.expert_size,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
        **_OWN_KEYS[partner.model_type](config, sizes),
    }


def _mixtral(config: Config, sizes: ExpertSizes) -> Config:
    biases = [key for key in ("attention_bias", "mlp_bias") if config.get(key)]
    if biases:
        raise RequestError(
            f"config.json: {biases[0]} = True, and mixtral, the partner of "
            f"{config['model_type']}, has no biases."
        )
    if sizes.dense_layers:
        raise RequestError(
            f"expansion.moe.layers leaves layers {_listed(sizes.dense_layers)} dense, and in "
            "mixtral every layer has experts; leave it away (qwen2 and qwen3 may have both)."
        )
    is_llama = config["model_type"] == "llama"
    window = None if is_llama else config.get("sliding_window", _MISTRAL_WINDOW)
    return {"sliding_window": window, "router_jitter_noise": 0.0}


def _qwen2_moe(config: Config, sizes: ExpertSizes) -> Config:
    is_windowed = bool(config.get("use_sliding_window", False))
    return {
        **_pattern(sizes),
        "qkv_bias": True,
        "shared_expert_intermediate_size": config["intermediate_size"],
        "use_sliding_window": is_windowed,
        "sliding_window": config.get("sliding_window") if is_windowed else None,
        "layer_types": _attention_kinds(config),
        "max_window_layers": config.get("max_window_layers", config["num_hidden_layers"]),
    }


def _qwen3_moe(config: Config, sizes: ExpertSizes) -> Config:
    kinds = set(_attention_kinds(config))
    if len(kinds) > 1:
        raise RequestError(
            "config.json: layer_types mixes full and sliding attention, and qwen3_moe, the partner "
            "of qwen3, has one kind for all layers."
        )
    is_windowed = kinds == {"sliding_attention"}
    return {
        **_pattern(sizes),
        "attention_bias": bool(config.get("attention_bias", False)),
        "use_sliding_window": is_windowed,
        "sliding_window": config.get("sliding_window") if is_windowed else None,
    }


def _pattern(sizes: ExpertSizes) -> Config:
    return {
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(sizes.dense_layers),
        "norm_topk_prob": True,  # without it k experts of equal weights add up to less than one
    }


def _attention_kinds(config: Config) -> list[object]:
    """Return the kind of attention of every layer, derived as Qwen's classes do if not stated."""
    layers, stated = config["num_hidden_layers"], config.get("layer_types")
    assert isinstance(layers, int)
    if isinstance(stated, list | tuple):
        return list(stated)
    first = config.get("max_window_layers", 28) if config.get("use_sliding_window") else layers
    assert isinstance(first, int)
    return ["full_attention" if layer < first else "sliding_attention" for layer in range(layers)]


def _listed(numbers: tuple[int, ...]) -> str:
    return ", ".join(map(str, numbers))


_OWN_KEYS: Mapping[str, Callable[[Config, ExpertSizes], Config]] = {
    "mixtral": _mixtral,
    "qwen2_moe": _qwen2_moe,
    "qwen3_moe": _qwen3_moe,
}
