"""The optimizer: which class, and which parameters it holds, in which groups, in which order."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tritter.errors import Problem
from tritter.targets import imported

if TYPE_CHECKING:
    import torch
    from torch import nn


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


_ADAMS = ("Adam", "AdamW", "Adam8bit", "AdamW8bit", "PagedAdam8bit", "PagedAdamW8bit")


def adam_problems(optimizer: Any, *, doing: str) -> Iterator[Problem]:
    """Yield that an optimizer is no Adam whose moments can follow a change of the model.

    Args:
        optimizer: as a config has it.
        doing: what needs it.
    """
    name = optimizer.target.rpartition(".")[2]
    if name not in _ADAMS or optimizer.arguments.get("amsgrad"):
        reason = (
            f"{doing}, and {name} has other state; allowed are {', '.join(_ADAMS)} without amsgrad"
        )
        yield Problem("optimizer", name, reason=reason)


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


# A share of a short training rounds to no step or one: the first update would be at full rate,
# while Adam's second moments rest on a single gradient.
MINIMUM_WARMUP_STEPS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Warm-up, then constant, cosine or warmup-stable-decay.

    `rewarm` is `cosine` whose warm-up begins at the rate that an earlier training ended with:
    re-warming and re-decaying (Ibrahim et al. 2024, arXiv 2403.08763).

    Args:
        learning_rate: the peak.
        max_steps: optimizer steps of the whole training.
        warmup_ratio: share of the steps over which the rate rises linearly to its peak; above 0
            at least `MINIMUM_WARMUP_STEPS`, or a quarter of a training too short for them.
        shape: `constant`, `cosine`, `rewarm`, or `wsd` (arXiv 2404.06395: constant, then a linear
            decay).
        decay_ratio: share of the steps that decay, for `wsd`.
        minimum_ratio: what is left of the peak at the end of all but `constant`.
        start_rate: where the warm-up of `rewarm` begins.
    """

    learning_rate: float
    max_steps: int
    warmup_ratio: float = 0.05
    shape: str = "cosine"
    decay_ratio: float = 0.2
    minimum_ratio: float = 0.0
    start_rate: float = 0.0

    @classmethod
    def constant(cls, learning_rate: float, *, max_steps: int) -> Schedule:
        """Return one rate from the first step to the last."""
        return cls(
            learning_rate=learning_rate, max_steps=max_steps, warmup_ratio=0.0, shape="constant"
        )

    @property
    def warmup_steps(self) -> int:
        if not self.warmup_ratio:
            return 0
        asked = round(self.warmup_ratio * self.max_steps)
        return max(asked, min(MINIMUM_WARMUP_STEPS, self.max_steps // 4))

    @property
    def last_rate(self) -> float:
        """The rate of the last step."""
        return self.rate(self.max_steps - 1)

    def rate(self, step: int) -> float:
        """Return the rate of step `step` (from 0)."""
        return self.learning_rate * self.factor(step)

    def factor(self, step: int) -> float:
        """Return the share of the peak rate that step `step` (from 0) uses."""
        if step < self.warmup_steps:
            risen = (step + 1) / self.warmup_steps
            start = self.start_rate / self.learning_rate if self.shape == "rewarm" else 0.0
            return start + (1 - start) * risen
        match self.shape:
            case "constant":
                return 1.0
            case "cosine" | "rewarm":
                progress = (step - self.warmup_steps) / max(1, self.max_steps - self.warmup_steps)
                left = (1 + math.cos(math.pi * min(1.0, progress))) / 2
                return self.minimum_ratio + (1 - self.minimum_ratio) * left
            case "wsd":
                decay_steps = max(1, round(self.decay_ratio * self.max_steps))
                left = min(1.0, max(0.0, (self.max_steps - step) / decay_steps))
                return self.minimum_ratio + (1 - self.minimum_ratio) * left
        raise ValueError(f"training.schedule = '{self.shape}': constant, cosine, wsd or rewarm.")
