"""Paired comparisons of two models on the same items, with confidence bounds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from tritter.errors import TritterError

if TYPE_CHECKING:
    from torch import Tensor

_FORMAT_VERSION = 1
_Unit = Literal["nats", "accuracy"]
_NUM_RESAMPLES = 1999
_POWER = 0.8  # probability of a conclusive result with the number of documents reported
# A fixed seed: the same scores have the same bounds in every run
_SEED = 20261120
_MAX_DRAWS_AT_ONCE = 2_000_000
# A variance below this fraction of its terms is a rounding error of zero
_ROUNDING = 1e-12


def score_file(name: str) -> str:
    """Return the path of a score file, relative to the run's folder."""
    return f"scores/{name}.json"


@dataclass(frozen=True, slots=True, eq=False)
class PairedScores:
    """Scores of one model on the items of one domain or task.

    Attributes:
        identifiers: one per item (a document or a question); paired records have the same ones.
        values: float64 [n], sum per item: nats of a document, or correct answers to a question.
        weights: name → int64 [n], positive: denominators of means. Losses have `tokens` and
            `bytes`, accuracies `answers`.
        unit: `nats` (lower is better) or `accuracy` (higher is better).
        chance: accuracy of guessing; 0 for losses.
        start: of losses, the `TextBounds.start` of the documents.
    """

    MAX_FILE_BYTES: ClassVar[int] = 2**30

    identifiers: tuple[str, ...]
    values: Tensor
    weights: Mapping[str, Tensor]
    unit: _Unit
    chance: float = 0.0
    start: tuple[int, ...] = ()

    @classmethod
    def of_answers(cls, names: Sequence[str], right: Tensor, chance: float) -> PairedScores:
        """Return the accuracies of questions, float64 [n]."""
        ones = right.new_ones(len(names)).long()
        return cls(tuple(names), right, {"answers": ones}, "accuracy", chance)

    def __len__(self) -> int:
        return len(self.identifiers)

    @property
    def per(self) -> str:
        """The denominator of changes; losses per byte are comparable across tokenizers."""
        return "bytes" if self.unit == "nats" else "answers"

    @property
    def above_chance(self) -> Tensor:
        """Return the values minus those of guessing, float64 [n]."""
        return self.values - self.chance * self.weights[self.per]

    def mean_above_chance(self) -> Estimate:
        """Estimate the accuracy above chance."""
        ratio = Estimate.of_ratio(self.above_chance, self.weights[self.per].double())
        return replace(ratio, errors=_student_errors(ratio.n))

    def mean(self) -> float:
        """Return the mean nats per token, or the accuracy."""
        return self._mean("tokens" if self.unit == "nats" else "answers")[0]

    def record(self) -> dict[str, float | int | None]:
        """Return the record for summary.json; non-finite values become None."""
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
        """Return a record that is serialisable as JSON."""
        return {
            "format_version": _FORMAT_VERSION,
            "identifiers": list(self.identifiers),
            "values": self.values.tolist(),
            "weights": {name: weight.tolist() for name, weight in self.weights.items()},
            "unit": self.unit,
            "chance": self.chance,
            **({"start": list(self.start)} if self.start else {}),
        }

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> PairedScores:
        """Read a record of `to_dict`.

        Raises:
            TritterError: the record is damaged or has another format version.
        """
        import torch

        if not isinstance(record, dict):
            raise TritterError("scores are not a JSON object. Score the model again.")
        version = record.get("format_version")
        if version != _FORMAT_VERSION:
            raise TritterError(
                f"scores have format_version={version!r}; this version of Tritter reads "
                f"{_FORMAT_VERSION}. Score the model again."
            )
        try:
            if record["unit"] not in get_args(_Unit):
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
                start=tuple(map(int, record.get("start", ()))),
            )
        except (KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise TritterError(f"scores are damaged ({error!r}).") from error
        columns = (read.values, *read.weights.values())
        if any(column.shape != (len(read),) for column in columns):
            raise TritterError("scores are damaged: values and weights need one number per item.")
        return read

    def _mean(self, weight: str) -> tuple[float, float]:
        """Return a mean and its standard error, clustered by item."""
        ratio = Estimate.of_ratio(self.values, self.weights[weight].double())
        return ratio.value, ratio.standard_error

    def relative_forgetting(self, after: PairedScores) -> Estimate:
        """Estimate relative forgetting, paired by item.

        For losses it is the relative rise of mean cross-entropy per byte. Both models score the
        same bytes, so this ratio is the ratio of summed nats. Documents are clusters: losses of
        tokens in a document are correlated, and errors per token would be several times too small.
        For accuracies it is the drop relative to the accuracy above chance.

        Returns:
            0.01 for a loss that rose by one per cent; negative for an improvement.

        Raises:
            TritterError: the items differ, a loss is not positive, or the accuracy before is not
                above chance.
        """
        value = self._relative_value(after)
        if self.unit == "accuracy":
            return self._drop(after, out_of=self.above_chance)
        return replace(_bounded_ratio(after.values, self.values), value=value)

    def drop_in_points(self, after: PairedScores) -> Estimate:
        """Estimate the drop of an accuracy, paired by item.

        Returns:
            0.02 for two points; negative for a gain.

        Raises:
            TritterError: the items differ.
        """
        self._check_paired(after)
        return self._drop(after, out_of=self.weights[self.per].double())

    def performance_delta(self, after: PairedScores) -> float:
        """Return the change of a score for the lineage, without bounds.

        Returns:
            The relative rise of the loss per byte, or the gain in accuracy.

        Raises:
            TritterError: as `relative_forgetting`.
        """
        if self.unit == "accuracy":
            self._check_paired(after)
            return after.mean() - self.mean()
        return self._relative_value(after)

    def dominant_items(self, after: PairedScores) -> tuple[str, ...]:
        """Return the smallest set of items that causes half of the spread, largest first.

        The spread is the sum of squares in the standard error. If few items dominate it, the bounds
        depend on those items.
        """
        ratio = after.values.sum() / self.values.sum()
        squares = (after.values - ratio * self.values).square()
        if not squares.sum() > 0:
            return ()
        largest = squares.sort(descending=True)
        number = int((largest.values.cumsum(0) < squares.sum() / 2).sum()) + 1
        return tuple(self.identifiers[index] for index in largest.indices[:number].tolist())

    def _relative_value(self, after: PairedScores) -> float:
        import torch

        self._check_paired(after)
        total = self.above_chance.sum()
        is_finite = torch.isfinite(total) and torch.isfinite(after.values).all()
        if not (is_finite and total > 0):
            required = "losses above zero" if self.unit == "nats" else "accuracies above chance"
            raise TritterError(
                f"evaluation: a relative change requires finite {required}; the sums are "
                f"{float(total):g} before and {float(after.above_chance.sum()):g} after"
            )
        rise = float(after.above_chance.sum() / total) - 1
        return rise if self.unit == "nats" else -rise

    def _drop(self, after: PairedScores, *, out_of: Tensor) -> Estimate:
        """Return Σ (before − after) / Σ out_of with the adjusted Wald interval of Bonett and Price.

        It adds one gained and one lost answer (Bonett and Price 2012, Adjusted Wald confidence
        interval for a difference of binomial proportions based on paired data). Without them, the
        interval would be far too narrow for few changed answers, and resampling has no bound.
        """
        import torch

        lost = self.values - after.values
        weight = self.weights[self.per].double().mean()
        more = torch.stack([weight, -weight])
        adjusted = Estimate.of_ratio(
            torch.cat([lost, more]), torch.cat([out_of, out_of.mean().expand(2)])
        )
        value, n = float(lost.sum() / out_of.sum()), len(self)
        return replace(adjusted, value=value, n=n, errors=_student_errors(n))

    def _check_paired(self, after: PairedScores) -> None:
        import torch

        before_items, after_items = (
            (each.unit, each.chance, each.identifiers, each.weights[each.per].tolist())
            for each in (self, after)
        )
        if before_items != after_items:
            raise TritterError(
                f"evaluation: {len(self)} items were scored before and {len(after)} after; a "
                "paired comparison requires the same items in the same order, with equal unit, "
                f"chance and {self.per}"
            )
        if self.start != after.start and torch.equal(
            self.weights["tokens"], after.weights["tokens"]
        ):
            raise TritterError(
                "evaluation: of the scores before and after, one was computed by a version that "
                "began texts with the end of text, the other begins them as the tokenizer does; "
                "score both again"
            )


@dataclass(frozen=True, slots=True, eq=False)
class Estimate:
    """A value with one-sided confidence bounds.

    Attributes:
        value: the estimate.
        standard_error: its standard error.
        n: number of independent documents.
        errors: float64 [R], sorted studentised errors of resamples, or their quantiles. None if
            unknown.
    """

    value: float
    standard_error: float
    n: int
    errors: Tensor | None = None

    @classmethod
    def of_ratio(cls, numerators: Tensor, denominators: Tensor) -> Estimate:
        """Return Σ numerator / Σ denominator over independent documents.

        The standard error is linearised (Taylor) as in survey sampling (Cochran, Sampling
        Techniques, 6.4), with documents as clusters. Each residual is divided by 1 − the document's
        share of the denominator. This equals the delete-one jackknife and stays valid if a few long
        documents dominate. Errors are not resampled.

        Args:
            numerators: float64 [n], one sum per document.
            denominators: float64 [n], positive.
        """
        import torch

        n = len(numerators)
        total = denominators.sum()
        value = numerators.sum() / total
        if n < 2:
            return cls(float(value), math.inf, n=n)
        leverage = denominators / total
        residuals = (numerators - value * denominators) / total / (1 - leverage)
        # (n − 1) / n is the jackknife factor; the leverage already corrects the degrees of freedom.
        variance = residuals.square().sum() * (n - 1) / n
        return cls(float(value), float(torch.sqrt(variance)), n=n)

    def upper(self, confidence: float) -> float:
        """Return the one-sided upper confidence bound.

        Args:
            confidence: at least 0.5; above R / (R + 1) the bound is infinite.
        """
        return self.value + self._margin(confidence, is_upper=True)

    def lower(self, confidence: float) -> float:
        """Return the one-sided lower confidence bound."""
        return self.value - self._margin(confidence, is_upper=False)

    def documents_to_decide(self, bound: float, confidence: float) -> int | None:
        """Return the number of similar documents needed to decide on which side of `bound` it is.

        This assumes that the value does not change and that the standard error is proportional
        to 1/√n. The excess of the bound over a normal bound, in standard errors, comes from
        skewness and also falls with 1/√n.

        Args:
            bound: the value to compare with.
            confidence: confidence of the one-sided bound.

        Returns:
            The total number of documents, or None if it is unknown.
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
        linear = (z + NormalDist().inv_cdf(_POWER)) * deviation
        x = (linear + math.sqrt(linear**2 + 4 * distance * excess * root)) / (2 * distance)
        return max(2, math.ceil(x**2))

    def _margin(self, confidence: float, *, is_upper: bool) -> float:
        """Return the distance of the bound from the value."""
        if self.standard_error == 0:
            return 0.0
        number = 0 if self.errors is None else len(self.errors)
        rank = math.ceil(confidence * (number + 1))
        if self.errors is None or rank > number:
            return math.inf
        error = -self.errors[number - rank] if is_upper else self.errors[rank - 1]
        return max(0.0, self.standard_error * float(error))


def _bounded_ratio(numerators: Tensor, denominators: Tensor) -> Estimate:
    """Return `Estimate.of_ratio` with studentised errors of resampled documents."""
    ratio = Estimate.of_ratio(numerators, denominators)
    if ratio.n < 2:
        return ratio
    return replace(ratio, errors=studentised_errors(numerators, denominators))


def finite_or_none(value: float | None) -> float | None:
    """Return a value that is serialisable as JSON: None if it is missing, infinite or NaN."""
    return value if value is not None and math.isfinite(value) else None


def _student_errors(n: int) -> Tensor | None:
    """Return quantiles of Student's t with n − 1 degrees of freedom, float64 [R].

    None for fewer than two items.
    """
    import torch
    from scipy.special import stdtrit  # slow to import, and only needed for accuracies

    if n < 2:
        return None
    probabilities = torch.arange(1, _NUM_RESAMPLES + 1, dtype=torch.float64) / (_NUM_RESAMPLES + 1)
    return torch.from_numpy(stdtrit(n - 1, probabilities.numpy()))


# The studentised bootstrap of a ratio of sums (bootstrap-t; Efron 1979, Hall 1988).
#
# Resampling estimates the distribution of the error in units of its standard error. If a few
# documents dominate the change, this distribution is far from Student's t, whose bounds would
# be too narrow.
#
# R: resamples · n: documents


def studentised_errors(numerators: Tensor, denominators: Tensor) -> Tensor:
    """Return (ratio of a resample − ratio) / standard error of the resample, sorted.

    The standard error is that of `Estimate.of_ratio`, with the leverages of the original documents.
    The result depends neither on the order of the documents nor on the units of the sums.

    Args:
        numerators: float64 [..., n], n ≥ 2.
        denominators: float64 [..., n], positive.

    Returns:
        float64 [..., _NUM_RESAMPLES]. Infinite for a resample that differs from the ratio although
        its documents agree with each other.
    """
    import torch

    for is_last in (False, True):  # sort by numerator, then by denominator
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
    at_once = max(1, _MAX_DRAWS_AT_ONCE // n)
    for start in range(0, _NUM_RESAMPLES, at_once):
        rows = min(at_once, _NUM_RESAMPLES - start)
        drawn = torch.randint(n, (rows, n), generator=generator)
        drawn += n * torch.arange(rows).unsqueeze(1)
        # Number of times that each resample contains each document
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
