"""What a training step costs in model FLOPs: by what of the model is trained in that step."""

from torch import nn

from tritter.families import (
    Flops,
    LogicalTensor,
    backward_flops,
    family_of,
    forward_flops,
    training_flops,
)
from tritter.models import config_of
from tritter.training.module import BaseModule
from tritter.training.parameters import live_layout


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
    return frozenset(
        part.tensor.name
        for stored in live_layout(model)
        if model.get_parameter(stored.name).requires_grad
        for part in stored.parts
    )
