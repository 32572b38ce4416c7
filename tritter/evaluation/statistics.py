"""Paired comparison of two models on the same items: how much worse the second one is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist, fmean
from typing import TYPE_CHECKING, Any, Literal, get_args

from tritter.errors import TritterError

if TYPE_CHECKING:
    from torch import Tensor

FORMAT_VERSION = 1
MAX_SCORE_BYTES = 2**30  # of a file of scores
Unit = Literal["nats", "accuracy"]


def score_file(name: str) -> str:
    """Return where the scores of one name lie, relative to the run's folder."""
    return f"scores/{name}.json"


@dataclass(frozen=True, slots=True, eq=False)
class PairedScores:
    """What one model scored on the items of one domain or task.

    Attributes:
        identifiers: one per item, a document or a question; two records pair up when these agree.
        values: float64 [n], summed over an item: nats of a document, right answers to a question.
        weights: name → int64 [n], positive: what a sum of values is divided by. Losses have
            `tokens` and `bytes`, accuracies `answers`.
        unit: `nats`, where less is better, or `accuracy`, where more is.
        chance: accuracy of guessing; 0 for losses.
    """

    identifiers: tuple[str, ...]
    values: Tensor
    weights: Mapping[str, Tensor]
    unit: Unit
    chance: float = 0.0

    def __len__(self) -> int:
        return len(self.identifiers)

    @property
    def per(self) -> str:
        """The weight that changes are said per: losses per byte outlive another tokenizer."""
        return "bytes" if self.unit == "nats" else "answers"

    @property
    def above_chance(self) -> Tensor:
        """Return the values without what guessing reaches, float64 [n]."""
        return self.values - self.chance * self.weights[self.per]

    def mean(self) -> float:
        """Return nats per token, or the part of right answers: the number that people know."""
        return self._mean("tokens" if self.unit == "nats" else "answers")[0]

    def record(self) -> dict[str, float | int | None]:
        """Return the record of summary.json; what is not finite becomes None."""
        if self.unit == "accuracy":
            accuracy, error = self._mean("answers")
            return {"accuracy": accuracy, "standard_error": finite_or_none(error), "n": len(self)}
        loss, error = self._mean("tokens")
        loss_per_byte, error_per_byte = self._mean("bytes")
        return {
            "loss": finite_or_none(loss),
            "loss_per_byte": finite_or_none(loss_per_byte),
            "standard_error": finite_or_none(error),
            "loss_per_byte_standard_error": finite_or_none(error_per_byte),
            "n": len(self),
        }

    def to_dict(self) -> dict[str, Any]:
        """Return a plain record that JSON can hold."""
        return {
            "format_version": FORMAT_VERSION,
            "identifiers": list(self.identifiers),
            "values": self.values.tolist(),
            "weights": {name: weight.tolist() for name, weight in self.weights.items()},
            "unit": self.unit,
            "chance": self.chance,
        }

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> PairedScores:
        """Read what `to_dict` wrote.

        Raises:
            TritterError: the record has another format version, or is none.
        """
        import torch

        if not isinstance(record, dict):
            raise TritterError("scores are no record. Score the model again.")
        version = record.get("format_version")
        if version != FORMAT_VERSION:
            raise TritterError(
                f"scores have format_version={version!r}; this program reads "
                f"{FORMAT_VERSION}. Score the model again."
            )
        try:
            if record["unit"] not in get_args(Unit):
                raise ValueError(f"unit {record['unit']!r}")
            names = ("tokens", "bytes") if record["unit"] == "nats" else ("answers",)
            read = cls(
                identifiers=tuple(str(name) for name in record["identifiers"]),
                values=torch.tensor(record["values"], dtype=torch.float64),
                weights={
                    name: torch.tensor(record["weights"][name], dtype=torch.int64) for name in names
                },
                unit=record["unit"],
                chance=float(record["chance"]),
            )
        except (KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise TritterError(f"scores are damaged ({error!r}).") from error
        columns = (read.values, *read.weights.values())
        if any(column.shape != (len(read),) for column in columns):
            raise TritterError("scores are damaged: as many numbers as items belong.")
        return read

    def _mean(self, weight: str) -> tuple[float, float]:
        """Return a mean and its standard error, clustered by item."""
        ratio = ratio_of_sums(self.values, self.weights[weight].double())
        return ratio.value, ratio.standard_error


@dataclass(frozen=True, slots=True, eq=False)
class Estimate:
    """A value with bounds.

    Attributes:
        value: what was measured.
        standard_error: of the value.
        n: independent documents behind it.
        errors: float64 [R], sorted: errors in units of their own standard error that samples like
            this one make, or their quantiles. None: nothing is known of them.
    """

    value: float
    standard_error: float
    n: int
    errors: Tensor | None = None

    def upper(self, confidence: float) -> float:
        """Return the one-sided upper bound: the truth lies below it with this confidence.

        Args:
            confidence: from 0.5; above R / (R + 1) no bound is known.
        """
        return self.value + self._margin(confidence, is_upper=True)

    def lower(self, confidence: float) -> float:
        """Return the one-sided lower bound: the truth lies above it with this confidence."""
        return self.value - self._margin(confidence, is_upper=False)

    def documents_to_decide(
        self, bound: float, confidence: float, power: float = 0.8
    ) -> int | None:
        """Return how many documents like these would settle on which side of `bound` the truth is.

        Assumes that the value stays where it is, that the error falls with the root of n, and that
        what the bound is wider than a normal one, in standard errors, does so too: it is skewness.

        Returns:
            The total number of documents, or None when no number is known to be enough.
        """
        distance = abs(self.value - bound)
        is_below = self.value < bound
        margin = (self.upper if is_below else self.lower)(confidence) - self.value
        if not math.isfinite(margin) or distance == 0:
            return None
        z, root = NormalDist().inv_cdf(confidence), math.sqrt(self.n)
        deviation = self.standard_error * root
        excess = max(0.0, abs(margin) - z * self.standard_error) * root
        # distance · x² = (z(confidence) + z(power)) · deviation · x + excess · root, with x = √n
        linear = (z + NormalDist().inv_cdf(power)) * deviation
        x = (linear + math.sqrt(linear**2 + 4 * distance * excess * root)) / (2 * distance)
        return max(2, math.ceil(x**2))

    def _margin(self, confidence: float, *, is_upper: bool) -> float:
        """Return how far the bound lies from the value."""
        if self.standard_error == 0:
            return 0.0
        number = 0 if self.errors is None else len(self.errors)
        rank = math.ceil(confidence * (number + 1))
        if self.errors is None or rank > number:
            return math.inf
        error = -self.errors[number - rank] if is_upper else self.errors[rank - 1]
        return max(0.0, self.standard_error * float(error))


def ratio_of_sums(numerators: Tensor, denominators: Tensor) -> Estimate:
    """Return Σ numerator / Σ denominator over independent documents.

    The standard error is the linearised (Taylor) one of survey sampling (Cochran, Sampling
    Techniques, 6.4), each document one cluster, with the residual of a document divided by
    1 - its share of the denominator: this is the delete-one jackknife, and it keeps the error
    honest when a few long documents dominate. Errors are not resampled.

    Args:
        numerators: float64 [n], one sum per document.
        denominators: float64 [n], positive.
    """
    import torch

    n = len(numerators)
    total = denominators.sum()
    value = numerators.sum() / total
    if n < 2:
        return Estimate(float(value), math.inf, n=n)
    leverage = denominators / total
    residuals = (numerators - value * denominators) / total / (1 - leverage)
    # n - 1 over n is the jackknife's factor; the leverage already undid the lost degree of freedom.
    variance = residuals.square().sum() * (n - 1) / n
    return Estimate(float(value), float(torch.sqrt(variance)), n=n)


def bounded_ratio(numerators: Tensor, denominators: Tensor) -> Estimate:
    """Return `ratio_of_sums` with the errors that resamples of the documents make.

    Args:
        numerators, denominators: as there.
    """
    ratio = ratio_of_sums(numerators, denominators)
    if ratio.n < 2:
        return ratio
    return replace(ratio, errors=studentised_errors(numerators, denominators))


def finite_or_none(value: float | None) -> float | None:
    """Return a number that JSON can hold: None for what is missing, infinite or not a number."""
    return value if value is not None and math.isfinite(value) else None


def relative_forgetting(before: PairedScores, after: PairedScores) -> Estimate:
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
        TritterError: as `relative_forgetting`.
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
    return replace(ratio, errors=_student_errors(ratio.n))


def _relative_value(before: PairedScores, after: PairedScores) -> float:
    import torch

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
    import torch

    lost = before.values - after.values
    weight = before.weights[before.per].double().mean()
    more = torch.stack([weight, -weight])
    adjusted = ratio_of_sums(torch.cat([lost, more]), torch.cat([out_of, out_of.mean().expand(2)]))
    value, n = float(lost.sum() / out_of.sum()), len(before)
    return replace(adjusted, value=value, n=n, errors=_student_errors(n))


def _student_errors(n: int) -> Tensor | None:
    """Return quantiles of Student's t with n − 1 degrees of freedom in place of resamples' errors.

    float64 [R]; None below two items, where nothing is known.
    """
    import torch
    from scipy.special import stdtrit  # half a second, which no gate of losses needs

    if n < 2:
        return None
    probabilities = torch.arange(1, NUM_RESAMPLES + 1, dtype=torch.float64) / (NUM_RESAMPLES + 1)
    return torch.from_numpy(stdtrit(n - 1, probabilities.numpy()))


def _check_paired(before: PairedScores, after: PairedScores) -> None:
    import torch

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


# The studentised bootstrap of a ratio of sums (bootstrap-t; Efron 1979, Hall 1988).
#
# How far a ratio lies from the truth, in units of its own standard error, is learned from
# resamples of the documents. Where a few documents carry the change, that distribution is far
# from Student's t, whose bounds promise too much there.
#
# R resamples · n documents

NUM_RESAMPLES = 1999
# One seed for every gate: the same scores have the same bounds
_SEED = 20261120
_MOST_DRAWS_AT_ONCE = 2_000_000
# A variance below this part of its terms is what rounding left of zero
_ROUNDING = 1e-12


def studentised_errors(numerators: Tensor, denominators: Tensor) -> Tensor:
    """Return (ratio of a resample − ratio) / standard error of the resample, sorted.

    The standard error is that of `ratio_of_sums`, with the leverages of the documents at hand. The
    result does not depend on the order of the documents, nor on the units of either sum.

    Args:
        numerators: float64 [..., n], n ≥ 2.
        denominators: float64 [..., n], positive.

    Returns:
        float64 [..., NUM_RESAMPLES]. Infinite where a resample moved although its documents agree
        with each other: nothing is known of such an error.
    """
    import torch

    for is_last in (False, True):  # sorted by numerator, and by denominator where that is equal
        order = (numerators if is_last else denominators).argsort(dim=-1, stable=True)
        numerators, denominators = numerators.gather(-1, order), denominators.gather(-1, order)
    total = denominators.sum(dim=-1, keepdim=True)
    shares = denominators / total
    residuals = numerators / total - shares * (numerators.sum(dim=-1, keepdim=True) / total)
    weights = (1 - shares).square().reciprocal()
    columns_nK = torch.stack(
        [
            residuals,
            shares,
            weights * residuals.square(),
            weights * residuals * shares,
            weights * shares.square(),
        ],
        dim=-1,
    )
    n = shares.shape[-1]
    generator, sums = torch.Generator().manual_seed(_SEED), []
    at_once = max(1, _MOST_DRAWS_AT_ONCE // n)
    for start in range(0, NUM_RESAMPLES, at_once):
        rows = min(at_once, NUM_RESAMPLES - start)
        drawn = torch.randint(n, (rows, n), generator=generator)
        drawn += n * torch.arange(rows).unsqueeze(1)
        # How often each resample holds each document
        counts_Rn = torch.bincount(drawn.flatten(), minlength=rows * n).view(rows, n).double()
        sums.append(torch.tensordot(counts_Rn, columns_nK, dims=([1], [-2])))
    residual, share, squares, products, shares = torch.cat(sums).movedim(0, -2).unbind(dim=-1)
    moved = residual / share
    # Σ w (e − moved · b)² over the resample, multiplied out
    terms = squares + moved.square() * shares
    spread = terms - 2 * moved * products
    spread = torch.where(spread > _ROUNDING * terms, spread, 0.0)
    standard_error = (spread * (n - 1) / n).sqrt() / share
    return torch.where(moved == 0, 0.0, moved / standard_error).sort(dim=-1).values


# What learning one task after another does to every domain: the matrix of scores, and transfer.
#
# R[k, d] is the score of domain d after task k, R[0, d] that before the first one. Lopez-Paz and
# Ranzato 2017 (arXiv 1706.08840, section 2) fill it with accuracies and compare with a model that
# has learned nothing. Here it holds losses per byte, so that negative is good, and R[0] is the
# base's own, which may know much already. What was learned before the run has the base's row as
# its own and counts in backward transfer.

ScoreRecords = Mapping[str, Mapping[str, Any]]  # domain or task → record, as in summary.json


@dataclass(frozen=True, slots=True)
class LearnedTask:
    """A task that was learned.

    Args:
        domains: that it was about.
        scores: of every domain afterwards.
    """

    domains: Sequence[str]
    scores: ScoreRecords


def transfer_matrix(
    baseline: ScoreRecords, tasks: Sequence[LearnedTask], *, learned_before: Sequence[str] = ()
) -> dict[str, Any]:
    """Return the matrix and its transfers, as summary.json has them.

    A domain's own task is the first that was about it. Backward transfer is R[last] − R[own], of
    what was learned before the last task; forward transfer R[own − 1] − R[0], of what was not
    learned in the first one. A score that is not known is None, and so is what is computed of it.

    Args:
        baseline: scores before the first task.
        learned_before: domains that the model had learned already.
    """
    rows = [baseline, *(task.scores for task in tasks)]
    domains = [name for name, record in baseline.items() if "loss" in record]
    losses = {name: [row[name].get("loss_per_byte") for row in rows] for name in domains}
    own = {name: 0 for name in learned_before if name in losses}
    for number, task in enumerate(tasks, start=1):
        for name in task.domains:
            own.setdefault(name, number)
    last = len(tasks)
    met = [(name, own[name], losses[name]) for name in domains if name in own]
    backward = {name: _less(each[last], each[k]) for name, k, each in met if k < last}
    forward = {name: _less(each[k - 1], each[0]) for name, k, each in met if k > 1}
    return {
        "rows": ["baseline", *(f"task {number}" for number in range(1, last + 1))],
        "trained": [[], *(list(task.domains) for task in tasks)],
        "domains": domains,
        "loss_per_byte": [list(row) for row in zip(*losses.values(), strict=True)],
        "accuracy": {
            name: [row[name].get("accuracy") for row in rows]
            for name, record in baseline.items()
            if "accuracy" in record
        },
        "own": {name: k for name, k, _ in met},
        "backward_transfer": backward,
        "forward_transfer": forward,
        "mean_backward_transfer": _mean(backward),
        "mean_forward_transfer": _mean(forward),
    }


def _less(after: float | None, before: float | None) -> float | None:
    return None if after is None or before is None else after - before


def _mean(transfer: Mapping[str, float | None]) -> float | None:
    known = [value for value in transfer.values() if value is not None]
    return fmean(known) if known and len(known) == len(transfer) else None
