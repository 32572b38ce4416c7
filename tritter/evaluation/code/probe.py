"""A program that tries to leave its sandbox; run inside it, as text, before anything else is.

It fails, with a line that says what was possible, unless everything was held.
"""

import os
import socket
from pathlib import Path


def try_all(attempts: dict) -> None:
    """Try everything.

    Args:
        attempts: the `folder` outside that everybody may read and write, the `home`, the `port`
            on which somebody listens, and how much memory and how many processes are too many.
    """
    possible = []
    secret = Path(attempts["folder"], "secret")
    for what, attempt in {
        "it reads files outside": lambda: secret.read_text(),
        "it writes files outside": lambda: secret.with_name("new").touch(),
        "it writes the libraries": lambda: Path(f"{os.__file__}.new").touch(),
        "it reaches the network": lambda: socket.create_connection(
            ("127.0.0.1", attempts["port"]), timeout=2
        ).close(),
        "it gets more memory than it may": lambda: bytearray(attempts["memory_bytes"]) and None,
        "it inherited an environment": lambda: _refuse_unless({*os.environ} - {"LC_CTYPE"}),
        "it starts as many processes as it likes": lambda: _fork(attempts["processes"]),
    }.items():
        try:
            attempt()
        except (OSError, MemoryError):
            continue
        possible.append(what)
    if possible:
        raise SystemExit(", ".join(possible))


def _refuse_unless(names: set) -> None:
    """Fail where there is no variable but the one that Python itself sets."""
    if not names:
        raise OSError


def _fork(number: int) -> None:
    ended, started = os.pipe()
    try:
        for _ in range(number):
            if os.fork() == 0:
                os.close(started)
                os.read(ended, 1)  # stays until the first one is gone
                os._exit(0)
    finally:
        os.close(started)
