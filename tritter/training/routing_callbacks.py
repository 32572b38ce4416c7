"""Callbacks of a training with experts: what is logged, balanced, opened, held still."""

from collections.abc import Iterable
from typing import Any

from lightning import Callback, LightningModule, Trainer
from torch import nn

from tritter.routing import AddedExperts, bias_update, routing_statistics
from tritter.training.routing import RoutingObjective


class RoutingCallback(Callback):
    """Record what the routers decide, log how even it is, and move the selection bias.

    Args:
        objective: that of the module which is trained.
    """

    def __init__(self, objective: RoutingObjective) -> None:
        self._objective = objective

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._objective.routing.start_recording()

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if self._objective.settings.bias_update_rate:
            self._move_bias()
        if trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            pl_module.log_dict(self._statistics())

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._objective.routing.stop_recording()

    def state_dict(self) -> dict[str, Any]:
        # Offsets as well: with several processes they come back to the first one by this state
        return {"routing": self._objective.routing.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._objective.routing.load_state_dict(state_dict["routing"])

    def _move_bias(self) -> None:
        routing, rate = self._objective.routing, self._objective.settings.bias_update_rate
        for record, load in zip(self._objective.records, self._objective.counts, strict=True):
            bias = routing.selection_bias(record.layer)
            routing.set_selection_bias(record.layer, bias_update(bias, load, rate=rate))

    def _statistics(self) -> dict[str, float]:
        """Return means over the layers, of this process's part of the batch."""
        layers = routing_statistics(
            self._objective.records, capacity_factor=self._objective.settings.capacity_factor
        )
        return {
            "routing/entropy": sum(layer.entropy for layer in layers) / len(layers),
            "routing/max_load": sum(layer.max_load for layer in layers) / len(layers),
            "routing/dropped_fraction": sum(layer.dropped_fraction for layer in layers)
            / len(layers),
        }


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
        self._at(trainer.global_step).apply(_model(pl_module))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._at(trainer.global_step).apply(_model(pl_module))

    def _at(self, step: int) -> AddedExperts:
        return self._added.at(self._added.step + step, anneal_steps=self._anneal_steps)


class Unfreezing(Callback):
    """Hold parameters still until a step, then let them be trained.

    They are in the optimiser from the start; one without a gradient is passed over there: it is
    not decayed and has no state. In one process only: DDP waits for the gradients of all that it
    was shown.

    Args:
        parameters: those that are held.
        after_steps: of this training.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], *, after_steps: int) -> None:
        self._parameters = tuple(parameters)
        self._after_steps = after_steps

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._set(trainer.global_step)

    def _set(self, step: int) -> None:
        for parameter in self._parameters:
            parameter.requires_grad_(step >= self._after_steps)


def _model(module: LightningModule) -> nn.Module:
    model = module.model
    assert isinstance(model, nn.Module)
    return model
