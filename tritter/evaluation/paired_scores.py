"""Scores of one model, item by item: two such records of the same items are compared in pairs."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from tritter.errors import TritterError
from tritter.evaluation.estimate import finite_or_none, ratio_of_sums

FORMAT_VERSION = 2
Unit = Literal["nats", "accuracy"]


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
    def from_dict(cls, record: dict[str, Any]) -> "PairedScores":
        """Read what `to_dict` wrote, or the document losses of format 1.

        Raises:
            TritterError: the record has another format version, or is none.
        """
        if not isinstance(record, dict):
            raise TritterError("scores are no record. Score the model again.")
        version = record.get("format_version")
        if version not in (1, FORMAT_VERSION):
            raise TritterError(
                f"scores have format_version={version!r}; this program reads up to "
                f"{FORMAT_VERSION}. Score the model again."
            )
        try:
            read = cls._read(_from_format_1(record) if version == 1 else record)
        except (KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise TritterError(f"scores are damaged ({error!r}).") from error
        columns = (read.values, *read.weights.values())
        if any(column.shape != (len(read),) for column in columns):
            raise TritterError("scores are damaged: as many numbers as items belong.")
        return read

    @classmethod
    def _read(cls, record: Mapping[str, Any]) -> "PairedScores":
        if record["unit"] not in get_args(Unit):
            raise ValueError(f"unit {record['unit']!r}")
        names = ("tokens", "bytes") if record["unit"] == "nats" else ("answers",)
        return cls(
            identifiers=tuple(str(name) for name in record["identifiers"]),
            values=torch.tensor(record["values"], dtype=torch.float64),
            weights={
                name: torch.tensor(record["weights"][name], dtype=torch.int64) for name in names
            },
            unit=record["unit"],
            chance=float(record["chance"]),
        )

    def _mean(self, weight: str) -> tuple[float, float]:
        """Return a mean and its standard error, clustered by item."""
        ratio = ratio_of_sums(self.values, self.weights[weight].double())
        return ratio.value, ratio.standard_error


def _from_format_1(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return document losses as they are written today."""
    return {
        "identifiers": record["identifiers"],
        "values": record["nats"],
        "weights": {"tokens": record["num_tokens"], "bytes": record["num_bytes"]},
        "unit": "nats",
        "chance": 0.0,
    }
