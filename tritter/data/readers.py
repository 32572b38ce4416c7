"""Files into texts: for each ending of a file's name a reader, which yields one text after another.

A reader goes on after what it can't read, so that one look at a file finds all that is wrong with
it; the lines stand in `Reading.problems`. It takes regular files only, in pieces of bounded size:
a pipe is never waited for. A file that unpacks to far more than its size is refused before that.
"""

import gzip
import json
import os
import zlib
from codecs import getincrementaldecoder
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from io import BufferedReader
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
# A .gz or .parquet may decode to this many times its own size. Text never does.
MAX_EXPANSION = 200
FREE_EXPANSION_BYTES = 64 * 2**20  # so much, however small the file
MAX_PROBLEMS_OF_FILE = 10
MAX_PROBLEMS_SHOWN = 100
_PIECE_BYTES = 2**20
_PARQUET_ROWS = 256
_SHARED_ROWS = 4096  # of a batch in which texts are shared
_DICTIONARY_PAGE, _NEXT_INT = b"\x15\x04", b"\x15"
_ROW_BYTES = 8  # at least, so that rows without values are limited as well
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
        self._expansion = None if packed_bytes is None else _Expansion(packed_bytes)

    def piece(self) -> bytes:
        return self._counted(self._file.read(_PIECE_BYTES))

    def line(self, max_bytes: int) -> bytes:
        return self._counted(self._file.readline(max_bytes))

    def _counted(self, content: bytes) -> bytes:
        if self._expansion is not None:
            self._expansion.count(len(content))
        self._reading.count(len(content))
        return content


class _Expansion:
    """Decoded bytes of a packed file.

    Args:
        packed_bytes: size of the file.
    """

    def __init__(self, packed_bytes: int) -> None:
        self.limit_bytes = max(FREE_EXPANSION_BYTES, MAX_EXPANSION * packed_bytes)
        self._num_bytes = 0

    def count(self, num_bytes: int) -> None:
        """Count bytes before or after they are decoded.

        Raises:
            WrongRecordError: there are more than the limit.
        """
        self._num_bytes += num_bytes
        if self._num_bytes > self.limit_bytes:
            raise WrongRecordError(
                f"unpacks to more than {self.limit_bytes // 2**20} MB, and a packed file may have "
                f"{FREE_EXPANSION_BYTES // 2**20} MB or {MAX_EXPANSION} times its own size"
            )


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
    expansion = _Expansion(path.stat().st_size)

    def count(num_bytes: int) -> None:
        expansion.count(num_bytes)
        reading.count(num_bytes)

    records = parquet_records(
        path, columns=lambda names: _columns(names, reading.text_field), count=count
    )
    for number, record in enumerate(records, start=1):
        yield from _record_text(f"{path}, row {number}", record, reading)


def check_expansion(path: Path) -> None:
    """Refuse a packed file that another library should not be given to decode; decodes it once.

    Raises:
        WrongRecordError: it decodes to more than it may, or is no such file.
        TritterError: it cannot be read.
    """
    if path.suffix.lower() == ".parquet":
        expansion = _Expansion(path.stat().st_size)
        for _ in _parquet_batches(path, columns=None, count=expansion.count):
            pass
    elif path.suffix.lower() == _PACKED:
        try:
            with _opened(path, Reading(key="", text_field=DEFAULT_FIELD)) as stream:
                while stream.piece():
                    pass
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise WrongRecordError(f"cannot be unpacked ({error})") from error


def parquet_records(
    path: Path,
    *,
    columns: Callable[[Sequence[str]], list[str]] | None = None,
    count: Callable[[int], None],
) -> Iterator[dict[str, Any]]:
    """Yield the records of a .parquet file.

    Args:
        columns: returns the columns to read, of those in the file; None: all.
        count: receives the bytes of the next rows before records are made of them; may raise.

    Raises:
        WrongRecordError: it is no parquet file, or its columns decode to far more than its size.
        TritterError: it cannot be read.
    """
    for batch in _parquet_batches(path, columns=columns, count=count):
        step = batch.num_rows if _decoded_bytes(batch) < FREE_EXPANSION_BYTES else 1
        for start in range(0, batch.num_rows, max(1, step)):
            yield from batch.slice(start, step).to_pylist()


