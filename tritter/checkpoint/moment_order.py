"""Whose moments are whose: an optimizer's state keeps no names, only positions.

Positions are given names only where one order explains all of them: that of the model's own
parameters, in one group, or in two with matrices in one and vectors in the other, as decay and no
decay are commonly parted. Each shape is checked. Elsewhere the moments are left out, and why.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from tritter.checkpoint.export import Moments
from tritter.families import StoredTensor
from tritter.parameter_map.carry import MOMENTS
from tritter.storage.tensors import is_finite


class MomentsLeftOut(Exception):
    """The optimizer's state cannot be used; says why."""


def named_moments(
    content: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    stored: Sequence[StoredTensor],
    prefix: str,
) -> Moments:
    """Return Adam's moments of a Lightning checkpoint by name on disk.

    Args:
        content: of the whole file.
        tensors: its model's tensors, named as in the file, in the file's order.
        stored: what they are.
        prefix: what stands before the model's own names.

    Raises:
        MomentsLeftOut: there are none, they are not Adam's, or their owners are not certain.
    """
    groups, state = _one_optimizer(content)
    owners = _owners(groups, tensors, {prefix + tensor.name for tensor in stored})
    by_name = {
        name: state[position]
        for group, names in zip(groups, owners, strict=True)
        for position, name in zip(group, names, strict=True)
        if position in state
    }
    kinds: dict[str, dict[str, Tensor]] = {kind: {} for kind in MOMENTS}
    steps = set()
    for tensor in stored:
        held = by_name.get(prefix + tensor.name)
        if held is None:
            continue
        for kind, moment in _adams(held, tensor):
            for part, value in tensor.unpack(moment):
                kinds[kind][part.disk_name] = value
        steps.add(_step(held))
    if len(steps) != 1:
        counts = f"from {min(steps)} to {max(steps)}" if steps else "none"
        raise MomentsLeftOut(f"its parameters do not share one step count ({counts})")
    return Moments(steps.pop(), kinds)


def _one_optimizer(
    content: Mapping[str, Any],
) -> tuple[list[list[int]], Mapping[Any, Mapping[str, Any]]]:
    """Return the positions in each group, and position → state."""
    states = content.get("optimizer_states")
    if not isinstance(states, Sequence) or states in ([], [{}]):
        raise MomentsLeftOut("the file holds none")
    if len(states) > 1:
        raise MomentsLeftOut(f"the file holds {len(states)} optimizers")
    try:
        groups = [[int(at) for at in group["params"]] for group in states[0]["param_groups"]]
        state = dict(states[0]["state"])
    except (KeyError, TypeError, ValueError) as error:
        raise MomentsLeftOut("it is not laid out as torch's optimizers are") from error
    if not all(isinstance(held, Mapping) for held in state.values()):
        raise MomentsLeftOut("it is not laid out as torch's optimizers are")
    return groups, state


def _owners(
    groups: Sequence[Sequence[int]], tensors: Mapping[str, Tensor], owned: set[str]
) -> list[list[str]]:
    """Return the names in each group."""
    names = [name for name in tensors if name in owned]  # a tied head is no parameter of its own
    matrices = [name for name in names if tensors[name].ndim >= 2]
    vectors = [name for name in names if tensors[name].ndim < 2]
    sizes = [len(group) for group in groups]
    for split in ([names], [matrices, vectors], [vectors, matrices]):
        if [len(part) for part in split] == sizes:
            return split
    raise MomentsLeftOut(
        f"its groups of {', '.join(map(str, sizes))} parameters are neither all {len(names)} of "
        f"the model nor its {len(matrices)} matrices and {len(vectors)} vectors"
    )


def _adams(held: Mapping[str, Any], tensor: StoredTensor) -> Iterator[tuple[str, Tensor]]:
    """Yield Adam's two moments of one parameter."""
    for kind in MOMENTS:
        moment = held.get(kind)
        if not isinstance(moment, Tensor) or not moment.is_floating_point():
            raise MomentsLeftOut(f"it is not Adam's: it holds {', '.join(map(str, held))}")
        if tuple(moment.shape) != tensor.shape:
            raise MomentsLeftOut(
                f"its order is not the model's: {tensor.name} of shape {tensor.shape} would get "
                f"moments of shape {tuple(moment.shape)}"
            )
        if not is_finite(moment):
            raise MomentsLeftOut(f"{kind} of {tensor.name} holds values that are not finite")
        yield kind, moment


def _step(held: Mapping[str, Any]) -> int:
    try:
        return int(held["step"])
    except (KeyError, TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise MomentsLeftOut("it does not say after how many steps it stands") from error
