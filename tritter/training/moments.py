"""Adam's moments of a live optimizer, mapped when its model changes during training.

Only this module distinguishes the Adams of torch and bitsandbytes; elsewhere moments are tensors
with the shape of the parameter.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from tritter.core.families import StoredTensor
from tritter.core.parameter_map.carry import MOMENTS, STATE_KINDS, Policy, has_state, mapped_state
from tritter.errors import TritterError
from tritter.training import eight_bit
from tritter.transform import Change

Moments = dict[str, Tensor]


def put_moments(
    optimizer: torch.optim.Optimizer,
    parameter: nn.Parameter,
    moments: Moments,
    *,
    before: eight_bit.State | None = None,
) -> None:
    """Set an Adam's moments of a parameter in its groups.

    Args:
        optimizer: An Adam of torch or bitsandbytes.
        parameter: Parameter in one of its groups.
        moments: Moments and step count.
        before: Optimizer state of the parameter that this one replaces, if known. An 8-bit
            optimizer uses it to keep the exact codes of unchanged blocks.
    """
    if eight_bit.is_of_bitsandbytes(optimizer):
        eight_bit.write(optimizer, parameter, moments, before=before)
        return
    # A copy: the optimizer changes it in place
    optimizer.state[parameter] = {
        **{kind: moments[kind].to(parameter, copy=True) for kind in MOMENTS},
        "step": moments["step"].to(torch.float32, copy=True),
    }


def moments_by_name(
    optimizer: torch.optim.Optimizer, model: nn.Module, stored_tensors: Iterable[StoredTensor]
) -> dict[str, Moments]:
    """Return an Adam's moments by logical name.

    Args:
        optimizer: An Adam of torch or bitsandbytes.
        model: Live model that it trains.
        stored_tensors: Parameters to read.

    Returns:
        Logical name → moments; tensors without moments are absent.

    Raises:
        TritterError: The optimizer state is not that of Adam.
    """
    found: dict[str, Moments] = {}
    for stored in stored_tensors:
        parameter = model.get_parameter(stored.name)
        state = optimizer.state.get(parameter)
        if not state:
            continue
        if eight_bit.is_of_bitsandbytes(optimizer):
            state = eight_bit.read(state, parameter.device)
        missing = {*MOMENTS, "step"} - set(state)
        if missing:
            raise TritterError(
                f"{type(optimizer).__name__} has no {', '.join(sorted(missing))} for "
                f"{stored.name}. Tritter can carry the moments of Adam and AdamW, including their "
                "8-bit variants."
            )
        for part in stored.parts:
            own = {kind: part.of(state[kind]) for kind in MOMENTS}
            found[part.tensor.name] = own | {"step": state["step"]}
    return found


def carried_moments(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    change: Change,
    *,
    stored_tensors: Sequence[StoredTensor],
    policy: Policy = "carry",
) -> dict[str, Moments]:
    """Return an Adam's moments after a change, by the names of the new parameters.

    A parameter whose state is reset has no moments: the optimizer creates them at its first step,
    with a new step count.

    Args:
        optimizer: Optimizer of `model`.
        model: Live model before the change.
        change: Change of the model.
        stored_tensors: Parameters after the change to return moments for.
        policy: Policy for the moments, as in `tritter.core.parameter_map.carry`.

    Raises:
        TritterError: The optimizer state is not that of Adam.
    """
    origins = {change.tensors[part.tensor.name].origin for s in stored_tensors for part in s.parts}
    # Only these: reading 8-bit moments needs eight bytes per parameter
    read = [s for s in change.before if any(part.tensor.name in origins for part in s.parts)]
    old = moments_by_name(optimizer, model, read)
    moved: dict[str, Moments] = {}

    def moved_kind(name: str, kind: str) -> Tensor:
        return mapped_state(
            change.tensors[name], STATE_KINDS[kind], lambda n: old[n][kind], policy=policy
        )

    found = {}
    for stored in stored_tensors:
        for name in (part.tensor.name for part in stored.parts):
            tensor_map = change.tensors[name]
            rule = STATE_KINDS[MOMENTS[0]]
            if has_state(tensor_map, rule, old.__contains__, policy=policy):
                step = old[tensor_map.origin or ""]["step"].clone()
                moved[name] = {kind: moved_kind(name, kind) for kind in MOMENTS} | {"step": step}
        if any(part.tensor.name in moved for part in stored.parts):
            found[stored.name] = _packed_moments(stored, moved)
    return found


def _packed_moments(stored: StoredTensor, state: Mapping[str, Moments]) -> Moments:
    """Return the moments of one parameter from those of its parts by logical name.

    Parts without moments get a zero first moment and the mean second moment of the other parts.
    The step count is the maximum over the parts.
    """
    first, second = MOMENTS
    names = [part.tensor.name for part in stored.parts if part.tensor.name in state]
    example = state[names[0]]
    mean = torch.stack([state[name][second].double().mean() for name in names]).mean()
    absent = {first: torch.zeros((), dtype=example[first].dtype), second: mean.to(example[second])}

    def moment(kind: str) -> Tensor:
        return stored.pack(lambda name: state[name][kind] if name in state else absent[kind])

    step = torch.stack([state[name]["step"] for name in names]).max()
    return {first: moment(first), second: moment(second), "step": step}
