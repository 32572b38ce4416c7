import importlib
import json
import math

import pytest
import torch

from tritter.evaluation.gate import (
    Check,
    GateResult,
    new_capability_check,
    retention_check,
)
from tritter.evaluation.jump import Jump

SIX = torch.tensor([100.0, 210.0, 90.0, 160.0, 120.0, 80.0])
# Thirty-six distinct documents
BEFORE = SIX.repeat(6) + torch.arange(36)
NOISE = torch.tensor([0.01, -0.01, 0.02, -0.02, 0.005, -0.005]).repeat(6)


@pytest.mark.parametrize(
    ("rise", "noise", "verdict"),
    [(0.01, 0.3, "passed"), (-0.1, 1, "passed"), (0.05, 1, "undecided"), (0.07, 1, "failed")],
)
def test_retention(make_losses, rise, noise, verdict):
    after = make_losses(BEFORE * (1 + rise + noise * NOISE))
    check = retention_check("prose", make_losses(BEFORE), after, bound=0.05, confidence=0.95)
    assert check.verdict == verdict
    assert check.value == pytest.approx(rise, abs=0.01)
    assert check.lower < check.value < check.upper
    assert (check.documents_needed is not None) == (verdict == "undecided")


@pytest.mark.parametrize(
    ("rise", "verdict"),
    [(-0.2, "passed"), (-0.001, "undecided"), (0.005, "undecided"), (0.05, "failed")],
)
def test_new_capability(make_losses, rise, verdict):
    after = make_losses(BEFORE * (1 + rise + NOISE))
    check = new_capability_check("code", make_losses(BEFORE), after, confidence=0.95)
    assert check.verdict == verdict and check.bound == 0.0


def test_an_unchanged_model_has_learned_nothing_new(make_losses):
    losses = make_losses(BEFORE)
    assert new_capability_check("code", losses, losses, confidence=0.95).verdict == "failed"
    assert retention_check("prose", losses, losses, bound=0, confidence=0.95).verdict == "passed"


def test_undecided_names_more_documents_than_there_were(make_losses):
    after = make_losses(BEFORE * (1.049 + NOISE))
    check = retention_check("prose", make_losses(BEFORE), after, bound=0.05, confidence=0.95)
    assert check.verdict == "undecided" and check.documents_needed > check.n == 36
    assert f"about {check.documents_needed} documents needed" in check.detail
    # The needed number of documents, as copies of the same ones, gives a conclusive verdict
    times = math.ceil(check.documents_needed / 36)
    before, after = make_losses(BEFORE.repeat(times)), make_losses(after.values.repeat(times))
    again = retention_check("prose", before, after, bound=0.05, confidence=0.95)
    assert again.verdict == "passed"


@pytest.mark.parametrize("n", [1, 2, 10, Check.MIN_DOCUMENTS - 1])
def test_below_thirty_documents_nothing_is_decided(make_losses, n):
    before = make_losses(BEFORE[:n])
    harmless, ruined = (
        make_losses(before.values * 1.001),
        make_losses(before.values * (2 + NOISE[:n])),
    )
    for check in (
        retention_check("prose", before, harmless, bound=0.05, confidence=0.95),
        retention_check("prose", before, ruined, bound=0.05, confidence=0.95),
        new_capability_check("code", before, make_losses(before.values / 2), confidence=0.95),
        new_capability_check("code", before, ruined, confidence=0.95),
    ):
        assert check.verdict == "undecided" and check.documents_needed >= Check.MIN_DOCUMENTS
        assert f"on {n} documents, fewer than the required 30; about" in check.detail
        json.dumps(check.to_dict(), allow_nan=False)


def test_thirty_documents_are_enough(make_losses):
    before = make_losses(BEFORE[: Check.MIN_DOCUMENTS])
    after = make_losses(before.values * (1.01 + 0.1 * NOISE[: Check.MIN_DOCUMENTS]))
    check = retention_check("prose", before, after, bound=0.05, confidence=0.95)
    assert check.verdict == "passed" and check.documents_needed is None


def test_few_documents_that_would_not_decide_ask_for_more_than_thirty(make_losses):
    after = make_losses(SIX * (1.049 + NOISE[:6]))
    check = retention_check("prose", make_losses(SIX), after, bound=0.05, confidence=0.95)
    assert check.documents_needed > Check.MIN_DOCUMENTS


def test_one_document_has_no_bounds(make_losses):
    one = make_losses(BEFORE[:1])
    check = retention_check("prose", one, one, bound=0.05, confidence=0.95)
    assert check.to_dict()["interval"] == [None, None]


