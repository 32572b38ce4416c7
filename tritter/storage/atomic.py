"""Atomic writes of files and folders: temporary sibling, fsync, rename."""

import errno
import hashlib
import os
import platform
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tritter.errors import RequestError, TritterError
from tritter.stopping import Stopped
from tritter.storage.reading import kind_of

_NO_LINKS = {
    *(errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK),
    *(errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP),
}
_OLD_PREFIX = "old-"  # mkdtemp never generates a hyphen
_NAME_EXISTS = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR)  # of a rename onto a name in use
_TEMPORARY = re.compile(  # see `_prefix`; mkdtemp adds eight characters
    rf"\.(?P<target>.+)\.(?P<host>[0-9a-f]{{8}})-(?P<process>\d{{1,9}})\.(?P<old>{_OLD_PREFIX})?"
    r"[a-z0-9_]{8}"
)
_Identity = tuple[int, int]  # device and inode of a file or folder
_PUBLISHED: set[_Identity] = set()  # folders that this process has published


@contextmanager
def atomic_folder(
    target: Path, *, overwrite: bool = False, check: Callable[[Path], None] | None = None
) -> Iterator[Path]:
    """Yield a temporary folder next to `target` that becomes `target` when the block succeeds.

    If the block raises, the temporary folder is removed and `target` is unchanged. Only a real
    folder is ever replaced, and only the one that existed when the block began.

    Args:
        target: Folder to write.
        overwrite: Whether an existing folder at `target` is replaced.
        check: Called with the folder to replace; raises if it must not be replaced. It is called
            again at the end with the old folder, just before that is deleted.
    """
    check = check or (lambda folder: None)
    if target.name in ("", ".."):  # other spellings of a named folder
        target = target.resolve()
    _refuse(target, overwrite=overwrite, check=check)
    with parents_of(target):
        try:
            _remove_leftovers(target)
            _refuse(target, overwrite=overwrite, check=check)  # a leftover may be back
            before = _identity(target) if overwrite else None
            temporary = Path(tempfile.mkdtemp(prefix=_prefix(target), dir=target.parent))
        except OSError as error:
            raise _unwritable(target, error) from error
        try:
            yield temporary
            temporary.chmod(0o755)
            _sync_tree(temporary)
            _replace_folder(temporary, target, before=before, check=check)
        except Exception as error:
            if not _is_write_error(error):
                raise
            is_copy = isinstance(error, shutil.Error)  # of a tree: (source, target, reason) each
            reason = error.args[0][0][2] if is_copy else error
            raise TritterError(
                f"{target} could not be written: {reason}. Nothing was changed."
            ) from error
        finally:
            _remove(temporary)


