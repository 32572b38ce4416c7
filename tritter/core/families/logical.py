"""Logical tensors, the entries of family tables: kind, layer, axes and names.

A *logical* tensor has the same name in every family (`layers.3.ffn.gate`,
`layers.3.experts.7.down`). Its axes belong to named spaces (`residual`, `layers.3.ffn`), and the
port of each axis determines how an expansion may scale it. Kind, layer and expert are fields, so
names need no parsing. A table entry is a template of many tensors and has no layer or expert yet.
"""

from dataclasses import dataclass, field, replace
from enum import Enum
from functools import lru_cache
from typing import Literal

from tritter.core.families.dimensions import Config

LayerKind = Literal["none", "all", "dense", "sparse"]
Arrangement = Literal["whole", "halves", "thirds", "qkv"]


class Port(Enum):
    """How a tensor uses the space of one of its axes."""

    WRITE = "write"  # a linear producer: any scale
    WRITE_SCALED = "write, then scaled"  # an embedding that the model multiplies by √hidden_size
    WRITE_NONLINEAR = "write through a nonlinearity"  # FFN gate, router, q, k: scale must be 1
    ABSORBED = "write into a norm"  # q and k before a norm per head with the model's eps
    READ = "read"  # a consumer
    GAIN = "gain"  # a norm: reads one space and writes the axis's space diagonally


@dataclass(frozen=True, slots=True)
class Space:
    """The vector space of an axis: one per model, per layer or per expert.

    Args:
        kind: such as `residual`, `query`, `ffn`.
        size: attribute of `Dimensions` with its size, or the size itself in a family without a
            table.
        scope: its owner: the model, each layer or each expert.
        layer: index of its layer; None in a template.
        expert: index of its expert; None in a template.
    """

    kind: str
    size: str | int
    scope: Literal["model", "layer", "expert"] = "layer"
    layer: int | None = None
    expert: int | None = None

    @property
    def name(self) -> str:
        return logical_name(self.kind, layer=self.layer, expert=self.expert)

    @property
    def is_branch_output(self) -> bool:
        """A norm separates it from the residual stream."""
        return self.kind in ("attention_output", "ffn_output")

    @property
    def is_norm_output(self) -> bool:
        """It is the output of a norm over the residual stream."""
        return self.kind in ("attention_input", "ffn_input", "head_input")

    @property
    def is_stream(self) -> bool:
        """It is the residual stream, or the output of a branch before its norm."""
        return self.kind == "residual" or self.is_branch_output


@dataclass(frozen=True, slots=True)
class Axis:
    """One dimension of a logical tensor: its space and its port.

    Args:
        space: of the axis.
        port: how the tensor uses it.
        length: of the axis, if it is not the size of the space: each unit then has several entries.
        arrangement: order of these entries: each unit's together (`whole`), or the units two or
            three times in turn (`halves`, `thirds`), or queries, then keys, then values (`qkv`).
        offset: constant that a norm of a family without a table adds to its gain.
    """

    space: Space
    port: Port
    length: int = 0
    arrangement: Arrangement = "whole"
    offset: float = 0.0


