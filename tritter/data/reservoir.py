"""A uniform sample of a stream of token sequences, in fixed memory."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tritter.data.slots import Slots, Weighting
from tritter.errors import RequestError, TritterError


class Reservoir:
    """Holds at most `capacity` sequences; each that was ever added is in it with the same chance.

    Of several processes that train together each holds the same one, if each is given the same.

    Args:
        capacity: sequences that it holds at most.
        seed: of what is replaced and of what is drawn.
        weighting: `uniform`: each returns only after all others have come, as long as nothing is
            added; `loss`: each draw takes a sequence with a chance in proportion to its loss.

    Raises:
        RequestError: the capacity is below 1.
    """

    def __init__(self, capacity: int, *, seed: int, weighting: Weighting = "uniform") -> None:
        if capacity < 1:
            raise RequestError(f"capacity = {capacity}: a reservoir holds at least 1 sequence.")
        self._slots = Slots(capacity, seed=seed, weighting=weighting)
        self.sequences = torch.empty(0, 0, dtype=torch.int32)  # [N, T]

    def __len__(self) -> int:
        return len(self.sequences)

    @property
    def capacity(self) -> int:
        """Sequences that it holds at most."""
        return self._slots.capacity

    @property
    def losses(self) -> Tensor:
        """Of each sequence, float32 [N], nats per token when it was seen."""
        return self._slots.losses

    @property
    def num_seen(self) -> int:
        """Sequences that were ever added."""
        return self._slots.num_seen

    @num_seen.setter
    def num_seen(self, count: int) -> None:
        self._slots.num_seen = count

    @property
    def sequence_length(self) -> int:
        """Tokens of one sequence; 0 while it is empty."""
        return self.sequences.shape[1]

    def add(self, sequences: Tensor, losses: Tensor | None = None) -> None:
        """Offer sequences [n, T], one after the other.

        Args:
            losses: of each, [n], finite and not negative; 1 when they are not given.

        Raises:
            RequestError: lengths differ, or a loss is negative or not finite.
        """
        losses = torch.ones(len(sequences)) if losses is None else losses.detach().float().cpu()
        if len(self) and sequences.shape[1] != self.sequence_length:
            raise RequestError(
                f"sequences of {sequences.shape[1]} tokens can't join those of "
                f"{self.sequence_length} that the buffer holds."
            )
        if losses.shape != sequences.shape[:1]:
            raise RequestError("a loss belongs to each sequence, finite and not negative.")
        slots = self._slots.offer(losses)
        more = len(self._slots) - len(self)
        if more > 0:
            before = self.sequences.view(len(self), sequences.shape[1])
            self.sequences = torch.cat([before, before.new_zeros(more, sequences.shape[1])])
        for slot, sequence in zip(slots, sequences.to("cpu", torch.int32), strict=True):
            if slot is not None:
                self.sequences[slot] = sequence

    def next_sequences(self, count: int) -> Tensor:
        """Draw `count` sequences, int64 [count, T].

        Raises:
            RequestError: there is none to draw from.
        """
        if count and not len(self):
            raise RequestError("the replay buffer is empty: nothing was added to it yet.")
        return self.sequences[self._slots.draw(count)].long()

    def state_dict(self) -> dict[str, Any]:
        """Return all of it, in plain containers and tensors."""
        return self._slots.state_dict() | {"sequences": self.sequences}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Become what was saved.

        Raises:
            TritterError: it holds more than this one may.
        """
        if len(state["sequences"]) > self.capacity:
            raise TritterError(
                f"the saved reservoir holds {len(state['sequences'])} sequences; this one has a "
                f"capacity of {self.capacity}."
            )
        self._slots.load_state_dict(state)
        self.sequences = state["sequences"].clone()
