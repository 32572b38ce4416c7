"""Errors that a person reads: the key, the value, what is allowed and a nearest match."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from difflib import get_close_matches
from enum import Enum

_LONGEST_VALUE = 500


class NoValue(Enum):
    """Stands where a problem is about no value."""

    VALUE = "value"


@dataclass(frozen=True, slots=True)
class Names:
    """How a person sets keys: by options of a command, or in a file.

    Args:
        name: returns what was typed in the place of a dotted key; None: there is no way to set
            it, and advice on it is left out.
        origin: returns the file and line of its value; None: the command line.
    """

    name: Callable[[str], str | None] = str
    origin: Callable[[str], str | None] = lambda key: None

    @classmethod
    def of(cls, names: Mapping[str, str | None]) -> "Names":
        """Return names of some keys; others have their own name."""
        return cls(lambda key: names.get(key, key))


_NAMES = ContextVar("names", default=Names())  # noqa: B039 # it is frozen


@contextmanager
def naming(names: Names) -> Iterator[None]:
    """Let errors of a block call keys as a person typed them."""
    token = _NAMES.set(names)
    try:
        yield
    finally:
        _NAMES.reset(token)


def key_name(key: str) -> str:
    """Return what a person types to set a dotted key."""
    return _NAMES.get().name(key) or key


def setting(key: str, value: object) -> str:
    """Return what a person types to set a dotted key to a value."""
    return f"{key_name(key)}={show(value)}"


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong with a request; as text, one line.

    Args:
        key: dotted, as it is set; empty where none is to blame.
        reason: what is allowed, or why the value can't be; without a full stop. Without a
            value it may be a sentence that begins with the key.
        advice: what to do instead; without a full stop.
        nearest: what was probably meant.
        origin: the file that the value stands in; None for the command line.
        job: which job of a sweep it is about.
        found_by: the pass over a request that found it: of targets, of fields, of rules.
    """

    key: str
    value: object = NoValue.VALUE
    reason: str = ""
    advice: str = ""
    nearest: str | None = None
    origin: str | None = None
    job: str | None = None
    found_by: int = 1

    def __str__(self) -> str:
        names = _NAMES.get()
        can_be_set = names.name(self.key) is not None
        job = f"{self.job}: " if self.job else ""
        reason = f"{self.reason}; {self.advice}" if self.advice and can_be_set else self.reason
        stop = "" if reason.endswith((".", "?")) else "."
        if not self.key or not can_be_set:
            return f"{job}{reason}{stop if self.key else ''}"
        key, origin = key_name(self.key), self.origin or names.origin(self.key)
        value = "" if self.value is NoValue.VALUE else f" = {show(self.value)}"
        where = f" (in {origin})" if origin else ""
        near = key_name(self.nearest) if self.nearest else ""
        suggestion = f" Did you mean {near}?" if near else ""
        if " " in near:  # words to be copied, without a question mark
            suggestion = f" Did you mean: {near}"
        if not value and reason.startswith(f"{self.key} "):  # a sentence about the key
            return f"{job}{key}{where}{reason[len(self.key) :]}{stop}{suggestion}"
        return f"{job}{key}{value}{where}: {reason}{stop}{suggestion}"


class TritterError(ValueError):
    """Something failed while it was being done (exit code 1)."""


class RequestError(TritterError):
    """The request itself is wrong; nothing was written (exit code 2).

    Args:
        wrong: a problem, or a text.
        problems: each thing alone, where `wrong` lists several.
    """

    def __init__(self, wrong: "Problem | str", *, problems: Iterable[Problem] = ()) -> None:
        super().__init__(str(wrong))
        alone = wrong if isinstance(wrong, Problem) else Problem("", reason=wrong)
        self.problems = tuple(problems) or (alone,)


def refused(key: str, value: object, reason: str, *, near: str | None = None) -> RequestError:
    """Return the refusal of one value.

    Args:
        key: dotted, as it is set in a configuration.
        reason: what is allowed, or why the value can't be; without a full stop.
        near: what was probably meant.
    """
    return RequestError(Problem(key, value, reason, nearest=near))


def refusal(problems: Collection[Problem]) -> RequestError:
    """Return one RequestError that lists all problems, of which there is at least one."""
    if len(problems) == 1:
        return RequestError(next(iter(problems)))
    lines = "\n".join(f"  {problem}" for problem in problems)
    text = f"{len(problems)} things are wrong with the request:\n{lines}"
    return RequestError(text, problems=problems)


def raise_problems(problems: Collection[Problem]) -> None:
    """Raise one RequestError that lists all problems, or return when there are none."""
    if problems:
        raise refusal(problems)


def show(value: object) -> str:
    """Return a value as a person would type it on the command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple):
        return "[" + ",".join(show(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{show(item)}" for key, item in value.items()) + "}"
    try:
        text = str(value)
    except ValueError:  # numbers of thousands of digits have no text
        return brief(value)
    if len(text) > _LONGEST_VALUE:
        return f"{text[:_LONGEST_VALUE]}… ({len(text)} characters)"
    return text if text else "(empty)"


def brief(value: object, *, num_characters: int = 120) -> str:
    """Return a value as it was given, or its beginning: what is wrong may be a megabyte long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # numbers of thousands of digits have no text
        return f"a {type(value).__name__} too large to be shown"
    return text if len(text) <= num_characters else f"{text[:num_characters]}…"


def nearest(value: str, allowed: Iterable[str], *, cutoff: float = 0.5) -> str | None:
    """Return the allowed word that is most like `value`, or that it is short for; else None."""
    words = [str(word) for word in allowed]
    matches = get_close_matches(str(value), words, n=1, cutoff=cutoff)
    return next(iter([*matches, *(w for w in words if is_short_for(str(value), w))]), None)


def is_short_for(word: str, name: str) -> bool:
    """Say whether a word is made of initials of a name, or of some of its words."""
    words = name.split("_")
    return word == "".join(part[:1] for part in words) or set(word.split("_")) < set(words)


def did_you_mean(value: str, allowed: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" (with its leading space), or nothing when no word is close."""
    match = nearest(value, allowed)
    return f" Did you mean '{match}'?" if match else ""
