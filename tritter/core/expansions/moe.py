"""Sparse upcycling of a dense model to a mixture of experts (Komatsuzaki et al., arXiv 2212.05055).

Each FFN is copied n times after a new router. The weights of the k selected copies add up to one,
so equal copies compute the function of the FFN for any routing. In Qwen2-MoE and GLM-4-MoE the
shared expert takes over the FFN (in Qwen2-MoE with doubled output and a gate that starts at one
half), and the outputs of the routed copies start at zero.

Without renormalisation (`norm_topk_prob=false`, He et al. 2024, arXiv 2410.07524) the softmax over
E experts gives each selected one 1/E at an even router. The k selected pieces of k/g copies sum up
to k/(g·E) FFNs, so `down` is scaled by g·E/k.

The moments and importances of copies depend on the routing, so their map assumes a balanced router.
Each of C copies gets 1/C of the gradient. A copy processes k/C of the tokens with weight 1/k each,
so it gets 1/(C·k) of the gradient's variance (measured with C = 8 and k = 2: 0.051–0.059 instead of
0.0625).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Literal, TypeVar

from pydantic import Field

from tritter.core.families import Config, Family, LogicalTensor, Model, find_family, logical_name
from tritter.core.parameter_map import AxisFactor, Fill, ParameterMap, TensorMap
from tritter.errors import Problem, RequestError, key_name, refused
from tritter.limits import MAX_EXPERTS, MAX_LAYERS
from tritter.options import Text, options
from tritter.seeds import derived_seed

_DEFAULT_COPIES, _DEFAULT_COPIES_PER_TOKEN = 8, 2
_DEFAULT_NOISE = 0.01  # of copies
_AVERAGE, _SOURCE = "average", "source"
_NEEDS_CHILDREN = ("attention_from", "router", "expert_hashes")
# Dense model type → types with experts that compute the same attention, the default first
_PARTNERS: Mapping[str, tuple[str, ...]] = {
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
_Child = TypeVar("_Child")


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
        target: model type of the result. Default: `mixtral`, `qwen2_moe` or `qwen3_moe`. In
            `qwen2_moe` and `glm4_moe` a shared expert replaces the FFN, and the outputs of the
            routed experts start at zero; `glm4_moe` has a sigmoid router.
        norm_topk_prob: the weights of the selected experts add up to one. Without it, they are
            the softmax over all experts, and the experts' output is scaled up (arXiv 2410.07524).
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
    noise: Annotated[float, Field(ge=0)] = _DEFAULT_NOISE
    reinit_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    granularity: Annotated[int, Field(ge=1, le=MAX_EXPERTS)] = 1
    layers: tuple[Annotated[int, Field(ge=0, le=MAX_LAYERS)], ...] | None = None
    target: Literal["mixtral", "qwen2_moe", "qwen3_moe", "glm4_moe"] | None = None
    norm_topk_prob: bool = True

    experts_from: tuple[Text, ...] | None = None
    attention_from: Text | None = None
    router: Literal["data", "random"] | None = None
    expert_hashes: tuple[Text, ...] | None = None

    def __post_init__(self) -> None:
        listed = self.experts_from
        if listed is None:
            for key in (key for key in _NEEDS_CHILDREN if getattr(self, key) is not None):
                reason = (
                    f"it is an option of {key_name('expansion.moe.experts_from')}, which is not set"
                )
                raise refused(f"expansion.moe.{key}", getattr(self, key), reason)
            return
        names, experts_from = (_AVERAGE, _SOURCE, *listed), key_name("expansion.moe.experts_from")
        problems = {
            "experts_from": (
                not 2 <= len(listed) <= MAX_EXPERTS or len(set(listed)) < len(listed),
                f"list 2 to {MAX_EXPERTS} different models",
            ),
            "num_experts": (
                self.num_experts not in (None, len(listed)),
                f"{experts_from} lists {len(listed)}; remove one of the two",
            ),
            "attention_from": (
                self.attention_from not in (None, *names),
                f"must be one of {', '.join(names)}",
            ),
            "granularity": (
                self.granularity != 1,
                "experts from other models are not split; use 1",
            ),
            "reinit_fraction": (self.reinit_fraction != 0, "it redraws neurons of copies; use 0"),
            "norm_topk_prob": (
                not self.norm_topk_prob,
                "experts from other models are not scaled up",
            ),
            "target": (
                self.target == "glm4_moe",
                "its experts can't come from other models; use null, or another type",
            ),
            "noise": (
                self.noise not in (0, _DEFAULT_NOISE),
                "it is added to copies, and experts from different models are none; use 0",
            ),
        }
        for key, (is_wrong, reason) in problems.items():
            if is_wrong:
                raise refused(f"expansion.moe.{key}", getattr(self, key), reason)

    @property
    def is_exact(self) -> bool:
        if self.experts_from is not None:
            return False
        if self.target in SHARED:  # the output of the routed experts is zero
            return True
        return self.noise == 0 and self.reinit_fraction == 0 and self.norm_topk_prob

    @property
    def output_scale(self) -> float:
        """Factor of `down`, so that an evenly routed layer has the output of the FFN."""
        if self.norm_topk_prob:  # the k weights of a token are split over the pieces
            return float(self.granularity)
        return self.granularity * self.total_experts / self.chosen_experts

    @property
    def total_experts(self) -> int:
        listed = self.experts_from
        return len(listed) if listed else self.num_experts or _DEFAULT_COPIES * self.granularity

    @property
    def chosen_experts(self) -> int:
        return self.experts_per_token or _DEFAULT_COPIES_PER_TOKEN * self.granularity

    def partner(self, family: Family) -> str:
        """Return the model type with experts that a dense family is upcycled to."""
        if partners := _PARTNERS.get(family.model_type):
            if self.target is not None and self.target not in partners:
                reason = f"{family.model_type} can become {', '.join(partners)}"
                raise refused("expansion.moe.target", self.target, reason)
            return self.target or partners[0]
        supported = ", ".join(f"{dense} ({sparse[0]})" for dense, sparse in _PARTNERS.items())
        cause = _REASONS.get(family.model_type, "transformers has none for it")
        reason = f"{family.model_type} has no MoE partner ({cause}); families that have one: "
        reason += supported
        if family.has_experts:
            reason = f"it makes a dense model sparse, and {family.model_type} has experts already; "
            reason += f"it supports {supported}. To add experts use {key_name('expansion')}=moe_add"
        raise RequestError(Problem("expansion.moe", reason=reason))

    def shared_models(self, children: Sequence[_Child]) -> tuple[_Child, ...]:
        """Return the models whose mean gives all tensors but the FFNs; empty for the source.

        Args:
            children: the models of `experts_from`.
        """
        if self.attention_from == _SOURCE:
            return ()
        if self.attention_from in (None, _AVERAGE):
            return tuple(children)
        assert self.experts_from is not None
        return (children[self.experts_from.index(self.attention_from)],)

    def target_config(self, source: Model) -> Config:
        partner, dimensions = self.partner(source.family), source.sizes
        if widths := source.ffn_sizes:
            reason = f"the FFNs of this model are {min(widths)} to {max(widths)} wide, but experts "
            reason += "have one width in all layers; pad the FFNs with export --format hf, then "
            raise RequestError(Problem("expansion.moe", reason=f"{reason}expand the result"))
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
        if not self.norm_topk_prob and partner not in ("qwen2_moe", "qwen3_moe"):
            reason = "Tritter does not support it for glm4_moe; use true"
            if partner == "mixtral":
                reason = "mixtral always renormalises; use true"
            ways = {"qwen2_moe", "qwen3_moe"}.intersection(_PARTNERS[source.model_type])
            reason += "".join(f", or {key_name('expansion.moe.target')}={way}" for way in ways)
            raise refused("expansion.moe.norm_topk_prob", False, reason)
        counts = {"num_experts": total, "experts_per_token": chosen, "expert_size": size}
        changed = _partner_config(source, partner, counts, dense_layers)
        if partner == "mixtral":  # has no such key
            return changed
        pieces_of_shared = {"n_shared_experts": pieces} if partner == "glm4_moe" else {}
        return {**changed, "norm_topk_prob": self.norm_topk_prob, **pieces_of_shared}

    def parameter_map(self, source: Model, target: Model, *, seed: int) -> ParameterMap:
        if self.experts_from is not None:
            reason = "it reads other checkpoints, so it needs a folder to compare them with"
            raise RequestError(Problem("expansion.moe.experts_from", reason=reason))
        copies = _Copies(self, source, target, seed)
        return ParameterMap(
            tensors={t.name: copies.tensor_map(t) for t in target.tensors},
            layer_sources=tuple(range(target.sizes.num_hidden_layers)),
        )

    def notes(self, source: Model, target: Model) -> tuple[str, ...]:
        dimensions = target.sizes
        size = source.sizes.intermediate_size // self.granularity
        active, total = target.num_active_parameters, target.num_parameters
        notes = [
            f"{source.model_type} → {target.model_type}: {dimensions.num_experts} experts per "
            f"layer, {dimensions.experts_per_token} per token; {active:,} of {total:,} parameters "
            "are active per token"
        ]
        if target.model_type in SHARED and self.experts_from is None:
            notes.append(
                "the shared expert replaces the FFN and the routed experts start with zero output, "
                "so the function is preserved at step 0, with any noise"
            )
        dense = self._dense_layers(dimensions.num_hidden_layers)
        if dense:
            notes.append(f"dense layers: {', '.join(map(str, dense))}")
        if not self.norm_topk_prob and target.model_type not in SHARED:
            notes.append(
                f"outputs of experts are scaled by {self.output_scale:g}: an evenly routed layer "
                "computes the FFN, a token with other routing a multiple of it"
            )
        if self.noise == 0 and self.reinit_fraction == 0:
            notes.append(
                "all copies start equal: until they differ, only a balance loss gives the router a "
                "gradient"
            )
        if self.granularity > 1:
            notes.append(
                f"the {self.granularity} pieces of a copy are routed together only at the start"
            )
        if dimensions.hidden_size % 8 or size % 8:
            notes.append(
                f"hidden size {dimensions.hidden_size} and expert size {size} "
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


class _Copies:
    """The tensor maps of one upcycling.

    Args:
        spec: its options.
        source: the dense model.
        target: the model with experts.
        seed: of fills, noise and reinitialised neurons.
    """

    def __init__(self, spec: Moe, source: Model, target: Model, seed: int) -> None:
        self._spec, self._target, self._seed = spec, target, seed
        self._expert_size = source.sizes.intermediate_size // spec.granularity
        # Discovery has other logical names than the tables, but names on disk are the same
        self._names = {tensor.disk_name: tensor.name for tensor in source.tensors}
        self._factors: dict[tuple[int, bool], AxisFactor] = {}  # those that all copies share

    def tensor_map(self, tensor: LogicalTensor) -> TensorMap:
        """Return the map of a tensor of the partner."""
        import torch

        if tensor.expert is not None:
            return self._expert(tensor, tensor.expert)
        shape, kind = self._target.shapes[tensor.name], _kind_of(tensor)
        if kind == "router":
            fill = Fill(
                kind="random",
                std=1 / math.sqrt(shape[1]),  # logits of about unit scale for any hidden size
                seed=derived_seed(self._seed, "fill", tensor.name),
                repeat=self._spec.granularity,
            )
            return TensorMap.created(shape, fill)
        if kind in ("shared_expert_gate", "router_bias"):
            return TensorMap.created(shape, Fill())  # a sigmoid of zero: one half
        if not kind.startswith("shared_expert."):
            return TensorMap(source=self._names[tensor.disk_name])
        source = logical_name(kind.replace("shared_expert.", "ffn."), layer=tensor.layer)
        if kind == "shared_expert.down" and self._target.model_type == "qwen2_moe":
            one = torch.ones(shape[0], dtype=torch.float64)
            doubled = AxisFactor(torch.arange(shape[0]), weight=2 * one, gradient=one / 2)
            return TensorMap(source=source, axes=(doubled, None))
        return TensorMap(source=source)

    def _expert(self, tensor: LogicalTensor, expert: int) -> TensorMap:
        spec, kind = self._spec, _kind_of(tensor)
        copy, piece = divmod(expert, spec.granularity)
        is_down, is_silent = kind == "experts.down", self._target.model_type in SHARED
        scale = spec.output_scale if is_down else 1.0
        factor = self._factors.get((piece, is_down))
        if factor is None:
            stem = f"layers.{tensor.layer}.experts.{expert}"
            factor = self._factor(piece, scale, stem)
        if not spec.reinit_fraction:
            # Shared by all copies: one per copy would need more memory than the largest tensor
            self._factors[piece, is_down] = factor
        fill = Fill("matched", scale=scale, seed=derived_seed(self._seed, "fill", tensor.name))
        return TensorMap(
            source=logical_name(kind.replace("experts.", "ffn."), layer=tensor.layer),
            axes=(None, factor) if is_down else (factor, None),
            fill=fill if spec.reinit_fraction else Fill(),
            is_zeroed=is_down and is_silent,
            # Zero outputs have no gradient, so dense moments do not apply
            state="fresh" if is_silent else "carry",
            noise=scale * spec.noise if copy else 0.0,
            noise_seed=derived_seed(self._seed, "noise", tensor.name),
            is_copy=copy > 0,
        )

    def _factor(self, piece: int, scale: float, stem: str) -> AxisFactor:
        """Return the factors along an expert's neurons.

        Args:
            scale: factor of the weights.
            stem: name of the expert; all its tensors reinitialise the same neurons.
        """
        import torch

        spec, size = self._spec, self._expert_size
        index = torch.arange(piece * size, (piece + 1) * size)
        generator = torch.Generator().manual_seed(derived_seed(self._seed, "redrawn", stem))
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


def _kind_of(tensor: LogicalTensor) -> str:
    """Return the kind of a partner's tensor as in the tables: `router`, `experts.down`."""
    if tensor.expert is not None:
        return tensor.kind.removesuffix("_proj.weight")
    name = tensor.disk_name.partition(f".{tensor.layer}.")[2]
    return tensor.kind if tensor.kind == "router" else _GLM_KINDS.get(name, tensor.kind)


def _partner_config(
    source: Model, partner: str, counts: Mapping[str, int], dense_layers: tuple[int, ...]
) -> Config:
    """Return the config of the upcycled model, without the key `norm_topk_prob`.

    It sets every key that the partner's class reads: the defaults of dense and sparse classes
    differ (eps, rotary base, sliding window), which would silently change the function.

    Args:
        source: the dense model.
        partner: model type of the result.
        counts: `num_experts`, `experts_per_token` and `expert_size`.
        dense_layers: layers that keep their FFN.
    """
    config, dimensions = source.config, source.sizes
    if config.get("rope_parameters") is None:
        from tritter.core.families.discovery.configs import StockConfig  # imports transformers

        # rope_theta and rope_scaling, the keys of earlier releases
        kept = {key: value for key, value in config.items() if not key.startswith("rope_")}
        config = {**kept, "rope_parameters": StockConfig(config).full["rope_parameters"]}
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
        return ["full_attention" if _window(config) is None else "sliding_attention"] * layers
    if isinstance(kinds, list | tuple):
        return list(kinds)
    first = config.get("max_window_layers", 28) if config.get("use_sliding_window") else layers
    assert isinstance(first, int)
    return ["full_attention" if layer < first else "sliding_attention" for layer in range(layers)]
