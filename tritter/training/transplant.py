"""Carry a live optimiser's moments over to the optimiser of an expanded model."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from tritter.errors import TritterError
from tritter.families import Config, StoredTensor, family_of, layout
from tritter.parameter_map import ParameterMap, TensorMap
from tritter.parameter_map.carry import MOMENTS, Policy, carry, starts_anew
from tritter.training.parameters import live_layout

Moments = dict[str, Tensor]


def transplant_optimiser(
    old: torch.optim.Optimizer,
    old_model: nn.Module,
    new: torch.optim.Optimizer,
    new_model: nn.Module,
    *,
    configs: Sequence[Config],
    parameter_maps: Sequence[ParameterMap],
    policy: Policy = "carry",
) -> None:
    """Give `new` (Adam or AdamW over `new_model`) the moments of `old`, mapped.

    A parameter whose state starts anew gets none: the optimiser makes it at its first step, with
    a step count of its own. Where experts share a parameter, and a step count with it, those that
    start anew get zero for the first moment and the mean of the others for the second.

    Args:
        configs: the config before each map, and the one after the last.
        policy: `carry`, `zero` or `reset_new`; see `tritter.parameter_map.carry`.

    Raises:
        TritterError: the old optimiser does not hold Adam's moments.
    """
    state = moments_by_name(old, old_model)
    for parameter_map in parameter_maps:
        state = {
            name: {kind: _carried(tensor_map, state, kind, policy) for kind in (*MOMENTS, "step")}
            for name, tensor_map in parameter_map.tensors.items()
            if tensor_map.source in state and not starts_anew(tensor_map, MOMENTS[0], policy=policy)
        }
    for stored in layout(family_of(configs[-1]), configs[-1], "live"):
        if any(part.tensor.name in state for part in stored.parts):
            parameter = new_model.get_parameter(stored.name)
            new.state[parameter].update(packed_moments(stored, state))


def packed_moments(stored: StoredTensor, state: Mapping[str, Moments]) -> Moments:
    """Return the state of one parameter, of what it holds by logical name.

    Some of its parts may have none yet: zero and the mean of the others stand in. Where parts
    differ in their steps, the most that one has had counts.
    """
    first, second = MOMENTS
    held = [part.tensor.name for part in stored.parts if part.tensor.name in state]
    example = state[held[0]]
    mean = torch.stack([state[name][second].double().mean() for name in held]).mean()
    absent = {first: torch.zeros((), dtype=example[first].dtype), second: mean.to(example[second])}

    def moment(kind: str) -> Tensor:
        return stored.pack(lambda name: state[name][kind] if name in state else absent[kind])

    step = torch.stack([state[name]["step"] for name in held]).max()
    return {first: moment(first), second: moment(second), "step": step}


def moments_by_name(optimiser: torch.optim.Optimizer, model: nn.Module) -> dict[str, Moments]:
    """Return what an Adam holds of a live model, by logical name; the rest is absent.

    Raises:
        TritterError: it holds something else than Adam's moments.
    """
    found: dict[str, Moments] = {}
    for stored in live_layout(model):
        held = optimiser.state.get(model.get_parameter(stored.name))
        if not held:
            continue
        missing = {*MOMENTS, "step"} - set(held)
        if missing:
            raise TritterError(
                f"{type(optimiser).__name__} holds no {', '.join(sorted(missing))} for "
                f"{stored.name}; the moments of Adam and AdamW can be carried."
            )
        parts = {kind: _by_name(stored, held[kind]) for kind in MOMENTS}
        for part in stored.parts:
            name = part.tensor.name
            found[name] = {kind: parts[kind][name] for kind in MOMENTS} | {"step": held["step"]}
    return found


def _by_name(stored: StoredTensor, value: Tensor) -> dict[str, Tensor]:
    return {tensor.name: part for tensor, part in stored.unpack(value)}


def _carried(tensor_map: TensorMap, state: dict[str, Moments], kind: str, policy: Policy) -> Tensor:
    assert tensor_map.source is not None
    source = state[tensor_map.source][kind]
    return source.clone() if kind == "step" else carry(tensor_map, source, kind, policy=policy)
