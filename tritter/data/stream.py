"""Training sequences of data sets that are read while the model trains, in constant memory."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from tritter.data.answers import TrainingCounts, missing_answers, unanswered_text
from tritter.data.chat import Chat
from tritter.data.datasets import DatasetName
from tritter.data.documents import Document, is_blank, pieces, text_key
from tritter.data.local_files import Reading, TextFileError
from tritter.data.packing import Packing, packed
from tritter.data.records import SkippedRecords, Text
from tritter.data.split import SplitRule
from tritter.data.tokens import TextBounds, TokenisedDocuments
from tritter.errors import RequestError
from tritter.seeds import derived_seed

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import Tensor

_BUFFER_SEQUENCES = 1024  # among which the next sequence is drawn
_AHEAD = 2  # batches of rows that are tokenised in advance


@dataclass(frozen=True, slots=True, eq=False)
class _Chunk:
    """Sequences int32 [N, T] of a batch of rows, and the position after it.

    Args:
        rows: the sequences.
        tail: tokens of the sequence that is not complete yet.
        epoch: number of the pass over all sources.
        source: index of the source.
        position: position in it, see `DatasetName.batches`.
        left_out: what the stream left out up to there, see `_LeftOut.to_plain`.
    """

    rows: Tensor
    tail: Tensor
    epoch: int
    source: int
    position: str
    left_out: Mapping[str, Any]


class _LeftOut:
    """What the first epoch of a stream skips and cuts.

    Attributes:
        reading: counts rows that are invalid or empty.
        num_rows: rows that were read.
        answers: counts conversations that are cut.
        unanswered: reason → number of conversations that have no answer.
        num_of_source: rows of the current source.
        exceeds_head: whether a source has more rows than the notes on its head cover.
    """

    def __init__(self, key: str, plain: Mapping[str, Any] | None = None) -> None:
        """Begin with the counts that `to_plain` returned; None begins with nothing."""
        self.reading, counts = Reading(key=key), dict(plain or {})
        self.num_rows = int(counts.get("num_rows", 0))
        self.num_of_source = int(counts.get("num_of_source", 0))
        self.exceeds_head = bool(counts.get("exceeds_head", False))
        self.answers = TrainingCounts(**counts.get("answers", {}))
        self.unanswered = Counter[str](counts.get("unanswered", {}))
        self.reading.num_blank = int(counts.get("num_blank", 0))
        if "skipped" in counts:
            self.reading.skipped = SkippedRecords.from_plain(counts["skipped"])

    def to_plain(self) -> dict[str, Any]:
        """Return the counts in plain containers."""
        return {
            "num_rows": self.num_rows,
            "num_of_source": self.num_of_source,
            "exceeds_head": self.exceeds_head,
            "answers": asdict(self.answers),
            "unanswered": dict(self.unanswered),
            "num_blank": self.reading.num_blank,
            "skipped": self.reading.skipped.to_plain(),
        }

    def notes(self, *, sequence_length: int) -> tuple[str, ...]:
        """Return a sentence for each kind; none if the notes on the head cover all rows."""
        if not self.exceeds_head:
            return ()
        reading, rows = self.reading, "of all rows that training read"
        num_valid = self.num_rows - reading.skipped.count
        skipped = reading.skipped_note(num_valid) if reading.skipped.count else ""
        notes = (
            skipped and f"{reading.key}, {rows}: {skipped}",
            reading.dropped_note(num_valid - reading.num_blank),
            self.answers.note(reading.key, sequence_length=sequence_length, rows=rows),
            unanswered_text(
                reading.key,
                self.unanswered,
                count=self.unanswered.total(),
                total=self.answers.total,
            ),
        )
        return tuple(filter(None, notes))


class StreamedSequences:
    """Endless training sequences of data sets, shuffled in a buffer.

    Each epoch reads all sources in order and contains every sequence once. Sequences leave the
    buffer in a random order that depends on the seed alone. A thread reads and tokenises ahead;
    the tokenizers library uses all cores. The state contains the position in the sources and
    the buffer: it is about 4 bytes per token of `_BUFFER_SEQUENCES`.

    Args:
        sources: the data sets of the domain.
        key: the configuration key, for messages.
        rule: the split; documents held out for validation are left out.
        tokenizer: the tokenizer.
        chat: see `TokenisedDocuments.of`.
        packing: see `packed`; with `documents`, each batch of rows is packed alone.
        sequence_length: tokens per sequence.
        bounds: start and end of a text.
        seed: seed of the order.
        buffer_sequences: sequences among which the next one is drawn.
    """

    def __init__(
        self,
        sources: Sequence[DatasetName],
        *,
        key: str,
        rule: SplitRule,
        tokenizer: Tokenizer,
        chat: Chat | None,
        packing: Packing,
        sequence_length: int,
        bounds: TextBounds,
        seed: int,
        buffer_sequences: int = _BUFFER_SEQUENCES,
    ) -> None:
        import torch

        self._sources, self._key, self._rule = tuple(sources), key, rule
        self._tokenizer, self._chat, self._packing = tokenizer, chat, packing
        self._sequence_length, self._bounds = sequence_length, bounds
        self._seed, self._size = seed, buffer_sequences
        self._num_drawn = 0
        self._buffer = torch.empty(0, sequence_length, dtype=torch.int32)
        # All of it is in the buffer, or was drawn
        self._last = _Chunk(
            self._buffer, self._buffer.flatten(), epoch=0, source=0, position="", left_out={}
        )
        self._pool: ThreadPoolExecutor | None = None  # started by the process that trains
        self._waiting: deque[Future[_Chunk]] = deque()
        self._next: Callable[[], _Chunk] | None = None

    def __len__(self) -> int:
        """Return the least number of sequences; the true number is unknown."""
        return 1

    @property
    def sequence_length(self) -> int:
        """Tokens of one sequence."""
        return self._sequence_length

    def next_sequences(self, count: int) -> Tensor:
        """Return the next `count` sequences, int64 [count, T]."""
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
            self._next = partial(next, self._chunks(self._last))
        while len(self._waiting) < _AHEAD:
            self._waiting.append(self._pool.submit(self._next))
        return self._waiting[0].result()

    @property
    def notes(self) -> tuple[str, ...]:
        """What the rows that were read leave out, a sentence each; the head has its own notes."""
        left_out = _LeftOut(self._key, self._last.left_out)
        return left_out.notes(sequence_length=self.sequence_length)

    def state_dict(self) -> dict[str, Any]:
        """Return the position, including the buffer, in plain containers and tensors."""
        return {
            "epoch": self._last.epoch,
            "source": self._last.source,
            "position": self._last.position,
            "tail": self._last.tail.clone(),
            "buffer": self._buffer.clone(),
            "num_drawn": self._num_drawn,
            "left_out": dict(self._last.left_out),
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
            left_out=state.get("left_out", {}),
        )
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
        self._pool, self._waiting = None, deque()

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the thread, which another process starts again at the same position."""
        return {**vars(self), "_pool": None, "_waiting": deque(), "_next": None}

    def _chunks(self, last: _Chunk) -> Iterator[_Chunk]:
        """Yield the sequences after a chunk, epoch after epoch."""
        tail, epoch, start, position = last.tail, last.epoch, last.source, last.position
        left_out = _LeftOut(self._key, last.left_out)
        while True:
            num_rows, is_whole = 0, not start and not position
            counted = _LeftOut(self._key) if epoch else left_out  # each row once
            for number in range(start, len(self._sources)):
                if not position:
                    counted.num_of_source = 0
                for texts, after in _batches(self._sources[number], position, counted):
                    rows, tail = self._sequences(texts, tail, counted)
                    num_rows += len(rows)
                    yield _Chunk(rows, tail, epoch, number, after, left_out.to_plain())
                position = ""
            if is_whole and not num_rows:
                names = ", ".join(map(str, self._sources))
                reason = f"the training documents of {names} do not fill one sequence of "
                raise TextFileError([f"{self._key}: {reason}{self.sequence_length} tokens."])
            epoch, start = epoch + 1, 0

    def _sequences(
        self, texts: Sequence[Text], tail: Tensor, counted: _LeftOut
    ) -> tuple[Tensor, Tensor]:
        """Return the sequences of some texts, int32 [N, T], and the tokens that remain."""
        length = self.sequence_length
        tokens = self._tokenised(texts, counted)
        if self._packing == "stream":
            closed = tokens.closed_tokens(self._bounds)
            return self._bounds.cut_rows(tail, closed, sequence_length=length)
        limits: dict[str, Any] = {"sequence_length": length, "bounds": self._bounds}
        if not tokens.num_tokens:
            return tail.view(0, length), tail
        counted.answers += TrainingCounts.of(tokens, **limits)
        return packed(tokens, packing="documents", **limits), tail

    def _tokenised(self, texts: Sequence[Text], counted: _LeftOut) -> TokenisedDocuments:
        """Return the tokens of the training documents; refused conversations are skipped."""
        size = self._rule.piece_characters
        parts = [piece for text in texts for piece in pieces(text, size)]
        counted.reading.num_blank += sum(map(is_blank, parts))
        documents = [
            Document.of(piece)
            for piece in parts
            if not is_blank(piece) and self._rule.side(text_key(str(piece))) == "train"
        ]
        if self._chat is not None and self._chat.loss_on != "all":
            counted.unanswered += missing_answers(documents)
        try:
            return TokenisedDocuments.of(documents, self._tokenizer, chat=self._chat)
        except RequestError:  # a chat template refuses some of the conversations
            kept = [each for each in documents if self._is_tokenised(each, counted)]
            return TokenisedDocuments.of(kept, self._tokenizer, chat=self._chat)

    def _is_tokenised(self, document: Document, counted: _LeftOut) -> bool:
        try:
            TokenisedDocuments.of([document], self._tokenizer, chat=self._chat)
        except RequestError as error:
            counted.reading.skipped.add("a conversation is skipped:", str(error))
            return False
        return True


def _batches(
    source: DatasetName, position: str, counted: _LeftOut
) -> Iterator[tuple[list[Text], str]]:
    """Yield the batches of a source as `DatasetName.batches` does, and count their rows."""
    reading = counted.reading
    batches = source.batches(reading, is_streamed=True, position=position)
    while True:
        before = reading.num_blank + reading.skipped.count
        if (batch := next(batches, None)) is None:
            return
        num_rows = len(batch[0]) + reading.num_blank + reading.skipped.count - before
        counted.num_rows += num_rows
        counted.num_of_source += num_rows
        counted.exceeds_head |= counted.num_of_source > DatasetName.HEAD_ROWS
        yield batch
