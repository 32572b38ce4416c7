"""Gates: the weight of each expert for each token, from router logits; the experts' mixed output.

The gates of a token depend on that token alone. With a capacity limit, they also depend on the
experts chosen by earlier tokens of its sequence; never on later ones.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import ceil

import torch
from torch import Tensor, distributed
from torch.nn.functional import linear, softmax

from tritter.data.batches import num_ranks
from tritter.methods.experts.adapters import Factors


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


@dataclass(frozen=True, eq=False)
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

    def of(self, kept: Tensor | tuple[slice, slice]) -> "Gates":
        """Return the gates of some tokens; for a mask kept, bool [B, T], as [N, n]."""
        chosen = None if self.chosen is None else self.chosen[kept]
        parts = self.weights[kept], chosen, self.probabilities[kept], self.logits[kept]
        return Gates(*parts, self.dropped)

    # Adding the adapters' outputs to a layer's output, with gates per token.
    #
    # N tokens of a batch, n experts, r the rank of one and R the sum of all.

    @cached_property
    def _weights(self) -> Tensor:
        """The weights of all tokens, [N, n]."""
        return self.weights.flatten(0, -2)

    @cached_property
    def _tokens(self) -> tuple[Tensor, ...] | None:
        """For each expert, the flat indices of its tokens, int64; None: all process every token.

        Computed once for all linear layers of a decoder layer.
        """
        if self.chosen is None:
            return None
        experts, tokens = self.chosen.flatten(0, -2).T.nonzero(as_tuple=True)
        return tokens.split(experts.bincount(minlength=self.chosen.shape[-1]).tolist())

    def output(self, inputs: Tensor, factors: Mapping[int, Factors]) -> Tensor:
        """Return Σₑ gₑ · (α/r)ₑ · Bₑ Aₑ x for every token, times the gain of the layer.

        Args:
            inputs: [..., in_features], N tokens in total; or integers [...], which denote one-hot
                vectors, so that A x is a column of A. With fewer tokens than gates,
                [B, t, in_features], they are the last ones of each sequence, as at the head.
            factors: adapters of the layer, by index of the expert.

        Returns:
            [..., out_features], in the dtype of the factors.
        """
        example, gates = next(iter(factors.values())), self
        if inputs.is_floating_point():
            shape, tokens = inputs.shape[:-1], inputs.flatten(0, -2).to(example.down.dtype)
        else:
            shape, tokens = inputs.shape, inputs.flatten()  # [N]; above [N, in]
        if len(tokens) < len(self._weights):
            gates = self.of((slice(None), slice(-shape[1], None)))
        weights = gates._weights.to(example.down.dtype)  # [N, n]
        if gates._tokens is None:  # all experts as one product of rank R
            up = torch.cat([each.up for each in factors.values()], dim=1)  # [out, R]
            scales = [
                (weights[:, number] * each.scaling).unsqueeze(-1).expand(-1, each.rank)
                for number, each in factors.items()
            ]
            if tokens.is_floating_point():
                low = linear(tokens, torch.cat([each.down for each in factors.values()]))  # [N, R]
            else:  # separate look-ups, so that no [R, V] copy is made
                low = torch.cat([each.low(tokens) for each in factors.values()], dim=1)
            added = linear(low * torch.cat(scales, dim=1), up)
        else:
            added = _chosen_output(tokens, factors, weights, gates._tokens)
        if example.gain is not None:  # the gain belongs to the layer
            added = added * example.gain.to(added.dtype)
        return added.unflatten(0, shape)

    def balance_loss(self) -> Tensor:
        """Return n · Σₑ fₑ · Pₑ, the load balancing loss of Switch (arXiv 2101.03961, equation 4).

        f is the share of choices that fall on an expert (in dense mode, of tokens that prefer it),
        and P its mean probability. The loss is 1 for even use, and n if a single expert is used. f
        covers all processes: the mean of their losses is that of the whole batch.
        """
        number = self.probabilities.shape[-1]
        probabilities = self.probabilities.flatten(0, -2)  # [N, n]
        if self.chosen is None:
            chosen = torch.nn.functional.one_hot(probabilities.argmax(-1), number)
        else:
            chosen = self.chosen.flatten(0, -2)
        counts = chosen.sum(0).to(probabilities.dtype)
        if num_ranks() > 1:
            distributed.all_reduce(counts)
        return number * (counts / counts.sum().clamp_min(1) * probabilities.mean(0)).sum()

    def entropy_loss(self) -> Tensor:
        """Return the mean entropy of a token's probabilities in nats; low if it is decisive."""
        entropies = -(self.probabilities * self.probabilities.clamp_min(1e-30).log()).sum(-1)
        return entropies.mean()

    def z_loss(self) -> Tensor:
        """Return the mean squared log-sum-exp of the logits (ST-MoE, arXiv 2202.08906, eq. 5)."""
        return torch.logsumexp(self.logits, dim=-1).square().mean()


def usage(gates: Sequence[Gates]) -> Tensor:
    """Return the mean gate of each expert over layers and tokens, float32 [n]."""
    return torch.stack([each.weights.detach().flatten(0, -2).mean(0) for each in gates]).mean(0)


def _chosen_output(
    tokens: Tensor, factors: Mapping[int, Factors], weights: Tensor, chosen: Sequence[Tensor]
) -> Tensor:
    """Return the sum over the experts of each token, [N, out]; each computes its own tokens."""
    assigned = [chosen[number] for number in factors]
    gathered = tokens.index_select(0, torch.cat(assigned)).split([len(own) for own in assigned])
    added: Tensor | None = None  # in the dtype of the products, which autocast may choose
    for own, inner, (number, each) in zip(assigned, gathered, factors.items(), strict=True):
        gate = (weights[own, number] * each.scaling).unsqueeze(-1)  # [n_e, 1]
        part = linear(each.low(inner) * gate, each.up)  # [n_e, out]
        added = part.new_zeros(len(tokens), part.shape[1]) if added is None else added
        added.index_add_(0, own, part)  # joined, k rows per token of a head are large
    assert added is not None
    return added
