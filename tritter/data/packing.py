"""Packing of documents into sequences, document masks, and windows for evaluation.

B: sequences or windows per batch · T: tokens per sequence or window
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

from tritter.data.batches import this_rank
from tritter.data.chat import ANSWER, CONTEXT, PADDING, START, ids_of, is_padding, is_unpredicted
from tritter.data.tokens import TokenisedDocuments, check_packs, pack
from tritter.errors import Problem, RequestError
from tritter.storage.spool import Spool

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

IGNORED = -100  # target excluded from the loss
Packing = Literal["stream", "documents"]
PACKED_TOKENS = 2**20  # at a time


@dataclass(frozen=True, slots=True)
class Window:
    """Tokens [start, stop) of a document, in the flat token tensor, and what precedes them.

    Args:
        document: index of the document.
        start: the first token.
        stop: the end of the tokens.
        is_first: whether an end of text is read first, as at the beginning of a document.
        shown: other tokens that are read first; without both, the token before `start` is.
        predicted: the first token to predict; those before it are context.
    """

    document: int
    start: int
    stop: int
    is_first: bool
    shown: tuple[range, ...] = ()
    predicted: int = 0

    @property
    def length(self) -> int:
        """The number of tokens to read; the last token is only predicted."""
        num_before = self.is_first + sum(map(len, self.shown))
        return max(1, num_before) + self.stop - self.start - 1


def windows_of(documents: TokenisedDocuments, *, sequence_length: int) -> list[Window]:
    """Cut documents into windows of at most `sequence_length` predictions.

    Nothing precedes a rendered conversation, so its first token is not predicted. Windows without
    any predicted token are omitted. An answer that begins in a later window gets a window of its
    own, see `_answer_windows`.
    """
    marks = documents.first_tokens.tolist()
    windows, spans = list[Window](), pairwise(documents.offsets.tolist())
    for index, ((first, stop), mark) in enumerate(zip(spans, marks, strict=True)):
        begin = first + (mark >= START)
        if mark >= ANSWER and stop - begin > sequence_length:
            is_predicted = ~is_unpredicted(documents.tokens[first:stop])
            windows += _answer_windows(index, begin, is_predicted, first, sequence_length)
        else:
            windows += [
                Window(index, start, min(start + sequence_length, stop), is_first=start == first)
                for start in range(begin, stop, sequence_length)
            ]
    if not documents.has_marks:
        return windows
    is_predicted = ~is_unpredicted(documents.tokens)
    return [window for window in windows if is_predicted[window.start : window.stop].any()]


def _answer_windows(
    document: int, begin: int, is_predicted: Tensor, first: int, length: int
) -> Iterator[Window]:
    """Yield windows that show each answer of a long conversation after the end of its prompt.

    Answers that end within `length` share the first window. Each other answer has a window with
    as much as fits of what precedes it, and at least half of the window for the answer. The rest
    of a longer answer follows in windows with the end of the prompt and of the part before.
    """
    import torch

    none = torch.zeros(1, dtype=torch.int8)
    edges = torch.diff(is_predicted.to(torch.int8), prepend=none, append=none)
    starts, ends = (((edges == sign).nonzero().flatten() + first).tolist() for sign in (1, -1))
    opening = range(first, begin)  # of a rendered conversation, nothing precedes its first token
    window = partial(Window, document, is_first=not opening)
    within = [end for end in ends if end <= begin + length]
    if within:
        yield window(begin, within[-1], shown=(opening,))
    half, quarter = length - length // 2, length // 4
    for start, end in zip(starts[len(within) :], ends[len(within) :], strict=True):
        stop = start + min(end - start, max(length - (start - begin), half))
        yield window(max(begin, stop - length), stop, shown=(opening,), predicted=start)
        prompt = range(max(begin, start - quarter), start)
        while stop < end:
            stop, predicted = min(end, stop + half), stop
            room = max(0, length - 1 - len(prompt) - (stop - predicted))
            at = max(start, predicted - room)
            yield window(at, stop, shown=(opening, prompt), predicted=predicted)


def window_batches(windows: Sequence[Window], *, batch_size: int) -> Iterator[Sequence[Window]]:
    """Yield batches of similar length, longest first: little padding, and memory peaks early."""
    by_length = sorted(windows, key=lambda window: -window.length)
    for start in range(0, len(by_length), batch_size):
        yield by_length[start : start + batch_size]


def window_tensors(
    batch: Sequence[Window], tokens: Tensor, *, end_of_text_id: int
) -> tuple[Tensor, Tensor]:
    """Return inputs with their marks, and targets, int64 [B, T], padded on the right.

    Causal attention never sees right padding, so no attention mask is needed; targets of padding
    are ignored.
    """
    import torch

    shape = (len(batch), batch[0].length)
    input_ids = torch.full(shape, end_of_text_id, dtype=torch.int64)
    targets = torch.full(shape, IGNORED, dtype=torch.int64)
    for row, window in enumerate(batch):
        piece = tokens[window.start : window.stop].long()
        read = [tokens[each.start : each.stop] for each in window.shown]
        if not (window.is_first or any(map(len, read))):
            read = [tokens[window.start - 1 : window.start]]
        num_read = window.length - len(piece) + 1
        input_ids[row, window.is_first : window.length] = torch.cat([*read, piece[:-1]])
        is_ignored = is_unpredicted(piece)
        is_ignored[: max(0, window.predicted - window.start)] = True
        own = ids_of(piece).masked_fill(is_ignored, IGNORED)
        targets[row, num_read - 1 : window.length] = own
    return input_ids, targets


def packed(
    documents: TokenisedDocuments, *, packing: Packing, sequence_length: int, end_of_text_id: int
) -> Tensor:
    """Pack documents into sequences int32 [N, sequence_length], spooled.

    `stream` is `pack`. With `documents`, a sequence consists of an end-of-text token, documents,
    each followed by an end of text, and padding of ends of text. A document therefore begins at
    an end of text, and an end of text after another one is padding. Longer documents are cut:
    full pieces get their own sequences, the rest is packed like a document; that of a conversation
    is dropped. The assignment of documents to sequences depends only on their lengths. A rendered
    conversation begins at its own first token, and the ends of text next to it are padding.

    Args:
        documents: tokens of the documents.
        packing: `stream` or `documents`.
        sequence_length: tokens per sequence.
        end_of_text_id: token that separates documents.

    Raises:
        RequestError: `sequence_length` is below 2, or the documents are empty.
    """
    if packing == "stream":
        return pack(documents, sequence_length=sequence_length, end_of_text_id=end_of_text_id)
    _check_documents(documents, sequence_length)
    import numpy as np

    pieces = _pack_pieces(documents, sequence_length - 1)
    tokens, spool = documents.tokens.numpy(), Spool()
    num_rows = max(1, PACKED_TOKENS // sequence_length)
    for first in range(0, pieces.num_sequences, num_rows):
        count = min(num_rows, pieces.num_sequences - first)
        flat = np.full(count * sequence_length, end_of_text_id, dtype=np.int32)
        part = slice(*np.searchsorted(pieces.rows, (first, first + count)).tolist())
        lengths = pieces.lengths[part]
        targets = (pieces.rows[part] - first) * sequence_length + pieces.columns[part]
        run = partial(_runs, lengths=lengths)
        flat[run(targets)] = tokens[run(pieces.starts[part])]
        is_chat = pieces.is_chat[part]
        begins, ends = targets[is_chat], (targets + lengths)[is_chat]
        flat[begins] = ids_of(flat[begins]) | CONTEXT | START
        inner = ends[ends % sequence_length > 0]
        outer = begins[pieces.columns[part][is_chat] == 1] - 1
        flat[np.concatenate([inner, outer])] = end_of_text_id | PADDING
        spool.append(flat.data.cast("B"))
    return spool.tensor("i4").view(-1, sequence_length)


def num_packed(documents: TokenisedDocuments, *, packing: Packing, sequence_length: int) -> int:
    """Return the number of sequences of packed documents without packing them.

    Raises:
        RequestError: `sequence_length` is below 2, or there are no sequences.
    """
    if packing == "stream":
        return check_packs(documents, sequence_length=sequence_length)
    _check_documents(documents, sequence_length)
    if count := _pack_pieces(documents, sequence_length - 1).num_sequences:
        return count
    is_predicted = ~is_unpredicted(documents.tokens).numpy()
    prompts = [int(each.argmax()) for each in _parts(documents, is_predicted) if each[1:].any()]
    shortest = f"; the shortest needs {min(prompts) + 2:,} tokens" if prompts else ""
    reason = (
        f"none of the {len(documents):,} conversations has its question and a token of its answer "
        f"within a sequence{shortest}"
    )
    raise RequestError(Problem("data.sequence_length", sequence_length, reason=reason))


def _check_documents(documents: TokenisedDocuments, sequence_length: int) -> None:
    if sequence_length < 2:
        raise RequestError(
            f"data.sequence_length={sequence_length}: must be at least 2, since each token is "
            "predicted from those before it."
        )
    if not documents.num_tokens:
        raise RequestError(f"data.packing=documents: the {len(documents)} documents are empty.")


def _parts(documents: TokenisedDocuments, values: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the part of values per token that belongs to each document."""
    for start, stop in pairwise(documents.offsets.tolist()):
        yield values[start:stop]


