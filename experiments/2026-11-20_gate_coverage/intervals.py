"""Three one-sided bounds of a ratio of sums, many samples at once.

S samples · n documents
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from scipy.special import stdtrit
from torch import Tensor

from tritter.evaluation.statistics import studentised_errors

# Each cuts what is left at least in half, or converges quadratically
_ROOT_STEPS = 60
_BOUND_STEPS = 30


@dataclass(frozen=True, slots=True, eq=False)
class Bounds:
    """One-sided bounds of the relative change, float64 [S] each."""

    lower: Tensor
    upper: Tensor


def student_t(before_Sn: Tensor, after_Sn: Tensor, *, confidence: float) -> Bounds:
    """Value ± t · jackknife error: what the gate used at first."""
    value, error = _value_and_error(before_Sn, after_Sn)
    margin = float(stdtrit(before_Sn.shape[1] - 1, confidence)) * error
    return Bounds(value - margin - 1, value + margin - 1)


def bootstrap_t(before_Sn: Tensor, after_Sn: Tensor, *, confidence: float) -> Bounds:
    """Value − error · quantile of the studentised bootstrap: what the gate uses."""
    value, error = _value_and_error(before_Sn, after_Sn)
    errors_SR = studentised_errors(after_Sn, before_Sn)
    rank = math.ceil(confidence * (errors_SR.shape[1] + 1)) - 1
    above = errors_SR[:, rank].clamp(min=0)
    below = -errors_SR[:, errors_SR.shape[1] - 1 - rank].clamp(max=0)
    return Bounds(value - error * above - 1, value + error * below - 1)


def empirical_likelihood(before_Sn: Tensor, after_Sn: Tensor, *, confidence: float) -> Bounds:
    """The ratios that the empirical likelihood does not reject (Owen 2001, chapters 2 and 3).

    −2 log R(θ) for mean zero of after − θ · before, calibrated by F(1, n − 1), which is Student's
    t squared: it has the coverage of t for normal data. No bound lies beyond the largest change of
    a document.
    """
    ratios_Sn = after_Sn / before_Sn
    value, _ = _value_and_error(before_Sn, after_Sn)
    limit = float(stdtrit(before_Sn.shape[1] - 1, confidence)) ** 2

    def bound(outside: Tensor) -> Tensor:
        inside = value.clone()
        for _ in range(_BOUND_STEPS):
            middle = (inside + outside) / 2
            accepted = log_likelihood_ratio(after_Sn - middle[:, None] * before_Sn) <= limit
            inside = torch.where(accepted, middle, inside)
            outside = torch.where(accepted, outside, middle)
        return inside

    return Bounds(bound(ratios_Sn.min(dim=1).values) - 1, bound(ratios_Sn.max(dim=1).values) - 1)


INTERVALS: dict[str, Callable[..., Bounds]] = {
    "t": student_t,
    "bootstrap-t": bootstrap_t,
    "empirical likelihood": empirical_likelihood,
}


def log_likelihood_ratio(terms_Sn: Tensor) -> Tensor:
    """Return −2 log R for mean zero of each row: 2 Σ log(1 + λ z) with Σ z / (1 + λ z) = 0.

    Infinite where zero lies outside the row's range. λ by Newton's method, kept between bounds:
    the sum falls in λ.
    """
    n = terms_Sn.shape[1]
    lowest, highest = terms_Sn.min(dim=1).values, terms_Sn.max(dim=1).values
    is_outside = (lowest >= 0) | (highest <= 0)
    # Every weight 1 / n / (1 + λ z) is at most 1
    low = torch.where(is_outside, 0.0, (1 / n - 1) / highest)
    high = torch.where(is_outside, 0.0, (1 / n - 1) / lowest)
    multiplier = torch.zeros_like(low)
    for _ in range(_ROOT_STEPS):
        pieces_Sn = terms_Sn / (1 + multiplier[:, None] * terms_Sn)
        slope, total = pieces_Sn.square().sum(dim=1), pieces_Sn.sum(dim=1)
        low = torch.where(total > 0, multiplier, low)
        high = torch.where(total < 0, multiplier, high)
        step = multiplier + total / slope
        is_between = (step > low) & (step < high)
        following = torch.where(is_between, step, (low + high) / 2)
        has_settled = (following - multiplier).abs() <= 1e-10 * (high - low)
        multiplier = following
        if bool((has_settled | is_outside).all()):
            break
    statistic = 2 * torch.log1p(multiplier[:, None] * terms_Sn).sum(dim=1)
    return torch.where(is_outside, math.inf, statistic)


def _value_and_error(before_Sn: Tensor, after_Sn: Tensor) -> tuple[Tensor, Tensor]:
    """`Estimate.of_ratio` of every row."""
    n = before_Sn.shape[1]
    total = before_Sn.sum(dim=1, keepdim=True)
    value = after_Sn.sum(dim=1, keepdim=True) / total
    residuals = (after_Sn - value * before_Sn) / total / (1 - before_Sn / total)
    return value[:, 0], (residuals.square().sum(dim=1) * (n - 1) / n).sqrt()
