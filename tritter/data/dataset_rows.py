"""The texts of data sets, read row by row through the `datasets` library; no script is ever run."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cache
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

from tritter.data.dataset_name import BUILDERS, DatasetName, check_folder, file_ending
from tritter.data.readers import MAX_PROBLEMS_OF_FILE, TextFileError, check_expansion
from tritter.data.records import DEFAULT_FIELD, WrongRecordError, form_fields, shown, text_of
from tritter.errors import TritterError, nearest
from tritter.storage.hub import quiet_hub
from tritter.storage.links import check_inside

_BATCH_ROWS = 256
_LOOKED_AT_ROWS = 100  # for what columns hold, where the data set doesn't say
_MAX_NAMES, _MAX_MESSAGE = 20, 300
_DEFAULT_SPLIT = "train"
_WHOLE_TEXTS = {"sample_by": "document"}  # not its lines
_COMMIT = re.compile(r"[0-9a-f]{40}")


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


def dataset_texts(source: DatasetName, *, key: str, is_streamed: bool) -> Iterator[str]:
    """Yield the texts of a data set, one row after another; a row without a text is passed over.

    Args:
        key: of the configuration, for messages.
        is_streamed: read from the hub as it comes; else it is fetched into the hub's cache first.
            What lies on disk is read from where it lies.

    Raises:
        TextFileError: as `resolve_dataset`, or rows hold something else; lists the first of them.
    """
    stated = resolve_dataset(source, key=key)
    problems: list[str] = []
    with _told(source, key):
        opened = _open(stated, is_streamed=is_streamed or stated.is_on_disk)
        rows = opened[_split(stated, opened)]
        columns = _columns(stated, rows)
        field = DEFAULT_FIELD if form_fields(columns) == columns else columns[0]
        for number, record in _records(rows, columns, stated.rows):
            if len(columns) == 1 and record[columns[0]] is None:
                continue
            try:
                yield text_of(record, field=field)
            except WrongRecordError as error:
                problems.append(f"{key}: {source}, row {number} {error}.")
                if len(problems) == MAX_PROBLEMS_OF_FILE:
                    break
    if problems:
        raise TextFileError(problems)


@cache
def _of_hub(source: DatasetName) -> DatasetName:
    """Return what a hub's name means; the same all through a process, whatever the hub does."""
    return _resolved(source)


def _resolved(source: DatasetName) -> DatasetName:
    if not source.is_on_disk:
        source = _at_hand(source)
    opened = _open(source, is_streamed=True)
    split = _split(source, opened)
    columns = _columns(source, opened[split])
    return replace(source, split=split, column=columns[0] if len(columns) == 1 else None)


def _library() -> Any:
    try:
        return import_module("datasets")
    except ImportError as error:
        raise _Unreadable("needs datasets to be read: pip install 'tritter[data]'") from error


