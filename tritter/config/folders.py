"""Folders of option files: Tritter's own, those of installed packages, and `--config-dir`.

A single scan serves composition, help, nearest matches, spelling and completion, so all of them
see the same options. No package is imported: its folder is located through its metadata (entry
points of the group `tritter.config`, for example `mine = "minepkg:conf"`). On the command line,
Hydra's `hydra.searchpath=[DIR]` is equivalent to `--config-dir DIR`.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Self

from tritter.conf_folder import config_folder, installed_folders, package_folder
from tritter.errors import Problem, RequestError, nearest, raise_problems

SEARCHPATH = "hydra.searchpath"
CONFIG_NAME = "config"
LADDERS = "ladder"
# Folder of option files that is not a config group → the key that selects one of its files
CHOSEN_BY = {
    LADDERS: "gate.ladder",
    "trigger": "growth.trigger",
    "initialiser": "growth.initialiser",
    "family": "the model_type of a config.json",
}

_Options = Mapping[str, Mapping[str, Path]]  # group → option → its file


@dataclass(frozen=True, slots=True)
class SearchPath:
    """Search path of a command, in addition to the installed options.

    Args:
        folders: absolute folders from `--config-dir` and `hydra.searchpath`.
        config_name: root file at which composition starts.
    """

    folders: tuple[Path, ...] = ()
    config_name: str = CONFIG_NAME

    @property
    def flags(self) -> list[str]:
        """The command-line flags that reproduce this search path."""
        named = [] if self.config_name == CONFIG_NAME else [f"--config-name={self.config_name}"]
        return [*(f"--config-dir={folder}" for folder in self.folders), *named]

    @classmethod
    def of(
        cls, folders: Sequence[str], config_name: str | None, *, searchpath: Sequence[str] = ()
    ) -> Self:
        """Return the search path of `--config-dir`, `--config-name` and `hydra.searchpath`."""
        requested = [("--config-dir", Path(folder)) for folder in folders]
        requested += [(SEARCHPATH, _search_path_folder(entry)) for entry in searchpath]
        found = [(key, folder.expanduser().absolute()) for key, folder in requested]
        problems = []
        for key, folder in found:
            if not folder.is_dir():
                reason = "it is not a folder" if folder.exists() else "there is no such folder"
                problems.append(Problem(key, folder, reason=reason))
        raise_problems(problems)
        paths = tuple(folder for _, folder in found)
        result = cls(paths, (config_name or CONFIG_NAME).removesuffix(".yaml"))
        if config_name is not None:
            roots = result.option_folders.values()
            names = sorted({path.stem for folder in roots for path in folder.glob("*.yaml")})
            if result.config_name not in names:
                reason = f"no config folder has {result.config_name}.yaml; available: "
                reason, near = reason + ", ".join(names), nearest(result.config_name, names)
                raise RequestError(Problem("--config-name", config_name, reason, nearest=near))
        return result

    @property
    def option_folders(self) -> dict[str, Path]:
        """Provider → folder of option files, Tritter's own first."""
        folders = {"tritter": config_folder(), **installed_folders()}
        for folder in self.folders:
            folders[f"--config-dir {folder}"] = folder
        by_folder = {folder.resolve(): provider for provider, folder in reversed(folders.items())}
        return {p: folder for p, folder in folders.items() if by_folder[folder.resolve()] == p}

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Use this search path in all functions of this module, for one command."""
        token = _SEARCH_PATH.set(self)
        try:
            yield
        finally:
            _SEARCH_PATH.reset(token)


_SEARCH_PATH: ContextVar[SearchPath | None] = ContextVar("search_path", default=None)


def search_path() -> SearchPath:
    """Return the search path of the current command."""
    return _SEARCH_PATH.get() or SearchPath()


def option_files() -> _Options:
    """Return the option files of all config folders, sorted."""
    folders = tuple(search_path().option_folders.values())
    return shipped_options() if folders == (config_folder(),) else _options_in(folders)


def shipped_options() -> _Options:
    """Return the options that are part of Tritter, sorted."""
    return _shipped_options(config_folder())


@cache
def _shipped_options(folder: Path) -> _Options:
    return _options_in([folder])


def _options_in(folders: Iterable[Path]) -> _Options:
    found: dict[str, dict[str, Path]] = {}
    problems = []
    for folder in folders:
        for path in sorted(folder.rglob("*.yaml")):
            group, name = path.parent.relative_to(folder).as_posix(), path.stem
            if group == "." or group.startswith("hydra"):
                continue
            other = found.setdefault(group, {}).setdefault(name, path)
            if other != path:
                reason = f"{other} already defines this option; rename one of them"
                problems.append(Problem(f"{group}={name}", path, reason=reason))
    raise_problems(problems)
    return {group: dict(sorted(found[group].items())) for group in sorted(found)}


def body_of(path: Path) -> Mapping[str, object]:
    """Return the keys of an option file without its defaults list, cached until it changes."""
    return _body(path, path.stat().st_mtime_ns)


@cache
def _body(path: Path, _version: int) -> Mapping[str, object]:
    import yaml

    try:
        body = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.CSafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RequestError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(body, dict):
        raise RequestError(f"{path} has no keys.")
    body.pop("defaults", None)
    return body


def _search_path_folder(entry: str) -> Path:
    """Return the folder that an entry of Hydra's search path names."""
    if not entry.startswith("pkg://"):
        return Path(entry.removeprefix("file://"))
    folder = package_folder(entry.removeprefix("pkg://").replace("/", "."))
    if folder is None:
        reason = "no installed package has this folder; install the package or pass a path"
        raise RequestError(Problem(SEARCHPATH, entry, reason=reason))
    return folder
