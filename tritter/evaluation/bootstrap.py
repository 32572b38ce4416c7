"""The studentised bootstrap of a ratio of sums (bootstrap-t; Efron 1979, Hall 1988).

How far a ratio lies from the truth, in units of its own standard error, is learned from resamples
of the documents. Where a few documents carry the change, that distribution is far from Student's
t, whose bounds promise too much there.

R resamples · n documents
"""

from collections.abc import Iterator

import torch
from torch import Tensor

NUM_RESAMPLES = 1999
# One seed for every gate: the same scores have the same bounds
_SEED = 20261120
_MOST_DRAWS_AT_ONCE = 2_000_000
# A variance below this part of its terms is what rounding left of zero
_ROUNDING = 1e-12


def studentised_errors(numerators: Tensor, denominators: Tensor) -> Tensor:
    """Return (ratio of a resample − ratio) / standard error of the resample, sorted.

    The standard error is that of `ratio_of_sums`, with the leverages of the documents at hand. The
    result does not depend on the order of the documents, nor on the units of either sum.

    Args:
        numerators: float64 [..., n], n ≥ 2.
        denominators: float64 [..., n], positive.

    Returns:
        float64 [..., NUM_RESAMPLES]. Infinite where a resample moved although its documents agree
        with each other: nothing is known of such an error.
    """
    numerators, denominators = _in_order(numerators, denominators)
    total = denominators.sum(dim=-1, keepdim=True)
    shares = denominators / total
    residuals = numerators / total - shares * (numerators.sum(dim=-1, keepdim=True) / total)
    weights = (1 - shares).square().reciprocal()
    columns_nK = torch.stack(
        [
            residuals,
            shares,
            weights * residuals.square(),
            weights * residuals * shares,
            weights * shares.square(),
        ],
        dim=-1,
    )
    n = shares.shape[-1]
    sums = [torch.tensordot(counts, columns_nK, dims=([1], [-2])) for counts in _resamples(n)]
    sums_RK = torch.cat(sums).movedim(0, -2)
    return _errors(sums_RK, n=n).sort(dim=-1).values


def _errors(sums_RK: Tensor, *, n: int) -> Tensor:
    """Return the studentised error of each resample; unsorted [..., R]."""
    residual, share, squares, products, shares = sums_RK.unbind(dim=-1)
    moved = residual / share
    # Σ w (e − moved · b)² over the resample, multiplied out
    terms = squares + moved.square() * shares
    spread = terms - 2 * moved * products
    spread = torch.where(spread > _ROUNDING * terms, spread, 0.0)
    standard_error = (spread * (n - 1) / n).sqrt() / share
    return torch.where(moved == 0, 0.0, moved / standard_error)


def _in_order(numerators: Tensor, denominators: Tensor) -> tuple[Tensor, Tensor]:
    """Sort by numerator, and by denominator where that is equal."""
    for is_last in (False, True):
        order = (numerators if is_last else denominators).argsort(dim=-1, stable=True)
        numerators, denominators = numerators.gather(-1, order), denominators.gather(-1, order)
    return numerators, denominators


def _resamples(n: int) -> Iterator[Tensor]:
    """Yield how often each resample holds each document, float64 [some resamples, n]."""
    generator = torch.Generator().manual_seed(_SEED)
    at_once = max(1, _MOST_DRAWS_AT_ONCE // n)
    for start in range(0, NUM_RESAMPLES, at_once):
        rows = min(at_once, NUM_RESAMPLES - start)
        drawn = torch.randint(n, (rows, n), generator=generator)
        drawn += n * torch.arange(rows).unsqueeze(1)
        yield torch.bincount(drawn.flatten(), minlength=rows * n).view(rows, n).double()
