"""The documents that paths mean: which files they are, what these hold, and data sets."""

import os
import stat
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain, count, islice, takewhile
from pathlib import Path

from tritter.data.built_in import BUILT_IN_TEXTS, built_in_documents, is_built_in
from tritter.data.datasets import PREFIX, dataset_names, dataset_texts, parse_name, resolve_dataset
from tritter.data.documents import Documents, documents_of, pieces
from tritter.data.local_files import (
    TEXT_SUFFIXES,
    Reading,
    SpentError,
    TextFileError,
    no_text,
    text_pieces,
    text_suffix,
)
from tritter.data.records import shown
from tritter.data.skills import SkillText
from tritter.errors import RequestError, TritterError, did_you_mean, refused
from tritter.storage.reading import check_inside, kind_of

_Identity = tuple[int, int]  # device and number of a folder
_GLOB_SIGNS = set("*?[")
MAX_RECORDED = 100_000  # files and folders that a path of a record may be searched through
_BROKEN_LINK = "link to nothing"
_MAX_SHOWN = 5
# Of all files together, unpacked; what is beyond is looked at when it is read for the run.
CHECKED_BYTES = 256 * 2**20


@dataclass(frozen=True, slots=True)
class FoundTexts:
    """The text files that paths mean, and what else stood there.

    Args:
        files: each once, in the order of the paths, then sorted.
        skipped: ending of a name, or kind of what is no file → how many were passed over. Hidden
            ones don't count.
    """

    files: tuple[Path, ...]
    skipped: Mapping[str, int] = field(default_factory=dict)

    def note(self, name: str) -> str | None:
        """Say of a domain how many texts were skipped; None when none were."""
        if not self.skipped:
            return None
        num_skipped = sum(self.skipped.values())
        read = "1 file" if len(self.files) == 1 else f"{len(self.files)} files"
        return f"{name}: {read} read; skipped {num_skipped} ({_counted(self.skipped)})"


def find_texts(key: str, paths: Iterable[str], *, is_recorded: bool = False) -> FoundTexts:
    """Find the text files that paths mean.

    A folder means all files of known kinds below it, but hidden ones. Links in it are followed if
    they end inside it, or in the hub's cache where a download belongs to it. Built-in texts and
    datasets are not files and are skipped.

    Args:
        is_recorded: nobody typed the paths, a checkpoint names them; it may come from anywhere, so
            the search is limited.

    Raises:
        RequestError: a path means no text file, and what was found instead; or a link in a folder
            leads out of it.
    """
    limit = MAX_RECORDED if is_recorded else None
    files: dict[Path, None] = {}
    skipped: Counter[str] = Counter()
    for path in paths:
        if is_built_in(path) or path.startswith(PREFIX):
            continue
        try:
            found = _found(key, path, limit)
        except (OSError, ValueError, RuntimeError, NotImplementedError) as error:
            # What a file system or a pattern can object to; a pattern does so in many ways
            if isinstance(error, RequestError):
                raise
            said = error.strerror if isinstance(error, OSError) else None
            raise refused(key, path, f"it can't be looked at ({said or error})") from error
        files.update(dict.fromkeys(found.files))
        skipped.update(found.skipped)
    return FoundTexts(tuple(files), skipped)


def _found(key: str, path: str, limit: int | None) -> FoundTexts:
    place = Path(path)
    if place.is_dir():
        return _known(key, path, _below(key, place, limit), where="the folder")
    if os.path.lexists(place):
        if _kind(place) is None and text_suffix(place):
            return FoundTexts((place,))
        raise refused(key, path, _not_read([place]))
    if _GLOB_SIGNS & set(path):
        if limit is not None:
            _check_glob(key, place, limit)
        matches = sorted(Path(place.anchor).glob(str(place.relative_to(place.anchor))))
        folder = Path(*takewhile(lambda part: not _GLOB_SIGNS & set(part), place.parts))
        for match in matches:
            _check_link(key, folder, match)
        return _known(key, path, matches, where="the glob")
    beside = [entry.name for entry in place.parent.iterdir()] if place.parent.is_dir() else []
    where = "" if place.parent.is_dir() else f"; {place.parent} is no folder either"
    reason = f"there is no such file or folder{where}.{did_you_mean(place.name, beside)}"
    raise refused(key, path, reason.removesuffix("."))


