"""L2-SP (Li et al. 2018, arXiv 1802.01483): weight decay towards the starting point, not zero.

When to use: no old data is available, and the cheapest mitigation suffices. It is also the control
for every importance-weighted penalty: it is the penalty with all importances equal to one. Weights
that the expansion added are free: they have no earlier value. Cost: one copy of the weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from tritter.methods.forgetting.quadratic import QuadraticPenalty
from tritter.options import options
from tritter.training import Needs, Task

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tritter.transform import Change


@options
class L2SPOptions:
    """Strength of the pull towards the starting point."""

    l2sp_lambda: Annotated[float, Field(ge=0)] = 0.03


class L2SP(QuadraticPenalty):
    """½ λ Σ (θ − θ*)² over all entries that existed before the expansion.

    Args:
        l2sp_lambda: λ.
    """

    name = "l2sp"
    Options = L2SPOptions

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.strength = self.options.l2sp_lambda

    @classmethod
    def needs(cls, options: Any) -> Needs:
        return Needs(carried=True, copies=2)

    def importance_on(self, model: nn.Module, batches: Iterable[Tensor]) -> Mapping[str, Tensor]:
        """Return ones; no data is read."""
        import torch

        return {name: torch.ones_like(p) for name, p in model.named_parameters()}

    def begin_task(self, model: nn.Module, task: Task) -> None:
        self.anchor_weights(model, task.carried)

    def parameters_changed(self, change: Change) -> None:
        super().parameters_changed(change)
        self.importance = {name: (value != 0).to(value) for name, value in self.importance.items()}
