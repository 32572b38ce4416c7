"""LightningModules around stock transformers models."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from tritter.training.forgetting_method import ForgettingMethod
from tritter.training.moments import start_from
from tritter.training.optimiser import OptimiserSettings, build_optimiser
from tritter.training.routing import RoutingObjective
from tritter.training.schedule import Schedule
from tritter.training.transplant import Moments


class BaseModule(LightningModule):
    """Next-token training of a causal language model.

    Args:
        model: a stock transformers model.
        schedule: learning rate over the steps.
        optimiser: everything else of the optimiser.
        routing: terms of the loss for the routers of a model with experts.
        moments: of Adam, that the optimiser starts from, by the model's parameter names; those
            of a training that is resumed take their place.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        schedule: Schedule,
        optimiser: OptimiserSettings,
        routing: RoutingObjective | None = None,
        moments: Mapping[str, Moments] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.schedule = schedule
        self.optimiser_settings = optimiser
        self.routing = routing
        self.moments = moments or {}

    def training_step(self, batch: Mapping[str, Tensor], batch_index: int) -> Tensor:
        """Return the mean next-token loss of a batch, nats per token."""
        loss = self.task_loss(batch)
        self.log("train/loss", loss.detach(), sync_dist=True)
        return loss if self.routing is None else loss + self._routing_loss(self.routing, batch)

    def task_loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        input_ids = batch["input_ids"]  # [B, T]
        # With router logits in its output a stock model adds a balance loss of its own
        options = {} if self.routing is None else {"output_router_logits": False}
        return self.model(input_ids=input_ids, labels=input_ids, use_cache=False, **options).loss

    def _routing_loss(self, routing: RoutingObjective, batch: Mapping[str, Tensor]) -> Tensor:
        """Return what the routers add to the loss of the batch; each term is logged."""
        terms = routing.terms(batch)
        loss = routing.weighted(terms)
        divergence = routing.divergence(self.model, self.global_step)
        if divergence is not None:
            terms["old_divergence"] = divergence
            loss = loss + routing.settings.hold_old * divergence
        for name, value in terms.items():
            self.log(f"routing/{name}", value.detach(), sync_dist=True)
        return loss

    def configure_optimizers(self) -> Any:
        optimiser = build_optimiser(
            self.named_parameters(),
            self.optimiser_settings,
            learning_rate=self.schedule.learning_rate,
        )
        start_from(optimiser, self.model, self.moments)
        # A plain function, which the scheduler's state leaves out; the step is all there is to save
        scheduler = LambdaLR(optimiser, lambda step: self.schedule.factor(step))
        return {
            "optimizer": optimiser,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step", "name": "learning_rate"},
        }


class ExpandedModule(BaseModule):
    """Continued training of a grown model, with methods that keep it from forgetting.

    Args:
        methods: in the order in which they were asked for.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        schedule: Schedule,
        optimiser: OptimiserSettings,
        methods: Sequence[ForgettingMethod] = (),
        routing: RoutingObjective | None = None,
        moments: Mapping[str, Moments] | None = None,
    ) -> None:
        super().__init__(
            model, schedule=schedule, optimiser=optimiser, routing=routing, moments=moments
        )
        self.methods = tuple(methods)

    def training_step(self, batch: Mapping[str, Tensor], batch_index: int) -> Tensor:
        """Return the loss of the task and of the methods; each is logged on its own."""
        loss = super().training_step(batch, batch_index)
        for method in self.methods:
            extra = method.extra_loss(self.model, batch)
            if extra is not None:
                self.log(f"forgetting/{method.name}/loss", extra.detach(), sync_dist=True)
                loss = loss + extra
        return loss

    def apply_methods_to_gradients(self) -> None:
        """Let every method read the task's gradients before any method changes them."""
        with torch.no_grad():
            for method in self.methods:
                method.observe_gradients(self.model)
            for method in self.methods:
                method.add_to_gradients(self.model)
