"""A cache of folders that appear whole or not at all, and are trusted only after a check."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from filelock import FileLock, Timeout

from tritter.errors import RequestError, TritterError

logger = logging.getLogger(__name__)


@contextmanager
def one_at_a_time(folder: Path, *, waiting: Callable[[], None] | None = None) -> Iterator[None]:
    """Let one process make an entry of a cache while others wait, who then find it made.

    The lock ends with its process, so that a job that is killed holds nobody up.

    Args:
        folder: of the entry, or its file.
        waiting: told that another process is at it.

    Raises:
        RequestError: the cache cannot be written.
    """
    require_writable(folder.parent)
    lock = FileLock(folder.with_name(f"{folder.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if waiting is not None:
            waiting()
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def set_aside(path: Path, *, reason: str) -> None:
    """Move what cannot be trusted out of the way, and say so in one line.

    Raises:
        RequestError: the cache cannot be written.
    """
    aside = path.with_name(f"{path.name}.broken-{uuid4().hex[:8]}")
    logger.warning(
        "cache entry %s is damaged (%s); moved to %s and built again", path, reason, aside.name
    )
    # Another process may have moved the same entry already.
    with write_errors(path.parent), suppress(FileNotFoundError):
        path.rename(aside)


def require_writable(folder: Path) -> None:
    """Find out whether a folder of the cache can be written, before any work is done for it.

    Raises:
        RequestError: it cannot.
    """
    with write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{uuid4().hex[:8]}"
        probe.touch()
        probe.unlink()


@contextmanager
def write_errors(folder: Path) -> Iterator[None]:
    """Name the cache in errors of a block that writes to it.

    Raises:
        RequestError: it cannot be written.
    """
    try:
        yield
    except (OSError, TritterError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RequestError(
            f"cache_dir: {folder} cannot be written ({reason}). "
            "Name a folder that can be: cache_dir=PATH."
        ) from error
