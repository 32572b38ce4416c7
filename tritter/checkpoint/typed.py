"""Records read from JSON that anybody may have written: every field of its type, and in range.

What a field takes follows from its annotation and its name: a `..._hash` or `..._digest` is
SHA-256 in hexadecimal, `..._digests` maps names to such, `..._path` is one name of a file.
"""

import math
import re
import types
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from tritter.errors import TritterError, brief
from tritter.limits import MAX_COUNT, MAX_LAYERS

_SHA256 = re.compile(r"[0-9a-f]{64}")
_LONGEST_TEXT = 4096
_MOST_ENTRIES = 2**20
_LARGEST = {"seed": 2**64 - 1, "layer_sources": MAX_LAYERS - 1}  # derived seeds have 64 bits


class _WrongValue(Exception):
    """A value is not what its field takes; the text says what that is."""


def read_record(record_type: Any, plain: object, *, origin: str, key: str = "") -> Any:
    """Return a record of dataclasses from plain values; keys that have a default may be missing.

    Args:
        origin: the file, for messages.
        key: where in the file the record stands.

    Raises:
        TritterError: names the field, what it holds and what is allowed.
    """
    if not isinstance(plain, Mapping):
        raise _refusal(origin, key or "the file", plain, "an object")
    known = {field.name: field for field in fields(record_type)}
    unknown = [str(name) for name in plain if name not in known]
    if unknown:
        raise TritterError(
            f"{origin} is not a lineage: {_inside(key, unknown[0][:60])} is unknown; it has: "
            f"{', '.join(known)}."
        )
    missing = [name for name, field in known.items() if name not in plain and _is_required(field)]
    if missing:
        raise TritterError(
            f"{origin} is not a lineage: {', '.join(_inside(key, name) for name in missing)} "
            f"{'is' if len(missing) == 1 else 'are'} missing."
        )
    hints = get_type_hints(record_type)
    values = {}
    for name, value in plain.items():
        place = _inside(key, name)
        try:
            values[name] = _value(name, value, hints[name], origin=origin, key=place)
        except _WrongValue as error:
            raise _refusal(origin, place, value, str(error)) from error
    return record_type(**values)


def _inside(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


def _is_required(field: "Field[Any]") -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def _refusal(origin: str, key: str, value: object, allowed: str) -> TritterError:
    return TritterError(f"{origin} is not a lineage: {key} = {brief(value)}; allowed is {allowed}.")


def _value(name: str, value: object, hint: Any, *, origin: str, key: str) -> Any:
    if get_origin(hint) in (Union, types.UnionType):
        kinds = [kind for kind in get_args(hint) if kind is not types.NoneType]
        if value is None and len(kinds) < len(get_args(hint)):
            return None
        (hint,) = kinds
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise _WrongValue(f"one of {', '.join(map(repr, get_args(hint)))}")
        return value
    if get_origin(hint) is tuple:
        return _entries(name, value, get_args(hint)[0], origin=origin, key=key)
    if get_origin(hint) is Mapping:
        return _mapping(name, value, get_args(hint)[1])
    return _scalar(name, value, hint)


def _entries(name: str, value: object, hint: Any, *, origin: str, key: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple) or len(value) > MAX_LAYERS:
        raise _WrongValue(f"a list of at most {MAX_LAYERS:,} entries")
    if is_dataclass(hint):
        return tuple(
            read_record(hint, entry, origin=origin, key=f"{key}.{number}")
            for number, entry in enumerate(value)
        )
    return tuple(_scalar(name, entry, hint) for entry in value)


def _mapping(name: str, value: object, hint: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping) or len(value) > _MOST_ENTRIES:
        raise _WrongValue(f"an object of at most {_MOST_ENTRIES:,} entries")
    if hint is Any:
        return value
    if name.endswith("file_digests"):
        for file in value:
            _require_inner_name(file)
    return {entry: _scalar(name, item, hint) for entry, item in value.items()}


def _require_inner_name(file: str) -> None:
    parts = file.split("/")
    if "\0" in file or len(file) > _LONGEST_TEXT or not all(parts) or {".", ".."} & set(parts):
        raise _WrongValue("names of files inside the folder")


def _scalar(name: str, value: object, hint: Any) -> Any:
    if hint is bool:
        if not isinstance(value, bool):
            raise _WrongValue("true or false")
        return value
    if hint is str:
        return _text(name, value)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        most = _LARGEST.get(name, MAX_COUNT)
        if not is_number or not isinstance(value, int) or not 0 <= value <= most:
            raise _WrongValue(f"a whole number from 0 to {most}")
        return value
    assert hint is float, f"{name} is of a kind that no file is read for: {hint}"
    # A whole number may be larger than any float
    if not is_number or not -1e300 < value < 1e300 or not math.isfinite(value):  # type: ignore[operator,arg-type]
        raise _WrongValue("a finite number")
    return value


def _text(name: str, value: object) -> str:
    if not isinstance(value, str) or len(value) > _LONGEST_TEXT or "\0" in value:
        raise _WrongValue(f"text of at most {_LONGEST_TEXT:,} characters")
    is_digest = name.endswith(("_hash", "_digest", "_digests"))
    if is_digest and not _SHA256.fullmatch(value):
        raise _WrongValue("SHA-256 in hexadecimal")
    return value
