"""The documents that paths and built-in texts mean."""

from collections.abc import Sequence
from functools import cache

from tritter.config.text_files import BUILT_IN_TEXTS, find_text_files
from tritter.data.documents import Document, documents_of
from tritter.data.ranked import RANKED_SUFFIXES, ranked_documents
from tritter.data.stdlib import StdlibText, gather
from tritter.data.text import read_texts


def source_documents(
    paths: Sequence[str], *, key: str, text_field: str, is_ranked: bool = False
) -> tuple[Document, ...]:
    """Return all documents that paths and built-in texts mean.

    Args:
        key: the configuration's key that named them, for messages.
        text_field: of records.
        is_ranked: read them as format 2 did, which counts where a split by rank goes on.

    Raises:
        RequestError: a path means no text file, or a file can't be read as what it is.
    """
    built_in = [each for path in BUILT_IN_TEXTS if path in paths for each in _built_in(path)]
    files = find_text_files(key, paths)
    if is_ranked:
        files = tuple(file for file in files if file.name.lower().endswith(RANKED_SUFFIXES))
    found = read_texts(files, key=key, text_field=text_field) if files else ()
    if is_ranked:
        return (*built_in, *ranked_documents(found))
    texts = [text for _, texts in found for text in texts]
    return documents_of([*(document.text for document in built_in), *texts])


def _built_in(path: str) -> tuple[Document, ...]:
    text = _library()
    return text.prose if path == "stdlib:prose" else text.code


@cache
def _library() -> StdlibText:
    return gather()
