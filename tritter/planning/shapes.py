"""The shapes that one expansion can reach, in growing order, and the one nearest to a size."""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from tritter.core.expansions import Dus, ExpansionSpec, Width, target_config
from tritter.core.expansions.specification import is_possible
from tritter.core.families import Config, Dimensions, count_parameters, family_of
from tritter.core.families.presets import PRESETS, Preset
from tritter.errors import RequestError, refused
from tritter.limits import MAX_LAYERS, MAX_WIDTH

_LARGEST_MULTIPLE = 256  # FFN sizes stay multiples of what they were multiples of, up to this
_FINEST_ROUNDING = 8  # an FFN is rounded to multiples of an eighth of itself at most
_MOST_SIZES = 128  # looked at in one direction, or up to three times as many
_COARSEST_STEP = 1 / 6  # of the hidden size; coarser ones would miss too many sizes
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


# Hidden sizes at which query and key/value heads grow in proportion, the rounder ones of them or
# all; or steps of a sixteenth while the heads stay.
WidthGrid = Literal["round", "proportional", "fine"]
WIDTH_GRIDS: tuple[WidthGrid, ...] = ("round", "proportional", "fine")


@dataclass(frozen=True, slots=True)
class Shape:
    """A model's shape, and the expansion that leads to it."""

    spec: ExpansionSpec
    config: Config
    parameters: int

    @property
    def aspect_ratio(self) -> float:
        return aspect_ratio(self.config)


@dataclass(frozen=True, slots=True)
class GrowthMethods:
    """The expansions that a plan may use, their sizes open; None: not that direction.

    Args:
        depth: such as `Dus()` or `LlamaPro()`.
        width: `Width()`.

    Raises:
        RequestError: a method has a size of its own, or grows in no direction that is planned.
    """

    depth: ExpansionSpec | None = None
    width: ExpansionSpec | None = None

    def __post_init__(self) -> None:
        for spec in filter(None, (self.depth, self.width)):
            for name in _SIZES:
                if (value := getattr(spec, name, None)) is not None:
                    raise RequestError(
                        f"expansion.{spec.name}.{name} = {value}: the plan chooses the sizes; "
                        "leave it out, or expand without a plan."
                    )

    @classmethod
    def usual(cls, config: Config) -> "GrowthMethods":
        """Return `Dus` and the `Width` that models of a config's family take."""
        takes_copies = family_of(config).subtracts_mean
        return cls(depth=Dus(), width=Width(init="net2net" if takes_copies else "fresh"))

    @classmethod
    def of(cls, specs: Sequence[ExpansionSpec]) -> "GrowthMethods":
        """Sort methods by direction; without any, `Dus` and `Width`.

        Raises:
            RequestError: a method has no sizes that can be planned, or two grow one direction.
        """
        if not specs:
            return cls(depth=Dus(), width=Width())
        found: dict[str, ExpansionSpec] = {}
        for spec in specs:
            direction = _direction(spec)
            if direction is None:
                raise RequestError(
                    f"expansion = {spec.name}: a plan grows depth and width; it can't choose the "
                    f"sizes of {spec.name}."
                )
            if direction in found:
                raise RequestError(
                    f"expansion = {found[direction].name}, {spec.name}: both grow {direction}; "
                    "name one of them."
                )
            found[direction] = spec
        return cls(depth=found.get("depth"), width=found.get("width"))


def aspect_ratio(config: Config) -> float:
    """Return a model's hidden size per layer."""
    sizes = family_of(config).dimensions(config)
    return sizes.hidden_size / sizes.num_hidden_layers


def depth_specs(
    config: Config, method: ExpansionSpec, *, least_aspect_ratio: float = 0.0
) -> list[ExpansionSpec]:
    """Return the depth expansions of at most twice the layers, fewest first.

    Args:
        least_aspect_ratio: hidden size per layer that must be left.
    """
    sizes = family_of(config).dimensions(config)
    most = min(2 * sizes.num_hidden_layers, MAX_LAYERS)
    layers = _thinned(range(sizes.num_hidden_layers + 1, most + 1))
    specs = [
        _with_sizes(method, target_layers=count)
        for count in layers
        if sizes.hidden_size / count >= least_aspect_ratio
    ]
    return [spec for spec in specs if is_possible(config, spec)]


