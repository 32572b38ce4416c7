"""A fit in several processes (DDP), and what of it comes back to the one that started them.

Only the fit runs in them: each computes its rows of every batch, all hold the same weights. Rank 0
writes what is trained; to the one that started it come a record of what was done, and failures,
as data.
"""

import logging
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning import Trainer
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.strategies.launchers.multiprocessing import (
    _MultiProcessingLauncher,
    _WorkerOutput,
)
from torch.multiprocessing import get_sharing_strategy, set_sharing_strategy
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

from tritter.errors import Problem, RequestError, TritterError
from tritter.training.result import Conclusion

_PORT = "MASTER_PORT"


class WorkerStrategy(DDPStrategy):
    """DDP whose processes are started by, and die with, the one that calls fit."""

    def __init__(self, accelerator: str) -> None:
        self.method = start_method(accelerator)
        # Named, so that a cluster's variables can't make the stages around the fit run twice
        environment = LightningEnvironment()
        super().__init__(cluster_environment=environment, start_method=self.method)

    def setup_environment(self) -> None:
        begin_worker(self.method)
        super().setup_environment()

    def _configure_launcher(self) -> None:
        self._launcher = WorkerLauncher(self, start_method=self.method)


def begin_worker(method: str) -> None:
    """Make ready a process that was started for a fit, before it meets the others."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    _end_with_parent()
    if method == "fork":
        # A fork inherits OpenMP's pool without its threads, and waits for them forever
        torch.set_num_threads(1)


def start_method(accelerator: str) -> Literal["fork", "spawn"]:
    """Return `fork` where it is safe, which is quicker: on Linux without a GPU; else `spawn`."""
    is_safe = sys.platform == "linux" and not torch.cuda.is_available()
    return "fork" if accelerator == "cpu" and is_safe else "spawn"


@dataclass(frozen=True, slots=True)
class _Failure:
    """An error of a process as data, for the process that started it.

    Args:
        kind: name of its class, of ours or OSError.
        key: what of the request it speaks of; empty where it does not say so.
        text: what it says.
    """

    kind: str
    key: str
    text: str

    @classmethod
    def of(cls, error: TritterError | OSError) -> "_Failure":
        kinds = (kind.__name__ for kind in type(error).__mro__ if kind in _KINDS)
        key = error.problems[0].key if isinstance(error, RequestError) else ""
        return cls(next(kinds), key, str(error))

    def error(self) -> TritterError:
        if self.kind == OSError.__name__:
            return TritterError(f"the training was refused by the system: {self.text}.")
        if self.kind == RequestError.__name__:
            return RequestError(self.text, problems=[Problem(self.key, reason=self.text)])
        return TritterError(self.text)


_KINDS = (RequestError, TritterError, OSError)


class WorkerLauncher(_MultiProcessingLauncher):
    """Starts the processes; brings back what was concluded and what failed, and no weights.

    Lightning would load the weights into the module of the process that started the others, where
    a new parameter is dropped in silence and a grown one does not fit.
    """

    def launch(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        self._failures = multiprocessing.get_context(self._start_method).SimpleQueue()
        try:
            return super().launch(function, *args, **options)
        except (ProcessRaisedException, ProcessExitedException) as error:
            if self._failures.empty():
                raise
            raise self._failures.get().error() from error

    def _wrapping_function(self, process_idx: int, *args: Any) -> None:
        try:
            super()._wrapping_function(process_idx, *args)
        except (TritterError, OSError) as error:
            self._failures.put(_Failure.of(error))
            raise

    def _collect_rank_zero_results(self, trainer: Trainer, results: Any) -> _WorkerOutput | None:
        if not trainer.is_global_zero:
            return None
        best = getattr(trainer.checkpoint_callback, "best_model_path", None)
        return _WorkerOutput(best, None, trainer.state, results, self.get_extra_results(trainer))

    def get_extra_results(self, trainer: Trainer) -> dict[str, Any]:
        extra = super().get_extra_results(trainer)
        return {**extra, "conclusion": _conclusion(trainer).given()}

    def update_main_process_results(self, trainer: Trainer, extra: dict[str, Any]) -> None:
        super().update_main_process_results(trainer, extra)
        _conclusion(trainer).take(extra["conclusion"])


def _conclusion(trainer: Trainer) -> Conclusion:
    return next(one for one in trainer.callbacks if isinstance(one, Conclusion))  # type: ignore[attr-defined]


@contextmanager
def worker_processes() -> Iterator[None]:
    """Let processes be started within, and tell their ends in our words.

    Raises:
        TritterError: a process was killed.
    """
    port, sharing = os.environ.get(_PORT), get_sharing_strategy()
    set_sharing_strategy("file_system")  # the other one spends an open file on every tensor
    try:
        yield
    except ProcessExitedException as error:
        raise TritterError(
            f"training process {error.error_index} ended unexpectedly ({error.signal_name or error}"
            "); the same command goes on from the last saved state."
        ) from error
    finally:
        set_sharing_strategy(sharing)
        os.environ.pop(_PORT, None)  # the next fit looks for a free one
        if port is not None:
            os.environ[_PORT] = port


def _end_with_parent() -> None:
    """End this process at once when its parent has ended, however that came about.

    Torch sends an interrupt, which a process that was started in the background ignores: it would
    go on, and write into a folder in which the run has been started again.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    sentinel = parent.sentinel

    def watch() -> None:
        multiprocessing.connection.wait([sentinel])
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
