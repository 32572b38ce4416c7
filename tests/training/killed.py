"""A training that is killed in the middle of a step, after its batch was drawn."""

import os
import signal

from lightning import Callback


class Killed(Exception):
    pass


class KillAt(Callback):
    """End all ranks by an exception, or one by a signal."""

    def __init__(self, step: int, *, signal_to_rank: int | None = None) -> None:
        self.step, self.signal_to_rank = step, signal_to_rank

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:  # type: ignore[no-untyped-def]
        if trainer.global_step != self.step:
            return
        if self.signal_to_rank is None:
            raise Killed("killed")
        if trainer.global_rank == self.signal_to_rank:
            os.kill(os.getpid(), signal.SIGKILL)
