"""Examples from easy to hard: sorted, in three phases, or as the order of a training.

Bengio et al. 2009 (curriculum learning), as the README of neural foam asks for it.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from math import isclose
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler

from tritter.data.records import DEFAULT_FIELD, PART_BREAK, WrongRecordError, text_of
from tritter.errors import Problem, RequestError, TritterError, nearest
from tritter.seeds import derived_seed

LENGTH, LOSS, DIFFICULTY = "length", "loss", "difficulty"
_TOKENS = "input_ids"

By = str | Callable[[Any], float] | Sequence[float] | Tensor
Model = Callable[..., Any]
Tokenizer = Callable[[str], Any]
FORMAT_VERSION = 1


def difficulties(
    examples: Sequence[Any],
    by: By | None = None,
    *,
    model: Model | None = None,
    tokenizer: Tokenizer | None = None,
) -> list[float]:
    """Return how hard each example is; the larger the harder.

    Args:
        examples: texts, tuples of texts, objects with a `text`, or mappings: with `input_ids`, a
            `text`, or a prompt and its answer by any of the names that `data` reads.
        by: `length`: tokens of the tokenizer or of `input_ids`, otherwise characters. `loss`: mean
            nats per token under the model; without a model what examples say under that name.
            Another word: the key or attribute under which examples say it. A function of an
            example. A number for each. None: `difficulty` where all examples have one, otherwise
            `length`.
        model: called as `model(input_ids=ids, labels=ids)`, ids int64 [1, T]; what it returns has
            a `loss`, as with models of transformers.
        tokenizer: of a text, returns a mapping with `input_ids`, as those of transformers.

    Raises:
        RequestError: there is no example, or one is not said to be of a finite difficulty.
    """
    if not len(examples):
        raise RequestError("there are no examples to tell the difficulty of.")
    if by is None:
        is_said = any(_value(example, DIFFICULTY) is not None for example in examples)
        by = DIFFICULTY if is_said else LENGTH
    if isinstance(by, str):
        if by == LENGTH:
            has_tokens = (tokenizer is not None or _tokens(each) is not None for each in examples)
            found: Iterable[Any] = (
                len(_ids(place, example, tokenizer) if is_counted else _text(place, example))
                for (place, example), is_counted in zip(
                    enumerate(examples), has_tokens, strict=True
                )
            )
        elif by == LOSS and model is not None:
            found = _losses(examples, model, tokenizer)
        else:
            found = (_said(*each, by) for each in enumerate(examples))
    elif callable(by):
        found = map(by, examples)
    elif len(by) == len(examples):
        found = by
    else:
        raise RequestError(f"{len(by)} difficulties are given for {len(examples)} examples.")
    numbers = []
    for place, value in enumerate(found):
        try:
            number = float(value)
        except (TypeError, ValueError, RuntimeError):
            number = math.nan
        if not math.isfinite(number):
            reason = f"that of example {place} is {value!r:.60}; a difficulty is a finite number"
            raise RequestError(Problem("difficulty", reason=reason))
        numbers.append(number)
    return numbers


def _value(example: Any, key: str) -> Any:
    return example.get(key) if isinstance(example, Mapping) else getattr(example, key, None)


def _said(place: int, example: Any, key: str) -> Any:
    """Return what an example says of its difficulty."""
    value = _value(example, key)
    if value is None:
        if isinstance(example, Mapping):
            names = [str(name) for name in example]
        else:
            names = [f.name for f in fields(example)] if is_dataclass(example) else []
            names = names or list(getattr(example, "__dict__", {}))
        near = nearest(key, [LENGTH, *names])
        reason = f"example {place} has no {key!r}; it has {', '.join(names) or 'no names'}"
        advice = "loss needs a model and a tokenizer" if key == LOSS else ""
        raise RequestError(Problem("difficulty", key, reason, advice, nearest=near))
    return value


def _losses(examples: Sequence[Any], model: Model, tokenizer: Tokenizer | None) -> list[float]:
    """Return the mean loss of each example's tokens, one example at a time and without dropout."""
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    parameters = model.parameters() if isinstance(model, nn.Module) else iter(())
    device = next((p.device for p in parameters), torch.device("cpu"))
    modes = [module.training for module in modules]
    try:
        for module in modules:
            module.training = False
        with torch.no_grad():
            batches = (_ids(*each, tokenizer)[None].to(device) for each in enumerate(examples))
            return [float(model(input_ids=ids, labels=ids).loss) for ids in batches]
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode


