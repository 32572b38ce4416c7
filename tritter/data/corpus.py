"""A corpus: named domains, tokenised and split, made once and cached by what made it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from hashlib import sha256
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import Tokenizer
from torch import Tensor

from tritter.data import cache, stdlib
from tritter.data.documents import Document, Split, documents_digest, split_documents
from tritter.data.tokenizer import train_tokenizer
from tritter.data.tokens import TokenisedDocuments, tokenise
from tritter.errors import RequestError, did_you_mean

FORMAT_VERSION = 1
_SIDES = ("train", "validation")


@dataclass(frozen=True, slots=True)
class SourceSummary:
    """Where a domain's text came from; `sha256` covers all its texts in order."""

    name: str
    origin: str
    num_documents: int
    num_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, eq=False)
class Domain:
    """One kind of text, split by document."""

    name: str
    train: TokenisedDocuments
    validation: TokenisedDocuments


@dataclass(frozen=True, slots=True, eq=False)
class Corpus:
    """Domains under one tokenizer; `digest` names what made them (texts, options, versions)."""

    tokenizer: Tokenizer
    domains: Mapping[str, Domain]
    digest: str
    sources: Mapping[str, SourceSummary]


@dataclass(frozen=True, slots=True)
class _Options:
    origin: str
    vocab_size: int
    validation_fraction: float
    max_validation_tokens_per_document: int
    seed: int
    tokenizer_domains: tuple[str, ...]


def build_corpus(
    domain_documents: Mapping[str, Sequence[Document]],
    *,
    origin: str | Mapping[str, str],
    vocab_size: int,
    validation_fraction: float,
    max_validation_tokens_per_document: int,
    seed: int,
    cache_dir: Path,
    tokenizer_domains: Sequence[str] | None = None,
    tokenizer: Tokenizer | None = None,
) -> Corpus:
    """Split, train a tokenizer on the train sides, tokenise; or load what did so before.

    The cache lives in `cache_dir/corpora/<digest>`. An entry that is damaged is set aside with a
    warning and made again.

    Args:
        domain_documents: the documents of each domain.
        origin: where they came from, in words, for the record; of all, or domain by domain.
        vocab_size: size of the byte-level vocabulary.
        validation_fraction: share of the documents, per domain, that validate.
        max_validation_tokens_per_document: longer validation documents keep their beginning.
        seed: of the split.
        cache_dir: folder of all caches.
        tokenizer_domains: domains that the tokenizer is trained on; by default all.
        tokenizer: of a model that exists; none is trained then, and `vocab_size` is its own.

    Raises:
        RequestError: an option is out of range, a domain is too small or unknown, or the cache
            cannot be written.
    """
    origins = dict.fromkeys(domain_documents, origin) if isinstance(origin, str) else origin
    options = _Options(
        origin="; ".join(dict.fromkeys(origins[name] for name in domain_documents)),
        vocab_size=vocab_size if tokenizer is None else tokenizer.get_vocab_size(),
        validation_fraction=validation_fraction,
        max_validation_tokens_per_document=max_validation_tokens_per_document,
        seed=seed,
        tokenizer_domains=_checked_domains(tokenizer_domains, domain_documents),
    )
    sources = {
        name: _summary(name, documents, origin=origins[name])
        for name, documents in domain_documents.items()
    }
    made_from = {"options": asdict(options), "sources": _plain_sources(sources)}
    digest = _digest(made_from | _tokenizer_entry(tokenizer))
    folder = _corpora(cache_dir) / digest
    cached = _load(folder)
    if cached is not None:
        return cached
    cache.require_writable(folder.parent)
    corpus = _make(
        domain_documents, options=options, sources=sources, digest=digest, tokenizer=tokenizer
    )
    cache.write_entry(folder, _to_entry(corpus))
    return corpus


def stdlib_corpus(
    *,
    vocab_size: int,
    validation_fraction: float,
    max_validation_tokens_per_document: int,
    seed: int,
    cache_dir: Path,
    tokenizer: Tokenizer | None = None,
) -> Corpus:
    """Return the embedded corpus: domains `prose` (documentation) and `code` (sources).

    A note in the cache says which corpus these options and this Python installation gave, so
    that a second run need not read the library again.

    Raises:
        RequestError: as `build_corpus`, or the library has no sources.
    """
    asked = {
        "library": stdlib.stdlib_fingerprint(),
        "vocab_size": vocab_size,
        "validation_fraction": validation_fraction,
        "max_validation_tokens_per_document": max_validation_tokens_per_document,
        "seed": seed,
        **_tokenizer_entry(tokenizer),
    }
    note = _corpora(cache_dir) / "stdlib" / _digest(asked)
    known = cache.read_note(note)
    # The note is a file that anyone may have damaged: its line is a name only if it looks so.
    if known is not None and len(known) == 64 and known.isalnum():
        cached = _load(_corpora(cache_dir) / known)
        if cached is not None:
            return cached
    text = stdlib.gather()
    corpus = build_corpus(
        {"prose": text.prose, "code": text.code},
        origin=stdlib.stdlib_origin(),
        vocab_size=vocab_size,
        validation_fraction=validation_fraction,
        max_validation_tokens_per_document=max_validation_tokens_per_document,
        seed=seed,
        cache_dir=cache_dir,
        tokenizer=tokenizer,
    )
    cache.write_note(note, corpus.digest)
    return corpus


