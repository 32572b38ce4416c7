"""The gate: checks on a grown model, and what follows from them.

Every check can end undecided: too few documents are a reason to say how many would do, and never a
reason to pass or to fail. Damage that is rare does not show in few documents, so below
`MIN_DOCUMENTS` no bound is trusted.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import TYPE_CHECKING, Any, Literal

from tritter.evaluation.statistics import (
    Estimate,
    PairedScores,
    above_chance,
    carrying_items,
    drop_in_points,
    finite_or_none,
    relative_forgetting,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tritter.evaluation.jump import Jump

Verdict = Literal["passed", "failed", "undecided", "reported", "not_asked"]
Status = Literal["kept", "rolled_back", "undecided", "ungated"]

# A tenth of all documents shows in at least one of 30 with a probability of 96 %
MIN_DOCUMENTS = 30
# Documents, as a part of all, that may not make half of the spread without being named
_FEW = 0.05
_MOST_NAMES = 3
# What loading an exact expansion in the stock classes may cost in float32, in units of std(logits).
EXACT_JUMP = 1e-4
# After which what has no gradient will have none: zeros that an expansion sets hold gradients from
# what lies behind them for two
ENOUGH_STEPS = 4
MEMORY_BOUND = 0.1  # of the bytes that shapes say


@dataclass(frozen=True, slots=True)
class Check:
    """One question to a grown model and its answer.

    Attributes:
        name: retention, new_capability, preservation, training, gradient_flow or memory.
        subject: the domain, or what else was looked at.
        value: the measured number, positive where the model became worse; None when there is
            none (a loss that is not finite).
        bound: what it was held against; None when it is only reported.
        lower, upper: one-sided bounds, each at `confidence`; infinite where none is known.
        n: documents or items behind the value.
        documents_needed: how many in all would decide, at least `MIN_DOCUMENTS`; only of an
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
    subject: str, before: PairedScores, after: PairedScores, *, bound: float, confidence: float
) -> Check:
    """Ask whether no more than a part `bound` of an old domain or task was lost.

    A domain loses by a rise of its loss per byte, a task by a drop of its accuracy above chance.
    Passed when the one-sided upper bound of the harm is at most `bound`, failed when the lower
    bound is above it; undecided below `MIN_DOCUMENTS`. Reported where the accuracy was not surely
    above chance before: there is nothing to lose.
    """

    def verdict(lower: float, upper: float) -> Verdict:
        return "passed" if upper <= bound else "failed" if lower > bound else "undecided"

    if before.unit == "accuracy" and not above_chance(before).lower(confidence) > 0:
        detail = f"accuracy {before.mean():.1%} before is not surely above chance"
        return Check("retention", subject, "reported", detail, n=len(before))
    return _forgetting_check(
        "retention",
        subject,
        before,
        after,
        estimate=relative_forgetting,
        drop="{:+.2%} of what is above chance",
        verdict=verdict,
        bound=bound,
        confidence=confidence,
    )


def new_capability_check(
    subject: str, before: PairedScores, after: PairedScores, *, confidence: float
) -> Check:
    """Ask whether the loss on a new domain fell, per byte, or the accuracy of a new task rose.

    Passed when the one-sided upper bound of the harm is below zero, failed when the lower bound
    is not; undecided below `MIN_DOCUMENTS`. An accuracy may start at chance, so points count.
    """

    def verdict(lower: float, upper: float) -> Verdict:
        return "passed" if upper < 0 else "failed" if lower >= 0 else "undecided"

    return _forgetting_check(
        "new_capability",
        subject,
        before,
        after,
        estimate=relative_forgetting if before.unit == "nats" else drop_in_points,
        drop="{:+.2%} points",
        verdict=verdict,
        bound=0.0,
        confidence=confidence,
    )


def new_task_check(
    subject: str, before: PairedScores, after: PairedScores, *, confidence: float
) -> Check:
    """Ask whether the accuracy of a task rose whose text was learned.

    As `new_capability_check`, but reported where it neither surely rose nor surely fell: whether
    anything was learned, the loss of the same text decides, which falls long before the first
    answer is right and goes on when the last one is.
    """
    check = new_capability_check(subject, before, after, confidence=confidence)
    if check.verdict != "undecided":
        return check
    detail = f"accuracy {before.mean():.1%} to {after.mean():.1%} on {check.n} items, not surely up"
    return replace(check, verdict="reported", detail=detail, bound=None, documents_needed=None)


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


