"""Which expert a domain moves most: the one to clone for it.

Utility of an expert = mean over batches of Σ |∂L/∂w · w| over its weights: the first-order change
of the loss if they were taken away (Molchanov et al. 2019, arXiv 1906.10771, without the square).
The choice of what to clone by gradients is that of Expert Upcycling (arXiv 2604.19835); here the
most useful expert of each layer gives all the new ones of it.
"""

import torch
from torch import Tensor, nn

from tritter.data.apart import labels_of
from tritter.errors import RequestError
from tritter.evaluation.inference import modes_kept
from tritter.stock_routers import Routing
from tritter.training.parameters import live_layout


def expert_utility(model: nn.Module, sequences: Tensor, *, batch_size: int = 8) -> Tensor:
    """Return the utility of every expert, [layers that have experts, E].

    Args:
        sequences: integers [N, T], of the domain.

    Raises:
        RequestError: the model has no experts, or there is no sequence.
    """
    routing = Routing.of(model)
    if routing is None or not len(sequences):
        raise RequestError("expert utility needs a model with experts, and text.")
    shared = [stored for stored in live_layout(model) if stored.is_of_experts]
    weights = [model.get_parameter(stored.name) for stored in shared]
    rows: dict[int | None, int] = {layer: row for row, layer in enumerate(routing.layers)}
    utility = torch.zeros(len(rows), routing.num_experts)
    device, batches = weights[0].device, sequences.split(batch_size)
    with modes_kept(model):
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
    """Return the expert of the highest utility, for each layer that has experts."""
    return tuple(expert_utility(model, sequences, batch_size=batch_size).argmax(dim=1).tolist())
