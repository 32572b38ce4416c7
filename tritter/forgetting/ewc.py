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
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from tritter.errors import TritterError
from tritter.families import forward_flops, training_flops
from tritter.forgetting.fisher import Estimator, diagonal_fisher
from tritter.forgetting.quadratic import QuadraticPenalty
from tritter.options import Count, options
from tritter.training import Needs, Preparation, Prepared, Task

_KINDS = {"diagonal": "fisher", "penalty_preserving": "fisher_penalty"}


@options
class EWCOptions:
    """How firm the pull is, and how its Fisher is estimated."""

    ewc_lambda: Annotated[float, Field(ge=0)] = 3e4
    normalise: Literal["none", "mean"] = "none"
    estimator: Literal["empirical", "true"] = "empirical"
    num_sequences: Count = 256
    carry: Literal["diagonal", "penalty_preserving"] = "diagonal"


class EWC(QuadraticPenalty):
    """Elastic weight consolidation.

    Args:
        ewc_lambda: λ.
        normalise: `none` or `mean`.
        estimator: `empirical` or `true`, see `fisher`.
        num_sequences: that the Fisher is averaged over.
        carry: through an expansion, `diagonal` or `penalty_preserving`.
    """

    name = "ewc"
    Options = EWCOptions
    importance_key = "fisher"

    def __init__(
        self,
        *,
        ewc_lambda: float,
        normalise: str = "none",
        estimator: Estimator = "empirical",
        num_sequences: int = 256,
        carry: str = "diagonal",
    ) -> None:
        super().__init__(ewc_lambda)
        self.normalise = normalise
        self.estimator = estimator
        self.num_sequences = num_sequences
        self.kind = _KINDS[carry]

    @classmethod
    def needs(cls, options: Any) -> Needs:
        return Needs(old_text=True, prepares=(_KINDS[options.carry],), copies=2)

    def prepare(self, given: Preparation) -> Prepared:
        chosen = given.draw(self.num_sequences, "fisher")
        given.say(f"Fisher of {len(chosen)} sequences of {', '.join(given.domains)}")
        fisher = diagonal_fisher(
            given.model, chosen, estimator=self.estimator, seed=given.seed("fisher", "labels")
        )
        # The gradients of a training step, and no update; true labels take a pass of their own
        from tritter.models import config_of  # transformers, which a refusal does not wait for

        config = config_of(given.model)
        flops = training_flops(config)
        if self.estimator == "true":
            flops += forward_flops(config)
        return Prepared(
            state={self.kind: fisher},
            flops=len(chosen) * flops.of(chosen.shape[1]),
            found={"sequences": len(chosen)},
        )

    def begin_task(self, model: nn.Module, task: Task) -> None:
        fisher = task.state.get(self.kind)
        if fisher is None:
            raise TritterError("forgetting=ewc was given no Fisher information of the old domains.")
        self.hold(model, fisher)
        if self.normalise == "mean":  # before the expansion: copies and new entries don't move it
            scale = mean_importance(task.state_before[self.kind])
            self.importance = {name: value / scale for name, value in self.importance.items()}


def mean_importance(importance: Mapping[str, Tensor]) -> float:
    """Return the mean over all entries of all parameters, in float64.

    Raises:
        TritterError: all of them are zero.
    """
    total, count = 0.0, 0
    for value in importance.values():
        total += float(value.sum(dtype=torch.float64))
        count += value.numel()
    if not total > 0:
        raise TritterError("the Fisher information is zero everywhere; it cannot be normalised.")
    return total / count


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
