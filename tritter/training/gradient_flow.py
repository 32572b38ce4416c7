"""Monitor that every trainable parameter receives a gradient.

Each step only checks parameters without a gradient so far, usually none after the first few steps.
An expert only has a gradient from the tokens routed to it.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn

from tritter.data.packing import labels_of
from tritter.evaluation.gate import Check
from tritter.training.module import base_of
from tritter.training.parameters import full_tensor, live_layout
from tritter.transform import Change

_TRIAL_RATE = 1e-4
_CLOSELY = 16  # steps after the start or a change that are all checked

# Parameter name → for each dimension, bool [size], the coordinates that an expansion has added
NewUnits = Mapping[str, tuple[Tensor | None, ...]]


@dataclass(slots=True)
class _Waiting:
    """The part of a parameter without a gradient so far.

    Args:
        dims: Dimension → bool [size], coordinates without a gradient. Empty: the parameter as a
            whole.
        since: Step from which it has been trained.
        is_done: Whether all of it had a gradient.
    """

    dims: dict[int, Tensor]
    since: int
    is_done: bool = False

    def observe(self, values: Tensor) -> None:
        """Mark the coordinates with nonzero values as done."""
        found = full_tensor(values.detach()) != 0
        for dim, pending in self.dims.items():
            others = [each for each in range(found.ndim) if each != dim]
            reached = found.any(dim=others) if others else found
            pending &= ~reached.cpu()
        self.is_done = not any(map(bool, map(torch.any, self.dims.values())))
        self.is_done &= bool(self.dims) or bool(found.any())


class GradientFlow(Callback):
    """Record of parameters, experts and new coordinates of a model without a gradient so far.

    In a training run, it must precede callbacks that change the gradients.

    Args:
        new: Coordinates that the expansion has added.
    """

    def __init__(self, new: NewUnits) -> None:
        self._new = new
        self._waiting: dict[str, _Waiting] = {}
        self._changed: set[str] = set()  # parameters changed since the start of training
        self._restored: dict[str, Any] = {}
        self._step = 0
        self._closely_until = _CLOSELY

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Any
    ) -> None:
        step = trainer.global_step
        is_logged = (step + 1) % trainer.log_every_n_steps == 0  # type: ignore[attr-defined]
        is_checked = step < self._closely_until or is_logged
        self.check(base_of(pl_module).model, step=step, is_checked=is_checked)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module = base_of(pl_module)
        if not trainer.optimizers:
            return
        (optimizer,) = trainer.optimizers
        experts = {stored.name for stored in live_layout(module.model) if stored.is_of_experts}
        for name in experts & self._waiting.keys():
            parameter = module.model.get_parameter(name)
            for value in optimizer.state.get(parameter, {}).values():
                is_like = isinstance(value, Tensor) and value.shape == parameter.shape
                if is_like and not self._waiting[name].is_done:
                    self._waiting[name].observe(value)  # tokens of steps that were not checked

    def check(self, model: nn.Module, *, step: int, is_checked: bool = True) -> None:
        """Check the gradients of a step.

        Args:
            model: Model in training.
            step: Number of the step, from 0.
            is_checked: Whether to check the gradients, or only count the step.
        """
        self._enter(model, step)
        self._step = step + 1
        for name, waiting in self._waiting.items() if is_checked else ():
            if not waiting.is_done and (gradient := model.get_parameter(name).grad) is not None:
                waiting.observe(gradient)

    def report(self, model: nn.Module, *, enough: int = Check.ENOUGH_STEPS) -> dict[str, Any]:
        """Return the names of parameters and experts without a gradient.

        Args:
            model: Model in training.
            enough: Minimum number of steps without a gradient.

        Returns:
            `without_gradient`: parameters and parts of them, `without_tokens`: experts, `steps`:
            number of steps.
        """
        self._enter(model, self._step)  # a run resumed from its last step has checked nothing
        parameters, experts = list[str](), dict[str, None]()
        for stored in live_layout(model):
            waiting = self._waiting.get(stored.name)
            if waiting is None or waiting.is_done or self._step - waiting.since < enough:
                continue
            if stored.is_of_experts:
                by_index = {part.index[0]: part.tensor for part in stored.parts}
                for index in waiting.dims[0].nonzero()[:, 0]:
                    tensor = by_index[int(index)]
                    experts[f"layers.{tensor.layer}.experts.{tensor.expert}"] = None
                continue
            parts = [
                f"{int(pending.sum())} new of {pending.numel()} along dimension {dim}"
                for dim, pending in waiting.dims.items()
                if pending.any()
            ]
            parameters.append(f"{stored.name} ({', '.join(parts)})" if parts else stored.name)
        return {
            "steps": self._step,
            "without_gradient": parameters,
            "without_tokens": list(experts),
        }

    def parameters_changed(self, change: Change) -> None:
        """Restart the check of all changed parameters."""
        changed = {*(stored.name for stored in change.altered), *change.removed}
        new = change.new_units()
        self._new = {**self._new, **{name: new.get(name, ()) for name in changed}}
        self._changed |= changed
        self._closely_until = self._step + _CLOSELY
        for name in changed:
            self._waiting.pop(name, None)

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self._step,
            "closely_until": self._closely_until,
            "waiting": {name: asdict(each) for name, each in self._waiting.items()},
            "new": {name: self._new.get(name, ()) for name in sorted(self._changed)},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._step, self._restored = int(state_dict["step"]), dict(state_dict["waiting"])
        self._closely_until = int(state_dict["closely_until"])
        self._changed = set(state_dict["new"])
        self._new = {**self._new, **state_dict["new"]}

    def _enter(self, model: nn.Module, step: int) -> None:
        """Start the check of parameters that have become trainable."""
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        if trained.keys() <= self._waiting.keys():
            return
        for stored in live_layout(model):
            if stored.name not in trained or stored.name in self._waiting:
                continue
            if (restored := self._restored.pop(stored.name, None)) is not None:
                entered = _Waiting(**restored)
            elif stored.is_of_experts:
                entered = _Waiting({0: torch.ones(stored.shape[0], dtype=torch.bool)}, step)
            else:
                flags = enumerate(self._new.get(stored.name, ()))
                entered = _Waiting({d: each.clone() for d, each in flags if each is not None}, step)
            self._waiting[stored.name] = entered


def run_trial_steps(
    model: nn.Module, input_ids: Tensor, new: NewUnits, *, steps: int
) -> dict[str, Any]:
    """Train a model for a few trial steps and return the result of `GradientFlow.report`.

    A step moves each parameter against the sign of its gradient, like Adam's first step, but
    without storing moments.

    Args:
        model: Model to train; its weights change.
        input_ids: Batch for every step, int64 [B, T], on the device of the model.
        new: Coordinates that the expansion has added.
        steps: Number of steps.
    """
    parameters = list(model.parameters())
    flow = GradientFlow(new)
    model.train()
    with torch.random.fork_rng():
        torch.manual_seed(0)  # the same dropout in each call
        for step in range(steps):
            labels = labels_of(model, input_ids)
            loss = model(input_ids=input_ids, labels=labels, use_cache=False).loss
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            del gradients  # now owned by the parameters
            flow.check(model, step=step)
            with torch.no_grad():
                for parameter in parameters:
                    if parameter.grad is not None:
                        parameter.add_(parameter.grad.sign_(), alpha=-_TRIAL_RATE)
                        parameter.grad = None
    return flow.report(model, enough=steps)
