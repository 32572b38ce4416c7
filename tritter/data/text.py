"""Text of one's own: documents from the texts that the readers find in files.

A record of .jsonl, .json or .parquet is a document, and so is a .txt, .md or .rst file, unless it
is over a megabyte or its domain has too few documents: then it is cut at blank lines, because a
gate needs enough documents to tell a change from chance.
"""

import re
from collections.abc import Iterator, Sequence
from hashlib import sha256
from pathlib import Path

from tritter.data.documents import Document
from tritter.data.readers import Reading, TextFileError, is_one_text

CUT_FROM_BYTES = 1_000_000
PIECE_CHARACTERS = 20_000
ENOUGH_DOCUMENTS = 20  # with fewer in a domain, every long file of one text is cut
_BLANK_LINES = re.compile(r"(?<=\n)[ \t\r]*\n(?:[ \t\r]*\n)*")


def read_documents(files: Sequence[Path], *, key: str, text_field: str) -> tuple[Document, ...]:
    """Read all documents of some files, in their order.

    A document is named by its file and its content, so that moving a folder or adding a record
    moves no other document between training and validation.

    Args:
        key: the configuration's key that named the files, for messages.
        text_field: of records in .jsonl, .json and .parquet.

    Raises:
        TextFileError: files can't be read, decoded or parsed, or lack the field; lists all of it,
            with file, line and what was found. Or all are blank.
    """
    reading = Reading(key=key, text_field=text_field)
    texts = {path: tuple(reading.texts(path)) for path in files}
    if reading.problems:
        raise TextFileError(reading.problems)
    is_scarce = sum(map(len, texts.values())) < ENOUGH_DOCUMENTS
    documents = [
        _document(path, piece)
        for path, found in texts.items()
        for text in found
        for piece in _pieces(path, text, is_scarce=is_scarce)
        if piece.strip()
    ]
    if not documents:
        raise TextFileError([no_text(key, files)])
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


def no_text(key: str, files: Sequence[Path]) -> str:
    """Return the line that says that files are all blank."""
    shown = ", ".join(map(str, files[:3]))
    more = f" and {len(files) - 3} more" if len(files) > 3 else ""
    return f"{key}: {shown}{more} hold{'' if len(files) > 1 else 's'} no text."


def _pieces(path: Path, text: str, *, is_scarce: bool) -> Iterator[str]:
    if is_one_text(path) and (is_scarce or len(text.encode()) > CUT_FROM_BYTES):
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
