"""Shapes reachable with one expansion, in ascending order, and the nearest shape to a size."""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Self, get_args

from tritter.core.expansions import Dus, ExpansionSpec, Layers, Width, target_model
from tritter.core.families import Dimensions, Model
from tritter.core.families.presets import PRESETS, aspect_ratio_at
from tritter.errors import RequestError, refused
from tritter.limits import MAX_LAYERS, MAX_WIDTH

_MAX_MULTIPLE = 256  # FFN sizes keep their power-of-two divisor, up to this value
_QUANTISED = 64  # the largest block of a quantiser without a fallback
_FINEST_ROUNDING = 8  # round an FFN to multiples of at most an eighth of its size
_NUM_SIZES = 128  # candidates per direction, or up to three times as many
_COARSEST_STEP = 1 / 6  # of the hidden size; coarser steps would skip too many sizes
_FINE_STEP = 1 / 16  # of the hidden size
_SIZES = (
    "target_layers",
    "drop_layers",
    "positions",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
)


# Candidate hidden sizes. `proportional`: all sizes at which query and key/value heads grow in
# proportion; `round`: only the rounder ones; `fine`: the others, in steps of a sixteenth.
_WidthGrid = Literal["round", "proportional", "fine"]
_TOLERANCE = 0.1


@dataclass(frozen=True, slots=True)
class Shape:
    """A model's shape and the expansion that yields it."""

    spec: ExpansionSpec
    model: Model

    @classmethod
    def of(cls, source: Model, spec: ExpansionSpec) -> Self:
        """Return the shape that an expansion yields."""
        return cls(spec, target_model(source, [spec]))

    @classmethod
    def nearest(
        cls, source: Model, specs: Sequence[ExpansionSpec], parameters: float
    ) -> Self | None:
        """Return the shape with the nearest number of parameters, by ratio.

        Args:
            source: the model to expand.
            specs: expansions of the source, in ascending order of parameters.
            parameters: the target size.
        """
        if not specs:
            return None
        index = bisect_left(specs, parameters, key=lambda spec: cls.of(source, spec).parameters)
        around = [cls.of(source, spec) for spec in specs[max(index - 1, 0) : index + 1]]
        return min(around, key=lambda shape: shape.miss(parameters))

    @property
    def parameters(self) -> int:
        return self.model.num_parameters

    def miss(self, parameters: float) -> float:
        """Return the |log ratio| of its parameters to a number of them."""
        return abs(math.log(self.parameters / parameters))

    @property
    def lopsidedness(self) -> float:
        """The |log ratio| of its aspect ratio to that of presets of its size."""
        return abs(math.log(self.model.sizes.aspect_ratio / aspect_ratio_at(self.parameters)))