def _known(key: str, path: str, found: Sequence[Path], *, where: str) -> FoundTexts:
    named = [place for place in found if text_suffix(place)]
    broken = [place for place in named if _kind(place) == _BROKEN_LINK]
    if broken:
        raise refused(key, str(broken[0]), "the link leads to no file")
    known = [place for place in named if _kind(place) is None]
    if known:
        taken = set(known)
        return FoundTexts(tuple(known), _kinds(place for place in found if place not in taken))
    nothing = f"{where} holds no file" if where == "the folder" else f"{where} matches no file"
    raise refused(key, path, _not_read(found) if found else nothing)


def _check_glob(key: str, pattern: Path, limit: int) -> None:
    """Refuse a pattern that would be compared with more files and folders than `limit`.

    Raises:
        RequestError: as said.
    """
    first = next(at for at, part in enumerate(pattern.parts) if _GLOB_SIGNS & set(part))
    parts = pattern.parts[first:]
    if ".." in parts or parts.count("**") > 1:  # the same folders again and again
        raise _too_many(key, pattern, limit)
    level, num_entries = [Path(*pattern.parts[:first])], 0
    for _ in parts if "**" not in parts else count():
        below: list[Path] = []
        for folder in level:
            with suppress(OSError), os.scandir(folder) as entries:
                for entry in islice(entries, limit - num_entries + 1):
                    num_entries += 1
                    # Passed over: a link in a circle, or into a folder that is closed to us
                    with suppress(OSError):
                        below += [Path(entry.path)] if entry.is_dir() else []
            if num_entries > limit:
                raise _too_many(key, pattern, limit)
        level = below
        if not level:
            return


def _too_many(key: str, place: Path, limit: int) -> RequestError:
    reason = (
        f"a path that a checkpoint records is searched through at most {limit:,} files and "
        "folders, and this one takes more"
    )
    return refused(key, str(place), reason)


def _below(key: str, folder: Path, limit: int | None) -> list[Path]:
    """Return what is no folder below a folder, sorted; a folder that is met again counts once.

    Raises:
        RequestError: a link leads back to where it stands, a folder can't be listed, or more than
            `limit` files and folders are there.
    """
    num_entries = 0
    found: list[Path] = []
    seen: set[_Identity] = set()
    waiting: deque[tuple[Path, tuple[_Identity, ...]]] = deque([(folder, ())])
    while waiting:
        place, above = waiting.popleft()
        try:
            status = place.stat()
            own = status.st_dev, status.st_ino
            if own in above:
                reason = "the link leads back to a folder that it stands in; remove it"
                raise refused(key, str(place), reason)
            if own in seen:
                continue
            entries = sorted(place.iterdir())
        except OSError as error:
            reason = f"the folder can't be listed ({error.strerror})"
            raise refused(key, str(place), reason) from error
        seen.add(own)
        num_entries += len(entries)
        if limit is not None and num_entries > limit:
            raise _too_many(key, folder, limit)
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_symlink():
                _check_link(key, folder, entry)
            if not entry.is_dir():
                found.append(entry)
            elif entry.is_symlink():
                waiting.append((entry, (*above, own)))  # last: what lies here keeps its own name
            else:
                waiting.appendleft((entry, (*above, own)))
    return sorted(found)


def _check_link(key: str, folder: Path, place: Path) -> None:
    """Refuse what leads out of the folder that the user named."""
    if place.exists():
        try:
            check_inside(folder, str(place.relative_to(folder)))
        except TritterError as error:
            raise refused(key, str(folder), str(error)) from error


