"""The path integral of synaptic intelligence (Zenke et al. 2017, arXiv 1703.04200), recorded.

ω = Σ −g·Δθ over the steps of a training: how much of the fall of the loss each weight did. It
needs the path, so it is recorded while a base is trained for a run whose methods ask for it, which
costs two copies of the weights and one pass over them per step, and is kept beside the base.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn

from tritter.checkpoint.state import write_state
from tritter.expand import Change
from tritter.storage.atomic import atomic_folder
from tritter.storage.writer import TensorStream
from tritter.training.module import base_of


def add_to_path(
    path_integral: dict[str, Tensor], model: nn.Module, before: Mapping[str, tuple[Tensor, Tensor]]
) -> None:
    """Add one step's −g·Δθ in place.

    Args:
        path_integral: parameter name → ω so far, float32.
        before: parameter name → (gradient, weights) from before the step. An entry that did not
            move adds nothing, whatever its gradient was.
    """
    for name, parameter in model.named_parameters():
        if name in before:
            gradient, old = before[name]
            step = parameter.detach() - old
            path_integral[name] += torch.where(step != 0, -gradient * step, 0.0).float()


class PathIntegral(Callback):
    """Record ω of a training and leave it in a folder, as `state/path_integral`.

    Stands before all methods, so that it reads the gradients of the task alone, unclipped.

    Args:
        folder: where `state/` is written when the training ends; replaced whole.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._before: dict[str, tuple[Tensor, Tensor]] = {}
        self._restored: Mapping[str, Tensor] | None = None
        self.path_integral: dict[str, Tensor] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        restored = self._restored or {}
        for name, parameter in base_of(pl_module).model.named_parameters():
            start = restored.get(name, torch.zeros_like(parameter, dtype=torch.float32))
            self.path_integral[name] = start.to(parameter.device)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Any
    ) -> None:
        self._before = {
            name: (p.grad.detach().clone(), p.detach().clone())
            for name, p in base_of(pl_module).model.named_parameters()
            if p.grad is not None
        }

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        add_to_path(self.path_integral, base_of(pl_module).model, self._before)
        self._before = {}

    def parameters_changed(self, change: Change) -> None:
        """Follow a change of the live model; what is new has done nothing yet."""
        followed = change.state("path_integral", self.path_integral)
        device = next(iter(self.path_integral.values())).device
        new = {s.name: torch.zeros(s.shape) for s in change.after if s.name not in followed}
        self.path_integral = {name: value.to(device) for name, value in (followed | new).items()}
        self._before = {}

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            stream = TensorStream.of((n, v.cpu()) for n, v in self.path_integral.items())
            with atomic_folder(self._folder, overwrite=True) as temporary:
                write_state(temporary, {"path_integral": stream}, step=trainer.global_step)

    def state_dict(self) -> dict[str, Any]:
        return dict(self.path_integral)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict
