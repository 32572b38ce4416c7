"""A program that tries to escape from its sandbox; it runs there, as text, before any other.

It exits with a list of successful attempts unless the sandbox blocks them all.
"""

import os
import socket
from pathlib import Path


def try_all(attempts: dict) -> None:
    """Try all ways to escape.

    Args:
        attempts: an outside `folder` that is readable and writable for all users, an open `port`,
            and excessive values of `memory_bytes` and `processes`.
    """
    possible = []
    secret = Path(attempts["folder"], "secret")
    for escape, attempt in {
        "it reads files outside": lambda: secret.read_text(),
        "it writes files outside": lambda: secret.with_name("new").touch(),
        "it writes the libraries": lambda: Path(f"{os.__file__}.new").touch(),
        "it reaches the network": lambda: socket.create_connection(
            ("127.0.0.1", attempts["port"]), timeout=2
        ).close(),
        "it exceeds the memory limit": lambda: bytearray(attempts["memory_bytes"]) and None,
        "it inherits an environment": lambda: _refuse_unless({*os.environ} - {"LC_CTYPE"}),
        "it exceeds the process limit": lambda: _fork(attempts["processes"]),
    }.items():
        try:
            attempt()
        except (OSError, MemoryError):
            continue
        possible.append(escape)
    if possible:
        raise SystemExit(", ".join(possible))


def _refuse_unless(names: set) -> None:
    """Raise an error if there are no environment variables except Python's own."""
    if not names:
        raise OSError


def _fork(number: int) -> None:
    ended, started = os.pipe()
    try:
        for _ in range(number):
            if os.fork() == 0:
                os.close(started)
                os.read(ended, 1)  # blocks until the parent ends
                os._exit(0)
    finally:
        os.close(started)
