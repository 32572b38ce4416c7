"""An endless stream of sequences whose order is a function of a seed, and whose place is saved."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from tritter.errors import RequestError, TritterError
from tritter.seeds import derived_seed


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
        if count < 0:
            raise ValueError(f"count={count}: must not be negative")
        picked: list[Tensor] = [self._order[:0]]
        while count:
            piece = self._order[self._position : self._position + count]
            picked.append(piece)
            count -= len(piece)
            self._advance(len(piece))
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

    def _advance(self, count: int) -> None:
        if self._position + count < len(self):
            self._position += count
        else:
            self._move_to(epoch=self._epoch + 1, position=0)

    def _move_to(self, *, epoch: int, position: int) -> None:
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
    chosen = []
    for position, (name, held) in enumerate(sequences.items()):
        # The remainder goes to the first ones
        share = count // len(sequences) + (position < count % len(sequences))
        order = torch.Generator().manual_seed(seed(name))
        chosen.append(held[torch.randperm(len(held), generator=order)[:share]])
    return torch.cat(chosen)
