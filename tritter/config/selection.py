"""The ordered groups: which methods a config selects, each a class of its own with its options."""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from tritter.config.folders import body_of, option_files
from tritter.config.suggestions import child_names, hint_for, nearest_key
from tritter.errors import Problem, RequestError, key_name, nearest
from tritter.options import is_options, join, read_options
from tritter.targets import TARGET, resolve

Origin = Callable[[str], str | None]
Answer = TypeVar("Answer")
_KEYLESS_GROUPS = ("experiment",)  # what they choose sets keys of other groups


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
        section, _, leaf = key.rpartition(".")
        known = self._known_keys()
        names = child_names(known, section)
        near = None
        if not section:
            names = sorted([*names, *_KEYLESS_GROUPS])
            near = nearest(leaf, names, cutoff=0.7)
        place = f"{key_name(section)} has" if section else "the root has"
        reason = f"there is no such key; {place} {', '.join(names)}" if names else "no such key"
        if (hint := hint_for(key, value)) is not None:
            yield Problem(key, value, reason=hint.reason or reason, nearest=hint.advice or None)
            return
        yield Problem(key, value, reason=reason, nearest=near or nearest_key(key, known))


# Group → what its classes have to be subclasses of, by name: importing it is left to a selection.
METHOD_GROUPS: Mapping[str, str | None] = {
    "expansion": None,
    "forgetting": "tritter.training.forgetting_method.ForgettingMethod",
}
# What an expansion has, which is a record of its options and no subclass of anything.
_EXPANSION = (
    *("name", "expansion_type", "is_exact", "new_blocks_only"),
    *("target_config", "parameter_map", "notes"),
)


@dataclass(frozen=True, slots=True)
class Selected:
    """One method of a run: the class that an option names, and what is asked of it."""

    kind: type[Any]
    options: Any

    @property
    def name(self) -> str:
        return self.kind.name

    def plain(self) -> dict[str, Any]:
        """Return the options as plain values."""
        return {field.name: getattr(self.options, field.name) for field in fields(self.options)}


def method_names(group: str) -> list[str]:
    """Return the options of an ordered group, but for `none`."""
    return [name for name in option_files().get(group, {}) if name != "none"]


def method_keys() -> list[str]:
    """Return the dotted keys of all methods, as their files state them."""
    files = option_files()
    return [
        f"{group}.{name}.{key}"
        for group in METHOD_GROUPS
        for name, path in files.get(group, {}).items()
        for key in _own_body(name, body_of(path))
        if key != TARGET
    ]


def method_class(group: str, name: str, bodies: Mapping[str, Any]) -> type[Any]:
    """Return the class that an entry of an ordered group names.

    Raises:
        RequestError: there is no such method, or it names no class of one.
    """
    key, body = f"{group}.{name}", bodies[name]
    if name not in method_names(group):
        raise RequestError(_no_method(group, name, bodies))
    if not isinstance(body, Mapping):
        raise RequestError(Problem(key, body, reason="it holds keys; choose an option of it"))
    kind: type[Any] = resolve(f"{key}.{TARGET}", body.get(TARGET), base=METHOD_GROUPS[group])
    if (reason := _unfit(group, name, kind, _record(group, kind))) is not None:
        raise RequestError(Problem(f"{key}.{TARGET}", body[TARGET], reason=reason))
    return kind


def read_methods(
    reader: Reader, group: str, bodies: Mapping[str, Any], classes: Mapping[str, type[Any]]
) -> tuple[Selected, ...]:
    """Return the methods of an ordered group whose classes were found and that can be read."""
    selected = []
    for name, raw in bodies.items():
        if (kind := classes.get(f"{group}.{name}")) is not None:
            body = {word: value for word, value in raw.items() if word != TARGET}
            options = reader.read(_record(group, kind), body, prefix=f"{group}.{name}")
            selected += [] if options is None else [Selected(kind, options)]
    return tuple(selected)


def _record(group: str, kind: type[Any]) -> Any:
    """Return the record of a method's options; an expansion is one itself."""
    return kind if group == "expansion" else getattr(kind, "Options", None)


def _unfit(group: str, name: str, kind: Any, record: Any) -> str | None:
    """Return why a class can't be a method of a group; None when it can."""
    if group == "expansion" and isinstance(kind, type):
        missing = [each for each in _EXPANSION if not hasattr(kind, each)]
        if missing:
            return f"it is no expansion: it has no {', '.join(missing)}"
    if not isinstance(record, type) or not is_options(record):
        where = "it is" if group == "expansion" else "its Options are"
        return f"{where} no record of options (see tritter.options.options)"
    if kind.name != name:
        return f"the class calls itself {kind.name}, and its option {name}; let them be the same"
    return None


def _own_body(name: str, body: Mapping[str, object]) -> Mapping[str, object]:
    """Return what an option of an ordered group nests under its own name."""
    own = body.get(name)
    return own if isinstance(own, Mapping) else {}


def nesting_problems() -> list[Problem]:
    """Return which option files of the ordered groups hold something else than their own body."""
    files = option_files()
    return [
        Problem(
            f"{group}={name}",
            list(body_of(path)),
            reason=f"{path} nests its keys under {name}, its own name, and nothing else",
        )
        for group in METHOD_GROUPS
        for name, path in files.get(group, {}).items()
        if list(body_of(path)) != [name]
    ]


def _no_method(group: str, name: str, bodies: Mapping[str, Any]) -> Problem:
    """Say what stands where methods stand: a misspelt one, or a method's key without it."""
    names = method_names(group)
    key, value = f"{group}.{name}", bodies[name]
    near = nearest(name, names)
    if near is not None or isinstance(value, Mapping):
        reason = f"there is no such method; there are {', '.join(names)}"
        return Problem(key, value, reason=reason, nearest=near)
    keys = [each for each in method_keys() if each.startswith(f"{group}.")]
    chosen = [each for each in keys if each.split(".")[1] in bodies]
    reason = f"a key stands below its method, {group}.METHOD.{name}; methods are {', '.join(names)}"
    return Problem(key, value, reason=reason, nearest=nearest_key(key, keys, first=chosen))
