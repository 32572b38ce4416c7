"""The best expert to clone for a domain.

Utility of an expert = mean over batches of Σ |∂L/∂w · w| over its weights: the first-order change
of the loss if they were removed (Molchanov et al. 2019, arXiv 1906.10771, without the square).
Choosing the source by gradients follows Expert Upcycling (arXiv 2604.19835); here the most useful
expert of each layer is the source of all its new experts.
"""

import torch
from torch import Tensor, nn

from tritter.core.stock_routers import Routing
from tritter.data.packing import labels_of
from tritter.errors import RequestError
from tritter.evaluation.inference import preserve_modes
from tritter.training.parameters import live_layout


def expert_utility(model: nn.Module, sequences: Tensor, *, batch_size: int = 8) -> Tensor:
    """Return the utility of every expert, [number of layers with experts, E].

    Args:
        model: a model with experts.
        sequences: integers [N, T], of the domain.
        batch_size: sequences per batch.

    Raises:
        RequestError: the model has no experts, or there are no sequences.
    """
    routing = Routing.of(model)
    if routing is None or not len(sequences):
        raise RequestError("expert utility needs a model with experts, and sequences.")
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
    return tuple(expert_utility(model, sequences, batch_size=batch_size).argmax(dim=1).tolist())
