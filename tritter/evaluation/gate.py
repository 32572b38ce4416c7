"""The gate: checks on a grown model, and what follows from them.

Every check can end undecided: too few documents are a reason to say how many would do, and never a
reason to pass or to fail. Damage that is rare does not show in few documents, so below
`MIN_DOCUMENTS` no bound is trusted.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from tritter.evaluation.estimate import finite_or_none
from tritter.evaluation.jump import Jump
from tritter.evaluation.losses import DocumentLosses
from tritter.evaluation.statistics import carrying_documents, relative_change

Verdict = Literal["passed", "failed", "undecided", "reported"]
Status = Literal["kept", "rolled_back", "undecided"]

# A tenth of all documents shows in at least one of 30 with a probability of 96 %
MIN_DOCUMENTS = 30
# Documents, as a part of all, that may not make half of the spread without being named
_FEW = 0.05
_MOST_NAMES = 3
# What loading an exact expansion in the stock classes may cost in float32, in units of std(logits).
EXACT_JUMP = 1e-4


@dataclass(frozen=True, slots=True)
class Check:
    """One question to a grown model and its answer.

    Attributes:
        name: retention, new_capability, preservation or training.
        subject: the domain, or what else was looked at.
        value: the measured number; None when there is none (a loss that is not finite).
        bound: what it was held against; None when it is only reported.
        lower, upper: one-sided bounds, each at `confidence`; infinite where none is known.
        n: documents behind the value.
        documents_needed: documents in all that would decide, at least `MIN_DOCUMENTS`; only of an
            undecided check.
    """

    name: str
    subject: str
    verdict: Verdict
    detail: str
    value: float | None = None
    bound: float | None = None
    lower: float | None = None
    upper: float | None = None
    confidence: float | None = None
    n: int | None = None
    documents_needed: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the record of summary.json's `gate` list."""
        bounds = [finite_or_none(self.lower), finite_or_none(self.upper)]
        return {
            "check": self.name,
            "subject": self.subject,
            "value": finite_or_none(self.value),
            "bound": self.bound,
            "interval": None if self.lower is None and self.upper is None else bounds,
            "confidence": self.confidence,
            "verdict": self.verdict,
            "detail": self.detail,
            "n": self.n,
            "documents_needed": self.documents_needed,
        }


def retention_check(
    domain: str, before: DocumentLosses, after: DocumentLosses, *, bound: float, confidence: float
) -> Check:
    """Ask whether the loss on an old domain rose by no more than `bound`, per byte.

    Passed when the one-sided upper bound of the rise is at most `bound`, failed when the lower
    bound is above it; undecided below `MIN_DOCUMENTS`.
    """

    def verdict(lower: float, upper: float) -> Verdict:
        return "passed" if upper <= bound else "failed" if lower > bound else "undecided"

    return _change_check(
        "retention", domain, before, after, verdict=verdict, bound=bound, confidence=confidence
    )


def new_capability_check(
    domain: str, before: DocumentLosses, after: DocumentLosses, *, confidence: float
) -> Check:
    """Ask whether the loss on a new domain fell, per byte.

    Passed when the one-sided upper bound of the change is below zero, failed when the lower bound
    is not; undecided below `MIN_DOCUMENTS`.
    """

    def verdict(lower: float, upper: float) -> Verdict:
        return "passed" if upper < 0 else "failed" if lower >= 0 else "undecided"

    return _change_check(
        "new_capability", domain, before, after, verdict=verdict, bound=0.0, confidence=confidence
    )


def preservation_check(jump: Jump, *, claims_exact: bool) -> Check:
    """Hold an exact expansion to its claim; report the jump of one that claims nothing."""
    value, bound = jump.relative_to_std, EXACT_JUMP if claims_exact else None
    verdict: Verdict = "reported"
    if bound is not None:
        verdict = "passed" if value < bound else "failed"
    elif finite_or_none(value) is None:
        verdict = "failed"
    claim = f"claimed exact, allowed {bound:g}" if bound is not None else "no claim, no bound"
    detail = f"logits jumped by {value:.2g} of their standard deviation ({claim})"
    return Check("preservation", "logits", verdict, detail, value=value, bound=bound)


def training_check(non_finite_steps: int, *, aborted_reason: str | None) -> Check:
    """Fail an attempt whose training was broken off."""
    verdict: Verdict = "passed" if aborted_reason is None else "failed"
    detail = aborted_reason or f"steps that were not finite: {non_finite_steps}"
    return Check("training", "steps", verdict, detail, value=float(non_finite_steps))


def decide(checks: Iterable[Check], *, enabled: bool) -> Status:
    """Draw the consequence: one failure rolls back, one open question leaves it undecided.

    Args:
        checks: all that were made; a reported one decides nothing.
        enabled: False (gate=off) keeps the result whatever the checks say.
    """
    verdicts = {check.verdict for check in checks}
    if enabled and "failed" in verdicts:
        return "rolled_back"
    if enabled and "undecided" in verdicts:
        return "undecided"
    return "kept"


def _change_check(
    name: str,
    domain: str,
    before: DocumentLosses,
    after: DocumentLosses,
    *,
    verdict: Callable[[float, float], Verdict],
    bound: float,
    confidence: float,
) -> Check:
    if (count := _num_non_finite(after)) > 0:
        return _broken(name, domain, after, num_non_finite=count, bound=bound)
    change = relative_change(before, after)
    lower, upper = change.lower(confidence), change.upper(confidence)
    is_enough = change.n >= MIN_DOCUMENTS
    answer: Verdict = verdict(lower, upper) if is_enough else "undecided"
    needed = None
    if answer == "undecided":
        needed = change.documents_to_decide(bound, confidence)
    if not is_enough:
        needed = max(MIN_DOCUMENTS, needed or 0)
    detail = f"loss per byte {change.value:+.2%} on {change.n} documents, " + (
        f"one-sided {confidence:.0%} bounds {_bound_text(lower)} and {_bound_text(upper)}, "
        f"allowed {bound:+.2%}"
        if is_enough
        else f"fewer than the {MIN_DOCUMENTS} that a verdict needs"
    )
    if answer == "undecided":
        detail += "; " + (
            f"about {needed} documents would decide"
            if needed
            else "no number of documents is known"
        )
    return Check(
        name,
        domain,
        answer,
        detail + _carried_by(carrying_documents(before, after), n=change.n),
        value=change.value,
        bound=bound,
        lower=lower,
        upper=upper,
        confidence=confidence,
        n=change.n,
        documents_needed=needed,
    )


def _bound_text(value: float) -> str:
    return f"{value:+.2%}" if finite_or_none(value) is not None else "unknown"


def _carried_by(names: Sequence[str], *, n: int) -> str:
    """Name the documents that make half of the spread, where they are few."""
    if n < MIN_DOCUMENTS or not names or len(names) > _FEW * n:
        return ""
    shown = ", ".join(repr(name) for name in names[:_MOST_NAMES])
    more = ", .." if len(names) > _MOST_NAMES else ""
    number = "one document" if len(names) == 1 else f"{len(names)} documents"
    return f"; half of the spread comes from {number}: {shown}{more}"


def _num_non_finite(losses: DocumentLosses) -> int:
    return int((~torch.isfinite(losses.nats)).sum())


def _broken(
    name: str, domain: str, after: DocumentLosses, *, num_non_finite: int, bound: float
) -> Check:
    detail = f"the loss is not finite on {num_non_finite} of {len(after)} documents"
    return Check(name, domain, "failed", detail, bound=bound, n=len(after))
