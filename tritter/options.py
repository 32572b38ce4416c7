"""Options: typed records of a method or config section, and their validation.

A record is a frozen dataclass. The types of its fields state the allowed values:
`Annotated[float, Field(ge=0)]` of pydantic, `Literal["a", "b"]`, `tuple[int, ...]`, `X | None`.
Pydantic validates strictly and through JSON, so text never passes as a number. Its errors are
rewritten as `Problem`s.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar, dataclass_transform, get_args, get_type_hints

from pydantic import (
    BeforeValidator,
    Field,
    PlainValidator,
    TypeAdapter,
    ValidationError,
    WithJsonSchema,
)

from tritter.errors import Problem, RequestError, nearest, raise_problems
from tritter.limits import MAX_COUNT, parse_count
from tritter.targets import TARGET, Component, dotted, resolve, values_of

_Record = TypeVar("_Record")
_Unknown = Callable[[str, object], Iterator[Problem]]
_Json = Mapping[str, Any]

# Counts without a limit of their own stop at MAX_COUNT
Count = Annotated[int, Field(ge=1, le=MAX_COUNT)]
WholeNumber = Annotated[int, Field(ge=0, le=MAX_COUNT)]
Text = Annotated[str, Field(min_length=1)]
# Added to a type, accepts counts such as 2M
PARSED_COUNT = BeforeValidator(lambda v: (parse_count(v) if isinstance(v, str) else None) or v)

_CONFIG = {"extra": "forbid", "strict": True, "allow_inf_nan": False}
_UNREADABLE: dict[str, list[int]] = {"": []}  # stands for values outside JSON; no field accepts it
_NUMBER_LIMITS = {
    "minimum": "at least",
    "exclusiveMinimum": "above",
    "maximum": "at most",
    "exclusiveMaximum": "below",
}
_KINDS = {
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
    "string": "text",
    "null": "null",
}
_PLURALS = {"integer": "whole numbers", "number": "numbers", "boolean": "booleans"}
_T = TypeVar("_T")


@dataclass_transform(
    frozen_default=True, kw_only_default=True, field_specifiers=(dataclasses.field,)
)
def options(record: type[_Record]) -> type[_Record]:
    """Make a class a record of options: frozen, keyword-only, without unknown fields.

    Use it as a decorator instead of `dataclass`.
    """
    record.__pydantic_config__ = _CONFIG  # type: ignore[attr-defined]
    return dataclasses.dataclass(frozen=True, kw_only=True)(record)  # slots would break super()


def is_options(record: object) -> bool:
    """Return True if a class was decorated with `options`."""
    settings = getattr(record, "__pydantic_config__", {})
    is_own = "__dataclass_fields__" in getattr(record, "__dict__", {})
    return is_own and settings.get("extra") == "forbid"


def read_options(
    record: type[_Record],
    raw: Mapping[str, object],
    *,
    prefix: str,
    problems: list[Problem],
    unknown: _Unknown | None = None,
) -> _Record | None:
    """Return the record of plain values, or None if there are problems.

    Args:
        record: class made by `options`.
        raw: field → value.
        prefix: of the keys in messages.
        problems: receives one problem for each invalid key.
        unknown: yields the problems of an unknown key, from its dotted name and its value.
            Default: lists the fields of the record.

    Raises:
        pydantic.PydanticUserError: pydantic can't build a schema of the record.
    """
    adapter, schema = _reading(record)  # type: ignore[arg-type] # a class is hashable
    plain = {str(name): _plain(value, _field(schema, str(name))) for name, value in raw.items()}
    try:
        return adapter.validate_json(json.dumps(plain))
    except ValidationError as error:
        found = _problems_of(error, schema, raw, prefix, unknown or _unknown_by(schema, prefix))
        problems += found.values()
        return None


def component_class(key: str, target: object, *, base: str | None = None) -> type[Any]:
    """Return the class that a component names; it has a record of options or is one.

    Args:
        key: of the component.
        target: the value of its `_target_`.
        base: dotted name of the required base class.
    """
    key = f"{key}.{TARGET}"
    kind: type[Any] = resolve(key, target, base=base)
    if not is_options(getattr(kind, "Options", kind)):
        where = "its Options are" if hasattr(kind, "Options") else "it is"
        reason = f"{where} not a record of options (see tritter.options.options)"
        raise RequestError(Problem(key, target, reason=reason))
    for field in dataclasses.fields(getattr(kind, "Options", kind)):
        if isinstance(field.default, property) or callable(field.default):
            reason = f"its base class has a member {field.name}; rename the option"
            raise RequestError(Problem(key, target, reason=reason))
    return kind


def read_component(
    key: str,
    kind: type[Any],
    body: Mapping[str, object],
    *,
    problems: list[Problem],
    unknown: _Unknown | None = None,
) -> Component | None:
    """Return a component of a known class, or None if there are problems.

    Args:
        key: of the component.
        kind: its class.
        body: its section of the config.
        problems: receives one problem for each invalid key.
        unknown: see `read_options`.
    """
    values = {name: value for name, value in body.items() if name != TARGET}
    record = getattr(kind, "Options", kind)
    found = read_options(record, values, prefix=key, problems=problems, unknown=unknown)
    if found is None:
        return None
    return Component(name=str(getattr(kind, "name", None) or found.name), kind=kind, options=found)


def read_part(key: str, value: object, named: Mapping[str, type[_T]], *, base: type[Any]) -> _T:
    """Return the nested record of an option: a trigger, an initialiser, a detector.

    Args:
        key: of the option.
        value: a name, `{name: NAME, OPTION: VALUE}`, `{_target_: CLASS, OPTION: VALUE}` for a
            third-party class, or the record itself.
        named: name → class.
        base: base class of all of them, third-party classes included.
    """
    problems: list[Problem] = []
    if isinstance(value, base):
        raise_problems(checked(value, prefix=key))
        record: _T = value
        return record
    body = dict(value) if isinstance(value, Mapping) else {"name": value}
    if TARGET in body:
        kind = component_class(key, body.pop(TARGET), base=dotted(base))
    elif (name := body.pop("name", None)) in named:
        kind = named[str(name)]
    else:
        shown = value if name is None else name
        reason = f"allowed: {', '.join(named)}, {{name: NAME, KEY: VALUE}} or {{{TARGET}: CLASS}}"
        raise RequestError(Problem(key, shown, reason=reason, nearest=nearest(str(shown), named)))
    part = read_options(kind, body, prefix=key, problems=problems)
    raise_problems(problems)
    assert part is not None, "options without a problem make a record"
    return part


def part_field(key: str, named: Mapping[str, type[Any]], *, base: type[Any]) -> tuple[Any, ...]:
    """Return the annotations of a field that `read_part` parses."""
    reads = PlainValidator(lambda value: read_part(key, value, named, base=base))
    return reads, WithJsonSchema({})


def field_keys(record: type, prefix: str) -> tuple[str, ...]:
    """Return the dotted keys of a record."""
    return tuple(join(prefix, field.name) for field in dataclasses.fields(record))


def parse_word(record: type, name: str, word: object) -> object:
    """Return a command-line word parsed as the type of a field, or unchanged if that fails."""
    node = _field(_reading(record)[1], name) if is_options(record) else {}
    kinds = {one.get("type") for one in _variants(node)}
    if not isinstance(word, str) or not kinds & {"array", "integer", "number"}:
        return word
    if "boolean" in kinds and word in ("true", "false"):
        return word == "true"
    if word.startswith(("[[", '["')):
        with suppress(ValueError):
            return json.loads(word)
    return [_number(w) for w in word.strip("[]").split(",")] if "array" in kinds else _number(word)


def choices(record: type, name: str) -> tuple[str, ...]:
    """Return the strings that a `Literal` field allows."""
    hint = get_type_hints(record)[name]
    literals = [hint, *get_args(hint)]
    return tuple(c for part in literals for c in get_args(part) if isinstance(c, str))


def checked(record: object, *, prefix: str) -> list[Problem]:
    """Return the problems of a record that was built in Python."""
    assert dataclasses.is_dataclass(record) and not isinstance(record, type)
    problems: list[Problem] = []
    read_options(type(record), values_of(record), prefix=prefix, problems=problems)
    return problems


def join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def leaves(tree: object, prefix: str = "") -> dict[str, Any]:
    """Return dotted key → value of a nested mapping; an empty section counts as a value."""
    if not isinstance(tree, Mapping) or not tree:
        return {prefix: tree}
    return {k: v for name in tree for k, v in leaves(tree[name], join(prefix, str(name))).items()}


@cache
def _reading(record: type[Any]) -> tuple["TypeAdapter[Any]", _Json]:
    """Return the pydantic adapter of a record, and its JSON schema."""
    adapter: TypeAdapter[Any] = TypeAdapter(record)
    return adapter, adapter.json_schema()


def _number(word: str) -> int | float | str:
    for kind in (int, float):
        with suppress(ValueError):
            return kind(word)
    return word


def _field(schema: _Json, name: str) -> _Json:
    return schema.get("properties", {}).get(name, {})


def _variants(schema: _Json) -> list[_Json]:
    return schema.get("anyOf", [schema])


def _strings(schema: _Json) -> list[str]:
    """Return the strings that a field allows; empty if it allows other values too."""
    return [w for one in _variants(schema) for w in one.get("enum", [one.get("const")]) if w]


def _plain(value: object, schema: _Json) -> object:
    """Return a value as JSON, in the spelling of its field."""
    if isinstance(value, Mapping):
        return {str(name): _plain(item, {}) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, {}) for item in value]
    strings = _strings(schema)
    if isinstance(value, bool):
        # YAML reads a bare on, off or true as a boolean
        matches = [word for word in (("on", "true") if value else ("off",)) if word in strings]
        return matches[0] if matches else value
    if isinstance(value, str):
        if not value.isascii() and value != value.encode(errors="replace").decode():
            return _UNREADABLE
        spelled = {word.replace("-", "_"): word for word in strings}
        return spelled.get(value.replace("-", "_"), value)
    if isinstance(value, float):
        return int(value) if value.is_integer() else value
    if isinstance(value, int):  # Python refuses to print integers of thousands of digits
        return value if value.bit_length() <= 4096 else _UNREADABLE
    if isinstance(value, Path):
        return str(value)
    return value if value is None else _UNREADABLE


def _problems_of(
    error: ValidationError, schema: _Json, raw: Mapping[str, object], prefix: str, unknown: _Unknown
) -> dict[str, Problem]:
    """Return dotted key → problem; a list or mapping gets one problem as a whole."""
    found: dict[str, Problem] = {}
    for entry in error.errors(include_url=False):
        names, value, node = _locate(entry["loc"], schema, raw)
        key = ".".join(filter(None, [prefix, *names]))
        kind, last = entry["type"], str(entry["loc"][-1]) if entry["loc"] else ""
        cause = entry.get("ctx", {}).get("error")
        if kind == "unexpected_keyword_argument":
            problems = list(unknown(join(key, last), entry["input"]))
        elif kind == "missing":
            problems = [Problem(key, reason="it is missing; set every key of this option")]
        elif isinstance(cause, RequestError):
            problems = list(cause.problems)
        elif not names or isinstance(cause, Exception):
            problems = [Problem(key, reason=str(cause or entry["msg"]))]
        else:
            near = nearest(str(value), _strings(node)) if _strings(node) else None
            reason = f"must be {_allowed(node) or entry['msg'].removeprefix('Input should be ')}"
            problems = [Problem(key, value, reason=reason, nearest=near)]
        for problem in problems:
            found.setdefault(problem.key or str(problem), problem)
    return found


def _locate(
    location: tuple[int | str, ...], schema: _Json, raw: object
) -> tuple[list[str], object, _Json]:
    """Return the path of fields to a location, its value and its schema."""
    names: list[str] = []
    value, node, record = raw, schema, schema
    for name in map(str, location):
        if name not in record.get("properties", {}):
            break
        names.append(name)
        value = value.get(name) if isinstance(value, Mapping) else None
        node = _field(record, name)
        record = _inner(node, schema)
    return names, value, node


def _inner(node: _Json, schema: _Json) -> _Json:
    """Return the schema of the record in a field; empty if the field has none."""
    names = [one.get("$ref", "").rpartition("/")[2] for one in _variants(node)]
    return next((schema["$defs"][name] for name in names if name), {})


def _unknown_by(schema: _Json, prefix: str) -> _Unknown:
    def unknown(key: str, value: object) -> Iterator[Problem]:
        names = list(schema.get("properties", {}))
        reason = f"there is no such key; {prefix} has {', '.join(names)}"
        yield Problem(key, value, reason=reason, nearest=nearest(key.rpartition(".")[2], names))

    return unknown


def _allowed(schema: _Json) -> str:
    """Return a description of the values that a field allows; empty if the schema has none."""
    parts = [_allowed_by(one) for one in _variants(schema)]
    return "" if not all(parts) else ", or ".join(parts)


def _allowed_by(schema: _Json) -> str:
    strings = _strings(schema)
    if strings:
        return ("one of " if len(strings) > 1 else "") + ", ".join(map(str, strings))
    kind = schema.get("type", "")
    if kind == "array":
        items = schema.get("items", {})
        plural = _PLURALS.get(items.get("type", ""), "strings")
        return f"a list of {plural}{_limits(items)}, as in [a,b]"
    if kind == "object" and isinstance(items := schema.get("additionalProperties"), Mapping):
        plural = _PLURALS.get(items.get("type", ""), "strings")
        return f"a mapping of names to {plural}{_limits(items)}, as in {{a:1}}"
    hint = " (quote numbers)" if kind == "string" else ""
    return f"{_KINDS[kind]}{_limits(schema)}{hint}" if kind in _KINDS else ""


def _limits(schema: _Json) -> str:
    parts = [f"{word} {schema[name]}" for name, word in _NUMBER_LIMITS.items() if name in schema]
    return " " + " and ".join(parts) if parts else ""


class RunRequest:
    """The sections of a run that validation rules read, as in `RunConfig`.

    A rule is skipped if a section that it reads is invalid itself.
    """

    __slots__ = ()

    adaptation: Any
    callbacks: Any
    control: Any
    data: Any
    expansion: Any
    experts: Any
    evaluation: Any
    forgetting: Any
    gate: Any
    growth: Any
    metrics: Any
    model: Any
    moe_routing: Any
    optimizer: Any
    pipeline: Any
    fallbacks: Any
    text: Any
    trainer: Any
    training: Any

    def with_sections(self, **sections: Any) -> Self:
        """Return a copy of the run with sections replaced."""
        return dataclasses.replace(self, **sections)  # type: ignore[type-var] # of a dataclass

    def methods(self) -> Iterator[tuple[str, Component]]:
        """Yield group and component of everything that acts in the training of the run."""
        for group in ("growth", "experts", "forgetting"):
            chosen = getattr(self, group)
            for one in chosen if isinstance(chosen, tuple) else (chosen,):
                if one is not None:
                    yield group, one


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """The models of a run.

    Args:
        source: initial `Model`.
        trained: trained `Model`s, the smallest first.
        folder: checkpoint of the initial model; None if it is not local, or if the run makes it.
    """

    source: Any
    trained: tuple[Any, ...]
    folder: Path | None = None


def nearest_multiples(value: int, divisor: int) -> str:
    """Return the multiples of a number around a value as text: "6 or 8"."""
    below, above = value // divisor * divisor, -(-value // divisor) * divisor
    return f"{below} or {above}" if below else str(above)