def flow_check(
    flow: Mapping[str, Any],
    *,
    new_experts: Collection[int] = (),
    least_steps: int = ENOUGH_STEPS,
) -> Check | None:
    """Ask whether everything that was trained got a gradient; None where it was not watched.

    Tokens alone bring an expert a gradient, so one that met none is named; the check fails where a
    layer's appended experts met none all together: what they add was never learned.

    Args:
        flow: what a training found.
        new_experts: those that were appended, by number.
        least_steps: without which nothing can be said.
    """
    if not flow:
        return None
    dead, idle = flow["without_gradient"], flow["without_tokens"]
    told = []
    if dead:
        told.append(f"no gradient reached {_listed(dead)}")
    if idle:
        told.append(f"no token met {_listed(idle)}")
    detail = "; ".join(told) or "all that was trained got a gradient"
    if flow["steps"] < least_steps:
        detail = f"a training of fewer than {least_steps} steps does not show it"
        return Check("gradient_flow", "parameters", "reported", detail, n=flow["steps"])
    by_layer: dict[str, set[int]] = {}
    for name in idle:  # such as layers.3.experts.7
        _, layer, _, number = name.split(".")
        by_layer.setdefault(layer, set()).add(int(number))
    is_lost = new_experts and any(set(new_experts) <= numbers for numbers in by_layer.values())
    verdict: Verdict = "failed" if dead or is_lost else "passed"
    return Check(
        "gradient_flow",
        "parameters",
        verdict,
        detail,
        value=float(len(dead)),
        bound=0.0,
        n=flow["steps"],
    )


def memory_check(held: Mapping[str, Any], *, expected: int) -> Check:
    """Hold what a training held against what its shapes say, in bytes.

    Args:
        held: of `parameters`, `gradients` and `optimizer`, and of a GPU the `peak`.
        expected: all three together.
    """
    names = ("parameters", "gradients", "optimizer")
    value = sum(held[name] for name in names) / expected - 1
    verdict: Verdict = "passed" if abs(value) <= MEMORY_BOUND else "failed"
    parts = ", ".join(f"{name} {held[name]:,}" for name in names)
    detail = f"held {value:+.2%} of the {expected:,} bytes that its shapes say ({parts})"
    if peak := held.get("peak"):
        detail += f"; the GPU's peak, with activations, was {peak:,}"
    return Check("memory", "states", verdict, detail, value=value, bound=MEMORY_BOUND)


def decide(checks: Iterable[Check]) -> Status:
    """Draw the consequence: one failure rolls back, one open question leaves it undecided.

    Args:
        checks: all that were made; a reported one decides nothing.
    """
    verdicts = {check.verdict for check in checks}
    if "failed" in verdicts:
        return "rolled_back"
    return "undecided" if "undecided" in verdicts else "kept"


def report_only(check: Check) -> Check:
    """Return a check as `gate=off` records it: its numbers without a bound or a verdict."""
    detail = f"{check.detail}; gate=off enforces nothing"
    return replace(check, verdict="reported", detail=detail, bound=None, documents_needed=None)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(names[:_MOST_NAMES]) + more


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
    """Estimate the harm to a domain, or to a task whose drop is worded as `drop`, and judge it."""
    import torch

    if not_finite := int((~torch.isfinite(after.values)).sum()):
        detail = f"the loss is not finite on {not_finite} of {len(after)} documents"
        return Check(name, subject, "failed", detail, bound=bound, n=len(after))
    harm, items = estimate(before, after), "documents" if before.unit == "nats" else "items"
    lower, upper = harm.lower(confidence), harm.upper(confidence)
    is_enough = harm.n >= MIN_DOCUMENTS
    answer: Verdict = verdict(lower, upper) if is_enough else "undecided"
    needed = None
    if answer == "undecided":
        needed = harm.documents_to_decide(bound, confidence)
    if not is_enough:
        needed = max(MIN_DOCUMENTS, needed or 0)
    changed = f"loss per byte {harm.value:+.2%}"
    if before.unit == "accuracy":
        changed = f"accuracy {before.mean():.1%} to {after.mean():.1%}, a drop of "
        changed += drop.format(harm.value)
    detail = f"{changed} on {harm.n} {items}, " + (
        f"one-sided {confidence:.0%} bounds {_bound_text(lower)} and {_bound_text(upper)}, "
        f"allowed {bound:+.2%}"
        if is_enough
        else f"fewer than the {MIN_DOCUMENTS} that a verdict needs"
    )
    if answer == "undecided":
        detail += "; " + (
            f"about {needed} {items} would decide" if needed else f"no number of {items} is known"
        )
    if before.unit == "nats":
        names = carrying_items(before, after)
        # The documents that make half of the spread are named where they are few
        if names and len(names) <= _FEW * harm.n and harm.n >= MIN_DOCUMENTS:
            shown = ", ".join(map(repr, names[:_MOST_NAMES]))
            more = ", .." if len(names) > _MOST_NAMES else ""
            number = "one document" if len(names) == 1 else f"{len(names)} documents"
            detail += f"; half of the spread comes from {number}: {shown}{more}"
    return Check(
        name,
        subject,
        answer,
        detail,
        value=harm.value,
        bound=bound,
        lower=lower,
        upper=upper,
        confidence=confidence,
        n=harm.n,
        documents_needed=needed,
    )


