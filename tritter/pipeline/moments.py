"""`optimizer.carry`: where the moments of a run's trainings come from, and where they are left."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from lightning import Callback
from torch import nn

from tritter.checkpoint.state import State, copy_states, read_state
from tritter.errors import RequestError
from tritter.families import LogicalTensor, family_of
from tritter.models import read_config
from tritter.parameter_map.carry import MOMENTS
from tritter.pipeline.context import RunContext
from tritter.training.moments import MomentKeeper, moments_of
from tritter.training.transplant import Moments

_FOLDER = "moments"

WriteState = Callable[[Path], None]


def keepers(context: RunContext, folder: Path) -> tuple[Callback, ...]:
    """Return what leaves the moments of a training in its folder, if they are asked for."""
    return (MomentKeeper(folder / _FOLDER),) if context.config.optimizer.carry else ()


def carried(context: RunContext, start: Path, model: nn.Module) -> Mapping[str, Moments]:
    """Return the moments that a training starts from, by parameter name.

    Args:
        start: the checkpoint that the training starts from.
        model: loaded from it, with what is not trained frozen.

    Raises:
        RequestError: they were asked for, and nothing that is trained has any.
        TritterError: they are damaged.
    """
    if not context.config.optimizer.carry:
        return {}
    state = read_state(start)
    found = {} if state is None else moments_of(state, model)
    if not found:
        raise RequestError(
            f"optimizer.carry = true: nothing that is trained from {start} has moments of Adam's; "
            "leave optimizer.carry out."
        )
    trained = sum(parameter.requires_grad for parameter in model.parameters())
    anew = f"; {trained - len(found)} begin anew" if trained > len(found) else ""
    context.say("", f"Adam's moments carried for {len(found)} of {trained} parameters{anew}")
    return found


def read_left(context: RunContext, folder: Path) -> State | None:
    """Return the moments that a training left in its folder, if it was to leave any."""
    return read_state(folder / _FOLDER) if context.config.optimizer.carry else None


def left(context: RunContext, folder: Path) -> WriteState | None:
    """Return what writes the moments that a training left in its folder beside its model."""
    state = read_left(context, folder)
    return None if state is None else lambda target: copy_states([state], target)


def passed_on(
    context: RunContext, start: Path, *, is_trained: Callable[[LogicalTensor], bool]
) -> WriteState | None:
    """Return what writes a checkpoint's moments beside a model of which a stage trained a part.

    Routers and new experts have moments of their own in the stages before the training, so those
    of a part that was trained are dropped: it begins anew there.
    """
    state = read_state(start)
    if not context.config.optimizer.carry or state is None:
        return None
    config = read_config(start)
    tensors = family_of(config).logical_tensors(config)
    trained = {tensor.disk_name for tensor in tensors if is_trained(tensor)}

    def is_kept(kind: str, name: str) -> bool:
        return kind in MOMENTS and name not in trained

    return lambda target: copy_states([state], target, is_kept=is_kept)


def discard_left(folder: Path) -> None:
    """Remove what a training left, after it was written beside its model."""
    shutil.rmtree(folder / _FOLDER, ignore_errors=True)