def padding_fraction(documents: TokenisedDocuments, *, sequence_length: int) -> float:
    """Return the share of padding tokens with `packing=documents`; not all documents are empty."""
    pieces = _pack_pieces(documents, sequence_length - 1)
    is_closed, is_opened = pieces.lengths < sequence_length - 1, pieces.columns == 1
    ends = (is_closed & ~pieces.is_chat).sum() + (is_opened & ~pieces.is_chat).sum()
    kept = int(pieces.lengths.sum() + ends)
    return 1 - kept / (pieces.num_sequences * sequence_length)


@dataclass(frozen=True, slots=True, eq=False)
class _Pieces:
    """Positions of M pieces of documents, in the order of their sequences.

    Attributes:
        starts: int64 [M], start in the flat token tensor.
        lengths: int64 [M], tokens without the closing end of text.
        rows: int64 [M], index of the sequence.
        columns: int64 [M], position in the sequence, after the initial end of text.
        is_chat: bool [M], whether the document is a rendered conversation.
        num_sequences: number of sequences.
    """

    starts: np.ndarray
    lengths: np.ndarray
    rows: np.ndarray
    columns: np.ndarray
    is_chat: np.ndarray
    num_sequences: int


def _pack_pieces(documents: TokenisedDocuments, capacity: int) -> _Pieces:
    """Assign documents to sequences with a capacity in tokens, including closing ends of text.

    A piece that fills its sequence has no closing end of text. Pieces of conversations without a
    token to predict are omitted.
    """
    import numpy as np

    offsets = documents.offsets.numpy()
    is_chat = documents.first_tokens.numpy() >= START
    lengths = _kept_lengths(documents, capacity)
    num_full, rest = lengths // capacity, lengths % capacity
    of_full = np.repeat(np.arange(len(lengths)), num_full)
    number = np.arange(len(of_full)) - np.repeat(np.cumsum(num_full) - num_full, num_full)
    full_starts = offsets[of_full] + number * capacity
    partial_pieces = np.flatnonzero(rest)
    if documents.has_marks:
        # The first token of a conversation is never predicted
        is_predicted = ~is_unpredicted(documents.tokens).numpy()
        until = np.concatenate([[0], np.cumsum(is_predicted)])
        is_useful = until[full_starts + capacity] > until[full_starts + is_chat[of_full]]
        full_starts, of_full = full_starts[is_useful], of_full[is_useful]
        begins = offsets[partial_pieces] + num_full[partial_pieces] * capacity
        is_useful = until[begins + rest[partial_pieces]] > until[begins + is_chat[partial_pieces]]
        partial_pieces = partial_pieces[is_useful]
    bins, columns = best_fit(rest[partial_pieces] + 1, capacity)
    order = np.lexsort((columns, bins))
    tails = partial_pieces[order]
    return _Pieces(
        starts=np.concatenate([full_starts, offsets[tails] + num_full[tails] * capacity]),
        lengths=np.concatenate([np.full_like(full_starts, capacity), rest[tails]]),
        rows=np.concatenate([np.arange(len(of_full)), len(of_full) + bins[order]]),
        columns=np.concatenate([np.ones_like(full_starts), columns[order] + 1]),
        is_chat=is_chat[np.concatenate([of_full, tails])],
        num_sequences=len(of_full) + (int(bins.max()) + 1 if len(bins) else 0),
    )


