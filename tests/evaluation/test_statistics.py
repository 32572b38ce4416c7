import math

import pytest
import torch

from tritter.errors import TritterError
from tritter.evaluation.estimate import Estimate, ratio_of_sums
from tritter.evaluation.losses import DocumentLosses
from tritter.evaluation.statistics import relative_change


def test_two_documents_by_hand(make_losses):
    before = make_losses(torch.tensor([100.0, 300.0]))
    after = make_losses(torch.tensor([110.0, 300.0]))
    change = relative_change(before, after)
    # Without the first document the ratio is 1, without the second 1.1: jackknife of two values.
    assert change.value == pytest.approx(0.025)
    jackknife = math.sqrt((1 / 2) * ((1.0 - 1.025) ** 2 + (1.1 - 1.025) ** 2))
    assert change.standard_error == pytest.approx(jackknife)
    assert (change.n, change.degrees_of_freedom) == (2, 1)
    assert change.upper(0.95) == pytest.approx(0.025 + 6.3138 * jackknife, abs=1e-4)


def test_error_equals_the_delete_one_jackknife():
    generator = torch.Generator().manual_seed(1)
    denominators = torch.rand(12, generator=generator, dtype=torch.float64) + 0.1
    numerators = denominators * (1 + torch.randn(12, generator=generator, dtype=torch.float64))
    estimate = ratio_of_sums(numerators, denominators)
    left_out = (numerators.sum() - numerators) / (denominators.sum() - denominators)
    jackknife = ((left_out - estimate.value).square().sum() * 11 / 12).sqrt()
    assert estimate.standard_error == pytest.approx(float(jackknife))


def test_sign_and_scale(make_losses):
    before = make_losses(torch.tensor([100.0, 200.0, 50.0]))
    worse, better = make_losses(before.nats * 1.03), make_losses(before.nats * 0.9)
    assert relative_change(before, worse).value == pytest.approx(0.03)
    assert relative_change(before, better).value == pytest.approx(-0.1)
    assert relative_change(before, worse).standard_error == pytest.approx(0, abs=1e-12)


def test_bounds_are_one_sided_and_the_interval_two_sided():
    estimate = Estimate(1.0, 0.1, n=11, degrees_of_freedom=10)
    assert estimate.upper(0.95) == pytest.approx(1.18125, abs=1e-4)
    assert estimate.lower(0.95) == pytest.approx(0.81875, abs=1e-4)
    assert estimate.interval(0.95) == pytest.approx((1 - 0.22281, 1 + 0.22281), abs=1e-4)


def test_one_document_knows_nothing(make_losses):
    change = relative_change(make_losses(torch.tensor([5.0])), make_losses(torch.tensor([6.0])))
    assert change.upper(0.95) == math.inf and change.lower(0.95) == -math.inf
    assert change.documents_to_decide(0.05, 0.95) is None


def test_documents_to_decide_is_the_least_that_has_the_power():
    estimate = Estimate(0.04, 0.02, n=20, degrees_of_freedom=19)
    needed = estimate.documents_to_decide(0.05, 0.95)
    # (1.645 + 0.842)² (0.02 √20 / 0.01)² = 494.8; Student's t asks for a little more.
    assert needed is not None and 495 <= needed <= 499
    assert estimate.documents_to_decide(0.05, 0.99) > needed
    assert estimate.documents_to_decide(0.05, 0.95, power=0.95) > needed
    assert estimate.documents_to_decide(0.08, 0.95) < needed
    assert estimate.documents_to_decide(0.04, 0.95) is None


def test_promised_number_of_documents_decides_as_often_as_promised():
    generator = torch.Generator().manual_seed(0)
    estimate = Estimate(0.04, 0.05 / math.sqrt(20), n=20, degrees_of_freedom=19)
    needed = estimate.documents_to_decide(0.05, 0.95)
    ones = torch.ones(needed, dtype=torch.float64)
    decided = 0
    for _ in range(400):
        changes = 0.04 + 0.05 * torch.randn(needed, generator=generator, dtype=torch.float64)
        decided += ratio_of_sums(changes, ones).upper(0.95) <= 0.05
    assert decided / 400 == pytest.approx(0.8, abs=0.06)


def test_upper_bound_covers_and_errors_per_token_do_not():
    """Documents of uneven length, each with its own effect; the truth is a rise of 2 %."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    num_corpora, n, truth = 2000, 60, 1.02
    num_tokens = torch.exp(5 + 0.7 * randn(num_corpora, n)).round()
    before = num_tokens * (3 + 0.3 * randn(num_corpora, n))
    after = before * (truth + 0.03 * randn(num_corpora, n))
    covered = covered_per_token = 0
    for index in range(num_corpora):
        estimate = ratio_of_sums(after[index], before[index])
        covered += estimate.upper(0.95) >= truth
        residuals = (after[index] - estimate.value * before[index]) / before[index].sum()
        # As if the tokens of a document were that many independent observations.
        per_token = float((residuals.square() / num_tokens[index]).sum().sqrt())
        covered_per_token += estimate.value + 1.645 * per_token >= truth
    assert 0.93 <= covered / num_corpora <= 0.97
    assert covered_per_token / num_corpora < 0.7


@pytest.mark.parametrize("sign", [1, -1])
def test_pairing_is_what_makes_small_changes_visible(make_losses, sign):
    generator = torch.Generator().manual_seed(0)
    nats = 300 + 100 * torch.randn(60, generator=generator)
    before, after = make_losses(nats), make_losses(nats * (1 + sign * 0.01))
    change = relative_change(before, after)
    unpaired = ratio_of_sums(before.nats, before.num_bytes.double())
    assert change.value == pytest.approx(sign * 0.01, abs=1e-6)
    assert change.standard_error < 0.01 * unpaired.standard_error / unpaired.value


def test_what_does_not_pair_is_refused(make_losses):
    before = make_losses(torch.tensor([1.0, 2.0]))
    with pytest.raises(TritterError, match="2 documents were scored before and 3 after"):
        relative_change(before, make_losses(torch.tensor([1.0, 2.0, 3.0])))
    renamed = DocumentLosses(("d0", "other"), before.nats, before.num_tokens, before.num_bytes)
    with pytest.raises(TritterError, match="'d1' before stands against 'other'"):
        relative_change(before, renamed)
    longer = make_losses(before.nats, num_bytes=torch.tensor([100, 102]))
    with pytest.raises(TritterError, match="'d1' has 100 bytes before and 102 after"):
        relative_change(before, longer)


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_losses_that_are_no_numbers_are_refused(make_losses, broken):
    good, bad = make_losses(torch.tensor([1.0, 2.0])), make_losses(torch.tensor([1.0, broken]))
    for before, after in ((good, bad), (bad, good), (make_losses(torch.zeros(2)), good)):
        with pytest.raises(TritterError, match="finite losses above zero"):
            relative_change(before, after)
