"""Convert a JSON or parquet record to a text: a field, or a conversation."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from tritter.data.conversations import (
    ACCEPTED,
    PREFERENCES,
    TURNS,
    Conversation,
    WrongRecordError,
    conversation_of,
    encodable,
    exclusion,
    kind_of_value,
)
from tritter.errors import key_name, nearest, show

DEFAULT_FIELD, FIELD_KEY = "text", "data.text_field"
# Common names of the text field
_COMMON_FIELDS = ("text", "content", "body", "document", "article", "raw_content", "completion")
_MAX_NAMES, _MAX_NAME_LENGTH, _MAX_MESSAGE = 12, 40, 200
_BLANKS = " \t\r\n"
_JSON_TURNS = re.compile(r"\s*\[\s*\{")

Text = str | Conversation  # the content of a record; `str` returns the plain text of both


def text_of(record: object, *, field: str) -> Text:
    """Return a record's text or conversation.

    A record is a text, or a mapping with a text in `field`. With the default field, it may also
    be a conversation, see `conversation_of`; its turns may also be named. `weight: 0` and
    `train: false` exclude a record.

    Args:
        record: the parsed record.
        field: name of the text field.
    """
    if isinstance(record, str):
        return encodable(record)
    if not isinstance(record, Mapping):
        raise WrongRecordError(
            f"is {kind_of_value(record)}; must be a JSON object "
            '{"text": "..."}, a conversation, or a string "..."'
        )
    value = record.get(field)
    # A table of texts has messages as JSON
    is_turns = field in TURNS and bool(isinstance(value, list) or _JSON_TURNS.match(str(value)))
    if is_turns or (value is None and field == DEFAULT_FIELD):
        conversation = conversation_of(record, turns=field if is_turns else None)
        if conversation is not None:
            return conversation
    if field not in record:
        raise missing_field(field, list(record))
    if not isinstance(value, str):
        found = f"is {kind_of_value(value)}, not a string"
        raise WrongRecordError(f"{key_name(FIELD_KEY)} = {field}: {found}")
    if excluding := exclusion(record):
        raise WrongRecordError(f"is excluded from training ({excluding})")
    return encodable(value)


def missing_field(field: str, found: Sequence[Any]) -> WrongRecordError:
    """Return the error for a missing field, with the available fields and the nearest match."""
    likely = next((name for name in _COMMON_FIELDS if name in found), None)
    likely = likely or nearest(field, [name for name in found if isinstance(name, str)])
    accepted = ""
    if field == DEFAULT_FIELD:
        accepted = f" Accepted: {field}, or a conversation: {ACCEPTED}"
    advice = f". Did you mean {key_name(FIELD_KEY)}={show(likely)}?" if likely else "."
    if "rejected" in found:
        advice = f". Preference data: {PREFERENCES}."
    names = [shown(name) for name in found[:_MAX_NAMES]]
    names += ["..."] if len(found) > _MAX_NAMES else []
    return WrongRecordError(
        f"has no field {shown(field)} ({key_name(FIELD_KEY)} = {shown(field)}); available: "
        f"{', '.join(names) or 'none'}{advice}{accepted}"
    )


def parse(text: str) -> Any:
    """Parse a line of JSON."""
    try:
        return _DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        raise _no_json(error) from error


def array_elements(text: str) -> Iterator[Any]:
    """Yield the elements of a JSON array, one after another."""
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
