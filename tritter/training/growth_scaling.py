"""Learning rates that depend on growth: scaled updates of new entries, or of widened matrices.

The update is scaled, not the gradient: Adam is invariant to the scale of the gradient. An update
contains the weight decay, so decay is scaled like the learning rate, as in a parameter group.
"""

from collections.abc import Mapping
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from tritter.core.families import Config, family_of, layout
from tritter.training.module import base_of
from tritter.training.parameters import scaled_update
from tritter.transform import Change

Masks = Mapping[str, Tensor]


def width_factors(base: Config, grown: Config) -> dict[str, float]:
    """Return parameter → learning rate relative to that of the base, for Adam.

    These are the rules of muP without output multipliers (arXiv 2203.03466, table 3): the base's
    fan-in over the new one for matrices, including the output head and routers. Embeddings and
    vectors are unchanged. A tied embedding counts as the output head, whose logits would otherwise
    grow with the width. Parameters with factor 1 are omitted.

    Args:
        base: config.json of the model at whose width the learning rate is right.
        grown: config.json of the model in training.
    """
    known = _fan_ins(base)
    stored_tensors, found = layout(grown, "live"), dict[str, float]()
    is_tied = all(stored.parts[0].tensor.kind != "head" for stored in stored_tensors)
    for stored in stored_tensors:
        tensor = stored.parts[0].tensor
        shape = family_of(grown).shape(tensor, grown)
        is_lookup = tensor.kind.startswith("embed") and not (is_tied and tensor.kind == "embed")
        if len(shape) != 2 or is_lookup:
            continue
        # A base without this kind, such as `experts.down`, has another with the same input
        size = known.get(tensor.kind, known.get(tensor.axes[1].space.kind, shape[1]))
        if size != shape[1]:
            found[stored.name] = size / shape[1]
    return found


def _fan_ins(config: Config) -> dict[str, int]:
    """Return the fan-in of matrices by kind, and by kind of their input space."""
    family, found = family_of(config), dict[str, int]()
    for tensor in family.logical_tensors(config):
        shape = family.shape(tensor, config)
        if len(shape) == 2:
            found |= {tensor.kind: shape[1], tensor.axes[1].space.kind: shape[1]}
    return found


class GrowthScaling(Callback):
    """Scale the updates of parameters, or of their new entries.

    It precedes callbacks that change the model, so that it knows the step of the change.

    Args:
        factors: Parameter → factor of its updates, throughout.
        new: Parameter → bool mask of new entries. None: no entry is treated as new, including
            those of neurons that are born during training.
        multiplier: Factor of updates of new entries after their warm-up.
        warmup_steps: Steps in which this factor rises linearly from 0.
    """

    def __init__(
        self,
        *,
        factors: Mapping[str, float] | None = None,
        new: Masks | None = None,
        multiplier: float = 1.0,
        warmup_steps: int = 0,
    ) -> None:
        self._factors = dict(factors or {})
        self._follows_births = new is not None
        self._multiplier = multiplier
        self._warmup_steps = warmup_steps
        self._born: dict[int, dict[str, Tensor]] = {0: dict(new or {})}  # step → new entries
        self._has_changed = False
        self._on_device: dict[int, dict[str, Tensor]] = {}
        self._before: dict[str, Tensor] = {}
        self._step = 0

    @property
    def summary(self) -> str:
        """The scaled parts, for the user."""
        if self._follows_births:
            count = sum(int(mask.sum()) for mask in self._born[0].values())
            return (
                f"{self._multiplier:g} times the learning rate for {count:,} new parameters; "
                f"warm-up steps: {self._warmup_steps}"
            )
        if not self._factors:
            return "the width does not grow, so all learning rates are unchanged"
        factors = ", ".join(f"{each:.3g}" for each in sorted(set(self._factors.values())))
        return f"{factors} times the learning rate for {len(self._factors)} matrices"

    def factor(self, name: str, *, step: int) -> float | Tensor:
        """Return the factor of the updates of a parameter at step `step` (from 0)."""
        value: float | Tensor = self._factors.get(name, 1.0)
        for born, masks in (self._on_device or self._born).items():
            if (mask := masks.get(name)) is not None:
                risen = min(1.0, (step - born + 1) / max(1, self._warmup_steps))
                old = torch.as_tensor(value, device=mask.device)
                value = torch.where(mask, self._multiplier * risen, old)
        return value

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        model = base_of(pl_module).model
        (optimizer,) = trainer.optimizers

        def before(*_: object) -> None:
            self._step = trainer.global_step
            if not self._on_device:
                self._on_device = {
                    born: {n: mask.to(model.get_parameter(n).device) for n, mask in masks.items()}
                    for born, masks in self._born.items()
                }
            names = {*self._factors, *(name for masks in self._born.values() for name in masks)}
            self._before = {
                name: parameter.detach().clone()
                for name, parameter in model.named_parameters()
                if name in names and parameter.requires_grad
            }

        def after(*_: object) -> None:
            for name, old in self._before.items():
                parameter = model.get_parameter(name).detach()
                parameter.copy_(scaled_update(old, parameter, self.factor(name, step=self._step)))
            self._before = {}

        optimizer.register_step_pre_hook(before)
        optimizer.register_step_post_hook(after)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._step = trainer.global_step

    def parameters_changed(self, change: Change) -> None:
        """Follow a change of the model during training; its new entries begin their warm-up."""
        if not self._follows_births:
            return
        named = {stored.name for stored in (*change.before, *change.after)}
        cohorts = [(self._step, change.new_entries())]
        for step, masks in self._born.items():
            kept = {name: mask for name, mask in masks.items() if name not in named}
            is_warm = self._step - step >= self._warmup_steps  # one cohort is enough for these
            mapped = change.masks(masks, with_copies=False)
            cohorts.append((0 if is_warm else step, kept | mapped))
        born: dict[int, dict[str, Tensor]] = {}
        for step, masks in cohorts:
            cohort = born.setdefault(step, {})
            for name, mask in masks.items():
                if bool(mask.any()):
                    cohort[name] = cohort[name] | mask if name in cohort else mask
        self._born, self._on_device, self._has_changed = born, {}, True

    def state_dict(self) -> dict[str, Any]:
        return {"step": self._step, "born": self._born if self._has_changed else None}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._step = int(state_dict["step"])
        if state_dict["born"] is not None:
            self._born, self._on_device = dict(state_dict["born"]), {}
            self._has_changed = True
