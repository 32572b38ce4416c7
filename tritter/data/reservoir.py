"""A uniform sample of a stream of unknown length, in fixed memory: Vitter 1985, algorithm R."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from tritter.errors import RequestError, TritterError

Weighting = Literal["uniform", "loss"]


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
        self.capacity = capacity
        self.weighting = weighting
        self.num_seen = 0
        self.sequences = torch.empty(0, 0, dtype=torch.int32)  # [N, T]
        self.losses = torch.empty(0)  # float32 [N], nats per token when they were seen
        self._replacing = torch.Generator().manual_seed(seed)
        self._drawing = torch.Generator().manual_seed(seed ^ 1)
        self._order = torch.empty(0, dtype=torch.int64)  # what is left of an epoch of slots

    def __len__(self) -> int:
        return len(self.sequences)

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
        if losses.shape != sequences.shape[:1] or not bool(
            (losses >= 0).all() & losses.isfinite().all()
        ):
            raise RequestError("a loss belongs to each sequence, finite and not negative.")
        kept: list[int] = []
        slots: list[int] = []
        for row in range(len(sequences)):
            self.num_seen += 1
            slot = len(self) + len(kept) if len(self) + len(kept) < self.capacity else None
            if slot is None:
                drawn = torch.randint(self.num_seen, (1,), generator=self._replacing)
                slot = int(drawn)
            if slot < self.capacity:
                slots.append(slot)
                kept.append(row)
        self._put(slots, sequences[kept].to("cpu", torch.int32), losses[kept])

    def next_sequences(self, count: int) -> Tensor:
        """Draw `count` sequences, int64 [count, T].

        Raises:
            RequestError: there is none to draw from.
        """
        if count and not len(self):
            raise RequestError("the replay buffer is empty: nothing was added to it yet.")
        if self.weighting == "loss" and count:
            chances = self.losses if float(self.losses.sum()) > 0 else torch.ones(len(self))
            slots = torch.multinomial(chances, count, replacement=True, generator=self._drawing)
        else:
            slots = self._next_slots(count)
        return self.sequences[slots].long()

    def state_dict(self) -> dict[str, Any]:
        """Return all of it, in plain containers and tensors."""
        return {
            "num_seen": self.num_seen,
            "sequences": self.sequences,
            "losses": self.losses,
            "replacing": self._replacing.get_state(),
            "drawing": self._drawing.get_state(),
            "order": self._order,
        }

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
        self.num_seen = int(state["num_seen"])
        self.sequences, self.losses = state["sequences"].clone(), state["losses"].clone()
        self._replacing.set_state(state["replacing"])
        self._drawing.set_state(state["drawing"])
        self._order = state["order"].clone()

    def _next_slots(self, count: int) -> Tensor:
        picked = [self._order[:0]]
        while count:
            if not len(self._order):
                self._order = torch.randperm(len(self), generator=self._drawing)
            picked.append(self._order[:count])
            self._order = self._order[len(picked[-1]) :]
            count -= len(picked[-1])
        return torch.cat(picked)

    def _put(self, slots: list[int], sequences: Tensor, losses: Tensor) -> None:
        """Write rows into their slots, the later of two for one slot last."""
        if not slots:
            return
        more = max(slots) + 1 - len(self)
        if more > 0:
            before = self.sequences.view(len(self), sequences.shape[1])
            self.sequences = torch.cat([before, sequences[:1].repeat(more, 1)])
            self.losses = torch.cat([self.losses, torch.zeros(more)])
            self._order = self._order[:0]
        for slot, sequence, loss in zip(slots, sequences, losses, strict=True):
            self.sequences[slot], self.losses[slot] = sequence, loss
