"""A fit in several processes (DDP), and what of it comes back to the one that started them.

Only the fit runs in them: each computes its rows of every batch, all hold the same weights. The
weights come back through the checkpoint io, what callbacks counted through a folder that rank 0
writes when the fit ends.
"""

import logging
import multiprocessing
import multiprocessing.connection
import os
import re
import shutil
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy
from torch.multiprocessing import get_sharing_strategy, set_sharing_strategy
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

from tritter.errors import RequestError, TritterError
from tritter.training.checkpoint_io import SafetensorsCheckpointIO
from tritter.training.stop_request import StopRequest

_PORT = "MASTER_PORT"


class WorkerStrategy(DDPStrategy):
    """DDP whose processes are started by, and die with, the one that calls fit."""

    def __init__(self, accelerator: str) -> None:
        self.method = start_method(accelerator)
        # Named, so that a cluster's variables can't make the stages around the fit run twice
        environment = LightningEnvironment()
        super().__init__(cluster_environment=environment, start_method=self.method)

    def setup_environment(self) -> None:
        for name in ("lightning.pytorch", "lightning.fabric"):
            logging.getLogger(name).setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", module="lightning")
        _end_with_parent()
        if self.method == "fork":
            # A fork inherits OpenMP's pool without its threads, and waits for them forever
            torch.set_num_threads(1)
        super().setup_environment()


def start_method(accelerator: str) -> Literal["fork", "spawn"]:
    """Return `fork` where it is safe, which is quicker: on Linux without a GPU; else `spawn`."""
    is_safe = sys.platform == "linux" and not torch.cuda.is_available()
    return "fork" if accelerator == "cpu" and is_safe else "spawn"


class WorkerCheckpointIO(SafetensorsCheckpointIO):
    """The same, for a fit whose trained weights Lightning hands over in a temporary folder."""

    def remove_checkpoint(self, path: Any) -> None:
        super().remove_checkpoint(path)
        with suppress(OSError):
            Path(path).parent.rmdir()  # which Lightning makes and forgets


class Returned(Callback):
    """Let rank 0 write what callbacks hold at the end of a fit, for the process that started it.

    Args:
        path: of the folder, which `take` removes.
        callbacks: name → callback; its `state_dict` has to hold all that is asked of it.
        stop: what the processes were asked; they may be so without the one that started them.
    """

    def __init__(self, path: Path, callbacks: Mapping[str, Callback], stop: StopRequest) -> None:
        self._path = path
        self._callbacks = dict(callbacks)
        self._stop = stop

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            content: dict[str, Any] = {
                "steps": trainer.global_step,
                "stopped_by": self._stop.signal_number,
                "callbacks": {name: one.state_dict() for name, one in self._callbacks.items()},
            }
            SafetensorsCheckpointIO().save_checkpoint(content, self._path)

    def take(self) -> int:
        """Give the callbacks of this process what they hold in rank 0; return the steps."""
        content = SafetensorsCheckpointIO().load_checkpoint(self._path)
        shutil.rmtree(self._path)
        for name, callback in self._callbacks.items():
            callback.load_state_dict(content["callbacks"][name])
        if content["stopped_by"] is not None:
            self._stop.note(content["stopped_by"])
        return int(content["steps"])


@contextmanager
def worker_processes() -> Iterator[None]:
    """Let processes be started within, and tell their ends in our words.

    Raises:
        TritterError: a process raised one, or was killed.
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
    except ProcessRaisedException as error:
        raise _own_error(str(error)) or error from error
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


def _own_error(trace: str) -> TritterError | None:
    """Return the error of ours that a process ended with; None if it was another's."""
    found = re.search(r"^tritter\.errors\.(\w+): (.*)\Z", trace, flags=re.MULTILINE | re.DOTALL)
    if found is None:
        return None
    kind = RequestError if found[1] == RequestError.__name__ else TritterError
    return kind(found[2].strip())
