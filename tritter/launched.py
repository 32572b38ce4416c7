"""The processes that torchrun or srun started, from their environment variables."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


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


def launch_of(environ: Mapping[str, str] = os.environ) -> Launch | None:
    """Return the place of this process; None if no launcher started several processes."""
    if "TORCHELASTIC_RUN_ID" in environ:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        found = Launch("torchrun", *(int(environ[name]) for name in names))
    elif "SLURM_STEP_ID" in environ and "SLURM_NTASKS" in environ:
        names = ("SLURM_NODEID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NNODES")
        node, count, local_rank, num_nodes = (int(environ.get(name, "1")) for name in names)
        local_count = count // num_nodes
        found = Launch("srun", node * local_count + local_rank, count, local_rank, local_count)
    else:
        return None
    return found if found.count > 1 else None
