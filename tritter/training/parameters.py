"""The parameters of a live model, experts that stand apart included, as its family knows them."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from tritter.families import NO_ADAPTERS, Adapters, Flops, StoredTensor, layout, training_flops
from tritter.families.layout import Part
from tritter.models import config_of

BASE, NEW = "_base", "_new"  # what the two parts of a parameter end in whose experts stand apart
WRAPPED = ".base_layer"  # what PEFT calls a linear layer that it put adapters on


def live_layout(model: nn.Module) -> tuple[StoredTensor, ...]:
    """Return what each parameter of a live model but adapters' holds, in forward order."""
    config, parameters = config_of(model), dict(model.named_parameters())
    places: list[StoredTensor] = []
    for stored in layout(config, "live"):
        owner, _, last = stored.name.rpartition(".")
        wrapped = f"{owner}{WRAPPED}.{last}"
        if stored.name in parameters:
            places.append(stored)
        elif wrapped in parameters:
            places.append(replace(stored, name=wrapped))
        else:
            num_base = len(parameters[stored.name + BASE])
            places += [_part_of(stored, BASE, 0, num_base), _part_of(stored, NEW, num_base, None)]
    return tuple(places)


def disk_values(model: nn.Module, values: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield (name on disk, value) for values by name of a live model's parameters."""
    for stored in live_layout(model):
        if stored.name in values:
            for tensor, value in stored.unpack(values[stored.name].detach().cpu()):
                yield tensor.disk_name, value


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


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """Return a live model's state dict, in which no experts stand apart."""
    state = model.state_dict()
    for name in [name.removesuffix(BASE) for name in state if name.endswith(BASE)]:
        state[name] = torch.cat([state.pop(name + BASE), state.pop(name + NEW)])
    return state


@dataclass(frozen=True, slots=True)
class StepFlops:
    """FLOPs of a step, whatever it reads.

    Args:
        sequence: of each sequence, or document where models read these apart.
        besides: of the step, of all processes together.
    """

    sequence: Flops
    besides: float = 0.0

    def of(self, lengths: Mapping[int, int]) -> float:
        """Return the FLOPs of a step on sequences, by length how many of all processes."""
        return self.sequence.of_all(lengths) + self.besides


def flops_of_sequence(
    model: nn.Module,
    *,
    routed_to: Collection[int] | None = None,
    adapters: Adapters = NO_ADAPTERS,
) -> Flops:
    """Return the FLOPs of a step on one sequence, with what needs a gradient now.

    Args:
        routed_to: the experts that share the tokens evenly. Default: all.
        adapters: what stands beside the model's own tensors.
    """
    config, trained = config_of(model), trained_tensors(model)
    return training_flops(
        config,
        is_trained=lambda tensor: tensor.name in trained,
        routed_to=routed_to,
        adapters=adapters,
    )


def trained_tensors(model: nn.Module) -> frozenset[str]:
    """Return the logical names of what needs a gradient in a live model."""
    return frozenset(
        part.tensor.name
        for stored in live_layout(model)
        if model.get_parameter(stored.name).requires_grad
        for part in stored.parts
    )
