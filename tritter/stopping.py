"""Ctrl-C and SIGTERM as one exception, so that unfinished output is removed before the exit."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(BaseException):
    """A signal requested the end of the process.

    This is not a KeyboardInterrupt, which typer and Lightning catch silently.

    Args:
        signal_number: SIGINT for Ctrl-C, SIGTERM as sent by schedulers, SIGPIPE if the reader of
            the output is closed.
        location: the progress at which a resumed command continues ("at step 3 of …"); None if
            there is nothing to resume.

    Attributes:
        advice: lines that explain how to resume.
    """

    def __init__(self, signal_number: int, *, location: str | None = None) -> None:
        super().__init__(signal.Signals(signal_number).name)
        self.signal_number = signal_number
        self.location = location
        self.advice: tuple[str, ...] = ()

    @property
    def exit_code(self) -> int:
        """130 after Ctrl-C, 143 after SIGTERM, 141 after SIGPIPE, as in a shell."""
        return 128 + self.signal_number


@contextmanager
def stopping() -> Iterator[None]:
    """Raise on the first Ctrl-C or SIGTERM inside; ignore further ones during the cleanup.

    Signals that the process already ignores (`nohup`, a background job) stay ignored. Handlers
    belong to the main thread; in other threads this does nothing.
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
            # None: the handler was not set from Python, so Python can't restore it
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
