"""The processes that torchrun or srun started, from their environment variables."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from tritter.errors import RequestError

_OF_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_OF_STEP = ("SLURM_NODEID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NUM_NODES")
_SHELLS = ("bash", "interactive")  # job names of shells that srun started, as in Lightning


@dataclass(frozen=True, slots=True)
class Launch:
    """Place of this process among those that a launcher started.

    Args:
        program: The launcher.
        rank: Index of this process.
        count: Number of processes.
        local_rank: Index of this process on its machine.
        local_count: Number of processes on each machine.
    """

    program: Literal["torchrun", "srun"]
    rank: int
    count: int
    local_rank: int
    local_count: int

    @property
    def num_nodes(self) -> int:
        """Number of machines."""
        return self.count // self.local_count

    @classmethod
    def of(cls, environ: Mapping[str, str] = os.environ) -> "Launch | None":
        """Return the place of this process; None if no launcher started several processes."""
        if "TORCHELASTIC_RUN_ID" in environ:
            found = cls("torchrun", *(int(environ[name]) for name in _OF_TORCHRUN))
        elif environ.get("SLURM_JOB_NAME") in _SHELLS or any(n not in environ for n in _OF_STEP):
            return None
        else:
            node, local_rank, count, num_nodes = (int(environ[name]) for name in _OF_STEP)
            if count % num_nodes:
                raise RequestError(
                    f"srun started {count} processes on {num_nodes} machines; each machine must "
                    "have the same number (--ntasks-per-node)."
                )
            local_count = count // num_nodes
            found = cls("srun", node * local_count + local_rank, count, local_rank, local_count)
        return found if found.count > 1 else None
