"""How appended experts begin: the experts they are copies of, their router rows, offset and base.

Utility of an expert = mean over batches of Σ |∂L/∂w · w| over its weights: the first-order change
of the loss if they were removed (Molchanov et al. 2019, arXiv 1906.10771, without the square).
Choosing the source by gradients follows Expert Upcycling (arXiv 2604.19835); here the most useful
expert of each layer is the source of all its new experts.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn

from tritter.core.stock_routers import AddedExperts, RouterControl
from tritter.data.packing import labels_of
from tritter.evaluation.inference import preserve_modes
from tritter.seeds import derived_seed
from tritter.training.module import base_of
from tritter.training.parameters import live_layout


def redraw_rows(model: nn.Module, experts: Sequence[int], *, seed: int) -> None:
    """Draw random router rows for new experts, with the deviation of the other rows."""
    routing = RouterControl.of(model)
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


def _expert_utility(model: nn.Module, sequences: Tensor, *, batch_size: int = 8) -> Tensor:
    """Return the utility of every expert for sequences [N, T]: [layers with experts, E]."""
    routing = RouterControl.of(model)
    assert routing is not None
    shared = [stored for stored in live_layout(model) if stored.is_of_experts]
    weights = [model.get_parameter(stored.name) for stored in shared]
    rows: dict[int | None, int] = {layer: row for row, layer in enumerate(routing.layers)}
    utility = torch.zeros(len(rows), routing.num_experts)
    device, batches = weights[0].device, sequences.split(batch_size)
    with preserve_modes(model):
        model.eval()
        for batch in batches:
            ids = batch.long().to(device)
            loss = model(input_ids=ids, labels=labels_of(model, ids), use_cache=False).loss
            for stored, weight, gradient in zip(
                shared, weights, torch.autograd.grad(loss, weights), strict=True
            ):
                change = (gradient * weight).detach().abs().flatten(1).sum(dim=1)
                utility[rows[stored.layer]] += change.float().cpu() / len(batches)
    return utility


def best_experts(model: nn.Module, sequences: Tensor, *, batch_size: int = 8) -> tuple[int, ...]:
    """Return the expert of the highest utility for each layer with experts."""
    return tuple(_expert_utility(model, sequences, batch_size=batch_size).argmax(dim=1).tolist())
