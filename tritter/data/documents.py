"""Documents: texts cut into pieces and identified by a hash of their words."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING, overload

from tritter.data.records import REASONING, Conversation, Text
from tritter.storage.spool import Spool

if TYPE_CHECKING:
    import numpy as np

PIECE_CHARACTERS = 20_000  # by default; a text of up to twice as many stays whole
_NAME_CHARACTERS = 40
_TEXT, _CONVERSATION = b"t", b"c"  # kinds of documents
_BLANK_LINES = re.compile(r"(?<=\n)[ \t\r]*\n(?:[ \t\r]*\n)*")


@dataclass(frozen=True, slots=True)
class Document:
    """A text and its identifier, by which results are paired and clustered.

    Args:
        identifier: hash and beginning of the text.
        text: the text, of a conversation as plain text.
        conversation: None for a text without messages.
    """

    identifier: str
    text: str
    conversation: Conversation | None = None

    @classmethod
    def of(cls, content: Text) -> Document:
        """Return a document that is identified by its beginning alone."""
        text = str(content)
        conversation = content if isinstance(content, Conversation) else None
        return cls(text[:_NAME_CHARACTERS], text, conversation)


def text_key(text: str) -> str:
    """Return the SHA-256 (hex) of a text's words, ignoring whitespace.

    A file and a record with the same words have the same key, regardless of line endings.
    """
    return sha256(" ".join(text.split()).encode()).hexdigest()


class Documents(Sequence[Document]):
    """Distinct documents with spooled texts; only their offsets are in memory.

    Attributes:
        notes: one sentence for each source with skipped records, and for dropped documents.
        num_duplicates: documents dropped by `of_pieces`.

    Args:
        contents: for each document a byte for its kind, and its text or its conversation's JSON
            in UTF-8.
        keys: bytes of each text's `text_key`.
        ends: int64, end offset of each document.
        order: int64, indices of the selected documents, in order.
    """

    def __init__(
        self, contents: Spool, keys: np.ndarray, ends: np.ndarray, order: np.ndarray
    ) -> None:
        self._contents, self._keys, self._ends, self._order = contents, keys, ends, order
        self.notes: tuple[str, ...] = ()
        self.num_duplicates = 0

    def __len__(self) -> int:
        return len(self._order)

    @overload
    def __getitem__(self, index: int) -> Document: ...
    @overload
    def __getitem__(self, index: slice) -> Documents: ...
    def __getitem__(self, index: int | slice) -> Document | Documents:
        import numpy as np

        if isinstance(index, slice):
            return self.select(np.arange(len(self))[index])
        position = self._order[index]
        content = self._content(position)
        kind, text = content[:1], content[1:].decode()
        conversation = Conversation.from_json(text) if kind == _CONVERSATION else None
        text = text if conversation is None else str(conversation)
        # The hash is unique; the beginning of the text helps people find it
        begin = text.lstrip()[: 2 * _NAME_CHARACTERS].replace("\r\n", "\n")[:_NAME_CHARACTERS]
        key = self._key(position)
        key = text_key(key + unseen) if (unseen := _unseen(content)) else key
        return Document(f"{key[:16]} {' '.join(begin.split())}", text, conversation)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def select(self, indices: np.ndarray) -> Documents:
        """Return the documents at some indices, in that order."""
        return Documents(self._contents, self._keys, self._ends, self._order[indices])

    def keys(self) -> Iterator[str]:
        """Yield the `text_key` of each document without reading its text."""
        return map(self._key, self._order)

    def _key(self, position: np.int64) -> str:
        return self._keys[position].tobytes().hex()

    def num_shared(self, other: Documents) -> int:
        """Return the number of documents that are in another collection, too."""
        import numpy as np

        # The first eight bytes of a key distinguish documents, in a quarter of the memory
        own, others = (each._keys[each._order].view("<i8")[::4] for each in (self, other))
        return len(np.intersect1d(own, others))

    def num_conversations(self) -> int:
        """Return the number of conversations."""
        starts = (int(self._ends[at - 1]) if at else 0 for at in self._order)
        return sum(self._contents.read(at, at + 1) == _CONVERSATION for at in starts)

    def _content(self, position: np.int64) -> bytes:
        start = int(self._ends[position - 1]) if position else 0
        return self._contents.read(start, int(self._ends[position]))

    def digest(self, *, is_exact: bool = True) -> str:
        """Return the SHA-256 (hex) of all identifiers and texts in order, with their lengths.

        Args:
            is_exact: False ignores the kind of line ends and blanks around each text.
        """
        digest = sha256()
        for document in self:
            text = document.text if is_exact else document.text.replace("\r\n", "\n").strip()
            for part in (document.identifier.encode(), text.encode()):
                digest.update(len(part).to_bytes(8, "little"))
                digest.update(part)
        return digest.hexdigest()

    def conversations_digest(self) -> str:
        """Return the SHA-256 (hex) of all conversations in order; of texts only the number."""
        digest = sha256()
        for document in self:
            talk = document.conversation
            digest.update(b"\n" + (b"" if talk is None else talk.to_json().encode()))
        return digest.hexdigest()

    @classmethod
    def of(cls, texts: Iterable[Text]) -> Documents:
        """Return distinct texts as documents; long texts are cut into `pieces`.

        Identifiers and order depend only on the texts, not on file names or the order of files.
        """
        return cls.of_pieces(piece for text in texts for piece in pieces(text))

    @classmethod
    def of_pieces(cls, texts: Iterable[Text]) -> Documents:
        """Collect texts in the order of their keys; of texts with equal keys keep the smallest.

        Texts without words are left out. The key of a conversation is that of its plain text: a
        chat template does not change it. Conversations of one key that differ in reasoning, tools
        or the flags that exclude turns all stay; the split has them on one side.
        """
        import numpy as np

        spool, keys, ends = Spool(), Spool(), Spool()
        for text in texts:
            if is_blank(text):
                continue
            if isinstance(text, Conversation):
                spool.append(_CONVERSATION + text.to_json().encode())
            else:
                spool.append(_TEXT + text.encode())
            keys.append(bytes.fromhex(text_key(str(text))))
            ends.append(len(spool).to_bytes(8, "little"))
        found = cls(spool, keys.array("V32"), ends.array("<i8"), np.empty(0, dtype=np.int64))
        order = np.argsort(keys.array("S32"), kind="stable")
        in_order = found._keys[order]
        is_first = np.ones(len(order), dtype=bool)
        is_first[1:] = in_order[1:] != in_order[:-1]
        kept = is_first.copy()
        first = np.flatnonzero(is_first)
        for group in np.flatnonzero(np.diff(first, append=len(order)) > 1):
            begin = first[group]
            end = first[group + 1] if group + 1 < len(first) else len(order)
            # UTF-8 bytes sort like the characters of the text
            best: dict[str, tuple[bytes, int]] = {}
            for position in order[begin:end]:
                content = found._content(position)
                unseen = _unseen(content)
                if unseen not in best or content < best[unseen][0]:
                    best[unseen] = content, position
            chosen = [position for _, position in sorted(best.values())]
            kept[begin:end] = np.arange(end - begin) < len(chosen)
            order[begin : begin + len(chosen)] = chosen
        found._order = order[kept]
        found.num_duplicates = len(order) - len(found._order)
        return found


def _unseen(content: bytes) -> str:
    """Return the fields that the plain text of a stored conversation omits, as JSON; or nothing."""
    if content[:1] != _CONVERSATION:
        return ""
    conversation, fields = Conversation.from_json(content[1:].decode()), (*REASONING, "train")
    more = [
        {field: " ".join(str(each[field]).split()) for field in fields if field in each}
        for each in conversation.messages
    ]
    is_plain = not any(more) and not conversation.tools
    return "" if is_plain else json.dumps([more, conversation.tools], sort_keys=True)


def is_blank(text: Text) -> bool:
    """Return whether a text has no words."""
    return not str(text).strip()


def pieces(text: Text, size: int = PIECE_CHARACTERS) -> Iterator[Text]:
    """Yield a text, cut at blank lines into pieces if it is long; joined, they are the text.

    A text of up to two sizes stays whole. Without a blank line within two sizes of a piece, it is
    cut at the end of a line, else at a space. A conversation is never cut, because its chat
    template needs all messages.
    """
    yield from (text,) if isinstance(text, Conversation) else pieces_of_chunks([text], size)


def pieces_of_chunks(chunks: Iterable[str], size: int = PIECE_CHARACTERS) -> Iterator[str]:
    """Yield the `pieces` of a text that arrives in chunks, with about one piece in memory."""
    held, length = list[str](), 0
    for chunk in chunks:
        held.append(chunk)
        length += len(chunk)
        if length <= 2 * size:
            continue
        text, start = "".join(held), 0
        while len(text) - start > 2 * size:
            end = _cut_position(text, start + size, start + 2 * size)
            yield text[start:end]
            start = end
        held, length = [text[start:]], len(text) - start
    yield "".join(held)


def _cut_position(text: str, start: int, end: int) -> int:
    if (blank := _BLANK_LINES.search(text, start, end)) is not None:
        return blank.end()
    for sign in ("\n", " "):
        if (position := text.find(sign, start, end)) >= 0:
            return position + 1
    return end
