"""Data sets of the hub and on disk: how they are named, and their texts, row by row.

The `datasets` library reads them. No script of a data set is ever run.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from itertools import chain, islice
from pathlib import Path
from typing import Any

from tritter.data.local_files import Reading, TextFileError, check_expansion
from tritter.data.records import DEFAULT_FIELD, WrongRecordError, form_fields, shown, text_of
from tritter.errors import RequestError, TritterError, did_you_mean, nearest, refused
from tritter.storage.hub import quiet_hub
from tritter.storage.reading import check_inside, check_tree, read_object, read_text, require_file

PREFIX = "hf:"
FORM = "hf:OWNER/NAME[@REVISION][/CONFIG][:SPLIT][[FROM:TO]][#COLUMN]"
PLACE_FORM = "PATH[:SPLIT][[FROM:TO]][#COLUMN]"
# Ending of a file → what `datasets` calls the builder that reads it, and its arguments
_PLAIN: dict[str, tuple[str, dict[str, str]]] = {
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t"}),
    ".txt": ("text", {}),
}
BUILDERS = {
    **_PLAIN,
    ".parquet": ("parquet", {}),
    ".arrow": ("arrow", {}),
    **{f"{ending}.gz": builder for ending, builder in _PLAIN.items()},
}
_SAVED = (("dataset_dict.json",), ("dataset_info.json", "state.json"))  # by `save_to_disk`
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
_LOOKED_AT_ROWS = 100  # for what columns hold, where the data set doesn't say
_MAX_NAMES, _MAX_MESSAGE = 20, 300
_DEFAULT_SPLIT = "train"
_WHOLE_TEXTS = {"sample_by": "document"}  # not its lines
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetName:
    """A data set and the part of it that is meant; as text, what finds it again.

    Args:
        name: a hub id, or an absolute path.
        revision: of the hub's repository; None: the newest.
        config: None: the only one, or the default.
        split: None: `train`, or the only one.
        rows: from, and up to but without; None: to the end.
        column: that holds the texts; None: `text`, an instruction, or the only one of texts.
    """

    name: str
    revision: str | None = None
    config: str | None = None
    split: str | None = None
    rows: tuple[int, int | None] = (0, None)
    column: str | None = None

    def __str__(self) -> str:
        parts = (("@", self.revision), ("/", self.config), (":", self.split))
        place = "".join(f"{sign}{word}" for sign, word in parts if word is not None)
        start, stop = self.rows
        if (start, stop) != (0, None):
            place += f"[{start or ''}:{'' if stop is None else stop}]"
        return f"{PREFIX}{self.name}{place}" + ("" if self.column is None else f"#{self.column}")

    @property
    def is_on_disk(self) -> bool:
        return Path(self.name).is_absolute()

    @property
    def is_saved(self) -> bool:
        """Whether it is a folder that `save_to_disk` left."""
        place = Path(self.name)
        return any(all((place / name).is_file() for name in names) for names in _SAVED)

    @property
    def builder(self) -> tuple[str, dict[str, str]] | None:
        """What reads a single file, with its arguments; None of what is no such file."""
        place = Path(self.name)
        ending = file_ending(place) if self.is_on_disk and place.is_file() else ""
        return BUILDERS[ending] if ending else None


def dataset_names(paths: Iterable[str]) -> tuple[str, ...]:
    """Return those of some paths that name data sets."""
    return tuple(path for path in paths if path.startswith(PREFIX))


def file_ending(place: Path) -> str:
    """Return the ending by which `datasets` reads a file; nothing of one that it doesn't."""
    name = place.name.lower()
    return max((end for end in BUILDERS if name.endswith(end)), key=len, default="")


def parse_name(key: str, word: str) -> DatasetName:
    """Return the data set that a word names; a path means one on disk, with `hf:` or without.

    Args:
        key: of the configuration, for messages.

    Raises:
        RequestError: it names none.
    """
    body = word.removeprefix(PREFIX)
    is_on_disk = not word.startswith(PREFIX) or body.startswith(("/", "./", "../", "~"))
    if is_on_disk:
        with suppress(OSError, ValueError, RuntimeError):  # it is no path
            if Path(body).expanduser().exists():
                return DatasetName(name=_absolute(key, body))
    match = (_ON_DISK if is_on_disk else _OF_HUB).fullmatch(body)
    if match is None:
        reason = f"allowed is {PLACE_FORM if is_on_disk else FORM}, FROM and TO counted in rows"
        raise refused(key, word, reason)
    found = match.groupdict()
    start, stop = int(found["start"] or 0), int(found["stop"]) if found["stop"] else None
    if stop is not None and stop <= start:
        raise refused(key, word, f"there is no row from {start} up to, but not including, {stop}")
    return DatasetName(
        name=_absolute(key, found["name"]) if is_on_disk else found["name"],
        revision=found.get("revision"),
        config=found.get("config"),
        split=found["split"],
        rows=(start, stop),
        column=found["column"],
    )


