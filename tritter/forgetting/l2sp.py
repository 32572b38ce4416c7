"""L2-SP (Li et al. 2018, arXiv 1802.01483): decay towards the starting point, not towards zero.

When to use: no old data at hand, and the cheapest protection will do; it is also the control for
every importance-weighted penalty, which it equals with all importances one. What the expansion
added is free: it has no past to return to. Cost: one copy of the weights.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from tritter.forgetting.quadratic import add_penalty_gradient, penalty
from tritter.training import ForgettingMethod, Task


class L2SP(ForgettingMethod):
    """½ λ Σ (θ − θ*)² over all entries that carry old knowledge.

    Args:
        l2sp_lambda: λ.
    """

    name = "l2sp"

    def __init__(self, *, l2sp_lambda: float) -> None:
        self.l2sp_lambda = l2sp_lambda
        self._anchor: dict[str, Tensor] = {}
        self._importance: dict[str, Tensor] = {}

    def begin_task(self, model: nn.Module, task: Task) -> None:
        for name, parameter in model.named_parameters():
            self._anchor[name] = parameter.detach().clone()
            self._importance[name] = task.carried[name].to(parameter)

    def add_to_gradients(self, model: nn.Module) -> None:
        add_penalty_gradient(
            model,
            anchor=self._anchor,
            importance=self._importance,
            strength=self.l2sp_lambda,
        )

    def logged_loss(self, model: nn.Module) -> float:
        return penalty(
            model,
            anchor=self._anchor,
            importance=self._importance,
            strength=self.l2sp_lambda,
        )

    def state_dict(self) -> dict[str, Any]:
        return {"anchor": self._anchor, "importance": self._importance}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._anchor, self._importance = dict(state["anchor"]), dict(state["importance"])
