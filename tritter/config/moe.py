"""What is asked of experts, held against the model that a run starts from."""

from dataclasses import fields
from pathlib import Path

from tritter.config.checkpoint_folder import checkpoint_config, checkpoint_place
from tritter.config.schema import (
    AdaptationConfig,
    CheckpointModelConfig,
    MoeRoutingConfig,
    RunConfig,
)
from tritter.errors import Problem, RequestError, show
from tritter.expansion import MoeAdd
from tritter.families import Config, family_of

_ROUTER_KEYS = ("router_epochs", "router_max_steps", "router_learning_rate", "encouragement")
_PLACE_OF_ADDED = Path("state", "router.json")


def expert_problems(config: RunConfig, source: Config) -> list[Problem]:
    """Return which keys of `moe_routing` and `adaptation` would have no effect, or a wrong one.

    Args:
        source: config.json of the model that the run starts from.
    """
    has_experts = family_of(source).has_experts
    problems = []
    if not has_experts and not any(spec.name == "moe" for spec in config.expansion):
        problems += _without_effect(
            "moe_routing",
            config.moe_routing,
            "the model is dense and has no routers; use expansion=moe",
        )
    elif config.moe_routing.hold_old:
        problems += _hold_problems(config, has_experts=has_experts)
    problems += _init_problems(config, source, has_experts=has_experts)
    if appends_experts(config):
        return problems + _adaptation_problems(config)
    reason = "no experts are being appended; use expansion=moe_add"
    return problems + _without_effect("adaptation", config.adaptation, reason)


def _without_effect(
    section: str, record: MoeRoutingConfig | AdaptationConfig, reason: str
) -> list[Problem]:
    default = type(record)()
    return [
        Problem(
            f"{section}.{field.name}",
            getattr(record, field.name),
            reason=f"{reason}, or leave it at {show(getattr(default, field.name))}",
        )
        for field in fields(record)
        if getattr(record, field.name) != getattr(default, field.name)
    ]


def _hold_problems(config: RunConfig, *, has_experts: bool) -> list[Problem]:
    reasons = []
    if not has_experts:
        reasons.append(
            "the model that the run starts from is dense, so there is no old routing to hold; "
            "allowed is 0"
        )
    if not config.text.old:
        reasons.append("it needs old text, data.old; or leave it at 0")
    held = config.moe_routing.hold_old
    return [Problem("moe_routing.hold_old", held, reason=reason) for reason in reasons]


def _init_problems(config: RunConfig, source: Config, *, has_experts: bool) -> list[Problem]:
    """Return why new experts can't begin as was asked for."""
    problems = []
    for position, spec in enumerate(config.expansion):
        if not isinstance(spec, MoeAdd):
            continue
        if spec.is_chosen_by_data and not has_experts:
            reason = (
                "the experts that moe makes of one FFN are alike; use clone, or add experts to a "
                "model that has some"
            )
            problems.append(Problem("expansion.moe_add.init", "best", reason=reason))
        before = [s.name for s in config.expansion[:position] if s.expansion_type == "depth"]
        if spec.is_chosen_by_data and before:
            reason = (
                "the experts are chosen layer by layer in the model that the run starts from; let "
                f"moe_add come before {' and '.join(before)}"
            )
            problems.append(Problem("expansion.moe_add.init", "best", reason=reason))
        if spec.teacher is not None:
            problems += _teacher_problems(spec.teacher, source)
    return problems


def _teacher_problems(teacher: str, source: Config) -> list[Problem]:
    key = "expansion.moe_add.teacher"
    try:
        config = checkpoint_config(checkpoint_place(teacher, key=key), key=key)
    except RequestError as error:
        return list(error.problems)
    if config is None or config["vocab_size"] == source["vocab_size"]:
        return []
    reason = (
        f"it has {config['vocab_size']} tokens, the model that the run starts from "
        f"{source['vocab_size']}; allowed is a teacher with the same tokenizer"
    )
    return [Problem(key, teacher, reason=reason)]


def appends_experts(config: RunConfig) -> bool:
    """Return whether experts are appended, or were and are not open yet."""
    if any(getattr(spec, "is_append", False) for spec in config.expansion):
        return True
    model = config.model
    return isinstance(model, CheckpointModelConfig) and (
        Path(model.path, _PLACE_OF_ADDED).is_file()
    )


def _adaptation_problems(config: RunConfig) -> list[Problem]:
    adaptation, default, problems = config.adaptation, AdaptationConfig(), []
    if adaptation.router_update == "frozen":
        problems += [
            Problem(
                f"adaptation.{key}",
                getattr(adaptation, key),
                reason="with adaptation.router_update = frozen there is no router stage; use "
                "fine_tune or retrain",
            )
            for key in _ROUTER_KEYS
            if getattr(adaptation, key) != getattr(default, key)
        ]
    grown = [s.name for s in config.expansion if s.expansion_type in ("depth", "width")]
    if adaptation.freeze_base and grown:
        reason = (
            f"what {' and '.join(grown)} added would be frozen as well; use "
            "adaptation.freeze_base=false"
        )
        problems.append(Problem("adaptation.freeze_base", True, reason=reason))
    return problems + _unfreezing_problems(config)


def _unfreezing_problems(config: RunConfig) -> list[Problem]:
    after, steps = config.adaptation.unfreeze_after, config.training.max_steps
    if after is None:
        return []
    reason = None
    if not config.adaptation.freeze_base:
        reason = "with adaptation.freeze_base = false nothing is frozen"
    elif after >= steps:
        reason = (
            f"the training has training.max_steps = {steps}; allowed is less, or null for never"
        )
    elif config.trainer.strategy == "ddp":
        reason = (
            "processes that train together need the same parameters throughout; use trainer=cpu "
            "or trainer=gpu"
        )
    return [Problem("adaptation.unfreeze_after", after, reason=reason)] if reason else []
