"""Experts from dense models that were trained from one parent (Branch-Train-MiX, arXiv 2403.07816).

The FFNs of each child become one expert. Attention, norms, embeddings and head are the average of
the children, or those of one model. In Qwen2-MoE the shared expert starts with zero output.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Protocol

from tritter.core.expansions.moe import Moe
from tritter.core.families import Config, LogicalTensor, Model, logical_name
from tritter.core.parameter_map import Fill, ParameterMap, TensorMap
from tritter.errors import Problem, RequestError
from tritter.seeds import derived_seed

if TYPE_CHECKING:
    from torch import Tensor

_SHRINKAGE = 0.1  # of the covariance within the data of a child, towards a multiple of one
_SAME_ROWS = 1e-6  # distance of two rows, as a share of the longest, with that of the mean state


class _Child(Protocol):
    """A model with the shapes of the source."""

    @property
    def name(self) -> str:
        """Short name for notes."""
        ...

    @property
    def model_hash(self) -> str: ...

    def read(self, name: str) -> Tensor:
        """Return a tensor by its logical name."""
        ...


class _RouterRows(Protocol):
    """Router rows that are computed when the first is read."""

    @property
    def digest(self) -> str:
        """What determines the rows, as a checksum."""
        ...

    def rows(self, layer: int) -> Tensor:
        """Return the rows of a layer [experts, hidden]."""
        ...


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class BoundMoe:
    """`moe` with its opened children.

    Args:
        options: of `Moe`, with `expert_hashes`.
        experts: the models whose FFNs become experts.
        shared: the models whose mean gives all other tensors; empty for the source.
        kept: the model whose function the result has if all tokens go to its expert, if any.
        routers: the router rows; None for random rows.
        remarks: notes for people.
    """

    options: Moe
    experts: tuple[_Child, ...]
    shared: tuple[_Child, ...]
    kept: _Child | None
    routers: _RouterRows | None
    remarks: tuple[str, ...]
    name: ClassVar[str] = "moe"
    expansion_type: ClassVar[str] = "moe"
    is_exact: ClassVar[bool] = False
    new_blocks_only: ClassVar[bool] = False

    def target_config(self, source: Model) -> Config:
        return self.options.target_config(source)

    def parameter_map(self, source: Model, target: Model, *, seed: int) -> ParameterMap:
        """Return the map in which the experts are the FFNs of the children."""
        layers, shapes = target.sizes.num_hidden_layers, target.shapes
        return ParameterMap(
            tensors={
                tensor.name: self._tensor_map(tensor, shapes[tensor.name], seed)
                for tensor in target.tensors
            },
            layer_sources=tuple(range(layers)),
        )

    def _tensor_map(self, tensor: LogicalTensor, shape: tuple[int, ...], seed: int) -> TensorMap:
        layer, kind = tensor.layer, tensor.kind
        if tensor.expert is not None:
            name = logical_name(kind.replace("experts.", "ffn."), layer=layer)
            return _other_map(shape, (self.experts[tensor.expert],), name)
        if kind == "router":
            assert layer is not None
            if self.routers is not None:
                digest, rows = f"{self.routers.digest}:{layer}", partial(self.routers.rows, layer)
                return TensorMap.created(shape, Fill("others", others={digest: rows}))
            std = 1 / math.sqrt(shape[1])  # as for copies
            drawn = Fill("random", std=std, seed=derived_seed(seed, "fill", tensor.name))
            return TensorMap.created(shape, drawn)
        if kind in ("shared_expert_gate", "shared_expert.down"):
            return TensorMap.created(shape, Fill())  # zero output, but gradients
        if kind.startswith("shared_expert."):
            name = logical_name(kind.replace("shared_expert.", "ffn."), layer=layer)
            return _other_map(shape, self.experts, name)
        if not self.shared:
            return TensorMap(source=tensor.name)
        return _other_map(shape, self.shared, tensor.name)

    def dense_map(self, source: Model) -> ParameterMap:
        """Return the map to the dense model in between: its FFNs are the mean of the experts."""
        tensors, shapes = {}, source.shapes
        for tensor in source.tensors:
            has_experts = self.options.layers is None or tensor.layer in self.options.layers
            is_mixed = has_experts and tensor.kind.startswith("ffn.")
            of = self.experts if is_mixed else self.shared
            found = _other_map(shapes[tensor.name], of, tensor.name) if of else None
            tensors[tensor.name] = found or TensorMap(source=tensor.name)
        return ParameterMap(tensors, tuple(range(source.sizes.num_hidden_layers)))

    def notes(self, source: Model, target: Model) -> tuple[str, ...]:
        names = ", ".join(child.name for child in self.experts)
        if not self.shared:
            shared = "the source"
        else:
            shared = self.shared[0].name if len(self.shared) == 1 else f"the average of {names}"
        kept = (
            f"only for {self.kept.name}, if its tokens are routed to its expert alone"
            if self.kept
            else "for no model in the list"
        )
        return (
            *self.options.notes(source, target),
            f"experts from {names}; attention, norms, embeddings and head from {shared}",
            f"the function is preserved {kept}",
            *self.remarks,
        )


def _other_map(shape: tuple[int, ...], children: tuple[_Child, ...], name: str) -> TensorMap:
    """Return the map of a tensor that is the mean of the same tensor of some models."""
    others = {f"{child.model_hash}:{name}": partial(child.read, name) for child in children}
    return TensorMap.created(shape, Fill("others", others=others))


def children_place(specs: Sequence[object]) -> int | None:
    """Return the index of `moe` with children among some expansions, or None."""
    listed = [getattr(spec, "experts_from", None) for spec in specs]
    place = next((n for n, each in enumerate(listed) if each is not None), None)
    if place:
        reason = "the models have the shapes of the source, so moe must be the first expansion"
        raise RequestError(Problem("expansion.moe.experts_from", listed[place], reason=reason))
    return place


def router_rows(means: Tensor, within: Tensor) -> Tensor:
    """Return router rows float64 [E, H] that distinguish the data of E children.

    They are those of a linear discriminant: the logits are log odds, up to a constant, that a
    token is from the data of a child. A router has no bias, so the rows are made orthogonal to the
    mean hidden state.

    Args:
        means: of the inputs of one layer's FFN, float64 [E, H].
        within: mean of their covariances on the data of each child, float64 [H, H].
    """
    import torch

    centre, size = means.mean(dim=0), means.shape[1]
    scale = within.diagonal().mean().clamp(min=1e-12)
    within = (1 - _SHRINKAGE) * within + _SHRINKAGE * scale * torch.eye(size).double()
    towards = torch.cat([means - centre, centre[None]])
    solved = torch.linalg.solve(within, towards.T).T  # [E + 1, H]
    rows, direction = solved[:-1], solved[-1]
    length = (direction @ centre).clamp(min=1e-12)
    rows = rows - (rows @ centre / length)[:, None] * direction
    if torch.pdist(rows).min() <= _SAME_ROWS * solved.norm(dim=1).max():
        reason = "the hidden states on the data of two models are the same; use random"
        raise RequestError(Problem("expansion.moe.router", reason=reason))
    return rows
