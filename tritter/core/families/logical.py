"""A tensor as a family's table knows it: its kind and layer, its axes, its names.

A *logical* tensor has one name in every family (`layers.3.ffn.gate`, `layers.3.experts.7.down`);
its axes live in named spaces (`residual`, `layers.3.ffn`), and each axis has a port, which says
what an expansion may do to it there. Nobody has to take a name apart: kind, layer and expert are
fields, and a table's entry, which stands for many tensors, has no numbers yet.
"""

from dataclasses import dataclass, replace
from enum import Enum
from typing import Literal

from tritter.core.families.dimensions import Config

LayerKind = Literal["none", "all", "dense", "sparse"]


class Port(Enum):
    """How a tensor touches the space of one of its axes."""

    WRITE = "write"  # a linear producer: any scale
    WRITE_SCALED = "write, then scaled"  # an embedding that the model multiplies by √hidden_size
    WRITE_NONLINEAR = "write through a nonlinearity"  # FFN gate, router, q, k: scale 1 forced
    ABSORBED = "write into a norm"  # q and k before a norm per head, which shares the model's eps
    READ = "read"  # a consumer
    GAIN = "gain"  # a norm: reads one space and writes the axis's space diagonally


@dataclass(frozen=True, slots=True)
class Space:
    """What an axis lives in: there is one of it per model, per layer or per expert.

    Args:
        kind: such as `residual`, `query`, `ffn`.
        size: attribute of `Dimensions` that is its size.
        scope: what has one of its own.
        layer: which layer it belongs to, once written out; `expert` likewise.
    """

    kind: str
    size: str
    scope: Literal["model", "layer", "expert"] = "layer"
    layer: int | None = None
    expert: int | None = None

    @property
    def name(self) -> str:
        return logical_name(self.kind, layer=self.layer, expert=self.expert)

    @property
    def is_branch_output(self) -> bool:
        """A norm stands between it and the residual stream."""
        return self.kind in ("attention_output", "ffn_output")

    @property
    def is_norm_output(self) -> bool:
        """A norm writes it, and what it hands the stream's values on to reads it."""
        return self.kind in ("attention_input", "ffn_input", "head_input")

    @property
    def is_stream(self) -> bool:
        """It is the residual stream, or a branch's output on the way to it."""
        return self.kind == "residual" or self.is_branch_output


@dataclass(frozen=True, slots=True)
class Axis:
    """One dimension of a logical tensor: its space and its port."""

    space: Space
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


@dataclass(frozen=True, slots=True, kw_only=True)
class LogicalTensor:
    """One tensor of a family, or in its table all of one kind.

    Args:
        kind: its logical name without numbers: `embed`, `attention.q`, `router`, `experts.gate`.
        disk_name: name in the safetensors files of Hugging Face checkpoints; in a table it holds
            `{layer}` and `{expert}`.
        axes: one per dimension; of a matrix the outputs first.
        layers: which layers have it: those with a dense FFN, with experts, or both; none: it
            stands outside of them.
        only_if: config key that must be true for the tensor to exist; empty: always.
        unless: config key that must be false for the tensor to exist; empty: always.
        live_name: name in the model's memory; empty: as on disk.
        is_transposed: on disk and in memory its inputs come first.
        within: name, on disk and in memory, of a tensor that it is outputs of, behind those that
            the table names before it; `disk_name` is then what its state is called. Empty: its own.
        fused: where it lies in memory when the experts of a layer share one tensor there.
        layer: which layer it belongs to, once written out; `expert` likewise.
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
    fused: Fused | None = None
    layer: int | None = None
    expert: int | None = None

    @property
    def name(self) -> str:
        """Its logical name, the same in every family."""
        return logical_name(self.kind, layer=self.layer, expert=self.expert)

    @property
    def is_per_layer(self) -> bool:
        return self.layers != "none"

    @property
    def is_per_expert(self) -> bool:
        return self.fused is not None

    @property
    def is_norm(self) -> bool:
        return self.axes[0].port is Port.GAIN

    @property
    def is_of_norm(self) -> bool:
        """It is a norm's gain, or the bias beside it."""
        is_bias = self.axes[0].port is Port.WRITE and self.axes[0].space.is_norm_output
        return self.is_norm or is_bias

    def for_layer(self, layer: int) -> "LogicalTensor":
        return self._filled("{layer}", layer=layer)

    def for_expert(self, expert: int) -> "LogicalTensor":
        return self._filled("{expert}", layer=self.layer, expert=expert)

    def exists(self, config: Config) -> bool:
        wanted = not self.only_if or bool(config.get(self.only_if))
        return wanted and not (self.unless and bool(config.get(self.unless)))

    def _filled(
        self, mark: str, *, layer: int | None, expert: int | None = None
    ) -> "LogicalTensor":
        text, fused, axes = str(layer if expert is None else expert), self.fused, list[Axis]()
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


def logical_name(kind: str, *, layer: int | None = None, expert: int | None = None) -> str:
    """Return the logical name of the tensor, or the space, of a kind at a place."""
    if expert is not None:
        kind = f"experts.{expert}.{kind.removeprefix('experts.')}"
    return kind if layer is None else f"layers.{layer}.{kind}"
