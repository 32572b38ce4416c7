"""The map to more experts."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from tritter.families import Config, Family, LogicalTensor, logical_name
from tritter.parameter_map import AxisFactor, AxisMap, Fill, ParameterMap, TensorMap
from tritter.seeds import derived_seed


@dataclass(frozen=True, slots=True, kw_only=True)
class Addition:
    """The maps of one addition.

    Args:
        is_append: some are appended; else all are doubled.
        cloned: layer → the expert that is cloned there.
    """

    is_append: bool
    init: str
    cloned: Mapping[int | None, int]
    noise: float
    seed: int

    def parameter_map(self, family: Family, source: Config, target: Config) -> ParameterMap:
        old, new = (family.dimensions(config).num_experts for config in (source, target))
        tensors: dict[str, TensorMap] = {}
        for tensor in family.logical_tensors(target):
            name = tensor.name
            if tensor.expert is not None and self.is_append and tensor.expert >= old:
                shape = family.shape(tensor, source)
                tensors[name] = self._appended(tensor, self.cloned[tensor.layer], old, shape)
            elif tensor.expert is not None and not self.is_append:
                rows = family.shape(tensor, source)[0]
                tensors[name] = self._replicated(tensor, old, rows)
            elif tensor.kind == "router":
                tensors[name] = self._router(name, self.cloned[tensor.layer], old, new)
            else:
                tensors[name] = TensorMap(source=name)
        num_layers = family.dimensions(source).num_hidden_layers
        return ParameterMap(tensors=tensors, layer_sources=tuple(range(num_layers)))

    def _appended(
        self,
        tensor: LogicalTensor,
        source: int,
        num_old: int,
        shape: tuple[int, ...],
    ) -> TensorMap:
        """Return the map of a new expert's matrix; its state starts anew, whatever it holds."""
        if self.init == "random":
            axes: list[AxisFactor | None] = [None] * len(shape)
            axes[0] = _without_source(shape[0])
            fill = Fill("matched", seed=derived_seed(self.seed, "fill", tensor.name))
            return TensorMap(_of_expert(tensor, 0), tuple(axes), fill=fill, state="fresh")
        blend = tuple(_of_expert(tensor, e) for e in range(1, num_old))
        is_mean = self.init == "mean"
        return TensorMap(
            source=_of_expert(tensor, 0 if is_mean else source),
            blend=blend if is_mean else (),
            state="fresh",
            noise=self.noise,
            noise_seed=derived_seed(self.seed, "noise", tensor.name),
            is_copy=True,
        )

    def _replicated(self, tensor: LogicalTensor, num_old: int, rows: int) -> TensorMap:
        """Return the map of one of two copies; each gets half of the gradient."""
        assert tensor.expert is not None
        ones = torch.ones(rows, dtype=torch.float64)
        is_copy = tensor.expert >= num_old
        return TensorMap(
            source=_of_expert(tensor, tensor.expert % num_old),
            axes=(AxisFactor(torch.arange(rows), ones, ones / 2), None),
            noise=self.noise if is_copy else 0.0,
            noise_seed=derived_seed(self.seed, "noise", tensor.name),
            is_copy=is_copy,
        )

    def _router(self, name: str, source: int, num_old: int, num_new: int) -> TensorMap:
        if not self.is_append:
            share = torch.full((num_new,), 0.5, dtype=torch.float64)
            routes = AxisMap.copied(num_old, torch.arange(num_new) % num_old, share)
            return TensorMap(name, (AxisFactor.writes_nonlinear(routes), None))
        routes = AxisMap.padded(num_old, num_new)
        match self.init:
            case "clone" | "best" | "distill":
                index = torch.where(routes.source >= 0, routes.source, source)
                ones = torch.ones(num_new, dtype=torch.float64)
                donor = TensorMap(name, (AxisFactor(index, ones, ones), None))
                fill = Fill("copy", donor=donor)
            case "mean":
                fill = Fill("row_mean")
            case _:
                fill = Fill("matched", seed=derived_seed(self.seed, "fill", name))
        return TensorMap(name, (AxisFactor.writes_nonlinear(routes), None), fill=fill)


def _of_expert(tensor: LogicalTensor, expert: int) -> str:
    """Return the name of the same matrix of another expert."""
    return logical_name(tensor.kind, layer=tensor.layer, expert=expert)


def _without_source(size: int) -> AxisFactor:
    nothing = torch.zeros(size, dtype=torch.float64)
    return AxisFactor(torch.full((size,), -1), nothing, nothing.clone())
