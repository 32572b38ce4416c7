"""Local files into texts: for each ending of a name a reader, which yields one text after another.

An object that can't be read (a malformed line, a record without a text) is skipped and counted; a
file of which nothing can be read, or that is damaged as a whole, is a problem. Files are regular
ones, read in pieces of bounded size: a pipe is never waited for, and a file that unpacks to far
more than its size is refused on the way.
"""

import csv
import gzip
import json
import os
import zlib
from codecs import IncrementalDecoder, getincrementaldecoder
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from io import BufferedReader
from pathlib import Path
from typing import Any, TypeVar

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
_WHOLE = (".txt", ".md", ".rst")
_PLAIN = (*_WHOLE, ".jsonl", ".json", ".csv")
TEXT_SUFFIXES = (*_PLAIN, ".parquet", *(f"{suffix}{_PACKED}" for suffix in _PLAIN))
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"

Columns = Callable[[Sequence[str]], list[str]]
_Item = TypeVar("_Item")


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
    """One reading of files and data sets: what it looks for, what was skipped, what was wrong.

    Args:
        key: of the configuration, that named the files; each line begins with it.
        text_field: of the records in .jsonl, .json, .csv and .parquet.
        max_bytes: unpacked bytes after which `SpentError` is raised; None: all are read.
        is_strict: an object that can't be read is a problem, not skipped.

    Attributes:
        problems: what forbids to go on, a line each.
        notes: of each source of which objects were skipped, how many and the first of them.
    """

    def __init__(
        self,
        *,
        key: str,
        text_field: str = DEFAULT_FIELD,
        max_bytes: int | None = None,
        is_strict: bool = False,
    ) -> None:
        self.key = key
        self._is_strict = is_strict
        self.text_field = text_field
        self.num_bytes = 0
        self.problems: list[str] = []
        self.notes: list[str] = []
        self._max_bytes = max_bytes
        self._skipped: list[str] = []  # of the source that is read, the first few
        self._num_skipped = 0

    def texts(self, path: Path) -> Iterator[str]:
        """Yield the texts of a file of records; one that can't be read is skipped.

        Raises:
            SpentError: `max_bytes` were read.
        """
        yield from self.counted(str(path), _texts(path, self))

    def pieces(self, path: Path) -> Iterator[str]:
        """Yield the `pieces` of a file's texts; one that is a whole file is never held whole.

        Raises:
            SpentError: `max_bytes` were read.
        """
        if _kind(path) in _WHOLE:
            yield from self.counted(str(path), pieces_of_chunks(_chunks(path, self)))
        else:
            for text in self.texts(path):
                yield from pieces(text)

    def counted(self, name: str, items: Iterator[_Item]) -> Iterator[_Item]:
        """Yield the texts or records of one source, and note what was skipped or wrong in it.

        Raises:
            SpentError: `max_bytes` were read.
            TextFileError: a data set can't be read.
        """
        num_read, self._skipped, self._num_skipped = 0, [], 0
        problem = None
        try:
            for item in items:
                num_read += 1
                yield item
        except TextFileError:
            raise
        except WrongRecordError as error:
            problem = f"{name} {error}"
        except (OSError, EOFError, zlib.error) as error:
            problem = f"{name} cannot be read ({error})"
        except TritterError as error:  # of the opening, with the path in it
            problem = str(error).removesuffix(".")
        finally:
            if self._num_skipped and num_read and not self._is_strict:
                total = num_read + self._num_skipped
                self.notes.append(
                    f"Skipped {self._num_skipped:,} of {total:,} records that can't be read; the "
                    f"first: {self._line(self._skipped[0])}"
                )
            elif self._num_skipped:
                self.problems += map(self._line, self._skipped)
                if more := self._num_skipped - len(self._skipped):
                    self.problems.append(self._line(f"{name} has {more} more such places"))
            self.problems += [self._line(problem)] if problem else []

    def skip(self, what: str) -> None:
        """Count an object that can't be read, in words that begin with its place."""
        self._num_skipped += 1
        if len(self._skipped) < MAX_PROBLEMS_OF_FILE:
            self._skipped.append(what)

    def count(self, num_bytes: int) -> None:
        """Count bytes that were read.

        Raises:
            SpentError: that was the last of them.
        """
        self.num_bytes += num_bytes
        if self._max_bytes is not None and self.num_bytes > self._max_bytes:
            raise SpentError

    def _line(self, what: str) -> str:
        return f"{self.key}: {what}{'' if what.endswith(('?', '.')) else '.'}"


