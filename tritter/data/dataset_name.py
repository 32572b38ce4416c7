"""How a data set is called: one of the hub, or one that lies on disk; found before it is opened."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from tritter.errors import Problem, RequestError, TritterError, did_you_mean
from tritter.storage.links import check_inside, check_tree
from tritter.storage.reading import read_object, read_text, require_file

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
    if is_on_disk and _is_there(body):
        return DatasetName(name=_absolute(key, body))
    match = (_ON_DISK if is_on_disk else _OF_HUB).fullmatch(body)
    if match is None:
        reason = f"allowed is {PLACE_FORM if is_on_disk else FORM}, FROM and TO counted in rows"
        raise RequestError(Problem(key, word, reason=reason))
    found = match.groupdict()
    start, stop = int(found["start"] or 0), int(found["stop"]) if found["stop"] else None
    if stop is not None and stop <= start:
        reason = f"there is no row from {start} up to, but not including, {stop}"
        raise RequestError(Problem(key, word, reason=reason))
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
    raise RequestError(Problem(key, word, reason=reason))


def check_folder(folder: Path) -> None:
    """Refuse a dataset folder that reads something outside itself: by a link, or by a name in it.

    Raises:
        TritterError: names the file, and the entry in it.
    """
    check_tree(folder)
    for path, entry in _entries(folder):
        if _ELSEWHERE.match(entry) or "\0" in entry:
            raise TritterError(
                f"{path} names {entry[:200]!r}, which is not in the folder; nothing there is read. "
                "Put the data into the folder and name it by its path there."
            )
        check_inside(path.parent, entry)


def _entries(folder: Path) -> Iterator[tuple[Path, str]]:
    """Yield file and entry of the names of data in the files that `datasets` reads for them."""
    for path in (folder / _CARD, folder / _CARD_ALONE):
        if path.is_file():
            require_file(path)
            try:  # as `datasets` does, so that nothing is read differently
                if path.name == _CARD:
                    card = import_module("huggingface_hub").DatasetCard.load(path).data.to_dict()
                else:
                    card = import_module("yaml").safe_load(read_text(path))
            except Exception as error:  # of several libraries
                raise TritterError(f"{path} cannot be read ({type(error).__name__}).") from error
            configs = card.get("configs") if isinstance(card, dict) else None
            for config in configs if isinstance(configs, list) else ():
                if isinstance(config, dict):
                    yield from ((path, each) for each in _patterns(config.get("data_files")))
                    yield from ((path, each) for each in _patterns(config.get("data_dir")))
    for path in folder.glob("dataset_dict.json"):
        yield from ((path, each) for each in _patterns(read_object(path).get("splits")))
    for path in folder.rglob("state.json"):
        files = read_object(path).get("_data_files")
        for each in files if isinstance(files, list) else ():
            if isinstance(each, dict):
                yield from ((path, name) for name in _patterns(each.get("filename")))


def _patterns(value: object) -> Iterator[str]:
    """Yield the patterns of a `data_files`: one, several, or those of splits."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for each in value:
            if isinstance(each, dict):
                paths = each.get("path")
                yield from (str(path) for path in (paths if isinstance(paths, list) else [paths]))
            else:
                yield str(each)
    elif isinstance(value, dict):
        for each in value.values():
            yield from (str(path) for path in (each if isinstance(each, list) else [each]))


def _is_there(path: str) -> bool:
    try:
        return Path(path).expanduser().exists()
    except (OSError, ValueError, RuntimeError):
        return False


def _absolute(key: str, path: str) -> str:
    try:
        return str(Path(path).expanduser().resolve())
    except (OSError, ValueError, RuntimeError) as error:
        raise RequestError(Problem(key, path, reason=f"that is no path ({error})")) from error
