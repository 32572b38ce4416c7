"""Files into texts: for each ending of a file's name a reader, which yields one text after another.

A reader goes on after what it can't read, so that one look at a file finds all that is wrong with
it; the lines stand in `Reading.problems`. It takes regular files only, in pieces of bounded size:
a pipe is never waited for, and what unpacks to far more than it is gets refused on the way.
"""

import gzip
import json
import os
import zlib
from codecs import getincrementaldecoder
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from tritter.data.documents import pieces, pieces_of_chunks
from tritter.data.records import (
    DEFAULT_FIELD,
    FORM_FIELDS,
    WrongRecordError,
    array_elements,
    missing_field,
    parse,
    text_of,
)
from tritter.errors import TritterError
from tritter.storage.reading import open_file

MAX_TEXT_BYTES = 2**30  # of a file that is one text
MAX_ARRAY_BYTES = 256 * 2**20  # of a .json, all of which is held as well as what it means
MAX_LINE_BYTES = 32 * 2**20
# A .gz is taken for what it unpacks to until it is this many times its own size, and text never is.
MAX_EXPANSION = 200
FREE_EXPANSION_BYTES = 64 * 2**20  # so much, however small the file
MAX_PROBLEMS_OF_FILE = 10
MAX_PROBLEMS_SHOWN = 100
_PIECE_BYTES = 2**20
_PARQUET_ROWS = 256
_PACKED = ".gz"
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_ENCODINGS = {
    "utf-16": "UTF-16",
    "utf-16-le": "UTF-16LE",
    "utf-16-be": "UTF-16BE",
    "utf-32": "UTF-32",
    "utf-32-le": "UTF-32LE",
    "utf-32-be": "UTF-32BE",
}


class TextFileError(TritterError):
    """Files that can't be read as what they are; `problems` has a line for each thing."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        shown = list(self.problems[:MAX_PROBLEMS_SHOWN])
        if len(self.problems) > len(shown):
            shown.append(f"and {len(self.problems) - len(shown)} more")
        lines = "\n".join(f"  {line}" for line in shown)
        several = f"{len(self.problems)} things are wrong with the text:\n{lines}"
        super().__init__(shown[0] if len(self.problems) == 1 else several)


class SpentError(Exception):
    """As many bytes were read as were to be read; what comes after was not looked at."""


class Reading:
    """One reading of some files: what is asked of them, and what was wrong.

    Args:
        key: of the configuration, that named the files; each problem begins with it.
        text_field: of the records in .jsonl, .json and .parquet.
        max_bytes: unpacked bytes after which `SpentError` is raised; None: all are read.
    """

    def __init__(self, *, key: str, text_field: str, max_bytes: int | None = None) -> None:
        self.key = key
        self.text_field = text_field
        self.num_bytes = 0
        self.problems: list[str] = []
        self._max_bytes = max_bytes
        self._num_of_file = 0

    def texts(self, path: Path) -> Iterator[str]:
        """Yield the texts of a file; what can't be read is reported, and passed over.

        Raises:
            SpentError: `max_bytes` were read.
        """
        yield from self._guarded(path, READERS[text_suffix(path)](path, self))

    def pieces(self, path: Path) -> Iterator[str]:
        """Yield the `pieces` of a file's texts; one that is a whole file is never held whole.

        Raises:
            SpentError: `max_bytes` were read.
        """
        reader = READERS[text_suffix(path)]
        if reader is _whole:
            yield from self._guarded(path, pieces_of_chunks(_chunks(path, self)))
        else:
            for text in self.texts(path):
                yield from pieces(text)

    def _guarded(self, path: Path, texts: Iterator[str]) -> Iterator[str]:
        """Report what goes wrong while a file is read."""
        self._num_of_file = 0
        try:
            yield from texts
        except WrongRecordError as error:
            self.report(f"{path} {error}")
        except (OSError, EOFError, zlib.error) as error:
            self.report(f"{path} cannot be read ({error})")
        except TritterError as error:  # of the opening, with the path in it
            self.report(str(error).removesuffix("."))
        if self._num_of_file > MAX_PROBLEMS_OF_FILE:
            more = self._num_of_file - MAX_PROBLEMS_OF_FILE
            self.problems.append(f"{self.key}: {path} has {more} more such places.")

    def report(self, what: str) -> None:
        """Note a problem, in words that begin with the place; the first few of a file count."""
        self._num_of_file += 1
        if self._num_of_file <= MAX_PROBLEMS_OF_FILE:
            end = "" if what.endswith(("?", ".")) else "."
            self.problems.append(f"{self.key}: {what}{end}")

    def count(self, num_bytes: int) -> None:
        """Count bytes that were read.

        Raises:
            SpentError: that was the last of them.
        """
        self.num_bytes += num_bytes
        if self._max_bytes is not None and self.num_bytes > self._max_bytes:
            raise SpentError


Reader = Callable[[Path, Reading], Iterator[str]]


def text_suffix(path: Path) -> str:
    """Return the ending by which a file is read; nothing of one that isn't."""
    name = path.name.lower()
    return next((suffix for suffix in READERS if name.endswith(suffix)), "")


