"""LiGO's linear growth operators (arXiv 2303.00980, eq. 4 to 8) over Tritter's spaces.

A matrix of source layer j becomes E_O·W_j·C_I, with one dense matrix per space, and a matrix of
target layer l a mix of those, Σ_j w[l,j]·(E_O·W_j·C_I). Matrices and mixes are trained on the loss
of the grown model while the source stays as it is; then the products are ordinary weights.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from tritter.core.expansions import ExpansionSpec, ResolvedExpansion
from tritter.core.families import Axis, Model, Port
from tritter.core.models import model_of, model_with_tensors
from tritter.core.parameter_map import AxisFactor
from tritter.transform.live import ModelExpander

Init = Literal["exact", "paper"]
MIX_NOISE = 0.03  # of the paper's code: uniform, on the one-hot mix of layers


class Operators:
    """The operators of one growth, and the weights that they make.

    `exact` starts at the maps of the expansions: what a matrix cannot say (random fills) stays as
    a constant, writers and readers have matrices of their own, and step 0 is the expansion.
    `paper` starts as the paper's code does: identity over rows of random averages, one matrix for
    writers, readers and gains of a space, no fills, and a noisy one-hot mix of layers. Gains take
    the factor that the grown norm asks for; the paper has LayerNorm behind the sum and needs none.

    Args:
        model: the small model; it is not changed.
        specs: a width, or a depth, or first a width and then a depth.
        seed: of fills and of the paper's random numbers.
    """

    def __init__(
        self, model: nn.Module, specs: Sequence[ExpansionSpec], *, init: Init, seed: int
    ) -> None:
        config = model_of(model).config
        self.init = init
        self.generator = torch.Generator().manual_seed(seed)
        steps = ModelExpander(specs, seed=seed).steps(Model(config))
        by_type = {step.spec.expansion_type: step for step in steps}
        held = dict(Model(config).disk_tensors(model.state_dict()))
        self.logical = {t.name: t for t in Model(config).tensors}
        self.sources = {name: held[t.disk_name].clone() for name, t in self.logical.items()}
        self.target_config = steps[-1].target.config
        self.matrices: dict[str, nn.Parameter] = {}
        self.keys: dict[str, list[str | None]] = {}
        self.factors: dict[str, float] = {}
        self.constants: dict[str, Tensor] = {}
        if "width" in by_type:
            self._add_matrices(by_type["width"])
        self.mixes: dict[str, nn.Parameter] = {}
        if "depth" in by_type:
            self._add_mixes(by_type["depth"])

    def parameters(self) -> list[nn.Parameter]:
        return [*self.matrices.values(), *self.mixes.values()]

    def weights(self) -> dict[str, Tensor]:
        """Return name on disk → weight of the grown model, differentiable."""
        wide = {name: self._widened(name) for name in self.sources}
        return {
            tensor.disk_name: self._mixed(tensor.name, wide)
            for tensor in Model(self.target_config).tensors
        }

    def folded(self) -> nn.Module:
        """Return the grown model with the products as its weights."""
        names = Model(self.target_config).tensors
        with torch.no_grad():
            held = self.weights()
            by_name = {tensor.name: held[tensor.disk_name] for tensor in names}
            return model_with_tensors(Model(self.target_config), by_name)

    def flops(self) -> float:
        """Count the FLOPs of the products in one step, forward and backward."""
        total = 0.0
        for name, source in self.sources.items():
            shape = list(source.shape)
            for dimension, key in enumerate(self.keys.get(name, ())):
                if key is None:
                    continue
                product = 2.0 * self.matrices[key].shape[0] * math.prod(shape)
                # The first product's input is frozen: its backward has only the matrix's gradient
                total += product * (2 if shape == list(source.shape) else 3)
                shape[dimension] = self.matrices[key].shape[0]
            mix = self.mixes.get(_template(name))
            if mix is not None:
                total += 6.0 * mix.shape[0] * math.prod(shape)
        return total

    def _add_matrices(self, step: ResolvedExpansion) -> None:
        for name, tensor in self.logical.items():
            tensor_map = step.parameter_map.tensors[name]
            pairs = list(
                zip(tensor.axes, tensor_map.axes or [None] * len(tensor.axes), strict=True)
            )
            self.keys[name] = [self._matrix(axis, factor) for axis, factor in pairs]
            self.factors[name] = 1.0
            if self.init == "exact":
                exact = tensor_map.apply(self.sources[name])
                self.constants[name] = exact - self._widened(name).detach()
            elif tensor.axes[0].port is Port.GAIN:
                self.factors[name] = _carried_factor(tensor_map.axes[0])

    def _matrix(self, axis: Axis, factor: AxisFactor | None) -> str | None:
        """Return the key of an axis's matrix, made where it is the first of its kind."""
        if factor is None or factor.is_identity:
            return None
        old_size = int(factor.index.max()) + 1
        if self.init == "paper":
            key = _shared_space(axis)
            value = self._averages(factor.index.numel(), old_size)
        else:
            value = torch.zeros(factor.index.numel(), old_size)
            kept = factor.index >= 0
            value[kept, factor.index[kept]] = factor.weight[kept].float()
            key = _own_space(axis, value)
            assert key not in self.matrices or torch.equal(self.matrices[key], value), key
        return self._added(key, value)

    def _added(self, key: str, value: Tensor) -> str:
        if key not in self.matrices:
            self.matrices[key] = nn.Parameter(value)
        return key

    def _averages(self, new_size: int, old_size: int) -> Tensor:
        rows = torch.rand(new_size - old_size, old_size, generator=self.generator)
        return torch.cat([torch.eye(old_size), rows / rows.sum(dim=1, keepdim=True)])

    def _add_mixes(self, step: ResolvedExpansion) -> None:
        layers = 1 + max(step.parameter_map.layer_sources)
        new_layers = len(step.parameter_map.layer_sources)
        for name, tensor_map in step.parameter_map.tensors.items():
            if not name.startswith("layers."):
                continue
            mix = self.mixes.setdefault(
                _template(name), nn.Parameter(torch.zeros(new_layers, layers))
            )
            assert tensor_map.source is not None
            with torch.no_grad():
                row = mix[_layer(name)]
                row[_layer(tensor_map.source)] = float(not tensor_map.is_zeroed)
                if self.init == "paper":
                    row += MIX_NOISE * torch.rand(layers, generator=self.generator) * (row == 0)
                    row /= row.sum()

    def _widened(self, name: str) -> Tensor:
        value = self.sources[name]
        for dimension, key in enumerate(self.keys.get(name, ())):
            if key is not None:
                matrix = self.matrices[key]
                value = matrix @ value if dimension == 0 else value @ matrix.T
        value = value * self.factors.get(name, 1.0)
        return value + self.constants[name] if name in self.constants else value

    def _mixed(self, name: str, wide: dict[str, Tensor]) -> Tensor:
        mix = self.mixes.get(_template(name)) if name.startswith("layers.") else None
        if mix is None:
            return wide[name]
        layers = [wide[f"layers.{j}.{_template(name)}"] for j in range(mix.shape[1])]
        return torch.einsum("j,j...->...", mix[_layer(name)], torch.stack(layers))


def _shared_space(axis: Axis) -> str:
    """Return the paper's operator of an axis: one per space, the stream's shared by all layers.

    Under grouped queries the output projection reads another space than v writes, so it cannot
    share v's operator as in the paper; it has one of its own.
    """
    if _is_stream(axis):
        return "residual"
    is_output = axis.space.kind == "query" and axis.port is Port.READ
    return axis.space.name + "_output" * is_output


def _own_space(axis: Axis, value: Tensor) -> str:
    """Return a key that axes share when they have space, side and starting values in common."""
    space = "residual" if _is_stream(axis) else axis.space.name
    side = {Port.READ: "read", Port.GAIN: "gain"}.get(axis.port, "write")
    return f"{space} {side} {value.sum():.6f}"


def _is_stream(axis: Axis) -> bool:
    return axis.space.size == "hidden_size"


def _carried_factor(factor: AxisFactor | None) -> float:
    return 1.0 if factor is None else float(factor.weight[factor.index >= 0][0])


def _template(name: str) -> str:
    return name.split(".", 2)[2] if name.startswith("layers.") else name


def _layer(name: str) -> int:
    return int(name.split(".", 2)[1])
