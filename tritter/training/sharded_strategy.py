"""A fit whose weights, gradients and moments lie in parts on several processes.

What is saved and what is written are whole tensors, the same as of one process.
"""

from pathlib import Path
from typing import Any

from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from tritter.training.processes import WorkerLauncher, begin_worker, start_method
from tritter.training.sharded import WHOLE


class ShardedStrategy(ModelParallelStrategy):
    """FSDP2 whose processes are started by, and die with, the one that calls fit.

    Rank 0 writes states of whole tensors; every rank reads them when the training goes on.

    Args:
        devices: how many processes share the weights.
    """

    def __init__(self, accelerator: str, *, devices: int) -> None:
        self.method = start_method(accelerator)
        super().__init__(
            data_parallel_size=devices, tensor_parallel_size=1, save_distributed_checkpoint=False
        )
        self.cluster_environment = LightningEnvironment()

    def setup_environment(self) -> None:
        begin_worker(self.method)
        super().setup_environment()

    def _configure_launcher(self) -> None:
        self._launcher = WorkerLauncher(self, start_method=self.method)

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """Return the state by names of parameters, whole; on other ranks than 0 nothing."""
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer._optimizer
        assert self.model is not None
        return get_optimizer_state_dict(self.model, optimizer, options=WHOLE)

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None
    ) -> None:
        if self.is_global_zero:
            self.checkpoint_io.save_checkpoint(checkpoint, filepath)

    def load_checkpoint(
        self, checkpoint_path: Any, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a state, and take each process's part of weights and moments from it."""
        checkpoint = self.checkpoint_io.load_checkpoint(Path(checkpoint_path))
        assert self.model is not None
        # What torch reads of them it takes out
        set_model_state_dict(self.model, dict(checkpoint["state_dict"]), options=WHOLE)
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            set_optimizer_state_dict(self.model, optimizer, dict(state), options=WHOLE)
        return checkpoint
