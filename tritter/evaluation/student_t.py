"""Student's t and the normal distribution, without scipy: for powers, and for means over seeds."""

import math
from functools import lru_cache
from statistics import NormalDist

# From here on the first correction of the Cornish-Fisher series is exact to 1e-7.
_LARGE_DEGREES_OF_FREEDOM = 10_000
_MAX_TERMS = 10_000


def normal_quantile(probability: float) -> float:
    """Return the standard normal quantile of a probability in (0, 1)."""
    return NormalDist().inv_cdf(probability)


@lru_cache(maxsize=4096)
def student_t_quantile(probability: float, degrees_of_freedom: int) -> float:
    """Return the quantile of Student's t.

    Args:
        probability: in (0, 1).
        degrees_of_freedom: below 1 nothing is known, so the quantile is infinite.
    """
    if not 0 < probability < 1:
        raise ValueError(f"probability must be between 0 and 1, got {probability}")
    if probability < 0.5:
        return -student_t_quantile(1 - probability, degrees_of_freedom)
    if degrees_of_freedom < 1:
        return math.inf
    if degrees_of_freedom >= _LARGE_DEGREES_OF_FREEDOM:
        z = normal_quantile(probability)
        return z + (z**3 + z) / (4 * degrees_of_freedom)
    return _bisect(probability, degrees_of_freedom)


def student_t_cdf(t: float, degrees_of_freedom: int) -> float:
    """Return P(T <= t); Abramowitz and Stegun 26.7.1 through the incomplete beta function."""
    x = degrees_of_freedom / (degrees_of_freedom + t * t)
    tail = 0.5 * _incomplete_beta(x, degrees_of_freedom / 2, 0.5)
    return 1 - tail if t >= 0 else tail


def _bisect(probability: float, degrees_of_freedom: int) -> float:
    low, high = 0.0, 1.0
    while student_t_cdf(high, degrees_of_freedom) < probability:
        low, high = high, 2 * high
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        if student_t_cdf(middle, degrees_of_freedom) < probability:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _incomplete_beta(x: float, a: float, b: float) -> float:
    """Return the regularised incomplete beta function I_x(a, b)."""
    if x <= 0 or x >= 1:
        return 0.0 if x <= 0 else 1.0
    log_front = a * math.log(x) + b * math.log1p(-x)
    log_front += math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    front = math.exp(log_front)
    # The fraction converges fast only on this side of the mean; the other side is the complement.
    if x < (a + 1) / (a + b + 2):
        return front * _beta_fraction(x, a, b) / a
    return 1 - front * _beta_fraction(1 - x, b, a) / b


def _beta_fraction(x: float, a: float, b: float) -> float:
    """Evaluate the continued fraction of I_x(a, b) (DLMF 8.17.22) by the modified Lentz method."""
    tiny = 1e-300
    c, d = 1.0, 1 / _away_from_zero(1 - (a + b) * x / (a + 1), tiny)
    fraction = d
    for m in range(1, _MAX_TERMS):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for term in (even, odd):
            d = 1 / _away_from_zero(1 + term * d, tiny)
            c = _away_from_zero(1 + term / c, tiny)
            fraction *= c * d
        if abs(c * d - 1) < 1e-15:
            return fraction
    raise ArithmeticError(f"incomplete beta did not converge at x={x}, a={a}, b={b}")


def _away_from_zero(value: float, tiny: float) -> float:
    return value if abs(value) > tiny else tiny
