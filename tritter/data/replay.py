"""The replay buffer: old sequences, sampled to be trained on again."""

from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from tritter.data.sequences import SequenceStream
from tritter.errors import RequestError, TritterError
from tritter.seeds import derived_seed


class ReplayBuffer:
    """Sequences of earlier domains; of each, one returns only after all others have come.

    The domains' shares are exact over time: the next sequence comes from the one that is furthest
    behind its share. Each domain has a random order of its own, so that replaying changes nothing
    about the order of new data, nor one domain about the order of another.
    """

    def __init__(
        self, streams: Mapping[str, SequenceStream], *, weights: Mapping[str, float] | None = None
    ) -> None:
        """Take the sequences of each domain.

        Args:
            weights: domain → its weight among all; 1 where it is not named.

        Raises:
            RequestError: there is no domain, or none with a weight above 0.
        """
        asked = {name: (weights or {}).get(name, 1.0) for name in streams}
        # The decimals that were asked for, so that no rounding accumulates
        exact = {name: Fraction(str(weight)) for name, weight in asked.items() if weight > 0}
        if not exact:
            raise RequestError("forgetting.replay.weights: no old domain has a weight above 0.")
        total = sum(exact.values())
        self._shares = {name: weight / total for name, weight in exact.items()}
        self._streams = {name: streams[name] for name in exact}
        self._drawn = dict.fromkeys(exact, 0)

    @classmethod
    def of_domains(
        cls,
        sequences: Mapping[str, Tensor],
        *,
        seed: int,
        weights: Mapping[str, float] | None = None,
    ) -> "ReplayBuffer":
        """Fill a buffer from domains of sequences [N, T].

        Raises:
            RequestError: a domain has no sequence, or no weight is above 0.
        """
        streams = {
            name: SequenceStream(each, seed=derived_seed(seed, "replay", name))
            for name, each in sequences.items()
        }
        return cls(streams, weights=weights)

    def __len__(self) -> int:
        return sum(map(len, self._streams.values()))

    @property
    def sequence_length(self) -> int:
        """Tokens of one sequence."""
        return next(iter(self._streams.values())).sequence_length

    def sample(self, count: int) -> Tensor:
        """Return `count` sequences, int64 [count, T], without replacement within an epoch."""
        drawn = [self._streams[self._next_domain()].next_sequences(1) for _ in range(count)]
        return torch.cat([torch.empty(0, self.sequence_length, dtype=torch.int64), *drawn])

    def state_dict(self) -> dict[str, Any]:
        """Return, by domain, what was drawn and the place in its order."""
        return {
            name: {"drawn": self._drawn[name], "place": stream.state_dict()}
            for name, stream in self._streams.items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a saved place.

        Raises:
            TritterError: the place does not exist in this buffer.
        """
        if state.keys() != self._streams.keys():
            raise TritterError(
                f"data position was saved while {', '.join(state)} was replayed; here it is "
                f"{', '.join(self._streams)}."
            )
        for name, stream in self._streams.items():
            self._drawn[name] = int(state[name]["drawn"])
            stream.load_state_dict(state[name]["place"])

    def _next_domain(self) -> str:
        """Count one sequence for the domain that is furthest behind its share, and return it."""
        number = sum(self._drawn.values()) + 1
        behind = {name: share * number - self._drawn[name] for name, share in self._shares.items()}
        name = max(behind, key=lambda each: behind[each])
        self._drawn[name] += 1
        return name
