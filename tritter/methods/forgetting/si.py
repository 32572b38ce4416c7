"""Synaptic intelligence (Zenke et al. 2017, arXiv 1703.04200): hold what did the learning.

c Σ Ω (θ − θ*)², without a half (eq. 4). Ω is the sum over earlier tasks of ω / (Δ² + ξ) (eq. 5),
where ω is how much of the fall of a task's loss a weight did and Δ how far it came in that task;
where ω is negative it counts as zero. What ω of the present training sees is the new text's
next-token loss alone: with side losses, losses of other methods or replayed rows in the batch that
loss is taken once more by itself, at the cost of a pass over the new rows.

ω and Δ of the latest task follow an expansion each by its rule, and Ω is computed of what comes of
them; that of earlier tasks follows as what both make of it. What is new is free.

Of a model whose path nobody recorded Ω is estimated: where the loss is quadratic and at its
minimum, ω / Δ² is half of the Hessian's diagonal, for which the Fisher of old text stands.

When to use: no old text is at hand, and the model's own training was recorded. Cost: five copies of
the weights, a few passes over them per step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from tritter.data.batches import this_rank
from tritter.data.packing import (
    IGNORED,
    document_mask_of,
    forward_options,
    labels_of,
    lengths_of,
    lengths_read,
)
from tritter.errors import RequestError, TritterError
from tritter.methods.forgetting.quadratic import QuadraticPenalty, diagonal_fisher, mean_over
from tritter.options import Count, options
from tritter.training import Needs, Preparation, Prepared, Task, Values

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tritter.transform import Change


@options
class SIOptions:
    """How firm the pull is, and what keeps Ω finite."""

    si_lambda: Annotated[float, Field(ge=0)] = 5.0
    xi: Annotated[float, Field(gt=0)] = 1e-4
    num_sequences: Count = 256


class SI(QuadraticPenalty):
    """Synaptic intelligence.

    Args:
        si_lambda: c.
        xi: ξ, in squared units of a weight.
        num_sequences: of old text that Ω is estimated on where no path was recorded.
    """

    name = "si"
    Options = SIOptions
    kind = "si_importance"
    importance_key = "si_importance"

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.strength = 2 * self.options.si_lambda  # of a penalty with a half
        self.path = WeightPath(start={})
        self._own: dict[str, Tensor] | None = None  # gradient of the new rows, their loss summed up
        self._own_tokens, self._own_lengths = 0.0, Counter[int]()
        self._flops = 0.0

    @classmethod
    def needs(cls, options: Any) -> Needs:
        kinds = (*RECORDED, cls.kind)
        return Needs(
            old_text=True,
            instead=RECORDED,
            prepares=(cls.kind,),
            state=kinds,
            leaves=kinds,
            copies=5,
        )

    def prepare(self, given: Preparation) -> Prepared:
        """Pass on Ω of the tasks before the latest, or estimate that of all."""
        if all(kind in given.state for kind in RECORDED):
            return Prepared(state={self.kind: given.state.get(self.kind, {})})
        from tritter.training.parameters import flops_of_sequence  # transformers, for no refusal

        if not given.domains:
            raise RequestError(
                "data.old = null: nobody recorded the path of this model's training, and si "
                "estimates it on old text; name it, or choose forgetting=l2sp."
            )
        chosen = given.draw(self.options.num_sequences, "si")
        fisher = diagonal_fisher(
            given.model, chosen, seed=given.seed("si"), progress=given.progress
        )
        return Prepared(
            state={self.kind: estimated_importance(fisher, length=chosen.shape[1])},
            flops=flops_of_sequence(given.model).of_all(
                lengths_of(document_mask_of(given.model), chosen)
            ),
            notes=(
                "si: no path of its training lies beside the model; its importances are estimated "
                f"on {len(chosen)} sequences of {', '.join(given.domains)}.",
            ),
        )

    def importance_on(self, model: nn.Module, batches: Iterable[Tensor]) -> Values:
        """Return Ω as old data estimates it, where no path of a training was recorded."""

        def estimate(sequences: Tensor) -> Values:
            fisher = diagonal_fisher(model, sequences)
            return estimated_importance(fisher, length=sequences.shape[1])

        return mean_over(batches, estimate)

    def begin_task(self, model: nn.Module, task: Task) -> None:
        omega, moved = (task.state.get(kind, {}) for kind in RECORDED)
        importance = dict(task.state.get(self.kind, {}))
        for name, latest in recorded_importance(omega, moved, xi=self.options.xi).items():
            importance[name] = importance.get(name, 0) + latest
        if not importance:
            raise TritterError("forgetting=si was given no path of an earlier training.")
        self.hold(model, importance)
        self.path = WeightPath(start=self.anchor)

    def observe_batch(self, model: nn.Module, batch: Mapping[str, Tensor]) -> None:
        """Add the gradient of the new rows' loss to what the step is to be seen by."""
        import torch
        from torch import nn

        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if self._own is None:
            self._own = {name: torch.zeros_like(p) for name, p in trained.items()}
        is_new = ~batch["is_replay"]
        rows, reading = batch["input_ids"][is_new], forward_options(batch, is_new)  # [B, T]
        self._own_lengths.update(lengths_read(model, rows, reading.get("attention_mask")))
        labels = batch["labels"][is_new] if "labels" in batch else labels_of(model, rows)
        targets = labels[:, 1:]  # [B, T - 1]
        # Batches count by what is to be predicted of them
        weight = float((targets != IGNORED).sum())
        if not weight:
            return
        logits = model(input_ids=rows, use_cache=False, **reading).logits[:, :-1].float()
        loss = nn.functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED
        )
        taken = torch.autograd.grad(loss * weight, list(trained.values()), materialize_grads=True)
        torch._foreach_add_([self._own[name] for name in trained], list(taken))
        self._own_tokens += weight

    def observe_gradients(self, model: nn.Module) -> None:
        import torch
        from torch import distributed

        from tritter.training.parameters import flops_of_sequence  # likewise

        if self._own is None:
            self.path.before_step(model)
            return
        tokens = self._own_tokens
        if this_rank().count > 1:
            device = next(iter(self._own.values())).device
            summed = torch.tensor(tokens, dtype=torch.float32, device=device)
            for value in (summed, *self._own.values()):
                distributed.all_reduce(value)
            tokens = float(summed)
        for value in self._own.values():
            value.div_(tokens or 1)
        self.path.before_step(model, self._own)
        self._flops = flops_of_sequence(model).of_all(self._own_lengths)
        self._own, self._own_tokens = None, 0.0
        self._own_lengths.clear()

    def look(self, model: nn.Module, step: int) -> float:
        self.path.after_step(model)
        flops, self._flops = self._flops, 0.0
        return flops

    def parameters_changed(self, change: Change) -> None:
        start = change.state("anchor", self.anchor)  # of what has no importance too
        super().parameters_changed(change)
        self.anchor = start
        self.path.parameters_changed(change, start=start)

    def end_task(self, model: nn.Module) -> Mapping[str, Values]:
        self.path.take_up(model)
        return {
            PATH_INTEGRAL: self.path.path_integral,
            DISPLACEMENT: self.path.displacement(model),
            self.kind: self.importance,
        }

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), PATH_INTEGRAL: self.path.path_integral}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.path = WeightPath(start=self.anchor, path_integral=state[PATH_INTEGRAL])


