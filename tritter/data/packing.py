"""Documents as sequences: packed in a stream or whole, read apart, and cut into windows for scores.

B sequences or windows in a batch · T tokens of each
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

from tritter.data.batches import this_rank
from tritter.data.tokens import TokenisedDocuments, check_packs, pack
from tritter.errors import RequestError
from tritter.storage.spool import Spool

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

IGNORED = -100  # a target that does not count
Packing = Literal["stream", "documents"]
LAID_TOKENS = 2**20  # at a time


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
    import torch

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


def packed(
    documents: TokenisedDocuments, *, packing: Packing, sequence_length: int, end_of_text_id: int
) -> Tensor:
    """Return documents as sequences int32 [N, sequence_length], spooled.

    `stream` is `pack`. With `documents` a sequence is an end of text, then documents, each closed
    by an end of text, then padding, which is of ends of text too: so a document begins at an end
    of text (or where the sequence does), and an end of text behind another is padding; nothing
    else need be known of a sequence, see `tritter.data.packing`. A document that is longer than a
    sequence is cut: what fills sequences stands alone, the rest is packed as a document. Which
    documents share a sequence follows from their lengths alone.

    Raises:
        RequestError: as `num_packed`.
    """
    if packing == "stream":
        return pack(documents, sequence_length=sequence_length, end_of_text_id=end_of_text_id)
    num_packed(documents, packing=packing, sequence_length=sequence_length)
    import numpy as np

    pieces = _placed(documents, sequence_length - 1)
    tokens, spool = documents.tokens.numpy(), Spool()
    num_rows = max(1, LAID_TOKENS // sequence_length)
    for first in range(0, pieces.num_sequences, num_rows):
        count = min(num_rows, pieces.num_sequences - first)
        laid = np.full(count * sequence_length, end_of_text_id, dtype=np.int32)
        part = slice(*np.searchsorted(pieces.rows, (first, first + count)).tolist())
        lengths = pieces.lengths[part]
        places = (pieces.rows[part] - first) * sequence_length + pieces.columns[part]
        run = partial(_runs, lengths=lengths)
        laid[run(places)] = tokens[run(pieces.starts[part])]
        spool.append(laid.data.cast("B"))
    return spool.tensor("i4").view(-1, sequence_length)


def num_packed(documents: TokenisedDocuments, *, packing: Packing, sequence_length: int) -> int:
    """Return how many sequences documents are packed into, without making them.

    Raises:
        RequestError: `sequence_length` is below 2, or there is no sequence.
    """
    if packing == "stream":
        return check_packs(documents, sequence_length=sequence_length)
    if sequence_length < 2:
        raise RequestError(
            f"data.sequence_length={sequence_length}: must be at least 2, since each token is "
            "predicted from those before it."
        )
    if not documents.num_tokens:
        raise RequestError(f"data.packing=documents: the {len(documents)} documents are empty.")
    return _placed(documents, sequence_length - 1).num_sequences


def padding_fraction(documents: TokenisedDocuments, *, sequence_length: int) -> float:
    """Return what part of the tokens is padding where documents, not all empty, stay whole."""
    pieces = _placed(documents, sequence_length - 1)
    closed = int((pieces.lengths < sequence_length - 1).sum())
    kept = int(pieces.lengths.sum()) + closed + pieces.num_sequences
    return 1 - kept / (pieces.num_sequences * sequence_length)


@dataclass(frozen=True, slots=True, eq=False)
class _Pieces:
    """Where M pieces of documents stand, in the order of their sequences.

    Attributes:
        starts: int64 [M], in the flat token tensor.
        lengths: int64 [M], tokens, the closing end of text left out.
        rows: int64 [M], sequence of each.
        columns: int64 [M], place in it, behind the end of text that it begins with.
        num_sequences: of all.
    """

    starts: np.ndarray
    lengths: np.ndarray
    rows: np.ndarray
    columns: np.ndarray
    num_sequences: int


def _placed(documents: TokenisedDocuments, room: int) -> _Pieces:
    """Place documents in sequences that have room for so many tokens, closing ones included.

    What fills a sequence to its end has no closing end of text, unless one stands there by itself.
    """
    import numpy as np

    offsets = documents.offsets.numpy()
    lengths = np.diff(offsets)
    num_full, rest = lengths // room, lengths % room
    of_full = np.repeat(np.arange(len(lengths)), num_full)
    number = np.arange(len(of_full)) - np.repeat(np.cumsum(num_full) - num_full, num_full)
    full_starts = offsets[of_full] + number * room
    left = np.flatnonzero(rest)
    bins, columns = best_fit(rest[left] + 1, room)
    order = np.lexsort((columns, bins))
    left = left[order]
    return _Pieces(
        starts=np.concatenate([full_starts, offsets[left] + num_full[left] * room]),
        lengths=np.concatenate([np.full_like(full_starts, room), rest[left]]),
        rows=np.concatenate([np.arange(len(of_full)), len(of_full) + bins[order]]),
        columns=np.concatenate([np.ones_like(full_starts), columns[order] + 1]),
        num_sequences=len(of_full) + (int(bins.max()) + 1 if len(bins) else 0),
    )


def best_fit(sizes: np.ndarray, room: int) -> tuple[np.ndarray, np.ndarray]:
    """Put things into bins: the largest first, each where the least room is left.

    Args:
        sizes: int64 [M], from 2 up to `room`; of equal ones the first is put first.
        room: of an empty bin.

    Returns:
        The bin of each, and how much lay in it before.
    """
    import numpy as np

    bins, before = np.empty_like(sizes), np.empty_like(sizes)
    waiting: list[list[int]] = [[] for _ in range(room + 1)]  # bins by the room that is left
    rooms, num_bins = 0, 0  # bit r: a bin with room r waits
    order = np.argsort(-sizes, kind="stable")
    for thing, size in zip(order.tolist(), sizes[order].tolist(), strict=True):
        fitting = rooms >> size
        if fitting:
            found = size + (fitting & -fitting).bit_length() - 1
            chosen = waiting[found].pop()
            if not waiting[found]:
                rooms ^= 1 << found
        else:
            found, chosen, num_bins = room, num_bins, num_bins + 1
        bins[thing], before[thing] = chosen, room - found
        waiting[found - size].append(chosen)
        rooms |= 1 << (found - size)
    return bins, before


def _runs(starts: np.ndarray, *, lengths: np.ndarray) -> np.ndarray:
    """Return start, start + 1, … of each run of a length, one run after the other."""
    import numpy as np

    begins = np.cumsum(lengths) - lengths
    return np.repeat(starts - begins, lengths) + np.arange(int(lengths.sum()))


@dataclass(frozen=True, slots=True)
class DocumentMask:
    """What tells documents of a sequence apart; as a hook it lets a model read them so."""

    end_of_text_id: int

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], options: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Give a stock model positions, unless it is told them, or writes on from what it read."""
        input_ids = options.get("input_ids", args[0] if args else None)
        told = ("position_ids", "attention_mask", "past_key_values")
        is_told = any(options.get(name) is not None for name in told)
        if input_ids is None or is_told or options.get("use_cache"):
            return None
        # With a cache of its own, which is the default, it would look for no boundary
        return args, {**options, "position_ids": self.positions(input_ids), "use_cache": False}

    def positions(self, input_ids: Tensor) -> Tensor:
        """Return the place of each token in its document, int64 [B, T]."""
        import torch

        places = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        is_start = input_ids == self.end_of_text_id
        return places - (places * is_start).cummax(dim=1).values

    def padding(self, input_ids: Tensor) -> Tensor:
        """Return which tokens are padding, bool [B, T]: ends of text behind another."""
        import torch

        is_end = input_ids == self.end_of_text_id
        return torch.cat([torch.zeros_like(is_end[:, :1]), is_end[:, 1:] & is_end[:, :-1]], dim=1)

    def going_on(self, seen: Tensor, *, num_read: int) -> dict[str, Tensor]:
        """Return by what a model that writes sees the last document alone of what was written.

        Args:
            seen: int64 [B, S], what it reads now, and before it what it has keys and values of.
            num_read: tokens that it reads now.
        """
        import torch

        positions, places = self.positions(seen), torch.arange(seen.shape[1], device=seen.device)
        is_last = places >= seen.shape[1] - 1 - positions[:, -1:]  # [B, S]
        return {"attention_mask": is_last.long(), "position_ids": positions[:, -num_read:]}

    def length_counts(self, input_ids: Tensor) -> Tensor:
        """Return how many documents have each length, int64 [T + 1], padding left out.

        The end of text that a document begins at counts as one of its tokens; the one that closes
        the last document of a sequence is alone.
        """
        import torch

        is_kept = ~self.padding(input_ids)
        is_start = is_kept & (self.positions(input_ids) == 0)
        document = is_start.flatten().cumsum(0)[is_kept.flatten()] - 1
        lengths = torch.bincount(document, minlength=1)
        return torch.bincount(lengths, minlength=input_ids.shape[1] + 1)


