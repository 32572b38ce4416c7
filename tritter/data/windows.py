"""Documents cut into windows that a model is scored on, each token once.

B windows in a batch · T positions in a window
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from tritter.data.tokens import TokenisedDocuments

IGNORED = -100  # a target that does not count


@dataclass(frozen=True, slots=True)
class Window:
    """Tokens [start, stop) of a document, in the flat token tensor."""

    document: int
    start: int
    stop: int
    is_first: bool

    @property
    def length(self) -> int:
        return self.stop - self.start


def windows_of(documents: TokenisedDocuments, *, sequence_length: int) -> list[Window]:
    """Cut documents into windows of at most `sequence_length` predictions."""
    offsets = documents.offsets.tolist()
    return [
        Window(index, start, min(start + sequence_length, stop), is_first=start == first)
        for index, (first, stop) in enumerate(pairwise(offsets))
        for start in range(first, stop, sequence_length)
    ]


def window_batches(windows: Sequence[Window], *, batch_size: int) -> Iterator[Sequence[Window]]:
    """Yield batches of like length, the longest first: little padding, and memory peaks at once."""
    by_length = sorted(windows, key=lambda window: -window.length)
    for start in range(0, len(by_length), batch_size):
        yield by_length[start : start + batch_size]


def window_tensors(
    batch: Sequence[Window], tokens: Tensor, *, end_of_text_id: int
) -> tuple[Tensor, Tensor]:
    """Return inputs and targets, int64 [B, T], padded on the right.

    A causal model does not look to the right, so padding needs no attention mask, only its targets
    must not count.
    """
    shape = (len(batch), batch[0].length)
    input_ids = torch.full(shape, end_of_text_id, dtype=torch.int64)
    targets = torch.full(shape, IGNORED, dtype=torch.int64)
    for row, window in enumerate(batch):
        piece = tokens[window.start : window.stop].long()
        targets[row, : window.length] = piece
        input_ids[row, 1 : window.length] = piece[:-1]
        if not window.is_first:
            input_ids[row, 0] = tokens[window.start - 1]
    return input_ids, targets
