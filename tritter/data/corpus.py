"""A corpus: named domains, tokenised and split, cached by a checksum of its inputs."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from hashlib import sha256
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save_file
from tokenizers import Tokenizer
from torch import Tensor

from tritter.data import cache
from tritter.data.answers import unanswered_note
from tritter.data.built_in import Stdlib
from tritter.data.chat import Chat
from tritter.data.documents import Document, Documents
from tritter.data.split import SplitRule
from tritter.data.tokens import TokenisedDocuments, train_tokenizer, unencoded_note
from tritter.errors import TritterError
from tritter.storage.atomic import atomic_folder, write_text_atomic
from tritter.storage.hashing import file_digest
from tritter.storage.reading import open_file
from tritter.storage.spool import Spool, mapped, tensor_of

_FORMAT_VERSION = 2  # 1 dropped blanks around documents
_LAYOUT = "1"  # of the cache; folders with other names predate the release
_SIDES = ("train", "validation")
_TENSORS, _METADATA, _TOKENIZER = "tokens.safetensors", "corpus.json", "tokenizer.json"
_FILES = (_TENSORS, _METADATA, _TOKENIZER)
_CHECKSUMS = "checksums.json"
_DTYPES = {"I32": "<i4", "I64": "<i8", "U8": "u1"}  # of cached tensors
_Sides = Mapping[str, tuple[Documents, Documents]]  # domain → for training, for validation


@dataclass(frozen=True, slots=True, eq=False)
class Domain:
    """A named part of the data, split by document.

    Args:
        name: the domain.
        train: training documents.
        validation: validation documents.
        held_out_before: how many of these an earlier domain of the run also holds out.
        origin: recorded origin of the documents.
        num_bytes: size of all texts.
        sha256: of all texts in order; ignores the kind of line ends and blanks around a text.
    """

    name: str
    train: TokenisedDocuments
    validation: TokenisedDocuments
    held_out_before: int
    origin: str
    num_bytes: int
    sha256: str

    @property
    def num_documents(self) -> int:
        return len(self.train) + len(self.validation)

    @property
    def counts(self) -> dict[str, int]:
        """The number of documents: all, of each side, and `held_out_before`."""
        sides = {"train": len(self.train), "validation": len(self.validation)}
        known = {"held_out_before": self.held_out_before}
        return {"documents": self.num_documents, **sides, **known}

    @property
    def source(self) -> dict[str, Any]:
        """Origin, size and checksum of the documents, for a lineage."""
        names = ("name", "origin", "num_documents", "num_bytes", "sha256")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, slots=True, eq=False)
class Corpus:
    """Domains under one tokenizer.

    Args:
        digest: checksum of the inputs (texts, their split, options, versions).
        notes: one sentence for each source with skipped records.
        chat: how its conversations were tokenised; None without any.
    """

    tokenizer: Tokenizer
    domains: Mapping[str, Domain]
    digest: str
    notes: tuple[str, ...] = ()
    chat: Chat | None = None

    @classmethod
    def build(
        cls,
        domains: Mapping[str, Documents],
        *,
        origin: str | Mapping[str, str],
        vocab_size: int,
        validation_fraction: float,
        max_validation_tokens_per_document: int,
        seed: int,
        cache_dir: Path,
        tokenizer: Tokenizer | None = None,
        chat: Chat | None = None,
        validation_bytes: Mapping[str, Tensor] | None = None,
    ) -> "Corpus":
        """Split documents, train a tokenizer on the training side and tokenise; or load the result.

        The cache is in `cache_dir/corpora/1/<digest>`. A damaged entry is renamed with a warning
        and rebuilt.

        Args:
            domains: the documents of each domain, old domains first.
            origin: recorded origin of the documents, for all domains or per domain.
            vocab_size: size of the byte-level vocabulary.
            validation_fraction: share of each domain's documents used for validation.
            max_validation_tokens_per_document: longer validation documents are truncated.
            seed: seed of the split.
            cache_dir: root folder of all caches.
            tokenizer: an existing tokenizer; then none is trained and `vocab_size` is ignored.
            chat: how to tokenise conversations, if there are any; None tokenises their plain text.
            validation_bytes: domain → int64 [n], bytes to keep of each validation document instead
                of `max_validation_tokens_per_document`.
        """
        origins = dict.fromkeys(domains, origin) if isinstance(origin, str) else origin
        options = {
            "origin": "; ".join(dict.fromkeys(origins[name] for name in domains)),
            "vocab_size": vocab_size if tokenizer is None else tokenizer.get_vocab_size(),
            "max_validation_tokens_per_document": max_validation_tokens_per_document,
            "tokenizer_domains": list(domains),
        }
        sources = {
            name: {
                "name": name,
                "origin": origins[name],
                "num_documents": len(documents),
                "num_bytes": sum(len(document.text.encode()) for document in documents),
                "sha256": documents.digest(is_exact=False),
            }
            for name, documents in domains.items()
        }
        rule = SplitRule(seed=seed, validation_fraction=validation_fraction)
        parted = rule.split(domains)
        made_from = _inputs(options, sources, parted, chat) | _tokenizer_entry(tokenizer)
        if validation_bytes is not None:
            made_from["validation_bytes"] = _digest_of(validation_bytes)
        digest = _digest(made_from)
        notes = tuple(note for domain in domains.values() for note in domain.notes)
        notes += tuple(_shared_notes(domains, held_out_before(parted)))
        if (cached := _load(cache_dir, digest)) is not None:
            return _with_notes(cached, notes, domains, chat)
        folder = _corpora(cache_dir) / digest
        cache.require_writable(folder.parent)
        corpus = _make(
            parted,
            vocab_size=vocab_size,
            max_tokens=None if validation_bytes else max_validation_tokens_per_document,
            sources=sources,
            digest=digest,
            tokenizer=tokenizer,
            chat=chat,
            validation_bytes=validation_bytes,
        )
        _save(corpus, folder)
        # A corpus from the cache is memory-mapped
        return _with_notes(_load(cache_dir, digest) or corpus, notes, domains, chat)

    @classmethod
    def of_stdlib(
        cls,
        *,
        vocab_size: int,
        validation_fraction: float,
        max_validation_tokens_per_document: int,
        seed: int,
        cache_dir: Path,
        tokenizer: Tokenizer | None = None,
        validation_bytes: Mapping[str, Tensor] | None = None,
    ) -> "Corpus":
        """Return the embedded corpus: domains `prose` (documentation) and `code` (sources).

        A note in the cache maps these options and this Python installation to a corpus, so a second
        run does not read the library again.
        """
        library = Stdlib()
        requested = {
            "format_version": _FORMAT_VERSION,
            "library": library.fingerprint,
            "vocab_size": vocab_size,
            "validation_fraction": validation_fraction,
            "max_validation_tokens_per_document": max_validation_tokens_per_document,
            "seed": seed,
            **_tokenizer_entry(tokenizer),
        }
        if validation_bytes is not None:
            requested["validation_bytes"] = _digest_of(validation_bytes)
        note = _corpora(cache_dir) / "stdlib" / _digest(requested)
        known = ""
        with suppress(OSError, UnicodeDecodeError):
            known = note.read_text(encoding="utf-8").strip()
        # The note may be damaged: use its line only if it looks like a checksum.
        if len(known) == 64 and known.isalnum():
            cached = _load(cache_dir, known)
            if cached is not None:
                return cached
        corpus = cls.build(
            {name: library.documents(name) for name in ("prose", "code")},
            origin=library.origin,
            vocab_size=vocab_size,
            validation_fraction=validation_fraction,
            max_validation_tokens_per_document=max_validation_tokens_per_document,
            seed=seed,
            cache_dir=cache_dir,
            tokenizer=tokenizer,
            validation_bytes=validation_bytes,
        )
        with cache.write_errors(note.parent):
            note.parent.mkdir(parents=True, exist_ok=True)
            write_text_atomic(note, corpus.digest + "\n")
        return corpus


def held_out_before(parted: _Sides) -> dict[str, int]:
    """Return domain → number of its validation documents that an earlier domain also has there."""
    numbers, known = dict[str, int](), set[str]()
    for name, (_, validation) in parted.items():
        keys = list(validation.keys())
        numbers[name] = sum(key in known for key in keys)
        known.update(keys)
    return numbers


def _shared_notes(domains: Mapping[str, Documents], held_out: Mapping[str, int]) -> Iterator[str]:
    """Yield a sentence on each domain with documents of earlier ones."""
    for at, (name, documents) in enumerate(domains.items()):
        shared = {each: documents.num_shared(domains[each]) for each in list(domains)[:at]}
        parts = [f"{count:,} also occur in {each}" for each, count in shared.items() if count]
        if parts:
            rest = " Held-out ones are scored in each domain, and no domain trains on them."
            yield (
                f"{name}: of {len(documents):,} documents, {', '.join(parts)}."
                f"{rest if held_out[name] else ''}"
            )


def _with_notes(
    corpus: Corpus, notes: tuple[str, ...], documents: Mapping[str, Documents], chat: Chat | None
) -> Corpus:
    """Return a corpus with its notes, to which those on its tokens and conversations are added."""
    domains = corpus.domains
    sides = {name: (domains[name].train, domains[name].validation) for name in domains}
    unencoded = (
        unencoded_note(name, sides[name], (each.text for each in documents[name]), corpus.tokenizer)
        for name in documents
    )
    notes = (*notes, *filter(None, unencoded))
    if chat is None:
        return replace(corpus, notes=notes)
    count = sum(each.num_conversations() for each in documents.values())
    talks = (each.conversation for each in chain.from_iterable(documents.values()))
    found = [chat.note(count), chat.unshown_note(talks)]
    found += [unanswered_note(name, each, documents[name]) for name, each in sides.items()]
    found.append(chat.endless_note(train.tokens for train, _ in sides.values()))
    return replace(corpus, notes=(*notes, *filter(None, found)), chat=chat)


def _inputs(
    options: Mapping[str, Any],
    sources: Mapping[str, Any],
    parted: _Sides,
    chat: Chat | None,
) -> dict[str, Any]:
    """Return the inputs of a corpus, without its tokenizer, as plain data."""
    sides = sha256()  # of the documents on each side of each domain
    for name, split in parted.items():
        for side in split:
            sides.update(f"{name}\0{side.digest()}".encode())
            if chat is not None:
                sides.update(f"{chat.digest}\0{side.conversations_digest()}".encode())
    return {"options": options, "sources": sources, "sides": sides.hexdigest()}


def _corpora(cache_dir: Path) -> Path:
    return Path(cache_dir) / "corpora" / _LAYOUT


def _digest(made_from: Mapping[str, Any]) -> str:
    versions = {"format_version": _FORMAT_VERSION, "tokenizers": tokenizers.__version__}
    return sha256(json.dumps({**versions, **made_from}, sort_keys=True).encode()).hexdigest()


def _make(
    splits: _Sides,
    *,
    vocab_size: int,
    max_tokens: int | None,
    sources: Mapping[str, Any],
    digest: str,
    tokenizer: Tokenizer | None,
    chat: Chat | None,
    validation_bytes: Mapping[str, Tensor] | None,
) -> Corpus:
    if tokenizer is None:
        training = (each for train, _ in splits.values() for each in train)
        tokenizer = train_tokenizer(training, vocab_size=vocab_size)
    kept: dict[str, Sequence[Document]] = {n: validation for n, (_, validation) in splits.items()}
    for name, sizes in (validation_bytes or {}).items():
        kept[name] = [
            Document(each.identifier, each.text.encode()[:size].decode())
            for each, size in zip(kept[name], sizes.tolist(), strict=True)
        ]
    shared = held_out_before(splits)
    domains = {
        name: Domain(
            name=name,
            train=TokenisedDocuments.of(train, tokenizer, chat=chat),
            validation=TokenisedDocuments.of(
                kept[name], tokenizer, max_tokens_per_document=max_tokens, chat=chat
            ),
            held_out_before=shared[name],
            **_read_source(sources[name]),
        )
        for name, (train, _) in splits.items()
    }
    return Corpus(tokenizer=tokenizer, domains=domains, digest=digest)


def _read_source(source: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of `Domain` that its `source` states."""
    return {name: source[name] for name in ("origin", "num_bytes", "sha256")}


