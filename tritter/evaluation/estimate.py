"""A number with its uncertainty, and the clustered ratio that every score here is."""

import math
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from tritter.evaluation.bootstrap import studentised_errors


@dataclass(frozen=True, slots=True)
class Ratio:
    """A ratio of sums, its standard error and the number of independent documents behind it."""

    value: float
    standard_error: float
    n: int


@dataclass(frozen=True, slots=True, eq=False)
class Estimate:
    """A value with bounds.

    Attributes:
        value: what was measured.
        standard_error: of the value.
        n: independent documents behind it.
        errors: float64 [R], sorted: errors in units of their own standard error that samples like
            this one make, or their quantiles. Empty where nothing is known of them.
    """

    value: float
    standard_error: float
    n: int
    errors: Tensor

    def upper(self, confidence: float) -> float:
        """Return the one-sided upper bound: the truth lies below it with this confidence.

        Args:
            confidence: from 0.5; above R / (R + 1) no bound is known.
        """
        return self.value + self._margin(-self.errors.flip(0), confidence)

    def lower(self, confidence: float) -> float:
        """Return the one-sided lower bound: the truth lies above it with this confidence."""
        return self.value - self._margin(self.errors, confidence)

    def documents_to_decide(
        self, bound: float, confidence: float, power: float = 0.8
    ) -> int | None:
        """Return how many documents like these would settle on which side of `bound` the truth is.

        Assumes that the value stays where it is, that the error falls with the root of n, and that
        what the bound is wider than a normal one, in standard errors, does so too: it is skewness.

        Returns:
            The total number of documents, or None when no number is known to be enough.
        """
        distance = abs(self.value - bound)
        is_below = self.value < bound
        margin = (self.upper if is_below else self.lower)(confidence) - self.value
        if not math.isfinite(margin) or distance == 0:
            return None
        z, root = NormalDist().inv_cdf(confidence), math.sqrt(self.n)
        deviation = self.standard_error * root
        excess = max(0.0, abs(margin) - z * self.standard_error) * root
        # distance · x² = (z(confidence) + z(power)) · deviation · x + excess · root, with x = √n
        linear = (z + NormalDist().inv_cdf(power)) * deviation
        x = (linear + math.sqrt(linear**2 + 4 * distance * excess * root)) / (2 * distance)
        return max(2, math.ceil(x**2))

    def _margin(self, errors: Tensor, confidence: float) -> float:
        """Return how far the bound lies from the value, for sorted errors towards the value."""
        if self.standard_error == 0:
            return 0.0
        rank = math.ceil(confidence * (len(errors) + 1))
        if not len(errors) or rank > len(errors):
            return math.inf
        return max(0.0, self.standard_error * float(errors[rank - 1]))


def ratio_of_sums(numerators: Tensor, denominators: Tensor) -> Ratio:
    """Return Σ numerator / Σ denominator over independent documents.

    The standard error is the linearised (Taylor) one of survey sampling (Cochran, Sampling
    Techniques, 6.4), each document one cluster, with the residual of a document divided by
    1 - its share of the denominator: this is the delete-one jackknife, and it keeps the error
    honest when a few long documents dominate.

    Args:
        numerators: float64 [n], one sum per document.
        denominators: float64 [n], positive.
    """
    n = len(numerators)
    total = denominators.sum()
    value = numerators.sum() / total
    if n < 2:
        return Ratio(float(value), math.inf, n=n)
    leverage = denominators / total
    residuals = (numerators - value * denominators) / total / (1 - leverage)
    # n - 1 over n is the jackknife's factor; the leverage already undid the lost degree of freedom.
    variance = residuals.square().sum() * (n - 1) / n
    return Ratio(float(value), float(torch.sqrt(variance)), n=n)


def bounded_ratio(numerators: Tensor, denominators: Tensor) -> Estimate:
    """Return `ratio_of_sums` with the errors that resamples of the documents make.

    Args:
        numerators, denominators: as there.
    """
    ratio = ratio_of_sums(numerators, denominators)
    if ratio.n < 2:
        errors = torch.empty(0, dtype=torch.float64)
    else:
        errors = studentised_errors(numerators, denominators)
    return Estimate(ratio.value, ratio.standard_error, n=ratio.n, errors=errors)


def finite_or_none(value: float | None) -> float | None:
    """Return a number that JSON can hold: None for what is missing, infinite or not a number."""
    return value if value is not None and math.isfinite(value) else None
