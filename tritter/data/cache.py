"""A cache of folders with atomic writes and checksums."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from filelock import FileLock, Timeout

from tritter.errors import RequestError, TritterError

_logger = logging.getLogger(__name__)


@contextmanager
def entry_lock(folder: Path, *, on_wait: Callable[[], None] | None = None) -> Iterator[None]:
    """Lock a cache entry: one process builds it while the others wait.

    The operating system releases the lock of a killed process.

    Args:
        folder: the folder or file of the entry.
        on_wait: called if another process has the lock.
    """
    require_writable(folder.parent)
    lock = FileLock(folder.with_name(f"{folder.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if on_wait is not None:
            on_wait()
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def quarantine(path: Path, *, reason: str) -> None:
    """Rename a damaged cache entry and log a warning."""
    aside = path.with_name(f"{path.name}.broken-{uuid4().hex[:8]}")
    _logger.warning(
        "cache entry %s is damaged (%s); moving it to %s and rebuilding", path, reason, aside.name
    )
    # Another process may have moved the same entry already.
    with write_errors(path.parent), suppress(FileNotFoundError):
        path.rename(aside)


def require_writable(folder: Path) -> None:
    """Check that a cache folder is writable before any work is done for it."""
    with write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{uuid4().hex[:8]}"
        probe.touch()
        probe.unlink()


@contextmanager
def write_errors(folder: Path) -> Iterator[None]:
    """Turn write errors of a block into errors that name the cache."""
    try:
        yield
    except (OSError, TritterError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RequestError(
            f"cache_dir: {folder} is not writable ({reason}). "
            "Set a writable folder: cache_dir=PATH."
        ) from error
