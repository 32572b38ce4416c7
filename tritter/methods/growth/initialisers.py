"""What new neurons begin as.

A neuron of a gated FFN is y += down · σ(gate·x) · (up·x). With up = 0, or down = 0, it changes
nothing at first; with both it would never learn. Without a gate it is y += down · σ(gate·x), which
begins with down = 0.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from tritter.methods.growth.blocks import ActivationProbe
from tritter.options import options

if TYPE_CHECKING:
    from torch import Tensor

Against = Literal["none", "neighbours", "activations"]
MAX_NEIGHBOURS = 16


def orthogonalised(
    rows: Tensor, existing: Tensor, *, against: Against, inputs: Tensor | None = None
) -> Tensor:
    """Return new rows without what their nearest neighbours look at, of the length they had.

    Against as many rows as there are dimensions nothing would be left, so only the nearest count,
    at most a quarter of the dimensions.

    Args:
        rows: [k, H], each made orthogonal to its neighbours and to the rows before it.
        existing: [F, H].
        against: `neighbours`: as directions; `activations`: what they compute of the inputs is
            uncorrelated.
        inputs: [T, H], of `activations`.
    """
    import torch
    from torch import Tensor

    if against == "none":
        return rows
    metric = None
    if against == "activations":
        assert inputs is not None, "activations are those of some inputs"
        metric = inputs.T @ inputs / len(inputs)  # [H, H]
    count = max(1, min(MAX_NEIGHBOURS, existing.shape[1] // 4))
    seen = existing if metric is None else existing @ metric
    norms = (existing * seen).sum(dim=1).clamp_min(1e-30).sqrt()
    made = list[Tensor]()
    for row in rows:
        nearest = existing[((seen @ row).abs() / norms).topk(min(count, len(existing))).indices]
        others = torch.stack([*nearest, *made[-count:]])
        viewed = others if metric is None else others @ metric  # [m, H]
        # Minus the projection on the span of the others, by the inner product of the metric
        coefficients = torch.linalg.lstsq(
            (viewed @ others.T).double(), (viewed @ row).double()[:, None], driver="gelsd"
        ).solution
        left = row - (coefficients.squeeze(1).to(row) @ others)
        length = torch.linalg.vector_norm(left)
        if float(length) > 1e-6 * float(torch.linalg.vector_norm(row)):
            row = left * (torch.linalg.vector_norm(row) / length)
        made.append(row)
    return torch.stack(made) if made else rows


_POWER_STEPS, _SUBSPACE = 12, 6
_LONGEST = 10.0  # of a new row or column, beside the median of the old ones


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Layer:
    """An FFN that grows, as an initialiser sees it; all in float32 on one device.

    Args:
        gate: [F, H]; `up` likewise, None where neurons have no gate and `gate` is all they read by.
        down: [H, F]; None where nobody knows who reads the neurons.
        gate_bias: [F], added before σ; new neurons have none at first.
        activation: σ.
        look: tokens of the step, of all processes.
        sources: int64 [k], the neurons of the highest pressure, which new ones may stem from.
        seed: of what is drawn.
    """

    gate: Tensor
    up: Tensor | None
    down: Tensor | None
    activation: Callable[[Tensor], Tensor]
    look: ActivationProbe
    sources: Tensor
    seed: int
    gate_bias: Tensor | None = None

    def drawn(self, count: int, size: int) -> Tensor:
        """Return standard normal numbers [count, size], by the seed alone."""
        import torch

        generator = torch.Generator().manual_seed(self.seed)
        return torch.randn(count, size, generator=generator).to(self.gate)

    def drawn_rows(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Yield (name, rows [F, H], standard normal numbers [k, H]) of what neurons read by."""
        width = self.gate.shape[1]
        drawn = self.drawn(len(self.sources), 2 * width)
        yield "gate", self.gate, drawn[:, :width]
        if self.up is not None:
            yield "up", self.up, drawn[:, width:]

    def computed(self) -> Tensor:
        """Return what the neurons of an FFN without gates computed, [T, F]."""
        return self.opened() if self.look.computed is None else self.look.computed

    def opened(self) -> Tensor:
        """Return σ of what gates read, [T, F]."""
        from torch.nn import functional as F

        return self.activation(F.linear(self.look.inputs, self.gate, self.gate_bias))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class NewNeurons:
    """k new neurons.

    Args:
        gate: [k, H]; `up` likewise, None as in the layer.
        down: [H, k]; None as in the layer.
        source: int64 [k], where they are copies that share the output of these neurons; None:
            they are made of the three above alone.
        share: what a copy takes over of its source's output, 0 to 1; the source keeps the rest.
    """

    gate: Tensor
    up: Tensor | None
    down: Tensor | None
    source: Tensor | None = None
    share: float = 0.0


