"""Scores of a run's models: held-out documents of each domain, and tasks."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from tritter.core.families import Flops
from tritter.data.tokens import TokenisedDocuments
from tritter.errors import TritterError
from tritter.evaluation.losses import document_losses, window_lengths
from tritter.evaluation.statistics import MAX_SCORE_BYTES, PairedScores
from tritter.evaluation.tasks import Reader, ScoredTask, subject_of
from tritter.storage.reading import read_object
from tritter.terminal import NewBar, no_bar

Scores = dict[str, PairedScores]  # domain name or task subject → scores


@dataclass(frozen=True, slots=True, eq=False)
class Scoring:
    """The documents and tasks to score, and how to read them.

    Args:
        documents: domain → validation documents.
        tasks: benchmarks and question sets.
        reader: tokenizer and batch size.
        sequence_length: length of the windows into which documents are cut.
    """

    documents: Mapping[str, TokenisedDocuments]
    tasks: tuple[ScoredTask, ...]
    reader: Reader
    sequence_length: int

    @property
    def subjects(self) -> tuple[str, ...]:
        """The names of all scores: domains, then tasks."""
        return (*self.documents, *map(subject_of, self.tasks))

    def score(self, model: nn.Module, *, new_bar: NewBar = no_bar) -> Scores:
        """Score a model on its current device.

        Raises:
            TritterError: a domain has no tokens.
        """
        scores = {
            domain: document_losses(
                model,
                documents,
                sequence_length=self.sequence_length,
                end_of_text_id=self.reader.end_of_text_id,
                batch_size=self.reader.batch_size,
                progress=new_bar(f"scoring {domain}"),
            )
            for domain, documents in self.documents.items()
        }
        scores |= {subject_of(task): task.score(model, self.reader) for task in self.tasks}
        return scores

    def read(self, path: Path) -> Scores:
        """Return the scores in a file.

        Raises:
            TritterError: scores are missing or damaged.
        """
        plain = read_object(path, limit_bytes=MAX_SCORE_BYTES)
        try:
            return {subject: PairedScores.from_dict(plain[subject]) for subject in self.subjects}
        except (KeyError, TritterError) as error:
            raise TritterError(
                f"{path} does not contain the scores of this run: {error}."
            ) from error

    def flops(self, reading: Flops) -> float:
        """Return the FLOPs of one scoring pass, without padding.

        Args:
            reading: FLOPs of reading a sequence.
        """
        lengths = Counter(
            window
            for documents in self.documents.values()
            for window in window_lengths(documents, sequence_length=self.sequence_length)
        )
        for task in self.tasks:
            lengths.update(task.lengths(self.reader))
        return reading.of_all(lengths)


def scores_text(scores: Mapping[str, PairedScores]) -> str:
    """Return scores as one line: losses, then accuracies."""
    losses = [f"{n} {score.mean():.3f}" for n, score in scores.items() if score.unit == "nats"]
    parts = [
        f"{n.removesuffix('/accuracy')} {score.mean():.1%}"
        for n, score in scores.items()
        if score.unit == "accuracy"
    ]
    text = f"loss [nats/token]: {', '.join(losses)}"
    return f"{text}; accuracy: {', '.join(parts)}" if parts else text


def score_records(scores: Mapping[str, PairedScores]) -> dict[str, dict[str, Any]]:
    """Return domain or task → record, as in summary.json; a domain may also have an accuracy."""
    records: dict[str, dict[str, Any]] = {}
    for subject, score in scores.items():
        record, name = score.record(), subject.removesuffix("/accuracy")
        if score.unit == "accuracy" and name in records:
            records[name] |= {
                "accuracy": record["accuracy"],
                "accuracy_standard_error": record["standard_error"],
                "num_questions": record["n"],
                "chance": score.chance,
            }
        else:
            records[name] = record
    return records
