"""From plain values to a dataclass: every key known, every value of its type and in its limits."""

import dataclasses
import math
import sys
import types
from collections.abc import Collection, Mapping
from typing import Any, Union, get_args, get_origin, get_type_hints

from tritter.config.problems import Origin, describe, nearest_key
from tritter.errors import RequestError, nearest
from tritter.limits import MAX_COUNT

_KIND_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
_PLURALS = {int: "whole numbers", float: "numbers", bool: "booleans", str: "words"}
_KEYLESS_GROUPS = ("experiment",)  # what they choose sets keys of other groups


class _WrongValue(Exception):
    """The value has not the type, or not the limits, of its field."""


class Reader:
    """Turns mappings into records and collects every problem on the way.

    Args:
        known_keys: all dotted keys of a config, from which nearest matches are offered.
        origin: tells which file a dotted key came from, if any.
    """

    def __init__(self, known_keys: Collection[str], *, origin: Origin | None = None) -> None:
        self.problems: list[str] = []
        self._known_keys = known_keys
        self._origin = origin or (lambda key: None)

    def report(self, key: str, value: object, *, reason: str, nearest: str | None = None) -> None:
        self.problems.append(
            describe(key, value, reason=reason, nearest=nearest, origin=self._origin(key))
        )

    def report_unknown(self, key: str, value: object) -> None:
        """Report a key without a place; of a whole unknown section, each key in it."""
        if isinstance(value, Mapping) and value:
            for name in value:
                self.report_unknown(join(key, str(name)), value[name])
            return
        section, _, leaf = key.rpartition(".")
        names = child_names(self._known_keys, section)
        near = None
        if not section:
            names = sorted([*names, *_KEYLESS_GROUPS])
            near = nearest(leaf, names, cutoff=0.7)
        place = f"{section} has" if section else "the root has"
        reason = f"there is no such key; {place} {', '.join(names)}" if names else "no such key"
        near = near or nearest_key(key, self._known_keys)
        self.report(key, value, reason=reason, nearest=near)

    def read(self, record_type: type, raw: object, *, prefix: str) -> Any:
        """Return a `record_type` from `raw`, or None when there were problems (now reported)."""
        if not isinstance(raw, Mapping):
            self.report(prefix, raw, reason="it holds keys; choose an option of it")
            return None
        count = len(self.problems)
        fields = {field.name: field for field in dataclasses.fields(record_type)}
        for name in raw:
            if name not in fields:
                self.report_unknown(join(prefix, str(name)), raw[name])
        hints = get_type_hints(record_type)
        values = {
            name: self._read_field(field, hints[name], raw, prefix=prefix)
            for name, field in fields.items()
        }
        if len(self.problems) > count:
            return None
        try:
            return record_type(**values)
        except RequestError as error:
            self.problems.append(str(error))
            return None

    def _read_field(
        self,
        field: "dataclasses.Field[Any]",
        hint: object,
        raw: Mapping[str, object],
        *,
        prefix: str,
    ) -> object:
        key = join(prefix, field.name)
        if field.name not in raw:
            self.problems.append(f"{key} is missing: its option file states every key.")
            return None
        value = raw[field.name]
        try:
            return _convert(value, hint, field.metadata)
        except _WrongValue:
            choices = field.metadata.get("choices", ())
            self.report(
                key,
                value,
                reason=f"allowed is {allowed(hint, field.metadata)}",
                nearest=nearest(str(value), choices) if choices else None,
            )
            return None


def join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def child_names(keys: Collection[str], section: str) -> list[str]:
    """Return the words that may follow `section`, or stand at the root when it is empty."""
    start = f"{section}." if section else ""
    return sorted({key[len(start) :].split(".")[0] for key in keys if key.startswith(start)})


def field_keys(record_type: type, prefix: str) -> tuple[str, ...]:
    """Return the dotted keys of a record."""
    return tuple(join(prefix, field.name) for field in dataclasses.fields(record_type))


