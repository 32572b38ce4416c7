"""Synaptic intelligence (Zenke et al. 2017, arXiv 1703.04200): anchor what drove earlier learning.

c Σ Ω (θ − θ*)², without a factor ½ (eq. 4). Ω is the sum over earlier tasks of ω / (Δ² + ξ)
(eq. 5). ω is the contribution of a weight to the fall of a task's loss, and Δ its displacement
during that task; a negative ω counts as zero. During the current run, ω is computed from the
next-token loss of the new data alone. With side losses, losses of other methods or replayed rows in
the batch, that loss is computed separately, at the cost of one more pass over the new rows.

An expansion maps ω and Δ of the latest task each by its own rule, and Ω is computed from the mapped
values; Ω of earlier tasks is mapped like their ratio. New weights are free.

If no path was recorded for a model, Ω is estimated: where the loss is quadratic and at its minimum,
ω / Δ² is half of the Hessian's diagonal, which the Fisher of old data approximates.

When to use: no old data is available, and the path of the model's own training was recorded.
Cost: five copies of the weights, a few passes over them per step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from tritter.data.batches import num_ranks
from tritter.data.packing import (
    IGNORED,
    DocumentMask,
    forward_options,
    labels_of,
    lengths_of,
    lengths_read,
)
from tritter.methods.forgetting.quadratic import QuadraticPenalty, diagonal_fisher, mean_over
from tritter.options import Count, options
from tritter.training import Needs, Preparation, Prepared, Task, Values

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tritter.transform import Change


@options
class SIOptions:
    """Strength of the penalty, and the damping that keeps Ω finite."""

    si_lambda: Annotated[float, Field(ge=0)] = 5.0
    xi: Annotated[float, Field(gt=0)] = 1e-4
    num_sequences: Count = 256


class SI(QuadraticPenalty):
    """Synaptic intelligence.

    Args:
        si_lambda: c.
        xi: ξ, in squared units of a weight.
        num_sequences: number of old sequences that Ω is estimated on if no path was recorded.
    """

    name = "si"
    Options = SIOptions
    kind = "si_importance"
    importance_key = "si_importance"

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.strength = 2 * self.options.si_lambda  # the base class has a factor ½
        self.path = WeightPath(start={})
        self._own: dict[str, Tensor] | None = None  # gradient of the new rows' summed loss
        self._own_tokens, self._own_lengths = 0.0, Counter[int]()
        self._flops = 0.0

    @classmethod
    def needs(cls, options: Any) -> Needs:
        kinds = (*WeightPath.kinds, cls.kind)
        return Needs(
            old_text=True,
            instead=WeightPath.kinds,
            prepares=(cls.kind,),
            state=kinds,
            leaves=kinds,
            copies=5,
        )

    def prepare(self, preparation: Preparation) -> Prepared:
        """Pass on Ω of all tasks before the latest, or estimate Ω of all tasks."""
        if all(kind in preparation.state for kind in WeightPath.kinds):
            return Prepared(state={self.kind: preparation.state.get(self.kind, {})})
        from tritter.training.parameters import (
            flops_of_sequence,
        )  # imports transformers, so not at the top

        chosen = preparation.draw(self.options.num_sequences, "si")
        fisher = diagonal_fisher(
            preparation.model, chosen, seed=preparation.seed("si"), progress=preparation.progress
        )
        return Prepared(
            state={self.kind: _estimated_importance(fisher, length=chosen.shape[1])},
            flops=flops_of_sequence(preparation.model).of_all(
                lengths_of(DocumentMask.of(preparation.model), chosen)
            ),
            notes=(
                "si: no path was recorded for this model; its importances are estimated "
                f"on {preparation.sequences_text(len(chosen))}.",
            ),
        )

    def importance_on(self, model: nn.Module, batches: Iterable[Tensor]) -> Values:
        """Return Ω as old data estimates it, where no path of a training was recorded."""

        def estimate(sequences: Tensor) -> Values:
            fisher = diagonal_fisher(model, sequences)
            return _estimated_importance(fisher, length=sequences.shape[1])

        return mean_over(batches, estimate)

    def begin_task(self, model: nn.Module, task: Task) -> None:
        omega, moved = (task.state.get(kind, {}) for kind in WeightPath.kinds)
        importance = dict(task.state.get(self.kind, {}))
        for name, latest in _recorded_importance(omega, moved, xi=self.options.xi).items():
            importance[name] = importance.get(name, 0) + latest
        assert importance, "`needs` asks for the path of an earlier training run"
        self.anchor_weights(model, importance)
        self.path = WeightPath(start=self.anchor)

    def observe_batch(self, model: nn.Module, batch: Mapping[str, Tensor]) -> None:
        """Add the gradient of the new rows' loss to the one that ω is computed from."""
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
        # Batches count in proportion to their predicted tokens
        weight = float((targets != IGNORED).sum())
        if not weight:
            return
        logits = model(input_ids=rows, use_cache=False, **reading).logits[:, :-1].float()
        loss = nn.functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED
        )
        row_gradients = torch.autograd.grad(
            loss * weight, list(trained.values()), materialize_grads=True
        )
        torch._foreach_add_([self._own[name] for name in trained], list(row_gradients))
        self._own_tokens += weight

    def observe_gradients(self, model: nn.Module) -> None:
        import torch
        from torch import distributed

        from tritter.training.parameters import flops_of_sequence  # imports transformers

        if self._own is None:
            self.path.before_step(model)
            return
        tokens = self._own_tokens
        if num_ranks() > 1:
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

    def observe_step(self, model: nn.Module, step: int) -> float:
        self.path.after_step(model)
        flops, self._flops = self._flops, 0.0
        return flops

    def parameters_changed(self, change: Change) -> None:
        start = change.state("anchor", self.anchor)  # of parameters without importance too
        super().parameters_changed(change)
        self.anchor = start
        self.path.parameters_changed(change, start=start)

    def end_task(self, model: nn.Module) -> Mapping[str, Values]:
        return {**self.path.recorded(model), self.kind: self.importance}

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "path_integral": self.path.path_integral}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.path = WeightPath(start=self.anchor, path_integral=state["path_integral"])


