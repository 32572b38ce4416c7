"""What the text files of a request hold, looked at before anything is written."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tritter.data.built_in import is_built_in
from tritter.data.dataset_name import dataset_names
from tritter.data.finding import find_text_files
from tritter.data.readers import Reading, SpentError, TextFileError
from tritter.data.sources import recorded_paths
from tritter.data.text import no_text
from tritter.errors import RequestError

# Of all files together, unpacked; what is beyond is looked at when it is read for the run.
CHECKED_BYTES = 256 * 2**20


@dataclass(frozen=True, slots=True)
class TextRequest:
    """The files and data sets of one domain, and how they are asked for.

    Args:
        key: that named them, for messages.
        paths: as `find_text_files` takes them.
        text_field: of their records.
    """

    key: str
    paths: tuple[str, ...]
    text_field: str


def check_contents(requests: Iterable[TextRequest], *, max_bytes: int = CHECKED_BYTES) -> None:
    """Read what was asked for, small files first, until so many bytes were read.

    Data sets are opened: their split and column have to be there.

    Raises:
        RequestError: files can't be read as what they are, or hold no text; lists all of it.
    """
    requests = list(dict.fromkeys(requests))
    asked = {request: find_text_files(request.key, request.paths) for request in requests}
    files = [(request, path) for request, found in asked.items() for path in found]
    problems: dict[tuple[TextRequest, Path], list[str]] = {}
    blank: set[tuple[TextRequest, Path]] = set()
    for request, path in sorted(files, key=lambda file: _size(file[1])):
        reading = Reading(key=request.key, text_field=request.text_field, max_bytes=max_bytes)
        problems[request, path] = reading.problems
        try:
            # All texts are looked at, though one would do to know that there is one
            if not sum(1 for _ in reading.pieces(path)):
                blank.add((request, path))
        except SpentError:
            break
        max_bytes -= reading.num_bytes
    found = [line for file in files for line in problems.get(file, ())]
    found += [
        no_text(request.key, paths)
        for request, paths in asked.items()
        if paths
        and not any(map(is_built_in, request.paths))
        and not dataset_names(request.paths)
        and all((request, path) in blank and not problems[request, path] for path in paths)
    ]
    found += _unopened((request.key, dataset_names(request.paths)) for request in requests)
    if found:
        raise RequestError(str(TextFileError(found)))


def _unopened(asked: Iterable[tuple[str, tuple[str, ...]]]) -> Iterator[str]:
    for key, name in dict.fromkeys((key, name) for key, names in asked for name in names):
        try:
            recorded_paths([name], key=key)
        except TextFileError as error:
            yield from error.problems


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # it is gone by now, which reading it will tell
        return 0
