"""Quadratic penalties: ½ λ Σ importance · (θ − θ*)², the common form of L2-SP and EWC.

The penalty's gradient is added in place of a term in the loss: the same step, without a second
graph over all parameters.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tritter.training import ForgettingMethod

if TYPE_CHECKING:
    from tritter.expand import Change


class QuadraticPenalty(ForgettingMethod):
    """Pull every parameter back to its anchor, as firmly as its importance says.

    A method fills both when a task begins, by parameter name; what has none is free.

    Args:
        strength: λ.
    """

    kind = "fisher"  # the rule by which an importance follows a map
    importance_key = "importance"  # in what a resumed training goes on from

    def __init__(self, strength: float) -> None:
        self.strength = strength
        self.anchor: dict[str, Tensor] = {}
        self.importance: dict[str, Tensor] = {}

    def hold(self, model: nn.Module, importance: Mapping[str, Tensor]) -> None:
        """Take the present weights for anchors, wherever there is an importance."""
        for name, parameter in model.named_parameters():
            if name in importance:
                self.anchor[name] = parameter.detach().clone()
                self.importance[name] = importance[name].to(parameter)

    def add_to_gradients(self, model: nn.Module) -> None:
        """Add λ · importance · (θ − θ*) to the gradient of every parameter that has one."""
        for name, parameter in model.named_parameters():
            if parameter.grad is None or name not in self.importance:
                continue
            pull = (parameter.detach() - self.anchor[name]).mul_(self.importance[name])
            parameter.grad.add_(pull.to(parameter.grad.dtype), alpha=self.strength)

    def logged_loss(self, model: nn.Module) -> float:
        """Return ½ λ Σ importance · (θ − θ*)², summed in float64."""
        total = torch.zeros((), dtype=torch.float64)
        for name, parameter in model.named_parameters():
            if name in self.importance:
                moved = parameter.detach() - self.anchor[name]
                importance = self.importance[name]
                if moved.device.type == "mps":  # which has no float64
                    moved, importance = moved.cpu(), importance.cpu()
                total += (importance * moved.double().square()).sum().cpu()
        return 0.5 * self.strength * float(total)

    def parameters_changed(self, change: "Change") -> None:
        """Map anchors as weights and importances by their rule; what is new is free."""
        # What was never held may be copied from: there the importance is zero, and no anchor counts
        unheld = (stored for stored in change.before if stored.name not in self.anchor)
        device = next((value.device for value in self.anchor.values()), None)
        zeros = {stored.name: torch.zeros(stored.shape, device=device) for stored in unheld}
        anchor = change.state("anchor", zeros | self.anchor)
        importance = change.state(self.kind, self.importance)
        self.anchor = {name: anchor[name] for name in importance if name in anchor}
        self.importance = {name: importance[name] for name in self.anchor}

    def state_dict(self) -> dict[str, Any]:
        return {"anchor": self.anchor, self.importance_key: self.importance}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.anchor, self.importance = dict(state["anchor"]), dict(state[self.importance_key])
