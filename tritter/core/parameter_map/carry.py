"""What lives on parameters beside the weights, carried through one expansion or several."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from tritter.core.parameter_map.apply import Quantity, Read, flagged, is_new, map_tensor, mapped
from tritter.core.parameter_map.tensor_map import TensorMap
from tritter.errors import TritterError

if TYPE_CHECKING:
    from torch import Tensor

Policy = Literal["carry", "zero", "reset_new"]
POLICIES: tuple[Policy, ...] = ("carry", "zero", "reset_new")

_NAME = re.compile(r"[a-z][a-z0-9_]{0,59}")  # it names a folder


@dataclass(frozen=True, slots=True)
class StateKind:
    """The rule of one kind of state: how it maps, and what stands where a coordinate is new.

    Args:
        quantity: decides the factors.
        new_entries: `zero`; `mean` of the carried entries; or `as_weights`, what the expansion
            writes into the weights there.
        is_moment: it is Adam's, and follows a policy.
    """

    quantity: Quantity
    new_entries: Literal["zero", "mean", "as_weights"]
    is_moment: bool = False

    @property
    def is_as_weights(self) -> bool:
        return self.new_entries == "as_weights"


STATE_KINDS: dict[str, StateKind] = {}


def register(kind: str, rule: StateKind) -> None:
    """Make a kind of state known: from then on it follows every map by its rule.

    Meant for the module of the method that leaves it. Registering the same again does nothing.

    Args:
        kind: lower-case letters, digits and `_`.

    Raises:
        TritterError: the name is of another form, or has another rule already.
    """
    if not is_kind_name(kind):
        raise TritterError(
            f"{kind!r} names no kind of state; allowed are lower-case letters, digits and _."
        )
    if STATE_KINDS.setdefault(kind, rule) != rule:
        raise TritterError(f"the kind of state {kind} is registered with another rule already.")


def is_kind_name(name: str) -> bool:
    """Say whether a kind of state, and the folder that holds it, may have this name."""
    return _NAME.fullmatch(name) is not None


register("exp_avg", StateKind(Quantity.GRADIENT, "zero", is_moment=True))
# Zeros would give new entries updates several times too large under an old step count
register("exp_avg_sq", StateKind(Quantity.SQUARED_GRADIENT, "mean", is_moment=True))
register("fisher", StateKind(Quantity.SQUARED_GRADIENT, "zero"))
register("fisher_penalty", StateKind(Quantity.PENALTY, "zero"))
register("online_fisher", StateKind(Quantity.SQUARED_GRADIENT, "zero"))
register("online_fisher_penalty", StateKind(Quantity.PENALTY, "zero"))
register("online_fisher_mean", StateKind(Quantity.SQUARED_GRADIENT, "zero"))
register("online_fisher_penalty_mean", StateKind(Quantity.PENALTY, "zero"))
register("path_integral", StateKind(Quantity.PATH_INTEGRAL, "zero"))
register("displacement", StateKind(Quantity.DISPLACEMENT, "zero"))
register("si_importance", StateKind(Quantity.PENALTY, "zero"))  # ω / Δ², mapped as both are
register("anchor", StateKind(Quantity.WEIGHT, "as_weights"))
register("ema", StateKind(Quantity.WEIGHT, "as_weights"))
MOMENTS = tuple(kind for kind, rule in STATE_KINDS.items() if rule.is_moment)
OURS = frozenset(STATE_KINDS)  # what every Tritter knows


def starts_anew(tensor_map: TensorMap, kind: str | StateKind, *, policy: Policy = "carry") -> bool:
    """Return whether the target has no state of this kind: it is absent, not zero."""
    rule = _rule(kind)
    if rule.is_as_weights:
        return False
    is_reset = policy == "zero" or (policy == "reset_new" and tensor_map.is_copy)
    return tensor_map.state == "fresh" or (rule.is_moment and is_reset)


def carry(
    tensor_map: TensorMap, source: Tensor, kind: str | StateKind, *, policy: Policy = "carry"
) -> Tensor:
    """Return the target's state for the source's; meant where state does not start anew.

    Args:
        kind: a registered one, or a rule.
        policy: of Adam's moments; other kinds are always carried. `carry` maps them exactly,
            copies included; `zero` starts all anew; `reset_new` carries the first copy of each
            coordinate and treats further copies as new (asymmetric, as in arXiv 2602.02472).
    """
    import torch

    rule = _rule(kind)
    state = map_tensor(tensor_map, source, quantity=rule.quantity)
    if rule.is_as_weights:
        return state
    starts = flagged(tensor_map.axes, is_new)
    if rule.is_moment and policy == "reset_new":
        starts = starts | flagged(tensor_map.axes, lambda axis: axis.is_duplicate)
    if not bool(starts.any()):
        return state
    starts = starts.to(state.device)
    value = torch.zeros((), dtype=state.dtype, device=state.device)
    if rule.new_entries == "mean" and not bool(starts.all()):
        value = state[~starts.expand(state.shape)].double().mean().to(state.dtype)
    return torch.where(starts, value, state)


def _rule(kind: str | StateKind) -> StateKind:
    return kind if isinstance(kind, StateKind) else STATE_KINDS[kind]


def has_state(
    tensor_map: TensorMap,
    rule: StateKind,
    is_held: Callable[[str], bool],
    *,
    policy: Policy = "carry",
) -> bool:
    """Return whether the target has state by a rule; what starts anew has none.

    Args:
        is_held: says of a logical name of the first model whether that has some.
    """
    before, donor = tensor_map.source, tensor_map.fill.donor
    if before is None or starts_anew(tensor_map, rule, policy=policy):
        return False
    needed: list[str | TensorMap] = [before]
    if rule.is_as_weights:
        needed += [*tensor_map.blend, *([] if donor is None else [donor])]
    return all(
        is_held(one) if isinstance(one, str) else has_state(one, rule, is_held, policy=policy)
        for one in needed
    )


def followed(
    tensor_map: TensorMap, rule: StateKind, read: Read, *, policy: Policy = "carry"
) -> Tensor:
    """Return the state of a target that has some, that of the first model read by logical name."""
    if rule.is_as_weights:
        return mapped(tensor_map, read)
    before = tensor_map.source
    assert before is not None, "what has no source starts anew"
    if isinstance(before, str):
        return carry(tensor_map, read(before), rule, policy=policy)
    return carry(tensor_map, followed(before, rule, read, policy=policy), rule, policy=policy)
