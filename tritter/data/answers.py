"""What a run trains and scores of its conversations, and what it leaves out, in sentences."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from tritter.data.chat import ANSWER, START, is_unpredicted
from tritter.data.documents import Document
from tritter.data.packing import kept_lengths
from tritter.data.records import Conversation
from tritter.data.tokens import TextBounds, TokenisedDocuments

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, slots=True)
class TrainingCounts:
    """Counts of the conversations of a domain that are trained; they can be added.

    Attributes:
        total: conversations.
        cut: conversations that exceed a sequence.
        lost: those of them without a trained token.
        predicted: tokens to predict.
        predicted_kept: tokens to predict within a sequence.
        targets: all tokens that follow another one.
        longest: tokens of the longest conversation.
    """

    total: int = 0
    cut: int = 0
    lost: int = 0
    predicted: int = 0
    predicted_kept: int = 0
    targets: int = 0
    longest: int = 0

    @classmethod
    def of(
        cls, documents: TokenisedDocuments, *, sequence_length: int, bounds: TextBounds
    ) -> TrainingCounts:
        """Return the counts of tokenised documents."""
        kept = kept_lengths(documents, sequence_length=sequence_length, bounds=bounds)
        sizes, targets = _sizes(documents)
        predicted, predicted_kept = _num_predicted(documents, kept)
        return cls(
            total=len(sizes),
            cut=int((documents.offsets.diff().numpy() > kept).sum()),  # texts are not cut
            lost=int(((predicted > 0) & (predicted_kept == 0)).sum()),
            predicted=int(predicted.sum()),
            predicted_kept=int(predicted_kept.sum()),
            targets=int(targets.sum()),
            longest=int(sizes.max(initial=0)),
        )

    def __add__(self, other: TrainingCounts) -> TrainingCounts:
        sums = {name: getattr(self, name) + value for name, value in asdict(other).items()}
        return TrainingCounts(**{**sums, "longest": max(self.longest, other.longest)})

    def note(self, name: str, *, sequence_length: int, rows: str = "") -> str:
        """Return a sentence on the conversations that exceed a sequence; empty if none.

        Args:
            name: the domain.
            sequence_length: tokens per sequence.
            rows: which rows of a stream they are, in words.
        """
        if not self.cut:
            return ""
        tokens = "tokens" if self.predicted == self.targets else "tokens of answers"
        plural = "s" * (self.lost > 1)
        alone = f", and {self.lost:,} conversation{plural} not at all" if self.lost else ""
        verbs = ("exceed", "are") if self.cut > 1 else ("exceeds", "is")
        return (
            f"{name}: {self.cut:,} of {self.total:,} training conversations{rows and f' {rows}'} "
            f"{verbs[0]} "
            f"data.sequence_length={sequence_length} and {verbs[1]} cut. "
            f"{self.predicted - self.predicted_kept:,} of {self.predicted:,} {tokens} are not "
            f"trained{alone}. The longest has {self.longest:,} tokens."
        )


def _sizes(documents: TokenisedDocuments) -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens of each conversation, and those that follow another one, int64 [n]."""
    first_tokens, sizes = documents.first_tokens.numpy(), documents.offsets.diff().numpy()
    is_conversation = first_tokens >= ANSWER
    return sizes[is_conversation], (sizes - (first_tokens >= START))[is_conversation]


def _num_predicted(documents: TokenisedDocuments, *kept: np.ndarray) -> list[np.ndarray]:
    """Return the predicted tokens of each conversation, int64 [n]: all, then those in each `kept`.

    Args:
        documents: the tokens, which are read once.
        kept: int64, tokens of each document that count, from its beginning.
    """
    import numpy as np

    first_tokens, offsets = documents.first_tokens.numpy(), documents.offsets.numpy()
    until = np.concatenate([[0], np.cumsum(~is_unpredicted(documents.tokens).numpy())])
    begins, is_conversation = offsets[:-1], first_tokens >= ANSWER
    starts = begins + (first_tokens >= START)  # nothing precedes the first token
    all_ends = (offsets[1:], *(begins + each for each in kept))
    counts = (until[np.maximum(ends, starts)] - until[starts] for ends in all_ends)
    return [each[is_conversation] for each in counts]


def unanswered_note(
    name: str, sides: Iterable[TokenisedDocuments], documents: Iterable[Document] = ()
) -> str:
    """Return a sentence on the conversations of a domain that have no answer; empty if none.

    Args:
        name: the domain.
        sides: its tokens.
        documents: its documents, to state the reasons.
    """
    predicted = [each for side in sides if side.has_marks for each in _num_predicted(side)]
    count = sum(int((each == 0).sum()) for each in predicted)
    total = sum(map(len, predicted))
    return unanswered_text(name, missing_answers(documents), count=count, total=total)


def missing_answers(documents: Iterable[Document]) -> Counter[str]:
    """Return reason → number of the conversations that have no answer."""
    return Counter(
        _missing_answer(each.conversation)
        for each in documents
        if each.conversation is not None and not each.conversation.answers
    )


def unanswered_text(name: str, reasons: Mapping[str, int], *, count: int, total: int) -> str:
    """Return a sentence on conversations without an answer; empty if there are none.

    Args:
        name: the domain.
        reasons: reason → number of conversations; the others have none.
        count: conversations without an answer.
        total: all conversations.
    """
    if not count:
        return ""
    by_reason = ", ".join(f"{number:,} {reason}" for reason, number in reasons.items())
    return (
        f"{name}: without an answer, and therefore not used: {count:,} of {total:,} conversations"
        f"{f' ({by_reason})' if by_reason else ''}."
    )


def _missing_answer(conversation: Conversation) -> str:
    """Return the reason for which a conversation has no answer."""
    if set(conversation.untrained) & set(conversation.assistant):
        return "excluded by weight, train or similar"
    first = max(1, conversation.num_given)
    is_empty = any(at >= first for at in conversation.assistant)
    return "with an empty answer" if is_empty else "without a message of the assistant to predict"


def scored_text(documents: TokenisedDocuments) -> str:
    """Return the scored part of the documents of a domain; empty without conversations."""
    if not documents.has_marks:
        return ""
    (sizes, targets), (predicted,) = _sizes(documents), _num_predicted(documents)
    num_texts, num_predicted = len(documents) - len(sizes), int(predicted.sum())
    share = num_predicted / max(1, int(sizes.sum()))
    texts = f", and {num_texts:,} texts" if num_texts else ""
    what = "all tokens" if (predicted == targets).all() else "answers only"
    return (
        f"{what}, {num_predicted:,} tokens ({share:.0%}) of {int((predicted > 0).sum()):,} of "
        f"{len(sizes):,} conversations{texts}"
    )


def scoring_note(
    name: str, documents: TokenisedDocuments, *, sequence_length: int, max_tokens: int
) -> str:
    """Return a sentence on what is scored of a domain; empty without conversations.

    Args:
        name: the domain.
        documents: its held-out documents.
        sequence_length: length of the windows.
        max_tokens: the limit with which the documents were tokenised.
    """
    if not documents.has_marks:
        return ""
    _, targets = _sizes(documents)
    num_long = max(len(documents.cut), int((targets > sequence_length).sum()))
    note = f"{name}: scores count {scored_text(documents)}."
    if num_long:
        note += (
            f" Longer than {min(sequence_length, max_tokens):,} tokens and not read whole: "
            f"{num_long:,}. An answer follows as much of the end of its prompt as fits."
        )
    return note
