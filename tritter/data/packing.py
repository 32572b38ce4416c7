"""How documents become sequences: as one stream, or whole beside each other."""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
from torch import Tensor

from tritter.data.tokens import TokenisedDocuments, check_packs, pack
from tritter.errors import RequestError
from tritter.storage.spool import Spool

Packing = Literal["stream", "documents"]
LAID_TOKENS = 2**20  # at a time


def packed(
    documents: TokenisedDocuments, *, packing: Packing, sequence_length: int, end_of_text_id: int
) -> Tensor:
    """Return documents as sequences int32 [N, sequence_length], spooled.

    `stream` is `pack`. With `documents` a sequence is an end of text, then documents, each closed
    by an end of text, then padding, which is of ends of text too: so a document begins at an end
    of text (or where the sequence does), and an end of text behind another is padding; nothing
    else need be known of a sequence, see `tritter.data.apart`. A document that is longer than a
    sequence is cut: what fills sequences stands alone, the rest is packed as a document. Which
    documents share a sequence follows from their lengths alone.

    Raises:
        RequestError: as `num_packed`.
    """
    if packing == "stream":
        return pack(documents, sequence_length=sequence_length, end_of_text_id=end_of_text_id)
    num_packed(documents, packing=packing, sequence_length=sequence_length)
    return _laid(
        documents, _placed(documents, sequence_length - 1), sequence_length, end_of_text_id
    )


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


def _laid(
    documents: TokenisedDocuments, pieces: _Pieces, sequence_length: int, end_of_text_id: int
) -> Tensor:
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


def _runs(starts: np.ndarray, *, lengths: np.ndarray) -> np.ndarray:
    """Return start, start + 1, … of each run of a length, one run after the other."""
    begins = np.cumsum(lengths) - lengths
    return np.repeat(starts - begins, lengths) + np.arange(int(lengths.sum()))
