"""Replay buffers: earlier sequences and examples in fixed memory, drawn in exact shares."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tritter.data.batches import (
    BatchStream,
    Sequences,
    SequenceStream,
    read_sequences,
    write_sequences,
)
from tritter.data.records import PART_BREAK
from tritter.errors import RequestError, TritterError
from tritter.seeds import derived_seed

if TYPE_CHECKING:
    from torch import Tensor

Weighting = Literal["uniform", "loss"]
_FORMAT_VERSION = 1
_PROMPTS = ("prompt", "instruction", "question")
_ANSWERS = ("answer", "completion", "response", "output")
_BETWEEN = ("input", "context")  # parts of an instruction that may be empty


class Sampler:
    """Reservoir sampling over slots (Vitter 1985, algorithm R), and draws from the slots.

    All offered items are kept with equal probability. Subclasses store the items.

    Args:
        capacity: maximum number of slots.
        seed: seed of replacements and draws.
        weighting: `uniform` draws every slot once before it repeats any, until new items arrive;
            `loss` draws with replacement, with probabilities proportional to the losses.
    """

    def __init__(self, capacity: int, *, seed: int, weighting: Weighting = "uniform") -> None:
        import torch

        self.capacity = capacity
        self.weighting = weighting
        self.num_seen = 0
        self.losses = torch.empty(0)  # float32 [N], nats per token when the item was offered
        self._replace_generator = torch.Generator().manual_seed(seed)
        self._draw_generator = torch.Generator().manual_seed(seed ^ 1)
        self._order = torch.empty(0, dtype=torch.int64)  # remaining slots of the epoch

    def __len__(self) -> int:
        return len(self.losses)

    def offer(self, losses: Tensor) -> list[int | None]:
        """Offer one item per loss [n] and return the slot of each.

        The slot is None if the item is not kept. If two items get the same slot, the later one
        replaces the earlier one.
        """
        import torch

        if losses.ndim != 1 or not bool((losses >= 0).all() & losses.isfinite().all()):
            raise RequestError("losses must be finite and not negative.")
        count, slots = len(self), list[int | None]()
        for _ in range(len(losses)):
            self.num_seen += 1
            if count < self.capacity:
                slots.append(count)
                count += 1
                continue
            drawn = int(torch.randint(self.num_seen, (1,), generator=self._replace_generator))
            slots.append(drawn if drawn < self.capacity else None)
        if count > len(self):
            self.losses = torch.cat([self.losses, torch.zeros(count - len(self))])
            self._order = self._order[:0]
        for slot, loss in zip(slots, losses, strict=True):
            if slot is not None:
                self.losses[slot] = loss
        return slots

    def draw(self, count: int) -> Tensor:
        """Return the slots of the next `count` draws, int64 [count]; requires at least one slot."""
        import torch

        if self.weighting == "loss" and count:
            chances = self.losses if float(self.losses.sum()) > 0 else torch.ones(len(self))
            return torch.multinomial(
                chances, count, replacement=True, generator=self._draw_generator
            )
        picked = [self._order[:0]]
        while count:
            if not len(self._order):
                self._order = torch.randperm(len(self), generator=self._draw_generator)
            picked.append(self._order[:count])
            self._order = self._order[len(picked[-1]) :]
            count -= len(picked[-1])
        return torch.cat(picked)

    def state_dict(self) -> dict[str, Any]:
        """Return the complete state, in plain containers and tensors."""
        return {
            "num_seen": self.num_seen,
            "losses": self.losses,
            "replacing": self._replace_generator.get_state(),
            "drawing": self._draw_generator.get_state(),
            "order": self._order,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a saved state."""
        self.num_seen = int(state["num_seen"])
        self.losses = state["losses"].clone()
        self._replace_generator.set_state(state["replacing"])
        self._draw_generator.set_state(state["drawing"])
        self._order = state["order"].clone()


