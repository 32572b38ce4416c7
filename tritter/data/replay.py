"""The replay buffer: old sequences, sampled to be trained on again."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tritter.data.sequences import SequenceStream
from tritter.seeds import derived_seed


class ReplayBuffer:
    """Sequences of an earlier task; a sequence returns only after all others have come.

    It holds its own random order, so that replaying changes nothing about the order of new data.
    """

    def __init__(self, stream: SequenceStream) -> None:
        self._stream = stream

    @classmethod
    def from_sequences(cls, sequences: Tensor, *, seed: int) -> "ReplayBuffer":
        """Fill a buffer from a dataset of sequences [N, T].

        Raises:
            RequestError: there is no sequence.
        """
        return cls(SequenceStream(sequences, seed=derived_seed(seed, "replay")))

    def __len__(self) -> int:
        return len(self._stream)

    @property
    def sequence_length(self) -> int:
        """Tokens of one sequence."""
        return self._stream.sequence_length

    def sample(self, count: int) -> Tensor:
        """Return `count` sequences, int64 [count, T], without replacement within an epoch."""
        return self._stream.next_sequences(count)

    def state_dict(self) -> dict[str, int]:
        """Return the place in the buffer's order."""
        return self._stream.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a saved place.

        Raises:
            TritterError: the place does not exist in this buffer.
        """
        self._stream.load_state_dict(state)