def text_pieces(files: Sequence[Path], reading: Reading) -> Iterator[str]:
    """Yield the texts of some files cut into their `pieces`, which is all that is held of them.

    Raises:
        TextFileError: files can't be read, decoded or parsed, or no record has the field; lists
            all of it, with file, line and what was found, once all was read. Or all are blank.
        SpentError: the reading's `max_bytes` were read.
    """
    is_blank = True
    for path in files:
        for piece in reading.pieces(path):
            is_blank = False
            yield piece
    if reading.problems:
        raise TextFileError(reading.problems)
    if is_blank:
        raise TextFileError([no_text(reading.key, files)])


def no_text(key: str, files: Sequence[Path]) -> str:
    """Return the line that says that files are all blank."""
    shown = ", ".join(map(str, files[:3]))
    more = f" and {len(files) - 3} more" if len(files) > 3 else ""
    return f"{key}: {shown}{more} hold{'' if len(files) > 1 else 's'} no text."


def text_suffix(path: Path) -> str:
    """Return the ending by which a file is read; nothing of one that isn't."""
    name = path.name.lower()
    return next((suffix for suffix in TEXT_SUFFIXES if name.endswith(suffix)), "")


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
            with _opened(path, Reading(key="")) as stream:
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


# One reader for each form of files


def records(
    path: Path, reading: Reading, *, columns: Columns | None = None
) -> Iterator[tuple[str, Any]]:
    """Yield place and record of a file of records; one that can't be read is skipped.

    Args:
        columns: returns the columns of a table to read, of those that it has; None: all.

    Raises:
        WrongRecordError: it can't be read as what its name says.
    """
    yield from _RECORDS[_kind(path)](path, reading, columns or list)


def _texts(path: Path, reading: Reading) -> Iterator[str]:
    columns = partial(_columns, field=reading.text_field)
    for where, record in records(path, reading, columns=columns):
        try:
            yield text_of(record, field=reading.text_field)
        except WrongRecordError as error:
            reading.skip(f"{where} {error}")


def _array(path: Path, reading: Reading, columns: Columns) -> Iterator[tuple[str, Any]]:
    text = whole_text(path, reading, max_bytes=MAX_ARRAY_BYTES)
    for number, record in enumerate(array_elements(text), start=1):
        yield f"{path}, record {number}", record


def _lines(path: Path, reading: Reading, columns: Columns) -> Iterator[tuple[str, Any]]:
    for number, line in _numbered_lines(path, reading):
        where = f"{path}, line {number}"
        try:
            text = _decoded(_whole_line(line)) if line.strip() else ""
            record = parse(text) if text else None
        except WrongRecordError as error:
            reading.skip(f"{where} {error}")
            continue
        if text:
            yield where, record


def _table(path: Path, reading: Reading, columns: Columns) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(MAX_LINE_BYTES)
    # Not a generator, which would end with the first line that is too long
    lines = map(_table_line, _numbered_lines(path, reading))
    rows = csv.DictReader(lines, strict=True)
    try:
        names = columns(rows.fieldnames or ())
    except csv.Error as error:
        raise WrongRecordError(f"is no table ({_short(error)})") from error
    while True:
        where = f"{path}, line {rows.line_num + 1}"
        try:
            row = next(rows, None)
            if row is None:
                return
            record = {name: row[name] for name in names}
            for name, text in record.items():
                if text and not text.isascii():
                    record[name] = _decoded(text.encode(errors="surrogateescape"))
        except (csv.Error, WrongRecordError) as error:
            reading.skip(f"{where} {_short(error)}")
            continue
        yield where, record


def _table_line(numbered: tuple[int, bytes]) -> str:
    """Return a line, in which bytes that are no UTF-8 are escaped until its row is known."""
    return _whole_line(numbered[1]).decode("utf-8", errors="surrogateescape")


def _rows(path: Path, reading: Reading, columns: Columns) -> Iterator[tuple[str, Any]]:
    expansion = _Expansion(path.stat().st_size)

    def count(num_bytes: int) -> None:
        expansion.count(num_bytes)
        reading.count(num_bytes)

    for number, record in enumerate(parquet_records(path, columns=columns, count=count), start=1):
        yield f"{path}, row {number}", record


