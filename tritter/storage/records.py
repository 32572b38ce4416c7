"""Records: the JSON files that describe Tritter's folders.

All records are written and read here. On disk, a record contains its kind (`format`), its version
(`format_version`), the fields of its class and the SHA-256 of all of these (`record_digest`). The
first released version is 1. Folders from before the release have no `format` and are refused.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Protocol, TypeVar, dataclass_transform

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError

from tritter.errors import TritterError, brief
from tritter.storage.reading import parse_object, read_text

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    class Record(DataclassInstance, Protocol):
        """A class made by `record`."""

        FORMAT: ClassVar[str]


FORMAT_VERSION = 1
_DIGEST = "record_digest"
_HEAD = ("format", "format_version", _DIGEST)
_CONFIG = {"extra": "forbid", "strict": True, "allow_inf_nan": False}
_MAX_TEXT = 4096
_MAX_KEY = 200

_Kind = TypeVar("_Kind")
_R = TypeVar("_R", bound="Record")
# Field types, limited to the values that the commands can handle
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Text = Annotated[str, Field(max_length=_MAX_TEXT, pattern=r"^[^\x00]*$")]
Seed = Annotated[int, Field(ge=0, lt=2**64)]  # derived seeds have 64 bits
Finite = Annotated[float, Field(ge=-1e300, le=1e300, allow_inf_nan=False)]


def _is_inner_name(name: str) -> str:
    parts = name.split("/")
    if "\0" in name or len(name) > _MAX_TEXT or not all(parts) or {".", ".."} & set(parts):
        raise ValueError("must be the name of a file inside the folder")
    return name


InnerName = Annotated[str, AfterValidator(_is_inner_name)]


@dataclass_transform(
    frozen_default=True, kw_only_default=True, field_specifiers=(dataclasses.field,)
)
def record(kind: type[_Kind]) -> type[_Kind]:
    """Turn a class into a record: frozen, keyword-only, without unknown keys.

    Use it as a decorator instead of `dataclass`. A record with its own file has a `FORMAT`.
    Annotations are checked when a record is read, not when it is constructed.
    """
    kind.__pydantic_config__ = _CONFIG  # type: ignore[attr-defined]
    return dataclasses.dataclass(frozen=True, slots=True, kw_only=True)(kind)


def plain_record(content: "Record") -> dict[str, Any]:
    """Return a record as plain values, without its checksum."""
    head = {"format": content.FORMAT, "format_version": FORMAT_VERSION}
    plain: dict[str, Any] = {**head, **dataclasses.asdict(content)}
    return plain


def record_text(content: "Record") -> str:
    """Return the text of a record on disk, including its checksum."""
    return signed_text(plain_record(content))


def signed_text(plain: Mapping[str, Any]) -> str:
    """Return the text of a record file for plain values, including its checksum."""
    read_again = json.loads(json.dumps(plain))  # tuples become lists
    rest = {key: value for key, value in read_again.items() if key != _DIGEST}
    digest = hashlib.sha256(json.dumps(rest).encode()).hexdigest()
    return json.dumps({**rest, _DIGEST: digest}, indent=1) + "\n"


def read_record(path: Path, kind: type[_R], *, advice: str = "", is_signed: bool = True) -> _R:
    """Read and validate an untrusted record file.

    Args:
        path: File to read.
        kind: Expected class of the record.
        advice: Sentence with advice for files from before the first release.
        is_signed: Whether the checksum must match. False accepts edited records; see
            `is_unchanged`.

    Returns:
        The record.

    Raises:
        TritterError: The file cannot be read, has another kind or version, was edited, or a field
            is missing, unknown, of the wrong type or out of range.
    """
    text = read_text(path)
    plain = parse_object(text, path=path)
    found, version = plain.get("format"), plain.get("format_version")
    if found is None:
        raise TritterError(
            f"{path} is not a {kind.FORMAT}, or a development version wrote it before the first "
            f"release of Tritter: it has no `format`. {advice}".rstrip()
        )
    if found != kind.FORMAT:
        raise TritterError(f"{path} is not a {kind.FORMAT}: format = {brief(found)}.")
    if type(version) is not int or version != FORMAT_VERSION:
        raise TritterError(
            f"{path}: format_version {brief(version)}; this Tritter reads {FORMAT_VERSION}."
        )
    if is_signed and text != signed_text(plain):
        raise TritterError(f"{path} was edited: its checksum does not match.")
    fields = {key: value for key, value in plain.items() if key not in _HEAD}
    return validate_record(fields, kind, what=f"{path} is not a {kind.FORMAT}")


def is_unchanged(path: Path) -> bool:
    """Return True if the checksum of a record file matches."""
    text = read_text(path)
    return text == signed_text(parse_object(text, path=path))


def validate_record(plain: object, kind: type[_Kind], *, what: str) -> _Kind:
    """Validate plain values against a type.

    Args:
        plain: JSON values.
        kind: Type or annotation to validate against.
        what: Start of the error message, such as `run.json is not a run`.

    Returns:
        The values as an instance of `kind`.
    """
    try:
        read: _Kind = _adapter(kind).validate_json(json.dumps(plain), strict=True)  # type: ignore[arg-type]
        return read
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        place = ".".join(str(part) for part in first["loc"] if part != "[key]")[:_MAX_KEY]
        if first["type"] == "missing":
            reason = f"{place} is missing"
        elif first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
            reason = f"{place} is unknown"
        else:
            reason = first["msg"].removeprefix("Value error, ").removesuffix(".")
            reason = reason.replace("Input should be", "must be", 1)
            reason = f"{place} = {brief(first['input'])}; {reason}" if place else reason
        raise TritterError(f"{what}: {reason}.") from error


@cache
def _adapter(kind: Any) -> "TypeAdapter[Any]":
    return TypeAdapter(kind)