def width_specs(
    config: Config,
    method: ExpansionSpec,
    *,
    grid: WidthGrid,
    most_aspect_ratio: float = math.inf,
) -> list[ExpansionSpec]:
    """Return the width expansions of at most twice the hidden size, narrowest first.

    Args:
        grid: which hidden sizes to consider.
        most_aspect_ratio: hidden size per layer that must not be passed.
    """
    sizes = family_of(config).dimensions(config)
    hidden, unit = sizes.hidden_size, _unit(sizes, grid)
    heads = sizes.num_attention_heads if grid == "fine" else None
    most = min(2 * hidden, MAX_WIDTH)
    specs = [
        _with_sizes(
            method,
            hidden_size=size,
            intermediate_size=_ffn_size(sizes, size),
            num_attention_heads=heads,
            num_key_value_heads=heads and sizes.num_key_value_heads,
        )
        for size in _thinned(range((hidden // unit + 1) * unit, most + 1, unit))
        if size / sizes.num_hidden_layers <= most_aspect_ratio
    ]
    return [spec for spec in specs if is_possible(config, spec)]


def specs_like(config: Config, spec: ExpansionSpec, methods: GrowthMethods) -> list[ExpansionSpec]:
    """Return the expansions in the direction of `spec` that grow a model of `config`."""
    if _direction(spec) == "depth":
        assert methods.depth is not None
        return depth_specs(config, methods.depth)
    assert methods.width is not None
    return width_specs(config, methods.width, grid="fine")


def _thinned(sizes: range) -> range:
    """Return every size or, of thousands, an odd part of them: methods may want even ones."""
    return sizes[:: len(sizes) // _MOST_SIZES // 2 * 2 + 1]


def nearest_shape(
    config: Config, specs: Sequence[ExpansionSpec], parameters: float
) -> Shape | None:
    """Return the shape whose count of parameters is nearest, by ratio.

    Args:
        specs: expansions of a model of `config`, in the order of the counts they lead to.
    """
    if not specs:
        return None
    place = bisect_left(specs, parameters, key=lambda spec: reached(config, spec).parameters)
    around = [reached(config, spec) for spec in specs[max(place - 1, 0) : place + 1]]
    return min(around, key=lambda shape: abs(math.log(shape.parameters / parameters)))


def reached(config: Config, spec: ExpansionSpec) -> Shape:
    """Return the shape that an expansion leads to.

    Raises:
        RequestError: it can't be had.
    """
    target = target_config(config, [spec])
    return Shape(spec, target, count_parameters(target))


def _unit(sizes: Dimensions, grid: WidthGrid) -> int:
    """Return what the hidden sizes of a grid are multiples of."""
    hidden, heads = sizes.hidden_size, sizes.num_attention_heads
    if grid == "fine":
        return heads * max(1, round(hidden * _FINE_STEP / heads))
    unit = hidden // math.gcd(hidden, heads, sizes.num_key_value_heads)
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
    """Return the FFN size in proportion, as round as the old one; experts follow by themselves."""
    if sizes.num_experts:
        return None
    old = sizes.intermediate_size
    wanted = old * hidden_size / sizes.hidden_size
    multiple = math.gcd(old, _LARGEST_MULTIPLE)
    while multiple > 1 and multiple > wanted / _FINEST_ROUNDING:
        multiple //= 2  # else the proportion would drift from step to step
    return max(old, round(wanted / multiple) * multiple)


TOLERANCE = 0.1


@dataclass(frozen=True, slots=True)
class NamedShape:
    """A shape, and what it is called."""

    name: str
    config: Config
    parameters: int


def named_shape(parameters: int) -> NamedShape:
    """Return the preset of about so many parameters, or else one with fewer or more layers.

    Raises:
        RequestError: neither comes within 10 %; names what there is.
    """
    whole = [preset_shape(preset) for preset in PRESETS.values()]
    near = [shape for shape in whole if _miss(shape, parameters) <= TOLERANCE]
    shapes = near or [_with_other_depth(preset, parameters) for preset in PRESETS.values()]
    best = min(shapes, key=lambda shape: _miss(shape, parameters))
    if _miss(best, parameters) > TOLERANCE:
        raise refused(
            "source",
            f"{parameters:,} parameters",
            "the presets, with up to twice their layers or fewer, "
            f"come no nearer than {best.parameters:,}; give a checkpoint folder",
        )
    return best


def preset_shape(preset: Preset) -> NamedShape:
    """Return a preset's shape, counted."""
    config = preset.config()
    return NamedShape(preset.name, config, count_parameters(config))


def _with_other_depth(preset: Preset, parameters: int) -> NamedShape:
    """Return a preset with the number of layers that comes nearest, at most twice its own."""
    config = preset.config()
    family = family_of(config)
    one, two = (family.count_parameters({**config, "num_hidden_layers": n}) for n in (1, 2))
    layers = min(max(1 + round((parameters - one) / (two - one)), 1), 2 * preset.num_hidden_layers)
    other = {**config, "num_hidden_layers": layers}
    return NamedShape(f"{preset.name} with {layers} layers", other, count_parameters(other))


def _miss(shape: NamedShape, parameters: int) -> float:
    return abs(shape.parameters / parameters - 1)