class Reservoir(Sampler):
    """A reservoir sample of token sequences.

    Processes that receive the same sequences keep the same reservoir.

    Args:
        capacity: maximum number of sequences.
        seed: seed of replacements and draws.
        weighting: see `Sampler`.
    """

    def __init__(self, capacity: int, *, seed: int, weighting: Weighting = "uniform") -> None:
        import torch

        if capacity < 1:
            raise RequestError(f"capacity = {capacity}: must be at least 1 sequence.")
        super().__init__(capacity, seed=seed, weighting=weighting)
        self.sequences = torch.empty(0, 0, dtype=torch.int32)  # [N, T]

    @property
    def sequence_length(self) -> int:
        """Tokens of one sequence; 0 while it is empty."""
        return self.sequences.shape[1]

    def add(self, sequences: Tensor, losses: Tensor | None = None) -> None:
        """Offer sequences [n, T] in order, with the loss of each, [n]; the default is 1."""
        import torch

        losses = torch.ones(len(sequences)) if losses is None else losses.detach().float().cpu()
        if len(self) and sequences.shape[1] != self.sequence_length:
            raise RequestError(
                f"the buffer has sequences of {self.sequence_length} tokens; sequences of "
                f"{sequences.shape[1]} tokens can't be added."
            )
        if losses.shape != sequences.shape[:1]:
            raise RequestError(
                f"losses have shape {list(losses.shape)}; {len(sequences)} sequences need one each."
            )
        before, slots = len(self), self.offer(losses)
        if (more := len(self) - before) > 0:
            stored = self.sequences.view(before, sequences.shape[1])
            self.sequences = torch.cat([stored, stored.new_zeros(more, sequences.shape[1])])
        for slot, sequence in zip(slots, sequences.to("cpu", torch.int32), strict=True):
            if slot is not None:
                self.sequences[slot] = sequence

    def next_sequences(self, count: int) -> Tensor:
        """Draw `count` sequences, int64 [count, T]."""
        assert len(self) or not count
        return self.sequences[self.draw(count)].long()

    def state_dict(self) -> dict[str, Any]:
        """Return the complete state, in plain containers and tensors."""
        return super().state_dict() | {"sequences": self.sequences}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a saved state."""
        if len(state["sequences"]) > self.capacity:
            raise TritterError(
                f"the saved reservoir has {len(state['sequences'])} sequences; this one has a "
                f"capacity of {self.capacity}."
            )
        super().load_state_dict(state)
        self.sequences = state["sequences"].clone()


class ReplayBuffer:
    """Sequences of several domains, each a full data set or a reservoir sample.

    The next sequence always comes from the domain that is furthest below its share, so shares
    are exact over time. Each domain has its own random order, independent of new data and of
    other domains. A data set yields every sequence once before it repeats any.
    """

    def __init__(
        self,
        streams: Mapping[str, Sequences],
        *,
        weights: Mapping[str, float | Fraction] | None = None,
    ) -> None:
        """Combine the sequences of several domains.

        Args:
            streams: domain → its sequences.
            weights: domain → sampling weight; defaults to 1.
        """
        decimals = {name: (weights or {}).get(name, 1.0) for name in streams}
        # The decimals that the user typed, so that no rounding accumulates
        exact = {name: Fraction(str(weight)) for name, weight in decimals.items() if weight > 0}
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
    ) -> ReplayBuffer:
        """Create a buffer of full data sets.

        Args:
            sequences: domain → sequences [N, T].
            seed: seed of all orders.
            weights: domain → sampling weight; defaults to 1.
            losses: domain → losses [N]; sequences are drawn in proportion to them.
        """
        streams: dict[str, Sequences] = {}
        for name, each in sequences.items():
            own = derived_seed(seed, "replay", name)
            if losses is not None and name in losses:
                streams[name] = weighted = Reservoir(len(each), seed=own, weighting="loss")
                weighted.add(each, losses[name])
            else:
                streams[name] = SequenceStream(each, seed=own)
        return cls(streams, weights=weights)

    @classmethod
    def of_reservoirs(
        cls,
        capacities: Mapping[str, int],
        *,
        seed: int,
        weighting: Weighting = "uniform",
    ) -> ReplayBuffer:
        """Create an empty buffer of reservoir samples.

        Args:
            capacities: domain → capacity in sequences.
            seed: seed of all reservoirs.
            weighting: weighting within a domain, see `Sampler`.
        """
        return cls(
            {
                name: Reservoir(each, seed=derived_seed(seed, "replay", name), weighting=weighting)
                for name, each in capacities.items()
            }
        )

    @classmethod
    def load(cls, path: Path, *, seed: int, weighting: Weighting = "uniform") -> ReplayBuffer:
        """Load the reservoirs that `save` wrote; draws start from the beginning."""
        tensors = read_sequences(path)
        names = [key.partition("/")[2] for key in tensors if key.startswith("sequences/")]
        try:
            counts = {name: tensors[f"counts/{name}"].tolist() for name in names}
            capacities = {name: capacity for name, (capacity, _) in counts.items()}
            buffer = cls.of_reservoirs(capacities, seed=seed, weighting=weighting)
            for name, stream in buffer._streams.items():
                assert isinstance(stream, Reservoir)
                sequences, losses = tensors[f"sequences/{name}"], tensors[f"losses/{name}"]
                stream.add(sequences, losses)
                stream.num_seen = counts[name][1]
        except (LookupError, TypeError, ValueError, RuntimeError) as error:
            raise TritterError(f"{path} is not a replay buffer ({error!r}).") from error
        return buffer

    def save(self, path: Path, *, extra: Mapping[str, Tensor] | None = None) -> None:
        """Write the reservoirs, and tensors that `load` ignores, as safetensors."""
        import torch

        tensors = dict(extra or {})
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
        """The domains with a reservoir sample."""
        return {n: each for n, each in self._streams.items() if isinstance(each, Reservoir)}

    @property
    def sequence_length(self) -> int:
        """Tokens of one sequence."""
        return max(stream.sequence_length for stream in self._streams.values())

    def add(self, sequences: Tensor, losses: Tensor | None = None, *, domain: str) -> None:
        """Offer sequences [n, T] to a domain's reservoir, with the loss of each, [n]."""
        stream = self._streams.get(domain)
        if not isinstance(stream, Reservoir):
            raise RequestError(
                f"domain = {domain}: the replay buffer has no such reservoir; available: "
                f"{', '.join(self.reservoirs) or 'none'}."
            )
        stream.add(sequences, losses)

    def mixed_into(self, batches: BatchStream, fraction: float) -> BatchStream:
        """Return a loader that draws `fraction` of each batch from this buffer.

        An earlier buffer of the loader keeps its share; the two take turns.
        """
        if self.sequence_length != batches.new.sequence_length:
            raise RequestError(
                f"data.sequence_length={batches.new.sequence_length}: the replayed sequences have "
                f"{self.sequence_length} tokens; both need the same length."
            )
        mixed, share = copy(batches), _exact_share(fraction)
        mixed.replayed, mixed.share = self, share
        if batches.replayed is not None:
            shares = {"first method": batches.share, "second method": share}
            streams = {"first method": batches.replayed, "second method": self}
            mixed.replayed = ReplayBuffer(streams, weights=shares)
            mixed.share = _exact_share(sum(shares.values()))
        return mixed

    def next_sequences(self, count: int) -> Tensor:
        """Return `count` sequences, int64 [count, T], in the domains' shares."""
        import torch

        sequences = [torch.empty(0, self.sequence_length, dtype=torch.int64)]
        for _ in range(count):
            # From the domain that is furthest below its share; empty reservoirs catch up later
            number = sum(self._drawn.values()) + 1
            filled = [name for name, stream in self._streams.items() if len(stream)]
            deficits = {name: self._shares[name] * number - self._drawn[name] for name in filled}
            if not deficits:
                raise RequestError("the replay buffer is empty.")
            name = max(deficits, key=lambda each: deficits[each])
            self._drawn[name] += 1
            sequences.append(self._streams[name].next_sequences(1))
        return torch.cat(sequences)

    sample = next_sequences

    @property
    def notes(self) -> tuple[str, ...]:
        """What streamed domains leave out, a sentence each."""
        return tuple(note for each in self._streams.values() for note in getattr(each, "notes", ()))

    def state_dict(self) -> dict[str, Any]:
        """Return the number of draws and the position of each domain; reservoirs completely."""
        return {
            name: {"drawn": self._drawn[name], "place": stream.state_dict()}
            for name, stream in self._streams.items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a saved position."""
        for name, stream in self._streams.items():
            self._drawn[name] = int(state[name]["drawn"])
            stream.load_state_dict(state[name]["place"])


def _exact_share(fraction: float | Fraction) -> Fraction:
    """Return a share of replayed sequences as the decimal that the user typed."""
    if not (math.isfinite(fraction) and 0 <= fraction < 1):
        raise RequestError(
            f"forgetting.replay.fraction={float(fraction):g}: must be at least 0 and below 1, "
            f"for example 0.25."
        )
    # 0.1 as a binary float is slightly more than a tenth
    return Fraction(str(fraction))


@dataclass(frozen=True, slots=True)
class ReplayExample:
    """A prompt, its answer, and the loss in nats per token when it was added."""

    prompt: str
    answer: str
    loss: float

    @property
    def text(self) -> str:
        """Prompt and answer joined like the parts of a record."""
        return f"{self.prompt}{PART_BREAK}{self.answer}"


class MemoryReplayBuffer:
    """A uniform sample of at most `max_size` of all added examples.

    It samples like the replay buffer of a run (`forgetting=replay`), which contains tokens.

    Args:
        max_size: maximum number of examples.
        seed: seed of replacements and draws.
        weighting: `uniform` draws every example once before it repeats any, until new examples
            arrive; `loss` draws with probabilities proportional to the losses.

    Raises:
        RequestError: `max_size` is below 1.
    """

    def __init__(
        self, max_size: int = 10_000, *, seed: int = 0, weighting: Weighting = "uniform"
    ) -> None:
        if type(max_size) is not int or max_size < 1:
            raise RequestError(f"max_size = {max_size}: must be a whole number of at least 1.")
        self.max_size = max_size
        self._slots = Sampler(max_size, seed=seed, weighting=weighting)
        self._examples: list[ReplayExample] = []
        self._remainder = Fraction(0)  # fraction of an example that later batches make up for

    def __len__(self) -> int:
        return len(self._examples)

    @property
    def examples(self) -> tuple[ReplayExample, ...]:
        """The stored examples."""
        return tuple(self._examples)

    def add(self, prompt: str, answer: str, loss: float = 1.0) -> None:
        """Offer an example; if the buffer is full, it replaces another example or is dropped.

        Args:
            prompt: the prompt.
            answer: the answer.
            loss: nats per token, used with `weighting="loss"`.

        Raises:
            RequestError: prompt or answer is not a string, or the loss is negative or not finite.
        """
        import torch

        if not (isinstance(prompt, str) and isinstance(answer, str)):
            kinds = f"{type(prompt).__name__} and {type(answer).__name__}"
            raise RequestError(f"prompt and answer must be strings, not {kinds}.")
        example = ReplayExample(prompt, answer, float(loss))
        (slot,) = self._slots.offer(torch.tensor([example.loss]))
        if slot == len(self):
            self._examples.append(example)
        elif slot is not None:
            self._examples[slot] = example

    def get_replay_batch(self, new_examples: Sequence[Any], replay_ratio: float = 0.2) -> list[Any]:
        """Return the new examples in order, followed by replayed ones.

        The ratio refers to the returned batch: 8 new examples and a ratio of 0.2 give a batch of
        10 with 2 replayed. Later batches make up for fractions, so the ratio is exact over time.
        An empty buffer replays nothing.

        Replayed examples have the format of the new ones: strings; tuples or lists of two
        strings; or mappings with the keys of the first example. Keys for a prompt, an answer, a
        `text` and a `loss` are filled, `input` and `context` are empty, all others are None. For
        any other format they are `{"prompt": ..., "answer": ...}`.

        Args:
            new_examples: the new examples.
            replay_ratio: share of replayed examples, in [0, 1).

        Raises:
            RequestError: the ratio is out of range.
        """
        if not 0 <= replay_ratio < 1:
            raise RequestError(f"replay_ratio = {replay_ratio}: must be at least 0 and below 1.")
        new, share = list(new_examples), Fraction(str(replay_ratio))
        if not len(self):
            return new
        self._remainder += len(new) * share / (1 - share)
        count = int(self._remainder)
        self._remainder -= count
        for slot in self._slots.draw(count).tolist():
            example, first = self._examples[slot], new[0]
            known: dict[str, Any] = {"text": example.text, "loss": example.loss}
            known |= dict.fromkeys(_PROMPTS, example.prompt)
            known |= dict.fromkeys(_ANSWERS, example.answer)
            if isinstance(first, str):
                new.append(example.text)
            elif type(first) in (tuple, list) and len(first) == 2:
                new.append(type(first)((example.prompt, example.answer)))
            elif isinstance(first, Mapping) and any(key in first for key in ("text", *_PROMPTS)):
                new.append({key: known.get(key, "" if key in _BETWEEN else None) for key in first})
            else:
                new.append({"prompt": example.prompt, "answer": example.answer})
        return new

    def state_dict(self) -> dict[str, Any]:
        """Return the complete state, in plain containers and tensors."""
        return {
            "format_version": _FORMAT_VERSION,
            "prompts": [example.prompt for example in self._examples],
            "answers": [example.answer for example in self._examples],
            "losses": [example.loss for example in self._examples],
            "owed": [self._remainder.numerator, self._remainder.denominator],
            "slots": self._slots.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a saved state."""
        if state["format_version"] > _FORMAT_VERSION:
            raise TritterError(
                f"the saved buffer has format {state['format_version']}; this version of Tritter "
                f"reads {_FORMAT_VERSION}."
            )
        if len(state["prompts"]) > self.max_size:
            raise TritterError(
                f"the saved buffer has {len(state['prompts'])} examples; this one has max_size = "
                f"{self.max_size}."
            )
        self._slots.load_state_dict(state["slots"])
        parts = zip(state["prompts"], state["answers"], state["losses"], strict=True)
        self._examples = [ReplayExample(*each) for each in parts]
        self._remainder = Fraction(*state["owed"])
