"""State through maps that follow one another: what there is of it, and what it becomes."""

from collections.abc import Callable

from torch import Tensor

from tritter.parameter_map.apply import Read, mapped
from tritter.parameter_map.carry import Policy, StateKind, carry, starts_anew
from tritter.parameter_map.tensor_map import TensorMap


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
