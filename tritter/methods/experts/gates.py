"""Gates: the weight of each expert for each token, computed from router logits.

The gates of a token depend on that token alone. With a capacity limit, they also depend on the
experts chosen by earlier tokens of its sequence; never on later ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor, distributed
from torch.nn.functional import softmax

from tritter.data.batches import this_rank


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """How logits are converted to gates.

    Args:
        top_k: experts per token; None: all of them (dense).
        temperature: τ, divisor of the logits.
        capacity_factor: in training with `top_k`, an expert processes at most
            ⌈factor · top_k · T / n⌉ tokens of a sequence of T, the earliest first; None: no limit.
    """

    top_k: int | None = None
    temperature: float = 1.0
    capacity_factor: float | None = None

    def gates(
        self, logits: Tensor, *, is_training: bool = False, is_dense: Tensor | None = None
    ) -> "Gates":
        """Return the gates for router logits.

        Dense gates are the probabilities. For top-k ≥ 2, they are the probabilities of the chosen
        experts, normalised to sum to 1. For top-1 the gate is the probability itself (Switch, arXiv
        2101.03961, equation 2): normalised it would be 1, and the router would get no gradient.

        Args:
            logits: [B, T, n], in float32 or wider.
            is_training: apply the capacity limit.
            is_dense: bool [B, T], tokens that use all experts. None: no token.
        """
        probabilities = softmax(logits / self.temperature, dim=-1)
        number = logits.shape[-1]
        if self.top_k is None or self.top_k >= number:
            return Gates(probabilities, None, probabilities, logits)
        experts = logits.topk(self.top_k, dim=-1).indices  # [B, T, k]
        chosen = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, experts, True)
        if is_dense is not None:
            chosen |= is_dense.unsqueeze(-1)
        weights = probabilities * chosen
        if self.top_k > 1:
            weights = weights / weights.sum(-1, keepdim=True)
        if not is_training or self.capacity_factor is None:
            return Gates(weights, chosen, probabilities, logits)
        limit = ceil(self.capacity_factor * self.top_k * logits.shape[1] / number)
        kept = chosen & (chosen.cumsum(dim=1) <= limit)  # the earliest tokens of each sequence
        dropped = 1 - float(kept.sum()) / float(chosen.sum())
        return Gates(weights * kept, kept, probabilities, logits, dropped)


@dataclass(frozen=True, slots=True, eq=False)
class Gates:
    """The gates of one layer for the tokens of a batch.

    Args:
        weights: [B, T, n], factor of each expert's output; 0 if not chosen.
        chosen: bool [B, T, n], experts that process a token; None: all of them.
        probabilities: [B, T, n], softmax of the logits over τ, for losses and reports.
        logits: [B, T, n], before division by τ.
        dropped: share of the choices dropped by the capacity limit.
    """

    weights: Tensor
    chosen: Tensor | None
    probabilities: Tensor
    logits: Tensor
    dropped: float = 0.0

    def of(self, kept: Tensor) -> "Gates":
        """Return the gates of some tokens, [N, n]; kept is bool [B, T]."""
        chosen = None if self.chosen is None else self.chosen[kept]
        parts = self.weights[kept], chosen, self.probabilities[kept], self.logits[kept]
        return Gates(*parts, self.dropped)


def balance_loss(gates: Gates) -> Tensor:
    """Return n · Σₑ fₑ · Pₑ, the load balancing loss of Switch (arXiv 2101.03961, equation 4).

    f is the share of choices that fall on an expert (in dense mode, of tokens that prefer it), and
    P its mean probability. The loss is 1 for even use, and n if a single expert is used. f covers
    all processes: the mean of their losses is that of the whole batch.
    """
    number = gates.probabilities.shape[-1]
    probabilities = gates.probabilities.flatten(0, -2)  # [N, n]
    if gates.chosen is None:
        chosen = torch.nn.functional.one_hot(probabilities.argmax(-1), number)
    else:
        chosen = gates.chosen.flatten(0, -2)
    counts = chosen.sum(0).to(probabilities.dtype)
    if this_rank().count > 1:
        distributed.all_reduce(counts)
    return number * (counts / counts.sum().clamp_min(1) * probabilities.mean(0)).sum()


def entropy_loss(gates: Gates) -> Tensor:
    """Return the mean entropy of a token's probabilities in nats; low if routing is decisive."""
    entropies = -(gates.probabilities * gates.probabilities.clamp_min(1e-30).log()).sum(-1)
    return entropies.mean()


def z_loss(gates: Gates) -> Tensor:
    """Return the mean squared log-sum-exp of the logits (ST-MoE, arXiv 2202.08906, equation 5)."""
    return torch.logsumexp(gates.logits, dim=-1).square().mean()


def usage(gates: Sequence[Gates]) -> Tensor:
    """Return the mean gate of each expert over layers and tokens, float32 [n]."""
    return torch.stack([each.weights.detach().flatten(0, -2).mean(0) for each in gates]).mean(0)
