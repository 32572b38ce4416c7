"""The documents that paths, data sets, built-in texts and sources from outside mean."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain

from tritter.data.built_in import BUILT_IN_TEXTS, built_in_documents, is_built_in
from tritter.data.dataset_name import dataset_names, parse_name
from tritter.data.dataset_rows import dataset_texts, resolve_dataset
from tritter.data.documents import Document, Documents, documents_of, pieces
from tritter.data.finding import find_text_files
from tritter.data.ranked import RANKED_SUFFIXES, ranked_documents
from tritter.data.readers import TextFileError
from tritter.data.skills import SkillText
from tritter.data.text import read_texts, text_pieces
from tritter.errors import TritterError


def source_documents(
    paths: Sequence[str],
    *,
    key: str,
    text_field: str,
    is_ranked: bool = False,
    texts: Callable[[], Iterable[str]] | None = None,
    is_streamed: bool = False,
    is_recorded: bool = False,
) -> Sequence[Document]:
    """Return all documents that paths, data sets and built-in texts mean.

    Args:
        key: the configuration's key that named them, for messages.
        text_field: of records.
        is_ranked: read them as format 2 did, which counts where a split by rank goes on.
        texts: yields them in place of paths.
        is_streamed: data sets of the hub are read as they come, not fetched first.
        is_recorded: a checkpoint names the paths; see `find_texts`.

    Raises:
        TextFileError: what a source from outside raised, or that it yields something else; or a
            data set can't be read, or holds no text.
        RequestError: a path means no text file, or a file can't be read as what it is.
    """
    if texts is not None:
        return documents_of(_own(texts, key))
    ordered = dict.fromkeys((*(each for each in BUILT_IN_TEXTS if each in paths), *paths))
    built_in = [each for path in filter(is_built_in, ordered) for each in built_in_documents(path)]
    files = find_text_files(key, paths, is_recorded=is_recorded)
    if is_ranked:
        files = tuple(file for file in files if file.name.lower().endswith(RANKED_SUFFIXES))
        found = read_texts(files, key=key, text_field=text_field) if files else ()
        return (*built_in, *ranked_documents(found))
    rows = _of_datasets(dataset_names(paths), key=key, is_streamed=is_streamed)
    held = chain((document.text for document in built_in), rows)
    read = text_pieces(files, key=key, text_field=text_field) if files else ()
    return Documents.of(chain(read, (piece for text in held for piece in pieces(text))))


def quick_pieces(
    paths: Sequence[str], *, key: str, text_field: str, max_bytes: int
) -> Iterator[str] | None:
    """Return an iterator over the documents that paths and skills mean, before it reads them.

    None where the standard library is among them, whose hundreds of documents take seconds to
    gather, or a data set of the hub: that would have to be downloaded or streamed first.

    Args:
        max_bytes: of files; the iterator raises `SpentError` beyond.

    Raises:
        RequestError: a path means no text file.
    """
    sources = [parse_name(key, name) for name in dataset_names(paths)]
    if set(paths) & set(BUILT_IN_TEXTS) or not all(source.is_on_disk for source in sources):
        return None
    files = find_text_files(key, paths)
    read: Iterator[str] = iter(())
    if files:
        read = text_pieces(files, key=key, text_field=text_field, max_bytes=max_bytes)
    skills = (SkillText.named(key, path).texts() for path in paths if is_built_in(path))
    rows = (dataset_texts(source, key=key, is_streamed=True) for source in sources)
    texts = chain.from_iterable(chain(skills, rows))
    return chain(read, (piece for text in texts for piece in pieces(text)))


def recorded_paths(paths: Sequence[str], *, key: str) -> tuple[str, ...]:
    """Return what a lineage keeps of paths: of data sets the revision, split and column as well.

    Raises:
        TextFileError: a data set is not at hand.
    """
    named = {name: parse_name(key, name) for name in dataset_names(paths)}
    stated = {name: str(resolve_dataset(source, key=key)) for name, source in named.items()}
    return tuple(stated.get(path, path) for path in paths)


def _of_datasets(names: Sequence[str], *, key: str, is_streamed: bool) -> Iterator[str]:
    for name in names:
        is_blank = True
        for text in dataset_texts(parse_name(key, name), key=key, is_streamed=is_streamed):
            is_blank = is_blank and not text.strip()
            yield text
        if is_blank:
            raise TextFileError([f"{key}: {name} holds no text."])


def _own(texts: Callable[[], Iterable[str]], key: str) -> Iterator[str]:
    try:
        for text in texts():
            if not isinstance(text, str):
                raise TextFileError([f"{key}: a {type(text).__name__} stands among its texts"])
            yield text
    except (TritterError, GeneratorExit):
        raise
    except Exception as error:  # whatever a class of somebody else raises
        told = " ".join(str(error).split())
        raise TextFileError([f"{key}: {type(error).__name__}: {told}"]) from error
