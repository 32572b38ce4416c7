"""Where option files are: ours, those of installed packages, and those of the command line.

All are treated alike, and by one scan: composition, help, nearest matches, spelling and completion
see the same. Nothing is imported for it: the folder of a package is found by its metadata (entry
points of the group `tritter.config`, as `mine = "minepkg:conf"`). On the command line
`hydra.searchpath=[DIR]`, Hydra's own spelling, means the same as `--config-dir DIR`.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tritter.conf_folder import config_folder, installed_folders, package_folder
from tritter.errors import Problem, RequestError, nearest, raise_problems

SEARCHPATH = "hydra.searchpath"
CONFIG_NAME = "config"
LADDERS, FAMILIES = "ladder", "family"
# Folders of option files that are no groups of Hydra's → the key that chooses one
CHOSEN_BY = {
    LADDERS: "gate.ladder",
    "trigger": "growth.trigger",
    "initialiser": "growth.initialiser",
    FAMILIES: "the model_type of a config.json",
}

Options = Mapping[str, Mapping[str, Path]]  # group → option → its file


@dataclass(frozen=True, slots=True)
class SearchPath:
    """What a command adds to the options that are installed.

    Args:
        folders: of `--config-dir` and `hydra.searchpath`, absolute.
        config_name: the file at the root that composition begins with.
    """

    folders: tuple[Path, ...] = ()
    config_name: str = CONFIG_NAME

    @property
    def flags(self) -> list[str]:
        """The flags of a command line that finds the same options."""
        named = [] if self.config_name == CONFIG_NAME else [f"--config-name={self.config_name}"]
        return [*(f"--config-dir={folder}" for folder in self.folders), *named]


_SEARCH_PATH: ContextVar[SearchPath | None] = ContextVar("front", default=None)


@contextmanager
def composing_from(search_path: SearchPath) -> Iterator[None]:
    """Let everything here speak of this front, for one command."""
    token = _SEARCH_PATH.set(search_path)
    try:
        yield
    finally:
        _SEARCH_PATH.reset(token)


def search_path() -> SearchPath:
    return _SEARCH_PATH.get() or SearchPath()


def search_path_of(
    folders: Sequence[str], config_name: str | None, *, searchpath: Sequence[str] = ()
) -> SearchPath:
    """Return what `--config-dir`, `--config-name` and `hydra.searchpath` mean.

    Raises:
        RequestError: a folder is none, or none holds the file.
    """
    asked = [("--config-dir", Path(folder)) for folder in folders]
    asked += [(SEARCHPATH, _searched_folder(entry)) for entry in searchpath]
    found = [(key, place.expanduser().absolute()) for key, place in asked]
    problems = [
        Problem(
            key,
            place,
            reason="it is no folder" if place.exists() else "there is no such folder",
        )
        for key, place in found
        if not place.is_dir()
    ]
    raise_problems(problems)
    places = tuple(place for _, place in found)
    meant = SearchPath(places, (config_name or CONFIG_NAME).removesuffix(".yaml"))
    with composing_from(meant):
        roots = option_folders().values()
        names = sorted({path.stem for folder in roots for path in folder.glob("*.yaml")})
        if config_name is not None and meant.config_name not in names:
            reason = f"no folder of options holds {meant.config_name}.yaml; there are "
            near = nearest(meant.config_name, names)
            raise RequestError(
                Problem("--config-name", config_name, reason + ", ".join(names), nearest=near)
            )
    return meant


def option_folders() -> dict[str, Path]:
    """Return provider → folder, ours first.

    Raises:
        RequestError: an installed package names a folder that is not there.
    """
    folders = {"tritter": config_folder(), **installed_folders()}
    for folder in search_path().folders:
        folders[f"--config-dir {folder}"] = folder
    by_place = {folder.resolve(): provider for provider, folder in reversed(folders.items())}
    return {p: folder for p, folder in folders.items() if by_place[folder.resolve()] == p}


def option_files() -> Options:
    """Return all options, sorted.

    Raises:
        RequestError: two folders have the same option; names both.
    """
    folders = tuple(option_folders().values())
    return shipped_options() if folders == (config_folder(),) else _options_in(folders)


def shipped_options() -> Options:
    """Return the options that are part of Tritter, sorted."""
    return _shipped_options(config_folder())


@cache
def _shipped_options(folder: Path) -> Options:
    return _options_in([folder])


def _options_in(folders: Iterable[Path]) -> Options:
    found: dict[str, dict[str, Path]] = {}
    problems = []
    for folder in folders:
        for path in sorted(folder.rglob("*.yaml")):
            group, name = path.parent.relative_to(folder).as_posix(), path.stem
            if group == "." or group.startswith("hydra"):
                continue
            other = found.setdefault(group, {}).setdefault(name, path)
            if other != path:
                reason = f"{other} has this option already; give one of them another name"
                problems.append(Problem(f"{group}={name}", path, reason=reason))
    raise_problems(problems)
    return {group: dict(sorted(found[group].items())) for group in sorted(found)}


def body_of(path: Path) -> Mapping[str, object]:
    """Return what an option file holds, read once.

    Raises:
        RequestError: it is no YAML, or no mapping.
    """
    return _body(path, path.stat().st_mtime_ns)


@cache
def _body(path: Path, _version: int) -> Mapping[str, object]:
    import yaml

    try:
        body = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.CSafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        told = " ".join(str(error).split())
        raise RequestError(f"{path} is no YAML: {told}") from error
    if not isinstance(body, Mapping):
        raise RequestError(f"{path} holds no keys.")
    return body


def _searched_folder(entry: str) -> Path:
    """Return the folder that an entry of Hydra's search path names.

    Raises:
        RequestError: no installed package holds it.
    """
    if not entry.startswith("pkg://"):
        return Path(entry.removeprefix("file://"))
    folder = package_folder(entry.removeprefix("pkg://").replace("/", "."))
    if folder is None:
        reason = "no installed package has this folder; install the package, or name a path"
        raise RequestError(Problem(SEARCHPATH, entry, reason=reason))
    return folder
