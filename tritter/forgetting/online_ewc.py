"""Online EWC (Schwarz et al. 2018, arXiv 1805.06370, section 4): one Fisher for all earlier tasks.

½ λ Σ F (θ − θ*)² with F = γ F_earlier + F_latest and θ* the latest weights: what an earlier
training held its weights by is kept beside what it trained, decays, and the Fisher of the task that
it trained on is added. So text of the latest task alone is needed; of the first training, that of
all old domains. (The paper multiplies the sum by γ once more in the penalty; here one task is EWC.)

When to use: task after task is trained, and text of those before the latest is gone. Cost: that of
EWC, with one more copy of the weights.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from tritter.forgetting.ewc import EWC, KINDS, EWCOptions
from tritter.options import options
from tritter.training import Needs, Preparation, Task

if TYPE_CHECKING:
    from tritter.expand import Change


@options
class OnlineEWCOptions(EWCOptions):
    """Those of EWC, and how fast the Fisher of earlier tasks fades."""

    gamma: Annotated[float, Field(ge=0, le=1)] = 1.0


class OnlineEWC(EWC):
    """EWC across tasks in a row.

    Args:
        gamma: γ, what is left of the earlier Fisher at each further task.
        ewc_lambda, normalise, estimator, num_sequences, carry, at, refresh_steps: as of `EWC`;
            each task's own Fisher is normalised, and is what looks are compared with.
    """

    name = "online_ewc"
    Options = OnlineEWCOptions

    def __init__(self, *, gamma: float = 1.0, **of_ewc: Any) -> None:
        super().__init__(**of_ewc)
        self.gamma = gamma
        self.left_kind = left_kind(self.kind, self.normalise)
        self._earlier: dict[str, Tensor] = {}  # γ F_earlier

    @classmethod
    def needs(cls, options: Any) -> Needs:
        needs, kind = super().needs(options), left_kind(KINDS[options.carry], options.normalise)
        return replace(needs, state=(kind,), leaves=(kind,), copies=needs.copies + 1)

    def begin_task(self, model: nn.Module, task: Task) -> None:
        kept = task.state.get(self.left_kind, {})
        parameters = dict(model.named_parameters())
        self._earlier = {n: (self.gamma * value).to(parameters[n]) for n, value in kept.items()}
        super().begin_task(model, task)
        self.hold(
            model,
            {
                name: value + self.importance.get(name, torch.zeros_like(value))
                for name, value in self._earlier.items()
            },
        )

    def _fisher_domains(self, of: Preparation | Task, domains: tuple[str, ...]) -> tuple[str, ...]:
        """Return those of the latest task; all where no earlier training left a Fisher."""
        return of.latest or domains if self.left_kind in of.state else domains

    def _looked(self, name: str, fisher: Tensor) -> Tensor:
        earlier = self._earlier.get(name)
        return fisher if earlier is None else fisher + earlier

    def parameters_changed(self, change: "Change") -> None:
        super().parameters_changed(change)
        self._earlier = change.state(self.left_kind, self._earlier)

    def end_task(self, model: nn.Module) -> Mapping[str, Mapping[str, Tensor]]:
        return {self.left_kind: self.importance}

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "earlier": self._earlier}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._earlier = dict(state["earlier"])


def left_kind(kind: str, normalise: str) -> str:
    """Return the kind of state that is kept from task to task: one for each unit and rule."""
    return f"online_{kind}_mean" if normalise == "mean" else f"online_{kind}"
