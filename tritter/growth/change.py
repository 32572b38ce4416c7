"""What growth does to a model's parameters: an axis map that appends, and a fill."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tritter.expand import Change
from tritter.expand.change import declared
from tritter.families import LogicalTensor, Port, family_of, with_ffn_sizes
from tritter.growth.initialisers import NewNeurons
from tritter.growth.places import FFN, FfnPlace, ffn_tensors
from tritter.models import config_of
from tritter.parameter_map import AxisFactor, AxisMap, Fill, ParameterMap, TensorMap
from tritter.parameter_map.axis_map import NO_SOURCE


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerGrowth:
    """What becomes of one FFN.

    Args:
        neurons: k new ones.
        recycled: int64 [r], r ≤ k: the places of dead neurons that the first of them take; the
            others are appended.
    """

    neurons: NewNeurons
    recycled: Tensor

    @property
    def born(self) -> int:
        """How many are appended."""
        return self.neurons.gate.shape[0] - len(self.recycled)

    def places(self, width: int) -> Tensor:
        """Return where the new neurons stand, int64 [k], in an FFN that was `width` wide."""
        return torch.cat([self.recycled, torch.arange(width, width + self.born)])


def growth_change(model: nn.Module, growths: Mapping[int, LayerGrowth]) -> Change:
    """Return the change of a live model whose layers get new neurons."""
    config = config_of(model)
    family = family_of(config)
    logical = family.logical_tensors(config)
    widths = [family.dimensions(config, layer=n).intermediate_size
              for n in range(family.dimensions(config).num_hidden_layers)]  # fmt: skip
    maps = dict(ParameterMap.identity([t.name for t in logical], num_layers=len(widths)).tensors)
    for layer, growth in growths.items():
        unit_map = neuron_map(growth, widths[layer])
        maps |= {t.name: _tensor_map(t, growth, unit_map) for t in ffn_tensors(config, layer)}
        widths[layer] += growth.born
    parameter_map = ParameterMap(maps, tuple(range(len(widths))))
    target = with_ffn_sizes(config, widths, key=family.sizes["intermediate_size"])
    return Change.of(parameter_map, config, target)


def module_change(
    model: nn.Module, places: Mapping[int, FfnPlace], growths: Mapping[int, LayerGrowth]
) -> Change:
    """Return the same change of a module that no family knows.

    Args:
        places: layer → where its neurons lie.
    """
    before, after, maps = [], [], {}
    for layer, growth in growths.items():
        place = places[layer]
        unit_map = neuron_map(growth, place.width(model))
        parts = {place.gate: "gate", place.up: "up", place.down: "down"}
        for name, dim in place.axes(model):
            shape = list(model.get_parameter(name).shape)
            before.append(declared(name, tuple(shape)))
            shape[dim] += growth.born
            after.append(declared(name, tuple(shape)))
            axes: list[AxisFactor | None] = [None] * len(shape)
            axes[dim] = unit_map.factor(Port.WRITE if dim == 0 else Port.READ)
            fill = _given(growth, parts.get(name))
            source = before[-1].parts[0].tensor.name
            maps[source] = TensorMap(source=source, axes=tuple(axes), fill=fill)
    return Change(config={}, before=tuple(before), after=tuple(after), tensors=maps)


@dataclass(frozen=True, slots=True, eq=False)
class NeuronMap:
    """The map of an FFN's neurons, in which recycled ones have lost what they were.

    Args:
        source: int64 [N], as in AxisMap; `share` likewise, float64 [N].
    """

    source: Tensor
    share: Tensor

    def factor(self, port: Port) -> AxisFactor:
        """Return the factor of an axis of neurons."""
        kept = (self.source != NO_SOURCE).double()
        match port:
            case Port.WRITE:
                return AxisFactor(self.source, kept, self.share)
            case Port.WRITE_NONLINEAR:  # p = 1, so that gradients have the share as well
                return AxisFactor(self.source, kept, self.share)
            case Port.READ:
                return AxisFactor(self.source, self.share, kept)
        raise AssertionError(f"neurons have no port {port}")


def neuron_map(growth: LayerGrowth, width: int) -> NeuronMap:
    """Return the map of the neurons of an FFN that was `width` wide.

    Without recycled ones it is an AxisMap: what copies share adds up to what their source wrote.
    """
    source = torch.cat([torch.arange(width), torch.full((growth.born,), NO_SOURCE)])
    share = torch.ones(len(source), dtype=torch.float64)
    source[growth.recycled] = NO_SOURCE
    places = growth.places(width)
    share[places] = 0.0
    if growth.neurons.source is not None:
        source[places] = growth.neurons.source
        for place, copied in zip(places.tolist(), growth.neurons.source.tolist(), strict=True):
            taken = growth.neurons.share * float(share[copied])
            share[place] = taken
            share[copied] -= taken
    if not len(growth.recycled):
        AxisMap.copied(width, source, share)  # raises where the function would not be kept
    return NeuronMap(source, share)


def _tensor_map(tensor: LogicalTensor, growth: LayerGrowth, unit_map: NeuronMap) -> TensorMap:
    factors = tuple(
        unit_map.factor(axis.port) if axis.space.kind == FFN else None for axis in tensor.axes
    )
    part = tensor.kind.removeprefix("ffn.") if len(tensor.axes) == 2 else None
    return TensorMap(source=tensor.name, axes=factors, fill=_given(growth, part))


def _given(growth: LayerGrowth, part: str | None) -> Fill:
    """Return what stands in new neurons; biases, which are no part, begin at zero."""
    if growth.neurons.source is not None or part is None:
        return Fill()
    if part == "up" and growth.neurons.up is None:
        part = "gate"  # where there is no gate, up is all that neurons read by
    values: Tensor = getattr(growth.neurons, part)
    return Fill(kind="given", values=values.contiguous())
