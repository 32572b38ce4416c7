"""The shape that a number of parameters means where there is no model yet: a preset's, or near."""

from dataclasses import dataclass

from tritter.errors import RequestError
from tritter.families import Config, count_parameters, family_of
from tritter.families.presets import PRESETS, Preset

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
        raise RequestError(
            f"source = {parameters:,} parameters: the presets, with up to twice their layers or "
            f"fewer, come no nearer than {best.parameters:,}; give a checkpoint folder."
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
