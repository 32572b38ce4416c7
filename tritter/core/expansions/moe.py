"""Sparse upcycling of a dense model to a mixture of experts (Komatsuzaki et al., arXiv 2212.05055).

Each FFN is copied n times after a new router. The weights of the k selected copies add up to one,
so equal copies compute the function of the FFN for any routing. In Qwen2-MoE the shared expert
takes over the FFN (with doubled output and a gate that starts at one half), and the outputs of the
routed copies start at zero.

The moments and importances of copies depend on the routing, so their map assumes a balanced router.
Each of C copies gets 1/C of the gradient. A copy processes k/C of the tokens with weight 1/k each,
so it gets 1/(C·k) of the gradient's variance (measured with C = 8 and k = 2: 0.051–0.059 instead of
0.0625).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from tritter.core.expansions.moe_children import DEFAULT_NOISE, check_children
from tritter.core.families import (
    MIXTRAL,
    QWEN2_MOE,
    QWEN3_MOE,
    Config,
    Family,
    LogicalTensor,
    ffn_sizes,
    logical_name,
)
from tritter.core.parameter_map import AxisFactor, Fill, ParameterMap, TensorMap
from tritter.errors import Problem, RequestError, key_name, refused, setting
from tritter.limits import MAX_EXPERTS, MAX_LAYERS
from tritter.options import Text, options
from tritter.seeds import derived_seed

DEFAULT_COPIES, DEFAULT_COPIES_PER_TOKEN = 8, 2


@options
class Moe:
    """Copy each FFN into experts after a new router.

    Args:
        num_experts: number of experts per layer. Default: 8 copies of the FFN.
        experts_per_token: k. Default: 2 copies.
        noise: relative standard deviation of the noise on every copy but the first. Without it all
            copies start equal, and the language-modelling loss gives the router no gradient.
        reinit_fraction: fraction of each expert's neurons that are reinitialised with the mean and
            deviation of the source, different in each expert (Drop-Upcycling, arXiv 2502.19261).
        granularity: number of pieces of each copy. The pieces of a copy share their router row, so
            at first a token is routed to all of them or none.
        layers: layers that get experts; the others keep their FFN. Default: all.
        experts_from: folders or hub ids of models that were trained from this one. The FFNs of each
            become one expert (Branch-Train-MiX, arXiv 2403.07816).
        attention_from: attention, norms, embeddings, head and dense FFNs: `average` of
            `experts_from`, `source`, or one of `experts_from`. Default: average.
        router: router rows: `data`, the directions that distinguish the experts' training data, or
            `random`. Default: data, if the lineage of every expert records its data.
        expert_hashes: model hashes of `experts_from`; set when they are known.
    """

    name: ClassVar[str] = "moe"
    new_blocks_only: ClassVar[bool] = False
    expansion_type: ClassVar[str] = "moe"
    num_experts: Annotated[int, Field(ge=2, le=MAX_EXPERTS)] | None = None
    experts_per_token: Annotated[int, Field(ge=1, le=MAX_EXPERTS)] | None = None
    noise: Annotated[float, Field(ge=0)] = DEFAULT_NOISE
    reinit_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    granularity: Annotated[int, Field(ge=1, le=MAX_EXPERTS)] = 1
    layers: tuple[Annotated[int, Field(ge=0, le=MAX_LAYERS)], ...] | None = None
    experts_from: tuple[Text, ...] | None = None
    attention_from: Text | None = None
    router: Literal["data", "random"] | None = None
    expert_hashes: tuple[Text, ...] | None = None

    def __post_init__(self) -> None:
        check_children(self)

    @property
    def is_exact(self) -> bool:
        return self.noise == 0 and self.reinit_fraction == 0 and self.experts_from is None

    @property
    def total_experts(self) -> int:
        listed = self.experts_from
        return len(listed) if listed else self.num_experts or DEFAULT_COPIES * self.granularity

    @property
    def chosen_experts(self) -> int:
        return self.experts_per_token or DEFAULT_COPIES_PER_TOKEN * self.granularity

    def target_config(self, family: Family, config: Config) -> Config:
        partner, dimensions = partner_of(family), family.dimensions(config)
        if widths := ffn_sizes(config):
            raise RequestError(
                Problem(
                    "expansion.moe",
                    reason=f"the FFNs of this model are {min(widths)} to {max(widths)} wide, but "
                    "experts have one width in all layers; pad the FFNs with export --format hf, "
                    "then expand the result",
                )
            )
        total, chosen, pieces = self.total_experts, self.chosen_experts, self.granularity
        _check_count("num_experts", total, at_least=2 * pieces, multiple_of=pieces)
        _check_count("experts_per_token", chosen, at_least=pieces, multiple_of=pieces)
        if chosen > total:
            raise refused(
                "expansion.moe.experts_per_token",
                chosen,
                f"a layer has {total} experts; must be at most {total}",
            )
        width = dimensions.intermediate_size
        size, rest = divmod(width, pieces)
        if rest:
            divisors = (count for count in range(1, width + 1) if width % count == 0)
            nearest = min(divisors, key=lambda count: abs(count - pieces))
            raise refused(
                "expansion.moe.granularity",
                pieces,
                f"it does not divide the FFN's {width} neurons; nearest: {nearest}",
            )
        dense_layers = self._dense_layers(dimensions.num_hidden_layers)
        for key in ("rms_norm_eps", "rope_parameters"):
            if config.get(key) is None:
                reason = f"{key} is missing, but {partner.model_type} needs it."
                raise RequestError(f"config.json: {reason}")
        return {
            **{key: value for key, value in config.items() if key not in _DENSE_KEYS},
            "model_type": partner.model_type,
            "architectures": [partner.architecture],
            "num_key_value_heads": dimensions.num_key_value_heads,
            "head_dim": dimensions.head_dim,
            partner.sizes["num_experts"]: total,
            partner.sizes["experts_per_token"]: chosen,
            partner.sizes["expert_size"]: size,
            "output_router_logits": False,
            "router_aux_loss_coef": 0.001,
            **_keys_of_partner(partner, config, dense_layers),
        }

    def parameter_map(
        self, family: Family, source: Config, target: Config, *, seed: int
    ) -> ParameterMap:
        if self.experts_from is not None:
            reason = "it reads other checkpoints, so it needs a folder to compare them with"
            raise RequestError(Problem("expansion.moe.experts_from", reason=reason))
        partner = partner_of(family)
        copies = Copies(self, partner, target, seed)
        return ParameterMap(
            tensors={t.name: copies.tensor_map(t) for t in partner.logical_tensors(target)},
            layer_sources=tuple(range(partner.dimensions(target).num_hidden_layers)),
        )

    def notes(self, family: Family, source: Config, target: Config) -> tuple[str, ...]:
        partner = partner_of(family)
        dimensions = partner.dimensions(target)
        active, total = partner.count_active_parameters(target), partner.count_parameters(target)
        notes = [
            f"{family.model_type} → {partner.model_type}: {dimensions.num_experts} experts per "
            f"layer, {dimensions.experts_per_token} per token; {active:,} of {total:,} parameters "
            "are active per token"
        ]
        if dimensions.shared_expert_size and self.experts_from is None:
            notes.append(
                "the shared expert replaces the FFN and the routed experts start with zero output, "
                "so the function is preserved at step 0, with any noise"
            )
        dense = self._dense_layers(dimensions.num_hidden_layers)
        if dense:
            notes.append(f"dense layers: {', '.join(map(str, dense))}")
        if self.is_exact:
            notes.append(
                "all copies start equal: until they differ, only a balance loss gives the router a "
                "gradient"
            )
        if self.granularity > 1:
            notes.append(
                f"the {self.granularity} pieces of a copy are routed together only at the start"
            )
        if dimensions.hidden_size % 8 or dimensions.expert_size % 8:
            notes.append(
                f"hidden size {dimensions.hidden_size} and expert size {dimensions.expert_size} "
                "are not both multiples of 8, which the default kernel of transformers needs; "
                'load it with experts_implementation="eager"'
            )
        return tuple(notes)

    def _dense_layers(self, layers: int) -> tuple[int, ...]:
        if self.layers is None:
            return ()
        wrong = [layer for layer in self.layers if not 0 <= layer < layers]
        if wrong or not self.layers:
            raise refused(
                "expansion.moe.layers",
                list(self.layers),
                f"list at least one layer from 0 to {layers - 1} to get experts",
            )
        return tuple(sorted(set(range(layers)) - set(self.layers)))


def _check_count(name: str, value: int, *, at_least: int, multiple_of: int) -> None:
    if value >= at_least and value % multiple_of == 0:
        return
    below = value - value % multiple_of
    counts = sorted({max(below, at_least), max(below + multiple_of, at_least)})
    granularity = key_name("expansion.moe.granularity")
    whole = f"a multiple of {granularity} = {multiple_of}, and " if multiple_of > 1 else ""
    raise refused(
        f"expansion.moe.{name}",
        value,
        f"must be {whole}at least {at_least}; nearest: {' or '.join(map(str, counts))}",
    )


@dataclass(frozen=True, slots=True)
class Copies:
    """The tensor maps of one upcycling.

    Args:
        spec: its options.
        partner: the family with experts.
        target: config of the result.
        seed: of fills, noise and reinitialised neurons.
    """

    spec: Moe
    partner: Family
    target: Config
    seed: int
    _factors: dict[tuple[int, bool], AxisFactor] = field(default_factory=dict, repr=False)

    def tensor_map(self, tensor: LogicalTensor) -> TensorMap:
        """Return the map of a tensor of the partner."""
        import torch

        if tensor.expert is not None:
            return self._expert(tensor, tensor.expert)
        shape = self.partner.shape(tensor, self.target)
        if tensor.kind == "router":
            fill = Fill(
                kind="random",
                std=1 / math.sqrt(shape[1]),  # logits of about unit scale for any hidden size
                seed=derived_seed(self.seed, "fill", tensor.name),
                repeat=self.spec.granularity,
            )
            return TensorMap.created(shape, fill)
        if tensor.kind == "shared_expert_gate":
            return TensorMap.created(shape, Fill())  # a sigmoid of zero: one half
        source = logical_name(tensor.kind.replace("shared_expert.", "ffn."), layer=tensor.layer)
        if tensor.kind == "shared_expert.down":
            one = torch.ones(shape[0], dtype=torch.float64)
            doubled = AxisFactor(torch.arange(shape[0]), weight=2 * one, gradient=one / 2)
            return TensorMap(source=source, axes=(doubled, None))
        return TensorMap(source=source)

    def _expert(self, tensor: LogicalTensor, expert: int) -> TensorMap:
        spec, dimensions = self.spec, self.partner.dimensions(self.target)
        copy, piece = divmod(expert, spec.granularity)
        is_down, is_silent = tensor.kind == "experts.down", dimensions.shared_expert_size > 0
        # The k weights of a token are split over the pieces, so their outputs are scaled up
        scale = float(spec.granularity) if is_down else 1.0
        factor = self._factors.get((piece, is_down))
        if factor is None:
            stem = f"layers.{tensor.layer}.experts.{expert}"
            factor = self._factor(piece, dimensions.expert_size, scale, stem)
        if not spec.reinit_fraction:
            # Shared by all copies: one per copy would need more memory than the largest tensor
            self._factors[piece, is_down] = factor
        fill = Fill("matched", scale=scale, seed=derived_seed(self.seed, "fill", tensor.name))
        return TensorMap(
            source=logical_name(tensor.kind.replace("experts.", "ffn."), layer=tensor.layer),
            axes=(None, factor) if is_down else (factor, None),
            fill=fill if spec.reinit_fraction else Fill(),
            is_zeroed=is_down and is_silent,
            # Zero outputs have no gradient, so dense moments do not apply
            state="fresh" if is_silent else "carry",
            noise=scale * spec.noise if copy else 0.0,
            noise_seed=derived_seed(self.seed, "noise", tensor.name),
            is_copy=copy > 0,
        )

    def _factor(self, piece: int, size: int, scale: float, stem: str) -> AxisFactor:
        """Return the factors along an expert's neurons.

        Args:
            size: neurons of one expert.
            scale: factor of the weights.
            stem: name of the expert; all its tensors reinitialise the same neurons.
        """
        import torch

        spec = self.spec
        index = torch.arange(piece * size, (piece + 1) * size)
        generator = torch.Generator().manual_seed(derived_seed(self.seed, "redrawn", stem))
        index[torch.randperm(size, generator=generator)[: round(spec.reinit_fraction * size)]] = -1
        kept = (index >= 0).double()
        share = spec.granularity / spec.total_experts  # of the dense gradient, if balanced
        chosen = spec.chosen_experts / spec.granularity
        return AxisFactor(
            index,
            weight=kept * scale,
            gradient=kept * share / scale,
            squared=kept * share / chosen / scale**2,
        )


# Dense families and their partners with experts, which compute the same function per expert.
#
# A partner's config sets every key that its class reads: the defaults of dense and sparse classes
# differ (eps, rotary base, sliding window), which would silently change the function.

PARTNERS: Mapping[str, Family] = {
    "llama": MIXTRAL,
    "mistral": MIXTRAL,
    "qwen2": QWEN2_MOE,
    "qwen3": QWEN3_MOE,
}
# Keys that the partner of a dense class does not read, or reads differently
_DENSE_KEYS = ("pretraining_tp", "mlp_bias", "layer_types", "max_window_layers")
# Reasons that a family has no partner despite an MoE family of the same name
_REASONS: Mapping[str, str] = {
    "phi3": "phimoe has LayerNorm instead of RMSNorm, and its own routing rule",
    "granite": "granitemoe stores experts in one tensor on disk, which is not supported",
}
_MISTRAL_WINDOW = 4096  # default of the class


def partner_of(family: Family) -> Family:
    """Return the family with experts that a dense family is upcycled to.

    Raises:
        RequestError: the family already has experts, or no partner; lists those that have one.
    """
    if family.model_type in PARTNERS:
        return PARTNERS[family.model_type]
    supported = ", ".join(f"{dense} ({sparse.model_type})" for dense, sparse in PARTNERS.items())
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


def _keys_of_partner(partner: Family, config: Config, dense_layers: tuple[int, ...]) -> Config:
    """Return the remaining keys of the partner's config, derived from the dense config.

    Raises:
        RequestError: the source has a feature that its partner lacks.
    """
    if partner is MIXTRAL:
        biases = [key for key in ("attention_bias", "mlp_bias") if config.get(key)]
        if biases:
            raise RequestError(
                f"config.json: {biases[0]} = True, but mixtral, the partner of "
                f"{config['model_type']}, has no biases."
            )
        if dense_layers:
            reason = (
                f"it leaves layers {', '.join(map(str, dense_layers))} dense, but in mixtral every "
                "layer has experts; omit it (qwen2 and qwen3 support both)"
            )
            raise RequestError(Problem("expansion.moe.layers", reason=reason))
        is_llama = config["model_type"] == "llama"
        window = None if is_llama else config.get("sliding_window", _MISTRAL_WINDOW)
        return {"sliding_window": window, "router_jitter_noise": 0.0}
    pattern = {
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(dense_layers),
        "norm_topk_prob": True,  # else the weights of k experts add up to less than one
    }
    kinds = _attention_kinds(config)
    if partner is QWEN2_MOE:
        is_windowed = bool(config.get("use_sliding_window", False))
        return {
            **pattern,
            "qkv_bias": True,
            "shared_expert_intermediate_size": config["intermediate_size"],
            "use_sliding_window": is_windowed,
            "sliding_window": config.get("sliding_window") if is_windowed else None,
            "layer_types": kinds,
            "max_window_layers": config.get("max_window_layers", config["num_hidden_layers"]),
        }
    if len(set(kinds)) > 1:
        raise RequestError(
            "config.json: layer_types mixes full and sliding attention, but qwen3_moe, the partner "
            "of qwen3, has one kind for all layers."
        )
    is_windowed = set(kinds) == {"sliding_attention"}
    return {
        **pattern,
        "attention_bias": bool(config.get("attention_bias", False)),
        "use_sliding_window": is_windowed,
        "sliding_window": config.get("sliding_window") if is_windowed else None,
    }


def _attention_kinds(config: Config) -> list[object]:
    """Return the kind of attention of each layer, by default as in Qwen's classes."""
    layers, kinds = config["num_hidden_layers"], config.get("layer_types")
    assert isinstance(layers, int)
    if isinstance(kinds, list | tuple):
        return list(kinds)
    first = config.get("max_window_layers", 28) if config.get("use_sliding_window") else layers
    assert isinstance(first, int)
    return ["full_attention" if layer < first else "sliding_attention" for layer in range(layers)]
