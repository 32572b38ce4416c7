"""How hard an example is: its length, its loss under a model, or what somebody says of it."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tritter.data.records import DEFAULT_FIELD, PART_BREAK, WrongRecordError, text_of
from tritter.errors import Problem, RequestError, nearest

LENGTH, LOSS, DIFFICULTY = "length", "loss", "difficulty"
_TOKENS = "input_ids"

By = str | Callable[[Any], float] | Sequence[float] | Tensor
Model = Callable[..., Any]
Tokenizer = Callable[[str], Any]


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
            found: Iterable[Any] = (_length(*each, tokenizer) for each in enumerate(examples))
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
    return [_finite(place, value) for place, value in enumerate(found)]


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


def _finite(place: int, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError):
        number = math.nan
    if not math.isfinite(number):
        reason = f"that of example {place} is {value!r:.60}; a difficulty is a finite number"
        raise RequestError(Problem("difficulty", reason=reason))
    return number


def _length(place: int, example: Any, tokenizer: Tokenizer | None) -> int:
    if tokenizer is not None or _tokens(example) is not None:
        return len(_ids(place, example, tokenizer))
    return len(_text(place, example))


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
