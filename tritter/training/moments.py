"""Adam's moments from one training to the next: taken up where it starts, left where it ends.

They lie in the `state/` of a checkpoint by name on disk, each parameter with the number of steps
behind it, which corrects the bias of both moments. What has none begins anew, with a step count of
its own; what is frozen has none and leaves none.
"""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn

from tritter.checkpoint.state import State, write_state
from tritter.errors import TritterError
from tritter.parameter_map.carry import MOMENTS
from tritter.storage.atomic import atomic_folder
from tritter.storage.tensors import is_finite
from tritter.storage.writer import TensorStream
from tritter.training.parameters import live_layout
from tritter.training.transplant import Moments, moments_by_name, packed_moments


def moments_of(state: State, model: nn.Module) -> dict[str, Moments]:
    """Return the moments of a model's trainable parameters, by parameter name; few may have some.

    Raises:
        TritterError: a moment has another shape than its parameter, or is not finite.
    """
    if not state.kinds.keys() >= set(MOMENTS):
        return {}
    first, second = (state.kinds[kind].files for kind in MOMENTS)
    both, found = first.keys() & second.keys(), {}
    for stored in live_layout(model):
        parameter = model.get_parameter(stored.name)
        if not parameter.requires_grad:
            continue
        held = [part for part in stored.parts if part.tensor.disk_name in both]
        by_name = {
            part.tensor.name: {
                kind: _moment(state, kind, part.tensor.disk_name, parameter[part.index].shape)
                for kind in MOMENTS
            }
            | {"step": torch.tensor(float(state.step_of(part.tensor.disk_name)))}
            for part in held
        }
        if by_name:
            found[stored.name] = packed_moments(stored, by_name)
    return found


def _moment(state: State, kind: str, name: str, shape: torch.Size) -> Tensor:
    tensors = state.kinds[kind]
    if tensors.shape(name) != tuple(shape):
        raise TritterError(
            f"{tensors.folder}: {name} has shape {list(tensors.shape(name))}; the model's is "
            f"{list(shape)}."
        )
    value = tensors.get(name)
    is_moment = value.is_floating_point() and is_finite(value)
    if not is_moment or (kind == MOMENTS[1] and bool((value < 0).any())):
        raise TritterError(f"{tensors.folder}: {name} is no moment of Adam's.")
    return value


def start_from(
    optimiser: torch.optim.Optimizer, model: nn.Module, moments: Mapping[str, Moments]
) -> None:
    """Let an Adam go on from moments, by parameter name; the others begin anew."""
    held = {parameter for group in optimiser.param_groups for parameter in group["params"]}
    for name, values in moments.items():
        parameter = model.get_parameter(name)
        assert parameter in held, f"{name} is frozen"
        # A copy: the optimiser changes it in place
        optimiser.state[parameter] = {
            **{kind: values[kind].to(parameter, copy=True) for kind in MOMENTS},
            "step": values["step"].to(torch.float32, copy=True),
        }


class MomentKeeper(Callback):
    """Leave the moments that a training ends with in a folder, as its `state/`.

    Args:
        folder: where `state/` is written; replaced whole.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        model = pl_module.model
        assert isinstance(model, nn.Module)
        optimiser = trainer.optimizers[0]
        disk_names = {
            part.tensor.name: part.tensor.disk_name
            for stored in live_layout(model)
            for part in stored.parts
        }
        held = {disk_names[n]: m for n, m in moments_by_name(optimiser, model).items()}
        steps = {name: int(moments["step"]) for name, moments in held.items()}
        # Of most parameters: what differs is told one by one
        step = Counter(steps.values()).most_common(1)[0][0] if steps else 0
        with atomic_folder(self._folder, overwrite=True) as temporary:
            write_state(
                temporary,
                {
                    kind: TensorStream.of((name, m[kind].cpu()) for name, m in held.items())
                    for kind in MOMENTS
                },
                step=step,
                other_steps={name: own for name, own in steps.items() if own != step},
            )
