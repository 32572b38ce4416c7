"""Sums that statistics follow from, so that those of several processes add up; intervals.

n samples · H hidden size
"""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

DEVIATION_FLOOR = 0.01  # of the mean: few held-out batches may agree by chance
CALIBRATION_BATCHES = 30  # from which on their own deviation is trusted alone


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What a number is usually, of one skill: sums over batch means and over samples.

    Args:
        batches: how many; `total` and `squares` sum their means and the squares of these.
        samples: how many; `sample_total` and `sample_squares` likewise.
    """

    batches: int
    total: float
    squares: float
    samples: int
    sample_total: float
    sample_squares: float

    @classmethod
    def of(cls, batches: Iterable[Tensor]) -> "Calibration":
        """Sum up batches of samples, each [B]."""
        held = [each.double() for each in batches]
        means = torch.stack([each.mean() for each in held])
        samples = torch.cat(held)
        return cls(
            batches=len(means),
            total=float(means.sum()),
            squares=float(means.square().sum()),
            samples=len(samples),
            sample_total=float(samples.sum()),
            sample_squares=float(samples.square().sum()),
        )

    def __add__(self, other: "Calibration") -> "Calibration":
        one, two = asdict(self), asdict(other)
        return Calibration(**{name: one[name] + two[name] for name in one})

    @property
    def mean(self) -> float:
        """Of batch means."""
        return self.total / self.batches

    @property
    def own_deviation(self) -> float:
        """Of batch means, unbiased and not floored; 0 of a single one."""
        return _deviation(self.batches, self.total, self.squares)

    def deviation(self, usual: float = 0.0) -> float:
        """Return the deviation of batch means, at least a hundredth of the mean.

        Of fewer than 30 batches it is filled up: by the deviation that independent samples give,
        or, where that is larger, by what is `usual` for other skills, relative to the mean.
        """
        missing = max(0, CALIBRATION_BATCHES - self.batches)
        spread = _deviation(self.samples, self.sample_total, self.sample_squares)
        expected = spread / math.sqrt(self.samples / self.batches)
        guess = max(expected, abs(usual * self.mean))
        variance = self.batches * self.own_deviation**2 + missing * guess**2
        filled = math.sqrt(variance / (self.batches + missing))
        return max(filled, DEVIATION_FLOOR * abs(self.mean), 1e-12)

    def z(self, values: Tensor, *, usual: float = 0.0, size: int | None = None) -> Tensor:
        """Return how many deviations of batch means values lie above the mean; the shape kept.

        The mean of a batch's is the z-score of its mean.

        Args:
            usual: as for `deviation`.
            size: of the batch, where means of fewer samples than were summed up spread more.
        """
        few = 1.0 if size is None else max(1.0, self.samples / self.batches / size)
        return (values.double() - self.mean) / (self.deviation(usual) * math.sqrt(few))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Moments:
    """Count, sum float64 [H] and sum of outer products float64 [H, H] of features."""

    n: int
    total: Tensor
    outer: Tensor

    @classmethod
    def of(cls, features: Tensor) -> "Moments":
        """Sum up features [n, H]."""
        wide = features.double()
        return cls(n=len(wide), total=wide.sum(dim=0), outer=wide.T @ wide)

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(
            n=self.n + other.n, total=self.total + other.total, outer=self.outer + other.outer
        )

    def __sub__(self, part: "Moments") -> "Moments":
        return Moments(
            n=self.n - part.n, total=self.total - part.total, outer=self.outer - part.outer
        )

    @property
    def mean(self) -> Tensor:
        return self.total / self.n

    @property
    def scatter(self) -> Tensor:
        """Σ (x − mean)(x − mean)ᵀ."""
        return self.outer - self.n * torch.outer(self.mean, self.mean)

    def shrunk_covariance(self) -> Tensor:
        """Return the covariance, shrunk towards a multiple of the identity.

        By how much, the oracle approximating estimator says (Chen et al. 2010, equation 23), which
        needs no more than these sums.
        """
        size = len(self.total)
        sample = self.scatter / self.n
        trace, square = sample.trace(), sample.square().sum()
        above = (1 - 2 / size) * square + trace**2
        below = (self.n + 1 - 2 / size) * (square - trace**2 / size)
        share = float(above / below) if below > 0 else 1.0
        target = torch.eye(size, dtype=torch.float64) * trace / size
        share = min(share, 1.0)
        return _regular((1 - share) * sample + share * target)

    def covariance_towards(self, reference: Tensor) -> Tensor:
        """Return the covariance with H samples' worth of another one, [H, H], mixed in."""
        weight = len(self.total)
        return _regular((self.scatter + weight * reference) / (self.n - 1 + weight))

    def state_dict(self) -> dict[str, Any]:
        return {"n": self.n, "total": self.total, "outer": self.outer}


