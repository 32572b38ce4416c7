"""The gate: checks of a grown model, and the decision to keep it.

Every check can be inconclusive (`undecided`): with too few documents it neither passes nor fails
but reports the number of documents needed. Rare damage does not show in few documents, so bounds
require at least `Check.MIN_DOCUMENTS`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from tritter.evaluation.statistics import (
    Estimate,
    PairedScores,
    finite_or_none,
)

if TYPE_CHECKING:
    from torch import Tensor

    from tritter.evaluation.jump import Jump

Verdict = Literal["passed", "failed", "undecided", "reported", "not_asked"]
Status = Literal["kept", "rolled_back", "undecided", "ungated"]

# Documents are named if this share of them, or less, causes half of the spread
_FEW = 0.05
_MAX_NAMES = 3
_MEMORY_BOUND = 0.1  # relative to the bytes computed from shapes
_MSE_BOUND = 1e-6  # mean squared difference of logits
_ROUNDED_JUMP = 1.0


@dataclass(frozen=True, slots=True)
class Check:
    """The result of one check of a grown model.

    Attributes:
        name: retention, new_capability, preservation, training, gradient_flow or memory.
        subject: the domain or other object of the check.
        verdict: the verdict.
        detail: explanation for people.
        value: the measured value, positive for a worse model; None if it is not finite.
        bound: the allowed value; None if the value is only reported.
        lower: one-sided lower bound at `confidence`; infinite if unknown.
        upper: one-sided upper bound at `confidence`; infinite if unknown.
        confidence: confidence of each bound.
        n: number of documents or items.
        documents_needed: total number of documents for a conclusive verdict, at least
            `Check.MIN_DOCUMENTS`; only for undecided checks.
        scored: the part of conversations that is scored; None for other documents.
        jump: record of the logit shift, with the yardstick; None in other checks.
    """

    # Damage to a tenth of all documents shows in at least one of 30 with probability 96 %
    MIN_DOCUMENTS: ClassVar[int] = 30
    # float32 tolerance of an exact expansion in the stock classes, in units of std(logits)
    EXACT_JUMP: ClassVar[float] = 1e-4
    # Steps after which a missing gradient is final: zeros of an expansion block them for two steps
    ENOUGH_STEPS: ClassVar[int] = 4

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
    scored: str | None = None
    jump: Mapping[str, float | None] | None = None

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
            **({} if self.scored is None else {"scored": self.scored}),
            **({} if self.jump is None else {"jump": dict(self.jump)}),
        }

    def reported(self) -> Check:
        """Return the check for `gate=off`: its numbers without bound and verdict."""
        detail = f"{self.detail}; gate=off enforces nothing"
        return replace(self, verdict="reported", detail=detail, bound=None, documents_needed=None)

    @classmethod
    def of_training(cls, non_finite_steps: int, *, aborted_reason: str | None) -> Check:
        """Check that training was not aborted."""
        verdict: Verdict = "passed" if aborted_reason is None else "failed"
        detail = aborted_reason or f"non-finite steps: {non_finite_steps}"
        return cls("training", "steps", verdict, detail, value=float(non_finite_steps))

    @classmethod
    def of_gradient_flow(
        cls,
        flow: Mapping[str, Any],
        *,
        new_experts: Collection[int] = (),
        min_steps: int = ENOUGH_STEPS,
    ) -> Check | None:
        """Check that all trained parameters received a gradient; None if it was not recorded.

        Experts without tokens have no gradient and are listed. The check fails if no appended
        expert of a layer received any token.

        Args:
            flow: gradient flow recorded during training.
            new_experts: indices of appended experts.
            min_steps: minimum number of steps for a verdict.
        """
        if not flow:
            return None
        dead, idle = flow["without_gradient"], flow["without_tokens"]
        findings = []
        if dead:
            findings.append(f"no gradient reached {_join_names(dead)}")
        if idle:
            findings.append(f"no token was routed to {_join_names(idle)}")
        detail = "; ".join(findings) or "all trained parameters received a gradient"
        if flow["steps"] < min_steps:
            detail = f"this check requires at least {min_steps} training steps"
            return cls("gradient_flow", "parameters", "reported", detail, n=flow["steps"])
        by_layer: dict[str, set[int]] = {}
        for name in idle:  # such as layers.3.experts.7
            _, layer, _, number = name.split(".")
            by_layer.setdefault(layer, set()).add(int(number))
        is_lost = new_experts and any(set(new_experts) <= numbers for numbers in by_layer.values())
        verdict: Verdict = "failed" if dead or is_lost else "passed"
        return cls(
            "gradient_flow",
            "parameters",
            verdict,
            detail,
            value=float(len(dead)),
            bound=0.0,
            n=flow["steps"],
        )

    @classmethod
    def of_memory(cls, measured: Mapping[str, Any], *, expected: int) -> Check:
        """Compare the memory of a training run with the bytes computed from shapes.

        Args:
            measured: bytes of `parameters`, `gradients` and `optimizer`, and the `peak` of a GPU.
            expected: sum of the three from shapes.
        """
        names = ("parameters", "gradients", "optimizer")
        value = sum(measured[name] for name in names) / expected - 1
        verdict: Verdict = "passed" if abs(value) <= _MEMORY_BOUND else "failed"
        parts = ", ".join(f"{name} {measured[name]:,}" for name in names)
        detail = f"{value:+.2%} compared with {expected:,} bytes from its shapes ({parts})"
        if peak := measured.get("peak"):
            detail += f"; GPU peak including activations: {peak:,} bytes"
        return cls("memory", "states", verdict, detail, value=value, bound=_MEMORY_BOUND)

    @classmethod
    def of_preservation(cls, jump: Jump, *, claims_exact: bool) -> Check:
        """Check the logit shift of a function-preserving expansion; report that of any other."""
        value, bound = jump.relative_to_std, cls.EXACT_JUMP if claims_exact else None
        verdict: Verdict = "reported"
        if bound is not None:
            verdict = "passed" if value < bound else "failed"
        elif finite_or_none(value) is None:
            verdict = "failed"
        claim = f"function-preserving, allowed {bound:g}" if bound is not None else "no bound"
        detail = f"logit shift at expansion: max {value:.2g} standard deviations ({claim})"
        return cls("preservation", "logits", verdict, detail, value=value, bound=bound)

    @classmethod
    def of_equivalence(
        cls,
        before: Tensor,
        after: Tensor,
        *,
        skip_reason: str | None,
        rounded: str = "",
        rounded_bound: float,
    ) -> Check:
        """Check that two models compute the same logits up to rounding.

        The check passes if the mean squared difference is below `_MSE_BOUND` and the largest
        difference is below 1e-4 standard deviations, because logits may be small. Differences that
        rounding of the weights to 16 bits may explain are undecided.

        Args:
            before: logits, float32 [B, T, V].
            after: logits of the other model.
            skip_reason: the reason why equality is not expected; then differences are reported
                and the check does not fail.
            rounded: dtypes below float32 of the weights of `after`, for the message.
            rounded_bound: largest difference, in standard deviations, that rounding may explain.
        """
        difference = after - before
        error = float(difference.square().mean())
        relative = float(difference.abs().max() / before.std())
        is_same = error < _MSE_BOUND and relative < cls.EXACT_JUMP
        verdict: Verdict = "passed" if is_same else "failed"
        detail = (
            f"mean squared difference of the logits {error:.2g}, allowed {_MSE_BOUND:g}; largest "
            f"difference {relative:.2g} standard deviations, allowed {cls.EXACT_JUMP:g}"
        )
        if not is_same and skip_reason is not None:
            verdict, detail = "not_asked", f"{skip_reason}; {detail}"
        elif not is_same and rounded and relative < rounded_bound:
            verdict = "undecided"
            detail += f"; this includes rounding to {rounded}, use a result in float32 to decide"
        return cls("forward_equivalence", "logits", verdict, detail, value=error, bound=_MSE_BOUND)

    @classmethod
    def of_scaling(cls, num_bytes: tuple[int, int], counted: tuple[int, int]) -> Check:
        """Check that memory grew in proportion to the number of parameters.

        Args:
            num_bytes: parameter bytes of both models, as loaded.
            counted: number of parameters of both models, from shapes.
        """
        measured, expected = num_bytes[1] / num_bytes[0], counted[1] / counted[0]
        value = measured / expected - 1
        verdict: Verdict = "passed" if abs(value) <= _MEMORY_BOUND else "failed"
        detail = (
            f"{num_bytes[0]:,} to {num_bytes[1]:,} bytes ({measured:.4g} times); from shapes "
            f"{counted[0]:,} to {counted[1]:,} parameters ({expected:.4g} times)"
        )
        bound = _MEMORY_BOUND
        return cls("memory_scaling", "parameters", verdict, detail, value=value, bound=bound)


@dataclass(frozen=True, slots=True)
class GateResult:
    """The result of the gate outside of a run. Nothing is rolled back.

    Args:
        status: `kept`, `rolled_back` or `undecided`.
        checks: one per domain, with value, bound and verdict.
    """

    status: Status
    checks: tuple[Check, ...]

    @classmethod
    def of(cls, checks: Sequence[Check]) -> GateResult:
        """Return the result of these checks; reported ones have no influence.

        Any failed check rolls back. Otherwise any undecided one makes the result undecided.
        """
        verdicts = {check.verdict for check in checks}
        status: Status = "undecided" if "undecided" in verdicts else "kept"
        return cls("rolled_back" if "failed" in verdicts else status, tuple(checks))


def retention_check(
    subject: str, before: PairedScores, after: PairedScores, *, bound: float, confidence: float
) -> Check:
    """Check that forgetting of an old domain or task is at most `bound`.

    Forgetting is the relative rise of a domain's loss per byte, or the relative drop of a task's
    accuracy above chance. The check passes if the one-sided upper bound is at most `bound`, and
    fails if the lower bound is above it. It is undecided below `Check.MIN_DOCUMENTS`. It is only
    reported if the accuracy was not significantly above chance before.

    Args:
        subject: name of the domain or task.
        before: scores before growth.
        after: scores after growth.
        bound: allowed relative forgetting.
        confidence: confidence of each one-sided bound.
    """

    def verdict(lower: float, upper: float) -> Verdict:
        return "passed" if upper <= bound else "failed" if lower > bound else "undecided"

    if before.unit == "accuracy" and not before.mean_above_chance().lower(confidence) > 0:
        detail = f"accuracy {before.mean():.1%} before is not significantly above chance"
        return Check("retention", subject, "reported", detail, n=len(before))
    return _forgetting_check(
        "retention",
        subject,
        before,
        after,
        estimate=PairedScores.relative_forgetting,
        drop="{:+.2%} of the accuracy above chance",
        verdict=verdict,
        bound=bound,
        confidence=confidence,
    )


def new_capability_check(
    subject: str, before: PairedScores, after: PairedScores, *, confidence: float
) -> Check:
    """Check that the loss per byte of a new domain fell, or that the accuracy of a new task rose.

    The check passes if the one-sided upper bound of the change is below zero (an improvement),
    and fails if the lower bound is not. It is undecided below `Check.MIN_DOCUMENTS`. Accuracies are
    compared in points, because they may start at chance.
    """

    def verdict(lower: float, upper: float) -> Verdict:
        return "passed" if upper < 0 else "failed" if lower >= 0 else "undecided"

    return _forgetting_check(
        "new_capability",
        subject,
        before,
        after,
        estimate=PairedScores.relative_forgetting
        if before.unit == "nats"
        else PairedScores.drop_in_points,
        drop="{:+.2%} points",
        verdict=verdict,
        bound=0.0,
        confidence=confidence,
    )


def new_task_check(
    subject: str, before: PairedScores, after: PairedScores, *, confidence: float
) -> Check:
    """Check that the accuracy of a task rose after training on its domain.

    As `new_capability_check`, but an inconclusive result is only reported. The loss of the same
    domain decides, because it falls long before the first and after the last change in accuracy.
    """
    check = new_capability_check(subject, before, after, confidence=confidence)
    if check.verdict != "undecided":
        return check
    change = f"accuracy {before.mean():.1%} to {after.mean():.1%} on {check.n} items"
    detail = f"{change}, no significant improvement"
    return replace(check, verdict="reported", detail=detail, bound=None, documents_needed=None)


def _join_names(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
    return ", ".join(names[:_MAX_NAMES]) + more


def _forgetting_check(
    name: str,
    subject: str,
    before: PairedScores,
    after: PairedScores,
    *,
    estimate: Callable[[PairedScores, PairedScores], Estimate],
    drop: str,
    verdict: Callable[[float, float], Verdict],
    bound: float,
    confidence: float,
) -> Check:
    """Estimate forgetting of a domain or task and return the check.

    Args:
        drop: format of an accuracy drop in the detail.
        verdict: maps lower and upper bound to a verdict.
    """
    import torch

    if not_finite := int((~torch.isfinite(after.values)).sum()):
        detail = f"the loss is not finite for {not_finite} of {len(after)} documents"
        return Check(name, subject, "failed", detail, bound=bound, n=len(after))
    change, items = estimate(before, after), "documents" if before.unit == "nats" else "items"
    lower, upper = change.lower(confidence), change.upper(confidence)
    is_enough = change.n >= Check.MIN_DOCUMENTS
    answer: Verdict = verdict(lower, upper) if is_enough else "undecided"
    needed = None
    if answer == "undecided":
        needed = change.documents_to_decide(bound, confidence)
    if not is_enough:
        needed = max(Check.MIN_DOCUMENTS, needed or 0)
    changed = f"loss per byte {change.value:+.2%}"
    if before.unit == "accuracy":
        changed = f"accuracy {before.mean():.1%} to {after.mean():.1%}, a drop of "
        changed += drop.format(change.value)
    detail = f"{changed} on {change.n} {items}, " + (
        f"one-sided {confidence:.0%} bounds {_bound_text(lower)} and {_bound_text(upper)}, "
        f"allowed {bound:+.2%}"
        if is_enough
        else f"fewer than the required {Check.MIN_DOCUMENTS}"
    )
    if answer == "undecided":
        detail += "; " + (
            f"about {needed} {items} needed" if needed else f"the number of {items} is unknown"
        )
    if before.unit == "nats":
        names = before.dominant_items(after)
        # Name the documents that cause half of the spread if they are few
        if names and len(names) <= _FEW * change.n and change.n >= Check.MIN_DOCUMENTS:
            shown = ", ".join(map(repr, names[:_MAX_NAMES]))
            more = ", .." if len(names) > _MAX_NAMES else ""
            number = "one document causes" if len(names) == 1 else f"{len(names)} documents cause"
            detail += f"; {number} half of the spread: {shown}{more}"
    return Check(
        name,
        subject,
        answer,
        detail,
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


def rounded_jump(*, has_experts: bool) -> float:
    """Return the largest logit shift [σ] that rounding of all weights to 16 bits may cause.

    With experts it is unbounded, because rounding may route tokens to other experts.
    """
    return inf if has_experts else _ROUNDED_JUMP
