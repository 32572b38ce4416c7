"""Slots of a uniform sample of a stream of unknown length: Vitter 1985, algorithm R.

What lies in them is held elsewhere; here is decided which slot is written, and which is drawn.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from tritter.errors import RequestError

Weighting = Literal["uniform", "loss"]


class Slots:
    """At most `capacity` slots; whatever was offered is in one of them with the same chance.

    Args:
        capacity: how many there are at most.
        seed: of what is replaced and of what is drawn.
        weighting: `uniform`: each slot returns only after all others have come, as long as none is
            added; `loss`: each draw takes one with a chance in proportion to its loss.
    """

    def __init__(self, capacity: int, *, seed: int, weighting: Weighting = "uniform") -> None:
        self.capacity = capacity
        self.weighting = weighting
        self.num_seen = 0
        self.losses = torch.empty(0)  # float32 [N], nats per token when they were seen
        self._replacing = torch.Generator().manual_seed(seed)
        self._drawing = torch.Generator().manual_seed(seed ^ 1)
        self._order = torch.empty(0, dtype=torch.int64)  # what is left of an epoch of slots

    def __len__(self) -> int:
        return len(self.losses)

    def offer(self, losses: Tensor) -> list[int | None]:
        """Offer something with each of these losses [n]; return the slot that each is put in.

        None where it is not kept. The later of two in one slot stays.

        Raises:
            RequestError: a loss is negative or not finite.
        """
        if losses.ndim != 1 or not bool((losses >= 0).all() & losses.isfinite().all()):
            raise RequestError("losses have to be finite and not negative.")
        count, slots = len(self), list[int | None]()
        for _ in range(len(losses)):
            self.num_seen += 1
            if count < self.capacity:
                slots.append(count)
                count += 1
                continue
            drawn = int(torch.randint(self.num_seen, (1,), generator=self._replacing))
            slots.append(drawn if drawn < self.capacity else None)
        if count > len(self):
            self.losses = torch.cat([self.losses, torch.zeros(count - len(self))])
            self._order = self._order[:0]
        for slot, loss in zip(slots, losses, strict=True):
            if slot is not None:
                self.losses[slot] = loss
        return slots

    def draw(self, count: int) -> Tensor:
        """Return the slots of the next `count` draws, int64 [count]; there is at least one slot."""
        if self.weighting == "loss" and count:
            chances = self.losses if float(self.losses.sum()) > 0 else torch.ones(len(self))
            return torch.multinomial(chances, count, replacement=True, generator=self._drawing)
        picked = [self._order[:0]]
        while count:
            if not len(self._order):
                self._order = torch.randperm(len(self), generator=self._drawing)
            picked.append(self._order[:count])
            self._order = self._order[len(picked[-1]) :]
            count -= len(picked[-1])
        return torch.cat(picked)

    def state_dict(self) -> dict[str, Any]:
        """Return all of it, in plain containers and tensors."""
        return {
            "num_seen": self.num_seen,
            "losses": self.losses,
            "replacing": self._replacing.get_state(),
            "drawing": self._drawing.get_state(),
            "order": self._order,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Become what was saved."""
        self.num_seen = int(state["num_seen"])
        self.losses = state["losses"].clone()
        self._replacing.set_state(state["replacing"])
        self._drawing.set_state(state["drawing"])
        self._order = state["order"].clone()
