"""Checks of the gate on synthetic accuracies, and score records of either unit."""

import json
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tritter.errors import TritterError
from tritter.evaluation.gate import GateResult, new_capability_check, retention_check
from tritter.evaluation.statistics import (
    PairedScores,
)

LIMITS = {"bound": 0.05, "confidence": 0.95}


def flipped(right: Tensor, *, lost: int = 0, gained: int = 0) -> Tensor:
    """Flip some correct answers to wrong ones and some wrong ones to correct ones."""
    changed = right.clone()
    changed[right.nonzero().flatten()[:lost]] = 0
    changed[(right == 0).nonzero().flatten()[:gained]] = 1
    return changed


def some_right(n: int, accuracy: float) -> Tensor:
    return (torch.arange(n) < round(accuracy * n)).double()


def test_harm_by_hand(make_answers):
    """8 of 10 correct, then 6: the loss is 2 of the 8 − 10/4 = 5.5 answers above chance."""
    before, after = make_answers(some_right(10, 0.8)), make_answers(some_right(10, 0.6))
    harm, drop = before.relative_forgetting(after), before.drop_in_points(after)
    assert harm.value == pytest.approx(2 / 5.5) and drop.value == pytest.approx(0.2)
    assert before.performance_delta(after) == pytest.approx(-0.2)
    # Bonett and Price by their own formula: n12 = 2, n21 = 0, one more of each
    lost, gained, n = 3 / 12, 1 / 12, 12
    wald = math.sqrt((lost + gained - (lost - gained) ** 2) / n)
    assert drop.standard_error == pytest.approx(wald, rel=0.1)
    # Student's t with nine degrees of freedom
    assert drop.upper(0.95) - drop.value == pytest.approx(1.8331 * drop.standard_error, rel=1e-4)
    assert drop.value - drop.lower(0.95) == pytest.approx(1.8331 * drop.standard_error, rel=1e-4)


@pytest.mark.parametrize(
    ("lost", "gained", "verdict"),
    [(0, 0, "passed"), (4, 4, "passed"), (30, 12, "undecided"), (100, 10, "failed")],
)
def test_retention_of_a_task(make_answers, lost, gained, verdict):
    right = some_right(1000, 0.7)
    before, after = make_answers(right), make_answers(flipped(right, lost=lost, gained=gained))
    check = retention_check("arithmetic", before, after, **LIMITS)
    assert check.verdict == verdict and check.n == 1000
    assert check.value == pytest.approx((lost - gained) / 450)
    assert check.lower < check.value < check.upper
    assert check.detail.startswith(f"accuracy 70.0% to {after.mean():.1%}, a drop of")
    assert ("items needed" in check.detail) == (verdict == "undecided")
    json.dumps(check.to_dict(), allow_nan=False)


@pytest.mark.parametrize(
    ("lost", "gained", "verdict"), [(0, 100, "passed"), (20, 20, "undecided"), (60, 0, "failed")]
)
def test_new_capability_in_a_task(make_answers, lost, gained, verdict):
    """Near chance, a change relative to the accuracy above chance is meaningless."""
    right = some_right(400, 0.25)
    before, after = make_answers(right), make_answers(flipped(right, lost=lost, gained=gained))
    check = new_capability_check("sorting", before, after, confidence=0.95)
    assert check.verdict == verdict
    assert check.value == pytest.approx((lost - gained) / 400)


def test_few_items_decide_nothing(make_answers):
    before = make_answers(some_right(29, 0.9))
    for after in (before, make_answers(torch.zeros(29))):
        check = retention_check("arithmetic", before, after, **LIMITS)
        assert check.verdict == "undecided" and "29 items, fewer than the" in check.detail


@pytest.mark.parametrize("accuracy", [0.2, 0.25, 0.27])
def test_what_was_never_known_cannot_be_lost(make_answers, accuracy):
    before, after = make_answers(some_right(200, accuracy)), make_answers(torch.zeros(200))
    check = retention_check("sorting", before, after, **LIMITS)
    assert check.verdict == "reported" and "not significantly above chance" in check.detail
    assert GateResult.of([check]).status == "kept"
    if accuracy <= 0.25:
        with pytest.raises(TritterError, match="accuracies above chance"):
            before.relative_forgetting(after)


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(("n", "lost", "gained"), [(60, 0.1, 0.05), (200, 0.02, 0.0)])
def test_bounds_cover_what_they_promise(make_answers, n, lost, gained):
    """Answers flip with known probabilities: 95 % of the bounds cover the true value."""
    generator = torch.Generator().manual_seed(n)
    truth = 0.7 * lost - 0.3 * gained
    covered = 0
    for _ in range(400):
        right = (torch.rand(n, generator=generator) < 0.7).double()
        flips = torch.rand(n, generator=generator) < torch.where(right == 1, lost, gained)
        after = torch.where(flips, 1 - right, right)
        covered += make_answers(right).drop_in_points(make_answers(after)).upper(0.95) >= truth
    assert covered / 400 >= 0.93


def test_units_and_chances_do_not_pair(make_answers, make_losses):
    answers = make_answers(some_right(40, 0.5))
    with pytest.raises(TritterError, match="equal unit, chance"):
        answers.relative_forgetting(make_losses(torch.ones(40)))
    with pytest.raises(TritterError, match="equal unit, chance"):
        answers.drop_in_points(replace(answers, chance=0.5))


def test_an_accuracy_survives_json(make_answers):
    answers = make_answers(some_right(40, 0.6))
    read = PairedScores.from_dict(json.loads(json.dumps(answers.to_dict())))
    assert read.identifiers == answers.identifiers and read.values.equal(answers.values)
    assert (read.unit, read.chance, read.record()) == ("accuracy", 0.25, answers.record())
    assert read.record()["accuracy"] == 0.6 == read.mean()
    for damage in ({"unit": "elo"}, {"weights": {}}, {"values": [1.0]}, {"chance": "high"}):
        with pytest.raises(TritterError, match="damaged"):
            PairedScores.from_dict(answers.to_dict() | damage)


@pytest.mark.parametrize(
    ("rise", "numbers"),
    [
        (0.03, ["0x1.bf4ad6dcc8100p-6", "0x1.8162b6291a5ccp-6", "0x1.ff702a47936bfp-6"]),
        (-0.2, ["-0x1.9f20ddf71f134p-3", "-0x1.a6dde20acfe36p-3", "-0x1.971c323c854f3p-3"]),
    ],
)
def test_bounds_of_losses_are_those_of_document_losses(make_losses, rise, numbers):
    """Bit-exact, including resamples."""
    before = torch.tensor([100.0, 210.0, 90.0, 160.0, 120.0, 80.0]).repeat(6) + torch.arange(36)
    noise = torch.tensor([0.01, -0.01, 0.02, -0.02, 0.005, -0.005]).repeat(6)
    after = make_losses(before * (1 + rise + noise))
    check = retention_check("prose", make_losses(before), after, **LIMITS)
    assert [number.hex() for number in (check.value, check.lower, check.upper)] == numbers
