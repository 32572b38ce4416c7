"""The optimiser: which parameters it holds, in which groups, in which order."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimiserSettings:
    """AdamW (arXiv 1711.05101) but for the learning rate, which the schedule gives.

    Args:
        weight_decay: on matrices; vectors (norm gains, biases) are not decayed.
    """

    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.01


def build_optimiser(
    parameters: Iterable[tuple[str, nn.Parameter]],
    settings: OptimiserSettings,
    *,
    learning_rate: float,
) -> torch.optim.Optimizer:
    """Return AdamW over the parameters that require a gradient.

    A frozen parameter stays out altogether: inside, weight decay and momentum would move it.
    Two groups always, each in the order given, so that saved state finds its place by position.
    """
    trainable = [parameter for _, parameter in parameters if parameter.requires_grad]
    matrices = [parameter for parameter in trainable if parameter.ndim >= 2]
    vectors = [parameter for parameter in trainable if parameter.ndim < 2]
    return torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": settings.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=learning_rate,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
    )