def _recorded_importance(path_integral: Values, displacement: Values, *, xi: float) -> Values:
    """Return max(ω, 0) / (Δ² + ξ) of one task, for the parameters that both have."""
    return {
        name: omega.clamp(min=0) / (displacement[name].square() + xi)
        for name, omega in path_integral.items()
        if name in displacement
    }


def _estimated_importance(fisher: Values, *, length: int) -> Values:
    """Return half of the Hessian's diagonal, approximated by the Fisher of single sequences.

    Args:
        fisher: mean squared gradient of the sequences' mean losses. At a minimum the gradients of
            single tokens are about independent, so it is 1 / (T - 1) of the per-token value.
        length: T.
    """
    return {name: value * (0.5 * (length - 1)) for name, value in fisher.items()}


class WeightPath:
    """The path of the weights during one training run: ω and Δ.

    ω = Σ −g·Δθ over its steps (eq. 3), where g is the gradient at the start of a step.

    Args:
        start: parameter name → initial weights; missing ones are read from the model when it is
            first seen.
        path_integral: parameter name → ω so far.
    """

    kinds = ("path_integral", "displacement")  # of state: ω and Δ

    def __init__(
        self, *, start: dict[str, Tensor], path_integral: Mapping[str, Tensor] | None = None
    ) -> None:
        self.start = start
        self.path_integral = dict(path_integral or {})
        self._before: dict[str, Tensor] = {}  # buffer for the weights before a step
        self._gradients: dict[str, Tensor] = {}  # buffer for the gradients of a step
        self._pending: tuple[str, ...] = ()  # parameters with a gradient in the current step

    def before_step(self, model: nn.Module, gradients: Mapping[str, Tensor] | None = None) -> None:
        """Store the weights and gradients of a step that is about to be taken.

        Args:
            gradients: by parameter name; None: the parameters' own `.grad`.
        """
        import torch
        from torch import nn

        with torch.no_grad():
            self.add_parameters(model)
            if gradients is None:
                named = ((name, p.grad) for name, p in model.named_parameters())
                gradients = {name: gradient for name, gradient in named if gradient is not None}
            values = list(gradients.values())
            # A step with a non-finite gradient is skipped and moves nothing
            is_finite = bool(torch.isfinite(nn.utils.get_total_norm(values)))
            self._pending = tuple(gradients) if is_finite else ()
            for name in gradients.keys() - self._gradients.keys():
                self._gradients[name] = torch.empty_like(self._before[name])
            if self._pending:
                torch._foreach_copy_([self._gradients[name] for name in gradients], values)
                torch._foreach_copy_(
                    [self._before[name] for name in gradients], self._weights(model)
                )

    def after_step(self, model: nn.Module) -> None:
        """Add the step's −g·Δθ; nothing if no step was taken."""
        import torch

        with torch.no_grad():
            if self._pending:
                moved = [self._before[name] for name in self._pending]
                torch._foreach_sub_(moved, self._weights(model))  # −Δθ
                omega = [self.path_integral[name] for name in self._pending]
                torch._foreach_addcmul_(omega, [self._gradients[n] for n in self._pending], moved)
            self._pending = ()

    def _weights(self, model: nn.Module) -> list[Tensor]:
        """Return the weights of the parameters that have a gradient in the step."""
        parameters: dict[str, Tensor] = dict(model.named_parameters())
        return [parameters[name] for name in self._pending]

    def add_parameters(self, model: nn.Module) -> None:
        """Add the trained parameters that were not seen before."""
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

    def recorded(self, model: nn.Module) -> dict[str, dict[str, Tensor]]:
        """Return ω and Δ at the end of training, kind of state → parameter name → values."""
        self.add_parameters(model)
        displacement = {
            name: p.detach().to(self.path_integral[name]) - self.start[name]
            for name, p in model.named_parameters()
            if name in self.path_integral
        }
        return dict(zip(self.kinds, (self.path_integral, displacement), strict=True))

    def parameters_changed(self, change: Change, *, start: dict[str, Tensor]) -> None:
        """Map the path through a change of the live model; new entries have no contribution yet.

        Args:
            start: initial values of the mapped weights.
        """
        self.start = start
        self.path_integral = change.state(self.kinds[0], self.path_integral)
        self._before, self._gradients, self._pending = {}, {}, ()
