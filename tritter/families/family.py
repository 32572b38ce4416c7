"""What a family table says: logical tensors, the spaces of their axes, ports, names on disk.

A *logical* tensor has one name in every family (`layers.3.ffn.gate`); its axes live in named
spaces (`residual`, `layers.3.ffn`), and each axis has a port, which says what an expansion may do
to it there. Templates hold `{layer}`; a space whose name holds it exists once per layer.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from functools import cached_property

from tritter.errors import RequestError, TritterError, did_you_mean

Config = dict[str, object]


class Port(Enum):
    """How a tensor touches the space of one of its axes."""

    WRITE = "write"  # a linear producer: any scale
    WRITE_NONLINEAR = "write through a nonlinearity"  # FFN gate, q, k: scale 1 forced
    ABSORBED = "write into a norm"  # q and k before a norm per head, which shares the model's eps
    READ = "read"  # a consumer
    GAIN = "gain"  # a norm: reads one space and writes the axis's space diagonally


@dataclass(frozen=True, slots=True)
class Axis:
    """One dimension of a logical tensor: its space and its port."""

    space: str
    port: Port


@dataclass(frozen=True, slots=True)
class LogicalTensor:
    """One tensor of a family.

    Args:
        name: logical name.
        disk_name: name in the safetensors files of Hugging Face checkpoints.
        axes: one per dimension, in the order on disk.
        only_if: config key that must be true for the tensor to exist; empty: always.
        unless: config key that must be false for the tensor to exist; empty: always.
    """

    name: str
    disk_name: str
    axes: tuple[Axis, ...]
    only_if: str = ""
    unless: str = ""

    def for_layer(self, layer: int) -> "LogicalTensor":
        axes = tuple(Axis(axis.space.format(layer=layer), axis.port) for axis in self.axes)
        return replace(
            self,
            name=self.name.format(layer=layer),
            disk_name=self.disk_name.format(layer=layer),
            axes=axes,
        )

    def exists(self, config: Config) -> bool:
        wanted = not self.only_if or bool(config.get(self.only_if))
        return wanted and not (self.unless and bool(config.get(self.unless)))


@dataclass(frozen=True, slots=True)
class Dimensions:
    """The sizes that a dense decoder's config states."""

    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int

    @property
    def query_size(self) -> int:
        return self.num_attention_heads * self.head_dim

    @property
    def key_value_size(self) -> int:
        return self.num_key_value_heads * self.head_dim


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
        per_layer_config_keys: config lists with one entry per layer.
    """

    model_type: str
    architecture: str
    spaces: Mapping[str, str]
    tensors: tuple[LogicalTensor, ...]
    heads_divide_hidden: bool
    per_layer_config_keys: tuple[str, ...] = ()

    def dimensions(self, config: Config) -> Dimensions:
        """Read the sizes from a config, with the defaults that transformers would derive.

        Raises:
            RequestError: a size is missing or no positive whole number.
        """

        def size(key: str, default: int | None = None) -> int:
            value = config.get(key)
            value = default if value is None else value
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise RequestError(f"config.json: {key} = {value!r}; a whole number ≥ 1 is needed.")
            return value

        heads = size("num_attention_heads")
        hidden_size = size("hidden_size")
        return Dimensions(
            num_hidden_layers=size("num_hidden_layers"),
            hidden_size=hidden_size,
            intermediate_size=size("intermediate_size"),
            num_attention_heads=heads,
            num_key_value_heads=size("num_key_value_heads", heads),
            head_dim=size("head_dim", hidden_size // heads),
            vocab_size=size("vocab_size"),
        )

    def logical_tensors(self, config: Config) -> tuple[LogicalTensor, ...]:
        """Return every tensor that a model of this config has, layers written out."""
        before, per_layer, after = self._sections
        tensors = list(before)
        for layer in range(self.dimensions(config).num_hidden_layers):
            tensors += [template.for_layer(layer) for template in per_layer]
        tensors += after
        return tuple(tensor for tensor in tensors if tensor.exists(config))

    def layer_tensors(self, config: Config) -> tuple[LogicalTensor, ...]:
        """Return the templates of one layer's tensors that exist under this config."""
        return tuple(tensor for tensor in self._sections[1] if tensor.exists(config))

    def shape(self, tensor: LogicalTensor, config: Config) -> tuple[int, ...]:
        dimensions = self.dimensions(config)
        return tuple(getattr(dimensions, self._size_key(axis.space)) for axis in tensor.axes)

    def match(self, disk_names: Iterable[str], config: Config) -> dict[str, LogicalTensor]:
        """Return disk name → logical tensor for all tensors of a checkpoint.

        Raises:
            TritterError: a name has no place in the family's table, or one is missing.
        """
        expected = {tensor.disk_name: tensor for tensor in self.logical_tensors(config)}
        names = set(disk_names) - self._tied_names(config)
        extra, missing = sorted(names - set(expected)), sorted(set(expected) - names)
        if extra or missing:
            parts = []
            if extra:
                parts.append(
                    f"{len(extra)} tensors that {self.model_type} does not have: {_some(extra)}"
                )
            if missing:
                parts.append(f"{len(missing)} tensors are missing: {_some(missing)}")
            raise TritterError("The checkpoint does not fit its config.json: " + "; ".join(parts))
        return expected

    def count_parameters(self, config: Config) -> int:
        """Count the parameters from shapes; a tied head counts once."""
        total = 0
        for tensor in self.logical_tensors(config):
            size = 1
            for length in self.shape(tensor, config):
                size *= length
            total += size
        return total

    def forward_flops_per_token(self, config: Config, *, context_length: int) -> int:
        """Count multiply-adds (2 FLOPs each) of one token's forward pass.

        Matrix products, the output head and attention over half the context on average; norms,
        rotary embedding and softmax are left out. A training step costs three times as much.
        """
        dimensions = self.dimensions(config)
        matrices = 0
        for tensor in self.logical_tensors(config):
            shape = self.shape(tensor, config)
            is_lookup = Axis("vocab", Port.READ) in tensor.axes
            if len(shape) == 2 and not is_lookup:
                matrices += shape[0] * shape[1]
        if config.get("tie_word_embeddings"):
            matrices += dimensions.vocab_size * dimensions.hidden_size
        attention = dimensions.num_hidden_layers * dimensions.query_size * context_length
        return 2 * matrices + 2 * attention

    def _size_key(self, space: str) -> str:
        return self.spaces[re.sub(r"\.\d+\.", ".{layer}.", space)]

    def _tied_names(self, config: Config) -> set[str]:
        """Names that a file may hold although the tie makes them redundant."""
        tied = (t for t in self.tensors if t.unless and not t.exists(config))
        return {tensor.disk_name for tensor in tied}

    @cached_property
    def _sections(self) -> tuple[list[LogicalTensor], list[LogicalTensor], list[LogicalTensor]]:
        is_layer = ["{layer}" in tensor.name for tensor in self.tensors]
        first = is_layer.index(True)
        last = len(is_layer) - is_layer[::-1].index(True)
        tensors = list(self.tensors)
        return tensors[:first], tensors[first:last], tensors[last:]


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


def _some(names: list[str], limit: int = 5) -> str:
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown}, … ({len(names) - limit} more)"
