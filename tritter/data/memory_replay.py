"""Prompts with their answers, kept in fixed memory and mixed into batches of new examples."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch

from tritter.data.records import PART_BREAK
from tritter.data.slots import Slots, Weighting
from tritter.errors import RequestError, TritterError

FORMAT_VERSION = 1
_PROMPTS = ("prompt", "instruction", "question")
_ANSWERS = ("answer", "completion", "response", "output")
_BETWEEN = ("input", "context")  # parts of an instruction that may be empty


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
        self._slots = Slots(max_size, seed=seed, weighting=weighting)
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
        drawn = (self._examples[slot] for slot in self._slots.draw(count).tolist())
        return [*new, *(_like(new, example) for example in drawn)]

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


def _like(new: Sequence[Any], example: Remembered) -> Any:
    """Return an example in the form of the new ones."""
    first = new[0]
    if isinstance(first, str):
        return example.text
    if type(first) in (tuple, list) and len(first) == 2:
        return type(first)((example.prompt, example.answer))
    known: dict[str, str | float] = {"text": example.text, "loss": example.loss}
    known |= dict.fromkeys(_PROMPTS, example.prompt) | dict.fromkeys(_ANSWERS, example.answer)
    if isinstance(first, Mapping) and any(key in first for key in ("text", *_PROMPTS)):
        return {key: known.get(key, "" if key in _BETWEEN else None) for key in first}
    return {"prompt": example.prompt, "answer": example.answer}
