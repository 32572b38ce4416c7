"""Documents of paths: find files, read their contents, and read data sets."""

import logging
import os
import stat
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import KW_ONLY, dataclass
from hashlib import sha256
from itertools import chain, count, islice, takewhile
from pathlib import Path

from tritter.data.built_in import Stdlib, built_in_documents, is_built_in
from tritter.data.datasets import DatasetName
from tritter.data.documents import PIECE_CHARACTERS, Documents, is_blank, text_key
from tritter.data.local_files import (
    SUPPORTED,
    ByteLimitError,
    Reading,
    TextFileError,
    not_data,
    text_suffix,
)
from tritter.data.records import DEFAULT_FIELD, Text, shown
from tritter.data.skills import SkillText
from tritter.errors import RequestError, TritterError, did_you_mean, refused
from tritter.storage.reading import check_inside, kind_of

_logger = logging.getLogger(__name__)

_GLOB_SIGNS = set("*?[")
_MAX_RECORDED = 100_000  # limit of files and folders to search for a path from a checkpoint
_BROKEN_LINK = "broken link"
_MAX_SHOWN = 5
# Decompressed bytes of all files to check up front; the rest is checked when the run reads it.
_CHECKED_BYTES = 256 * 2**20
_AGAIN = "named again"


def text_files(
    key: str,
    paths: Iterable[str],
    *,
    is_recorded: bool = False,
    skipped: Counter[str] | None = None,
) -> tuple[Path, ...]:
    """Return the text files of some paths: each once, in the order of the paths, then sorted.

    A folder stands for all supported files in it and its subfolders, except hidden ones and those
    that are `not_data`. Links are followed if they stay inside the folder, or inside the hub's
    cache for a download. Built-in texts and data sets are skipped.

    Args:
        key: the configuration key, for messages.
        paths: files, folders and globs.
        is_recorded: the paths come from a checkpoint, which is untrusted: a limited search.
        skipped: counts other entries by file extension, kind, or why the content is no text, and
            files of several paths, which are read once. Hidden files are not counted.
    """
    limit = _MAX_RECORDED if is_recorded else None
    skipped = Counter() if skipped is None else skipped
    files: dict[Path, None] = {}
    for path in paths:
        if is_built_in(path) or path.startswith(DatasetName.PREFIX):
            continue
        try:
            found = _found(key, path, limit, skipped)
        except (OSError, ValueError, RuntimeError, NotImplementedError) as error:
            # File systems and glob patterns raise many kinds of errors
            if isinstance(error, RequestError):
                raise
            reason = error.strerror if isinstance(error, OSError) else None
            raise refused(key, path, f"it can't be read ({reason or error})") from error
        if again := sum(each in files for each in found):
            skipped[_AGAIN] += again
        files.update(dict.fromkeys(found))
    return tuple(files)


def skipped_note(name: str, paths: Iterable[str], *, key: str) -> str | None:
    """Return a message about the skipped files of a domain's paths; None if there are none."""
    skipped = Counter[str]()
    count = len(text_files(key, paths, skipped=skipped))
    if not skipped:
        return None
    read = "1 file" if count == 1 else f"{count} files"
    return f"{name}: {read} read; skipped {skipped.total()} ({_join_counts(skipped)})"


def _found(key: str, path: str, limit: int | None, skipped: Counter[str]) -> Sequence[Path]:
    location = Path(path)
    parent = location.parent
    if location.is_dir():
        below = _below(key, location, limit)
        return _known(key, path, below, skipped, where="the folder")
    if os.path.lexists(location):
        if _kind(location) is None and text_suffix(location):
            return [location]
        raise refused(key, path, _unsupported(_kinds([location])))
    if _GLOB_SIGNS & set(path):
        if limit is not None:
            _check_glob(key, location, limit)
        matches = sorted(Path(location.anchor).glob(str(location.relative_to(location.anchor))))
        folder = Path(*takewhile(lambda part: not _GLOB_SIGNS & set(part), location.parts))
        for match in matches:
            _check_link(key, folder, match)
        return _known(key, path, matches, skipped, where="the glob")
    siblings = [each.name for each in parent.glob("*") if each.is_dir() or text_suffix(each)]
    where = "" if parent.is_dir() else f"; {parent} is not a folder either"
    reason = f"there is no such file or folder{where}.{did_you_mean(location.name, siblings)}"
    raise refused(key, path, reason.removesuffix("."))


