"""Cross-entropy of every document of a domain, each token scored once.

B windows in a batch · T positions in a window · V vocabulary
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tritter.data.tokens import TokenisedDocuments
from tritter.errors import TritterError
from tritter.evaluation.estimate import finite_or_none, ratio_of_sums
from tritter.evaluation.inference import evaluating

FORMAT_VERSION = 1
_IGNORED = -100


@dataclass(frozen=True, slots=True, eq=False)
class DocumentLosses:
    """What one model scored on the documents of one domain.

    Attributes:
        identifiers: one per document; two records pair up when these agree.
        nats: float64 [n], summed cross-entropy of a document.
        num_tokens: int64 [n].
        num_bytes: int64 [n], UTF-8 bytes of the scored text.
    """

    identifiers: tuple[str, ...]
    nats: Tensor
    num_tokens: Tensor
    num_bytes: Tensor

    def __len__(self) -> int:
        return len(self.identifiers)

    def to_dict(self) -> dict[str, Any]:
        """Return a plain record that JSON can hold."""
        return {
            "format_version": FORMAT_VERSION,
            "identifiers": list(self.identifiers),
            "nats": self.nats.tolist(),
            "num_tokens": self.num_tokens.tolist(),
            "num_bytes": self.num_bytes.tolist(),
        }

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> "DocumentLosses":
        """Read what `to_dict` wrote.

        Raises:
            TritterError: the record has another format version, or is none.
        """
        if not isinstance(record, dict):
            raise TritterError("document losses are no record. Score the model again.")
        if record.get("format_version") != FORMAT_VERSION:
            raise TritterError(
                f"document losses have format_version={record.get('format_version')!r}; "
                f"this program reads {FORMAT_VERSION}. Score the model again."
            )
        try:
            read = cls(
                identifiers=tuple(str(name) for name in record["identifiers"]),
                nats=torch.tensor(record["nats"], dtype=torch.float64),
                num_tokens=torch.tensor(record["num_tokens"], dtype=torch.int64),
                num_bytes=torch.tensor(record["num_bytes"], dtype=torch.int64),
            )
        except (KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise TritterError(f"document losses are damaged ({error!r}).") from error
        columns = (read.nats, read.num_tokens, read.num_bytes)
        if any(column.shape != (len(read),) for column in columns):
            raise TritterError("document losses are damaged: as many numbers as documents belong.")
        return read


@dataclass(frozen=True, slots=True)
class DomainScore:
    """A domain's loss in nats per token and nats per byte, with errors clustered by document."""

    loss: float
    loss_per_byte: float
    standard_error: float
    loss_per_byte_standard_error: float
    n: int

    def to_dict(self) -> dict[str, float | int | None]:
        """Return the record of summary.json; what is not finite becomes None."""
        return {
            "loss": finite_or_none(self.loss),
            "loss_per_byte": finite_or_none(self.loss_per_byte),
            "standard_error": finite_or_none(self.standard_error),
            "loss_per_byte_standard_error": finite_or_none(self.loss_per_byte_standard_error),
            "n": self.n,
        }


@dataclass(frozen=True, slots=True)
class _Window:
    """Tokens [start, stop) of a document, in the flat token tensor."""

    document: int
    start: int
    stop: int
    is_first: bool

    @property
    def length(self) -> int:
        return self.stop - self.start


