"""The folder with the option files: next to the package in a checkout, inside it if installed."""

from pathlib import Path

from tritter.errors import TritterError


def config_folder() -> Path:
    """Return the folder `conf`.

    Raises:
        TritterError: the installation has no such folder.
    """
    package = Path(__file__).resolve().parent
    for folder in (package.parent / "conf", package / "conf"):
        if (folder / "config.yaml").is_file():
            return folder
    raise TritterError(f"no conf/config.yaml next to {package} or inside it: reinstall tritter")
