"""Documents: texts cut by their own size alone, and told apart by what they say."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING, overload

from tritter.storage.spool import Spool

if TYPE_CHECKING:
    import numpy as np

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


class Documents(Sequence[Document]):
    """Documents whose texts are spooled, each different one once; memory holds their places.

    Attributes:
        notes: what was skipped when they were read, a sentence each.

    Args:
        texts: UTF-8, one after the other.
        keys: bytes of the `text_key` of each.
        ends: int64, where each ends.
        order: int64, which of them are meant, in their order.
    """

    def __init__(self, texts: Spool, keys: np.ndarray, ends: np.ndarray, order: np.ndarray) -> None:
        self._texts, self._keys, self._ends, self._order = texts, keys, ends, order
        self.notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self._order)

    @overload
    def __getitem__(self, index: int) -> Document: ...
    @overload
    def __getitem__(self, index: slice) -> Documents: ...
    def __getitem__(self, index: int | slice) -> Document | Documents:
        import numpy as np

        if isinstance(index, slice):
            return self.chosen(np.arange(len(self))[index])
        place = self._order[index]
        text = self._text(place).decode()
        # Tells the text from others, and a person finds it by its beginning
        name = f"{self._key(place)[:16]} {' '.join(text[:NAME_CHARACTERS].split())}"
        return Document(name, text)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def chosen(self, indices: np.ndarray) -> Documents:
        """Return some of them, by their indices, in that order."""
        return Documents(self._texts, self._keys, self._ends, self._order[indices])

    def keys(self) -> Iterator[str]:
        """Yield the `text_key` of each, without reading any."""
        return map(self._key, self._order)

    def _key(self, place: np.int64) -> str:
        return self._keys[place].tobytes().hex()

    def _text(self, place: np.int64) -> bytes:
        start = int(self._ends[place - 1]) if place else 0
        return self._texts.read(start, int(self._ends[place]))

    @classmethod
    def of(cls, texts: Iterable[str]) -> Documents:
        """Take texts, in the order of their keys; of those with the same words the least."""
        import numpy as np

        spool, keys, ends = Spool(), Spool(), Spool()
        for text in texts:
            spool.append(text.encode())
            keys.append(bytes.fromhex(text_key(text)))
            ends.append(len(spool).to_bytes(8, "little"))
        found = cls(spool, keys.array("V32"), ends.array("<i8"), np.empty(0, dtype=np.int64))
        order = np.argsort(keys.array("S32"), kind="stable")
        in_order = found._keys[order]
        is_first = np.ones(len(order), dtype=bool)
        is_first[1:] = in_order[1:] != in_order[:-1]
        first = np.flatnonzero(is_first)
        for group in np.flatnonzero(np.diff(first, append=len(order)) > 1):
            begin = first[group]
            end = first[group + 1] if group + 1 < len(first) else len(order)
            # As bytes of UTF-8 texts have the order of their characters
            first[group] = min(range(begin, end), key=lambda at: found._text(np.int64(order[at])))
        found._order = order[first]
        return found


def documents_of(texts: Iterable[str]) -> Documents:
    """Return texts as documents, a long one as its `pieces`, each different text once.

    Names and order follow from the texts alone: neither what the files are called, nor in which
    order they come, nor what else there is makes a difference to any of them.
    """
    return Documents.of(piece for text in texts for piece in pieces(text))


def notes_of(documents: Sequence[Document]) -> tuple[str, ...]:
    """Return what was skipped when documents were read, a sentence each."""
    return documents.notes if isinstance(documents, Documents) else ()


def pieces(text: str) -> Iterator[str]:
    """Yield a text without the blank around it, cut when it is long; nothing of a blank one."""
    whole = text.replace("\r\n", "\n").strip()
    yield from (piece for piece in map(str.strip, cut(whole)) if piece)


def pieces_of_chunks(chunks: Iterable[str]) -> Iterator[str]:
    """Yield the `pieces` of a text that comes in chunks, of which about one is held.

    They are those of the whole text: what is blank behind the last word that came is kept back
    until more comes, since none of it counts at the end.
    """
    text, blanks = "", list[str]()
    for chunk in _with_line_ends(chunks):
        word_end = len(chunk.rstrip())
        if not word_end:
            blanks += [chunk] if text else []
            continue
        text = "".join((text, *blanks, chunk[:word_end])) if text else chunk[:word_end].lstrip()
        blanks = [chunk[word_end:]]
        start = 0
        while len(text) - start > 2 * PIECE_CHARACTERS:
            end = _cut_position(text, start + PIECE_CHARACTERS, start + 2 * PIECE_CHARACTERS)
            yield from filter(None, (text[start:end].strip(),))
            start = end
        text = text[start:]
    yield from filter(None, map(str.strip, cut(text)))


def _with_line_ends(chunks: Iterable[str]) -> Iterator[str]:
    """Yield chunks with plain line ends; one that was parted stays whole."""
    carried = ""
    for chunk in chunks:
        joined = carried + chunk
        carried = "\r" if joined.endswith("\r") else ""
        yield joined.removesuffix(carried).replace("\r\n", "\n")
    yield carried


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


def _cut_position(text: str, start: int, end: int) -> int:
    if (blank := _BLANK_LINES.search(text, start, end)) is not None:
        return blank.end()
    for sign in ("\n", " "):
        if (position := text.find(sign, start, end)) >= 0:
            return position + 1
    return end
