"""Readers of local files: one per file extension, each yields the texts of a file.

Invalid records (a malformed line, a record without a text) are skipped and counted. A file
without any valid record, or a damaged file, is a problem. Only regular files are read, in pieces
of bounded size. A file that decompresses to far more than its size is refused.
"""

import csv
import gzip
import json
import os
import zlib
from codecs import IncrementalDecoder, getincrementaldecoder
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

from tritter.data.documents import PIECE_CHARACTERS, is_blank, pieces, pieces_of_chunks
from tritter.data.records import (
    DEFAULT_FIELD,
    FIELD_KEY,
    OF_RECORDS,
    TURNS,
    SkippedRecords,
    Text,
    WrongRecordError,
    conversation_fields,
    shown,
    text_of,
    unread_formats,
)
from tritter.errors import TritterError, key_name
from tritter.storage.reading import open_file

_MAX_ARRAY_BYTES = 256 * 2**20  # of a .json, which is parsed in memory
_MAX_LINE_BYTES = 32 * 2**20
# A .gz or .parquet may decode to this many times its own size. Real text never exceeds it.
_MAX_EXPANSION = 200
_FREE_EXPANSION_BYTES = 64 * 2**20  # always allowed, even for small files
_MAX_PROBLEMS_SHOWN = 100
_PIECE_BYTES = 2**20
_PARQUET_ROWS = 1024  # that are decoded at a time
_ROW_BYTES = 8  # minimum, so that rows without values count too
_PACKED = ".gz"
_WRITING = (".txt", ".md", ".rst", ".tex")
# fmt: off
_SOURCE_CODE = (
    ".py", ".pyi", ".pyx", ".c", ".h", ".cc", ".cpp", ".cxx", ".hh", ".hpp", ".cu", ".cuh",
    ".java", ".kt", ".kts", ".scala", ".groovy", ".clj", ".cs", ".fs", ".go", ".rs", ".swift",
    ".vb", ".m", ".mm", ".d", ".zig", ".nim", ".js", ".mjs", ".cjs", ".jsx", ".ts", ".tsx", ".vue",
    ".svelte", ".dart", ".html", ".htm", ".css", ".scss", ".xml", ".php", ".rb", ".pl", ".pm",
    ".lua", ".r", ".jl", ".hs", ".ml", ".mli", ".ex", ".exs", ".erl", ".el", ".lisp", ".scm",
    ".f", ".f90", ".pas", ".v", ".sv", ".vhdl", ".asm", ".s", ".sh", ".bash", ".zsh", ".ps1",
    ".sql", ".proto", ".cmake", ".yaml", ".yml", ".toml",
)
# fmt: on
_WHOLE = (*_WRITING, *_SOURCE_CODE)
_PLAIN = (*_WHOLE, ".jsonl", ".json", ".csv")
_TEXT_SUFFIXES = (*_PLAIN, ".parquet", *(f"{suffix}{_PACKED}" for suffix in _PLAIN))
SUPPORTED = (
    f"{', '.join(_WRITING)}, source files ({', '.join(_SOURCE_CODE[:4])}, ...), .jsonl, .json, "
    ".csv, all of these also as .gz, and .parquet"
)
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_BLANKS, _MAX_MESSAGE = " \t\r\n", 200  # of JSON

_Columns = Callable[[Sequence[str]], list[str]]
_Item = TypeVar("_Item")


