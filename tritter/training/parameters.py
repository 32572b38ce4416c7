"""The parameters of a live model, experts that stand apart included, as its family knows them."""

from dataclasses import replace

from torch import nn

from tritter.families import StoredTensor, family_of, layout
from tritter.families.layout import Part
from tritter.models import config_of

BASE, NEW = "_base", "_new"  # what the two parts of a parameter end in whose experts stand apart


def live_layout(model: nn.Module) -> tuple[StoredTensor, ...]:
    """Return what each parameter of a live model holds, in forward order."""
    config, parameters = config_of(model), dict(model.named_parameters())
    places: list[StoredTensor] = []
    for stored in layout(family_of(config), config, "live"):
        if stored.name in parameters:
            places.append(stored)
        else:
            num_base = len(parameters[stored.name + BASE])
            places += [_part_of(stored, BASE, 0, num_base), _part_of(stored, NEW, num_base, None)]
    return tuple(places)


def _part_of(stored: StoredTensor, ending: str, first: int, end: int | None) -> StoredTensor:
    """Return the parameter that holds the experts from `first` on, up to `end`."""
    parts = []
    for part in stored.parts:
        expert, rows = part.index
        assert isinstance(expert, int)
        if first <= expert and (end is None or expert < end):
            parts.append(Part(part.tensor, (expert - first, rows)))
    num_experts = (end or stored.shape[0]) - first
    shape = (num_experts, *stored.shape[1:])
    return replace(stored, name=stored.name + ending, shape=shape, parts=tuple(parts))