def write_text_atomic(
    path: Path, text: str, *, check: Callable[[Path], None] | None = None
) -> None:
    """Write a small text file atomically: readers see the old content or the new, never a part.

    Args:
        path: File to write.
        text: Its new content.
        check: Called with the file to replace; raises if it must not be replaced.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path)
        descriptor, name = tempfile.mkstemp(prefix=_prefix(path), dir=path.parent)
        temporary = Path(name)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        if check is None:
            temporary.replace(path)
        elif not _rename_new(temporary, path):
            check(path)
            temporary.replace(path)
        _sync(path.parent)
    except OSError as error:
        raise TritterError(f"{path} could not be written: {error.strerror or error}.") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _is_write_error(error: Exception) -> bool:
    """Return True for an error of the system, also as safetensors and tokenizers raise it."""
    is_of_rust = not isinstance(error, TritterError) and "(os error " in str(error)
    return is_of_rust or isinstance(error, OSError)


def link_or_copy(source: Path, target: Path) -> None:
    """Hard-link a file, or copy it where the file system has no hard links.

    Intended for weights: they are never opened for writing, only replaced by a rename.
    """
    try:
        os.link(source.resolve(), target)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        shutil.copyfile(source, target)


def copy_tree(source: Path, target: Path) -> None:
    """Copy a checkpoint folder into an existing one: weights as hard links, the rest as copies."""

    def copy(path: str, destination: str) -> None:
        if path.endswith(".safetensors"):
            link_or_copy(Path(path), Path(destination))
        else:
            shutil.copyfile(path, destination)

    shutil.copytree(source, target, dirs_exist_ok=True, copy_function=copy)


def remove_folder(target: Path) -> None:
    """Remove a folder written by `atomic_folder`, and the leftovers of its killed writers."""
    if target.parent.is_dir():
        _remove_leftovers(target)
    shutil.rmtree(target, ignore_errors=True)


@contextmanager
def parents_of(target: Path) -> Iterator[None]:
    """Create the parent folders of `target`; remove those still empty when the block ends."""
    missing = [folder for folder in target.parents if not folder.exists()]
    try:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unwritable(target, error) from error
        yield
    finally:
        for folder in missing:
            with suppress(OSError):  # it is not empty, or was never created
                folder.rmdir()


def _unwritable(target: Path, error: OSError | ValueError) -> RequestError:
    reason = getattr(error, "strerror", None) or error
    return RequestError(f"{target} cannot be written: {reason}.")


def refuse_existing(target: Path, *, overwrite: bool) -> None:
    """Refuse a target that exists and must not be replaced, without opening or following it.

    Args:
        target: Path to write.
        overwrite: Whether an existing folder may be replaced.
    """
    try:
        mode = target.lstat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return
    except (OSError, ValueError) as error:
        raise _unwritable(target, error) from error
    if not overwrite:
        what = "" if stat.S_ISDIR(mode) else f" and is {kind_of(mode)}"
        way = ", or replace it (--overwrite)" if stat.S_ISDIR(mode) else ""
        raise RequestError(f"{target} already exists{what}; choose another path{way}.")
    if not stat.S_ISDIR(mode):
        raise RequestError(
            f"{target} is {kind_of(mode)}; only folders can be replaced. Choose another path."
        )


def _refuse(target: Path, *, overwrite: bool, check: Callable[[Path], None]) -> None:
    refuse_existing(target, overwrite=overwrite)
    if overwrite and os.path.lexists(target):
        check(target)


def _replace_folder(
    new: Path, target: Path, *, before: _Identity | None, check: Callable[[Path], None]
) -> None:
    """Move `new` to `target`; a folder cannot be renamed onto a folder that is not empty.

    The old folder is briefly in a hidden folder next to `target`; after a kill at that moment, the
    next writer restores it.

    Args:
        before: Identity of the folder to replace, or None if there was none. A folder that
            another process has put there since is not replaced.
    """
    own = _identity(new)
    if before is None or not os.path.lexists(target):
        if not _rename_new(new, target):
            raise _exists_error(target)
    else:
        _check_old(target, target, before, check)
        old = Path(tempfile.mkdtemp(prefix=_prefix(target) + _OLD_PREFIX, dir=target.parent))
        target.replace(old / target.name)
        try:
            _check_old(old / target.name, target, before, check)
            new.replace(target)
        except BaseException:
            (old / target.name).replace(target)
            old.rmdir()
            raise
        _remove(old)
    if own is not None:
        _PUBLISHED.add(own)
    _sync(target.parent)


def _exists_error(target: Path) -> RequestError:
    return RequestError(
        f"{target} exists now: another process wrote it after this command started. It was not "
        "changed. Choose another path."
    )


def _identity(path: Path) -> _Identity | None:
    """Return the device and inode of a file or folder, or None if it does not exist."""
    try:
        found = path.lstat()
    except (OSError, ValueError):
        return None
    return found.st_dev, found.st_ino


def published_here(target: Path) -> _Identity | None:
    """Return the identity of the folder at `target` if this process published it, else None."""
    identity = _identity(target)
    return identity if identity in _PUBLISHED else None


def _check_old(old: Path, target: Path, before: _Identity, check: Callable[[Path], None]) -> None:
    """Check the old folder of `target`, which is about to be deleted."""
    if _identity(old) != before:
        raise _exists_error(target)
    try:
        _refuse(old, overwrite=True, check=check)
    except RequestError as error:
        raise RequestError(str(error).replace(str(old), str(target))) from error


def _remove(folder: Path) -> None:
    """Remove a folder, even if a stop signal arrives during the removal."""
    try:
        shutil.rmtree(folder, ignore_errors=True)
    except Stopped:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _rename_new(first: Path, second: Path) -> bool:
    """Rename a file or folder; return False if the new name is taken."""
    if os.path.lexists(second):
        return False
    try:
        if first.is_dir():
            first.rename(second)
        else:  # a rename would replace a file that another process has just written
            link_or_copy(first, second)
            first.unlink()
    except OSError as error:
        if error.errno in _NAME_EXISTS:  # another process was faster
            return False
        raise
    return True


def _prefix(target: Path) -> str:
    return f".{target.name}.{_host()}-{os.getpid()}."


def _host() -> str:
    """Return a name for this machine: process ids are only unique per machine."""
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]


def clear_leftovers(folder: Path) -> None:
    """Remove what killed writers left below a run folder that this process has locked.

    They may have run on another machine, or in a container or before a restart that gave them the
    id of a process that runs now. A folder that was moved aside is restored.
    """
    for above, names, files in os.walk(folder):
        for name in (*names, *files):
            if (match := _TEMPORARY.fullmatch(name)) is not None:
                _remove_leftover(Path(above, name), match)


def _remove_leftovers(target: Path) -> None:
    """Remove temporary folders and files of processes that were killed while writing `target`.

    A folder that was moved aside and not yet replaced is restored first.
    """
    for path in sorted(target.parent.iterdir()):
        match = _TEMPORARY.fullmatch(path.name)
        if match is None or match["target"] != target.name or match["host"] != _host():
            continue
        if not _is_alive(int(match["process"])):
            _remove_leftover(path, match)


def _remove_leftover(path: Path, match: re.Match[str]) -> None:
    name = match["target"]
    if path.is_symlink() or name in (".", ".."):
        return
    if path.is_file():
        path.unlink(missing_ok=True)
    elif path.is_dir():
        if match["old"] and (path / name).exists() and not os.path.lexists(path.with_name(name)):
            (path / name).replace(path.with_name(name))
        shutil.rmtree(path, ignore_errors=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except OSError as error:
        return error.errno != errno.ESRCH
    return True


def _sync_tree(folder: Path) -> None:
    for path in (*folder.rglob("*"), folder):
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
