"""The groups of methods: what a config selects, each a class of its own with its options."""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from typing import Any, TypeVar

from tritter.config.folders import body_of, option_files
from tritter.config.suggestions import child_names, hint_for, nearest_key
from tritter.errors import Problem, RequestError, key_name, nearest
from tritter.options import component_class, join, read_component, read_options
from tritter.targets import TARGET, Component, resolve
from tritter.training.options import REFUSED, trainer_parameters

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

    def component(
        self, key: str, kind: type[Any] | None, body: Mapping[str, object]
    ) -> Component | None:
        """Return a component; None when its class was not found, or there were problems."""
        if kind is None:
            return None
        return read_component(key, kind, body, problems=self.problems, unknown=self._unknown)

    def _unknown(self, key: str, value: object) -> Iterator[Problem]:
        if isinstance(value, Mapping) and value:
            for name in value:
                yield from self._unknown(join(key, str(name)), value[name])
            return
        section, _, leaf = key.rpartition(".")
        known = self._known_keys()
        if section == "trainer":
            further = (f"trainer.{name}" for name in trainer_parameters() if name not in REFUSED)
            known = (*known, *further)
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
# Likewise of groups of which one option is chosen, and what their option `none` means
CHOSEN_GROUPS = {
    "growth": ("tritter.growth.method.NeuronGrowth", "nothing grows"),
    "experts": ("tritter.experts.method.Experts", "there are no adapters"),
}
# What an expansion has, which is a record of its options and no subclass of anything.
_EXPANSION = (
    *("name", "expansion_type", "is_exact", "new_blocks_only"),
    *("target_config", "parameter_map", "notes"),
)


def method_names(group: str) -> list[str]:
    """Return the options of an ordered group, but for `none`."""
    return [name for name in option_files().get(group, {}) if name != "none"]


def weightless_methods() -> list[str]:
    """Return the methods against forgetting that use no weights; for messages."""
    found = []
    for name in method_names("forgetting"):
        with suppress(RequestError):  # told where it is selected
            body = body_of(option_files()["forgetting"][name])
            found += [] if method_class("forgetting", name, body).uses_weights else [name]
    return found


def method_keys() -> list[str]:
    """Return the dotted keys of all methods, as their files state them."""
    files = option_files()
    keys = [
        f"{group}.{name}.{key}"
        for group in METHOD_GROUPS
        for name, path in files.get(group, {}).items()
        for key in _own_body(name, body_of(path))
    ]
    keys += [
        f"{group}.{key}"
        for group in CHOSEN_GROUPS
        for path in files.get(group, {}).values()
        for key in body_of(path)
    ]
    return [key for key in dict.fromkeys(keys) if not key.endswith(TARGET)]


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
    place, target = f"{key}.{TARGET}", body.get(TARGET)
    if group == "expansion":
        kind = resolve(place, target)
        missing = [each for each in _EXPANSION if not hasattr(kind, each)]
        if isinstance(kind, type) and missing:
            reason = f"it is no expansion: it has no {', '.join(missing)}"
            raise RequestError(Problem(place, target, reason=reason))
    kind = component_class(key, target, base=METHOD_GROUPS[group])
    if kind.name != name:
        reason = f"the class calls itself {kind.name}, and its option {name}; let them be the same"
        raise RequestError(Problem(place, target, reason=reason))
    return kind


def chosen_class(group: str, body: Mapping[str, Any]) -> type[Any] | None:
    """Return the class that a group of one names; None where it is `none`.

    Raises:
        RequestError: it is none, or keys are set of what was not chosen.
    """
    if not body:
        return None
    base, nothing = CHOSEN_GROUPS[group]
    if TARGET in body:
        return component_class(group, body[TARGET], base=base)
    key, value = next(iter(body.items()))
    choice = next(name for name in option_files().get(group, {}) if name != "none")
    reason = f"{nothing} with {group}=none, which has no keys; choose {group}={choice}"
    raise RequestError(Problem(f"{group}.{key}", value, reason=reason))


def read_methods(
    reader: Reader, group: str, bodies: Mapping[str, Any], classes: Mapping[str, type[Any]]
) -> tuple[Component, ...]:
    """Return the methods of an ordered group whose classes were found and that can be read."""
    keys = {f"{group}.{name}": body for name, body in bodies.items()}
    read = [reader.component(key, classes.get(key), body) for key, body in keys.items()]
    return tuple(each for each in read if each is not None)


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
