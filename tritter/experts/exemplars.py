"""A few sequences of each expert's text, seen again while others learn.

Where a token does not tell yet whose text it begins, all experts take part, and what one learns
there would push out what the others said. A small share of their text in each batch holds it.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tritter.data.reservoir import Reservoir
from tritter.seeds import derived_seed


class Exemplars:
    """A reservoir of sequences for each expert.

    Args:
        capacity: sequences of each.
        seed: of which are kept and drawn.
    """

    def __init__(self, capacity: int, *, seed: int) -> None:
        self.capacity, self._seed = capacity, seed
        self._held: dict[str, Reservoir] = {}
        self._turn = 0
        self.owed = 0.0  # rows of a batch that are not given yet

    def add(self, expert: str, sequences: Tensor) -> None:
        """Offer sequences [N, T] of an expert's text."""
        if expert not in self._held:
            own = derived_seed(self._seed, "exemplars", expert)
            self._held[expert] = Reservoir(self.capacity, seed=own)
        self._held[expert].add(sequences)

    def sample(self, count: int, *, without: str) -> Tensor:
        """Return sequences of all experts but one in turn, int64 [count, T]; of none, none."""
        others = [name for name in self._held if name != without]
        if not others:
            return torch.empty(0, 0, dtype=torch.int64)
        turns = [others[(self._turn + number) % len(others)] for number in range(count)]
        self._turn += count
        return torch.cat([self._held[name].next_sequences(1) for name in turns])

    @property
    def sequence_length(self) -> int:
        """Tokens of one sequence; 0 while there is none."""
        return max((each.sequence_length for each in self._held.values()), default=0)

    def move(self, expert: str, *, heir: str | None) -> None:
        """Forget an expert's, or let another have them."""
        gone = self._held.pop(expert, None)
        if gone is not None and heir is not None:
            self.add(heir, gone.sequences)

    def state_dict(self) -> dict[str, Any]:
        """Return all of it, in plain containers and tensors."""
        return {
            "held": {name: each.state_dict() for name, each in self._held.items()},
            "turn": self._turn,
            "owed": self.owed,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Become what was saved, as far as there is room."""
        self._held, self._turn = {}, int(state["turn"])
        self.owed = float(state["owed"])
        for name, each in state["held"].items():
            own = derived_seed(self._seed, "exemplars", name)
            self._held[name] = Reservoir(self.capacity, seed=own)
            if len(each["sequences"]) > self.capacity:  # fewer are kept from here on
                self._held[name].add(each["sequences"])
            else:
                self._held[name].load_state_dict(each)
