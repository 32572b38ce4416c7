"""What is asked of experts, held against the model that a run starts from."""

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
from tritter.errors import Problem, RequestError, show
from tritter.expansion import MoeAdd
from tritter.families import Config, family_of

_ROUTER_KEYS = ("router_epochs", "router_max_steps", "router_learning_rate", "encouragement")
_PLACE_OF_ADDED = Path("state", "router.json")


def expert_problems(config: RunConfig, source: Config) -> Iterator[Problem]:
    """Yield which keys of `moe_routing` and `adaptation` would have no effect, or a wrong one.

    Args:
        source: config.json of the model that the run starts from.
    """
    has_experts = family_of(source).has_experts
    if not has_experts and not any(spec.name == "moe" for spec in config.expansion):
        reason = "the model is dense and has no routers; use expansion=moe"
        yield from _without_effect("moe_routing", config.moe_routing, reason)
    elif config.moe_routing.hold_old:
        yield from _hold_problems(config, has_experts=has_experts)
    yield from _init_problems(config, source, has_experts=has_experts)
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


def _hold_problems(config: RunConfig, *, has_experts: bool) -> Iterator[Problem]:
    key, held = "moe_routing.hold_old", config.moe_routing.hold_old
    if not has_experts:
        reason = "the model that the run starts from is dense, so there is no old routing to hold; "
        yield Problem(key, held, reason=f"{reason}allowed is 0")
    if not config.text.old:
        yield Problem(key, held, reason="it needs old text, data.old; or leave it at 0")


def _init_problems(config: RunConfig, source: Config, *, has_experts: bool) -> Iterator[Problem]:
    """Yield why new experts can't begin as was asked for."""
    key = "expansion.moe_add.init"
    for position, spec in enumerate(config.expansion):
        if not isinstance(spec, MoeAdd):
            continue
        if spec.is_chosen_by_data and not has_experts:
            reason = (
                "the experts that moe makes of one FFN are alike; use clone, or add experts to a "
                "model that has some"
            )
            yield Problem(key, "best", reason=reason)
        before = [s.name for s in config.expansion[:position] if s.expansion_type == "depth"]
        if spec.is_chosen_by_data and before:
            reason = (
                "the experts are chosen layer by layer in the model that the run starts from; let "
                f"moe_add come before {' and '.join(before)}"
            )
            yield Problem(key, "best", reason=reason)
        if spec.teacher is not None:
            yield from teacher_problems(spec.teacher, source, key="expansion.moe_add.teacher")


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
    if adaptation.unfreeze_after is not None and (reason := _why_not_unfrozen(config)):
        yield Problem("adaptation.unfreeze_after", adaptation.unfreeze_after, reason=reason)


def _why_not_unfrozen(config: RunConfig) -> str:
    after, steps = config.adaptation.unfreeze_after, config.training.max_steps
    if not config.adaptation.freeze_base:
        return "with adaptation.freeze_base = false nothing is frozen"
    if after is not None and after >= steps:
        return f"the training has training.max_steps = {steps}; allowed is less, or null for never"
    if config.trainer.strategy != "auto":
        return (
            "processes that train together need the same parameters throughout; use trainer=cpu "
            "or trainer=gpu"
        )
    return ""
