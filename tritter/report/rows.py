"""Rows of a run's result, read from its summary.json; table and plots show the same ones."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Role = Literal["old", "new"]
ACCURACY = "/accuracy"  # behind the name of a domain or task, where its right answers are meant
_CHECK_OF_ROLE: dict[Role, str] = {"old": "retention", "new": "new_capability"}


@dataclass(frozen=True, slots=True)
class Score:
    """One domain or task at one stage: nats per token and per byte, or the part of right answers.

    None where not known, or of the other kind.
    """

    loss: float | None
    loss_per_byte: float | None
    standard_error: float | None
    accuracy: float | None = None

    @property
    def value(self) -> float | None:
        """The one of both kinds that there is."""
        return self.loss if self.accuracy is None else self.accuracy


@dataclass(frozen=True, slots=True)
class ScoreChange:
    """Change from before to after training: of a loss relative, per byte; of an accuracy in points.

    Only a loss has one-sided bounds here: those of an accuracy are about what was lost of it, and
    stand in the check's detail. A bound is None where it is not known: a few documents carry it.
    """

    value: float | None
    lower: float | None
    upper: float | None
    in_points: bool = False

    @property
    def below(self) -> float | None:
        """Return how far the lower bound lies from the value."""
        return None if self.value is None or self.lower is None else self.value - self.lower

    @property
    def above(self) -> float | None:
        """Return how far the upper bound lies from the value; not as far as the lower one."""
        return None if self.value is None or self.upper is None else self.upper - self.value


@dataclass(frozen=True, slots=True)
class DomainRow:
    """One domain of one trained model: the last attempt, or the un-grown control.

    Args:
        domain: its name, with `/accuracy` behind it where the row is about the answers.
    """

    domain: str
    role: Role
    is_control: bool
    before: Score
    expanded: Score | None
    trained: Score
    change: ScoreChange
    bound: float | None
    verdict: str | None


def last_attempt(summary: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what the last attempt scored, also when it was rolled back afterwards."""
    attempts: Sequence[Mapping[str, Any]] = summary.get("attempts") or []
    return attempts[-1] if attempts else summary


def domain_rows(summary: Mapping[str, Any]) -> tuple[DomainRow, ...]:
    """Return one row per domain, the old ones first, then the same for the control if there is one.

    The scores after training are those of the last attempt: after a rollback the summary's own
    `final` repeats the baseline, and a person wants to see what was refused.
    """
    attempt = last_attempt(summary)
    rows = _rows(summary, attempt, expanded=attempt.get("expanded") or summary.get("expanded"))
    if control := summary.get("control"):
        rows += _rows(summary, control, expanded=None)
    return rows


def checks(record: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """Return the gate's checks of an attempt, a control or a summary."""
    return record.get("gate") or []


def _rows(
    summary: Mapping[str, Any],
    trained: Mapping[str, Any],
    *,
    expanded: Mapping[str, Any] | None,
) -> tuple[DomainRow, ...]:
    return tuple(
        _row(subject, role, summary=summary, trained=trained, expanded=expanded)
        for subject, role in subjects(summary)
    )


def subjects(summary: Mapping[str, Any]) -> tuple[tuple[str, Role], ...]:
    """Return what a run scored, with its role: each domain, what it teaches, then other tasks."""
    domains, scored = summary.get("domains") or {}, summary.get("baseline") or {}
    roles: tuple[Role, ...] = ("old", "new")
    found: list[tuple[str, Role]] = []
    for role in roles:
        for name in domains.get(role, []):
            found.append((name, role))
            if {"accuracy", "loss"} <= scored.get(name, {}).keys():
                found.append((f"{name}{ACCURACY}", role))
    known = {name for name, _ in found}
    return (*found, *((f"{name}{ACCURACY}", "old") for name in scored if name not in known))


def _row(
    domain: str,
    role: Role,
    *,
    summary: Mapping[str, Any],
    trained: Mapping[str, Any],
    expanded: Mapping[str, Any] | None,
) -> DomainRow:
    # A round of several states what it started from
    before = score_of(trained.get("baseline") or summary.get("baseline"), domain)
    after = score_of(trained.get("final"), domain)
    check = next(
        (
            check
            for check in checks(trained)
            if check["check"] == _CHECK_OF_ROLE[role] and check.get("subject") == domain
        ),
        {},
    )
    return DomainRow(
        domain=domain,
        role=role,
        is_control=trained is summary.get("control"),
        before=before,
        expanded=None if expanded is None else score_of(expanded, domain),
        trained=after,
        change=_change(check, before=before, after=after),
        bound=check.get("bound"),
        verdict=check.get("verdict"),
    )


def score_of(scores: Mapping[str, Any] | None, domain: str) -> Score:
    """Return one score of a record as summary.json has it: a domain's loss, or what it teaches."""
    record = (scores or {}).get(domain.removesuffix(ACCURACY), {})
    if "loss" not in record or domain.endswith(ACCURACY):
        error = record.get("accuracy_standard_error", record.get("standard_error"))
        return Score(None, None, error, record.get("accuracy"))
    return Score(*(record.get(name) for name in ("loss", "loss_per_byte", "standard_error")))


def _change(check: Mapping[str, Any], *, before: Score, after: Score) -> ScoreChange:
    """Take the gate's paired change; without a check the plain ratio, which has no bounds."""
    if before.accuracy is not None and after.accuracy is not None:
        return ScoreChange(after.accuracy - before.accuracy, None, None, in_points=True)
    if check:
        lower, upper = check.get("interval") or (None, None)
        return ScoreChange(check.get("value"), lower, upper)
    if not before.loss_per_byte or after.loss_per_byte is None:
        return ScoreChange(None, None, None)
    return ScoreChange(after.loss_per_byte / before.loss_per_byte - 1, None, None)
