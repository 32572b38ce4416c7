"""Map state of parameters (moments, importances, anchors) through one expansion or several."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from tritter.core.parameter_map.axis_map import Quantity
from tritter.core.parameter_map.tensor_map import Read, TensorMap
from tritter.errors import TritterError

if TYPE_CHECKING:
    from torch import Tensor

Policy = Literal["carry", "zero", "reset_new"]

_NAME = re.compile(r"[a-z][a-z0-9_]{0,59}")  # also the name of a folder


@dataclass(frozen=True, slots=True)
class StateKind:
    """The rule of one kind of state: its factors, and the values of new coordinates.

    Args:
        quantity: determines the factors.
        new_entries: `zero`, `mean` of the mapped entries, or `as_weights`: mapped and filled like
            the weights.
        is_moment: it is a moment of Adam, to which a policy applies.
    """

    quantity: Quantity
    new_entries: Literal["zero", "mean", "as_weights"]
    is_moment: bool = False

    @property
    def is_as_weights(self) -> bool:
        return self.new_entries == "as_weights"

    def has_state(
        self, tensor_map: TensorMap, exists: Callable[[str], bool], *, policy: Policy = "carry"
    ) -> bool:
        """Return True if the target has state of this kind; what is reset is absent, not zero.

        Args:
            tensor_map: the map.
            exists: returns True if a logical tensor of the first model has state.
            policy: of Adam's moments; see `mapped`.
        """
        before, donor = tensor_map.source, tensor_map.fill.donor
        is_reset = policy == "zero" or (policy == "reset_new" and tensor_map.is_copy)
        is_fresh = tensor_map.state == "fresh" or (self.is_moment and is_reset)
        if before is None or (is_fresh and not self.is_as_weights):
            return False
        needed: list[str | TensorMap] = [before]
        if self.is_as_weights:
            needed += [*tensor_map.blend, *([] if donor is None else [donor])]
        return all(
            exists(one) if isinstance(one, str) else self.has_state(one, exists, policy=policy)
            for one in needed
        )

    def mapped(self, tensor_map: TensorMap, read: Read, *, policy: Policy = "carry") -> Tensor:
        """Return the state of a target that has state.

        Args:
            tensor_map: the map.
            read: returns the state of the first model by logical name.
            policy: of Adam's moments; other kinds are always mapped. `carry` maps all entries,
                copies included; `zero` resets all; `reset_new` maps the first copy of each
                coordinate and resets further copies (asymmetric, as in arXiv 2602.02472).
        """
        import torch

        if self.is_as_weights:
            return tensor_map.mapped(read)
        before = tensor_map.source
        assert before is not None, "state without a source is reset"
        if isinstance(before, str):
            source = read(before)
        else:
            source = self.mapped(before, read, policy=policy)
        state = tensor_map.apply(source, quantity=self.quantity)
        is_fresh = tensor_map.any_mask(lambda axis: axis.is_new)
        if self.is_moment and policy == "reset_new":
            is_fresh = is_fresh | tensor_map.any_mask(lambda axis: axis.is_duplicate)
        if not bool(is_fresh.any()):
            return state
        is_fresh = is_fresh.to(state.device)
        value = torch.zeros((), dtype=state.dtype, device=state.device)
        if self.new_entries == "mean" and not bool(is_fresh.all()):
            value = state[~is_fresh.expand(state.shape)].double().mean().to(state.dtype)
        return torch.where(is_fresh, value, state)


STATE_KINDS: dict[str, StateKind] = {}


def register(kind: str, rule: StateKind) -> None:
    """Register a kind of state, so that every expansion maps it by its rule.

    The module of the method that writes the state calls this. Repeated calls with the same rule
    have no effect.

    Args:
        kind: lower-case letters, digits and `_`.
        rule: of this kind.

    Raises:
        TritterError: the name is invalid, or is registered with a different rule.
    """
    if not is_kind_name(kind):
        raise TritterError(
            f"{kind!r} is not a kind of state; use lower-case letters, digits and _."
        )
    if STATE_KINDS.setdefault(kind, rule) != rule:
        raise TritterError(f"the kind of state {kind} is already registered with a different rule.")


def is_kind_name(name: str) -> bool:
    """Return True if the name is valid for a kind of state and its folder."""
    return _NAME.fullmatch(name) is not None


register("exp_avg", StateKind(Quantity.GRADIENT, "zero", is_moment=True))
# With zeros and an old step count, updates of new entries would be several times too large
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
BUILT_IN_KINDS = frozenset(STATE_KINDS)  # known to every installation of Tritter
