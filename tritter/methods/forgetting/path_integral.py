"""The path of a base model's pretraining, recorded for synaptic intelligence (arXiv 1703.04200).

It can't be computed afterwards. It is therefore recorded while a base is pretrained for a run whose
methods need it, and saved with the base: ω, the contribution of each weight to the fall of the
loss, and Δ, its displacement. Cost: four copies of the weights and a few passes over them per step.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from tritter.checkpoints.state import write_state
from tritter.methods.forgetting.si import WeightPath
from tritter.storage.atomic import atomic_folder
from tritter.storage.writer import TensorStream
from tritter.training.module import base_of
from tritter.transform import Change


class PathIntegral(Callback):
    """Record ω and Δ of a training run and save them in a folder, as its `state/`.

    It runs before all methods, so that it reads the unclipped gradients of the task alone.

    Args:
        folder: where `state/` is written at the end of training; replaced as a whole.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = WeightPath(start={})

    @property
    def path_integral(self) -> Mapping[str, Tensor]:
        """The running ω, by parameter name."""
        return self._path.path_integral

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._path.add_parameters(base_of(pl_module).model)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Any
    ) -> None:
        self._path.before_step(base_of(pl_module).model)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._path.after_step(base_of(pl_module).model)

    def parameters_changed(self, change: Change) -> None:
        """Map ω and the starting weights through a change of the live model."""
        self._path.parameters_changed(change, start=change.state("anchor", self._path.start))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            recorded = self._path.recorded(base_of(pl_module).model)
            kinds = {
                kind: TensorStream.of((name, value.cpu()) for name, value in values.items())
                for kind, values in recorded.items()
            }
            with atomic_folder(self._folder, overwrite=True) as temporary:
                write_state(temporary, kinds, step=trainer.global_step)

    def state_dict(self) -> dict[str, Any]:
        return {"path_integral": self._path.path_integral, "start": self._path.start}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        start = dict(state_dict["start"])
        self._path = WeightPath(start=start, path_integral=state_dict["path_integral"])
