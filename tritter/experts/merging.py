"""Several adapters as one of a given rank: the best there is of the sum of what they add."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tritter.experts.adapters import Factors


def merged(
    parts: Sequence[Factors], weights: Sequence[float], *, rank: int, alpha: float
) -> Factors:
    """Return the adapter of a rank that is nearest to Σ wᵢ · (α/r)ᵢ · Bᵢ Aᵢ (Eckart–Young).

    The sum is never formed: with [B₁ …] = Q S and [A₁ …]ᵀ = P T it is Q (S Tᵀ) Pᵀ, so that only a
    matrix of the sum of the ranks is decomposed.

    Args:
        weights: how much each counts, such as its mean gate.
        rank: of the result; where the sum has less, the rest is zero.
        alpha: of the result; α / rank is part of it, and taken out of B.
    """
    scaled = zip(parts, weights, strict=True)
    up = torch.cat([w * each.scaling * each.up.double() for each, w in scaled], dim=1)  # [out, R]
    down = torch.cat([each.down.double() for each in parts])  # [R, in]
    q, s = torch.linalg.qr(up)
    p, t = torch.linalg.qr(down.T)
    left, values, right = torch.linalg.svd(s @ t.T)
    number = min(rank, len(values))
    root = values[:number].sqrt()
    example, scaling = parts[0].down, alpha / rank
    new_up = _padded((q @ left[:, :number]) * root / scaling, rank, dim=1)
    new_down = _padded((root[:, None] * right[:number]) @ p.T, rank, dim=0)
    return Factors(new_down.to(example), new_up.to(example), scaling, parts[0].gain)


def lost_share(parts: Sequence[Factors], weights: Sequence[float], result: Factors) -> float:
    """Return ‖sum − result‖ / ‖sum‖ (Frobenius): what a merge leaves out; 0 of a sum of zeros."""
    whole = sum((w * each.delta().double() for each, w in zip(parts, weights, strict=True)))
    assert isinstance(whole, Tensor)
    norm = float(whole.norm())
    return float((whole - result.delta().double()).norm()) / norm if norm else 0.0


def _padded(values: Tensor, size: int, *, dim: int) -> Tensor:
    """Return a matrix with zeros behind, so that a dimension has a size."""
    shape = list(values.shape)
    shape[dim] = size - shape[dim]
    return torch.cat([values, values.new_zeros(shape)], dim=dim) if shape[dim] else values
