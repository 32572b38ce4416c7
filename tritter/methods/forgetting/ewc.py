"""EWC (Kirkpatrick et al. 2017, arXiv 1612.00796): hold each weight as firmly as it mattered.

½ λ Σ F (θ − θ*)², where F is the diagonal Fisher of the old domains at the weights that the
training starts from. λ multiplies the raw per-sequence Fisher of the mean token loss, with the ½
that the original has and many copies drop; `normalise=mean` divides F by its mean in the model
before the expansion, so that one λ means the same for models of different size, and for a model
and what it grows into.

F comes through the expansion by the parameter map, by which all that is new is free, or is taken
at the grown model, where new directions that write have a gradient. What new rows compute has
none at first, and drifts until it matters: F is taken again while the model trains, and the
larger of the two stands, entry by entry; θ* stays.

When to use: some old text may be kept, and not be trained on. Cost: passes over it, two copies of
the weights (four while F is taken), one pass over them per step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from tritter.core.families import forward_flops, training_flops
from tritter.data.packing import document_mask_of, lengths_of
from tritter.errors import TritterError
from tritter.methods.forgetting.quadratic import (
    QuadraticPenalty,
    diagonal_fisher,
    mean_over,
    placed_like,
    shared_fisher,
)
from tritter.options import Count, options
from tritter.training import Needs, Preparation, Prepared, Task

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tritter.transform import Change

_PURPOSE = "fisher"  # of the draw that the first Fisher and all later ones share
KINDS = {"diagonal": "fisher", "penalty_preserving": "fisher_penalty"}


@options
class EWCOptions:
    """How firm the pull is, and how its Fisher is estimated."""

    ewc_lambda: Annotated[float, Field(ge=0)] = 3e3
    normalise: Literal["none", "mean"] = "none"
    estimator: Literal["empirical", "true"] = "empirical"
    num_sequences: Count = 256
    carry: Literal["diagonal", "penalty_preserving"] = "diagonal"
    at: Literal["auto", "carried", "expanded"] = "auto"
    refresh_steps: Count | None = 10


class EWC(QuadraticPenalty):
    """Elastic weight consolidation.

    Args:
        ewc_lambda: λ.
        normalise: `none` or `mean`.
        estimator: `empirical` or `true`, see `fisher`.
        num_sequences: that the Fisher is averaged over.
        carry: through an expansion, `diagonal` or `penalty_preserving`.
        at: which Fisher a training starts with: `carried`, `expanded` (taken at the model that is
            trained), or `auto`: the larger of both where new entries are not zero, else carried.
        refresh_steps: the Fisher is taken again after so many steps, twice as many, and so on;
            None: never.
    """

    name = "ewc"
    Options = EWCOptions
    importance_key = "fisher"

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.strength, self.kind = self.options.ewc_lambda, KINDS[self.options.carry]
        self._carried: Mapping[str, Tensor] = {}
        self._scale = 1.0

    @classmethod
    def needs(cls, options: Any) -> Needs:
        is_carried = options.at != "expanded" or options.normalise == "mean"
        return Needs(
            old_text=True,
            prepares=(KINDS[options.carry],) if is_carried else (),
            carried=options.at == "auto",
            copies=2,
        )

    def prepare(self, given: Preparation) -> Prepared:
        """Take the Fisher at the weights before the expansion."""
        domains = self._fisher_domains(given, given.domains)
        chosen = given.draw(self.options.num_sequences, _PURPOSE, domains=domains)
        given.say(f"Fisher of {len(chosen)} sequences of {', '.join(domains)}")
        fisher = diagonal_fisher(
            given.model, chosen, estimator=self.options.estimator, progress=given.progress
        )
        return Prepared(
            state={self.kind: fisher},
            flops=self._flops(given.model, chosen),
            found={"sequences": len(chosen)},
        )

    def importance_on(self, model: nn.Module, batches: Iterable[Tensor]) -> Mapping[str, Tensor]:
        """Return the Fisher information, divided by its mean under `normalise=mean`."""
        estimate = partial(diagonal_fisher, model, estimator=self.options.estimator)
        fisher = mean_over(batches, estimate)
        scale = mean_importance(fisher) if self.options.normalise == "mean" else 1.0
        return {name: value / scale for name, value in fisher.items()}

    def begin_task(self, model: nn.Module, task: Task) -> None:
        import torch

        at, fisher = self.options.at, task.state.get(self.kind)
        if fisher is None and at != "expanded":
            raise TritterError(
                f"forgetting={self.name} was given no Fisher information of the old domains."
            )
        self._carried = task.carried
        if self.options.normalise == "mean":
            # Before the expansion: copies and new entries don't move it
            self._scale = mean_importance(task.state_before[self.kind])
        given = {} if fisher is None or at == "expanded" else fisher
        importance = {name: value / self._scale for name, value in given.items()}
        if at != "carried" or self.options.refresh_steps is not None:
            # What has no Fisher yet may get one: its anchor is where it begins
            free = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
            importance = {**free, **importance}
            domains = self._fisher_domains(task, tuple(task.old_sequences))
            self._sequences = task.draw(self.options.num_sequences, _PURPOSE, domains=domains)
        self.hold(model, importance)

    def _fisher_domains(self, of: Preparation | Task, domains: tuple[str, ...]) -> tuple[str, ...]:
        """Return the old domains that each Fisher, the first and the later ones, is taken on."""
        return domains

    def look(self, model: nn.Module, step: int) -> float:
        import torch

        if step == 0:  # before anything but the expansion changed the model
            at = self.options.at
            is_due = at == "expanded" or (at == "auto" and has_new_values(model, self._carried))
        else:
            times, rest = divmod(step, self.options.refresh_steps or step + 1)
            is_due = rest == 0 and times.bit_count() == 1
        if not is_due:
            return 0.0
        taken = shared_fisher(model, self._sequences, estimator=self.options.estimator)
        for name, held in self.importance.items():
            torch.maximum(held, self._looked(name, taken[name] / self._scale).to(held), out=held)
        return self._flops(model, self._sequences)

    def _looked(self, name: str, fisher: Tensor) -> Tensor:
        """Return the importance that a parameter has by the Fisher of a look alone."""
        return fisher

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "scale": self._scale}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._scale = float(state.get("scale", self._scale))

    def _flops(self, model: nn.Module, sequences: Tensor) -> float:
        """Return what the gradients of a training step take, and no update."""
        from tritter.core.models import config_of  # transformers, which a refusal does not wait for

        config = config_of(model)
        flops = training_flops(config)
        if self.options.estimator == "true":  # labels take a pass of their own
            flops += forward_flops(config)
        return flops.of_all(lengths_of(document_mask_of(model), sequences))


def has_new_values(model: nn.Module, carried: Mapping[str, Tensor]) -> bool:
    """Say whether entries that carry nothing old are other than zero: they may come to write."""
    return any(
        bool(p.detach()[~carried[n].to(p.device)].any()) for n, p in model.named_parameters()
    )


def mean_importance(importance: Mapping[str, Tensor]) -> float:
    """Return the mean over all entries of all parameters, in float64.

    Raises:
        TritterError: all of them are zero.
    """
    import torch

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
        batches = (batch["input_ids"] for batch in dataloader)
        self.fisher = mean_over(batches, partial(diagonal_fisher, model))
        if not self.fisher:
            raise TritterError("ElasticWeightConsolidation: the dataloader yields no sequence.")
        self.optimal_params = {n: p.detach().clone() for n, p in model.named_parameters()}

    def penalty(self) -> Tensor:
        """Return ½ λ Σ F (θ − θ*)², a scalar to add to the loss."""
        import torch

        terms = [
            (self.fisher[name] * (parameter - self.optimal_params[name]).square()).sum()
            for name, parameter in self.model.named_parameters()
        ]
        return 0.5 * self.lambda_ewc * torch.stack(terms).sum()


# Online EWC (Schwarz et al. 2018, arXiv 1805.06370, section 4): one Fisher for all earlier tasks.
#
# ½ λ Σ F (θ − θ*)² with F = γ F_earlier + F_latest and θ* the latest weights: what an earlier
# training held its weights by is kept beside what it trained, decays, and the Fisher of the task
# that it trained on is added. So text of the latest task alone is needed; of the first training,
# that of all old domains. (The paper multiplies the sum by γ once more in the penalty; here one
# task is EWC.)
#
# When to use: task after task is trained, and text of those before the latest is gone. Cost: that
# of EWC, with one more copy of the weights.


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

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.kept_kind = kept_kind(self.kind, self.options.normalise)
        self._earlier: dict[str, Tensor] = {}  # γ F_earlier

    @classmethod
    def needs(cls, options: Any) -> Needs:
        needs, kind = super().needs(options), kept_kind(KINDS[options.carry], options.normalise)
        return replace(needs, state=(kind,), leaves=(kind,), copies=needs.copies + 1)

    def begin_task(self, model: nn.Module, task: Task) -> None:
        import torch

        kept = task.state.get(self.kept_kind, {})
        parameters = dict(model.named_parameters())
        gamma = self.options.gamma
        self._earlier = {n: (gamma * value).to(parameters[n]) for n, value in kept.items()}
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
        return of.latest or domains if self.kept_kind in of.state else domains

    def _looked(self, name: str, fisher: Tensor) -> Tensor:
        earlier = self._earlier.get(name)
        return fisher if earlier is None else fisher + earlier

    def parameters_changed(self, change: Change) -> None:
        super().parameters_changed(change)
        self._earlier = change.state(self.kept_kind, self._earlier)

    def end_task(self, model: nn.Module) -> Mapping[str, Mapping[str, Tensor]]:
        return {self.kept_kind: self.importance}

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "earlier": self._earlier}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._earlier = placed_like(self._earlier or self.anchor, state["earlier"])


def kept_kind(kind: str, normalise: str) -> str:
    """Return the kind of state that is kept from task to task: one for each unit and rule."""
    return f"online_{kind}_mean" if normalise == "mean" else f"online_{kind}"
