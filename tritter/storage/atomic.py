"""Files and folders that appear whole or not at all: temporary sibling, fsync, rename."""

import ctypes
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
from functools import partial
from pathlib import Path

from tritter.errors import RequestError, TritterError
from tritter.stopping import Stopped
from tritter.storage.reading import kind_of

_AT_FDCWD = -100  # from fcntl.h
_RENAME_NEW, _RENAME_EXCHANGE = 1, 2  # RENAME_NOREPLACE and RENAME_EXCHANGE of linux/fs.h
_NO_LINKS = {
    *(errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK),
    *(errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP),
}
_ASIDE = "old-"  # mkdtemp's own characters hold no hyphen
_TAKEN = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR)  # why a rename finds its new name taken
Identity = tuple[int, int]  # device and inode of a file or folder
_PLACED: set[Identity] = set()  # folders that this process has put in place


@contextmanager
def atomic_folder(
    target: Path, *, overwrite: bool = False, check: Callable[[Path], None] | None = None
) -> Iterator[Path]:
    """Yield a temporary folder beside `target` that becomes `target` when the block ends well.

    When the block raises, the temporary folder goes and what stood at `target` stays. Only a real
    folder is ever replaced, and only the one that was there when the block began.

    Args:
        check: called with a folder that is to be replaced; raises when it may not be. It is asked
            at the end, too, of what has been moved away and is about to be deleted.

    Raises:
        RequestError: something stands at `target` already and `overwrite` is off, or it may not
            be replaced, or the place cannot be written; or another process wrote `target`
            meanwhile, whose result stays.
        TritterError: the disk refused a write on the way (full, read-only).
    """
    check = check or (lambda folder: None)
    if target.name in ("", ".."):  # other spellings of a folder, which has a name
        target = target.resolve()
    _refuse(target, overwrite=overwrite, check=check)
    with _parents_of(target):
        try:
            _remove_leftovers(target)
            _refuse(target, overwrite=overwrite, check=check)  # what was moved aside stands again
            before = identity_of(target) if overwrite else None
            temporary = Path(tempfile.mkdtemp(prefix=_prefix(target), dir=target.parent))
        except OSError as error:
            raise _unwritable(target, error) from error
        try:
            yield temporary
            temporary.chmod(0o755)
            _sync_tree(temporary)
            _replace_folder(temporary, target, before=before, check=check)
        except OSError as error:
            raise TritterError(
                f"{target} could not be written: {error}. Nothing was changed."
            ) from error
        finally:
            _remove(temporary)


def write_text_atomic(
    path: Path, text: str, *, check: Callable[[Path], None] | None = None
) -> None:
    """Write a small text file so that a reader sees the old content or the new, never a part.

    Args:
        check: called with a file that is to be replaced; raises when it may not be. It is called
            again with the file that was moved away and is about to be deleted.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path)
    descriptor, name = tempfile.mkstemp(prefix=_prefix(path), dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        if check is None:
            temporary.replace(path)
        elif not _rename_new(temporary, path):
            check(path)
            if not _exchange_checked(temporary, path, check):
                temporary.replace(path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file a second name; copy it where the file system has no hard links.

    Meant for weights, which nothing opens for writing: they are replaced by a rename.
    """
    try:
        os.link(source.resolve(), target)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        shutil.copyfile(source, target)


def copy_tree(source: Path, target: Path) -> None:
    """Copy a checkpoint folder into an existing one: weights as hard links, the rest as copies."""

    def copy(path: str, place: str) -> None:
        if path.endswith(".safetensors"):
            link_or_copy(Path(path), Path(place))
        else:
            shutil.copyfile(path, place)

    shutil.copytree(source, target, dirs_exist_ok=True, copy_function=copy)


def remove_folder(target: Path) -> None:
    """Remove a folder that `atomic_folder` wrote, and what killed writers of it left beside it."""
    if target.parent.is_dir():
        _remove_leftovers(target)
    shutil.rmtree(target, ignore_errors=True)


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


def _unwritable(target: Path, error: OSError | ValueError) -> RequestError:
    reason = getattr(error, "strerror", None) or error
    return RequestError(f"{target} cannot be written: {reason}.")


