"""`optimizer.carry`: where the moments of a run's trainings come from, and where they are left."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from lightning import Callback
from torch import nn

from tritter.checkpoint import Source
from tritter.checkpoint.folder import Artifact
from tritter.checkpoint.state import State, copy_states, read_state
from tritter.errors import RequestError
from tritter.families import LogicalTensor
from tritter.parameter_map.carry import MOMENTS
from tritter.pipeline.context import RunContext
from tritter.training.fitting import LEFT_NAME
from tritter.training.moments import MomentKeeper, Moments, moments_of

_FOLDER = "moments"


def keepers(context: RunContext, folder: Path) -> tuple[Callback, ...]:
    """Return what leaves the moments of a training in its folder, if they are asked for."""
    return (MomentKeeper(folder / _FOLDER),) if context.config.optimizer.carry else ()


def carried(context: RunContext, start: Source, model: nn.Module) -> Mapping[str, Moments]:
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
    found = {} if start.state is None else moments_of(start.state, model)
    if not found:
        raise RequestError(
            f"optimizer.carry = true: nothing that is trained from {start.folder} has moments of "
            "Adam's; leave optimizer.carry out."
        )
    trained = sum(parameter.requires_grad for parameter in model.parameters())
    anew = f"; {trained - len(found)} begin anew" if trained > len(found) else ""
    context.say("", f"Adam's moments carried for {len(found)} of {trained} parameters{anew}")
    return found


def left_in(context: RunContext, folder: Path) -> tuple[Path, ...]:
    """Return where a training leaves its moments, if it is to leave any."""
    return (folder / _FOLDER,) if context.config.optimizer.carry else ()


@dataclass(frozen=True, slots=True)
class LeftState:
    """Writes the state that a training left in its folder, moments and others, beside its model."""

    folder: Path

    def write(self, folder: Path) -> None:
        states = (read_state(self.folder / name) for name in (LEFT_NAME, _FOLDER))
        copy_states([state for state in states if state is not None], folder)


@dataclass(frozen=True, slots=True)
class PassedOn:
    """Writes the moments of a checkpoint beside a model of which a stage trained a part."""

    state: State
    trained: frozenset[str]

    def write(self, folder: Path) -> None:
        copy_states(
            [self.state],
            folder,
            is_kept=lambda kind, name: kind in MOMENTS and name not in self.trained,
        )


def passed_on(
    context: RunContext, start: Source, *, is_trained: Callable[[LogicalTensor], bool]
) -> Artifact | None:
    """Return what writes a checkpoint's moments beside a model of which a stage trained a part.

    Routers and new experts have moments of their own in the stages before the training, so those
    of a part that was trained are dropped: it begins anew there.
    """
    if not context.config.optimizer.carry or start.state is None:
        return None
    tensors = start.family.logical_tensors(start.config)
    return PassedOn(start.state, frozenset(t.disk_name for t in tensors if is_trained(t)))


def discard_left(folder: Path) -> None:
    """Remove what a training left, after it was written beside its model."""
    shutil.rmtree(folder / _FOLDER, ignore_errors=True)