@contextmanager
def _told(source: DatasetName, key: str) -> Iterator[None]:
    """Say of whatever goes wrong with a data set which one it is."""
    try:
        with _quiet(), quiet_hub():
            yield
    except (TritterError, GeneratorExit):
        raise
    except _Unreadable as error:
        raise TextFileError([f"{key}: {source} {_ended(str(error))}"]) from error
    # Libraries of many formats and of the hub stand behind it, and each raises its own.
    except Exception as error:
        raise TextFileError([f"{key}: {source} {_ended(_reason(source, error))}"]) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the library's bars and remarks from the terminal, which belongs to the run's own."""
    library = _library()
    log, was_shown = library.utils.logging, library.is_progress_bar_enabled()
    verbosity = log.get_verbosity()
    library.disable_progress_bars()
    log.set_verbosity(log.CRITICAL)
    try:
        yield
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
    if configs := _configs(told):
        asked = "has several configs" if source.config is None else f"has no config {source.config}"
        near = nearest(source.config or "", configs)
        advice = f". Did you mean {near}?" if near else ""
        return f"{asked}; there are {_listed(configs)}{advice}"
    return f"can't be read ({type(error).__name__}: {told})"


def _configs(told: str) -> list[str]:
    """Return the configs that an error of the library lists."""
    found = re.search(r"(?:BuilderConfig|[cC]onfig).*\[('[^\]]*')\]", told)
    return re.findall(r"'([^']+)'", found[1]) if found else []


def _arguments(source: DatasetName) -> dict[str, Any]:
    """Return what `load_dataset` takes for a data set; a file of plain text is one row."""
    if source.builder is not None:
        path, own = source.builder
        by = _WHOLE_TEXTS if path == "text" else {}
        return {"path": path, "data_files": source.name, **own, **by}
    builder, by = _builder(source)
    return _named(source) | (_WHOLE_TEXTS if builder.name == "text" else by)


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


def _at_hand(source: DatasetName) -> DatasetName:
    """Return a data set of the hub with the config and the commit that are at hand.

    Raises:
        _Unreadable: another commit is asked for than the one that is cached.
    """
    builder, _ = _builder(source)
    config = builder.config.name.partition("-sample_by=")[0]
    held, asked = str(builder.hash or ""), source.revision or ""
    if not _COMMIT.fullmatch(held):
        return source
    if _COMMIT.fullmatch(asked) and held != asked:
        raise _Unreadable(f"is not at hand; of {source.name} the revision {held} is cached")
    return replace(source, revision=held, config=config)


def _open(source: DatasetName, *, is_streamed: bool) -> Mapping[str | None, Any]:
    """Return split → rows; of a data set that was saved without splits, None → rows."""
    library = _library()
    if source.is_on_disk:
        _check_files(source)
    if source.is_on_disk and source.is_saved:
        saved = library.load_from_disk(source.name)
        return saved if isinstance(saved, Mapping) else {None: saved}
    return library.load_dataset(**_arguments(source), streaming=is_streamed)


def _check_files(source: DatasetName) -> None:
    """Refuse files that are outside a dataset folder, of other kinds, or decode to far too much.

    Raises:
        _Unreadable: names the first of them.
    """
    place = Path(source.name)
    files = [place] if place.is_file() else []
    if place.is_dir():
        try:
            check_folder(place)
        except TritterError as error:
            raise _Unreadable(f"is refused: {error}") from error
        if source.is_saved:
            return
        found = _builder(source)[0].config.data_files or {}
        files = [Path(str(file)) for of_split in found.values() for file in of_split]
    for file in files:
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
    kinds = _kinds(rows)
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


def _kinds(rows: Any) -> dict[str, str]:
    """Return column → kind of what it holds: as the data set says, else as its first rows show."""
    if rows.features is not None:
        dtypes = {name: str(getattr(f, "dtype", "lists")) for name, f in rows.features.items()}
        is_text = ("string", "large_string", "string_view")
        return {n: "text" if dtype in is_text else dtype for n, dtype in dtypes.items()}
    found: dict[str, set[str]] = {}
    for row in islice(rows, _LOOKED_AT_ROWS):
        for name, value in row.items():
            kinds = found.setdefault(name, set())
            if value is not None:
                kinds.add("text" if isinstance(value, str) else type(value).__name__)
    return {name: " and ".join(sorted(kinds)) or "null" for name, kinds in found.items()}


def _records(
    rows: Any, columns: Sequence[str], part: tuple[int, int | None]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield number and record of the rows that are meant, of which a batch is held at a time."""
    start, stop = part
    wanted = rows.select_columns(list(columns))
    if hasattr(wanted, "num_rows"):
        if start >= wanted.num_rows:
            return
        wanted = wanted.select(range(start, min(stop or wanted.num_rows, wanted.num_rows)))
    else:
        wanted = wanted.skip(start) if start else wanted
        wanted = wanted if stop is None else wanted.take(stop - start)
    number = start
    for batch in wanted.iter(batch_size=_BATCH_ROWS):
        for values in zip(*(batch[name] for name in columns), strict=True):
            yield number, dict(zip(columns, values, strict=True))
            number += 1


def _listed(names: Any) -> str:
    told = [shown(name) for name in names]
    return ", ".join(told[:_MAX_NAMES] + (["..."] if len(told) > _MAX_NAMES else []))
