"""Which parameters a stage of the adaptation trains, and that it is as it was afterwards."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def only_trainable(model: nn.Module, is_trained: Callable[[str], bool]) -> Iterator[None]:
    """Let only parameters of some names need a gradient inside the block, whatever happens there.

    Args:
        is_trained: says so of a parameter's name.
    """
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(is_trained(name))
        yield
    finally:
        for parameter, needed in before:
            parameter.requires_grad_(needed)
