"""Errors that a person reads: the key, the value, what is allowed and a nearest match."""

from collections.abc import Iterable
from difflib import get_close_matches


class TritterError(ValueError):
    """Something failed while it was being done (exit code 1)."""


class RequestError(TritterError):
    """The request itself is wrong; nothing was written (exit code 2)."""


def brief(value: object, *, num_characters: int = 120) -> str:
    """Return a value as it was given, or its beginning: what is wrong may be a megabyte long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # numbers of thousands of digits have no text
        return f"a {type(value).__name__} too large to be shown"
    return text if len(text) <= num_characters else f"{text[:num_characters]}…"


def nearest(value: str, allowed: Iterable[str], *, cutoff: float = 0.5) -> str | None:
    """Return the allowed word that is most like `value`, or None when none is close."""
    matches = get_close_matches(str(value), [str(word) for word in allowed], n=1, cutoff=cutoff)
    return matches[0] if matches else None


def did_you_mean(value: str, allowed: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" (with its leading space), or nothing when no word is close."""
    match = nearest(value, allowed)
    return f" Did you mean '{match}'?" if match else ""