class TextFileError(TritterError):
    """Files or data sets can't be read; `problems` has one line per problem."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        shown = list(self.problems[:_MAX_PROBLEMS_SHOWN])
        if len(self.problems) > len(shown):
            shown.append(f"and {len(self.problems) - len(shown)} more")
        lines = "\n".join(f"  {line}" for line in shown)
        several = f"the data has {len(self.problems)} problems:\n{lines}"
        super().__init__(shown[0] if len(self.problems) == 1 else several)


class ByteLimitError(Exception):
    """The byte limit of a reading is reached; the rest was not read."""


class Reading:
    """Options and results of reading files and data sets.

    Args:
        key: the configuration key that named the files; each message begins with it.
        text_field: field of the text in .jsonl, .json, .csv and .parquet records.
        max_bytes: limit of decompressed bytes; beyond it, `ByteLimitError` is raised. None reads
            all.
        is_strict: an invalid record is a problem instead of being skipped.
        piece_characters: size of the `pieces` of long texts.

    Attributes:
        problems: fatal problems, one line each.
        notes: for each source with skipped records, their number and the first one.
        num_blank: texts without words, which are dropped.
        skipped: invalid records of the current source.
    """

    def __init__(
        self,
        *,
        key: str,
        text_field: str = DEFAULT_FIELD,
        max_bytes: int | None = None,
        is_strict: bool = False,
        piece_characters: int = PIECE_CHARACTERS,
    ) -> None:
        self.key = key
        self._piece_characters = piece_characters
        self._is_strict = is_strict
        self.text_field = text_field
        self.num_bytes = 0
        self.problems: list[str] = []
        self.notes: list[str] = []
        self.num_blank = 0
        self._max_bytes = max_bytes
        self.skipped = SkippedRecords()
        self._is_unread_noted = False

    def texts(self, path: Path) -> Iterator[Text]:
        """Yield the texts of a file of records; invalid records are skipped."""
        yield from self.counted(str(path), _texts(path, self))

    def pieces(self, path: Path) -> Iterator[Text]:
        """Yield the `pieces` of a file's texts; plain text files are streamed."""
        if _kind(path) in _WHOLE:
            found: Iterator[Text] = pieces_of_chunks(_chunks(path, self), self._piece_characters)
            yield from self.filled(self.counted(str(path), found))
        else:
            yield from self.filled(self.texts(path))

    def pieces_of(self, files: Sequence[Path]) -> Iterator[Text]:
        """Yield the `pieces` of files, which must have words, with one in memory at a time."""
        has_words = False
        for piece in chain.from_iterable(map(self.pieces, files)):
            has_words = True
            yield piece
        if self.problems or not has_words:
            raise TextFileError(self.problems or [self.no_text(files)])

    def records(self, path: Path, *, columns: _Columns | None = None) -> Iterator[tuple[str, Any]]:
        """Yield location and content of each record of a file; invalid records are skipped.

        Args:
            path: the file.
            columns: maps the columns of a table to those to read; None reads all.
        """
        yield from _RECORDS[_kind(path)](path, self, columns or list)

    def whole_text(self, path: Path, *, max_bytes: int) -> str:
        """Return a file's decompressed text."""
        chunks, size = list[str](), 0
        for chunk in _chunks(path, self):
            chunks.append(chunk)
            size += len(chunk.encode())
            if size > max_bytes:
                raise WrongRecordError(
                    f"exceeds the limit of {max_bytes // 2**20} MB; split the file, or write its "
                    "texts to a .jsonl"
                )
        return "".join(chunks)

    def filled(self, texts: Iterable[Text]) -> Iterator[Text]:
        """Yield the `pieces` of texts that have words, and count the others."""
        size = self._piece_characters
        for piece in chain.from_iterable(map(partial(pieces, size=size), texts)):
            if is_blank(piece):
                self.num_blank += 1
            else:
                yield piece

    def counted(self, name: str, items: Iterator[_Item]) -> Iterator[_Item]:
        """Yield the items of one source, and record its skipped records and problems."""
        num_read, problem, self.skipped = 0, None, SkippedRecords()
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
        except TritterError as error:  # from opening the file; its message contains the path
            problem = str(error).removesuffix(".")
        finally:
            skipped = self.skipped
            if skipped.count and num_read and not self._is_strict:
                self.notes.append(self.skipped_note(num_read))
            elif lines := skipped.first_lines:
                more = skipped.count - len(lines)
                # No record is valid, all for one reason: as for a wrong data.text_field
                is_alike = skipped.count > 2 and len(skipped.reasons) == 1 and not num_read
                self.problems += map(self._line, lines[:1] if is_alike else lines)
                if is_alike:
                    alike = f"{name} has {skipped.count - 1} more records with this problem"
                    self.problems.append(self._line(alike))
                elif more:
                    self.problems.append(self._line(f"{name} has {more} more invalid records"))
            self.problems += [self._line(problem)] if problem else []

    def skipped_note(self, num_read: int) -> str:
        """Return the number of skipped records by reason, and the first; others were read."""
        return self.skipped.note(num_read, self._line)

    def dropped_note(self, num_read: int, *, num_duplicates: int = 0) -> str:
        """Return the number of documents that were dropped although they are valid; else ""."""
        kinds = {"empty": self.num_blank, "duplicate": num_duplicates}
        dropped = " and ".join(f"{number:,} {kind}" for kind, number in kinds.items() if number)
        total = f"{sum(kinds.values()) + num_read:,}"
        return f"{self.key}: dropped of {total} documents: {dropped}." if dropped else ""

    def no_text(self, files: Sequence[Path]) -> str:
        """Return the message for files that contain no text."""
        shown = ", ".join(map(str, files[:3]))
        more = f" and {len(files) - 3} more" if len(files) > 3 else ""
        return f"{self.key}: {shown}{more} contain{'' if len(files) > 1 else 's'} no text."

    def note_unread(self, names: Collection[str], *, is_text: bool, option: str) -> None:
        """Add a note, once, if records have another content than the one that is read.

        Args:
            names: the fields with a value.
            is_text: whether the text is read; otherwise the first of `TURNS`.
            option: selects messages, to precede their name.
        """
        unread = conversation_fields(names) if is_text else unread_formats(names)
        if self._is_unread_noted or not unread:
            return
        read = DEFAULT_FIELD if is_text else next(name for name in TURNS if name in names)
        turns = [f"{option}{name}" for name in unread if name in TURNS]
        advice = turns[0] if turns else f"a copy without {read}"
        self.notes.append(
            f"{self.key}: records have {read} and {', '.join(unread)}; {read} is read "
            f"({advice} reads {'conversations' if is_text else 'the other'})."
        )
        self._is_unread_noted = True

    def count(self, num_bytes: int) -> None:
        """Count bytes read."""
        self.num_bytes += num_bytes
        if self._max_bytes is not None and self.num_bytes > self._max_bytes:
            raise ByteLimitError

    def _line(self, problem: str) -> str:
        return f"{self.key}: {problem}{'' if problem.endswith(('?', '.')) else '.'}"


