"""Documents as checkpoints of format 2 and before read them, for the split that they recorded."""

from collections.abc import Iterator, Sequence
from hashlib import sha256
from pathlib import Path

from tritter.data.documents import Document, cut

RANKED_SUFFIXES = (".txt", ".jsonl", ".parquet", ".txt.gz", ".jsonl.gz")  # what was read then
CUT_FROM_BYTES = 1_000_000
ENOUGH_DOCUMENTS = 20  # with fewer in a domain, every long .txt was cut


def ranked_documents(texts: Sequence[tuple[Path, Sequence[str]]]) -> tuple[Document, ...]:
    """Return the documents of some files, named by file and content.

    A .txt over a megabyte was cut, and in a domain of few documents every longer one.
    """
    is_scarce = sum(len(found) for _, found in texts) < ENOUGH_DOCUMENTS
    return tuple(
        Document(f"{path.name}:{sha256(piece.encode()).hexdigest()[:16]}", piece)
        for path, found in texts
        for text in found
        for piece in _pieces(path, text, is_scarce=is_scarce)
        if piece.strip()
    )


def _pieces(path: Path, text: str, *, is_scarce: bool) -> Iterator[str]:
    is_whole_file = path.name.lower().removesuffix(".gz").endswith(".txt")
    if is_whole_file and (is_scarce or len(text.encode()) > CUT_FROM_BYTES):
        return cut(text)
    return iter((text,))
