"""Rules between the methods, benchmarks and teachers of a run."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from tritter.checkpoint.usable import checkpoint_config, checkpoint_place
from tritter.config.folders import body_of, option_files
from tritter.config.schema import (
    AdaptationConfig,
    CheckpointModelConfig,
    MoeRoutingConfig,
    RunConfig,
)
from tritter.config.selection import weightless_methods
from tritter.data.benchmark_names import CODE, benchmark_names, code_problems
from tritter.data.options import DatasetsConfig
from tritter.errors import Problem, RequestError, nearest, show
from tritter.expansion import target_config
from tritter.families import Config, family_of

KEY = "evaluation.tasks"


def benchmark_problems(config: RunConfig) -> Iterator[Problem]:
    """Yield what is wrong with the benchmarks of a run, but for their files."""
    asked = config.evaluation
    try:
        names = benchmark_names(asked.tasks, key=KEY)
    except RequestError as error:
        yield from error.problems
        return
    yield from code_problems(names, asked.allow_code, key=KEY, allowing="evaluation.allow_code")
    if asked.tasks_path is not None and not Path(asked.tasks_path).is_dir():
        yield Problem("evaluation.tasks_path", asked.tasks_path, reason="there is no such folder")
    is_external = asked.code_sandbox == "external"
    if is_external and not asked.code_sandbox_command and set(names) & set(CODE):
        reason = "name the command that reads a program on its standard input"
        yield Problem("evaluation.code_sandbox_command", None, reason=reason)
    for domain in config.text.domains:
        if domain.name in names:
            reason = "a domain has that name already"
            yield Problem(KEY, domain.name, reason=reason)


def method_problems(config: RunConfig) -> Iterator[Problem]:
    """Yield which methods make what another makes too, or use weights that are frozen."""
    needs = [one.kind.needs(one.options) for one in config.forgetting]
    for what in ("prepares", "leaves"):
        counts = Counter(kind for each in needs for kind in getattr(each, what))
        if twice := [kind for kind, count in counts.items() if count > 1]:
            reason = f"more than one of them {what} {', '.join(twice)}; leave one out"
            yield Problem("forgetting", [one.name for one in config.forgetting], reason=reason)
    names = [one.name for one in config.forgetting if one.kind.uses_weights]
    reasons = []
    if config.trainer.strategy == "fsdp":
        reason = "they look at whole weights or gradients, and each process holds a part; with "
        reasons.append(f"{reason}whole weights in each, use trainer=ddp, else")
    if config.experts is not None:
        reasons.append("they hold weights of the base, which is frozen; with experts")
    for reason in reasons if names else ():
        allowed = " and ".join(["none", *weightless_methods()])
        yield Problem("forgetting", names, reason=f"{reason} allowed are {allowed}")
    mixing = [one.name for one, each in zip(config.forgetting, needs, strict=True) if each.mixes]
    if len(mixing) > 1:
        reason = f"{' and '.join(mixing)} both mix old text into the batches; choose one of them"
        yield Problem("forgetting", [one.name for one in config.forgetting], reason=reason)


def method_start_problems(config: RunConfig, source: Config) -> Iterator[Problem]:
    """Yield what can't be had of a model that the run starts from.

    Args:
        source: its config.json; of a base that is to be trained the vocabulary is not known yet.
    """
    is_known = isinstance(config.model, CheckpointModelConfig)
    for one in config.forgetting:
        place = one.kind.needs(one.options).teacher_place
        if place is not None:
            key = f"forgetting.{one.name}.teacher"
            yield from teacher_problems(place, source if is_known else None, key=key)
    if any(one.kind.needs(one.options).old_text for one in config.forgetting):
        data = config.data
        yield from config.text.kept.misfits(
            sequence_length=data.sequence_length, packing=data.packing
        )


_ROUTER_KEYS = ("router_epochs", "router_max_steps", "router_learning_rate", "encouragement")
_PLACE_OF_ADDED = Path("state", "router.json")


def expert_problems(config: RunConfig, source: Config) -> Iterator[Problem]:
    """Yield which keys of `moe_routing` and `adaptation` would have no effect, or a wrong one.

    Args:
        source: config.json of the model that the run starts from.
    """
    has_experts = family_of(source).has_experts
    if not family_of(target_config(source, config.expansion)).has_experts:
        reason = "the model is dense and has no routers; use expansion=moe"
        yield from _without_effect("moe_routing", config.moe_routing, reason)
    elif held := config.moe_routing.hold_old:
        key = "moe_routing.hold_old"
        if not has_experts:
            reason = "the model that the run starts from is dense, so there is no old routing to "
            yield Problem(key, held, reason=f"{reason}hold; allowed is 0")
        if not config.text.old:
            yield Problem(key, held, reason="it needs old text, data.old; or leave it at 0")
    for position, spec in enumerate(config.expansion):
        before = config.expansion[:position]
        if (own_rules := getattr(spec, "problems", None)) is not None:
            yield from own_rules(before, has_experts=has_experts)
        if (teacher := getattr(spec, "teacher", None)) is not None:
            yield from teacher_problems(teacher, source, key=f"expansion.{spec.name}.teacher")
    if appends_experts(config):
        yield from _adaptation_problems(config)
    else:
        reason = "no experts are being appended; use expansion=moe_add"
        yield from _without_effect("adaptation", config.adaptation, reason)


def _without_effect(
    section: str, record: MoeRoutingConfig | AdaptationConfig, reason: str
) -> Iterator[Problem]:
    for key, value, default in _changed(section, record):
        yield Problem(f"{section}.{key}", value, reason=f"{reason}, or leave it at {show(default)}")


def _changed(
    section: str, record: MoeRoutingConfig | AdaptationConfig
) -> Iterator[tuple[str, object, object]]:
    """Yield the keys that are not as the option `default` has them: key, value, default."""
    defaults = body_of(option_files()[section]["default"])
    for key, value in asdict(record).items():
        if value != defaults[key]:
            yield key, value, defaults[key]


def teacher_problems(teacher: str, source: Config | None, *, key: str) -> Iterator[Problem]:
    """Yield why a teacher can't be learned from, as far as its config.json says.

    Args:
        source: that of the model that learns; None where its vocabulary is not known yet.
    """
    try:
        config = checkpoint_config(checkpoint_place(teacher, key=key), key=key)
    except RequestError as error:
        yield from error.problems
        return
    if config is None or source is None:
        return
    if config["vocab_size"] != source["vocab_size"]:
        reason = (
            f"it has {config['vocab_size']} tokens, the model that the run starts from "
            f"{source['vocab_size']}; allowed is a teacher with the same tokenizer"
        )
        yield Problem(key, teacher, reason=reason)


def appends_experts(config: RunConfig) -> bool:
    """Return whether experts are appended, or were and are not open yet."""
    model = config.model
    return any(getattr(spec, "is_append", False) for spec in config.expansion) or (
        isinstance(model, CheckpointModelConfig) and Path(model.path, _PLACE_OF_ADDED).is_file()
    )


def _adaptation_problems(config: RunConfig) -> Iterator[Problem]:
    adaptation = config.adaptation
    reason = "with adaptation.router_update = frozen there is no router stage; use fine_tune or "
    for key, value, _ in _changed("adaptation", adaptation):
        if key in _ROUTER_KEYS and adaptation.router_update == "frozen":
            yield Problem(f"adaptation.{key}", value, reason=f"{reason}retrain")
    grown = [s.name for s in config.expansion if s.expansion_type in ("depth", "width")]
    if adaptation.freeze_base and grown:
        reason = f"what {' and '.join(grown)} added would be frozen as well; use "
        yield Problem(
            "adaptation.freeze_base", True, reason=f"{reason}adaptation.freeze_base=false"
        )
    after, steps = adaptation.unfreeze_after, config.training.max_steps
    if after is None:
        return
    if not adaptation.freeze_base:
        reason = "with adaptation.freeze_base = false nothing is frozen"
    elif after >= steps:
        reason = f"the training has training.max_steps = {steps}; allowed is less, or null for "
        reason += "never"
    elif config.trainer.strategy != "auto":
        reason = "processes that train together need the same parameters throughout; use "
        reason += "trainer=cpu or trainer=gpu"
    else:
        return
    yield Problem("adaptation.unfreeze_after", after, reason=reason)


def weight_problems(config: RunConfig) -> Iterator[Problem]:
    """Yield the domains that are none of the new ones, or that a task is about alone."""
    data = config.data
    if not isinstance(data, DatasetsConfig) or not data.weights:
        return
    mixed = [name for task in config.text.tasks if len(task) > 1 for name in task]
    new = [name for task in config.text.tasks for name in task]
    for name, weight in data.weights.items():
        key = f"data.weights.{name}"
        if name not in new:
            known = tuple(dict.fromkeys(new))
            reason = f"there is no such new domain; there are {', '.join(known) or 'none'}"
            yield Problem(key, weight, reason=reason, nearest=nearest(name, known))
        elif name not in mixed:
            reason = "its task has no other domain, so that nothing is weighed; leave it out"
            yield Problem(key, weight, reason=reason)
