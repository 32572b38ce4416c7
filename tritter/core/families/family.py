"""A family's table, expanded for a config: tensors, their shapes and their number."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from math import prod
from typing import Any, Literal

from tritter.core.families.dimensions import (
    DENSE_SIZES,
    FFN_SIZES,
    Config,
    Dimensions,
    ffn_sizes,
    on_disk,
)
from tritter.core.families.logical import LogicalTensor, Port
from tritter.errors import RequestError, brief

_FFN_PARTS = {f"ffn.{part}": part for part in ("gate", "up", "down")}


@dataclass(frozen=True)
class Family:
    """One architecture of Hugging Face transformers, as data.

    Args:
        model_type: the `model_type` of its config.json.
        architecture: the class in config.json's `architectures`.
        tensors: all logical tensors in forward order, one template for all layers and experts.
        heads_divide_hidden: the config class requires a hidden size divisible by the number of
            heads.
        sizes: attribute of `Dimensions` → its config key.
        per_layer_config_keys: config lists with one entry per layer.
        sparse_layers: the layers that have experts; `pattern` follows `mlp_only_layers` and
            `decoder_sparse_step`.
        windows: the layers with sliding-window attention if the config sets `sliding_window`:
            `none`, `all`, or those in `layer_types`.
        norm_offset: offset between the weight of a norm and its gain.
        subtracts_mean: its norms are LayerNorms.
        parallel_residual_key: config key that makes attention and FFN read the same residual
            stream; empty if the FFN always follows attention.
        has_interleaved_rope: rotary embeddings pair coordinates 2i and 2i + 1 instead of i and
            i + head_dim / 2.
        ffn_ratio: default FFN width as a multiple of the hidden size; 0 if the config must set it.
        layer_index_key: config key that makes a layer depend on its index; empty if there is none.
        defaults: optional config keys that the table reads → their default values.
    """

    model_type: str
    architecture: str
    tensors: tuple[LogicalTensor, ...]
    heads_divide_hidden: bool = False
    sizes: Mapping[str, str] = field(default_factory=lambda: DENSE_SIZES)
    per_layer_config_keys: tuple[str, ...] = ()
    sparse_layers: Literal["none", "all", "pattern"] = "none"
    windows: Literal["none", "all", "layer_types"] = "none"
    norm_offset: float = 0.0
    subtracts_mean: bool = False
    parallel_residual_key: str = ""
    has_interleaved_rope: bool = False
    ffn_ratio: int = 0
    layer_index_key: str = ""
    defaults: Mapping[str, object] = field(default_factory=dict)

    @property
    def has_table(self) -> bool:
        """Its tensors are tabulated; otherwise `widened` finds their axes."""
        return bool(self.tensors)

    def unrounded(self, config: Config, dtype: Any) -> Collection[str]:
        """Return the names, on disk and in memory, of what stock models of a dtype have in float32.

        The dtype is one of torch. Only 16-bit models have such tensors.
        """
        return ()

    def inexact_reason(self, config: Config, copied: Collection[int]) -> str:
        """Return the reason why copies of these layers can't be identities; empty if they can."""
        return ""

    @property
    def has_experts(self) -> bool:
        return self.sparse_layers != "none"

    @property
    def norms_all_heads(self) -> bool:
        """The norm of the queries takes the mean square over all heads."""
        return any(t.is_norm and t.axes[0].space.kind == "query" for t in self.tensors)

    @property
    def heads_fill_hidden(self) -> bool:
        """The total width of the heads equals the hidden size."""
        return "head_dim" not in self.sizes

    @property
    def keeps_heads(self) -> bool:
        """The number of heads can't grow, and does not depend on the hidden size."""
        return False

    @property
    def positions_key(self) -> str:
        """Config key of the context length."""
        return self.sizes.get("max_position_embeddings", "max_position_embeddings")

    def position_limit(self, config: Config) -> int | None:
        """Return the context length in tokens, or None if the config does not set it."""
        limit = config.get(self.positions_key)
        return limit if isinstance(limit, int) else None

    @property
    def has_gate(self) -> bool:
        """FFNs or experts are gated."""
        return any(tensor.kind in ("ffn.gate", "experts.gate") for tensor in self.tensors)

    def fixed_neurons(self, config: Config) -> str:
        """Return the reason if single layers can't get neurons; empty if they can."""
        if self.has_experts:
            return (
                f"{self.model_type} has experts, and neurons grow only in dense FFNs; add experts "
                "(expansion=moe_add)"
            )
        if any(tensor.within and tensor.kind == "ffn.up" for tensor in self.tensors):
            return (
                f"{self.model_type} stores gate and up as one tensor, and growth requires two; use "
                "expansion=width"
            )
        return ""

    def ffn_part(self, tensor: LogicalTensor) -> str:
        """Return `gate`, `up` or `down` for a matrix of a dense FFN, else an empty text."""
        return _FFN_PARTS.get(tensor.kind, "")

    def neuron_axis(self, tensor: LogicalTensor) -> int:
        """Return the axis of the neurons in a matrix of a dense FFN."""
        return [axis.space.kind for axis in tensor.axes].index("ffn")

    def activation_name(self, up: str) -> str:
        """Return the name of the module that computes σ of an FFN; empty: `act_fn` or `act` in it.

        Args:
            up: name in memory of the weight.
        """
        return ""

    def with_ffn_sizes(self, config: Config, sizes: Sequence[int]) -> Config:
        """Return the config of a model with the given FFN width per layer."""
        same = self.with_widest_ffn(on_disk(config), max(sizes))
        return same if min(sizes) == max(sizes) else {**same, FFN_SIZES: list(sizes)}

    def with_widest_ffn(self, config: Config, size: int) -> Config:
        """Return the config of a model in which all FFNs have a width."""
        return {**config, self.sizes["intermediate_size"]: size}

    def dimensions(self, config: Config) -> Dimensions:
        """Read the sizes from a config, with the defaults that transformers would derive.

        `intermediate_size` is that of the widest FFN.
        """
        return Dimensions.read(config, self.sizes, ffn_ratio=self.ffn_ratio)

    def findings(self, config: Config) -> Config:
        """Return the findings about a model type without a table, for people."""
        return {}

    def widened(self, config: Config) -> "Family":
        """Return this family with all that growth in width needs to know."""
        return self

    def check_growth(self, old: Dimensions, new: Dimensions) -> None:
        """Raise a RequestError if a size that changes can't grow."""

    def with_dimensions(self, config: Config, sizes: Dimensions) -> Config:
        """Return the config of a model with other sizes of FFNs, heads and residual stream."""
        grown = Dimensions.GROWING
        changed = {k: getattr(sizes, name) for name, k in self.sizes.items() if name in grown}
        return {**config, **changed}

    def decoder(self, config: Config) -> Config:
        """Return the config of the decoder, which multimodal configs contain."""
        return config

    def separates_documents(self, config: Config) -> bool:
        """Return True if position ids that restart keep a token from reading earlier documents."""
        return True

    def with_vocabulary(self, config: Config, size: int) -> Config:
        """Return the config of a model with another number of tokens."""
        return {**config, self.sizes.get("vocab_size", "vocab_size"): size}

    def with_experts(self, config: Config, num_experts: int, experts_per_token: int) -> Config:
        """Return the config of a model with other numbers of experts."""
        counts = {"num_experts": num_experts, "experts_per_token": experts_per_token}
        return {**config, **{self.sizes[name]: count for name, count in counts.items()}}

    def with_rms(self, config: Config, ratio: float) -> Config:
        """Return the config of a model whose residual stream has `ratio` times the RMS."""
        changed: dict[str, float] = {}
        for key in self._eps_keys(config):
            eps = float(config[key]) * ratio**2  # type: ignore[arg-type]
            changed[key] = float(f"{eps:.15g}")  # 8e-07, not 7.999999e-07
        return {**config, **changed}

    def _eps_keys(self, config: Config) -> Collection[str]:
        """Return the keys of the eps of norms over the residual stream."""
        return ("rms_norm_eps",)

    def is_tied(self, config: Config) -> bool:
        """Return True if the embedding is also the head."""
        return bool(config.get("tie_word_embeddings"))

    def offset_of(self, tensor: LogicalTensor) -> float:
        """Return the offset between the weight of a norm and its gain."""
        return self.norm_offset

    def layer_kinds(self, config: Config, num_layers: int) -> list[Literal["dense", "sparse"]]:
        """Return the kind of each layer: with experts (sparse) or one FFN (dense)."""
        layers = range(num_layers)
        if self.sparse_layers != "pattern":
            return ["sparse" if self.has_experts else "dense" for _ in layers]
        exempt, step = config.get("mlp_only_layers"), config.get("decoder_sparse_step", 1)
        if not isinstance(step, int) or step < 1:
            raise RequestError(
                f"config.json: decoder_sparse_step = {brief(step)}; must be a whole number ≥ 1."
            )
        listed = exempt if isinstance(exempt, list | tuple) else ()
        dense = {layer for layer in listed if isinstance(layer, int)}
        return ["dense" if layer in dense or (layer + 1) % step else "sparse" for layer in layers]

    def logical_tensors(self, config: Config, sizes: Dimensions) -> tuple[LogicalTensor, ...]:
        """Return all tensors of a model with this config, one for each layer and expert."""
        templates = tuple(tensor for tensor in self.tensors if tensor.exists(config))
        kinds = self.layer_kinds(config, sizes.num_hidden_layers)
        return _for_layers(templates, tuple(kinds), sizes.num_experts)

    def with_layers(
        self,
        config: Config,
        layer_sources: Sequence[int],
        identities: Collection[int] | None = None,
    ) -> Config:
        """Return the config of a model whose layer t is a copy of layer `layer_sources[t]`.

        Settings per layer are copied too: kinds of attention, layers with experts, FFN widths.

        Args:
            config: config.json of the source.
            layer_sources: source layer of each target layer.
            identities: target layers that are identities. Default: repeated layers, except the
                first copy.
        """
        deeper: Config = {**config, self.sizes["num_hidden_layers"]: len(layer_sources)}
        for key in self.per_layer_config_keys:
            values = config.get(key)
            if isinstance(values, list):
                deeper[key] = [values[source] for source in layer_sources]
        if sizes := ffn_sizes(config):
            deeper = self.with_ffn_sizes(deeper, [sizes[source] for source in layer_sources])
        if self.sparse_layers == "pattern":
            kinds = self.layer_kinds(config, self.dimensions(config).num_hidden_layers)
            dense = [t for t, s in enumerate(layer_sources) if kinds[s] == "dense"]
            deeper |= {"mlp_only_layers": dense, "decoder_sparse_step": 1}
        return deeper

    def shape(self, tensor: LogicalTensor, sizes: Dimensions) -> tuple[int, ...]:
        """Return the shape of a tensor, or of all tensors of a template.

        Args:
            tensor: of this family.
            sizes: of the model, with the FFN width of the tensor's layer.
        """
        return tuple(
            [
                size if isinstance(size := axis.space.size, int) else getattr(sizes, size)
                for axis in tensor.axes
            ]
        )

    def branch_output(self, tensor: LogicalTensor) -> bool:
        """Return True if a tensor writes the output of a block to the residual stream.

        These are the output projections of attention, FFN and experts with their biases, or the
        norms after them. If all of them are zero (for a norm: its gain), the block is the identity.
        """
        output = tensor.axes[0]
        is_written = output.port in (Port.WRITE, Port.GAIN) and output.space.kind == "residual"
        return is_written and tensor.layer is not None

    def zero_of(self, tensor: LogicalTensor) -> float:
        """Return the value of a branch output in an identity block."""
        return -self.norm_offset if tensor.is_norm else 0.0

    def count(self, config: Config, sizes: Dimensions) -> tuple[int, int]:
        """Count the tensors on disk and the parameters, without naming tensors.

        A tied head counts once. A template is repeated for each FFN width among its layers.
        """
        kinds = self.layer_kinds(config, sizes.num_hidden_layers)
        widths = ffn_sizes(config) or [sizes.intermediate_size] * len(kinds)
        layers = [
            (kind, times, replace(sizes, intermediate_size=width))
            for (kind, width), times in Counter(zip(kinds, widths, strict=True)).items()
        ]
        tensors = parameters = 0
        for template in self.tensors:
            if not template.exists(config):
                continue
            for kind, times, own in layers if template.is_per_layer else [("none", 1, sizes)]:
                if template.layers in ("all", kind):
                    number = times * (sizes.num_experts if template.is_per_expert else 1)
                    tensors += number
                    parameters += number * prod(self.shape(template, own))
        return tensors, parameters

    def attention_window(self, config: Config, layer: int) -> int | None:
        """Return the sliding window of a layer in tokens, or None for full attention."""
        if self.windows == "none" or config.get("use_sliding_window") is False:
            return None
        kinds = config.get("layer_types")
        if self.windows == "layer_types" and not (
            isinstance(kinds, list) and kinds[layer] == "sliding_attention"
        ):
            return None
        window = config.get("sliding_window")
        return window if isinstance(window, int) and window > 0 else None

    def tied_names(self, config: Config) -> Mapping[str, str]:
        """Return name of a tied tensor, which a file may hold too → name of the one it repeats."""
        return {
            name: self.tensors[0].disk_name
            for tensor in self.tensors
            if tensor.unless and not tensor.exists(config)
            for name in (tensor.disk_name, tensor.live_name or tensor.disk_name)
        }

    def read_as(
        self, config: Config, extra: Collection[str], missing: Collection[str]
    ) -> dict[str, str]:
        """Return extra name in files → missing name of the layout; empty: no class reads it."""
        return {}

    def causal_config(self, config: Config) -> Config:
        """Return the config of the model that is loaded: of a multimodal one, maybe its text."""
        return config


@lru_cache(maxsize=8)  # of 37,000 tensors for Qwen3-MoE 94 x 128
def _for_layers(
    templates: tuple[LogicalTensor, ...], layers: tuple[str, ...], num_experts: int
) -> tuple[LogicalTensor, ...]:
    """Return the tensors of a model from its templates and the kinds of its layers."""
    per_layer = [template for template in templates if template.is_per_layer]
    first = templates.index(per_layer[0])
    tensors = list(templates[:first])
    for layer, kind in enumerate(layers):
        filled = [t.filled(layer=layer) for t in per_layer if t.layers in ("all", kind)]
        per_expert = [tensor for tensor in filled if tensor.is_per_expert]
        for tensor in filled:
            if not tensor.is_per_expert:
                tensors.append(tensor)
            elif tensor is per_expert[0]:  # the first template stands for all of them
                for expert in range(num_experts):
                    tensors += [each.filled(layer=layer, expert=expert) for each in per_expert]
    return (*tensors, *templates[first + len(per_layer) :])
