"""Carry a live optimiser's moments over to the optimiser of an expanded model."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tritter.errors import TritterError
from tritter.families import Config, Family
from tritter.parameter_map import ParameterMap, TensorMap
from tritter.parameter_map.carry import MOMENTS, Policy, carry, starts_anew

Moments = dict[str, Tensor]


def transplant_optimiser(
    old: torch.optim.Optimizer,
    old_model: nn.Module,
    new: torch.optim.Optimizer,
    new_model: nn.Module,
    *,
    family: Family,
    configs: Sequence[Config],
    parameter_maps: Sequence[ParameterMap],
    policy: Policy = "carry",
) -> None:
    """Give `new` (Adam or AdamW over `new_model`) the moments of `old`, mapped.

    A parameter whose state starts anew gets none: the optimiser makes it at its first step, with
    a step count of its own.

    Args:
        configs: the config before each map, and the one after the last.
        policy: `carry`, `zero` or `reset_new`; see `tritter.parameter_map.carry`.

    Raises:
        TritterError: the old optimiser does not hold Adam's moments.
    """
    state = _moments_by_name(old, old_model, family, configs[0])
    for parameter_map in parameter_maps:
        state = {
            name: {kind: _carried(tensor_map, state, kind, policy) for kind in (*MOMENTS, "step")}
            for name, tensor_map in parameter_map.tensors.items()
            if tensor_map.source in state and not starts_anew(tensor_map, MOMENTS[0], policy=policy)
        }
    parameters = dict(new_model.named_parameters())
    for tensor in family.logical_tensors(configs[-1]):
        if tensor.name in state:
            new.state[parameters[tensor.disk_name]].update(state[tensor.name])


def _moments_by_name(
    optimiser: torch.optim.Optimizer, model: nn.Module, family: Family, config: Config
) -> dict[str, Moments]:
    parameters = dict(model.named_parameters())
    found: dict[str, Moments] = {}
    for tensor in family.logical_tensors(config):
        held = optimiser.state.get(parameters[tensor.disk_name])
        if not held:
            continue
        missing = {*MOMENTS, "step"} - set(held)
        if missing:
            raise TritterError(
                f"{type(optimiser).__name__} holds no {', '.join(sorted(missing))} for "
                f"{tensor.disk_name}; the moments of Adam and AdamW can be carried."
            )
        found[tensor.name] = {kind: held[kind] for kind in (*MOMENTS, "step")}
    return found


def _carried(tensor_map: TensorMap, state: dict[str, Moments], kind: str, policy: Policy) -> Tensor:
    source = state[tensor_map.source][kind]
    return source.clone() if kind == "step" else carry(tensor_map, source, kind, policy=policy)
