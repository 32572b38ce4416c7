"""A training that is asked to stop: it ends its step, saves what it goes on from, and is done."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from tritter.stopping import Stopped

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_SECONDS_TO_DIE = 10.0


class StopRequest:
    """Whether Ctrl-C or SIGTERM asked this training to stop.

    The first signal is noted and passed on to worker processes, the second ends the training at
    once. Workers only take note: who started them decides.
    """

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self._process = os.getpid()

    @property
    def is_asked(self) -> bool:
        return self.signal_number is not None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take signals inside.

        Raises:
            Stopped: a second signal came.
        """
        is_main = threading.current_thread() is threading.main_thread()
        before = {number: signal.getsignal(number) for number in _SIGNALS if is_main}
        try:
            self.listen()
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def listen(self) -> None:
        """Take signals from now on; Lightning sets handlers of its own when a fit begins."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in _SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._take)

    def note(self, number: int) -> None:
        """Take note of a signal; the first one counts."""
        if self.signal_number is None:
            self.signal_number = number

    def _take(self, number: int, frame: FrameType | None) -> None:
        is_worker = os.getpid() != self._process
        if is_worker or not self.is_asked:
            self.note(number)
            if not is_worker:
                for worker in multiprocessing.active_children():
                    worker.terminate()  # which it takes as this process took its signal
            return
        workers = multiprocessing.active_children()
        for worker in workers:
            worker.kill()
        for worker in workers:  # none of them writes any more when this one says it is over
            worker.join(_SECONDS_TO_DIE)
        raise Stopped(number)
