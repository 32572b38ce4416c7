"""The end of a step, after all other callbacks: save, and see whether the training ends there."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from tritter.stopping import Stopped
from tritter.training.callbacks import FiniteGuard
from tritter.training.work import ends_step

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


class SaveState(Checkpoint):
    """Save what the training needs to go on, every so many steps and when it is to end early.

    Stands last among the callbacks, behind all that write checkpoints, so that it sees what the
    others did in the step, and in its evaluation if there is one. A training ends where
    a step does: whoever asks for it between two batches of a step is heard at its end. Of several
    processes all end at the same step.

    Args:
        path: of the checkpoint folder, which is replaced whole.
        every_n_steps: 0 saves only when the training is to end early.
        stop: whether it is asked to stop, to go on later.
        guard: whether it is broken off.

    Attributes:
        ended_early: which callback ended the training before its last step, and why. One that is
            resumed after that does not train on.
    """

    def __init__(
        self, path: Path, *, every_n_steps: int, stop: StopRequest, guard: FiniteGuard
    ) -> None:
        self._path = path
        self._every_n_steps = every_n_steps
        self._stop = stop
        self._guard = guard
        self._is_to_end = False
        self.has_trained = False
        self.ended_early: str | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop.listen()
        if self.ended_early is not None:
            trainer.should_stop = True
        for callback in trainer.checkpoint_callbacks:
            if hasattr(callback, "_last_global_step_saved"):
                # Else it would save the step it is resumed from again, in the midst of the next
                callback._last_global_step_saved = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.has_trained = True
        self._is_to_end |= trainer.should_stop
        trainer.should_stop = False
        if not ends_step(trainer, batch_idx):
            return
        agree = trainer.strategy.reduce_boolean_decision
        trainer.should_stop = agree(self._is_to_end or self._stop.is_asked, all=False)
        is_stopped = trainer.should_stop and agree(self._stop.is_asked, all=False)
        if is_stopped:
            self._stop.note(signal.SIGTERM)  # another process was asked
        every = self._every_n_steps
        is_due = is_stopped or bool(every and trainer.global_step % every == 0)
        is_ours = self._stop.is_asked or self._guard.stopped_because is not None
        if trainer.should_stop and not is_ours and trainer.global_step < trainer.max_steps:
            self.ended_early = _who_ended(trainer)
        if is_due or self.ended_early is not None:
            trainer.save_checkpoint(self._path, weights_only=False)

    def state_dict(self) -> dict[str, Any]:
        return {"ended_early": self.ended_early}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.ended_early = state_dict["ended_early"]


class EndOfTraining(Callback):
    """Let callbacks end a training that is resumed from its last step, which Lightning passes over.

    Stands first, so that what they leave then is there for those that write it when the fit ends.
    """

    def __init__(self) -> None:
        self._has_ended = False

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._has_ended = True

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._has_ended:
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                callback.on_train_end(trainer, pl_module)


def _who_ended(trainer: Trainer) -> str:
    """Return which callback asked the training to stop, and why, as far as it says."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        reason = getattr(callback, "stopping_reason_message", None)
        if reason:
            said = reason.removesuffix(" Signaling Trainer to stop.")
            return f"{type(callback).__name__}: {said}"
    return "a callback asked the training to stop"
