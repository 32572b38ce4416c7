"""EWC (Kirkpatrick et al. 2017, arXiv 1612.00796): anchor each weight by its importance.

½ λ Σ F (θ − θ*)², where F is the diagonal Fisher of the old domains at the initial weights of the
run. λ multiplies the raw per-sequence Fisher of the mean token loss, with the ½ of the paper, which
many implementations drop. `normalise=mean` divides F by its mean in the model before the expansion,
so that one λ fits models of different sizes, and a model and its expansion.

F is either mapped through the expansion by the parameter map, which leaves all new entries free, or
computed at the expanded model, where new weights that write to the output have a gradient. Rows
that compute new features have no gradient at first and may drift until they matter. F is therefore
recomputed during training, and the entrywise maximum is used; θ* stays fixed.

When to use: some old data may be kept but not trained on. Cost: passes over the old data, two
copies of the weights (four while F is computed), one pass over the weights per step.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from tritter.core.families import forward_flops, training_flops
from tritter.data.batches import num_ranks, this_rank
from tritter.data.packing import DocumentMask, lengths_of
from tritter.errors import TritterError
from tritter.methods.forgetting.penalty import old_sequences
from tritter.methods.forgetting.quadratic import QuadraticPenalty, diagonal_fisher, mean_over
from tritter.options import Count, options
from tritter.training import Needs, Preparation, Prepared, Task

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tritter.transform import Change

_PURPOSE = "fisher"  # the first Fisher and all later ones share this sample
_KINDS = {"diagonal": "fisher", "penalty_preserving": "fisher_penalty"}


@options
class EWCOptions:
    """Strength of the penalty, and how its Fisher is estimated."""

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
        estimator: `empirical` or `true`, see `diagonal_fisher`.
        num_sequences: number of old sequences that the Fisher is averaged over.
        carry: rule that maps the Fisher through an expansion: `diagonal` or `penalty_preserving`.
        at: the initial Fisher: `carried` (mapped through the expansion), `expanded` (computed at
            the trained model), or `auto`: the maximum of both if new entries are nonzero, else
            carried.
        refresh_steps: recompute the Fisher after so many steps, twice as many, and so on;
            None: never.
    """

    name = "ewc"
    Options = EWCOptions
    importance_key = "fisher"

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.strength, self.kind = self.options.ewc_lambda, _KINDS[self.options.carry]
        self._carried: Mapping[str, Tensor] = {}
        self._scale = 1.0
        self._sequences: Tensor | None = None  # None without old data: nothing is refreshed

    @classmethod
    def needs(cls, options: Any) -> Needs:
        is_carried = options.at != "expanded" or options.normalise == "mean"
        kinds = (_KINDS[options.carry],) if is_carried else ()
        return Needs(
            old_text=True,
            instead=() if options.at == "expanded" else kinds,
            prepares=kinds,
            state=kinds,
            carried=options.at == "auto",
            copies=2 if options.refresh_steps is None else 4,  # a sum and a gradient, for a while
        )

    @classmethod
    def refreshes(cls, options: Any, max_steps: int) -> int:
        period = options.refresh_steps
        before_training = options.at != "carried"
        return before_training + (0 if period is None else (max_steps // period).bit_length())

    def prepare(self, preparation: Preparation) -> Prepared:
        """Compute the Fisher at the weights before the expansion.

        Without old data, the one that the checkpoint contains is passed on.
        """
        if not preparation.domains:
            return Prepared(
                state={self.kind: preparation.state[self.kind]},
                notes=(f"There is no old data: {self.name} uses the checkpoint's importances.",),
            )
        domains = self._fisher_domains(preparation, preparation.domains)
        chosen = preparation.draw(self.options.num_sequences, _PURPOSE, domains=domains)
        preparation.log(
            "how much each parameter matters for the old data: Fisher information of "
            + preparation.sequences_text(len(chosen), domains)
        )
        fisher = diagonal_fisher(
            preparation.model,
            chosen,
            estimator=self.options.estimator,
            progress=preparation.progress,
        )
        return Prepared(
            state={self.kind: fisher},
            flops=self._flops(preparation.model, chosen),
            found={"sequences": len(chosen)},
        )

    def importance_on(self, model: nn.Module, batches: Iterable[Tensor]) -> Mapping[str, Tensor]:
        """Return the Fisher information, divided by its mean under `normalise=mean`."""
        estimate = partial(diagonal_fisher, model, estimator=self.options.estimator)
        fisher = mean_over(batches, estimate)
        scale = _mean_importance(fisher) if self.options.normalise == "mean" else 1.0
        return {name: value / scale for name, value in fisher.items()}

    def begin_task(self, model: nn.Module, task: Task) -> None:
        import torch

        at, fisher = self.options.at, task.state.get(self.kind)
        assert fisher is not None or at == "expanded", "`needs` asks for the Fisher information"
        self._carried = task.carried
        if self.options.normalise == "mean":
            # Before the expansion, so that copies and new entries don't change it
            self._scale = _mean_importance(task.state_before[self.kind])
        mapped = {} if fisher is None or at == "expanded" else fisher
        importance = {name: value / self._scale for name, value in mapped.items()}
        is_refreshed = at != "carried" or self.options.refresh_steps is not None
        self._sequences = None
        if is_refreshed and task.old_sequences:
            # Parameters without Fisher may get one later; their anchor is the initial value
            free = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
            importance = {**free, **importance}
            domains = self._fisher_domains(task, tuple(task.old_sequences))
            self._sequences = task.draw(self.options.num_sequences, _PURPOSE, domains=domains)
        self.anchor_weights(model, importance)

    def _fisher_domains(self, of: Preparation | Task, domains: tuple[str, ...]) -> tuple[str, ...]:
        """Return the old domains that every Fisher, first or refreshed, is computed on."""
        return domains

    def observe_step(self, model: nn.Module, step: int) -> float:
        import torch

        if step == 0:  # only the expansion has changed the model
            at = self.options.at
            is_due = at == "expanded" or (
                at == "auto" and _has_nonzero_new_entries(model, self._carried)
            )
        else:
            times, rest = divmod(step, self.options.refresh_steps or step + 1)
            is_due = rest == 0 and times.bit_count() == 1
        if not is_due or self._sequences is None:
            return 0.0
        fisher = self._shared_fisher(model, self._sequences)
        for name, importance in self.importance.items():
            torch.maximum(
                importance,
                self._add_earlier(name, fisher[name] / self._scale).to(importance),
                out=importance,
            )
        return self._flops(model, self._sequences)

    def _shared_fisher(self, model: nn.Module, sequences: Tensor) -> dict[str, Tensor]:
        """Return `diagonal_fisher` of all sequences, computed in shares by all processes."""
        import torch
        from torch import distributed

        estimate = partial(diagonal_fisher, estimator=self.options.estimator)
        rank, count = this_rank(), num_ranks()
        if count == 1:
            return estimate(model, sequences)
        own = sequences[rank::count]
        total = {n: torch.zeros_like(p, dtype=torch.float32) for n, p in model.named_parameters()}
        if len(own):
            numbers = range(rank, len(sequences), count)
            total = estimate(model, own, numbers=numbers)
        for value in total.values():
            value.mul_(len(own) / len(sequences))
            distributed.all_reduce(value)
        return total

    def _add_earlier(self, name: str, fisher: Tensor) -> Tensor:
        """Return the importance of a parameter that a refreshed Fisher alone implies."""
        return fisher

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "scale": self._scale}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._scale = float(state.get("scale", self._scale))

    def _flops(self, model: nn.Module, sequences: Tensor) -> float:
        """Return the FLOPs of the gradients of a training step, without the update."""
        from tritter.core.models import model_of  # imports transformers, so not at the top

        whole = model_of(model)
        flops = training_flops(whole)
        if self.options.estimator == "true":  # sampling labels takes another forward pass
            flops += forward_flops(whole)
        return flops.of_all(lengths_of(DocumentMask.of(model), sequences))


def _has_nonzero_new_entries(model: nn.Module, carried: Mapping[str, Tensor]) -> bool:
    """Return True if new entries are nonzero, so that their outputs may matter."""
    return any(
        bool(p.detach()[~carried[n].to(p.device)].any()) for n, p in model.named_parameters()
    )


def _mean_importance(importance: Mapping[str, Tensor]) -> float:
    """Return the mean importance over all entries of all parameters, in float64."""
    import torch

    total, count = 0.0, 0
    for value in importance.values():
        total += float(value.sum(dtype=torch.float64))
        count += value.numel()
    if not total > 0:
        raise TritterError("the Fisher information is zero everywhere; it cannot be normalised.")
    return total / count


class ElasticWeightConsolidation:
    """EWC for your own training loop; in Tritter's, `EWC` does the same without a graph.

    Args:
        model: a causal language model with the weights that become the anchor.
        dataloader: yields batches of old data, `{"input_ids": integers [B, T]}`, with an
            `attention_mask` if they are padded.
        lambda_ewc: λ.

    Raises:
        RequestError: PEFT or DDP wraps the model, or its weights are sharded.
        TritterError: the loader yields nothing.
    """

    def __init__(
        self, model: nn.Module, dataloader: Iterable[Mapping[str, Tensor]], lambda_ewc: float = 1e3
    ) -> None:
        from tritter.core.models import refuse_wrapped  # imports transformers

        self.model = model = getattr(model, "_orig_mod", model)  # without torch.compile
        refuse_wrapped(model)
        self.lambda_ewc = lambda_ewc
        batches = old_sequences(dataloader, tokenizer=None, sequence_length=0, count=sys.maxsize)
        self.fisher = mean_over(batches, partial(diagonal_fisher, model))
        if not self.fisher:
            raise TritterError("ElasticWeightConsolidation: the dataloader yields no sequences.")
        self.optimal_params = {n: p.detach().clone() for n, p in model.named_parameters()}

    def penalty(self) -> Tensor:
        """Return ½ λ Σ F (θ − θ*)², a scalar to add to the loss."""
        import torch

        from tritter.core.models import refuse_wrapped  # imports transformers

        refuse_wrapped(self.model)  # may have been sharded since
        moved = ((n, p - self.optimal_params[n]) for n, p in self.model.named_parameters())
        # In float32: squares are too small for float16
        terms = [(self.fisher[name] * own * own).sum() for name, own in moved]
        return 0.5 * self.lambda_ewc * torch.stack(terms).sum()


# Online EWC (Schwarz et al. 2018, arXiv 1805.06370, section 4): one Fisher for all earlier tasks.
#
# ½ λ Σ F (θ − θ*)² with F = γ F_earlier + F_latest and θ* the latest weights. The Fisher of earlier
# tasks is saved with the trained model and decays by γ with each task; the Fisher of the latest
# task is added to it. Only data of the latest task is needed; the first run needs data of all old
# domains. (The paper multiplies the sum by γ once more in the penalty; here the first task equals
# EWC.)
#
# When to use: tasks are trained in sequence, and only data of the latest one is available. Cost:
# that of EWC, with one more copy of the weights.


@options
class OnlineEWCOptions(EWCOptions):
    """Options of EWC, and the decay of the Fisher of earlier tasks."""

    gamma: Annotated[float, Field(ge=0, le=1)] = 1.0


class OnlineEWC(EWC):
    """EWC across a sequence of tasks.

    Args:
        gamma: γ, the factor by which the earlier Fisher decays with each further task.
        ewc_lambda, normalise, estimator, num_sequences, carry, at, refresh_steps: as in `EWC`;
            each task's own Fisher is normalised, and refreshed values are compared with it.
    """

    name = "online_ewc"
    Options = OnlineEWCOptions

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.saved_kind = _saved_kind(self.kind, self.options.normalise)
        self._earlier: dict[str, Tensor] = {}  # γ F_earlier

    @classmethod
    def needs(cls, options: Any) -> Needs:
        needs, kind = super().needs(options), _saved_kind(_KINDS[options.carry], options.normalise)
        return replace(needs, instead=(), state=(kind,), leaves=(kind,), copies=needs.copies + 1)

    def begin_task(self, model: nn.Module, task: Task) -> None:
        kept = task.state.get(self.saved_kind, {})
        parameters = dict(model.named_parameters())
        gamma = self.options.gamma
        self._earlier = {n: (gamma * value).to(parameters[n].device) for n, value in kept.items()}
        super().begin_task(model, task)
        total = dict(self._earlier)
        for name, value in total.items():
            latest = self.importance.get(name)
            # A run that has grown and resumes loads its own state after this, of other shapes
            if latest is not None and latest.shape == value.shape:
                total[name] = value + latest
        self.anchor_weights(model, total)

    def _fisher_domains(self, of: Preparation | Task, domains: tuple[str, ...]) -> tuple[str, ...]:
        """Return the domains of the latest task; all if no earlier run saved a Fisher."""
        return of.latest or domains if self.saved_kind in of.state else domains

    def _add_earlier(self, name: str, fisher: Tensor) -> Tensor:
        earlier = self._earlier.get(name)
        return fisher if earlier is None else fisher + earlier

    def parameters_changed(self, change: Change) -> None:
        super().parameters_changed(change)
        self._earlier = change.state(self.saved_kind, self._earlier)

    def end_task(self, model: nn.Module) -> Mapping[str, Mapping[str, Tensor]]:
        return {self.saved_kind: self.importance}

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "earlier": self._earlier}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._earlier = self._to_device(state["earlier"])


def _saved_kind(kind: str, normalise: str) -> str:
    """Return the kind of state that is saved between tasks, one for each unit and rule."""
    return f"online_{kind}_mean" if normalise == "mean" else f"online_{kind}"
