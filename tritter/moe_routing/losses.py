"""Losses on router logits, each a pure function of one layer's tensors.

All of them start from raw logits: a softmax of a softmax would be nearly uniform whatever the
router does. They compute in float32, or float64 for float64 logits, and average over tokens.

Shapes: N tokens, E experts, k experts per token. Tokens of several layers may stand in one tensor,
as transformers has it, or each layer may have its own loss.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def load_balancing_loss(
    logits: Tensor, selected: Tensor, *, counts: Tensor | None = None
) -> Tensor:
    """Return E · Σ f_e · P_e: the price of an unequal load (arXiv 2101.03961, eq. 4-6).

    f_e is the number of tokens sent to expert e over N, P_e the mean of its probability; even
    routing gives k. Where transformers computes it over the same tokens it has the same value.

    Args:
        logits: [N, E].
        selected: int64 [N, k], the experts that the tokens were sent to.
        counts: int64 [E], the load of a batch that these tokens are a part of, as processes that
            train together have it: the mean of their losses is then that of the whole batch.
    """
    num_experts = logits.shape[-1]
    probabilities = _wide(logits).softmax(dim=-1)
    if counts is None:
        counts = torch.bincount(selected.flatten(), minlength=num_experts)
    load = counts.to(probabilities.dtype) * selected.shape[-1] / counts.sum()
    return num_experts * (load * probabilities.mean(dim=0)).sum()


def router_z_loss(logits: Tensor) -> Tensor:
    """Return the mean of (log Σ exp logits)², which keeps logits small (arXiv 2202.08906, eq. 5).

    Args:
        logits: [N, E].
    """
    return _wide(logits).logsumexp(dim=-1).square().mean()


def routing_divergence(old_probabilities: Tensor, logits: Tensor) -> Tensor:
    """Return KL(old ‖ new), nats per token: how far a router has moved from where it was.

    Experts that were added since have no old probability, so whatever they take counts as moved.

    Args:
        old_probabilities: [N, E_old] of the old router on the same tokens, E_old ≤ E.
        logits: [N, E].
    """
    logits = _wide(logits)
    old = old_probabilities.detach().to(logits.dtype)
    log_new = F.log_softmax(logits, dim=-1)[:, : old.shape[-1]]
    log_new = log_new.masked_fill(old == 0, 0.0)  # 0 · log 0 is 0, and so is its gradient
    return (torch.xlogy(old, old) - old * log_new).sum(dim=-1).mean()


def new_expert_mass(
    logits: Tensor, experts: Sequence[int], *, weights: Tensor | None = None
) -> Tensor:
    """Return the mean probability that the router gives to some experts together, from 0 to 1.

    Args:
        logits: [N, E].
        experts: their indices.
        weights: [N], of the tokens in the mean; equal ones of 1/N by default.
    """
    mass = _wide(logits).softmax(dim=-1)[:, list(experts)].sum(dim=-1)
    return mass.mean() if weights is None else (weights.to(mass.dtype) * mass).sum()


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
