"""A result writer for tests: written by the training process, read by the test."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from tritter.core.stock_routers import RouterControl
from tritter.training import FitResult
from tritter.training.checkpoint_io import SafetensorsCheckpointIO


@dataclass(frozen=True)
class Written:
    """Writes a model's tensors, and the additional state of its routers, into a folder."""

    path: Path

    def __call__(self, model: nn.Module, result: FitResult) -> None:
        routing = RouterControl.attached(model)
        content = {
            "model": dict(model.state_dict()),
            "routing": None if routing is None else routing.state_dict(),
        }
        SafetensorsCheckpointIO().save_checkpoint(content, self.path)

    def read(self) -> dict[str, Any]:
        return SafetensorsCheckpointIO().load_checkpoint(self.path)

    def read_into(self, model: nn.Module) -> None:
        """Give a model what was written."""
        content = self.read()
        model.load_state_dict(content["model"])
        if content["routing"] is not None:
            routing = RouterControl.of(model)
            assert routing is not None
            routing.load_state_dict(content["routing"])
