"""Compute a target's weights in blocks of rows: as `TensorMap.rounded_weight`, in less memory.

Intermediate values fit in the CPU cache; none is as large as a whole tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import TYPE_CHECKING

from tritter.core.parameter_map.axis_map import AxisFactor
from tritter.core.parameter_map.tensor_map import (
    Read,
    TensorMap,
    compute_dtype,
    normal_numbers,
    take_along,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_BLOCK_ENTRIES = 2**18
# torch draws normal numbers in groups of 16. Blocks of whole groups equal a single draw if the last
# block has at least one group
_DRAW_GROUP = 16
_SUMMATION_ERROR = 1e-10  # relative error of sums in another order, with a wide margin
_WIDE, _DOUBLE = 4, 8  # bytes of a number in computations, and in sums
_AT_A_TIME = 6  # copies of a block or target: taken, drawn, added, chosen, rounded, written
_Shape = tuple[int, ...]
_Spread = tuple[float, float]  # mean and standard deviation


def _last_change(tensor_map: TensorMap) -> TensorMap:
    """Return the last map of a chain that changes the weights."""
    step = tensor_map
    while step.keeps_weights and isinstance(step.source, TensorMap) and not step.offset:
        step = step.source
    return step


def _makes_rows(step: TensorMap) -> bool:
    """Return True if each target row depends on single rows of a two-dimensional source."""
    is_local = step.fill.kind not in ("mean", "given") and step.fill.repeat == 1
    return step.source is not None and not step.blend and not step.offset and is_local


@dataclass(frozen=True, slots=True)
class WeightReader:
    """Reads the weights of target tensors in blocks of rows.

    Args:
        read: returns a stored source tensor by logical name.
        spreads: name of a source → its mean and standard deviation, shared by all targets.
    """

    read: Read
    spreads: dict[str, _Spread] = field(default_factory=dict)

    def blocks(self, tensor_map: TensorMap, dtype: torch.dtype) -> Iterator[Tensor]:
        """Yield the weights of a target in order, computed wide and rounded once, at the end.

        In a chain of maps, all but the last are applied to whole tensors.
        """
        step = _last_change(tensor_map)
        name = step.origin if step.is_verbatim else None
        if name is not None:
            for block in self.read(name).reshape(-1).split(_BLOCK_ENTRIES):
                yield block.to(dtype)
            return
        if step.source is not None and _makes_rows(step):
            name, source = self._value(step.source)
            if source.ndim == 2:
                donor = None if step.fill.donor is None else self._value(step.fill.donor)[1]
                spread = partial(self._spread, name, source)
                for block in _Rows(step, source, donor, spread).blocks():
                    yield block.to(dtype)
                return
        yield step.rounded_weight(self.read, dtype)

    def _value(self, source: str | TensorMap) -> tuple[str, Tensor]:
        """Return a tensor of the first model with its name, or a mapped tensor in a wide dtype."""

        def read_wide(name: str) -> Tensor:
            tensor = self.read(name)
            return tensor.to(compute_dtype(tensor))

        if isinstance(source, TensorMap) and not source.is_verbatim:
            return "", source.mapped(read_wide)
        name = source if isinstance(source, str) else source.origin
        assert name is not None
        return name, self.read(name)

    def _spread(self, name: str, source: Tensor) -> _Spread:
        """Return mean and standard deviation, up to the error of another order of summation.

        Large tensors are summed in blocks, unless sums cancel.
        """
        if name in self.spreads:
            return self.spreads[name]
        count, total, squares = source.numel(), 0.0, 0.0
        if count > _BLOCK_ENTRIES:
            for block in source.reshape(-1).split(_BLOCK_ENTRIES):
                wide = block.double()
                total += float(wide.sum())
                squares += float(wide.dot(wide))
        mean = total / max(count, 1)
        if count <= _BLOCK_ENTRIES or count * mean**2 > 0.5 * squares:
            wide = source.double()
            found = float(wide.mean()), float(wide.std())
        else:
            found = mean, ((squares - count * mean**2) / (count - 1)) ** 0.5
        if name:
            self.spreads[name] = found
        return found


class _Rows:
    """Computes the weights of a two-dimensional target from its source."""

    def __init__(
        self, step: TensorMap, source: Tensor, donor: Tensor | None, spread: Callable[[], _Spread]
    ) -> None:
        self._step, self._source, self._donor, self._spread = step, source, donor, spread
        self._axes = step.axes or (None, None)
        self._shape = tuple(
            size if axis is None else axis.index.numel()
            for axis, size in zip(self._axes, source.shape, strict=True)
        )
        self._dtype = compute_dtype(source)

    def blocks(self) -> Iterator[Tensor]:
        """Yield the weights in order, in the dtype of the computation."""
        import torch

        rows, columns = self._shape
        height = max(_BLOCK_ENTRIES // max(columns, 1) // _DRAW_GROUP, 1) * _DRAW_GROUP
        if columns < _DRAW_GROUP:
            height = max(rows, 1)
        row_factor, column_factor = (
            None if axis is None or bool((axis.weight == 1).all()) else axis.weight.to(self._dtype)
            for axis in self._axes
        )
        is_zeroed = self._step.is_zeroed
        add_noise = None if is_zeroed or not self._step.noise else self._noise()
        new_rows, new_columns = self._flags(lambda axis: axis.is_new)
        has_new = bool(new_rows.any()) or bool(new_columns.any())
        fill = self._filler() if has_new and not is_zeroed else None
        for begin in range(0, rows, height):
            end = min(begin + height, rows)
            if is_zeroed:
                yield torch.zeros((end - begin, columns), dtype=self._dtype)
                continue
            filled = None if fill is None else fill(begin, end)
            if filled is not None and bool(new_rows[begin:end].all()) and add_noise is None:
                yield filled.to(self._dtype).expand(end - begin, columns)
                continue
            values = self._taken(begin, end)
            if row_factor is not None:
                values.mul_(row_factor[begin:end, None])
            if column_factor is not None:
                values.mul_(column_factor)
            if add_noise is not None:
                values = add_noise(values, begin, end)
            if filled is not None:
                values = _chosen(values, filled, new_rows[begin:end], new_columns)
            yield values

    def _taken(self, begin: int, end: int) -> Tensor:
        """Return source entries at their target coordinates; new coordinates are undefined."""
        import torch

        row_axis, column_axis = self._axes
        part = self._source[begin:end]
        if row_axis is not None:
            index = row_axis.index[begin:end].clamp(min=0)
            first, last = int(index[0]), int(index[0]) + end - begin
            is_slice = bool((index == torch.arange(first, last)).all())
            part = self._source[first:last] if is_slice else self._source.index_select(0, index)
        if column_axis is None:
            return part.to(self._dtype, copy=True)
        return take_along(part, 1, column_axis.index, dtype=self._dtype)

    def _flags(self, flags: Callable[[AxisFactor], Tensor]) -> list[Tensor]:
        """Return the masks of flagged rows [rows] and columns [columns]."""
        import torch

        axes = zip(self._axes, self._shape, strict=True)
        return [torch.zeros(n, dtype=torch.bool) if a is None else flags(a) for a, n in axes]

    def _noise(self) -> Callable[[Tensor, int, int], Tensor] | None:
        """Return the function that adds noise to rows, or None if nothing is a copy."""
        import torch

        step = self._step
        rows, columns = self._flags(lambda axis: axis.is_duplicate)
        if not (step.is_copy or bool(rows.any()) or bool(columns.any())):
            return None
        _, deviation = self._spread()
        std = step.noise * deviation
        std = _as_float32(
            std, std * _SUMMATION_ERROR, lambda: step.noise * float(self._source.double().std())
        )
        draw = normal_numbers(step.noise_seed, std=std)

        def add(values: Tensor, begin: int, end: int) -> Tensor:
            noise = draw(values.shape).to(values)
            if step.is_copy:
                return values.add_(noise)
            return torch.where(rows[begin:end, None] | columns, values + noise, values)

        return add

    def _filler(self) -> Callable[[int, int], Tensor]:
        """Return the function that computes the fill of a block of rows."""
        import torch

        fill, source, columns = self._step.fill, self._source, self._shape[1]
        match fill.kind:
            case "random":
                draw = normal_numbers(fill.seed, std=fill.std)
            case "matched":
                (mean, std), scale = self._spread(), fill.scale
                mean, std = scale * mean, abs(scale) * std
                error = std * _SUMMATION_ERROR
                draw = normal_numbers(
                    fill.seed,
                    std=_as_float32(std, error, lambda: float((scale * source.double()).std())),
                    mean=_as_float32(mean, error, lambda: float((scale * source.double()).mean())),
                )
            case "row_mean":
                row = source.double().mean(dim=0).to(self._dtype)
                return lambda begin, end: row
            case "rows" | "quiet":
                before = torch.nn.functional.pad(
                    self._flags(lambda axis: axis.is_new)[0].cumsum(0), (1, 0)
                )
                make = fill.new_rows(source)

                def rows(begin: int, end: int) -> Tensor:
                    # New rows of the block, after rows that keep their values
                    first, last = int(before[begin]), int(before[end])
                    made = torch.zeros((end - begin, columns), dtype=self._dtype)
                    made[before[begin:end] < before[begin + 1 : end + 1]] = make(first, last).to(
                        self._dtype
                    )
                    return made

                return rows
            case "copy":
                donor = self._donor
                assert donor is not None, "a copy fill needs a donor"
                return lambda begin, end: donor[begin:end]
            case _:
                zero = torch.zeros((), dtype=self._dtype)
                return lambda begin, end: zero
        return lambda begin, end: draw(torch.Size((end - begin, columns)))


def _chosen(values: Tensor, filled: Tensor, new_rows: Tensor, new_columns: Tensor) -> Tensor:
    """Return values with the entries of new rows and columns from `filled`, in its place."""
    import torch

    filled = filled.to(values).expand(values.shape)
    first = int(new_columns.int().argmax()) if bool(new_columns.any()) else len(new_columns)
    if bool(new_rows.any()) or not bool(new_columns[first:].all()):
        return torch.where(new_rows[:, None] | new_columns, filled, values)
    values[:, first:] = filled[:, first:]  # usually, new columns are the last ones
    return values


def _as_float32(value: float, error: float, exact: Callable[[], float]) -> float:
    """Return `value` if float32 rounds it like the exact number, else the slow exact number."""
    import torch

    low, high = torch.tensor([value - error, value + error], dtype=torch.float64).float()
    return value if bool(low == high) else exact()


def peak_bytes(tensor_map: TensorMap, shape_of: Callable[[str], _Shape]) -> tuple[int, int]:
    """Return the peak memory of `WeightReader.blocks`; memory-mapped files do not count.

    Args:
        tensor_map: map of the target.
        shape_of: returns the shape of a source tensor by logical name.

    Returns:
        The bytes of each thread, and those in addition if sums in another order may round
        differently and are recomputed over a whole tensor, which is rare.
    """
    step = _last_change(tensor_map)
    if step.is_verbatim:
        return _BLOCK_ENTRIES * _DOUBLE, 0
    if not _makes_rows(step) or len(_shape(step, shape_of)) != 2:
        return _whole(step, shape_of), 0
    assert step.source is not None
    before, donor = step.source, step.fill.donor
    entries = prod(_source_shape(step, shape_of))
    usual = _AT_A_TIME * _WIDE * max(_BLOCK_ENTRIES, 16 * _shape(step, shape_of)[1])
    usual += 0 if donor is None or donor.is_verbatim else _whole(donor, shape_of)
    if isinstance(before, TensorMap) and not before.is_verbatim:
        usual += _whole(before, shape_of)
    if step.fill.kind in ("row_mean", "rows", "quiet"):
        usual += _DOUBLE * entries
    needs_spread = bool(step.noise) or step.fill.kind == "matched"
    return usual, 2 * _DOUBLE * entries if needs_spread else 0


def _whole(step: TensorMap, shape_of: Callable[[str], _Shape]) -> int:
    """Return the memory of a map over whole tensors, its sources included, in bytes."""
    sources = [source for source in (step.source, *step.blend, step.fill.donor) if source]
    num_bytes = sum(
        _whole(source, shape_of)
        if isinstance(source, TensorMap)
        else _WIDE * prod(shape_of(source))
        for source in sources
    )
    if step.source is not None and (
        step.noise or step.fill.kind in ("matched", "row_mean", "rows")
    ):
        num_bytes += 2 * _DOUBLE * prod(_source_shape(step, shape_of))
    if step.fill.others:  # the sum, and the tensor that is added to it
        num_bytes += 2 * _DOUBLE * prod(step.shape)
    return num_bytes + _AT_A_TIME * _WIDE * prod(_shape(step, shape_of))


def _source_shape(step: TensorMap, shape_of: Callable[[str], _Shape]) -> _Shape:
    source = step.source
    if isinstance(source, TensorMap):
        return _shape(source, shape_of)
    return step.shape if source is None else shape_of(source)


def _shape(step: TensorMap, shape_of: Callable[[str], _Shape]) -> _Shape:
    before = _source_shape(step, shape_of)
    axes = step.axes or (None,) * len(before)
    return tuple(
        size if axis is None else axis.index.numel()
        for size, axis in zip(before, axes, strict=True)
    )
