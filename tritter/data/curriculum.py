"""Curriculum learning (Bengio et al. 2009): sort, group or sample examples by difficulty."""

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

_LENGTH, _LOSS, _DIFFICULTY = "length", "loss", "difficulty"
_TOKENS = "input_ids"

_By = str | Callable[[Any], float] | Sequence[float] | Tensor
_Model = Callable[..., Any]
_Tokenizer = Callable[[str], Any]
_FORMAT_VERSION = 1


def _value(example: Any, key: str) -> Any:
    return example.get(key) if isinstance(example, Mapping) else getattr(example, key, None)


def _required_value(index: int, example: Any, key: str) -> Any:
    """Return the value that an example has under a key."""
    value = _value(example, key)
    if value is None:
        if isinstance(example, Mapping):
            names = [str(name) for name in example]
        else:
            names = [f.name for f in fields(example)] if is_dataclass(example) else []
            names = names or list(getattr(example, "__dict__", {}))
        near = nearest(key, [_LENGTH, *names])
        reason = f"example {index} has no {key!r}; it has {', '.join(names) or 'no keys'}"
        advice = "loss needs a model and a tokenizer" if key == _LOSS else ""
        raise RequestError(Problem("difficulty", key, reason, advice, nearest=near))
    return value


def _losses(examples: Sequence[Any], model: _Model, tokenizer: _Tokenizer | None) -> list[float]:
    """Return the mean loss per token of each example, computed one by one in eval mode."""
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


def _ids(index: int, example: Any, tokenizer: _Tokenizer | None) -> Tensor:
    """Return the tokens of an example, int64 [T]."""
    tokens = _tokens(example)
    if tokens is None:
        if tokenizer is None:
            raise RequestError(
                f"example {index} has no {_TOKENS}; the loss of a text needs a tokenizer."
            )
        tokens = tokenizer(_text(index, example))[_TOKENS]
    return torch.as_tensor(tokens, dtype=torch.int64).flatten()


def _text(index: int, example: Any) -> str:
    """Return an example as one text, in the format of a corpus."""
    if isinstance(example, tuple | list) and example and all(isinstance(x, str) for x in example):
        return PART_BREAK.join(example)
    text = None if isinstance(example, Mapping) else getattr(example, DEFAULT_FIELD, None)
    try:
        return str(text_of(example if text is None else text, field=DEFAULT_FIELD))
    except WrongRecordError as error:
        advice = "set difficulty to a key of the examples, a function or a number per example"
        reason = f"example {index} {error}"
        raise RequestError(Problem("difficulty", _LENGTH, reason, advice)) from error


class Phases(NamedTuple):
    """Examples in three phases of difficulty, each list from easy to hard."""

    easy: list[Any]
    medium: list[Any]
    hard: list[Any]