def _corpora(cache_dir: Path) -> Path:
    return Path(cache_dir) / "corpora"


def _checked_domains(asked: Sequence[str] | None, available: Mapping[str, Any]) -> tuple[str, ...]:
    if not available:
        raise RequestError("data: a corpus needs at least one domain.")
    chosen = tuple(available) if asked is None else tuple(asked)
    for name in chosen:
        if name not in available:
            raise RequestError(
                f"data.tokenizer_domains: no domain '{name}'; there are "
                f"{', '.join(available)}.{did_you_mean(name, available)}"
            )
    if not chosen:
        raise RequestError("data.tokenizer_domains: the tokenizer needs at least one domain.")
    return chosen


def _summary(name: str, documents: Sequence[Document], *, origin: str) -> SourceSummary:
    return SourceSummary(
        name=name,
        origin=origin,
        num_documents=len(documents),
        num_bytes=sum(len(document.text.encode()) for document in documents),
        sha256=documents_digest(documents),
    )


def _digest(made_from: Mapping[str, Any]) -> str:
    versions = {"format_version": FORMAT_VERSION, "tokenizers": tokenizers.__version__}
    return sha256(json.dumps({**versions, **made_from}, sort_keys=True).encode()).hexdigest()


def _make(
    domain_documents: Mapping[str, Sequence[Document]],
    *,
    options: _Options,
    sources: Mapping[str, SourceSummary],
    digest: str,
    tokenizer: Tokenizer | None,
) -> Corpus:
    splits = {
        name: _split(name, documents, options=options)
        for name, documents in domain_documents.items()
    }
    if tokenizer is None:
        training = [each for name in options.tokenizer_domains for each in splits[name].train]
        tokenizer = train_tokenizer(training, vocab_size=options.vocab_size)
    limit = options.max_validation_tokens_per_document
    domains = {
        name: _domain(name, split, tokenizer=tokenizer, max_validation_tokens=limit)
        for name, split in splits.items()
    }
    return Corpus(tokenizer=tokenizer, domains=domains, digest=digest, sources=dict(sources))


def _split(name: str, documents: Sequence[Document], *, options: _Options) -> Split:
    try:
        return split_documents(
            documents, validation_fraction=options.validation_fraction, seed=options.seed
        )
    except RequestError as error:
        raise RequestError(f"{error} (Domain {name}.)") from error


def _tokenizer_entry(tokenizer: Tokenizer | None) -> dict[str, str]:
    """Return what a tokenizer adds to what a corpus is made from; nothing when one is trained."""
    if tokenizer is None:
        return {}
    return {"tokenizer": sha256(tokenizer.to_str().encode()).hexdigest()}


def _domain(name: str, split: Split, *, tokenizer: Tokenizer, max_validation_tokens: int) -> Domain:
    return Domain(
        name=name,
        train=tokenise(split.train, tokenizer),
        validation=tokenise(
            split.validation, tokenizer, max_tokens_per_document=max_validation_tokens
        ),
    )


def _load(folder: Path) -> Corpus | None:
    try:
        entry = cache.read_entry(folder)
        return None if entry is None else _from_entry(entry, digest=folder.name)
    except cache.BrokenEntryError as error:
        cache.set_aside(folder, reason=str(error))
        return None


def _to_entry(corpus: Corpus) -> cache.CacheEntry:
    tensors: dict[str, Tensor] = {}
    identifiers: dict[str, dict[str, tuple[str, ...]]] = {}
    for name, domain in corpus.domains.items():
        identifiers[name] = {}
        for side in _SIDES:
            documents: TokenisedDocuments = getattr(domain, side)
            identifiers[name][side] = documents.identifiers
            for part in ("tokens", "offsets", "num_bytes"):
                tensors[f"{name}.{side}.{part}"] = getattr(documents, part)
    metadata = {
        "format_version": FORMAT_VERSION,
        "digest": corpus.digest,
        "identifiers": identifiers,
        "sources": _plain_sources(corpus.sources),
    }
    return cache.CacheEntry(tensors=tensors, metadata=metadata, tokenizer=corpus.tokenizer)


def _from_entry(entry: cache.CacheEntry, *, digest: str) -> Corpus:
    metadata = entry.metadata
    if metadata.get("digest") != digest or metadata.get("format_version") != FORMAT_VERSION:
        raise cache.BrokenEntryError("it holds another corpus than its name says")
    domains = {
        name: Domain(name=name, **{side: _side(entry, name, side) for side in _SIDES})
        for name in metadata["identifiers"]
    }
    names = [field.name for field in fields(SourceSummary)]
    sources = {
        name: SourceSummary(**{key: source[key] for key in names})
        for name, source in metadata["sources"].items()
    }
    return Corpus(tokenizer=entry.tokenizer, domains=domains, digest=digest, sources=sources)


def _side(entry: cache.CacheEntry, name: str, side: str) -> TokenisedDocuments:
    parts = {
        part: entry.tensors[f"{name}.{side}.{part}"] for part in ("tokens", "offsets", "num_bytes")
    }
    return TokenisedDocuments(**parts, identifiers=tuple(entry.metadata["identifiers"][name][side]))


def _plain_sources(sources: Mapping[str, SourceSummary]) -> dict[str, dict[str, Any]]:
    return {name: asdict(source) for name, source in sources.items()}
