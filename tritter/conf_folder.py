"""Where the option files are: beside the package in a checkout, inside it when installed."""

from pathlib import Path

from tritter.errors import TritterError


def config_folder() -> Path:
    """Return the folder `conf`.

    Raises:
        TritterError: if the installation holds none.
    """
    package = Path(__file__).resolve().parent
    for folder in (package.parent / "conf", package / "conf"):
        if (folder / "config.yaml").is_file():
            return folder
    raise TritterError(
        f"no conf/config.yaml beside or inside {package}: the installation is broken"
    )
