"""What lives on parameters beside the weights, carried through an expansion."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tritter.parameter_map.apply import Quantity, map_tensor
from tritter.parameter_map.tensor_map import TensorMap

Policy = Literal["carry", "zero", "reset_new"]
POLICIES: tuple[Policy, ...] = ("carry", "zero", "reset_new")


@dataclass(frozen=True, slots=True)
class StateKind:
    """One kind of state: how it maps, and what stands where a coordinate is new.

    Args:
        quantity: decides the factors.
        new_entries: `zero`; `mean` of the carried entries; or `as_weights`, what the expansion
            writes into the weights there.
    """

    quantity: Quantity
    new_entries: Literal["zero", "mean", "as_weights"]


STATE_KINDS: dict[str, StateKind] = {
    "exp_avg": StateKind(Quantity.GRADIENT, "zero"),
    # Zeros would give new entries updates several times too large under an old step count
    "exp_avg_sq": StateKind(Quantity.SQUARED_GRADIENT, "mean"),
    "fisher": StateKind(Quantity.SQUARED_GRADIENT, "zero"),
    "fisher_penalty": StateKind(Quantity.PENALTY, "zero"),
    "path_integral": StateKind(Quantity.PATH_INTEGRAL, "zero"),
    "anchor": StateKind(Quantity.WEIGHT, "as_weights"),
    "ema": StateKind(Quantity.WEIGHT, "as_weights"),
}
MOMENTS = ("exp_avg", "exp_avg_sq")


def starts_anew(tensor_map: TensorMap, kind: str, *, policy: Policy = "carry") -> bool:
    """Return whether the target has no state of this kind: it is absent, not zero."""
    if STATE_KINDS[kind].new_entries == "as_weights":
        return False
    is_reset = policy == "zero" or (policy == "reset_new" and tensor_map.is_copy)
    return tensor_map.state == "fresh" or (kind in MOMENTS and is_reset)


def carry(tensor_map: TensorMap, source: Tensor, kind: str, *, policy: Policy = "carry") -> Tensor:
    """Return the target's state for the source's; meant where state does not start anew.

    Args:
        kind: a key of `STATE_KINDS`.
        policy: of Adam's moments; other kinds are always carried. `carry` maps them exactly,
            copies included; `zero` starts all anew; `reset_new` carries the first copy of each
            coordinate and treats further copies as new (asymmetric, as in arXiv 2602.02472).
    """
    state = STATE_KINDS[kind]
    mapped = map_tensor(tensor_map, source, quantity=state.quantity)
    if state.new_entries == "as_weights":
        return mapped
    copies = kind in MOMENTS and policy == "reset_new"
    is_new = _new_entries(tensor_map, mapped.shape, copies=copies).to(mapped.device)
    if not bool(is_new.any()):
        return mapped
    value = torch.zeros((), dtype=mapped.dtype, device=mapped.device)
    if state.new_entries == "mean" and not bool(is_new.all()):
        value = mapped[~is_new].double().mean().to(mapped.dtype)
    return torch.where(is_new, value, mapped)


def _new_entries(tensor_map: TensorMap, shape: torch.Size, *, copies: bool) -> Tensor:
    """Bool mask of the entries without a source; with `copies`, of second copies as well."""
    is_new = torch.zeros((), dtype=torch.bool)
    axes = tensor_map.axes or (None,) * len(shape)
    for size, axis in zip(shape, axes, strict=True):
        here = torch.zeros(size, dtype=torch.bool)
        if axis is not None:
            here = axis.index < 0
            if copies:
                here = here | axis.is_duplicate
        is_new = is_new.unsqueeze(-1) | here
    return is_new
