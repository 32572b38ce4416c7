"""Documents, and a split of them into training and validation that leaks nothing."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256

from tritter.errors import RequestError


@dataclass(frozen=True, slots=True)
class Document:
    """One text and the name under which results of it are paired and clustered."""

    identifier: str
    text: str


@dataclass(frozen=True, slots=True)
class Split:
    """The two sides of a split, each in the order in which the documents came."""

    train: tuple[Document, ...]
    validation: tuple[Document, ...]


def split_documents(
    documents: Iterable[Document], *, validation_fraction: float, seed: int
) -> Split:
    """Split whole documents by the hash of (seed, identifier).

    The `round(validation_fraction * n)` documents with the smallest hashes validate, so another
    document leaves all others where they were, but for at most one at the border. Blank
    documents are dropped; of documents with the same text only the first is kept, so that no
    text stands on both sides.

    Raises:
        RequestError: two different texts share an identifier, the fraction is not between 0
            and 1, or one side would be empty.
    """
    if not (math.isfinite(validation_fraction) and 0 < validation_fraction < 1):
        raise RequestError(
            f"data.validation_fraction={validation_fraction}: must lie between 0 and 1 "
            f"(both excluded), for example 0.1."
        )
    distinct = _distinct(documents)
    num_validation = round(validation_fraction * len(distinct))
    if not 0 < num_validation < len(distinct):
        raise RequestError(
            f"data.validation_fraction={validation_fraction}: of {len(distinct)} distinct "
            f"documents {num_validation} would validate and {len(distinct) - num_validation} "
            f"train; each side needs at least one. Give more documents or another fraction."
        )
    ranked = sorted(distinct, key=lambda document: _rank(document, seed=seed))
    chosen = {document.identifier for document in ranked[:num_validation]}
    return Split(
        train=tuple(each for each in distinct if each.identifier not in chosen),
        validation=tuple(each for each in distinct if each.identifier in chosen),
    )


def documents_digest(documents: Sequence[Document]) -> str:
    """Return the SHA-256 (hex) of all identifiers and texts in order, each with its length."""
    digest = sha256()
    for document in documents:
        for part in (document.identifier.encode(), document.text.encode()):
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part)
    return digest.hexdigest()


def _distinct(documents: Iterable[Document]) -> list[Document]:
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


def _rank(document: Document, *, seed: int) -> bytes:
    return sha256(f"{seed}\0{document.identifier}".encode()).digest()
