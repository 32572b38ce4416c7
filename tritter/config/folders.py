"""Where option files are: ours, those of installed packages, and those below `--config-dir`.

All are treated alike, and by one scan: composition, help, nearest matches, spelling and completion
see the same. Nothing is imported for it: the folder of a package is found by its metadata (entry
points of the group `tritter.config`, as `mine = "minepkg:conf"`).
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path

from tritter.conf_folder import config_folder
from tritter.errors import Problem, RequestError, nearest, raise_problems

ENTRY_POINTS = "tritter.config"
CONFIG_NAME = "config"
LADDERS = "ladder"  # a folder of option files that are chosen as gate.ladder, by no group of theirs

Options = Mapping[str, Mapping[str, Path]]  # group → option → its file


@dataclass(frozen=True, slots=True)
class Front:
    """What a command adds to the options that are installed.

    Args:
        folders: of `--config-dir`, absolute.
        config_name: the file at the root that composition begins with.
    """

    folders: tuple[Path, ...] = ()
    config_name: str = CONFIG_NAME


_FRONT: ContextVar[Front | None] = ContextVar("front", default=None)


@contextmanager
def composing_from(front: Front) -> Iterator[None]:
    """Let everything here speak of this front, for one command."""
    token = _FRONT.set(front)
    try:
        yield
    finally:
        _FRONT.reset(token)


def front() -> Front:
    return _FRONT.get() or Front()


def front_of(folders: Sequence[str], config_name: str | None) -> Front:
    """Return what `--config-dir` and `--config-name` mean.

    Raises:
        RequestError: a folder is none, or none holds the file.
    """
    places = tuple(Path(folder).expanduser().absolute() for folder in folders)
    problems = [
        Problem(
            "--config-dir",
            place,
            reason="it is no folder" if place.exists() else "there is no such folder",
        )
        for place in places
        if not place.is_dir()
    ]
    raise_problems(problems)
    meant = Front(places, (config_name or CONFIG_NAME).removesuffix(".yaml"))
    with composing_from(meant):
        if config_name is not None and meant.config_name not in (names := config_names()):
            reason = f"no folder of options holds {meant.config_name}.yaml; there are "
            near = nearest(meant.config_name, names)
            raise RequestError(
                Problem("--config-name", config_name, reason + ", ".join(names), nearest=near)
            )
    return meant


def config_names() -> list[str]:
    """Return what `--config-name` may be: the files at the root of the folders."""
    return sorted({p.stem for folder in option_folders().values() for p in folder.glob("*.yaml")})


def option_folders() -> dict[str, Path]:
    """Return provider → folder, ours first.

    Raises:
        RequestError: an installed package names a folder that is not there.
    """
    folders = {"tritter": config_folder(), **_installed_folders(tuple(sys.path))}
    for folder in front().folders:
        folders[f"--config-dir {folder}"] = folder
    by_place = {folder.resolve(): provider for provider, folder in reversed(folders.items())}
    return {p: folder for p, folder in folders.items() if by_place[folder.resolve()] == p}


@cache
def _installed_folders(_path: tuple[str, ...]) -> dict[str, Path]:
    """Return what the packages bring that are found on this path; reading all metadata is slow."""
    points = sorted(entry_points(group=ENTRY_POINTS), key=lambda point: point.name)
    return {f"the package's entry point {p.name} = {p.value}": _folder_of(p) for p in points}


def option_files() -> Options:
    """Return all options, sorted.

    Raises:
        RequestError: two folders have the same option; names both.
    """
    found: dict[str, dict[str, Path]] = {}
    problems = []
    folders = option_folders()
    for folder in folders.values():
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


def _folder_of(point: EntryPoint) -> Path:
    """Return the folder that an entry point names; nothing is imported."""
    top, *inner = point.module.split(".")
    spec = find_spec(top)  # of "a.b" it would import a
    places = list(spec.submodule_search_locations or ()) if spec else []
    for place in places:
        folder = Path(place, *inner, *point.attr.split("."))
        if folder.is_dir():
            return folder
    raise RequestError(
        Problem(
            f"entry point {point.name} of {ENTRY_POINTS}",
            point.value,
            reason=f"{top} is no package that holds this folder; reinstall it, or remove it",
        )
    )
