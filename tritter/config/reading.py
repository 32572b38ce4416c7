"""From plain values to records: what is wrong is collected, and what was meant is offered."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from tritter.config.renamed import new_name
from tritter.config.suggestions import child_names, nearest_key
from tritter.errors import Problem, nearest
from tritter.options import join, read_options

Origin = Callable[[str], str | None]
_KEYLESS_GROUPS = ("experiment",)  # what they choose sets keys of other groups


class Reader:
    """Turns mappings into records and collects every problem on the way.

    Args:
        known_keys: returns all dotted keys of a config, from which nearest matches are offered.
        origin: tells which file a dotted key came from, if any.
    """

    def __init__(
        self, known_keys: Callable[[], Collection[str]], *, origin: Origin | None = None
    ) -> None:
        self.problems: list[Problem] = []
        self._known_keys = known_keys
        self._origin = origin or (lambda key: None)

    def report(self, key: str, value: object, *, reason: str, nearest: str | None = None) -> None:
        origin = self._origin(key)
        self.problems.append(Problem(key, value, reason=reason, nearest=nearest, origin=origin))

    def report_unknown(self, key: str, value: object) -> None:
        """Report a key without a place; of a whole unknown section, each key in it."""
        self.problems += self._unknown(key, value)

    def add(self, problems: Iterable[Problem]) -> None:
        """Take over problems, each with the file that it comes from."""
        self.problems += [replace(p, origin=p.origin or self._origin(p.key)) for p in problems]

    def read(self, record_type: type, raw: object, *, prefix: str) -> Any:
        """Return a `record_type` from `raw`, or None when there were problems (now reported)."""
        if not isinstance(raw, Mapping):
            self.report(prefix, raw, reason="it holds keys; choose an option of it")
            return None
        found: list[Problem] = []
        record = read_options(
            record_type, raw, prefix=prefix, problems=found, unknown=self._unknown
        )
        self.add(found)
        return record

    def _unknown(self, key: str, value: object) -> Iterator[Problem]:
        if isinstance(value, Mapping) and value:
            for name in value:
                yield from self._unknown(join(key, str(name)), value[name])
            return
        origin = self._origin(key)
        if (now := new_name(key)) is not None:
            yield Problem(key, value, reason=f"it is called {now} now", origin=origin)
            return
        section, _, leaf = key.rpartition(".")
        known = self._known_keys()
        names = child_names(known, section)
        near = None
        if not section:
            names = sorted([*names, *_KEYLESS_GROUPS])
            near = nearest(leaf, names, cutoff=0.7)
        place = f"{section} has" if section else "the root has"
        reason = f"there is no such key; {place} {', '.join(names)}" if names else "no such key"
        near = near or nearest_key(key, known)
        yield Problem(key, value, reason=reason, nearest=near, origin=origin)
