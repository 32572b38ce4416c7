"""Look at a model without changing it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[torch.device]:
    """Put a model into eval and inference mode, yield its device, then restore every module's mode.

    Each module's own mode comes back, so a partly frozen model stays partly in eval.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.inference_mode():
            yield device_of(model)
    finally:
        for module, was_training in modes:
            module.training = was_training


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the first parameter (a model without parameters is on the CPU)."""
    first = next(model.parameters(), None)
    return torch.device("cpu") if first is None else first.device
