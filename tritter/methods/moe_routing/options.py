"""The sections `moe_routing` and `adaptation` of a run: their records and their rules; no torch."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from tritter.checkpoints.location import teacher_problems
from tritter.core.expansions import target_config
from tritter.core.families import Config, family_of
from tritter.errors import Problem, show
from tritter.options import Count, RunRequest, options
from tritter.targets import values_of


@options
class RoutingOptions:
    """What a training asks of the routers of a model with experts: weights of terms of its loss.

    Zero leaves a term out.

    Args:
        auxiliary_loss: of the load balancing loss (arXiv 2101.03961, eq. 4-6).
        z_loss: of the router z-loss (arXiv 2202.08906, eq. 5).
        bias_update_rate: step of the selection bias of balancing without a loss (arXiv
            2408.15664), in probability; the bias is gone when the model is saved.
        hold_old: of the divergence from the old routing of old text, which `OldRouting` holds.
        capacity_factor: of the dropped fraction that is logged; nothing is dropped.
    """

    auxiliary_loss: Annotated[float, Field(ge=0)] = 0.01
    z_loss: Annotated[float, Field(ge=0)] = 1e-3
    bias_update_rate: Annotated[float, Field(ge=0, lt=1)] = 0.0
    hold_old: Annotated[float, Field(ge=0)] = 0.0
    capacity_factor: Annotated[float, Field(gt=0)] = 1.25


@options
class AdaptationOptions:
    """The two trainings that open appended experts: of the routers, then of the experts."""

    router_update: Literal["fine_tune", "retrain", "frozen"] = "fine_tune"
    router_epochs: Count = 3
    router_max_steps: Count | None = 100
    router_learning_rate: Annotated[float, Field(gt=0)] = 3e-3
    encouragement: Annotated[float, Field(ge=0)] = 0.1
    anneal_steps: Count | None = None
    freeze_base: bool = True
    unfreeze_after: Count | None = None
    distill_steps: Count = 100
    distill_temperature: Annotated[float, Field(gt=0)] = 2.0


_ROUTER_KEYS = ("router_epochs", "router_max_steps", "router_learning_rate", "encouragement")
_PLACE_OF_ADDED = Path("state", "router.json")


def expert_problems(config: RunRequest, source: Config) -> Iterator[Problem]:
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
            yield Problem(key, held, reason=f"{reason}hold; must be 0")
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
    section: str, record: RoutingOptions | AdaptationOptions, reason: str
) -> Iterator[Problem]:
    for key, (value, default) in _changed(record).items():
        yield Problem(f"{section}.{key}", value, reason=f"{reason}, or leave it at {show(default)}")


def _changed(record: RoutingOptions | AdaptationOptions) -> dict[str, tuple[object, object]]:
    """Return the keys that are not at their defaults: key → value, default."""
    values, usual = values_of(record), values_of(type(record)())
    return {key: (value, usual[key]) for key, value in values.items() if value != usual[key]}


def appends_experts(config: RunRequest) -> bool:
    """Return whether experts are appended, or were and are not open yet."""
    model = config.model
    return any(getattr(spec, "is_append", False) for spec in config.expansion) or (
        model.model_type == "hf" and Path(model.path, _PLACE_OF_ADDED).is_file()
    )


def _adaptation_problems(config: RunRequest) -> Iterator[Problem]:
    adaptation = config.adaptation
    reason = "with adaptation.router_update = frozen there is no router stage; use fine_tune or "
    for key, (value, _) in _changed(adaptation).items():
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
