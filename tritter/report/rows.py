"""Rows of a run's result, from its summary.json, for its table and plots."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from tritter.report.summary import Attempt, Score, Scores, Summary
from tritter.report.table import ACCURACY, MISSING, number_text

Role = Literal["old", "new"]
_CHECK_OF_ROLE: dict[Role, str] = {"old": "retention", "new": "new_capability"}


@dataclass(frozen=True, slots=True)
class ScoreChange:
    """Change from before to after training: relative for a loss per byte, in points for accuracy.

    Only a loss has one-sided bounds; those of an accuracy are in the detail of its check. A bound
    is None if there were too few documents.
    """

    value: float | None
    lower: float | None
    upper: float | None
    in_points: bool = False

    def text(self) -> str:
        """Return the change in per cent with its bounds, or in points."""
        if self.value is None:
            return MISSING
        if self.in_points:
            return f"{100 * self.value:+.1f} points"
        value, lower, upper = (
            "?" if each is None else f"{100 * each:+.2f}"
            for each in (self.value, self.lower, self.upper)
        )
        has_bounds = self.lower is not None or self.upper is not None
        return f"{value} [{lower}, {upper}]" if has_bounds else value


@dataclass(frozen=True, slots=True)
class DomainRow:
    """One domain of one trained model: the last attempt, or the control (not grown).

    Args:
        domain: Its name, followed by `/accuracy` if the row is about the accuracy.
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


def domain_rows(summary: Summary) -> tuple[DomainRow, ...]:
    """Return one row per domain, the old ones first, then the same for a control.

    The scores after training are those of the last attempt. (After a rollback, the summary's own
    `final` repeats the baseline.)
    """
    attempt = summary.last_attempt
    rows = _rows(summary, attempt, expanded=attempt.expanded or summary.expanded)
    if summary.control is not None:
        rows += _rows(summary, summary.control, expanded=None)
    return rows


def _rows(summary: Summary, trained: Attempt, *, expanded: Scores | None) -> tuple[DomainRow, ...]:
    rows = []
    for domain, role in _subjects(summary):
        # A later round states its own baseline
        before = score_of(trained.baseline or summary.baseline, domain)
        after = score_of(trained.final, domain)
        wanted = (_CHECK_OF_ROLE[role], domain)
        check = next((each for each in trained.gate if (each.check, each.subject) == wanted), None)
        change = ScoreChange(None, None, None)
        if before.accuracy is not None and after.accuracy is not None:
            change = ScoreChange(after.accuracy - before.accuracy, None, None, in_points=True)
        elif check is not None:  # its change is paired; the plain ratio has no bounds
            change = ScoreChange(check.value, *check.bounds)
        elif before.loss_per_byte and after.loss_per_byte is not None:
            change = ScoreChange(after.loss_per_byte / before.loss_per_byte - 1, None, None)
        row = DomainRow(
            domain=domain,
            role=role,
            is_control=trained is summary.control,
            before=before,
            expanded=None if expanded is None else score_of(expanded, domain),
            trained=after,
            change=change,
            bound=None if check is None else check.bound,
            verdict=None if check is None else check.verdict,
        )
        rows.append(row)
    return tuple(rows)


def _subjects(summary: Summary) -> tuple[tuple[str, Role], ...]:
    """Return the scored subjects with their roles: domains, their accuracies, other tasks."""
    domains: dict[Role, list[str]] = {"old": summary.domains.old, "new": summary.domains.new}
    found: list[tuple[str, Role]] = []
    for role, names in domains.items():
        for name in names:
            found.append((name, role))
            scored = summary.baseline.get(name, Score()).model_fields_set
            if {"accuracy", "loss"} <= scored:
                found.append((f"{name}{ACCURACY}", role))
    known = {name for name, _ in found}
    others = (name for name in summary.baseline if name not in known)
    return (*found, *((f"{name}{ACCURACY}", "old") for name in others))


def score_of(scores: Scores, domain: str) -> Score:
    """Return the loss of a domain, or its accuracy if `domain` asks for it."""
    found = scores.get(domain.removesuffix(ACCURACY), Score())
    if "loss" in found.model_fields_set and not domain.endswith(ACCURACY):
        kept = ("loss", "loss_per_byte", "standard_error")
        return Score.model_construct(**{name: getattr(found, name) for name in kept})
    error = found.accuracy_standard_error
    error = found.standard_error if error is None else error
    return Score.model_construct(accuracy=found.accuracy, standard_error=error)


class LossUnit:
    """The unit in which losses of some runs can be compared: a token, or a byte.

    Args:
        summaries: The runs.
    """

    def __init__(self, summaries: Iterable[Summary]) -> None:
        self.name = "byte" if any(each.has_new_tokens for each in summaries) else "token"

    def score(self, score: Score | None) -> Score | None:
        """Return a score whose loss and standard error are in this unit."""
        if self.name == "token" or score is None or (ratio := score.tokens_per_byte) is None:
            return score
        error = None if score.standard_error is None else score.standard_error * ratio
        return score.model_copy(update={"loss": score.loss_per_byte, "standard_error": error})

    def text(self, score: Score | None) -> str:
        """Return the loss with three decimals, or an accuracy in per cent."""
        score = self.score(score)
        if score is not None and score.accuracy is not None:
            return f"{score.accuracy:.1%}"
        return number_text(None if score is None else score.loss, ".3f")
