"""Packing of documents into sequences, document masks, and windows for evaluation.

B: sequences or windows per batch · T: tokens per sequence or window
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, Self

from tritter.data.batches import num_ranks
from tritter.data.chat import ANSWER, CONTEXT, PADDING, START, ids_of, is_padding, is_unpredicted
from tritter.data.tokens import TextBounds, TokenisedDocuments
from tritter.errors import Problem, RequestError
from tritter.storage.spool import Spool

if TYPE_CHECKING:
    import numpy as np
    from torch import Generator, Tensor, nn

IGNORED = -100  # target excluded from the loss
Packing = Literal["stream", "documents"]
_PACKED_TOKENS = 2**20  # at a time


@dataclass(frozen=True, slots=True)
class _Window:
    """Tokens [start, stop) of a document, in the flat token tensor, and what precedes them.

    Args:
        document: index of the document.
        start: the first token.
        stop: the end of the tokens.
        front: number of tokens of `TextBounds.prefix` that are read first.
        shown: other tokens that are read first; without both, the token before `start` is.
        predicted: the first token to predict; those before it are context.
    """

    document: int
    start: int
    stop: int
    front: int
    shown: tuple[range, ...] = ()
    predicted: int = 0

    @property
    def length(self) -> int:
        """The number of tokens to read; the last token is only predicted."""
        num_before = self.front + sum(map(len, self.shown))
        return max(1, num_before) + self.stop - self.start - 1


def _answer_windows(
    document: int, begin: int, is_predicted: Tensor, first: int, length: int, num_front: int
) -> Iterator[_Window]:
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
    window = partial(_Window, document, front=0 if opening else num_front)
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


class Windows(list[_Window]):
    """Documents cut into windows that a model reads in `sequence_length` positions.

    Nothing precedes a rendered conversation, so its first token is not predicted. Windows without
    any predicted token are omitted. An answer that begins in a later window gets a window of its
    own, see `_answer_windows`.
    """

    def __init__(
        self, documents: TokenisedDocuments, *, sequence_length: int, bounds: TextBounds
    ) -> None:
        self._tokens, self._bounds = documents.tokens, bounds
        marks = documents.first_tokens.tolist()
        windows, spans = list[_Window](), pairwise(documents.offsets.tolist())
        num_front, length = len(bounds.prefix), max(1, sequence_length + 1 - len(bounds.prefix))
        for index, ((first, stop), mark) in enumerate(zip(spans, marks, strict=True)):
            begin = first + (mark >= START)
            if mark >= ANSWER and stop - begin > length:
                is_predicted = ~is_unpredicted(documents.tokens[first:stop])
                windows += _answer_windows(index, begin, is_predicted, first, length, num_front)
            else:
                windows += [
                    _Window(
                        index,
                        start,
                        min(start + length, stop),
                        front=num_front * (start == first or (bool(bounds.start) and mark < START)),
                    )
                    for start in range(begin, stop, length)
                ]
        if documents.has_marks:
            is_predicted = ~is_unpredicted(documents.tokens)
            windows = [each for each in windows if is_predicted[each.start : each.stop].any()]
        super().__init__(windows)

    def sample(self, max_tokens: int, *, generator: Generator) -> list[_Window]:
        """Return random windows of up to `max_tokens`; at least one, if there is any."""
        import torch

        chosen = list[_Window]()
        for index in torch.randperm(len(self), generator=generator).tolist():
            max_tokens -= self[index].length
            if chosen and max_tokens < 0:
                break
            chosen.append(self[index])
        return chosen

    def batches(
        self, chosen: Sequence[_Window] | None = None, *, batch_size: int
    ) -> Iterator[Sequence[_Window]]:
        """Yield batches of similar length, longest first: little padding, and memory peaks early.

        Args:
            chosen: some of the windows; all by default.
            batch_size: windows per batch.
        """
        by_length = sorted(self if chosen is None else chosen, key=lambda window: -window.length)
        for start in range(0, len(by_length), batch_size):
            yield by_length[start : start + batch_size]

    def tensors(self, batch: Sequence[_Window]) -> tuple[Tensor, Tensor]:
        """Return inputs with their marks, and targets, int64 [B, T], padded on the right.

        Where a text has a start, every window begins with it, since a model that expects one
        predicts badly without it; otherwise a later window begins with the preceding token. Causal
        attention never sees right padding, so no attention mask is needed; targets of padding are
        ignored.
        """
        import torch

        tokens, bounds = self._tokens, self._bounds
        shape = (len(batch), batch[0].length)
        input_ids = torch.full(shape, bounds.end, dtype=torch.int64)
        targets = torch.full(shape, IGNORED, dtype=torch.int64)
        prefix = tokens.new_tensor(bounds.prefix)
        for row, window in enumerate(batch):
            piece = tokens[window.start : window.stop].long()
            read = [
                prefix[: window.front],
                *(tokens[each.start : each.stop] for each in window.shown),
            ]
            if not any(map(len, read)):
                read = [tokens[window.start - 1 : window.start]]
            num_read = window.length - len(piece) + 1
            input_ids[row, : window.length] = torch.cat([*read, piece[:-1]])
            is_ignored = is_unpredicted(piece)
            is_ignored[: max(0, window.predicted - window.start)] = True
            own = ids_of(piece).masked_fill(is_ignored, IGNORED)
            targets[row, num_read - 1 : window.length] = own
        return input_ids, targets


def packed(
    documents: TokenisedDocuments, *, packing: Packing, sequence_length: int, bounds: TextBounds
) -> Tensor:
    """Pack documents into sequences int32 [N, sequence_length], spooled.

    `stream` is `pack`. With `documents`, a sequence consists of documents, each with its start and
    an end of text, and padding of ends of text. Where documents have no start, the sequence begins
    with an end of text, so that each document begins at one. An end of text after another one is
    padding. Longer documents are cut: full pieces, each with a start, get their own sequences, the
    rest is packed like a document; that of a conversation is dropped. The assignment of documents
    to sequences depends only on their lengths. A rendered conversation begins at its own first
    token, and the ends of text next to it are padding.

    Args:
        documents: tokens of the documents.
        packing: `stream` or `documents`.
        sequence_length: tokens per sequence.
        bounds: start and end of a text.
    """
    if packing == "stream":
        return documents.pack(sequence_length=sequence_length, bounds=bounds)
    _check_documents(documents, sequence_length, bounds)
    import numpy as np

    pieces = _pack_pieces(documents, sequence_length, bounds)
    tokens, spool, start = documents.tokens.numpy(), Spool(), bounds.marked_start
    num_rows = max(1, _PACKED_TOKENS // sequence_length)
    for first in range(0, pieces.num_sequences, num_rows):
        count = min(num_rows, pieces.num_sequences - first)
        flat = np.full(count * sequence_length, bounds.end, dtype=np.int32)
        part = slice(*np.searchsorted(pieces.rows, (first, first + count)).tolist())
        lengths = pieces.lengths[part]
        targets = (pieces.rows[part] - first) * sequence_length + pieces.columns[part]
        run = partial(_runs, lengths=lengths)
        flat[run(targets)] = tokens[run(pieces.starts[part])]
        is_chat = pieces.is_chat[part]
        for at, token in enumerate(start):
            flat[targets[~is_chat] - len(start) + at] = token
        begins, ends = targets[is_chat], (targets + lengths)[is_chat]
        flat[begins] = ids_of(flat[begins]) | CONTEXT | START
        inner = ends[ends % sequence_length > 0]
        outer = begins[(pieces.columns[part][is_chat] == 1) & (not start)] - 1
        flat[np.concatenate([inner, outer])] = bounds.end | PADDING
        spool.append(flat.data.cast("B"))
    return spool.tensor("i4").view(-1, sequence_length)


def num_packed(
    documents: TokenisedDocuments, *, packing: Packing, sequence_length: int, bounds: TextBounds
) -> int:
    """Return the number of sequences of packed documents without packing them."""
    if packing == "stream":
        return documents.num_sequences(sequence_length=sequence_length, bounds=bounds)
    _check_documents(documents, sequence_length, bounds)
    if count := _pack_pieces(documents, sequence_length, bounds).num_sequences:
        return count
    is_predicted = ~is_unpredicted(documents.tokens).numpy()
    prompts = [int(each.argmax()) for each in _parts(documents, is_predicted) if each[1:].any()]
    needed = min(prompts, default=0) + 1 + len(bounds.prefix)
    shortest = f"; the shortest needs {needed:,} tokens" if prompts else ""
    reason = (
        f"none of the {len(documents):,} conversations has its question and a token of its answer "
        f"within a sequence{shortest}"
    )
    raise RequestError(Problem("data.sequence_length", sequence_length, reason=reason))


def _check_documents(
    documents: TokenisedDocuments, sequence_length: int, bounds: TextBounds
) -> None:
    bounds.check_length(sequence_length)
    if not documents.num_tokens:
        raise RequestError(f"data.packing=documents: the {len(documents)} documents are empty.")


def _parts(documents: TokenisedDocuments, values: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the part of values per token that belongs to each document."""
    for start, stop in pairwise(documents.offsets.tolist()):
        yield values[start:stop]


