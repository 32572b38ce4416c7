"""A folder lock for one process at a time; the system releases it when that process ends."""

import fcntl
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import ClassVar

from tritter.errors import RequestError, refused

_MAX_BYTES = 200


class FolderLock:
    """The lock of a folder.

    The process that holds it must only call `held`: with the others it would lose the lock.

    Args:
        folder: Folder to lock.
    """

    NAME: ClassVar[str] = ".lock"

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @contextmanager
    def held(self, *, key: str) -> Iterator[None]:
        """Lock the folder while the block runs.

        The system releases the lock when this process ends, even by a kill. Forked processes do not
        hold it. On a file system without locks it has no effect.

        Args:
            key: Option that named the folder, for error messages.
        """
        path = self.folder / self.NAME
        while True:
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
            except OSError:  # another user owns the file, or it cannot be created
                yield
                return
            if (holder := _lock(descriptor)) is not None:
                os.close(descriptor)
                raise self._error(holder, key=key)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.lstat(path), os.fstat(descriptor)):
                    break
            os.close(descriptor)  # the last holder has removed the file
        try:
            with suppress(OSError):  # a full disk: the lock names no process
                os.truncate(descriptor, 0)
                os.pwrite(
                    descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0
                )
            yield
        finally:
            path.unlink(missing_ok=True)
            os.close(descriptor)

    def check(self, *, key: str) -> None:
        """Refuse a folder that another process has locked, without writing anything."""
        if (holder := self._holder()) is not None:
            raise self._error(holder, key=key)

    @property
    def process(self) -> int | None:
        """The id of the local process that has locked the folder, or None."""
        holder = re.fullmatch(r"process ([1-9]\d{0,9}) on (\S+)", self._holder() or "")
        if holder is None or holder[2] != socket.gethostname():
            return None
        return int(holder[1])

    @property
    def is_held(self) -> bool:
        """True if another process, on any machine, has locked the folder."""
        return self._holder() is not None

    def _holder(self) -> str | None:
        """Return the name of the process that has locked the folder, or None."""
        try:
            descriptor = os.open(self.folder / self.NAME, os.O_RDWR | os.O_NOFOLLOW)
        except OSError:
            return None
        try:
            return _lock(descriptor)
        finally:
            os.close(descriptor)

    def _error(self, holder: str, *, key: str) -> RequestError:
        reason = f"{holder} is using it; wait until it ends, or choose another folder"
        return refused(key, self.folder, reason)


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
