"""Endless training batches: new sequences in a fixed order and an exact share of replayed ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from tritter.errors import RequestError, TritterError
from tritter.seeds import derived_seed
from tritter.storage.reading import require_file

if TYPE_CHECKING:
    from torch import Tensor

_FORMAT_VERSION = 1
_ENDLESS = 2**40  # batches: more than any run draws


def this_rank() -> int:
    """Return the rank of this process; 0 without distributed training."""
    from torch import distributed

    is_distributed = distributed.is_available() and distributed.is_initialized()
    return distributed.get_rank() if is_distributed else 0


def num_ranks() -> int:
    """Return the number of processes that train together; 1 without distributed training."""
    from torch import distributed

    is_distributed = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if is_distributed else 1


class Sequences(Protocol):
    """An endless source of sequences with a position that can be saved."""

    def __len__(self) -> int:
        """Return the number of sequences; 0 if there are none yet."""

    @property
    def sequence_length(self) -> int:
        """Tokens of one sequence."""

    def next_sequences(self, count: int) -> Tensor:
        """Return the next `count` sequences, int64 [count, T]."""

    def state_dict(self) -> dict[str, Any]:
        """Return the position, in plain containers and tensors."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a saved position."""


class SequenceStream:
    """Yields sequences epoch after epoch, shuffled by a function of seed and epoch.

    Each epoch contains every sequence once. The shuffle uses no global random state, so data
    order does not depend on anything else in the run. The state is {epoch, position}.
    """

    def __init__(self, sequences: Tensor, *, seed: int) -> None:
        """Shuffle sequences of shape [N, T] (any integer type)."""
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
        """Return the position in the stream."""
        return {"epoch": self._epoch, "position": self._position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a saved position."""
        epoch, position = int(state["epoch"]), int(state["position"])
        if epoch < 0 or not 0 <= position < len(self):
            raise TritterError(
                f"data position {dict(state)} does not fit these {len(self)} sequences: "
                f"it was saved with other data. Resume with the data of that run."
            )
        self._move_to(epoch=epoch, position=position)

    def _move_to(self, *, epoch: int, position: int) -> None:
        import torch

        self._epoch, self._position = epoch, position
        generator = torch.Generator().manual_seed(derived_seed(self._seed, "epoch", epoch))
        # int32 needs half the memory of int64 and draws the same permutation
        self._order = torch.randperm(len(self), generator=generator, dtype=torch.int32)


def sample_equally(
    sequences: Mapping[str, Tensor], count: int, *, seed: Callable[[str], int]
) -> Tensor:
    """Sample `count` sequences [N, T], the same number from each domain.

    A domain with too few sequences contributes all of them.

    Args:
        sequences: domain → int [N, T].
        seed: domain → seed of its shuffle.
    """
    import torch

    chosen = []
    for position, (name, own) in enumerate(sequences.items()):
        # The first domains share the remainder
        share = count // len(sequences) + (position < count % len(sequences))
        order = torch.Generator().manual_seed(seed(name))
        chosen.append(own[torch.randperm(len(own), generator=order)[:share]])
    return torch.cat(chosen)


def write_sequences(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write named tensors (tokens and their metadata) as safetensors."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def read_sequences(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file that `write_sequences` wrote."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        require_file(path)
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise TritterError(f"{path} can't be read as token sequences ({error}).") from error


class BatchStream:
    """An endless loader of batches {"input_ids": int64 [B, T], "is_replay": bool [B]}.

    Replay does not change the order of new sequences: a run with replay sees a prefix of the
    new sequences that the run without replay sees. Replayed sequences follow the new ones in a
    batch. With several processes, each draws the whole batch and keeps every n-th row: together
    they see the batches of a single process, and all have the same position.
    All iterators share one position. It advances just before a batch is yielded.

    The loader is endless but reports a length. Without one, Lightning prefetches a batch and
    saves a position that training has not reached, and a resumed run would skip a batch.
    """

    def __init__(
        self, new: Sequences, *, batch_size: int, num_batches: int = _ENDLESS, window: int = 1
    ) -> None:
        """Batch a stream of sequences.

        Args:
            new: the new sequences.
            batch_size: sequences per batch, new and replayed.
            num_batches: the length to report to progress bars: the batches that the run needs.
            window: batches of an optimizer step to draw together. Above 1, each of them has the
                list of all as `window`, so that losses can be averaged over the tokens of the
                step. The position is then that after the window.
        """
        self.new = new
        self._batch_size = batch_size
        self.replayed: Sequences | None = None  # see `ReplayBuffer.mixed_into`
        self.share = Fraction(0)  # of replayed sequences, in [0, 1)
        self._num_batches, self._window = num_batches, window
        self._batch_index = 0

    def __len__(self) -> int:
        return self._num_batches

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while True:
            batches = [self._draw() for _ in range(self._window)]
            if self._window > 1:
                yield from ({**batch, "window": batches} for batch in batches)
            else:
                yield from batches

    def _draw(self) -> dict[str, Tensor]:
        """Return the next batch of this process."""
        import torch

        rank, count = this_rank(), num_ranks()
        assert self._batch_size % count == 0
        num_replayed = _num_replayed(self.share, self._batch_index, self._batch_size)
        num_new = self._batch_size - num_replayed
        sequences = [self.new.next_sequences(num_new)]
        if self.replayed is not None:
            sequences.append(self.replayed.next_sequences(num_replayed))
        self._batch_index += 1
        is_replay = torch.arange(self._batch_size) >= num_new
        whole = {"input_ids": torch.cat(sequences), "is_replay": is_replay}
        return {name: rows[rank::count] for name, rows in whole.items()}

    @property
    def notes(self) -> tuple[str, ...]:
        """What streamed data leaves out of the batches, a sentence each."""
        return tuple(getattr(self.new, "notes", ()))

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the new and the replayed sequences, in plain containers."""
        return {
            "format_version": _FORMAT_VERSION,
            "batch_index": self._batch_index,
            "new": self.new.state_dict(),
            "replay": None if self.replayed is None else self.replayed.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a saved position."""
        if state["format_version"] != _FORMAT_VERSION:
            raise TritterError(
                f"data position has format_version={state['format_version']}; "
                f"this version of Tritter reads {_FORMAT_VERSION}."
            )
        self.new.load_state_dict(state["new"])
        if self.replayed is not None:
            self.replayed.load_state_dict(state["replay"])
        self._batch_index = int(state["batch_index"])


def _num_replayed(share: Fraction, batch_index: int, batch_size: int) -> int:
    """Return the number of replayed sequences of a batch, without accumulated rounding errors.

    The first n batches sum to floor(n · batch_size · share).
    """
    before = math.floor(batch_index * batch_size * share)
    return math.floor((batch_index + 1) * batch_size * share) - before


def lengthened(sequences: Tensor, length: int) -> Tensor:
    """Return stored sequences joined to longer ones, int [M, length]; at least one.

    The last tokens are dropped; too few are repeated.
    """
    tokens = sequences.flatten()
    tokens = tokens.repeat(-(-length // len(tokens)))
    return tokens[: len(tokens) // length * length].view(-1, length)