@dataclass(frozen=True, slots=True, eq=False)
class Gaussian:
    """A mean float64 [H] and the Cholesky factor of a covariance [H, H]."""

    mean: Tensor
    factor: Tensor

    @classmethod
    def of(cls, mean: Tensor, covariance: Tensor) -> "Gaussian":
        return cls(mean, torch.linalg.cholesky(covariance))

    def whitened(self, features: Tensor) -> Tensor:
        """Return features [n, H] in units of the deviation in every direction, float64."""
        offsets = (features.double() - self.mean).T
        return torch.linalg.solve_triangular(self.factor, offsets, upper=False).T

    def distances(self, features: Tensor) -> Tensor:
        """Return Mahalanobis distances by √H, float64 [n]: about 1 where the Gaussian is true."""
        return self.whitened(features).square().mean(dim=1).sqrt()

    def centre_distance(self, features: Tensor) -> Tensor:
        """Return the distance of a batch's mean as values float64 [n] of its samples.

        It is Mahalanobis' by √(H/n) (Hotelling's T by √H): about 1 for n independent samples of the
        Gaussian, however many. A sample's value is its part along the direction of the mean; their
        mean is the distance itself, exactly.
        """
        whitened = self.whitened(features)
        mean = whitened.mean(dim=0)
        scale = math.sqrt(len(whitened) / whitened.shape[1])
        return scale * (whitened @ mean) / mean.norm().clamp_min(1e-12)


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean with one-sided bounds, each of which holds with the confidence."""

    value: float
    lower: float
    upper: float


def t_interval(values: Tensor, *, confidence: float) -> Interval:
    """Return the mean of independent samples [n] with Student's bounds; infinite for one sample.

    Of losses, whose long tail lies above, the lower bound errs to the safe side: an outlier that
    lifts the mean widens the interval by more.
    """
    from scipy.special import stdtrit  # half a second, which importing this room need not take

    n, value = len(values), float(values.double().mean())
    if n < 2:
        return Interval(value, -math.inf, math.inf)
    error = float(values.double().std()) / math.sqrt(n)
    margin = float(stdtrit(n - 1, confidence)) * error
    return Interval(value, value - margin, value + margin)


def share_bound(count: int, n: int, *, confidence: float, is_lower: bool) -> float:
    """Return the one-sided bound of a share of which `count` of n were seen (Clopper, Pearson)."""
    from scipy.special import betaincinv

    if is_lower:
        return 0.0 if count == 0 else float(betaincinv(count, n - count + 1, 1 - confidence))
    return 1.0 if count == n else float(betaincinv(count + 1, n - count, confidence))


def _deviation(n: int, total: float, squares: float) -> float:
    return math.sqrt(max(0.0, squares - total**2 / n) / (n - 1)) if n > 1 else 0.0


def _regular(covariance: Tensor) -> Tensor:
    """Return a covariance that has an inverse, though a direction never varied."""
    size = len(covariance)
    least = 1e-8 * covariance.trace() / size + 1e-12
    return covariance + least * torch.eye(size, dtype=covariance.dtype)
