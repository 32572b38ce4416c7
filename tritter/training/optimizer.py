"""The optimizer: which class, and which parameters it holds, in which groups, in which order."""

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from tritter.targets import imported


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerSettings:
    """An optimizer but for the learning rate, which the schedule gives; by default AdamW.

    Args:
        target: dotted name of its class.
        weight_decay: on matrices; vectors (norm gains, biases) are not decayed. None: the
            default of the class.
        arguments: the others of the class.
    """

    target: str = "torch.optim.AdamW"  # arXiv 1711.05101
    weight_decay: float | None = 0.01
    arguments: Mapping[str, Any] = field(default_factory=lambda: {"betas": (0.9, 0.95)})


def build_optimizer(
    parameters: Iterable[tuple[str, nn.Parameter]],
    settings: OptimizerSettings,
    *,
    learning_rate: float,
) -> torch.optim.Optimizer:
    """Return an optimizer over the parameters that require a gradient.

    A frozen parameter stays out altogether: inside, weight decay and momentum would move it.
    Two groups always, each in the order given, so that saved state finds its place by position.
    """
    kind = imported(settings.target)
    trainable = [parameter for _, parameter in parameters if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [parameter for parameter in trainable if parameter.ndim >= 2]},
        {"params": [parameter for parameter in trainable if parameter.ndim < 2]},
    ]
    if "weight_decay" in inspect.signature(kind).parameters:
        groups[1]["weight_decay"] = 0.0
        if settings.weight_decay is not None:
            groups[0]["weight_decay"] = settings.weight_decay
    arguments = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in settings.arguments.items()
    }
    return kind(groups, lr=learning_rate, **arguments)
