"""How evenly the routers of a model use their experts.

Shapes: N tokens, E experts, k experts per token.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from tritter.stock_routers.control import Record


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerStatistics:
    """The use of one layer's experts over some tokens.

    Args:
        layer: number of the layer.
        load: per expert, its part of all assignments; they add up to 1.
        max_load: the largest load over the mean one; 1 is even, E/k all to the same experts.
        load_entropy: of `load`, over that of an even one: 1 is even.
        entropy: of the router's probabilities for one token, nats, on average; 0 is certain.
        dropped_fraction: of all assignments, those that experts of limited capacity would drop.
    """

    layer: int
    load: tuple[float, ...]
    max_load: float
    load_entropy: float
    entropy: float
    dropped_fraction: float


def layer_statistics(record: Record, *, capacity_factor: float) -> LayerStatistics:
    """Return the statistics of one layer over the tokens of a forward pass.

    Args:
        capacity_factor: an expert takes at most that many times its even part. Stock models drop
            nothing: this says what a deployment with such a limit would lose.
    """
    probabilities = record.probabilities.detach()
    num_experts = probabilities.shape[-1]
    counts = expert_counts(record.selected, num_experts)
    load = counts.double() / counts.sum()
    entropy = -torch.xlogy(probabilities, probabilities).sum(dim=-1).mean()
    return LayerStatistics(
        layer=record.layer,
        load=tuple(load.tolist()),
        max_load=float(load.max() * num_experts),
        load_entropy=load_entropy(counts),
        entropy=float(entropy),
        dropped_fraction=dropped_fraction(counts, capacity_factor=capacity_factor),
    )


def routing_statistics(
    records: Iterable[Record], *, capacity_factor: float
) -> tuple[LayerStatistics, ...]:
    """Return the statistics of every layer that recorded; see `layer_statistics`."""
    return tuple(layer_statistics(record, capacity_factor=capacity_factor) for record in records)


def expert_counts(selected: Tensor, num_experts: int) -> Tensor:
    """Return int64 [E], how many tokens each expert got; counts of several batches add up.

    Args:
        selected: int64 [N, k].
    """
    return torch.bincount(selected.flatten(), minlength=num_experts)


def load_entropy(counts: Tensor) -> float:
    """Return the entropy of the load over that of an even one, from 0 to 1.

    Args:
        counts: [E].
    """
    load = counts.double() / counts.sum()
    return float(-torch.xlogy(load, load).sum()) / math.log(len(counts))


def dropped_fraction(counts: Tensor, *, capacity_factor: float) -> float:
    """Return the part of all assignments beyond a capacity of ⌈factor · N · k / E⌉ per expert.

    Args:
        counts: [E], of the tokens that share the capacity.
    """
    total = int(counts.sum())
    capacity = math.ceil(capacity_factor * total / len(counts))
    return int((counts - capacity).clamp(min=0).sum()) / total


def bias_update(selection_bias: Tensor, load: Tensor, *, rate: float) -> Tensor:
    """Return the next selection bias: b + rate · sign(mean load − load) (arXiv 2408.15664, alg. 1).

    Args:
        selection_bias: [E].
        load: [E], counts or parts of the step's assignments.
        rate: u of the paper, in probability per step.
    """
    load = load.to(selection_bias.dtype)
    return selection_bias + rate * (load.mean() - load).sign()
