"""The replay buffer: sequences of earlier trainings, sampled to be trained on again."""

from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tritter.data.reservoir import Reservoir
from tritter.data.sequence_file import read_sequences, write_sequences
from tritter.data.sequences import SequenceStream
from tritter.data.slots import Weighting
from tritter.errors import RequestError, TritterError
from tritter.seeds import derived_seed

SEEN = "seen"  # the domain of what is added without a word which it is of


class ReplayBuffer:
    """Sequences of earlier domains, whole data sets or reservoirs of what went by.

    The domains' shares are exact over time: the next sequence comes from the one that is furthest
    behind its share. Each domain has a random order of its own, so that replaying changes nothing
    about the order of new data, nor one domain about the order of another. Of a data set one
    returns only after all others have come.
    """

    def __init__(
        self,
        streams: Mapping[str, SequenceStream | Reservoir],
        *,
        weights: Mapping[str, float] | None = None,
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
        losses: Mapping[str, Tensor] | None = None,
    ) -> "ReplayBuffer":
        """Fill a buffer from domains of sequences [N, T].

        Args:
            losses: domain → [N], by which its sequences are drawn in proportion.

        Raises:
            RequestError: a domain has no sequence, or no weight is above 0.
        """
        streams: dict[str, SequenceStream | Reservoir] = {}
        for name, each in sequences.items():
            own = derived_seed(seed, "replay", name)
            if name in (losses or {}):
                assert losses is not None
                streams[name] = held = Reservoir(len(each), seed=own, weighting="loss")
                held.add(each, losses[name])
            else:
                streams[name] = SequenceStream(each, seed=own)
        return cls(streams, weights=weights)

    @classmethod
    def of_reservoirs(
        cls,
        capacities: Mapping[str, int] | int,
        *,
        seed: int,
        weighting: Weighting = "uniform",
        weights: Mapping[str, float] | None = None,
    ) -> "ReplayBuffer":
        """Return an empty buffer that keeps a sample of what is added to it.

        Args:
            capacities: domain → sequences that are kept of it; a number is that of one domain.
            weighting: within a domain, see `Reservoir`.

        Raises:
            RequestError: a capacity is below 1, or no weight is above 0.
        """
        asked = {SEEN: capacities} if isinstance(capacities, int) else capacities
        streams = {
            name: Reservoir(each, seed=derived_seed(seed, "replay", name), weighting=weighting)
            for name, each in asked.items()
        }
        return cls(streams, weights=weights)

    @classmethod
    def load(
        cls,
        path: Path,
        *,
        seed: int,
        weighting: Weighting = "uniform",
        weights: Mapping[str, float] | None = None,
    ) -> "ReplayBuffer":
        """Return a buffer of reservoirs as `save` left them, from which drawing begins anew.

        Raises:
            TritterError: there is no such file, or it is damaged.
            RequestError: no weight is above 0.
        """
        held = read_sequences(path)
        names = [key.partition("/")[2] for key in held if key.startswith("sequences/")]
        try:
            counts = {name: held[f"counts/{name}"].tolist() for name in names}
            capacities = {name: capacity for name, (capacity, _) in counts.items()}
            buffer = cls.of_reservoirs(capacities, seed=seed, weighting=weighting, weights=weights)
            for name, stream in buffer._streams.items():
                assert isinstance(stream, Reservoir)
                sequences, losses = held[f"sequences/{name}"], held[f"losses/{name}"]
                stream.add(sequences, losses)
                stream.num_seen = counts[name][1]
        except (LookupError, TypeError, ValueError, RuntimeError) as error:
            if isinstance(error, RequestError):
                raise
            raise TritterError(f"{path} holds no replay buffer ({error!r}).") from error
        return buffer

    def save(self, path: Path, *, beside: Mapping[str, Tensor] | None = None) -> None:
        """Write what the reservoirs hold, with losses, as safetensors.

        Args:
            beside: what else is known of them, by names that `load` passes over.

        Raises:
            RequestError: a domain is a data set, which lies elsewhere already.
        """
        tensors = dict(beside or {})
        for name, stream in self._streams.items():
            if not isinstance(stream, Reservoir):
                raise RequestError(f"the domain {name} is a data set; only reservoirs are saved.")
            tensors[f"sequences/{name}"] = stream.sequences
            tensors[f"losses/{name}"] = stream.losses
            tensors[f"counts/{name}"] = torch.tensor([stream.capacity, stream.num_seen])
        write_sequences(path, tensors)

    def __len__(self) -> int:
        return sum(map(len, self._streams.values()))

    @property
    def reservoirs(self) -> dict[str, Reservoir]:
        """The domains of which a sample is held."""
        return {n: each for n, each in self._streams.items() if isinstance(each, Reservoir)}

    @property
    def sequence_length(self) -> int:
        """Tokens of one sequence."""
        return max(stream.sequence_length for stream in self._streams.values())

    def add(self, sequences: Tensor, losses: Tensor | None = None, *, domain: str = SEEN) -> None:
        """Offer sequences [n, T] to a domain's reservoir, with the loss of each, [n].

        Raises:
            RequestError: there is no such reservoir, or what `Reservoir.add` refuses.
        """
        stream = self._streams.get(domain)
        if not isinstance(stream, Reservoir):
            held = [n for n, each in self._streams.items() if isinstance(each, Reservoir)]
            raise RequestError(
                f"domain = {domain}: the replay buffer has no such reservoir; it has "
                f"{', '.join(held) or 'none'}."
            )
        stream.add(sequences, losses)

    def sample(self, count: int) -> Tensor:
        """Return `count` sequences, int64 [count, T], each domain in its share.

        Raises:
            RequestError: nothing was added yet.
        """
        drawn = [self._streams[self._next_domain()].next_sequences(1) for _ in range(count)]
        return torch.cat([torch.empty(0, self.sequence_length, dtype=torch.int64), *drawn])

    def state_dict(self) -> dict[str, Any]:
        """Return, by domain, what was drawn and the place in its order; reservoirs whole."""
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
        """Count one sequence for the domain that is furthest behind its share, and return it.

        A reservoir to which nothing was added waits, and is caught up with.
        """
        number = sum(self._drawn.values()) + 1
        filled = [name for name, stream in self._streams.items() if len(stream)]
        behind = {name: self._shares[name] * number - self._drawn[name] for name in filled}
        if not behind:
            raise RequestError("the replay buffer is empty: nothing was added to it yet.")
        name = max(behind, key=lambda each: behind[each])
        self._drawn[name] += 1
        return name
