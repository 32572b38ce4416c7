"""Text of one's own: documents from .txt, .jsonl and .parquet files, and .gz of the first two.

A record of .jsonl or .parquet is a document, and so is a .txt file, unless it is over a megabyte
or its domain has too few documents: then it is cut at blank lines, because a gate needs enough
documents to tell a change from chance.
"""

import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from typing import Any

from tritter.data.documents import Document
from tritter.errors import RequestError

CUT_FROM_BYTES = 1_000_000
PIECE_CHARACTERS = 20_000
ENOUGH_DOCUMENTS = 20  # with fewer in a domain, every long .txt is cut
# What other people call the field that holds a document.
COMMON_FIELDS = ("text", "content", "body", "document", "article", "raw_content", "completion")
_BLANK_LINES = re.compile(r"(?<=\n)[ \t\r]*\n(?:[ \t\r]*\n)*")


def read_documents(files: Sequence[Path], *, key: str, text_field: str) -> tuple[Document, ...]:
    """Read all documents of some files, in their order.

    A document is named by its file and its content, so that moving a folder or adding a record
    moves no other document between training and validation.

    Args:
        key: the configuration's key that named the files, for messages.
        text_field: of .jsonl and .parquet.

    Raises:
        RequestError: a file can't be read, decoded or parsed, lacks the field, or all are blank;
            names file, line and what was found.
    """
    reading = _Reading(key=key, text_field=text_field)
    texts = {path: tuple(reading.texts(path)) for path in files}
    is_scarce = sum(map(len, texts.values())) < ENOUGH_DOCUMENTS
    documents = [
        _document(path, piece)
        for path, found in texts.items()
        for text in found
        for piece in _pieces(path, text, is_scarce=is_scarce)
        if piece.strip()
    ]
    if not documents:
        raise RequestError(f"{key}: {_some(files)} hold no text.")
    return tuple(documents)


def cut(text: str, *, size: int = PIECE_CHARACTERS) -> Iterator[str]:
    """Cut a text at blank lines into pieces of about `size` characters, which together are it.

    Where no blank line comes within two sizes it is cut at a line's end, and without that at a
    blank.
    """
    start = 0
    while len(text) - start > 2 * size:
        end = _cut_position(text, start + size, start + 2 * size)
        yield text[start:end]
        start = end
    yield text[start:]


class _Reading:
    def __init__(self, *, key: str, text_field: str) -> None:
        self._key = key
        self._field = text_field

    def texts(self, path: Path) -> Iterator[str]:
        name = path.name.lower()
        try:
            if name.endswith(".parquet"):
                yield from self._parquet(path)
            elif name.removesuffix(".gz").endswith(".jsonl"):
                yield from self._lines(path)
            else:
                yield self._decoded(path)
        except (OSError, EOFError, zlib.error) as error:
            raise RequestError(f"{self._key}: {path} can't be read ({error}).") from error

    def _decoded(self, path: Path) -> str:
        content = path.read_bytes()
        if path.name.lower().endswith(".gz"):
            content = gzip.decompress(content)
        try:
            return content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise RequestError(
                f"{self._key}: {path} is no UTF-8 (byte {error.start} is "
                f"0x{content[error.start]:02x}); convert it, for example with "
                f"iconv -f ENCODING -t UTF-8."
            ) from error

    def _lines(self, path: Path) -> Iterator[str]:
        for number, line in enumerate(self._decoded(path).split("\n"), start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise RequestError(f"{self._key}: {where} is no JSON ({error}).") from error
            if not isinstance(record, dict):
                raise RequestError(f"{self._key}: {where} is no JSON object.")
            if self._field not in record:
                raise self._missing(where, record)
            yield self._text(where, record[self._field])

    def _parquet(self, path: Path) -> Iterator[str]:
        try:
            arrow, parquet = import_module("pyarrow"), import_module("pyarrow.parquet")
        except ImportError as error:
            raise RequestError(
                f"{self._key}: {path} needs pyarrow to be read: pip install 'tritter[data]'."
            ) from error
        try:
            with parquet.ParquetFile(path) as file:
                if self._field not in file.schema_arrow.names:
                    raise self._missing(str(path), file.schema_arrow.names)
                row = 0
                for batch in file.iter_batches(columns=[self._field]):
                    for value in batch.column(0).to_pylist():
                        row += 1
                        yield self._text(f"{path}, row {row}", value)
        except arrow.ArrowException as error:
            raise RequestError(f"{self._key}: {path} is no parquet file ({error}).") from error

    def _missing(self, where: str, found: Iterable[str]) -> RequestError:
        names = list(found)
        likely = next((name for name in COMMON_FIELDS if name in names), None)
        advice = f" Did you mean data.text_field={likely}?" if likely else ""
        return RequestError(
            f"data.text_field = {self._field}: {where} ({self._key}) has no such field; it has "
            f"{', '.join(names) or 'none'}.{advice}"
        )

    def _text(self, where: str, value: Any) -> str:
        if not isinstance(value, str):
            raise RequestError(
                f"data.text_field = {self._field}: {where} ({self._key}) holds "
                f"{type(value).__name__}, no text."
            )
        # JSON may spell an unpaired surrogate, which no UTF-8 file can hold.
        return value.encode("utf-8", errors="replace").decode("utf-8")


def _pieces(path: Path, text: str, *, is_scarce: bool) -> Iterator[str]:
    is_whole_file = path.name.lower().removesuffix(".gz").endswith(".txt")
    if is_whole_file and (is_scarce or len(text.encode()) > CUT_FROM_BYTES):
        return cut(text)
    return iter((text,))


def _cut_position(text: str, start: int, end: int) -> int:
    if (blank := _BLANK_LINES.search(text, start, end)) is not None:
        return blank.end()
    for sign in ("\n", " "):
        if (position := text.find(sign, start, end)) >= 0:
            return position + 1
    return end


def _document(path: Path, text: str) -> Document:
    return Document(f"{path.name}:{sha256(text.encode()).hexdigest()[:16]}", text)


def _some(files: Sequence[Path]) -> str:
    shown = ", ".join(map(str, files[:3]))
    return shown if len(files) <= 3 else f"{shown} and {len(files) - 3} more"
