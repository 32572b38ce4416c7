"""What making a target's weights takes of memory, by the shapes alone; see `WeightReader`."""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

from tritter.parameter_map.rows import BLOCK_ENTRIES, in_order, makes_rows
from tritter.parameter_map.tensor_map import TensorMap

_WIDE, _DOUBLE = 4, 8  # bytes of a number that is computed on, of one that is summed up
_AT_A_TIME = 6  # of a block, or of a whole target: taken, drawn, added, chosen, rounded, written

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Held:
    """Bytes in memory while one target is made; what is mapped from its file takes none.

    Args:
        usual: by each thread that makes one.
        rare: on top, where sums in another order might round otherwise, and are taken anew of a
            whole tensor.
    """

    usual: int
    rare: int


def held_bytes(tensor_map: TensorMap, shape_of: Callable[[str], Shape]) -> Held:
    """Return what `WeightReader.blocks` holds at most at a time.

    Args:
        shape_of: gives the shape of a source tensor by logical name.
    """
    step = in_order(tensor_map)
    if step.is_verbatim:
        return Held(BLOCK_ENTRIES * _DOUBLE, 0)
    if not makes_rows(step) or len(_shape(step, shape_of)) != 2:
        return Held(_whole(step, shape_of), 0)
    assert step.source is not None
    before, donor = step.source, step.fill.donor
    entries = prod(_source_shape(step, shape_of))
    usual = _AT_A_TIME * _WIDE * max(BLOCK_ENTRIES, 16 * _shape(step, shape_of)[1])
    usual += 0 if donor is None or donor.is_verbatim else _whole(donor, shape_of)
    if isinstance(before, TensorMap) and not before.is_verbatim:
        usual += _whole(before, shape_of)
    if step.fill.kind == "row_mean":
        usual += _DOUBLE * entries
    is_spread_asked = bool(step.noise) or step.fill.kind == "matched"
    return Held(usual, 2 * _DOUBLE * entries if is_spread_asked else 0)


def _whole(step: TensorMap, shape_of: Callable[[str], Shape]) -> int:
    """Return what a map takes that is applied to whole tensors, its sources included."""
    sources = [source for source in (step.source, *step.blend, step.fill.donor) if source]
    taken = sum(
        _whole(source, shape_of)
        if isinstance(source, TensorMap)
        else _WIDE * prod(shape_of(source))
        for source in sources
    )
    if step.source is not None and (step.noise or step.fill.kind in ("matched", "row_mean")):
        taken += 2 * _DOUBLE * prod(_source_shape(step, shape_of))
    return taken + _AT_A_TIME * _WIDE * prod(_shape(step, shape_of))


def _source_shape(step: TensorMap, shape_of: Callable[[str], Shape]) -> Shape:
    source = step.source
    if isinstance(source, TensorMap):
        return _shape(source, shape_of)
    return step.shape if source is None else shape_of(source)


def _shape(step: TensorMap, shape_of: Callable[[str], Shape]) -> Shape:
    before = _source_shape(step, shape_of)
    axes = step.axes or (None,) * len(before)
    return tuple(
        size if axis is None else axis.index.numel()
        for size, axis in zip(before, axes, strict=True)
    )