def padding_fraction(
    documents: TokenisedDocuments, *, sequence_length: int, bounds: TextBounds
) -> float:
    """Return the share of padding tokens with `packing=documents`."""
    pieces = _pack_pieces(documents, sequence_length, bounds)
    is_text = ~pieces.is_chat
    is_closed = pieces.columns + pieces.lengths < sequence_length
    is_opened = (pieces.columns == 1) & (not bounds.start)
    added = (is_text & is_closed).sum() + (is_text & is_opened).sum()
    kept = int(pieces.lengths.sum() + added + is_text.sum() * len(bounds.start))
    return 1 - kept / max(1, pieces.num_sequences * sequence_length)


@dataclass(frozen=True, slots=True, eq=False)
class _Pieces:
    """Positions of M pieces of documents, in the order of their sequences.

    Attributes:
        starts: int64 [M], start in the flat token tensor.
        lengths: int64 [M], tokens without the closing end of text.
        rows: int64 [M], index of the sequence.
        columns: int64 [M], position in the sequence, after its start or the initial end of text.
        is_chat: bool [M], whether the document is a rendered conversation.
        num_sequences: number of sequences.
    """

    starts: np.ndarray
    lengths: np.ndarray
    rows: np.ndarray
    columns: np.ndarray
    is_chat: np.ndarray
    num_sequences: int


