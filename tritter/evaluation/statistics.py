"""Paired comparison of two models on the same items: how much worse the second one is."""

from dataclasses import replace

import torch
from torch import Tensor

from tritter.errors import TritterError
from tritter.evaluation.bootstrap import NUM_RESAMPLES
from tritter.evaluation.estimate import Estimate, bounded_ratio, ratio_of_sums
from tritter.evaluation.paired_scores import PairedScores


def relative_harm(before: PairedScores, after: PairedScores) -> Estimate:
    """Estimate how much of what a model could do is lost, paired by item.

    Of a loss this is the relative rise of mean cross-entropy per byte. Both models scored the same
    bytes, so the ratio of losses per byte is the ratio of summed nats. Documents are the clusters:
    tokens of one document succeed or fail together, and errors per token would be several times
    too small. Of an accuracy it is the drop as a part of the accuracy above chance.

    Returns:
        0.01 for a loss that rose by one per cent; negative where the model became better.

    Raises:
        TritterError: the two did not score the same items, a loss is not a positive number, or an
            accuracy is not above chance before.
    """
    value = _relative_value(before, after)
    if before.unit == "accuracy":
        return _drop(before, after, out_of=before.above_chance)
    return replace(bounded_ratio(after.values, before.values), value=value)


def drop_in_points(before: PairedScores, after: PairedScores) -> Estimate:
    """Estimate the drop of an accuracy, 0.02 for two points, negative for a gain; paired by item.

    Raises:
        TritterError: the two did not score the same items.
    """
    _check_paired(before, after)
    return _drop(before, after, out_of=before.weights[before.per].double())


def performance_delta(before: PairedScores, after: PairedScores) -> float:
    """Return how a score changed, as the lineage says it: no bounds, so nothing is resampled.

    Returns:
        The relative rise of a loss per byte, or the points that an accuracy gained.

    Raises:
        TritterError: as `relative_harm`.
    """
    if before.unit == "accuracy":
        _check_paired(before, after)
        return after.mean() - before.mean()
    return _relative_value(before, after)


def carrying_items(before: PairedScores, after: PairedScores) -> tuple[str, ...]:
    """Return the fewest items whose changes make up half of the spread, the largest first.

    The spread is the sum of squares behind the standard error; where few items make it, the
    bounds rest on what those few happened to be.
    """
    ratio = after.values.sum() / before.values.sum()
    squares = (after.values - ratio * before.values).square()
    if not squares.sum() > 0:
        return ()
    largest = squares.sort(descending=True)
    number = int((largest.values.cumsum(0) < squares.sum() / 2).sum()) + 1
    return tuple(before.identifiers[index] for index in largest.indices[:number].tolist())


def above_chance(scores: PairedScores) -> Estimate:
    """Estimate the accuracy above that of guessing."""
    ratio = ratio_of_sums(scores.above_chance, scores.weights[scores.per].double())
    errors = _student_errors(ratio.n)
    return Estimate(ratio.value, ratio.standard_error, n=ratio.n, errors=errors)


def _relative_value(before: PairedScores, after: PairedScores) -> float:
    _check_paired(before, after)
    total = before.above_chance.sum()
    is_finite = torch.isfinite(total) and torch.isfinite(after.values).all()
    if not (is_finite and total > 0):
        what = "losses above zero" if before.unit == "nats" else "accuracies above chance"
        raise TritterError(
            f"evaluation: a relative change needs finite {what}, got {float(total):g} before and "
            f"{float(after.above_chance.sum()):g} after, summed"
        )
    rise = float(after.above_chance.sum() / total) - 1
    return rise if before.unit == "nats" else -rise


def _drop(before: PairedScores, after: PairedScores, *, out_of: Tensor) -> Estimate:
    """Return Σ (before − after) / Σ out_of with the adjusted Wald interval of Bonett and Price.

    One answer more is gained and one more is lost (Bonett and Price 2012, Adjusted Wald confidence
    interval for a difference of binomial proportions based on paired data): where few answers
    changed, or none, their spread alone would be far too sure. Resamples of such items would know
    no bound at all.
    """
    lost = before.values - after.values
    weight = before.weights[before.per].double().mean()
    more = torch.stack([weight, -weight])
    adjusted = ratio_of_sums(torch.cat([lost, more]), torch.cat([out_of, out_of.mean().expand(2)]))
    value = float(lost.sum() / out_of.sum())
    n = len(before)
    return Estimate(value, adjusted.standard_error, n=n, errors=_student_errors(n))


def _student_errors(n: int) -> Tensor:
    """Return quantiles of Student's t with n − 1 degrees of freedom in place of resamples' errors.

    float64 [R]; empty below two items, where nothing is known.
    """
    from scipy.special import stdtrit  # half a second, which no gate of losses needs

    if n < 2:
        return torch.empty(0, dtype=torch.float64)
    probabilities = torch.arange(1, NUM_RESAMPLES + 1, dtype=torch.float64) / (NUM_RESAMPLES + 1)
    return torch.from_numpy(stdtrit(n - 1, probabilities.numpy()))


def _check_paired(before: PairedScores, after: PairedScores) -> None:
    if (before.unit, before.chance) != (after.unit, after.chance):
        raise TritterError(
            f"evaluation: {before.unit} with chance {before.chance:g} before stands against "
            f"{after.unit} with chance {after.chance:g} after"
        )
    if len(before) != len(after):
        raise TritterError(
            f"evaluation: {len(before)} items were scored before and {len(after)} after; "
            "a paired comparison needs the same ones"
        )
    for first, second in zip(before.identifiers, after.identifiers, strict=True):
        if first != second:
            raise TritterError(
                f"evaluation: {first!r} before stands against {second!r} after; "
                "a paired comparison needs the same items in the same order"
            )
    old, new = before.weights[before.per], after.weights[after.per]
    if not torch.equal(old, new):
        index = int((old != new).nonzero()[0])
        raise TritterError(
            f"evaluation: {before.identifiers[index]!r} has {int(old[index])} {before.per} before "
            f"and {int(new[index])} after; both must score the same"
        )
