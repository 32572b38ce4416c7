"""Text of one's own: the texts that the readers find in files."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from tritter.data.readers import Reading, TextFileError


def read_texts(
    files: Sequence[Path], *, key: str, text_field: str
) -> tuple[tuple[Path, tuple[str, ...]], ...]:
    """Read the texts of some files, in their order: each record is one, and a file without.

    Args:
        key: the configuration's key that named the files, for messages.
        text_field: of records in .jsonl, .json and .parquet.

    Raises:
        TextFileError: files can't be read, decoded or parsed, or lack the field; lists all of it,
            with file, line and what was found. Or all are blank.
    """
    reading = Reading(key=key, text_field=text_field)
    texts = tuple((path, tuple(reading.texts(path))) for path in files)
    found = any(text.strip() for _, of_file in texts for text in of_file)
    _check(reading, files, is_blank=not found)
    return texts


def text_pieces(
    files: Sequence[Path], *, key: str, text_field: str, max_bytes: int | None = None
) -> Iterator[str]:
    """Yield the texts of some files cut into their `pieces`, which is all that is held of them.

    Raises:
        TextFileError: as `read_texts`, once all was read.
        SpentError: `max_bytes` were read.
    """
    reading, is_blank = Reading(key=key, text_field=text_field, max_bytes=max_bytes), True
    for path in files:
        for piece in reading.pieces(path):
            is_blank = False
            yield piece
    _check(reading, files, is_blank=is_blank)


def _check(reading: Reading, files: Sequence[Path], *, is_blank: bool) -> None:
    if reading.problems:
        raise TextFileError(reading.problems)
    if is_blank:
        raise TextFileError([no_text(reading.key, files)])


def no_text(key: str, files: Sequence[Path]) -> str:
    """Return the line that says that files are all blank."""
    shown = ", ".join(map(str, files[:3]))
    more = f" and {len(files) - 3} more" if len(files) > 3 else ""
    return f"{key}: {shown}{more} hold{'' if len(files) > 1 else 's'} no text."
