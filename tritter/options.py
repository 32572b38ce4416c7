"""Options: records of what may be asked of a method or of a section, and how values become them.

A record is a frozen dataclass. Its fields say what a value may be: `Annotated[float, Field(ge=0)]`
of pydantic, `Literal["a", "b"]`, `tuple[int, ...]`, `X | None`. Pydantic judges, strictly and
through JSON, so that text is never taken for a number; what it finds is said in our words.
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
from tritter.targets import TARGET, Component, dotted, resolve

Record = TypeVar("Record")
Unknown = Callable[[str, object], Iterator[Problem]]
Schema = Mapping[str, Any]

# What has no limit of its own ends at the largest count
Count = Annotated[int, Field(ge=1, le=MAX_COUNT)]
WholeNumber = Annotated[int, Field(ge=0, le=MAX_COUNT)]
Text = Annotated[str, Field(min_length=1)]
# Beside a type: a count may be written as 2M
IN_WORDS = BeforeValidator(lambda v: (parse_count(v) if isinstance(v, str) else None) or v)

_CONFIG = {"extra": "forbid", "strict": True, "allow_inf_nan": False}
_UNREADABLE: dict[str, list[int]] = {"": []}  # what JSON can't hold, and no field takes
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


@dataclass_transform(
    frozen_default=True, kw_only_default=True, field_specifiers=(dataclasses.field,)
)
def options(record: type[Record]) -> type[Record]:
    """Make a class a record of options: frozen, by keyword only, refusing what it has no field for.

    As a decorator, in the place of `dataclass`.
    """
    record.__pydantic_config__ = _CONFIG  # type: ignore[attr-defined]
    return dataclasses.dataclass(frozen=True, slots=True, kw_only=True)(record)


def is_options(record: object) -> bool:
    """Say whether a class is a record that refuses unknown keys, as `options` makes them."""
    settings = getattr(record, "__pydantic_config__", {})
    is_own = "__dataclass_fields__" in getattr(record, "__dict__", {})
    return is_own and settings.get("extra") == "forbid"


def read_options(
    record: type[Record],
    raw: Mapping[str, object],
    *,
    prefix: str,
    problems: list[Problem],
    unknown: Unknown | None = None,
) -> Record | None:
    """Return a record of plain values, or None when there were problems.

    Args:
        record: made by `options`.
        raw: field → value.
        prefix: of the keys in messages.
        problems: gets one for each key that is wrong.
        unknown: describes a key that there is not, given its dotted name and its value; default:
            by the fields of the record.

    Raises:
        pydantic.PydanticUserError: the record itself can't be read by.
    """
    adapter, schema = _reading(record)  # type: ignore[arg-type] # a class is hashable
    plain = {str(name): _plain(value, _field(schema, str(name))) for name, value in raw.items()}
    try:
        return adapter.validate_json(json.dumps(plain))
    except ValidationError as error:
        found = _judged(error, schema, raw, prefix, unknown or _unknown_by(schema, prefix))
        problems += found.values()
        return None


def component_class(key: str, target: object, *, base: str | None = None) -> type[Any]:
    """Return the class that a component names, which has a record of options or is one.

    Args:
        key: of the component.
        target: the value of its `_target_`.
        base: dotted name of the class that it has to be a subclass of.

    Raises:
        RequestError: there is no such class, or it has no such record.
    """
    key = f"{key}.{TARGET}"
    kind: type[Any] = resolve(key, target, base=base)
    if not is_options(getattr(kind, "Options", kind)):
        where = "its Options are" if hasattr(kind, "Options") else "it is"
        reason = f"{where} no record of options (see tritter.options.options)"
        raise RequestError(Problem(key, target, reason=reason))
    return kind


def read_component(
    key: str,
    kind: type[Any],
    body: Mapping[str, object],
    *,
    problems: list[Problem],
    unknown: Unknown | None = None,
) -> Component | None:
    """Return a component whose class was found, or None when there were problems.

    Args:
        key: of the component.
        body: what the config holds below the key.
        problems: gets one for each key that is wrong; `unknown` as in `read_options`.
    """
    values = {name: value for name, value in body.items() if name != TARGET}
    record = getattr(kind, "Options", kind)
    found = read_options(record, values, prefix=key, problems=problems, unknown=unknown)
    if found is None:
        return None
    return Component(name=str(getattr(kind, "name", None) or found.name), kind=kind, options=found)


Part = TypeVar("Part")


def read_part(key: str, value: object, named: Mapping[str, type[Part]], *, base: type[Any]) -> Part:
    """Return the record that an option holds: a trigger, an initialiser, a detector.

    Args:
        key: of the option.
        value: a name, `{name: NAME, OPTION: VALUE}`, `{_target_: CLASS, OPTION: VALUE}` of a class
            from outside, or the record itself.
        named: name → class.
        base: of all of them, and of classes from outside.

    Raises:
        RequestError: it is none of these, or an option is wrong.
    """
    problems: list[Problem] = []
    if isinstance(value, base):
        raise_problems(checked(value, prefix=key))
        made: Part = value
        return made
    body = dict(value) if isinstance(value, Mapping) else {"name": value}
    if TARGET in body:
        kind = component_class(key, body.pop(TARGET), base=dotted(base))
    elif (name := body.pop("name", None)) in named:
        kind = named[str(name)]
    else:
        said = value if name is None else name
        reason = f"allowed is one of {', '.join(named)}, or {{{TARGET}: CLASS}} of your own"
        raise RequestError(Problem(key, said, reason=reason, nearest=nearest(str(said), named)))
    part = read_options(kind, body, prefix=key, problems=problems)
    raise_problems(problems)
    assert part is not None, "options without a problem make a record"
    return part


def part_field(key: str, named: Mapping[str, type[Any]], *, base: type[Any]) -> tuple[Any, ...]:
    """Return the annotations of a field that `read_part` reads; see there."""
    reads = PlainValidator(lambda value: read_part(key, value, named, base=base))
    return reads, WithJsonSchema({})


def field_keys(record: type, prefix: str) -> tuple[str, ...]:
    """Return the dotted keys of a record."""
    return tuple(join(prefix, field.name) for field in dataclasses.fields(record))


def from_word(record: type, name: str, word: object) -> object:
    """Return what a word of a command line means for a field; one that means nothing stays."""
    node = _field(_reading(record)[1], name) if is_options(record) else {}
    kinds = {one.get("type") for one in _variants(node)}
    if not isinstance(word, str) or not kinds & {"array", "integer", "number"}:
        return word
    return [_number(w) for w in word.strip("[]").split(",")] if "array" in kinds else _number(word)


def choices(record: type, name: str) -> tuple[str, ...]:
    """Return the words that a field of `Literal` takes, None left out."""
    hint = get_type_hints(record)[name]
    literals = [hint, *get_args(hint)]
    return tuple(c for part in literals for c in get_args(part) if isinstance(c, str))


def checked(given: object, *, prefix: str) -> list[Problem]:
    """Return what is wrong with the values of a record that a program made."""
    assert dataclasses.is_dataclass(given) and not isinstance(given, type)
    values = {field.name: getattr(given, field.name) for field in dataclasses.fields(given)}
    problems: list[Problem] = []
    read_options(type(given), values, prefix=prefix, problems=problems)
    return problems


def join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def leaves(tree: object, prefix: str = "") -> dict[str, Any]:
    """Return dotted key, below the prefix → value; an empty section is a value."""
    if not isinstance(tree, Mapping) or not tree:
        return {prefix: tree}
    return {k: v for name in tree for k, v in leaves(tree[name], join(prefix, str(name))).items()}


@cache
def _reading(record: type[Any]) -> tuple["TypeAdapter[Any]", Schema]:
    """Return what reads a record, and its schema, made once."""
    adapter: TypeAdapter[Any] = TypeAdapter(record)
    return adapter, adapter.json_schema()


def _number(word: str) -> int | float | str:
    for kind in (int, float):
        with suppress(ValueError):
            return kind(word)
    return word


def _field(schema: Schema, name: str) -> Schema:
    return schema.get("properties", {}).get(name, {})


def _variants(schema: Schema) -> list[Schema]:
    return schema.get("anyOf", [schema])


def _words(schema: Schema) -> list[str]:
    """Return the words that a field takes; none where it takes more than words."""
    return [w for one in _variants(schema) for w in one.get("enum", [one.get("const")]) if w]


def _plain(value: object, schema: Schema) -> object:
    """Return a value as JSON holds it, in the spelling of its field."""
    if isinstance(value, Mapping):
        return {str(name): _plain(item, {}) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, {}) for item in value]
    words = _words(schema)
    if isinstance(value, bool):
        # YAML reads a bare on, off or true as a boolean
        spoken = [word for word in (("on", "true") if value else ("off",)) if word in words]
        return spoken[0] if spoken else value
    if isinstance(value, str):
        if not value.isascii() and value != value.encode(errors="replace").decode():
            return _UNREADABLE
        spelled = {word.replace("-", "_"): word for word in words}
        return spelled.get(value.replace("-", "_"), value)
    if isinstance(value, float):
        return int(value) if value.is_integer() else value
    if isinstance(value, int):  # Python has no text for numbers of thousands of digits
        return value if value.bit_length() <= 4096 else _UNREADABLE
    if isinstance(value, Path):
        return str(value)
    return value if value is None else _UNREADABLE


def _judged(
    error: ValidationError, schema: Schema, raw: Mapping[str, object], prefix: str, unknown: Unknown
) -> dict[str, Problem]:
    """Return dotted key → what is wrong there; a list or a mapping is judged as a whole."""
    found: dict[str, Problem] = {}
    for entry in error.errors(include_url=False):
        names, value, node = _place(entry["loc"], schema, raw)
        key = ".".join(filter(None, [prefix, *names]))
        kind, last = entry["type"], str(entry["loc"][-1]) if entry["loc"] else ""
        cause = entry.get("ctx", {}).get("error")
        if kind == "unexpected_keyword_argument":
            told = list(unknown(join(key, last), entry["input"]))
        elif kind == "missing":
            told = [Problem(key, reason="it is missing; an option states every key")]
        elif isinstance(cause, RequestError):
            told = list(cause.problems)
        elif not names or isinstance(cause, Exception):
            told = [Problem(key, reason=str(cause or entry["msg"]))]
        else:
            near = nearest(str(value), _words(node)) if _words(node) else None
            reason = f"allowed is {_allowed(node) or entry['msg'].removeprefix('Input should be ')}"
            told = [Problem(key, value, reason=reason, nearest=near)]
        for problem in told:
            found.setdefault(problem.key or str(problem), problem)
    return found


def _place(
    location: tuple[int | str, ...], schema: Schema, raw: object
) -> tuple[list[str], object, Schema]:
    """Return the fields that lead to a place, from record to record; what it holds, and may."""
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


def _inner(node: Schema, schema: Schema) -> Schema:
    """Return the record that a field holds; an empty one where it holds none."""
    names = [one.get("$ref", "").rpartition("/")[2] for one in _variants(node)]
    return next((schema["$defs"][name] for name in names if name), {})


def _unknown_by(schema: Schema, prefix: str) -> Unknown:
    def unknown(key: str, value: object) -> Iterator[Problem]:
        names = list(schema.get("properties", {}))
        reason = f"there is no such key; {prefix} has {', '.join(names)}"
        yield Problem(key, value, reason=reason, nearest=nearest(key.rpartition(".")[2], names))

    return unknown


def _allowed(schema: Schema) -> str:
    """Say in words what a field takes; empty where the schema has none for it."""
    words = [_allowed_by(one) for one in _variants(schema)]
    return "" if not all(words) else ", or ".join(words)


def _allowed_by(schema: Schema) -> str:
    words = _words(schema)
    if words:
        return ("one of " if len(words) > 1 else "") + ", ".join(map(str, words))
    kind = schema.get("type", "")
    if kind == "array":
        items = schema.get("items", {})
        plural = _PLURALS.get(items.get("type", ""), "words")
        return f"a list of {plural}{_limits(items)}, as in [a,b]"
    if kind == "object" and isinstance(items := schema.get("additionalProperties"), Mapping):
        plural = _PLURALS.get(items.get("type", ""), "words")
        return f"a mapping of names to {plural}{_limits(items)}, as in {{a:1}}"
    hint = " (quote what looks like a number)" if kind == "string" else ""
    return f"{_KINDS[kind]}{_limits(schema)}{hint}" if kind in _KINDS else ""


def _limits(schema: Schema) -> str:
    parts = [f"{word} {schema[name]}" for name, word in _NUMBER_LIMITS.items() if name in schema]
    return " " + " and ".join(parts) if parts else ""


class RunRequest:
    """What the rules of a feature read of a run: its sections, as `RunConfig` holds them.

    A rule that reads a section which is wrong by itself is not asked.
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
    model: Any
    moe_routing: Any
    optimizer: Any
    pipeline: Any
    fallbacks: Any
    text: Any
    trainer: Any
    training: Any

    def with_sections(self, **sections: Any) -> Self:
        """Return the run with other sections."""
        return dataclasses.replace(self, **sections)  # type: ignore[type-var] # of a dataclass


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """The models of a run, as far as their configs say.

    Args:
        source: config.json of the model that the run starts from.
        trained: config.json of the models that are trained, the smallest first.
        folder: of the checkpoint that the run starts from; None: it is not at hand, or made by
            the run.
    """

    source: dict[str, Any]
    trained: tuple[dict[str, Any], ...]
    folder: Path | None = None


def nearest_multiples(value: int, divisor: int) -> str:
    """Return the multiples of a number on both sides of a value, in words."""
    below, above = value // divisor * divisor, -(-value // divisor) * divisor
    return f"{below} or {above}" if below else str(above)
