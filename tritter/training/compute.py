"""What a training step costs in model FLOPs: by what of the model is trained in that step."""

from torch import nn

from tritter.families import (
    Flops,
    LogicalTensor,
    backward_flops,
    family_of,
    forward_flops,
    layout,
    training_flops,
)
from tritter.models import config_of
from tritter.training.module import BaseModule

BASE, NEW = "_base", "_new"  # what the two parts of a parameter end in whose experts stand apart


class StepFlops:
    """Counts the FLOPs of steps; what is trained may change between two of them."""

    def __init__(self) -> None:
        self._flags: tuple[bool, ...] = ()
        self._batch = self._held = Flops()

    def of(self, module: BaseModule, *, num_sequences: int, length: int) -> float:
        """Count the step that was just taken, or is about to be.

        Args:
            num_sequences: of the batch, of all processes together.
            length: tokens of a sequence.
        """
        flags = tuple(parameter.requires_grad for parameter in module.model.parameters())
        if flags != self._flags:
            self._flags = flags
            self._batch, self._held = _flops_of(module.model)
        flops = num_sequences * self._batch.of(length)
        if module.routing is not None and (held := module.routing.held_batch) is not None:
            # Each process looks at the same old text, which is counted once
            flops += held[0] * self._held.of(held[1])
        return flops


def _flops_of(model: nn.Module) -> tuple[Flops, Flops]:
    """Return the FLOPs of a step on a sequence, and of holding the routing of one."""
    config, trained = config_of(model), trained_tensors(model)
    family = family_of(config)

    def is_trained(tensor: LogicalTensor) -> bool:
        return tensor.name in trained

    of_routing = backward_flops(family, config, is_trained=is_trained, loss_at="routers")
    return (
        training_flops(family, config, is_trained=is_trained),
        forward_flops(family, config) + of_routing,
    )


def trained_tensors(model: nn.Module) -> frozenset[str]:
    """Return the logical names of what needs a gradient in a live model."""
    config, parameters = config_of(model), dict(model.named_parameters())
    trained = set()
    for stored in layout(family_of(config), config, "live"):
        for part in stored.parts:
            parameter = parameters.get(stored.name)
            if parameter is None:
                assert part.tensor.expert is not None
                num_base = len(parameters[stored.name + BASE])
                end = BASE if part.tensor.expert < num_base else NEW
                parameter = parameters[stored.name + end]
            if parameter.requires_grad:
                trained.add(part.tensor.name)
    return frozenset(trained)