def _digest_of(sizes: Mapping[str, Tensor]) -> str:
    return _digest({name: each.tolist() for name, each in sizes.items()})


def _tokenizer_entry(tokenizer: Tokenizer | None) -> dict[str, str]:
    """Return the checksum of a given tokenizer; empty if the tokenizer is trained."""
    if tokenizer is None:
        return {}
    return {"tokenizer": sha256(tokenizer.to_str().encode()).hexdigest()}


def _load(cache_dir: Path, digest: str) -> Corpus | None:
    """Load a corpus from the cache; None if the entry is missing or damaged."""
    folder = _corpora(cache_dir) / digest
    if not folder.exists():
        return None
    try:
        checksums = json.loads((folder / _CHECKSUMS).read_text(encoding="utf-8"))
        for name in _FILES:
            if checksums[name] != file_digest(folder / name):
                raise TritterError(f"{name} does not match its checksum")
        tensors, domains = _tensors(folder / _TENSORS), {}
        metadata = json.loads((folder / _METADATA).read_text(encoding="utf-8"))
        if metadata.get("digest") != digest or metadata.get("format_version") != _FORMAT_VERSION:
            raise TritterError("its corpus does not match its name")
        for name, counts in metadata["counts"].items():
            # Former entries have only the number
            former = range(metadata.get("cut", {}).get(name, 0))
            cut = tuple(metadata.get("cut_documents", {}).get(name, former))
            sides: dict[str, Any] = {}
            for side in _SIDES:
                prefix, own_cut = f"{name}.{side}.", cut if side == "validation" else ()
                own = {n.removeprefix(prefix): tensors[n] for n in tensors if n.startswith(prefix)}
                sides[side] = TokenisedDocuments.of_tensors(own, cut=own_cut)
            domains[name] = Domain(
                name=name,
                **sides,
                held_out_before=int(counts["held_out_before"]),
                **_read_source(metadata["sources"][name]),
            )
        return Corpus(
            tokenizer=Tokenizer.from_file(str(folder / _TOKENIZER)),
            domains=domains,
            digest=digest,
        )
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        cache.quarantine(folder, reason=f"{type(error).__name__}: {error}")
        return None