class _Stream:
    """A file's bytes, unpacked, counted and limited."""

    def __init__(self, file: Any, *, reading: Reading, packed_bytes: int | None) -> None:
        self._file = file
        self._reading = reading
        self._limit = None
        if packed_bytes is not None:
            self._limit = max(FREE_EXPANSION_BYTES, MAX_EXPANSION * packed_bytes)
        self._num_bytes = 0

    def piece(self) -> bytes:
        return self._counted(self._file.read(_PIECE_BYTES))

    def line(self, max_bytes: int) -> bytes:
        return self._counted(self._file.readline(max_bytes))

    def _counted(self, content: bytes) -> bytes:
        self._num_bytes += len(content)
        if self._limit is not None and self._num_bytes > self._limit:
            raise WrongRecordError(
                f"unpacks to more than {self._limit // 2**20} MB, {MAX_EXPANSION} times what it "
                "is; allowed is less, as text never is packed so well"
            )
        self._reading.count(len(content))
        return content


@contextmanager
def _opened(path: Path, reading: Reading) -> Iterator[_Stream]:
    """Open a file as a stream, and see whether it stays the same meanwhile."""
    with open_file(path) as file:
        before = os.fstat(file.fileno())
        if path.name.lower().endswith(_PACKED):
            with gzip.GzipFile(fileobj=file) as unpacked:
                yield _Stream(unpacked, reading=reading, packed_bytes=before.st_size)
        else:
            yield _Stream(file, reading=reading, packed_bytes=None)
        after = os.fstat(file.fileno())
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            raise WrongRecordError("changed while it was read")


def _whole(path: Path, reading: Reading) -> Iterator[str]:
    yield _content(path, reading, max_bytes=MAX_TEXT_BYTES)


def _array(path: Path, reading: Reading) -> Iterator[str]:
    text = _content(path, reading, max_bytes=MAX_ARRAY_BYTES)
    for number, record in enumerate(array_elements(text), start=1):
        yield from _record_text(f"{path}, record {number}", record, reading)


def _lines(path: Path, reading: Reading) -> Iterator[str]:
    with _opened(path, reading) as stream:
        number = 0
        while line := stream.line(MAX_LINE_BYTES):
            number += 1
            where = f"{path}, line {number}"
            if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
                reading.report(f"{where} is longer than {MAX_LINE_BYTES // 2**20} MB, the most")
                while (rest := stream.line(_PIECE_BYTES)) and not rest.endswith(b"\n"):
                    pass
                continue
            if number == 1:
                _check_encoding(line)
                line = line.removeprefix(_BYTE_ORDER_MARK)
            if not line.strip():
                continue
            try:
                record = parse(_decoded(line))
            except WrongRecordError as error:
                reading.report(f"{where} {error}")
                continue
            yield from _record_text(where, record, reading)


