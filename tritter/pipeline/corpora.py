"""The text of a run: the Python installation's own, files, or both, under one tokenizer."""

from collections.abc import Sequence

from tokenizers import Tokenizer

from tritter.config.schema import DataConfig, RunConfig, TextDataConfig
from tritter.config.text_contents import text_key
from tritter.config.text_files import BUILT_IN_TEXTS, find_text_files, find_texts
from tritter.data.corpus import Corpus, build_corpus, stdlib_corpus
from tritter.data.documents import Document
from tritter.data.readers import TextFileError
from tritter.data.stdlib import StdlibText, gather, stdlib_origin
from tritter.data.text import read_documents

FILES_ORIGIN = "text files"


def run_corpus(config: RunConfig, *, tokenizer: Tokenizer | None) -> Corpus:
    """Return the old and new domains of a run, tokenised.

    Args:
        tokenizer: of a checkpoint; None trains one on the texts.

    Raises:
        TextFileError: files can't be read as what they are.
        RequestError: a domain is too small, or the cache can't be written.
    """
    data = config.data
    limit = config.evaluation.max_tokens_per_document
    if not isinstance(data, TextDataConfig):
        return stdlib_corpus(
            vocab_size=data.vocab_size,
            validation_fraction=data.validation_fraction,
            max_validation_tokens_per_document=limit,
            seed=config.seed,
            cache_dir=config.cache_dir,
            tokenizer=tokenizer,
        )
    sources = {**data.old, **data.new}
    return build_corpus(
        _all_documents(data),
        origin={name: _origin(paths) for name, paths in sources.items()},
        vocab_size=data.vocab_size,
        validation_fraction=data.validation_fraction,
        max_validation_tokens_per_document=limit,
        seed=config.seed,
        cache_dir=config.cache_dir,
        tokenizer=tokenizer,
    )


def text_notes(data: DataConfig) -> tuple[str, ...]:
    """Say of each domain whose paths mean other files too what was skipped.

    Raises:
        RequestError: a path means no text file any more.
    """
    sources = {**data.old_sources, **data.new_sources}
    found = {name: find_texts(text_key(data, name), paths) for name, paths in sources.items()}
    return tuple(note for name, texts in found.items() if (note := texts.note(name)) is not None)


def _all_documents(data: TextDataConfig) -> dict[str, tuple[Document, ...]]:
    """Return the documents of all domains.

    Raises:
        TextFileError: lists what can't be read, of all domains.
    """
    documents: dict[str, tuple[Document, ...]] = {}
    problems: list[str] = []
    for name in (*data.old, *data.new):
        try:
            documents[name] = domain_documents(data, name)
        except TextFileError as error:
            problems += error.problems
    if problems:
        raise TextFileError(problems)
    return documents


def domain_documents(data: DataConfig, name: str) -> tuple[Document, ...]:
    """Return all documents of one domain, built-in ones first.

    Raises:
        TextFileError: files can't be read as what they are.
    """
    is_old = name in data.old_sources
    field = data.text_field if isinstance(data, TextDataConfig) else "text"
    paths = (data.old_sources if is_old else data.new_sources)[name]
    return source_documents(paths, key=text_key(data, name), text_field=field)


def source_documents(paths: Sequence[str], *, key: str, text_field: str) -> tuple[Document, ...]:
    """Return all documents that paths and built-in texts mean.

    Raises:
        RequestError: a path means no text file.
        TextFileError: files can't be read as what they are.
    """
    built_in = [path for path in BUILT_IN_TEXTS if path in paths]
    documents = _built_in(gather(), built_in) if built_in else ()
    files = find_text_files(key, paths)
    if files:
        documents += read_documents(files, key=key, text_field=text_field)
    return documents


def _built_in(text: StdlibText, names: Sequence[str]) -> tuple[Document, ...]:
    documents: tuple[Document, ...] = ()
    for name in names:
        documents += text.prose if name == "stdlib:prose" else text.code
    return documents


def _origin(paths: Sequence[str]) -> str:
    built_in = [path for path in paths if path in BUILT_IN_TEXTS]
    origins = [stdlib_origin()] if built_in else []
    return " and ".join([*origins, *([FILES_ORIGIN] if len(built_in) < len(paths) else [])])