def _tokens(example: Any) -> Any:
    return example.get(_TOKENS) if isinstance(example, Mapping) else None


def _ids(place: int, example: Any, tokenizer: Tokenizer | None) -> Tensor:
    """Return the tokens of an example, int64 [T]."""
    tokens = _tokens(example)
    if tokens is None:
        if tokenizer is None:
            raise RequestError(
                f"example {place} holds no {_TOKENS}; the loss of a text needs a tokenizer."
            )
        tokens = tokenizer(_text(place, example))[_TOKENS]
    return torch.as_tensor(tokens, dtype=torch.int64).flatten()


def _text(place: int, example: Any) -> str:
    """Return an example as one text, as a corpus would hold it."""
    if isinstance(example, tuple | list) and example and all(isinstance(x, str) for x in example):
        return PART_BREAK.join(example)
    text = None if isinstance(example, Mapping) else getattr(example, DEFAULT_FIELD, None)
    try:
        return text_of(example if text is None else text, field=DEFAULT_FIELD)
    except WrongRecordError as error:
        advice = "say what is difficult: a key of the examples, a function, or a number for each"
        reason = f"example {place} {error}"
        raise RequestError(Problem("difficulty", LENGTH, reason, advice)) from error


class Phases(NamedTuple):
    """Examples by how hard they are, each list from easy to hard."""

    easy: list[Any]
    medium: list[Any]
    hard: list[Any]


class CurriculumLearning:
    """Tells easy examples from hard ones.

    Args:
        difficulty: see `tritter.data.curriculum.difficulties`; by default what examples say under
            `difficulty`, otherwise their length.
        model: for `loss`: asked anew at each call, as it is then.
        tokenizer: for `loss`, and for `length` in tokens.
        fractions: of all examples that are easy, medium and hard.

    Raises:
        RequestError: the fractions are not three that make up the whole.
    """

    def __init__(
        self,
        difficulty: By | None = None,
        *,
        model: Model | None = None,
        tokenizer: Tokenizer | None = None,
        fractions: Sequence[float] = (1 / 3, 1 / 3, 1 / 3),
    ) -> None:
        is_whole = isclose(sum(fractions), 1.0, abs_tol=1e-6)
        if len(fractions) != 3 or not is_whole or not min(fractions) >= 0:
            raise RequestError(
                f"fractions = {list(fractions)}: these are three, of easy, medium and hard "
                "examples, which add up to 1."
            )
        self._difficulty, self._model, self._tokenizer = difficulty, model, tokenizer
        self._fractions = tuple(fractions)

    def order(self, examples: Sequence[Any]) -> list[int]:
        """Return the places of the examples from easy to hard; of equal ones the first is first.

        Raises:
            RequestError: there is no example, or one is not said to be of a finite difficulty.
        """
        found = difficulties(
            examples, self._difficulty, model=self._model, tokenizer=self._tokenizer
        )
        return sorted(range(len(found)), key=found.__getitem__)

    def sort_by_difficulty(self, examples: Sequence[Any]) -> list[Any]:
        """Return the examples from easy to hard; equally hard ones keep their order.

        Raises:
            RequestError: as `order`.
        """
        return [examples[place] for place in self.order(examples)]

    def get_phases(self, examples: Sequence[Any]) -> Phases:
        """Return easy, medium and hard examples: every example once, to within one in its share.

        Raises:
            RequestError: as `order`.
        """
        ordered = self.sort_by_difficulty(examples)
        first, second = self.bounds(len(ordered))
        return Phases(ordered[:first], ordered[first:second], ordered[second:])

    def bounds(self, count: int) -> tuple[int, int]:
        """Return how many of some examples are easy, and how many are not hard."""
        first = round(count * self._fractions[0])
        return first, max(first, count - round(count * self._fractions[2]))

    def sampler(
        self,
        examples: Sequence[Any],
        *,
        num_steps: int,
        batch_size: int = 1,
        opens: Sequence[float] = (1 / 3, 2 / 3),
        seed: int = 0,
    ) -> "CurriculumSampler":
        """Return the order of a training: easy ones first, then medium ones too, then all.

        Args:
            num_steps: of the training.
            batch_size: examples of a step.
            opens: shares of the steps after which medium and hard examples join.

        Raises:
            RequestError: as `order`; or the steps, the batch size or the shares are none.
        """
        if num_steps < 1 or batch_size < 1:
            raise RequestError(
                f"num_steps = {num_steps}, batch_size = {batch_size}: both are at least 1."
            )
        if len(opens) != 2 or not 0 <= opens[0] <= opens[1] <= 1:
            raise RequestError(f"opens = {list(opens)}: two shares of the steps, in their order.")
        order = self.order(examples)
        # A phase without examples stands open at once, as there would be nothing to draw
        bounds = (*self.bounds(len(order)), len(order))
        starts = (0, *(round(share * num_steps) * batch_size for share in opens))
        return CurriculumSampler(
            torch.tensor(order),
            sizes={start: size for start, size in zip(starts, bounds, strict=True) if size},
            num_draws=num_steps * batch_size,
            seed=seed,
        )


