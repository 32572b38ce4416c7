"""Which key was probably meant."""

from collections.abc import Collection
from difflib import get_close_matches

from tritter.errors import is_short_for

_OF_SOME_RUNS = ("experts", "growth")  # whose keys are meant least


def child_names(keys: Collection[str], section: str) -> list[str]:
    """Return the words that may follow `section`, or stand at the root when it is empty."""
    start = f"{section}." if section else ""
    return sorted({key[len(start) :].split(".")[0] for key in keys if key.startswith(start)})


def nearest_key(key: str, known: Collection[str], *, first: Collection[str] = ()) -> str | None:
    """Return the known dotted key that `key` most likely means.

    The same last word counts most (`learning_rate` → `training.learning_rate`), then a similar
    word in the same place, then what the word is short for (`lr`), then a similar key anywhere.
    Each is looked for among `first`, then in the section of `key` and below it, then anywhere.
    """
    section, _, leaf = key.rpartition(".")
    by_length = sorted(known, key=lambda k: (_is_of_some_runs(k), len(k), k))
    inside = [other for other in by_length if section and other.startswith(f"{section}.")]
    leaves = {other: other.rpartition(".")[2] for other in by_length}
    ordered = ([other for other in by_length if other in first], inside, by_length)
    for places in ordered:
        same_leaf = [other for other in places if leaves[other] == leaf]
        usual = [other for other in same_leaf if not _is_of_some_runs(other)]
        if same_leaf := usual or same_leaf:
            return (get_close_matches(key, same_leaf, n=1, cutoff=0.0) or same_leaf)[0]
    siblings = {leaves[o]: o for o in by_length if o.rpartition(".")[0] == section}
    matches = get_close_matches(leaf, siblings, n=1, cutoff=0.6)
    if matches:
        return siblings[matches[0]]
    for places in ordered:
        longer = [other for other in places if is_short_for(leaf, leaves[other])]
        if longer:
            return longer[0]
    matches = get_close_matches(key, by_length, n=1, cutoff=0.5)
    return matches[0] if matches else None


def _is_of_some_runs(key: str) -> bool:
    return key.partition(".")[0] in _OF_SOME_RUNS
