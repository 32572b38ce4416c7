"""Statistics compared with numpy, scipy and sums by hand."""

from functools import reduce
from operator import add

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from tests.methods.novelty.factories import drawn
from tritter.methods.novelty.statistics import (
    Calibration,
    Gaussian,
    Moments,
    share_bound,
    t_bounds,
)


def test_a_z_score_by_hand():
    batches = [torch.tensor([3.0, 5.0]), torch.tensor([4.0, 6.0])] * Calibration.full
    held = Calibration.of(batches)
    deviation = np.std([4.0, 5.0] * Calibration.full, ddof=1)
    assert held.mean == 4.5 and held.own_deviation == pytest.approx(deviation)
    z = held.z(torch.tensor([6.5, 7.5]))
    assert float(z.mean()) == pytest.approx((7.0 - 4.5) / deviation)
    assert torch.allclose(held.z(torch.tensor([6.5]), size=1), z[:1] / 2**0.5)


def test_the_deviation_is_floored_at_a_hundredth_of_the_mean():
    agreeing = Calibration.of([torch.tensor([4.0, 4.0])] * Calibration.full)
    assert agreeing.own_deviation == 0 and agreeing.deviation() == pytest.approx(0.04)


def test_few_batches_are_filled_up_by_what_is_usual():
    generator = torch.Generator().manual_seed(0)
    few = Calibration.of(4 + torch.randn(2, 16, generator=generator))
    spread = few.sample_squares - few.sample_total**2 / 32
    expected = (spread / 31) ** 0.5 / 4  # of the mean of sixteen independent samples
    filled = (2 * few.own_deviation**2 + 28 * expected**2) / 30
    assert few.deviation() == pytest.approx(filled**0.5)
    assert few.deviation(0.5) > few.deviation(0.3) > few.deviation()
    many = Calibration.of(4 + torch.randn(Calibration.full, 16, generator=generator))
    assert many.deviation(0.5) == many.own_deviation


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(1, 7), st.integers(0, 9))
def test_sums_of_parts_are_those_of_the_whole(sizes: list[int], features: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randn(size, features, generator=generator) for size in sizes]
    one, many = Moments.of(torch.cat(parts)), reduce(add, [Moments.of(part) for part in parts])
    assert one.n == many.n
    assert torch.allclose(one.total, many.total) and torch.allclose(one.outer, many.outer)
    left = many - Moments.of(parts[0])
    assert left.n == sum(sizes[1:]) and torch.allclose(
        left.outer, sum((p.double().T @ p.double() for p in parts[1:]), torch.zeros(1).double())
    )
    losses = [part[:, 0] for part in parts]
    whole = Calibration.of(losses)
    assert whole.mean == pytest.approx(np.mean([float(each.mean()) for each in losses]))
    assert (whole.batches, whole.samples) == (len(parts), sum(map(len, parts)))


def test_mean_scatter_and_distance_against_numpy():
    features = drawn(generator=torch.Generator().manual_seed(0), batch=50).features.double()
    held = Moments.of(features)
    rows = features.numpy()
    assert np.allclose(held.mean, rows.mean(axis=0))
    assert np.allclose(held.scatter / 49, np.cov(rows.T))
    covariance = held.shrunk_covariance()
    inverse = np.linalg.inv(covariance.numpy())
    offsets = rows - rows.mean(axis=0)
    squares = np.einsum("ni,ij,nj->n", offsets, inverse, offsets)
    gaussian = Gaussian.of(held.mean, covariance)
    assert np.allclose(gaussian.distances(features), (squares / 6) ** 0.5)
    document_mask = features[:8] + 1
    offset = document_mask.mean(dim=0).numpy() - rows.mean(axis=0)
    hotelling = 8 * offset @ inverse @ offset
    values = gaussian.centre_distance(document_mask)
    assert values.shape == (8,)
    assert float(values.mean()) == pytest.approx((hotelling / 6) ** 0.5)


def test_shrinkage_is_the_oracle_approximating_one():
    covariance = pytest.importorskip("sklearn.covariance")
    for n in (10, 40, 4000):  # scikit-learn omits the terms in 2/H
        features = torch.randn(n, 60, generator=torch.Generator().manual_seed(n)).double()
        features[:, :20] *= 3
        features -= features.mean(dim=0)
        ours = Moments.of(features).shrunk_covariance()
        theirs, _ = covariance.oas(features.numpy(), assume_centered=True)
        assert np.allclose(ours, theirs, atol=0.02 * np.trace(theirs) / 60)


@pytest.mark.parametrize("n", [2, 3, 5])
def test_a_covariance_of_too_few_samples_has_an_inverse(n: int) -> None:
    features = torch.randn(n, 24, generator=torch.Generator().manual_seed(n))
    features[:, 3] = 1.0  # a constant direction
    distances = Gaussian.of(
        Moments.of(features).mean, Moments.of(features).shrunk_covariance()
    ).distances(features)
    assert distances.isfinite().all()


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("kind", ["normal", "skewed"])
def test_t_intervals_cover_as_they_promise(kind: str) -> None:
    """2,000 samples of 32: the coverage of the lower bound is in its 99.9 % binomial interval.

    For skewed samples the coverage is higher, so spawning an expert is conservative.
    """
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2000, 32, generator=generator, dtype=torch.float64)
    samples, truth = (noise, 0.0) if kind == "normal" else (noise.exp(), np.exp(0.5))
    held = sum(t_bounds(row, confidence=0.95)[0] <= truth for row in samples)
    low, high = stats.binom.interval(0.999, 2000, 0.95)
    assert low <= held and (kind == "skewed" or held <= high)
    if kind == "skewed":
        assert held > high


def test_a_t_interval_is_scipys_and_one_sample_knows_nothing():
    values = torch.tensor([1.0, 2.0, 4.0])
    lower, upper = t_bounds(values, confidence=0.9)
    low, high = stats.t.interval(0.8, 2, loc=7 / 3, scale=stats.sem(values))
    assert (lower, upper) == (pytest.approx(low), pytest.approx(high))
    assert t_bounds(values[:1], confidence=0.9) == (-np.inf, np.inf)


@pytest.mark.parametrize(("count", "n"), [(0, 5000), (1, 5000), (3, 40), (40, 40)])
def test_bounds_of_a_share_are_clopper_and_pearsons(count: int, n: int) -> None:
    interval = stats.binomtest(count, n).proportion_ci(confidence_level=0.9)
    assert share_bound(count, n, confidence=0.95, is_lower=True) == pytest.approx(interval.low)
    assert share_bound(count, n, confidence=0.95, is_lower=False) == pytest.approx(interval.high)