def _known(
    key: str, path: str, found: Sequence[Path], skipped: Counter[str], *, where: str
) -> list[Path]:
    """Return the text files among some entries, and count the others."""
    named = [each for each in found if text_suffix(each)]
    broken = [each for each in named if _kind(each) == _BROKEN_LINK]
    if broken:
        raise refused(key, str(broken[0]), "the link is broken")
    reasons = {each: not_data(each) for each in named if _kind(each) is None}
    known = [each for each, reason in reasons.items() if reason is None]
    others = _kinds(each for each in found if each not in reasons)
    others.update(filter(None, reasons.values()))
    if not known:
        nothing = f"{where} is empty" if where == "the folder" else f"{where} matches no file"
        raise refused(key, path, _unsupported(others) if found else nothing)
    skipped.update(others)
    return known


def _check_glob(key: str, pattern: Path, limit: int) -> None:
    """Check that a pattern searches at most `limit` files and folders."""
    first = next(at for at, part in enumerate(pattern.parts) if _GLOB_SIGNS & set(part))
    parts = pattern.parts[first:]
    if ".." in parts or parts.count("**") > 1:  # would visit folders repeatedly
        raise _search_limit_error(key, pattern, limit)
    level, num_entries = [Path(*pattern.parts[:first])], 0
    for _ in parts if "**" not in parts else count():
        below: list[Path] = []
        for folder in level:
            with suppress(OSError), os.scandir(folder) as entries:
                for entry in islice(entries, limit - num_entries + 1):
                    num_entries += 1
                    # Skip circular links and inaccessible folders
                    with suppress(OSError):
                        below += [Path(entry.path)] if entry.is_dir() else []
            if num_entries > limit:
                raise _search_limit_error(key, pattern, limit)
        level = below
        if not level:
            return


def _search_limit_error(key: str, path: Path, limit: int) -> RequestError:
    reason = f"the search of a path from a checkpoint is limited to {limit:,} files and folders"
    return refused(key, str(path), reason)


def _below(key: str, folder: Path, limit: int | None) -> list[Path]:
    """Return the sorted files in a folder and its subfolders; each folder is visited once."""

    def fail(error: OSError) -> None:
        raise refused(key, error.filename, f"the folder can't be listed ({error.strerror})")

    num_entries, found, visited = 0, list[Path](), set[str]()
    waiting = [folder]  # then linked folders: direct paths take precedence
    for start in waiting:
        for root, folders, files in os.walk(start, onerror=fail):
            num_entries += len(folders) + len(files)
            if limit is not None and num_entries > limit:
                raise _search_limit_error(key, folder, limit)
            if (real := os.path.realpath(root)) in visited:
                folders.clear()
                continue
            visited.add(real)
            folders[:] = sorted(name for name in folders if name[0] != ".")
            for entry in sorted(Path(root, name) for name in (*folders, *files) if name[0] != "."):
                if entry.is_symlink():
                    _check_link(key, folder, entry)
                if not entry.is_dir():
                    found.append(entry)
                elif entry.is_symlink():
                    waiting.append(entry)
    return sorted(found)


def _check_link(key: str, folder: Path, path: Path) -> None:
    """Refuse a link that leaves the folder that the user named."""
    if path.exists():
        try:
            check_inside(folder, str(path.relative_to(folder)))
        except TritterError as error:
            raise refused(key, str(folder), str(error)) from error


