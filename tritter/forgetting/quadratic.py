"""Quadratic penalties: ½ λ Σ importance · (θ − θ*)², the common form of L2-SP and EWC.

The penalty's gradient is added in place of a term in the loss: the same step, without a second
graph over all parameters.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


def add_penalty_gradient(
    model: nn.Module,
    *,
    anchor: Mapping[str, Tensor],
    importance: Mapping[str, Tensor],
    strength: float,
) -> None:
    """Add λ · importance · (θ − θ*) to the gradient of every parameter that has one."""
    for name, parameter in model.named_parameters():
        if parameter.grad is None or name not in anchor:
            continue
        pull = (parameter.detach() - anchor[name]).mul_(importance[name])
        parameter.grad.add_(pull.to(parameter.grad.dtype), alpha=strength)


def penalty(
    model: nn.Module,
    *,
    anchor: Mapping[str, Tensor],
    importance: Mapping[str, Tensor],
    strength: float,
) -> float:
    """Return ½ λ Σ importance · (θ − θ*)², summed in float64."""
    total = torch.zeros((), dtype=torch.float64)
    for name, parameter in model.named_parameters():
        if name in anchor:
            change = (parameter.detach() - anchor[name]).double()
            total += (importance[name] * change.square()).sum().cpu()
    return 0.5 * strength * float(total)