def check_place(key: str, word: str, source: DatasetName) -> None:
    """Find out whether a data set that is on disk lies there; one of the hub is not looked for.

    Raises:
        RequestError: there is none that could be read.
    """
    place = Path(source.name)
    if not source.is_on_disk:
        return
    if place.suffix == ".py" or (place / f"{place.name}.py").is_file():
        reason = "it is a script, and a data set's script is never run; name its data"
    elif place.is_dir():
        try:
            check_folder(place)
        except TritterError as error:
            raise RequestError(f"{key}: {error}") from error
        return
    elif place.is_file():
        if file_ending(place):
            return
        reason = f"of files {', '.join(BUILDERS)} are read; data=text reads others"
    else:
        beside = [each.name for each in place.parent.iterdir()] if place.parent.is_dir() else []
        where = "" if beside else f"; {place.parent} is no folder either"
        near = did_you_mean(place.name, beside)
        is_like_hub = not near and _OF_HUB.fullmatch(word)
        hub = f"; of the hub it would be {PREFIX}{word}" if is_like_hub else ""
        reason = f"there is no such file or folder{where}{hub}.{near}".removesuffix(".")
    raise refused(key, word, reason)


def check_folder(folder: Path) -> None:
    """Refuse a dataset folder that reads something outside itself: by a link, or by a name in it.

    Raises:
        TritterError: names the file, and the entry in it.
    """
    check_tree(folder)
    named: list[tuple[Path, object]] = []  # file and what it says of data, as `datasets` reads it
    for path in filter(Path.is_file, (folder / _CARD, folder / _CARD_ALONE)):
        require_file(path)
        try:
            if path.name == _CARD:
                card = import_module("huggingface_hub").DatasetCard.load(path).data.to_dict()
            else:
                card = import_module("yaml").safe_load(read_text(path))
        except Exception as error:  # of several libraries
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
                f"{path} names {entry[:200]!r}, which is not in the folder; nothing there is read. "
                "Put the data into the folder and name it by its path there."
            )
        check_inside(path.parent, entry)


def _patterns(value: object) -> Iterator[str]:
    """Yield the patterns of a `data_files`: one, several, or those of splits."""
    named = list(value.values()) if isinstance(value, dict) else value
    for each in named if isinstance(named, list) else [] if named is None else [named]:
        paths = each.get("path") if isinstance(each, dict) else each
        yield from (str(path) for path in (paths if isinstance(paths, list) else [paths]))


def _absolute(key: str, path: str) -> str:
    try:
        return str(Path(path).expanduser().resolve())
    except (OSError, ValueError, RuntimeError) as error:
        raise refused(key, path, f"that is no path ({error})") from error


class _Unreadable(Exception):
    """What is wrong with a data set, in words that follow its name."""


def resolve_dataset(source: DatasetName, *, key: str) -> DatasetName:
    """Return a data set with revision, split and column stated, as it is at hand now.

    Metadata are read, and at most some rows.

    Args:
        key: of the configuration, for messages.

    Raises:
        TextFileError: there is no such data set, config, split or column, or it is not at hand.
    """
    with _told(source, key):
        return _of_hub(source) if not source.is_on_disk else _resolved(source)


def dataset_texts(source: DatasetName, reading: Reading, *, is_streamed: bool) -> Iterator[str]:
    """Yield the texts of a data set, one row after another; a row without a text is passed over.

    Args:
        reading: counts the rows that hold something else.
        is_streamed: read from the hub as it comes; else it is fetched into the hub's cache first.
            What lies on disk is read from where it lies.

    Raises:
        TextFileError: as `resolve_dataset`.
    """
    yield from reading.counted(str(source), _texts(source, reading, is_streamed=is_streamed))


