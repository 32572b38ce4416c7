"""Replay: earlier sequences and examples, sampled in fixed memory and drawn in exact shares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tritter.data.batches import SequenceStream, read_sequences, write_sequences
from tritter.data.records import PART_BREAK
from tritter.errors import RequestError, TritterError
from tritter.seeds import derived_seed

if TYPE_CHECKING:
    from torch import Tensor

Weighting = Literal["uniform", "loss"]
SEEN = "seen"  # the domain of what is added without a word which it is of
FORMAT_VERSION = 1
_PROMPTS = ("prompt", "instruction", "question")
_ANSWERS = ("answer", "completion", "response", "output")
_BETWEEN = ("input", "context")  # parts of an instruction that may be empty


class Sampler:
    """Which of what was offered is kept in at most `capacity` slots, and which slots are drawn.

    Whatever was offered is kept with the same chance (Vitter 1985, algorithm R). What is in the
    slots is held elsewhere.

    Args:
        capacity: how many there are at most.
        seed: of what is replaced and of what is drawn.
        weighting: `uniform`: each slot returns only after all others have come, as long as none is
            added; `loss`: each draw takes one with a chance in proportion to its loss.
    """

    def __init__(self, capacity: int, *, seed: int, weighting: Weighting = "uniform") -> None:
        import torch

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
        import torch

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
        import torch

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


class Reservoir(Sampler):
    """A sampler that holds sequences of tokens.

    Of several processes that train together each holds the same one, if each is given the same.

    Args:
        capacity: sequences that it holds at most.
        seed: of what is replaced and of what is drawn.
        weighting: as of `Sampler`.

    Raises:
        RequestError: the capacity is below 1.
    """

    def __init__(self, capacity: int, *, seed: int, weighting: Weighting = "uniform") -> None:
        import torch

        if capacity < 1:
            raise RequestError(f"capacity = {capacity}: a reservoir holds at least 1 sequence.")
        super().__init__(capacity, seed=seed, weighting=weighting)
        self.sequences = torch.empty(0, 0, dtype=torch.int32)  # [N, T]

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
        import torch

        losses = torch.ones(len(sequences)) if losses is None else losses.detach().float().cpu()
        if len(self) and sequences.shape[1] != self.sequence_length:
            raise RequestError(
                f"sequences of {sequences.shape[1]} tokens can't join those of "
                f"{self.sequence_length} that the buffer holds."
            )
        if losses.shape != sequences.shape[:1]:
            raise RequestError("a loss belongs to each sequence, finite and not negative.")
        before, slots = len(self), self.offer(losses)
        if (more := len(self) - before) > 0:
            held = self.sequences.view(before, sequences.shape[1])
            self.sequences = torch.cat([held, held.new_zeros(more, sequences.shape[1])])
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
        return self.sequences[self.draw(count)].long()

    def state_dict(self) -> dict[str, Any]:
        """Return all of it, in plain containers and tensors."""
        return super().state_dict() | {"sequences": self.sequences}

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
        super().load_state_dict(state)
        self.sequences = state["sequences"].clone()


class ReplayBuffer:
    """Sequences of several domains, whole data sets or reservoirs of what went by.

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
        purpose: str = "replay",
    ) -> ReplayBuffer:
        """Fill a buffer from domains of sequences [N, T].

        Args:
            purpose: another one gives the domains other orders.
            losses: domain → [N], by which its sequences are drawn in proportion.

        Raises:
            RequestError: a domain has no sequence, or no weight is above 0.
        """
        streams: dict[str, SequenceStream | Reservoir] = {}
        for name, each in sequences.items():
            own = derived_seed(seed, purpose, name)
            if losses is not None and name in losses:
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
    ) -> ReplayBuffer:
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
    ) -> ReplayBuffer:
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
        import torch

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

    def next_sequences(self, count: int) -> Tensor:
        """Return `count` sequences, int64 [count, T], each domain in its share.

        Raises:
            RequestError: nothing was added yet.
        """
        import torch

        sequences = [torch.empty(0, self.sequence_length, dtype=torch.int64)]
        for _ in range(count):
            # From the domain that is furthest behind its share. A reservoir to which nothing was
            # added waits, and is caught up with.
            number = sum(self._drawn.values()) + 1
            filled = [name for name, stream in self._streams.items() if len(stream)]
            behind = {name: self._shares[name] * number - self._drawn[name] for name in filled}
            if not behind:
                raise RequestError("the replay buffer is empty: nothing was added to it yet.")
            name = max(behind, key=lambda each: behind[each])
            self._drawn[name] += 1
            sequences.append(self._streams[name].next_sequences(1))
        return torch.cat(sequences)

    sample = next_sequences

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