def _kind(place: Path) -> str | None:
    """Return what stands there, if it is no regular file."""
    try:
        mode = place.stat().st_mode
    except OSError:
        return _BROKEN_LINK
    if stat.S_ISREG(mode):
        return None
    return kind_of(mode).removeprefix("a ")


def _kinds(places: Iterable[Path]) -> Counter[str]:
    return Counter(_kind(place) or place.suffix.lower() or "no ending" for place in places)


def _counted(kinds: Mapping[str, int]) -> str:
    by_count = sorted(kinds, key=lambda kind: (-kinds[kind], kind))
    told = [f"{shown(kind)} {kinds[kind]}" for kind in by_count[:_MAX_SHOWN]]
    return ", ".join([*told, *(["..."] if len(by_count) > _MAX_SHOWN else [])])


def _not_read(places: Sequence[Path]) -> str:
    return f"texts are read from {', '.join(TEXT_SUFFIXES)}; found {_counted(_kinds(places))}"


def source_documents(
    paths: Sequence[str],
    *,
    key: str,
    text_field: str,
    texts: Callable[[], Iterable[str]] | None = None,
    is_streamed: bool = False,
    is_recorded: bool = False,
) -> Documents:
    """Return all documents that paths, data sets and built-in texts mean.

    Args:
        key: the configuration's key that named them, for messages.
        text_field: of records.
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
    built_in = (each for path in filter(is_built_in, paths) for each in built_in_documents(path))
    files = find_texts(key, paths, is_recorded=is_recorded).files
    reading = Reading(key=key, text_field=text_field)
    rows = _of_datasets(dataset_names(paths), reading, is_streamed=is_streamed)
    whole = chain((document.text for document in built_in), rows)
    read = text_pieces(files, reading) if files else ()
    documents = Documents.of(chain(read, (piece for text in whole for piece in pieces(text))))
    documents.notes = tuple(reading.notes)
    return documents


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
    files = find_texts(key, paths).files
    reading = Reading(key=key, text_field=text_field, max_bytes=max_bytes)
    read = text_pieces(files, reading) if files else iter(())
    skills = (SkillText.named(key, path).texts() for path in paths if is_built_in(path))
    rows = (dataset_texts(source, reading, is_streamed=True) for source in sources)
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


def _of_datasets(names: Sequence[str], reading: Reading, *, is_streamed: bool) -> Iterator[str]:
    for name in names:
        is_blank = True
        source = parse_name(reading.key, name)
        for text in dataset_texts(source, reading, is_streamed=is_streamed):
            is_blank = is_blank and not text.strip()
            yield text
        if reading.problems or is_blank:
            raise TextFileError(reading.problems or [f"{reading.key}: {name} holds no text."])


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


@dataclass(frozen=True, slots=True)
class TextRequest:
    """The files and data sets of one domain, and how they are asked for.

    Args:
        key: that named them, for messages.
        paths: as `find_texts` takes them.
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
    asked = {request: find_texts(request.key, request.paths).files for request in requests}
    files = [(request, path) for request, found in asked.items() for path in found]
    problems: dict[tuple[TextRequest, Path], list[str]] = {}
    blank: set[tuple[TextRequest, Path]] = set()
    sizes = dict.fromkeys((path for _, path in files), 0)
    for path in sizes:
        with suppress(OSError):  # it is gone by now, which reading it will tell
            sizes[path] = path.stat().st_size
    for request, path in sorted(files, key=lambda file: sizes[file[1]]):
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
    named = ((request.key, name) for request in requests for name in dataset_names(request.paths))
    for key, name in dict.fromkeys(named):
        try:
            recorded_paths([name], key=key)
        except TextFileError as error:
            found += error.problems
    if found:
        raise RequestError(str(TextFileError(found)))
