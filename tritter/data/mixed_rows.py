"""Batches of rows of any data set, a share of them old, for trainers with loaders of their own.

The order is that of `BatchStream`, over the numbers of rows: exact shares, a random order of each
domain, a position that follows from the epoch. The trainer's collator makes batches of the rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from functools import cached_property, partial
from itertools import chain, compress
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Sampler

from tritter.data.batches import BatchStream, SequenceStream
from tritter.data.chat import ids_of, is_unpredicted
from tritter.data.packing import IGNORED
from tritter.data.tokens import TextBounds, TokenisedDocuments, ends_of, parsed_tokenizer
from tritter.errors import Problem, RequestError
from tritter.seeds import derived_seed

OldData = Sequence[str] | Any  # texts, or a tokenised datasets.Dataset
_ROWS_MEASURED = 256  # whose longest gives the default sequence length
_Mix = Callable[[BatchStream, Mapping[str, Tensor]], BatchStream]
# Fields of a row, made of the tokens of a sequence
_FIELDS: dict[str, Callable[[Tensor], list[int]]] = {
    "input_ids": lambda tokens: ids_of(tokens).tolist(),
    "labels": lambda tokens: ids_of(tokens).masked_fill(is_unpredicted(tokens), IGNORED).tolist(),
    "attention_mask": lambda tokens: [1] * len(tokens),
    "position_ids": lambda tokens: list(range(len(tokens))),
    "seq_lengths": lambda tokens: [len(tokens)],  # TRL's, of packed rows
}


def mixed_loader(
    loader: Any,
    old: Mapping[str, Any],
    *,
    mix: _Mix,
    fraction: Fraction,
    batch_size: int,
    seed: int,
    is_floored: bool,
) -> Any:
    """Return a loader over the rows of another, a share of whose batches is old.

    Args:
        loader: of the new rows.
        old: domain → tokenised rows, or sequences [N, T].
        mix: mixes old numbers [N, 1] of each domain into the numbers of new rows.
        fraction: the share of old rows.
        batch_size: rows of a batch of all processes.
        is_floored: an epoch ends before the batch that would be filled up with the next epoch.
    """
    new = loader.dataset
    if not hasattr(new, "__len__") or not hasattr(new, "__getitem__"):
        reason = "replay needs a data set with a length, not a stream"
        raise RequestError(Problem("train_dataset", type(new).__name__, reason=reason))
    numbers, first = {}, len(new)
    for name, rows in old.items():
        numbers[name] = torch.arange(first, first + len(rows)).view(-1, 1)
        first += len(rows)

    def batches() -> BatchStream:
        stream = SequenceStream(torch.arange(len(new)).view(-1, 1), seed=derived_seed(seed, "new"))
        return mix(BatchStream(stream, batch_size=batch_size), numbers)

    exact = len(new) / (batch_size * (1 - fraction))
    count = max(1, math.floor(exact) if is_floored else math.ceil(exact))
    return _MixedLoader(
        _MixedRows(new, old),
        batch_sampler=_MixedBatches(batches, count),
        collate_fn=partial(_collated, collate=loader.collate_fn),
        num_workers=loader.num_workers,
        pin_memory=loader.pin_memory,
        prefetch_factor=loader.prefetch_factor,
        persistent_workers=loader.persistent_workers,
        multiprocessing_context=loader.multiprocessing_context,
        worker_init_fn=loader.worker_init_fn,
    )


class _MixedLoader(DataLoader):
    """A loader whose order follows the epoch; the Trainer sets it."""

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]


class _MixedBatches(Sampler[list[int]]):
    """Numbers of rows, batch by batch: those of an epoch follow those of the epoch before.

    Args:
        batches: begins the stream of all epochs.
        count: batches of an epoch.
    """

    def __init__(self, batches: Callable[[], BatchStream], count: int) -> None:
        self._batches, self._count = batches, count
        self._stream = batches()
        self._epoch = 0

    def __len__(self) -> int:
        return self._count

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        first = self._epoch * self._count
        if self._position > first:
            self._stream = self._batches()
        batches = iter(self._stream)
        while self._position < first:
            next(batches)
        for _ in range(self._count):
            yield next(batches)["input_ids"].flatten().tolist()

    @property
    def _position(self) -> int:
        return int(self._stream.state_dict()["batch_index"])


class _MixedRows(ConcatDataset[Any]):
    """New rows, then the old ones of each domain, with the fields of the new and their kind."""

    def __init__(self, new: Any, old: Mapping[str, Any]) -> None:
        sample = new[0]
        super().__init__([new, *(_OldRows(n, rows, sample=sample) for n, rows in old.items())])

    def __getitem__(self, number: int) -> tuple[Any, bool]:
        return super().__getitem__(number), number >= self.cumulative_sizes[0]


class _OldRows(Dataset[dict[str, Any]]):
    """Old rows of a domain, tokenised ones or sequences [N, T], with the fields of a new row."""

    def __init__(self, name: str, rows: Any, *, sample: Mapping[str, Any]) -> None:
        self._rows, self._sample = rows, sample
        known = set(_FIELDS) if isinstance(rows, Tensor) else set(rows.column_names)
        if missing := sorted(sample.keys() - known):
            reason = (
                f"the training rows have {', '.join(missing)}, which old rows lack; pass old data "
                "tokenised like the training data"
            )
            raise RequestError(Problem(f"old_data.{name}", reason=reason))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> dict[str, Any]:
        if not isinstance(self._rows, Tensor):
            row = self._rows[number]
            return {field: row[field] for field in self._sample}
        tokens = self._rows[number]
        values = {field: _FIELDS[field](tokens) for field in self._sample}
        return {
            field: torch.tensor(value) if isinstance(self._sample[field], Tensor) else value
            for field, value in values.items()
        }


def _collated(
    rows: list[tuple[Any, bool]], *, collate: Callable[[list[Any]], Any]
) -> dict[str, Any]:
    """Return a batch of rows that marks the replayed ones, as bool [B] `is_replay`."""
    batch = dict(collate([row for row, _ in rows]))
    return {**batch, "is_replay": torch.tensor([is_old for _, is_old in rows])}


class PackedText:
    """Packs text into sequences for a trainer that has a tokenizer, a model and rows of its own.

    Args:
        processing_class: a fast tokenizer of transformers, or a processor with one.
        config: of the model.
        generation: its generation config.
        rows: what the trainer trains on.
        sequence_length: tokens of a sequence. Default: the longest of the first 256 rows.
    """

    def __init__(
        self,
        processing_class: Any,
        *,
        config: Any,
        generation: Any = None,
        rows: Any,
        sequence_length: int | None,
    ) -> None:
        self._outer, self._config, self._rows = processing_class, config, rows
        self._generation = generation
        self._requested_length = sequence_length

    @cached_property
    def sequence_length(self) -> int:
        """Tokens of a sequence."""
        if self._requested_length is not None:
            return self._requested_length
        try:
            count = min(len(self._rows), _ROWS_MEASURED)
            return max(len(self._rows[at]["input_ids"]) for at in range(count))
        except (TypeError, KeyError, ValueError, NotImplementedError) as error:
            reason = "the training data has no rows with input_ids to derive it from; set it"
            raise RequestError(Problem("sequence_length", None, reason=reason)) from error

    @cached_property
    def bounds(self) -> TextBounds:
        """The start and the end of a document."""
        backend = self._backend
        ends = [*ends_of(self._outer), *ends_of(self._config, generation=self._generation)]
        if not ends:
            reason = "neither the tokenizer nor the model's config has an eos_token_id"
            raise RequestError(Problem("processing_class", reason=reason))
        if backend is None:
            return TextBounds(ends[0])
        return TextBounds.of(backend, ends[0], stops=ends[1:])

    @cached_property
    def _backend(self) -> Tokenizer | None:
        outer = getattr(self._outer, "tokenizer", self._outer)
        backend = getattr(outer, "backend_tokenizer", None)
        return None if backend is None else parsed_tokenizer(backend.to_str())

    def tokenise_texts(self, texts: Sequence[str]) -> TokenisedDocuments:
        """Return texts as tokens, whole and without padding."""
        if self._backend is None:
            reason = "texts need a fast tokenizer; pass one, or tokenised rows"
            raise RequestError(
                Problem("processing_class", type(self._outer).__name__, reason=reason)
            )
        return TokenisedDocuments.of_texts(texts, self._backend)

    def sequences(self, name: str, data: OldData) -> Tensor:
        """Return int32 [N, T] with marks: packed texts or rows, or rows of that length."""
        length = self.sequence_length
        is_text = isinstance(data, tuple)
        documents = self.tokenise_texts(data) if is_text else _join_rows(data, self.bounds)
        if not is_text and bool((documents.offsets.diff() == length).all()):
            return documents.tokens.view(-1, length)
        if (count := documents.num_closed_tokens(self.bounds)) < length:
            reason = f"its {count} tokens do not fill one sequence of {length}"
            raise RequestError(Problem(f"old_data.{name}", reason=reason))
        return documents.pack(sequence_length=length, bounds=self.bounds)


def _join_rows(rows: Any, bounds: TextBounds) -> TokenisedDocuments:
    """Return the tokens of tokenised rows, without padding; the start of a text is marked."""
    has_mask, number = "attention_mask" in rows.column_names, len(bounds.start)
    kept = []
    for row in rows.with_format(None):
        ids = row["input_ids"]
        ids = list(compress(ids, row["attention_mask"])) if has_mask else ids
        is_begun = tuple(ids[:number]) == bounds.start
        kept.append([*bounds.marked_start, *ids[number:]] if is_begun else ids)
    lengths = torch.tensor([len(ids) for ids in kept])
    return TokenisedDocuments(
        tokens=torch.tensor(list(chain.from_iterable(kept)), dtype=torch.int32),
        offsets=torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]),
        num_bytes=lengths,  # byte counts are not used here
        identifiers=[str(number) for number in range(len(kept))],
    )


def check_old_data(name: str, data: OldData) -> Any:
    """Return texts as a tuple, tokenised rows unchanged."""
    if hasattr(data, "column_names"):
        has_ids, found = "input_ids" in data.column_names, ", ".join(data.column_names)
        if has_ids and len(data):
            return data
        reason = f"it has no column input_ids (it has {found}); tokenise it, or pass texts"
        reason = "it has no rows" if has_ids else reason
        raise RequestError(Problem(f"old_data.{name}", reason=reason))
    texts = () if isinstance(data, str) else tuple(data)
    if not texts or not all(isinstance(text, str) for text in texts):
        reason = "must be a list of texts, or a tokenised datasets.Dataset"
        raise RequestError(Problem(f"old_data.{name}", type(data).__name__, reason=reason))
    return texts
