"""`experts`: one class with its keys, and what of a run does not go together with it."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tritter.checkpoint.expert_files import ExpertFiles, refuse_experts
from tritter.config.folders import body_of, option_files
from tritter.config.rules import freezing
from tritter.config.schema import ONE_OF, ExpertsConfig, GrowthConfig, RunConfig
from tritter.config.selection import Reader
from tritter.errors import Problem, RequestError, TritterError, nearest
from tritter.expansion import target_config
from tritter.families import Config, family_of
from tritter.options import is_options, read_options
from tritter.targets import TARGET, dotted, resolve

_EXPERTS_KIND = "tritter.experts.method.Experts"
_METHODS = ("replay",)  # of forgetting, which look at no parameter


def experts_class(raw: Mapping[str, Any]) -> type | None:
    """Return the class that `experts` names; None where the whole model is trained.

    Raises:
        RequestError: it is none, or keys are set of what was not chosen.
    """
    return chosen_class("experts", raw, base=_EXPERTS_KIND, nothing="there are no adapters")


def read_experts(
    reader: Reader, raw: Mapping[str, Any], classes: Mapping[str, Any]
) -> ExpertsConfig | None:
    """Return the experts of a run, or None when there are none, or there were problems."""
    kind = classes.get("experts")
    if kind is None:
        return None
    values = {key: value for key, value in raw.items() if key != TARGET}
    options = reader.read(kind.Options, values, prefix="experts")
    return None if options is None else ExpertsConfig(kind=kind, options=options)


def experts_problems(config: RunConfig) -> Iterator[Problem]:
    """Yield what of a run does not go together with experts."""
    if config.experts is None:
        return
    if config.pipeline.target_params is not None:
        reason = "a run that grows to a size trains all of it; leave it out, or experts=none"
        yield Problem("pipeline.target_params", config.pipeline.target_params, reason=reason)
    if config.growth is not None:
        reason = "neurons grow in a base that is trained, and under experts it is frozen"
        yield Problem("growth", config.growth.kind.__name__, reason=reason)
    names = [one.name for one in config.forgetting if one.name not in _METHODS]
    if names:
        reason = (
            "they hold weights of the base, which is frozen; with experts allowed are none and "
            f"{', '.join(_METHODS)}"
        )
        yield Problem("forgetting", names, reason=reason)
    yield from adam_problems(config, doing="experts come and go with Adam's two moments")
    if config.optimizer.carry:
        reason = "moments of the base are carried, which is frozen; those of experts begin anew"
        yield Problem("optimizer.carry", True, reason=reason)
    if config.experts.is_dynamic:
        yield from _dynamic_problems(config)


def experts_start_problems(
    config: RunConfig, source: Config, folder: Path | None
) -> Iterator[Problem]:
    """Yield why experts can't be put on, or gone on with, in what a run starts from.

    Args:
        source: its config.json.
        folder: the checkpoint, if it is at hand.

    Raises:
        RequestError: it has experts, and the run would train the whole model; or they, or its
            lineage, are damaged.
    """
    try:
        files = None if folder is None or not folder.is_dir() else ExpertFiles.read(folder)
    except TritterError as error:
        raise RequestError(Problem("model.path", folder, reason=str(error).rstrip("."))) from error
    asked = config.experts
    if asked is None:
        if files is not None:
            assert folder is not None
            refuse_experts(folder, doing="a training with experts=none", key="model.path")
        return
    family, wanted = family_of(source), asked.options.base_bits
    if wanted is not None and any(tensor.is_transposed for tensor in family.tensors):
        reason = f"the matrices of {family.model_type} lie transposed, and none would be quantised"
        yield Problem("experts.base_bits", wanted, reason=reason, nearest="null")
    if files is None:
        if asked.is_dynamic and asked.options.boundaries == "detected" and not config.text.old:
            reason = (
                "what is new is told by what the base knows, of which text is looked at, and "
                "never trained on; name some, or say experts.boundaries=told"
            )
            yield Problem("data.old", {}, reason=reason)
        return
    names, first = files.head.names, "expert_0" if asked.is_dynamic else "lora"
    if names[0] != first:
        reason = f"the checkpoint has the experts {', '.join(names)}, none of which is its {first}"
        yield Problem("experts", asked.name, reason=reason)
    bits = files.head.base_bits
    if asked.options.base_bits != bits:
        held = "as it stands in the folder" if bits is None else f"in {bits} bits"
        reason = f"the experts of the checkpoint were trained on a base {held}"
        value = asked.options.base_bits
        nearest = "null" if bits is None else str(bits)
        yield Problem("experts.base_bits", value, reason=reason, nearest=nearest)
    router = getattr(asked.options, "router", "evidence")
    if router != files.head.router:
        reason = f"the experts of the checkpoint are mixed by {files.head.router}"
        yield Problem("experts.router", router, reason=reason, nearest=files.head.router)


def _dynamic_problems(config: RunConfig) -> Iterator[Problem]:
    assert config.experts is not None
    asked = config.experts.options
    if asked.max_rank < asked.rank:
        reason = f"below experts.rank = {asked.rank}, that experts begin with"
        yield Problem("experts.max_rank", asked.max_rank, reason=reason)
    if asked.router == "evidence" and asked.shared_router:
        reason = "experts.router=evidence has no learned router; allowed with learned and both"
        yield Problem("experts.shared_router", True, reason=reason)
    config.experts.kind.check(asked)
    batch, least = config.data.batch_size, 2
    if asked.boundaries == "detected" and batch < least:
        reason = f"novelty is told by the spread of a batch; allowed is at least {least}"
        yield Problem("data.batch_size", batch, reason=reason)
    steps = config.training.max_steps
    accumulated = int(config.trainer_arguments.get("accumulate_grad_batches", 1))
    if asked.boundaries == "detected" and asked.min_samples > steps * accumulated * batch:
        reason = (
            f"a training of {steps} steps sees {steps * accumulated * batch:,} sequences, too few "
            "for any decision"
        )
        yield Problem("experts.min_samples", asked.min_samples, reason=reason)
    if asked.when_full == "merge" and asked.boundaries == "told":
        reason = "similarity is that of what novelty looks at; with boundaries=told use evict"
        yield Problem("experts.when_full", "merge", reason=reason)


_GROWTH_KIND = "tritter.growth.method.NeuronGrowth"


def growth_class(raw: Mapping[str, Any]) -> type | None:
    """Return the class that `growth` names; None where nothing grows.

    Raises:
        RequestError: it is none, or keys are set of what was not chosen.
    """
    return chosen_class("growth", raw, base=_GROWTH_KIND, nothing="nothing grows")


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


_ADAMS = ("Adam", "AdamW", "Adam8bit", "AdamW8bit", "PagedAdam8bit", "PagedAdamW8bit")


def chosen_class(group: str, raw: Mapping[str, Any], *, base: str, nothing: str) -> type | None:
    """Return the class that a group names; None where it is `none`.

    Args:
        base: dotted name of what it has to be a subclass of.
        nothing: what happens with `none`, for the message about a key of it.

    Raises:
        RequestError: it is none, or keys are set of what was not chosen.
    """
    if not raw:
        return None
    options = [name for name in option_files().get(group, {}) if name != "none"]
    if TARGET not in raw:
        key, value = next(iter(raw.items()))
        reason = f"{nothing} with {group}=none, which has no keys; choose {group}={options[0]}"
        raise RequestError(Problem(f"{group}.{key}", value, reason=reason))
    kind: type = resolve(f"{group}.{TARGET}", raw[TARGET], base=base)
    if not is_options(kind.Options):  # type: ignore[attr-defined]
        reason = "its Options are no record of options (see tritter.options.options)"
        raise RequestError(Problem(f"{group}.{TARGET}", raw[TARGET], reason=reason))
    return kind


def chosen_keys() -> list[str]:
    """Return the dotted keys of such groups, as their options state them."""
    keys = (
        f"{group}.{key}"
        for group in ONE_OF
        for path in option_files().get(group, {}).values()
        for key in body_of(path)
        if key != TARGET
    )
    return list(dict.fromkeys(keys))


def adam_problems(config: RunConfig, *, doing: str) -> Iterator[Problem]:
    """Yield that the optimizer is no Adam whose moments can follow a change of the model.

    Args:
        doing: what needs it.
    """
    name = config.optimizer.target.rpartition(".")[2]
    if name not in _ADAMS or config.optimizer.arguments.get("amsgrad"):
        reason = (
            f"{doing}, and {name} has other state; allowed are {', '.join(_ADAMS)} without amsgrad"
        )
        yield Problem("optimizer", name, reason=reason)
