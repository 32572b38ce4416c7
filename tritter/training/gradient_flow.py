"""Whether every parameter that is trained got a gradient, watched until it did.

A step looks at those alone that none has reached yet, which after the first few are none. An expert
gets one from the tokens alone that it is sent.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn

from tritter.data.packing import labels_of
from tritter.evaluation.gate import ENOUGH_STEPS
from tritter.training.module import base_of
from tritter.training.parameters import live_layout, whole
from tritter.transform import Change

_TRIAL_RATE = 1e-4
_CLOSELY = 16  # steps, from the first and from a change, that are looked at one by one

# By parameter: along each dimension, bool [size], which coordinates no weight stood in before
NewUnits = Mapping[str, tuple[Tensor | None, ...]]


@dataclass(slots=True)
class _Waiting:
    """What of one parameter had no gradient yet.

    Args:
        dims: dimension → bool [size], coordinates of it; without any the whole is waited for.
        since: the step from which it has been trained.
    """

    dims: dict[int, Tensor]
    since: int
    is_done: bool = False

    def see(self, values: Tensor) -> None:
        """Take off what has a value that is not zero."""
        found = whole(values.detach()) != 0
        for dim, pending in self.dims.items():
            others = [each for each in range(found.ndim) if each != dim]
            reached = found.any(dim=others) if others else found
            pending &= ~reached.cpu()
        self.is_done = not any(map(bool, map(torch.any, self.dims.values())))
        self.is_done &= bool(self.dims) or bool(found.any())


class Flow:
    """Which parameters, experts and new coordinates of a model have had no gradient yet.

    Args:
        new: along which dimensions of which parameters an expansion set new coordinates.
    """

    def __init__(self, new: NewUnits) -> None:
        self._new = new
        self._waiting: dict[str, _Waiting] = {}
        self._changed: set[str] = set()  # since the training began: what `new` does not tell
        self._restored: dict[str, Any] = {}
        self._step = 0
        self._closely_until = _CLOSELY

    def look(self, model: nn.Module, *, step: int, is_looked_at: bool = True) -> None:
        """Take the gradients of a step, counted from 0."""
        self._enter(model, step)
        self._step = step + 1
        for name, waiting in self._waiting.items() if is_looked_at else ():
            if not waiting.is_done and (gradient := model.get_parameter(name).grad) is not None:
                waiting.see(gradient)

    def found(self, model: nn.Module, *, enough: int = ENOUGH_STEPS) -> dict[str, Any]:
        """Return by name what had no gradient in so many steps and more.

        `without_gradient` holds parameters and parts of them, `without_tokens` experts, `steps` is
        how many were taken.
        """
        self._enter(model, self._step)  # a training that goes on from its last step has seen none
        parameters, experts = list[str](), dict[str, None]()
        for stored in live_layout(model):
            waiting = self._waiting.get(stored.name)
            if waiting is None or waiting.is_done or self._step - waiting.since < enough:
                continue
            if stored.is_of_experts:
                by_place = {part.index[0]: part.tensor for part in stored.parts}
                for place in waiting.dims[0].nonzero()[:, 0]:
                    tensor = by_place[int(place)]
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
        """Watch what was changed from here on anew."""
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
        """Begin to wait for what is trained and was not before."""
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        if trained.keys() <= self._waiting.keys():
            return
        for stored in live_layout(model):
            if stored.name not in trained or stored.name in self._waiting:
                continue
            if (held := self._restored.pop(stored.name, None)) is not None:
                entered = _Waiting(**held)
            elif stored.is_of_experts:
                entered = _Waiting({0: torch.ones(stored.shape[0], dtype=torch.bool)}, step)
            else:
                flags = enumerate(self._new.get(stored.name, ()))
                entered = _Waiting({d: each.clone() for d, each in flags if each is not None}, step)
            self._waiting[stored.name] = entered


class GradientFlow(Flow, Callback):
    """Watch a training; stands before what changes the gradients of the task."""

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Any
    ) -> None:
        step = trainer.global_step
        is_logged = (step + 1) % trainer.log_every_n_steps == 0  # type: ignore[attr-defined]
        is_looked_at = step < self._closely_until or is_logged
        self.look(base_of(pl_module).model, step=step, is_looked_at=is_looked_at)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module = base_of(pl_module)
        if module.moments or not trainer.optimizers:
            return  # moments that were carried on know of earlier tokens
        (optimizer,) = trainer.optimizers
        experts = {stored.name for stored in live_layout(module.model) if stored.is_of_experts}
        for name in experts & self._waiting.keys():
            parameter = module.model.get_parameter(name)
            for value in optimizer.state.get(parameter, {}).values():
                is_like = isinstance(value, Tensor) and value.shape == parameter.shape
                if is_like and not self._waiting[name].is_done:
                    self._waiting[name].see(value)  # tokens of steps between those looked at


def tried(model: nn.Module, input_ids: Tensor, new: NewUnits, *, steps: int) -> dict[str, Any]:
    """Train a model for a few steps, for trial; return what `Flow` found of it.

    A step moves each parameter against the sign of its gradient, as Adam's first step does, but
    holds no moments.

    Args:
        input_ids: int64 [B, T], where the model is; the same in each step.
    """
    parameters = list(model.parameters())
    flow = Flow(new)
    model.train()
    with torch.random.fork_rng():
        torch.manual_seed(0)  # the same units drop out at each call
        for step in range(steps):
            labels = labels_of(model, input_ids)
            loss = model(input_ids=input_ids, labels=labels, use_cache=False).loss
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            del gradients  # which are the parameters' now
            flow.look(model, step=step)
            with torch.no_grad():
                for parameter in parameters:
                    if parameter.grad is not None:
                        parameter.add_(parameter.grad.sign_(), alpha=-_TRIAL_RATE)
                        parameter.grad = None
    return flow.found(model, enough=steps)
