"""The questions of a validation that answers of two models decide, as checks like the gate's."""

from math import inf

from torch import Tensor, nn

from tritter.evaluation.gate import EXACT_JUMP, MEMORY_BOUND, Check, Verdict

MSE_BOUND = 1e-6  # of logits, as the specification has it (section 9.1)
_ROUNDED_JUMP = 1.0


def equivalence_check(
    before: Tensor,
    after: Tensor,
    *,
    reason_not_asked: str | None,
    rounded: str = "",
    rounded_bound: float = _ROUNDED_JUMP,
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