def _kind(path: Path) -> str | None:
    """Return the kind of a directory entry; None for a regular file."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return _BROKEN_LINK
    if stat.S_ISREG(mode):
        return None
    return kind_of(mode).removeprefix("a ")


def _kinds(paths: Iterable[Path]) -> Counter[str]:
    return Counter(_kind(path) or path.suffix.lower() or "no extension" for path in paths)


def _join_counts(kinds: Mapping[str, int]) -> str:
    by_count = sorted(kinds, key=lambda kind: (-kinds[kind], kind))
    parts = [f"{shown(kind)} {kinds[kind]}" for kind in by_count[:_MAX_SHOWN]]
    return ", ".join([*parts, *(["..."] if len(by_count) > _MAX_SHOWN else [])])


def _unsupported(kinds: Mapping[str, int]) -> str:
    return f"supported are {SUPPORTED}; found {_join_counts(kinds)}"


@dataclass(frozen=True, slots=True)
class TextRequest:
    """The texts of one domain: their location and how to read them.

    Args:
        paths: files, folders, globs, data sets and built-in texts.
        key: the configuration key, for messages.
        text_field: field of records that contains the text.
        texts: a third-party source that replaces the paths.
        is_streamed: stream data sets from the hub instead of downloading them.
        is_head: read the first rows of data sets only.
        is_recorded: the paths come from a checkpoint; see `text_files`.
        piece_characters: size of the `pieces` of long texts; those of built-in texts are fixed.
    """

    paths: Sequence[str]
    _: KW_ONLY
    key: str
    text_field: str = DEFAULT_FIELD
    texts: Callable[[], Iterable[str]] | None = None
    is_streamed: bool = False
    is_head: bool = False
    is_recorded: bool = False
    piece_characters: int = PIECE_CHARACTERS

    @property
    def files(self) -> tuple[Path, ...]:
        """The text files of the paths."""
        return text_files(self.key, self.paths, is_recorded=self.is_recorded)

    def reading(self, *, is_quick: bool = False) -> Reading:
        """Return the options of a reading; a quick one ends after 256 MB of files."""
        return Reading(
            key=self.key,
            text_field=self.text_field,
            max_bytes=_CHECKED_BYTES if is_quick else None,
            piece_characters=self.piece_characters,
        )

    def documents(self) -> Documents:
        """Return all documents."""
        reading, paths = self.reading(), self.paths
        if self.texts is not None:
            return _documents(_checked_texts(self.texts, self.key), reading)
        built_in = (doc for path in filter(is_built_in, paths) for doc in built_in_documents(path))
        whole = chain((each.conversation or each.text for each in built_in), self._rows(reading))
        files = self.files
        read = reading.pieces_of(files) if files else ()
        return _documents(chain(read, whole), reading)

    def noted_documents(self) -> Documents:
        """Return all documents, and log which files and records are left out."""
        documents = self.documents()
        skipped = skipped_note(self.key, self.paths, key=self.key)
        for note in filter(None, (skipped, *documents.notes)):
            _logger.warning(note)
        return documents

    def quick_pieces(self, reading: Reading) -> Iterator[Text] | None:
        """Return a lazy iterator over the documents of files, skills and data sets on disk.

        Return None if the paths include the standard library, which takes seconds to read, or a
        data set of the hub, which requires the network.

        Args:
            reading: a quick one; at its limit, the iterator raises `ByteLimitError`.
        """
        sources = self._datasets
        if {*self.paths} & {*Stdlib.TEXTS} or not all(each.is_on_disk for each in sources):
            return None
        files = self.files
        read = reading.pieces_of(files) if files else iter(())
        named = (SkillText.named(self.key, path) for path in filter(is_built_in, self.paths))
        skills = (each.texts() for each in named)
        rows = (source.texts(reading, is_streamed=True) for source in sources)
        texts = chain.from_iterable(chain(skills, rows))
        return chain(read, reading.filled(texts))

    def quick_digest(self) -> str | None:
        """Return a checksum of the set of `quick_pieces`; None if it is not readable."""
        keys = array("Q")  # the beginning of each key: millions of records need little memory
        try:
            for text in self.quick_pieces(self.reading(is_quick=True)) or ():
                keys.append(int(text_key(str(text))[:16], 16))
        except (TextFileError, ByteLimitError):  # the run reports unreadable files
            return None
        return sha256(array("Q", sorted(set(keys))).tobytes()).hexdigest() if keys else None

    @property
    def recorded_paths(self) -> tuple[str, ...]:
        """The paths of a lineage record: data sets with revision, split, rows and column."""
        sources = ((each.head if self.is_head else each) for each in self._datasets)
        resolved = (str(source.resolved(key=self.key)) for source in sources)
        stated = dict(zip(DatasetName.names_in(self.paths), resolved, strict=True))
        return tuple(stated.get(path, path) for path in self.paths)

    @property
    def streams(self) -> tuple[DatasetName, ...]:
        """The data sets to read while the model trains; empty if all documents are read before."""
        return tuple(self._datasets) if self.is_head else ()

    @property
    def _datasets(self) -> list[DatasetName]:
        return [DatasetName.named(self.key, name) for name in DatasetName.names_in(self.paths)]

    def _rows(self, reading: Reading) -> Iterator[Text]:
        """Yield the texts of the data sets."""
        for name in DatasetName.names_in(self.paths):
            has_words = False
            source = DatasetName.named(self.key, name)
            source = source.head if self.is_head else source
            for text in source.texts(reading, is_streamed=self.is_streamed):
                has_words = has_words or not is_blank(text)
                yield text
            if reading.problems or not has_words:
                raise TextFileError(reading.problems or [f"{self.key}: {name} contains no text."])


def _documents(texts: Iterable[Text], reading: Reading) -> Documents:
    """Return distinct texts with notes on those that were skipped or dropped."""
    documents = Documents.of_pieces(reading.filled(texts))
    note = reading.dropped_note(len(documents), num_duplicates=documents.num_duplicates)
    documents.notes = (*reading.notes, *filter(None, [note]))
    return documents


def _checked_texts(texts: Callable[[], Iterable[str]], key: str) -> Iterator[str]:
    try:
        found = texts()
        if isinstance(found, str):  # it would yield its characters
            raise TextFileError([f"{key}: texts() returns a string; it must yield strings"])
        for text in found:
            if not isinstance(text, str):
                kind = type(text).__name__
                raise TextFileError([f"{key}: texts() yields a {kind}; it must yield strings"])
            yield text
    except (TritterError, GeneratorExit):
        raise
    except Exception as error:  # third-party code
        message = " ".join(str(error).split())
        raise TextFileError([f"{key}: texts() raises {type(error).__name__}: {message}"]) from error


def check_contents(requests: Iterable[TextRequest], *, max_bytes: int = _CHECKED_BYTES) -> None:
    """Read the requested files, smallest first, up to `max_bytes`, and open the data sets."""
    requests = list(dict.fromkeys(requests))
    requested = {each: each.files for each in requests}
    files = [(request, path) for request, found in requested.items() for path in found]
    problems: dict[tuple[TextRequest, Path], list[str]] = {}
    blank: set[tuple[TextRequest, Path]] = set()
    sizes = dict.fromkeys((path for _, path in files), 0)
    for path in sizes:
        with suppress(OSError):  # the file is gone; reading it will fail
            sizes[path] = path.stat().st_size
    for request, path in sorted(files, key=lambda file: sizes[file[1]]):
        reading = Reading(key=request.key, text_field=request.text_field, max_bytes=max_bytes)
        problems[request, path] = reading.problems
        try:
            # Read all texts, to find all problems
            if not sum(1 for _ in reading.pieces(path)):
                blank.add((request, path))
        except ByteLimitError:
            break
        max_bytes -= reading.num_bytes
    found = [line for file in files for line in problems.get(file, ())]
    found += [
        request.reading().no_text(paths)
        for request, paths in requested.items()
        if paths
        and not any(map(is_built_in, request.paths))
        and not DatasetName.names_in(request.paths)
        and all((request, path) in blank and not problems[request, path] for path in paths)
    ]
    named = (
        (request.key, name) for request in requests for name in DatasetName.names_in(request.paths)
    )
    for key, name in dict.fromkeys(named):
        try:
            DatasetName.named(key, name).resolved(key=key)
        except TextFileError as error:
            found += error.problems
    if found:
        raise RequestError(str(TextFileError(found)))
