"""Training sequences of data sets that are read while the model trains, in constant memory."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from tritter.data.chat import Chat
from tritter.data.conversations import Conversation
from tritter.data.datasets import HEAD_ROWS, DatasetName, TextBatch, text_batches
from tritter.data.documents import NAME_CHARACTERS, Document, is_blank, pieces, text_key
from tritter.data.local_files import Reading, TextFileError
from tritter.data.packing import Packing, packed
from tritter.data.records import Text
from tritter.data.split import SplitRule, threshold_side
from tritter.data.tokens import TextBounds, TokenisedDocuments, closed_tokens, cut_rows, tokenise
from tritter.errors import RequestError
from tritter.seeds import derived_seed

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import Tensor

logger = logging.getLogger(__name__)

BUFFER_SEQUENCES = 1024  # among which the next sequence is drawn
_AHEAD = 2  # batches of rows that are tokenised in advance


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SequenceOptions:
    """The options that turn texts into training sequences.

    Args:
        rule: the split; documents held out for validation are left out.
        tokenizer: the tokenizer.
        chat: see `tokenise`.
        packing: see `packed`; with `documents`, each batch of rows is packed alone.
        sequence_length: tokens per sequence.
        bounds: start and end of a text.
    """

    rule: SplitRule
    tokenizer: Tokenizer
    chat: Chat | None
    packing: Packing
    sequence_length: int
    bounds: TextBounds


@dataclass(frozen=True, slots=True, eq=False)
class _Chunk:
    """Sequences int32 [N, T] of a batch of rows, and the position after it.

    Args:
        rows: the sequences.
        tail: tokens of the sequence that is not complete yet.
        epoch: number of the pass over all sources.
        source: index of the source.
        position: position in it, see `TextBatch`.
    """

    rows: Tensor
    tail: Tensor
    epoch: int
    source: int
    position: str


class StreamedSequences:
    """Endless training sequences of data sets, shuffled in a buffer.

    Each epoch reads all sources in order and contains every sequence once. Sequences leave the
    buffer in a random order that depends on the seed alone. A thread reads and tokenises ahead;
    the tokenizers library uses all cores. The state contains the position in the sources and
    the buffer: it is about 4 bytes per token of `BUFFER_SEQUENCES`.

    Args:
        sources: the data sets of the domain.
        key: the configuration key, for messages.
        options: turn texts into sequences.
        seed: seed of the order.
        buffer_sequences: sequences among which the next one is drawn.
    """

    def __init__(
        self,
        sources: Sequence[DatasetName],
        *,
        key: str,
        options: SequenceOptions,
        seed: int,
        buffer_sequences: int = BUFFER_SEQUENCES,
    ) -> None:
        import torch

        self._sources, self._key, self._options = tuple(sources), key, options
        self._seed, self._size = seed, buffer_sequences
        self._num_drawn = 0
        self._buffer = torch.empty(0, options.sequence_length, dtype=torch.int32)
        # All of it is in the buffer, or was drawn
        self._last = _Chunk(self._buffer, self._buffer.flatten(), epoch=0, source=0, position="")
        self._pool: ThreadPoolExecutor | None = None  # started by the process that trains
        self._waiting: deque[Future[_Chunk]] = deque()
        self._next: Callable[[], _Chunk] | None = None

    def __len__(self) -> int:
        """Return the least number of sequences; the true number is unknown."""
        return 1

    @property
    def sequence_length(self) -> int:
        """Tokens of one sequence."""
        return self._options.sequence_length

    def next_sequences(self, count: int) -> Tensor:
        """Return the next `count` sequences, int64 [count, T].

        Raises:
            TextFileError: a data set can't be read.
        """
        import torch

        found = [torch.empty(0, self.sequence_length, dtype=torch.int32)]
        for _ in range(count):
            self._fill()
            drawn = derived_seed(self._seed, "draw", self._num_drawn) % len(self._buffer)
            found.append(self._buffer[drawn : drawn + 1].clone())
            self._buffer[drawn] = self._buffer[-1]
            self._buffer = self._buffer[:-1]
            self._num_drawn += 1
        return torch.cat(found).long()

    def _fill(self) -> None:
        """Fill the buffer; the next epoch begins when it is empty."""
        import torch

        while len(self._buffer) < self._size:
            chunk = self._peek()
            if len(self._buffer) and chunk.epoch > self._last.epoch:
                return
            self._waiting.popleft()
            self._buffer = torch.cat([self._buffer, chunk.rows])
            self._last = replace(chunk, rows=chunk.rows[:0].clone())

    def _peek(self) -> _Chunk:
        if self._pool is None or self._next is None:
            self._pool = ThreadPoolExecutor(1)
            chunks = _chunks(self._sources, self._last, key=self._key, options=self._options)
            self._next = partial(next, chunks)
        while len(self._waiting) < _AHEAD:
            self._waiting.append(self._pool.submit(self._next))
        return self._waiting[0].result()

    def state_dict(self) -> dict[str, Any]:
        """Return the position, including the buffer, in plain containers and tensors."""
        return {
            "epoch": self._last.epoch,
            "source": self._last.source,
            "position": self._last.position,
            "tail": self._last.tail.clone(),
            "buffer": self._buffer.clone(),
            "num_drawn": self._num_drawn,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a saved position."""
        self._buffer, self._num_drawn = state["buffer"].clone(), int(state["num_drawn"])
        self._last = _Chunk(
            self._buffer[:0],
            state["tail"],
            epoch=int(state["epoch"]),
            source=int(state["source"]),
            position=str(state["position"]),
        )
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
        self._pool, self._waiting = None, deque()

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the thread, which another process starts again at the same position."""
        return {**vars(self), "_pool": None, "_waiting": deque(), "_next": None}


def _chunks(
    sources: Sequence[DatasetName], last: _Chunk, *, key: str, options: SequenceOptions
) -> Iterator[_Chunk]:
    """Yield the sequences after a chunk, epoch after epoch."""
    tail, epoch, start, position = last.tail, last.epoch, last.source, last.position
    while True:
        num_rows, is_whole = 0, not start and not position
        for number in range(start, len(sources)):
            for batch in _batches(sources[number], position, key=key, is_logged=not epoch):
                rows, tail = _sequences(batch.texts, tail, options)
                num_rows += len(rows)
                yield _Chunk(rows, tail, epoch, number, batch.position)
            position = ""
        if is_whole and not num_rows:
            names = ", ".join(map(str, sources))
            reason = f"the training documents of {names} do not fill one sequence of "
            raise TextFileError([f"{key}: {reason}{options.sequence_length} tokens."])
        epoch, start = epoch + 1, 0


def _batches(
    source: DatasetName, position: str, *, key: str, is_logged: bool
) -> Iterator[TextBatch]:
    """Yield the batches of a source after a position.

    Args:
        source: the data set.
        position: see `TextBatch`.
        key: the configuration key, for messages.
        is_logged: log that rows after the head are skipped, and their number by reason at the end.
            The notes of a run have those of the head only.
    """
    reading, num_read, num_of_head = Reading(key=key), 0, None
    for batch in text_batches(source, reading, is_streamed=True, position=position):
        num_read += len(batch.texts)
        if num_read + reading.num_skipped <= HEAD_ROWS:
            num_of_head = reading.num_skipped
        elif is_logged and num_of_head is not None and reading.num_skipped > num_of_head:
            note = reading.skipped_note(num_read)
            logger.warning("Also after the first %s rows: %s", f"{HEAD_ROWS:,}", note)
            num_of_head = None
        yield batch
    if is_logged and reading.num_skipped:
        logger.warning(reading.skipped_note(num_read))


def _sequences(
    texts: Sequence[Text], tail: Tensor, options: SequenceOptions
) -> tuple[Tensor, Tensor]:
    """Return the sequences of some texts, int32 [N, T], and the tokens that remain."""
    length = options.sequence_length
    tokens = _tokenised(texts, options)
    if options.packing == "stream":
        closed = closed_tokens(tokens, options.bounds)
        return cut_rows(tail, closed, sequence_length=length, bounds=options.bounds)
    if not tokens.num_tokens:
        return tail.view(0, length), tail
    rows = packed(
        tokens,
        packing="documents",
        sequence_length=length,
        bounds=options.bounds,
    )
    return rows, tail


def _tokenised(texts: Sequence[Text], options: SequenceOptions) -> TokenisedDocuments:
    """Return the tokens of the training documents; refused conversations are skipped."""
    documents = [
        Document(
            str(piece)[:NAME_CHARACTERS],
            str(piece),
            piece if isinstance(piece, Conversation) else None,
        )
        for text in texts
        for piece in pieces(text)
        if not is_blank(piece) and threshold_side(text_key(str(piece)), options.rule) == "train"
    ]
    try:
        return tokenise(documents, options.tokenizer, chat=options.chat)
    except RequestError:  # a chat template refuses some of the conversations
        kept = [each for each in documents if _is_tokenised(each, options)]
        return tokenise(kept, options.tokenizer, chat=options.chat)


def _is_tokenised(document: Document, options: SequenceOptions) -> bool:
    try:
        tokenise([document], options.tokenizer, chat=options.chat)
    except RequestError as error:
        logger.warning("A conversation is skipped: %s", error)
        return False
    return True