@dataclass(frozen=True, slots=True)
class Place:
    """Location in memory of a tensor on disk.

    Args:
        name: of the tensor in memory, or a template of it.
        block: index of its block of rows, among blocks of equal size.
        num_blocks: number of blocks; of one expert if the tensor in memory stacks experts.
        is_stacked: the first dimension of the tensor in memory is the experts.
    """

    name: str
    block: int = 0
    num_blocks: int = 1
    is_stacked: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class LogicalTensor:
    """One tensor of a family, or the template of all tensors of one kind.

    Args:
        kind: its logical name without indices: `embed`, `attention.q`, `router`, `experts.gate`.
        disk_name: name in the safetensors files of Hugging Face checkpoints; a template has
            `{layer}` and `{expert}` in it.
        axes: one per dimension, the outputs of a matrix first.
        layers: the layers that have it: those with a dense FFN, those with experts, or all; `none`
            for tensors outside the layers.
        only_if: config key that must be true for the tensor to exist; empty: always.
        unless: config key that must be false for the tensor to exist; empty: always.
        live_name: name in the model's memory; empty if it equals `disk_name`.
        is_transposed: stored with its inputs first, on disk and in memory.
        within: name of the stored tensor whose rows it is a block of, in the order of the table;
            `disk_name` then only names its state. Empty if it is stored separately.
        fused: its location in memory if the experts of a layer are stacked in one tensor.
        layer: index of its layer; None in a template.
        expert: index of its expert; None in a template.

    Attributes:
        name: its logical name, the same in every family.
    """

    kind: str
    disk_name: str
    axes: tuple[Axis, ...]
    layers: LayerKind = "none"
    only_if: str = ""
    unless: str = ""
    live_name: str = ""
    is_transposed: bool = False
    within: str = ""
    fused: Place | None = None
    layer: int | None = None
    expert: int | None = None
    name: str = field(init=False, compare=False)

    def __post_init__(self) -> None:
        name = logical_name(self.kind, layer=self.layer, expert=self.expert)
        object.__setattr__(self, "name", name)

    @property
    def is_per_layer(self) -> bool:
        return self.layers != "none"

    @property
    def is_per_expert(self) -> bool:
        return self.fused is not None

    @property
    def is_norm(self) -> bool:
        return bool(self.axes) and self.axes[0].port is Port.GAIN

    @property
    def is_attention(self) -> bool:
        """It is a projection or a norm of attention."""
        return self.kind.startswith("attention.")

    @property
    def is_of_norm(self) -> bool:
        """It is the gain or the bias of a norm."""
        if self.is_norm or not self.axes:  # a single number has no axis
            return self.is_norm
        return self.axes[0].port is Port.WRITE and self.axes[0].space.is_norm_output

    def exists(self, config: Config) -> bool:
        is_enabled = not self.only_if or bool(config.get(self.only_if))
        return is_enabled and not (self.unless and bool(config.get(self.unless)))

    def filled(self, *, layer: int, expert: int | None = None) -> "LogicalTensor":
        """Return the tensor of a layer, or of an expert of that layer, from a template."""
        mark, text = ("{layer}", str(layer)) if expert is None else ("{expert}", str(expert))
        fused, axes = self.fused, list[Axis]()
        for axis in self.axes:
            own = expert if axis.space.scope == "expert" else None
            space = axis.space
            if space.scope != "model":
                space = replace(space, layer=layer, expert=own)
            axes.append(Axis(space, axis.port))
        return replace(
            self,
            disk_name=self.disk_name.replace(mark, text),
            live_name=self.live_name.replace(mark, text),
            within=self.within.replace(mark, text),
            axes=tuple(axes),
            fused=None if fused is None else replace(fused, name=fused.name.replace(mark, text)),
            layer=layer,
            expert=expert,
        )


def segments(arrangement: Arrangement, entries: int, head_dim: int) -> tuple[int, ...] | None:
    """Return the entries of a unit in each segment of an axis, or None if that is impossible.

    Args:
        arrangement: of the units along the axis.
        entries: of a unit, in total.
        head_dim: entries of a key or a value.
    """
    found: tuple[int, ...]
    match arrangement:
        case "whole":
            found = (entries,)
        case "halves":
            found = (entries // 2,) * 2
        case "thirds":
            found = (entries // 3,) * 3
        case "qkv":
            found = (entries - 2 * head_dim, head_dim, head_dim)
    return found if sum(found) == entries and min(found) > 0 else None


@lru_cache(maxsize=100_000)  # of a model with 94 x 128 experts: 37,000
def logical_name(kind: str, *, layer: int | None = None, expert: int | None = None) -> str:
    """Return the logical name of a tensor or a space."""
    if expert is not None:
        kind = f"experts.{expert}.{kind.removeprefix('experts.')}"
    return kind if layer is None else f"layers.{layer}.{kind}"