@options
class Initialiser(ABC):
    """Makes new neurons: from outside, a record of options with this base.

    Args:
        orthogonalise: new directions against those that the layer has.
    """

    name: ClassVar[str] = ""  # of ours, in `INITIALISERS`
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

    Without gates it is down that is zero. The gradient of a new column is Σ_t δ_t σ(gate·x_t), and
    rows along the right singular vectors of M make it long: as long as the median of the layer's
    columns, and no row answers more strongly than the layer's do.
    """

    name: ClassVar[str] = "gradmax"

    def neurons(self, layer: Layer) -> NewNeurons:
        import torch

        if layer.up is None or layer.down is None:
            return self._without_gates(layer)
        inputs, deltas = layer.look.inputs, layer.look.output_gradients  # [T, H]
        count = len(layer.sources)
        existing, width = layer.gate, layer.gate.shape[1]
        led = min(count, max(1, width // 2))  # the gradient leads so far; further ones are drawn
        gates = _directions(deltas.T @ inputs, layer.drawn(width, led + 2), led)
        gates = torch.cat([gates, layer.drawn(count, width)[led:]])
        gates = orthogonalised(gates, existing, against=self.orthogonalise, inputs=inputs)
        gates = gates * _strength(layer.gate, gates, inputs)
        # As long a gradient as the median of those of the rows of up, over the tokens looked at
        wanted = _median_norm(((deltas @ layer.down) * layer.opened()).T @ inputs)
        longest = _LONGEST * _median_norm(layer.down.T)
        columns: list[Tensor] = []
        for gate in gates:
            opened = layer.activation(inputs @ gate)[:, None]  # [T, 1]
            moment = (deltas * opened).T @ inputs  # [H, H], M_g
            for column in columns[len(columns) // led * led :]:  # or all would write alike
                moment = moment - torch.outer(column, column @ moment)
            # The first left singular vector of the moment
            start = layer.drawn(moment.shape[1], _SUBSPACE)
            columns.append(_subspace(moment @ moment.T, start)[:, 0])
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

    def _without_gates(self, layer: Layer) -> NewNeurons:
        import torch

        inputs, deltas = layer.look.inputs, layer.look.output_gradients  # [T, H], [T, O]
        count, width = len(layer.sources), layer.gate.shape[1]
        drawn = layer.drawn(width + count, count + 2)
        rows = _directions(deltas.T @ inputs, drawn[:width], count)  # [k, H]
        if count > width:  # neurons that begin alike would stay alike
            rows = torch.cat([rows[:width], layer.drawn(count, width)[width:]])
        rows = orthogonalised(rows, layer.gate, against=self.orthogonalise, inputs=inputs)
        rows = rows * _strength(layer.gate, rows, inputs)
        if layer.down is None:
            return NewNeurons(gate=rows, up=None, down=None)

        def reached(rows: Tensor) -> Tensor:
            """Return the norms of the gradients of new columns, [k, 1]."""
            computed = layer.activation(inputs @ rows.T)
            return torch.linalg.vector_norm(deltas.T @ computed, dim=0)[:, None]

        # The sign of a singular vector says nothing, and σ tells the two apart
        rows = torch.where(reached(rows) < reached(-rows), -rows, rows)
        wanted = _median_norm((deltas.T @ layer.computed()).T)
        rows = rows * (wanted / reached(rows).clamp_min(1e-30)).clamp(max=1.0)
        down = layer.down.new_zeros(layer.down.shape[0], count)
        return NewNeurons(gate=rows, up=None, down=down)


@options
class Split(Initialiser):
    """Copies of the neurons of the highest pressure, which share what those wrote.

    Unequal shares, or the two would stay alike for ever.

    Args:
        share: of the output, of the new one.
    """

    name: ClassVar[str] = "split"

    share: Annotated[float, Field(gt=0, lt=1)] = 0.3

    def neurons(self, layer: Layer) -> NewNeurons:
        source = layer.sources
        return NewNeurons(
            gate=layer.gate[source],
            up=None if layer.up is None else layer.up[source],
            down=None if layer.down is None else layer.down[:, source] * self.share,
            source=source,
            share=self.share,
        )


@options
class SourceNoise(Initialiser):
    """The README's: the weights of a source and noise, orthogonalised; it changes the function.

    Args:
        noise: its standard deviation, relative to that of the layer's weights.
    """

    name: ClassVar[str] = "source_noise"

    is_exact: ClassVar[bool] = False

    orthogonalise: Against = "neighbours"
    noise: Annotated[float, Field(ge=0)] = 0.1

    def neurons(self, layer: Layer) -> NewNeurons:
        from torch import Tensor

        source, inputs, made = layer.sources, layer.look.inputs, dict[str, Tensor]()
        for name, existing, part in layer.drawn_rows():
            rows = existing[source] + self.noise * existing.std() * part
            made[name] = orthogonalised(rows, existing, against=self.orthogonalise, inputs=inputs)
        down = None if layer.down is None else layer.down[:, source]
        return NewNeurons(gate=made["gate"], up=made.get("up"), down=down)


@options
class Random(Initialiser):
    """New directions of the strength that the layer's have; they write nothing at first."""

    name: ClassVar[str] = "random"

    def neurons(self, layer: Layer) -> NewNeurons:
        from torch import Tensor

        inputs, made = layer.look.inputs, dict[str, Tensor]()
        for name, existing, part in layer.drawn_rows():
            rows = orthogonalised(part, existing, against=self.orthogonalise, inputs=inputs)
            made[name] = rows * _strength(existing, rows, inputs)
        down = layer.down
        if down is not None:
            down = down.new_zeros(down.shape[0], len(layer.sources))
        return NewNeurons(gate=made["gate"], up=made.get("up"), down=down)


