"""Files and folders that appear whole or not at all: temporary sibling, fsync, rename."""

import ctypes
import hashlib
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tritter.errors import RequestError, TritterError
from tritter.stopping import Stopped

_AT_FDCWD = -100  # from fcntl.h
_RENAME_EXCHANGE = 2  # from linux/fs.h
_ASIDE = "old-"  # mkdtemp's own characters hold no hyphen


@contextmanager
def atomic_folder(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside `target` that becomes `target` when the block ends well.

    When the block raises, the temporary folder goes and what stood at `target` stays.

    Raises:
        RequestError: something stands at `target` already and `overwrite` is off, or the place
            cannot be written.
        TritterError: the disk refused a write on the way (full, read-only).
    """
    _refuse_existing(target, overwrite=overwrite)
    with _parents_of(target):
        try:
            _remove_leftovers(target)
            _refuse_existing(target, overwrite=overwrite)  # what had been moved aside stands again
            temporary = Path(tempfile.mkdtemp(prefix=_prefix(target), dir=target.parent))
        except OSError as error:
            raise _unwritable(target, error) from error
        try:
            yield temporary
            temporary.chmod(0o755)
            _sync_tree(temporary)
            _replace_folder(temporary, target, overwrite=overwrite)
        except OSError as error:
            raise TritterError(
                f"{target} could not be written: {error}. Nothing was changed."
            ) from error
        finally:
            _remove(temporary)


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


@contextmanager
def _parents_of(target: Path) -> Iterator[None]:
    """Make the folders above `target`; those that are empty when the block ends go again."""
    missing = [folder for folder in target.parents if not folder.exists()]
    try:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unwritable(target, error) from error
        yield
    finally:
        for folder in missing:
            with suppress(OSError):  # it is not empty, or was never made
                folder.rmdir()


def _unwritable(target: Path, error: OSError) -> RequestError:
    return RequestError(f"{target} cannot be written: {error.strerror or error}.")


def _refuse_existing(target: Path, *, overwrite: bool) -> None:
    if target.exists() and not overwrite:
        raise RequestError(f"{target} exists already; nothing was overwritten. Choose another.")


def _replace_folder(new: Path, target: Path, *, overwrite: bool) -> None:
    """Put `new` at `target`; a folder cannot be renamed onto one that is not empty.

    What came to stand there since it was looked for is therefore left alone without `overwrite`.

    Where the system can exchange two names in one step, a kill leaves the old folder or the new
    one. Elsewhere there is a moment at which the old one has moved aside and lies in a hidden
    folder beside `target`, from where the next writer puts it back.
    """
    if not (overwrite and target.exists()):
        new.replace(target)
    elif not _exchange(new, target):
        old = Path(tempfile.mkdtemp(prefix=_prefix(target) + _ASIDE, dir=target.parent))
        target.replace(old / target.name)
        try:
            new.replace(target)
        except BaseException:
            (old / target.name).replace(target)
            old.rmdir()
            raise
        _remove(old)
    _sync_folder(target.parent)


def _remove(folder: Path) -> None:
    """Remove a folder, also when somebody stops the process meanwhile: that happens once."""
    try:
        shutil.rmtree(folder, ignore_errors=True)
    except Stopped:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _exchange(first: Path, second: Path) -> bool:
    """Swap two names in one step (Linux renameat2); return False where that cannot be done."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    names = (os.fsencode(first.absolute()), os.fsencode(second.absolute()))
    return renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0


def _prefix(target: Path) -> str:
    return f".{target.name}.{_host()}-{os.getpid()}."


def _host() -> str:
    """Name this machine, whose process numbers say nothing about another's on a shared disk."""
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]


def _remove_leftovers(target: Path) -> None:
    """Remove temporary folders of processes that were killed while writing `target`.

    A folder that one of them had moved aside and not replaced yet is put back first.
    """
    pattern = re.compile(rf"\.{re.escape(target.name)}\.{_host()}-(\d+)\.({_ASIDE})?")
    for path in sorted(target.parent.iterdir()):
        match = pattern.match(path.name)
        if match and path.is_dir() and not _is_alive(int(match[1])):
            if match[2] and (path / target.name).exists() and not target.exists():
                (path / target.name).replace(target)
            shutil.rmtree(path, ignore_errors=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


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
