"""Processes that torchrun or srun starts: the first runs everything, the others join its fits.

A run has one writer, as without a launcher. For each fit, the first process sends the module, its
callbacks and its data to the others, as Lightning sends them to processes that it starts itself.
"""

import itertools
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from tritter.errors import TritterError
from tritter.launched import Launch
from tritter.targets import silence_logging
from tritter.terminal import say

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

_FOREVER = timedelta(days=365)  # expanding and scoring may take hours
_TO_JOIN = timedelta(minutes=10)
_TO_LEAVE = timedelta(seconds=60)
_TO_FAIL = timedelta(seconds=30)
_FIT, _END = "fit", "end"


class Ranks:
    """The channel between the processes of a launch.

    Args:
        launch: Place of this process.
    """

    def __init__(self, launch: Launch) -> None:
        self.launch = launch
        self._store = _join(launch)
        self._numbers = itertools.count()

    @classmethod
    def leading(cls) -> "Ranks | None":
        """Return the channel to the processes that join the fits of this one, if there are any."""
        return _leading.get()

    @contextmanager
    def lead(self) -> Iterator[None]:
        """Lead the other processes in the fits inside the block, and end them after it."""
        token = _leading.set(self)
        try:
            yield
        finally:
            _leading.reset(token)
            self._announce(_END)
            others = [f"left {rank}" for rank in range(1, self.launch.count)]
            with suppress(RuntimeError):  # one of them has been killed
                self._store.wait(others, _TO_LEAVE)

    def call(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Call a function of a Trainer in all processes, and return the result of this one."""
        from lightning.pytorch.strategies.launchers.multiprocessing import _GlobalStateSnapshot
        from torch import distributed

        with self._group(self._announce(_FIT)):
            states = _GlobalStateSnapshot.capture()
            distributed.broadcast_object_list([(function, args, options, states)])
            return function(*args, **options)

    def serve(self) -> int:
        """Join the fits of the first process until it ends; return the exit code."""
        from torch import distributed

        for ignored in (signal.SIGINT, signal.SIGTERM):  # the first process decides
            signal.signal(ignored, signal.SIG_IGN)
        exit_code = 0
        for number in self._numbers:
            self._store.wait([f"task {number}"], _FOREVER)
            if self._store.get(f"task {number}").decode() == _END:
                break
            try:
                with self._group(number):
                    received: list[Any] = [None]
                    with silence_logging():  # of libraries that this imports
                        distributed.broadcast_object_list(received)
                    function, args, options, states = received.pop()
                    states.restore()
                    function(*args, **options)
            except BaseException:
                place = f"process {self.launch.rank} of {self.launch.count}"
                say(f"{place}: {traceback.format_exc()}", is_error=True)
                exit_code = 1
                self._wait_or_exit(number + 1)
        self._store.set(f"left {self.launch.rank}", "")
        return exit_code

    def _wait_or_exit(self, number: int) -> None:
        """Let the first process report an error that both have; end this one if only it has.

        The first process then waits for this one, and its connection has to close.
        """
        try:
            self._store.wait([f"task {number}"], _TO_FAIL)
        except RuntimeError:
            sys.stderr.flush()
            os._exit(1)

    def _announce(self, task: str) -> int:
        number = next(self._numbers)
        self._store.set(f"task {number}", task)
        return number

    @contextmanager
    def _group(self, number: int) -> Iterator[None]:
        """Form the process group of one fit, so that this process is alone outside of fits."""
        from torch import distributed
        from torch.distributed.distributed_c10d import PrefixStore

        distributed.init_process_group(
            store=PrefixStore(f"fit {number}", self._store),
            rank=self.launch.rank,
            world_size=self.launch.count,
        )
        try:
            yield
        finally:
            distributed.destroy_process_group()
            if self.launch.program == "torchrun":
                os.environ["WORLD_SIZE"] = str(self.launch.count)  # which Lightning removes


def _join(launch: Launch) -> "Store":
    """Return the store of all processes once they have joined."""
    from torch.distributed.rendezvous import rendezvous

    if launch.program == "srun":
        _set_slurm_variables(launch)
    try:
        store, _, _ = next(rendezvous("env://", launch.rank, launch.count, timeout=_TO_JOIN))
    except RuntimeError as error:
        raise TritterError(
            f"{launch.program} started {launch.count} processes, but they did not join: {error}"
        ) from error
    return store


_leading: ContextVar[Ranks | None] = ContextVar("leading", default=None)


def _set_slurm_variables(launch: Launch) -> None:
    """Set the variables of torchrun, which Lightning's environment without a cluster reads."""
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

    nodes = os.environ["SLURM_STEP_NODELIST"]
    port = 15_000 + int(os.environ.get("SLURM_JOB_ID", "0")[-4:])
    os.environ.setdefault("MASTER_ADDR", SLURMEnvironment.resolve_root_node_address(nodes))
    os.environ.setdefault("MASTER_PORT", str(port))
    os.environ["LOCAL_RANK"] = str(launch.local_rank)
    os.environ["NODE_RANK"] = str(launch.rank // launch.local_count)