def _strength(existing: Tensor, rows: Tensor, inputs: Tensor) -> Tensor:
    """Return factors [k, 1] that let rows answer to the inputs as strongly as the median does.

    A direction that hardly any input has would be stretched without end, so there is one.
    """
    import torch

    usual = torch.linalg.vector_norm(inputs @ existing.T, dim=0).median()
    own = torch.linalg.vector_norm(inputs @ rows.T, dim=0)
    longest = _LONGEST * _median_norm(existing) / torch.linalg.vector_norm(rows, dim=1)
    return torch.minimum(usual / own.clamp_min(1e-30), longest)[:, None]


def _median_norm(rows: Tensor) -> Tensor:
    import torch

    return torch.linalg.vector_norm(rows, dim=1).median()


def _directions(moment: Tensor, start: Tensor, count: int) -> Tensor:
    """Return the first right singular vectors of a matrix, as rows [count, H], unit length."""
    found = _subspace(moment.T @ moment, start)
    if count > found.shape[1]:  # more new neurons than dimensions
        found = found.repeat(1, -(-count // found.shape[1]))
    return found[:, :count].T


def _subspace(square: Tensor, start: Tensor) -> Tensor:
    """Return the leading eigenvectors of a symmetric matrix [H, H], by subspace iteration."""
    import torch

    largest = square.abs().max().clamp_min(1e-30)
    square = (square / largest).double()
    basis = torch.linalg.qr(start[:, : square.shape[0]].double()).Q
    for _ in range(_POWER_STEPS):
        basis = torch.linalg.qr(square @ basis).Q
    _, turned = torch.linalg.eigh(basis.T @ square @ basis)
    return (basis @ turned.flip(1)).to(start)