@dataclass(frozen=True, slots=True)
class GrowthMethods:
    """The expansions of a plan, without sizes.

    Args:
        depth: a depth expansion such as `Dus()` or `LlamaPro()`; None disables depth.
        width: a width expansion such as `Width()`; None disables width.
    """

    depth: ExpansionSpec | None = None
    width: ExpansionSpec | None = None

    def __post_init__(self) -> None:
        for spec in filter(None, (self.depth, self.width)):
            for name in _SIZES:
                if (value := getattr(spec, name, None)) is not None:
                    raise RequestError(
                        f"expansion.{spec.name}.{name} = {value}: the plan chooses the sizes; "
                        "remove it, or expand without a plan."
                    )

    @classmethod
    def usual(cls, model: Model) -> "GrowthMethods":
        """Return `Dus`, and `Width` with the initialisation for the model's family."""
        takes_copies = model.family.subtracts_mean
        return cls(depth=Dus(), width=Width(init="net2net" if takes_copies else "fresh"))

    @classmethod
    def of(cls, specs: Sequence[ExpansionSpec], model: Model) -> "GrowthMethods":
        """Group methods by direction; without any, return the `usual` ones of the model."""
        if not specs:
            return cls.usual(model)
        found: dict[str, ExpansionSpec] = {}
        for spec in specs:
            direction = _direction(spec)
            if isinstance(spec, Layers):
                raise RequestError(
                    "expansion = layers: it lists the layers of the result, so it has no size to "
                    "choose. Remove the target, or use dus, stack, interpolate or llama_pro."
                )
            if direction is None:
                raise RequestError(
                    f"expansion = {spec.name}: a plan grows only depth and width; it can't choose "
                    f"the sizes of {spec.name}."
                )
            if direction in found:
                raise RequestError(
                    f"expansion = {found[direction].name}, {spec.name}: both grow {direction}; "
                    "choose one of them."
                )
            found[direction] = spec
        return cls(depth=found.get("depth"), width=found.get("width"))

    def depth_specs(self, source: Model, *, min_aspect_ratio: float = 0.0) -> list[ExpansionSpec]:
        """Return the depth expansions to at most twice the layers, in ascending order.

        Args:
            source: the model to expand.
            min_aspect_ratio: minimum hidden size per layer.
        """
        if self.depth is None:
            return []
        sizes = source.sizes
        most = min(2 * sizes.num_hidden_layers, MAX_LAYERS)
        layers = _thin_out(range(sizes.num_hidden_layers + 1, most + 1))
        specs = (
            _with_sizes(self.depth, target_layers=count)
            for count in layers
            if sizes.hidden_size / count >= min_aspect_ratio
        )
        return [spec for spec in specs if _is_possible(source, spec)]

    def width_specs(
        self, source: Model, *, grid: _WidthGrid, max_aspect_ratio: float = math.inf
    ) -> list[ExpansionSpec]:
        """Return the width expansions to at most twice the hidden size, in ascending order.

        Args:
            source: the model to expand.
            grid: candidate hidden sizes.
            max_aspect_ratio: maximum hidden size per layer.
        """
        if self.width is None:
            return []
        sizes = source.sizes
        hidden = sizes.hidden_size
        # As round as the source: quantisers need multiples of 32 or 64
        unit = math.lcm(_unit(sizes, grid), _rounding(hidden, hidden, most=_QUANTISED))
        unit *= max(1, round(hidden * _FINE_STEP / unit)) if grid == "fine" else 1
        heads = sizes.num_attention_heads if grid == "fine" else None
        proportional = _unit(sizes, "proportional")
        most = min(2 * hidden, MAX_WIDTH)
        specs = (
            _with_sizes(
                self.width,
                hidden_size=size,
                intermediate_size=_ffn_size(sizes, size),
                num_attention_heads=heads,
                num_key_value_heads=heads and sizes.num_key_value_heads,
            )
            for size in _thin_out(range((hidden // unit + 1) * unit, most + 1, unit))
            if size / sizes.num_hidden_layers <= max_aspect_ratio
            and (grid != "fine" or size % proportional)
        )
        return [spec for spec in specs if _is_possible(source, spec)]

    def specs_like(self, source: Model, spec: ExpansionSpec) -> list[ExpansionSpec]:
        """Return the expansions of a model in the direction of `spec`."""
        if _direction(spec) == "depth":
            return self.depth_specs(source)
        grids: tuple[_WidthGrid, ...] = ("proportional", "fine")
        return [spec for grid in grids for spec in self.width_specs(source, grid=grid)]

    def deeper(
        self, source: Model, parameters: float, *, min_aspect_ratio: float = 0.0
    ) -> Shape | None:
        """Return the deeper shape with the nearest number of parameters."""
        specs = self.depth_specs(source, min_aspect_ratio=min_aspect_ratio)
        return Shape.nearest(source, specs, parameters)

    def wider(
        self, source: Model, parameters: float, *, slack: float, max_aspect_ratio: float = math.inf
    ) -> Shape | None:
        """Return a wider shape: the roundest one that is close enough, otherwise the nearest.

        Args:
            source: the model to expand.
            parameters: the target size.
            slack: shapes within this factor of the target are close enough.
            max_aspect_ratio: maximum hidden size per layer.
        """
        found: list[Shape] = []
        for grid in get_args(_WidthGrid):
            specs = self.width_specs(source, grid=grid, max_aspect_ratio=max_aspect_ratio)
            shape = Shape.nearest(source, specs, parameters)
            if shape is not None:
                found.append(shape)
                if shape.miss(parameters) <= math.log(slack):
                    return shape
        return min(found, key=lambda shape: shape.miss(parameters), default=None)


def _is_possible(source: Model, spec: ExpansionSpec) -> bool:
    try:
        target_model(source, [spec])
    except RequestError:
        return False
    return True


def _thin_out(sizes: range) -> range:
    """Return all sizes, or every n-th of many; n is odd, because methods may need even sizes."""
    return sizes[:: len(sizes) // _NUM_SIZES // 2 * 2 + 1]


def _unit(sizes: Dimensions, grid: _WidthGrid) -> int:
    """Return a divisor of the hidden sizes of a grid."""
    hidden, heads = sizes.hidden_size, sizes.num_attention_heads
    unit = heads if grid == "fine" else hidden // math.gcd(hidden, heads, sizes.num_key_value_heads)
    while grid == "round" and 2 * unit <= hidden * _COARSEST_STEP:
        unit *= 2
    return unit


def _direction(spec: ExpansionSpec) -> str | None:
    names = {field.name for field in fields(spec)}  # type: ignore[arg-type]
    if "target_layers" in names:
        return "depth"
    return "width" if "hidden_size" in names else None


def _with_sizes(spec: Any, **sizes: int | None) -> ExpansionSpec:
    return replace(spec, **sizes)


def _ffn_size(sizes: Dimensions, hidden_size: int) -> int | None:
    """Return the proportional FFN size, rounded like the old one; None with experts."""
    if sizes.num_experts:
        return None
    old = sizes.intermediate_size
    exact = old * hidden_size / sizes.hidden_size
    multiple = _rounding(old, exact, most=_MAX_MULTIPLE)
    return max(old, round(exact / multiple) * multiple)


def _rounding(old: int, exact: float, *, most: int) -> int:
    """Return the largest power of two that divides `old`, up to `most` and to a part of `exact`."""
    multiple = math.gcd(old, most)
    while multiple > 1 and multiple > exact / _FINEST_ROUNDING:
        multiple //= 2  # otherwise the proportion would drift from step to step
    return multiple


def nearest_preset(parameters: int) -> tuple[str, Model]:
    """Return name and model of the nearest preset, if need be with another number of layers."""

    def miss(model: Model) -> float:
        return abs(model.num_parameters / parameters - 1)

    models = {name: Model(preset.config()) for name, preset in PRESETS.items()}
    if not any(miss(model) <= _TOLERANCE for model in models.values()):
        models = dict(_with_other_depth(name, each, parameters) for name, each in models.items())
    name, best = min(models.items(), key=lambda item: miss(item[1]))
    if miss(best) > _TOLERANCE:
        raise refused(
            "source",
            f"{parameters:,} parameters",
            "the nearest preset, with up to twice its layers or fewer, has "
            f"{best.num_parameters:,}; use a checkpoint folder",
        )
    return name, best


def _with_other_depth(name: str, whole: Model, parameters: int) -> tuple[str, Model]:
    """Return a preset with the nearest number of layers, at most twice its own."""
    one, two = (whole.with_layers([0] * n).num_parameters for n in (1, 2))
    most = 2 * whole.sizes.num_hidden_layers
    layers = min(max(1 + round((parameters - one) / (two - one)), 1), most)
    return f"{name} with {layers} layers", whole.with_layers([0] * layers)
