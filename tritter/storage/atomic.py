"""Files and folders that appear whole or not at all: temporary sibling, fsync, rename."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tritter.errors import RequestError, TritterError


@contextmanager
def atomic_folder(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside `target` that becomes `target` when the block ends well.

    When the block raises, the temporary folder goes and what stood at `target` stays.

    Raises:
        RequestError: something stands at `target` already and `overwrite` is off, or the place
            cannot be written.
        TritterError: the disk refused a write on the way (full, read-only).
    """
    if target.exists() and not overwrite:
        raise RequestError(f"{target} exists already; nothing was overwritten. Choose another.")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise RequestError(f"{target} cannot be written: {error.strerror or error}.") from error
    try:
        yield temporary
        temporary.chmod(0o755)
        _sync_tree(temporary)
        _replace_folder(temporary, target)
    except OSError as error:
        raise TritterError(
            f"{target} could not be written: {error}. Nothing was changed."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text_atomic(path: Path, text: str) -> None:
    """Write a small text file so that a reader sees the old content or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
        _sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _replace_folder(new: Path, target: Path) -> None:
    """Put `new` at `target`; a folder cannot be renamed onto one that is not empty."""
    if target.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
        target.replace(old / "replaced")
        try:
            new.replace(target)
        except OSError:
            (old / "replaced").replace(target)
            raise
        shutil.rmtree(old, ignore_errors=True)
    else:
        new.replace(target)
    _sync_folder(target.parent)


def _sync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        else:
            _sync_folder(path)
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
