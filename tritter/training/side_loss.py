"""What a training adds to the loss of its task, read from the task's own forward pass."""

from collections.abc import Mapping

from lightning import Callback
from torch import Tensor, nn


class SideLoss:
    """Base of all of them; the LightningModule holds them as a list.

    Args:
        forward_options: what the model is called with besides, in the forward pass of the task.
        flops: model FLOPs that it took before the first step.
    """

    forward_options: Mapping[str, bool] = {}
    flops = 0.0

    def loss(
        self, model: nn.Module, batch: Mapping[str, Tensor], *, step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return what is added to the loss, and its terms by the names of their metrics.

        Args:
            batch: what the task's forward pass was of, which lies right behind.
            step: optimizer steps of this training so far.
        """
        raise NotImplementedError

    def step_flops(self, model: nn.Module) -> float:
        """Count the FLOPs of a step besides those of the task, of all processes together."""
        return 0.0

    def callbacks(self) -> tuple[Callback, ...]:
        """Return what drives it."""
        return ()