def text_suffix(path: Path) -> str:
    """Return the extension that selects the reader of a file; empty if it is unsupported."""
    return next((suffix for suffix in _TEXT_SUFFIXES if path.name.lower().endswith(suffix)), "")


def not_data(path: Path) -> str | None:
    """Return the reason why a file in a folder of texts is none; None if it may be one.

    A project contains settings in .json (one object) and source files of other encodings.
    """
    kind = _kind(path)
    if kind != ".json" and kind not in _SOURCE_CODE:
        return None
    # A file that can't be opened is reported when it is read
    with suppress(OSError, EOFError, zlib.error, TritterError):
        try:
            with _open_stream(path, Reading(key="")) as stream:
                start, is_whole = stream.piece(), not stream.piece()
            _check_encoding(start)
            text = _decode(start.removeprefix(_BYTE_ORDER_MARK), is_last=is_whole).lstrip()
        except WrongRecordError:
            text = "\0"
        if "\0" in text:
            return f"{kind} not in UTF-8"
        if kind == ".json" and text.startswith("{") and not _has_lines(text):
            return f"{kind} of one object"
    return None


def _has_lines(text: str) -> bool:
    """Return whether this is JSON Lines: an object, and more after its line."""
    first, _, rest = text.partition("\n")
    try:
        return bool(rest.strip()) and isinstance(parse(first), dict)
    except WrongRecordError:
        return False


def has_records(path: Path) -> bool:
    """Return whether the reader of a file yields records, not the file's text."""
    return _kind(path) in _RECORDS


def check_sizes(path: Path) -> None:
    """Refuse a file of a data set that takes far more memory than its size, by reading it once."""
    name = path.name.lower()
    has_lines = name.removesuffix(_PACKED).endswith((".jsonl", ".json", ".csv", ".tsv"))
    if name.endswith(".parquet"):
        expansion = _Expansion(path.stat().st_size)
        for batch in _parquet_batches(path, columns=None):
            expansion.count(_decoded_bytes(batch))
    elif name.endswith(_PACKED) or has_lines:
        is_array = name.removesuffix(_PACKED).endswith(".json")
        limit = _MAX_ARRAY_BYTES if is_array else _MAX_LINE_BYTES
        try:
            _check_lines(path, limit if has_lines else None)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise WrongRecordError(f"cannot be decompressed ({error})") from error


