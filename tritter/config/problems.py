"""What is wrong with a request, said the same way everywhere: key, value, allowed, nearest."""

from collections.abc import Callable, Collection
from difflib import get_close_matches

from tritter.errors import RequestError, brief

_LONGEST_VALUE = 500
Origin = Callable[[str], str | None]


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


def nearest_key(key: str, known: Collection[str], *, first: Collection[str] = ()) -> str | None:
    """Return the known dotted key that `key` most likely means.

    The same last word counts most (`learning_rate` → `training.learning_rate`), then a similar
    word in the same place, then what the word is short for (`lr`), then a similar key anywhere.
    Each is looked for among `first`, then in the section of `key` and below it, then anywhere.
    """
    section, _, leaf = key.rpartition(".")
    by_length = sorted(known, key=lambda other: (len(other), other))
    inside = [other for other in by_length if section and other.startswith(f"{section}.")]
    leaves = {other: other.rpartition(".")[2] for other in by_length}
    ordered = ([other for other in by_length if other in first], inside, by_length)
    for places in ordered:
        same_leaf = [other for other in places if leaves[other] == leaf]
        if same_leaf:
            return (get_close_matches(key, same_leaf, n=1, cutoff=0.0) or same_leaf)[0]
    siblings = {leaves[o]: o for o in by_length if o.rpartition(".")[0] == section}
    matches = get_close_matches(leaf, siblings, n=1, cutoff=0.6)
    if matches:
        return siblings[matches[0]]
    for places in ordered:
        longer = [other for other in places if _is_short_for(leaf, leaves[other])]
        if longer:
            return longer[0]
    matches = get_close_matches(key, by_length, n=1, cutoff=0.5)
    return matches[0] if matches else None


def _is_short_for(word: str, name: str) -> bool:
    """Say whether a word is made of initials of a name, or of some of its words."""
    words = name.split("_")
    return word == "".join(part[:1] for part in words) or set(word.split("_")) < set(words)


def describe(
    key: str,
    value: object,
    *,
    reason: str,
    nearest: str | None = None,
    origin: str | None = None,
) -> str:
    """Return one problem as one line."""
    where = f" (in {origin})" if origin else ""
    suggestion = f" Did you mean {nearest}?" if nearest else ""
    return f"{key} = {show(value)}{where}: {reason}.{suggestion}"


def raise_problems(problems: Collection[str]) -> None:
    """Raise one RequestError that lists all problems, or return when there are none."""
    if not problems:
        return
    if len(problems) == 1:
        raise RequestError(next(iter(problems)))
    lines = "\n".join(f"  {problem}" for problem in problems)
    raise RequestError(f"{len(problems)} things are wrong with the request:\n{lines}")
