"""Initial weights of new neurons.

A neuron of a gated FFN adds y += down · σ(gate·x) · (up·x). With up = 0 or down = 0 it leaves the
output unchanged at first; with both zero it would never learn. Without a gate a neuron adds
y += down · σ(gate·x) and starts with down = 0.
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

_Against = Literal["none", "neighbours", "activations"]
_MAX_NEIGHBOURS = 16
_POWER_STEPS, _SUBSPACE = 12, 6
_LONGEST = 10.0  # maximum norm of a new row or column, relative to the median of the old ones


def orthogonalised(
    rows: Tensor, existing: Tensor, *, against: _Against, inputs: Tensor | None = None
) -> Tensor:
    """Return rows made orthogonal to their nearest existing rows, with their original norm.

    Only the nearest rows count, at most a quarter of the dimensions: nothing would remain after
    projecting out as many rows as there are dimensions.

    Args:
        rows: [k, H], each made orthogonal to its neighbours and to the rows before it.
        existing: [F, H].
        against: `neighbours`: orthogonal directions; `activations`: uncorrelated activations on the
            inputs.
        inputs: [T, H], needed for `activations`.
    """
    import torch
    from torch import Tensor

    if against == "none":
        return rows
    metric = None
    if against == "activations":
        assert inputs is not None, "against=activations needs inputs"
        metric = inputs.T @ inputs / len(inputs)  # [H, H]
    count = max(1, min(_MAX_NEIGHBOURS, existing.shape[1] // 4))
    seen = existing if metric is None else existing @ metric
    norms = (existing * seen).sum(dim=1).clamp_min(1e-30).sqrt()
    made = list[Tensor]()
    for row in rows:
        nearest = existing[((seen @ row).abs() / norms).topk(min(count, len(existing))).indices]
        others = torch.stack([*nearest, *made[-count:]])
        viewed = others if metric is None else others @ metric  # [m, H]
        # Minus the projection on the span of the others, in the inner product of the metric
        system, wanted = (each.double().cpu() for each in (viewed @ others.T, viewed @ row))
        # GPUs have no driver for singular systems
        coefficients = torch.linalg.lstsq(system, wanted[:, None], driver="gelsd").solution
        remainder = row - (coefficients.squeeze(1).to(row) @ others)
        length = torch.linalg.vector_norm(remainder)
        if float(length) > 1e-6 * float(torch.linalg.vector_norm(row)):
            row = remainder * (torch.linalg.vector_norm(row) / length)
        made.append(row)
    return torch.stack(made) if made else rows


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Layer:
    """Weights and activations of an FFN that grows; all in float32 on one device.

    Args:
        gate: [F, H].
        up: [F, H]; None if neurons have no gate and `gate` stores their only input weights.
        down: [H, F]; None if the reader of the neurons is not known.
        activation: σ.
        probe: activations of the step, of all processes.
        sources: int64 [k], the neurons of the highest pressure, which may serve as sources.
        seed: seed of random numbers.
        gate_bias: [F], added before σ; new neurons start without one.
    """

    gate: Tensor
    up: Tensor | None
    down: Tensor | None
    activation: Callable[[Tensor], Tensor]
    probe: ActivationProbe
    sources: Tensor
    seed: int
    gate_bias: Tensor | None = None

    def drawn(self, count: int, size: int) -> Tensor:
        """Return standard normal numbers [count, size] that depend on the seed alone."""
        import torch

        generator = torch.Generator().manual_seed(self.seed)
        return torch.randn(count, size, generator=generator).to(self.gate)

    def random_rows(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Yield (name, rows [F, H], standard normal numbers [k, H]) for each input weight."""
        width = self.gate.shape[1]
        drawn = self.drawn(len(self.sources), 2 * width)
        yield "gate", self.gate, drawn[:, :width]
        if self.up is not None:
            yield "up", self.up, drawn[:, width:]

    def computed(self) -> Tensor:
        """Return the activations of the neurons of an FFN without gates, [T, F]."""
        return self.gate_activations() if self.probe.computed is None else self.probe.computed

    def gate_activations(self) -> Tensor:
        """Return the activations σ(gate·x) of the gates, [T, F]."""
        from torch.nn import functional as F

        return self.activation(F.linear(self.probe.inputs, self.gate, self.gate_bias))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class NewNeurons:
    """k new neurons of one layer. An initialiser leaves the last two to their defaults.

    gate: [k, H].
    up: [k, H]; None as in the layer.
    down: [H, k]; None as in the layer.
    source: int64 [k], the neurons whose output the new ones share as copies; None: the new
        neurons consist of the three weights alone.
    share: share of the source's output that a copy takes over, 0 to 1.
    recycled: indices of the r ≤ k dead neurons that the first new ones replace; the others are
        appended.
    died: number of dead neurons that remain unchanged.
    """

    gate: Tensor
    up: Tensor | None
    down: Tensor | None
    source: Tensor | None = None
    share: float = 0.0
    recycled: tuple[int, ...] = ()
    died: int = 0

    @property
    def born(self) -> int:
        """The number of appended neurons."""
        return len(self.gate) - len(self.recycled)

    def indices(self, width: int) -> Tensor:
        """Return the indices of the new neurons, int64 [k], in an FFN that had `width` neurons."""
        import torch

        rows = [*self.recycled, *range(width, width + self.born)]
        return torch.tensor(rows, dtype=torch.int64)