def _parquet_batches(
    path: Path,
    *,
    columns: Callable[[Sequence[str]], list[str]] | None,
    count: Callable[[int], None],
) -> Iterator[Any]:
    """Yield record batches of bounded size; a text that many rows share may be there only once."""
    try:
        arrow, parquet = import_module("pyarrow"), import_module("pyarrow.parquet")
    except ImportError as error:
        raise WrongRecordError("needs pyarrow to be read: pip install 'tritter[data]'") from error
    with open_file(path) as opened:
        try:
            metadata = parquet.read_metadata(opened)
            leaves = [metadata.schema.column(index) for index in range(metadata.num_columns)]
            texts = [leaf.path for leaf in leaves if leaf.physical_type == "BYTE_ARRAY"]
            for group in range(metadata.num_row_groups):
                rows = _batch_rows(opened, metadata.row_group(group), leaves)
                shared = [] if rows else texts
                with parquet.ParquetFile(opened, read_dictionary=shared, metadata=metadata) as file:
                    names = None if columns is None else columns(file.schema_arrow.names)
                    for batch in file.iter_batches(rows or _SHARED_ROWS, [group], names):
                        count(_decoded_bytes(batch))
                        yield batch
        except arrow.ArrowException as error:
            raise WrongRecordError(f"is no parquet file ({_short(error)})") from error


def _batch_rows(file: BufferedReader, group: Any, leaves: Sequence[Any]) -> int:
    """Return how many rows of a row group may be decoded at a time.

    Returns:
        0 if single rows may be too large, since their lists repeat texts: the texts have to stay
        in their dictionaries then. That copies a whole dictionary for each batch.

    Raises:
        WrongRecordError: pages, numbers of values or values are too large for the size of the file.
    """
    expansion = _Expansion(os.fstat(file.fileno()).st_size)
    rows = _PARQUET_ROWS
    for index, leaf in enumerate(leaves):
        chunk = group.column(index)
        expansion.count(chunk.total_uncompressed_size)
        if leaf.physical_type not in ("BYTE_ARRAY", "FIXED_LEN_BYTE_ARRAY"):
            value_bytes = 8
        elif "DELTA_BYTE_ARRAY" in chunk.encodings:  # each value may repeat the one before
            value_bytes = chunk.total_uncompressed_size
        else:
            value_bytes = _dictionary_bytes(file, chunk)
        rows = min(rows, max(1, FREE_EXPANSION_BYTES // max(1, value_bytes)))
        if leaf.max_repetition_level:
            expansion.count(8 * chunk.num_values)
            if value_bytes * chunk.num_values > expansion.limit_bytes:
                rows = 0
    return rows


def _dictionary_bytes(file: BufferedReader, chunk: Any) -> int:
    """Return the decoded size of a column's dictionary, which no value in it exceeds."""
    start = chunk.data_page_offset
    if chunk.has_dictionary_page and 0 < chunk.dictionary_page_offset < start:
        start = chunk.dictionary_page_offset
    file.seek(start)
    header = file.read(16)
    # A PageHeader of Thrift's compact protocol begins with its type and its decoded size
    if header[:2] != _DICTIONARY_PAGE or header[2:3] != _NEXT_INT:
        return 0
    size = 0
    for place, byte in enumerate(header[3:8]):
        size |= (byte & 0x7F) << (7 * place)
        if byte < 0x80:
            break
    return size >> 1  # zigzag


def _decoded_bytes(column: Any) -> int:
    """Return the bytes that a batch or a column has once each row has its own copy of its text."""
    kind = getattr(column, "type", None)
    if kind is None:  # a batch
        return sum(map(_decoded_bytes, column.columns)) + _ROW_BYTES * int(column.num_rows)
    types = import_module("pyarrow.types")
    if types.is_struct(kind):
        return sum(map(_decoded_bytes, column.flatten()))
    if types.is_map(kind):
        return _decoded_bytes(column.keys) + _decoded_bytes(column.items) + int(column.nbytes)
    if types.is_nested(kind) and hasattr(column, "flatten"):  # lists
        return _decoded_bytes(column.flatten()) + int(column.nbytes)
    if types.is_dictionary(kind):
        compute = import_module("pyarrow.compute")
        try:
            lengths = compute.binary_length(column.dictionary)
        except NotImplementedError:  # a dictionary of numbers
            return int(column.nbytes)
        return int(compute.sum(compute.take(lengths, column.indices)).as_py() or 0)
    return int(column.nbytes)


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