def _tensors(path: Path) -> dict[str, Tensor]:
    """Load the tensors of a file; a large file is memory-mapped."""
    if path.stat().st_size <= Spool.IN_MEMORY_BYTES:
        return load(path.read_bytes())
    found = {}
    # safetensors maps files privately, which fails for a file larger than memory
    with open_file(path) as file, safe_open(path, framework="np") as header:
        content = mapped(file)
        start = 8 + int.from_bytes(content[:8], "little")
        for name in header.offset_keys():
            part = header.get_slice(name)
            dtype, shape = np.dtype(_DTYPES[part.get_dtype()]), part.get_shape()
            array = np.frombuffer(content, dtype, count=prod(shape), offset=start)
            found[name] = tensor_of(array.reshape(shape))
            start += array.nbytes
    return found


def _save(corpus: Corpus, folder: Path) -> None:
    """Write a cache entry atomically.

    If another process was first, its folder stays: entries of one name are identical.
    """
    tensors: dict[str, Tensor] = {}
    for name, domain in corpus.domains.items():
        for side in _SIDES:
            documents: TokenisedDocuments = getattr(domain, side)
            parts = documents.to_tensors().items()
            tensors |= {f"{name}.{side}.{part}": tensor for part, tensor in parts}
    metadata = {
        "format_version": _FORMAT_VERSION,
        "digest": corpus.digest,
        "sources": {name: domain.source for name, domain in corpus.domains.items()},
        "counts": {name: domain.counts for name, domain in corpus.domains.items()},
        "cut_documents": {name: domain.validation.cut for name, domain in corpus.domains.items()},
    }
    try:
        with atomic_folder(folder) as temporary:
            save_file(tensors, temporary / _TENSORS, metadata={"format": "pt"})
            corpus.tokenizer.save(str(temporary / _TOKENIZER))
            (temporary / _METADATA).write_text(json.dumps(metadata, indent=1) + "\n")
            checksums = {name: file_digest(temporary / name) for name in _FILES}
            (temporary / _CHECKSUMS).write_text(json.dumps(checksums, indent=1) + "\n")
    except TritterError:
        if not folder.exists():
            with cache.write_errors(folder.parent):
                raise