@dataclass(frozen=True, slots=True)
class Remembered:
    """A prompt, its answer, and the loss in nats per token when it was kept."""

    prompt: str
    answer: str
    loss: float

    @property
    def text(self) -> str:
        """Prompt and answer as one text, joined as the parts of a record are."""
        return f"{self.prompt}{PART_BREAK}{self.answer}"


class MemoryReplayBuffer:
    """A uniform sample of all examples that were ever added, at most `max_size` of them.

    The same sampling as of the replay buffer of a run (`forgetting=replay`), which holds tokens.

    Args:
        max_size: examples that it holds at most.
        seed: of what is replaced and of what is drawn.
        weighting: `uniform`: each returns only after all others have come, as long as nothing is
            added; `loss`: each draw takes an example with a chance in proportion to its loss.

    Raises:
        RequestError: `max_size` is below 1.
    """

    def __init__(
        self, max_size: int = 10_000, *, seed: int = 0, weighting: Weighting = "uniform"
    ) -> None:
        if max_size < 1:
            raise RequestError(f"max_size = {max_size}: a buffer holds at least 1 example.")
        self.max_size = max_size
        self._slots = Sampler(max_size, seed=seed, weighting=weighting)
        self._examples: list[Remembered] = []
        self._owed = Fraction(0)  # of an example that could not be replayed in part

    def __len__(self) -> int:
        return len(self._examples)

    @property
    def examples(self) -> tuple[Remembered, ...]:
        """What it holds."""
        return tuple(self._examples)

    def add(self, prompt: str, answer: str, loss: float = 1.0) -> None:
        """Offer an example; when the buffer is full it takes the place of another, or none.

        Args:
            loss: nats per token, by which it is drawn where `weighting` is `loss`.

        Raises:
            RequestError: no texts, or a loss that is negative or not finite.
        """
        import torch

        if not (isinstance(prompt, str) and isinstance(answer, str)):
            kinds = f"{type(prompt).__name__} and {type(answer).__name__}"
            raise RequestError(f"prompt and answer are texts, not {kinds}.")
        example = Remembered(prompt, answer, float(loss))
        (slot,) = self._slots.offer(torch.tensor([example.loss]))
        if slot == len(self):
            self._examples.append(example)
        elif slot is not None:
            self._examples[slot] = example

    def get_replay_batch(self, new_examples: Sequence[Any], replay_ratio: float = 0.2) -> list[Any]:
        """Return the new examples in their order, and replayed ones behind them.

        The ratio is of the batch that is returned: with 8 new examples and 0.2 two are replayed,
        which makes 10. Where it does not come out even, the rest is made up for in later batches,
        so that the ratio holds over time. An empty buffer replays nothing, and owes nothing.

        Replayed ones look like the new: texts; tuples or lists of two texts; or mappings with the
        keys of the first, of which those for a prompt, an answer, a `text` and a `loss` are filled,
        an `input` or `context` is empty, and any other is None. Beside new ones of another
        kind they are `{"prompt": ..., "answer": ...}`.

        Args:
            replay_ratio: from 0 to below 1.

        Raises:
            RequestError: the ratio is none.
        """
        if not 0 <= replay_ratio < 1:
            raise RequestError(f"replay_ratio = {replay_ratio}: it is from 0 to below 1.")
        new, share = list(new_examples), Fraction(str(replay_ratio))
        if not len(self):
            return new
        self._owed += len(new) * share / (1 - share)
        count = int(self._owed)
        self._owed -= count
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
                filled = {key: known.get(key, "" if key in _BETWEEN else None) for key in first}
                new.append(filled)
            else:
                new.append({"prompt": example.prompt, "answer": example.answer})
        return new

    def state_dict(self) -> dict[str, Any]:
        """Return all of it, in plain containers and tensors."""
        return {
            "format_version": FORMAT_VERSION,
            "prompts": [example.prompt for example in self._examples],
            "answers": [example.answer for example in self._examples],
            "losses": [example.loss for example in self._examples],
            "owed": [self._owed.numerator, self._owed.denominator],
            "slots": self._slots.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Become what was saved.

        Raises:
            TritterError: it holds more than this one may, or is of a newer format.
        """
        if state["format_version"] > FORMAT_VERSION:
            raise TritterError(
                f"the saved buffer is of format {state['format_version']}; {FORMAT_VERSION} is "
                "known."
            )
        if len(state["prompts"]) > self.max_size:
            raise TritterError(
                f"the saved buffer holds {len(state['prompts'])} examples; this one has max_size = "
                f"{self.max_size}."
            )
        self._slots.load_state_dict(state["slots"])
        parts = zip(state["prompts"], state["answers"], state["losses"], strict=True)
        self._examples = [Remembered(*each) for each in parts]
        self._owed = Fraction(*state["owed"])
