"""Documents: texts cut by their own size alone, and told apart by what they say."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256

from tritter.errors import RequestError

PIECE_CHARACTERS = 20_000
NAME_CHARACTERS = 40
_BLANK_LINES = re.compile(r"(?<=\n)[ \t\r]*\n(?:[ \t\r]*\n)*")


@dataclass(frozen=True, slots=True)
class Document:
    """One text and the name under which results of it are paired and clustered."""

    identifier: str
    text: str


def text_key(text: str) -> str:
    """Return what tells a text from others: SHA-256 (hex) of its words, whatever blank is between.

    So a file and a record of the same text are one, with any line ends around or within.
    """
    return sha256(" ".join(text.split()).encode()).hexdigest()


def documents_of(texts: Iterable[str]) -> tuple[Document, ...]:
    """Return texts as documents, a long one as its `pieces`, each different text once.

    Names and order follow from the texts alone: neither what the files are called, nor in which
    order they come, nor what else there is makes a difference to any of them.
    """
    by_key: dict[str, str] = {}
    for piece in (piece for text in texts for piece in pieces(text)):
        key = text_key(piece)
        by_key[key] = min(by_key.get(key, piece), piece)
    return tuple(Document(_named(key, by_key[key]), by_key[key]) for key in sorted(by_key))


def _named(key: str, text: str) -> str:
    """Return a name that tells a text from others, and by which a person finds it."""
    return f"{key[:16]} {' '.join(text[:NAME_CHARACTERS].split())}"


def pieces(text: str) -> Iterator[str]:
    """Yield a text without the blank around it, cut when it is long; nothing of a blank one."""
    whole = text.replace("\r\n", "\n").strip()
    yield from (piece for piece in map(str.strip, cut(whole)) if piece)


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


def documents_digest(documents: Sequence[Document]) -> str:
    """Return the SHA-256 (hex) of all identifiers and texts in order, each with its length."""
    digest = sha256()
    for document in documents:
        for part in (document.identifier.encode(), document.text.encode()):
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part)
    return digest.hexdigest()


def distinct(documents: Iterable[Document]) -> list[Document]:
    """Return the documents that are not blank, of those with the same text the first.

    Raises:
        RequestError: two different texts share an identifier.
    """
    by_text: dict[str, Document] = {}
    for document in documents:
        if document.text.strip():
            by_text.setdefault(document.text, document)
    identifiers: set[str] = set()
    for document in by_text.values():
        if document.identifier in identifiers:
            raise RequestError(
                f"data: two documents with different texts are both called "
                f"'{document.identifier}'; every document needs a name of its own."
            )
        identifiers.add(document.identifier)
    return list(by_text.values())


def _cut_position(text: str, start: int, end: int) -> int:
    if (blank := _BLANK_LINES.search(text, start, end)) is not None:
        return blank.end()
    for sign in ("\n", " "):
        if (position := text.find(sign, start, end)) >= 0:
            return position + 1
    return end
