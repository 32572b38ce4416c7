"""Data sets from the hub and from disk: parse their names and read their texts row by row.

The `datasets` library reads them. Scripts of data sets never run.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cache
from importlib import import_module
from itertools import chain, islice
from pathlib import Path
from threading import RLock
from typing import Any, ClassVar

from tritter.data.local_files import Reading, TextFileError, check_sizes, separator_problem
from tritter.data.records import (
    DEFAULT_FIELD,
    OF_RECORDS,
    TURNS,
    Text,
    WrongRecordError,
    conversation_fields,
    shown,
    text_of,
)
from tritter.errors import RequestError, TritterError, did_you_mean, nearest, refused
from tritter.storage.hashing import file_digest
from tritter.storage.hub import quiet_hub
from tritter.storage.reading import check_inside, check_tree, read_object, read_text, require_file

_FORM = "hf:OWNER/NAME[@REVISION][/CONFIG][:SPLIT][[FROM:TO]][#COLUMN]"
_PATH_FORM = "PATH[:SPLIT][[FROM:TO]][#COLUMN]"
# File extension → builder of `datasets` that reads it, and the builder's arguments
_PLAIN: dict[str, tuple[str, dict[str, str]]] = {
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t"}),
    ".txt": ("text", {}),
}
_BUILDERS = {
    **_PLAIN,
    ".parquet": ("parquet", {}),
    ".arrow": ("arrow", {}),
    **{f"{ending}.gz": builder for ending, builder in _PLAIN.items()},
}
_SAVED = (("dataset_dict.json",), ("dataset_info.json", "state.json"))  # from `save_to_disk`
_CARD, _CARD_ALONE = "README.md", ".huggingface.yaml"
_ELSEWHERE = re.compile(r"[\w+.-]*:|.*(?:://|::)|/|(?:.*/)?\.\.(?:/|$)", re.DOTALL)
_TAIL = (
    r"(?::(?P<split>\w[\w.-]*))?"
    r"(?P<slice>\[(?P<start>\d*):(?P<stop>\d*)\])?"
    r"(?:#(?P<column>.+))?"
)
_HUB_NAME = (
    r"(?P<name>\w[\w.-]*/\w[\w.-]*)(?:@(?P<revision>\w[\w.-]*))?"
    r"(?:/(?P<config>[^/:#@\[\]]+))?"
)
_OF_HUB, _ON_DISK = re.compile(_HUB_NAME + _TAIL), re.compile(r"(?P<name>.+?)" + _TAIL)
_BATCH_ROWS = 256
_BATCH_CHARACTERS = 2**21  # of a batch that is read while a model trains
_HASHED_BYTES = 4 * 2**30  # of streamed files, which takes seconds
_PROBED_ROWS = 100  # to infer the types of columns where the data set does not declare them
_MAX_NAMES, _MAX_MESSAGE = 20, 300
_DEFAULT_SPLIT = "train"
_WHOLE_TEXTS = {"sample_by": "document"}  # not by line
_LOCK = RLock()
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetName:
    """A data set and the selected part of it; `str` returns a name that resolves to the same.

    Args:
        name: a hub id or an absolute path.
        revision: revision of the hub repository; None selects the newest.
        config: None selects the only config or the default.
        split: None selects `train` or the only split.
        rows: first row and end (exclusive); None reads to the end.
        column: column of texts; None selects `text`, the columns of a conversation, or the only
            column of texts.
    """

    PREFIX: ClassVar[str] = "hf:"
    HEAD_ROWS: ClassVar[int] = 10_000  # of a streamed data set, for validation and statistics
    name: str
    revision: str | None = None
    config: str | None = None
    split: str | None = None
    rows: tuple[int, int | None] = (0, None)
    column: str | None = None

    @classmethod
    def named(cls, key: str, word: str) -> DatasetName:
        """Parse the name of a data set; a path, with or without `hf:`, means one on disk.

        Args:
            key: the configuration key, for messages.
            word: the name as typed.
        """
        body = word.removeprefix(cls.PREFIX)
        is_on_disk = not word.startswith(cls.PREFIX) or body.startswith(("/", "./", "../", "~"))
        if is_on_disk:
            with suppress(OSError, ValueError, RuntimeError):  # it is not a path
                if Path(body).expanduser().exists():
                    return cls(name=_absolute(key, body))
        match = (_ON_DISK if is_on_disk else _OF_HUB).fullmatch(body)
        if match is None:
            reason = f"the format is {_PATH_FORM if is_on_disk else _FORM}; FROM and TO count rows"
            raise refused(key, word, reason)
        found = match.groupdict()
        start, stop = int(found["start"] or 0), int(found["stop"]) if found["stop"] else None
        if stop is not None and stop <= start:
            raise refused(key, word, f"rows {start} to {stop} (exclusive) are an empty range")
        return cls(
            name=_absolute(key, found["name"]) if is_on_disk else found["name"],
            revision=found.get("revision"),
            config=found.get("config"),
            split=found["split"],
            rows=(start, stop),
            column=found["column"],
        )

    @classmethod
    def names_in(cls, paths: Iterable[str]) -> tuple[str, ...]:
        """Return the paths that name data sets."""
        return tuple(path for path in paths if path.startswith(cls.PREFIX))

    def __str__(self) -> str:
        parts = (("@", self.revision), ("/", self.config), (":", self.split))
        tail = "".join(f"{sign}{word}" for sign, word in parts if word is not None)
        start, stop = self.rows
        if (start, stop) != (0, None):
            tail += f"[{start or ''}:{'' if stop is None else stop}]"
        return f"{self.PREFIX}{self.name}{tail}" + (
            "" if self.column is None else f"#{self.column}"
        )

    @property
    def head(self) -> DatasetName:
        """The first rows, which a run with `data.streaming` reads before it trains."""
        start, stop = self.rows
        last = start + self.HEAD_ROWS
        return replace(self, rows=(start, last if stop is None else min(stop, last)))

    @property
    def is_on_disk(self) -> bool:
        return Path(self.name).is_absolute()

    @property
    def is_saved(self) -> bool:
        """Whether it is a folder written by `save_to_disk`."""
        return any(all((Path(self.name) / name).is_file() for name in names) for names in _SAVED)

    def check_on_disk(self, key: str, word: str) -> None:
        """Check that a data set on disk, typed as `word`, exists and is supported."""
        path = Path(self.name)
        if not self.is_on_disk:
            return
        if path.suffix == ".py" or (path / f"{path.name}.py").is_file():
            reason = "Tritter never runs the script of a data set; name its data files"
        elif path.is_dir():
            try:
                _check_folder(path)
            except TritterError as error:
                raise RequestError(f"{key}: {error}") from error
            return
        elif path.is_file():
            if _file_ending(path):
                return
            reason = f"data=hf reads {', '.join(_BUILDERS)}; data=text reads other files"
        else:
            siblings = [e.name for e in path.parent.glob("*") if e.is_dir() or _file_ending(e)]
            parent = "" if path.parent.is_dir() else f"; {path.parent} is not a folder either"
            near = did_you_mean(path.name, siblings)
            is_like_hub = not near and not _file_ending(path) and _OF_HUB.fullmatch(word)
            hub = f"; for a data set of the hub, write {self.PREFIX}{word}" if is_like_hub else ""
            reason = f"there is no such file or folder{parent}{hub}.{near}".removesuffix(".")
        raise refused(key, word, reason)

    def resolved(self, *, key: str) -> DatasetName:
        """Return the data set with its revision, split and column.

        This reads metadata and at most a few rows.

        Args:
            key: the configuration key, for messages.
        """
        with _dataset_errors(self, key):
            return _of_hub(self) if not self.is_on_disk else _resolve_name(self)

    def texts(self, reading: Reading, *, is_streamed: bool) -> Iterator[Text]:
        """Yield the texts row by row; rows without a text are skipped.

        Args:
            reading: counts invalid rows.
            is_streamed: True streams from the hub; False downloads into the hub's cache first. Data
                sets on disk are read in place.
        """
        batches = self.batches(reading, is_streamed=is_streamed)
        texts = chain.from_iterable(texts for texts, _ in batches)
        yield from reading.counted(str(self), texts)

    def batches(
        self, reading: Reading, *, is_streamed: bool, position: str = ""
    ) -> Iterator[tuple[list[Text], str]]:
        """Yield the texts in batches, from a position that an earlier batch had.

        Each has the position after it as JSON, which is empty for a whole table.
        """
        stated = self.resolved(key=reading.key)
        with _dataset_errors(self, reading.key):
            opened = _open(stated, is_streamed=is_streamed or stated.is_on_disk)
            rows = opened[_split(stated, opened)]
            columns = _columns(stated, rows)
            is_text = conversation_fields(columns) != columns
            field = columns[0] if is_text else DEFAULT_FIELD
            if self.column is None and (field == DEFAULT_FIELD or not is_text):
                reading.note_unread(rows.column_names or columns, is_text=is_text, option="#")
            (start, stop), selected = stated.rows, rows.select_columns(list(columns))
            if hasattr(selected, "num_rows"):
                if start >= selected.num_rows:
                    return
                end = min(stop or selected.num_rows, selected.num_rows)
                selected = selected.select(range(start, end))
                selected = selected.to_iterable_dataset() if is_streamed else selected
            else:
                selected = selected.skip(start) if start else selected
                selected = selected if stop is None else selected.take(stop - start)
            size = _rows_of_batch(selected) if is_streamed else _BATCH_ROWS
            if position:
                selected.load_state_dict(json.loads(position))
            batches, number = selected.iter(batch_size=size), start  # one batch in memory at a time
        while True:
            with _dataset_errors(self, reading.key):
                if (batch := next(batches, None)) is None:
                    return
                after = json.dumps(selected.state_dict()) if is_streamed else ""
            texts = list[Text]()
            for values in zip(*(batch[name] for name in columns), strict=True):
                number += 1
                if is_text and values[0] is None:
                    reading.num_blank += 1
                    continue
                try:
                    texts.append(text_of(dict(zip(columns, values, strict=True)), field=field))
                except WrongRecordError as error:
                    reading.skipped.add(f"{self}, row {number - 1}", str(error))
            yield texts, after


def _file_ending(path: Path) -> str:
    """Return the extension that selects the builder of a file; empty if it is unsupported."""
    return max((end for end in _BUILDERS if path.name.lower().endswith(end)), key=len, default="")


def _check_folder(folder: Path) -> None:
    """Refuse a data set folder that refers to files outside itself, by link or by name."""
    check_tree(folder)
    named: list[tuple[Path, object]] = []  # file and its data entries, as `datasets` reads them
    for path in filter(Path.is_file, (folder / _CARD, folder / _CARD_ALONE)):
        require_file(path)
        try:
            if path.name == _CARD:
                card = import_module("huggingface_hub").DatasetCard.load(path).data.to_dict()
            else:
                card = import_module("yaml").safe_load(read_text(path))
        except Exception as error:  # several libraries raise here
            raise TritterError(f"{path} cannot be read ({type(error).__name__}).") from error
        configs = card.get("configs") if isinstance(card, dict) else None
        for config in configs if isinstance(configs, list) else ():
            if isinstance(config, dict):
                named += [(path, config.get("data_files")), (path, config.get("data_dir"))]
    for path in folder.glob("dataset_dict.json"):
        named.append((path, read_object(path).get("splits")))
    for path in folder.rglob("state.json"):
        files = read_object(path).get("_data_files")
        for each in files if isinstance(files, list) else ():
            if isinstance(each, dict):
                named.append((path, each.get("filename")))
    for path, entry in ((path, entry) for path, value in named for entry in _patterns(value)):
        if _ELSEWHERE.match(entry) or "\0" in entry:
            raise TritterError(
                f"{path} refers to {entry[:200]!r}, which is outside the folder. "
                "Move the data into the folder and use a path relative to it."
            )
        check_inside(path.parent, entry)


def _patterns(value: object) -> Iterator[str]:
    """Yield the patterns of a `data_files` entry: one, several, or per split."""
    named = list(value.values()) if isinstance(value, dict) else value
    for each in named if isinstance(named, list) else [] if named is None else [named]:
        paths = each.get("path") if isinstance(each, dict) else each
        yield from (str(path) for path in (paths if isinstance(paths, list) else [paths]))


def _absolute(key: str, path: str) -> str:
    try:
        return str(Path(path).expanduser().resolve())
    except (OSError, ValueError, RuntimeError) as error:
        raise refused(key, path, f"this is not a valid path ({error})") from error


class _Unreadable(Exception):
    """The problem of a data set, phrased to follow its name."""


def stream_identity(*sources: DatasetName, key: str) -> dict[str, str]:
    """Return the data sets by their resolved names, and file → its contents.

    Contents are size and SHA-256; of more than `_HASHED_BYTES`, size and time of the last change.
    """
    files: dict[Path, os.stat_result] = {}
    for source in sources:
        path = Path(source.name)
        for file in (path, *sorted(path.rglob("*"))) if source.is_on_disk else ():
            if file.is_file() and (_file_ending(file) or file.name == _CARD):
                files[file] = file.stat()
    is_hashed = sum(status.st_size for status in files.values()) <= _HASHED_BYTES
    found = {"data sets": ", ".join(str(each.resolved(key=key)) for each in sources)}
    for file, status in files.items():
        changed = datetime.fromtimestamp(status.st_mtime, tz=UTC).isoformat()
        contents = f"SHA-256 {file_digest(file)}" if is_hashed else f"modified {changed}"
        found[str(file)] = f"{status.st_size:,} bytes, {contents}"
    return found


def _rows_of_batch(rows: Any) -> int:
    """Return a number of rows of about `_BATCH_CHARACTERS`, from the length of the first."""
    found = [len(str(row)) for row in rows.take(_PROBED_ROWS)]
    mean = max(1, sum(found) // max(1, len(found)))
    return max(1, min(_BATCH_ROWS, _BATCH_CHARACTERS // mean))


def _resolve_name(source: DatasetName) -> DatasetName:
    if not source.is_on_disk:
        builder, _ = _builder(source)
        config = builder.config.name.partition("-sample_by=")[0]
        cached, revision = str(builder.hash or ""), source.revision or ""
        if _COMMIT.fullmatch(cached):
            if _COMMIT.fullmatch(revision) and cached != revision:
                raise _Unreadable(f"is not cached; the cache has {source.name} at {cached}")
            source = replace(source, revision=cached, config=config)
    opened = _open(source, is_streamed=True)
    split = _split(source, opened)
    columns = _columns(source, opened[split])
    is_text = conversation_fields(columns) != columns
    column = columns[0] if is_text or len(columns) == 1 else source.column
    return replace(source, split=split, column=column)


_of_hub = cache(_resolve_name)  # once per process, even if the hub changes during the run


def _library() -> Any:
    return import_module("datasets")  # importing it takes a second


@contextmanager
def _dataset_errors(source: DatasetName, key: str) -> Iterator[None]:
    """Name the data set in all errors of a block, and silence the library's output.

    One thread at a time: each restores the settings that it found.
    """
    with _LOCK:
        library = _library()
        log, was_shown = library.utils.logging, library.is_progress_bar_enabled()
        verbosity = log.get_verbosity()
        library.disable_progress_bars()
        log.set_verbosity(log.CRITICAL)
        try:
            with quiet_hub():
                yield
        except (TritterError, GeneratorExit):
            raise
        # Format and hub libraries raise exceptions of their own.
        except Exception as error:
            reason = _reason(source, error)
            stop = "" if reason.endswith((".", "?")) else "."
            raise TextFileError([f"{key}: {source} {reason}{stop}"]) from error
        finally:
            log.set_verbosity(verbosity)
            if was_shown:
                library.enable_progress_bars()


def _reason(source: DatasetName, error: Exception) -> str:
    if isinstance(error, _Unreadable):
        return str(error)
    library = _library()
    message = " ".join(str(error).split())[:_MAX_MESSAGE]
    if isinstance(error, ConnectionError) and not source.is_on_disk:
        advice = "download it once with network access, or name a folder from save_to_disk"
        if library.config.HF_HUB_OFFLINE:
            folder = library.config.HF_DATASETS_CACHE
            return f"is not cached in {folder}, and HF_HUB_OFFLINE disables downloads; {advice}"
        return f"is not cached, and the hub can't be reached ({message}); {advice}"
    if isinstance(error, library.exceptions.DatasetNotFoundError):
        return f"is not on the hub, or requires a login ({message.removesuffix('.')})"
    if "scripts are no longer supported" in message:
        return "is a script, which Tritter never runs; name its data files"
    listed = re.search(r"(?:BuilderConfig|[cC]onfig).*\[('[^\]]*')\]", message)
    if configs := re.findall(r"'([^']+)'", listed[1]) if listed else []:
        is_unnamed = source.config is None
        problem = "has several configs" if is_unnamed else f"has no config {source.config}"
        near = nearest(source.config or "", configs)
        advice = f". Did you mean {near}?" if near else ""
        return f"{problem}; available: {_join_names(configs)}{advice}"
    return f"can't be read ({type(error).__name__}: {message})"


def _load_arguments(source: DatasetName) -> dict[str, Any]:
    revision = {} if source.revision is None else {"revision": source.revision}
    # A bare id would match a folder of that name in the working directory
    path = source.name if source.is_on_disk else f"hf://datasets/{source.name}"
    return {"path": path, "name": source.config, **revision}


def _builder(source: DatasetName) -> tuple[Any, dict[str, str]]:
    """Return the builder of a data set and the extra arguments that select it."""
    load = _library().load_dataset_builder
    try:
        return load(**_load_arguments(source)), {}
    except ValueError:
        # The cache key of a text data set includes `sample_by`
        with suppress(ValueError, TypeError):
            return load(**_load_arguments(source), **_WHOLE_TEXTS), _WHOLE_TEXTS
        raise


def _open(source: DatasetName, *, is_streamed: bool) -> Mapping[str | None, Any]:
    """Return split → rows; None → rows if the data set was saved without splits."""
    library = _library()
    location, is_saved = Path(source.name), source.is_on_disk and source.is_saved
    found: Mapping[str, Any] = {}
    if is_file := source.is_on_disk and location.is_file():
        found = {_DEFAULT_SPLIT: [location]}
    if source.is_on_disk and location.is_dir():
        try:
            _check_folder(location)
        except TritterError as error:
            raise _Unreadable(f"is refused: {error}") from error
        found = {} if is_saved else _builder(source)[0].config.data_files or {}
    files = {split: [Path(str(file)) for file in of_split] for split, of_split in found.items()}
    for file in chain.from_iterable(
        files.values()
    ):  # unsupported, outside the folder, or decompressing to far too much
        if not _file_ending(file):
            reason = f"{file} is not supported; allowed are {', '.join(_BUILDERS)}"
            raise _Unreadable(f"is refused: {reason}")
        try:
            check_inside(location, str(file))
            status = file.stat()
            _check_sizes(file, status.st_size, status.st_mtime_ns)
        except WrongRecordError as error:
            raise _Unreadable(f"is refused: {file} {error}") from error
        except TritterError as error:
            raise _Unreadable(f"is refused: {error}") from error
    if is_saved:
        saved = library.load_from_disk(source.name)
        return saved if isinstance(saved, Mapping) else {None: saved}
    if is_file:
        path, own = _BUILDERS[_file_ending(location)]
        arguments = {"path": path, "data_files": source.name, **own}
        is_plain_text = path == "text"
    else:
        builder, own = _builder(source)
        is_plain_text = builder.name == "text"
        arguments = _load_arguments(source) | ({} if is_plain_text else own)
    if is_plain_text and files:  # the library would convert line ends
        return {str(split): _whole_texts(of_split) for split, of_split in files.items()}
    if is_plain_text:  # one row per file
        arguments |= _WHOLE_TEXTS
    return library.load_dataset(**arguments, streaming=is_streamed)


def _whole_texts(files: list[Path]) -> Any:
    """Return rows with the text of each file."""
    library = _library()
    features = library.Features({DEFAULT_FIELD: library.Value("string")})
    options = {"features": features, "gen_kwargs": {"files": files}}
    return library.IterableDataset.from_generator(_rows_of_files, **options)


def _rows_of_files(files: list[Path]) -> Iterator[dict[str, str]]:
    for file in files:
        yield {DEFAULT_FIELD: Reading(key="").whole_text(file, max_bytes=sys.maxsize)}


@cache
def _check_sizes(file: Path, size: int, modified_ns: int) -> None:
    """Check a file once until it changes."""
    check_sizes(file)


def _split(source: DatasetName, opened: Mapping[str | None, Any]) -> str | None:
    names = [str(name) for name in opened if name is not None]
    if source.split is not None:
        if source.split in names:
            return source.split
        near = nearest(source.split, names)
        available = f"available: {_join_names(names)}" if names else "it was saved without splits"
        advice = f". Did you mean {near}?" if near else ""
        raise _Unreadable(f"has no split {shown(source.split)}; {available}{advice}")
    if _DEFAULT_SPLIT in names:
        return _DEFAULT_SPLIT
    if len(opened) > 1:
        raise _Unreadable(f"has several splits: {_join_names(names)}; append one, :{names[0]}")
    return next(iter(opened), None)


def _columns(source: DatasetName, rows: Any) -> tuple[str, ...]:
    """Return the columns of texts: one and those that exclude rows, or those of a conversation."""
    kinds: dict[str, str] = {}  # column → type, declared by the data set or inferred from rows
    if rows.features is not None:
        dtypes = {name: str(getattr(f, "dtype", "lists")) for name, f in rows.features.items()}
        is_text = ("string", "large_string", "string_view")
        kinds = {n: "text" if dtype in is_text else dtype for n, dtype in dtypes.items()}
        # Values of several types: rows without a text are skipped
        mixed = {n for n, f in rows.features.items() if type(f).__name__ == "Json"} - {*TURNS}
        kinds |= dict.fromkeys(mixed & {DEFAULT_FIELD, source.column}, "text")
    else:
        found: dict[str, set[str]] = {}
        for row in islice(rows, _PROBED_ROWS):
            for name, value in row.items():
                of_column = found.setdefault(name, set())
                if value is not None:
                    of_column.add("text" if isinstance(value, str) else type(value).__name__)
        kinds = {name: " and ".join(sorted(types)) or "null" for name, types in found.items()}
    if not kinds:
        raise _Unreadable("has no rows")
    if len(kinds) == 1 and (problem := separator_problem([*kinds])):
        raise _Unreadable(problem)
    texts = [name for name, kind in kinds.items() if kind == "text"]
    excluding = tuple(name for name in OF_RECORDS if name in kinds)
    if (column := source.column) is not None:
        if column in TURNS and column in kinds:
            return conversation_fields([column, *(name for name in kinds if name not in TURNS)])
        if column in texts:
            return (column, *(name for name in excluding if name != column))
        if column in kinds:
            raise _Unreadable(f"has {kinds[column]} in column {shown(column)}, not text")
        near = nearest(column, kinds)
        advice = f". Did you mean {near}?" if near else ""
        raise _Unreadable(f"has no column {shown(column)}; available: {_join_names(kinds)}{advice}")
    if DEFAULT_FIELD in texts:
        return (DEFAULT_FIELD, *excluding)
    if form := conversation_fields(list(kinds)):
        return form
    if len(texts) == 1:
        return (texts[0], *(name for name in excluding if name != texts[0]))
    number = f"{len(texts)} text columns" if texts else "no text column"
    raise _Unreadable(
        f"has no column named text, and {number}; available: {_join_names(kinds)}. Select a column "
        "with #COLUMN or data.text_column=COLUMN"
    )


def _join_names(names: Any) -> str:
    short = [shown(name) for name in names]
    return ", ".join(short[:_MAX_NAMES] + (["..."] if len(short) > _MAX_NAMES else []))
