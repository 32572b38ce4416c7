"""Callbacks of a training with appended experts: what is opened, and what is held still."""

from collections.abc import Iterable
from typing import Any

from lightning import Callback, LightningModule, Trainer
from torch import nn

from tritter.stock_routers import AddedExperts
from tritter.training.module import base_of


class ExpertOpening(Callback):
    """Raise the router offset of appended experts before each step of a training.

    Args:
        added: what they are when the training begins.
        anneal_steps: steps from the appending on, after which the offset is 0.
    """

    def __init__(self, added: AddedExperts, *, anneal_steps: int) -> None:
        self._added = added
        self._anneal_steps = anneal_steps

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._at(trainer.global_step).apply(base_of(pl_module).model)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._at(trainer.global_step).apply(base_of(pl_module).model)

    def _at(self, step: int) -> AddedExperts:
        return self._added.at(self._added.step + step, anneal_steps=self._anneal_steps)


class Unfreezing(Callback):
    """Hold parameters still until a step, then let them be trained.

    They need gradients from now on, so that the optimizer takes them in at the start; one that has
    none in a step is passed over there: it is not decayed and has no state. In one process only:
    DDP waits for the gradients of all that it was shown.

    Args:
        parameters: those that are held.
        after_steps: of this training.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], *, after_steps: int) -> None:
        self._parameters = tuple(parameters)
        self._after_steps = after_steps
        for parameter in self._parameters:
            parameter.requires_grad_(True)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        for parameter in self._parameters:
            parameter.requires_grad_(trainer.global_step >= self._after_steps)