@options
class Initialiser(ABC):
    """Base class of initialisers; subclass it as a record of options to add your own.

    Args:
        orthogonalise: make new directions orthogonal to existing ones.
    """

    name: ClassVar[str] = ""  # key in `INITIALISERS` of built-in initialisers
    is_exact: ClassVar[bool] = False  # True if the function is preserved

    orthogonalise: _Against = "none"

    @abstractmethod
    def neurons(self, layer: Layer) -> NewNeurons:
        """Return one new neuron per source of the layer."""


@options
class GradMax(Initialiser):
    """Maximise the initial gradient of new neurons: Evci et al. 2022, arXiv 2201.05125.

    The gradient of a new row of up is downᵀ·M_g, with M_g = Σ_t σ(gate·x_t) δ_t x_tᵀ over tokens.
    Among all down of equal norm, the first left singular vector of M_g maximises it. Gates are set
    to the right singular vectors of M = Σ_t δ_t x_tᵀ, scaled like the existing gates. up is zero,
    so the function is preserved. down is scaled so that the norm of the new gradients equals the
    median of the layer, within limits.

    Without gates down is zero. The gradient of a new column is Σ_t δ_t σ(gate·x_t), and rows along
    the right singular vectors of M make it large. Its norm is limited to the median of the layer's
    columns, and the responses of new rows to those of existing ones.
    """

    name: ClassVar[str] = "gradmax"
    is_exact: ClassVar[bool] = True

    def neurons(self, layer: Layer) -> NewNeurons:
        import torch

        if layer.up is None or layer.down is None:
            return self._without_gates(layer)
        inputs, deltas = layer.probe.inputs, layer.probe.output_gradients  # [T, H]
        count = len(layer.sources)
        existing, width = layer.gate, layer.gate.shape[1]
        led = min(
            count, max(1, width // 2)
        )  # directions from the gradient; further ones are random
        gates = _directions(deltas.T @ inputs, layer.drawn(width, led + 2), led)
        gates = torch.cat([gates, layer.drawn(count, width)[led:]])
        gates = orthogonalised(gates, existing, against=self.orthogonalise, inputs=inputs)
        gates = gates * _strength(layer.gate, gates, inputs)
        # Target: the median gradient norm of the rows of up, over the recorded tokens
        target_norm = _median_norm(((deltas @ layer.down) * layer.gate_activations()).T @ inputs)
        longest = _LONGEST * _median_norm(layer.down.T)
        columns: list[Tensor] = []
        for gate in gates:
            gate_activations = layer.activation(inputs @ gate)[:, None]  # [T, 1]
            moment = (deltas * gate_activations).T @ inputs  # [H, H], M_g
            for column in columns[len(columns) // led * led :]:  # so that the columns differ
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
        lengths = (target_norm / reached.clamp_min(1e-30)).clamp(max=longest)
        return NewNeurons(gate=gates, up=torch.zeros_like(gates), down=down * lengths)

    def _without_gates(self, layer: Layer) -> NewNeurons:
        import torch

        inputs, deltas = layer.probe.inputs, layer.probe.output_gradients  # [T, H], [T, O]
        count, width = len(layer.sources), layer.gate.shape[1]
        drawn = layer.drawn(width + count, count + 2)
        rows = _directions(deltas.T @ inputs, drawn[:width], count)  # [k, H]
        if count > width:  # equal neurons would stay equal
            rows = torch.cat([rows[:width], layer.drawn(count, width)[width:]])
        rows = orthogonalised(rows, layer.gate, against=self.orthogonalise, inputs=inputs)
        rows = rows * _strength(layer.gate, rows, inputs)
        if layer.down is None:
            return NewNeurons(gate=rows, up=None, down=None)

        def reached(rows: Tensor) -> Tensor:
            """Return the gradient norms of new columns, [k, 1]."""
            computed = layer.activation(inputs @ rows.T)
            return torch.linalg.vector_norm(deltas.T @ computed, dim=0)[:, None]

        # The sign of a singular vector is arbitrary, but σ is not symmetric
        rows = torch.where(reached(rows) < reached(-rows), -rows, rows)
        target_norm = _median_norm((deltas.T @ layer.computed()).T)
        rows = rows * (target_norm / reached(rows).clamp_min(1e-30)).clamp(max=1.0)
        return NewNeurons(gate=rows, up=None, down=layer.down.new_zeros(layer.down.shape[0], count))


@options
class Split(Initialiser):
    """Copy the neurons of the highest pressure and share their output.

    The shares are unequal; otherwise both copies would stay equal forever.

    Args:
        share: share of the output that the new neuron takes over.
    """

    name: ClassVar[str] = "split"
    is_exact: ClassVar[bool] = True

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
    """Copy the weights of a source, add noise and orthogonalise; changes the function.

    Args:
        noise: standard deviation, relative to that of the layer's weights.
    """

    name: ClassVar[str] = "source_noise"

    orthogonalise: _Against = "neighbours"
    noise: Annotated[float, Field(ge=0)] = 0.1

    def neurons(self, layer: Layer) -> NewNeurons:
        from torch import Tensor

        source, inputs, made = layer.sources, layer.probe.inputs, dict[str, Tensor]()
        for name, existing, part in layer.random_rows():
            rows = existing[source] + self.noise * existing.std() * part
            made[name] = orthogonalised(rows, existing, against=self.orthogonalise, inputs=inputs)
        down = None if layer.down is None else layer.down[:, source]
        return NewNeurons(gate=made["gate"], up=made.get("up"), down=down)


@options
class Random(Initialiser):
    """Random directions scaled like existing ones, with zero output weights."""

    name: ClassVar[str] = "random"
    is_exact: ClassVar[bool] = True

    def neurons(self, layer: Layer) -> NewNeurons:
        from torch import Tensor

        inputs, made = layer.probe.inputs, dict[str, Tensor]()
        for name, existing, part in layer.random_rows():
            rows = orthogonalised(part, existing, against=self.orthogonalise, inputs=inputs)
            made[name] = rows * _strength(existing, rows, inputs)
        down = layer.down
        if down is not None:
            down = down.new_zeros(down.shape[0], len(layer.sources))
        return NewNeurons(gate=made["gate"], up=made.get("up"), down=down)


def _strength(existing: Tensor, rows: Tensor, inputs: Tensor) -> Tensor:
    """Return factors [k, 1] that scale rows to the median response of existing rows to the inputs.

    The factor is limited, because a direction that hardly occurs in the inputs would diverge.
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
    """Return the first right singular vectors of a matrix as rows [count, H] of unit length."""
    found = _subspace(moment.T @ moment, start)
    if count > found.shape[1]:  # more new neurons than dimensions
        found = found.repeat(1, -(-count // found.shape[1]))
    return found[:, :count].T


def _subspace(square: Tensor, start: Tensor) -> Tensor:
    """Return the leading eigenvectors of a symmetric matrix [H, H], by subspace iteration."""
    import torch

    square = (square / square.abs().max().clamp_min(1e-30)).double()
    basis = torch.linalg.qr(start[:, : square.shape[0]].double()).Q
    for _ in range(_POWER_STEPS):
        basis = torch.linalg.qr(square @ basis).Q
    _, turned = torch.linalg.eigh(basis.T @ square @ basis)
    found = basis @ turned.flip(1)
    # The sign is arbitrary, and rounding would decide it: processes add tokens in another order
    return (found * found.gather(0, found.abs().argmax(dim=0, keepdim=True)).sign()).to(start)
