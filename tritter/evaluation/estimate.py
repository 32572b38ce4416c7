"""A number with its uncertainty, and the clustered ratio that every score here is."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tritter.evaluation.student_t import normal_quantile, student_t_quantile

_MOST_DOCUMENTS = 10**9


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value, its standard error and the number of independent documents behind it."""

    value: float
    standard_error: float
    n: int
    degrees_of_freedom: int

    def upper(self, confidence: float) -> float:
        """Return the one-sided upper bound: the truth lies below it with this confidence."""
        return self.value + self._margin(confidence)

    def lower(self, confidence: float) -> float:
        """Return the one-sided lower bound: the truth lies above it with this confidence."""
        return self.value - self._margin(confidence)

    def interval(self, confidence: float) -> tuple[float, float]:
        """Return the two-sided interval (lower, upper)."""
        one_sided = (1 + confidence) / 2
        return self.lower(one_sided), self.upper(one_sided)

    def documents_to_decide(
        self, bound: float, confidence: float, power: float = 0.8
    ) -> int | None:
        """Return how many documents like these would settle on which side of `bound` the truth is.

        Assumes that the value stays where it is and that the error falls with the root of n.

        Returns:
            The total number of documents, or None when no number is known to be enough.
        """
        distance = abs(self.value - bound)
        if not math.isfinite(self.standard_error) or distance == 0:
            return None
        deviation = self.standard_error * math.sqrt(self.n)

        def is_enough(n: int) -> bool:
            quantiles = student_t_quantile(confidence, n - 1) + normal_quantile(power)
            return quantiles * deviation <= distance * math.sqrt(n)

        return _smallest(2, is_enough)

    def _margin(self, confidence: float) -> float:
        if self.standard_error == 0:
            return 0.0
        return student_t_quantile(confidence, self.degrees_of_freedom) * self.standard_error


def ratio_of_sums(numerators: Tensor, denominators: Tensor) -> Estimate:
    """Estimate Σ numerator / Σ denominator over independent documents.

    The standard error is the linearised (Taylor) one of survey sampling (Cochran, Sampling
    Techniques, 6.4), each document one cluster, with the residual of a document divided by
    1 - its share of the denominator: this is the delete-one jackknife, and it keeps the intervals
    honest when a few long documents dominate.

    Args:
        numerators: float64 [n], one sum per document.
        denominators: float64 [n], positive.
    """
    n = len(numerators)
    total = denominators.sum()
    value = numerators.sum() / total
    if n < 2:
        return Estimate(float(value), math.inf, n=n, degrees_of_freedom=0)
    leverage = denominators / total
    residuals = (numerators - value * denominators) / total / (1 - leverage)
    # n - 1 over n is the jackknife's factor; the leverage already undid the lost degree of freedom.
    variance = residuals.square().sum() * (n - 1) / n
    return Estimate(float(value), float(torch.sqrt(variance)), n=n, degrees_of_freedom=n - 1)


def finite_or_none(value: float | None) -> float | None:
    """Return a number that JSON can hold: None for what is missing, infinite or not a number."""
    return value if value is not None and math.isfinite(value) else None


def _smallest(first: int, holds: Callable[[int], bool]) -> int | None:
    """Return the smallest n >= first for which a monotone condition holds."""
    low, high = first - 1, first
    while not holds(high):
        if high > _MOST_DOCUMENTS:
            return None
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high