# Form of files → what reads their records. Another form is another entry here.
_RECORDS: dict[str, Callable[[Path, Reading, Columns], Iterator[tuple[str, Any]]]] = {
    ".jsonl": _lines,
    ".json": _array,
    ".csv": _table,
    ".parquet": _rows,
}


def _kind(path: Path) -> str:
    """Return the ending by which a file is read, without that of its packing."""
    return text_suffix(path).removesuffix(_PACKED)


def _columns(names: Sequence[str], field: str) -> list[str]:
    if field in names:
        return [field]
    known = [name for name in names if name in FORM_FIELDS]
    if field != DEFAULT_FIELD or not known:
        raise missing_field(field, names)
    return known


# Bytes into text


def _numbered_lines(path: Path, reading: Reading) -> Iterator[tuple[int, bytes]]:
    """Yield number and bytes of the lines; of one that is too long the first `MAX_LINE_BYTES`."""
    with _opened(path, reading) as stream:
        number = 0
        while line := stream.line(MAX_LINE_BYTES):
            number += 1
            if number == 1:
                _check_encoding(line)
                line = line.removeprefix(_BYTE_ORDER_MARK)
            yield number, line
            rest = line if len(line) >= MAX_LINE_BYTES else b"\n"
            while rest and not rest.endswith(b"\n"):
                rest = stream.line(_PIECE_BYTES)


def _whole_line(line: bytes) -> bytes:
    """Return a line as it is.

    Raises:
        WrongRecordError: it is longer than a line may be, and was cut.
    """
    if len(line) >= MAX_LINE_BYTES and not line.endswith(b"\n"):
        raise WrongRecordError(f"is longer than {MAX_LINE_BYTES // 2**20} MB, the most")
    return line


def whole_text(path: Path, reading: Reading, *, max_bytes: int) -> str:
    """Return a file's text, unpacked.

    Raises:
        WrongRecordError: it is no UTF-8, or too large.
    """
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
    decoder, start, num_decoded = getincrementaldecoder("utf-8")(), 0, 0
    with _opened(path, reading) as stream:
        while piece := stream.piece():
            if start == 0:
                _check_encoding(piece)
            if (position := piece.find(0)) >= 0:
                raise WrongRecordError(f"holds a byte 0, at {start + position}; that is no text")
            content = piece if start else piece.removeprefix(_BYTE_ORDER_MARK)
            yield _decoded(content, decoder, start=num_decoded, is_last=False)
            start, num_decoded = start + len(piece), num_decoded + len(content)
    yield _decoded(b"", decoder, start=num_decoded)


def _check_encoding(start: bytes) -> None:
    """Refuse what isn't UTF-8 by its first bytes: a mark of another encoding, or bytes 0.

    Raises:
        WrongRecordError: names the encoding where it can be told.
    """
    found = json.detect_encoding(start[:4]).upper() if any(start[:4]) else "UTF-8"
    if not found.startswith("UTF-8"):
        name = found.replace("-LE", "LE").replace("-BE", "BE")  # as iconv has it
        raise WrongRecordError(
            f"is no UTF-8 but {name}, by its first bytes; convert it, for example with iconv -f "
            f"{name} -t UTF-8"
        )


def _decoded(
    content: bytes,
    decoder: IncrementalDecoder | None = None,
    *,
    start: int = 0,
    is_last: bool = True,
) -> str:
    """Return the characters of UTF-8 bytes, or those that are whole by now.

    Args:
        decoder: of a text that comes in pieces; a character may be in two of them.
        start: bytes of the pieces before.
    """
    decoder = decoder or getincrementaldecoder("utf-8")()
    waiting = len(decoder.getstate()[0])
    try:
        return decoder.decode(content, is_last)
    except UnicodeDecodeError as error:
        place = start - waiting + error.start
        raise WrongRecordError(
            f"is no UTF-8 (byte {place} is 0x{error.object[error.start]:02x}); convert it, for "
            "example with iconv -f ENCODING -t UTF-8"
        ) from error


# Parquet


def _parquet_batches(
    path: Path,
    *,
    columns: Callable[[Sequence[str]], list[str]] | None,
    count: Callable[[int], None],
) -> Iterator[Any]:
    """Yield record batches of bounded size; a text that many rows share may be there only once."""
    arrow, parquet = import_module("pyarrow"), import_module("pyarrow.parquet")
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


def _short(error: Exception) -> str:
    return str(error).split("\n", 1)[0][:200]