def _bound_text(value: float) -> str:
    return f"{value:+.2%}" if finite_or_none(value) is not None else "unknown"


MSE_BOUND = 1e-6  # of logits, as the specification has it (section 9.1)
_ROUNDED_JUMP = 1.0


def equivalence_check(
    before: Tensor,
    after: Tensor,
    *,
    reason_not_asked: str | None,
    rounded: str = "",
    rounded_bound: float,
) -> Check:
    """Ask whether two models say the same, to rounding.

    Passed when the mean squared difference of logits is below `MSE_BOUND`, and the largest
    difference below 1e-4 of their standard deviation: logits may be small.
    What a rounding of the weights to 16 bits may have done is undecided.

    Args:
        before: logits, float32 [B, T, V].
        after: the same of the other model.
        reason_not_asked: why nothing claims it; what differs is told then, and nothing fails.
        rounded: the types that weights of `after` were computed for, if any is below float32.
        rounded_bound: of the largest difference, from which on no such rounding explains it.
    """
    difference = after - before
    error = float(difference.square().mean())
    relative = float(difference.abs().max() / before.std())
    is_same = error < MSE_BOUND and relative < EXACT_JUMP
    verdict: Verdict = "passed" if is_same else "failed"
    detail = (
        f"mean squared difference of the logits {error:.2g}, allowed {MSE_BOUND:g}; largest "
        f"difference {relative:.2g} standard deviations, allowed {EXACT_JUMP:g}"
    )
    if not is_same and reason_not_asked is not None:
        verdict, detail = "not_asked", f"{reason_not_asked}; {detail}"
    elif not is_same and rounded and relative < rounded_bound:
        verdict = "undecided"
        detail += f"; rounding to {rounded} is in it, a result in float32 would decide"
    return Check("forward_equivalence", "logits", verdict, detail, value=error, bound=MSE_BOUND)


def rounded_jump(*, has_experts: bool) -> float:
    """Return what rounding of all weights to 16 bits surely does not do to the logits.

    In deviations of the logits. It may send a token to other experts, which has no bound.
    """
    return inf if has_experts else _ROUNDED_JUMP


def scaling_check(held: tuple[int, int], counted: tuple[int, int]) -> Check:
    """Ask whether memory grew as the shapes say.

    Args:
        held: bytes of the parameters of both models, as loaded.
        counted: their parameters, counted from shapes.
    """
    measured, expected = held[1] / held[0], counted[1] / counted[0]
    value = measured / expected - 1
    verdict: Verdict = "passed" if abs(value) <= MEMORY_BOUND else "failed"
    detail = (
        f"{held[0]:,} to {held[1]:,} bytes, {measured:.4g} times; by the shapes {counted[0]:,} to "
        f"{counted[1]:,} parameters, {expected:.4g} times"
    )
    bound = MEMORY_BOUND
    return Check("memory_scaling", "parameters", verdict, detail, value=value, bound=bound)


def parameter_bytes(model: nn.Module) -> int:
    """Return the bytes that a model's parameters hold, each storage once."""
    held = {p.data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    return sum(held.values())
