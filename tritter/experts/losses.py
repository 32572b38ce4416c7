"""What a router is asked besides the task: to use its experts, to decide, to stay small."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tritter.experts.gates import Gates


def balance_loss(gates: Gates) -> Tensor:
    """Return n · Σₑ fₑ · Pₑ, the load balancing loss of Switch (arXiv 2101.03961, equation 4).

    f is the share of choices that fall on an expert (in dense mode, of tokens that prefer it) and P
    its mean probability. It is 1 where all are used alike, and n where one alone is.
    """
    number = gates.probabilities.shape[-1]
    probabilities = gates.probabilities.flatten(0, -2)  # [N, n]
    if gates.chosen is None:
        chosen = torch.nn.functional.one_hot(probabilities.argmax(-1), number)
    else:
        chosen = gates.chosen.flatten(0, -2)
    counts = chosen.sum(0).to(probabilities.dtype)
    shares = counts / counts.sum().clamp_min(1)
    return number * (shares * probabilities.mean(0)).sum()


def entropy_loss(gates: Gates) -> Tensor:
    """Return the mean entropy of a token's probabilities, nats: small where the router decides."""
    return entropies(gates.probabilities).mean()


def z_loss(gates: Gates) -> Tensor:
    """Return the mean squared log-sum-exp of the logits (ST-MoE, arXiv 2202.08906, equation 5)."""
    return torch.logsumexp(gates.logits, dim=-1).square().mean()


def entropies(probabilities: Tensor) -> Tensor:
    """Return the entropy along the last dimension, nats; [..., n] → [...]."""
    return -(probabilities * probabilities.clamp_min(1e-30).log()).sum(-1)


def usage(gates: Sequence[Gates]) -> Tensor:
    """Return the mean gate of each expert over layers and tokens, float32 [n]."""
    return torch.stack([each.weights.detach().flatten(0, -2).mean(0) for each in gates]).mean(0)
