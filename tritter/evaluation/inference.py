"""Look at a model without changing it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Set back every module's own mode: a partly frozen model stays partly in eval."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, was_training in modes:
            module.training = was_training


@contextmanager
def evaluating(model: nn.Module) -> Iterator[torch.device]:
    """Put a model into eval and inference mode, yield its device, then set all modes back."""
    with modes_kept(model), torch.inference_mode():
        model.eval()
        yield device_of(model)


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the first parameter (a model without parameters is on the CPU)."""
    first = next(model.parameters(), None)
    return torch.device("cpu") if first is None else first.device
