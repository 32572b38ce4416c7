"""Sufficient statistics as sums that add up over processes; confidence intervals.

n samples · H hidden size
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

_DEVIATION_FLOOR = 0.01  # relative to the mean: few held-out batches may agree by chance


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """Usual values of a quantity for one skill: sums over batch means and over samples.

    Args:
        batches: number of batches.
        total: sum of batch means.
        squares: sum of squared batch means.
        samples: number of samples.
        sample_total: sum over samples.
        sample_squares: sum of squares over samples.
    """

    full: ClassVar[int] = 30  # batches from which on their own deviation is used alone

    batches: int
    total: float
    squares: float
    samples: int
    sample_total: float
    sample_squares: float

    @classmethod
    def of(cls, batches: Iterable[Tensor]) -> "Calibration":
        """Return the sums of batches of samples, each [B]."""
        wide = [each.double() for each in batches]
        means = torch.stack([each.mean() for each in wide])
        samples = torch.cat(wide)
        return cls(
            batches=len(means),
            total=float(means.sum()),
            squares=float(means.square().sum()),
            samples=len(samples),
            sample_total=float(samples.sum()),
            sample_squares=float(samples.square().sum()),
        )

    @property
    def mean(self) -> float:
        """Mean of batch means."""
        return self.total / self.batches

    @property
    def own_deviation(self) -> float:
        """Unbiased standard deviation of batch means, without a floor; 0 for a single batch."""
        return _deviation(self.batches, self.total, self.squares)

    def deviation(self, usual: float = 0.0) -> float:
        """Return the standard deviation of batch means, at least a hundredth of the mean.

        With fewer than 30 batches, it is combined with a prior: the deviation for independent
        samples or, if larger, `usual`: the deviation for other skills, relative to the mean.
        """
        missing = max(0, self.full - self.batches)
        spread = _deviation(self.samples, self.sample_total, self.sample_squares)
        expected = spread / math.sqrt(self.samples / self.batches)
        guess = max(expected, abs(usual * self.mean))
        variance = self.batches * self.own_deviation**2 + missing * guess**2
        filled = math.sqrt(variance / (self.batches + missing))
        return max(filled, _DEVIATION_FLOOR * abs(self.mean), 1e-12)

    def z(self, values: Tensor, *, usual: float = 0.0, size: int | None = None) -> Tensor:
        """Return z-scores of values in deviations of batch means; the shape is kept.

        The mean over a batch is the z-score of the batch mean.

        Args:
            usual: as for `deviation`.
            size: size of the batch, since means of fewer samples vary more.
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

        The weight is that of the oracle approximating shrinkage estimator (Chen et al. 2010,
        equation 23), which needs only these sums.
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
        """Return the covariance combined with another one, [H, H], at the weight of H samples."""
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
        """Return features [n, H] scaled to unit deviation in every direction, float64."""
        offsets = (features.double() - self.mean).T
        return torch.linalg.solve_triangular(self.factor, offsets, upper=False).T

    def distances(self, features: Tensor) -> Tensor:
        """Return Mahalanobis distances by √H, float64 [n]: about 1 for samples of the Gaussian."""
        return self.whitened(features).square().mean(dim=1).sqrt()

    def centre_distance(self, features: Tensor) -> Tensor:
        """Return the distance of a batch mean, as values float64 [n] of its samples.

        It is the Mahalanobis distance divided by √(H/n) (Hotelling's T divided by √H): about 1 for
        n independent samples of the Gaussian, for any n. The value of a sample is its component
        along the mean's direction; the mean of the values is exactly the distance.
        """
        whitened = self.whitened(features)
        mean = whitened.mean(dim=0)
        scale = math.sqrt(len(whitened) / whitened.shape[1])
        return scale * (whitened @ mean) / mean.norm().clamp_min(1e-12)


def t_bounds(values: Tensor, *, confidence: float) -> tuple[float, float]:
    """Return one-sided Student bounds of the mean of independent samples [n].

    They are infinite for one sample. For losses, which have a long upper tail, the lower bound is
    conservative: an outlier raises the mean but widens the interval by more.
    """
    from scipy.special import stdtrit  # takes half a second to import

    n, value = len(values), float(values.double().mean())
    if n < 2:
        return -math.inf, math.inf
    margin = float(stdtrit(n - 1, confidence)) * float(values.double().std()) / math.sqrt(n)
    return value - margin, value + margin


def share_bound(count: int, n: int, *, confidence: float, is_lower: bool) -> float:
    """Return the one-sided Clopper–Pearson bound of a share with `count` of n observed."""
    from scipy.special import betaincinv

    if is_lower:
        return 0.0 if count == 0 else float(betaincinv(count, n - count + 1, 1 - confidence))
    return 1.0 if count == n else float(betaincinv(count + 1, n - count, confidence))


def _deviation(n: int, total: float, squares: float) -> float:
    return math.sqrt(max(0.0, squares - total**2 / n) / (n - 1)) if n > 1 else 0.0


def _regular(covariance: Tensor) -> Tensor:
    """Return a regularised covariance that is invertible even if a direction never varied."""
    size = len(covariance)
    least = 1e-8 * covariance.trace() / size + 1e-12
    return covariance + least * torch.eye(size, dtype=covariance.dtype)
