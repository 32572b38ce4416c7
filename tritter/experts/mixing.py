"""What adapters add to the output of a layer, each token by its own gates.

N tokens of a batch, n experts, r the rank of one and R the sum of all.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import embedding, linear

from tritter.experts.adapters import Factors
from tritter.experts.gates import Gates


@dataclass(frozen=True, slots=True, eq=False)
class Dispatch:
    """Which tokens go to which expert, made once for all linear layers of a decoder layer.

    Args:
        weights: [N, n], gates.
        tokens: int64 [P], a place in the batch for each choice, expert by expert and in order of
            tokens; None: every expert computes every token.
        choices: for each expert where its choices lie in `tokens`.
    """

    weights: Tensor
    tokens: Tensor | None
    choices: tuple[slice, ...] = ()

    @classmethod
    def of(cls, gates: Gates) -> "Dispatch":
        """Return the dispatch of a layer's gates."""
        weights = gates.weights.flatten(0, -2)
        if gates.chosen is None:
            return cls(weights, None)
        experts, tokens = gates.chosen.flatten(0, -2).T.nonzero(as_tuple=True)
        counts = experts.bincount(minlength=weights.shape[1]).tolist()
        ends = torch.tensor([0, *counts]).cumsum(0).tolist()
        slices = tuple(slice(*ends[number : number + 2]) for number in range(len(counts)))
        return cls(weights, tokens, slices)

    def last(self, batch: int, length: int) -> "Dispatch":
        """Return the dispatch of the last tokens of each sequence, as the head may be given them.

        Args:
            batch: B, number of sequences.
            length: how many tokens of each.
        """
        own = len(self.weights) // batch
        weights = self.weights.unflatten(0, (batch, own))[:, own - length :].flatten(0, 1)
        if self.tokens is None:
            return Dispatch(weights, None)
        kept, choices, end = [], [], 0
        for choice in self.choices:
            tokens = self.tokens[choice]
            sequence, place = tokens // own, tokens % own - (own - length)
            kept.append((sequence * length + place)[place >= 0])
            choices.append(slice(end, end := end + len(kept[-1])))
        return Dispatch(weights, torch.cat(kept), tuple(choices))


def mixed(inputs: Tensor, factors: Mapping[int, Factors], dispatch: Dispatch) -> Tensor:
    """Return Σₑ gₑ · (α/r)ₑ · Bₑ Aₑ x for every token, times what the layer multiplies it with.

    Args:
        inputs: [..., in_features], N tokens in all; or integers [...], tokens that stand for
            one-hot vectors, so that A x is a column of A. Where there are fewer than gates,
            [B, t, in_features], they are the last of each sequence.
        factors: of the experts that stand on this layer, by number.

    Returns:
        [..., out_features], in the dtype of the factors.
    """
    example = next(iter(factors.values()))
    if inputs.is_floating_point():
        places, tokens = inputs.shape[:-1], inputs.flatten(0, -2).to(example.down.dtype)  # [N, in]
    else:
        places, tokens = inputs.shape, inputs.flatten()  # [N]
    if len(tokens) < len(dispatch.weights):
        dispatch = dispatch.last(*places)
    weights = dispatch.weights.to(example.down.dtype)  # [N, n]
    if dispatch.tokens is None:
        added = _all(tokens, factors, weights)
    else:
        added = _chosen(tokens, factors, weights, dispatch.tokens, dispatch.choices)
    if example.gain is not None:  # of the layer, and so of all alike
        added = added * example.gain.to(added.dtype)
    return added.unflatten(0, places)


def _all(tokens: Tensor, factors: Mapping[int, Factors], weights: Tensor) -> Tensor:
    """Compute all experts as one low-rank product of the rank R."""
    up = torch.cat([each.up for each in factors.values()], dim=1)  # [out, R]
    gates = [
        (weights[:, number] * each.scaling).unsqueeze(-1).expand(-1, each.rank)
        for number, each in factors.items()
    ]
    if tokens.is_floating_point():
        low = linear(tokens, torch.cat([each.down for each in factors.values()]))  # [N, R]
    else:  # looked up one by one: a sum of ranks by the whole vocabulary is never copied
        low = torch.cat([_low(tokens, each) for each in factors.values()], dim=1)
    return linear(low * torch.cat(gates, dim=1), up)


def _chosen(
    tokens: Tensor,
    factors: Mapping[int, Factors],
    weights: Tensor,
    places: Tensor,
    choices: tuple[slice, ...],
) -> Tensor:
    """Compute each expert for the tokens that chose it; tokens are gathered and added up once."""
    standing = [places[choices[number]] for number in factors]
    where = places if len(factors) == len(choices) else torch.cat(standing)
    gathered = tokens.index_select(0, where).split([len(own) for own in standing])
    parts = []
    for own, inputs, (number, each) in zip(standing, gathered, factors.items(), strict=True):
        gates = (weights[own, number] * each.scaling).unsqueeze(-1)  # [n_e, 1]
        parts.append(linear(_low(inputs, each) * gates, each.up))  # [n_e, out]
    added = torch.cat(parts)
    return added.new_zeros(len(tokens), added.shape[1]).index_add(0, where, added)


def _low(tokens: Tensor, factors: Factors) -> Tensor:
    """Return A x, [N, r]."""
    if tokens.is_floating_point():
        return linear(tokens, factors.down)
    return embedding(tokens, factors.down.T)
