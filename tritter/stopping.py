"""Ctrl-C and SIGTERM as one exception, so that what was begun is cleared away before the end."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(BaseException):
    """Somebody wants this process to end.

    No KeyboardInterrupt: typer and Lightning catch that one and say nothing.

    Args:
        signal_number: SIGINT for Ctrl-C, SIGTERM as schedulers send it, SIGPIPE when nobody reads
            what is printed.
        where: what was being done, and where it goes on: "at step 3 of …"; None: nothing that
            would go on.

    Attributes:
        advice: lines that say how to go on.
    """

    def __init__(self, signal_number: int, *, where: str | None = None) -> None:
        super().__init__(signal.Signals(signal_number).name)
        self.signal_number = signal_number
        self.where = where
        self.advice: tuple[str, ...] = ()

    @property
    def exit_code(self) -> int:
        """130 after Ctrl-C, 143 after SIGTERM, 141 when nobody reads on, as a shell has it."""
        return 128 + self.signal_number


@contextmanager
def stopping() -> Iterator[None]:
    """Let the first Ctrl-C or SIGTERM inside raise, and no further one disturb the clearing up.

    What the process ignores from its start on (`nohup`, a job in the background) it goes on
    ignoring. Handlers belong to the main thread; in another one this does nothing.

    Raises:
        Stopped: a signal came.
    """
    process, is_stopped = os.getpid(), False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal is_stopped
        if os.getpid() != process:  # a worker that was forked inside
            raise SystemExit(128 + number)
        if not is_stopped:
            is_stopped = True
            raise Stopped(number)

    before = {}
    if threading.current_thread() is threading.main_thread():
        handlers = {number: signal.getsignal(number) for number in _SIGNALS}
        before = {n: handler for n, handler in handlers.items() if handler != signal.SIG_IGN}
    try:
        for number in before:
            signal.signal(number, stop)
        yield
    except KeyboardInterrupt as error:
        raise Stopped(signal.SIGINT) from error
    finally:
        for number, handler in before.items():
            # None stands for a handler that was not set from Python, and can't be set from here
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
