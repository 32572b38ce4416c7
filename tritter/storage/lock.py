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
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        except OSError:  # it belongs to somebody else, or none can be made
            yield
            return
        if (holder := _lock(descriptor)) is not None:
            os.close(descriptor)
            raise _is_taken(folder, holder, key=key)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.lstat(path), os.fstat(descriptor)):
                break
        os.close(descriptor)  # its last holder took the file away meanwhile
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
    if (holder := _holder(folder)) is not None:
        raise _is_taken(folder, holder, key=key)


def process_in(folder: Path) -> int | None:
    """Return the id of the process of this machine that holds a folder; None: there is none.

    It is not for the process that holds it itself, which would lose the lock.
    """
    holder = re.fullmatch(r"process ([1-9]\d{0,9}) on (\S+)", _holder(folder) or "")
    if holder is None or holder[2] != socket.gethostname():
        return None
    return int(holder[1])


def is_held(folder: Path) -> bool:
    """Say whether another process, of whatever machine, holds a folder."""
    return _holder(folder) is not None


def _holder(folder: Path) -> str | None:
    """Return how another process that holds a folder names itself; None: nobody holds it."""
    try:
        descriptor = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        return _lock(descriptor)
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> str | None:
    """Take a lock, or return who has it."""
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        content = os.pread(descriptor, _MAX_BYTES, 0).decode(errors="replace")
        return content or "another process"
    except OSError:  # no locks here
        pass
    return None


def _is_taken(folder: Path, holder: str, *, key: str) -> RequestError:
    reason = f"{holder} is running there; wait until it has ended, or name another folder"
    return refused(key, folder, reason)
