"""From the words of `tritter expand` to expansions: which option belongs to which method."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from tritter.cli.method_options import method_bodies, method_options
from tritter.cli.values import spelled
from tritter.config.selection import Reader, Selected, method_class, read_methods
from tritter.errors import (
    Problem,
    RequestError,
    TritterError,
    did_you_mean,
    nearest,
    raise_problems,
)
from tritter.expansion import ExpansionSpec
from tritter.options import from_word

Name = TypeVar("Name", bound=str)


def method_names(words: Sequence[str]) -> tuple[str, ...]:
    """Return the methods named by `--method`, in order.

    Raises:
        RequestError: one does not exist; names those that do.
    """
    names = [name.strip().replace("-", "_") for word in words for name in word.split(",")]
    for name in names:
        if name not in method_bodies():
            shown, allowed = spelled(name) or "(empty)", [*map(spelled, method_bodies())]
            raise RequestError(
                f"--method = {shown}: there are {', '.join(allowed)}; several are joined by "
                f"commas.{did_you_mean(shown, allowed)}"
            )
    return tuple(names)


def specs_of(methods: Sequence[str], given: Mapping[str, Any]) -> tuple[ExpansionSpec, ...]:
    """Return the expansions that methods and options describe.

    Args:
        given: option → what was typed.

    Raises:
        RequestError: an option that no method takes, or that several would; a value that is not
            allowed. All problems at once.
    """
    problems = []
    fields: dict[str, dict[str, Any]] = {name: {} for name in methods}
    for option in given:
        takers = method_options()[option]
        taking = [name for name in methods if name in takers]
        if len(taking) == 1:
            fields[taking[0]][takers[taking[0]]] = given[option]
        else:
            problems.append(_misplaced(option, given[option], methods=methods, taking=taking))
    raise_problems(problems)
    reader = Reader(tuple)
    selected = [one for name in methods for one in _selected(reader, name, fields[name])]
    with in_options():
        raise_problems(reader.problems)
    return tuple(one.options for one in selected)


def choice(option: str, word: str, allowed: Sequence[Name]) -> Name:
    """Return the allowed word that an option's value spells, with - or _.

    Raises:
        RequestError: it is none of them.
    """
    for name in allowed:
        if name == word.replace("-", "_"):
            return name
    shown = [spelled(name) for name in allowed]
    reason = f"allowed is one of {', '.join(shown)}"
    raise RequestError(
        Problem(f"--{option}", word, reason=reason, nearest=nearest(spelled(word), shown))
    )


@contextmanager
def in_options() -> Iterator[None]:
    """Let refusals speak of the options that were typed, not of configuration keys."""
    try:
        yield
    except RequestError as error:
        raise RequestError(_with_options(str(error))) from error


@contextmanager
def damage_is_a_wrong_request() -> Iterator[None]:
    """Refuse a checkpoint that cannot be opened as what it is: the wrong thing to ask for."""
    try:
        yield
    except TritterError as error:
        raise RequestError(_with_options(str(error))) from error


def _misplaced(
    option: str, value: Any, *, methods: Sequence[str], taking: Sequence[str]
) -> Problem:
    key = f"--{spelled(option)}"
    if taking:
        reason = (
            f"{_listed(taking)} would {'both' if len(taking) == 2 else 'all'} take it; expand in "
            "commands of their own to say which"
        )
    else:
        takers = list(method_options()[option])
        reason = (
            f"--method {','.join(map(spelled, methods))} does not take it; {_listed(takers)} "
            f"{'does' if len(takers) == 1 else 'do'}"
        )
    return Problem(key, value, reason=reason)


def _listed(names: Sequence[str]) -> str:
    """Return `dus, stack and llama-pro` for these names."""
    *others, last = map(spelled, names)
    return f"{', '.join(others)} and {last}" if others else last


def _selected(reader: Reader, name: str, typed: Mapping[str, Any]) -> tuple[Selected, ...]:
    """Read a method's options as a configuration's are read, defaults filled in."""
    body = method_bodies()[name]
    record = method_class("expansion", name, {name: body})
    values = {key: from_word(record, key, word) for key, word in typed.items()}
    classes = {f"expansion.{name}": record}
    return read_methods(reader, "expansion", {name: {**body, **values}}, classes)


def _with_options(text: str) -> str:
    """Return a refusal whose keys, and whose advice on keys and methods, are spelled as options.

    A refusal names its keys in full once; advice after it (`use init=net2net`) leaves the method
    out and means the one that was named.
    """
    by_field = {
        (method, field): f"--{spelled(option)}"
        for option, takers in method_options().items()
        for method, field in takers.items()
    }
    named = re.search(r"\bexpansion\.(\w+)", text)
    methods = method_bodies()

    def of_key(key: re.Match[str]) -> str:
        return by_field.get((key["method"], key["field"]), key[0])

    def of_advice(advice: re.Match[str]) -> str:
        key, sign, value = advice["key"], advice["sign"], advice["value"]
        if key == "expansion" and value in methods:
            return f"--method{sign}{spelled(value)}"
        option = by_field.get((named[1], key)) if named else None
        return f"{option}{sign}{value}" if option else advice[0]

    advice = r"(?<![\w.-])(?P<key>[a-z]\w*)(?P<sign>=| = )(?P<value>\w+)"
    text = re.sub(advice, of_advice, text)
    text = re.sub(r"\bexpansion\.(?P<method>\w+)\.(?P<field>\w+)", of_key, text)
    return re.sub(r"^(checkpoint|target_params|dtype)\b", lambda key: f"--{spelled(key[0])}", text)