def test_documents_that_carry_the_change_are_named(make_losses):
    before = make_losses(BEFORE)
    after = before.values * (1.01 + NOISE)
    after[4] *= 1.6
    check = retention_check("prose", before, make_losses(after), bound=0.05, confidence=0.95)
    assert check.verdict == "undecided"
    assert check.detail.endswith("; one document causes half of the spread: 'd4'")
    after = before.values * (1.01 + NOISE)
    calm = retention_check("prose", before, make_losses(after), bound=0.05, confidence=0.95)
    assert "spread" not in calm.detail


def test_an_unknown_bound_is_said_in_words(make_losses):
    before = make_losses(BEFORE)
    after = before.values * 1.01
    after[4] *= 1.6
    check = retention_check("prose", before, make_losses(after), bound=0.05, confidence=0.95)
    assert check.verdict == "undecided" and check.to_dict()["interval"][1] is None
    assert "and unknown, allowed" in check.detail and "inf" not in check.detail
    assert "the number of documents is unknown" in check.detail


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(("n", "at_most"), [(2, 0.0), (10, 0.0), (60, 0.05)])
def test_rare_large_damage_does_not_pass(make_losses, n, at_most):
    """A tenth of the documents rises by 60 %, the rest by 1 %: 6.9 % in total, 5 % allowed."""
    experiment = importlib.import_module("experiments.2026-11-20_gate_coverage.gate_coverage")
    (damage,) = (damage for damage in experiment.DAMAGES if damage.name == "rare")
    sample = damage.sample(300, n, torch.Generator().manual_seed(1))
    passed = sum(
        retention_check(
            "prose", make_losses(before), make_losses(after), bound=0.05, confidence=0.95
        ).verdict
        == "passed"
        for before, after in zip(sample.before, sample.after, strict=True)
    )
    assert passed / 300 <= at_most


def test_a_loss_that_is_not_finite_fails_and_is_never_undecided(make_losses):
    before, after = (
        make_losses(BEFORE),
        make_losses(BEFORE.clone().index_fill(0, torch.tensor(1), math.nan)),
    )
    for check in (
        retention_check("prose", before, after, bound=0.05, confidence=0.95),
        new_capability_check("code", before, after, confidence=0.95),
    ):
        assert check.verdict == "failed" and "not finite for 1 of 36" in check.detail
        json.dumps(check.to_dict(), allow_nan=False)


@pytest.mark.parametrize(
    ("relative", "claims_exact", "verdict"),
    [
        (3e-6, True, "passed"),
        (2e-4, True, "failed"),
        (math.nan, True, "failed"),
        (0.4, False, "reported"),
        (math.inf, False, "failed"),
    ],
)
def test_preservation(relative, claims_exact, verdict):
    check = Check.of_preservation(Jump(0.1, relative), claims_exact=claims_exact)
    assert check.verdict == verdict
    assert (check.bound is None) == (not claims_exact)
    assert check.to_dict()["interval"] is None


def test_training():
    assert Check.of_training(0, aborted_reason=None).verdict == "passed"
    check = Check.of_training(3, aborted_reason="loss not finite at step 17")
    assert check.verdict == "failed" and check.detail == "loss not finite at step 17"


@pytest.mark.parametrize(
    ("verdicts", "status"),
    [
        ([], "kept"),
        (["passed", "reported"], "kept"),
        (["passed", "undecided"], "undecided"),
        (["undecided", "failed", "passed"], "rolled_back"),
    ],
)
def test_decision(verdicts, status):
    checks = [Check("retention", "prose", verdict, "") for verdict in verdicts]
    assert GateResult.of(checks).status == status
    assert GateResult.of([check.reported() for check in checks]).status == "kept"


def test_a_check_that_is_only_reported_keeps_its_numbers(make_losses):
    losses = make_losses(BEFORE), make_losses(BEFORE * (1.5 + NOISE))
    failed = retention_check("prose", *losses, bound=0.05, confidence=0.95)
    reported = failed.reported().to_dict()
    assert failed.verdict == "failed" and reported["verdict"] == "reported"
    assert (reported["bound"], reported["documents_needed"]) == (None, None)
    for key in ("value", "interval", "confidence", "n"):
        assert reported[key] == failed.to_dict()[key] is not None
    assert reported["detail"].startswith(failed.detail) and "gate=off" in reported["detail"]


def test_record_holds_the_contract(make_losses):
    after = make_losses(BEFORE * (0.8 + NOISE))
    record = new_capability_check("code", make_losses(BEFORE), after, confidence=0.95).to_dict()
    assert {"check", "value", "bound", "interval", "verdict"} <= set(record)
    assert record["check"] == "new_capability" and record["subject"] == "code"
    assert record["interval"][0] < record["value"] < record["interval"][1]
    json.dumps(record, allow_nan=False)
