"""Which files the words of `data.old` and `data.new` mean; found before anything is written."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from tritter.config.problems import describe
from tritter.config.schema import TextSources
from tritter.errors import RequestError, did_you_mean, nearest

TEXT_SUFFIXES = (".txt", ".jsonl", ".parquet", ".txt.gz", ".jsonl.gz")
BUILT_IN_TEXTS = ("stdlib:prose", "stdlib:code")  # the Python installation's own
_GLOB_SIGNS = set("*?[")
_MAX_SHOWN = 5


def text_sources(key: str, value: object, *, default_name: str) -> TextSources:
    """Return domain → absolute paths of a value as it stands in a config.

    Args:
        key: what the value is called in messages.
        value: a path, a list of paths, or a mapping of domain names to either; null means none.
        default_name: of the domain when none is named.

    Raises:
        RequestError: the value has another form, a name can't be one, or a path means no text.
    """
    if value is None:
        return {}
    named = value if isinstance(value, Mapping) else {default_name: value}
    sources: TextSources = {}
    for name, paths in named.items():
        if not isinstance(name, str) or not name.replace("-", "_").isidentifier():
            reason = "a domain is named with letters, digits, - and _"
            raise RequestError(describe(key, name, reason=reason))
        place = f"{key}.{name}" if isinstance(value, Mapping) else key
        sources[name] = _paths(place, paths)
        find_text_files(place, sources[name])
    return sources


def find_text_files(key: str, paths: Iterable[str]) -> tuple[Path, ...]:
    """Return the text files that paths mean, each once, in the order of the paths, then sorted.

    A folder means all files of known kinds below it, but hidden ones. Built-in texts are no files
    and are passed over.

    Raises:
        RequestError: a path means no text file; says what was found instead.
    """
    found: dict[Path, None] = {}
    for path in paths:
        if path not in BUILT_IN_TEXTS:
            found.update(dict.fromkeys(_files(key, path)))
    return tuple(found)


def is_text_file(path: Path) -> bool:
    return path.name.lower().endswith(TEXT_SUFFIXES)


def _paths(key: str, value: object) -> list[str]:
    paths = [value] if isinstance(value, str) else value
    if not isinstance(paths, Sequence) or not all(isinstance(p, str) and p for p in paths):
        reason = "allowed is a path, a list of paths, or a mapping of domain names to paths"
        raise RequestError(describe(key, value, reason=reason))
    if not paths:
        raise RequestError(describe(key, value, reason="the list is empty; name a path"))
    return [_absolute(key, path) for path in paths]


def _absolute(key: str, path: str) -> str:
    if path.startswith("stdlib:"):
        if path not in BUILT_IN_TEXTS:
            reason = f"the built-in texts are {', '.join(BUILT_IN_TEXTS)}"
            near = nearest(path, BUILT_IN_TEXTS)
            raise RequestError(describe(key, path, reason=reason, nearest=near))
        return path
    return str(Path(path).expanduser().resolve())


def _files(key: str, path: str) -> list[Path]:
    place = Path(path)
    if place.is_file():
        if is_text_file(place):
            return [place]
        raise RequestError(describe(key, path, reason=_not_read([place])))
    if place.is_dir():
        inside = sorted(p for p in place.rglob("*") if p.is_file() and not _is_hidden(p, place))
        return _known(key, path, inside, where="the folder")
    if _GLOB_SIGNS & set(path):
        matches = Path(place.anchor).glob(str(place.relative_to(place.anchor)))
        inside = sorted(match for match in matches if match.is_file())
        return _known(key, path, inside, where="the glob")
    beside = [entry.name for entry in place.parent.iterdir()] if place.parent.is_dir() else []
    where = "" if place.parent.is_dir() else f"; {place.parent} is no folder either"
    reason = f"there is no such file or folder{where}.{did_you_mean(place.name, beside)}"
    raise RequestError(describe(key, path, reason=reason.removesuffix(".")))


def _known(key: str, path: str, files: Sequence[Path], *, where: str) -> list[Path]:
    known = [file for file in files if is_text_file(file)]
    if known:
        return known
    found = f"{where} holds no file" if where == "the folder" else f"{where} matches no file"
    raise RequestError(describe(key, path, reason=_not_read(files) if files else found))


def _not_read(files: Sequence[Path]) -> str:
    kinds = Counter(file.suffix or "no ending" for file in files).most_common(_MAX_SHOWN)
    found = ", ".join(f"{kind} ({count})" for kind, count in kinds)
    return f"texts are read from {', '.join(TEXT_SUFFIXES)}; found {found}"


def _is_hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)
