"""The gate: checks on a grown model, and what follows from them.

Every check can end undecided: too few documents are a reason to say how many would do, and never a
reason to pass or to fail.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from tritter.evaluation.estimate import Estimate, finite_or_none
from tritter.evaluation.jump import Jump
from tritter.evaluation.losses import DocumentLosses
from tritter.evaluation.statistics import relative_change

Verdict = Literal["passed", "failed", "undecided", "reported"]
Status = Literal["kept", "rolled_back", "undecided"]

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
        lower, upper: one-sided bounds, each at `confidence`.
        n: documents behind the value.
        documents_needed: documents in all that would decide; only of an undecided check.
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
    bound is above it.
    """
    if (count := _num_non_finite(after)) > 0:
        return _broken("retention", domain, after, num_non_finite=count, bound=bound)
    change = relative_change(before, after)
    verdict: Verdict = "undecided"
    if change.upper(confidence) <= bound:
        verdict = "passed"
    elif change.lower(confidence) > bound:
        verdict = "failed"
    return _change_check(
        "retention", domain, change, verdict=verdict, bound=bound, confidence=confidence
    )


def new_capability_check(
    domain: str, before: DocumentLosses, after: DocumentLosses, *, confidence: float
) -> Check:
    """Ask whether the loss on a new domain fell, per byte.

    Passed when the one-sided upper bound of the change is below zero, failed when the lower bound
    is not.
    """
    if (count := _num_non_finite(after)) > 0:
        return _broken("new_capability", domain, after, num_non_finite=count, bound=0.0)
    change = relative_change(before, after)
    verdict: Verdict = "undecided"
    if change.upper(confidence) < 0:
        verdict = "passed"
    elif change.lower(confidence) >= 0:
        verdict = "failed"
    return _change_check(
        "new_capability", domain, change, verdict=verdict, bound=0.0, confidence=confidence
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
    name: str, domain: str, change: Estimate, *, verdict: Verdict, bound: float, confidence: float
) -> Check:
    needed = None
    if verdict == "undecided":
        needed = change.documents_to_decide(bound, confidence)
    lower, upper = change.lower(confidence), change.upper(confidence)
    detail = (
        f"loss per byte {change.value:+.2%} on {change.n} documents, one-sided {confidence:.0%} "
        f"bounds {lower:+.2%} and {upper:+.2%}, allowed {bound:+.2%}"
    )
    if verdict == "undecided":
        detail += "; " + (
            f"about {needed} documents would decide"
            if needed
            else "no number of documents is known"
        )
    return Check(
        name,
        domain,
        verdict,
        detail,
        value=change.value,
        bound=bound,
        lower=lower,
        upper=upper,
        confidence=confidence,
        n=change.n,
        documents_needed=needed,
    )


def _num_non_finite(losses: DocumentLosses) -> int:
    return int((~torch.isfinite(losses.nats)).sum())


def _broken(
    name: str, domain: str, after: DocumentLosses, *, num_non_finite: int, bound: float
) -> Check:
    detail = f"the loss is not finite on {num_non_finite} of {len(after)} documents"
    return Check(name, domain, "failed", detail, bound=bound, n=len(after))
