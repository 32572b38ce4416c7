"""Notes on the inputs of a run."""

from collections.abc import Collection, Iterator
from typing import Any

from tritter.config.schema import RunConfig
from tritter.data.answers import scoring_note, training_note
from tritter.data.corpus import Corpus
from tritter.data.packing import padding_fraction
from tritter.data.tokens import TextBounds

_MUCH_PADDING = 0.1


def packing_notes(
    config: RunConfig, corpus: Corpus, streams: Collection[str], *, bounds: TextBounds
) -> Iterator[str]:
    """Yield notes on whole documents in sequences: what is cut, unscored or padding.

    Args:
        config: the run.
        corpus: its tokenised domains.
        streams: domains of which the corpus has only the head.
        bounds: start and end of a text.
    """
    length, limit = config.data.sequence_length, config.evaluation.max_tokens_per_document
    text: dict[str, Any] = {"sequence_length": length, "bounds": bounds}
    for name, domain in corpus.domains.items():
        yield training_note(name, domain.train, **text, is_head=name in streams)
        yield scoring_note(name, domain.validation, sequence_length=length, max_tokens=limit)
        if not domain.train.num_tokens:
            continue
        share = padding_fraction(domain.train, **text)
        longer = padding_fraction(domain.train, **{**text, "sequence_length": 2 * length})
        if share > _MUCH_PADDING:
            yield (
                f"{name}: {share:.0%} of the training sequences is padding, because its "
                f"documents are shorter than {length} tokens; "
                f"data.sequence_length={2 * length} gives {longer:.0%}."
            )
