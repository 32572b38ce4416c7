"""`growth`: one class with its keys, and two of them that name classes of their own."""

from collections.abc import Iterator, Mapping
from typing import Any

from tritter.config.chosen import adam_problems, chosen_class
from tritter.config.growth_config import GrowthConfig
from tritter.config.reading import Reader
from tritter.config.rules.freezing import freezing
from tritter.config.schema import RunConfig
from tritter.errors import Problem, nearest
from tritter.expansion import target_config
from tritter.families import Config, family_of
from tritter.options import is_options, read_options
from tritter.targets import TARGET, dotted, resolve

_KIND = "tritter.growth.method.NeuronGrowth"


def growth_class(raw: Mapping[str, Any]) -> type | None:
    """Return the class that `growth` names; None where nothing grows.

    Raises:
        RequestError: it is none, or keys are set of what was not chosen.
    """
    return chosen_class("growth", raw, base=_KIND, nothing="nothing grows")


def read_growth(
    reader: Reader, raw: Mapping[str, Any], classes: Mapping[str, Any]
) -> GrowthConfig | None:
    """Return what grows in a run, or None when nothing does, or there were problems (reported)."""
    kind = classes.get("growth")
    if kind is None:
        return None
    values = {key: value for key, value in raw.items() if key != TARGET}
    options = reader.read(kind.Options, values, prefix="growth")
    parts = {key: _part(reader, key, raw.get(key), kind) for key in kind.PARTS}
    if options is None or None in parts.values():
        return None
    return GrowthConfig(kind=kind, options=options, parts=parts)


def growth_problems(config: RunConfig) -> Iterator[Problem]:
    """Yield what of a run does not go together with growth."""
    if config.growth is None:
        return
    yield from adam_problems(config, doing="growth maps Adam's two moments to the new shapes")
    if config.pipeline.target_params is not None:
        reason = "its plan of expansions counts every parameter; with growth=none it is kept"
        yield Problem("pipeline.target_params", config.pipeline.target_params, reason=reason)
    frozen = freezing(config)
    if frozen is not None and frozen.new_only:
        reason = "neurons that grow would change what is frozen in part; with growth=none it works"
        yield Problem("forgetting.freeze.new_only", True, reason=reason)
    places = None if frozen is None or frozen.until is not None else frozen.places
    if places is not None and "ffn" in places.parts:
        reason = "the FFNs, in which neurons grow, would be frozen; freeze attention, or an end"
        yield Problem("forgetting.freeze.layers", frozen and frozen.layers, reason=reason)
    if any(spec.new_blocks_only for spec in config.expansion):
        reason = "with new_blocks_only old FFNs are frozen, and would grow without being trained"
        yield Problem("growth", dotted(config.growth.kind), reason=reason)
    yield from _option_problems(config.growth, config.training.max_steps)


def growth_start_problems(config: RunConfig, source: Config) -> Iterator[Problem]:
    """Yield why the model that is trained can't grow.

    Args:
        source: config.json of the model that the run starts from.
    """
    if config.growth is None:
        return
    grown = target_config(source, config.expansion)
    if family_of(grown).has_experts:
        reason = (
            f"{grown['model_type']} has experts, and neurons grow in dense FFNs only; choose an "
            "expansion without experts, or growth=none"
        )
        yield Problem("growth", config.growth.kind.__name__, reason=reason)
        return
    if family_of(grown).has_stacked_ffn:
        reason = (
            f"in {grown['model_type']} gate and up are one tensor, and neurons grow in FFNs in "
            "which they are two; choose expansion=width, or growth=none"
        )
        yield Problem("growth", config.growth.kind.__name__, reason=reason)
        return
    steps, layers = config.training.max_steps, family_of(grown).dimensions(grown).num_hidden_layers
    if reason := config.growth.made().why_never(max_steps=steps, num_layers=layers):
        yield Problem("growth.trigger", config.growth.options.trigger, reason=reason)


def _option_problems(growth: GrowthConfig, max_steps: int) -> Iterator[Problem]:
    options, trigger = growth.options, growth.parts["trigger"]
    if trigger.needs_budget and not (options.max_new_parameters or options.max_extra_flops):
        reason = "say what it may spend: growth.max_new_parameters or growth.max_extra_flops"
        yield Problem("growth.trigger", options.trigger, reason=reason)
    if options.at is not None and not trigger.takes_steps:
        reason = f"steps are those of growth.trigger=schedule, and the trigger is {options.trigger}"
        yield Problem("growth.at", list(options.at), reason=reason)
    late = [step for step in options.at or () if step >= max_steps]
    if late:
        reason = f"the training has training.max_steps = {max_steps}; allowed are steps before"
        yield Problem("growth.at", late, reason=reason)


def _part(reader: Reader, key: str, said: Any, kind: Any) -> Any:
    """Return the record that a word or a mapping with `_target_` means; None: reported."""
    ours, base = kind.PARTS[key]
    name = f"growth.{key}"
    if isinstance(said, str) and said in ours:
        return ours[said]()
    if not isinstance(said, Mapping):
        near = nearest(str(said), ours)
        reason = f"allowed is one of {', '.join(ours)}, or {{_target_: CLASS}} of your own"
        reader.problems.append(Problem(name, said, reason=reason, nearest=near))
        return None
    target = reader.ask(lambda: resolve(f"{name}.{TARGET}", said.get(TARGET), base=dotted(base)))
    if target is None:
        return None
    if not is_options(target):
        reason = "it is no record of options (see tritter.options.options)"
        reader.report(f"{name}.{TARGET}", said[TARGET], reason=reason)
        return None
    body = {k: v for k, v in said.items() if k != TARGET}
    return read_options(target, body, prefix=name, problems=reader.problems)
