"""Readable errors: the key, the value, the allowed values and the nearest match."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from difflib import get_close_matches
from enum import Enum

_MAX_VALUE_CHARACTERS, _BRIEF_CHARACTERS = 500, 120


class _NoValue(Enum):
    """Sentinel of problems that have no value."""

    VALUE = "value"


@dataclass(frozen=True, slots=True)
class Names:
    """The way users set keys: by options of a command, or in a file.

    Args:
        name: returns the option that the user typed for a dotted key, or None if the key can't
            be set. Messages then omit advice on it.
        origin: returns the file of its value, with its place there, or None for the command line.
    """

    name: Callable[[str], str | None] = str
    origin: Callable[[str], str | None] = lambda key: None

    @classmethod
    def of(cls, names: Mapping[str, str | None]) -> "Names":
        """Return the names from a mapping; keys missing from it keep their own name."""
        return cls(lambda key: names.get(key, key))

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Name keys in the errors of a block as the user typed them."""
        token = _NAMES.set(self)
        try:
            yield
        finally:
            _NAMES.reset(token)


_NAMES = ContextVar("names", default=Names())  # noqa: B039 # it is frozen


def key_name(key: str) -> str:
    """Return the option that sets a dotted key."""
    return _NAMES.get().name(key) or key


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem of a request; `str` gives one line.

    Args:
        key: dotted key; empty if no key is to blame.
        value: the invalid value.
        reason: the allowed values, or why the value is invalid; without a full stop. Without a
            value it may be a sentence that begins with the key.
        advice: what to do instead; without a full stop.
        nearest: the closest valid key or value.
        origin: the file that sets the value; None for the command line.
        job: the job of a sweep.
        found_by: the validation pass that found it: targets, fields or rules.
    """

    key: str
    value: object = _NoValue.VALUE
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
        value = "" if self.value is _NoValue.VALUE else f" = {show(self.value)}"
        where = f" (in {origin})" if origin else ""
        near = key_name(self.nearest) if self.nearest else ""
        suggestion = f" Did you mean {near}?" if near else ""
        if " " in near:  # several words to copy: no question mark
            suggestion = f" Did you mean: {near}"
        if not value and reason.startswith(f"{self.key} "):  # a sentence about the key
            return f"{job}{key}{where}{reason[len(self.key) :]}{stop}{suggestion}"
        return f"{job}{key}{value}{where}: {reason}{stop}{suggestion}"


class TritterError(ValueError):
    """A command failed while it ran (exit code 1)."""


class RequestError(TritterError):
    """The request is invalid; nothing was written (exit code 2).

    Args:
        wrong: a problem, or a message.
        problems: the single problems, if `wrong` lists several.
    """

    def __init__(self, wrong: "Problem | str", *, problems: Iterable[Problem] = ()) -> None:
        super().__init__(str(wrong))
        alone = wrong if isinstance(wrong, Problem) else Problem("", reason=wrong)
        self.problems = tuple(problems) or (alone,)


def refused(key: str, value: object, reason: str, *, near: str | None = None) -> RequestError:
    """Return the error for one invalid value.

    Args:
        key: dotted key of the configuration.
        value: the invalid value.
        reason: the allowed values, or why the value is invalid; without a full stop.
        near: the closest valid value.
    """
    return RequestError(Problem(key, value, reason, nearest=near))


def refusal(problems: Collection[Problem]) -> RequestError:
    """Return one RequestError that lists all problems; there must be at least one."""
    if len(problems) == 1:
        return RequestError(next(iter(problems)))
    lines = "\n".join(f"  {problem}" for problem in problems)
    text = f"{len(problems)} things are wrong with the request:\n{lines}"
    return RequestError(text, problems=problems)


def raise_problems(problems: Collection[Problem]) -> None:
    """Raise one RequestError that lists all problems, if there are any."""
    if problems:
        raise refusal(problems)


def show(value: object) -> str:
    """Return a value in the syntax of the command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple):
        return "[" + ",".join(show(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{show(item)}" for key, item in value.items()) + "}"
    try:
        text = str(value)
    except ValueError:  # Python refuses to print integers of thousands of digits
        return brief(value)
    if len(text) > _MAX_VALUE_CHARACTERS:
        return f"{text[:_MAX_VALUE_CHARACTERS]}… ({len(text)} characters)"
    return text if text else "(empty)"


def brief(value: object) -> str:
    """Return the repr of a value in one line, truncated: it may be a megabyte long."""
    try:
        text = " ".join(line.strip() for line in repr(value).splitlines())
    except (ValueError, RecursionError):  # Python refuses to print huge integers
        return f"a {type(value).__name__} too large to show"
    return text if len(text) <= _BRIEF_CHARACTERS else f"{text[:_BRIEF_CHARACTERS]}…"


def shortened(names: Sequence[str]) -> str:
    """Return names in one line, only the first five of them if there are more."""
    shown, num_hidden = ", ".join(names[:5]), len(names) - 5
    return f"{shown}, … ({num_hidden} more)" if num_hidden > 0 else shown


def nearest(value: str, allowed: Iterable[str], *, cutoff: float = 0.5) -> str | None:
    """Return the allowed name closest to `value`, or one that it abbreviates; else None."""
    names = [str(name) for name in allowed]
    spellings = dict.fromkeys((str(value), str(value).lower()))
    matches = [m for v in spellings for m in get_close_matches(v, names, n=1, cutoff=cutoff)]
    return next(iter([*matches, *(n for n in names if is_short_for(str(value), n))]), None)


def is_short_for(word: str, name: str) -> bool:
    """Return True if a word abbreviates a name: its initials, or some of its parts."""
    parts = name.split("_")
    return word == "".join(part[:1] for part in parts) or set(word.split("_")) < set(parts)


def did_you_mean(value: str, allowed: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" (with its leading space), or "" if no name is close."""
    match = nearest(value, allowed)
    return f" Did you mean '{match}'?" if match else ""


@contextmanager
def panics_as_errors(what: str = "a library") -> Iterator[None]:
    """Raise a panic of a library in Rust, which is no Exception in Python, as an error.

    Args:
        what: its cause, for the message.
    """
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # each library has its own class
            raise
        raise TritterError(f"{what} failed: {' '.join(str(error).split())} (a panic)") from error