def mask_documents(model: nn.Module, document_mask: DocumentMask) -> nn.Module:
    """Let a stock model read the documents of its sequences apart from here on, and return it.

    It goes along with the live model and its copies, and is no part of what is saved. Where there
    is one document in a sequence, or padding behind it, a model says what it did before.
    """
    if document_mask_of(model) is None:
        _backbone(model).register_forward_pre_hook(document_mask, with_kwargs=True)
    return model


def document_mask_of(model: nn.Module) -> DocumentMask | None:
    """Return how a model tells documents apart; None: what it reads is one stream."""
    hooks = _backbone(model)._forward_pre_hooks.values()
    return next((hook for hook in hooks if isinstance(hook, DocumentMask)), None)


def labels_of(model: nn.Module, input_ids: Tensor) -> Tensor:
    """Return what a model is to predict of int64 [B, T], unshifted: padding is IGNORED."""
    document_mask = document_mask_of(model)
    return (
        input_ids
        if document_mask is None
        else input_ids.masked_fill(document_mask.padding(input_ids), IGNORED)
    )


def kept_tokens(model: nn.Module, input_ids: Tensor) -> Tensor | None:
    """Return which tokens of [B, T] are no padding, bool [B, T]; None: all, there can be none."""
    document_mask = document_mask_of(model)
    return None if document_mask is None else ~document_mask.padding(input_ids)


