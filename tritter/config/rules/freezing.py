"""What `forgetting=freeze` leaves untrained, held against the models that a run trains."""

from collections.abc import Iterator
from math import prod
from typing import Any

from tritter.config.rounds import planned_rounds
from tritter.config.schema import RunConfig
from tritter.errors import Problem
from tritter.expansion import target_config
from tritter.families import Config, LogicalTensor, Places, family_of

_KEY = "forgetting.freeze"
_GROWING = ("ffn.gate", "ffn.up", "ffn.down")  # what is trained under growth.freeze_attention


def freezing(config: RunConfig) -> Any | None:
    """Return the options of `freeze`; None where nothing is frozen by it."""
    return next((one.options for one in config.forgetting if one.name == "freeze"), None)


def freezing_problems(config: RunConfig, source: Config) -> Iterator[Problem]:
    """Yield what can't be frozen of the models that are trained.

    Args:
        source: config.json of the model that the run starts from.
    """
    options = freezing(config)
    if options is None:
        return
    steps, at = config.training.max_steps, options.first_step(config.training.max_steps)
    if at is not None and at >= steps:
        reason = (
            f"the training has training.max_steps = {steps}; allowed is less, or null for never"
        )
        yield Problem(f"{_KEY}.until", options.until, reason=reason)
    if options.new_only and (reason := _why_nothing_is_new(config)):
        yield Problem(f"{_KEY}.new_only", True, reason=reason)
    grown = _grown(config, source)
    if options.old_experts and not family_of(grown[-1]).has_experts:
        reason = "the model is dense and has no experts; name layers instead"
        yield Problem(f"{_KEY}.old_experts", True, reason=reason)
    if options.places is not None and (reason := _why_no_places(options.places, grown)):
        yield Problem(f"{_KEY}.layers", options.layers, reason=reason)


def num_frozen(config: RunConfig, trained: Config, before: Config) -> int:
    """Return how many parameters of a training may stay out of the optimizer to its end.

    At most: where a parameter is frozen in part, the optimizer holds the whole of it.

    Args:
        before: config.json of the model before the expansion.
    """
    options, family = freezing(config), family_of(trained)
    if config.growth is not None and config.growth.options.freeze_attention:
        sizes = (prod(family.shape(tensor, trained)) for tensor, _ in _tensors(trained)
                 if tensor.kind in _GROWING)  # fmt: skip
        return family.count_parameters(trained) - sum(sizes)
    if options is None or options.until is not None:
        return 0
    frozen = 0
    appends = any(getattr(spec, "is_append", False) for spec in config.expansion)
    places = options.places
    for tensor, is_tied in _tensors(trained):
        is_held = places is not None and places.has(tensor, is_tied=is_tied)
        if is_held or (options.old_experts and tensor.is_per_expert and not appends):
            frozen += prod(family.shape(tensor, trained))
    return max(frozen, family.count_parameters(before)) if options.new_only else frozen


def _grown(config: RunConfig, source: Config) -> tuple[Config, ...]:
    """Return what is trained, the smallest first."""
    control = (source,) if config.control else ()
    if config.pipeline.target_params is not None:
        return *control, *(shape.config for shape in planned_rounds(config, source))
    return *control, target_config(source, config.expansion)


def _why_nothing_is_new(config: RunConfig) -> str:
    specs, is_planned = config.expansion, config.pipeline.target_params is not None
    if config.control:
        return "the control does not grow, and nothing of it would be trained; leave one out"
    if len(config.text.tasks) > 1:
        return "the model grows for the first task alone, and the others add nothing new"
    if not specs and not is_planned:
        return "without an expansion nothing is new; choose one, or name layers instead"
    if specs and all(s.expansion_type == "depth" and not s.is_exact for s in specs):
        names = " and ".join(spec.name for spec in specs)
        return f"{names} only copies layers, which are not new; use llama_pro, width or moe"
    return ""


def _why_no_places(places: Places, grown: tuple[Config, ...]) -> str:
    smallest = grown[0]
    layers = family_of(smallest).dimensions(smallest).num_hidden_layers
    if places.last_layer >= layers:
        which = "smallest model that is trained" if len(grown) > 1 else "model that is trained"
        return f"the {which} has {layers} layers; allowed are 0 to {layers - 1}"
    for word in places.parts:
        one = Places.read([word])
        if not any(one.has(tensor, is_tied=is_tied) for tensor, is_tied in _tensors(grown[-1])):
            return f"the model has no {word}; leave it out"
    for each in grown:
        if all(places.has(tensor, is_tied=is_tied) for tensor, is_tied in _tensors(each)):
            return "that is all of the model, and nothing is left to train"
    return ""


def _tensors(config: Config) -> Iterator[tuple[LogicalTensor, bool]]:
    """Yield the tensors of a model, each with whether its head is tied."""
    tensors = family_of(config).logical_tensors(config)
    is_tied = all(tensor.kind != "head" for tensor in tensors)
    yield from ((tensor, is_tied) for tensor in tensors)