def _check_lines(path: Path, limit: int | None) -> None:
    """Read a file, and check the length of its lines."""
    number, length = 1, 0
    with _open_stream(path, Reading(key="")) as stream:
        while piece := stream.piece():
            end = piece.find(b"\n")
            length += len(piece) if end < 0 else end
            if limit is not None and length > limit:
                problem = f"exceeds the limit of {limit // 2**20} MB per line"
                raise WrongRecordError(f"line {number} {problem}")
            if end >= 0:
                length = len(piece) - piece.rfind(b"\n") - 1
                number += piece.count(b"\n")


def parquet_records(
    path: Path,
    *,
    columns: Callable[[Sequence[str]], list[str]] | None = None,
    count: Callable[[int], None],
) -> Iterator[dict[str, Any]]:
    """Yield the records of a .parquet file; an empty one has a text that is not UTF-8.

    Args:
        path: the file.
        columns: maps the file's columns to those to read; None reads all.
        count: receives the size of the next rows before they are converted; may raise.
    """
    for batch in _parquet_batches(path, columns=columns):
        size = max(1, _decoded_bytes(batch))
        is_small = size < _FREE_EXPANSION_BYTES
        step = max(1, batch.num_rows * _PIECE_BYTES // size) if is_small else 1
        for start in range(0, batch.num_rows, step):
            part = batch.slice(start, step)
            count(_decoded_bytes(part))
            try:
                yield from part.to_pylist()
            except UnicodeDecodeError:
                for index in range(part.num_rows):
                    record = {}
                    with suppress(UnicodeDecodeError):
                        (record,) = part.slice(index, 1).to_pylist()
                    yield record


class _Expansion:
    """Counter of the decoded bytes of a file with `packed_bytes`."""

    def __init__(self, packed_bytes: int) -> None:
        self.limit_bytes = max(_FREE_EXPANSION_BYTES, _MAX_EXPANSION * packed_bytes)
        self._num_bytes = 0

    def count(self, num_bytes: int) -> None:
        """Count decoded bytes."""
        self._num_bytes += num_bytes
        if self._num_bytes > self.limit_bytes:
            raise WrongRecordError(
                f"decompresses to more than {self.limit_bytes // 2**20} MB; the limit is "
                f"{_FREE_EXPANSION_BYTES // 2**20} MB or {_MAX_EXPANSION} times the file's size"
            )


class _Stream:
    """Decompressed bytes of a file, counted and limited."""

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
def _open_stream(path: Path, reading: Reading) -> Iterator[_Stream]:
    """Open a file as a stream."""
    with open_file(path) as file:
        if path.name.lower().endswith(_PACKED):
            size = os.fstat(file.fileno()).st_size
            with gzip.GzipFile(fileobj=file) as unpacked:
                yield _Stream(unpacked, reading=reading, packed_bytes=size)
        else:
            yield _Stream(file, reading=reading, packed_bytes=None)


# One reader per file format


def _texts(path: Path, reading: Reading) -> Iterator[Text]:
    field = reading.text_field

    def columns(names: Sequence[str]) -> list[str]:
        if field == DEFAULT_FIELD and field in names:
            reading.note_unread(names, is_text=True, option=f"{key_name(FIELD_KEY)}=")
        return _columns(names, field)

    for where, record in reading.records(path, columns=columns):
        try:
            text = text_of(record, field=field)
        except WrongRecordError as error:
            reading.skipped.add(where, str(error))
            continue
        if field == DEFAULT_FIELD and isinstance(record, dict):
            names, is_text = [n for n in record if record[n]], isinstance(text, str)
            reading.note_unread(names, is_text=is_text, option=f"{key_name(FIELD_KEY)}=")
        yield text


def _array(path: Path, reading: Reading, columns: _Columns) -> Iterator[tuple[str, Any]]:
    text = reading.whole_text(path, max_bytes=_MAX_ARRAY_BYTES)
    for number, record in enumerate(_array_elements(text), start=1):
        yield f"{path}, record {number}", record


def _lines(path: Path, reading: Reading, columns: _Columns) -> Iterator[tuple[str, Any]]:
    for number, line in _numbered_lines(path, reading):
        where = f"{path}, line {number}"
        try:
            text = _decode(_whole_line(line)) if line.strip() else ""
            record = parse(text) if text else None
        except WrongRecordError as error:
            reading.skipped.add(where, str(error))
            continue
        if text:
            yield where, record


def _table(path: Path, reading: Reading, columns: _Columns) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(_MAX_LINE_BYTES)
    # Not a generator: it would end at the first line that is too long
    rows = csv.DictReader(map(_table_line, _numbered_lines(path, reading)), strict=True)
    try:
        header = rows.fieldnames or ()
    except csv.Error as error:
        raise WrongRecordError(f"is not a valid CSV table ({_short(error)})") from error
    if problem := separator_problem(header):
        raise WrongRecordError(problem)
    names = columns(header)
    if repeated := [name for name in names if header.count(name) > 1]:
        raise WrongRecordError(f"repeats the column {shown(repeated[0])}")
    while True:
        where = f"{path}, line {rows.line_num + 1}"
        try:
            row = next(rows, None)
            if row is None:
                return
            if any(surplus := row.pop(None, ())):  # of a text with commas, without quotes
                count = f"{len(header) + len(surplus)} values for {len(header)} columns"
                raise WrongRecordError(f"has {count}; put quotes around a text with commas")
            record = {name: row[name] for name in names}
            for name, text in record.items():
                if text and not text.isascii():
                    record[name] = _decode(text.encode(errors="surrogateescape"))
        except (csv.Error, WrongRecordError) as error:
            reading.skipped.add(where, _short(error))
            continue
        yield where, record


def separator_problem(header: Sequence[str]) -> str:
    """Return the problem of a header that has other separators than commas; else ""."""
    separator = next((sign for sign in ";\t|" if sign in "".join(header)), None)
    if len(header) != 1 or separator is None:
        return ""
    column = shown(header[0])
    return f"has one column, {column}; columns must be separated by commas, not by {separator!r}"


def _table_line(numbered: tuple[int, bytes]) -> str:
    """Return a line with invalid UTF-8 bytes escaped; the row is checked later."""
    return _whole_line(numbered[1]).decode("utf-8", errors="surrogateescape")


def _rows(path: Path, reading: Reading, columns: _Columns) -> Iterator[tuple[str, Any]]:
    expansion = _Expansion(path.stat().st_size)

    def count(num_bytes: int) -> None:
        expansion.count(num_bytes)
        reading.count(num_bytes)

    for number, record in enumerate(parquet_records(path, columns=columns, count=count), start=1):
        if not record:
            reading.skipped.add(f"{path}, row {number}", "is not UTF-8")
        else:
            yield f"{path}, row {number}", record


# File extension → reader of its records. Add new formats here.
_RECORDS: dict[str, Callable[[Path, Reading, _Columns], Iterator[tuple[str, Any]]]] = {
    ".jsonl": _lines,
    ".json": _array,
    ".csv": _table,
    ".parquet": _rows,
}


def _kind(path: Path) -> str:
    """Return the extension of a file without `.gz`."""
    return text_suffix(path).removesuffix(_PACKED)


def _columns(names: Sequence[str], field: str) -> list[str]:
    if field in names and field not in TURNS:
        return [field, *(name for name in OF_RECORDS if name in names and name != field)]
    known = conversation_fields(names) if field in (DEFAULT_FIELD, *TURNS) else ()
    if not known:
        raise WrongRecordError.of_field(field, names)
    return list(known)


# Decoding


def _numbered_lines(path: Path, reading: Reading) -> Iterator[tuple[int, bytes]]:
    """Yield number and bytes of each line, truncated at `_MAX_LINE_BYTES`."""
    with _open_stream(path, reading) as stream:
        number = 0
        while line := stream.line(_MAX_LINE_BYTES):
            number += 1
            if number == 1:
                _check_encoding(line)
                line = line.removeprefix(_BYTE_ORDER_MARK)
            yield number, line
            rest = line if len(line) >= _MAX_LINE_BYTES else b"\n"
            while rest and not rest.endswith(b"\n"):
                rest = stream.line(_PIECE_BYTES)


def _whole_line(line: bytes) -> bytes:
    """Return a line if it is complete."""
    if len(line) >= _MAX_LINE_BYTES and not line.endswith(b"\n"):
        raise WrongRecordError(f"exceeds the limit of {_MAX_LINE_BYTES // 2**20} MB per line")
    return line


def _chunks(path: Path, reading: Reading) -> Iterator[str]:
    """Yield a file's text in chunks."""
    decoder, start, num_decoded = getincrementaldecoder("utf-8")(), 0, 0
    with _open_stream(path, reading) as stream:
        while piece := stream.piece():
            if start == 0:
                _check_encoding(piece)
            if (position := piece.find(0)) >= 0:
                offset = start + position
                raise WrongRecordError(f"is not text: it has a zero byte at offset {offset}")
            content = piece if start else piece.removeprefix(_BYTE_ORDER_MARK)
            yield _decode(content, decoder, start=num_decoded, is_last=False)
            start, num_decoded = start + len(piece), num_decoded + len(content)
    yield _decode(b"", decoder, start=num_decoded)


def _check_encoding(start: bytes) -> None:
    """Refuse text whose first bytes indicate another encoding than UTF-8."""
    found = json.detect_encoding(start[:4]).upper() if any(start[:4]) else "UTF-8"
    if not found.startswith("UTF-8"):
        name = found.replace("-LE", "LE").replace("-BE", "BE")  # iconv's name
        raise WrongRecordError(
            f"appears to be {name}, not UTF-8; convert it, for example with iconv -f "
            f"{name} -t UTF-8"
        )


def _decode(
    content: bytes,
    decoder: IncrementalDecoder | None = None,
    *,
    start: int = 0,
    is_last: bool = True,
) -> str:
    """Decode UTF-8 bytes; incomplete characters at the end wait for the next call.

    Args:
        content: the bytes.
        decoder: keeps state between pieces of a text.
        start: offset of the piece in the text.
        is_last: the piece ends the text.
    """
    decoder = decoder or getincrementaldecoder("utf-8")()
    waiting = len(decoder.getstate()[0])
    try:
        return decoder.decode(content, is_last)
    except UnicodeDecodeError as error:
        offset = start - waiting + error.start
        raise WrongRecordError(
            f"is not UTF-8 (byte {offset} is 0x{error.object[error.start]:02x}); convert it, for "
            "example with iconv -f ENCODING -t UTF-8"
        ) from error


# JSON


def parse(text: str) -> Any:
    """Parse a line of JSON."""
    try:
        return _DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        raise _no_json(error) from error


def _array_elements(text: str) -> Iterator[Any]:
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


# Parquet


def _parquet_batches(
    path: Path, *, columns: Callable[[Sequence[str]], list[str]] | None
) -> Iterator[Any]:
    """Yield record batches of bounded size, with texts that stay dictionary-encoded."""
    arrow, parquet = import_module("pyarrow"), import_module("pyarrow.parquet")
    with open_file(path) as opened:
        expansion = _Expansion(os.fstat(opened.fileno()).st_size)
        try:
            metadata = parquet.read_metadata(opened)
            leaves = [metadata.schema.column(index) for index in range(metadata.num_columns)]
            for group in range(metadata.num_row_groups):
                rows, shared = _batch_form(metadata.row_group(group), leaves, expansion)
                with parquet.ParquetFile(opened, read_dictionary=shared, metadata=metadata) as file:
                    names = None if columns is None else columns(file.schema_arrow.names)
                    yield from file.iter_batches(rows, [group], names)
        except arrow.ArrowException as error:
            raise WrongRecordError(f"is not a parquet file ({_short(error)})") from error


def _batch_form(group: Any, leaves: Sequence[Any], expansion: _Expansion) -> tuple[int, list[str]]:
    """Return the rows of a row group to decode at a time, and its dictionary-encoded columns.

    Texts stay dictionary-encoded, since rows may repeat a large one. Arrow cannot do that with
    texts that are stored as differences.
    """
    rows, shared = _PARQUET_ROWS, list[str]()
    for index, leaf in enumerate(leaves):
        chunk = group.column(index)
        num_bytes, largest = chunk.total_uncompressed_size, 8
        expansion.count(num_bytes)
        if leaf.physical_type == "FIXED_LEN_BYTE_ARRAY":
            largest = leaf.length
        elif "DELTA_BYTE_ARRAY" in chunk.encodings:  # values may repeat prefixes of earlier ones
            largest = num_bytes
        if leaf.max_repetition_level:
            expansion.count(largest * chunk.num_values)
        mean = num_bytes // max(1, group.num_rows)
        rows = min(rows, max(1, _FREE_EXPANSION_BYTES // max(1, largest, mean)))
        is_delta = any(encoding.startswith("DELTA") for encoding in chunk.encodings)
        if leaf.physical_type == "BYTE_ARRAY" and not is_delta:
            shared.append(leaf.path)
    return rows, shared


def _decoded_bytes(column: Any) -> int:
    """Return the size of a batch or column when each row has its own copy of its text."""
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
