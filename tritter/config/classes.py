"""The first pass over a config: each class that it names is found, and fits its place."""

from collections.abc import Iterator, Mapping
from typing import Any

from tritter.config.experts import experts_class
from tritter.config.growth import growth_class
from tritter.config.named import BASES, named_class
from tritter.config.optimizers import optimizer_class
from tritter.config.reading import Reader
from tritter.config.schema import ONE_OF, SECTIONS
from tritter.config.sections import data_class, model_class
from tritter.config.selection import METHOD_GROUPS, method_class
from tritter.options import leaves

Bodies = Mapping[str, Mapping[str, Any]]  # group → its body

_OF_ONE = {
    "model": model_class,
    "data": data_class,
    "optimizer": optimizer_class,
    "growth": growth_class,
    "experts": experts_class,
}
_OPTIONAL = ONE_OF  # absent: nothing is chosen
_OF_SEVERAL = {**dict.fromkeys(METHOD_GROUPS, method_class), **dict.fromkeys(BASES, named_class)}
_NOTHING = {"logger": "csv"}  # what stands for nothing in a group of several; else none


def group_bodies(reader: Reader, raw: Mapping[str, Any]) -> Bodies:
    """Return the body of each group, without what stands for nothing and what is switched off."""
    bodies = {}
    for group in (*SECTIONS, "optimizer", *_OPTIONAL, *_OF_SEVERAL):
        body = raw.get(group)
        if body is None and group in (*_OF_SEVERAL, *_OPTIONAL):
            body = {}
        if not isinstance(body, Mapping):
            reader.report(group, body, reason="it holds keys; choose an option of it")
        elif group in _OF_SEVERAL:
            bodies[group] = _several(reader, group, body)
        else:
            bodies[group] = body
    return bodies


def find_classes(reader: Reader, bodies: Bodies) -> dict[str, Any]:
    """Return key → class of those that are found; what is wrong with others is reported.

    A key is that of a group, or of an entry of a group of several.
    """
    found = {key: reader.ask(*question) for key, question in _questions(bodies)}
    return {key: kind for key, kind in found.items() if kind is not None}


def _questions(bodies: Bodies) -> Iterator[tuple[str, tuple[Any, ...]]]:
    for group, body in bodies.items():
        if group in _OF_ONE:
            yield group, (_OF_ONE[group], body)
        for name in body if group in _OF_SEVERAL else ():
            if f"{group}.{name}" != "logger.wandb":
                yield f"{group}.{name}", (_OF_SEVERAL[group], group, name, body)


def _several(reader: Reader, group: str, body: Mapping[str, Any]) -> Mapping[str, Any]:
    nothing, names = _NOTHING.get(group, "none"), [str(name) for name in body]
    # One more callback by its key stands beside the option none, which nobody typed
    if group in METHOD_GROUPS and nothing in names and len(names) > 1:
        reader.report(group, names, reason="none stands alone; leave it out of the list")
    if given := body.get(nothing):
        for key, value in leaves(given, f"{group}.{nothing}").items():
            reader.report(key, value, reason=f"{nothing} has no keys")
    switched_off = [name for name in body if body[name] is None and group in BASES]
    return {str(n): each for n, each in body.items() if n not in (nothing, *switched_off)}
