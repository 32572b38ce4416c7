"""The folders with option files: ours, and those of installed packages.

Ours are next to the package in a checkout, and inside it when installed. Other packages name their
folder as an entry point of the group `tritter.config`; nothing is imported to find it.
"""

import sys
from contextlib import suppress
from functools import cache
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

from tritter.errors import Problem, RequestError

_ENTRY_POINTS = "tritter.config"


def config_folder() -> Path:
    """Return the folder `conf`."""
    package = Path(__file__).resolve().parent
    is_checkout = (package.parent / "conf" / "config.yaml").is_file()
    return (package.parent if is_checkout else package) / "conf"


def installed_folders() -> dict[str, Path]:
    """Return provider → folder of the packages on `sys.path`."""
    return _installed_folders(tuple(sys.path))


@cache
def _installed_folders(_path: tuple[str, ...]) -> dict[str, Path]:  # reading all metadata is slow
    folders = {}
    for point in sorted(entry_points(group=_ENTRY_POINTS), key=lambda point: point.name):
        folder = package_folder(f"{point.module}.{point.attr}")
        if folder is None:
            top = point.module.partition(".")[0]
            reason = f"{top} is not a package with this folder; reinstall or uninstall it"
            key = f"entry point {point.name} of {_ENTRY_POINTS}"
            raise RequestError(Problem(key, point.value, reason=reason))
        folders[f"the package's entry point {point.name} = {point.value}"] = folder
    return folders


def package_folder(dotted: str) -> Path | None:
    """Return a folder in a package, given its dotted name; nothing is imported."""
    top, *inner = dotted.split(".")
    spec = None
    with suppress(ValueError):  # no package can have this name
        spec = find_spec(top)  # find_spec("a.b") would import a
    locations = (spec and spec.submodule_search_locations) or ()
    return next((folder for p in locations if (folder := Path(p, *inner)).is_dir()), None)
