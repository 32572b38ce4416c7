"""What adapters add to the output of a linear layer, each token by its own gates.

N tokens of a batch, n experts, r the rank of one and R the sum of all.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

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


def mixed(inputs: Tensor, factors: Mapping[int, Factors], dispatch: Dispatch) -> Tensor:
    """Return Σₑ gₑ · (α/r)ₑ · Bₑ Aₑ x for every token.

    Args:
        inputs: [..., in_features], N tokens in all.
        factors: of the experts that stand on this layer, by number.

    Returns:
        [..., out_features], in the dtype of the factors.
    """
    example = next(iter(factors.values()))
    tokens = inputs.flatten(0, -2).to(example.down.dtype)  # [N, in]
    weights = dispatch.weights.to(example.down.dtype)  # [N, n]
    if dispatch.tokens is None:
        added = _all(tokens, factors, weights)
    else:
        added = _chosen(tokens, factors, weights, dispatch.tokens, dispatch.choices)
    return added.unflatten(0, inputs.shape[:-1])


def _all(tokens: Tensor, factors: Mapping[int, Factors], weights: Tensor) -> Tensor:
    """Compute all experts as one low-rank product of the rank R."""
    down = torch.cat([each.down for each in factors.values()])  # [R, in]
    up = torch.cat([each.up for each in factors.values()], dim=1)  # [out, R]
    gates = [
        (weights[:, number] * each.scaling).unsqueeze(-1).expand(-1, each.rank)
        for number, each in factors.items()
    ]
    return linear(linear(tokens, down) * torch.cat(gates, dim=1), up)


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
        parts.append(linear(linear(inputs, each.down) * gates, each.up))  # [n_e, out]
    added = torch.cat(parts)
    return added.new_zeros(len(tokens), added.shape[1]).index_add(0, where, added)