def _texts(source: DatasetName, reading: Reading, *, is_streamed: bool) -> Iterator[str]:
    stated = resolve_dataset(source, key=reading.key)
    with _told(source, reading.key):
        opened = _open(stated, is_streamed=is_streamed or stated.is_on_disk)
        rows = opened[_split(stated, opened)]
        columns = _columns(stated, rows)
        field = DEFAULT_FIELD if form_fields(columns) == columns else columns[0]
        (start, stop), wanted = stated.rows, rows.select_columns(list(columns))
        if hasattr(wanted, "num_rows"):
            if start >= wanted.num_rows:
                return
            wanted = wanted.select(range(start, min(stop or wanted.num_rows, wanted.num_rows)))
        else:
            wanted = wanted.skip(start) if start else wanted
            wanted = wanted if stop is None else wanted.take(stop - start)
        batches = wanted.iter(batch_size=_BATCH_ROWS)  # of which one is held at a time
        held = (zip(*(batch[name] for name in columns), strict=True) for batch in batches)
        for number, values in enumerate(chain.from_iterable(held), start=start):
            if len(columns) == 1 and values[0] is None:
                continue
            try:
                yield text_of(dict(zip(columns, values, strict=True)), field=field)
            except WrongRecordError as error:
                reading.skip(f"{source}, row {number} {error}")


@cache
def _of_hub(source: DatasetName) -> DatasetName:
    """Return what a hub's name means; the same all through a process, whatever the hub does."""
    return _resolved(source)


def _resolved(source: DatasetName) -> DatasetName:
    if not source.is_on_disk:
        builder, _ = _builder(source)
        config = builder.config.name.partition("-sample_by=")[0]
        cached, asked = str(builder.hash or ""), source.revision or ""
        if _COMMIT.fullmatch(cached):
            if _COMMIT.fullmatch(asked) and cached != asked:
                reason = f"is not at hand; of {source.name} the revision {cached} is cached"
                raise _Unreadable(reason)
            source = replace(source, revision=cached, config=config)
    opened = _open(source, is_streamed=True)
    split = _split(source, opened)
    columns = _columns(source, opened[split])
    return replace(source, split=split, column=columns[0] if len(columns) == 1 else None)


def _library() -> Any:
    return import_module("datasets")  # which takes a second


@contextmanager
def _told(source: DatasetName, key: str) -> Iterator[None]:
    """Say of whatever goes wrong with a data set which one it is.

    The library's bars and remarks are kept from the terminal, which belongs to the run's own.
    """
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
    except _Unreadable as error:
        raise TextFileError([f"{key}: {source} {_ended(str(error))}"]) from error
    # Libraries of many formats and of the hub stand behind it, and each raises its own.
    except Exception as error:
        raise TextFileError([f"{key}: {source} {_ended(_reason(source, error))}"]) from error
    finally:
        log.set_verbosity(verbosity)
        if was_shown:
            library.enable_progress_bars()


def _ended(said: str) -> str:
    return said if said.endswith((".", "?")) else f"{said}."


def _reason(source: DatasetName, error: Exception) -> str:
    library = _library()
    told = " ".join(str(error).split())[:_MAX_MESSAGE]
    if isinstance(error, ConnectionError) and not source.is_on_disk:
        advice = "fetch it once where there is a network, or name a folder that datasets saved"
        if library.config.HF_HUB_OFFLINE:
            where = library.config.HF_DATASETS_CACHE
            return f"is not cached in {where}, and HF_HUB_OFFLINE keeps from the hub; {advice}"
        return f"is not cached, and the hub can't be reached ({told}); {advice}"
    if isinstance(error, library.exceptions.DatasetNotFoundError):
        return f"is not on the hub as OWNER/NAME, or needs a login there ({told.removesuffix('.')})"
    if "scripts are no longer supported" in told:
        return "is a script, and a data set's script is never run; name its data"
    listed = re.search(r"(?:BuilderConfig|[cC]onfig).*\[('[^\]]*')\]", told)
    if configs := re.findall(r"'([^']+)'", listed[1]) if listed else []:
        asked = "has several configs" if source.config is None else f"has no config {source.config}"
        near = nearest(source.config or "", configs)
        advice = f". Did you mean {near}?" if near else ""
        return f"{asked}; there are {_listed(configs)}{advice}"
    return f"can't be read ({type(error).__name__}: {told})"


def _named(source: DatasetName) -> dict[str, Any]:
    revision = {} if source.revision is None else {"revision": source.revision}
    # Without the address a folder of that name in the current one would be taken
    place = source.name if source.is_on_disk else f"hf://datasets/{source.name}"
    return {"path": place, "name": source.config, **revision}


def _builder(source: DatasetName) -> tuple[Any, dict[str, str]]:
    """Return what would read a data set, and by what it is found besides its name."""
    load = _library().load_dataset_builder
    try:
        return load(**_named(source)), {}
    except ValueError:
        # In the cache a text goes by how it was cut as well
        with suppress(ValueError, TypeError):
            return load(**_named(source), **_WHOLE_TEXTS), _WHOLE_TEXTS
        raise


