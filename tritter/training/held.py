"""The bytes that a training really holds, and the sizes of what is trained, which say the same."""

from collections import Counter
from collections.abc import Iterable
from math import prod
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from tritter.training.module import base_of
from tritter.training.parameters import live_layout
from tritter.training.sharded import own_part
from tritter.training.work import ends_step


class HeldBytes(Callback):
    """Add up parameters, gradients and the optimizer's state, where they lie.

    At the end of the first step, and of each after which something else is trained.

    Attributes:
        held: in bytes `parameters`, `gradients`, `optimizer`, and of a GPU the `peak`, activations
            included; in `trained` pairs of a parameter's size and how many have it, by the shapes
            that the family says. Empty before the first step.
    """

    def __init__(self) -> None:
        self._trained: tuple[bool, ...] = ()
        self.held: dict[str, Any] = {}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        model = base_of(pl_module).model
        parameters = list(model.parameters())
        trained = tuple(parameter.requires_grad for parameter in parameters)
        if trained == self._trained or not ends_step(trainer, batch_idx):
            return
        gradients = [each.grad for each in parameters if each.grad is not None]
        if not gradients:
            return  # the step was refused
        self._trained = trained
        (optimizer,) = trainer.optimizers
        states = (value for state in optimizer.state.values() for value in state.values())
        shapes = {stored.name: stored.shape for stored in live_layout(model)}
        named = model.named_parameters()
        sizes = (prod(shapes.get(name, each.shape)) for name, each in named if each.requires_grad)
        self.held = {
            "parameters": _bytes(parameters),
            "gradients": _bytes(gradients),
            "optimizer": _bytes(value for value in states if isinstance(value, Tensor)),
            "trained": sorted(map(list, Counter(sizes).items())),
        }

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.held and pl_module.device.type == "cuda":
            self.held["peak"] = torch.cuda.max_memory_allocated()

    def state_dict(self) -> dict[str, Any]:
        return {"held": self.held}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.held = dict(state_dict["held"])

    def parameters_changed(self, change: object) -> None:
        """Add up the next step anew."""
        self._trained = ()


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of tensors, each storage once, in all processes that share them."""
    by_place = {(own_part(t).data_ptr(), t.numel()): t.numel() * t.element_size() for t in tensors}
    return sum(by_place.values())