def recorded_importance(path_integral: Values, displacement: Values, *, xi: float) -> Values:
    """Return max(ω, 0) / (Δ² + ξ) of one task, by the names that both have."""
    return {
        name: omega.clamp(min=0) / (displacement[name].square() + xi)
        for name, omega in path_integral.items()
        if name in displacement
    }


def estimated_importance(fisher: Values, *, length: int) -> Values:
    """Return half of the Hessian's diagonal as the Fisher of single sequences tells it.

    Args:
        fisher: mean of the squared gradients of the sequences' mean losses: at a minimum the
            gradients of single tokens are about independent, so that it is a (T - 1)-th of theirs.
        length: T.
    """
    return {name: value * (0.5 * (length - 1)) for name, value in fisher.items()}


# The way that the weights of a training go, and how much of the fall of a loss each did.
#
# ω = Σ −g·Δθ over the steps of a training (Zenke et al. 2017, arXiv 1703.04200, eq. 3), where g
# is the gradient at the start of a step.
PATH_INTEGRAL, DISPLACEMENT = "path_integral", "displacement"
RECORDED = (PATH_INTEGRAL, DISPLACEMENT)  # kinds of state: ω, and Δ, how far each weight came


class WeightPath:
    """The way that the weights of one training go.

    Args:
        start: parameter name → weights that it began with; what is absent is taken from the model
            when it is first seen.
        path_integral: parameter name → ω so far.
    """

    def __init__(
        self, *, start: dict[str, Tensor], path_integral: Mapping[str, Tensor] | None = None
    ) -> None:
        self.start = start
        self.path_integral = dict(path_integral or {})
        self._before: dict[str, Tensor] = {}  # room for the weights before a step
        self._gradients: dict[str, Tensor] = {}  # room for those of a step
        self._pending: tuple[str, ...] = ()  # what has a gradient in the step that is taken

    def before_step(self, model: nn.Module, gradients: Mapping[str, Tensor] | None = None) -> None:
        """Take the gradients of a step that is about to be taken.

        Args:
            gradients: by parameter name; None: those that the parameters hold.
        """
        import torch
        from torch import nn

        with torch.no_grad():
            self.take_up(model)
            if gradients is None:
                held = ((name, p.grad) for name, p in model.named_parameters())
                gradients = {name: gradient for name, gradient in held if gradient is not None}
            given = list(gradients.values())
            # A step that is not finite is refused, and moves nothing
            is_finite = bool(torch.isfinite(nn.utils.get_total_norm(given)))
            self._pending = tuple(gradients) if is_finite else ()
            for name in gradients.keys() - self._gradients.keys():
                self._gradients[name] = torch.empty_like(self._before[name])
            if self._pending:
                torch._foreach_copy_([self._gradients[name] for name in gradients], given)
                torch._foreach_copy_(
                    [self._before[name] for name in gradients], self._weights(model)
                )

    def after_step(self, model: nn.Module) -> None:
        """Add the step's −g·Δθ; nothing where none was taken."""
        import torch

        with torch.no_grad():
            if self._pending:
                moved = [self._before[name] for name in self._pending]
                torch._foreach_sub_(moved, self._weights(model))  # −Δθ
                omega = [self.path_integral[name] for name in self._pending]
                torch._foreach_addcmul_(omega, [self._gradients[n] for n in self._pending], moved)
            self._pending = ()

    def _weights(self, model: nn.Module) -> list[Tensor]:
        """Return the weights of what has a gradient in the step."""
        held: dict[str, Tensor] = dict(model.named_parameters())
        return [held[name] for name in self._pending]

    def take_up(self, model: nn.Module) -> None:
        """Begin for what is trained and was not met before."""
        import torch

        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad and name not in self._before:
                    wide = torch.promote_types(parameter.dtype, torch.float32)
                    self._before[name] = torch.empty_like(parameter, dtype=wide)
                    start = self.start.get(name)
                    self.start[name] = parameter.clone() if start is None else start.to(parameter)
                    omega = self.path_integral.get(name, torch.zeros_like(parameter))
                    self.path_integral[name] = omega.to(self._before[name])

    def displacement(self, model: nn.Module) -> dict[str, Tensor]:
        """Return Δ by parameter name: how far each weight is from where it began."""
        return {
            name: p.detach().to(self.path_integral[name]) - self.start[name]
            for name, p in model.named_parameters()
            if name in self.path_integral
        }

    def parameters_changed(self, change: Change, *, start: dict[str, Tensor]) -> None:
        """Follow a change of the live model; what is new has done nothing yet.

        Args:
            start: where the weights that are there then began.
        """
        self.start = start
        self.path_integral = change.state(PATH_INTEGRAL, self.path_integral)
        self._before, self._gradients, self._pending = {}, {}, ()