def _open(source: DatasetName, *, is_streamed: bool) -> Mapping[str | None, Any]:
    """Return split → rows; of a data set that was saved without splits, None → rows."""
    library = _library()
    place, is_saved = Path(source.name), source.is_on_disk and source.is_saved
    files = [place] if source.is_on_disk and place.is_file() else []
    if source.is_on_disk and place.is_dir():
        try:
            check_folder(place)
        except TritterError as error:
            raise _Unreadable(f"is refused: {error}") from error
        found = {} if is_saved else _builder(source)[0].config.data_files or {}
        files = [Path(str(file)) for of_split in found.values() for file in of_split]
    for file in files:  # of other kinds, outside the folder, or decoding to far too much
        if not file_ending(file):
            raise _Unreadable(f"is refused: of files {', '.join(BUILDERS)} are read, not {file}")
        try:
            check_inside(place, str(file))
            status = file.stat()
            _check_expansion(file, status.st_size, status.st_mtime_ns)
        except WrongRecordError as error:
            raise _Unreadable(f"is refused: {file} {error}") from error
        except TritterError as error:
            raise _Unreadable(f"is refused: {error}") from error
    if is_saved:
        saved = library.load_from_disk(source.name)
        return saved if isinstance(saved, Mapping) else {None: saved}
    if source.builder is not None:
        path, own = source.builder
        arguments = {"path": path, "data_files": source.name, **own}
        is_plain_text = path == "text"
    else:
        builder, own = _builder(source)
        is_plain_text = builder.name == "text"
        arguments = _named(source) | ({} if is_plain_text else own)
    if is_plain_text:  # a file of it is one row
        arguments |= _WHOLE_TEXTS
    return library.load_dataset(**arguments, streaming=is_streamed)


@cache
def _check_expansion(file: Path, size: int, modified_ns: int) -> None:
    """Check a file once, as long as it does not change."""
    check_expansion(file)


def _split(source: DatasetName, opened: Mapping[str | None, Any]) -> str | None:
    names = [str(name) for name in opened if name is not None]
    if source.split is not None:
        if source.split in names:
            return source.split
        near = nearest(source.split, names)
        has = f"it has {_listed(names)}" if names else "it was saved without splits"
        advice = f". Did you mean {near}?" if near else ""
        raise _Unreadable(f"has no split {shown(source.split)}; {has}{advice}")
    if _DEFAULT_SPLIT in names:
        return _DEFAULT_SPLIT
    if len(opened) > 1:
        raise _Unreadable(f"has several splits: {_listed(names)}; name one, :{names[0]}")
    return next(iter(opened), None)


def _columns(source: DatasetName, rows: Any) -> tuple[str, ...]:
    """Return the columns that hold the texts: one, or those of an instruction."""
    kinds: dict[str, str] = {}  # column → what it holds, as the data set says, or its first rows
    if rows.features is not None:
        dtypes = {name: str(getattr(f, "dtype", "lists")) for name, f in rows.features.items()}
        is_text = ("string", "large_string", "string_view")
        kinds = {n: "text" if dtype in is_text else dtype for n, dtype in dtypes.items()}
    else:
        found: dict[str, set[str]] = {}
        for row in islice(rows, _LOOKED_AT_ROWS):
            for name, value in row.items():
                of_column = found.setdefault(name, set())
                if value is not None:
                    of_column.add("text" if isinstance(value, str) else type(value).__name__)
        kinds = {name: " and ".join(sorted(held)) or "null" for name, held in found.items()}
    if not kinds:
        raise _Unreadable("holds no rows")
    texts = [name for name, kind in kinds.items() if kind == "text"]
    if (column := source.column) is not None:
        if column in form_fields([column]) or column in texts:
            return (column,)
        if column in kinds:
            raise _Unreadable(f"holds {kinds[column]} in its column {shown(column)}, no text")
        near = nearest(column, kinds)
        advice = f". Did you mean {near}?" if near else ""
        raise _Unreadable(f"has no column {shown(column)}; it has {_listed(kinds)}{advice}")
    if DEFAULT_FIELD in texts:
        return (DEFAULT_FIELD,)
    if form := form_fields(list(kinds)):
        return form
    if len(texts) == 1:
        return (texts[0],)
    which = f"{len(texts)} columns of texts" if texts else "no column of texts"
    raise _Unreadable(
        f"has no column text, and {which}; it has {_listed(kinds)}. Name one, #COLUMN or "
        "data.text_column=COLUMN"
    )


def _listed(names: Any) -> str:
    told = [shown(name) for name in names]
    return ", ".join(told[:_MAX_NAMES] + (["..."] if len(told) > _MAX_NAMES else []))
