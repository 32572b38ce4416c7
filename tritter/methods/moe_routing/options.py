"""Options and rules of the sections `moe_routing` and `adaptation`; does not import torch."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from tritter.checkpoints.location import teacher_problems
from tritter.core.expansions import target_model
from tritter.core.families import SIGMOID_ROUTERS, Model
from tritter.errors import Problem, show
from tritter.options import Count, RunRequest, options
from tritter.targets import values_of

_ROUTER_KEYS = ("router_epochs", "router_max_steps", "router_learning_rate", "encouragement")
_ADDED_EXPERTS_FILE = Path("state", "router.json")


@options
class RoutingOptions:
    """Weights of router terms in the training loss of a model with experts; 0 disables a term.

    Args:
        auxiliary_loss: of the load balancing loss (arXiv 2101.03961, eq. 4-6).
        z_loss: of the router z-loss (arXiv 2202.08906, eq. 5).
        bias_update_rate: step of the selection bias in loss-free balancing (arXiv 2408.15664), in
            units of probability; only sigmoid routers save it with the model.
        hold_old: of the divergence from the original routing of old data, see
            `RoutingObjective.hold`.
        capacity_factor: for the logged dropped fraction; no token is dropped.
    """

    auxiliary_loss: Annotated[float, Field(ge=0)] = 0.01
    z_loss: Annotated[float, Field(ge=0)] = 1e-3
    bias_update_rate: Annotated[float, Field(ge=0, lt=1)] = 0.0
    hold_old: Annotated[float, Field(ge=0)] = 0.0
    capacity_factor: Annotated[float, Field(gt=0)] = 1.25


@options
class AdaptationOptions:
    """The two training stages for appended experts: first the routers, then the experts."""

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

    def router_steps(self, num_sequences: int, batch_size: int) -> int:
        """Return the steps of the router stage on a number of sequences of the new domain."""
        steps = -(-self.router_epochs * num_sequences // batch_size)
        steps = min(steps, self.router_max_steps or steps)
        return 0 if self.router_update == "frozen" else steps

    def is_used(self, config: RunRequest) -> bool:
        """Return True if experts are appended, or were appended and are not open yet."""
        model = config.model
        return any(getattr(spec, "is_append", False) for spec in config.expansion) or (
            model.model_type == "hf" and Path(model.path, _ADDED_EXPERTS_FILE).is_file()
        )

    def start_problems(self, config: RunRequest, source: Model) -> Iterator[Problem]:
        """Yield keys of `moe_routing` and `adaptation` that would have no effect, or a wrong one.

        Args:
            config: the run.
            source: the starting model.
        """
        has_experts = source.family.has_experts
        target = target_model(source, config.expansion).family
        is_known = target.has_table or target.model_type in SIGMOID_ROUTERS
        if not (target.has_experts and is_known):
            reason = "the model is dense and has no routers; use expansion=moe"
            if target.has_experts:
                reason = f"Tritter does not know the routers of {target.model_type}; remove the key"
            yield from _without_effect("moe_routing", config.moe_routing, reason)
        elif weight := config.moe_routing.hold_old:
            key = "moe_routing.hold_old"
            if not has_experts:
                reason = "the starting model is dense and has no old routing to preserve; use 0"
                yield Problem(key, weight, reason=reason)
            if not config.text.old:
                yield Problem(key, weight, reason="requires data.old; or leave it at 0")
        for position, spec in enumerate(config.expansion):
            if (own_rules := getattr(spec, "problems", None)) is not None:
                yield from own_rules(config.expansion[:position], has_experts=has_experts)
            if (teacher := getattr(spec, "teacher", None)) is not None:
                yield from teacher_problems(teacher, source, key=f"expansion.{spec.name}.teacher")
        if self.is_used(config):
            yield from _adaptation_problems(config)
        else:
            reason = "no experts are being appended; use expansion=moe_add"
            yield from _without_effect("adaptation", self, reason)


def _without_effect(
    section: str, record: RoutingOptions | AdaptationOptions, reason: str
) -> Iterator[Problem]:
    for key, (value, default) in _changed(record).items():
        yield Problem(f"{section}.{key}", value, reason=f"{reason}, or leave it at {show(default)}")


def _changed(record: RoutingOptions | AdaptationOptions) -> dict[str, tuple[object, object]]:
    """Return the keys that differ from their defaults: key → (value, default)."""
    values, usual = values_of(record), values_of(type(record)())
    return {key: (value, usual[key]) for key, value in values.items() if value != usual[key]}


def _adaptation_problems(config: RunRequest) -> Iterator[Problem]:
    adaptation = config.adaptation
    reason = "adaptation.router_update = frozen skips the router stage; use fine_tune or "
    for key, (value, _) in _changed(adaptation).items():
        if key in _ROUTER_KEYS and adaptation.router_update == "frozen":
            yield Problem(f"adaptation.{key}", value, reason=f"{reason}retrain")
    grown = [s.name for s in config.expansion if s.expansion_type in ("depth", "width")]
    if adaptation.freeze_base and grown:
        reason = f"weights added by {' and '.join(grown)} would also be frozen; use "
        reason += "adaptation.freeze_base=false"
        yield Problem("adaptation.freeze_base", True, reason=reason)
    if adaptation.freeze_base and len(config.text.tasks) > 1:
        reason = "later tasks would train the whole model; use adaptation.freeze_base=false, or one"
        yield Problem("adaptation.freeze_base", True, reason=f"{reason} task")
    after, steps = adaptation.unfreeze_after, config.training.max_steps
    if after is None:
        return
    if not adaptation.freeze_base:
        reason = "has no effect with adaptation.freeze_base = false"
    elif after >= steps:
        reason = f"must be below training.max_steps = {steps}, or null for never"
    elif config.trainer.strategy != "auto":
        reason = "distributed training needs a fixed set of parameters; use "
        reason += "trainer=cpu or trainer=gpu"
    else:
        return
    yield Problem("adaptation.unfreeze_after", after, reason=reason)