def lengths_of(document_mask: DocumentMask | None, input_ids: Tensor) -> dict[int, int]:
    """Return, by length, how many sequences [B, T] are; documents, and no padding, of those apart.

    Args:
        apart: how they are told apart; None: they are not.
    """
    if document_mask is None:
        return {input_ids.shape[1]: len(input_ids)}
    return _by_length(document_mask.length_counts(input_ids))


def lengths_read(model: nn.Module, input_ids: Tensor) -> dict[int, int]:
    """Return `lengths_of` what a model reads in all processes together, which ask at once.

    Args:
        input_ids: int64 [B, T] of this process.
    """
    import torch
    from torch import distributed

    document_mask = document_mask_of(model)
    if this_rank().count == 1:
        return lengths_of(document_mask, input_ids)
    counts = torch.zeros(input_ids.shape[1] + 1, dtype=torch.int64, device=input_ids.device)
    counts[-1] = len(input_ids)
    counts = counts if document_mask is None else document_mask.length_counts(input_ids)
    distributed.all_reduce(counts)
    return _by_length(counts)


def _by_length(counts: Tensor) -> dict[int, int]:
    return {length: number for length, number in enumerate(counts.tolist()) if length and number}


def _backbone(model: nn.Module) -> nn.Module:
    """Return what of a stock model gives hidden states, which may be called without its head."""
    found: nn.Module = getattr(model, str(getattr(model, "base_model_prefix", "")), model)
    return found
