"""What new neurons of a gated FFN begin as.

A neuron is y += down · σ(gate·x) · (up·x). With up = 0, or down = 0, it changes nothing at first;
with both it would never learn.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from tritter.growth.look import Look
from tritter.growth.orthogonal import Against, orthogonalised
from tritter.options import options

_POWER_STEPS, _SUBSPACE = 12, 6
_LONGEST = 10.0  # of a new column, beside the median of the old ones


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Layer:
    """An FFN that grows, as an initialiser sees it; all in float32 on one device.

    Args:
        gate: [F, H]; `up` likewise.
        down: [H, F].
        activation: σ.
        look: tokens of the step, of all processes.
        sources: int64 [k], the neurons of the highest pressure, which new ones may stem from.
        seed: of what is drawn.
    """

    gate: Tensor
    up: Tensor
    down: Tensor
    activation: Callable[[Tensor], Tensor]
    look: Look
    sources: Tensor
    seed: int

    def drawn(self, count: int, size: int) -> Tensor:
        """Return standard normal numbers [count, size], by the seed alone."""
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randn(count, size, generator=generator).to(self.gate)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class NewNeurons:
    """k new neurons.

    Args:
        gate: [k, H]; `up` likewise.
        down: [H, k].
        source: int64 [k], where they are copies that share the output of these neurons; None:
            they are made of the three above alone.
        share: what a copy takes over of its source's output, 0 to 1; the source keeps the rest.
    """

    gate: Tensor
    up: Tensor
    down: Tensor
    source: Tensor | None = None
    share: float = 0.0


@options
class Initialiser(ABC):
    """Makes new neurons: from outside, a record of options with this base.

    Args:
        orthogonalise: new directions against those that the layer has.
    """

    is_exact: ClassVar[bool] = True  # the function is kept

    orthogonalise: Against = "none"

    @abstractmethod
    def neurons(self, layer: Layer) -> NewNeurons:
        """Return as many new neurons as the layer names sources."""


@options
class GradMax(Initialiser):
    """The largest gradient that a neuron can begin with: Evci et al. 2022, arXiv 2201.05125.

    The gradient of a new row of up is downᵀ·M_g, with M_g = Σ_t σ(gate·x_t) δ_t x_tᵀ over tokens:
    of all down of one length the first left singular vector of M_g makes it longest. Gates look
    at the right singular vectors of M = Σ_t δ_t x_tᵀ, in the strength that the layer's gates have.
    up is zero, so the function is kept; down is as long as lets the new gradients be as large as
    the median of the layer's.
    """

    def neurons(self, layer: Layer) -> NewNeurons:
        inputs, deltas = layer.look.inputs, layer.look.output_gradients  # [T, H]
        count = len(layer.sources)
        gates = _directions(deltas.T @ inputs, layer.drawn(layer.gate.shape[1], count + 2), count)
        existing = layer.gate
        gates = orthogonalised(gates, existing, against=self.orthogonalise, inputs=inputs)
        gates = gates * _strength(layer.gate, gates, inputs)
        wanted, longest = _median_gradient(layer), _LONGEST * _median_norm(layer.down.T)
        columns: list[Tensor] = []
        for gate in gates:
            opened = layer.activation(inputs @ gate)[:, None]  # [T, 1]
            moment = (deltas * opened).T @ inputs  # [H, H], M_g
            for column in columns:  # or all would write alike
                moment = moment - torch.outer(column, column @ moment)
            left = _first_left(moment, layer.drawn(moment.shape[1], _SUBSPACE))
            columns.append(left)
        down = torch.stack(columns, dim=1)  # [H, k], unit length
        reached = torch.stack(
            [
                torch.linalg.vector_norm(
                    (deltas @ column * layer.activation(inputs @ gate)) @ inputs
                )
                for gate, column in zip(gates, columns, strict=True)
            ]
        )
        lengths = (wanted / reached.clamp_min(1e-30)).clamp(max=longest)
        return NewNeurons(gate=gates, up=torch.zeros_like(gates), down=down * lengths)


@options
class Split(Initialiser):
    """Copies of the neurons of the highest pressure, which share what those wrote.

    Unequal shares, or the two would stay alike for ever.

    Args:
        share: of the output, of the new one.
    """

    share: Annotated[float, Field(gt=0, lt=1)] = 0.3

    def neurons(self, layer: Layer) -> NewNeurons:
        source = layer.sources
        return NewNeurons(
            gate=layer.gate[source],
            up=layer.up[source],
            down=layer.down[:, source] * self.share,
            source=source,
            share=self.share,
        )


@options
class SourceNoise(Initialiser):
    """The README's: the weights of a source and noise, orthogonalised; it changes the function.

    Args:
        noise: its standard deviation, relative to that of the layer's weights.
    """

    is_exact: ClassVar[bool] = False

    orthogonalise: Against = "neighbours"
    noise: Annotated[float, Field(ge=0)] = 0.1

    def neurons(self, layer: Layer) -> NewNeurons:
        source, width = layer.sources, layer.gate.shape[1]
        drawn = layer.drawn(len(source), 2 * width)
        made = []
        for existing, part in ((layer.gate, drawn[:, :width]), (layer.up, drawn[:, width:])):
            rows = existing[source] + self.noise * existing.std() * part
            made.append(
                orthogonalised(rows, existing, against=self.orthogonalise, inputs=layer.look.inputs)
            )
        return NewNeurons(gate=made[0], up=made[1], down=layer.down[:, source])


@options
class Random(Initialiser):
    """New directions of the strength that the layer's have; they write nothing at first."""

    def neurons(self, layer: Layer) -> NewNeurons:
        count, width = len(layer.sources), layer.gate.shape[1]
        drawn, inputs = layer.drawn(count, 2 * width), layer.look.inputs
        made = []
        for existing, part in ((layer.gate, drawn[:, :width]), (layer.up, drawn[:, width:])):
            rows = orthogonalised(part, existing, against=self.orthogonalise, inputs=inputs)
            made.append(rows * _strength(existing, rows, inputs))
        down = layer.down.new_zeros(layer.down.shape[0], count)
        return NewNeurons(gate=made[0], up=made[1], down=down)