class CurriculumLearning:
    """Orders examples by difficulty.

    Examples are texts, tuples of texts, objects with a `text`, or mappings with `input_ids`, a
    `text`, or a prompt and an answer under any field name that `data` accepts.

    Args:
        difficulty: the measure of difficulty:

            - `length`: number of tokens (from the tokenizer or `input_ids`), else of characters.
            - `loss`: mean nats per token under the model; without a model, the examples' `loss`.
            - another name: a key or attribute of the examples.
            - a function of an example, or a sequence with one number per example.
            - None: `difficulty` if any example has one, otherwise `length`.
        model: for `loss`, called as `model(input_ids=ids, labels=ids)` with ids int64 [1, T]; its
            output has a `loss`, as for models of transformers. Each call uses its current weights.
        tokenizer: for `loss`, and for `length` in tokens: maps a text to a mapping with
            `input_ids`, as in transformers.
        fractions: shares of easy, medium and hard examples.

    Raises:
        RequestError: `fractions` are not three numbers that add up to 1.
    """

    def __init__(
        self,
        difficulty: _By | None = None,
        *,
        model: _Model | None = None,
        tokenizer: _Tokenizer | None = None,
        fractions: Sequence[float] = (1 / 3, 1 / 3, 1 / 3),
    ) -> None:
        is_whole = isclose(sum(fractions), 1.0, abs_tol=1e-6)
        if len(fractions) != 3 or not is_whole or not min(fractions) >= 0:
            raise RequestError(
                f"fractions = {list(fractions)}: requires three numbers that add up to 1, for "
                "easy, medium and hard examples."
            )
        self._difficulty, self._model, self._tokenizer = difficulty, model, tokenizer
        self._fractions = tuple(fractions)

    def difficulties(self, examples: Sequence[Any]) -> list[float]:
        """Return the difficulty of each example; larger is harder.

        Raises:
            RequestError: there are no examples, or an example has no finite difficulty.
        """
        if not len(examples):
            raise RequestError("there are no examples.")
        by, model, tokenizer = self._difficulty, self._model, self._tokenizer
        if by is None:
            has_difficulty = any(_value(example, _DIFFICULTY) is not None for example in examples)
            by = _DIFFICULTY if has_difficulty else _LENGTH
        if isinstance(by, str):
            if by == _LENGTH:
                has_tokens = (
                    tokenizer is not None or _tokens(each) is not None for each in examples
                )
                found: Iterable[Any] = (
                    len(_ids(index, example, tokenizer) if is_counted else _text(index, example))
                    for (index, example), is_counted in zip(
                        enumerate(examples), has_tokens, strict=True
                    )
                )
            elif by == _LOSS and model is not None:
                found = _losses(examples, model, tokenizer)
            else:
                found = (_required_value(*each, by) for each in enumerate(examples))
        elif callable(by):
            found = map(by, examples)
        elif len(by) == len(examples):
            found = by
        else:
            raise RequestError(f"there are {len(by)} difficulties for {len(examples)} examples.")
        numbers = []
        for index, value in enumerate(found):
            try:
                number = float(value)
            except (TypeError, ValueError, RuntimeError):
                number = math.nan
            if not math.isfinite(number):
                reason = f"example {index} has the value {value!r:.60}; it must be a finite number"
                raise RequestError(Problem("difficulty", reason=reason))
            numbers.append(number)
        return numbers

    def order(self, examples: Sequence[Any]) -> list[int]:
        """Return the indices of the examples from easy to hard; ties keep their order.

        Raises:
            RequestError: as `difficulties`.
        """
        found = self.difficulties(examples)
        return sorted(range(len(found)), key=found.__getitem__)

    def sort_by_difficulty(self, examples: Sequence[Any]) -> list[Any]:
        """Return the examples from easy to hard; ties keep their order.

        Raises:
            RequestError: as `difficulties`.
        """
        return [examples[index] for index in self.order(examples)]

    def get_phases(self, examples: Sequence[Any]) -> Phases:
        """Return easy, medium and hard examples; each share is exact to within one example.

        Raises:
            RequestError: as `difficulties`.
        """
        ordered = self.sort_by_difficulty(examples)
        first, second = self.bounds(len(ordered))
        return Phases(ordered[:first], ordered[first:second], ordered[second:])

    def bounds(self, count: int) -> tuple[int, int]:
        """Return the number of easy examples, and the number of easy and medium examples."""
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
        """Return a sampler that draws easy examples first, then adds medium and hard ones.

        Args:
            examples: as for `order`.
            num_steps: optimizer steps of the training run.
            batch_size: examples per step.
            opens: shares of the steps after which medium and hard examples join.
            seed: seed of the shuffles.

        Raises:
            RequestError: as `difficulties`; or the steps, batch size or shares are out of range.
        """
        if any(type(number) is not int or number < 1 for number in (num_steps, batch_size)):
            reason = "must be whole numbers of at least 1"
            raise RequestError(f"num_steps = {num_steps}, batch_size = {batch_size}: {reason}.")
        if len(opens) != 2 or not 0 <= opens[0] <= opens[1] <= 1:
            raise RequestError(
                f"opens = {list(opens)}: requires two shares of the steps in ascending order."
            )
        order = self.order(examples)
        # A phase without examples is skipped: there is nothing to draw
        bounds = (*self.bounds(len(order)), len(order))
        starts = (0, *(round(share * num_steps) * batch_size for share in opens))
        return CurriculumSampler(
            torch.tensor(order),
            sizes={start: size for start, size in zip(starts, bounds, strict=True) if size},
            num_draws=num_steps * batch_size,
            seed=seed,
        )


class CurriculumSampler(Sampler[int]):
    """Draws indices of examples; each stage adds harder ones.

    `CurriculumLearning.sampler` creates it.

    A stage draws every available example once before it repeats any, in a random order. Draws
    depend only on the seed and the position, so the state is the position and the order of
    difficulty. An interrupted pass continues from its position. Later passes draw from all
    examples.

    A DataLoader with workers prefetches. To resume, set the position to `step × batch_size`:
    `load_state_dict(state | {"position": ...})`.

    Args:
        order: indices of the examples from easy to hard, int64 [N].
        sizes: first position of a stage → number of easiest examples available in it.
        num_draws: draws per pass.
        seed: seed of the shuffles within stages.
    """

    def __init__(
        self, order: Tensor, *, sizes: Mapping[int, int], num_draws: int, seed: int
    ) -> None:
        self._order, self._num_draws, self._seed = order, num_draws, seed
        # The first stage with examples starts at position 0
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
                shuffled = torch.randperm(self._sizes[stage], generator=generator)
                self._shuffled = (stage, epoch), self._order[shuffled]
            self._position += 1
            yield int(self._shuffled[1][index])

    def state_dict(self) -> dict[str, Any]:
        """Return the position, the order of difficulty and the stages."""
        return {
            "format_version": _FORMAT_VERSION,
            "position": self._position,
            "order": self._order,
            "starts": list(self._starts),
            "sizes": list(self._sizes),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a saved position and order; a loss may sort the examples differently by now."""
        course = (list(state["starts"]), list(state["sizes"]))
        if state["format_version"] > _FORMAT_VERSION:
            raise TritterError(
                f"the saved curriculum has format {state['format_version']}; this version of "
                f"Tritter reads {_FORMAT_VERSION}."
            )
        if course != (self._starts, self._sizes) or len(state["order"]) != len(self._order):
            raise TritterError(
                f"the saved curriculum has {len(state['order'])} examples, of which {course[1]} "
                f"are available after {course[0]} draws; this one has {len(self._order)}, of "
                f"which {self._sizes} are available after {self._starts}."
            )
        self._order, self._position = state["order"].clone(), int(state["position"])
        self._shuffled = None
