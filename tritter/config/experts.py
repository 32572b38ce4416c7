"""What is asked of experts, held against the model that a run starts from."""

from dataclasses import fields
from pathlib import Path

from tritter.config.checkpoint_folder import checkpoint_config, checkpoint_place
from tritter.config.problems import show
from tritter.config.schema import (
    AdaptationConfig,
    CheckpointModelConfig,
    RoutingConfig,
    RunConfig,
)
from tritter.errors import RequestError
from tritter.expansion import MoeAdd
from tritter.families import Config, family_of

_ROUTER_KEYS = ("router_epochs", "router_max_steps", "router_learning_rate", "encouragement")
_PLACE_OF_ADDED = Path("state", "router.json")


def expert_problems(config: RunConfig, source: Config) -> list[str]:
    """Return which keys of `routing` and `adaptation` would have no effect, or a wrong one.

    Args:
        source: config.json of the model that the run starts from.
    """
    has_experts = family_of(source).has_experts
    problems = []
    if not has_experts and not any(spec.name == "moe" for spec in config.expansion):
        problems += _without_effect(
            "routing", config.routing, "the model is dense and has no routers; use expansion=moe"
        )
    elif config.routing.hold_old:
        problems += _hold_problems(config, has_experts=has_experts)
    problems += _init_problems(config, source, has_experts=has_experts)
    if _appends(config):
        return problems + _adaptation_problems(config)
    reason = "no experts are being appended; use expansion=moe_add"
    return problems + _without_effect("adaptation", config.adaptation, reason)


def _without_effect(
    section: str, record: RoutingConfig | AdaptationConfig, reason: str
) -> list[str]:
    default = type(record)()
    return [
        f"{section}.{field.name} = {show(getattr(record, field.name))}: {reason}, or leave it at "
        f"{show(getattr(default, field.name))}."
        for field in fields(record)
        if getattr(record, field.name) != getattr(default, field.name)
    ]


def _hold_problems(config: RunConfig, *, has_experts: bool) -> list[str]:
    key = f"routing.hold_old = {config.routing.hold_old}"
    problems = []
    if not has_experts:
        problems.append(
            f"{key}: the model that the run starts from is dense, so there is no old routing to "
            "hold; allowed is 0."
        )
    if not config.text.old:
        problems.append(f"{key}: it needs old text, data.old; or leave it at 0.")
    return problems


def _init_problems(config: RunConfig, source: Config, *, has_experts: bool) -> list[str]:
    """Return why new experts can't begin as was asked for."""
    problems = []
    for position, spec in enumerate(config.expansion):
        if not isinstance(spec, MoeAdd):
            continue
        if spec.is_chosen_by_data and not has_experts:
            problems.append(
                "expansion.moe_add.init = best: the experts that moe makes of one FFN are alike; "
                "use clone, or add experts to a model that has some."
            )
        before = [s.name for s in config.expansion[:position] if s.expansion_type == "depth"]
        if spec.is_chosen_by_data and before:
            problems.append(
                "expansion.moe_add.init = best: the experts are chosen layer by layer in the model "
                f"that the run starts from; let moe_add come before {' and '.join(before)}."
            )
        if spec.teacher is not None:
            problems += _teacher_problems(spec.teacher, source)
    return problems


def _teacher_problems(teacher: str, source: Config) -> list[str]:
    key = "expansion.moe_add.teacher"
    try:
        config = checkpoint_config(checkpoint_place(teacher, key=key), key=key)
    except RequestError as error:
        return [str(error)]
    if config is None or config["vocab_size"] == source["vocab_size"]:
        return []
    return [
        f"{key} = {teacher}: it has {config['vocab_size']} tokens, the model that the run starts "
        f"from {source['vocab_size']}; allowed is a teacher with the same tokenizer."
    ]


def _appends(config: RunConfig) -> bool:
    """Return whether experts are appended, or were and are not open yet."""
    if any(getattr(spec, "is_append", False) for spec in config.expansion):
        return True
    model = config.model
    return isinstance(model, CheckpointModelConfig) and (
        Path(model.path, _PLACE_OF_ADDED).is_file()
    )


def _adaptation_problems(config: RunConfig) -> list[str]:
    adaptation, default, problems = config.adaptation, AdaptationConfig(), []
    if adaptation.router_update == "frozen":
        problems += [
            f"adaptation.{key} = {show(getattr(adaptation, key))}: with "
            "adaptation.router_update = frozen there is no router stage; use fine_tune or retrain."
            for key in _ROUTER_KEYS
            if getattr(adaptation, key) != getattr(default, key)
        ]
    grown = [s.name for s in config.expansion if s.expansion_type in ("depth", "width")]
    if adaptation.freeze_base and grown:
        problems.append(
            f"adaptation.freeze_base = true: what {' and '.join(grown)} added would be frozen as "
            "well; use adaptation.freeze_base=false."
        )
    return problems + _unfreezing_problems(config)


def _unfreezing_problems(config: RunConfig) -> list[str]:
    after, steps = config.adaptation.unfreeze_after, config.training.max_steps
    if after is None:
        return []
    key = f"adaptation.unfreeze_after = {after}"
    if not config.adaptation.freeze_base:
        return [f"{key}: with adaptation.freeze_base = false nothing is frozen."]
    if after >= steps:
        return [
            f"{key}: the training has training.max_steps = {steps}; allowed is less, or null for "
            "never."
        ]
    if config.trainer.strategy == "ddp":
        return [
            f"{key}: processes that train together need the same parameters throughout; use "
            "trainer=cpu or trainer=gpu."
        ]
    return []
