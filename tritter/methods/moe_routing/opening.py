"""How appended experts open during training: their router rows, offset and base."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import nn

from tritter.core.stock_routers import AddedExperts, Routing
from tritter.seeds import derived_seed
from tritter.training.module import base_of


def redraw_rows(model: nn.Module, experts: Sequence[int], *, seed: int) -> None:
    """Draw random router rows for new experts, with the deviation of the other rows."""
    routing = Routing.of(model)
    assert routing is not None
    for layer in routing.layers:
        generator = torch.Generator().manual_seed(derived_seed(seed, "router", layer))
        weight = routing.router(layer).weight
        assert isinstance(weight, nn.Parameter)
        with torch.no_grad():
            rows = torch.randn(len(experts), weight.shape[1], generator=generator)
            weight[list(experts)] = (rows * weight[: experts[0]].std().cpu()).to(weight)


class ExpertOpening(Callback):
    """Raise the router offset of appended experts before each training step.

    Args:
        added: the appended experts at the start of training.
        anneal_steps: steps since they were appended after which the offset is 0.
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
    """Freeze parameters until a step, then train them.

    They need gradients when the optimizer is created, so that it includes them. In a step without
    their gradient, the optimizer skips them: no weight decay and no state. Only for a single
    process, because DDP waits for the gradients of all its parameters.

    Args:
        parameters: the frozen parameters.
        after_steps: number of steps of this run.
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
