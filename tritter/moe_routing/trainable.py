"""Which parameters a stage of the adaptation trains, and that it is as it was afterwards."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn

from tritter.expand import declared
from tritter.families import LogicalTensor
from tritter.training.parameters import live_layout


def is_router(tensor: LogicalTensor) -> bool:
    """Return whether a tensor is a router's."""
    return tensor.kind == "router"


@contextmanager
def only_trainable(model: nn.Module, is_trained: Callable[[LogicalTensor], bool]) -> Iterator[None]:
    """Let only some tensors of a live model need a gradient inside the block, whatever happens.

    Args:
        is_trained: says so of a tensor; a parameter that holds several needs a gradient for all
            of them, or none.
    """
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    known = {stored.name: stored for stored in live_layout(model)}
    try:
        for name, parameter in model.named_parameters():
            stored = known.get(name) or declared(name, tuple(parameter.shape))
            parameter.requires_grad_(all(is_trained(part.tensor) for part in stored.parts))
        yield
    finally:
        for parameter, needed in before:
            parameter.requires_grad_(needed)
