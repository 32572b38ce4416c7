import pytest

from tritter.report import rows
from tritter.report.rows import LossUnit
from tritter.report.summary import Summary


def domain_rows(plain):
    return rows.domain_rows(Summary.of(plain))


def test_a_row_joins_the_stages_and_the_check_of_its_domain(summary):
    prose, code = domain_rows(summary)
    assert (prose.domain, prose.role, code.domain, code.role) == ("prose", "old", "code", "new")
    assert (prose.before.loss, prose.expanded.loss, prose.trained.loss) == (3.59, 3.5901, 3.627)
    assert prose.change.value == 0.0102
    assert prose.change.value - prose.change.lower == pytest.approx(0.0024)
    assert prose.change.upper - prose.change.value == pytest.approx(0.0034)
    assert (prose.bound, prose.verdict, code.bound) == (0.05, "passed", 0.0)


def test_control_rows_come_last_and_were_never_expanded(summary_with_control):
    found = domain_rows(summary_with_control)
    assert [row.is_control for row in found] == [False, False, True, True]
    assert found[2].expanded is None and found[2].trained.loss == 3.69
    assert found[2].before == found[0].before


def test_after_a_rollback_the_rows_show_what_was_refused(rolled_back):
    prose, code = domain_rows(rolled_back)
    assert rolled_back["final"]["prose"]["loss"] == 3.59
    assert prose.trained.loss == 7.1 and prose.verdict == "failed"
    assert code.trained.loss is None and code.change.value is None


def test_without_checks_the_change_is_the_ratio_per_byte(summary):
    summary["attempts"][0]["gate"] = []
    prose, _ = domain_rows(summary)
    assert prose.change.value == pytest.approx(1.22 / 1.208 - 1)
    assert prose.change.lower is None and prose.change.upper is None and prose.verdict is None


def test_an_attempt_that_broke_off_has_rows_without_scores(summary):
    summary["attempts"] = [
        {"expansion": ["width"], "final": {}, "gate": [], "status": "rolled_back"}
    ]
    assert all(row.trained.loss is None for row in domain_rows(summary))


def test_a_bound_that_is_not_known_leaves_the_other(summary):
    summary["attempts"][0]["gate"][0]["interval"] = [0.0, None]
    prose, _ = domain_rows(summary)
    assert prose.change.value - prose.change.lower == pytest.approx(0.0102)
    assert prose.change.upper is None


def test_an_accuracy_changes_in_points(summary):
    task = {"accuracy": 0.62, "standard_error": 0.02, "n": 400}
    summary["domains"]["old"].append("arithmetic")
    summary["baseline"]["arithmetic"] = task
    summary["attempts"][0]["final"]["arithmetic"] = task | {"accuracy": 0.6}
    row = next(row for row in domain_rows(summary) if row.domain == "arithmetic")
    assert (LossUnit([]).text(row.before), LossUnit([]).text(row.expanded)) == ("62.0%", "-")
    assert row.change.text() == "-2.0 points"


def test_what_a_skill_teaches_has_a_row_behind_its_loss(summary):
    """And so has a task that no domain teaches, which is to be kept."""
    answers = {"accuracy_standard_error": 0.01, "num_questions": 900, "chance": 0.0}
    final = summary["attempts"][0]["final"]
    summary["baseline"]["code"] |= answers | {"accuracy": 0.1}
    final["code"] |= answers | {"accuracy": 0.45}
    summary["baseline"]["arc"] = {"accuracy": 0.6, "standard_error": 0.02, "n": 400}
    final["arc"] = {"accuracy": 0.59, "standard_error": 0.02, "n": 400}
    check = {"check": "new_capability", "subject": "code/accuracy", "verdict": "passed"}
    summary["attempts"][0]["gate"].append(check)
    prose, code, right, arc = domain_rows(summary)
    assert [row.domain for row in (prose, code, right, arc)] == [
        "prose", "code", "code/accuracy", "arc/accuracy",
    ]  # fmt: skip
    assert (code.before.loss, code.before.accuracy) == (4.591, None)
    assert not code.change.in_points and code.verdict == "passed"
    assert (LossUnit([]).text(right.before), LossUnit([]).text(right.trained)) == ("10.0%", "45.0%")
    assert (right.change.text(), right.verdict, right.role) == (
        "+35.0 points", "passed", "new",
    )  # fmt: skip
    assert (arc.change.text(), arc.role, arc.before.standard_error) == (
        "-1.0 points", "old", 0.02,
    )  # fmt: skip