class CurriculumSampler(Sampler[int]):
    """Places of examples, more of them open from one stage to the next; made by `sampler`.

    Within a stage each open example comes once before any comes again, in a random order of its
    own. What is drawn is a function of the seed and of how many were drawn, so that this number
    and the order of difficulty are all there is to save. A pass that was left goes on where it
    stood. Passes after the first have all examples open.

    A DataLoader with workers draws ahead of the training: go to `step × batch_size` then, with
    `load_state_dict(state | {"position": ...})`.

    Args:
        order: places of the examples from easy to hard, int64 [N].
        sizes: position from which on a stage holds → how many of the easiest are open in it.
        num_draws: in one pass.
        seed: of the orders within the stages.
    """

    def __init__(
        self, order: Tensor, *, sizes: Mapping[int, int], num_draws: int, seed: int
    ) -> None:
        self._order, self._num_draws, self._seed = order, num_draws, seed
        # The first stage that has any example begins at once
        self._starts = [0, *sorted(sizes)[1:]]
        self._sizes = [sizes[start] for start in sorted(sizes)]
        self._position = 0
        self._shuffled: tuple[tuple[int, int], Tensor] | None = None  # the last (stage, epoch)

    def __len__(self) -> int:
        return self._num_draws

    def __iter__(self) -> Iterator[int]:
        end = (self._position // self._num_draws + 1) * self._num_draws
        while self._position < end:
            stage = sum(start <= self._position for start in self._starts) - 1
            epoch, index = divmod(self._position - self._starts[stage], self._sizes[stage])
            if self._shuffled is None or self._shuffled[0] != (stage, epoch):
                own = derived_seed(self._seed, "curriculum", stage, epoch)
                generator = torch.Generator().manual_seed(own)
                places = torch.randperm(self._sizes[stage], generator=generator)
                self._shuffled = (stage, epoch), self._order[places]
            self._position += 1
            yield int(self._shuffled[1][index])

    def state_dict(self) -> dict[str, Any]:
        """Return the place in the order, and what is easy and hard."""
        return {
            "format_version": FORMAT_VERSION,
            "position": self._position,
            "order": self._order,
            "starts": list(self._starts),
            "sizes": list(self._sizes),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a saved place, in the saved order: a loss would sort otherwise by now.

        Raises:
            TritterError: it was saved with other examples or another course, or by a newer format.
        """
        course = (list(state["starts"]), list(state["sizes"]))
        if state["format_version"] > FORMAT_VERSION:
            raise TritterError(
                f"the saved curriculum is of format {state['format_version']}; {FORMAT_VERSION} "
                "is known."
            )
        if course != (self._starts, self._sizes) or len(state["order"]) != len(self._order):
            raise TritterError(
                f"the saved curriculum is one of {len(state['order'])} examples, of which "
                f"{course[1]} are open from {course[0]} draws on; this one has "
                f"{len(self._order)}, {self._sizes} from {self._starts} on."
            )
        self._order, self._position = state["order"].clone(), int(state["position"])
        self._shuffled = None