def document_losses(
    model: nn.Module,
    documents: TokenisedDocuments,
    *,
    sequence_length: int,
    end_of_text_id: int,
    batch_size: int,
    autocast_dtype: torch.dtype | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> DocumentLosses:
    """Score every token of every document exactly once.

    A document is cut into windows of `sequence_length` predictions. The first window is conditioned
    on end-of-text, a later one on the one token before it. That is how packed training sequences
    start as well, and it costs one position per token; a strided window would cost two. A model
    before and after training is cut alike, so the comparison is fair.

    Args:
        model: `model(input_ids=[B, T], use_cache=False).logits` is [B, T, V], causal.
        documents: an empty document says nothing and is left out of the result.
        batch_size: windows per forward pass; the result does not depend on it.
        autocast_dtype: lower precision of the forward pass; the loss itself is always float32.
        progress: called with (windows done, windows in all) after each batch.

    Raises:
        TritterError: there is no token to score.
    """
    windows = _cut(documents, sequence_length=sequence_length)
    if not windows:
        raise TritterError("evaluation: the validation documents hold no token, nothing to score")
    nats = torch.zeros(len(documents), dtype=torch.float64)
    with evaluating(model) as device:
        done = 0
        for batch in _batches(windows, batch_size=batch_size):
            input_ids, targets = _tensors(batch, documents.tokens, end_of_text_id=end_of_text_id)
            with torch.autocast(device.type, autocast_dtype, enabled=autocast_dtype is not None):
                logits = model(input_ids=input_ids.to(device), use_cache=False).logits
            row = torch.tensor([window.document for window in batch])
            nats.index_add_(0, row, _nats_per_row(logits, targets.to(device)).cpu())
            done += len(batch)
            if progress is not None:
                progress(done, len(windows))
    return _without_empty(documents, nats)


def domain_score(losses: DocumentLosses) -> DomainScore:
    """Condense the losses of a domain's documents to the numbers of summary.json."""
    per_token = ratio_of_sums(losses.nats, losses.num_tokens.double())
    per_byte = ratio_of_sums(losses.nats, losses.num_bytes.double())
    return DomainScore(
        loss=per_token.value,
        loss_per_byte=per_byte.value,
        standard_error=per_token.standard_error,
        loss_per_byte_standard_error=per_byte.standard_error,
        n=len(losses),
    )


def window_lengths(documents: TokenisedDocuments, *, sequence_length: int) -> list[int]:
    """Return how many tokens each pass over a window reads when documents are scored."""
    return [window.length for window in _cut(documents, sequence_length=sequence_length)]


def _cut(documents: TokenisedDocuments, *, sequence_length: int) -> list[_Window]:
    offsets = documents.offsets.tolist()
    return [
        _Window(index, start, min(start + sequence_length, stop), is_first=start == first)
        for index, (first, stop) in enumerate(pairwise(offsets))
        for start in range(first, stop, sequence_length)
    ]


def _batches(windows: Sequence[_Window], *, batch_size: int) -> Iterator[Sequence[_Window]]:
    """Yield batches of like length, the longest first: little padding, and memory peaks at once."""
    by_length = sorted(windows, key=lambda window: -window.length)
    for start in range(0, len(by_length), batch_size):
        yield by_length[start : start + batch_size]


def _tensors(
    batch: Sequence[_Window], tokens: Tensor, *, end_of_text_id: int
) -> tuple[Tensor, Tensor]:
    """Return inputs and targets, int64 [B, T], padded on the right.

    A causal model does not look to the right, so padding needs no attention mask, only its targets
    must not count.
    """
    shape = (len(batch), batch[0].length)
    input_ids = torch.full(shape, end_of_text_id, dtype=torch.int64)
    targets = torch.full(shape, _IGNORED, dtype=torch.int64)
    for row, window in enumerate(batch):
        piece = tokens[window.start : window.stop].long()
        targets[row, : window.length] = piece
        input_ids[row, 1 : window.length] = piece[:-1]
        if not window.is_first:
            input_ids[row, 0] = tokens[window.start - 1]
    return input_ids, targets


def _nats_per_row(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum the cross-entropy of each row: float32 per token, float64 in the sum; float64 [B]."""
    nats_BT = cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), ignore_index=_IGNORED, reduction="none"
    ).view_as(targets)
    return nats_BT.double().sum(dim=1)


def _without_empty(documents: TokenisedDocuments, nats: Tensor) -> DocumentLosses:
    num_tokens = documents.offsets.diff()
    kept = num_tokens.nonzero().flatten()
    return DocumentLosses(
        identifiers=tuple(documents.identifiers[index] for index in kept.tolist()),
        nats=nats[kept],
        num_tokens=num_tokens[kept],
        num_bytes=documents.num_bytes[kept],
    )