def refuse_existing(target: Path, *, overwrite: bool) -> None:
    """Refuse a place where something stands that will not be replaced; opens and follows nothing.

    Raises:
        RequestError: `overwrite` is off, or it is no real folder; or no file can be called so.
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
        raise RequestError(f"{target} exists already{what}; choose another place{way}.")
    if not stat.S_ISDIR(mode):
        raise RequestError(
            f"{target} is {kind_of(mode)}; only a folder is ever replaced. Choose another place."
        )


def _refuse(target: Path, *, overwrite: bool, check: Callable[[Path], None]) -> None:
    refuse_existing(target, overwrite=overwrite)
    if overwrite and os.path.lexists(target):
        check(target)


def _replace_folder(
    new: Path, target: Path, *, before: Identity | None, check: Callable[[Path], None]
) -> None:
    """Put `new` at `target`; a folder cannot be renamed onto one that is not empty.

    Where the system can exchange two names in one step, a kill leaves the old folder or the new
    one. Elsewhere there is a moment at which the old one has moved aside and lies in a hidden
    folder beside `target`, from where the next writer puts it back.

    Args:
        before: the folder at `target` that is to be replaced; None: there was none. What another
            process has put there since is left alone.
    """
    own = identity_of(new)
    if before is None or not os.path.lexists(target):
        if not _rename_new(new, target):
            raise _exists_now(target)
    else:
        _check_old(target, target, before, check)
        check_old = partial(_check_old, target=target, before=before, check=check)
        if not _exchange_checked(new, target, check_old):
            old = Path(tempfile.mkdtemp(prefix=_prefix(target) + _ASIDE, dir=target.parent))
            target.replace(old / target.name)
            try:
                check_old(old / target.name)
                new.replace(target)
            except BaseException:
                (old / target.name).replace(target)
                old.rmdir()
                raise
            _remove(old)
    if own is not None:
        _PLACED.add(own)
    _sync(target.parent)


def _exists_now(target: Path) -> RequestError:
    return RequestError(
        f"{target} exists now: another process wrote it after this command began, and it is left "
        "as it is. Choose another place."
    )


def identity_of(path: Path) -> Identity | None:
    """Return what tells a file or folder from all others; None: there is none."""
    try:
        found = path.lstat()
    except (OSError, ValueError):
        return None
    return found.st_dev, found.st_ino


def is_published_here(target: Path) -> bool:
    """Return whether the folder at `target` is one that this process put there."""
    return identity_of(target) in _PLACED


def _check_old(old: Path, target: Path, before: Identity, check: Callable[[Path], None]) -> None:
    """Check what is, or was until now, at `target` and is about to be deleted."""
    if identity_of(old) != before:
        raise _exists_now(target)
    try:
        _refuse(old, overwrite=True, check=check)
    except RequestError as error:
        raise RequestError(str(error).replace(str(old), str(target))) from error


def _remove(folder: Path) -> None:
    """Remove a folder, also when somebody stops the process meanwhile: that happens once."""
    try:
        shutil.rmtree(folder, ignore_errors=True)
    except Stopped:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _exchange(first: Path, second: Path) -> bool:
    """Swap two names in one step; return False where that cannot be done."""
    return _renameat2(first, second, _RENAME_EXCHANGE) == 0


def _exchange_checked(new: Path, target: Path, check: Callable[[Path], None]) -> bool:
    """Do the same; the names are swapped back if `check` refuses what was at `target`."""
    if not _exchange(new, target):
        return False
    try:
        check(new)
    except BaseException:
        if not _exchange(new, target):
            new.replace(target)
        raise
    return True


def _rename_new(first: Path, second: Path) -> bool:
    """Rename a file or folder; return False when something has the new name already."""
    failure = _renameat2(first, second, _RENAME_NEW)
    if failure in (0, errno.EEXIST):
        return failure == 0
    if os.path.lexists(second):
        return False
    try:
        first.rename(second)
    except OSError as error:
        if error.errno in _TAKEN:  # it came in between
            return False
        raise
    return True


def _renameat2(first: Path, second: Path, flag: int) -> int:
    """Call Linux's renameat2 and return the number of its error; 0 when it is done."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return errno.ENOSYS
    names = (os.fsencode(first.absolute()), os.fsencode(second.absolute()))
    done = renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], flag) == 0
    return 0 if done else ctypes.get_errno()


def _prefix(target: Path) -> str:
    return f".{target.name}.{_host()}-{os.getpid()}."


def _host() -> str:
    """Name this machine, whose process numbers say nothing about another's on a shared disk."""
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]


def _remove_leftovers(target: Path) -> None:
    """Remove temporary folders and files of processes that were killed while writing `target`.

    A folder that one of them had moved aside and not replaced yet is put back first.
    """
    pattern = re.compile(rf"\.{re.escape(target.name)}\.{_host()}-(\d+)\.({_ASIDE})?")
    for path in sorted(target.parent.iterdir()):
        match = pattern.match(path.name)
        if match is None or path.is_symlink() or _is_alive(int(match[1])):
            continue
        if path.is_file():
            path.unlink(missing_ok=True)
        elif path.is_dir():
            if match[2] and (path / target.name).exists() and not os.path.lexists(target):
                (path / target.name).replace(target)
            shutil.rmtree(path, ignore_errors=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
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
