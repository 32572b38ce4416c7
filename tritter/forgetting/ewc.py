"""EWC (Kirkpatrick et al. 2017, arXiv 1612.00796): hold each weight as firmly as it mattered.

½ λ Σ F (θ − θ*)², where F is the diagonal Fisher of the old domains at the old weights, carried
through the expansion by the parameter map. λ multiplies the raw per-sequence Fisher of the mean
token loss, with the ½ that the original has and many copies drop; `normalise=mean` divides F by
its mean in the model before the expansion, so that one λ means the same for models of different
size, and for a model and what it grows into.

When to use: the old data may be looked at once, before the training, and not during it. What the
expansion added has no Fisher and is free. Cost: one pass over some old sequences, two copies of
the weights, one pass over them per step.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tritter.errors import TritterError
from tritter.forgetting.fisher import diagonal_fisher
from tritter.forgetting.quadratic import add_penalty_gradient, penalty
from tritter.training import ForgettingMethod, Task


class EWC(ForgettingMethod):
    """Elastic weight consolidation.

    Args:
        ewc_lambda: λ.
        normalise: `none` or `mean`.
    """

    name = "ewc"

    def __init__(self, *, ewc_lambda: float, normalise: str = "none") -> None:
        self.ewc_lambda = ewc_lambda
        self.normalise = normalise
        self._anchor: dict[str, Tensor] = {}
        self._fisher: dict[str, Tensor] = {}

    def begin_task(self, model: nn.Module, task: Task) -> None:
        fisher = task.importance.get("fisher")
        if fisher is None:
            raise TritterError("forgetting=ewc was given no Fisher information of the old domains.")
        scale = 1.0
        if self.normalise == "mean":
            stated = task.mean_importance.get("fisher")
            scale = mean_importance(fisher, carried=task.carried) if stated is None else stated
        for name, parameter in model.named_parameters():
            if name in fisher:
                self._anchor[name] = parameter.detach().clone()
                self._fisher[name] = fisher[name].to(parameter) / scale

    def add_to_gradients(self, model: nn.Module) -> None:
        add_penalty_gradient(
            model, anchor=self._anchor, importance=self._fisher, strength=self.ewc_lambda
        )

    def logged_loss(self, model: nn.Module) -> float:
        return penalty(
            model, anchor=self._anchor, importance=self._fisher, strength=self.ewc_lambda
        )

    def state_dict(self) -> dict[str, Any]:
        return {"anchor": self._anchor, "fisher": self._fisher}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._anchor, self._fisher = dict(state["anchor"]), dict(state["fisher"])


def mean_importance(
    importance: Mapping[str, Tensor], *, carried: Mapping[str, Tensor] | None = None
) -> float:
    """Return the mean over all entries of all parameters, in float64.

    Args:
        carried: parameter name → bool mask of the entries to count. What an expansion added is
            zero and would dilute the mean.

    Raises:
        TritterError: all of them are zero.
    """
    held = importance if carried is None else {n: v[carried[n]] for n, v in importance.items()}
    total = sum(float(value.sum(dtype=torch.float64)) for value in held.values())
    if not total > 0:
        raise TritterError("the Fisher information is zero everywhere; it cannot be normalised.")
    return total / sum(value.numel() for value in held.values())


class ElasticWeightConsolidation:
    """EWC for a training loop of one's own; in Tritter's, `EWC` does the same without a graph.

    Args:
        model: a causal language model at the weights to be held.
        dataloader: yields batches of old data, `{"input_ids": integers [B, T]}`.
        lambda_ewc: λ.

    Raises:
        TritterError: the loader yields nothing.
    """

    def __init__(
        self, model: nn.Module, dataloader: Iterable[Mapping[str, Tensor]], lambda_ewc: float = 1e3
    ) -> None:
        self.model = model
        self.lambda_ewc = lambda_ewc
        total: dict[str, Tensor] = {}
        count = 0
        for batch in dataloader:
            sequences = batch["input_ids"]
            for name, value in diagonal_fisher(model, sequences).items():
                total[name] = total.get(name, torch.zeros_like(value)) + value * len(sequences)
            count += len(sequences)
        if not count:
            raise TritterError("ElasticWeightConsolidation: the dataloader yields no sequence.")
        self.fisher = {name: value / count for name, value in total.items()}
        self.optimal_params = {n: p.detach().clone() for n, p in model.named_parameters()}

    def penalty(self) -> Tensor:
        """Return ½ λ Σ F (θ − θ*)², a scalar to add to the loss."""
        terms = [
            (self.fisher[name] * (parameter - self.optimal_params[name]).square()).sum()
            for name, parameter in self.model.named_parameters()
        ]
        return 0.5 * self.lambda_ewc * torch.stack(terms).sum()