def _strength(existing: Tensor, rows: Tensor, inputs: Tensor) -> Tensor:
    """Return factors [k, 1] that let rows answer to the inputs as strongly as the median does."""
    usual = torch.linalg.vector_norm(inputs @ existing.T, dim=0).median()
    own = torch.linalg.vector_norm(inputs @ rows.T, dim=0)
    return (usual / own.clamp_min(1e-30))[:, None]


def _median_norm(rows: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows, dim=1).median()


def _median_gradient(layer: Layer) -> Tensor:
    """Return the median norm of the gradients of the rows of up, over the tokens looked at."""
    inputs, deltas = layer.look.inputs, layer.look.output_gradients
    opened = layer.activation(inputs @ layer.gate.T)  # [T, F]
    return _median_norm(((deltas @ layer.down) * opened).T @ inputs)


def _directions(moment: Tensor, start: Tensor, count: int) -> Tensor:
    """Return the first right singular vectors of a matrix, as rows [count, H], unit length."""
    found = _subspace(moment.T @ moment, start)
    if count > found.shape[1]:  # more new neurons than dimensions
        found = found.repeat(1, -(-count // found.shape[1]))
    return found[:, :count].T


def _first_left(moment: Tensor, start: Tensor) -> Tensor:
    """Return the first left singular vector of a matrix, unit length."""
    return _subspace(moment @ moment.T, start)[:, 0]


def _subspace(square: Tensor, start: Tensor) -> Tensor:
    """Return the leading eigenvectors of a symmetric matrix [H, H], by subspace iteration."""
    largest = square.abs().max().clamp_min(1e-30)
    square = (square / largest).double()
    basis = torch.linalg.qr(start[:, : square.shape[0]].double()).Q
    for _ in range(_POWER_STEPS):
        basis = torch.linalg.qr(square @ basis).Q
    _, turned = torch.linalg.eigh(basis.T @ square @ basis)
    return (basis @ turned.flip(1)).to(start)
