"""What a family table says: logical tensors, the spaces of their axes, ports, names on disk.

A *logical* tensor has one name in every family (`layers.3.ffn.gate`, `layers.3.experts.7.down`);
its axes live in named spaces (`residual`, `layers.3.ffn`), and each axis has a port, which says
what an expansion may do to it there. Templates hold `{layer}` and `{expert}`; a space whose name
holds them exists once per layer, or per expert.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import cached_property
from math import prod
from typing import Literal

from tritter.errors import RequestError, brief, did_you_mean
from tritter.families.dimensions import DENSE_SIZES, Config, Dimensions, read_dimensions

LayerKind = Literal["all", "dense", "sparse"]


class Port(Enum):
    """How a tensor touches the space of one of its axes."""

    WRITE = "write"  # a linear producer: any scale
    WRITE_SCALED = "write, then scaled"  # an embedding that the model multiplies by √hidden_size
    WRITE_NONLINEAR = "write through a nonlinearity"  # FFN gate, router, q, k: scale 1 forced
    ABSORBED = "write into a norm"  # q and k before a norm per head, which shares the model's eps
    READ = "read"  # a consumer
    GAIN = "gain"  # a norm: reads one space and writes the axis's space diagonally


@dataclass(frozen=True, slots=True)
class Axis:
    """One dimension of a logical tensor: its space and its port."""

    space: str
    port: Port


@dataclass(frozen=True, slots=True)
class Fused:
    """Where an expert's matrix lies in the tensor that transformers holds in memory.

    Args:
        name: of the tensor, which has one slice per expert along its first dimension.
        block: which part of the slice's rows it is.
        num_blocks: how many parts of equal size stand one below the other.
    """

    name: str
    block: int = 0
    num_blocks: int = 1


@dataclass(frozen=True, slots=True)
class LogicalTensor:
    """One tensor of a family.

    Args:
        name: logical name.
        disk_name: name in the safetensors files of Hugging Face checkpoints.
        axes: one per dimension, in the order on disk.
        only_if: config key that must be true for the tensor to exist; empty: always.
        unless: config key that must be false for the tensor to exist; empty: always.
        layers: the kind of layer that has it: with a dense FFN, with experts, or both.
        live_name: name in the model's memory; empty: as on disk.
        fused: where it lies in memory when the experts of a layer share one tensor there.
        expert: which expert it belongs to, once written out.
    """

    name: str
    disk_name: str
    axes: tuple[Axis, ...]
    only_if: str = ""
    unless: str = ""
    layers: LayerKind = "all"
    live_name: str = ""
    fused: Fused | None = None
    expert: int | None = None

    @property
    def is_per_expert(self) -> bool:
        return self.fused is not None

    def for_layer(self, layer: int) -> "LogicalTensor":
        return self._filled("{layer}", str(layer))

    def for_expert(self, expert: int) -> "LogicalTensor":
        return replace(self._filled("{expert}", str(expert)), expert=expert)

    def exists(self, config: Config) -> bool:
        wanted = not self.only_if or bool(config.get(self.only_if))
        return wanted and not (self.unless and bool(config.get(self.unless)))

    def _filled(self, mark: str, text: str) -> "LogicalTensor":
        fused = self.fused
        return replace(
            self,
            name=self.name.replace(mark, text),
            disk_name=self.disk_name.replace(mark, text),
            live_name=self.live_name.replace(mark, text),
            axes=tuple(Axis(axis.space.replace(mark, text), axis.port) for axis in self.axes),
            fused=None if fused is None else replace(fused, name=fused.name.replace(mark, text)),
        )


@dataclass(frozen=True)
class Family:
    """One architecture of Hugging Face transformers, as data.

    Args:
        model_type: the `model_type` of its config.json.
        architecture: the class in config.json's `architectures`.
        spaces: space template → attribute of `Dimensions` that is its size.
        tensors: templates of all logical tensors, in forward order.
        heads_divide_hidden: the config class refuses a hidden size that the head count does
            not divide.
        sizes: attribute of `Dimensions` → config key that states it.
        per_layer_config_keys: config lists with one entry per layer.
        sparse_layers: which layers have experts; `pattern`: as `mlp_only_layers` and
            `decoder_sparse_step` say.
        windows: which layers attend to the last `sliding_window` tokens only, where the config
            states so many: `none`, `all`, or those that `layer_types` names.
        norm_offset: what a norm adds to its weight to get its gain.
    """

    model_type: str
    architecture: str
    spaces: Mapping[str, str]
    tensors: tuple[LogicalTensor, ...]
    heads_divide_hidden: bool
    sizes: Mapping[str, str] = field(default_factory=lambda: DENSE_SIZES)
    per_layer_config_keys: tuple[str, ...] = ()
    sparse_layers: Literal["none", "all", "pattern"] = "none"
    windows: Literal["none", "all", "layer_types"] = "none"
    norm_offset: float = 0.0

    @property
    def has_experts(self) -> bool:
        return self.sparse_layers != "none"

    def dimensions(self, config: Config) -> Dimensions:
        """Read the sizes from a config, with the defaults that transformers would derive.

        Raises:
            RequestError: a size is missing or no positive whole number.
        """
        return read_dimensions(config, self.sizes)

    def is_sparse(self, config: Config, layer: int) -> bool:
        """Return whether a layer has experts in place of one FFN.

        Raises:
            RequestError: the config's pattern is none.
        """
        if self.sparse_layers != "pattern":
            return self.has_experts
        return self.layer_kinds(config)[layer] == "sparse"

    def layer_kinds(self, config: Config) -> list[Literal["dense", "sparse"]]:
        """Return of every layer whether it has experts (sparse) or one FFN (dense).

        Raises:
            RequestError: the config's pattern is none.
        """
        layers = range(self.dimensions(config).num_hidden_layers)
        if self.sparse_layers != "pattern":
            return ["sparse" if self.has_experts else "dense" for _ in layers]
        exempt, step = config.get("mlp_only_layers"), config.get("decoder_sparse_step", 1)
        if not isinstance(step, int) or step < 1:
            raise RequestError(
                f"config.json: decoder_sparse_step = {brief(step)}; a whole number ≥ 1 is needed."
            )
        listed = exempt if isinstance(exempt, list | tuple) else ()
        dense = {layer for layer in listed if isinstance(layer, int)}
        return ["dense" if layer in dense or (layer + 1) % step else "sparse" for layer in layers]

    def logical_tensors(self, config: Config) -> tuple[LogicalTensor, ...]:
        """Return every tensor that a model of this config has, layers and experts written out."""
        before, per_layer, after = self._sections
        dimensions = self.dimensions(config)
        tensors = list(before)
        for layer, kind in enumerate(self.layer_kinds(config)):
            templates = [t.for_layer(layer) for t in per_layer if t.layers in ("all", kind)]
            tensors += _with_experts(templates, dimensions.num_experts)
        tensors += after
        return tuple(tensor for tensor in tensors if tensor.exists(config))

    def with_layers(self, config: Config, layer_sources: Sequence[int]) -> Config:
        """Return the config of a model whose layer t is a copy of layer `layer_sources[t]`.

        Whatever the config states per layer follows: kinds of attention, which layers have
        experts.
        """
        deeper: Config = {**config, "num_hidden_layers": len(layer_sources)}
        for key in self.per_layer_config_keys:
            values = config.get(key)
            if isinstance(values, list):
                deeper[key] = [values[source] for source in layer_sources]
        if self.sparse_layers == "pattern":
            kinds = self.layer_kinds(config)
            dense = [t for t, s in enumerate(layer_sources) if kinds[s] == "dense"]
            deeper |= {"mlp_only_layers": dense, "decoder_sparse_step": 1}
        return deeper

    def shape(self, tensor: LogicalTensor, config: Config) -> tuple[int, ...]:
        return self._shape(tensor, self.dimensions(config))

    def _shape(self, tensor: LogicalTensor, dimensions: Dimensions) -> tuple[int, ...]:
        return tuple(getattr(dimensions, self._size_name(axis.space)) for axis in tensor.axes)

    def branch_output(self, tensor: LogicalTensor) -> bool:
        """Return whether a tensor writes what a block adds to the residual stream.

        True of the output projections of attention, FFN and experts and of their biases, or of
        the norms that stand behind them: with all of them zero (a norm's gain zero, that is) a
        block is the identity.
        """
        output = tensor.axes[0]
        is_written = output.port in (Port.WRITE, Port.GAIN) and output.space == "residual"
        return is_written and tensor.name.startswith("layers.")

    def count_parameters(self, config: Config) -> int:
        """Count the parameters from shapes; a tied head counts once."""
        return sum(size for _, size in self._sizes_of_tensors(config))

    def count_active_parameters(self, config: Config) -> int:
        """Count the parameters that one token meets: of the experts, those it is routed to."""
        return round(
            sum(size * self._active_share(t, config) for t, size in self._sizes_of_tensors(config))
        )

    def attention_window(self, config: Config, layer: int) -> int | None:
        """Return how many tokens a layer's attention goes back, the own included; None: to all."""
        if self.windows == "none" or config.get("use_sliding_window") is False:
            return None
        kinds = config.get("layer_types")
        if self.windows == "layer_types" and not (
            isinstance(kinds, list) and kinds[layer] == "sliding_attention"
        ):
            return None
        window = config.get("sliding_window")
        return window if isinstance(window, int) and window > 0 else None

    def tied_names(self, config: Config) -> set[str]:
        """Return names that a file may hold although the tie makes them redundant."""
        tied = (t for t in self.tensors if t.unless and not t.exists(config))
        return {tensor.disk_name for tensor in tied}

    def count_tensors(self, config: Config) -> int:
        """Count the tensors on disk, without naming them."""
        return sum(times for _, times in self._multiplicities(config))

    def _sizes_of_tensors(self, config: Config) -> Iterator[tuple[LogicalTensor, int]]:
        """Yield the templates of the tensors, and how many parameters all that follow one have."""
        dimensions = self.dimensions(config)
        for template, times in self._multiplicities(config):
            yield template, times * prod(self._shape(template, dimensions))

    def _multiplicities(self, config: Config) -> Iterator[tuple[LogicalTensor, int]]:
        """Yield the templates of the tensors that a model has, and how many follow each."""
        kinds, num_experts = Counter(self.layer_kinds(config)), self.dimensions(config).num_experts
        for template in self.tensors:
            if template.exists(config):
                layers = sum(kinds[k] for k in kinds if template.layers in ("all", k))
                in_layers = layers if "{layer}" in template.name else 1
                yield template, in_layers * (num_experts if template.is_per_expert else 1)

    def _active_share(self, tensor: LogicalTensor, config: Config) -> float:
        if not tensor.is_per_expert:
            return 1.0
        dimensions = self.dimensions(config)
        return dimensions.experts_per_token / dimensions.num_experts

    def _size_name(self, space: str) -> str:
        template = re.sub(r"^layers\.\d+\.", "layers.{layer}.", space)
        return self.spaces[re.sub(r"\.experts\.\d+\.", ".experts.{expert}.", template)]

    @cached_property
    def _sections(self) -> tuple[list[LogicalTensor], list[LogicalTensor], list[LogicalTensor]]:
        is_layer = ["{layer}" in tensor.name for tensor in self.tensors]
        first = is_layer.index(True)
        last = len(is_layer) - is_layer[::-1].index(True)
        tensors = list(self.tensors)
        return tensors[:first], tensors[first:last], tensors[last:]


def is_stream(space: str) -> bool:
    """Return whether a space is the residual stream, or a branch's output on the way to it."""
    return space == "residual" or is_branch_output(space)


def is_branch_output(space: str) -> bool:
    """Return whether a norm stands between a space and the residual stream."""
    return space.endswith((".attention_output", ".ffn_output"))


def find_family(families: Mapping[str, Family], model_type: str) -> Family:
    """Return the family of a `model_type`.

    Raises:
        RequestError: the family has no table; names those that have.
    """
    if model_type not in families:
        raise RequestError(
            f"model_type '{model_type}' is not a family that Tritter knows; it knows "
            f"{', '.join(sorted(families))}.{did_you_mean(model_type, families)}"
        )
    return families[model_type]


def _with_experts(templates: Sequence[LogicalTensor], num_experts: int) -> list[LogicalTensor]:
    """Write the templates of experts out, expert by expert, at the place of the first one."""
    per_expert = [template for template in templates if template.is_per_expert]
    written: list[LogicalTensor] = []
    for template in templates:
        if not template.is_per_expert:
            written.append(template)
        elif template is per_expert[0]:
            written += [t.for_expert(expert) for expert in range(num_experts) for t in per_expert]
    return written
