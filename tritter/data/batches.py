"""Endless batches for training: new sequences in their own order, and an exact share of old."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from tritter.errors import RequestError, TritterError
from tritter.seeds import derived_seed
from tritter.storage.reading import require_file

if TYPE_CHECKING:
    from torch import Tensor

FORMAT_VERSION = 1
ENDLESS = 2**40  # batches: more than any run asks for


@dataclass(frozen=True, slots=True)
class Rank:
    """One of `count` processes that train together; without others, 0 of 1."""

    index: int
    count: int


def this_rank() -> Rank:
    """Return the place of this process, as torch.distributed knows it."""
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        return Rank(distributed.get_rank(), distributed.get_world_size())
    return Rank(0, 1)


class Sequences(Protocol):
    """Where sequences come from without end, with a place that is saved."""

    @property
    def sequence_length(self) -> int:
        """Tokens of one sequence."""

    def next_sequences(self, count: int) -> Tensor:
        """Return the next `count` sequences, int64 [count, T]."""

    def state_dict(self) -> dict[str, Any]:
        """Return the place, in plain containers and tensors."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a saved place."""


class SequenceStream:
    """Hands out sequences epoch after epoch, each epoch in a new order f(seed, epoch).

    Every sequence comes once in an epoch. The order draws on no global random state, so that
    data order is the same whatever else a run does. The place {epoch, position} is all there is
    to save.
    """

    def __init__(self, sequences: Tensor, *, seed: int) -> None:
        """Take sequences of shape [N, T] (any integer type).

        Raises:
            RequestError: there is no sequence.
        """
        if sequences.ndim != 2 or not len(sequences):
            raise RequestError(
                f"data: a stream needs sequences of shape [N, T] with N > 0, "
                f"not {list(sequences.shape)}."
            )
        self._sequences = sequences
        self._seed = seed
        self._move_to(epoch=0, position=0)

    def __len__(self) -> int:
        return len(self._sequences)

    @property
    def sequence_length(self) -> int:
        """Tokens of one sequence."""
        return self._sequences.shape[1]

    def next_sequences(self, count: int) -> Tensor:
        """Return the next `count` sequences, int64 [count, T], across epochs where needed."""
        import torch

        if count < 0:
            raise ValueError(f"count={count}: must not be negative")
        picked: list[Tensor] = [self._order[:0]]
        while count:
            piece = self._order[self._position : self._position + count]
            picked.append(piece)
            count -= len(piece)
            if self._position + len(piece) < len(self):
                self._position += len(piece)
            else:
                self._move_to(epoch=self._epoch + 1, position=0)
        return self._sequences[torch.cat(picked)].long()

    def state_dict(self) -> dict[str, int]:
        """Return the place in the stream."""
        return {"epoch": self._epoch, "position": self._position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a saved place.

        Raises:
            TritterError: the place does not exist among these sequences.
        """
        epoch, position = int(state["epoch"]), int(state["position"])
        if epoch < 0 or not 0 <= position < len(self):
            raise TritterError(
                f"data position {dict(state)} does not fit the {len(self)} sequences at hand; "
                f"it was saved with other data. Resume with the data of that run."
            )
        self._move_to(epoch=epoch, position=position)

    def _move_to(self, *, epoch: int, position: int) -> None:
        import torch

        self._epoch, self._position = epoch, position
        generator = torch.Generator().manual_seed(derived_seed(self._seed, "epoch", epoch))
        # Half of what int64 would take; the numbers are the same
        self._order = torch.randperm(len(self), generator=generator, dtype=torch.int32)


def drawn_equally(
    sequences: Mapping[str, Tensor], count: int, *, seed: Callable[[str], int]
) -> Tensor:
    """Return `count` sequences [N, T] at random, of each domain as many.

    Fewer where a domain has not as many.

    Args:
        sequences: domain → int [N, T].
        seed: domain → seed of its order.
    """
    import torch

    chosen = []
    for position, (name, held) in enumerate(sequences.items()):
        # The remainder goes to the first ones
        share = count // len(sequences) + (position < count % len(sequences))
        order = torch.Generator().manual_seed(seed(name))
        chosen.append(held[torch.randperm(len(held), generator=order)[:share]])
    return torch.cat(chosen)


def write_sequences(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors of tokens, and of what is known of them, by name."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def read_sequences(path: Path) -> dict[str, Tensor]:
    """Return what was written.

    Raises:
        TritterError: there is no such file, or it is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        require_file(path)
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise TritterError(f"{path} can't be read as sequences of tokens ({error}).") from error


class ExactShare:
    """How many sequences of each batch are replayed, so that no rounding ever accumulates."""

    def __init__(self, fraction: float) -> None:
        """Take a share from 0 up to, not including, 1.

        Raises:
            RequestError: the share is outside of that.
        """
        if not (math.isfinite(fraction) and 0 <= fraction < 1):
            raise RequestError(
                f"forgetting.replay.fraction={fraction}: must be at least 0 and below 1, "
                f"for example 0.25."
            )
        # The decimal that was asked for: 0.1 as a binary float is a little more than a tenth.
        self.fraction = Fraction(str(fraction))

    def count(self, batch_index: int, batch_size: int) -> int:
        """Return the number for one batch; the first n sum to floor(n · batch_size · fraction)."""
        before = math.floor(batch_index * batch_size * self.fraction)
        return math.floor((batch_index + 1) * batch_size * self.fraction) - before


class BatchStream:
    """An endless loader of batches {"input_ids": int64 [B, T], "is_replay": bool [B]}.

    New sequences come in the order of their stream whatever is replayed: a run with replay sees
    a prefix of what the run without it sees. The old ones of a batch stand after its new ones.
    Of several processes that train together each draws the whole batch and takes every n-th row,
    so that together they see what one process sees, and all are at the same place.
    All iterators share one place, which moves before a batch is handed out (a trainer that has
    enough never asks again), and not before the first is asked for.

    The batches never end, yet the loader has a length: without one Lightning fetches a batch
    ahead and saves a place that training has not reached, so that a resumed run skips a batch.
    """

    def __init__(
        self,
        new: Sequences,
        *,
        batch_size: int,
        num_batches: int = ENDLESS,
    ) -> None:
        """Batch a stream.

        Args:
            new: the new sequences.
            batch_size: sequences of a batch, new and old together.
            num_batches: the length to report, for progress bars: what the run will ask for.

        Raises:
            RequestError: the batch is empty.
        """
        if batch_size < 1:
            raise RequestError(f"data.batch_size={batch_size}: must be at least 1.")
        self._new = new
        self._batch_size = batch_size
        self._replayed: Sequences | None = None
        self._share = ExactShare(0.0)
        self._num_batches = num_batches
        self._batch_index = 0

    def with_replay(self, buffer: Sequences, fraction: float) -> BatchStream:
        """Return a loader over the same stream in which a share of each batch is replayed.

        Raises:
            RequestError: something is replayed already, the share is not in [0, 1), or old
                sequences have another length than new ones.
        """
        if self._replayed is not None:
            raise RequestError("forgetting: only one method can mix old data into the batches.")
        if buffer.sequence_length != self._new.sequence_length:
            raise RequestError(
                f"data.sequence_length={self._new.sequence_length}: the replayed sequences have "
                f"{buffer.sequence_length} tokens; both must be packed alike."
            )
        mixed = BatchStream(self._new, batch_size=self._batch_size, num_batches=self._num_batches)
        mixed._replayed, mixed._share = buffer, ExactShare(fraction)
        return mixed

    def __len__(self) -> int:
        return self._num_batches

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        import torch

        while True:
            rank = this_rank()
            if self._batch_size % rank.count:
                raise RequestError(
                    f"data.batch_size={self._batch_size}: must be a multiple of trainer.devices="
                    f"{rank.count}."
                )
            num_replayed = self._share.count(self._batch_index, self._batch_size)
            num_new = self._batch_size - num_replayed
            sequences = [self._new.next_sequences(num_new)]
            if self._replayed is not None:
                sequences.append(self._replayed.next_sequences(num_replayed))
            self._batch_index += 1
            is_replay = torch.arange(self._batch_size) >= num_new
            whole = {"input_ids": torch.cat(sequences), "is_replay": is_replay}
            yield {name: rows[rank.index :: rank.count] for name, rows in whole.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return the place in the new and the replayed sequences, in plain containers."""
        return {
            "format_version": FORMAT_VERSION,
            "batch_index": self._batch_index,
            "new": self._new.state_dict(),
            "replay": None if self._replayed is None else self._replayed.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a saved place.

        Raises:
            TritterError: it was saved in another format, with other data, or with replay where
                there is none now (or the reverse).
        """
        if state["format_version"] != FORMAT_VERSION:
            raise TritterError(
                f"data position has format_version={state['format_version']}; "
                f"this version of Tritter reads {FORMAT_VERSION}."
            )
        if (state["replay"] is None) != (self._replayed is None):
            raise TritterError(
                "data position was saved with other replay settings (with replay against "
                "without); resume with the forgetting methods of that run."
            )
        self._new.load_state_dict(state["new"])
        if self._replayed is not None:
            self._replayed.load_state_dict(state["replay"])
        self._batch_index = int(state["batch_index"])
