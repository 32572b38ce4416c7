"""Which neurons are dead: mature, and of no weight in what their layer writes."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tritter.growth.look import Look
from tritter.growth.places import FfnPlace


def wanda_scores(model: nn.Module, place: FfnPlace, look: Look) -> Tensor:
    """Return |w|·‖x‖ of every neuron, float32 [F]: Sun et al. 2023, arXiv 2306.11695.

    x is what a neuron computes of the tokens, as a root mean square; w its column of down, 1 where
    nobody knows it.
    """
    gate, up, down = place.weights(model)
    computed = look.computed
    if computed is None:
        summed = F.linear(look.inputs, gate, place.bias(model, place.gate))  # [T, F]
        computed = place.activation(model)(summed)
        if up is not None and place.up is not None:
            computed = computed * F.linear(look.inputs, up, place.bias(model, place.up))
    strength = computed.square().mean(dim=0).sqrt()
    return strength if down is None else strength * torch.linalg.vector_norm(down, dim=0)


def dead_neurons(
    scores: Mapping[int, Tensor], young: Mapping[int, Tensor], *, quantile: float
) -> dict[int, Tensor]:
    """Return layer → int64 [d], its dead neurons, those of the lowest score first.

    Args:
        scores: layer → float32 [F].
        young: layer → int64 [k], neurons that can't be dead.
        quantile: of the scores of all layers together, each in proportion to its layer's median,
            below which a mature neuron is dead.
    """
    relative = {n: each / each.median().clamp_min(1e-30) for n, each in scores.items()}
    threshold = torch.quantile(_sampled(list(relative.values())), quantile)
    found = {}
    for layer, each in relative.items():
        is_dead = each < threshold
        is_dead |= each == 0
        is_dead[young[layer].to(each.device)] = False
        places = is_dead.nonzero().squeeze(1)
        found[layer] = places[each[places].argsort(stable=True)].cpu()
    return found


def _sampled(values: Sequence[Tensor], limit: int = 2**20) -> Tensor:
    """Return values in one row, evenly thinned: torch takes no quantile of more than 2**24."""
    row = torch.cat(list(values))
    return row[:: -(-len(row) // limit)]
