"""The text of a run: the Python installation's own, files, or both, under one tokenizer."""

from collections.abc import Collection, Iterable, Iterator
from typing import Any

from tokenizers import Tokenizer

from tritter.config.run_text import DomainText, RunText
from tritter.config.schema import RunConfig
from tritter.data.built_in import built_in_origin, is_built_in
from tritter.data.corpus import Corpus, build_corpus, stdlib_corpus
from tritter.data.dataset_name import dataset_names
from tritter.data.finding import find_texts
from tritter.data.packing import padding_fraction
from tritter.data.readers import TextFileError
from tritter.data.sources import source_documents
from tritter.data.split import DomainCounts, DomainDocuments, Earlier
from tritter.targets import dotted

MUCH_PADDING = 0.1
FILES_ORIGIN, DATASETS_ORIGIN = "text files", "data sets"
_STDLIB_DOMAINS = [("prose", ("stdlib:prose",)), ("code", ("stdlib:code",))]


def run_corpus(config: RunConfig, text: RunText, *, tokenizer: Tokenizer | None) -> Corpus:
    """Return the old and new domains of a run, tokenised.

    Args:
        text: of the run.
        tokenizer: of a checkpoint; None trains one on the texts.

    Raises:
        TextFileError: files can't be read as what they are.
        RequestError: a domain is too small, or the cache can't be written.
    """
    split = text.split
    asked: dict[str, Any] = {
        "vocab_size": config.data.vocab_size,
        "validation_fraction": split.validation_fraction,
        "max_validation_tokens_per_document": config.evaluation.max_tokens_per_document,
        "seed": split.seed,
        "cache_dir": config.cache_dir,
        "tokenizer": tokenizer,
    }
    if _is_stdlib(text):
        return stdlib_corpus(**asked)
    history = all_documents(text.history)
    return build_corpus(
        all_documents(text.domains),
        origin={domain.name: _origin(domain, config) for domain in text.domains},
        **asked,
        earlier=Earlier(split.exceptions, tuple(history.values())),
    )


def text_notes(text: RunText) -> tuple[str, ...]:
    """Say of each domain whose paths mean other files too what was skipped.

    Raises:
        RequestError: a path means no text file any more.
    """
    found = {domain.name: find_texts(domain.key, domain.paths) for domain in text.domains}
    return tuple(note for name, texts in found.items() if (note := texts.note(name)) is not None)


def all_documents(domains: Iterable[DomainText]) -> dict[str, DomainDocuments]:
    """Return the documents of all domains, each as its split reads them.

    Raises:
        TextFileError: lists what can't be read, of all domains.
    """
    documents: dict[str, DomainDocuments] = {}
    problems: list[str] = []
    for domain in domains:
        try:
            found = source_documents(
                domain.paths,
                key=domain.key,
                text_field=domain.text_field,
                is_ranked=bool(domain.ranked),
                texts=domain.texts,
                is_streamed=domain.is_streamed,
            )
            documents[domain.name] = DomainDocuments(found, domain.ranked)
        except TextFileError as error:
            problems += error.problems
    if problems:
        raise TextFileError(problems)
    return documents


def _is_stdlib(text: RunText) -> bool:
    """Say whether it is the embedded corpus and no more, of which the cache keeps a note."""
    places = [(domain.name, domain.paths) for domain in text.domains]
    is_plain = not (text.split.exceptions or text.history)
    return is_plain and places == _STDLIB_DOMAINS and not any(d.ranked for d in text.domains)


def _origin(domain: DomainText, config: RunConfig) -> str:
    if domain.texts is not None:
        return dotted(type(config.data))
    datasets = dataset_names(domain.paths)
    has_files = any(not is_built_in(path) and path not in datasets for path in domain.paths)
    origins = (
        built_in_origin(domain.paths),
        DATASETS_ORIGIN if datasets else "",
        FILES_ORIGIN if has_files else "",
    )
    return " and ".join(filter(None, origins))


def corpus_notes(config: RunConfig, corpus: Corpus) -> Iterator[str]:
    """Say what was done with the documents of a run, a sentence each."""
    yield from _moved(corpus.counts.values())
    if config.data.packing == "documents":
        length = config.data.sequence_length
        yield from _padded(corpus, (length, 2 * length))


def _padded(corpus: Corpus, lengths: tuple[int, int]) -> Iterator[str]:
    """Say of which domains more than a tenth is padding, as of documents of one length.

    Args:
        lengths: of sequences, those that are and longer ones.
    """
    for name, domain in corpus.domains.items():
        if not domain.train.num_tokens:
            continue
        share, longer = (padding_fraction(domain.train, sequence_length=n) for n in lengths)
        if share > MUCH_PADDING:
            yield (
                f"Of the training sequences of {name} {share:.0%} is padding: its documents fill "
                f"no {lengths[0]} tokens; data.sequence_length={lengths[1]} leaves {longer:.0%}."
            )


def _moved(counts: Collection[DomainCounts]) -> Iterator[str]:
    """Say what earlier trainings, or an old domain, did with documents of the run's domains."""
    reasons = {
        "learned before, so that they don't validate": sum(c.learned_before for c in counts),
        "held out before, so that they are not trained on": sum(c.held_out_before for c in counts),
        "both, so that they are left out": sum(c.left_out for c in counts),
    }
    if said := [f"{count} {reason}" for reason, count in reasons.items() if count]:
        yield f"Documents that were met before: {'; '.join(said)}."
