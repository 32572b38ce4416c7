import math
from dataclasses import replace

import pytest
import torch
from scipy.special import stdtrit
from torch import Tensor

from tritter.errors import TritterError
from tritter.evaluation.statistics import (
    Estimate,
    _bounded_ratio,
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def test_two_documents_by_hand(make_losses):
    before = make_losses(torch.tensor([100.0, 300.0]))
    after = make_losses(torch.tensor([110.0, 300.0]))
    change = before.relative_forgetting(after)
    # Without the first document the ratio is 1, without the second 1.1: jackknife of two values.
    assert change.value == pytest.approx(0.025)
    jackknife = math.sqrt((1 / 2) * ((1.0 - 1.025) ** 2 + (1.1 - 1.025) ** 2))
    assert change.standard_error == pytest.approx(jackknife)
    # A quarter of the resamples holds one of the documents twice, another quarter the other.
    assert change.n == 2 and change.upper(0.95) == math.inf and change.lower(0.95) == -math.inf


def test_error_equals_the_delete_one_jackknife():
    generator = torch.Generator().manual_seed(1)
    denominators = torch.rand(12, generator=generator, dtype=torch.float64) + 0.1
    numerators = denominators * (1 + torch.randn(12, generator=generator, dtype=torch.float64))
    estimate = Estimate.of_ratio(numerators, denominators)
    left_out = (numerators.sum() - numerators) / (denominators.sum() - denominators)
    jackknife = ((left_out - estimate.value).square().sum() * 11 / 12).sqrt()
    assert estimate.standard_error == pytest.approx(float(jackknife))


def test_sign_and_scale(make_losses):
    before = make_losses(torch.tensor([100.0, 200.0, 50.0]))
    worse, better = make_losses(before.values * 1.03), make_losses(before.values * 0.9)
    assert before.relative_forgetting(worse).value == pytest.approx(0.03)
    assert before.relative_forgetting(better).value == pytest.approx(-0.1)
    assert before.relative_forgetting(worse).standard_error == pytest.approx(0, abs=1e-12)


def test_bounds_are_read_off_the_errors_of_resamples():
    errors = torch.tensor([-3.0, -1.0, 0.0, 0.5, 1.0]).double()
    estimate = Estimate(1.0, 0.1, n=11, errors=errors)
    # The truth lies as far from the value as the value from its resamples, on the other side.
    assert estimate.upper(5 / 6) == pytest.approx(1.3)
    assert estimate.lower(5 / 6) == pytest.approx(0.9)
    assert estimate.upper(4 / 6) == pytest.approx(1.1)
    assert estimate.upper(0.9) == math.inf and estimate.lower(0.9) == -math.inf
    assert Estimate(1.0, 0.1, n=11, errors=errors + 5).upper(0.6) == 1.0  # never below the value


def test_one_document_knows_nothing(make_losses):
    change = make_losses(torch.tensor([5.0])).relative_forgetting(make_losses(torch.tensor([6.0])))
    assert change.upper(0.95) == math.inf and change.lower(0.95) == -math.inf
    assert change.documents_to_decide(0.05, 0.95) is None


def normal_errors(n: int) -> Tensor:
    return torch.special.ndtri((torch.arange(n).double() + 1) / (n + 1))


def test_documents_to_decide_is_the_least_that_has_the_power():
    estimate = Estimate(0.04, 0.02, n=20, errors=normal_errors(1999))
    needed = estimate.documents_to_decide(0.05, 0.95)
    # (1.645 + 0.842)² (0.02 √20 / 0.01)²
    assert needed == 495
    assert estimate.documents_to_decide(0.05, 0.99) > needed
    assert estimate.documents_to_decide(0.08, 0.95) < needed
    assert estimate.documents_to_decide(0.04, 0.95) is None
    # A bound of three errors instead of 1.645: what is more falls with n, the rest with its root.
    skewed = Estimate(0.04, 0.02, n=20, errors=normal_errors(1999) - 3 + 1.645)
    more = skewed.documents_to_decide(0.05, 0.95)
    width = (1.6449 + 0.8416) * 0.02 * math.sqrt(20 / more) + (3 - 1.6449) * 0.02 * 20 / more
    assert more > needed and width == pytest.approx(0.01, rel=1e-3)
    assert skewed.documents_to_decide(0.03, 0.95) == needed  # the other side is not skewed


@pytest.mark.full
def test_promised_number_of_documents_decides_as_often_as_promised():
    estimate = Estimate(0.04, 0.05 / math.sqrt(20), n=20, errors=normal_errors(1999))
    needed = estimate.documents_to_decide(0.05, 0.95)
    ones = torch.ones(needed, dtype=torch.float64)
    samples = 0.04 + 0.05 * normal(200, needed)
    decided = sum(_bounded_ratio(changes, ones).upper(0.95) <= 0.05 for changes in samples)
    assert decided / 200 == pytest.approx(0.8, abs=0.09)


@pytest.mark.parametrize("n", [60, 1000])
def test_for_normal_data_the_bounds_are_those_of_students_t(n):
    before = torch.ones(n, dtype=torch.float64)
    estimate = _bounded_ratio(before * (1.02 + 0.05 * normal(n, seed=n)), before)
    margin = stdtrit(n - 1, 0.95) * estimate.standard_error
    assert estimate.upper(0.95) - estimate.value == pytest.approx(margin, rel=0.12)
    assert estimate.value - estimate.lower(0.95) == pytest.approx(margin, rel=0.12)


def test_bootstrap_is_that_of_resamples_one_after_the_other():
    """Compare with a loop over resamples that uses the jackknife and other draws."""
    before = torch.exp(0.5 * normal(40, seed=1))
    after = before * (1 + torch.exp(normal(40, seed=2)))
    estimate = _bounded_ratio(after, before)
    generator = torch.Generator().manual_seed(5)
    errors = []
    for _ in range(4000):
        drawn = torch.randint(40, (40,), generator=generator)
        again = Estimate.of_ratio(after[drawn], before[drawn])
        errors.append((again.value - estimate.value) / again.standard_error)
    quantiles = torch.tensor(errors).quantile(torch.tensor([0.05, 0.95])).tolist()
    error = estimate.standard_error
    assert (estimate.value - estimate.upper(0.95)) / error == pytest.approx(quantiles[0], rel=0.1)
    assert (estimate.value - estimate.lower(0.95)) / error == pytest.approx(quantiles[1], rel=0.1)
    # Skewed to the right: the truth may lie further above than below.
    assert quantiles[0] < -1.15 * quantiles[1]


def test_bounds_depend_neither_on_units_nor_on_the_order_of_documents():
    before, after = torch.exp(normal(50, seed=1)), torch.exp(normal(50, seed=1) + 0.1)
    after *= 1 + 0.1 * normal(50, seed=3)
    first = _bounded_ratio(after, before)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    for other in (
        _bounded_ratio(after[order], before[order]),
        _bounded_ratio(after / math.log(2), before / math.log(2)),
        _bounded_ratio(after, before),
    ):
        for confidence in (0.6, 0.95, 0.999):
            assert other.upper(confidence) == pytest.approx(first.upper(confidence), rel=1e-9)
            assert other.lower(confidence) == pytest.approx(first.lower(confidence), rel=1e-9)


def test_more_confidence_is_never_a_closer_bound():
    before = torch.exp(normal(35, seed=1))
    estimate = _bounded_ratio(before * torch.exp(normal(35, seed=2)), before)
    confidences = [0.501, 0.6, 0.8, 0.9, 0.95, 0.99, 0.999]
    upper = [estimate.upper(confidence) for confidence in confidences]
    lower = [estimate.lower(confidence) for confidence in confidences]
    assert upper == sorted(upper) and lower == sorted(lower, reverse=True)
    assert lower[0] <= estimate.value <= upper[0]


def test_a_bound_is_unknown_where_one_document_makes_the_whole_change(make_losses):
    """A third of the resamples lack it, so all their documents agree."""
    before = 100 + normal(40, seed=1).abs()
    hit = torch.zeros(40, dtype=torch.float64).index_fill(0, torch.tensor(3), 0.6)
    change = make_losses(before).relative_forgetting(make_losses(before * (1.01 + hit)))
    assert change.upper(0.95) == math.inf and math.isfinite(change.lower(0.95))
    assert change.documents_to_decide(0.5, 0.95) is None


def test_documents_that_carry_the_change(make_losses):
    before = make_losses(torch.full((40,), 100.0))
    rise = torch.full((40,), 1.01).index_fill(0, torch.tensor([7, 30]), 1.5)
    rise[30] = 1.6
    assert before.dominant_items(make_losses(before.values * rise)) == ("d30",)
    rise[7] = 1.59
    assert before.dominant_items(make_losses(before.values * rise)) == ("d30", "d7")
    assert before.dominant_items(before) == ()


@pytest.mark.full
def test_upper_bound_covers_and_errors_per_token_do_not():
    """Documents of uneven length with individual effects; the true rise is 2 %."""
    num_corpora, n, truth = 600, 60, 1.02
    num_tokens = torch.exp(5 + 0.7 * normal(num_corpora, n, seed=1)).round()
    before = num_tokens * (3 + 0.3 * normal(num_corpora, n, seed=2))
    after = before * (truth + 0.03 * normal(num_corpora, n, seed=3))
    covered = covered_per_token = 0
    for index in range(num_corpora):
        estimate = _bounded_ratio(after[index], before[index])
        covered += estimate.upper(0.95) >= truth
        residuals = (after[index] - estimate.value * before[index]) / before[index].sum()
        # As if the tokens of a document were that many independent observations.
        per_token = float((residuals.square() / num_tokens[index]).sum().sqrt())
        covered_per_token += estimate.value + 1.645 * per_token >= truth
    assert 0.92 <= covered / num_corpora <= 0.98
    assert covered_per_token / num_corpora < 0.7


@pytest.mark.parametrize("sign", [1, -1])
def test_pairing_is_what_makes_small_changes_visible(make_losses, sign):
    generator = torch.Generator().manual_seed(0)
    nats = 300 + 100 * torch.randn(60, generator=generator)
    before, after = make_losses(nats), make_losses(nats * (1 + sign * 0.01))
    change = before.relative_forgetting(after)
    unpaired = Estimate.of_ratio(before.values, before.weights["bytes"].double())
    assert change.value == pytest.approx(sign * 0.01, abs=1e-6)
    assert change.standard_error < 0.01 * unpaired.standard_error / unpaired.value


def test_what_does_not_pair_is_refused(make_losses):
    before = make_losses(torch.tensor([1.0, 2.0]))
    with pytest.raises(TritterError, match="2 items were scored before and 3 after"):
        before.relative_forgetting(make_losses(torch.tensor([1.0, 2.0, 3.0])))
    renamed = replace(before, identifiers=("d0", "other"))
    longer = make_losses(before.values, num_bytes=torch.tensor([100, 102]))
    for other in (renamed, longer):
        with pytest.raises(TritterError, match="requires the same items"):
            before.relative_forgetting(other)


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_losses_that_are_no_numbers_are_refused(make_losses, broken):
    good, bad = make_losses(torch.tensor([1.0, 2.0])), make_losses(torch.tensor([1.0, broken]))
    for before, after in ((good, bad), (bad, good), (make_losses(torch.zeros(2)), good)):
        with pytest.raises(TritterError, match="finite losses above zero"):
            before.relative_forgetting(after)