def _pack_pieces(
    documents: TokenisedDocuments, sequence_length: int, bounds: TextBounds
) -> _Pieces:
    """Assign documents to sequences, including their starts and closing ends of text.

    A piece that fills its sequence has no closing end of text. Pieces of conversations without a
    token to predict are omitted.
    """
    import numpy as np

    offsets = documents.offsets.numpy()
    is_chat = documents.first_tokens.numpy() >= START
    leads = np.where(is_chat, 0, len(bounds.start))
    first_column = 0 if bounds.start else 1
    capacity = sequence_length - first_column
    rooms = _rooms(documents, sequence_length, bounds)
    lengths = kept_lengths(documents, sequence_length=sequence_length, bounds=bounds)
    num_full, rest = lengths // rooms, lengths % rooms
    of_full = np.repeat(np.arange(len(lengths)), num_full)
    number = np.arange(len(of_full)) - np.repeat(np.cumsum(num_full) - num_full, num_full)
    full_starts = offsets[of_full] + number * rooms[of_full]
    partial_pieces = np.flatnonzero(rest)
    if documents.has_marks:
        # The first token of a conversation is never predicted
        is_predicted = ~is_unpredicted(documents.tokens).numpy()
        until = np.concatenate([[0], np.cumsum(is_predicted)])
        ends = full_starts + rooms[of_full]
        is_useful = until[ends] > until[full_starts + is_chat[of_full]]
        full_starts, of_full = full_starts[is_useful], of_full[is_useful]
        begins = offsets[partial_pieces] + (num_full * rooms)[partial_pieces]
        is_useful = until[begins + rest[partial_pieces]] > until[begins + is_chat[partial_pieces]]
        partial_pieces = partial_pieces[is_useful]
    bins, before = _best_fit(rest[partial_pieces] + leads[partial_pieces] + 1, capacity)
    order = np.lexsort((before, bins))
    tails = partial_pieces[order]
    of_piece = np.concatenate([of_full, tails])
    in_bin = np.concatenate([np.zeros_like(full_starts), before[order]])
    return _Pieces(
        starts=np.concatenate([full_starts, offsets[tails] + num_full[tails] * rooms[tails]]),
        lengths=np.concatenate([rooms[of_full], rest[tails]]),
        rows=np.concatenate([np.arange(len(of_full)), len(of_full) + bins[order]]),
        columns=first_column + in_bin + leads[of_piece],
        is_chat=is_chat[of_piece],
        num_sequences=len(of_full) + (int(bins.max()) + 1 if len(bins) else 0),
    )