def allowed(hint: object, metadata: Mapping[str, Any]) -> str:
    """Say in words what a field takes."""
    kind, is_optional = _split_optional(hint)
    ending = ", or null" if is_optional else ""
    choices = metadata.get("choices")
    if choices:
        return ("one of " if len(choices) > 1 else "") + ", ".join(map(str, choices)) + ending
    if get_origin(kind) is tuple:
        item = get_args(kind)[0]
        return f"a list of {_PLURALS[item]}{_limits(metadata)}, as in [a,b]{ending}"
    if get_origin(kind) is Mapping:
        item = get_args(kind)[1]
        return f"a mapping of names to {_PLURALS[item]}{_limits(metadata)}, as in {{a:1}}{ending}"
    hint_for_text = " (quote what looks like a number)" if kind is str else ""
    limits = _limits(_with_largest_count(kind, metadata))
    return f"{_KIND_NAMES[kind]}{limits}{hint_for_text}{ending}"


def _with_largest_count(kind: type, metadata: Mapping[str, Any]) -> Mapping[str, Any]:
    """Let whole numbers that state no limit of their own end at the largest count."""
    return {"maximum": MAX_COUNT, **metadata} if kind is int else metadata


def _limits(metadata: Mapping[str, Any]) -> str:
    words = {"minimum": "at least", "above": "above", "maximum": "at most", "below": "below"}
    parts = [f"{words[name]} {metadata[name]}" for name in words if name in metadata]
    return " " + " and ".join(parts) if parts else ""


def _split_optional(hint: object) -> tuple[Any, bool]:
    if get_origin(hint) in (Union, types.UnionType):
        kinds = [kind for kind in get_args(hint) if kind is not types.NoneType]
        assert len(kinds) == 1, f"a field is of one type, or that and None: {hint}"
        return kinds[0], True
    return hint, False


def _convert(value: object, hint: object, metadata: Mapping[str, Any]) -> object:
    kind, is_optional = _split_optional(hint)
    if value is None:
        if is_optional:
            return None
        raise _WrongValue
    if get_origin(kind) is tuple:
        if not isinstance(value, list | tuple):
            raise _WrongValue
        return tuple(_convert(item, get_args(kind)[0], metadata) for item in value)
    if get_origin(kind) is Mapping:
        if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
            raise _WrongValue
        return {name: _convert(item, get_args(kind)[1], metadata) for name, item in value.items()}
    if "choices" in metadata:
        return _choose(value, metadata["choices"])
    converted = _scalar(value, kind)
    if isinstance(converted, int | float) and not isinstance(converted, bool):
        _check_limits(converted, _with_largest_count(kind, metadata))
    return converted


def _choose(value: object, choices: tuple[str, ...]) -> str:
    # YAML reads a bare on, off or true as a boolean
    if isinstance(value, bool) and "off" in choices:
        value = "on" if value else "off"
    elif value is True and "true" in choices:
        value = "true"
    by_spelling = {choice.replace("-", "_"): choice for choice in choices}
    spelling = str(value).replace("-", "_")
    if not isinstance(value, str) or spelling not in by_spelling:
        raise _WrongValue
    return by_spelling[spelling]


def _scalar(value: object, kind: type) -> object:
    if kind is bool or isinstance(value, bool):
        if kind is bool and isinstance(value, bool):
            return value
        raise _WrongValue
    if kind is int and isinstance(value, int | float):
        if isinstance(value, float) and not value.is_integer():
            raise _WrongValue
        return int(value)
    if kind is float and isinstance(value, int | float):
        # Whole numbers may be larger than any float
        if abs(value) > sys.float_info.max or not math.isfinite(value):
            raise _WrongValue
        return float(value)
    if kind is str and isinstance(value, str) and value:
        return value
    raise _WrongValue


def _check_limits(value: float, metadata: Mapping[str, Any]) -> None:
    if (
        value < metadata.get("minimum", -math.inf)
        or value > metadata.get("maximum", math.inf)
        or value <= metadata.get("above", -math.inf)
        or value >= metadata.get("below", math.inf)
    ):
        raise _WrongValue
