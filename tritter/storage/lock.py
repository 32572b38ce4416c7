"""A folder lock for one process at a time; the system releases it when that process ends."""

import fcntl
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tritter.errors import RequestError, refused

LOCK_NAME = ".lock"
_MAX_BYTES = 200


@contextmanager
def folder_lock(folder: Path, *, key: str) -> Iterator[None]:
    """Lock a folder while the block runs.

    The system releases the lock when this process ends, even by a kill. Forked processes do not
    hold it. On a file system without locks it has no effect.

    Args:
        folder: Folder to lock.
        key: Option that named the folder, for error messages.
    """
    path = folder / LOCK_NAME
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        except OSError:  # another user owns the file, or it cannot be created
            yield
            return
        if (holder := _lock(descriptor)) is not None:
            os.close(descriptor)
            raise _locked_error(folder, holder, key=key)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.lstat(path), os.fstat(descriptor)):
                break
        os.close(descriptor)  # the last holder has removed the file
    try:
        with suppress(OSError):  # a full disk: the lock names no process
            os.truncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def check_unlocked(folder: Path, *, key: str) -> None:
    """Refuse a folder that another process has locked, without writing anything.

    The process that holds the lock must not call this: it would lose the lock.
    """
    if (holder := _holder(folder)) is not None:
        raise _locked_error(folder, holder, key=key)


def locking_process(folder: Path) -> int | None:
    """Return the id of the local process that has locked a folder, or None.

    The process that holds the lock must not call this: it would lose the lock.
    """
    holder = re.fullmatch(r"process ([1-9]\d{0,9}) on (\S+)", _holder(folder) or "")
    if holder is None or holder[2] != socket.gethostname():
        return None
    return int(holder[1])


def is_locked(folder: Path) -> bool:
    """Return True if another process, on any machine, has locked a folder."""
    return _holder(folder) is not None


def _holder(folder: Path) -> str | None:
    """Return the name of the process that has locked a folder, or None."""
    try:
        descriptor = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        return _lock(descriptor)
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> str | None:
    """Acquire a lock, or return the name of the process that holds it."""
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        content = os.pread(descriptor, _MAX_BYTES, 0).decode(errors="replace")
        return content or "another process"
    except OSError:  # the file system has no locks
        pass
    return None


def _locked_error(folder: Path, holder: str, *, key: str) -> RequestError:
    reason = f"{holder} is using it; wait until it ends, or choose another folder"
    return refused(key, folder, reason)
