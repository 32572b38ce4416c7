"""Sequences of several domains, each in the share that its weight gives it."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tritter.data.replay import ReplayBuffer
from tritter.data.sequences import SequenceStream
from tritter.seeds import derived_seed


class WeightedStream:
    """Hands out sequences of several domains in exact shares; each in an endless order of its own.

    The next one comes from the domain that is furthest behind its share, so that after n of them
    each has had share × n to within one. A domain may go round several times while another has
    not been through once.
    """

    def __init__(
        self, sequences: Mapping[str, Tensor], *, weights: Mapping[str, float], seed: int
    ) -> None:
        """Take sequences [N, T] of each domain.

        Args:
            weights: domain → its weight among all, above 0; 1 where it is not named.
        """
        streams = {
            name: SequenceStream(each, seed=derived_seed(seed, "domain", name))
            for name, each in sequences.items()
        }
        self._drawn = ReplayBuffer(streams, weights=weights)

    def __len__(self) -> int:
        return len(self._drawn)

    @property
    def sequence_length(self) -> int:
        """Tokens of one sequence."""
        return self._drawn.sequence_length

    def next_sequences(self, count: int) -> Tensor:
        """Return the next `count` sequences, int64 [count, T]."""
        return self._drawn.sample(count)

    def state_dict(self) -> dict[str, Any]:
        """Return, by domain, what was drawn and the place in its order."""
        return self._drawn.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a saved place.

        Raises:
            TritterError: the place does not exist among these sequences.
        """
        self._drawn.load_state_dict(state)
