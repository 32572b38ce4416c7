"""From plain values to records: what is wrong is collected, and what was meant is offered."""

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, TypeVar

from tritter.config.suggestions import child_names, hint_for, nearest_key
from tritter.errors import Problem, RequestError, nearest
from tritter.options import join, read_options

Origin = Callable[[str], str | None]
Answer = TypeVar("Answer")
_KEYLESS_GROUPS = ("experiment",)  # what they choose sets keys of other groups

# Of a key or of a whole group, refused with its new name for one version: old → new
RENAMED = {
    "routing": "moe_routing",
    "logger.project": "logger.wandb.project",
    "logger.group": "logger.wandb.group",
    "logger.tags": "logger.wandb.tags",
    "optimizer.beta1": "optimizer.betas",
    "optimizer.beta2": "optimizer.betas",
}


class Reader:
    """Turns mappings into records and collects every problem on the way.

    Args:
        known_keys: returns all dotted keys of a config, from which nearest matches are offered.
    """

    def __init__(self, known_keys: Callable[[], Collection[str]]) -> None:
        self.problems: list[Problem] = []
        self._known_keys = known_keys

    def report(self, key: str, value: object, *, reason: str) -> None:
        self.problems.append(Problem(key, value, reason=reason))

    def report_unknown(self, key: str, value: object) -> None:
        """Report a key without a place; of a whole unknown section, each key in it."""
        self.problems += self._unknown(key, value)

    def ask(self, question: Callable[..., Answer], *words: Any) -> Answer | None:
        """Return what a function says, or None when it refuses (now reported)."""
        try:
            return question(*words)
        except RequestError as error:
            self.problems += error.problems
            return None

    def read(self, record_type: type, raw: Mapping[str, object], *, prefix: str) -> Any:
        """Return a `record_type` from `raw`, or None when there were problems (now reported)."""
        return read_options(
            record_type, raw, prefix=prefix, problems=self.problems, unknown=self._unknown
        )

    def _unknown(self, key: str, value: object) -> Iterator[Problem]:
        if isinstance(value, Mapping) and value:
            for name in value:
                yield from self._unknown(join(key, str(name)), value[name])
            return
        if (now := new_name(key)) is not None:
            yield Problem(key, value, reason=f"it is called {now} now")
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
        if (hint := hint_for(key, value)) is not None:
            yield Problem(key, value, reason=hint.reason or reason, nearest=hint.advice or None)
            return
        yield Problem(key, value, reason=reason, nearest=near or nearest_key(key, known))


def new_name(key: str) -> str | None:
    """Return what a dotted key is called now, by itself or by the group that it stands in."""
    for old in sorted(RENAMED, key=len, reverse=True):
        if f"{key}.".startswith(f"{old}."):
            return RENAMED[old] + key[len(old) :]
    return None
