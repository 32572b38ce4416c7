"""The map of a recorded expansion, rebuilt from its record and read as a table."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from tritter.checkpoint import ExpansionRecord
from tritter.errors import TritterError
from tritter.expansion import EXPANSIONS
from tritter.families import Config, check_config, family_of
from tritter.parameter_map import ParameterMap, TensorMap

if TYPE_CHECKING:
    from torch import Tensor

_MOST_VALUES = 3


@dataclass(frozen=True, slots=True)
class MapRow:
    """Tensors of one kind that one expansion treats alike.

    Args:
        kind: of a logical tensor.
        layers: target layers, such as `0, 2-4`; empty for a tensor outside the layers.
        source_shape: shape before.
        target_shape: shape after.
        weight: factors that weights are multiplied with where they have a source.
        gradient: the same of gradients.
        fill: what stands where there is no source; random with its standard deviation.
        state: whether moments and importances follow.
    """

    kind: str
    layers: str
    source_shape: tuple[int, ...]
    target_shape: tuple[int, ...]
    weight: str
    gradient: str
    fill: str
    state: str


def rebuilt_map(record: ExpansionRecord) -> ParameterMap:
    """Return the parameter map that a record describes.

    Raises:
        TritterError: the method or its options are not ones that this Tritter has.
    """
    spec_type = EXPANSIONS.get(record.method)
    if spec_type is None:
        raise TritterError(f"this Tritter has no method '{record.method}'")
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in record.options.items()}
    source: Config = dict(record.source_config)
    target: Config = dict(record.target_config)
    try:
        for config in (source, target):
            check_config(family_of(config), config)
        spec = spec_type(**options)
        return spec.parameter_map(family_of(source), source, target, seed=record.seed)
    # Options and configs stand in a file that anybody may have written, and whatever does not fit
    # comes out of the map's arithmetic as whatever it happens to be
    except Exception as error:
        raise TritterError(f"its record does not describe a map ({error})") from error


def map_rows(parameter_map: ParameterMap, source: Config, target: Config) -> tuple[MapRow, ...]:
    """Return the rows of a map's table, in the order of a forward pass, layers joined."""
    family, source_family = family_of(target), family_of(source)
    sources = {
        t.name: source_family.shape(t, source) for t in source_family.logical_tensors(source)
    }
    layers: dict[MapRow, list[int]] = {}
    for tensor in family.logical_tensors(target):
        tensor_map = parameter_map.tensors[tensor.name]
        row = MapRow(
            kind=tensor.kind,
            layers="",
            source_shape=sources[tensor_map.origin] if tensor_map.origin else (),
            target_shape=family.shape(tensor, target),
            weight="0" if tensor_map.is_zeroed else _factors(tensor_map, "weight"),
            gradient=_factors(tensor_map, "gradient"),
            fill=_fill(tensor_map),
            state=tensor_map.state,
        )
        layers.setdefault(row, []).extend([] if tensor.layer is None else [tensor.layer])
    kinds = list(dict.fromkeys(row.kind for row in layers))
    ordered = sorted(layers, key=lambda row: kinds.index(row.kind))
    return tuple(replace(row, layers=_ranges(layers[row])) for row in ordered)


def _ranges(numbers: Iterable[int]) -> str:
    """Return `0, 2-4` for 0, 2, 3, 4."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)


def _factors(tensor_map: TensorMap, quantity: str) -> str:
    """Return the different products of the axes' factors over entries that have a source."""
    import torch

    values = torch.ones(1, dtype=torch.float64)
    for axis in tensor_map.axes:
        if axis is not None:
            along: Tensor = getattr(axis, quantity)[axis.index >= 0].unique()
            values = torch.outer(values, along).flatten().unique()
    texts = list(dict.fromkeys(f"{value:.4g}" for value in values.tolist()))
    if len(texts) > _MOST_VALUES:
        return f"{texts[0]} .. {texts[-1]}"
    return ", ".join(texts)


def _fill(tensor_map: TensorMap) -> str:
    """Return what new entries hold, and what is added to copies."""
    has_gaps = tensor_map.source is None or any(
        axis is not None and bool((axis.index < 0).any()) for axis in tensor_map.axes
    )
    parts = []
    if has_gaps:
        fill = tensor_map.fill
        parts.append(f"random {fill.std:.2g}" if fill.kind == "random" else fill.kind)
    if tensor_map.noise:
        parts.append(f"noise {tensor_map.noise:g} on copies")
    return "; ".join(parts) or "-"
