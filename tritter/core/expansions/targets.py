"""From a parameter count to a shape: the nearest target of one method."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from math import lcm
from typing import Any

from tritter.core.expansions.depth import Dus, Interpolate, LlamaPro, Stack
from tritter.core.expansions.moe import Moe
from tritter.core.expansions.moe_add import MoeAdd, sparse_layers
from tritter.core.expansions.specification import ExpansionSpec, target_model
from tritter.core.expansions.width import Width
from tritter.core.families import Model
from tritter.errors import Problem, RequestError, refused
from tritter.limits import MAX_EXPERTS, MAX_LAYERS, MAX_WIDTH

_TOLERANCE = 0.1
_MAX_GROWTH = 64  # limit of the search, as a multiple of the source
_MAX_COPIES = 1024  # limit of the search for copies of an FFN
_MAX_WIDTHS = 2**14  # number of hidden sizes to try; coarser beyond 10 B parameters


def reach_parameters(
    source: Model, specs: Sequence[ExpansionSpec], target: int
) -> tuple[ExpansionSpec, ...]:
    """Return `specs` with the one open target set to the shape nearest to `target` parameters.

    Depth methods choose the number of layers, moe and moe_add the number of experts. Width chooses
    the hidden size; the FFN is scaled with it, and so are the heads if the result is an integer.
    Refused if that shape is more than 10 % off.
    """
    if len(specs) != 1:
        names = ", ".join(spec.name for spec in specs)
        reason = (
            f"it needs exactly one method, not {names}; use one method, or set the target of each "
            "method"
        )
        raise RequestError(Problem("target_params", reason=reason))
    (spec,) = specs
    if target <= source.num_parameters:
        raise refused(
            "target_params",
            f"{target:,}",
            f"the model already has {source.num_parameters:,} parameters; set a larger target",
        )
    (best, count), smallest = _nearest(source, spec, target)
    is_far = abs(count - target) > _TOLERANCE * target
    if is_far and isinstance(spec, Width) and spec.multiple_of is None:
        (best, count), smallest = _nearest(source, replace(spec, multiple_of=1), target)
    if abs(count - target) > _TOLERANCE * target:
        raise refused(
            "target_params",
            f"{target:,}",
            f"the nearest shape of {spec.name} has {count:,} parameters ({_describe(best)}), more "
            f"than 10 % off; its smallest step gives {smallest:,}",
        )
    return (best,)


def _nearest(
    source: Model, spec: ExpansionSpec, target: int
) -> tuple[tuple[ExpansionSpec, int], int]:
    """Return the nearest expansion and its parameters, and the parameters of the smallest one."""
    found: list[tuple[ExpansionSpec, int]] = []
    for candidate in _candidates(source, spec):
        with suppress(RequestError):
            found.append((candidate, target_model(source, [candidate]).num_parameters))
            if found[-1][1] > target:  # candidates are sorted by size
                break
    if not found:
        raise RequestError(Problem("target_params", reason=f"{spec.name} can't expand this model"))
    return min(found, key=lambda pair: abs(pair[1] - target)), found[0][1]


def _candidates(source: Model, spec: ExpansionSpec) -> Iterator[ExpansionSpec]:
    dimensions = source.sizes
    layers, hidden = dimensions.num_hidden_layers, dimensions.hidden_size
    match spec:
        case Dus(target_layers=None, drop_layers=None):
            for count in range(layers + 1, min(2 * layers, MAX_LAYERS) + 1):
                yield replace(spec, target_layers=count)
        case Stack(target_layers=None):
            step = 1 if spec.partial else layers
            for count in range(layers + step, _max_size(layers, MAX_LAYERS) + 1, step):
                yield replace(spec, target_layers=count)
        case Interpolate(target_layers=None) | LlamaPro(target_layers=None, positions=None):
            for count in range(layers + 1, _max_size(layers, MAX_LAYERS) + 1):
                yield replace(spec, target_layers=count)
        case Width(hidden_size=None):
            most, multiple = _max_size(hidden, MAX_WIDTH), spec.multiple_for(hidden)
            if multiple == 1 or source.family.heads_divide_hidden:
                multiple = lcm(dimensions.num_attention_heads, multiple)
            step = multiple * max(1, (most - hidden) // (multiple * _MAX_WIDTHS))
            first = hidden + step - (hidden % multiple if spec.multiple_of else 0)
            for size in range(first, most + 1, step):
                yield replace(spec, hidden_size=size)
        case Moe(num_experts=None, experts_from=None):
            spec.partner(source.family)
            pieces = spec.granularity
            for count in range(2 * pieces, _max_size(pieces, MAX_EXPERTS, _MAX_COPIES) + 1, pieces):
                yield replace(spec, num_experts=count)
        case MoeAdd(num_experts=None, addition="append"):
            sparse_layers(source)
            for count in range(1, _max_size(max(dimensions.num_experts, 1), MAX_EXPERTS) + 1):
                yield replace(spec, num_experts=count)
        case MoeAdd(num_experts=None):
            yield spec
        case _:
            reason = f"{spec.name} has no size that a target can set; remove this setting"
            if described := _describe(spec):
                reason = f"{spec.name} already has a target ({described}); set only one of them"
            raise RequestError(Problem("target_params", reason=reason))


def _max_size(size: int, limit: int, growth: int = _MAX_GROWTH) -> int:
    return min(growth * size, limit)


def _describe(spec: Any) -> str:
    names = ("target_layers", "drop_layers", "positions", "hidden_size", "num_experts")
    values = {name: getattr(spec, name, None) for name in (*names, "experts_from")}
    return ", ".join(
        f"{name} {_plain(value)}" for name, value in values.items() if value is not None
    )


def _plain(value: object) -> str:
    return f"[{', '.join(map(str, value))}]" if isinstance(value, tuple) else str(value)


def growth_examples(source: Model) -> dict[str, tuple[ExpansionSpec, ...]]:
    """Return size → examples of growth: to any size, then by whole copies.

    FFN and heads are scaled with the hidden size.
    """
    sizes = source.widened.sizes
    heads, groups, hidden = sizes.num_attention_heads, sizes.num_key_value_heads, sizes.hidden_size
    kept = Width(
        hidden_size=hidden,
        intermediate_size=sizes.ffn_size,
        num_attention_heads=heads,
        num_key_value_heads=groups,
    )
    doubled = replace(kept, num_attention_heads=2 * heads, num_key_value_heads=2 * groups)
    return {
        "FFN": (
            replace(kept, intermediate_size=3 * sizes.ffn_size // 2),
            replace(kept, intermediate_size=2 * sizes.ffn_size, init="net2net"),
        ),
        "heads": (doubled, replace(doubled, init="net2net")),
        "hidden size": (
            Width(hidden_size=3 * hidden // 2),
            Width(hidden_size=2 * hidden, init="net2net"),
        ),
        "experts": (MoeAdd(addition="replicate", noise=0.0),),
    }