def _kept_lengths(documents: TokenisedDocuments, capacity: int) -> np.ndarray:
    """Return the tokens of each document to train, int64 [n]: of a conversation, a sequence.

    The rest of a longer conversation would be answers without their question.
    """
    import numpy as np

    lengths = np.diff(documents.offsets.numpy())
    is_conversation = documents.first_tokens.numpy() >= ANSWER
    return np.where(is_conversation, np.minimum(lengths, capacity), lengths)


def best_fit(sizes: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Pack items into bins with the best-fit decreasing heuristic.

    Args:
        sizes: int64 [M], from 2 up to `capacity`; ties keep their order.
        capacity: capacity of a bin.

    Returns:
        The bin of each item, and the item's offset in the bin.
    """
    import numpy as np

    bins, before = np.empty_like(sizes), np.empty_like(sizes)
    open_bins: list[list[int]] = [[] for _ in range(capacity + 1)]  # by free capacity
    free_sizes, num_bins = 0, 0  # bit r: there is a bin with free capacity r
    order = np.argsort(-sizes, kind="stable")
    for item, size in zip(order.tolist(), sizes[order].tolist(), strict=True):
        fitting = free_sizes >> size
        if fitting:
            free = size + (fitting & -fitting).bit_length() - 1
            chosen = open_bins[free].pop()
            if not open_bins[free]:
                free_sizes ^= 1 << free
        else:
            free, chosen, num_bins = capacity, num_bins, num_bins + 1
        bins[item], before[item] = chosen, capacity - free
        open_bins[free - size].append(chosen)
        free_sizes |= 1 << (free - size)
    return bins, before


def _runs(starts: np.ndarray, *, lengths: np.ndarray) -> np.ndarray:
    """Return the concatenated ranges [start, start + length)."""
    import numpy as np

    begins = np.cumsum(lengths) - lengths
    return np.repeat(starts - begins, lengths) + np.arange(int(lengths.sum()))


@dataclass(frozen=True, slots=True)
class DocumentMask:
    """Restricts attention to single documents; a forward pre-hook that sets position ids."""

    end_of_text_id: int

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], options: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Remove marks from a model's inputs, and add position ids.

        Position ids are unchanged if the caller sets them or uses a cache.
        """
        input_ids = options.get("input_ids", args[0] if args else None)
        if input_ids is None:
            return None
        if "input_ids" in options:
            options = {**options, "input_ids": ids_of(input_ids)}
        else:
            args = (ids_of(input_ids), *args[1:])
        explicit = ("position_ids", "attention_mask", "past_key_values")
        is_explicit = any(options.get(name) is not None for name in explicit)
        if is_explicit or options.get("use_cache"):
            return args, options
        # With its default cache, the model would ignore document boundaries
        return args, {**options, "position_ids": self.positions(input_ids), "use_cache": False}

    def positions(self, input_ids: Tensor) -> Tensor:
        """Return the position of each token in its document, int64 [B, T]."""
        import torch

        columns = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        is_start = self._is_end(input_ids) | (input_ids >= START)
        return columns - (columns * is_start).cummax(dim=1).values

    def padding(self, input_ids: Tensor) -> Tensor:
        """Return the padding mask, bool [B, T].

        Padding are ends of text after another end of text, and those marked as padding.
        """
        import torch

        is_end = self._is_end(input_ids)
        repeated = is_end[:, 1:] & is_end[:, :-1]
        return torch.cat([torch.zeros_like(is_end[:, :1]), repeated], dim=1) | is_padding(input_ids)

    def _is_end(self, input_ids: Tensor) -> Tensor:
        return (input_ids == self.end_of_text_id) | is_padding(input_ids)

    def generation_inputs(self, seen: Tensor, *, num_read: int) -> dict[str, Tensor]:
        """Return model inputs that restrict generation to the last document.

        Args:
            seen: int64 [B, S], cached and new tokens.
            num_read: number of new tokens.
        """
        import torch

        positions, columns = self.positions(seen), torch.arange(seen.shape[1], device=seen.device)
        is_last = columns >= seen.shape[1] - 1 - positions[:, -1:]  # [B, S]
        return {"attention_mask": is_last.long(), "position_ids": positions[:, -num_read:]}

    def length_counts(self, input_ids: Tensor) -> Tensor:
        """Return the number of documents of each length, int64 [T + 1], without padding.

        The end of text that begins a document counts as one of its tokens. The one that closes
        the last document of a sequence counts as a document of length 1.
        """
        import torch

        is_kept = ~self.padding(input_ids)
        # The end of text between a conversation and a text is padding, so the text begins after it
        is_first = torch.cat([torch.ones_like(is_kept[:, :1]), ~is_kept[:, :-1]], dim=1)
        is_start = is_kept & (is_first | (self.positions(input_ids) == 0))
        document = is_start.flatten().cumsum(0)[is_kept.flatten()] - 1
        lengths = torch.bincount(document, minlength=1)
        return torch.bincount(lengths, minlength=input_ids.shape[1] + 1)


def mask_documents(model: nn.Module, document_mask: DocumentMask) -> nn.Module:
    """Register a document mask on a stock model and return the model.

    Copies of the model keep the mask; checkpoints do not include it. The mask does not change
    the output for sequences with a single document.
    """
    if document_mask_of(model) is None:
        _backbone(model).register_forward_pre_hook(document_mask, with_kwargs=True)
    return model


def document_mask_of(model: nn.Module) -> DocumentMask | None:
    """Return a model's document mask; None if it reads a stream."""
    hooks = _backbone(model)._forward_pre_hooks.values()
    return next((hook for hook in hooks if isinstance(hook, DocumentMask)), None)


def inputs_for(model: nn.Module, tokens: Tensor) -> Tensor:
    """Return tokens as a model reads them: a document mask needs their marks, others the ids."""
    return tokens if document_mask_of(model) is not None else ids_of(tokens)


def labels_of(model: nn.Module, input_ids: Tensor) -> Tensor:
    """Return the unshifted labels of tokens int64 [B, T]: padding and prompts are IGNORED."""
    document_mask = document_mask_of(model)
    if document_mask is None:
        return input_ids
    is_ignored = document_mask.padding(input_ids) | is_unpredicted(input_ids)
    return ids_of(input_ids).masked_fill(is_ignored, IGNORED)


def forward_options(batch: Mapping[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
    """Return the further inputs that another collator added for some rows of a batch."""
    return {name: batch[name][rows] for name in ("attention_mask", "position_ids") if name in batch}


def kept_tokens(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None
) -> Tensor | None:
    """Return the mask of tokens that are not padding, bool [B, T]; None if there is no padding.

    Args:
        model: the model.
        input_ids: int64 [B, T].
        attention_mask: [B, T], from another collator that pads.
    """
    if attention_mask is not None:
        return attention_mask.bool()
    document_mask = document_mask_of(model)
    return None if document_mask is None else ~document_mask.padding(input_ids)


def lengths_of(document_mask: DocumentMask | None, input_ids: Tensor) -> dict[int, int]:
    """Return length → number of documents, without padding; of sequences without a mask.

    Args:
        document_mask: None counts whole sequences.
        input_ids: int64 [B, T].
    """
    if document_mask is None:
        return {input_ids.shape[1]: len(input_ids)}
    return _by_length(document_mask.length_counts(input_ids))


def lengths_read(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None
) -> dict[int, int]:
    """Return `lengths_of` a model's inputs, summed over all processes (a collective call).

    Args:
        model: the model.
        input_ids: int64 [B, T] of this process.
        attention_mask: [B, T], of a batch that was padded elsewhere, in each process to its own T.
    """
    import torch
    from torch import distributed

    if attention_mask is not None:
        own = Counter(attention_mask.sum(dim=1).tolist())
        of_ranks = [own] * this_rank().count
        if this_rank().count > 1:
            distributed.all_gather_object(of_ranks, own)
        return {length: number for length, number in sum(of_ranks, Counter()).items() if length}
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
    """Return the part of a stock model without its head."""
    found: nn.Module = getattr(model, str(getattr(model, "base_model_prefix", "")), model)
    return found