def _rows(path: Path, reading: Reading) -> Iterator[str]:
    try:
        arrow, parquet = import_module("pyarrow"), import_module("pyarrow.parquet")
    except ImportError as error:
        raise WrongRecordError("needs pyarrow to be read: pip install 'tritter[data]'") from error
    with open_file(path) as opened:
        try:
            with parquet.ParquetFile(opened) as file:
                names = file.schema_arrow.names
                columns = _columns(names, reading.text_field)
                row = 0
                for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=columns):
                    reading.count(batch.nbytes)
                    for record in batch.to_pylist():
                        row += 1
                        yield from _record_text(f"{path}, row {row}", record, reading)
        except arrow.ArrowException as error:
            raise WrongRecordError(f"is no parquet file ({_short(error)})") from error


def _columns(names: Sequence[str], field: str) -> list[str]:
    if field in names:
        return [field]
    known = [name for name in names if name in FORM_FIELDS]
    if field != DEFAULT_FIELD or not known:
        raise missing_field(field, names)
    return known


_PLAIN: dict[str, Reader] = {
    ".txt": _whole,
    ".md": _whole,
    ".rst": _whole,
    ".jsonl": _lines,
    ".json": _array,
}
# Ending of a name → what reads such files. Another source of texts is another entry here.
READERS: dict[str, Reader] = {
    **_PLAIN,
    ".parquet": _rows,
    **{f"{suffix}{_PACKED}": reader for suffix, reader in _PLAIN.items()},
}
TEXT_SUFFIXES = tuple(READERS)


def _content(path: Path, reading: Reading, *, max_bytes: int) -> str:
    chunks, size = list[str](), 0
    for chunk in _chunks(path, reading):
        chunks.append(chunk)
        size += len(chunk.encode())
        if size > max_bytes:
            raise WrongRecordError(
                f"is larger than {max_bytes // 2**20} MB, the most that is read as one; split "
                "it, or write its texts to a .jsonl"
            )
    return "".join(chunks)


def _chunks(path: Path, reading: Reading) -> Iterator[str]:
    """Yield a file's text as it is read.

    Raises:
        WrongRecordError: it is no UTF-8, or holds a byte 0.
    """
    decoder, start = _Decoder(), 0
    with _opened(path, reading) as stream:
        while piece := stream.piece():
            if start == 0:
                _check_encoding(piece)
            if (position := piece.find(0)) >= 0:
                raise WrongRecordError(f"holds a byte 0, at {start + position}; that is no text")
            yield decoder.decode(piece if start else piece.removeprefix(_BYTE_ORDER_MARK))
            start += len(piece)
    yield decoder.decode(b"", is_last=True)


def _record_text(where: str, record: object, reading: Reading) -> Iterator[str]:
    try:
        yield text_of(record, field=reading.text_field)
    except WrongRecordError as error:
        reading.report(f"{where} {error}")


def _check_encoding(start: bytes) -> None:
    """Refuse what isn't UTF-8 by its first bytes: a mark of another encoding, or bytes 0.

    Raises:
        WrongRecordError: names the encoding where it can be told.
    """
    found = json.detect_encoding(start[:4]) if any(start[:4]) else "utf-8"
    if found in _ENCODINGS:
        raise WrongRecordError(
            f"is no UTF-8 but {_ENCODINGS[found]}, by its first bytes; convert it, for example "
            f"with iconv -f {_ENCODINGS[found]} -t UTF-8"
        )


def _decoded(content: bytes) -> str:
    return _Decoder().decode(content, is_last=True)


class _Decoder:
    """UTF-8 into text, piece by piece; a character may stand in two of them."""

    def __init__(self) -> None:
        self._decoder = getincrementaldecoder("utf-8")()
        self._num_bytes = 0

    def decode(self, content: bytes, *, is_last: bool = False) -> str:
        """Return the characters that are whole by now.

        Raises:
            WrongRecordError: bytes are no UTF-8; says where, counted from the first piece.
        """
        waiting = len(self._decoder.getstate()[0])
        try:
            text = self._decoder.decode(content, is_last)
        except UnicodeDecodeError as error:
            place = self._num_bytes - waiting + error.start
            raise WrongRecordError(
                f"is no UTF-8 (byte {place} is 0x{error.object[error.start]:02x}); convert it, for "
                "example with iconv -f ENCODING -t UTF-8"
            ) from error
        self._num_bytes += len(content)
        return text


def _short(error: Exception) -> str:
    return str(error).split("\n", 1)[0][:200]