def _rooms(documents: TokenisedDocuments, sequence_length: int, bounds: TextBounds) -> np.ndarray:
    """Return the tokens of each document that fit in a sequence with what precedes them."""
    import numpy as np

    is_chat = documents.first_tokens.numpy() >= START
    before = 0 if bounds.start else 1  # an end of text, else the start of each text
    return sequence_length - before - np.where(is_chat, 0, len(bounds.start))


def kept_lengths(
    documents: TokenisedDocuments, *, sequence_length: int, bounds: TextBounds
) -> np.ndarray:
    """Return the tokens of each document to train, int64 [n]: of a conversation, a sequence.

    The rest of a longer conversation would be answers without their question.
    """
    import numpy as np

    lengths = np.diff(documents.offsets.numpy())
    rooms = _rooms(documents, sequence_length, bounds)
    is_conversation = documents.first_tokens.numpy() >= ANSWER
    return np.where(is_conversation, np.minimum(lengths, rooms), lengths)


def _best_fit(sizes: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
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
class MarkedText:
    """Removes marks from a model's inputs; a forward pre-hook."""

    bounds: TextBounds

    @classmethod
    def of(cls, model: nn.Module) -> Self | None:
        """Return the way in which a model reads marked tokens; None if it reads unmarked ones."""
        hooks = _backbone(model)._forward_pre_hooks.values()
        return next((hook for hook in hooks if isinstance(hook, cls)), None)

    def attach(self, model: nn.Module) -> nn.Module:
        """Let a stock model read marked tokens, and mask documents if this does.

        Copies of the model keep the hook; checkpoints do not include it. A document mask does not
        change the output for marked sequences with a single document; see `reading_whole` for
        others.
        """
        if MarkedText.of(model) is None:
            _backbone(model).register_forward_pre_hook(self, with_kwargs=True)
        return model

    @contextmanager
    def attached(self, model: nn.Module) -> Iterator[None]:
        """Let a model of somebody else read marked tokens inside the block."""
        if MarkedText.of(model) is not None:
            yield
            return
        handle = _backbone(model).register_forward_pre_hook(self, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], options: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Return the arguments of a model, with ids instead of marked tokens."""
        if options.get("input_ids") is not None:
            return args, {**options, "input_ids": ids_of(options["input_ids"])}
        return ((ids_of(args[0]), *args[1:]), options) if args else None


@dataclass(frozen=True, slots=True)
class DocumentMask(MarkedText):
    """Restricts attention to single documents; a forward pre-hook that sets position ids."""

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], options: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Remove marks from a model's inputs, and add position ids.

        Position ids are unchanged if the caller sets them or uses a cache.
        """
        input_ids = options.get("input_ids", args[0] if args else None)
        if input_ids is None:
            return None
        args, options = MarkedText.__call__(self, module, args, options) or (args, options)
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
        is_start = self._begins(input_ids) | (input_ids >= START)
        return columns - (columns * is_start).cummax(dim=1).values

    def padding(self, input_ids: Tensor) -> Tensor:
        """Return the padding mask, bool [B, T].

        Padding are ends of text after another end of text, and those marked as padding.
        """
        import torch

        is_end = self._is_end(input_ids)
        repeated = is_end[:, 1:] & is_end[:, :-1]
        return torch.cat([torch.zeros_like(is_end[:, :1]), repeated], dim=1) | is_padding(input_ids)

    def _begins(self, input_ids: Tensor) -> Tensor:
        """Return the ends of text that do not belong to the document before, bool [B, T]."""
        import torch

        is_end = self._is_end(input_ids)
        if not self.bounds.start:
            return is_end
        # Sequences of versions without starts have ends of text in front of documents
        is_inside = (input_ids < START) & ~is_end
        none = torch.zeros_like(is_end[:, :1])
        return self.padding(input_ids) | (is_end & torch.cat([is_inside[:, 1:], none], dim=1))

    def _is_end(self, input_ids: Tensor) -> Tensor:
        return (input_ids == self.bounds.end) | is_padding(input_ids)

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

        Tokens in front of a document count as its own, and so does the end of text that closes one
        with a start. Without starts, an end of text begins the next document: the last one of a
        sequence counts as a document of length 1.
        """
        import torch

        is_kept = ~self.padding(input_ids)
        # The end of text between a conversation and a text is padding, so the text begins after it
        is_first = torch.cat([torch.ones_like(is_kept[:, :1]), ~is_kept[:, :-1]], dim=1)
        is_start = is_kept & (is_first | (self.positions(input_ids) == 0))
        document = is_start.flatten().cumsum(0)[is_kept.flatten()] - 1
        lengths = torch.bincount(document, minlength=1)
        return torch.bincount(lengths, minlength=input_ids.shape[1] + 1)


@contextmanager
def reading_whole(model: nn.Module) -> Iterator[None]:
    """Let a model read unmarked tokens as one document inside the block, ends of text included."""
    hooks = _backbone(model)._forward_pre_hooks
    own = {key: hook for key, hook in hooks.items() if isinstance(hook, MarkedText)}
    try:
        hooks.update(dict.fromkeys(own, lambda *_: None))  # keeps the order of all hooks
        yield
    finally:
        hooks.update(own)


def inputs_for(model: nn.Module, tokens: Tensor) -> Tensor:
    """Return tokens as a model reads them: a document mask needs their marks, others the ids."""
    return tokens if DocumentMask.of(model) is not None else ids_of(tokens)


def labels_of(model: nn.Module, input_ids: Tensor) -> Tensor:
    """Return the unshifted labels of tokens int64 [B, T]: padding and prompts are IGNORED.

    So is the start of a text.
    """
    reading = MarkedText.of(model)
    if reading is None:
        return input_ids
    is_ignored = is_unpredicted(input_ids)
    if isinstance(reading, DocumentMask):
        is_ignored = is_ignored | reading.padding(input_ids)
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
    document_mask = DocumentMask.of(model)
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
        of_ranks = [own] * num_ranks()
        if num_ranks() > 1:
            distributed.all_gather_object(of_ranks, own)
        return {length: number for length, number in sum(of_ranks, Counter()).items() if length}
    document_mask = DocumentMask.of(model)
    if num_ranks() == 1:
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
