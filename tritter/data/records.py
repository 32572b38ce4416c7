"""Convert a JSON or parquet record to a text: a field, or the joined parts of an instruction."""

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from tritter.errors import nearest

DEFAULT_FIELD = "text"
PART_BREAK = "\n\n"  # between the parts of an instruction
# Common names of the text field
COMMON_FIELDS = ("text", "content", "body", "document", "article", "raw_content", "completion")
# Formats of instruction records: for each part its possible names, and whether it is required
_Form = tuple[tuple[tuple[str, ...], bool], ...]
_FORMS: tuple[_Form, ...] = (
    ((("instruction",), True), (("input", "context"), False), (("output", "response"), True)),
    ((("prompt",), True), (("completion", "response", "answer"), True)),
    ((("question",), True), (("answer",), True)),
)
_MESSAGES = "messages"
FORM_FIELDS = {_MESSAGES} | {name for form in _FORMS for names, _ in form for name in names}
_MAX_NAMES, _MAX_NAME_LENGTH, _MAX_MESSAGE = 12, 40, 200
_BLANKS = " \t\r\n"


class WrongRecordError(Exception):
    """The problem of a record or a file, phrased to follow its location."""


def text_of(record: object, *, field: str) -> str:
    """Return a record's text.

    A record is a text, or a mapping with a text in `field`. With the default field, it may also
    be an instruction: its parts (instruction, input, output; prompt, completion; question,
    answer) are joined by blank lines, as are messages, each as `role: content`.

    Args:
        record: the parsed record.
        field: name of the text field.

    Raises:
        WrongRecordError: the record has no text.
    """
    if isinstance(record, str):
        return _encodable(record)
    if not isinstance(record, Mapping):
        raise WrongRecordError(
            f"is {_kind(record)}; must be a JSON object "
            '{"text": "..."}, an instruction, or a string "..."'
        )
    if field in record:
        return _encodable(_as_text(record[field], f"data.text_field = {field}:"))
    if field == DEFAULT_FIELD and _MESSAGES in record:
        messages = record[_MESSAGES]
        if not isinstance(messages, list):
            found = _kind(messages)
            raise WrongRecordError(f"messages: is {found}; must be a list of messages")
        lines = []
        for number, message in enumerate(messages, start=1):
            if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
                raise WrongRecordError(
                    f"messages: number {number} is not a message; must be "
                    '{"role": "...", "content": "..."}'
                )
            where = f"messages: number {number},"
            role = _as_text(message["role"], f"{where} role:")
            lines.append(f"{role}: {_as_text(message['content'], f'{where} content:')}")
        return _encodable(PART_BREAK.join(lines))
    form, matched = next(_forms(record), ((), [])) if field == DEFAULT_FIELD else ((), [])
    if not matched:
        raise missing_field(field, list(record))
    parts = [
        _as_text(record[name], f"{name}:")
        for name, (_, is_needed) in zip(matched, form, strict=True)
        if name is not None and (is_needed or record[name] is not None)
    ]
    return _encodable(PART_BREAK.join(filter(None, parts)))


def form_fields(names: Collection[str]) -> tuple[str, ...]:
    """Return the names that form an instruction or messages; empty if there are none."""
    if _MESSAGES in names:
        return (_MESSAGES,)
    return next((tuple(filter(None, matched)) for _, matched in _forms(names)), ())


def missing_field(field: str, found: Sequence[Any]) -> WrongRecordError:
    """Return the error for a missing field, with the available fields and the nearest match."""
    likely = next((name for name in COMMON_FIELDS if name in found), None)
    likely = likely or nearest(field, [name for name in found if isinstance(name, str)])
    advice = f". Did you mean data.text_field={likely}?" if likely else ""
    names = [shown(name) for name in found[:_MAX_NAMES]]
    names += ["..."] if len(found) > _MAX_NAMES else []
    return WrongRecordError(
        f"has no field {shown(field)} (data.text_field = {shown(field)}); available: "
        f"{', '.join(names) or 'none'}{advice}"
    )


def parse(text: str) -> Any:
    """Parse a line of JSON.

    Raises:
        WrongRecordError: the line is invalid, repeats a field, has NaN, or is nested too deeply.
    """
    try:
        return _DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        raise _no_json(error) from error


def array_elements(text: str) -> Iterator[Any]:
    """Yield the elements of a JSON array, one after another.

    Raises:
        WrongRecordError: the text is not an array, or not valid JSON.
    """
    position = _after_blanks(text, 0)
    if text[position : position + 1] != "[":
        found = "is an object" if text[position : position + 1] == "{" else "is not an array"
        raise WrongRecordError(
            f"{found}; must be an array of records or texts (for one record per line use .jsonl)"
        )
    position = _after_blanks(text, position + 1)
    is_closed = text[position : position + 1] == "]"
    try:
        while not is_closed:
            value, position = _DECODER.raw_decode(text, position)
            yield value
            position = _after_blanks(text, position)
            sign = text[position : position + 1]
            is_closed = sign == "]"
            if sign not in ("]", ","):
                raise json.JSONDecodeError("Expecting ',' or ']'", text, position)
            if not is_closed:
                position = _after_blanks(text, position + 1)
    except (ValueError, RecursionError) as error:
        raise _no_json(error) from error
    end = _after_blanks(text, position + 1)
    if end < len(text):
        raise WrongRecordError(f"is not valid JSON (extra data after the array, at {end})")


def shown(name: object) -> str:
    """Return a field name for a message, escaped and shortened."""
    text = repr(name)[1:-1] if isinstance(name, str) else repr(name)
    return text if len(text) <= _MAX_NAME_LENGTH else f"{text[:_MAX_NAME_LENGTH]}..."


def _forms(names: Collection[str]) -> Iterator[tuple[_Form, list[str | None]]]:
    """Yield each instruction format that matches the names, and the name of each part."""
    for form in _FORMS:
        matched = [next((each for each in known if each in names), None) for known, _ in form]
        if all(
            name is not None or not is_needed
            for name, (_, is_needed) in zip(matched, form, strict=True)
        ):
            yield form, matched


def _as_text(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise WrongRecordError(f"{where} is {_kind(value)}, not a string")
    return value


def _encodable(text: str) -> str:
    # JSON may contain an unpaired surrogate, which UTF-8 cannot encode.
    return text.encode("utf-8", errors="replace").decode("utf-8")


def _kind(value: object) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "true or false"
        case int() | float():
            return "a number"
        case str():
            return "a string"
        case list():
            return "a list"
        case Mapping():
            return "an object"
    return type(value).__name__


def _after_blanks(text: str, position: int) -> int:
    while position < len(text) and text[position] in _BLANKS:
        position += 1
    return position


def _no_json(error: ValueError | RecursionError) -> WrongRecordError:
    if isinstance(error, RecursionError):
        return WrongRecordError("is nested too deeply")
    return WrongRecordError(f"is not valid JSON ({str(error)[:_MAX_MESSAGE]})")


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    record: dict[str, Any] = {}
    for name, value in pairs:
        if name in record:
            raise ValueError(f"the field {shown(name)} is repeated")
        record[name] = value
    return record


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant, object_pairs_hook=_unique)
