"""What of a config determines the result: two runs with one fingerprint are the same run."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from tritter.config.components import WITHOUT_EFFECT as NO_EFFECT
from tritter.config.schema import SECTIONS, RunConfig
from tritter.data.skills import PREFIX
from tritter.errors import show
from tritter.options import leaves
from tritter.targets import Component, identity, imported

# What may differ between the parts of one run: where it is, who watches, and how.
_WITHOUT_EFFECT = {
    # The steps that follow from it are what is trained
    "pretraining": ("max_tokens",),
    "training": ("max_tokens",),
    "pipeline": ("keep_stages",),
    "trainer": (
        *("devices", "strategy", "progress", "save_every_n_steps", "check_memory"),
        "activation_checkpointing",  # the same bits
    ),
}
_OF_BENCHMARKS = {
    *("tasks", "tasks_path", "task_limit"),
    *("allow_code", "code_sandbox", "code_sandbox_command"),
}
_ABSENT = "(absent)"


def fingerprint(config: RunConfig) -> dict[str, Any]:
    """Return, as plain JSON values, everything of a config that determines the result.

    `resume`, `cache_dir`, `logger` and, of `trainer`, `devices`, `strategy`, `progress`,
    `save_every_n_steps`, `check_memory`, `activation_checkpointing` and arguments that only watch
    are left out. The methods of an ordered group stand beside the list of their names; of a class
    from outside (a source, method, callback or optimizer) also its dotted name and the SHA-256 of
    its file. Of ours the version of Tritter tells, or every edit of a comment would keep runs from
    going on.
    """
    result: dict[str, Any] = {"seed": config.seed, "control": config.control}
    for section in SECTIONS:
        without = _WITHOUT_EFFECT.get(section, ())
        if section == "evaluation" and not _asks_questions(config):
            without = ("task_questions",)
        values = asdict(getattr(config, section))
        result[section] = {key: values[key] for key in values if key not in without}
    if not config.evaluation.tasks:
        result["evaluation"] = {
            key: value for key, value in result["evaluation"].items() if key not in _OF_BENCHMARKS
        }
    if config.gate.ladder is not None:
        result["gate"]["rungs"] = [_attempt(rung) for rung in config.rungs]
    result["data"] |= identity(type(config.data))
    result["trainer"] |= effective_arguments(config)
    result["optimizer"] = optimizer_record(config)
    if config.callbacks:
        result["callbacks"] = {one.name: one.plain() for one in config.callbacks}
    if config.growth is not None:
        result["growth"] = config.growth.plain()
    if config.experts is not None:
        result["experts"] = {"name": config.experts.name, **config.experts.plain()}
    return result | _methods(config)


def _attempt(config: RunConfig) -> dict[str, Any]:
    """Return what an attempt has of its own, as the fingerprint has that of the first."""
    training = asdict(config.training)
    without = _WITHOUT_EFFECT["training"]
    kept = {key: training[key] for key in training if key not in without}
    return {"training": kept, **_methods(config)}


def _methods(config: RunConfig) -> dict[str, Any]:
    expansion = [Component(name=s.name, kind=type(s), options=s) for s in config.expansion]
    result = {}
    for group, chosen in (("expansion", expansion), ("forgetting", config.forgetting)):
        bodies = {one.name: one.plain() for one in chosen}
        result[group] = {"methods": [*bodies], **bodies}
    return result


def _asks_questions(config: RunConfig) -> bool:
    paths = (path for domain in config.text.domains for path in domain.paths)
    return any(path.startswith(PREFIX) for path in paths)


def effective_arguments(config: RunConfig) -> dict[str, Any]:
    """Return the further arguments of the Trainer that determine what is trained."""
    arguments = config.trainer_arguments
    return {name: arguments[name] for name in arguments if name not in NO_EFFECT}


def optimizer_record(config: RunConfig) -> dict[str, Any]:
    """Return the optimizer's class and all its keys side by side."""
    optimizer = config.optimizer
    return {
        "target": optimizer.target,
        "weight_decay": optimizer.weight_decay,
        "carry": optimizer.carry,
        **optimizer.arguments,
        **identity(imported(optimizer.target)),
    }


def changed_keys(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return the dotted keys whose values differ between two fingerprints."""
    return list(_changes(old, new))


def describe_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return one line `key: old → new` for each changed key."""
    return [f"{key}: {show(a)} → {show(b)}" for key, (a, b) in _changes(old, new).items()]


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    before, after = leaves(old), leaves(new)
    both = {key: (before.get(key, _ABSENT), after.get(key, _ABSENT)) for key in before | after}
    return {key: (a, b) for key, (a, b) in both.items() if a != b}
