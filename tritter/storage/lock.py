"""One process at a time in a folder: a lock that ends with the process that holds it."""

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
_HOLDER = re.compile(r"process (?P<number>[1-9]\d{0,9}) on (?P<host>\S+)")


@contextmanager
def alone_in(folder: Path, *, key: str) -> Iterator[None]:
    """Hold a folder against other processes while the block runs.

    The system takes the lock back when this process ends, however that comes about; processes
    that it forks don't hold it. A file system without locks holds nobody off.

    Args:
        key: what named the folder, for messages.

    Raises:
        RequestError: another process holds it.
    """
    path = folder / LOCK_NAME
    descriptor = _locked(path, folder, key=key)
    if descriptor is None:
        yield
        return
    try:
        with suppress(OSError):  # a full disk: the holder has no name
            os.truncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def check_free(folder: Path, *, key: str) -> None:
    """Refuse a folder that another process holds; writes nothing.

    It is not for the process that holds it itself, which would lose the lock.

    Raises:
        RequestError: says which process.
    """
    try:
        descriptor = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_NOFOLLOW)
    except OSError:
        return
    try:
        _lock(descriptor, folder, key=key)
    finally:
        os.close(descriptor)


def process_in(folder: Path) -> int | None:
    """Return the id of the process of this machine that holds a folder; None: there is none.

    It is not for the process that holds it itself, which would lose the lock.
    """
    try:
        check_free(folder, key="")
    except RequestError:
        try:
            descriptor = os.open(folder / LOCK_NAME, os.O_RDONLY | os.O_NOFOLLOW)
        except OSError:  # it ended meanwhile
            return None
        try:
            content = os.pread(descriptor, _MAX_BYTES, 0).decode(errors="replace")
        finally:
            os.close(descriptor)
        holder = _HOLDER.fullmatch(content)
        if holder is not None and holder["host"] == socket.gethostname():
            return int(holder["number"])
    return None


def is_held(folder: Path) -> bool:
    """Say whether another process, of whatever machine, holds a folder."""
    try:
        check_free(folder, key="")
    except RequestError:
        return True
    return False


def _locked(path: Path, folder: Path, *, key: str) -> int | None:
    """Return a descriptor that holds the lock; None where no file can be opened."""
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        except OSError:  # it belongs to somebody else, or none can be made
            return None
        try:
            _lock(descriptor, folder, key=key)
        except RequestError:
            os.close(descriptor)
            raise
        with suppress(FileNotFoundError):
            if os.path.samestat(os.lstat(path), os.fstat(descriptor)):
                return descriptor
        os.close(descriptor)  # its last holder took the file away meanwhile


def _lock(descriptor: int, folder: Path, *, key: str) -> None:
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        holder = os.pread(descriptor, _MAX_BYTES, 0).decode(errors="replace")
        reason = f"{holder or 'another process'} is running there; wait until it has ended, or name"
        raise refused(key, folder, f"{reason} another folder") from error
    except OSError:  # no locks here
        return
